"""Two towers on one image: Prismatic's concatenation, each with its own normalisation, weights and positions."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from configs import towers
from tcjax.assemble import assemble
from tcjax.batch import Batch
from tcjax.compressors import mlp, resize_image, token_packer
from tcjax.config import DataConfig, MeshConfig, Pixels, Run, TrainConfig
from tcjax.evaluate.cost import cost, tower_flops, training_flops
from tcjax.export.run import TARGETS
from tcjax.record import from_dict, to_dict
from tcjax.sharding import make_mesh, place
from tcjax.towers.dual import DualConfig
from tcjax.vlm import VlmConfig
from tests.saved_towers import CLIP, NAFLEX, REGISTERS, SIGLIP, pixels, saved, twin
from tests.tiny import LLM

DINO_PIXELS = Pixels(size_YX=(18, 18), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FIRST = dataclasses.replace(REGISTERS, pixels=DINO_PIXELS, feature_layer=-2, table_HW=(5, 5))
SECOND = dataclasses.replace(SIGLIP, pixels=Pixels(size_YX=(18, 18)), feature_layer=-2)
DUAL = DualConfig(towers=(FIRST, SECOND))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(root, the two published classes) with both saved below the root."""
    root, models = tmp_path_factory.mktemp("project"), [twin(FIRST), twin(SECOND)]
    for name, model in zip(("dino", "siglip"), models, strict=True):
        saved(model, root / "checkpoints" / name)
    return root, models


def with_weights() -> VlmConfig:
    first, second = (
        dataclasses.replace(tower, weights=f"checkpoints/{name}")
        for tower, name in zip(DUAL.towers, ("dino", "siglip"), strict=True)
    )
    return VlmConfig(tower=DualConfig(towers=(first, second)), compressor=mlp.Config(), llm=LLM)


