"""LDPv2: an MLP on every token, average pooling to h x w bins, one depthwise convolution. Keys are MobileVLM V2's.

    z = pool(mlp(x));   y = z + peg(z)

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], Q = h * w
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. With a mask the mean is over a bin's valid tokens; a bin without any is not valid, and the
convolution reads 0 there.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "ldp_v2":
            raise ValueError(f"this file holds the family 'ldp_v2', the config is of {config['family']!r}")
        if config["order"] != "mlp, pool, convolution":
            raise ValueError(f"this file goes through mlp, pool, convolution; the config says {config['order']!r}")
        width, kernel = config["llm_width"], config["kernel"]
        mlp = nn.Sequential(
            nn.Linear(config["vision_width"], width), ACTIVATIONS[config["activation"]](), nn.Linear(width, width)
        )
        self.mlp = nn.ModuleDict({"mlp": mlp})
        self.peg = nn.ModuleDict(
            {"peg": nn.Sequential(nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width))}
        )
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        some = None
        if valid is None:
            grid = self.pool(self.mlp["mlp"](tokens))
        else:
            keep = valid[..., None]
            share = self.pool(keep.to(tokens.dtype))
            some = share > 0
            projected = self.mlp["mlp"](tokens.masked_fill(~keep, 0)).masked_fill(~keep, 0)
            grid = self.pool(projected) / share.where(some, 1)
        out = grid + self.peg["peg"](grid)
        if some is None:
            return out.flatten(2).transpose(1, 2)
        out = out.masked_fill(~some, 0)
        return out.flatten(2).transpose(1, 2), some[:, 0].flatten(1)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, D, h, w]; bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1."""
        grid = tokens.transpose(1, 2).unflatten(2, tuple(self.config["grid"]))
        return functional.adaptive_avg_pool2d(grid, tuple(self.config["pooled"]))
