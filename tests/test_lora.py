"""LoRA: changes nothing before it learns, computes peft's formula, learns alone, is saved alone, and merges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tcjax.assemble import assemble, build
from tcjax.compressors import matryoshka_query
from tcjax.config import LoraConfig, MeshConfig, TrainConfig
from tcjax.interop import names
from tcjax.interop.names import flatten
from tcjax.job import at
from tcjax.llms.decoder import Decoder
from tcjax.nn import lora
from tcjax.sharding import make_mesh, place, place_batch
from tcjax.train.optimiser import make_optimiser
from tcjax.train.state import init, num_parameters, split
from tcjax.train.step import jit_step, make_step
from tests.decoder_twins import prompt, theirs, twin
from tests.tiny import IDENTITY, LLM, VLM, a_run, batch_at, go, losses

LORA = LoraConfig(rank=3, alpha=6.0)
BOTH = ("compressor", "lora")
PUBLISHED = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"} | {
    name: f"{name}_proj" for name in ("gate", "up", "down")
}


def a_model(config: LoraConfig = LORA):
    return build(VLM, lora=config)


def planted_updates(llm: Decoder, seed: int = 0) -> dict[str, np.ndarray]:
    """Every leaf of `llm`, its updates drawn anew so that neither factor is 0."""
    rng = np.random.default_rng(seed)
    leaves = flatten(llm)
    return {
        path: 0.3 * rng.normal(size=leaf.shape).astype(np.float32) if lora.is_lora(tuple(path.split("/"))) else leaf
        for path, leaf in leaves.items()
    }


def test_a_fresh_update_changes_no_bit():
    batch = batch_at(0)
    run = nnx.jit(lambda model: model.llm.logits(model.llm(*model.embed(batch))))
    np.testing.assert_array_equal(run(VLM.build(nnx.Rngs(0))), run(a_model()))


def test_updates_compute_the_same_in_graph_and_tree_mode():
    llm = a_model().llm
    names.assign(llm, planted_updates(llm))
    tokens_BS = np.arange(12).reshape(2, 6)
    expected_BSD = llm(llm.embed(tokens_BS))
    assert np.abs(expected_BSD - VLM.build(nnx.Rngs(0)).llm(llm.embed(tokens_BS))).max() > 1e-2
    for graph in (True, False):
        graphdef, state = nnx.split(llm, graph=graph)
        run = jax.jit(lambda state, g=graphdef: nnx.merge(g, state)(llm.embed(tokens_BS)))
        np.testing.assert_allclose(run(state), expected_BSD, atol=1e-5)


def test_the_model_is_the_one_that_it_would_be_without(tmp_path):
    plain, _ = assemble(VLM, root=tmp_path)
    updated, identity = assemble(VLM, root=tmp_path, lora=LORA)
    mine = {path: leaf for path, leaf in flatten(updated).items() if "/lora/" not in path}
    jax.tree.map(np.testing.assert_array_equal, mine, flatten(plain))
    assert not any("lora" in fact for fact in identity)


def test_first_values_are_pefts():
    """A uniform in +-1/sqrt(in), as kaiming_uniform_(a=sqrt 5) draws it; B zero; another seed draws another A."""
    model = build(VLM, lora=dataclasses.replace(LORA, rank=64))
    for name, layer in lora.linears(model.llm.blocks):
        a, b = np.asarray(layer.lora.a[...]), np.asarray(layer.lora.b[...])
        bound = layer.in_features**-0.5
        assert a.shape == (LLM.layers, layer.in_features, 64) and b.shape == (LLM.layers, 64, layer.out_features), name
        assert 0.9 * bound < np.abs(a).max() <= bound and not b.any()
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    again, other = (build(VLM, seed, LORA).llm.blocks.gate.lora.a[...] for seed in (0, 1))
    np.testing.assert_array_equal(again, a_model().llm.blocks.gate.lora.a[...])
    assert np.abs(other - again).max() > 1e-3


class PeftLinear(torch.nn.Module):
    """peft's LoraLayer by hand: result + lora_B(lora_A(x)) * alpha / r."""

    def __init__(self, base: torch.nn.Linear, a: np.ndarray, b: np.ndarray, scaling: float):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.lora_A = torch.nn.Linear(*a.shape, bias=False)
        self.lora_B = torch.nn.Linear(*b.shape, bias=False)
        self.lora_A.weight.data, self.lora_B.weight.data = torch.tensor(a.T), torch.tensor(b.T)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling


