"""Vision transformer: images_BYX3 -> tokens_BNC, the N = H * W patches of the image in row-major order.

    x = patches W + b (+ class token) + position (+ registers);   blocks (tcjax/towers/blocks.py);   norm

One file is CLIP, SigLIP, SigLIP2 (NaFlex too), DINOv2, BLIP-2's EVA tower and any small one by config. Sources: Radford et
al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), Tschannen et al. 2025 (SigLIP 2), Oquab et al. 2024 (DINOv2), Darcet et al. 2024
(registers), checked against their `transformers` classes in tests/test_vit*.py. Departures: a patch is a row of a matrix
instead of a convolution (the same sums), class token and registers are dropped at the end (`keep_class` puts the class token
before the patches), and a block or norm that `feature_layer` does not need is not built.
Cost per image and layer: 8 N C^2 + 4 N C F + 4 N^2 C FLOPs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.config import Pixels
from tcjax.nn import layers
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import padding_mask
from tcjax.nn.dense import dense, small_normal
from tcjax.nn.norm import LayerNorm
from tcjax.nn.pixels import normalised
from tcjax.nn.positions import RESIZES
from tcjax.towers import naflex
from tcjax.towers.blocks import SCORES, Block, Probe, patches


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A tower's published numbers and the layer its features are read from.

    pixels: size and normalisation of the images. With geometry "naflex" up to N = max_patches patches of an image of any
        shape, already cut out (tcjax/towers/naflex.py).
    patch: side of a square patch in pixels; pixels that do not fill a patch on the right and at the bottom are left out
        (SigLIP's 384 = 27 * 14 + 6).
    pre_norm: a norm before the first block (CLIP). post_norm: a norm after the last one (SigLIP, DINOv2).
    registers: learned tokens without a place between the class token and the patches. layer_scale: learned factors on
        what a block adds (both DINOv2).
    names: whose names the published tensors bear (tcjax/towers/layouts.py).
    table_HW: the grid of the published position table where the pixels fill another one; it is resized as `resize` says.
    feature_layer: -1 reads after the last block and the post norm; -2 before the last block (LLaVA), and so on.
    keep_class: the class token is handed over too, before the patches.
    levels: earlier layers handed over too, as hidden states are counted: 0 before the first block, 12 after the 12th.
    probes: what else the last block behind the features tells of each token (tcjax/towers/blocks.py).
    shrunk_HW: token grid to which the image is resized first (bilinear, antialiased) with the position table.
    weights: path of published safetensors, or of a downloaded checkpoint's folder ("": from the seed).
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
    registers: int = 0
    layer_scale: bool = False
    names: Literal["clip", "dinov2"] = "clip"
    table_HW: tuple[int, int] | None = None
    resize: Literal["bicubic", "bicubic antialiased", "bilinear antialiased"] = "bicubic"
    feature_layer: int = -1
    keep_class: bool = False
    levels: tuple[int, ...] = ()
    probes: tuple[Probe, ...] = ()
    shrunk_HW: tuple[int, int] | None = None
    weights: str = ""

    def __post_init__(self):
        if min(self.patch, self.width, self.layers, self.heads, self.feed_forward) < 1 or self.registers < 0:
            raise ValueError(
                f"patch, width, layers, heads and feed_forward must be at least 1, registers at least 0, but this is {self}."
            )
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}.")
        if self.ragged:
            self._check_ragged()
        elif min(self.pixels.size_YX) < self.patch:
            raise ValueError(f"pixels.size_YX={self.pixels.size_YX} must hold at least one patch={self.patch}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is unknown; possible: {sorted(ACTIVATIONS)}.")
        if self.resize not in RESIZES:
            raise ValueError(f"resize={self.resize!r} is unknown; possible: {sorted(RESIZES)}.")
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
        self._check_probes()

    def _check_probes(self) -> None:
        known = (*SCORES, "keys")
        if set(self.probes) - set(known) or len(set(self.probes)) != len(self.probes):
            raise ValueError(f"probes={self.probes} must name some of {known}, each once.")
        if "class_attention" in self.probes and not self.class_token:
            raise ValueError(
                'probes names "class_attention", but this tower has no class token (class_token=False); "column_means", the '
                "mean attention that each patch receives, stands in for it."
            )

    def _check_ragged(self) -> None:
        if self.class_token or self.registers or self.names != "clip" or self.shrunk_HW is not None:
            raise ValueError(
                "a tower that reads images of any shape (pixels.geometry='naflex') is SigLIP2's: class_token=False, "
                f"registers=0, names='clip', shrunk_HW=None; got {self.class_token}, {self.registers}, {self.names!r}, "
                f"{self.shrunk_HW}."
            )
        if self.table_HW is None:
            raise ValueError("table_HW must be given where pixels.geometry='naflex'; SigLIP2's so400m has (16, 16).")
        if self.pixels.patch != self.patch:
            raise ValueError(
                f"pixels.patch={self.pixels.patch} cuts other patches than the tower's patch={self.patch} reads."
            )

    @property
    def ragged(self) -> bool:
        """Whether every image has a grid of its own."""
        return self.pixels.geometry == "naflex"

    @property
    def full_HW(self) -> tuple[int, int]:
        """The grid that the pixels fill: pixels / patch."""
        rows_Y, columns_X = self.pixels.size_YX
        return (1, self.pixels.max_patches) if self.ragged else (rows_Y // self.patch, columns_X // self.patch)

    @property
    def grid_HW(self) -> tuple[int, int]:
        """The grid of the tokens handed over; (1, N) where every image has its own of up to N patches."""
        return self.full_HW if self.shrunk_HW is None else self.shrunk_HW

    @property
    def position_HW(self) -> tuple[int, int]:
        """The grid of the position table."""
        return self.full_HW if self.table_HW is None else self.table_HW

    @property
    def num_tokens(self) -> int:
        """N, all that is handed over. CLIP-L/336: 24 * 24 = 576; with `keep_class` 577."""
        return self.grid_HW[0] * self.grid_HW[1] + self.keep_class

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches while the blocks run."""
        return self.class_token + self.registers

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

    def giving(self, **fields: Any) -> VitConfig:
        """The tower with what a compressor wants of it (`CompressorConfig.of_tower`)."""
        return dataclasses.replace(self, **fields)

    def build(self, rngs: nnx.Rngs) -> Vit:
        return Vit(self, rngs=rngs)


