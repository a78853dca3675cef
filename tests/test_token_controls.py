"""The controls that keep tokens without looking: what they keep is fixed, even, and the same in PyTorch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tcjax.compressors import random_tokens, stride_tokens
from tcjax.compressors.base import Context, Widths
from tcjax.interop import names, tensors
from tests.exported import WIDTHS, artifact
from tests.planted import noise
from tests.test_projector_parity import C, D, assert_equal, build, llava

GRID = Widths(grid_HW=(8, 8), vision_C=C, llm_D=D)


@nnx.jit
def compress(module, x_BNC, valid_BN=None, index_B=None):
    return module(x_BNC, Context(valid_BN, assign=True, index_B=index_B))


def kept(module, valid_BN=None, index_B=None, rows=1):
    """The positions of each row's valid outputs."""
    rows = rows if valid_BN is None else len(valid_BN)
    x_BNC = noise(rows if index_B is None else len(index_B), module.widths.num_tokens, C)
    out = compress(module, x_BNC, valid_BN, index_B)
    where_BQ = np.asarray(out.assign_BQN).argmax(-1)
    return [row if out.valid_BQ is None else row[np.asarray(out.valid_BQ[b])] for b, row in enumerate(where_BQ)]


def twin_of(case):
    modeling: dict = {}
    exec((artifact(case) / "modeling_compressor.py").read_text(), modeling)
    twin = modeling["Compressor"](json.loads((artifact(case) / "compressor_config.json").read_text()))
    weights = tensors.load(artifact(case) / "compressor.safetensors")
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return twin, weights


def ragged(rows, num_tokens, seed=0):
    """From nearly full to nearly empty."""
    random = np.random.RandomState(seed)
    return random.random_sample((rows, num_tokens)) < np.linspace(1, 0.02, rows)[:, None]


@pytest.mark.parametrize(
    "config",
    [
        random_tokens.Config(num_queries=9),
        stride_tokens.Config(num_queries=9),
        stride_tokens.Config(num_queries=9, mode="first"),
    ],
    ids=["random", "grid", "first"],
)
def test_what_is_kept_is_projected_as_llava_does(config):
    module, weights = build(config, (5, 7))
    x_BNC, index_B = noise(3, 35, C), jnp.asarray([0, 4, 9])
    out = compress(module, x_BNC, None, index_B)
    for b, where_Q in enumerate(kept(module, None, index_B)):
        assert len(set(where_Q)) == 9
        assert_equal(out.tokens_BQD[b], llava(weights)(torch.from_numpy(x_BNC[b, where_Q])))


@pytest.mark.parametrize(
    "config",
    [
        random_tokens.Config(num_queries=16),
        stride_tokens.Config(num_queries=16),
        stride_tokens.Config(num_queries=16, mode="first"),
    ],
    ids=["random", "grid", "first"],
)
def test_with_padding_as_many_valid_tokens_are_kept_as_there_are(config):
    module = config.build(GRID, nnx.Rngs(0))
    valid_BN = ragged(12, 64)
    for valid_N, where in zip(valid_BN, kept(module, valid_BN), strict=True):
        assert len(where) == min(16, valid_N.sum())
        assert valid_N[where].all()
        assert (np.diff(where) > 0).all()  # raster order, none twice


# Random --------------------------------------------------------------------------------------------------------------


def test_an_image_keeps_its_tokens_wherever_it_stands():
    module = random_tokens.Config(num_queries=10).build(GRID, nnx.Rngs(0))
    one = kept(module, None, jnp.asarray([5, 6, 7]))
    other = kept(module, None, jnp.asarray([9, 7, 5, 1]))
    np.testing.assert_array_equal(one[0], other[2])
    np.testing.assert_array_equal(one[2], other[1])
    assert len({tuple(row) for row in one + other}) == 5
    again = random_tokens.Config(num_queries=10, seed=1).build(GRID, nnx.Rngs(0))
    assert not np.array_equal(kept(again, None, jnp.asarray([5]))[0], one[0])


def test_fewer_are_drawn_from_those_that_more_kept():
    index_B = jnp.asarray([1, 2])
    few, many = (kept(random_tokens.Config(num_queries=q).build(GRID, nnx.Rngs(0)), None, index_B) for q in (6, 20))
    assert all(set(a) < set(b) for a, b in zip(few, many, strict=True))


def test_without_an_index_all_images_keep_the_same():
    module = random_tokens.Config(num_queries=10).build(GRID, nnx.Rngs(0))
    where = kept(module, rows=3)
    np.testing.assert_array_equal(where[0], where[1])
    np.testing.assert_array_equal(where[0], kept(module, None, jnp.asarray([0]))[0])


def test_the_draw_is_the_written_hash():
    """In Python's own integers: a change would silently change every control."""

    def mixed(x):
        for _ in range(2):
            x = (x ^ x >> 16) * 0x45D9F3B % 2**32
        return x ^ x >> 16

    index_B = [0, 12, 2**31 - 1]
    where = kept(random_tokens.Config(num_queries=6, seed=3).build(GRID, nnx.Rngs(0)), None, jnp.asarray(index_B))
    for index, row in zip(index_B, where, strict=True):
        state = mixed(mixed(0x9E3779B9 ^ 3) ^ index)
        assert row.tolist() == sorted(sorted(range(64), key=lambda n: mixed(state ^ n) >> 1)[:6])
    assert where[0].tolist() == [8, 10, 34, 43, 48, 53]


