"""The blocks of a vision transformer, and what may be asked of one of them beside its tokens: its probes.

    x += scale * attention(norm(x));  x += scale * mlp(norm(x))        the scales are DINOv2's, 1 elsewhere

    class_attention   what the class token pays to each token, mean over the heads     (CLS -> tokens, FasterVLM, VisionZip)
    column_means      what each token receives, mean over the heads and over all who look (VisionZip where there is no CLS)
    keys              the key vectors, heads side by side                                (ToMe's metric)

Attention is paid by softmax over all tokens, so over patches alone it sums to less than 1. The block's output still goes
through `attend`; only the rows that a probe names are computed a second time as explicit weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import attend, attention_weights
from tcjax.nn.dense import dense
from tcjax.nn.norm import LayerNorm

if TYPE_CHECKING:
    from tcjax.towers.vit import VitConfig

Probe = Literal["class_attention", "column_means", "keys"]
SCORES: tuple[Probe, ...] = ("class_attention", "column_means")  # one number per token


class Block(nnx.Module):
    """Pre-norm attention and MLP. The two projections that add to the residual start sqrt(2 layers) smaller."""

    def __init__(self, cfg: VitConfig, *, rngs: nnx.Rngs):
        C, F = cfg.width, cfg.feed_forward
        into_residual = initializers.variance_scaling(0.5 / cfg.layers, "fan_in", "normal")
        self.activation = cfg.activation
        self.attention_norm = LayerNorm("C", C, eps=cfg.norm_eps)
        self.attention = Attention(C, cfg.heads, into_residual, rngs=rngs)
        self.mlp_norm = LayerNorm("C", C, eps=cfg.norm_eps)
        self.up = dense("CF", C, F, rngs=rngs)
        self.down = dense("FC", F, C, init=into_residual, rngs=rngs)
        if cfg.layer_scale:
            self.attention_scale = nnx.Param(jnp.ones((C,)), axes="C")
            self.mlp_scale = nnx.Param(jnp.ones((C,)), axes="C")

    def __call__(
        self, tokens_BSC: jax.Array, mask_BSM: jax.Array | None = None, probes: tuple[Probe, ...] = ()
    ) -> tuple[jax.Array, dict[Probe, jax.Array]]:
        """The block's output and {probe: [B, S, its width]}.

        mask_BSM: True where s may see m; None sees all.
        """
        read_BSC, found = self.attention(self.attention_norm(tokens_BSC), mask_BSM, probes)
        if hasattr(self, "attention_scale"):
            read_BSC = read_BSC * self.attention_scale[...]
        tokens_BSC = tokens_BSC + read_BSC
        hidden_BSF = ACTIVATIONS[self.activation](self.up(self.mlp_norm(tokens_BSC)))
        changed_BSC = self.down(hidden_BSF)
        if hasattr(self, "mlp_scale"):
            changed_BSC = changed_BSC * self.mlp_scale[...]
        return tokens_BSC + changed_BSC, found


class Attention(nnx.Module):
    """Multi-head self-attention with biases; every token sees every token that the mask leaves."""

    def __init__(self, C: int, heads: int, out_init: initializers.Initializer, *, rngs: nnx.Rngs):
        self.heads = heads
        self.query = dense("CE", C, C, rngs=rngs)
        self.key = dense("CE", C, C, rngs=rngs)
        self.value = dense("CE", C, C, rngs=rngs)
        self.out = dense("EC", C, C, init=out_init, rngs=rngs)

    def __call__(
        self, tokens_BSC: jax.Array, mask_BSM: jax.Array | None, probes: tuple[Probe, ...]
    ) -> tuple[jax.Array, dict[Probe, jax.Array]]:
        B, S, C = tokens_BSC.shape
        query_BSKA, key_BSKA, value_BSKA = (
            project(tokens_BSC).reshape(B, S, self.heads, C // self.heads)
            for project in (self.query, self.key, self.value)
        )
        read_BSC = attend(query_BSKA, key_BSKA, value_BSKA, mask_BSM=mask_BSM).reshape(B, S, C)
        found: dict[Probe, jax.Array] = {}
        if "class_attention" in probes:
            weights_BKSM = attention_weights(query_BSKA[:, :1], key_BSKA, mask_BSM=mask_BSM)
            found["class_attention"] = weights_BKSM.mean(1)[:, 0, :, None]
        if "column_means" in probes:
            weights_BSM = attention_weights(query_BSKA, key_BSKA, mask_BSM=mask_BSM).mean(1)
            found["column_means"] = _over_who_looks(weights_BSM, mask_BSM)[..., None]
        if "keys" in probes:
            found["keys"] = key_BSKA.reshape(B, S, C)
        return self.out(read_BSC), {probe: x.astype(tokens_BSC.dtype) for probe, x in found.items()}


def _over_who_looks(weights_BSM: jax.Array, mask_BSM: jax.Array | None) -> jax.Array:
    """BM: the mean over the queries; those that are padding themselves do not count."""
    if mask_BSM is None:
        return weights_BSM.mean(1)
    looks_BS = jnp.broadcast_to(mask_BSM[:, 0], weights_BSM.shape[:2])  # padding hides the same tokens from everyone
    summed_BM = jnp.where(looks_BS[..., None], weights_BSM, 0).sum(1)
    return summed_BM / looks_BS.sum(1, keepdims=True)


def patches(images_BYX3: jax.Array, patch: int) -> jax.Array:
    """Patches as rows [B, N, P]: N row-major over the grid, P = (row, column, channel) inside the patch."""
    B, H, W = len(images_BYX3), images_BYX3.shape[1] // patch, images_BYX3.shape[2] // patch
    whole_BYX3 = images_BYX3[:, : H * patch, : W * patch]
    tiles = whole_BYX3.reshape(B, H, patch, W, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(B, H * W, patch * patch * 3)
