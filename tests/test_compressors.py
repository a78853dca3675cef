"""The contract: one examination for every compressor. A new one is a row of CASES; the failure prints its checksum."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.compressors import BOARDS, CATALOGUE
from tcjax.compressors import avg_pool, conv16, ldp, ldp_v2, mlp, pixel_shuffle, quecc, resampler, token_packer
from tcjax.compressors.base import Context, Widths
from tcjax.config import MeshConfig
from tcjax.sharding import make_mesh, place
from tests.planted import leaves, noise, plant

WIDTHS = Widths(grid_HW=(4, 6), vision_C=12, llm_D=16, text_D=10, levels=2)
TINY = {"depth": 2, "heads": 2, "head_width": 4, "ff_mult": 2}

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
    "token_packer": (token_packer.Config(num_queries=6, head_width=4, levels=(1, 2)), 6, 1.74397),
    "quecc": (quecc.Config(num_queries=6, heads=2, levels=(1, 2)), 6, -2.01463),
    "quecc_last": (quecc.Config(num_queries=6, heads=3, levels=(1, 2), text_pool="last"), 6, -4.53426),
    "ldp": (ldp.Config(), 6, 3.22742),
    "ldp_v2": (ldp_v2.Config(num_queries=9), 9, -29.78502),  # bins overlap: 4 rows -> 3
    "ldp_v2_shaped": (ldp_v2.Config(num_queries=6, shape=(3, 2)), 6, -8.5902),
    "conv16": (conv16.Config(), 2, -22.86267),
    "conv16_neck": (conv16.Config(num_queries=2, neck=8), 2, 20.66046),
}
SELECTING: set[str] = set()  # they leave most tokens unread on purpose
INERT = {"token_packer": {"norm_key/bias"}, "quecc": {"key/norm/bias"}}  # published, but a softmax cancels them
FIXED = {"mlp": 1, "ldp": 4, "conv16": 16}  # the grid alone says their Q, N over this
FEWER = {"avg_pool": 4, "ldp_v2": 4}  # of a family whose cases cannot give 2
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
    for path, leaf in nnx.to_flat_state(grads):
        value = np.asarray(leaf.get_value())
        layers = value if leaf.get_metadata("axes").startswith("L") else value[None]
        assert np.isfinite(value).all(), path
        alive = np.abs(layers).reshape(len(layers), -1).max(1) > 1e-4
        assert (alive != ("/".join(map(str, path)) in INERT.get(config.family, ()))).all(), path
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
    one_BQD = compress(small, x_BNC, VALID_BN, assign=True)
    if config.elastic == "pooling" and not config.averaged_over():
        return  # a pooling of fewer bins is no prefix of one of more
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
    "token_packer": (
        token_packer.Config(num_queries=5),
        r"num_queries=5 .* equal cells .*\[1, 2, 3, 4, 6, 8, 12, 24\]",
    ),
    "token_packer_shape": (token_packer.Config(num_queries=6, shape=(3, 2)), r"\(3, 2\) .*\[\(1, 6\), \(2, 3\)\]"),
    "quecc": (quecc.Config(num_queries=4, heads=2), r"num_queries=4 .* s x s cells .*possible: \[6, 24\]"),
    "ldp": (ldp.Config(num_queries=4), r"num_queries=4 .* one stride of 2 .*possible: \[6\]"),
    "ldp_v2": (ldp_v2.Config(num_queries=6), r"num_queries=6 .*possible: \[1, 4, 9, 16\]"),
    "conv16": (conv16.Config(num_queries=0), r"num_queries=0 .* two strides of 2 .*possible: \[2\]"),
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
        (token_packer.Config(num_queries=6, head_width=4), r"levels=\(12, 16, 22, 23\) names 4 .* hands over 2; "),
        (token_packer.Config(num_queries=6, levels=(1, 2)), "head_width=128 must divide .* C=12"),
        (quecc.Config(num_queries=6, levels=(1, 2), heads=5), "heads=5 must divide .* C=12"),
        (quecc.Config(num_queries=6, levels=(1, 2), text_pool="max"), r"text_pool='max' .*\['mean', 'last'\]"),
        (conv16.Config(neck=-1), "neck=-1: .* or 0 for none"),
    ],
)
def test_other_impossible_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(WIDTHS, nnx.Rngs(0))


@pytest.mark.parametrize(
    ("catalogue", "widths", "num_queries", "parameters"),
    [
        (CATALOGUE, Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096), 64, 67_217_408),
        (BOARDS, Widths(grid_HW=(16, 16), vision_C=96, llm_D=128), 16, 261_056),
    ],
)
def test_the_catalogue_builds_at_published_widths(catalogue, widths, num_queries, parameters):
    sizes = {}
    for name, make in catalogue.items():
        Q = widths.num_tokens // FIXED[name] if name in FIXED else num_queries
        config = make(Q)
        assert dataclasses.is_dataclass(config)
        own = dataclasses.replace(widths, levels=len(config.of_tower().get("levels", ())), text_D=widths.llm_D)
        assert config.outputs(own) == Q
        module = nnx.eval_shape(lambda config=config, own=own: config.build(own, nnx.Rngs(0)))
        assert module.num_outputs == Q
        sizes[name] = sum(leaf.get_value().size for leaf in leaves(module).values())
    assert sizes["resampler"] == parameters
    C, D = widths.vision_C, widths.llm_D
    assert sizes["mlp"] == sizes["avg_pool"] == C * D + D + D * D + D  # LLaVA-1.5-7B: 20,979,712
