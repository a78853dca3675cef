"""Learned merge against its own formulas, token by token in float64 torch, and against the sketch's sequential loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.optimize import brentq
from torch.nn import functional

from tcjax.compressors import learned_merge
from tcjax.compressors.base import Context, Widths
from tests.planted import leaves, noise, planted

C, D, T = 12, 16, 10
SMALL = {"scorer": 8, "merger": 6, "metric": 4}
WIDTHS = Widths(grid_HW=(4, 6), vision_C=C, llm_D=D, text_D=T)
TOLD = learned_merge.Config(num_queries=7, text=True, prior=True, **SMALL)


def built(config, widths=WIDTHS):
    return planted(config, widths)


@nnx.jit
def _compress(module, x_BNC, context):
    return module(x_BNC, context._replace(assign=True))


def compress(module, x_BNC, context):
    return _compress(module, x_BNC, context._replace(assign=None))  # a bool would be traced


def context_of(x_BNC, valid_BN=None, **more):
    """Row 0 is asked something, row 1 something shorter, the others nothing."""
    B, N, _ = x_BNC.shape
    length_B = np.array([5, 3, *[0] * (B - 2)])[:B]
    return Context(
        valid_BN,
        text_BTD=noise(B, 5, T, seed=4),
        text_valid_BT=np.arange(5) < length_B[:, None],
        prior_BN=np.abs(noise(B, N, seed=6)),
        **more,
    )


def wide(module):
    return {
        path: torch.tensor(np.asarray(leaf.get_value()), dtype=torch.float64) for path, leaf in leaves(module).items()
    }


# The formulas, one image without padding, one dropped token after another --------------------------------------------


def scores_of(p, x, text, prior):
    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], eps=1e-5)

    normed = norm(x, "importance/norm")
    u = functional.gelu(normed @ p["importance/local/kernel"] + p["importance/local/bias"])
    both = torch.cat([u, u.mean(0).expand_as(u)], dim=1)
    kernel = torch.cat([p["importance/mixed/kernel"], p["importance/overall/kernel"]])
    s = functional.gelu(both @ kernel + p["importance/mixed/bias"]) @ p["importance/score"]
    if len(text):
        query = norm(text.mean(0), "importance/text_norm") @ p["importance/text_query/kernel"]
        s = s + normed @ p["importance/token_key/kernel"] @ query / p["importance/token_key/kernel"].shape[1] ** 0.5
    log = torch.log(prior + 1e-6)
    return s + p["importance/trust"] * (log - log.mean()) / (log.var(correction=0) + 1e-6).sqrt()


def shares_of(s, number, temperature):
    def excess(tau):
        return torch.sigmoid(s / temperature + tau).sum().item() - min(number, len(s) - 1e-3)

    return torch.sigmoid(s / temperature + brentq(excess, -1000, 1000, xtol=1e-13))


def one_image(p, x, text, prior, number, temperature=0.1):
    s = scores_of(p, x, text, prior)
    share = shares_of(s, number, temperature)
    kept = sorted(sorted(range(len(s)), key=lambda n: -s[n])[:number])
    e = functional.normalize(x @ p["metric/kernel"])
    top, below = torch.zeros(len(kept), p["merger/kept/bias"].shape[0], dtype=torch.float64), torch.ones(len(kept))
    for n in sorted(set(range(len(s))) - set(kept)):
        j = (e[kept] @ e[n]).argmax().item()
        pair = torch.cat([x[kept[j]], x[n]])
        kernel = torch.cat([p["merger/kept/kernel"], p["merger/dropped/kernel"]])
        top[j] += share[n] * functional.gelu(pair @ kernel + p["merger/kept/bias"])
        below[j] += share[n]
    y = x[kept] + (top / below[:, None].double()) @ p["merger/back/kernel"]
    return projected(p, y)


def projected(p, y):
    hidden = functional.gelu(y @ p["out/linears/0/kernel"] + p["out/linears/0/bias"])
    return (hidden @ p["out/linears/1/kernel"] + p["out/linears/1/bias"]).numpy(force=True)


@pytest.mark.parametrize(
    ("grid", "number", "padding"),
    [((4, 6), 7, 0), ((4, 6), 7, 6), ((5, 5), 20, 9), ((27, 27), 64, 100), ((1, 1), 1, 0)],
)
def test_equals_the_formulas_token_by_token(grid, number, padding):
    widths = Widths(grid_HW=grid, vision_C=C, llm_D=D, text_D=T)
    module = built(learned_merge.Config(num_queries=number, text=True, prior=True, **SMALL), widths)
    x_BNC = 2 * noise(3, widths.num_tokens, C, seed=1) + 1
    valid_BN = np.ones(x_BNC.shape[:2], bool)
    valid_BN[1, np.random.RandomState(2).permutation(widths.num_tokens)[:padding]] = False
    context = context_of(x_BNC, valid_BN if padding else None)
    ours = compress(module, x_BNC, context)
    p = wide(module)
    for b in range(3):
        x, prior = (torch.tensor(a[b][valid_BN[b]], dtype=torch.float64) for a in (x_BNC, context.prior_BN))
        text = torch.tensor(context.text_BTD[b][context.text_valid_BT[b]], dtype=torch.float64)
        theirs = one_image(p, x, text, prior, min(number, len(x)))
        found = np.asarray(ours.tokens_BQD[b])
        np.testing.assert_allclose(found[: len(theirs)], theirs, atol=3e-6 * np.abs(theirs).max())
        np.testing.assert_array_equal(found[len(theirs) :], 0)
        if padding:
            np.testing.assert_array_equal(ours.valid_BQ[b], np.arange(number) < len(theirs))


# Properties ----------------------------------------------------------------------------------------------------------


def test_every_tokens_score_gets_a_gradient_while_the_temperature_is_high():
    """The prior is added to the scores, so its gradient is theirs."""
    module, x_BNC = built(TOLD), noise(3, 24, C)
    valid_BN = np.arange(24) < np.array([[24], [17], [24]])

    def total(prior_BN):
        context = context_of(x_BNC, valid_BN, progress=jnp.float32(0))._replace(prior_BN=prior_BN)
        return (module(x_BNC, context).tokens_BQD * noise(3, 7, D, seed=1)).sum()

    grad_BN = np.asarray(jax.grad(total)(np.abs(noise(3, 24, seed=6)) + 0.1))
    assert (np.abs(grad_BN[valid_BN]) > 1e-5).all()
    assert (grad_BN[~valid_BN] == 0).all()


def test_the_order_of_the_tokens_does_not_matter():
    module, x_BNC, order_N = built(TOLD), noise(2, 24, C), np.random.RandomState(0).permutation(24)
    context = context_of(x_BNC)
    one = compress(module, x_BNC, context).tokens_BQD
    other = compress(module, x_BNC[:, order_N], context._replace(prior_BN=context.prior_BN[:, order_N])).tokens_BQD

    def as_a_set(tokens_QD):
        return np.asarray(tokens_QD)[np.argsort(np.asarray(tokens_QD)[:, 0])]

    for b in range(2):
        np.testing.assert_allclose(as_a_set(one[b]), as_a_set(other[b]), atol=5e-7 * np.abs(one[b]).max())


def test_masking_equals_cutting_the_padding_off():
    module, x_BNC = built(TOLD), noise(2, 24, C)
    context = context_of(x_BNC)
    masked = compress(module, x_BNC, context._replace(valid_BN=np.tile(np.arange(24) < 17, (2, 1))))
    cut = compress(module, x_BNC[:, :17], context._replace(prior_BN=context.prior_BN[:, :17]))
    np.testing.assert_allclose(masked.tokens_BQD, cut.tokens_BQD, atol=1e-6)


def test_at_first_it_is_plain_pruning():
    """By the prior alone, to a thousandth; the kept tokens reach the projection untouched, in raster order."""
    module = TOLD.build(WIDTHS, nnx.Rngs(0))
    x_BNC = noise(2, 24, C)
    context = context_of(x_BNC)
    kept_BQ = np.sort(np.argsort(-context.prior_BN, axis=1)[:, :7], axis=1)
    expected_BQD = module.out(jnp.take_along_axis(jnp.asarray(x_BNC), kept_BQ[..., None], axis=1))
    np.testing.assert_array_equal(module(x_BNC, context).tokens_BQD, expected_BQD)


@pytest.mark.parametrize("literal", [False, True])
def test_fewer_active_outputs_are_the_config_at_fewer(literal):
    config = learned_merge.Config(num_queries=9, literal=literal, **SMALL)
    module, small, x_BNC = built(config), built(config.at(4)), noise(3, 24, C)
    valid_BN = np.arange(24) < np.array([[24], [17], [3]])
    out = compress(module, x_BNC, Context(valid_BN, active_B=jnp.full(3, 4)))
    for found, expected in zip(out, compress(small, x_BNC, Context(valid_BN)), strict=True):
        np.testing.assert_allclose(found[:, :4], expected, atol=2e-6)
        assert not np.asarray(found[:, 4:]).any()


def test_more_outputs_than_tokens_leave_the_last_ones_invalid():
    out = compress(built(learned_merge.Config(num_queries=7, **SMALL)), noise(2, 5, C), Context())
    np.testing.assert_array_equal(out.valid_BQ, np.tile(np.arange(7) < 5, (2, 1)))
    np.testing.assert_array_equal(out.assign_BQN, np.tile(np.eye(7, 5), (2, 1, 1)))
    assert not out.tokens_BQD[:, 5:].any()


def test_randomness_is_of_the_key_and_of_the_first_half():
    module, x_BNC = built(TOLD), noise(2, 24, C)
    plain = context_of(x_BNC)
    keys_B, other_B = (jax.random.split(jax.random.key(seed), 2) for seed in (0, 1))

    def tokens(**more):
        return np.asarray(compress(module, x_BNC, plain._replace(**more)).tokens_BQD)

    early = {"progress": jnp.float32(0.1)}
    np.testing.assert_array_equal(tokens(keys_B=keys_B, **early), tokens(keys_B=keys_B, **early))
    assert np.abs(tokens(keys_B=keys_B, **early) - tokens(keys_B=other_B, **early)).max() > 0.1
    crossed_B = jnp.stack([keys_B[0], other_B[1]])
    np.testing.assert_array_equal(tokens(keys_B=crossed_B, **early)[0], tokens(keys_B=keys_B, **early)[0])
    for late in (0.5, 0.8, 1.0):
        np.testing.assert_array_equal(tokens(keys_B=keys_B, progress=jnp.float32(late)), tokens())


def test_the_temperature_falls_from_1_to_a_tenth_over_the_first_half():
    module, x_BNC = built(TOLD), noise(1, 24, C)
    context = context_of(x_BNC)
    x, prior = torch.tensor(x_BNC[0]).double(), torch.tensor(context.prior_BN[0]).double()
    for progress, temperature in {0.0: 1.0, 0.25: 0.55, 0.5: 0.1}.items():
        ours = compress(module, x_BNC, context._replace(progress=jnp.float32(progress))).tokens_BQD[0]
        text = torch.tensor(context.text_BTD[0]).double()
        theirs = one_image(wide(module), x, text, prior, 7, temperature)
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.abs(theirs).max())


def test_the_null_text_is_no_text():
    told = built(learned_merge.Config(num_queries=7, text=True, **SMALL))
    plain = built(learned_merge.Config(num_queries=7, **SMALL))
    x_BNC = noise(3, 24, C)
    told_BQD = compress(told, x_BNC, context_of(x_BNC)).tokens_BQD
    plain_BQD = compress(plain, x_BNC, Context()).tokens_BQD
    np.testing.assert_allclose(told_BQD[2], plain_BQD[2], atol=2e-6)
    assert np.abs(told_BQD[0] - plain_BQD[0]).max() > 0.1


def loops(jaxpr):
    """The lengths of all scans, however deep; None for a loop of unknown length."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            yield equation.params.get("length")
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from loops(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(("literal", "expected"), [(False, {48}), (True, {24})])
def test_only_the_literal_form_goes_token_by_token(literal, expected):
    module = built(learned_merge.Config(num_queries=7, literal=literal, **SMALL))
    graphdef, state = nnx.split(module)
    program = jax.make_jaxpr(lambda state, x_BNC: nnx.merge(graphdef, state)(x_BNC).tokens_BQD)(state, noise(2, 24, C))
    assert set(loops(program.jaxpr)) == expected


# The sketch ----------------------------------------------------------------------------------------------------------


def sketch(p, tokens, number):
    """Score, keep the highest (here in raster order), overwrite with one dropped token after another."""

    def mlp(x, first, second):
        hidden = functional.gelu(x @ p[f"{first}/kernel"] + p[f"{first}/bias"])
        return hidden @ p[f"{second}/kernel"] + p[f"{second}/bias"]

    importance = torch.sigmoid(mlp(tokens, "importance/hidden", "importance/score"))[:, 0]
    kept_indices = importance.topk(number).indices.sort().values
    kept_tokens = tokens[kept_indices].clone()
    for dropped in sorted(set(range(len(tokens))) - set(kept_indices.tolist())):
        similarities = functional.cosine_similarity(tokens[dropped][None], kept_tokens)
        most_similar = similarities.argmax()
        pair = torch.cat([kept_tokens[most_similar], tokens[dropped]])
        kept_tokens[most_similar] = mlp(pair, "overwriter/linears/0", "overwriter/linears/1")
    return projected(p, kept_tokens)


@pytest.mark.parametrize(("grid", "number", "padding"), [((4, 6), 9, 0), ((5, 5), 7, 10), ((9, 9), 16, 20)])
def test_the_literal_form_is_the_sketch(grid, number, padding):
    widths = Widths(grid_HW=grid, vision_C=C, llm_D=D)
    module = built(learned_merge.Config(num_queries=number, scorer=8, literal=True), widths)
    x_BNC = noise(2, widths.num_tokens, C, seed=3)
    valid_BN = np.ones(x_BNC.shape[:2], bool)
    valid_BN[1, :padding] = False
    ours_BQD = compress(module, x_BNC, Context(valid_BN if padding else None)).tokens_BQD
    for b in range(2):
        theirs_QD = sketch(wide(module), torch.tensor(x_BNC[b][valid_BN[b]]).double(), number)
        np.testing.assert_allclose(ours_BQD[b], theirs_QD, atol=1e-5 * np.abs(theirs_QD).max())


# Sizes, start, refusals ----------------------------------------------------------------------------------------------


def test_sizes_at_a_7b_model():
    big = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096, text_D=4096)
    sizes = {}
    for name, config in {"plain": learned_merge.Config(), "text": learned_merge.Config(text=True)}.items():
        module = nnx.eval_shape(lambda config=config: config.build(big, nnx.Rngs(0)))
        sizes[name] = sum(leaf.get_value().size for leaf in leaves(module).values())
    scorer = 2 * 1024 + 1024 * 256 + 256 + 256 * 256 + 256 + 256 * 256 + 256
    merger = 2 * 1024 * 256 + 256 + 256 * 1024
    assert sizes["plain"] == scorer + 1024 * 64 + merger + 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert sizes["text"] - sizes["plain"] == 2 * 4096 + 1024 * 64 + 4096 * 64


def test_starts_where_the_prior_decides():
    value = {path: np.asarray(leaf.get_value()) for path, leaf in leaves(TOLD.build(WIDTHS, nnx.Rngs(0))).items()}
    assert not value["merger/back/kernel"].any()
    for path in ("importance/score", "importance/text_query/kernel"):
        assert 0 < np.abs(value[path]).max() < 1e-3
    assert value["importance/trust"] == 1
    assert abs(value["merger/kept/kernel"].std() - C**-0.5) < 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (learned_merge.Config(num_queries=4, merger=0), "merger=0: must be at least 1"),
        (learned_merge.Config(num_queries=4, temperature=0.0), r"temperature=0\.0: must be positive"),
        (learned_merge.Config(num_queries=4, literal=True, prior=True), r"cannot be told \['prior'\] as well"),
        (learned_merge.Config(num_queries=4, text=True), r"text=True .* Widths\.text_D=0"),
    ],
)
def test_impossible_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(Widths(grid_HW=(4, 6), vision_C=C, llm_D=D), nnx.Rngs(0))
