"""The LLM: numbers of the published classes, padding on either side, a cache that changes nothing, strict names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from configs import llms
from tcjax.interop import names
from tcjax.llms import decoder
from tcjax.llms.decoder import Decoder, LlmConfig
from tcjax.llms.rope import Llama3Scaling, frequencies, rotate, rotation

LLAMA = LlmConfig(
    vocab=29,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,  # queries are 32 wide, the model 24
    feed_forward=32,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie=False,
)
CASES = {
    "llama": LLAMA,
    "llama-tied-ungrouped": dataclasses.replace(LLAMA, tie=True, kv_heads=4),
    # Waves of 6, 63, 628 and 6283 positions: the first is kept, the second blended, the others slow down.
    "llama3": dataclasses.replace(
        LLAMA, tie=True, rope_scaling=Llama3Scaling(factor=8.0, low=0.5, high=4.0, original=64)
    ),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6, head_width=6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, norm_eps=1e-6, rope_theta=1e6, tie=True),
}
EVERYTHING = dataclasses.replace(CASES["llama3"], tie=False, qkv_bias=True, qk_norm=True)
LENGTHS = np.array([9, 5, 1])  # valid tokens per row


def twin(cfg: LlmConfig) -> torch.nn.Module:
    """The published class at this size; every tensor random, so that no norm or bias hides behind its initial value."""
    if cfg.qkv_bias:
        config_type, model_type = transformers.Qwen2Config, transformers.Qwen2ForCausalLM
    elif cfg.qk_norm:
        config_type, model_type = transformers.Qwen3Config, transformers.Qwen3ForCausalLM
    else:
        config_type, model_type = transformers.LlamaConfig, transformers.LlamaForCausalLM
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": cfg.rope_scaling.factor,
            "low_freq_factor": cfg.rope_scaling.low,
            "high_freq_factor": cfg.rope_scaling.high,
            "original_max_position_embeddings": cfg.rope_scaling.original,
        }
    extra = {} if cfg.qkv_bias else {"head_dim": cfg.head_width}
    config = config_type(
        vocab_size=cfg.vocab,
        hidden_size=cfg.width,
        intermediate_size=cfg.feed_forward,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tie,
        rope_parameters=rope,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **extra,
    )
    model = model_type(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


class Case(NamedTuple):
    cfg: LlmConfig
    model: torch.nn.Module  # the published class
    tensors: dict[str, np.ndarray]  # its file
    llm: Decoder  # ours with those weights
    logits: Callable[..., jax.Array]  # (tokens_BS, valid_BS) -> logits_BSV, compiled once


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    cfg = CASES[request.param]
    model, folder = twin(cfg), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    llm = loaded(cfg, tensors)
    return Case(cfg, model, tensors, llm, jax.jit(lambda tokens_BS, valid_BS: logits_of(llm, tokens_BS, valid_BS)))


def loaded(cfg: LlmConfig, tensors: dict[str, np.ndarray]) -> Decoder:
    llm = cfg.build(nnx.Rngs(0))
    names.assign(llm, names.from_torch(tensors, decoder.names(cfg), names.shapes(llm), ignore=decoder.ignore(cfg)))
    return llm


def prompt(side: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens_BS and valid_BS of LENGTHS valid tokens, the same tokens whichever side is padded."""
    rng, S = np.random.default_rng(0), LENGTHS.max()
    tokens_BS = rng.integers(0, 29, (len(LENGTHS), S))
    valid_BS = np.arange(S) < LENGTHS[:, None]
    if side == "right":
        return tokens_BS, valid_BS
    rolled = [np.roll(row, S - length) for row, length in zip(tokens_BS, LENGTHS, strict=True)]
    return np.stack(rolled), valid_BS[:, ::-1]


def logits_of(llm: Decoder, tokens_BS, valid_BS=None) -> jax.Array:
    return llm.logits(llm(llm.embed(tokens_BS), valid_BS))


def theirs(model: torch.nn.Module, tokens_BS: np.ndarray, valid_BS: np.ndarray) -> np.ndarray:
    mask = torch.from_numpy(valid_BS.copy())
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens_BS.copy()),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        )
    return out.logits.numpy()


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_the_published_class(case, side):
    tokens_BS, valid_BS = prompt(side)
    expected_BSV = theirs(case.model, tokens_BS, valid_BS)
    logits_BSV = np.asarray(case.logits(tokens_BS, valid_BS))
    assert logits_BSV.dtype == np.float32
    np.testing.assert_allclose(logits_BSV[valid_BS], expected_BSV[valid_BS], rtol=1e-5, atol=1e-5)


