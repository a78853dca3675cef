"""The single-layer resamplers against the published classes, run once with random weights (tests/golden).

What made the golden files, everything in float32 on a CPU, torch 2.13:
    qwen_resampler      qwen_vl: Resampler of Yuliang-Liu/Monkey 498e1d9 (monkey_model/visual.py, Qwen-VL's), then the
                        tower's ln_post and proj; omnilmm: OpenBMB/MiniCPM-V 0dbb566 (omnilmm/model/resampler.py);
                        minicpm_v2, v25, v45: `Resampler` of the models' own resampler.py (2.0, 2.6, and 4.5 with
                        batch_infer=True; its other path mixes up the padding of frames); uhd: thunlp/LLaVA-UHD 13981b5
                        (multimodal_projector/resampler.py without its cast to bfloat16)
    spatial_resampler   AdaptSpatialResampler of thunlp/LLaVA-UHD dd7f6cc (branch LLaVA-UHD-v1) on torchvision's CPU kernel
                        of roi_align
    matryoshka_query    Resampler of gordonhu608/MQT-LLaVA 92c35d0 as `.float()`: its table stays rounded to half
Each case holds the original's whole state dict, so loading it also proves the names.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from tcjax.compressors import matryoshka_query, qwen_resampler, spatial_resampler
from tcjax.compressors.base import Context, Widths
from tcjax.export import families
from tcjax.export.artifact import export
from tcjax.interop import names, tensors
from tests.planted import leaves, noise, planted

GOLDEN = Path(__file__).parent / "golden"


def case_of(family: str, case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The original's state dict, and tokens, out and perhaps valid."""
    stored = tensors.load(GOLDEN / f"{family}.safetensors")
    own = {key.removeprefix(f"{case}."): value for key, value in stored.items() if key.startswith(f"{case}.")}
    weights = {key.removeprefix("weights."): value for key, value in own.items() if key.startswith("weights.")}
    return weights, {key: value for key, value in own.items() if not key.startswith("weights.")}


def loaded(config, widths: Widths, weights: dict[str, np.ndarray]):
    module = config.build(widths, nnx.Rngs(0))
    names.assign(module, names.from_torch(weights, config.names(widths), names.shapes(module)))
    return module


def twin(config, widths: Widths, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    source: dict = {}
    facts = families.describe(config, widths)
    exec(families.twin_source(facts), source)
    module = source["Compressor"](facts)
    module.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights.items()}, strict=True)
    return module.eval()


@nnx.jit
def compress(module, x_BNC, valid_BN=None):
    with jax.default_matmul_precision("highest"):
        return module(x_BNC, Context(valid_BN))


def assert_equals_the_original(family: str, case: str, config, widths: Widths):
    """Ours and the twin, both from the original's own state dict."""
    weights, found = case_of(family, case)
    tokens, valid, out = found["tokens"], found.get("valid"), found["out"]
    ours = compress(loaded(config, widths, weights), tokens, valid).tokens_BQD
    with torch.inference_mode():
        arguments = [torch.from_numpy(tokens)] + ([] if valid is None else [torch.from_numpy(valid)])
        theirs = twin(config, widths, weights)(*arguments)
    theirs = theirs if valid is None else theirs[0]
    np.testing.assert_allclose(ours, out, atol=3e-6 * np.abs(out).max())
    np.testing.assert_allclose(theirs, out, atol=3e-6 * np.abs(out).max())


QWEN = {  # case: (form, grid, frames, queries, vision width)
    "qwen_vl_4x4": ("qwen_vl", (4, 4), 1, 9, 12),
    "qwen_vl_3x3": ("qwen_vl", (3, 3), 1, 9, 16),  # as wide as the LLM: no kv_proj
    "omnilmm_5x5": ("omnilmm", (5, 5), 1, 4, 12),
    "minicpm_v2_3x5": ("minicpm_v2", (3, 5), 1, 4, 12),
    "minicpm_v25_3x5": ("minicpm_v25", (3, 5), 1, 5, 12),  # images of 15, 10 and 5 patches
    "minicpm_v45_full": ("minicpm_v45", (3, 4), 3, 5, 12),
    "minicpm_v45_ragged": ("minicpm_v45", (3, 4), 3, 5, 12),
    "minicpm_v45_image": ("minicpm_v45", (3, 4), 1, 5, 12),
    "uhd_3x5": ("uhd", (3, 5), 1, 9, 12),
}


