"""Strided tokens: a uniform sub-lattice of the grid or simply the first Q, then an MLP. A control.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. The lattice h x w has rows floor((i + 1/2) H / h) and columns likewise. With a mask it is
stretched over the rows and columns that have a valid token, and its points that are not valid are replaced by evenly
spaced ones of the valid tokens left over; with fewer than Q valid ones the outputs left over are not valid.
The MLP's keys are those of LLaVA's mm_projector.
"""

import itertools

import torch
from torch import nn

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Sequential):
    def __init__(self, config: dict):
        if config["family"] != "stride_tokens":
            raise ValueError(f"this file holds the family 'stride_tokens', the config is of {config['family']!r}")
        if config["mode"] not in ("grid", "first"):
            raise ValueError(f"mode is 'grid' or 'first', not {config['mode']!r}")
        widths = [config["vision_width"]] + [config["llm_width"]] * config["depth"]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[config["activation"]]()]
        super().__init__(*layers[:-1])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        present = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid
        kept = present if self.config["mode"] == "first" else self.on_lattice(present)
        where = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.config["num_queries"]]
        taken = tokens.gather(1, where[..., None].expand(-1, -1, tokens.shape[2]))
        if valid is None:
            return super().forward(taken)
        some = kept.gather(1, where)
        taken = taken.masked_fill(~some[..., None], 0)
        return super().forward(taken).masked_fill(~some[..., None], 0), some

    def on_lattice(self, present: torch.Tensor) -> torch.Tensor:
        """Flags of Q of the tokens present, or of all if there are fewer."""
        height, width = self.config["lattice"]
        grid = present.unflatten(1, tuple(self.config["grid"]))
        rows = spread(grid.any(2), height, torch.full_like(present[:, 0], height, dtype=torch.long))
        columns = spread(grid.any(1), width, torch.full_like(present[:, 0], width, dtype=torch.long))
        lattice = (grid & rows[:, :, None] & columns[:, None]).flatten(1)
        return lattice | spread(present & ~lattice, height * width, height * width - lattice.sum(1))


def spread(present: torch.Tensor, count: int, wanted: torch.Tensor) -> torch.Tensor:
    """Flags of `wanted` evenly spaced ones of those present: number i is that of rank floor((2 i + 1) V / (2 wanted))."""
    part = torch.arange(count, device=present.device)
    rank = (2 * part + 1) * present.sum(1, keepdim=True) // (2 * wanted.clamp(min=1)[:, None])
    rank = rank.where(part < wanted[:, None], -1)
    own = present.long().cumsum(1) - 1
    return present & (own[:, None] == rank[..., None]).any(1)
