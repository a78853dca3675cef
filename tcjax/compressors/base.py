"""The contract every compressor keeps: facts from the neighbours in, Q tokens of LLM width out.

A compressor's file holds a frozen dataclass `Config` (its own choices; the config object is the registration) and one
final class. `Config.build(widths, rngs)` makes the module, `module(tokens_BNC, context)` compresses. The projection to
the LLM's width is inside, so one compressor saves, shards and exports as one unit. Masked outputs are exactly 0, and
invalid inputs never influence valid outputs. `tests/test_compressors.py` examines all of them by the same questions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.interop.names import Name

SCHEMA = 2  # of the descriptions


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Facts from the neighbours. grid_HW: the tower's token grid; vision_C, llm_D, text_D: widths.

    frames: images that are compressed together, the frames of a video; their tokens follow one another.
    levels: how many earlier layers of the tower come along, each of width vision_C.
    extra: tokens before the grid's, the class token where the tower keeps it.
    ragged: every image has a grid of its own, of at most grid_HW = (1, N) tokens; `Context.valid_BN` says how many.
    """

    grid_HW: tuple[int, int]
    vision_C: int
    llm_D: int
    text_D: int = 0
    frames: int = 1
    levels: int = 0
    extra: int = 0
    ragged: bool = False

    @property
    def num_tokens(self) -> int:
        """N, the tokens the tower hands over."""
        return self.frames * (self.extra + self.grid_HW[0] * self.grid_HW[1])


class Context(NamedTuple):
    """What a compressor may be told beside the tokens; all optional. One that lacks what it needs raises.

    valid_BN: bool, True for real tokens; None means all.
    assign: True asks for `Compressed.assign_BQN`, who went where (pictures only, costs memory). A Python bool: under
        jit close over it, do not pass it in.
    text_BTD: the instruction's embeddings (D here is `Widths.text_D`), without positions; never the answer's.
    text_valid_BT: bool, True for real text; None means all, a row without any is the null text.
    levels_BNE: the tower's earlier layers side by side, E = levels * C.
    prior_BN: scores >= 0 of the tokens from elsewhere, such as the tower's attention.
    active_B: int32, only the first so many of the Q outputs are wanted of this row; the others become invalid.
    keys_B: one PRNG key per row. Given only in training; what is random is random then and nowhere else.
    progress: float32 scalar, the share of the training that is over; None means all of it.
    index_B: int32, the sample's position in its source: what is drawn per image is the same in every epoch.
    """

    valid_BN: jax.Array | None = None
    assign: bool = False
    text_BTD: jax.Array | None = None
    text_valid_BT: jax.Array | None = None
    levels_BNE: jax.Array | None = None
    prior_BN: jax.Array | None = None
    active_B: jax.Array | None = None
    keys_B: jax.Array | None = None
    progress: jax.Array | None = None
    index_B: jax.Array | None = None


class Compressed(NamedTuple):
    """tokens_BQD: what the LLM gets. valid_BQ: bool, None means all Q are valid.

    assign_BQN: rows over the visual tokens summing to 1 where the output is valid: the pooling matrix of a pooling
    compressor, the head-mean of the last cross-attention of an attending one. None unless asked for.
    """

    tokens_BQD: jax.Array
    valid_BQ: jax.Array | None = None
    assign_BQN: jax.Array | None = None


Need = Literal["text", "levels", "prior"]