@pytest.mark.parametrize("case", QWEN)
def test_every_form_equals_its_original(case):
    form, grid_HW, frames, queries, width = QWEN[case]
    config = qwen_resampler.Config(num_queries=queries, form=form, head_width=8, frame_step=700)
    widths = Widths(grid_HW=grid_HW, vision_C=width, llm_D=16, frames=frames)
    assert_equals_the_original("qwen_resampler", case, config, widths)


@pytest.mark.parametrize("case", ["6x6_9", "4x6_4", "5x9_9", "9x4_4", "3x4_16", "8x8_4", "7x2_9"])
def test_regions_equal_llava_uhds(case):
    """7x2_9 and 3x4_16 have regions below one cell, which roi_align widens to one."""
    grid, queries = case.split("_")
    config = spatial_resampler.Config(num_queries=int(queries), head_width=8)
    widths = Widths(grid_HW=tuple(map(int, grid.split("x"))), vision_C=12, llm_D=16)
    assert_equals_the_original("spatial_resampler", case, config, widths)


@pytest.mark.parametrize("grid_HW", [(24, 24), (20, 27), (12, 48), (9, 30), (61, 9)])
def test_samples_are_torchvisions(grid_HW):
    """At the sizes of real slices, 12 x 12 regions: the matrix times three random vectors per cell."""
    _, found = case_of("spatial_resampler", f"sampled_{grid_HW[0]}x{grid_HW[1]}")
    sample_QMN = spatial_resampler.region_matrix(grid_HW, 12)
    np.testing.assert_allclose(sample_QMN @ found["vectors"], found["out"], atol=2e-5)


@pytest.mark.parametrize(("case", "queries"), [("4x4_9of9", 9), ("3x5_9of9", 9), ("5x4_7of16", 7)])
def test_matryoshka_queries_equal_mqts(case, queries):
    grid, most = case.split("_")[0], int(case.split("of")[1])
    width = 12 if case.startswith("3x5") else 16
    config = matryoshka_query.Config(num_queries=queries, max_queries=most, head_width=width // 2)
    widths = Widths(grid_HW=tuple(map(int, grid.split("x"))), vision_C=width, llm_D=20)
    assert_equals_the_original("matryoshka_query", case, config, widths)


def test_the_queries_table_is_published_in_half_precision():
    weights, found = case_of("matryoshka_query", "published")
    assert not weights
    config, widths = matryoshka_query.Config(num_queries=2, max_queries=9), Widths(grid_HW=(4, 4), vision_C=12, llm_D=8)
    (table,) = (name.value for name in config.names(widths) if name.torch == "pos_embed")
    np.testing.assert_array_equal(table, found["pos_embed"], strict=True)
    # MQT rounds; a table that is exact would be off by up to 2^-12.
    assert 1e-5 < np.abs(table.astype(np.float32) - qwen_resampler.sincos_2d((3, 3), 12)).max() < 2.0**-11


def test_a_checkpoint_with_other_positions_is_refused():
    """Half precision is the same table; rows and columns changed over are another, and so is another number of queries."""
    weights, _ = case_of("qwen_resampler", "qwen_vl_4x4")
    config = qwen_resampler.Config(num_queries=9, head_width=8)
    widths = Widths(grid_HW=(4, 4), vision_C=12, llm_D=16)
    table = weights["attn_pool.pos_embed"]
    loaded(config, widths, weights | {"attn_pool.pos_embed": table.astype(np.float16)})
    turned = table.reshape(3, 3, 16).swapaxes(0, 1).reshape(9, 16)
    with pytest.raises(ValueError, match=r"attn_pool\.pos_embed is not the table .* other positions"):
        loaded(config, widths, weights | {"attn_pool.pos_embed": turned})
    with pytest.raises(ValueError, match=r"attn_pool\.pos_embed: \[9, 16\] there, \[4, 16\] asked for"):
        loaded(qwen_resampler.Config(num_queries=4, head_width=8), widths, weights)
    with pytest.raises(ValueError, match=r"UNEXPECTED .*\n    attn_pool"):
        loaded(qwen_resampler.Config(num_queries=9, form="minicpm_v25", head_width=8), widths, weights)


def parameters(config, widths: Widths) -> int:
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    return sum(leaf.get_value().size for leaf in leaves(module).values())


def test_published_sizes():
    llava = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096)
    assert parameters(spatial_resampler.Config(), llava) == 88_711_168  # as LLaVA-UHD counts them
    attention_and_proj = 4 * 4096**2 + 4 * 4096 + 4096**2
    for config, widths in (
        (qwen_resampler.Config(), Widths(grid_HW=(32, 32), vision_C=1664, llm_D=4096)),  # ViT-bigG at 448
        (qwen_resampler.Config(num_queries=64, form="uhd"), llava),
    ):
        own = config.num_queries * 4096 + 3 * 2 * 4096 + widths.vision_C * 4096
        assert parameters(config, widths) == own + attention_and_proj
        assert config.semantics(widths)["heads"] == 32
    table = 256 * 1024  # saved, but not trained
    assert parameters(matryoshka_query.Config(), llava) + table == 8_923_136
    assert matryoshka_query.Config().semantics(llava)["heads"] == 16
    assert matryoshka_query.Config().drawn_from == tuple(range(2, 257, 2))


