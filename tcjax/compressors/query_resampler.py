"""Text-primed perceiver: learned latents read the question first, and then, knowing what is asked, the image.

    t = W_t text + b_t,   x = W_2 gelu(W_1 (x + position[n]))          both to the working width E
    z <- perceiver layer(z, t)                                         the first text_layers layers
    z <- perceiver layer(z, x)                                         the other layers (tcjax/nn/perceiver.py)
    y = W_4 gelu(W_3 RMSNorm(z))                                       E -> D -> D

The cheapest compressor that is conditioned on the question: no new kind of weight. Keys are text or image first, the
latents last: the outputs see each other. Without `positions` nothing knows the grid and any N will do.
The null text (a row whose text_valid_BT is all False) is well defined: no text is among the keys, so the text layers
read nothing but the latents themselves, and what follows is the image compressed without a question. Padding of the
text is masked out of the keys in the same way.

Source: Yan et al. 2024, "TG-LLaVA: Text Guided LLaVA via Learnable Latent Embeddings", mm_patch_encoder of
AIDC-AI/TG-LLaVA, whose layers are Idefics2's with norms of eps 1e-5. There its 64 tokens join the 576 image tokens, the
image is four tiles of 24 x 24 tokens (2304 positions), and the text comes from CLIP's text tower, padding included.
It starts as there: latents N(0, 0.02), positions N(0, 1), linear layers as torch draws them.
Departures: the tokens stand alone, the text is the LLM's embeddings of the question, and paddings are masked. Biases
start at 0. Latents that are not active are masked out of the keys (an elastic training's); an image without any valid
token has no valid output.
Cost: N (C^2 + C E) + T D_text E + Q (E D + D^2) multiplications, and per layer, which reads M = N or T positions,
(2 Q I + 2 (M + Q) J A) E + 2 Q (M + Q) I + 3 ff_mult Q E^2, I = heads * head_width. At E = 1024 the perceiver has 33 M
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import (
    Compressed,
    Compressor,
    Context,
    Widths,
    any_valid,
    check_grid,
    check_width,
    handed_over,
    read_text,
    visible,
)
from tcjax.compressors.queries import PrefixConfig
from tcjax.interop.lines import linear, norm, perceiver_layer
from tcjax.interop.names import Name
from tcjax.nn.dense import dense, small_normal, torch_uniform
from tcjax.nn.layers import stack
from tcjax.nn.mlp import Mlp
from tcjax.nn.norm import RMSNorm
from tcjax.nn.perceiver import PerceiverLayer, PerceiverSizes, key_mask, read


@dataclass(frozen=True, kw_only=True)
class Config(PrefixConfig):
    """TG-LLaVA's sizes. width: E, there the tower's. depth: layers, of which the first text_layers read the question.

    heads, kv_heads, head_width: K, J, A. ff_mult: F = ff_mult * E. eps: of every norm.
    positions: a learned vector for every place of the grid is added to the tokens.
    """

    num_queries: int = 64
    width: int = 1024
    depth: int = 2
    text_layers: int = 1
    heads: int = 16
    kv_heads: int = 4
    head_width: int = 96
    ff_mult: int = 4
    eps: float = 1e-5
    positions: bool = True
    needs = ("text",)

    def build(self, widths: Widths, rngs: nnx.Rngs) -> QueryResampler:
        return QueryResampler(self, widths, rngs=rngs)

    def sizes(self) -> PerceiverSizes:
        """Of one layer; ValueError if they do not fit each other."""
        return PerceiverSizes(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            feed_forward=self.ff_mult * self.width,
            eps=self.eps,
        )

    def semantics(self, widths: Widths) -> dict:
        return {
            "any_num_tokens": not self.positions,
            "max_queries": self.weighted(),
            "positions": self.positions,
            "width": self.width,
            "depth": self.depth,
            "text_layers": self.text_layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_width": self.head_width,
            "feed_forward": self.ff_mult * self.width,
            "activation": "silu",
            "mlp_activation": "gelu",
            "norm_eps": self.eps,
            "reading_order": "text, image",
            "attended_order": "context, latents",
        }

    def names(self, widths: Widths) -> list[Name]:
        """TG-LLaVA's mm_patch_encoder."""
        image_layer = f"perceiver.layers.{{L+{self.text_layers}}}"  # published layers are counted through
        table = [
            *linear("to_text", "resize_linear"),
            *linear("to_image/linears/0", "pre_mlp.0"),
            *linear("to_image/linears/1", "pre_mlp.2"),
            Name("latents", "perceiver.latents"),
            *perceiver_layer("text_layers", "perceiver.layers.{L}"),
            *perceiver_layer("image_layers", image_layer),
            *norm("norm", "perceiver.norm", bias=False),
            *linear("out/linears/0", "proj.0"),
            *linear("out/linears/1", "proj.2"),
        ]
        return table + [Name("positions", "position_embedding.weight")] * self.positions


