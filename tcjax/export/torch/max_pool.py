"""Max pooling of the token grid to h x w bins, then an MLP: y = W_2 gelu(W_1 max(bin)). Or first the MLP.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row, Q = h * w. An invalid token never wins; a bin without any valid one is not valid.
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
        if config["family"] != "max_pool":
            raise ValueError(f"this file holds the family 'max_pool', the config is of {config['family']!r}")
        if config["order"] not in ORDERS:
            raise ValueError(f"this file knows the orders {ORDERS}; the config says {config['order']!r}")
        widths = [config["vision_width"]] + [config["llm_width"]] * config["depth"]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[config["activation"]]()]
        super().__init__(*layers[:-1])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        first = self.config["order"] == "mlp, then pool"
        if valid is None:
            return self.pool(super().forward(tokens)) if first else super().forward(self.pool(tokens))
        tokens = tokens.masked_fill(~valid[..., None], 0)
        if first:
            tokens = super().forward(tokens)
        some = self.pool(valid[..., None].to(tokens.dtype)) > 0
        most = self.pool(tokens.masked_fill(~valid[..., None], float("-inf"))).masked_fill(~some, 0)
        return (most if first else super().forward(most)).masked_fill(~some, 0), some[..., 0]

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, Q, C]; bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1."""
        grid = tokens.transpose(1, 2).unflatten(2, tuple(self.config["grid"]))
        return functional.adaptive_max_pool2d(grid, tuple(self.config["pooled"])).flatten(2).transpose(1, 2)
