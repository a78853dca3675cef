"""The connector against transformers' own: Idefics2Connector and Idefics2PerceiverResampler with random weights."""

import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.idefics2.configuration_idefics2 import Idefics2Config, Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector, Idefics2PerceiverResampler

from tcjax.compressors import idefics2_resampler
from tcjax.compressors.base import Context, Widths
from tcjax.export.torch import idefics2_resampler as twin
from tcjax.interop import names
from tcjax.nn.perceiver import read
from tests.planted import leaves, noise
from tests.torch_layers import off

WIDTHS = Widths(grid_HW=(3, 5), vision_C=12, llm_D=16)
SIZES = {"depth": 3, "heads": 6, "kv_heads": 2, "head_width": 4}  # 24 = heads * head_width is not D
CONFIG = idefics2_resampler.Config(num_queries=5, projection=20, **SIZES)


def connector(config=CONFIG, *, seed=0, attention="sdpa") -> Idefics2Connector:
    """The published module with weights that are not small and norms that are not one."""
    published = Idefics2Config(
        vision_config={"hidden_size": WIDTHS.vision_C},
        text_config={
            "model_type": "mistral",
            "hidden_size": WIDTHS.llm_D,
            "intermediate_size": config.projection,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        perceiver_config=perceiver_config(config),
        attn_implementation=attention,
    )
    return filled(Idefics2Connector(published), seed)


def perceiver_config(config) -> dict:
    return {
        "hidden_size": WIDTHS.llm_D,
        "rms_norm_eps": config.eps,
        "resampler_n_latents": config.num_queries,
        "resampler_depth": config.depth,
        "resampler_n_heads": config.heads,
        "resampler_head_dim": config.head_width,
        "num_key_value_heads": config.kv_heads,
    }


def filled(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    with torch.no_grad():
        for number, (name, weight) in enumerate(module.named_parameters()):
            value = torch.from_numpy(noise(*weight.shape, seed=100 * seed + number))
            is_norm, is_latents = "norm" in name, name.endswith("latents")
            weight.copy_(1 + 0.2 * value if is_norm else value if is_latents else value * weight.shape[1] ** -0.5)
    return module.eval()


def ours(module: torch.nn.Module, config=CONFIG) -> nnx.Module:
    """The same weights in JAX, by the published names."""
    loaded = config.build(WIDTHS, nnx.Rngs(0))
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    names.assign(loaded, names.from_torch(tensors, config.names(WIDTHS), names.shapes(loaded)))
    return loaded


@nnx.jit
def compress(module, x_BNC, valid_BN=None):
    return module(x_BNC, Context(valid_BN, assign=True))


def ragged(num_tokens: int, padding: int) -> np.ndarray:
    valid_BN = np.ones((2, num_tokens), bool)
    valid_BN[1, num_tokens - padding :] = False
    valid_BN[0, : padding // 2] = False
    return valid_BN


@pytest.mark.parametrize(("num_tokens", "padding"), [(15, 0), (15, 6), (13, 5), (1, 0), (729, 0), (729, 300)])
def test_equals_the_published_connector(num_tokens, padding):
    published = connector(attention="eager" if padding else "sdpa")
    x_BNC, valid_BN = 3 * noise(2, num_tokens, 12) + 1, ragged(num_tokens, padding)
    with torch.no_grad():
        expected_BQD = published(torch.from_numpy(x_BNC), torch.from_numpy(valid_BN)).numpy()
    out = compress(ours(published), x_BNC, valid_BN if padding else None)
    assert off(out.tokens_BQD, expected_BQD) <= 2e-6


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_every_grouping_of_the_heads_is_the_published_one(kv_heads):
    config = idefics2_resampler.Config(num_queries=4, projection=20, **SIZES | {"kv_heads": kv_heads})
    published, x_BNC = connector(config, seed=kv_heads), noise(2, 15, 12)
    with torch.no_grad():
        expected_BQD = published(torch.from_numpy(x_BNC), torch.ones(2, 15)).numpy()
    assert off(compress(ours(published, config), x_BNC).tokens_BQD, expected_BQD) <= 2e-6


def test_the_layers_alone_are_the_published_perceiver():
    """Without the projection: tcjax.nn.perceiver.read against Idefics2PerceiverResampler."""
    published = filled(Idefics2PerceiverResampler(Idefics2PerceiverConfig(**perceiver_config(CONFIG))), 1)
    whole = connector()
    whole.perceiver_resampler.load_state_dict(published.state_dict())
    module, x_BND = ours(whole), 2 * noise(2, 11, 16)
    with torch.no_grad():
        expected_BQD = published(torch.from_numpy(x_BND), torch.ones(2, 11)).numpy()
    latents_BQD = np.broadcast_to(module.latents[...], (2, 5, 16))
    assert off(module.norm(read(module.layers, latents_BQD, x_BND, None)[0]), expected_BQD) <= 2e-6


def test_a_published_state_dict_loads_into_the_twin_as_it_is():
    published = connector()
    copy = twin.Compressor(CONFIG.describe(WIDTHS))
    copy.load_state_dict(published.state_dict(), strict=True)
    x_BNC, valid_BN = torch.from_numpy(noise(2, 13, 12)), torch.from_numpy(ragged(13, 4))
    with torch.no_grad():
        expected_BQD, (found_BQD, _) = published(x_BNC, valid_BN), copy(x_BNC, valid_BN)
    assert off(found_BQD, expected_BQD) <= 2e-6
    back = names.to_torch(names.flatten(ours(published)), CONFIG.names(WIDTHS))
    assert back.keys() == published.state_dict().keys()
    for key, value in published.state_dict().items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_the_twin_survives_torch_export():
    published = connector()
    copy = twin.Compressor(CONFIG.describe(WIDTHS))
    copy.load_state_dict(published.state_dict())
    x_BNC, valid_BN = torch.from_numpy(noise(2, 13, 12)), torch.from_numpy(ragged(13, 4))
    exported = torch.export.export(copy.eval(), (x_BNC, valid_BN)).module()
    assert off(exported(x_BNC, valid_BN)[0].detach(), copy(x_BNC, valid_BN)[0].detach()) <= 1e-6


def test_another_eps_is_another_model():
    """The trap: the checkpoint was trained at 1e-5, the library's default is 1e-6. Faint tokens tell them apart."""
    x_BNC, found = 1e-2 * noise(2, 15, 12), {}
    for eps in (1e-5, 1e-6):
        config = idefics2_resampler.Config(num_queries=5, projection=20, eps=eps, **SIZES)
        published = connector(config)
        with torch.no_grad():
            expected_BQD = published(torch.from_numpy(x_BNC), torch.ones(2, 15)).numpy()
        found[eps] = compress(ours(published, config), x_BNC).tokens_BQD
        assert off(found[eps], expected_BQD) <= 2e-6
        assert config.describe(WIDTHS)["norm_eps"] == eps
    assert np.abs(found[1e-5] - found[1e-6]).max() > 1e-2
    assert idefics2_resampler.Config().eps == 1e-5


def test_keys_are_the_image_first_and_the_assignment_is_its_part():
    """The last layer's attention as transformers' eager code returns it, head-mean, cut to the image, renormalised."""
    published, x_BNC, valid_BN, seen = connector(attention="eager"), noise(2, 15, 12), ragged(15, 6), []
    published.perceiver_resampler.layers[-1].self_attn.register_forward_hook(lambda *call: seen.append(call[-1][1]))
    with torch.no_grad():
        published(torch.from_numpy(x_BNC), torch.from_numpy(valid_BN))
    weights_BQN = seen[0].mean(1)[..., :15].numpy()
    assert np.abs(weights_BQN[~valid_BN[:, None].repeat(5, 1)]).max() == 0
    expected_BQN = weights_BQN / weights_BQN.sum(-1, keepdims=True)
    np.testing.assert_allclose(compress(ours(published), x_BNC, valid_BN).assign_BQN, expected_BQN, atol=1e-6)


def test_masking_equals_cutting_the_padding_off():
    module, x_BNC = ours(connector()), noise(2, 15, 12)
    masked = compress(module, x_BNC, np.tile(np.arange(15) < 11, (2, 1)))
    cut = compress(module, x_BNC[:, :11])
    assert off(masked.tokens_BQD, cut.tokens_BQD) <= 2e-6
    np.testing.assert_allclose(masked.assign_BQN[..., :11], cut.assign_BQN, atol=1e-6)


def test_fewer_latents_without_masking_them_would_be_another_model():
    """Outputs see each other: the first three of five are not what three latents give."""
    published = connector()
    few = CONFIG.at(3).build(WIDTHS, nnx.Rngs(0))
    nnx.update(few, nnx.state(ours(published)))
    x_BNC = noise(2, 15, 12)
    small_BQD, all_BQD = compress(few, x_BNC).tokens_BQD, compress(ours(published), x_BNC).tokens_BQD
    assert np.abs(small_BQD - all_BQD[:, :3]).max() > 1e-2
    active = Context(active_B=np.full(2, 3))
    assert off(ours(published)(x_BNC, active).tokens_BQD[:, :3], small_BQD) <= 2e-6


def test_defaults_are_the_published_ones():
    """Idefics2-8B: SigLIP-so400m (1152), Mistral-7B (4096); the perceiver alone has 651 M parameters."""
    widths = Widths(grid_HW=(27, 27), vision_C=1152, llm_D=4096)
    module = nnx.eval_shape(lambda: idefics2_resampler.Config().build(widths, nnx.Rngs(0)))
    sizes = {path: leaf.get_value().size for path, leaf in leaves(module).items()}
    projection = sum(size for path, size in sizes.items() if path.startswith("projection"))
    with torch.device("meta"):
        published = Idefics2PerceiverResampler(Idefics2PerceiverConfig())
    assert sum(sizes.values()) - projection == published.num_parameters() == 651_468_800
    assert projection == 2 * 1152 * 14336 + 14336 * 4096


def test_starts_as_published_except_for_the_latents():
    """Every kernel N(0, 0.02), every norm one; latents N(0, 0.02) where the published ones are all ones."""
    widths = Widths(grid_HW=(4, 4), vision_C=48, llm_D=64)
    config = idefics2_resampler.Config(num_queries=32, projection=64, **SIZES)
    start = leaves(config.build(widths, nnx.Rngs(0)))
    for path, leaf in start.items():
        value = np.asarray(leaf.get_value())
        if path.endswith("scale"):
            assert (value == 1).all(), path
            continue
        np.testing.assert_allclose(value.std(), 0.02, rtol=0.06, err_msg=path)
        assert abs(value.mean()) < 0.002, path
        if path.startswith("layers"):
            assert not np.array_equal(value[0], value[1]), f"{path}: layers must start apart"


def test_latents_of_ones_give_equal_outputs():
    config = idefics2_resampler.Config(num_queries=4, projection=20, latents="ones", **SIZES)
    module = config.build(WIDTHS, nnx.Rngs(0))
    assert (np.asarray(module.latents[...]) == 1).all()
    published = Idefics2PerceiverResampler(Idefics2PerceiverConfig(**perceiver_config(config)))
    assert (published.latents == 1).all()
    tokens_BQD = np.asarray(compress(module, noise(2, 15, 12)).tokens_BQD)
    np.testing.assert_allclose(tokens_BQD, tokens_BQD[:, :1].repeat(4, 1), atol=1e-6)
    apart_BQD = compress(CONFIG.build(WIDTHS, nnx.Rngs(0)), noise(2, 15, 12)).tokens_BQD
    assert np.abs(apart_BQD[:, 0] - apart_BQD[:, 1]).max() > 0.1
