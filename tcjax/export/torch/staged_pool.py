"""Staged pooling: the grid shrinks in several steps, with a ConvNeXt block between one and the next, then an MLP.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. With a mask every mean is over valid positions, convolutions read 0 at the others, and a
position is valid if any that it averages is. Keys are those of ConvNeXt's layers and LLaVA's mm_projector.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "staged_pool":
            raise ValueError(f"this file holds the family 'staged_pool', the config is of {config['family']!r}")
        self.blocks = nn.ModuleList(Block(config) for _ in config["stages"][1:])
        widths = [config["vision_width"]] + [config["llm_width"]] * config["depth"]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[config["activation"]]()]
        self.mm_projector = nn.Sequential(*layers[:-1])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        grid = tokens.transpose(1, 2).unflatten(2, tuple(self.config["grid"]))
        keep = None if valid is None else valid[:, None].unflatten(2, tuple(self.config["grid"]))
        for stage, shape in enumerate(self.config["stages"]):
            grid, keep = self.pool(grid, keep, tuple(shape))
            if stage < len(self.blocks):
                grid = self.blocks[stage](grid)
                grid = grid if keep is None else grid.masked_fill(~keep, 0)
        tokens = self.mm_projector(grid.flatten(2).transpose(1, 2))
        if keep is None:
            return tokens
        some = keep.flatten(1)
        return tokens.masked_fill(~some[..., None], 0), some

    @staticmethod
    def pool(grid: torch.Tensor, keep: torch.Tensor | None, shape: tuple[int, int]):
        """[B, C, H, W] -> [B, C, h, w]; bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1."""
        if keep is None:
            return functional.adaptive_avg_pool2d(grid, shape), None
        share = functional.adaptive_avg_pool2d(keep.to(grid.dtype), shape)
        some = share > 0
        return functional.adaptive_avg_pool2d(grid.masked_fill(~keep, 0), shape) / share.where(some, 1), some


class Block(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width, inner, kernel = config["vision_width"], config["feed_forward"], config["kernel"]
        self.dwconv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.layernorm = nn.LayerNorm(width, eps=config["norm_eps"])
        self.pwconv1 = nn.Linear(width, inner)
        self.act = ACTIVATIONS[config["activation"]]()
        self.pwconv2 = nn.Linear(inner, width)
        self.layer_scale_parameter = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        hidden = self.layernorm(self.dwconv(grid).permute(0, 2, 3, 1))
        hidden = self.layer_scale_parameter * self.pwconv2(self.act(self.pwconv1(hidden)))
        return grid + hidden.permute(0, 3, 1, 2)