class CompressorConfig:
    """A compressor's own choices: a frozen dataclass in the compressor's file that inherits this interface.

    needs: fields of the context without which it cannot work ("text": text_BTD, and so on).
    elastic: whether one training serves fewer tokens too, and how (`at`).
        "no": its weights belong to one Q.  "pooling": no weight knows Q.
        "prefix": outputs do not see each other, the first Q' are what they were.
        "masked prefix": they do, so the others are masked out of the keys.
    """

    needs: ClassVar[tuple[Need, ...]] = ()
    elastic: ClassVar[Literal["no", "pooling", "prefix", "masked prefix"]] = "no"

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Compressor:
        raise NotImplementedError(type(self).__module__)

    def outputs(self, widths: Widths) -> int:
        """Q, the tokens handed to the LLM; ValueError naming the possible numbers if the grid cannot give it."""
        raise NotImplementedError(type(self).__module__)

    def at(self, num_queries: int) -> Self:
        """The config with the same weights at another number of tokens; ValueError if there is none."""
        raise ValueError(
            f"{type(self).__module__} has weights for one number of tokens only; train it at {num_queries}, or use an "
            f"elastic compressor (`tcjax compressors` says which are)."
        )

    def of_tower(self) -> dict[str, Any]:
        """Fields of the tower's config that this compressor wants otherwise, such as `levels`."""
        return {}

    def asked(self, widths: Widths) -> Widths:
        """The widths of a tower that gives what `of_tower` asks for."""
        fields = self.of_tower()
        grid_HW, levels = fields.get("shrunk_HW", widths.grid_HW), len(fields.get("levels", ()))
        return replace(widths, grid_HW=grid_HW, levels=levels, extra=int(fields.get("keep_class", widths.extra)))

    def averaged_over(self) -> tuple[int, ...]:
        """The numbers of active outputs whose losses every training step averages; () trains all of them at once."""
        return ()

    @property
    def family(self) -> str:
        """Its file's name, which is its PyTorch twin's too."""
        return type(self).__module__.rpartition(".")[2]

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        """(h, w) of the outputs where they still lie on a grid, row by row; else a row of Q."""
        return 1, self.outputs(widths)

    def describe(self, widths: Widths) -> dict[str, Any]:
        """What compressor_config.json says: all that the PyTorch twin computes from. JSON types only.

        "extra", tokens before the grid's, is absent where there are none.
        """
        facts = {
            "schema": SCHEMA,
            "family": self.family,
            "grid": list(widths.grid_HW),
            "frames": widths.frames,
            "token_order": "row by row",
            "vision_width": widths.vision_C,
            "llm_width": widths.llm_D,
            "text_width": widths.text_D if "text" in self.needs else 0,
            "levels": widths.levels if "levels" in self.needs else 0,
            "num_queries": self.outputs(widths),
            "needs": list(self.needs),
            "any_num_tokens": False,
        }
        if widths.extra:
            facts["extra"] = widths.extra
        return facts | self.semantics(widths)

    def semantics(self, widths: Widths) -> dict[str, Any]:
        """The family's own facts beyond sizes and Q: depth, eps, activation, orders. JSON types only."""
        raise NotImplementedError(type(self).__module__)

    def names(self, widths: Widths) -> list[Name]:
        """Leaf of the module <-> tensor of the published checkpoints."""
        raise NotImplementedError(type(self).__module__)


class Compressor(nnx.Module):
    """Interface of all compressors; subclasses are final. num_outputs: Q, static."""

    num_outputs: int

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        raise NotImplementedError(type(self).__name__)


def check_width(tokens_BNC: jax.Array, widths: Widths) -> None:
    """ValueError unless the tokens have the width this compressor was built for; any number of them will do."""
    if tokens_BNC.ndim != 3 or tokens_BNC.shape[-1] != widths.vision_C:
        raise ValueError(
            f"tokens_BNC is {list(tokens_BNC.shape)}, but this compressor was built for [B, N, C={widths.vision_C}]; "
            f"build it with the tower's own Widths."
        )


def check_grid(tokens_BNC: jax.Array, widths: Widths) -> None:
    """ValueError unless the tokens fill the grid this compressor was built for."""
    check_width(tokens_BNC, widths)
    only_grid(widths)
    if tokens_BNC.shape[1] != widths.num_tokens:
        raise ValueError(
            f"tokens_BNC has N={tokens_BNC.shape[1]} tokens, but this compressor was built for N={widths.num_tokens}, "
            f"a {widths.grid_HW[0]}x{widths.grid_HW[1]} grid without class token; build it with the tower's own Widths."
        )


def one_image(widths: Widths) -> tuple[int, int]:
    """The grid (H, W); ValueError for a video or a class token, which a compressor that reads a grid does not know."""
    if widths.frames != 1:
        raise ValueError(
            f"this compressor reads one image, not {widths.frames} frames; wrap it in per_frame, or use one that reads "
            f"video (resampler, minicpm_resampler)."
        )
    only_grid(widths)
    return widths.grid_HW


def only_grid(widths: Widths) -> None:
    """ValueError for a tower without one fixed grid, or with tokens before it: a compressor of a grid has no place for them."""
    if widths.ragged:
        raise ValueError(
            f"this compressor reads one fixed grid, and the tower hands over images of any shape, up to N={widths.num_tokens} "
            f"tokens on a grid of each image's own (Pixels.geometry='naflex'). Use a compressor that reads any number of tokens "
            f"(resampler, qformer, query_merge), or a tower of fixed resolution."
        )
    if widths.extra:
        height, width = widths.grid_HW
        raise ValueError(
            f"this compressor reads a grid, and the tower hands over extra={widths.extra} token before its {height}x{width}: "
            f"the class token. Build the tower with VitConfig.keep_class=False, or use a compressor that reads any tokens "
            f"(qformer, resampler, query_merge)."
        )


