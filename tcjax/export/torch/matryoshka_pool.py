"""Matryoshka pooling (M3): an MLP on every token, then the mean of every block, at any of the trained scales.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens
    tokens = compressor(features, scale=9)              # 9 tokens instead of Q; config["scales"] are all there are

N is the grid, row by row. With a mask the mean is over a block's valid tokens; a block without any is not valid.
The MLP's keys are those of LLaVA's mm_projector.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Sequential):
    def __init__(self, config: dict):
        if config["family"] != "matryoshka_pool":
            raise ValueError(f"this file holds the family 'matryoshka_pool', the config is of {config['family']!r}")
        if config["order"] != "mlp, then pool":
            raise ValueError(f"this file pools after the MLP; the config says {config['order']!r}")
        widths = [config["vision_width"]] + [config["llm_width"]] * config["depth"]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[config["activation"]]()]
        super().__init__(*layers[:-1])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None, *, scale: int | None = None):
        pooled = tuple(self.config["pooled"]) if scale is None else self.shape(scale)
        if valid is None:
            return self.pool(super().forward(tokens), pooled)
        keep = valid[..., None]
        tokens = super().forward(tokens.masked_fill(~keep, 0)).masked_fill(~keep, 0)
        share = self.pool(keep.to(tokens.dtype), pooled)
        some = share > 0
        return self.pool(tokens, pooled) / share.where(some, 1), some[..., 0]

    def shape(self, scale: int) -> tuple[int, int]:
        """(h, w) of a scale."""
        if scale not in self.config["scales"]:
            raise ValueError(f"scale {scale} was not trained; {self.config['scales']} were")
        rows, columns = self.config["grid"]
        side = (rows * columns // scale) ** 0.5
        return (1, 1) if scale == 1 else (round(rows / side), round(columns / side))

    def pool(self, tokens: torch.Tensor, pooled: tuple[int, int]) -> torch.Tensor:
        """[B, N, D] -> [B, Q, D], whole blocks."""
        rows, columns = self.config["grid"]
        grid = tokens.transpose(1, 2).unflatten(2, (rows, columns))
        kernel = (rows // pooled[0], columns // pooled[1])
        return functional.avg_pool2d(grid, kernel).flatten(2).transpose(1, 2)