@pytest.mark.parametrize("targets", [LORA.targets, ("query", "value")], ids=["all", "query and value"])
def test_the_forward_pass_is_pefts(targets, tmp_path):
    found = twin("qwen2", tmp_path)
    llm, config = found.llm, LoraConfig(rank=3, alpha=6.0, targets=targets)
    lora.attach(llm.blocks, (found.cfg.layers,), config, nnx.Rngs(0))
    leaves = planted_updates(llm)
    names.assign(llm, leaves)
    for n, layer in enumerate(found.model.model.layers):
        for target in targets:
            where = layer.self_attn if target in ("query", "key", "value", "out") else layer.mlp
            path = f"blocks/attention/{target}" if where is layer.self_attn else f"blocks/{target}"
            a, b = leaves[f"{path}/lora/a"][n], leaves[f"{path}/lora/b"][n]
            base = getattr(where, PUBLISHED[target])
            setattr(where, PUBLISHED[target], PeftLinear(base, a, b, config.alpha / config.rank))
    tokens_BS, valid_BS = prompt("left")
    expected_BSD, expected_BSV = theirs(found.model, tokens_BS, valid_BS)
    hidden_BSD = llm(llm.embed(tokens_BS), valid_BS)
    np.testing.assert_allclose(hidden_BSD[valid_BS], expected_BSD[valid_BS], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(llm.logits(hidden_BSD)[valid_BS], expected_BSV[valid_BS], rtol=1e-5, atol=1e-5)
    merged = found.cfg.build(nnx.Rngs(0))
    names.assign(merged, lora.merged(llm, flatten(llm)))
    hidden_BSD = merged(merged.embed(tokens_BS), valid_BS)
    np.testing.assert_allclose(hidden_BSD[valid_BS], expected_BSD[valid_BS], rtol=1e-5, atol=1e-5)


def test_only_the_updates_and_the_compressor_learn(tmp_path):
    model = a_model()
    _, trainable, frozen = split(model, BOTH)
    learning, resting = set(flatten(trainable)), set(flatten(frozen))
    assert learning == {path for path in flatten(model) if path.startswith("compressor/") or "/lora/" in path}
    assert not learning & resting and any(path.startswith("llm/") for path in resting)
    before = flatten(a_model())
    after = flatten(go(tmp_path, a_run(trainable=BOTH, lora=LORA), model=model).model)
    assert {path for path in before if not np.array_equal(before[path], after[path])} == learning


def test_every_update_gets_a_gradient_once_it_is_not_zero():
    model = a_model()
    names.assign(model.llm, planted_updates(model.llm))
    graphdef, trainable, frozen = split(model, ("lora",))
    gradient = jax.jit(jax.grad(lambda t: nnx.merge(graphdef, t, frozen).loss_terms(batch_at(0)).total))
    leaves = flatten(gradient(trainable))
    assert len(leaves) == 14
    for path, leaf in leaves.items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, path


def test_checkpoints_hold_what_learns_and_resuming_changes_nothing(tmp_path):
    run = a_run(trainable=BOTH, lora=LORA)
    whole = go(tmp_path / "whole", run, model=a_model())
    _, trainable, frozen = split(a_model(), BOTH)
    saved = sum(p.stat().st_size for p in (tmp_path / "whole/checkpoints/6").rglob("*") if p.is_file())
    assert saved <= 3 * 4 * num_parameters(trainable) + 2**20
    short = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=6, save_every=3))
    go(tmp_path / "cut", short, model=a_model())
    (tmp_path / "cut/checkpoints/6").rename(tmp_path / "gone")
    resumed = go(tmp_path / "cut", short, model=a_model())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, flatten(resumed.model), flatten(whole.model))
    assert num_parameters(frozen) > 0 and IDENTITY