@pytest.mark.parametrize("family", [qwen_resampler, spatial_resampler, matryoshka_query])
def test_starts_as_published(family):
    """N(0, 0.02^2) but for the packed projection, which is Xavier-uniform over its [3 E, E], and proj, N(0, 1 / D)."""
    width = 64
    config = family.Config(num_queries=64, head_width=32)
    start = leaves(
        config.build(
            Widths(grid_HW=(6, 6), vision_C=width, llm_D=48 if family is matryoshka_query else 96), nnx.Rngs(0)
        )
    )
    value = {path: np.asarray(leaf.get_value()) for path, leaf in start.items()}
    assert abs(value["query"].std() / 0.02 - 1) < 0.05
    assert abs(value["attn/out_proj/kernel"].std() / 0.02 - 1) < 0.05
    if family is not matryoshka_query:
        assert abs(value["kv_proj/kernel"].std() / 0.02 - 1) < 0.05
    E, D = value["attn/out_proj/kernel"].shape[0], value["proj"].shape[1]
    assert abs(np.abs(value["attn/in_proj/kernel"]).max() / np.sqrt(6 / (4 * E)) - 1) < 0.01
    assert abs(value["proj"].std() * np.sqrt(D) - 1) < 0.05
    for path in value:
        if path.endswith(("bias", "scale")):
            assert (value[path] == path.endswith("scale")).all(), path


def test_frames_have_an_order_and_an_image_has_none():
    """Two frames changed over are another video; without frame positions (a still image, twice) they would not be."""
    widths = Widths(grid_HW=(3, 4), vision_C=12, llm_D=16, frames=2)
    config = qwen_resampler.Config(num_queries=3, form="minicpm_v45", head_width=8, frame_step=5)
    module = planted(config, widths)
    x_BNC = noise(1, 24, 12)
    there, back = (compress(module, x).tokens_BQD for x in (x_BNC, np.roll(x_BNC, 12, axis=1)))
    assert np.abs(there - back).max() > 1e-2
    assert config.frame_positions(widths) == [0, 5]
    assert config.frame_positions(Widths(grid_HW=(3, 4), vision_C=12, llm_D=16)) == []
    with pytest.raises(ValueError, match="reads one image, not 2 frames"):
        qwen_resampler.Config(num_queries=4, head_width=8).build(widths, nnx.Rngs(0))
    with pytest.raises(ValueError, match="reads one image, not 2 frames"):
        spatial_resampler.Config(num_queries=4, head_width=8).build(widths, nnx.Rngs(0))


def test_matryoshka_pools_every_image_alike():
    """The published keys hold no image; with key_content they do."""
    x_BNC = noise(2, 12, 12)
    for key_content in (False, True):
        config = matryoshka_query.Config(num_queries=4, max_queries=4, head_width=6, key_content=key_content)
        module = planted(config, Widths(grid_HW=(3, 4), vision_C=12, llm_D=16))
        one, other = module(x_BNC, Context(assign=True)).assign_BQN
        assert (np.abs(one - other).max() < 1e-7) == (not key_content)


