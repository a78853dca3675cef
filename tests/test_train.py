"""Training keeps its promises: frozen is frozen, cut or whole is the same, and no accident loses more than it must."""

import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tcjax.config import MeshConfig, TrainConfig
from tcjax.interop.names import flatten
from tcjax.sharding import make_mesh, place, place_batch
from tcjax.train.optimiser import make_optimiser, schedule
from tcjax.train.state import init, num_parameters, recompute, split
from tcjax.train.step import jit_step, make_step
from tests.tiny import VLM, a_model, a_run, batch_at, go, losses

ROOT = Path(__file__).parents[1]


def stepped(mesh_config: MeshConfig, num_devices: int, *, accumulate: int = 1, steps: int = 3, **train_changes):
    """Losses and trained parameters of three steps on a mesh of the first devices."""
    config = TrainConfig(steps=steps, peak_lr=1e-2, warmup=0.0, weight_decay=0.1, **train_changes)
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    model = a_model()
    recompute(model, config.remat)
    graphdef, trainable, frozen = split(model, config.trainable)
    optimiser = make_optimiser(config)
    state, frozen = place(init(place(trainable, mesh), optimiser), mesh), place(frozen, mesh)
    step = jit_step(make_step(graphdef, optimiser, accumulate=accumulate), state, mesh)
    seen = []
    for number in range(steps):
        state, metrics = step(state, frozen, place_batch(batch_at(number), mesh), np.int32(number + 1))
        seen.append([float(metrics.loss), float(metrics.grad_norm), float(metrics.count)])
    assert step._cache_size() == 1
    return np.array(seen), flatten(state.trainable)


@pytest.fixture(scope="module")
def on_one_device():
    return stepped(MeshConfig(), 1)


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        (MeshConfig(data=8), 1),
        (MeshConfig(data=2, fsdp=4), 1),
        (MeshConfig(data=1, fsdp=8), 1),
        (MeshConfig(data=2, fsdp=2, tensor=2), 1),
        (MeshConfig(data=4, tensor=2), 2),
        (MeshConfig(data=1, fsdp=1, tensor=8), 8),
    ],
)
def test_eight_devices_and_microbatches_equal_one_device(on_one_device, mesh, accumulate):
    metrics, parameters = stepped(mesh, 8, accumulate=accumulate)
    np.testing.assert_allclose(metrics, on_one_device[0], atol=1e-5, rtol=1e-5)
    for path, array in on_one_device[1].items():
        np.testing.assert_allclose(parameters[path], array, atol=1e-5, err_msg=path)


def test_a_learning_llm_computed_again_on_eight_devices_equals_one():
    learns = {"trainable": ("compressor", "llm"), "remat": "full"}
    alone, sharded = (
        stepped(*mesh, **learns) for mesh in ((MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8))
    )
    np.testing.assert_allclose(sharded[0], alone[0], atol=1e-5, rtol=1e-5)
    for path, array in alone[1].items():
        np.testing.assert_allclose(sharded[1][path], array, atol=1e-5, err_msg=path)


def test_frozen_parts_are_bit_identical_and_the_compressor_moves(tmp_path):
    before = flatten(a_model())
    after = flatten(go(tmp_path).model)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if path.startswith("compressor/")}


def test_frozen_parameters_have_no_gradient_no_moments_and_no_checkpoint_bytes(tmp_path):
    run = a_run()
    _, trainable, frozen = split(a_model(), run.train.trainable)
    moments = init(trainable, make_optimiser(run.train)).optimiser
    assert num_parameters(moments) <= 2 * num_parameters(trainable) + 2
    assert num_parameters(frozen) > 0
    go(tmp_path, run)
    saved = sum(p.stat().st_size for p in (tmp_path / "checkpoints/6").rglob("*") if p.is_file())
    assert saved <= 3 * 4 * num_parameters(trainable) + 2**20


