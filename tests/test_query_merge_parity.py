"""Query merge against its formulas in float64 torch, and its literal relevance against the sketch's two lines."""

import importlib

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from tcjax.compressors import learned_merge, query_merge
from tcjax.compressors.base import Context, Widths
from tcjax.interop import names
from tests.planted import leaves, noise, planted

C, D, T = 12, 16, 10
WIDTHS = Widths(grid_HW=(4, 6), vision_C=C, llm_D=D, text_D=T)
TEXT_VALID_BT = np.arange(5) < np.array([[5], [3], [0]])  # a question, a shorter one, none


@jax.jit
def _compress(graphdef_state, x_BNC, context):
    graphdef, state = graphdef_state
    return nnx.merge(graphdef, state)(x_BNC, context._replace(assign=True))


def compress(module, x_BNC, valid_BN=None, *, text_BTD=None, text_valid_BT=TEXT_VALID_BT):
    text_BTD = noise(len(x_BNC), 5, module.widths.text_D, seed=4) if text_BTD is None else text_BTD
    context = Context(valid_BN, None, text_BTD, text_valid_BT[: len(x_BNC)])
    return _compress(nnx.split(module), x_BNC, context)


def formulas(p, x, text, literal):
    """One image without padding, one slot after another."""

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], eps=1e-5)

    normed = norm(x, "norm")
    relevance = torch.zeros(len(x), dtype=torch.float64)
    if len(text) and literal:
        relevance = x @ (text.mean(0) @ p["relevance/query/kernel"])
    elif len(text):
        query = norm(text.mean(0), "relevance/norm") @ p["relevance/query/kernel"]
        relevance = normed @ p["relevance/key/kernel"] @ query / p["slots"].shape[1] ** 0.5
    alpha = relevance.softmax(0)
    share = (p["slots"] @ (normed @ p["slot_key/kernel"]).T / p["slots"].shape[1] ** 0.5).softmax(0)
    merged = torch.stack([(row * alpha) @ x / (row * alpha).sum() for row in share])
    hidden = functional.gelu(merged @ p["out/linears/0/kernel"] + p["out/linears/0/bias"])
    return (hidden @ p["out/linears/1/kernel"] + p["out/linears/1/bias"]).numpy(force=True)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize(("grid", "padding"), [((4, 6), 0), ((5, 5), 9), ((27, 27), 100), ((1, 1), 0)])
def test_equals_the_formulas(grid, padding, literal):
    widths = Widths(grid_HW=grid, vision_C=C, llm_D=D, text_D=T)
    module = planted(query_merge.Config(num_queries=5, inner=6, literal=literal), widths)
    p = {path: torch.tensor(np.asarray(leaf.get_value())).double() for path, leaf in leaves(module).items()}
    x_BNC = 2 * noise(3, widths.num_tokens, C, seed=1) + 1
    valid_BN = np.ones(x_BNC.shape[:2], bool)
    valid_BN[1, np.random.RandomState(2).permutation(widths.num_tokens)[:padding]] = False
    ours_BQD = compress(module, x_BNC, valid_BN if padding else None).tokens_BQD
    text_BTD = noise(3, 5, T, seed=4)
    for b in range(3):
        x, text = torch.tensor(x_BNC[b][valid_BN[b]]).double(), torch.tensor(text_BTD[b][TEXT_VALID_BT[b]]).double()
        theirs_QD = formulas(p, x, text, literal)
        np.testing.assert_allclose(ours_BQD[b], theirs_QD, atol=3e-6 * np.abs(theirs_QD).max())


def test_the_literal_relevance_is_the_sketchs_in_one_slot():
    """Of one width no matrix is in between; one slot owns every token, so its weights are the relevance alone."""
    widths = Widths(grid_HW=(4, 6), vision_C=C, llm_D=D, text_D=C)
    module = planted(query_merge.Config(num_queries=1, inner=6, literal=True), widths)
    assert not [path for path in leaves(module) if path.startswith("relevance")]
    x_BNC, query_BD = noise(3, 24, C), noise(3, C, seed=4)
    found = compress(module, x_BNC, text_BTD=query_BD[:, None], text_valid_BT=np.ones((3, 1), bool))
    for visual_tokens, query_embedding, weights_QN in zip(x_BNC, query_BD, found.assign_BQN, strict=True):
        relevance_scores = torch.matmul(torch.tensor(visual_tokens), torch.tensor(query_embedding))
        attention_weights = torch.softmax(relevance_scores, dim=0)
        np.testing.assert_allclose(weights_QN[0], attention_weights, atol=1e-6)


