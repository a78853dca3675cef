"""One compressor for every frame of a video: y = [f(x_1) ; ... ; f(x_F)]. The class of f follows below.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, F * N, vision_width] -> [B, F * q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, F * N], True for real tokens

The tokens of the frames follow one another. Every frame hears the whole `text`.
"""

import torch
from torch import nn


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "per_frame":
            raise ValueError(f"this file holds the family 'per_frame', the config is of {config['family']!r}")
        (each,) = config["parts"]
        self.each = globals()[each["family"]]()(each)
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None, **told: torch.Tensor):
        batch, frames = tokens.shape[0], self.config["frames"]
        given = {}
        for name, value in told.items():
            by_image = name in ("text", "text_valid")
            given[name] = value.repeat_interleave(frames, 0) if by_image else self.apart(value, frames)
        if valid is None:
            return self.each(self.apart(tokens, frames), **given).reshape(batch, -1, self.config["llm_width"])
        out, some = self.each(self.apart(tokens, frames), self.apart(valid, frames), **given)
        return out.reshape(batch, -1, self.config["llm_width"]), some.reshape(batch, -1)

    def apart(self, per_token: torch.Tensor, frames: int) -> torch.Tensor:
        """[B, F * n, ...] -> [B * F, n, ...]"""
        return per_token.unflatten(1, (frames, -1)).flatten(0, 1)
