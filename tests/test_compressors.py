"""The contract: one examination for every compressor. A new one is a row of tests/compressor_cases.py."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.compressors import BOARDS, CATALOGUE
from tcjax.compressors import (
    avg_pool,
    chain,
    decoder_resampler,
    elastic,
    idefics2_resampler,
    matryoshka_query,
    mlp,
    per_frame,
    pixel_shuffle,
    qformer,
    query_resampler,
    qwen_resampler,
    resampler,
    resize_image,
    spatial_resampler,
)
from tcjax.compressors.base import Context, Widths
from tcjax.config import MeshConfig
from tcjax.sharding import make_mesh, place
from tcjax.study.tables import _line
from tests.compressor_cases import CASES, FEWER, IMPOSSIBLE, IMPOSSIBLE_CHOICES, SELECTING, UNFELT, UNREACHED, WIDTHS
from tests.planted import leaves, noise, plant

WIDTHS = Widths(grid_HW=(4, 6), vision_C=12, llm_D=16, text_D=10, levels=2)
TINY = {"depth": 2, "heads": 2, "head_width": 4, "ff_mult": 2}
GROUPED = {"heads": 4, "kv_heads": 2, "head_width": 4, "ff_mult": 2}
BERT = {"depth": 4, "width": 8, "heads": 2, "feed_forward": 16}

CASES = {  # name: (tiny config, Q, vdot(tokens, noise) with planted weights)
    "mlp": (mlp.Config(), 24, -25.53666),
    "mlp_3_layers": (mlp.Config(num_queries=24, depth=3), 24, 7.90116),
    "avg_pool": (avg_pool.Config(num_queries=9), 9, -2.42293),  # bins overlap: 4 rows -> 3
    "avg_pool_shaped": (avg_pool.Config(num_queries=6, shape=(2, 3)), 6, 3.96526),
    "pixel_shuffle": (pixel_shuffle.Config(num_queries=6), 6, 1.5206),
    "pixel_shuffle_mlp": (pixel_shuffle.Config(num_queries=6, head="mlp"), 6, 19.27796),
    "resampler": (resampler.Config(num_queries=5, **TINY), 5, 1.06527),
    "resampler_prefix": (resampler.Config(num_queries=3, max_queries=5, **TINY), 3, -8.71471),
    "resampler_video": (resampler.Config(num_queries=4, max_frames=3, media=1, max_media=2, **TINY), 4, -5.74115),
    "qwen_resampler": (qwen_resampler.Config(num_queries=9, head_width=8), 9, -19.53106),
    "qwen_resampler_prefix": (
        qwen_resampler.Config(num_queries=3, max_queries=4, head_width=8, post=False),
        3,
        5.29743,
    ),
    "omnilmm": (qwen_resampler.Config(num_queries=4, form="omnilmm", head_width=4), 4, -6.32458),
    "minicpm_v2": (qwen_resampler.Config(num_queries=4, form="minicpm_v2", head_width=8), 4, -7.07854),
    "minicpm_v25": (qwen_resampler.Config(num_queries=5, form="minicpm_v25", head_width=8), 5, -1.27553),
    "minicpm_v45": (qwen_resampler.Config(num_queries=5, form="minicpm_v45", head_width=16), 5, 3.36562),
    "uhd_resampler": (qwen_resampler.Config(num_queries=4, form="uhd", head_width=8), 4, 1.37828),
    "spatial_resampler": (spatial_resampler.Config(num_queries=9, head_width=8), 9, -0.47639),
    "matryoshka_query": (matryoshka_query.Config(num_queries=9, max_queries=9, head_width=6), 9, -0.03622),
    "matryoshka_content": (
        matryoshka_query.Config(num_queries=3, max_queries=9, head_width=4, key_content=True),
        3,
        -0.81093,
    ),
    "decoder_resampler": (decoder_resampler.Config(num_queries=5, heads=2, feed_forward=20), 5, -14.86598),
    "decoder_resampler_prefix": (
        decoder_resampler.Config(num_queries=3, max_queries=5, heads=3, feed_forward=20, depth=1),
        3,
        3.66479,
    ),
    "elastic": (elastic.Config(of=resampler.Config(num_queries=5, **TINY)), 5, 20.44692),
    "chain": (
        chain.Config(parts=(avg_pool.Config(num_queries=9), resampler.Config(num_queries=4, **TINY))),
        4,
        -2.84258,
    ),
    "per_frame": (per_frame.Config(each=resampler.Config(num_queries=4, **TINY)), 4, -4.93847),
    "resize_image": (resize_image.Config(num_queries=24, shape=(4, 6)), 24, -25.53666),
    "idefics2_resampler": (idefics2_resampler.Config(num_queries=5, depth=2, projection=8, **GROUPED), 5, 37.60905),
    "idefics2_resampler_prefix": (
        idefics2_resampler.Config(num_queries=3, max_queries=5, depth=1, projection=8, latents="ones", **GROUPED),
        3,
        -13.92754,
    ),
    "query_resampler": (query_resampler.Config(num_queries=5, width=8, **GROUPED), 5, 11.83464),
    "query_resampler_anywhere": (
        query_resampler.Config(num_queries=3, max_queries=4, width=8, depth=3, positions=False, **GROUPED),
        3,
        18.68648,
    ),
    "qformer": (qformer.Config(num_queries=5, **BERT), 5, 7.17879),
    "qformer_every_layer": (qformer.Config(num_queries=3, max_queries=5, cross_every=1, **BERT), 3, 18.0481),
    "qformer_text": (qformer.Config(num_queries=5, text=True, max_text=7, **BERT), 5, -0.22846),
    "qformer_own_words": (qformer.Config(num_queries=4, text=True, max_text=5, **BERT | {"width": 10}), 4, -14.55236),
}
# Weights of published files that reach no output, {family: {path: layers}}: a key's bias cancels in the softmax, and the
# text is dropped after the last layer, the last group's second, so that its feed-forward there is for nothing.
UNFELT = {"qformer": {".*/key/bias": slice(None), "groups/layers/1/text_ff/.*": slice(-1, None)}}
SELECTING: set[str] = set()  # they leave most tokens unread on purpose
CANCELLED = {("ln_k", "bias")}  # a shift of all keys alike, which the softmax takes back; matryoshka_query publishes it
FEWER = {"avg_pool": 4, "mlp": 4}  # of a family whose cases cannot give 2
PADDED = np.arange(24) % 6 >= 4  # the two right columns of the 4 x 6 grid ...
EMPTY_ROW = np.arange(24) < 12  # ... or the upper half, or everything
VALID_BN = np.stack([~PADDED, ~EMPTY_ROW, np.zeros(24, bool)])
TEXT_VALID_BT = np.arange(5) < np.array([[5], [3], [0]])  # a full instruction, a shorter one, the null text


@pytest.fixture(params=CASES, scope="module")
def case(request):
    config, num_queries, checksum = CASES[request.param]
    return plant(config.build(WIDTHS, nnx.Rngs(0))), num_queries, checksum, config


def told(x_BNC, valid_BN=None, *, assign=False, active_B=None):
    """Everything a compressor may need beside the tokens; row b always gets the same."""
    B, N, _ = x_BNC.shape
    rows = np.arange(B) % 3
    return Context(
        valid_BN,
        assign,
        text_BTD=jnp.asarray(noise(3, 5, 10, seed=4)[rows], x_BNC.dtype),
        text_valid_BT=jnp.asarray(TEXT_VALID_BT[rows]),
        levels_BNE=jnp.asarray(noise(3, N, 24, seed=5)[rows], x_BNC.dtype),
        prior_BN=jnp.asarray(np.abs(noise(3, N, seed=6))[rows]),
        active_B=active_B,
        index_B=jnp.asarray(rows + 7),
    )


@partial(jax.jit, static_argnames=("graphdef", "assign"))
def _compress(graphdef, state, x_BNC, valid_BN, assign, active_B=None):
    return nnx.merge(graphdef, state)(x_BNC, told(x_BNC, valid_BN, assign=assign, active_B=active_B))


def compress(compressor, x_BNC, valid_BN=None, *, assign=False, active_B=None):
    """Compiled once per module and kind of input: the whole examination shares these programs."""
    return _compress(*nnx.split(compressor), x_BNC, valid_BN, assign, active_B)


@partial(jax.jit, static_argnames="graphdef")
def _gradients(graphdef, state, x_BNC, valid_BN, target_BQD):
    """By the parameters and by the tokens."""

    def loss(state, x_BNC):
        return (nnx.merge(graphdef, state)(x_BNC, told(x_BNC, valid_BN)).tokens_BQD * target_BQD).sum()

    return jax.grad(loss, argnums=(0, 1))(state, x_BNC)


def test_gives_num_queries_tokens_of_llm_width(case):
    compressor, num_queries, _, config = case
    out = compress(compressor, noise(3, 24, 12))
    assert out.tokens_BQD.shape == (3, num_queries, 16)
    assert out.valid_BQ is None
    assert out.assign_BQN is None
    assert config.outputs(WIDTHS) == compressor.num_outputs == num_queries


def test_planted_weights_give_the_recorded_checksum(case):
    compressor, num_queries, checksum, _ = case
    tokens_BQD = compress(compressor, noise(3, 24, 12)).tokens_BQD
    np.testing.assert_allclose(np.vdot(tokens_BQD, noise(3, num_queries, 16, seed=1)), checksum, atol=1e-4)


def test_every_parameter_names_its_axes(case):
    compressor, *_ = case
    for path, leaf in leaves(compressor).items():
        assert len(leaf.get_metadata("axes")) == leaf.get_value().ndim, path
        assert leaf.get_value().dtype == jnp.float32, path


def test_jit_equals_eager(case):
    compressor, *_ = case
    x_BNC = noise(3, 24, 12)
    eager = compressor(x_BNC, told(x_BNC, jnp.asarray(VALID_BN), assign=True))
    for one, other in zip(eager, compress(compressor, x_BNC, VALID_BN, assign=True), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_images_in_a_batch_do_not_mix(case):
    compressor, *_ = case
    x_BNC = noise(3, 24, 12)
    before_BQD = compress(compressor, x_BNC).tokens_BQD
    after_BQD = compress(compressor, np.stack([x_BNC[0], 1e3 * x_BNC[2], x_BNC[2]])).tokens_BQD
    np.testing.assert_array_equal(after_BQD[::2], before_BQD[::2])
    broken_BQD = compress(compressor, np.stack([x_BNC[0], np.full((24, 12), np.nan, np.float32), x_BNC[2]])).tokens_BQD
    np.testing.assert_array_equal(broken_BQD[::2], before_BQD[::2])  # a NaN stays in its own image ...
    assert np.isnan(broken_BQD[1]).any()  # ... and is not hidden there
    assert np.abs(after_BQD[1] - before_BQD[1]).max() > 1e-2


@pytest.mark.parametrize("poison", [7.0, np.nan])
def test_invalid_tokens_change_nothing(case, poison):
    compressor, *_ = case
    x_BNC = noise(3, 24, 12)
    poisoned_BNC = np.where(VALID_BN[..., None], x_BNC, np.float32(poison))
    clean, dirty = compress(compressor, x_BNC, VALID_BN), compress(compressor, poisoned_BNC, VALID_BN)
    np.testing.assert_array_equal(clean.tokens_BQD, dirty.tokens_BQD)
    np.testing.assert_array_equal(clean.valid_BQ, dirty.valid_BQ)


def test_every_parameter_and_every_valid_token_gets_a_gradient(case):
    compressor, num_queries, _, config = case
    x_BNC = np.where(VALID_BN[..., None], noise(3, 24, 12), np.float32(np.nan))
    grads, grad_BNC = _gradients(*nnx.split(compressor), x_BNC, VALID_BN, noise(3, num_queries, 16, seed=1))
    unreached = {path for name, path in UNREACHED.items() if CASES[name][0] == config}
    for path, leaf in nnx.to_flat_state(grads):
        if path in CANCELLED:
            continue
        value = np.asarray(leaf.get_value())
        if path[0] in unreached:
            np.testing.assert_array_equal(value, 0, err_msg=f"{path} learns: no exemption is needed")
            continue
        layers = value if leaf.get_metadata("axes").startswith("L") else value[None]
        assert np.isfinite(value).all(), path
        felt_L = np.abs(layers).reshape(len(layers), -1).max(1)
        for pattern, unfelt in UNFELT.get(config.family, {}).items():
            if re.fullmatch(pattern, "/".join(map(str, path))):
                assert (felt_L[unfelt] < 1e-5).all(), path
                felt_L[unfelt] = 1
        assert (felt_L > 1e-4).all(), path
    np.testing.assert_array_equal(np.asarray(grad_BNC)[~VALID_BN], 0)
    if config.family not in SELECTING:
        assert np.abs(np.asarray(grad_BNC)[VALID_BN]).max(-1).min() > 1e-4


def test_all_valid_equals_no_mask(case):
    compressor, *_ = case
    x_BNC = noise(3, 24, 12)
    out = compress(compressor, x_BNC, np.ones((3, 24), bool))
    np.testing.assert_allclose(out.tokens_BQD, compress(compressor, x_BNC).tokens_BQD, atol=2e-6)
    assert out.valid_BQ.all()


def test_invalid_outputs_are_exactly_zero(case):
    compressor, *_ = case
    out = compress(compressor, noise(3, 24, 12), VALID_BN)
    assert out.valid_BQ.dtype == jnp.bool
    assert out.valid_BQ.shape == out.tokens_BQD.shape[:2]
    np.testing.assert_array_equal(out.valid_BQ.any(1), [True, True, False])  # an empty image has no valid output
    tokens_BQD, valid_BQ = np.asarray(out.tokens_BQD), np.asarray(out.valid_BQ)
    np.testing.assert_array_equal((tokens_BQD != 0).all(-1), valid_BQ)
    np.testing.assert_array_equal((tokens_BQD == 0).all(-1), ~valid_BQ)


def test_fewer_active_outputs_are_the_config_at_fewer(case):
    """What elastic training masks is what the smaller config leaves out, and no weight changes."""
    compressor, num_queries, _, config = case
    if config.elastic == "no":
        with pytest.raises(ValueError, match="weights for one number of tokens only"):
            config.at(num_queries)
        return
    x_BNC, fewer = noise(3, 24, 12), config.at(FEWER.get(config.family, 2))
    small = fewer.build(WIDTHS, nnx.Rngs(0))
    nnx.update(small, nnx.state(compressor))
    assert small.num_outputs == fewer.outputs(WIDTHS) < num_queries
    if "shrunk_HW" in config.of_tower():
        return  # fewer tokens come from the tower already
    if config.elastic == "pooling" and not config.averaged_over():
        return  # a pooling of fewer bins is no prefix of one of more
    one_BQD = compress(small, x_BNC, VALID_BN, assign=True)
    active_B = jnp.full(3, small.num_outputs)
    out = compress(compressor, x_BNC, VALID_BN, assign=True, active_B=active_B)
    np.testing.assert_array_equal(out.valid_BQ[:, small.num_outputs :], False)
    for found, expected in zip(out, one_BQD, strict=True):
        np.testing.assert_allclose(found[:, : small.num_outputs], expected, atol=2e-6)
        np.testing.assert_array_equal(found[:, small.num_outputs :], 0)


def test_what_it_needs_is_missed_by_name(case):
    compressor, _, _, config = case
    x_BNC, fields = noise(3, 24, 12), {"text": "text_BTD", "levels": "levels_BNE", "prior": "prior_BN"}
    for need in config.needs:
        with pytest.raises(ValueError, match=fields[need]):
            compressor(x_BNC, told(x_BNC)._replace(**{fields[need]: None}))
    if not config.needs:
        assert compressor(x_BNC).tokens_BQD.shape[1] == config.outputs(WIDTHS)


def test_assignment_rows_are_shares_of_the_valid_tokens(case):
    compressor, num_queries, *_ = case
    x_BNC = noise(3, 24, 12)
    free = compress(compressor, x_BNC, assign=True)
    assert free.assign_BQN.shape == (3, num_queries, 24)
    np.testing.assert_allclose(free.assign_BQN.sum(-1), 1, atol=1e-6)
    kept = compress(compressor, x_BNC, VALID_BN, assign=True)
    np.testing.assert_allclose(kept.assign_BQN.sum(-1), np.asarray(kept.valid_BQ, np.float32), atol=1e-6)
    assert (np.asarray(kept.assign_BQN) >= 0).all()
    assert (np.moveaxis(np.asarray(kept.assign_BQN), 1, 2)[~VALID_BN] == 0).all()
    np.testing.assert_allclose(free.tokens_BQD, compress(compressor, x_BNC).tokens_BQD, atol=2e-6)


def test_bfloat16_is_finite_and_near_float32(case):
    compressor, *_ = case
    x_BNC = noise(3, 24, 12)
    exact_BQD = np.asarray(compress(compressor, x_BNC).tokens_BQD)
    graphdef, state = nnx.split(compressor)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    out_BQD = _compress(graphdef, rounded, x_BNC.astype(jnp.bfloat16), VALID_BN | True, False).tokens_BQD
    assert out_BQD.dtype == jnp.bfloat16
    error_BQD = np.abs(np.asarray(out_BQD, np.float32) - exact_BQD)
    assert error_BQD.max() <= 0.03 * np.abs(exact_BQD).max()  # 8 significant bits; a NaN fails too
    for params, x in ((state, x_BNC.astype(jnp.bfloat16)), (rounded, x_BNC)):
        mixed = jax.eval_shape(partial(_compress, graphdef, assign=False), params, x, VALID_BN)
        assert mixed.tokens_BQD.dtype == jnp.float32


def test_one_device_equals_eight(case):
    compressor, *_ = case
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x_BNC, valid_BN = noise(4, 24, 12), np.concatenate([VALID_BN, ~VALID_BN[:1]])
    graphdef, state = nnx.split(compressor)
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    spread = place(state, mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread))
    eight = _compress(graphdef, spread, jax.device_put(x_BNC, batch), jax.device_put(valid_BN, batch), False)
    assert len(eight.tokens_BQD.sharding.device_set) == 8
    one = _compress(graphdef, state, x_BNC, valid_BN, False)
    np.testing.assert_allclose(eight.tokens_BQD, one.tokens_BQD, atol=1e-5)


def test_a_second_module_of_the_same_config_compiles_nothing(case):
    compressor, _, _, config = case
    compress(compressor, noise(3, 24, 12), VALID_BN)
    compiled = _compress._cache_size()
    compress(config.build(WIDTHS, nnx.Rngs(1)), noise(3, 24, 12, seed=3), ~VALID_BN)
    assert _compress._cache_size() == compiled


def test_graph_mode_equals_tree_mode(case):
    compressor, _, _, config = case
    x_BNC = noise(3, 24, 12)
    expected_BQD = compress(compressor, x_BNC).tokens_BQD
    with nnx.set_graph_mode(False):
        tree = plant(config.build(WIDTHS, nnx.Rngs(0)))
        assert list(leaves(tree)) == list(leaves(compressor))
        np.testing.assert_allclose(compress(tree, x_BNC).tokens_BQD, expected_BQD, atol=2e-6)


def test_tokens_of_another_tower_are_refused(case):
    compressor, *_ = case
    with pytest.raises(ValueError, match=r"\[2, 24, 10\].*C=12"):
        compressor(noise(2, 24, 10))
    with pytest.raises(ValueError, match=r"valid_BN is bool\[2, 1\].*bool\[2, 24\]"):
        compressor(noise(2, 24, 12), Context(jnp.ones((2, 1), bool)))


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name][0].describe(WIDTHS)["any_num_tokens"]])
def test_grid_compressors_refuse_another_number_of_tokens(name):
    compressor = CASES[name][0].build(WIDTHS, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"N=25 tokens.*N=24, a 4x6 grid"):
        compressor(noise(2, 25, 12))


IMPOSSIBLE = {  # name: (config, what the message must say)
    "mlp": (mlp.Config(num_queries=6), r"num_queries=6 .* 4x6 grid; possible: \[24\]"),
    "avg_pool": (avg_pool.Config(num_queries=6), r"num_queries=6 .*shape=\(h, w\).* possible: \[1, 4, 9, 16\]"),
    "avg_pool_large": (avg_pool.Config(num_queries=25), r"possible: \[1, 4, 9, 16\]"),
    "avg_pool_negative": (avg_pool.Config(num_queries=-4), r"possible: \[1, 4, 9, 16\]"),
    "avg_pool_shape": (
        avg_pool.Config(num_queries=12, shape=(2, 3)),
        r"has 6 .* 4x6 grid: \[\(2, 6\), \(3, 4\), \(4, 3\)\]",
    ),
    "avg_pool_grid": (avg_pool.Config(num_queries=10, shape=(5, 2)), r"shape=\(5, 2\) .* \(1, 1\) to \(4, 6\)"),
    "pixel_shuffle": (pixel_shuffle.Config(num_queries=8), r"num_queries=8 .*; possible: \[6, 24\]"),
    "resampler": (resampler.Config(num_queries=0), r"num_queries=0: .* from 1 up"),
    "qwen_resampler": (
        qwen_resampler.Config(num_queries=5, head_width=8),
        r"max_queries=5 is no square, but form='qwen_vl' .* near it are 4 and 9\. num_queries may be any",
    ),
    "uhd": (qwen_resampler.Config(num_queries=8, form="uhd", head_width=8), r"max_queries=8 is no square.* 4 and 9"),
    "more_than_max": (
        qwen_resampler.Config(num_queries=5, max_queries=4, form="minicpm_v25", head_width=8),
        r"num_queries=5: .* up to max_queries=4",
    ),
    "form": (qwen_resampler.Config(form="minicpm"), r"form='minicpm' is none of \['qwen_vl', .* 'uhd'\]"),
    "spatial_resampler": (
        spatial_resampler.Config(num_queries=8, head_width=8),
        r"num_queries=8 is not a square number of regions of a 4x6 grid; possible: \[1, 4, 9, 16, 25, 36, 49, 64\]",
    ),
    "spatial_resampler_large": (spatial_resampler.Config(num_queries=81, head_width=8), r"num_queries=81 .* 49, 64\]"),
    "matryoshka_query": (matryoshka_query.Config(num_queries=257, head_width=6), r"num_queries=257: .*max_queries=256"),
    "matryoshka_table": (
        matryoshka_query.Config(num_queries=3, max_queries=8, head_width=6),
        r"max_queries=8 is no square, but matryoshka_query",
    ),
    "decoder_resampler": (decoder_resampler.Config(num_queries=0), r"num_queries=0: .* from 1 up"),
    "idefics2_resampler": (idefics2_resampler.Config(num_queries=0), r"num_queries=0: .* from 1 up to max_queries=0"),
    "query_resampler": (query_resampler.Config(num_queries=5, max_queries=4), r"num_queries=5: .* max_queries=4"),
    "qformer": (qformer.Config(num_queries=6, max_queries=5), r"num_queries=6: .* from 1 up to max_queries=5"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_num_queries_name_the_possible_ones(name):
    config, message = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=message):
        config.outputs(WIDTHS)
    with pytest.raises(ValueError, match=message):
        config.build(WIDTHS, nnx.Rngs(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (pixel_shuffle.Config(num_queries=6, head="conv"), r"head='conv' .*\['linear', 'mlp'\]"),
        (mlp.Config(depth=0), "depth=0: .* at least 1"),
        (resampler.Config(heads=0), "heads=0: .* at least 1"),
        (qwen_resampler.Config(num_queries=4), r"head_width=128 does not divide .* width 16; .*\[1, 2, 4, 8, 16\]"),
        (qwen_resampler.Config(num_queries=4, head_width=8, frame_step=0), "frame_step=0: .* at least 1"),
        (spatial_resampler.Config(num_queries=4), r"head_width=128 does not divide .* width 16"),
        (matryoshka_query.Config(num_queries=4), r"head_width=64 does not divide .* width 12"),
        (decoder_resampler.Config(heads=5), "heads=5 must divide the width 12"),
        (decoder_resampler.Config(heads=4, depth=0), "depth=0: .* at least 1"),
        (idefics2_resampler.Config(projection=0), "projection=0: .* at least 1"),
        (idefics2_resampler.Config(kv_heads=5), r"kv_heads=5 must divide heads=16; possible: \[1, 2, 4, 8, 16\]"),
        (idefics2_resampler.Config(latents="zeros"), r"latents='zeros' .*\('normal', 'ones'\)"),
        (query_resampler.Config(head_width=0), "head_width=0: .* at least 1"),
        (query_resampler.Config(eps=0.0), "eps=0.0: must be above 0"),
        (query_resampler.Config(text_layers=2), "text_layers=2 of depth=2: .* 1 <= text_layers < depth"),
        (qformer.Config(cross_every=0), "cross_every=0: .* at least 1"),
        (qformer.Config(width=100), "heads=12 must divide width=100"),
        (qformer.Config(depth=12, cross_every=5), "cross_every=5 must divide depth=12"),
    ],
    IMPOSSIBLE_CHOICES,
)
def test_other_impossible_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(WIDTHS, nnx.Rngs(0))


BIG = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096, text_D=4096)
SMALL = Widths(grid_HW=(16, 16), vision_C=96, llm_D=128, text_D=128)
PUBLISHED = {"resampler": 67_217_408, "mlp": 20_979_712, "avg_pool": 20_979_712}  # the latter two are LLaVA-1.5-7B's


@pytest.mark.parametrize(
    ("catalogue", "widths", "num_queries", "sizes"),
    [(CATALOGUE, BIG, 64, PUBLISHED), (BOARDS, SMALL, 16, {"resampler": 261_056})],
)
def test_the_catalogue_builds_at_published_widths(catalogue, widths, num_queries, sizes):
    for name, make in catalogue.items():
        line = _line(name, make, widths)
        assert num_queries in line["possible"] or name in ("mlp", "chain") or "merger" in name, (name, line["possible"])
        assert line["parameters"] > 0 and line["flops"] > 0, name
        assert line["parameters"] == sizes.get(name, line["parameters"]), name
