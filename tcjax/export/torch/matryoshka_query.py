"""Matryoshka query transformer: any first m queries, each a pooling of the image. Keys are MQT-LLaVA's.

    y = attn(ln_q(query + P), ln_k(P resized to the grid), ln_v(x)) @ proj

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

P is the table `pos_embed`, half precision in the file. Lower `num_queries` in the config for fewer tokens: they are the
first ones. N is the grid, row by row. An image without any valid token has no valid output.
"""

import torch
from torch import nn
from torch.nn import functional


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "matryoshka_query":
            raise ValueError(f"this file holds the family 'matryoshka_query', the config is of {config['family']!r}")
        width, eps = config["vision_width"], config["norm_eps"]
        self.pos_embed = nn.Parameter(torch.zeros(config["max_queries"], width), requires_grad=False)
        self.query = nn.Parameter(0.02 * torch.randn(config["max_queries"], width))
        self.attn = nn.MultiheadAttention(width, config["heads"], batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_k = nn.LayerNorm(width, eps=eps)
        self.ln_v = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Parameter(config["llm_width"] ** -0.5 * torch.randn(width, config["llm_width"]))
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        hidden = some = None
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
            some = valid.any(-1, keepdim=True)
            hidden = ~(valid | ~some)
        batch, num = tokens.shape[0], self.config["num_queries"]
        table = self.pos_embed.to(self.query.dtype)
        queries = self.ln_q(self.query[:num] + table[:num])
        keys = self.resized(table)
        keys = self.ln_k(keys + tokens) if self.config["key_content"] else self.ln_k(keys).expand(batch, -1, -1)
        queries = queries.expand(batch, -1, -1)
        out = self.attn(queries, keys, self.ln_v(tokens), key_padding_mask=hidden, need_weights=False)[0] @ self.proj
        if some is None:
            return out
        some = some.expand(-1, num)
        return out.masked_fill(~some[..., None], 0), some

    def resized(self, table: torch.Tensor) -> torch.Tensor:
        """[1, N, vision_width]"""
        side = round(self.config["max_queries"] ** 0.5)
        square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(square, size=self.config["grid"], mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
