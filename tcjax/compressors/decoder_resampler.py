"""Decoder resampler: Q learned queries through L layers of torch's TransformerDecoder, with the image as its memory.

    z <- LN(z + MHA(z, z, z))           L times, the norms behind the sums
    z <- LN(z + MHA(z, x, x))
    z <- LN(z + W_2 relu(W_1 z))        then y = W_out z

Source: nn.TransformerDecoderLayer at its defaults (F = 2048, ReLU, LayerNorm eps 1e-5), 2 layers of width C = 1024 with
16 heads and 64 queries from N(0, 1). Notes on LLaVA-UHD sketch this module; LLaVA-UHD itself has a single layer without
self-attention or feed-forward (qwen_resampler with form="uhd", spatial_resampler).
Departures: W_out (C -> D, with bias), which the sketch lacks. No dropout (torch's default is 0.1). Biases start at 0. The
batch is the first axis: the sketch leaves batch_first=False and so mixes the images. Padding is masked out of the memory,
queries that are not active out of the self-attention. No positions: any N will do, in any order.
Cost: per layer (6 Q + 2 N) C^2 + 2 Q (Q + N) C + 2 Q C F multiplications, and Q C D.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors.base import Compressed, Compressor, Context, Widths, any_valid, check_width, handed_over, visible
from tcjax.compressors.queries import PrefixConfig
from tcjax.interop.lines import attention, linear, norm
from tcjax.interop.names import Name
from tcjax.nn.activations import ACTIVATIONS
from tcjax.nn.attention import padding_mask
from tcjax.nn.dense import dense, torch_uniform
from tcjax.nn.layers import run, stack
from tcjax.nn.mha import MultiheadAttention
from tcjax.nn.norm import LayerNorm

_EPS = 1e-5
_ATTENTIONS = {"self_attn": "self_attn", "cross_attn": "multihead_attn"}
_LINEARS = {"ff_in": "linear1", "ff_out": "linear2"}
_NORMS = {"norm_self": "norm1", "norm_cross": "norm2", "norm_ff": "norm3"}


@dataclass(frozen=True, kw_only=True)
class Config(PrefixConfig):
    """depth: layers L. heads: K, they share the vision width. feed_forward: F."""

    num_queries: int = 64
    depth: int = 2
    heads: int = 16
    feed_forward: int = 2048

    def build(self, widths: Widths, rngs: nnx.Rngs) -> DecoderResampler:
        return DecoderResampler(self, widths, rngs=rngs)

    def semantics(self, widths: Widths) -> dict:
        return {
            "any_num_tokens": True,
            "max_queries": self.weighted(),
            "depth": self.depth,
            "heads": self.heads,
            "feed_forward": self.feed_forward,
            "activation": "relu",
            "norm_eps": _EPS,
            "norm_order": "behind the sums",
        }

    def names(self, widths: Widths) -> list[Name]:
        """nn.TransformerDecoderLayer's, the layers in a list; out_proj is ours."""
        table = [Name("queries", "queries"), *linear("out_proj", "out_proj")]
        for lines, pairs in ((attention, _ATTENTIONS), (linear, _LINEARS), (norm, _NORMS)):
            for ours, theirs in pairs.items():
                table += lines(f"layers/{ours}", f"layers.{{L}}.{theirs}")
        return table


class DecoderResampler(Compressor):
    def __init__(self, config: Config, widths: Widths, *, rngs: nnx.Rngs):
        for name in ("depth", "feed_forward"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: must be at least 1.")
        self.widths, self.num_outputs = widths, config.outputs(widths)
        C, D = widths.vision_C, widths.llm_D
        most = config.weighted()
        self.queries = nnx.Param(rngs.params.normal((most, C)), axes="QC")
        self.layers = stack(lambda rngs: _Layer(config, C, rngs=rngs), config.depth, rngs)
        self.out_proj = dense("CD", C, D, init=torch_uniform, rngs=rngs)

    def __call__(self, tokens_BNC: jax.Array, context: Context = Context()) -> Compressed:
        check_width(tokens_BNC, self.widths)
        tokens_BNC, (B, Q) = visible(tokens_BNC, context), (len(tokens_BNC), self.num_outputs)
        query_QC = self.queries[...][:Q]
        dtype = jnp.result_type(tokens_BNC, query_QC)
        memory_BNC, query_BQC = tokens_BNC.astype(dtype), jnp.broadcast_to(query_QC.astype(dtype), (B, *query_QC.shape))
        mask_BSM = padding_mask(context.valid_BN)
        active_BSM = None
        if context.active_B is not None:
            active_BSM = (jnp.arange(Q) < jnp.maximum(context.active_B, 1)[:, None])[:, None]

        def step(layer: _Layer, query_BQC: jax.Array, _):
            return layer(query_BQC, memory_BNC, active_BSM, mask_BSM, assign=context.assign)

        query_BQC, assign_LBQN = run(self.layers, step, query_BQC)
        assign_BQN = None if assign_LBQN is None else assign_LBQN[-1]
        return handed_over(self.out_proj(query_BQC), any_valid(tokens_BNC, context, Q), assign_BQN, context)


class _Layer(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each added and then normed."""

    def __init__(self, config: Config, C: int, *, rngs: nnx.Rngs):
        self.self_attn = MultiheadAttention(C, config.heads, rngs=rngs)
        self.cross_attn = MultiheadAttention(C, config.heads, rngs=rngs)
        self.ff_in = dense("CF", C, config.feed_forward, init=torch_uniform, rngs=rngs)
        # "FE", as the attentions call this width: with "FC" on a data x fsdp x tensor mesh XLA's partitioner hands the sum
        # behind it other images' rows (jax 0.10.2; test_one_device_equals_eight).
        self.ff_out = dense("FE", config.feed_forward, C, init=torch_uniform, rngs=rngs)
        self.norm_self, self.norm_cross, self.norm_ff = (LayerNorm("C", C, eps=_EPS) for _ in range(3))

    def __call__(self, query_BQC, memory_BNC, active_BSM, mask_BSM, *, assign: bool):
        """The next queries, and if asked the head-mean of the attention to the image, BQN."""
        seen_BQC, _ = self.self_attn(query_BQC, query_BQC, query_BQC, mask_BSM=active_BSM)
        query_BQC = self.norm_self(query_BQC + seen_BQC)
        read_BQC, assign_BQN = self.cross_attn(query_BQC, memory_BNC, memory_BNC, mask_BSM=mask_BSM, weights=assign)
        query_BQC = self.norm_cross(query_BQC + read_BQC)
        hidden_BQF = ACTIVATIONS["relu"](self.ff_in(query_BQC))
        return self.norm_ff(query_BQC + self.ff_out(hidden_BQF)), assign_BQN
