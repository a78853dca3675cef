"""The resampler against the published blocks: transformers' Evolla attention and feed-forward are OpenFlamingo's."""

import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.evolla.modeling_evolla import EvollaFeedForward, EvollaSequenceCompressorAttention

from tcjax.compressors import resampler
from tcjax.compressors.base import Context, Widths
from tests.planted import leaves, noise, planted

C, D, Q, DEPTH, HEADS, HEAD_WIDTH, FF_MULT = 24, 16, 5, 3, 2, 8, 4  # E = 16 is not C


def twin_forward(params: dict[str, np.ndarray], x_BNC: np.ndarray, valid_BN: np.ndarray) -> np.ndarray:
    """OpenFlamingo's PerceiverResampler with our weights, then the out_proj it lacks."""
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    x, z = torch.from_numpy(x_BNC), tensors["latents"].expand(len(x_BNC), -1, -1)
    mask = torch.cat([torch.from_numpy(valid_BN), torch.ones(len(x_BNC), Q, dtype=torch.bool)], 1).float()
    for i in range(DEPTH):
        attention = EvollaSequenceCompressorAttention(C, dim_head=HEAD_WIDTH, heads=HEADS)
        feed_forward = EvollaFeedForward(C, mult=FF_MULT)
        attention.load_state_dict(
            {
                f"{name}.{theirs}": tensors[f"layers/{name}/{ours}"][i]
                for name in ("norm_media", "norm_latents")
                for theirs, ours in (("weight", "scale"), ("bias", "bias"))
            }
            | {f"{name}.weight": tensors[f"layers/{name}/kernel"][i].T for name in ("to_q", "to_kv", "to_out")}
        )
        feed_forward.load_state_dict(
            {
                "norm.weight": tensors["layers/norm_ff/scale"][i],
                "norm.bias": tensors["layers/norm_ff/bias"][i],
                "fc1.weight": tensors["layers/ff_in/kernel"][i].T,
                "fc2.weight": tensors["layers/ff_out/kernel"][i].T,
            }
        )
        z = attention(x, z, mask) + z
        z = feed_forward(z) + z
    z = torch.nn.functional.layer_norm(z, (C,), tensors["norm/scale"], tensors["norm/bias"], eps=1e-5)
    return (z @ tensors["out_proj/kernel"] + tensors["out_proj/bias"]).numpy(force=True)


@nnx.jit
def compress(module, x_BNC, valid_BN=None):
    return module(x_BNC, Context(valid_BN, assign=True))


@pytest.mark.parametrize(("num_tokens", "padding"), [(16, 0), (16, 5), (13, 4), (1, 0)])
def test_equals_open_flamingo(num_tokens, padding):
    config = resampler.Config(num_queries=Q, depth=DEPTH, heads=HEADS, head_width=HEAD_WIDTH, ff_mult=FF_MULT)
    module = planted(config, Widths(grid_HW=(4, 4), vision_C=C, llm_D=D))
    params = {path: np.array(leaf.get_value()) for path, leaf in leaves(module).items()}
    x_BNC = 3 * noise(2, num_tokens, C) + 1  # a mean that a careless LayerNorm would notice
    valid_BN = np.ones((2, num_tokens), bool)
    valid_BN[1, num_tokens - padding :] = False
    ours_BQD = np.asarray(compress(module, x_BNC, valid_BN if padding else None).tokens_BQD)
    theirs_BQD = twin_forward(params, x_BNC, valid_BN)
    np.testing.assert_allclose(ours_BQD, theirs_BQD, atol=1e-5 * np.abs(theirs_BQD).max())


def test_defaults_are_open_flamingos():
    """63.0 M parameters at width 1024 without our out_proj: 64 latents, 6 layers, 8 heads of 64."""
    module = nnx.eval_shape(
        lambda: resampler.Config().build(Widths(grid_HW=(16, 16), vision_C=1024, llm_D=4096), nnx.Rngs(0))
    )
    sizes = {path: leaf.get_value().size for path, leaf in leaves(module).items()}
    layer = 3 * 2 * 1024 + 1024 * 512 + 1024 * 1024 + 512 * 1024 + 2 * 1024 * 4096
    assert sum(size for path, size in sizes.items() if "out_proj" not in path) == 64 * 1024 + 6 * layer + 2 * 1024