def test_every_token_is_as_likely_as_any_other():
    """4,000 images keep 16 of 64: every token in 1,000 of them, every pair in 238, both within 5 deviations."""
    module = random_tokens.Config(num_queries=16).build(GRID, nnx.Rngs(0))
    chosen_BN = np.zeros((4000, 64))
    for b, where in enumerate(kept(module, None, jnp.arange(4000))):
        chosen_BN[b, where] = 1
    assert np.abs(chosen_BN.sum(0) - 1000).max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    pairs_NN = (chosen_BN.T @ chosen_BN)[~np.eye(64, dtype=bool)]
    share = 16 / 64 * 15 / 63
    assert np.abs(pairs_NN - 4000 * share).max() < 5 * (4000 * share * (1 - share)) ** 0.5


def test_pytorch_draws_the_same_tokens():
    twin, weights = twin_of("random_tokens")
    config = random_tokens.Config(num_queries=10, seed=3)
    module = config.build(WIDTHS, nnx.Rngs(0))
    shapes = names.shapes(module)
    names.assign(module, names.from_torch(weights, config.names(WIDTHS), shapes))
    index = np.array([0, 1, 17, 2**31 - 1, 123_456_789], np.int32)
    x_BNC, valid_BN = noise(5, 24, 8), ragged(5, 24)
    with torch.no_grad():
        plain = twin(torch.from_numpy(x_BNC), index=torch.from_numpy(index))
        masked, some = twin(torch.from_numpy(x_BNC), torch.from_numpy(valid_BN), index=torch.from_numpy(index))
    assert_equal(compress(module, x_BNC, None, jnp.asarray(index)).tokens_BQD, plain)
    out = compress(module, x_BNC, valid_BN, jnp.asarray(index))
    assert_equal(out.tokens_BQD, masked)
    np.testing.assert_array_equal(out.valid_BQ, some)


# Strided -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid_HW", "shape", "rows", "columns"),
    [
        ((8, 8), (2, 4), [2, 6], [1, 3, 5, 7]),
        ((5, 7), (2, 3), [1, 3], [1, 3, 5]),
        ((24, 24), (3, 3), [4, 12, 20], [4, 12, 20]),
        ((3, 2), (3, 2), [0, 1, 2], [0, 1]),
    ],
)
def test_the_lattice_is_even_and_centred(grid_HW, shape, rows, columns):
    config = stride_tokens.Config(num_queries=shape[0] * shape[1], shape=shape)
    module = config.build(Widths(grid_HW=grid_HW, vision_C=C, llm_D=D), nnx.Rngs(0))
    expected = [row * grid_HW[1] + column for row in rows for column in columns]
    assert kept(module)[0].tolist() == expected
    assert config.out_grid(module.widths) == shape


def test_the_lattice_is_stretched_over_what_is_valid():
    """Padding on the right and below: the lattice of the smaller grid."""
    module = stride_tokens.Config(num_queries=9).build(GRID, nnx.Rngs(0))
    small = stride_tokens.Config(num_queries=9).build(Widths(grid_HW=(5, 6), vision_C=C, llm_D=D), nnx.Rngs(0))
    valid_HW = np.zeros((8, 8), bool)
    valid_HW[:5, :6] = True
    rows, columns = np.divmod(kept(small)[0], 6)
    np.testing.assert_array_equal(kept(module, valid_HW.reshape(1, 64))[0], 8 * rows + columns)


def test_missing_points_are_replaced_evenly():
    """One column is invalid in all rows but the last, so the lattice keeps it and misses three of its four points."""
    module = stride_tokens.Config(num_queries=16).build(GRID, nnx.Rngs(0))
    valid_HW = np.ones((8, 8), bool)
    valid_HW[:7, 3] = False
    where = kept(module, valid_HW.reshape(1, 64))[0]
    lattice = [8 * row + column for row in (1, 3, 5, 7) for column in (1, 3, 5, 7)]
    right = [n for n in lattice if valid_HW.reshape(-1)[n]]
    left = [n for n in range(64) if valid_HW.reshape(-1)[n] and n not in right]
    assert len(right) == 13
    assert where.tolist() == sorted(right + [left[(2 * i + 1) * len(left) // 6] for i in range(3)])


def test_the_first_are_the_first():
    module = stride_tokens.Config(num_queries=5, mode="first").build(GRID, nnx.Rngs(0))
    assert kept(module)[0].tolist() == [0, 1, 2, 3, 4]
    valid_BN = np.ones((1, 64), bool)
    valid_BN[0, [0, 2, 3]] = False
    assert kept(module, valid_BN)[0].tolist() == [1, 4, 5, 6, 7]


@pytest.mark.parametrize("case", ["stride_tokens", "first_tokens"])
def test_pytorch_keeps_the_same_lattice(case):
    twin, weights = twin_of(case)
    config = {
        "stride_tokens": stride_tokens.Config(num_queries=9),
        "first_tokens": stride_tokens.Config(num_queries=10, mode="first"),
    }[case]
    module = config.build(WIDTHS, nnx.Rngs(0))
    names.assign(module, names.from_torch(weights, config.names(WIDTHS), names.shapes(module)))
    x_BNC, valid_BN = noise(40, 24, 8), ragged(40, 24)
    with torch.no_grad():
        theirs, some = twin(torch.from_numpy(x_BNC), torch.from_numpy(valid_BN))
    out = compress(module, x_BNC, valid_BN)
    assert_equal(out.tokens_BQD, theirs)
    np.testing.assert_array_equal(out.valid_BQ, some)
