"""The Q-Former against transformers' Blip2QFormerModel and InstructBlipQFormerModel, which load our names strictly."""

import numpy as np
import pytest
import torch
from flax import nnx
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    OPTConfig,
)

from tcjax.compressors import qformer
from tcjax.compressors.base import Context, Widths
from tcjax.interop import names
from tests.planted import leaves, noise, planted

C, D, E, Q, HEADS, F, VOCAB, MAX_TEXT = 12, 16, 24, 5, 3, 32, 20, 9
WIDTHS = Widths(grid_HW=(4, 4), vision_C=C, llm_D=D, text_D=E)
SIZES = {"num_queries": Q, "width": E, "heads": HEADS, "feed_forward": F, "max_text": MAX_TEXT}
THEIRS = {
    "vocab_size": VOCAB,
    "hidden_size": E,
    "num_attention_heads": HEADS,
    "intermediate_size": F,
    "max_position_embeddings": MAX_TEXT,
    "encoder_hidden_size": C,
    "attn_implementation": "eager",
}
WORDS_VE = noise(VOCAB, E, seed=8)


@nnx.jit
def compress(module, x_BNC, valid_BN=None, text_BTD=None, text_valid_BT=None):
    return module(x_BNC, Context(valid_BN, True, text_BTD=text_BTD, text_valid_BT=text_valid_BT))


def pair(config: qformer.Config, *, faint: float = 1.0):
    """Our planted module, transformers' class with its weights under the published names, and what lies outside it."""
    module = planted(config, WIDTHS)
    module.queries.set_value(module.queries[...] * faint)
    published = names.to_torch(names.flatten(module), config.names(WIDTHS))
    tensors = {name: torch.from_numpy(array) for name, array in published.items()}
    own = {name.removeprefix("qformer."): value for name, value in tensors.items() if name.startswith("qformer.")}
    sizes = THEIRS | {"num_hidden_layers": config.depth, "cross_attention_frequency": config.cross_every}
    if config.text:
        theirs = InstructBlipQFormerModel(InstructBlipQFormerConfig(**sizes))
        own["embeddings.word_embeddings.weight"] = torch.from_numpy(WORDS_VE)
    else:
        theirs = Blip2QFormerModel(Blip2QFormerConfig(**sizes))
    theirs.load_state_dict(own, strict=True)
    return module, theirs.eval(), {name: value for name, value in tensors.items() if "qformer." not in name}


@torch.inference_mode()
def their_forward(theirs, outside, x_BNC, valid_BN=None, ids_BT=None, text_valid_BT=None, num_queries=Q):
    """language_projection(qformer(query_tokens, image)): [B, Q, D], and the head-mean of its last cross-attention."""
    told = {}
    if isinstance(theirs, InstructBlipQFormerModel):
        told["input_ids"] = None if ids_BT is None else torch.from_numpy(ids_BT)
    if ids_BT is not None:
        everyone = torch.ones(len(x_BNC), num_queries, dtype=torch.long)
        told["attention_mask"] = torch.cat([everyone, torch.from_numpy(text_valid_BT).long()], 1)
    out = theirs(
        query_embeds=outside["query_tokens"].expand(len(x_BNC), -1, -1),
        encoder_hidden_states=torch.from_numpy(x_BNC),
        encoder_attention_mask=None if valid_BN is None else torch.from_numpy(valid_BN).long(),
        output_attentions=True,
        **told,
    )
    rows = out.last_hidden_state[:, :num_queries]
    weight, bias = outside["language_projection.weight"], outside["language_projection.bias"]
    return torch.nn.functional.linear(rows, weight, bias).numpy(), out.cross_attentions[-1].mean(1).numpy()