def visible(tokens_BNC: jax.Array, context: Context) -> jax.Array:
    """The tokens with 0 in place of the invalid ones, so that not even a NaN of theirs gets further."""
    valid_BN = context.valid_BN
    if valid_BN is not None and (valid_BN.shape != tokens_BNC.shape[:2] or valid_BN.dtype != jnp.bool):
        raise ValueError(
            f"context.valid_BN is {valid_BN.dtype}{list(valid_BN.shape)}, but these tokens need "
            f"bool{list(tokens_BNC.shape[:2])}: one flag per token, True for real ones."
        )
    return masked(tokens_BNC, valid_BN)


def read_text(context: Context, widths: Widths) -> tuple[jax.Array, jax.Array]:
    """text_BTD with 0 in place of padding, and text_valid_BT; ValueError if there is no text or it does not fit."""
    text_BTD, valid_BT = context.text_BTD, context.text_valid_BT
    if text_BTD is None:
        raise ValueError(
            "this compressor is conditioned on the question and got no context.text_BTD; the pipeline hands it over "
            "when Batch.instruction_BT is filled (a text_valid_BT of False is the null text)."
        )
    if text_BTD.ndim != 3 or text_BTD.shape[-1] != widths.text_D:
        raise ValueError(
            f"context.text_BTD is {list(text_BTD.shape)}, but this compressor was built for [B, T, {widths.text_D}], "
            f"the embeddings of Widths.text_D; build it with the LLM's own Widths."
        )
    if valid_BT is None:
        return text_BTD, jnp.ones(text_BTD.shape[:2], bool)
    if valid_BT.shape != text_BTD.shape[:2] or valid_BT.dtype != jnp.bool:
        raise ValueError(
            f"context.text_valid_BT is {valid_BT.dtype}{list(valid_BT.shape)}, but this text needs "
            f"bool{list(text_BTD.shape[:2])}: one flag per position, True for real ones."
        )
    return masked(text_BTD, valid_BT), valid_BT


def read_levels(tokens_BNC: jax.Array, context: Context, levels: int) -> jax.Array:
    """levels_BNE with 0 in place of invalid tokens; ValueError if the tower did not hand them over."""
    wanted = [*tokens_BNC.shape[:2], levels * tokens_BNC.shape[2]]
    if context.levels_BNE is None or list(context.levels_BNE.shape) != wanted:
        got = "none" if context.levels_BNE is None else str(list(context.levels_BNE.shape))
        raise ValueError(
            f"this compressor reads {levels} earlier layers of the tower, context.levels_BNE {wanted}, and got {got}; "
            f"VitConfig.levels names the layers the tower hands over."
        )
    return masked(context.levels_BNE, context.valid_BN)


def any_valid(tokens_BNC: jax.Array, context: Context, num: int) -> jax.Array | None:
    """valid_BQ of a compressor whose `num` outputs all stand or fall with the image: False where no token is valid."""
    return limited(_whole(tokens_BNC, context, num), tokens_BNC, context, num)


def limited(valid_BQ: jax.Array | None, tokens_BNC: jax.Array, context: Context, num: int) -> jax.Array | None:
    """valid_BQ with the outputs beyond `context.active_B` switched off."""
    if context.active_B is None:
        return valid_BQ
    active_BQ = jnp.arange(num) < context.active_B[:, None]
    return active_BQ if valid_BQ is None else valid_BQ & active_BQ


def handed_over(
    tokens_BQD: jax.Array, valid_BQ: jax.Array | None, assign_BQN: jax.Array | None, context: Context
) -> Compressed:
    """The result with everything 0 where it is not valid. assign_BQN: any non-negative weights, or None."""
    if assign_BQN is not None:
        assign_BQN = masked(shares(assign_BQN, context.valid_BN), valid_BQ)
    return Compressed(masked(tokens_BQD, valid_BQ), valid_BQ, assign_BQN)


def _whole(tokens_BNC: jax.Array, context: Context, num: int) -> jax.Array | None:
    if context.valid_BN is None:
        return None
    return jnp.broadcast_to(context.valid_BN.any(-1, keepdims=True), (len(tokens_BNC), num))


def shares(weights_BQN: jax.Array, valid_BN: jax.Array | None) -> jax.Array:
    """Non-negative weights as assign_BQN: only valid tokens count, rows sum to 1; a row without any weight stays 0."""
    weights_BQN = weights_BQN.astype(jnp.float32)
    if valid_BN is not None:
        weights_BQN = jnp.where(valid_BN[:, None], weights_BQN, 0)
    return weights_BQN / jnp.maximum(weights_BQN.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def masked(tokens_BQD: jax.Array, valid_BQ: jax.Array | None) -> jax.Array:
    """Exactly 0 where not valid."""
    return tokens_BQD if valid_BQ is None else jnp.where(valid_BQ[..., None], tokens_BQD, 0)
