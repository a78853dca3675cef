"""C-Abstractor: RegNet blocks on the token grid, adaptive average pooling to h x w, RegNet blocks, then an MLP.

    x <- blocks(x + pos);  x <- mean of each of h x w bins;  x <- blocks(x);  y = W_2 silu(W_1 x)
    block(x) = silu(short(x) + LN(W_3 (g * u)))        u = silu(LN(depthwise_3x3(silu(LN(W_1 x)))))
                                                       g = sigmoid(V_2 silu(V_1 mean_HW(u)))

LN runs over the channels of one place, eps 1e-5 (timm's norm-and-activation layer; its plain 2-D LayerNorm would have
1e-6). short is the identity, or a linear layer and LN where the width changes: in the first block only. The squeezed
width of g is a quarter of the width that the block reads. Bins are torch's AdaptiveAvgPool2d: they overlap where h does
not divide H, and no weight depends on h x w.

With padding every convolution reads 0 where a token is invalid, as it does beyond the border, and both kinds of mean are
over valid places: to the blocks a padded image is the image cut to its valid rectangle. A bin without any valid
token is an invalid output.

Source: Cha et al. 2024, "Honeybee: Locality-enhanced Projector for Multimodal LLM" (kakaobrain/honeybee), blocks of timm.
Departures: grids and poolings need not be square; masks; no extra learned output tokens (`num_eos_tokens`, 0 in every
published config). Everything starts N(0, 0.02), biases 0. It was published on the tower's last layer before its norm.
Cost: per block (2 E^2 + 9 E) N + E^2 / 2 multiplications before the pooling, Q in place of N after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, Context, Widths, check_grid, handed_over, masked, visible
from tcjax.compressors.queries import GridConfig
from tcjax.interop.lines import conv, conv1x1, linear, norm
from tcjax.interop.names import Name
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.conv import Conv
from tcjax.nn.dense import dense, small_normal
from tcjax.nn.layers import run, stack
from tcjax.nn.norm import LayerNorm
from tcjax.nn.pool import bin_means, bin_shares

_EPS, _PRENORM_EPS = 1e-5, 1e-6
_silu = ACTIVATIONS["silu"]


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """Honeybee's sizes. num_queries: h * w. shape: (h, w) of the pooled grid; None takes the square.

    depth: blocks before and blocks after the pooling; with 0 it is pooling and MLP alone. hidden: their width E.
    mlp_depth: linear layers of the readout. pos_emb: learned positions are added first. prenorm: LayerNorm before that.
    """

    num_queries: int = 144
    depth: int = 3
    hidden: int = 1024
    mlp_depth: int = 2
    pos_emb: bool = True
    prenorm: bool = False
    elastic = "pooling"

    def build(self, widths: Widths, rngs: nnx.Rngs) -> CAbstractor:
        return CAbstractor(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "pooled": list(self.out_grid(widths)),
            "order": "blocks, pool, blocks, mlp",
            "depth": self.depth,
            "hidden": self.hidden,
            "squeezed": [_squeezed(widths.vision_C), _squeezed(self.hidden)],
            "mlp_depth": self.mlp_depth,
            "pos_emb": self.pos_emb,
            "prenorm": self.prenorm,
            "prenorm_eps": _PRENORM_EPS,
            "norm_eps": _EPS,
            "activation": "silu",
        }

    def names(self, widths: Widths) -> list[Name]:
        """Honeybee's abstractor."""
        table = [line for k in range(self.mlp_depth) for line in linear(f"readout/{k}", f"readout.{2 * k}")]
        table += [Name("pos", "pos_emb", "unsqueeze")] * self.pos_emb
        table += norm("prenorm", "prenorm") * self.prenorm
        if self.depth:
            table += _stage("before", "net.0", self.depth, shortcut=widths.vision_C != self.hidden)
            table += _stage("after", "net.2", self.depth, shortcut=False)
        return table


