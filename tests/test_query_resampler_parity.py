"""The text-primed perceiver against TG-LLaVA's own module, and, for masks it does not know, transformers' layers.

tests/golden/query_resampler.safetensors: inputs, random weights and outputs of `mm_patch_encoder` in
tg_llava/model/multimodal_patch_encoder/builder.py of AIDC-AI/TG-LLaVA at commit 0009eb8, run in float32 with small sizes
in place of the literals it is written with (width 8 for 1024, text 10 for 768, 5 latents for 64, N positions for 2304) and
4 heads of 4 sharing 2 key/value heads. It has no masks, one layer for the text and one for the image.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverLayer, Idefics2RMSNorm

from tcjax.compressors import query_resampler
from tcjax.compressors.base import Context, Widths
from tcjax.export.torch import query_resampler as twin
from tcjax.interop import names
from tests.planted import leaves, noise, planted
from tests.torch_layers import off

GOLDEN = load_file(Path(__file__).parent / "golden/query_resampler.safetensors")
SIZES = {"heads": 4, "kv_heads": 2, "head_width": 4}
ORIGINAL = query_resampler.Config(num_queries=5, width=8, **SIZES)
GRIDS = {  # of the golden cases; "tiles" is one image cut into four
    "tiles": Widths(grid_HW=(2, 3), frames=4, vision_C=8, llm_D=12, text_D=10),
    "grid": Widths(grid_HW=(3, 5), vision_C=8, llm_D=12, text_D=10),
    "word": Widths(grid_HW=(4, 4), vision_C=8, llm_D=12, text_D=10),
}
WIDTHS = Widths(grid_HW=(3, 5), vision_C=12, llm_D=16, text_D=10)  # the working width is none of these
CONFIGS = {
    "published": query_resampler.Config(num_queries=5, width=8, **SIZES),
    "deep": query_resampler.Config(num_queries=4, width=8, depth=4, text_layers=2, positions=False, **SIZES),
    "eps": query_resampler.Config(num_queries=3, width=8, depth=3, eps=1e-3, **SIZES),
}


@nnx.jit
def compress(module, x_BNC, text_BTD, text_valid_BT=None, valid_BN=None):
    return module(x_BNC, Context(valid_BN, True, text_BTD, text_valid_BT))


def weights_of(case: str) -> dict[str, np.ndarray]:
    prefix = f"{case}.weights."
    return {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}


@pytest.mark.parametrize("case", GRIDS)
def test_equals_tg_llava(case):
    module, widths = ORIGINAL.build(GRIDS[case], nnx.Rngs(0)), GRIDS[case]
    published = weights_of(case)
    names.assign(module, names.from_torch(published, ORIGINAL.names(widths), names.shapes(module)))
    out = compress(module, GOLDEN[f"{case}.tokens"], GOLDEN[f"{case}.text"])
    assert off(out.tokens_BQD, GOLDEN[f"{case}.out"]) <= 2e-6
    back = names.to_torch(names.flatten(module), ORIGINAL.names(widths))
    assert back.keys() == published.keys()
    for key, value in published.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("case", GRIDS)
def test_tg_llavas_state_dict_loads_into_the_twin_as_it_is(case):
    copy = twin.Compressor(ORIGINAL.describe(GRIDS[case])).eval()
    copy.load_state_dict({key: torch.from_numpy(value) for key, value in weights_of(case).items()}, strict=True)
    with torch.no_grad():
        out = copy(torch.from_numpy(GOLDEN[f"{case}.tokens"]), text=torch.from_numpy(GOLDEN[f"{case}.text"]))
    assert off(out, GOLDEN[f"{case}.out"]) <= 2e-6


def oracle(module, config, x_BNC, text_BTD, text_valid_BT, valid_BN) -> np.ndarray:
    """Transformers' layers with our weights, one row at a time with its padding cut off: no mask is involved."""
    weight = {path: torch.from_numpy(np.array(leaf.get_value())) for path, leaf in leaves(module).items()}
    sizes = {"resampler_n_heads": config.heads, "resampler_head_dim": config.head_width}
    facts = Idefics2PerceiverConfig(
        hidden_size=config.width, rms_norm_eps=config.eps, num_key_value_heads=config.kv_heads, **sizes
    )
    facts._attn_implementation = "eager"

    def layer(room: str, number: int) -> torch.nn.Module:
        made = Idefics2PerceiverLayer(facts, 0)
        table = [name for name in config.names(WIDTHS) if name.jax.startswith(f"{room}/")]
        offset = 0 if room == "text_layers" else config.text_layers
        arrays = names.to_torch({name.jax: weight[name.jax].numpy() for name in table}, table)
        own = f"perceiver.layers.{number + offset}."
        made.load_state_dict({k.removeprefix(own): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(own)})
        return made

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        for number in (0, 1):
            x = torch.nn.functional.gelu(x) if number else x
            x = x @ weight[f"{name}/linears/{number}/kernel"] + weight[f"{name}/linears/{number}/bias"]
        return x

    readers = [("text_layers", number) for number in range(config.text_layers)]
    readers += [("image_layers", number) for number in range(config.depth - config.text_layers)]
    final = Idefics2RMSNorm(config.width, eps=config.eps)
    final.load_state_dict({"weight": weight["norm/scale"]})
    rows = []
    for row in range(len(x_BNC)):
        image = torch.from_numpy(x_BNC[row]) + (weight["positions"] if config.positions else 0)
        image = mlp(image[torch.from_numpy(valid_BN[row])], "to_image")[None]
        text = torch.from_numpy(text_BTD[row][text_valid_BT[row]])
        text = (text @ weight["to_text/kernel"] + weight["to_text/bias"])[None]
        z = weight["latents"][: config.num_queries][None]
        for room, number in readers:
            z = layer(room, number)(z, text if room == "text_layers" else image)
        rows.append(mlp(final(z), "out")[0])
    return torch.stack(rows).numpy(force=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_layers_under_ragged_masks(name):
    """Full, partly padded and null text; ragged images. NaN lies where nobody may look."""
    config = CONFIGS[name]
    module = planted(config, WIDTHS)
    x_BNC, text_BTD = 2 * noise(3, 15, 12) + 1, noise(3, 6, 10, seed=1)
    text_valid_BT = np.stack([np.ones(6, bool), np.arange(6) % 3 == 1, np.zeros(6, bool)])
    valid_BN = np.stack([np.arange(15) % 5 < 3, np.ones(15, bool), np.arange(15) == 7])
    expected_BQD = oracle(module, config, x_BNC, text_BTD, text_valid_BT, valid_BN)
    hidden_BNC = np.where(valid_BN[..., None], x_BNC, np.float32(np.nan))
    hidden_BTD = np.where(text_valid_BT[..., None], text_BTD, np.float32(np.nan))
    assert off(compress(module, hidden_BNC, hidden_BTD, text_valid_BT, valid_BN).tokens_BQD, expected_BQD) <= 2e-6


@pytest.mark.parametrize("num_tokens", [1, 13, 729])
def test_without_positions_any_number_of_tokens_will_do(num_tokens):
    config = CONFIGS["deep"]
    module = planted(config, WIDTHS)
    x_BNC, text_BTD = noise(2, num_tokens, 12), noise(2, 3, 10, seed=1)
    everything = np.ones((2, 3), bool), np.ones((2, num_tokens), bool)
    assert (
        off(compress(module, x_BNC, text_BTD).tokens_BQD, oracle(module, config, x_BNC, text_BTD, *everything)) <= 2e-6
    )


def test_the_question_changes_what_is_read_from_the_image():
    module = planted(ORIGINAL, GRIDS["grid"])
    x_BNC, text_BTD = noise(1, 15, 8).repeat(3, 0), noise(3, 4, 10, seed=1)
    text_valid_BT = np.array([[True] * 4, [True] * 4, [False] * 4])
    out = compress(module, x_BNC, text_BTD, text_valid_BT)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(out.tokens_BQD[one] - out.tokens_BQD[other]).max() > 0.1
        assert np.abs(out.assign_BQN[one] - out.assign_BQN[other]).max() > 1e-3


def test_the_null_text_is_the_same_whatever_its_length_and_content():
    module = planted(ORIGINAL, GRIDS["grid"])
    x_BNC = noise(2, 15, 8)
    short = compress(module, x_BNC, noise(2, 1, 10), np.zeros((2, 1), bool)).tokens_BQD
    long = compress(module, x_BNC, np.full((2, 9, 10), np.nan, np.float32), np.zeros((2, 9), bool)).tokens_BQD
    assert np.isfinite(short).all()
    assert off(long, short) <= 2e-6


def test_the_question_is_read_in_any_order():
    """No positions in the text: it is a set, of which padding is no part."""
    module = planted(ORIGINAL, GRIDS["grid"])
    x_BNC, text_BTD, text_valid_BT = noise(2, 15, 8), noise(2, 6, 10, seed=1), np.tile(np.arange(6) < 4, (2, 1))
    order = [5, 3, 0, 4, 2, 1]
    one = compress(module, x_BNC, text_BTD, text_valid_BT).tokens_BQD
    other = compress(module, x_BNC, text_BTD[:, order], text_valid_BT[:, order]).tokens_BQD
    assert off(other, one) <= 2e-6


def test_the_twin_survives_torch_export():
    copy = twin.Compressor(ORIGINAL.describe(GRIDS["grid"])).eval()
    inputs = (torch.from_numpy(noise(2, 15, 8)), torch.ones(2, 15, dtype=torch.bool))
    inputs += (torch.from_numpy(noise(2, 6, 10)), torch.arange(6)[None] < torch.tensor([[4], [0]]))
    exported = torch.export.export(copy, inputs).module()
    assert off(exported(*inputs)[0].detach(), copy(*inputs)[0].detach()) <= 2e-6


def test_defaults_are_the_published_ones():
    """CLIP-L (1024), its text tower (768), Qwen2-7B (3584), four tiles of 24 x 24."""
    widths = Widths(grid_HW=(24, 24), frames=4, vision_C=1024, llm_D=3584, text_D=768)
    config = query_resampler.Config()
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    sizes = {path.split("/")[0]: 0 for path in leaves(module)}
    for path, leaf in leaves(module).items():
        sizes[path.split("/")[0]] += leaf.get_value().size
    layer = 3 * 1024 + 2 * 1024 * 1536 + 2 * 1024 * 384 + 3 * 1024 * 4096
    assert sizes["text_layers"] == sizes["image_layers"] == layer
    assert sizes["text_layers"] + sizes["image_layers"] + sizes["latents"] + sizes["norm"] == 33_102_848
    assert sizes["positions"] == 2304 * 1024
    assert sizes["to_text"] == 768 * 1024 + 1024
    assert sizes["to_image"] == 2 * (1024 * 1024 + 1024)
    assert sizes["out"] == 1024 * 3584 + 3584 + 3584 * 3584 + 3584


def test_starts_as_published():
    """Latents N(0, 0.02), positions N(0, 1), kernels as torch draws them: U(-a, a), a = 1 / sqrt(fan_in); biases 0."""
    widths = Widths(grid_HW=(6, 6), vision_C=32, llm_D=48, text_D=40)
    start = leaves(query_resampler.Config(num_queries=32, width=64, depth=4, **SIZES).build(widths, nnx.Rngs(0)))
    value = {path: np.asarray(leaf.get_value()) for path, leaf in start.items()}
    np.testing.assert_allclose(value["latents"].std(), 0.02, rtol=0.06)
    np.testing.assert_allclose(value["positions"].std(), 1, rtol=0.06)
    for path, array in value.items():
        if path.endswith("kernel"):
            np.testing.assert_allclose(np.abs(array).max(), array.shape[-2] ** -0.5, rtol=0.02, err_msg=path)
            np.testing.assert_allclose(array.std(), (3 * array.shape[-2]) ** -0.5, rtol=0.06, err_msg=path)
        elif path.endswith(("scale", "bias")):
            assert (array == path.endswith("scale")).all(), path
    assert not np.array_equal(value["image_layers/query/kernel"][0], value["image_layers/query/kernel"][1])
    assert not np.array_equal(value["text_layers/query/kernel"][0], value["image_layers/query/kernel"][0])


def test_a_compressor_for_no_text_is_refused():
    with pytest.raises(ValueError, match=r"Widths.text_D=0: .* the LLM's"):
        ORIGINAL.build(Widths(grid_HW=(3, 5), vision_C=8, llm_D=12), nnx.Rngs(0))


def test_the_twin_misses_its_text_by_name():
    copy = twin.Compressor(ORIGINAL.describe(GRIDS["grid"]))
    with pytest.raises(ValueError, match="give text="):
        copy(torch.from_numpy(noise(2, 15, 8)))
