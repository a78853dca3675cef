"""Pixel shuffle: s x s neighbours side by side form one wide token, then a projection.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], Q = N / s^2
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. Channels of the wide token run (row, column, channel), channel fastest; torch's own
PixelUnshuffle has the channel slowest, with equal shapes. Invalid tokens enter as 0; an output is valid if any of its
tokens is. Head "linear" has the keys of Idefics3's connector, head "mlp" those of InternVL's mlp1. The outputs come row
by row, or column by column as from InternVL's first version (ps_version "v1").
"""

import torch
from torch import nn

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "pixel_shuffle":
            raise ValueError(f"this file holds the family 'pixel_shuffle', the config is of {config['family']!r}")
        if config["channel_order"] != "row, column, channel":
            raise ValueError(f"this file merges in the order row, column, channel, not {config['channel_order']!r}")
        if config["output_order"] not in ("row by row", "column by column"):
            raise ValueError(f"this file emits row by row or column by column, not {config['output_order']!r}")
        wide, out = config["vision_width"] * config["factor"] ** 2, config["llm_width"]
        if config["head"] == "linear":
            self.modality_projection = nn.ModuleDict({"proj": nn.Linear(wide, out, bias=False)})
        elif config["head"] == "mlp":
            norm = nn.LayerNorm(wide, eps=config["norm_eps"])
            activation = ACTIVATIONS[config["activation"]]()
            self.mlp1 = nn.Sequential(norm, nn.Linear(wide, out), activation, nn.Linear(out, out))
        else:
            raise ValueError(f"head is 'linear' or 'mlp', not {config['head']!r}")
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        head = self.modality_projection["proj"] if self.config["head"] == "linear" else self.mlp1
        if valid is None:
            return head(self.merge(tokens))
        some = self.merge(valid[..., None]).any(-1)
        tokens = head(self.merge(tokens.masked_fill(~valid[..., None], 0)))
        return tokens.masked_fill(~some[..., None], 0), some

    def merge(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, N / s^2, s * s * C]."""
        (rows, columns), s = self.config["grid"], self.config["factor"]
        split = tokens.reshape(tokens.shape[0], rows // s, s, columns // s, s, tokens.shape[-1])
        blocks = (1, 3) if self.config["output_order"] == "row by row" else (3, 1)
        return split.permute(0, *blocks, 2, 4, 5).flatten(3, 5).flatten(1, 2)