def test_padding_on_either_side_or_in_between_changes_nothing(case):
    """Row 1, of five tokens: in front, behind, and with the holes that invalid visual tokens leave; then nothing but itself."""
    tokens_S = np.arange(5) + 3
    rows = [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [0, 2, 3, 6, 7]]
    tokens_BS, valid_BS = np.random.default_rng(2).integers(0, 29, (3, 9)), np.zeros((3, 9), bool)
    for b, places in enumerate(rows):
        tokens_BS[b, places], valid_BS[b, places] = tokens_S, True
    alone_SV = theirs(case.model, tokens_S[None], np.ones((1, 5), bool))[0]
    for row_SV in np.asarray(case.logits(tokens_BS, valid_BS))[valid_BS].reshape(3, 5, -1):
        np.testing.assert_allclose(row_SV, alone_SV, rtol=1e-5, atol=1e-5)


def test_a_token_never_sees_what_follows(case):
    tokens_BS, valid_BS = prompt("right")[0], np.ones((3, 9), bool)
    changed_BS = tokens_BS.copy()
    changed_BS[:, 5:] = (changed_BS[:, 5:] + 1) % 29
    before_BSV, after_BSV = case.logits(tokens_BS, valid_BS), case.logits(changed_BS, valid_BS)
    np.testing.assert_array_equal(before_BSV[:, :5], after_BSV[:, :5])
    assert np.abs(before_BSV[:, 5:] - after_BSV[:, 5:]).max(-1).min() > 1e-3


def test_prefill_and_extend_equal_the_whole_forward():
    """Five tokens on the left-padded prompt, then one by one, then two at once, into a cache with a place to spare."""
    tokens_BS, valid_BS = prompt("left")
    valid_BS = valid_BS | (np.arange(9) >= 5)  # what is appended is valid
    llm, rng = EVERYTHING.build(nnx.Rngs(0)), np.random.default_rng(3)
    # No bias and no norm hides behind an initial 0 or 1.
    planted = {path: 0.3 * rng.normal(size=shape) + ("norm" in path) for path, shape in names.shapes(llm).items()}
    names.assign(llm, planted)

    @jax.jit
    def whole_and_in_pieces(tokens_BS, valid_BS):
        seq_BSD = llm.embed(tokens_BS)
        hidden_BSD, cache = llm.prefill(seq_BSD[:, :5], valid_BS[:, :5], room=5)
        pieces = [hidden_BSD]
        for start, end in ((5, 6), (6, 7), (7, 9)):
            hidden_BSD, cache = llm.extend(seq_BSD[:, start:end], cache)
            pieces.append(hidden_BSD)
        return llm(seq_BSD, valid_BS), jnp.concatenate(pieces, axis=1), cache

    whole_BSD, hidden_BSD, cache = whole_and_in_pieces(tokens_BS, valid_BS)
    assert np.abs(whole_BSD[1] - whole_BSD[2]).max() > 0.1
    np.testing.assert_allclose(hidden_BSD[valid_BS], whole_BSD[valid_BS], rtol=1e-5, atol=1e-5)
    assert cache.key_LBMJA.shape[:3] == (2, 3, 10)
    assert cache.used == 9
    np.testing.assert_array_equal(cache.valid_BM, np.pad(valid_BS, ((0, 0), (0, 1))))


def test_names_are_a_bijection_with_the_published_file(case):
    cfg, tensors, llm = case.cfg, case.tensors, case.llm
    table = decoder.names(cfg)
    assert sorted(name.jax for name in table) == sorted(names.shapes(llm))
    on_disk = [
        name.torch.replace("{L}", str(layer))
        for name in table
        for layer in range(cfg.layers if "{L}" in name.torch else 1)
    ]
    assert sorted(on_disk) == sorted(tensors)


def test_import_undoes_export_bit_for_bit(case):
    cfg, tensors, llm = case.cfg, case.tensors, case.llm
    published = names.to_torch(names.flatten(llm), decoder.names(cfg))
    assert published.keys() == tensors.keys()
    for key, tensor in published.items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key, strict=True)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded(cfg, published)), nnx.state(llm))


