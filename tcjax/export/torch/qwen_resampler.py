"""Single-layer resamplers with sin-cos positions. Keys are those of Qwen-VL, OmniLMM, MiniCPM-V or LLaVA-UHD.

    x' = ln_kv(kv_proj(x));  z = attn(ln_q(query) + P_q, x' + P_k, x');  y = ln_post(z) @ proj

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

P_q and P_k are fixed tables of sines and cosines; `form` in the config names the checkpoint they are of. N is the grid,
row by row, frame by frame. An image without any valid token has no valid output.
"""

import torch
from torch import nn
from torch.nn import functional


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "qwen_resampler":
            raise ValueError(f"this file holds the family 'qwen_resampler', the config is of {config['family']!r}")
        known = {"key_positions": ("exact", "resized"), "key_prefix": ("", "attn_pool.")}
        for fact, values in known.items():
            if config[fact] not in values:
                raise ValueError(f"this file knows {fact} of {values}; the config says {config[fact]!r}")
        width, queries, eps = config["llm_width"], config["max_queries"], config["norm_eps"]
        pool = self
        if config["key_prefix"]:  # Qwen-VL's vision tower: it has the resampler inside, and what follows beside it
            pool = self.attn_pool = nn.Module()
        pool.query = nn.Parameter(0.02 * torch.randn(queries, width))
        if config["pos_embed_is_saved"]:
            side = round(queries**0.5)
            pool.pos_embed = nn.Parameter(sincos_2d(side, side, width), requires_grad=False)
        same = config["vision_width"] == width
        pool.kv_proj = nn.Identity() if same else nn.Linear(config["vision_width"], width, bias=False)
        pool.attn = nn.MultiheadAttention(width, config["heads"], batch_first=True)
        pool.ln_q = nn.LayerNorm(width, eps=eps)
        pool.ln_kv = nn.LayerNorm(width, eps=eps)
        if config["post"]:
            self.ln_post = nn.LayerNorm(width, eps=eps)
            self.proj = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        pool = self.attn_pool if self.config["key_prefix"] else self
        hidden = some = None
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
            some = valid.any(-1, keepdim=True)
            hidden = ~(valid | ~some)
        values = pool.ln_kv(pool.kv_proj(tokens))
        keys = values + self.key_positions().to(values.dtype)
        queries = pool.ln_q(pool.query[: self.config["num_queries"]])
        if self.config["queries_have_positions"]:
            queries = queries + pool.pos_embed[: len(queries)].to(queries.dtype)
        queries = queries.expand(len(tokens), -1, -1)
        out = pool.attn(queries, keys, values, key_padding_mask=hidden, need_weights=False)[0]
        if self.config["post"]:
            out = self.ln_post(out) @ self.proj
        if some is None:
            return out
        some = some.expand(-1, out.shape[1])
        return out.masked_fill(~some[..., None], 0), some

    def key_positions(self) -> torch.Tensor:
        """[N, llm_width]"""
        pool = self.attn_pool if self.config["key_prefix"] else self
        height, width = self.config["grid"]
        size, device = self.config["llm_width"], pool.query.device
        if self.config["key_positions"] == "exact":
            table = sincos_2d(height, width, size, device)
        else:
            side = round(self.config["max_queries"] ** 0.5)
            square = pool.pos_embed.float().reshape(1, side, side, size).permute(0, 3, 1, 2)
            resized = functional.interpolate(square, size=(height, width), mode="bicubic", align_corners=False)
            table = resized.permute(0, 2, 3, 1).reshape(height * width, size)
        if self.config["frame_positions"]:
            frames = torch.tensor(self.config["frame_positions"], device=device)
            table = (sincos_1d(frames, size)[:, None] + table).flatten(0, 1)
        return table


def sincos_2d(height: int, width: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """[height * width, size]: the first half tells the column, the second half the row."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.cat([sincos_1d(columns, size // 2), sincos_1d(rows, size // 2)], dim=1)


def sincos_1d(positions: torch.Tensor, size: int) -> torch.Tensor:
    """[P, size]: sines, then cosines. Rounded to float32 where the published tables were: late positions tell."""
    exponents = (torch.arange(size // 2, device=positions.device).float() / (size / 2)).double()
    rates = 1 / (10000**exponents).float()
    angles = positions.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
