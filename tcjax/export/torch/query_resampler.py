"""Text-primed perceiver: learned latents read the question, then the image. Keys are TG-LLaVA's mm_patch_encoder's.

    t = resize_linear(text)                     x = pre_mlp(x + position_embedding)
    z <- layer(z, t)                            the first text_layers layers; z <- layer(z, x), the others
    y = proj(norm(z))                           pre_mlp and proj: linear, GELU, linear

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    # features [B, N, vision_width], text [B, T, text_width] -> [B, Q, llm_width]; text_valid: bool [B, T]
    tokens = compressor(features, text=text, text_valid=text_valid)
    tokens, valid = compressor(features, valid, text=text, text_valid=text_valid)     # with a bool mask [B, N]

`text` is the LLM's embeddings of the question. A row whose text_valid is all False is the null text: its latents then read
themselves before they read the image. An image without any valid token has no valid output.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "query_resampler":
            raise ValueError(f"this file holds the family 'query_resampler', the config is of {config['family']!r}")
        orders = config["reading_order"], config["attended_order"], config["activation"]
        if orders != ("text, image", "context, latents", "silu"):
            raise ValueError(
                f"this file reads (text, image), attends to (context, latents) and gates by silu; the config says {orders}"
            )
        vision, width, llm = config["vision_width"], config["width"], config["llm_width"]
        activation = ACTIVATIONS[config["mlp_activation"]]
        if config["positions"]:
            height, breadth = config["grid"]
            self.position_embedding = nn.Embedding(config["frames"] * height * breadth, vision)
        self.pre_mlp = nn.Sequential(nn.Linear(vision, vision), activation(), nn.Linear(vision, width))
        self.proj = nn.Sequential(nn.Linear(width, llm), activation(), nn.Linear(llm, llm))
        self.perceiver = Perceiver(config)
        self.resize_linear = nn.Linear(config["text_width"], width)
        self.config = config

    def forward(
        self,
        tokens: torch.Tensor,
        valid: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_valid: torch.Tensor | None = None,
    ):
        if text is None:
            raise ValueError("this compressor reads the question: give text=[B, T, text_width]")
        if text_valid is not None:
            text = text.masked_fill(~text_valid[..., None], 0)
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
        if self.config["positions"]:
            tokens = tokens + self.position_embedding.weight
        out = self.perceiver(self.resize_linear(text), text_valid, self.pre_mlp(tokens), valid)
        out = self.proj(out)
        if valid is None:
            return out
        some = valid.any(-1, keepdim=True).expand(-1, out.shape[1])
        return out.masked_fill(~some[..., None], 0), some


class Perceiver(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width = config["width"]
        self.num_queries, self.text_layers = config["num_queries"], config["text_layers"]
        self.latents = nn.Parameter(0.02 * torch.randn(config["max_queries"], width))
        self.layers = nn.ModuleList(Layer(width, config) for _ in range(config["depth"]))
        self.norm = RMSNorm(width, config["norm_eps"])

    def forward(
        self, text: torch.Tensor, text_valid: torch.Tensor | None, image: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        latents = self.latents[: self.num_queries].expand(image.shape[0], -1, -1)
        text_mask, image_mask = self.seen(text_valid), self.seen(valid)
        for number, layer in enumerate(self.layers):
            is_text = number < self.text_layers
            latents = layer(latents, text if is_text else image, text_mask if is_text else image_mask)
        return self.norm(latents)

    def seen(self, valid: torch.Tensor | None) -> torch.Tensor | None:
        """[B, 1, 1, M + Q]: the valid context, and always the latents, so that no row sees nothing."""
        if valid is None:
            return None
        latents = torch.ones(valid.shape[0], self.num_queries, dtype=torch.bool, device=valid.device)
        return torch.cat([valid, latents], dim=1)[:, None, None]


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
