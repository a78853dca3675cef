"""Random tokens: Q of the N tokens, the same ones for the same image in every run, then an MLP. A control.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens
    tokens = compressor(features, index=index)          # int64 [B], the images' numbers in their data set; none is 0

Kept are the Q valid tokens with the smallest hash of (seed, index, position), in raster order; with fewer valid ones the
outputs left over are not valid. The MLP's keys are those of LLaVA's mm_projector.
"""

import itertools

import torch
from torch import nn

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Sequential):
    def __init__(self, config: dict):
        if config["family"] != "random_tokens":
            raise ValueError(f"this file holds the family 'random_tokens', the config is of {config['family']!r}")
        if config["hash"] != "xorshift-multiply 0x45d9f3b":
            raise ValueError(f"this file draws by xorshift-multiply 0x45d9f3b, not {config['hash']!r}")
        widths = [config["vision_width"]] + [config["llm_width"]] * config["depth"]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[config["activation"]]()]
        super().__init__(*layers[:-1])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None, *, index: torch.Tensor | None = None):
        position = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        first = torch.zeros_like(position[:, :1]) if index is None else index[:, None].long() & 0xFFFFFFFF
        state = torch.full_like(position, 0x9E3779B9)
        for number in (torch.full_like(position, self.config["seed"]), first, position):
            state = self.mix(state ^ number)
        draw = state >> 1
        if valid is not None:
            draw = draw.masked_fill(~valid, 2**31)
        drawn = draw.argsort(dim=1, stable=True)[:, : self.config["num_queries"]]
        if valid is None:
            return super().forward(take(tokens, drawn.sort(dim=1).values))
        real = valid.gather(1, drawn)
        where = torch.where(real, drawn, drawn + tokens.shape[1]).sort(dim=1).values  # the invalid ones last
        some = where < tokens.shape[1]
        kept = take(tokens, where % tokens.shape[1]).masked_fill(~some[..., None], 0)
        return super().forward(kept).masked_fill(~some[..., None], 0), some

    @staticmethod
    def mix(x: torch.Tensor) -> torch.Tensor:
        """On 32 bits; the multiplier is below 2^31, so int64 holds every product."""
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return x ^ (x >> 16)


def take(tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """[B, N, C] at the positions [B, Q]."""
    return tokens.gather(1, where[..., None].expand(-1, -1, tokens.shape[2]))