def test_what_old_checkpoints_store_besides_is_dropped_by_name(case):
    cfg, tensors, llm = case.cfg, case.tensors, case.llm
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for layer in range(2)}
    if cfg.tie:
        extra["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded(cfg, tensors | extra)), nnx.state(llm))
    with pytest.raises(ValueError, match=r"model.surprise"):
        loaded(cfg, tensors | {"model.surprise": np.ones(1, np.float32)})


def test_jit_equals_eager_in_graph_and_tree_mode():
    tokens_BS, valid_BS = prompt("right")
    llm = EVERYTHING.build(nnx.Rngs(0))
    eager_BSV = logits_of(llm, tokens_BS, valid_BS)
    for graph in (True, False):
        graphdef, state = nnx.split(llm, graph=graph)
        jitted_BSV = jax.jit(lambda state, g=graphdef: logits_of(nnx.merge(g, state), tokens_BS, valid_BS))(state)
        np.testing.assert_allclose(jitted_BSV, eager_BSV, atol=1e-6)


def test_bfloat16_stays_bfloat16_and_close():
    tokens_BS, valid_BS = prompt("left")

    @jax.jit
    def run(state):
        llm = nnx.merge(graphdef, state)
        hidden_BSD, cache = llm.prefill(llm.embed(tokens_BS[:, :8]), valid_BS[:, :8], room=1)
        hidden_B1D, _ = llm.extend(llm.embed(tokens_BS[:, 8:]), cache)
        return hidden_BSD, hidden_B1D, llm.logits(hidden_B1D)

    graphdef, state = nnx.split(EVERYTHING.build(nnx.Rngs(0)))
    wide, narrow = run(state), run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    assert [array.dtype for array in narrow] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    seen_BS = valid_BS[:, :8]
    np.testing.assert_allclose(narrow[0].astype(jnp.float32)[seen_BS], wide[0][seen_BS], atol=0.1)
    np.testing.assert_allclose(narrow[1].astype(jnp.float32), wide[1], atol=0.1)


def test_gradients_are_finite_behind_padding_and_reach_every_parameter():
    tokens_BS, valid_BS = prompt("left")
    graphdef, state = nnx.split(EVERYTHING.build(nnx.Rngs(0)))

    @jax.jit
    @jax.grad
    def gradient(state):
        logits_BSV = logits_of(nnx.merge(graphdef, state), tokens_BS, valid_BS)
        return -jnp.sum(jax.nn.log_softmax(logits_BSV)[..., 3] * valid_BS)

    for path, leaf in names.flatten(gradient(state)).items():
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-6, path


def test_rotation_by_hand():
    """At position 3 the pair (1, 0) of frequency 1 becomes (cos 3, sin 3), the pair of frequency 0.01 barely turns."""
    assert frequencies(4, 1e4).tolist() == pytest.approx([1.0, 0.01])
    turned = rotate(
        jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4), rotation(jnp.array([[3]]), frequencies(4, 1e4))
    )
    expected = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    np.testing.assert_allclose(turned.ravel(), expected, atol=1e-6)


def test_frequencies_are_those_of_the_published_llama_3_2():
    """transformers' own table at the real head width and scaling, to the last bit but one."""
    cfg = llms.llama_3_2_1b()
    config = transformers.LlamaConfig(
        head_dim=64,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = frequencies(cfg.head_width, cfg.rope_theta, cfg.rope_scaling)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=5e-7)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"head_width": 7}, "head_width=7 must be even"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_impossible_configs_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **changes)


def test_wrong_shapes_say_why():
    llm = LLAMA.build(nnx.Rngs(0))
    seq_BSD = jnp.zeros((2, 4, 24))
    with pytest.raises(ValueError, match=r"valid_BS is \[2, 3\], but seq_BSD is \[2, 4, 24\]"):
        llm(seq_BSD, jnp.ones((2, 3), bool))
    _, cache = llm.prefill(seq_BSD, None, room=1)
    with pytest.raises(ValueError, match="6 new positions do not fit a cache of 5"):
        llm.extend(jnp.zeros((2, 6, 24)), cache)


@pytest.mark.parametrize(
    "preset, parameters",
    [
        (llms.vicuna_7b, 6_738_415_616),
        (llms.llama_3_2_1b, 1_235_814_400),
        (llms.qwen2_5_0_5b, 494_032_768),
        (llms.qwen3_0_6b, 596_049_920),
        (llms.smollm2_135m, 134_515_008),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_published_sizes_add_up(preset, parameters):
    cfg = preset()
    first, second = (
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda c=c: c.build(nnx.Rngs(0))))))
        for c in (dataclasses.replace(cfg, layers=1), dataclasses.replace(cfg, layers=2))
    )
    assert first + (cfg.layers - 1) * (second - first) == parameters
