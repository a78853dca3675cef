"""Elastic: one training for every smaller number of tokens, by switching a random number of outputs on.

    training: each sample draws Q' from `drawn_from`; outputs Q' ... Q - 1 are masked, in the keys too where outputs see
    each other; then the LLM sees Q' tokens. Shapes stay those of Q, so nothing compiles twice.
    evaluation: all num_queries of `of`; `at(Q')` has the same weights and gives Q' tokens.

Sources: Hu et al. 2024, "Matryoshka Query Transformer" (uniform over {2, 4, ..., 256}); Kusupati et al. 2022,
"Matryoshka Representation Learning". Departures: MQT draws one number per batch and process, we draw one per sample, from
a key of the sample and the step, so that the number of devices does not matter. Cost: that of `of`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, CompressorConfig, Context, Need, Widths
from tcjax.interop.names import Name


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """of: the compressor at its largest Q. drawn_from: the numbers to draw; () is every one from 1 to Q."""

    of: CompressorConfig
    drawn_from: tuple[int, ...] = ()

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.needs

    @property
    def elastic(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.elastic

    @property
    def family(self) -> str:
        """Of the compressor inside: it is what remains once the training is over."""
        return self.of.family

    def outputs(self, widths: Widths) -> int:
        most = self.of.outputs(widths)
        if "prefix" not in self.of.elastic and not self.of.averaged_over():
            raise ValueError(
                f"{self.of.family} cannot be trained elastically: the first few of its outputs do not stand alone "
                f"(elastic={self.of.elastic!r}); `tcjax compressors` names those whose outputs are a prefix."
            )
        wrong = [number for number in self.drawn_from if not 1 <= number <= most]
        if wrong:
            raise ValueError(
                f"drawn_from has {wrong}; every number is from 1 to {most}, the outputs of {self.of.family}."
            )
        return most

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Elastic:
        return Elastic(self, widths, rngs=rngs)

    def at(self, num_queries: int) -> Config:
        smaller = self.of.at(num_queries)
        return replace(self, of=smaller, drawn_from=tuple(n for n in self.drawn_from if n <= num_queries))

    def of_tower(self) -> dict:
        return self.of.of_tower()

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        return self.of.out_grid(widths)

    def describe(self, widths: Widths) -> dict:
        return self.of.describe(widths)

    def names(self, widths: Widths) -> list[Name]:
        return [dataclasses.replace(name, jax=f"of/{name.jax}") for name in self.of.names(widths)]


class Elastic(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.num_outputs = config.outputs(widths)
        self.drawn_from = config.drawn_from or config.of.averaged_over()
        self.of = config.of.build(widths, rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        if context.keys_B is not None and context.active_B is None:
            numbers = np.array(self.drawn_from or range(1, self.num_outputs + 1), np.int32)
            choose = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), 0, len(numbers)))
            context = context._replace(active_B=jnp.asarray(numbers)[choose(context.keys_B)])
        return self.of(tokens_BNC, context)