class CAbstractor(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        C, D, E = widths.vision_C, widths.llm_D, config.hidden
        for name, value, least in (("depth", config.depth, 0), ("mlp_depth", config.mlp_depth, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}.")
        if config.depth and min(C, E) < 3:
            raise ValueError(f"vision_C={C}, hidden={E}: both must be at least 3, a quarter of them rounds to a width.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        self.pooled = config.out_grid(widths)
        self.prenorm = LayerNorm("C", C, eps=_PRENORM_EPS) if config.prenorm else None
        pos_NC = small_normal(rngs.params(), (widths.num_tokens, C), jnp.float32)
        self.pos = nnx.Param(pos_NC, axes="NC") if config.pos_emb else None
        self.before = _Stage(config.depth, C, E, rngs=rngs) if config.depth else None
        self.after = _Stage(config.depth, E, E, rngs=rngs) if config.depth else None
        sizes = [E if config.depth else C] + [D] * config.mlp_depth
        letters = "E" + "DF" * config.mlp_depth  # neighbours differ
        self.readout = nnx.List(
            [
                dense(letters[k : k + 2], sizes[k], sizes[k + 1], init=small_normal, rngs=rngs)
                for k in range(config.mlp_depth)
            ]
        )

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_grid(tokens_BNC, self.widths)
        grids = self.widths.grid_HW, self.pooled
        x_BNC = visible(tokens_BNC, context)
        if self.prenorm is not None:
            x_BNC = self.prenorm(x_BNC)
        if self.pos is not None:
            x_BNC = x_BNC + self.pos[...]
        if self.before is not None:
            x_BNC = self.before(x_BNC, context.valid_BN, self.widths.grid_HW)
        x_BQC, valid_BQ = bin_means(masked(x_BNC, context.valid_BN), context.valid_BN, *grids)
        if self.after is not None:
            x_BQC = self.after(x_BQC, valid_BQ, self.pooled)
        for k, layer in enumerate(self.readout):
            x_BQC = layer(_silu(x_BQC) if k else x_BQC)
        assign_BQN = bin_shares(len(tokens_BNC), *grids) if context.assign else None
        return handed_over(x_BQC, valid_BQ, assign_BQN, context)


class _Stage(nnx.Module):
    """`depth` blocks, C wide at first and E wide from then on. A first one with a shortcut of its own stands apart."""

    def __init__(self, depth: int, C: int, E: int, *, rngs: nnx.Rngs):
        self.first = _Block(C, E, rngs=rngs) if C != E else None
        equal = depth - (C != E)
        self.rest = stack(lambda rngs: _Block(E, E, rngs=rngs), equal, rngs) if equal else None

    def __call__(self, tokens_BNC: jax.Array, valid_BN: jax.Array | None, grid_HW: tuple[int, int]) -> jax.Array:
        B, N, _ = tokens_BNC.shape
        x_BHWC = tokens_BNC.reshape(B, *grid_HW, -1)
        valid_BHW = None if valid_BN is None else valid_BN.reshape(B, *grid_HW)
        if self.first is not None:
            x_BHWC = self.first(x_BHWC, valid_BHW)
        if self.rest is not None:
            # The type that goes round in the loop: the blocks promote to their weights'.
            x_BHWC = x_BHWC.astype(jnp.result_type(x_BHWC, *jax.tree.leaves(nnx.state(self.rest))))
            x_BHWC, _ = run(self.rest, lambda block, x_BHWC, _: (block(x_BHWC, valid_BHW), None), x_BHWC)
        return x_BHWC.reshape(B, N, -1)


class _Block(nnx.Module):
    """RegNet's bottleneck without a bottleneck: groups of one channel, squeeze and excitation after the convolution."""

    def __init__(self, C: int, E: int, *, rngs: nnx.Rngs):
        linear = partial(dense, init=small_normal, rngs=rngs)
        self.conv1, self.norm1 = linear("CE", C, E, bias=False), LayerNorm("E", E, eps=_EPS)
        self.conv2 = Conv("E", E, E, kernel=3, padding=1, groups=E, bias=False, init=small_normal, rngs=rngs)
        self.norm2 = LayerNorm("E", E, eps=_EPS)
        self.squeeze = linear("EA", E, _squeezed(C))
        self.excite = linear("AE", _squeezed(C), E)
        self.conv3, self.norm3 = linear("EI", E, E, bias=False), LayerNorm("E", E, eps=_EPS)
        self.short = linear("CE", C, E, bias=False) if C != E else None
        self.short_norm = LayerNorm("E", E, eps=_EPS) if C != E else None

    def __call__(self, x_BHWC: jax.Array, valid_BHW: jax.Array | None) -> jax.Array:
        inner_BHWE = masked(_silu(self.norm1(self.conv1(x_BHWC))), valid_BHW)
        inner_BHWE = _silu(self.norm2(self.conv2(inner_BHWE)))
        mean_BE = _mean(inner_BHWE, valid_BHW)
        gate_BE = jax.nn.sigmoid(self.excite(_silu(self.squeeze(mean_BE))))
        out_BHWE = self.norm3(self.conv3(inner_BHWE * gate_BE[:, None, None]))
        if self.short is not None and self.short_norm is not None:
            x_BHWC = self.short_norm(self.short(x_BHWC))
        return _silu(x_BHWC + out_BHWE)


def _mean(x_BHWE: jax.Array, valid_BHW: jax.Array | None) -> jax.Array:
    """Over the valid places, summed in float32."""
    wide_BHWE = masked(x_BHWE, valid_BHW).astype(jnp.float32)
    if valid_BHW is None:
        return wide_BHWE.mean((1, 2)).astype(x_BHWE.dtype)
    places_B = jnp.maximum(valid_BHW.sum((1, 2)), 1)
    return (wide_BHWE.sum((1, 2)) / places_B[:, None]).astype(x_BHWE.dtype)


def _squeezed(width: int) -> int:
    return round(width / 4)  # a half goes to the even neighbour, in timm too


def _stage(ours: str, theirs: str, depth: int, *, shortcut: bool) -> list[Name]:
    table = []
    if shortcut:
        table += _block(f"{ours}/first", f"{theirs}.b1")
        table += conv1x1(f"{ours}/first/short", f"{theirs}.b1.downsample.conv", bias=False)
        table += norm(f"{ours}/first/short_norm", f"{theirs}.b1.downsample.bn")
    if depth > shortcut:
        table += _block(f"{ours}/rest", f"{theirs}.b{{L+{1 + shortcut}}}")
    return table


def _block(ours: str, theirs: str) -> list[Name]:
    table = conv(f"{ours}/conv2", f"{theirs}.conv2.conv", bias=False)
    for k in (1, 3):
        table += conv1x1(f"{ours}/conv{k}", f"{theirs}.conv{k}.conv", bias=False)
    for k in (1, 2, 3):
        table += norm(f"{ours}/norm{k}", f"{theirs}.conv{k}.bn")
    return table + conv1x1(f"{ours}/squeeze", f"{theirs}.se.fc1") + conv1x1(f"{ours}/excite", f"{theirs}.se.fc2")
