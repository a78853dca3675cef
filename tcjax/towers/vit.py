"""Vision transformer: images_BYX3 -> tokens_BNC, the N = H * W patches of the image in row-major order.

    x = patches W + b (+ class token) + position;   per block:  x += attention(norm(x));  x += mlp(norm(x))

One file is CLIP, SigLIP, BLIP-2's EVA tower and any small one by config. Sources: Radford et al. 2021 (CLIP), Zhai et
al. 2023 (SigLIP), checked against `transformers` (CLIPVisionModel, SiglipVisionModel, Blip2VisionModel) in
tests/test_vit.py and test_vit_asked.py. Departures: a patch is a row of a matrix instead of a convolution (the same sums),
the class token is dropped at the end unless `keep_class` puts it before the patches, and a block or norm that
`feature_layer` does not need is not built. Cost per image and layer: 8 N C^2 + 4 N C F + 4 N^2 C FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from tcjax.config import Pixels
from tcjax.interop.names import Name
from tcjax.nn import layers
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import attend
from tcjax.nn.dense import dense, small_normal
from tcjax.nn.norm import LayerNorm
from tcjax.nn.positions import resize_matrix


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A tower's published numbers and the layer its features are read from.

    pixels: size and normalisation of the images. patch: side of a square patch in pixels; pixels that do not fill a
    patch on the right and at the bottom are left out (SigLIP's 384 = 27 * 14 + 6).
    pre_norm: a norm before the first block (CLIP). post_norm: a norm after the last one (SigLIP).
    feature_layer: -1 reads after the last block and the post norm; -2 before the last block (LLaVA), and so on.
    keep_class: the class token is handed over too, before the patches.
    levels: earlier layers handed over too, as hidden states are counted: 0 before the first block, 12 after the 12th.
    shrunk_HW: token grid to which the image is resized first (bilinear, antialiased) with the position table (bicubic).
    weights: path of published safetensors ("": from the seed); loaded by whoever builds the run.
    """

    pixels: Pixels
    patch: int
    width: int
    layers: int
    heads: int
    feed_forward: int
    activation: str
    norm_eps: float
    class_token: bool
    patch_bias: bool
    pre_norm: bool
    post_norm: bool
    feature_layer: int = -1
    keep_class: bool = False
    levels: tuple[int, ...] = ()
    shrunk_HW: tuple[int, int] | None = None
    weights: str = ""

    def __post_init__(self):
        if min(self.patch, self.width, self.layers, self.heads, self.feed_forward) < 1:
            raise ValueError(f"patch, width, layers, heads and feed_forward must be at least 1, but this is {self}.")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}.")
        if min(self.pixels.size_YX) < self.patch:
            raise ValueError(f"pixels.size_YX={self.pixels.size_YX} must hold at least one patch={self.patch}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is unknown; possible: {sorted(ACTIVATIONS)}.")
        if not -self.layers <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer={self.feature_layer} must count from the end: {-self.layers} ... -1.")
        if self.keep_class and not self.class_token:
            raise ValueError(
                "keep_class=True, but this tower has no class token (class_token=False); choose a tower that has one, or a "
                "compressor that does without (qformer.Config(class_token=False))."
            )
        if any(not 0 <= level <= self.layers for level in self.levels):
            raise ValueError(f"levels={self.levels} must be hidden states of this tower: 0 ... {self.layers}.")
        if self.shrunk_HW is not None and not all(
            1 <= side <= full for side, full in zip(self.shrunk_HW, self.full_HW, strict=True)
        ):
            raise ValueError(f"shrunk_HW={self.shrunk_HW} must be from (1, 1) to the tower's own grid {self.full_HW}.")

    @property
    def full_HW(self) -> tuple[int, int]:
        """The grid of the position table: pixels / patch."""
        rows_Y, columns_X = self.pixels.size_YX
        return rows_Y // self.patch, columns_X // self.patch

    @property
    def grid_HW(self) -> tuple[int, int]:
        """The grid of the tokens handed over."""
        return self.full_HW if self.shrunk_HW is None else self.shrunk_HW

    @property
    def num_tokens(self) -> int:
        """N, all that is handed over. CLIP-L/336: 24 * 24 = 576; with `keep_class` 577."""
        return self.grid_HW[0] * self.grid_HW[1] + self.keep_class

    @property
    def num_blocks(self) -> int:
        """Blocks that are built and run."""
        return max(self.feature_state, *self.levels, 0)

    @property
    def feature_state(self) -> int:
        """The hidden state that is handed over, counted from the embeddings."""
        return self.layers + 1 + self.feature_layer

    @property
    def norms_last(self) -> bool:
        """Whether the post norm is built and run: only after the very last block."""
        return self.post_norm and self.feature_layer == -1

    def build(self, rngs: nnx.Rngs) -> Vit:
        return Vit(self, rngs=rngs)


