"""Chain: compressors in series, each reading what the one before it hands over.

    y = f_k( ... f_2(f_1(x)))        f_1 ... f_(k-1) keep the vision width C, f_k projects to the LLM's width D

Pooling, then learned queries, then merging: 576 -> 144 -> 36 -> 9 is 64 times fewer. Every budget is checked when the
chain is built. Padding travels along: what is invalid after one part is hidden from the next. The tower's earlier layers
and prior scores belong to its own tokens, so only the first part can read them; the question reaches all.

Source: composition is ours; it equals its parts one after another (tests/test_chain.py). Cost: the sum of the parts'.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, CompressorConfig, Context, Need, Widths
from tcjax.interop.names import Name


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """parts: from the tower to the LLM, at least two."""

    parts: tuple[CompressorConfig, ...]

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(dict.fromkeys(need for part in self.parts for need in part.needs))

    @property
    def elastic(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.parts[-1].elastic

    def outputs(self, widths: Widths) -> int:
        return self.parts[-1].outputs(self.between(widths)[-1])

    def between(self, widths: Widths) -> list[Widths]:
        """What each part reads and how wide it writes; ValueError naming the part whose budget does not fit."""
        if len(self.parts) < 2:
            raise ValueError(f"a chain has at least two parts, this one has {len(self.parts)}.")
        found, reads = [], widths
        for number, part in enumerate(self.parts):
            last = number == len(self.parts) - 1
            llm_D = widths.llm_D if last else widths.vision_C
            found.append(replace(reads, llm_D=llm_D))
            late = sorted({"levels", "prior"} & set(part.needs)) if number else []
            if late:
                raise ValueError(
                    f"part {number + 1} of the chain, {part.family}, reads {late}; only the first part can."
                )
            try:
                part.outputs(found[-1])
                reads = replace(widths, grid_HW=part.out_grid(found[-1]), frames=1, levels=0, extra=0)
            except ValueError as error:
                raise ValueError(f"part {number + 1} of the chain, {part.family}: {error}") from error
        return found

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Chain:
        return Chain(self, widths, rngs=rngs)

    def at(self, num_queries: int) -> Config:
        return replace(self, parts=(*self.parts[:-1], self.parts[-1].at(num_queries)))

    def of_tower(self) -> dict:
        return self.parts[0].of_tower()

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        return self.parts[-1].out_grid(self.between(widths)[-1])

    def semantics(self, widths: Widths) -> dict:
        each = zip(self.parts, self.between(widths), strict=True)
        facts = [part.describe(widths) for part, widths in each]
        return {"parts": facts, "any_num_tokens": facts[0]["any_num_tokens"] and facts[1]["any_num_tokens"]}

    def names(self, widths: Widths) -> list[Name]:
        each = enumerate(zip(self.parts, self.between(widths), strict=True))
        return [
            dataclasses.replace(name, jax=f"parts/{number}/{name.jax}", torch=f"parts.{number}.{name.torch}")
            for number, (part, widths) in each
            for name in part.names(widths)
        ]


class Chain(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.num_outputs = config.outputs(widths)
        each = zip(config.parts, config.between(widths), strict=True)
        self.parts = nnx.List([part.build(widths, rngs) for part, widths in each])

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        out, assign_BQN = Compressed(tokens_BNC, context.valid_BN), None
        for number, part in enumerate(self.parts):
            own = context._replace(valid_BN=out.valid_BQ)
            if number:
                own = own._replace(levels_BNE=None, prior_BN=None)
            if number < len(self.parts) - 1:
                own = own._replace(active_B=None)
            if own.keys_B is not None:
                own = own._replace(keys_B=jax.vmap(lambda key, n=number: jax.random.fold_in(key, n))(own.keys_B))
            out = part(out.tokens_BQD, own)
            if number == 0:
                assign_BQN = out.assign_BQN
            elif out.assign_BQN is not None:
                assign_BQM, assign_BMN = out.assign_BQN, assign_BQN
                assign_BQN = jnp.einsum("BQM,BMN->BQN", assign_BQM, assign_BMN)
        return out._replace(assign_BQN=assign_BQN)
