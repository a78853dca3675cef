"""Compressors made of others: a chain equals its parts, a video its frames, elastic training the smaller compressor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tcjax.compressors import avg_pool, chain, elastic, mlp, per_frame, pixel_shuffle, resampler, resize_image
from tcjax.compressors.base import Context, Widths
from tests.planted import noise, planted

WIDTHS = Widths(grid_HW=(4, 6), vision_C=12, llm_D=16)
TINY = {"depth": 1, "heads": 2, "head_width": 4, "ff_mult": 2}
PARTS = (
    avg_pool.Config(num_queries=12, shape=(3, 4)),
    resampler.Config(num_queries=9, **TINY),
    resampler.Config(num_queries=4, **TINY),
)


def test_a_chain_is_its_parts_one_after_another():
    config = chain.Config(parts=PARTS)
    module = planted(config, WIDTHS)
    x_BNC, valid_BN = noise(2, 24, 12), np.arange(24) < np.array([[24], [9]])
    between = config.between(WIDTHS)
    assert [(widths.grid_HW, widths.llm_D) for widths in between] == [((4, 6), 12), ((3, 4), 12), ((1, 9), 16)]
    tokens, valid, assign = x_BNC, valid_BN, None
    for part, own, widths in zip(PARTS, module.parts, between, strict=True):
        alone = part.build(widths, nnx.Rngs(1))
        nnx.update(alone, nnx.state(own))
        out = alone(tokens, Context(jnp.asarray(valid), assign=True))
        tokens, valid = out.tokens_BQD, out.valid_BQ
        assign = out.assign_BQN if assign is None else out.assign_BQN @ assign
    whole = module(x_BNC, Context(jnp.asarray(valid_BN), assign=True))
    np.testing.assert_array_equal(whole.tokens_BQD, tokens)
    np.testing.assert_allclose(whole.assign_BQN, assign, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (PARTS[:1], "at least two parts, this one has 1"),
        ((avg_pool.Config(num_queries=12, shape=(3, 4)), avg_pool.Config(num_queries=25)), r"part 2 .*avg_pool: num_q"),
        ((PARTS[1], pixel_shuffle.Config(num_queries=2)), r"part 2 .*1x9 grid; possible: \[9\]"),
        ((avg_pool.Config(num_queries=7), PARTS[1]), "part 1 of the chain, avg_pool: num_queries=7"),
    ],
)
def test_a_chain_whose_budget_does_not_fit_names_the_part(parts, message):
    with pytest.raises(ValueError, match=message):
        chain.Config(parts=parts).build(WIDTHS, nnx.Rngs(0))


def test_per_frame_is_the_compressor_on_every_frame():
    widths = dataclasses.replace(WIDTHS, frames=3)
    each = resampler.Config(num_queries=4, **TINY)
    module = planted(per_frame.Config(each=each), widths)
    x_BNC, valid_BN = noise(2, 72, 12), np.arange(72) < np.array([[72], [40]])  # the third frame is all padding
    out = module(x_BNC, Context(jnp.asarray(valid_BN), assign=True))
    assert out.tokens_BQD.shape == (2, 12, 16)
    for frame in range(3):
        tokens, outputs = slice(24 * frame, 24 * frame + 24), slice(4 * frame, 4 * frame + 4)
        alone = module.each(x_BNC[:, tokens], Context(jnp.asarray(valid_BN[:, tokens]), assign=True))
        np.testing.assert_allclose(out.tokens_BQD[:, outputs], alone.tokens_BQD, atol=1e-6)
        np.testing.assert_array_equal(out.valid_BQ[:, outputs], alone.valid_BQ)
        np.testing.assert_allclose(out.assign_BQN[:, outputs, tokens], alone.assign_BQN, atol=1e-6)
    np.testing.assert_allclose(out.assign_BQN.sum(-1), out.valid_BQ, atol=1e-6)


def test_a_compressor_of_one_image_names_the_way_to_video():
    with pytest.raises(ValueError, match="one image, not 3 frames; wrap it in per_frame"):
        avg_pool.Config(num_queries=4).build(dataclasses.replace(WIDTHS, frames=3), nnx.Rngs(0))


def drawn(config, num=512, *, step=0):
    module = planted(config, WIDTHS)
    keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(step), i))(jnp.arange(num))
    valid = jax.jit(lambda keys_B: module(jnp.zeros((num, 24, 12)), Context(keys_B=keys_B)).valid_BQ)
    return np.asarray(valid(keys_B)).sum(1)


def test_elastic_training_draws_every_number_equally_often():
    counts = np.bincount(drawn(elastic.Config(of=PARTS[2])), minlength=5)
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 128) < 4 * 128**0.5).all(), counts
    assert set(drawn(elastic.Config(of=PARTS[1], drawn_from=(2, 4, 8)))) == {2, 4, 8}
    one, other = drawn(elastic.Config(of=PARTS[2])), drawn(elastic.Config(of=PARTS[2]), step=1)
    assert (one != other).mean() > 0.5


def test_an_elastic_sample_is_the_compressor_at_its_number():
    config = elastic.Config(of=PARTS[1], drawn_from=(3,))
    module = planted(config, WIDTHS)
    small = config.at(3).build(WIDTHS, nnx.Rngs(1))
    nnx.update(small, nnx.state(module))
    x_BNC, keys_B = noise(2, 24, 12), jax.random.split(jax.random.key(0), 2)
    out = module(x_BNC, Context(keys_B=keys_B))
    np.testing.assert_allclose(out.tokens_BQD[:, :3], small(x_BNC).tokens_BQD, atol=1e-6)
    np.testing.assert_array_equal(out.valid_BQ, np.arange(9) < np.full((2, 1), 3))
    assert module(x_BNC).valid_BQ is None  # nothing is drawn outside training


def test_what_cannot_be_elastic_says_why():
    with pytest.raises(ValueError, match=r"avg_pool cannot be trained elastically.*elastic='pooling'"):
        elastic.Config(of=PARTS[0]).outputs(WIDTHS)
    with pytest.raises(ValueError, match=r"drawn_from has \[0, 10\]; every number is from 1 to 9"):
        elastic.Config(of=PARTS[1], drawn_from=(0, 3, 10)).outputs(WIDTHS)


def test_resize_image_asks_the_tower_for_a_smaller_grid():
    config = resize_image.Config(num_queries=6, shape=(2, 3))
    assert config.of_tower() == {"shrunk_HW": (2, 3)}
    module = planted(config, dataclasses.replace(WIDTHS, grid_HW=(2, 3)))
    x_BNC = noise(2, 6, 12)
    twin = mlp.Config().build(dataclasses.replace(WIDTHS, grid_HW=(2, 3)), nnx.Rngs(1))
    nnx.update(twin, nnx.state(module))
    np.testing.assert_array_equal(module(x_BNC).tokens_BQD, twin(x_BNC).tokens_BQD)
    with pytest.raises(ValueError, match="num_queries=6 is no square"):
        resize_image.Config(num_queries=6).of_tower()