class QueryResampler(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        for name in ("width", "ff_mult"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: must be at least 1.")
        if not 1 <= config.text_layers < config.depth:
            raise ValueError(
                f"text_layers={config.text_layers} of depth={config.depth}: at least 1 layer reads the question and at "
                f"least 1 the image, so 1 <= text_layers < depth (a compressor without text is idefics2_resampler)."
            )
        if widths.text_D < 1:
            raise ValueError(
                f"Widths.text_D={widths.text_D}: this compressor reads the question; text_D is the width of its "
                f"embeddings, the LLM's."
            )
        self.widths, self.num_outputs = widths, config.outputs(widths)
        sizes, C, E, D = config.sizes(), widths.vision_C, config.width, widths.llm_D
        most, N = config.weighted(), widths.num_tokens

        def layers(num: int) -> nnx.Module:
            return stack(lambda rngs: PerceiverLayer("E", E, sizes, init=torch_uniform, rngs=rngs), num, rngs)

        self.positions = nnx.Param(rngs.params.normal((N, C)), axes="NC") if config.positions else None
        self.to_text = dense("DE", widths.text_D, E, init=torch_uniform, rngs=rngs)
        self.to_image = Mlp("CFE", (C, C, E), rngs=rngs)
        self.latents = nnx.Param(small_normal(rngs.params(), (most, E), jnp.float32), axes="QE")
        self.text_layers = layers(config.text_layers)
        self.image_layers = layers(config.depth - config.text_layers)
        self.norm = RMSNorm("E", E, eps=config.eps)
        self.out = Mlp("EFD", (E, D, D), rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        (check_width if self.positions is None else check_grid)(tokens_BNC, self.widths)
        B, Q = len(tokens_BNC), self.num_outputs
        tokens_BNC = visible(tokens_BNC, context)
        text_BTD, text_valid_BT = read_text(context, self.widths)
        if self.positions is not None:
            tokens_BNC = tokens_BNC + self.positions[...]
        text_BTE, image_BNE = self.to_text(text_BTD), self.to_image(tokens_BNC)
        dtype = jnp.result_type(text_BTE, image_BNE)
        text_BTE, image_BNE = text_BTE.astype(dtype), image_BNE.astype(dtype)
        latents_QE = self.latents[...][:Q].astype(dtype)
        latents_BQE = jnp.broadcast_to(latents_QE, (B, *latents_QE.shape))
        text_mask_BSM = key_mask(text_BTE, text_valid_BT, Q, context.active_B)
        image_mask_BSM = key_mask(image_BNE, context.valid_BN, Q, context.active_B)
        latents_BQE, _ = read(self.text_layers, latents_BQE, text_BTE, text_mask_BSM)
        latents_BQE, assign_BQN = read(self.image_layers, latents_BQE, image_BNE, image_mask_BSM, assign=context.assign)
        tokens_BQD = self.out(self.norm(latents_BQE))
        return handed_over(tokens_BQD, any_valid(tokens_BNC, context, Q), assign_BQN, context)
