"""Average pooling of the token grid to h x w bins, then an MLP: y = W_2 gelu(W_1 mean(bin)). Or first the MLP.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], Q = h * w
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. With a mask the mean is over a bin's valid tokens; a bin without any is not valid.
The MLP's keys are those of LLaVA's mm_projector.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}
ORDERS = ("pool, then mlp", "mlp, then pool")


class Compressor(nn.Sequential):
    def __init__(self, config: dict):
        if config["family"] != "avg_pool":
            raise ValueError(f"this file holds the family 'avg_pool', the config is of {config['family']!r}")
        if config["order"] not in ORDERS:
            raise ValueError(f"this file knows the orders {ORDERS}; the config says {config['order']!r}")
        widths = [config["vision_width"]] + [config["llm_width"]] * config["depth"]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[config["activation"]]()]
        super().__init__(*layers[:-1])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if self.config["order"] == "pool, then mlp":
            if valid is None:
                return super().forward(self.pool(tokens))
            mean, some = self.mean(tokens, valid)
            return super().forward(mean).masked_fill(~some[..., None], 0), some
        if valid is None:
            return self.pool(super().forward(tokens))
        return self.mean(super().forward(tokens.masked_fill(~valid[..., None], 0)), valid)

    def mean(self, tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the valid tokens in each bin, and which bins have any."""
        keep = valid[..., None]
        share = self.pool(keep.to(tokens.dtype))
        some = share > 0
        return self.pool(tokens.masked_fill(~keep, 0)) / share.where(some, 1), some[..., 0]

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, Q, C]; bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1."""
        grid = tokens.transpose(1, 2).unflatten(2, tuple(self.config["grid"]))
        return functional.adaptive_avg_pool2d(grid, tuple(self.config["pooled"])).flatten(2).transpose(1, 2)
