"""The LLM: padding anywhere, a cache that changes nothing, strict names, bfloat16. tests/test_decoder_parity.py: its numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tcjax.interop import names
from tcjax.llms import decoder
from tcjax.llms.decoder import Decoder
from tcjax.llms.rope import frequencies, rotate, rotation
from tests.decoder_twins import LLAMA, LLAMA3, Twin, loaded, prompt, theirs, twin

EVERYTHING = dataclasses.replace(LLAMA3, tie=False, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, window=4)


class Case(NamedTuple):
    twin: Twin
    logits: Callable[..., jax.Array]  # (tokens_BS, valid_BS) -> logits_BSV, compiled once


@pytest.fixture(scope="module", params=("llama", "llama-biases", "mistral", "qwen2", "qwen3"))
def case(request, tmp_path_factory) -> Case:
    found = twin(request.param, tmp_path_factory.mktemp(request.param))
    llm = found.llm
    return Case(found, jax.jit(lambda tokens_BS, valid_BS: logits_of(llm, tokens_BS, valid_BS)))


def logits_of(llm: Decoder, tokens_BS, valid_BS=None) -> jax.Array:
    return llm.logits(llm(llm.embed(tokens_BS), valid_BS))


def test_padding_on_either_side_or_in_between_changes_nothing(case):
    """Row 1, of five tokens: in front, behind, and with the holes that invalid visual tokens leave; then nothing but itself."""
    tokens_S = np.arange(5) + 3
    rows = [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [0, 2, 3, 6, 7]]
    tokens_BS, valid_BS = np.random.default_rng(2).integers(0, 29, (3, 9)), np.zeros((3, 9), bool)
    for b, places in enumerate(rows):
        tokens_BS[b, places], valid_BS[b, places] = tokens_S, True
    alone_SV = theirs(case.twin.model, tokens_S[None], np.ones((1, 5), bool))[1][0]
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
    cfg, tensors, llm = case.twin.cfg, case.twin.tensors, case.twin.llm
    table = decoder.names(cfg)
    assert sorted(name.jax for name in table) == sorted(names.shapes(llm))
    on_disk = [
        name.torch.replace("{L}", str(layer))
        for name in table
        for layer in range(cfg.layers if "{L}" in name.torch else 1)
    ]
    assert sorted(on_disk) == sorted(tensors)


def test_import_undoes_export_bit_for_bit(case):
    cfg, tensors, llm = case.twin.cfg, case.twin.tensors, case.twin.llm
    published = names.to_torch(names.flatten(llm), decoder.names(cfg))
    assert published.keys() == tensors.keys()
    for key, tensor in published.items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key, strict=True)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded(cfg, published)), nnx.state(llm))


def test_what_old_checkpoints_store_besides_is_dropped_by_name(case):
    cfg, tensors, llm = case.twin.cfg, case.twin.tensors, case.twin.llm
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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"head_width": 7}, "head_width=7 must be even"),
        ({"layers": 0}, "at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
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