def test_a_region_of_a_24_grid_by_hand():
    """12 regions of 2 cells, 3 samples each, at 2 r + 1/3, 2 r + 1 and 2 r + 5/3; beyond the last centre is the last."""
    by_row = spatial_resampler.axis_matrix(24, 12, 3)
    np.testing.assert_allclose(by_row[4][:, 8:11], [[2 / 3, 1 / 3, 0], [0, 1, 0], [0, 1 / 3, 2 / 3]], atol=2e-6)
    np.testing.assert_allclose(by_row[11][:, 22:], [[2 / 3, 1 / 3], [0, 1], [0, 1]], atol=2e-6)
    assert spatial_resampler.samples((24, 24)) == (3, 3)
    assert spatial_resampler.samples((12, 48)) == (2, 4)  # (h, w) of a wide image
    assert spatial_resampler.region_matrix((24, 24), 12).shape == (144, 9, 576)


def test_padding_of_regions():
    """A sample is the mean of its valid cells, a region without any is not valid, the others do not notice."""
    config = spatial_resampler.Config(num_queries=9, head_width=8)
    module = planted(config, Widths(grid_HW=(9, 9), vision_C=12, llm_D=16))
    x_BNC, kept = noise(1, 81, 12), np.ones((9, 9), bool)
    kept[:, 6:] = False  # the right third; the middle regions' last sample reads columns 5 and 6
    full = module(x_BNC, Context(assign=True))
    out = module(x_BNC, Context(kept.reshape(1, 81), assign=True))
    np.testing.assert_array_equal(out.valid_BQ[0], [True, True, False] * 3)
    np.testing.assert_allclose(out.tokens_BQD[0, ::3], full.tokens_BQD[0, ::3], atol=1e-5)
    assert np.abs(out.tokens_BQD[0, 1] - full.tokens_BQD[0, 1]).max() > 1e-3
    np.testing.assert_allclose(out.assign_BQN[0, 1].reshape(9, 9)[4:, :3], 0, atol=1e-6)  # its own region alone
    alike_BNC = np.broadcast_to(
        x_BNC[:, :1], x_BNC.shape
    )  # one value everywhere: a mean of fewer cells is the same mean
    nowhere = module.attn.in_proj.kernel
    nowhere.set_value(nowhere[...].at[:, 16:32].set(0))  # no keys, so no positions
    even, uneven = module(alike_BNC), module(alike_BNC, Context(kept.reshape(1, 81)))
    np.testing.assert_allclose(uneven.tokens_BQD[0, :2], even.tokens_BQD[0, :2], atol=1e-5)


def test_resizing_is_torchs():
    """As the originals call it, over a grid that is not square; jax.image.resize differs by 0.3."""
    table = torch.from_numpy(noise(9, 8))
    resized = functional.interpolate(table.reshape(1, 3, 3, 8).permute(0, 3, 1, 2), (5, 7), mode="bicubic")
    ours = qwen_resampler.resize_matrix((3, 3), (5, 7)) @ table.numpy()
    np.testing.assert_allclose(ours, resized.permute(0, 2, 3, 1).reshape(35, 8), atol=1e-5)


@pytest.mark.parametrize("frames", [2, 3])
def test_a_video_is_exported(tmp_path, frames):
    config = qwen_resampler.Config(num_queries=3, form="minicpm_v45", head_width=4, frame_step=700)
    widths = Widths(grid_HW=(2, 3), vision_C=8, llm_D=12, frames=frames)
    certificate = export(planted(config, widths), config, widths, tmp_path / "out", provenance={})
    assert max(row["relative"] for row in certificate["cases"]) < 2e-6


EXPORTED = {
    "qwen_resampler": qwen_resampler.Config(num_queries=3, max_queries=4, head_width=6),
    "minicpm_v45": qwen_resampler.Config(num_queries=5, form="minicpm_v45", head_width=4),
    "spatial_resampler": spatial_resampler.Config(num_queries=4, head_width=6),
    "matryoshka_query": matryoshka_query.Config(num_queries=3, max_queries=4, head_width=4),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_a_twin_can_be_captured_whole(case):
    """torch.export reads it once and keeps no question to the data open."""
    widths = Widths(grid_HW=(4, 6), vision_C=8, llm_D=12, frames=2 if case == "minicpm_v45" else 1)
    config = EXPORTED[case]
    module = planted(config, widths)
    weights = names.to_torch(names.flatten(module), config.names(widths))
    compressor = twin(config, widths, weights)
    inputs = torch.from_numpy(noise(2, widths.num_tokens, 8)), torch.ones(2, widths.num_tokens, dtype=torch.bool)
    captured = torch.export.export(compressor, inputs).module()
    with torch.no_grad():
        torch.testing.assert_close(captured(*inputs), compressor(*inputs))
