"""LDP: an MLP on every token, then two MobileNetV3 blocks, the second with stride 2. Keys are MobileVLM's.

    z = mlp(x);   z <- z + block_1(z);   y = block_2(z)
    block(z) = LN(W_p se(u)),  u = hardswish(LN(conv(z))),  se(u) = u * hardsigmoid(fc2(relu(fc1(mean(u)))))

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], a quarter of N
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row; odd sides are rounded up. With a mask the convolutions read 0 and the mean leaves out what is
not valid; an output is valid if any token of its own 2 x 2 is.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "ldp":
            raise ValueError(f"this file holds the family 'ldp', the config is of {config['family']!r}")
        if config["strides"] != [1, 2]:
            raise ValueError(f"this file has two blocks of strides 1 and 2; the config says {config['strides']}")
        width, squeezed, eps = config["llm_width"], config["squeezed"], config["norm_eps"]
        mlp = nn.Sequential(
            nn.Identity(),
            nn.Linear(config["vision_width"], width),
            ACTIVATIONS[config["activation"]](),
            nn.Linear(width, width),
        )
        blocks = [Block(width, squeezed, stride, eps) for stride in config["strides"]]
        self.model = nn.ModuleDict({"mlp": mlp, "mb_block": nn.ModuleList([nn.Identity(), *blocks])})
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        sides, keep = tuple(self.config["grid"]), None
        if valid is not None:
            keep = valid.unflatten(1, sides)[:, None]
            tokens = tokens.masked_fill(~valid[..., None], 0)
        grid = self.model["mlp"](tokens).transpose(1, 2).unflatten(2, sides)
        for block in self.model["mb_block"][1:]:
            grid, keep = block(zeroed(grid, keep), keep)
        out = zeroed(grid, keep).flatten(2).transpose(1, 2)
        return out if keep is None else (out, keep[:, 0].flatten(1))


class Block(nn.Module):
    """An inverted residual block without expansion."""

    def __init__(self, width: int, squeezed: int, stride: int, eps: float):
        super().__init__()
        near = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        weigh = nn.ModuleDict({"fc1": nn.Conv2d(width, squeezed, 1), "fc2": nn.Conv2d(squeezed, width, 1)})
        mix = nn.Conv2d(width, width, 1, bias=False)
        self.stride = stride
        self.block = nn.ModuleList(
            [
                nn.ModuleList([near, nn.LayerNorm(width, eps=eps)]),
                weigh,
                nn.ModuleList([mix, nn.LayerNorm(width, eps=eps)]),
            ]
        )

    def forward(self, grid: torch.Tensor, keep: torch.Tensor | None):
        (near, norm_near), weigh, (mix, norm) = self.block
        if keep is not None and self.stride == 2:
            keep = functional.max_pool2d(keep.to(grid.dtype), 2, ceil_mode=True) > 0
        read = zeroed(functional.hardswish(by_channel(norm_near, near(grid))), keep)
        if keep is None:
            mean = read.mean((2, 3), keepdim=True)
        else:
            mean = read.sum((2, 3), keepdim=True) / keep.sum((2, 3), keepdim=True).clamp(min=1)
        read = read * functional.hardsigmoid(weigh["fc2"](functional.relu(weigh["fc1"](mean))))
        out = by_channel(norm, mix(read))
        return grid + out if self.stride == 1 else out, keep


def by_channel(norm: nn.LayerNorm, grid: torch.Tensor) -> torch.Tensor:
    return norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def zeroed(grid: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return grid if keep is None else grid.masked_fill(~keep, 0)