def assert_near(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def padded(num_tokens: int, padding: int) -> np.ndarray | None:
    valid_BN = np.ones((2, num_tokens), bool)
    valid_BN[1, num_tokens - padding :] = False
    return valid_BN if padding else None


@pytest.mark.parametrize(
    ("num_tokens", "padding", "depth", "cross_every"),
    [(16, 0, 4, 2), (16, 5, 2, 1), (13, 4, 4, 2), (1, 0, 2, 1), (257, 100, 4, 2), (13, 4, 6, 3)],
)
def test_equals_blip2(num_tokens, padding, depth, cross_every):
    module, theirs, outside = pair(qformer.Config(depth=depth, cross_every=cross_every, **SIZES))
    x_BNC, valid_BN = 3 * noise(2, num_tokens, C) + 1, padded(num_tokens, padding)
    ours = compress(module, x_BNC, valid_BN)
    their_BQD, their_BQN = their_forward(theirs, outside, x_BNC, valid_BN)
    assert_near(ours.tokens_BQD, their_BQD)
    assert_near(ours.assign_BQN, their_BQN)  # of the last layer that reads the image


@pytest.mark.parametrize(("num_tokens", "padding", "num_text"), [(16, 0, 9), (13, 4, 4), (16, 5, 1)])
def test_equals_instruct_blip(num_tokens, padding, num_text):
    """With text as wide as the queries there is no text_proj, and nothing is ours."""
    module, theirs, outside = pair(qformer.Config(depth=4, text=True, **SIZES))
    assert outside.keys() == {"query_tokens", "language_projection.weight", "language_projection.bias"}
    x_BNC, valid_BN = noise(2, num_tokens, C), padded(num_tokens, padding)
    ids_BT = np.random.RandomState(3).randint(1, VOCAB, (2, num_text))
    text_valid_BT = np.arange(num_text) < np.array([[num_text], [max(1, num_text - 3)]])
    hidden_BTD = np.where(text_valid_BT[..., None], WORDS_VE[ids_BT], np.float32(np.nan))
    ours = compress(module, x_BNC, valid_BN, hidden_BTD, text_valid_BT)
    their_BQD, their_BQN = their_forward(theirs, outside, x_BNC, valid_BN, ids_BT, text_valid_BT)
    assert_near(ours.tokens_BQD, their_BQD)
    assert_near(ours.assign_BQN, their_BQN)
    blind_BQD, _ = their_forward(theirs, outside, x_BNC, valid_BN)
    assert np.abs(blind_BQD - their_BQD).max() > 0.05  # the text does something


def test_the_null_text_is_no_text():
    """input_ids=None on the same weights; whatever lies in the masked rows."""
    module, theirs, outside = pair(qformer.Config(depth=4, text=True, **SIZES))
    x_BNC = noise(2, 16, C)
    ours = compress(module, x_BNC, None, np.full((2, 6, E), np.nan, np.float32), np.zeros((2, 6), bool))
    assert_near(ours.tokens_BQD, their_forward(theirs, outside, x_BNC)[0])


def test_the_text_counts_its_positions():
    module, *_ = pair(qformer.Config(depth=4, text=True, **SIZES))
    x_BNC, text_BTD = noise(1, 16, C), noise(1, 4, E, seed=2)
    straight, turned = compress(module, x_BNC, None, text_BTD), compress(module, x_BNC, None, text_BTD[:, ::-1])
    assert np.abs(straight.tokens_BQD - turned.tokens_BQD).max() > 1e-2


def test_text_of_another_width_is_mapped_first():
    """text_proj is a linear layer before the positions: mapping by hand gives InstructBLIP's own form."""
    config = qformer.Config(depth=2, text=True, **SIZES)
    wide = planted(config, Widths(grid_HW=(4, 4), vision_C=C, llm_D=D, text_D=10))
    plain = planted(config, WIDTHS)
    assert leaves(wide).keys() - leaves(plain).keys() == {"text_proj/kernel", "text_proj/bias"}
    x_BNC, text_BTD, valid_BT = noise(2, 16, C), noise(2, 4, 10, seed=2), np.arange(4) < np.array([[4], [2]])
    text_BTE = text_BTD @ wide.text_proj.kernel[...] + wide.text_proj.bias[...]
    assert_near(
        compress(wide, x_BNC, None, text_BTD, valid_BT).tokens_BQD,
        compress(plain, x_BNC, None, np.asarray(text_BTE), valid_BT).tokens_BQD,
    )


def test_eps_is_far_below_the_queries():
    """Queries of variance 1e-10: eps 1e-6 in the first norm would shrink them to a hundredth."""
    module, theirs, outside = pair(qformer.Config(depth=2, **SIZES), faint=1e-5 * Q**0.5)
    assert module.queries[...].var() < 1.5e-10
    x_BNC = noise(2, 16, C)
    ours_BQD = compress(module, x_BNC).tokens_BQD
    assert_near(ours_BQD, their_forward(theirs, outside, x_BNC)[0])
    module.norm.eps = 1e-6
    assert np.abs(compress(module, x_BNC).tokens_BQD - ours_BQD).max() > 0.05


def test_masking_equals_cutting_the_padding_off():
    module, *_ = pair(qformer.Config(depth=4, text=True, **SIZES))
    x_BNC, text_BTD = noise(2, 16, C), noise(2, 6, E, seed=2)
    valid_BN, valid_BT = np.tile(np.arange(16) < 11, (2, 1)), np.tile(np.arange(6) < 4, (2, 1))
    masked = compress(module, x_BNC, valid_BN, text_BTD, valid_BT)
    cut = compress(module, x_BNC[:, :11], None, text_BTD[:, :4])
    np.testing.assert_allclose(masked.tokens_BQD, cut.tokens_BQD, atol=1e-5)
    np.testing.assert_allclose(masked.assign_BQN[..., :11], cut.assign_BQN, atol=1e-6)


def test_blip2_as_a_whole_loads_it_and_agrees():
    """Tower, Q-Former and projection of Blip2ForConditionalGeneration: our names are its names."""
    config = qformer.Config(depth=4, **SIZES)
    module, _, outside = pair(config)
    qformer_config = {**THEIRS, "num_hidden_layers": 4}
    vision = {"hidden_size": C, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": D, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    whole = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(**vision, image_size=28, patch_size=14).to_dict(),
            qformer_config=Blip2QFormerConfig(**qformer_config).to_dict(),
            text_config=OPTConfig(**text, word_embed_proj_dim=D, max_position_embeddings=16).to_dict(),
            num_query_tokens=Q,
        )
    ).eval()
    published = names.to_torch(names.flatten(module), config.names(WIDTHS))
    loaded = whole.load_state_dict({key: torch.from_numpy(value) for key, value in published.items()}, strict=False)
    assert loaded.unexpected_keys == []
    assert [key for key in loaded.missing_keys if not key.startswith(("vision_model.", "language_model."))] == []
    pixels = torch.from_numpy(noise(2, 3, 28, 28))
    with torch.inference_mode():
        x_BNC = whole.vision_model(pixels).last_hidden_state
        answer = whole.qformer(
            query_embeds=whole.query_tokens.expand(2, -1, -1), encoder_hidden_states=x_BNC
        ).last_hidden_state
        their_BQD = whole.language_projection(answer).numpy()
    assert x_BNC.shape == (2, 5, C)  # the class token is among them
    assert_near(compress(module, x_BNC.numpy()).tokens_BQD, their_BQD)
    assert outside.keys() == {"query_tokens", "language_projection.weight", "language_projection.bias"}


