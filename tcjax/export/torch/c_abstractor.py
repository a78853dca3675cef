"""C-Abstractor: RegNet blocks, adaptive average pooling to h x w, RegNet blocks, an MLP. Keys are Honeybee's.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], Q = h * w
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. Published checkpoints have the same keys behind "abstractor.". With a mask every convolution
reads 0 in place of invalid tokens and means are over valid ones; a bin without any is not valid.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "c_abstractor":
            raise ValueError(f"this file holds the family 'c_abstractor', the config is of {config['family']!r}")
        if config["order"] != "blocks, pool, blocks, mlp":
            raise ValueError(f"this file pools between its blocks; the config says {config['order']!r}")
        vision, hidden, llm = config["vision_width"], config["hidden"], config["llm_width"]
        rows, columns = config["grid"]
        if config["prenorm"]:
            self.prenorm = nn.LayerNorm(vision, eps=config["prenorm_eps"])
        if config["pos_emb"]:
            self.pos_emb = nn.Parameter(torch.randn(1, rows * columns, vision))
        if config["depth"]:
            self.net = nn.ModuleList([Stage(config, vision), nn.Identity(), Stage(config, hidden)])
        readout = [nn.Linear(hidden if config["depth"] else vision, llm)]
        for _ in range(1, config["mlp_depth"]):
            readout += [ACTIVATIONS[config["activation"]](), nn.Linear(llm, llm)]
        self.readout = nn.Sequential(*readout)
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
        if self.config["prenorm"]:
            tokens = self.prenorm(tokens)
        if self.config["pos_emb"]:
            tokens = tokens + self.pos_emb
        grid = tokens.transpose(1, 2).unflatten(2, tuple(self.config["grid"]))
        keep = None if valid is None else valid.unflatten(1, tuple(self.config["grid"]))[:, None]
        if self.config["depth"]:
            grid = self.net[0](grid, keep)
        grid, keep = self.pool(grid, keep)
        if self.config["depth"]:
            grid = self.net[2](grid, keep)
        out = self.readout(grid.flatten(2).transpose(1, 2))
        if keep is None:
            return out
        some = keep.flatten(1)
        return out.masked_fill(~some[..., None], 0), some

    def pool(self, grid: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, C, H, W] -> [B, C, h, w]; bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1."""
        pooled = tuple(self.config["pooled"])
        if keep is None:
            return functional.adaptive_avg_pool2d(grid, pooled), None
        share = functional.adaptive_avg_pool2d(keep.to(grid.dtype), pooled)
        some = share > 0
        return functional.adaptive_avg_pool2d(grid.masked_fill(~keep, 0), pooled) / share.where(some, 1), some


class Stage(nn.Module):
    def __init__(self, config: dict, width: int):
        super().__init__()
        for k in range(config["depth"]):
            squeezed = config["squeezed"][0 if k == 0 and width == config["vision_width"] else 1]
            self.add_module(f"b{k + 1}", Block(config, width if k == 0 else config["hidden"], squeezed))

    def forward(self, grid: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        for block in self.children():
            grid = block(grid, keep)
        return grid


class Block(nn.Module):
    """RegNet's bottleneck with groups of one channel: 1 x 1, 3 x 3 depthwise, squeeze and excitation, 1 x 1."""

    def __init__(self, config: dict, width: int, squeezed: int):
        super().__init__()
        hidden, eps = config["hidden"], config["norm_eps"]
        self.act = ACTIVATIONS[config["activation"]]()
        self.conv1 = ConvNorm(nn.Conv2d(width, hidden, 1, bias=False), eps)
        self.conv2 = ConvNorm(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), eps)
        self.se = nn.ModuleDict({"fc1": nn.Conv2d(hidden, squeezed, 1), "fc2": nn.Conv2d(squeezed, hidden, 1)})
        self.conv3 = ConvNorm(nn.Conv2d(hidden, hidden, 1, bias=False), eps)
        self.downsample = nn.Identity()
        if width != hidden:
            self.downsample = ConvNorm(nn.Conv2d(width, hidden, 1, bias=False), eps)

    def forward(self, grid: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        inner = self.act(self.conv1(grid))
        if keep is not None:
            inner = inner.masked_fill(~keep, 0)
        inner = self.act(self.conv2(inner))
        if keep is None:
            mean = inner.mean((2, 3), keepdim=True)
        else:
            places = keep.sum((2, 3), keepdim=True).clamp(min=1)
            mean = inner.masked_fill(~keep, 0).sum((2, 3), keepdim=True) / places
        gate = self.se["fc2"](self.act(self.se["fc1"](mean))).sigmoid()
        return self.act(self.downsample(grid) + self.conv3(inner * gate))


class ConvNorm(nn.Module):
    """A convolution and a LayerNorm over the channels of each place."""

    def __init__(self, conv: nn.Conv2d, eps: float):
        super().__init__()
        self.conv = conv
        self.bn = nn.LayerNorm(conv.out_channels, eps=eps)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(grid).movedim(1, -1)).movedim(-1, 1)
