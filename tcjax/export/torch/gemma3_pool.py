"""Gemma 3's projector: block means, an RMSNorm with the scale 1 + w, one matrix. Keys are Gemma 3's.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row; Q = N / k^2 blocks of k x k. `mm_input_projection_weight` is [vision_width, llm_width], not
transposed. With a mask the mean is over a block's valid tokens; a block without any is not valid.
"""

import torch
from torch import nn
from torch.nn import functional


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "gemma3_pool":
            raise ValueError(f"this file holds the family 'gemma3_pool', the config is of {config['family']!r}")
        width = config["vision_width"]
        self.mm_soft_emb_norm = RMSNorm(width, config["norm_eps"])
        self.mm_input_projection_weight = nn.Parameter(torch.randn(width, config["llm_width"]) * width**-0.5)
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if valid is None:
            return self.project(self.pool(tokens))
        keep = valid[..., None]
        share = self.pool(keep.to(tokens.dtype))
        some = share > 0
        mean = self.pool(tokens.masked_fill(~keep, 0)) / share.where(some, 1)
        return self.project(mean).masked_fill(~some, 0), some[..., 0]

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, Q, C]."""
        (rows, columns), (height, width) = self.config["grid"], self.config["pooled"]
        grid = tokens.transpose(1, 2).unflatten(2, (rows, columns))
        kernel = (rows // height, columns // width)
        return functional.avg_pool2d(grid, kernel).flatten(2).transpose(1, 2)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mm_soft_emb_norm(tokens) @ self.mm_input_projection_weight


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (unit * (1 + self.weight.float())).type_as(x)