def test_weight_decay_pulls_on_matrices_only():
    config = TrainConfig(steps=1, peak_lr=1.0, warmup=0.0, weight_decay=0.5, clip=0.0)
    _, trainable, _ = split(a_model(), ("compressor",))
    optimiser = make_optimiser(config)
    zero = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = optimiser.update(zero, optimiser.init(trainable), trainable)
    decayed = {path for path, update in flatten(updates).items() if np.any(update)}
    assert decayed == {path for path in flatten(trainable) if path.endswith("kernel")}


def test_the_learning_rate_rises_then_follows_a_cosine():
    rate = schedule(TrainConfig(steps=100, peak_lr=1.0, warmup=0.1, end_lr=0.1))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 0.5, 1.0, 0.55, 0.1], atol=1e-6)


def test_a_trainable_part_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"parts of Vlm, which are \['compressor', 'llm', 'tower'\]"):
        split(a_model(), ("projector",))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_masters(tmp_path):
    outcome = go(tmp_path, a_run(compute="bfloat16"))
    assert {array.dtype for array in flatten(outcome.model).values()} == {np.dtype("float32")}
    exact = losses(tmp_path)
    go(tmp_path / "float32")
    np.testing.assert_allclose(exact, losses(tmp_path / "float32"), rtol=0.03)
    assert exact != losses(tmp_path / "float32")


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute='fp8' is not one of"):
        go(tmp_path, a_run(compute="fp8"))


def test_every_logged_line_has_the_promised_fields(tmp_path):
    go(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    promised = "step loss accuracy grad_norm learning_rate images_per_second supervised_tokens_per_second "
    promised += "host_wait_share padding_share useful_flops_per_second seconds dropped_turns"
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == set(promised.split()) for line in lines)
    assert all(0 <= line["host_wait_share"] <= 1 for line in lines)
    assert [line["dropped_turns"] for line in lines] == [1, 2, 3, 4, 5, 6]
    padding = [1 - batch_at(step).valid_BS.mean() for step in range(1, 7)]
    np.testing.assert_allclose([line["padding_share"] for line in lines], padding)
    positions = [round(batch_at(step).valid_BS.sum() / 8) for step in range(1, 7)]  # of a sample; padding is no work
    np.testing.assert_allclose(
        [line["useful_flops_per_second"] / line["images_per_second"] for line in lines], [1e3 * n for n in positions]
    )


def test_a_run_leaves_its_config_and_its_environment(tmp_path):
    run = a_run()
    go(tmp_path, run)
    from tcjax.record import from_dict

    assert from_dict(json.loads((tmp_path / "run.json").read_text())) == run
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__ and len(environment["devices"]) == 8


def test_the_step_compiles_once(tmp_path):
    assert go(tmp_path).compiles == 1


def test_wandb_gets_every_logged_line_when_wanted(tmp_path, monkeypatch):
    said = []
    run = types.SimpleNamespace(
        log=lambda line, step: said.append((step, line["loss"])), finish=lambda: said.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: said.append(options) or run))
    go(tmp_path, a_run(wandb="offline"))
    assert (said[0]["mode"], said[0]["name"], said[-1]) == ("offline", "tiny/run", "end")
    assert said[1:-1] == list(enumerate(losses(tmp_path), 1))


def test_wandb_wanted_and_absent_or_misspelt_is_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="wandb='onlin' is not one of"):
        go(tmp_path, a_run(wandb="onlin"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb='offline' needs the package: pip install 'tcjax\[wandb\]'"):
        go(tmp_path, a_run(wandb="offline"))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_impossible_q_is_said_before_anything_is_built():
    from tcjax.compressors import avg_pool
    from tcjax.vlm import VlmConfig

    config = VlmConfig(tower=VLM.tower, compressor=avg_pool.Config(num_queries=5), llm=VLM.llm)
    with pytest.raises(ValueError, match=r"num_queries=5 .*possible: \[1, 4, 9, 16\]"):
        config.build(nnx.Rngs(0))
