"""Average pooling of the token grid to h x w bins, then an MLP: y = W_2 gelu(W_1 mean(bin)).

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], Q = h * w
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. With a mask the mean is over a bin's valid tokens; a bin without any is not valid.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Sequential):
    def __init__(self, config: dict):
        if config["family"] != "avg_pool":
            raise ValueError(f"this file holds the family 'avg_pool', the config is of {config['family']!r}")
        if config["order"] != "pool, then mlp":
            raise ValueError(f"this file pools before the MLP; the config says {config['order']!r}")
        width = config["llm_width"]
        super().__init__(
            nn.Linear(config["vision_width"], width), ACTIVATIONS[config["activation"]](), nn.Linear(width, width)
        )
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if valid is None:
            return super().forward(self.pool(tokens))
        keep = valid[..., None]
        share = self.pool(keep.to(tokens.dtype))
        some = share > 0
        mean = self.pool(tokens.masked_fill(~keep, 0)) / share.where(some, 1)
        return super().forward(mean).masked_fill(~some, 0), some[..., 0]

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, Q, C]; bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1."""
        grid = tokens.transpose(1, 2).unflatten(2, tuple(self.config["grid"]))
        return functional.adaptive_avg_pool2d(grid, tuple(self.config["pooled"])).flatten(2).transpose(1, 2)
