"""Compressors in series: y = f_k( ... f_2(f_1(x))). The classes of the parts follow below, each in a function of its name.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

What is not valid after one part is hidden from the next. `text` goes to the parts that need it, `levels` and `prior` to
the first.
"""

import torch
from torch import nn


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "chain":
            raise ValueError(f"this file holds the family 'chain', the config is of {config['family']!r}")
        self.parts = nn.ModuleList(globals()[part["family"]]()(part) for part in config["parts"])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None, **told: torch.Tensor):
        for facts, part in zip(self.config["parts"], self.parts, strict=True):
            needs = {"text", "text_valid"} if "text" in facts["needs"] else set()
            needs |= {"levels", "prior"} & set(facts["needs"])
            given = {name: value for name, value in told.items() if name in needs}
            if valid is None:
                tokens = part(tokens, **given)
            else:
                tokens, valid = part(tokens, valid, **given)
        return tokens if valid is None else (tokens, valid)
