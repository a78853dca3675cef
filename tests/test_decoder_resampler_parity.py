"""The decoder resampler against torch's own nn.TransformerDecoder, and its start."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from tcjax.compressors import decoder_resampler
from tcjax.compressors.base import Context, Widths
from tcjax.interop import names
from tests.planted import leaves, noise, planted

C, D, Q, DEPTH, HEADS, F = 24, 16, 5, 3, 4, 40


def built() -> tuple[nnx.Module, dict[str, torch.Tensor]]:
    config = decoder_resampler.Config(num_queries=Q, depth=DEPTH, heads=HEADS, feed_forward=F)
    widths = Widths(grid_HW=(4, 4), vision_C=C, llm_D=D)
    module = planted(config, widths)
    published = names.to_torch(names.flatten(module), config.names(widths))
    return module, {key: torch.from_numpy(value) for key, value in published.items()}


def original(weights: dict[str, torch.Tensor], x_BNC: np.ndarray, valid_BN: np.ndarray) -> np.ndarray:
    layer = torch.nn.TransformerDecoderLayer(C, HEADS, dim_feedforward=F, batch_first=True)
    decoder = torch.nn.TransformerDecoder(layer, DEPTH).eval()
    decoder.load_state_dict({key: value for key, value in weights.items() if key.startswith("layers.")}, strict=True)
    with torch.no_grad():
        queries = weights["queries"].expand(len(x_BNC), -1, -1)
        read = decoder(queries, torch.from_numpy(x_BNC), memory_key_padding_mask=torch.from_numpy(~valid_BN))
        return (read @ weights["out_proj.weight"].T + weights["out_proj.bias"]).numpy()


@nnx.jit
def compress(module, x_BNC, valid_BN=None, active_B=None):
    with jax.default_matmul_precision("highest"):
        return module(x_BNC, Context(valid_BN, active_B=active_B))


@pytest.mark.parametrize(("num_tokens", "padding"), [(16, 0), (16, 5), (13, 4), (1, 0)])
def test_equals_torchs_decoder(num_tokens, padding):
    module, weights = built()
    x_BNC = 3 * noise(2, num_tokens, C) + 1
    valid_BN = np.ones((2, num_tokens), bool)
    valid_BN[1, num_tokens - padding :] = False
    ours = compress(module, x_BNC, valid_BN if padding else None).tokens_BQD
    theirs = original(weights, x_BNC, valid_BN)
    np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.abs(theirs).max())


def test_queries_see_each_other_so_fewer_are_masked_not_cut():
    module, _ = built()
    x_BNC = noise(2, 16, C)
    whole, fewer = compress(module, x_BNC), compress(module, x_BNC, active_B=np.array([Q, 2], np.int32))
    np.testing.assert_allclose(fewer.tokens_BQD[0], whole.tokens_BQD[0], atol=1e-5)
    assert np.abs(fewer.tokens_BQD[1, :2] - whole.tokens_BQD[1, :2]).max() > 1e-3


def test_published_size_and_start():
    """torch's own layer has 16.8 M parameters at width 1024, F = 2048."""
    config, widths = decoder_resampler.Config(), Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096)
    sizes = {
        path: leaf.get_value().size
        for path, leaf in leaves(nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))).items()
    }
    with torch.device("meta"):
        layer = torch.nn.TransformerDecoderLayer(1024, 16)
    one = sum(parameter.numel() for parameter in layer.parameters())
    assert sum(size for path, size in sizes.items() if path.startswith("layers")) == 2 * one
    assert sizes["queries"] == 64 * 1024
    small = decoder_resampler.Config(num_queries=48, depth=2, heads=4, feed_forward=64)
    start = leaves(small.build(Widths(grid_HW=(4, 4), vision_C=32, llm_D=16), nnx.Rngs(0)))
    value = {path: np.asarray(leaf.get_value()) for path, leaf in start.items()}
    assert abs(value["queries"].std() - 1) < 0.1
    assert abs(np.abs(value["layers/self_attn/in_proj/kernel"]).max() / np.sqrt(6 / (4 * 32)) - 1) < 0.01
    for path, fan_in in {"self_attn/out_proj": 32, "cross_attn/out_proj": 32, "ff_in": 32, "ff_out": 64}.items():
        kernels = value[f"layers/{path}/kernel"]
        np.testing.assert_allclose(np.abs(kernels).max(), fan_in**-0.5, rtol=0.02)
        assert not np.array_equal(kernels[0], kernels[1]), f"{path}: layers must start apart"