def test_features_are_both_towers_side_by_side_each_on_its_own_normalisation(project):
    """As Prismatic has them: behind the second-to-last blocks, patches alone; the table of 5 x 5 serves 4 x 4 patches."""
    root, models = project
    grey_BYX3 = np.random.default_rng(0).uniform(size=(2, 18, 18, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = [
            model(
                pixels((grey_BYX3 - np.array(cfg.pixels.mean, np.float32)) / np.array(cfg.pixels.std, np.float32)),
                output_hidden_states=True,
            ).hidden_states[-2][:, cfg.num_prefix :]
            for cfg, model in zip(DUAL.towers, models, strict=True)
        ]
    model, identity = assemble(with_weights(), root=root)
    images_BYX3 = (grey_BYX3 - np.array(DUAL.pixels.mean)) / np.array(DUAL.pixels.std)
    found_BNC = jax.jit(model.tower)(images_BYX3.astype(np.float32))
    assert found_BNC.shape == (2, 16, 48) == (2, DUAL.num_tokens, DUAL.width)
    np.testing.assert_allclose(found_BNC, torch.cat(theirs, -1), rtol=1e-5, atol=2e-5)
    first, second = identity["tower.weights"].split(" + ")
    assert len(first) == len(second) == 64 and first != second
    assert identity["model.tower.towers.0.registers"] == 2 and "model.tower.towers.1.weights" not in identity


def test_bytes_are_normalised_by_each_tower_for_itself(project):
    model, _ = assemble(with_weights(), root=project[0])
    bytes_BYX3 = np.random.default_rng(0).integers(0, 256, (2, 18, 18, 3)).astype(np.uint8)
    images_BYX3 = (bytes_BYX3 / 255 - np.array(DUAL.pixels.mean)) / np.array(DUAL.pixels.std)
    from_bytes_BNC = jax.jit(model.tower)(bytes_BYX3)
    np.testing.assert_allclose(
        from_bytes_BNC, jax.jit(model.tower)(images_BYX3.astype(np.float32)), rtol=1e-5, atol=2e-5
    )


def test_weights_whose_config_says_another_tower_are_refused(project):
    config = with_weights()
    first, second = config.tower.towers
    other = DualConfig(towers=(dataclasses.replace(first, norm_eps=1e-5), second))
    with pytest.raises(
        ValueError, match=r"dino/config.json describes another tower .*\n  norm_eps: 1e-06 there, 1e-05 ask"
    ):
        assemble(dataclasses.replace(config, tower=other), root=project[0])


def test_a_model_reads_both(project):
    model, _ = assemble(with_weights(), root=project[0])
    images_BYX3 = np.random.default_rng(0).normal(size=(2, 18, 18, 3)).astype(np.float32)
    batch = Batch(images_BYX3=images_BYX3, index_B=np.arange(2))
    assert with_weights().widths.vision_C == 48
    assert model.compress(batch).tokens_BQD.shape == (2, 16, LLM.width)


def test_one_device_equals_eight():
    graphdef, state = nnx.split(DUAL.build(nnx.Rngs(0)))
    images_BYX3 = np.random.default_rng(0).normal(size=(8, 18, 18, 3)).astype(np.float32)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    expected = run(state, images_BYX3)
    for sizes in ((1, 8, 1), (1, 2, 4), (2, 2, 2)):
        mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
        spread = jax.device_put(images_BYX3, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        np.testing.assert_allclose(run(place(state, mesh), spread), expected, rtol=1e-5, atol=1e-5)


def test_it_costs_what_both_cost():
    config = VlmConfig(tower=DUAL, compressor=mlp.Config(), llm=LLM)
    both = [tower_flops(tower) for tower in DUAL.towers]
    assert tower_flops(DUAL).total == both[0].total + both[1].total
    assert cost(config, text_tokens=4).tower_flops == tower_flops(DUAL).total
    assert training_flops(config, 4) - training_flops(config, 4, cached_features=True) == tower_flops(DUAL).total


def test_a_run_with_it_is_written_and_read_back():
    config = VlmConfig(tower=DUAL, compressor=mlp.Config(), llm=LLM)
    assert from_dict(to_dict(config)) == config


def test_no_published_host_has_two_towers():
    model = VlmConfig(tower=DUAL, compressor=mlp.Config(), llm=LLM)
    run = Run(name="any", model=model, data=DataConfig(sources=(), tokenizer=""), train=TrainConfig(steps=1))
    for name in ("hf", "hf-remote", "llava"):
        assert "two" in TARGETS[name].why_not(run), name


def test_a_compressor_gets_a_smaller_grid_of_both_and_no_layers_of_either():
    smaller = VlmConfig(tower=DUAL, compressor=resize_image.Config(num_queries=4), llm=LLM)
    assert {tower.shrunk_HW for tower in smaller.seen.towers} == {(2, 2)} and smaller.num_queries == 4
    packer = VlmConfig(tower=DUAL, compressor=token_packer.Config(num_queries=4), llm=LLM)
    with pytest.raises(
        ValueError, match=r"two towers have no layers, class token or attention in common; choose one tower"
    ):
        packer.build(nnx.Rngs(0))


def test_prismatics_pair_has_its_numbers():
    large = towers.dinosiglip_384("a", "b")
    assert (large.width, large.grid_HW, large.num_tokens) == (2176, (27, 27), 729)
    assert [tower.feature_layer for tower in large.towers] == [-2, -2]
    assert [tower.weights for tower in large.towers] == ["a", "b"]
    assert large.pixels.mean == (0.485, 0.456, 0.406) and large.pixels.geometry == "squash"
    assert towers.dinosiglip_224().num_tokens == 256


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((FIRST,), "two, first and second, but there are 1"),
        ((FIRST, SIGLIP), r"may differ in mean and std alone, but these are .*18, 18.*16, 16.*table_HW"),
        ((FIRST, dataclasses.replace(SECOND, patch=9)), r"the grids are \(4, 4\) and \(2, 2\)"),
        ((FIRST, NAFLEX), "may differ in mean and std alone"),
        ((dataclasses.replace(FIRST, levels=(1,)), SECOND), r"hands over patches alone: .*levels=\(1,\)"),
        (
            (dataclasses.replace(FIRST, weights="x"), SECOND),
            "weights='x' and weights='': one tower .* random; give both",
        ),
        (
            (dataclasses.replace(CLIP, pixels=DINO_PIXELS, keep_class=True), SECOND),
            "hands over patches alone: keep_class=True",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_towers_that_do_not_fit_together_say_why(pair, message):
    with pytest.raises(ValueError, match=message):
        DualConfig(towers=pair)
