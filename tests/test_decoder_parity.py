"""Every published family read from a folder that its transformers class saved: the same hidden states and logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tcjax.config import MeshConfig
from tcjax.llms import published
from tcjax.llms.decoder import Decoder
from tcjax.sharding import make_mesh, place, place_batch
from tests.decoder_twins import CASES, VOCAB, Twin, prompt, theirs, twin

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Twin:
    return twin(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Twin:
    return twin(request.param, tmp_path_factory.mktemp(request.param))


@nnx.jit
def ours(llm: Decoder, tokens_BS, valid_BS, segment_BS=None) -> tuple[jax.Array, jax.Array]:
    hidden_BSD = llm(llm.embed(tokens_BS), valid_BS, segment_BS)
    return hidden_BSD, llm.logits(hidden_BSD)


def assert_close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_config_that_transformers_saved_is_the_one_we_meant(case):
    assert published.llm(case.folder, weights="") == case.cfg


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_hidden_states_and_logits_are_those_of_the_published_class(case, side):
    tokens_BS, valid_BS = prompt(side)
    hidden_BSD, logits_BSV = ours(case.llm, tokens_BS, valid_BS)
    expected_BSD, expected_BSV = theirs(case.model, tokens_BS, valid_BS)
    assert np.abs(expected_BSD[valid_BS]).max() > 0.5
    assert_close(hidden_BSD[valid_BS], expected_BSD[valid_BS])
    assert_close(logits_BSV[valid_BS], expected_BSV[valid_BS])


def test_a_cache_changes_nothing(case):
    """Four tokens on the left-padded prompt, then one, one more, and three at once, into a cache with a place to spare."""
    tokens_BS, valid_BS = prompt("left")
    valid_BS = valid_BS | (np.arange(9) >= 4)  # what is appended is valid

    @nnx.jit
    def in_pieces(llm: Decoder) -> jax.Array:
        seq_BSD = llm.embed(tokens_BS)
        hidden_BSD, cache = llm.prefill(seq_BSD[:, :4], valid_BS[:, :4], room=6)
        pieces = [hidden_BSD]
        for start, end in ((4, 5), (5, 6), (6, 9)):
            hidden_BSD, cache = llm.extend(seq_BSD[:, start:end], cache)
            pieces.append(hidden_BSD)
        return jnp.concatenate(pieces, axis=1)

    expected_BSD, _ = theirs(case.model, tokens_BS, valid_BS)
    assert_close(in_pieces(case.llm)[valid_BS], expected_BSD[valid_BS])


def test_a_window_hides_what_lies_before_it_and_nothing_else():
    """Two layers of window 4 reach 6 positions back: the first token moves the seventh and not the eighth."""
    llm = CASES["mistral"].build(nnx.Rngs(0))
    tokens_BS, valid_BS = np.arange(9)[None] + 3, np.ones((1, 9), bool)
    changed_BS = np.where(np.arange(9) == 0, 1, tokens_BS)
    before_BSD, after_BSD = ours(llm, tokens_BS, valid_BS)[0], ours(llm, changed_BS, valid_BS)[0]
    moved_S = np.abs(before_BSD - after_BSD).max((0, 2)) > 0
    np.testing.assert_array_equal(moved_S, np.arange(9) <= 6)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=8, tensor=1),
        MeshConfig(data=1, fsdp=1, tensor=8),
        MeshConfig(data=1, fsdp=2, tensor=4),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=lambda mesh: f"{mesh.data}x{mesh.fsdp}x{mesh.tensor}",
)
def test_eight_devices_equal_one_and_the_published_class(family, mesh):
    rng = np.random.default_rng(5)
    tokens_BS = rng.integers(0, VOCAB, (8, 9))
    valid_BS = np.arange(9) >= rng.integers(0, 5, (8, 1))
    expected_BSD, expected_BSV = theirs(family.model, tokens_BS, valid_BS)
    device = make_mesh(mesh)
    graphdef, state = nnx.split(family.llm)
    state = place(state, device)
    query = state["blocks"]["attention"]["query"]["kernel"].get_value()
    assert query.addressable_shards[0].data.size == query.size // (mesh.fsdp * mesh.tensor)
    run = jax.jit(lambda state, tokens_BS, valid_BS: ours(nnx.merge(graphdef, state), tokens_BS, valid_BS))
    hidden_BSD, logits_BSV = run(state, *place_batch((tokens_BS, valid_BS), device))
    assert_close(np.asarray(hidden_BSD)[valid_BS], expected_BSD[valid_BS])
    assert_close(np.asarray(logits_BSV)[valid_BS], expected_BSV[valid_BS])


DOCUMENTS = ([3, 1, 4, 1, 5, 9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3])


def packed(documents=DOCUMENTS, room: int = 18) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens_BS, valid_BS and segment_BS of one row: document after document as segments 1, 2, ..., then padding."""
    tokens = np.concatenate(documents)
    segments = np.repeat(np.arange(len(documents)) + 1, [len(document) for document in documents])
    behind = (0, room - len(tokens))
    return (
        np.pad(tokens, behind)[None],
        (np.arange(room) < len(tokens))[None],
        np.pad(segments, behind, constant_values=len(documents) + 1)[None],
    )


def test_packed_documents_are_each_as_if_alone(family):
    hidden_BSD, logits_BSV = ours(family.llm, *packed())
    start = 0
    for document in DOCUMENTS:
        end = start + len(document)
        alone_BSD, alone_BSV = theirs(family.model, np.array([document]), np.ones((1, len(document)), bool))
        assert_close(hidden_BSD[:, start:end], alone_BSD)
        assert_close(logits_BSV[:, start:end], alone_BSV)
        start = end


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_nothing_leaks_between_packed_documents(family, changed):
    """Another document of the same length in one place moves that document and no bit of the others."""
    others = [[t + 11 for t in document] if n == changed else document for n, document in enumerate(DOCUMENTS)]
    tokens_BS, valid_BS, segment_BS = packed()
    before_BSD, _ = ours(family.llm, tokens_BS, valid_BS, segment_BS)
    after_BSD, _ = ours(family.llm, packed(others)[0], valid_BS, segment_BS)
    mine_S = segment_BS[0] == changed + 1
    np.testing.assert_array_equal(
        np.asarray(before_BSD)[0, ~mine_S & valid_BS[0]], np.asarray(after_BSD)[0, ~mine_S & valid_BS[0]]
    )
    assert np.abs(before_BSD - after_BSD)[0, mine_S].max(-1).min() > 1e-3
