"""Perceiver resampler: learned latents read the image through layers of cross-attention. Keys are OpenFlamingo's.

    x <- x + frame_embs[f] + media_time_embs[t]             if the checkpoint has them
    z <- z + W_o softmax(q k^T / sqrt(head_width)) v        q = LN(z) W_q,  [k | v] = [LN(x) ; LN(z)] W_kv
    z <- z + W_2 gelu(W_1 LN(z))                            depth times; then y = out_proj(LN(z))

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], any N
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

`out_proj` (vision width to LLM width) is not in OpenFlamingo; everything else loads into its perceiver as it is.
An image without any valid token has no valid output.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "resampler":
            raise ValueError(f"this file holds the family 'resampler', the config is of {config['family']!r}")
        orders = config["attended_order"], config["kv_order"]
        if orders != ("image, latents", "keys, values"):
            raise ValueError(
                f"this file attends to (image, latents) and packs (keys, values); the config says {orders}"
            )
        width, eps = config["vision_width"], config["norm_eps"]
        self.latents = nn.Parameter(torch.randn(config["max_queries"], width))
        if config["max_frames"]:
            self.frame_embs = nn.Parameter(torch.randn(config["max_frames"], width))
        if config["max_media"]:
            self.media_time_embs = nn.Parameter(torch.randn(config["max_media"], 1, width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["depth"]))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.out_proj = nn.Linear(width, config["llm_width"])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        batch, media = tokens.shape[0], self.config["media"]
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
        tokens = self.embed(tokens).reshape(batch * media, -1, tokens.shape[-1])  # a medium is a row of its own
        latents = self.latents[: self.config["num_queries"]].expand(tokens.shape[0], -1, -1)
        mask = some = None
        if valid is not None:
            valid = valid.reshape(batch * media, -1)
            some = valid.any(-1, keepdim=True).expand(-1, latents.shape[1])
            mask = torch.cat([valid, torch.ones_like(some)], dim=1)[:, None, None]
        for layer in self.layers:
            latents = layer(tokens, latents, mask)
        out = self.out_proj(self.norm(latents)).reshape(batch, -1, self.config["llm_width"])
        if some is None:
            return out
        some = some.reshape(batch, -1)
        return out.masked_fill(~some[..., None], 0), some

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        media = self.config["media"]
        frames = self.config["frames"] // media
        if self.config["max_frames"]:
            apart = tokens.unflatten(1, (media, frames, -1))
            tokens = (apart + self.frame_embs[:frames, None]).flatten(1, 3)
        if self.config["max_media"]:
            apart = tokens.unflatten(1, (media, -1))
            tokens = (apart + self.media_time_embs[:media]).flatten(1, 2)
        return tokens


class Layer(nn.ModuleList):
    """Cross-attention (0) and feed-forward (1), both residual on the un-normed latents."""

    def __init__(self, config: dict):
        width, hidden, eps = config["vision_width"], config["feed_forward"], config["norm_eps"]
        feed_forward = nn.Sequential(
            nn.LayerNorm(width, eps=eps),
            nn.Linear(width, hidden, bias=False),
            ACTIVATIONS[config["activation"]](),
            nn.Linear(hidden, width, bias=False),
        )
        super().__init__([Attention(width, config["heads"], config["head_width"], eps), feed_forward])

    def forward(self, tokens: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        latents = latents + self[0](tokens, latents, mask)
        return latents + self[1](latents)


class Attention(nn.Module):
    """Latents attend to the image and, behind it, to themselves."""

    def __init__(self, width: int, heads: int, head_width: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width, eps=eps)
        self.norm_latents = nn.LayerNorm(width, eps=eps)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, tokens: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        latents = self.norm_latents(latents)
        seen = torch.cat([self.norm_media(tokens), latents], dim=1)
        key, value = self.to_kv(seen).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(latents), key, value)
        )
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(read.transpose(1, 2).flatten(2))