@pytest.mark.parametrize("literal", [False, True])
def test_without_a_question_every_token_is_equally_relevant(literal):
    """One slot: the plain mean of the valid tokens, whatever the padding of the text holds; with a question it is not."""
    module = planted(query_merge.Config(num_queries=1, inner=6, literal=literal), WIDTHS)
    x_BNC, text_BTD = noise(3, 24, C), noise(3, 5, T, seed=4)
    text_BTD[2] = np.nan
    valid_BN = np.arange(24) < 17 + np.zeros((3, 1))
    found = compress(module, x_BNC, valid_BN, text_BTD=text_BTD)
    np.testing.assert_allclose(found.assign_BQN[2, 0], valid_BN[2] / 17, atol=1e-7)
    np.testing.assert_allclose(found.tokens_BQD[2, 0], module.out(x_BNC[2, :17].mean(0)), atol=2e-6)
    assert np.abs(found.assign_BQN[0, 0] - valid_BN[0] / 17).max() > 0.01


@pytest.mark.parametrize(
    "config",
    [
        query_merge.Config(num_queries=5, inner=6),
        query_merge.Config(num_queries=5, inner=6, literal=True),
        learned_merge.Config(num_queries=7, scorer=8, merger=6, metric=4, text=True),
    ],
)
def test_the_pytorch_twins_know_the_null_text(config):
    """Beside real tokens; in an artifact's probes the null text is that of the empty image."""
    module = planted(config, WIDTHS)
    module_torch = importlib.import_module(f"tcjax.export.torch.{config.family}").Compressor(config.describe(WIDTHS))
    weights = names.to_torch(names.flatten(module), config.names(WIDTHS))
    module_torch.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    x_BNC, text_BTD = noise(3, 24, C), np.where(TEXT_VALID_BT[..., None], noise(3, 5, T, seed=4), np.nan)
    text_BTD = text_BTD.astype(np.float32)
    ours_BQD = np.asarray(compress(module, x_BNC, text_BTD=text_BTD).tokens_BQD)
    arrays = {"tokens": x_BNC, "text": text_BTD, "text_valid": TEXT_VALID_BT}
    theirs_BQD = module_torch(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    np.testing.assert_allclose(theirs_BQD.numpy(force=True), ours_BQD, atol=3e-6 * np.abs(ours_BQD).max())


def test_starts_as_its_own_control():
    """No text moves it before the first step; slots N(0, 1), so shares differ."""
    module = query_merge.Config(num_queries=64, inner=16).build(WIDTHS, nnx.Rngs(0))
    x_BNC = noise(2, 24, C)
    asked = compress(module, x_BNC).tokens_BQD
    other = compress(module, x_BNC, text_valid_BT=np.zeros((2, 5), bool)).tokens_BQD
    np.testing.assert_array_equal(asked, other)
    assert abs(np.asarray(module.slots[...]).std() - 1) < 0.1
    assert abs(np.asarray(module.slot_key.kernel[...]).std() - C**-0.5) < 0.05


def test_every_share_of_a_token_is_weighted_alike():
    """Two questions differ in a token's weight, not in whose token it is: their log ratios are one relevance plus a constant."""
    module = planted(query_merge.Config(num_queries=5, inner=6), WIDTHS)
    x_BNC = np.tile(noise(1, 24, C), (2, 1, 1))
    ratio_QN = np.log(np.divide(*np.asarray(compress(module, x_BNC).assign_BQN)))
    centred_QN = ratio_QN - ratio_QN.mean(1, keepdims=True)
    np.testing.assert_allclose(centred_QN, np.tile(centred_QN[:1], (5, 1)), atol=5e-6)
    assert centred_QN.std() > 0.01


def test_masking_equals_cutting_the_padding_off():
    module = planted(query_merge.Config(num_queries=5, inner=6), WIDTHS)
    x_BNC = noise(3, 24, C)
    masked = compress(module, x_BNC, np.tile(np.arange(24) < 17, (3, 1)))
    cut = compress(module, x_BNC[:, :17])
    np.testing.assert_allclose(masked.tokens_BQD, cut.tokens_BQD, atol=2e-6)
    np.testing.assert_allclose(masked.assign_BQN[..., :17], cut.assign_BQN, atol=1e-6)


def test_sizes_at_a_7b_model():
    big = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096, text_D=4096)
    sizes = {}
    for literal in (False, True):
        module = nnx.eval_shape(lambda literal=literal: query_merge.Config(literal=literal).build(big, nnx.Rngs(0)))
        sizes[literal] = sum(leaf.get_value().size for leaf in leaves(module).values())
    both = 2 * 1024 + 64 * 256 + 1024 * 256 + 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert sizes[False] == both + 2 * 4096 + 1024 * 256 + 4096 * 256
    assert sizes[True] == both + 4096 * 1024


@pytest.mark.parametrize(
    ("text_D", "inner", "message"), [(0, 6, r"Widths\.text_D=0"), (T, 0, "inner=0: .* at least 1")]
)
def test_impossible_choices_are_named(text_D, inner, message):
    widths = Widths(grid_HW=(4, 6), vision_C=C, llm_D=D, text_D=text_D)
    with pytest.raises(ValueError, match=message):
        query_merge.Config(inner=inner).build(widths, nnx.Rngs(0))
