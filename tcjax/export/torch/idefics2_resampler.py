"""Idefics2's connector: tokens are projected to the LLM's width, then learned latents read them. Keys are Idefics2's.

    x <- down(silu(gate(x)) * up(x))                               modality_projection
    z <- z + o_proj softmax(q k^T / sqrt(head_width)) v            q of n(z), k and v of [n'(x) ; n(z)], n RMSNorms
    z <- z + down(silu(gate(n''(z))) * up(n''(z)))                 depth times; then y = norm(z)

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], any N
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

Loads into transformers' Idefics2Connector as it is. An image without any valid token has no valid output.
"""

import torch
from torch import nn
from torch.nn import functional


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "idefics2_resampler":
            raise ValueError(f"this file holds the family 'idefics2_resampler', the config is of {config['family']!r}")
        if (config["attended_order"], config["activation"]) != ("image, latents", "silu"):
            raise ValueError(
                f"this file attends to (image, latents) and gates by silu; the config says {config['attended_order']!r} "
                f"and {config['activation']!r}"
            )
        self.modality_projection = GatedMlp(config["vision_width"], config["projection"], config["llm_width"])
        self.perceiver_resampler = Perceiver(config)

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if valid is None:
            return self.perceiver_resampler(self.modality_projection(tokens), None)
        tokens = self.modality_projection(tokens.masked_fill(~valid[..., None], 0))
        out = self.perceiver_resampler(tokens, valid)
        some = valid.any(-1, keepdim=True).expand(-1, out.shape[1])
        return out.masked_fill(~some[..., None], 0), some


class Perceiver(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width = config["llm_width"]
        self.num_queries = config["num_queries"]
        self.latents = nn.Parameter(0.02 * torch.randn(config["max_queries"], width))
        self.layers = nn.ModuleList(Layer(width, config) for _ in range(config["depth"]))
        self.norm = RMSNorm(width, config["norm_eps"])

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        latents = self.latents[: self.num_queries].expand(tokens.shape[0], -1, -1)
        mask = None
        if valid is not None:
            seen = torch.ones(latents.shape[:2], dtype=torch.bool, device=valid.device)
            mask = torch.cat([valid, seen], dim=1)[:, None, None]
        for layer in self.layers:
            latents = layer(latents, tokens, mask)
        return self.norm(latents)


class Layer(nn.Module):
    """Cross-attention and gated feed-forward, both residual on the un-normed latents."""

    def __init__(self, width: int, config: dict):
        super().__init__()
        eps = config["norm_eps"]
        self.input_latents_norm = RMSNorm(width, eps)
        self.input_context_norm = RMSNorm(width, eps)
        self.self_attn = Attention(width, config["heads"], config["kv_heads"], config["head_width"])
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = GatedMlp(width, config["feed_forward"], width)

    def forward(self, latents: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        read = self.self_attn(self.input_latents_norm(latents), self.input_context_norm(context), mask)
        latents = latents + read
        return latents + self.mlp(self.post_attention_layernorm(latents))


class Attention(nn.Module):
    """Latents attend to the context and, behind it, to themselves; heads / kv_heads of them share keys and values."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int):
        super().__init__()
        self.head_width, self.shared_by = head_width, heads // kv_heads
        self.q_proj = nn.Linear(width, heads * head_width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=False)
        self.o_proj = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, latents: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        seen = torch.cat([context, latents], dim=1)
        query = self.heads(self.q_proj(latents))
        key, value = (
            self.heads(project(seen)).repeat_interleave(self.shared_by, dim=1) for project in (self.k_proj, self.v_proj)
        )
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(read.transpose(1, 2).flatten(2))

    def heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class GatedMlp(nn.Module):
    def __init__(self, width_in: int, hidden: int, width_out: int):
        super().__init__()
        self.gate_proj = nn.Linear(width_in, hidden, bias=False)
        self.up_proj = nn.Linear(width_in, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width_out, bias=False)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(tensor)) * self.up_proj(tensor))


class RMSNorm(nn.Module):
    """Statistics in float32; cast back, then times the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(tensor.dtype)
