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

from tcjax.compressors import decoder_resampler, matryoshka_query, qwen_resampler, spatial_resampler
from tcjax.compressors.base import Context, Widths
from tcjax.export import families
from tcjax.interop import names, tensors
from tests.planted import leaves, noise, plant

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
