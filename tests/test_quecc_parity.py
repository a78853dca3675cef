"""QueCC against the original class, whose answers with random weights are in tests/golden, and cell by cell.

quecc.safetensors: locuslab/llava-token-compression, commit bdedebd, llava/model/multimodal_projector/quecc.py, QueCC with
stride and kernel 3, 4 and 12 on a 12 x 12 grid, then Linear, GELU, Linear as its builder has them. Run with torch 2.13
in float32; the width 4096, which the source states as a number, was replaced by 2 * 8, the LLM's by 12.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from tcjax.compressors import quecc
from tcjax.compressors.base import Widths
from tcjax.export.torch import quecc as room
from tcjax.interop import tensors
from tests.planted import leaves, noise, planted
from tests.torch_layers import (
    attention,
    compress,
    conv_kernel,
    line,
    loaded,
    normed,
    ragged,
    section,
    twin,
    two,
    values,
)

GOLDEN = Path(__file__).parent / "golden/quecc.safetensors"
C, D, T_WIDTH, EPS = 8, 12, 10, 1e-6
WIDTHS = Widths(grid_HW=(12, 12), vision_C=C, llm_D=D, text_D=T_WIDTH, levels=2)
CLOSE = {"rtol": 0, "atol": 4e-6}  # outputs are of size 1 ... 4


def questioned(num_queries: int, **choices) -> quecc.Config:
    return quecc.Config(num_queries=num_queries, levels=(1, 2), **choices)


@pytest.mark.parametrize("stride", [3, 4, 12])
def test_quecc_equals_the_original(stride):
    """Its one text vector as an instruction of one token, and as the last of three."""
    golden = section(tensors.load(GOLDEN), f"{stride}.")
    weights, text_BTD = section(golden, "weights."), golden["text"]
    longer_BTD = np.concatenate([noise(2, 2, T_WIDTH), text_BTD, np.full((2, 1, T_WIDTH), np.nan)], axis=1, dtype="f4")
    whole_BT = np.ones((2, 1), bool)
    for pool, text, valid_BT in (
        ("mean", text_BTD, whole_BT),
        ("last", text_BTD, whole_BT),
        ("last", longer_BTD, np.array([[True, True, True, False]] * 2)),
    ):
        config = questioned((12 // stride) ** 2, text_pool=pool)
        module = loaded(config, WIDTHS, weights)
        told = {"text_BTD": text, "text_valid_BT": valid_BT, "levels_BNE": golden["levels"]}
        np.testing.assert_allclose(compress(module, golden["tokens"], **told).tokens_BQD, golden["out"], **CLOSE)
        theirs = twin(room, config, WIDTHS, weights)(
            torch.from_numpy(golden["tokens"]), None, *map(torch.from_numpy, (text, valid_BT, golden["levels"]))
        )
        np.testing.assert_allclose(theirs.numpy(force=True), golden["out"], **CLOSE)


@pytest.mark.parametrize(("grid_HW", "s"), [((12, 12), 4), ((8, 6), 2), ((9, 15), 3), ((27, 27), 9)])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_quecc_with_padding_one_cell_at_a_time(grid_HW, s, pool):
    (H, W), Q = grid_HW, grid_HW[0] * grid_HW[1] // s**2
    widths = Widths(grid_HW=grid_HW, vision_C=C, llm_D=D, levels=2, text_D=T_WIDTH)
    module = planted(questioned(Q, heads=4, text_pool=pool), widths)
    value = values(module)
    x_BNC, l_BNE, valid_BN = noise(4, H * W, C) + 1, noise(4, H * W, 2 * C, seed=1), ragged(grid_HW)
    text_BTD, text_valid_BT = noise(4, 5, T_WIDTH, seed=2), np.arange(5) < np.array([[5], [2], [0], [1]])
    text_valid_BT[0, 1] = False
    hidden_BN1 = np.where(valid_BN, 1, np.nan)[..., None].astype("f4")
    ours = compress(
        module,
        x_BNC * hidden_BN1,
        levels_BNE=l_BNE * hidden_BN1,
        valid_BN=valid_BN,
        text_BTD=np.where(text_valid_BT[..., None], text_BTD, np.float32(np.nan)),
        text_valid_BT=text_valid_BT,
    )
    conv_w = conv_kernel(value, "downsample")
    conv_b, heads = torch.from_numpy(value["downsample/bias"]), attention(value, 4)

    def projected(name, x):
        return normed(value, f"{name}/norm", two(value, f"{name}/mlp", x), EPS)

    for b in range(4):
        x, keep = (torch.from_numpy(a[b]) for a in (x_BNC, valid_BN))
        words = torch.from_numpy(text_BTD[b])[torch.from_numpy(text_valid_BT[b])]
        if len(words):
            vector = words.mean(0) if pool == "mean" else words[-1]
            x = x + normed(value, "norm_text", line(value, "text", vector), EPS)
        full = (projected("query", x) * keep[:, None]).T.reshape(1, C, H, W)
        query = functional.conv2d(full, conv_w, conv_b, stride=s, groups=C)[0].flatten(1).T
        index = torch.arange(H * W).reshape(H, W)
        for q in range(Q):
            i, j = divmod(q, W // s)
            inside = index[i * s : (i + 1) * s, j * s : (j + 1) * s].flatten()
            inside = inside[keep[inside]]
            assert bool(ours.valid_BQ[b, q]) == bool(len(inside))
            found = np.asarray(ours.tokens_BQD[b, q])
            if not len(inside):
                np.testing.assert_array_equal(found, 0)
                continue
            few = torch.from_numpy(l_BNE[b])[inside][None]
            read, _ = heads(query[q][None, None], projected("key", few), projected("value", few))
            np.testing.assert_allclose(found, two(value, "mlp", read[0, 0]).numpy(force=True), atol=5e-6)


def test_without_a_question_quecc_adds_nothing():
    """Neither W_t 0 + b nor its norm: other embeddings behind a False change nothing, and a question does."""
    module = planted(questioned(9), WIDTHS)
    x_BNC, levels_BNE = noise(2, 144, C), noise(2, 144, 2 * C, seed=1)
    told = {"levels_BNE": levels_BNE, "text_BTD": noise(2, 3, T_WIDTH), "text_valid_BT": np.zeros((2, 3), bool)}
    null_BQD = compress(module, x_BNC, **told).tokens_BQD
    state = nnx.state(module)
    for leaf in (state["text"]["bias"], state["norm_text"]["bias"]):
        leaf.set_value(leaf.get_value() + 1)
    nnx.update(module, state)
    np.testing.assert_array_equal(compress(module, x_BNC, **told).tokens_BQD, null_BQD)
    asked_BQD = compress(module, x_BNC, **told | {"text_valid_BT": np.ones((2, 3), bool)}).tokens_BQD
    assert np.abs(asked_BQD - null_BQD).max() > 1e-2


def test_the_defaults_are_the_published_sizes():
    """21.0 M parameters and LLaVA-1.5's projector; 36 tokens, 8 heads."""
    widths = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096, text_D=4096, levels=4)
    config = quecc.Config()
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    C, D = 1024, 4096
    keys_and_values, queries = 2 * (4 * C * C + C**2 + 4 * C), 2 * C**2 + 4 * C
    own = keys_and_values + queries + (16 + 1) * C + (D * C + 3 * C) + 4 * (C**2 + C)
    assert sum(leaf.get_value().size for leaf in leaves(module).values()) == own + 20_979_712
    assert own == 21_008_384
    assert config.of_tower() == {"levels": (12, 16, 22, 23)}
    assert (config.outputs(widths), module.attention.heads) == (36, 8)


def test_it_starts_as_torch_does():
    """Kernels U(-a, a), a = 1 / sqrt(fan_in), the convolution's fan_in s^2; in_proj Xavier-uniform; biases 0."""
    widths = Widths(grid_HW=(4, 4), vision_C=64, llm_D=64, text_D=32, levels=2)
    value = values(questioned(4).build(widths, nnx.Rngs(0)))
    fans = {"text": 32, "query/mlp/linears/0": 64, "key/mlp/linears/0": 128, "attention/out_proj": 64, "downsample": 4}
    for path, fan_in in fans.items():
        np.testing.assert_allclose(value[f"{path}/kernel"].std(), (3 * fan_in) ** -0.5, rtol=0.1, err_msg=path)
        np.testing.assert_allclose(np.abs(value[f"{path}/kernel"]).max(), fan_in**-0.5, rtol=0.05, err_msg=path)
    np.testing.assert_allclose(np.abs(value["attention/in_proj/kernel"]).max(), (6 / (64 + 192)) ** 0.5, rtol=0.01)
    assert all((array == 0).all() for path, array in value.items() if path.endswith("bias"))