class Vit(nnx.Module):
    """cfg: the numbers it was built from."""

    def __init__(self, cfg: VitConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch = dense("PC", 3 * cfg.patch**2, cfg.width, bias=cfg.patch_bias, rngs=rngs)
        if cfg.class_token:
            self.class_token = nnx.Param(small_normal(rngs.params(), (cfg.width,)), axes="C")
        num_positions = cfg.full_HW[0] * cfg.full_HW[1] + cfg.class_token
        self.position = nnx.Param(small_normal(rngs.params(), (num_positions, cfg.width)), axes="NC")
        if cfg.pre_norm:
            self.pre_norm = LayerNorm("C", cfg.width, eps=cfg.norm_eps)
        self.blocks = layers.stack(lambda rngs: Block(cfg, rngs=rngs), cfg.num_blocks, rngs)
        if cfg.norms_last:
            self.post_norm = LayerNorm("C", cfg.width, eps=cfg.norm_eps)

    def __call__(self, images_BYX3: jax.Array) -> jax.Array:
        """Tokens of normalised images, [B, N, C]: the class token if it is kept, then the grid in row-major order.

        With `levels`, [B, N, (1 + levels) * C]: the tokens first, then the earlier layers side by side.
        """
        cfg = self.cfg
        if images_BYX3.ndim != 4 or images_BYX3.shape[1:] != (*cfg.pixels.size_YX, 3):
            raise ValueError(
                f"images_BYX3 is {list(images_BYX3.shape)}, but this tower reads [B, {cfg.pixels.size_YX[0]}, "
                f"{cfg.pixels.size_YX[1]}, 3]; resize the images or build the tower with their pixels.size_YX."
            )
        tokens_BSC = self.patch(patches(self._shrunk(images_BYX3), cfg.patch))
        if cfg.class_token:
            class_B1C = jnp.broadcast_to(self.class_token[...], (len(tokens_BSC), 1, cfg.width))
            tokens_BSC = jnp.concatenate([class_B1C.astype(tokens_BSC.dtype), tokens_BSC], axis=1)
        tokens_BSC = tokens_BSC + self._positions()
        if cfg.pre_norm:
            tokens_BSC = self.pre_norm(tokens_BSC)
        tokens_BSC = self._with_levels(tokens_BSC) if cfg.levels else self._last(tokens_BSC)
        return tokens_BSC if cfg.keep_class else tokens_BSC[:, int(cfg.class_token) :]

    def _last(self, tokens_BSC: jax.Array) -> jax.Array:
        tokens_BSC, _ = layers.run(self.blocks, lambda block, x_BSC, _: (block(x_BSC), None), tokens_BSC)
        return self.post_norm(tokens_BSC) if self.cfg.norms_last else tokens_BSC

    def _with_levels(self, tokens_BSC: jax.Array) -> jax.Array:
        def step(block: Block, x_BSC: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x_BSC = block(x_BSC)
            return x_BSC, x_BSC

        _, states_LBSC = layers.run(self.blocks, step, tokens_BSC)
        states = [tokens_BSC, *states_LBSC]
        last_BSC = states[self.cfg.feature_state]
        if self.cfg.norms_last:
            last_BSC = self.post_norm(last_BSC)
        return jnp.concatenate([last_BSC, *(states[level] for level in self.cfg.levels)], axis=-1)

    def _shrunk(self, images_BYX3: jax.Array) -> jax.Array:
        if self.cfg.shrunk_HW is None:
            return images_BYX3
        height, width = (side * self.cfg.patch for side in self.cfg.shrunk_HW)
        return jax.image.resize(images_BYX3, (len(images_BYX3), height, width, 3), "bilinear", antialias=True)

    def _positions(self) -> jax.Array:
        table_NC = self.position[...]
        if self.cfg.shrunk_HW is None:
            return table_NC
        first = int(self.cfg.class_token)
        resized_QC = jnp.asarray(resize_matrix(self.cfg.full_HW, self.cfg.shrunk_HW), table_NC.dtype) @ table_NC[first:]
        return jnp.concatenate([table_NC[:first], resized_QC])


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

    def __call__(self, tokens_BSC: jax.Array) -> jax.Array:
        tokens_BSC = tokens_BSC + self.attention(self.attention_norm(tokens_BSC))
        hidden_BSF = ACTIVATIONS[self.activation](self.up(self.mlp_norm(tokens_BSC)))
        return tokens_BSC + self.down(hidden_BSF)


class Attention(nnx.Module):
    """Multi-head self-attention with biases; every token sees every token."""

    def __init__(self, C: int, heads: int, out_init: initializers.Initializer, *, rngs: nnx.Rngs):
        self.heads = heads
        self.query = dense("CE", C, C, rngs=rngs)
        self.key = dense("CE", C, C, rngs=rngs)
        self.value = dense("CE", C, C, rngs=rngs)
        self.out = dense("EC", C, C, init=out_init, rngs=rngs)

    def __call__(self, tokens_BSC: jax.Array) -> jax.Array:
        B, S, C = tokens_BSC.shape
        query_BSKA, key_BSKA, value_BSKA = (
            project(tokens_BSC).reshape(B, S, self.heads, C // self.heads)
            for project in (self.query, self.key, self.value)
        )
        return self.out(attend(query_BSKA, key_BSKA, value_BSKA).reshape(B, S, C))


def patches(images_BYX3: jax.Array, patch: int) -> jax.Array:
    """Patches as rows [B, N, P]: N row-major over the grid, P = (row, column, channel) inside the patch."""
    B, H, W = len(images_BYX3), images_BYX3.shape[1] // patch, images_BYX3.shape[2] // patch
    whole_BYX3 = images_BYX3[:, : H * patch, : W * patch]
    tiles = whole_BYX3.reshape(B, H, patch, W, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(B, H * W, patch * patch * 3)


def names(cfg: VitConfig) -> list[Name]:
    """Leaf of `cfg.build` <-> tensor of the published CLIP and SigLIP checkpoints."""
    table = [
        Name("patch/kernel", "vision_model.embeddings.patch_embedding.weight", "patches"),
        Name("position", "vision_model.embeddings.position_embedding.weight", "same"),
    ]
    if cfg.patch_bias:
        table.append(Name("patch/bias", "vision_model.embeddings.patch_embedding.bias", "same"))
    if cfg.class_token:
        table.append(Name("class_token", "vision_model.embeddings.class_embedding", "same"))
    norms = {"blocks/attention_norm": _LAYER + "layer_norm1", "blocks/mlp_norm": _LAYER + "layer_norm2"}
    if cfg.pre_norm:
        norms["pre_norm"] = "vision_model.pre_layrnorm"  # the published spelling
    if cfg.norms_last:
        norms["post_norm"] = "vision_model.post_layernorm"
    for ours, theirs in norms.items():
        table += [Name(f"{ours}/scale", f"{theirs}.weight", "same"), Name(f"{ours}/bias", f"{theirs}.bias", "same")]
    for ours, theirs in _DENSE.items():
        table.append(Name(f"blocks/{ours}/kernel", f"{_LAYER}{theirs}.weight", "transpose"))
        table.append(Name(f"blocks/{ours}/bias", f"{_LAYER}{theirs}.bias", "same"))
    return table


def ignore(cfg: VitConfig) -> list[str]:
    """Regular expressions of published tensors this tower has no use for; each must match a whole name.

    The text half and its head, SigLIP's pooling head, old checkpoints' position ids, and what lies behind
    `feature_layer`: the blocks after it and the post norm (CLIP's norms only the pooled class token).
    """
    patterns = [
        r"text_model\..*",
        r"(text_projection|visual_projection)\.weight",
        r"logit_scale|logit_bias",
        r"vision_model\.head\..*",
        r"vision_model\.embeddings\.position_ids",
    ]
    patterns += [rf"vision_model\.encoder\.layers\.{layer}\..*" for layer in range(cfg.num_blocks, cfg.layers)]
    if not cfg.norms_last:
        patterns.append(r"vision_model\.post_layernorm\..*")
    return patterns


_LAYER = "vision_model.encoder.layers.{L}."
_DENSE = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