def test_starts_as_torch_does():
    """Latents N(0, 1); linear layers U(-a, a) with a = 1/sqrt(fan_in), so with standard deviation a / sqrt(3)."""
    config = resampler.Config(num_queries=32, depth=2, heads=4, head_width=8, ff_mult=4)
    start = leaves(config.build(Widths(grid_HW=(4, 4), vision_C=32, llm_D=32), nnx.Rngs(0)))
    value = {path: np.asarray(leaf.get_value()) for path, leaf in start.items()}
    assert abs(value["latents"].std() - 1) < 0.1
    for path, fan_in in {"to_q": 32, "to_kv": 32, "to_out": 32, "ff_in": 32, "ff_out": 128}.items():
        kernels = value[f"layers/{path}/kernel"]
        np.testing.assert_allclose(np.abs(kernels).max(), fan_in**-0.5, rtol=0.01)
        np.testing.assert_allclose(kernels.std(), (3 * fan_in) ** -0.5, rtol=0.05)
        assert not np.array_equal(kernels[0], kernels[1]), f"{path}: layers must start apart"
    assert (value["norm/scale"] == 1).all()
    assert (value["norm/bias"] == 0).all()


def test_masking_equals_cutting_the_padding_off():
    config = resampler.Config(num_queries=Q, depth=2, heads=HEADS, head_width=HEAD_WIDTH)
    module = planted(config, Widths(grid_HW=(4, 4), vision_C=C, llm_D=D))
    x_BNC = noise(2, 16, C)
    masked = compress(module, x_BNC, np.tile(np.arange(16) < 11, (2, 1)))
    cut = compress(module, x_BNC[:, :11])
    np.testing.assert_allclose(masked.tokens_BQD, cut.tokens_BQD, atol=1e-5)
    np.testing.assert_allclose(masked.assign_BQN[..., :11], cut.assign_BQN, atol=1e-6)


def test_assignment_is_the_last_layers_attention():
    """One layer, one head, by hand: softmax over image and latents, cut to the image, renormalised."""
    config = resampler.Config(num_queries=Q, depth=1, heads=1, head_width=8)
    module = planted(config, Widths(grid_HW=(4, 4), vision_C=C, llm_D=D))
    params = {path: np.array(leaf.get_value()) for path, leaf in leaves(module).items()}
    x_BNC = noise(1, 16, C)

    def norm(x, name):
        unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return unit * params[f"layers/{name}/scale"][0] + params[f"layers/{name}/bias"][0]

    query_QE = norm(params["latents"], "norm_latents") @ params["layers/to_q/kernel"][0]
    key_NE = norm(x_BNC[0], "norm_media") @ params["layers/to_kv/kernel"][0][:, :8]
    weights_QN = np.exp(query_QE @ key_NE.T * 8**-0.5)
    expected_QN = weights_QN / weights_QN.sum(-1, keepdims=True)
    np.testing.assert_allclose(compress(module, x_BNC).assign_BQN[0], expected_QN, atol=1e-6)


@pytest.mark.parametrize(("media", "frames"), [(1, 3), (2, 1), (2, 3)])
def test_video_and_media_embeddings_are_open_flamingos(media, frames):
    """x [B, T, F, v, C]: frame_embs[f] and media_time_embs[t] join the tokens, every medium has latents of its own."""
    config = resampler.Config(
        num_queries=Q, depth=DEPTH, heads=HEADS, head_width=HEAD_WIDTH, max_frames=4, media=media, max_media=3
    )
    widths = Widths(grid_HW=(2, 3), vision_C=C, llm_D=D, frames=media * frames)
    module = planted(config, widths)
    params = {path: np.array(leaf.get_value()) for path, leaf in leaves(module).items()}
    x_BNC = noise(2, media * frames * 6, C)
    valid_BN = np.ones(x_BNC.shape[:2], bool)
    valid_BN[1, -4:] = False
    told_BTFvC = x_BNC.reshape(2, media, frames, 6, C) + params["frames"][:frames, None]
    told_BTFvC = told_BTFvC + params["media"][:media, None, None]
    rows = told_BTFvC.reshape(2 * media, frames * 6, C)
    theirs_BQD = twin_forward(params, rows, valid_BN.reshape(2 * media, -1)).reshape(2, media * Q, D)
    ours = compress(module, x_BNC, valid_BN)
    np.testing.assert_allclose(ours.tokens_BQD, theirs_BQD, atol=1e-5 * np.abs(theirs_BQD).max())
    for medium in range(media):  # nobody looks at another medium's tokens
        outputs = ours.assign_BQN[:, medium * Q : (medium + 1) * Q].reshape(2, Q, media, -1)
        np.testing.assert_allclose(outputs[:, :, medium].sum(-1), 1, atol=1e-5)


def test_more_frames_or_media_than_embeddings_are_refused():
    widths = Widths(grid_HW=(2, 3), vision_C=C, llm_D=D, frames=5)
    with pytest.raises(ValueError, match="5 frames of 1 media do not fit max_frames=4"):
        resampler.Config(max_frames=4).build(widths, nnx.Rngs(0))
    with pytest.raises(ValueError, match="media=5 is more than max_media=2"):
        resampler.Config(media=5, max_media=2).build(widths, nnx.Rngs(0))
