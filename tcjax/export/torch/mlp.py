"""MLP projector: every visual token becomes one LLM token, y = W_2 gelu(W_1 x). Keys are those of LLaVA's mm_projector.

compressor = Compressor(json.load(open("compressor_config.json")))
compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], here Q = N
tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens
"""

import itertools

import torch
from torch import nn

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Sequential):
    def __init__(self, config: dict):
        if config["family"] != "mlp":
            raise ValueError(f"this file holds the family 'mlp', the config is of {config['family']!r}")
        widths = [config["vision_width"]] + [config["llm_width"]] * config["depth"]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[config["activation"]]()]
        super().__init__(*layers[:-1])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if valid is None:
            return super().forward(tokens)
        tokens = super().forward(tokens.masked_fill(~valid[..., None], 0))
        return tokens.masked_fill(~valid[..., None], 0), valid
