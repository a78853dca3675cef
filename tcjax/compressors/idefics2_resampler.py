"""Idefics2's connector: every token is projected to the LLM's width first, then Q latents read them through L layers.

    x <- W_down (silu(W_gate x) * W_up x)              C -> projection -> D, no biases
    z <- perceiver layer(z, x)                         L times (tcjax/nn/perceiver.py);  y = RMSNorm(z)

The latents are as wide as the LLM, so nothing is projected at the end. Keys are the image first, the latents last: the
outputs see each other. Nothing knows the grid: any N will do; the frames of a video are read together.

Source: Laurencon et al. 2024, "What matters when building vision-language models?"; Idefics2Connector of transformers,
under whose names the weights are published. Linear layers are drawn from N(0, 0.02).
Departures: latents are drawn from N(0, 0.02). The published start is all ones (`latents="ones"`): equal latents give Q
equal outputs, which only the LLM's positions can tell apart. Latents that are not active are masked out of the keys (an
elastic training's); an image without any valid token has no valid output.
Trap: the trained model's norms have eps 1e-5, its LLM's; later versions of transformers default to 1e-6. When loading a
checkpoint take the value from its config.
Cost: N P (2 C + D) multiplications per image, P = projection, and per layer (2 Q I + 2 (N + Q) J A) D + 2 Q (N + Q) I +
3 ff_mult Q D^2, I = heads * head_width. At D = 4096 the perceiver has 651 M parameters, the projection 92 M for C = 1152.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.compressors.base import Compressed, Compressor, Context, Widths, any_valid, check_width, handed_over, visible
from tcjax.compressors.queries import PrefixConfig
from tcjax.interop.lines import gated_mlp, norm, perceiver_layer
from tcjax.interop.names import Name
from tcjax.nn.dense import small_normal
from tcjax.nn.layers import stack
from tcjax.nn.norm import RMSNorm
from tcjax.nn.perceiver import GatedMlp, PerceiverLayer, PerceiverSizes, key_mask, read

Latents = Literal["normal", "ones"]


@dataclass(frozen=True, kw_only=True)
class Config(PrefixConfig):
    """Idefics2-8B's sizes. depth: layers L. heads, kv_heads, head_width: K, J, A. ff_mult: F = ff_mult * D.

    projection: inner width of the modality projection, in Idefics2 the feed-forward width of its LLM (Mistral-7B).
    eps: of every norm. latents: how they start, "normal" N(0, 0.02) or "ones" as published.
    """

    num_queries: int = 64
    depth: int = 3
    heads: int = 16
    kv_heads: int = 4
    head_width: int = 96
    ff_mult: int = 4
    projection: int = 14336
    eps: float = 1e-5
    latents: Latents = "normal"

    def build(self, widths: Widths, rngs: nnx.Rngs) -> Idefics2Resampler:
        return Idefics2Resampler(self, widths, rngs=rngs)

    def sizes(self, widths: Widths) -> PerceiverSizes:
        """Of one layer; ValueError if they do not fit each other."""
        return PerceiverSizes(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            feed_forward=self.ff_mult * widths.llm_D,
            eps=self.eps,
        )

    def semantics(self, widths: Widths) -> dict:
        return {
            "any_num_tokens": True,
            "max_queries": self.weighted(),
            "depth": self.depth,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_width": self.head_width,
            "feed_forward": self.ff_mult * widths.llm_D,
            "projection": self.projection,
            "activation": "silu",
            "norm_eps": self.eps,
            "attended_order": "image, latents",
        }

    def names(self, widths: Widths) -> list[Name]:
        """Idefics2's connector (`model.connector.` in a whole checkpoint)."""
        return [
            *gated_mlp("projection", "modality_projection"),
            Name("latents", "perceiver_resampler.latents"),
            *perceiver_layer("layers", "perceiver_resampler.layers.{L}"),
            *norm("norm", "perceiver_resampler.norm", bias=False),
        ]


class Idefics2Resampler(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        for name in ("depth", "ff_mult", "projection"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: must be at least 1.")
        if config.latents not in get_args(Latents):
            raise ValueError(f"latents={config.latents!r} is no start of the latents; possible: {get_args(Latents)}.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        sizes, C, D = config.sizes(widths), widths.vision_C, widths.llm_D
        most = config.weighted()
        start = small_normal if config.latents == "normal" else initializers.ones
        self.projection = GatedMlp("CFD", (C, config.projection, D), init=small_normal, rngs=rngs)
        self.latents = nnx.Param(start(rngs.params(), (most, D), jnp.float32), axes="QD")
        self.layers = stack(
            lambda rngs: PerceiverLayer("D", D, sizes, init=small_normal, rngs=rngs), config.depth, rngs
        )
        self.norm = RMSNorm("D", D, eps=config.eps)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_width(tokens_BNC, self.widths)
        B, Q = len(tokens_BNC), self.num_outputs
        image_BND = self.projection(visible(tokens_BNC, context))
        valid_BQ = any_valid(tokens_BNC, context, Q)
        mask_BSM = key_mask(image_BND, context.valid_BN, Q, context.active_B)
        latents_QD = self.latents[...][:Q].astype(image_BND.dtype)
        latents_BQD = jnp.broadcast_to(latents_QD, (B, *latents_QD.shape))
        latents_BQD, assign_BQN = read(self.layers, latents_BQD, image_BND, mask_BSM, assign=context.assign)
        return handed_over(self.norm(latents_BQD), valid_BQ, assign_BQN, context)
