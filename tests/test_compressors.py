"""The contract: one examination for every compressor. A new one is a row of tests/compressor_cases.py."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.compressors import BOARDS, CATALOGUE
from tcjax.compressors.base import Context, Widths
from tcjax.config import MeshConfig
from tcjax.sharding import make_mesh, place
from tcjax.study.catalogue import catalogue_line
from tests.compressor_cases import CASES, FEWER, IMPOSSIBLE, IMPOSSIBLE_CHOICES, SELECTING, UNFELT, UNREACHED, WIDTHS
from tests.planted import leaves, noise, planted

PADDED = np.arange(24) % 6 >= 4  # the two right columns of the 4 x 6 grid ...
EMPTY_ROW = np.arange(24) < 12  # ... or the upper half, or everything
VALID_BN = np.stack([~PADDED, ~EMPTY_ROW, np.zeros(24, bool)])
TEXT_VALID_BT = np.arange(5) < np.array([[5], [3], [0]])  # a full instruction, a shorter one, the null text


@pytest.fixture(params=CASES, scope="module")
def case(request):
    config, num_queries, checksum = CASES[request.param]
    yield planted(config, WIDTHS), num_queries, checksum, config
    jax.clear_caches()


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
    small = nnx.eval_shape(lambda: fewer.build(WIDTHS, nnx.Rngs(0)))
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
    compress(planted(config, WIDTHS), noise(3, 24, 12, seed=3), ~VALID_BN)
    assert _compress._cache_size() == compiled


def test_graph_mode_equals_tree_mode(case):
    compressor, _, _, config = case
    x_BNC = noise(3, 24, 12)
    expected_BQD = compress(compressor, x_BNC).tokens_BQD
    with nnx.set_graph_mode(False):
        tree = planted(config, WIDTHS)
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


@pytest.mark.parametrize("name", CASES)
def test_a_class_token_before_the_grid_is_read_or_refused(name):
    config, widths = CASES[name][0], replace(WIDTHS, extra=1)
    x_BNC = noise(2, 25, 12)
    if not config.describe(WIDTHS)["any_num_tokens"]:
        with pytest.raises(ValueError, match=r"extra=1 token before its \d+x\d+: the class token\. Build the tower"):
            config.build(widths, nnx.Rngs(0))(x_BNC, told(x_BNC))
        return
    assert config.describe(widths) == config.describe(WIDTHS) | {"extra": 1}
    compressor = planted(config, widths)
    out = compress(compressor, x_BNC, assign=True)
    assert out.assign_BQN.shape == (2, compressor.num_outputs, 25)
    np.testing.assert_allclose(out.assign_BQN.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_num_queries_name_the_possible_ones(name):
    config, message = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=message):
        config.outputs(WIDTHS)
    with pytest.raises(ValueError, match=message):
        config.build(WIDTHS, nnx.Rngs(0))


@pytest.mark.parametrize(
    ("config", "message"),
    IMPOSSIBLE_CHOICES,
)
def test_other_impossible_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(WIDTHS, nnx.Rngs(0))


BIG = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096, text_D=4096)
SMALL = Widths(grid_HW=(16, 16), vision_C=96, llm_D=128, text_D=128)
GUIDE = Path(__file__).parents[1] / "docs" / "compressors.md"
PUBLISHED = {"resampler": 67_217_408, "mlp": 20_979_712, "avg_pool": 20_979_712}  # the latter two are LLaVA-1.5-7B's


@pytest.mark.parametrize(
    ("catalogue", "widths", "num_queries", "sizes"),
    [(CATALOGUE, BIG, 64, PUBLISHED), (BOARDS, SMALL, 16, {"resampler": 265_664})],
)
def test_the_catalogue_builds_at_published_widths(catalogue, widths, num_queries, sizes):
    for name, make in catalogue.items():
        line = catalogue_line(name, make, widths)
        elsewhere = name in ("mlp", "chain", "ldp", "conv16") or "merger" in name
        assert num_queries in line["possible"] or elsewhere, (name, line["possible"])
        assert line["parameters"] > 0 and line["flops"] > 0, name
        assert line["parameters"] == sizes.get(name, line["parameters"]), name
        if widths is BIG:
            assert _documented(line) in GUIDE.read_text(), "docs/compressors.md has another line"


def _documented(line: dict) -> str:
    hosts = ", ".join(target for target in line["exports"] if target in ("hf", "hf-remote", "llava"))
    size, work = f"{line['parameters'] / 1e6:.1f} M", f"{line['flops'] / 1e9:.2f} at {line['at']}"
    cells = [
        line["name"],
        line["queries"],
        line["elastic"],
        ", ".join(line["needs"]),
        size,
        work,
        hosts,
        line["source"],
    ]
    return f"| {' | '.join(cells)} |\n"
