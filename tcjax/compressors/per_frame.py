"""Per frame: one compressor for every frame of a video, the frames' tokens one after another.

    y = [f(x_1) ; f(x_2) ; ... ; f(x_F)]        Q = F * q, shared weights

Source: Dai et al. 2023, "InstructBLIP", reads video this way: its Q-Former sees each frame alone, 4 x 32 queries
(transformers' InstructBlipVideo). Any compressor of one image becomes one of video. Each frame hears the whole
question. Cost: F times that of `each`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, CompressorConfig, Context, Need, Widths, check_grid
from tcjax.interop.names import Name


@dataclass(frozen=True, kw_only=True)
class Config(CompressorConfig):
    """each: compresses one frame."""

    each: CompressorConfig

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.each.needs

    def outputs(self, widths: Widths) -> int:
        return widths.frames * self.each.outputs(_of_one(widths))

    def build(self, widths: Widths, rngs: nnx.Rngs) -> PerFrame:
        return PerFrame(self, widths, rngs=rngs)

    def of_tower(self) -> dict:
        return self.each.of_tower()

    def out_grid(self, widths: Widths) -> tuple[int, int]:
        height, width = self.each.out_grid(_of_one(widths))
        return widths.frames * height, width

    def semantics(self, widths: Widths) -> dict:
        return {"parts": [self.each.describe(_of_one(widths))]}

    def names(self, widths: Widths) -> list[Name]:
        return [
            dataclasses.replace(name, jax=f"each/{name.jax}", torch=f"each.{name.torch}")
            for name in self.each.names(_of_one(widths))
        ]


class PerFrame(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.each = config.each.build(_of_one(widths), rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        B, F = len(tokens_BNC), self.widths.frames

        def apart(per_token: Any) -> Any:
            """[B, F * n, ...] as rows of their own."""
            return None if per_token is None else per_token.reshape(B * F, -1, *per_token.shape[2:])

        def repeated(per_image: Any) -> Any:
            return None if per_image is None else jnp.repeat(per_image, F, axis=0)

        keys_B, index_B = repeated(context.keys_B), repeated(context.index_B)
        frame_B = jnp.tile(jnp.arange(F), B)
        own = context._replace(
            valid_BN=apart(context.valid_BN),
            levels_BNE=apart(context.levels_BNE),
            prior_BN=apart(context.prior_BN),
            text_BTD=repeated(context.text_BTD),
            text_valid_BT=repeated(context.text_valid_BT),
            active_B=None,
            keys_B=None if keys_B is None else jax.vmap(jax.random.fold_in)(keys_B, frame_B),
            index_B=None if index_B is None else index_B * F + frame_B,
        )
        out = self.each(apart(tokens_BNC), own)
        tokens_BQD = out.tokens_BQD.reshape(B, self.num_outputs, -1)
        valid_BQ = None if out.valid_BQ is None else out.valid_BQ.reshape(B, self.num_outputs)
        assign_BQN = None
        if out.assign_BQN is not None:
            of_frame = out.assign_BQN.reshape(B, F, -1, 1, self.widths.num_tokens // F)
            assign_BQN = (of_frame * jnp.eye(F)[:, None, :, None]).reshape(B, self.num_outputs, -1)
        return Compressed(tokens_BQD, valid_BQ, assign_BQN)


def _of_one(widths: Widths) -> Widths:
    return replace(widths, frames=1)
