"""DeepSeek-OCR's compressor: two convolutions of stride 2 turn 4 x 4 tokens into one. Keys are DeepSeek-OCR's.

    y = out_proj(net_3(net_2(neck(x))))           3 x 3, stride 2, padding 1, no bias, nothing between them

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], a sixteenth of N
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row; sides that 4 does not divide are rounded up. The neck is there if `neck` is not 0. `out_proj`
is not in DeepSeek-OCR; everything else is its sam_model's. With a mask the convolutions read 0 for what is not valid; an
output is valid if any token of its own 4 x 4 is.
"""

import torch
from torch import nn
from torch.nn import functional


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "conv16":
            raise ValueError(f"this file holds the family 'conv16', the config is of {config['family']!r}")
        if (config["kernel"], config["strides"]) != (3, [2, 2]):
            raise ValueError(
                f"this file has two 3 x 3 convolutions of stride 2; the config says {config['kernel']} and "
                f"{config['strides']}"
            )
        width = config["neck"] or config["vision_width"]
        if config["neck"]:
            self.neck = nn.ModuleList(
                [
                    nn.Conv2d(config["vision_width"], width, 1, bias=False),
                    nn.LayerNorm(width, eps=config["norm_eps"]),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.LayerNorm(width, eps=config["norm_eps"]),
                ]
            )
        self.net_2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False)
        self.out_proj = nn.Linear(4 * width, config["llm_width"])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        sides = tuple(self.config["grid"])
        keep = None if valid is None else valid.unflatten(1, sides)[:, None]
        grid = zeroed(tokens.transpose(1, 2).unflatten(2, sides), keep)
        if self.config["neck"]:
            narrow, norm_narrow, near, norm_near = self.neck
            grid = zeroed(by_channel(norm_narrow, narrow(grid)), keep)
            grid = zeroed(by_channel(norm_near, near(grid)), keep)
        for layer in (self.net_2, self.net_3):
            if keep is not None:
                keep = functional.max_pool2d(keep.to(grid.dtype), 2, ceil_mode=True) > 0
            grid = zeroed(layer(grid), keep)
        out = self.out_proj(grid.flatten(2).transpose(1, 2))
        if keep is None:
            return out
        some = keep[:, 0].flatten(1)
        return out.masked_fill(~some[..., None], 0), some


def by_channel(norm: nn.LayerNorm, grid: torch.Tensor) -> torch.Tensor:
    return norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def zeroed(grid: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return grid if keep is None else grid.masked_fill(~keep, 0)
