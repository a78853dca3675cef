"""The contract every compressor keeps: facts from the neighbours in, Q tokens of LLM width out.

A compressor's file holds a frozen dataclass `Config` (its own choices; the config object is the registration) and one
final class. `Config.build(widths, rngs)` makes the module, `module(tokens_BNC, context)` compresses. The projection to
the LLM's width is inside, so one compressor saves, shards and exports as one unit. Masked outputs are exactly 0, and
invalid inputs never influence valid outputs. `tests/test_compressors.py` examines all of them by the same questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Facts from the neighbours. grid_HW: the tower's token grid; vision_C, llm_D, text_D: widths."""

    grid_HW: tuple[int, int]
    vision_C: int
    llm_D: int
    text_D: int = 0

    @property
    def num_tokens(self) -> int:
        """N, the tokens the tower hands over."""
        return self.grid_HW[0] * self.grid_HW[1]


class Context(NamedTuple):
    """What a compressor may be told beside the tokens; all optional. One that lacks what it needs raises.

    valid_BN: bool, True for real tokens; None means all.
    assign: True asks for `Compressed.assign_BQN`, who went where (pictures only, costs memory). A Python bool: under
        jit close over it, do not pass it in.
    """

    valid_BN: jax.Array | None = None
    assign: bool = False


class Compressed(NamedTuple):
    """tokens_BQD: what the LLM gets. valid_BQ: bool, None means all Q are valid.

    assign_BQN: rows over the visual tokens summing to 1 where the output is valid: the pooling matrix of a pooling
    compressor, the head-mean of the last cross-attention of an attending one. None unless asked for.
    """

    tokens_BQD: jax.Array
    valid_BQ: jax.Array | None = None
    assign_BQN: jax.Array | None = None


class Config(Protocol):
    """A compressor's own choices: a frozen dataclass in the compressor's file."""

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Compressor: ...

    def outputs(self, widths: Widths) -> int:
        """Q, the tokens handed to the LLM; ValueError naming the possible numbers if the grid cannot give it."""
        ...


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
    if tokens_BNC.shape[1] != widths.num_tokens:
        raise ValueError(
            f"tokens_BNC has N={tokens_BNC.shape[1]} tokens, but this compressor was built for N={widths.num_tokens}, "
            f"a {widths.grid_HW[0]}x{widths.grid_HW[1]} grid without class token; build it with the tower's own Widths."
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


def shares(weights_BQN: jax.Array, valid_BN: jax.Array | None) -> jax.Array:
    """Non-negative weights as assign_BQN: only valid tokens count, rows sum to 1; a row without any weight stays 0."""
    weights_BQN = weights_BQN.astype(jnp.float32)
    if valid_BN is not None:
        weights_BQN = jnp.where(valid_BN[:, None], weights_BQN, 0)
    return weights_BQN / jnp.maximum(weights_BQN.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def refuse_queries(num_queries: int, widths: Widths, rule: str, possible: Iterable[int]) -> ValueError:
    """The error for a Q that cannot be had: the rule, the values, the way out."""
    height, width = widths.grid_HW
    return ValueError(
        f"num_queries={num_queries} is not {rule} of a {height}x{width} grid; possible: {sorted(set(possible))}."
    )


def masked(tokens_BQD: jax.Array, valid_BQ: jax.Array | None) -> jax.Array:
    """Exactly 0 where not valid."""
    return tokens_BQD if valid_BQ is None else jnp.where(valid_BQ[..., None], tokens_BQD, 0)