class Vit(nnx.Module):
    """cfg: the numbers it was built from."""

    def __init__(self, cfg: VitConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch = dense("PC", 3 * cfg.patch**2, cfg.width, bias=cfg.patch_bias, rngs=rngs)
        if cfg.class_token:
            self.class_token = nnx.Param(small_normal(rngs.params(), (cfg.width,)), axes="C")
        if cfg.registers:
            self.registers = nnx.Param(small_normal(rngs.params(), (cfg.registers, cfg.width)), axes="NC")
        num_positions = cfg.position_HW[0] * cfg.position_HW[1] + cfg.class_token
        self.position = nnx.Param(small_normal(rngs.params(), (num_positions, cfg.width)), axes="NC")
        if cfg.pre_norm:
            self.pre_norm = LayerNorm("C", cfg.width, eps=cfg.norm_eps)
        self.blocks = layers.stack(lambda rngs: Block(cfg, rngs=rngs), cfg.num_blocks, rngs)
        if cfg.norms_last:
            self.post_norm = LayerNorm("C", cfg.width, eps=cfg.norm_eps)

    def __call__(self, images_BYX3: jax.Array, grids_B2: jax.Array | None = None) -> jax.Array:
        """Tokens of images, uint8 or normalised, [B, N, C]: the class token if it is kept, then the grid in row-major order.

        With `levels` and `probes`, [B, N, (1 + levels) * C + probes]: the tokens first, then the earlier layers side by
        side, then each probe as wide as it is (a score 1, keys C), both in the order in which they are named.

        Args:
            grids_B2: rows and columns of each image's own grid, for a tower that reads images of any shape. What lies
                behind the first rows * columns patches influences nothing and comes out as exactly 0.
        """
        cfg = self.cfg
        if images_BYX3.shape[1:] != cfg.pixels.shape:
            raise ValueError(
                f"images_BYX3 is {list(images_BYX3.shape)}, but this tower reads [B, {cfg.pixels.shape[0]}, "
                f"{cfg.pixels.shape[1]}, 3]; resize the images or build the tower with their pixels.size_YX."
            )
        images_BYX3 = normalised(images_BYX3, cfg.pixels, self.patch.kernel.dtype)
        if cfg.ragged:
            return self._of_any_shape(images_BYX3, naflex.check_grids(grids_B2, len(images_BYX3)))
        tokens_BSC = self._embed(patches(self._shrunk(images_BYX3), cfg.patch))
        if cfg.pre_norm:
            tokens_BSC = self.pre_norm(tokens_BSC)
        seen_BSE = self._through_blocks(tokens_BSC, None)
        patches_BNE = seen_BSE[:, cfg.num_prefix :]
        return jnp.concatenate([seen_BSE[:, :1], patches_BNE], axis=1) if cfg.keep_class else patches_BNE

    def _embed(self, patches_BNP: jax.Array) -> jax.Array:
        """[B, S, C]: class token, registers, patches; all but the registers with their positions."""
        cfg = self.cfg
        tokens_BSC = self.patch(patches_BNP)
        if cfg.class_token:
            tokens_BSC = _put_first(self.class_token[...][None], tokens_BSC)
        tokens_BSC = tokens_BSC + self._positions()
        if cfg.registers:
            first = int(cfg.class_token)
            behind_BSC = _put_first(self.registers[...], tokens_BSC[:, first:])
            tokens_BSC = jnp.concatenate([tokens_BSC[:, :first], behind_BSC], axis=1)
        return tokens_BSC

    def _of_any_shape(self, images_BNP3: jax.Array, grids_B2: jax.Array) -> jax.Array:
        """images_BNP3: the patches themselves, P their pixels row by row."""
        cfg, num = self.cfg, images_BNP3.shape[1]
        valid_BN = naflex.valid(grids_B2, num)
        patches_BNP = jnp.where(valid_BN[..., None], images_BNP3.reshape(len(images_BNP3), num, -1), 0)
        tokens_BNC = self.patch(patches_BNP)
        position_BNC = naflex.positions(self.position[...], cfg.position_HW, grids_B2, num)
        tokens_BNC = tokens_BNC + position_BNC.astype(tokens_BNC.dtype)
        if cfg.pre_norm:
            tokens_BNC = self.pre_norm(tokens_BNC)
        seen_BNE = self._through_blocks(tokens_BNC, padding_mask(valid_BN))
        return jnp.where(valid_BN[..., None], seen_BNE, 0)

    def _through_blocks(self, tokens_BSC: jax.Array, mask_BSM: jax.Array | None) -> jax.Array:
        """[B, S, (1 + levels) * C + probes]. What a probe asks of, the last block behind the features, runs by itself."""
        cfg, probed = self.cfg, self.cfg.feature_state - 1
        runs: list[tuple[int, int, tuple[Probe, ...]]] = [(0, cfg.num_blocks, ())]
        if cfg.probes:
            runs = [(0, probed, ()), (probed, 1, cfg.probes), (probed + 1, cfg.num_blocks - probed - 1, ())]
        states, found = [tokens_BSC], {}
        for start, num, probes in runs:
            if num:
                tokens_BSC, (states_LBSC, told) = self._run(tokens_BSC, mask_BSM, start, num, probes)
                states += [] if states_LBSC is None else [*states_LBSC]
                found |= told
        last_BSC = states[cfg.feature_state] if cfg.levels else tokens_BSC
        if cfg.norms_last:
            last_BSC = self.post_norm(last_BSC)
        beside = [states[level] for level in cfg.levels] + [found[probe][0] for probe in cfg.probes]
        return jnp.concatenate([last_BSC, *beside], axis=-1) if beside else last_BSC

    def _run(self, tokens_BSC: jax.Array, mask_BSM: jax.Array | None, start: int, num: int, probes: tuple[Probe, ...]):
        def step(block: Block, x_BSC: jax.Array, _: None):
            x_BSC, told = block(x_BSC, mask_BSM, probes)
            return x_BSC, (x_BSC if self.cfg.levels else None, told)

        return layers.run(self.blocks, step, tokens_BSC, start=start, num=num)

    def _shrunk(self, images_BYX3: jax.Array) -> jax.Array:
        if self.cfg.shrunk_HW is None:
            return images_BYX3
        height, width = (side * self.cfg.patch for side in self.cfg.shrunk_HW)
        return jax.image.resize(images_BYX3, (len(images_BYX3), height, width, 3), "bilinear", antialias=True)

    def _positions(self) -> jax.Array:
        cfg, table_NC = self.cfg, self.position[...]
        if cfg.grid_HW == cfg.position_HW:
            return table_NC
        first, precise = int(cfg.class_token), jax.lax.Precision.HIGHEST
        rows, columns = (RESIZES[cfg.resize](*sides) for sides in zip(cfg.position_HW, cfg.grid_HW, strict=True))
        square_HWC = table_NC[first:].astype(jnp.float32).reshape(*cfg.position_HW, cfg.width)
        tall_HWC = jnp.tensordot(rows, square_HWC, axes=(1, 0), precision=precise)
        resized_WHC = jnp.tensordot(columns, tall_HWC, axes=(1, 1), precision=precise)
        resized_NC = resized_WHC.swapaxes(0, 1).reshape(-1, cfg.width).astype(table_NC.dtype)
        return jnp.concatenate([table_NC[:first], resized_NC])


def _put_first(tokens_MC: jax.Array, behind_BSC: jax.Array) -> jax.Array:
    """The same M tokens before the others of every image."""
    first_BMC = jnp.broadcast_to(tokens_MC, (len(behind_BSC), *tokens_MC.shape))
    return jnp.concatenate([first_BMC.astype(behind_BSC.dtype), behind_BSC], axis=1)