def stepped(mesh_config: MeshConfig, num_devices: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    config = TrainConfig(steps=3, peak_lr=1e-2, warmup=0.0, trainable=BOTH, lora=LORA, lr_of={"compressor": 1e-3})
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    graphdef, trainable, frozen = split(a_model(), config.trainable)
    optimiser = make_optimiser(config)
    state, frozen = place(init(place(trainable, mesh), optimiser), mesh), place(frozen, mesh)
    step = jit_step(make_step(graphdef, optimiser), state, mesh)
    seen = []
    for number in range(3):
        state, metrics = step(state, frozen, place_batch(batch_at(number), mesh), np.int32(number + 1))
        seen.append([float(metrics.loss), float(metrics.grad_norm)])
    assert step._cache_size() == 1
    return np.array(seen), flatten(state.trainable)


def test_eight_devices_equal_one():
    alone, cut = stepped(MeshConfig(), 1), stepped(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_allclose(cut[0], alone[0], rtol=1e-5, atol=1e-5)
    for path, array in alone[1].items():
        np.testing.assert_allclose(cut[1][path], array, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_every_part_learns_at_its_own_peak(weight_decay):
    """LLaVA's: updates at 2e-4, the projector at 2e-5. One step is what another peak for all would do to that part."""

    def after_one_step(**changes) -> dict[str, np.ndarray]:
        config = TrainConfig(
            **{"steps": 4, "warmup": 0.0, "trainable": BOTH, "lora": LORA, "weight_decay": weight_decay} | changes
        )
        _, trainable, _ = split(a_model(), BOTH)
        optimiser = make_optimiser(config)
        gradient = jax.tree.map(
            lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), trainable
        )
        return flatten(optimiser.update(gradient, optimiser.init(trainable), trainable)[0])

    slow, fast = after_one_step(peak_lr=2e-5), after_one_step(peak_lr=2e-4)
    for path, update in after_one_step(peak_lr=2e-4, lr_of={"compressor": 2e-5}).items():
        np.testing.assert_allclose(update, (slow if path.startswith("compressor") else fast)[path], rtol=1e-6)


def test_an_elastic_compressor_is_scored_with_its_updates():
    config = dataclasses.replace(VLM, compressor=matryoshka_query.Config(num_queries=4, max_queries=4, head_width=8))
    run = a_run(model=config, trainable=BOTH, lora=LORA)
    model = build(config, lora=LORA)
    _, fewer = at(run, model, 2)
    np.testing.assert_array_equal(fewer.llm.blocks.gate.lora.a[...], model.llm.blocks.gate.lora.a[...])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"lora": LORA}, r"train.lora adds updates that trainable=\('compressor',\) would freeze at 0; name 'lora'"),
        ({"trainable": BOTH}, r"which are \['compressor', 'llm', 'tower'\] \(train.lora.rank adds 'lora'\)"),
        ({"trainable": BOTH, "lora": LORA, "lr_of": {"llm": 1e-5}}, r"lr_of gives \{'llm': 1e-05\}; it takes positive"),
        (
            {"lr_of": {"compressor": 0.0}},
            r"lr_of gives \{'compressor': 0.0\}; it takes positive peaks of parts that learn",
        ),
    ],
)
def test_what_would_learn_nothing_is_refused_before_training(train, message, tmp_path):
    run = a_run(**train)
    with pytest.raises(ValueError, match=message):
        go(tmp_path, run, model=build(VLM, lora=run.train.lora))


def test_impossible_updates_say_why():
    with pytest.raises(
        ValueError, match=r"lora.targets=\('q_proj',\) must name .*\['down', 'gate', 'key', 'out', 'query'"
    ):
        a_model(LoraConfig(rank=2, targets=("q_proj",)))
    with pytest.raises(ValueError, match=r"lora.rank=-1 must be at least 1, or 0"):
        LoraConfig(rank=-1)

    class NoLlm:
        def build(self, rngs):
            return VLM.tower.build(rngs)

    with pytest.raises(ValueError, match=r"train.lora adds to an LLM, and Vit has none"):
        build(NoLlm(), lora=LORA)