@pytest.mark.parametrize("text", [False, True])
def test_defaults_are_the_published_sizes(text):
    """At width 1408 and without word embeddings: 105.1 M for BLIP-2, 162.2 M for InstructBLIP."""
    widths = Widths(grid_HW=(16, 16), vision_C=1408, llm_D=2560, text_D=768)
    module = nnx.eval_shape(lambda: qformer.Config(text=text).build(widths, nnx.Rngs(0)))
    sizes = {path: leaf.get_value().size for path, leaf in leaves(module).items()}
    assert sizes.pop("queries") == 32 * 768
    assert sizes.pop("out_proj/kernel") + sizes.pop("out_proj/bias") == 768 * 2560 + 2560
    with torch.device("meta"):
        theirs = (
            InstructBlipQFormerModel(InstructBlipQFormerConfig()) if text else Blip2QFormerModel(Blip2QFormerConfig())
        )
    expected = sum(value.numel() for key, value in theirs.named_parameters() if "word_embeddings" not in key)
    assert sum(sizes.values()) == expected
    assert round(expected / 1e6, 1) == (162.2 if text else 105.1)


def test_starts_as_published():
    """Queries, positions and kernels N(0, 0.02), biases 0, norms 1; transformers' own start has queries of zeros."""
    config = qformer.Config(num_queries=16, depth=4, width=32, heads=4, feed_forward=64, text=True, max_text=32)
    start = leaves(config.build(Widths(grid_HW=(4, 4), vision_C=32, llm_D=32, text_D=16), nnx.Rngs(0)))
    value = {path: np.asarray(leaf.get_value()) for path, leaf in start.items()}
    for path, array in value.items():
        if path.endswith("kernel") or path in ("queries", "positions"):
            assert abs(array.std() - 0.02) < 0.0015, path
            assert np.abs(array).max() > 2.5 * 0.02, path  # not cut off at two standard deviations
        else:
            assert (array == path.endswith("scale")).all(), path
    for place in (0, 1):
        kernels = value[f"groups/layers/{place}/query_ff/ff_in/kernel"]
        assert not np.array_equal(kernels[0], kernels[1]), "layers must start apart"


def test_what_cannot_be_read_is_said():
    config = qformer.Config(depth=2, text=True, **SIZES)
    with pytest.raises(ValueError, match=r"10 positions, .*max_text=9.*last 128"):
        compress(config.build(WIDTHS, nnx.Rngs(0)), noise(1, 16, C), None, noise(1, 10, E))
    with pytest.raises(ValueError, match=r"conditioned on the question, but Widths.text_D is 0"):
        config.build(Widths(grid_HW=(4, 4), vision_C=C, llm_D=D), nnx.Rngs(0))
    assert (config.needs, qformer.Config().needs) == (("text",), ())
