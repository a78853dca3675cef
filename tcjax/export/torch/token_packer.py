"""TokenPacker: each cell of the grid becomes one token, read from earlier layers of the tower. Keys are TokenPacker's.

    q = ln_q_1(q_proj_1(x0)), k = ln_k_1(k_proj_1(l)), v = ln_v_1(v_proj_1(l))      l = the cell's tokens in `levels`
    y = mlp(clip_attn(q, k, v))                       x0 = the features downsampled bilinearly, not antialiased

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features, levels=levels)            # [B, N, C] and [B, N, levels * C] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid, levels)     # with a bool mask [B, N], True for real tokens

N is the grid, row by row; `levels` has the tower's hidden states of `layers` (the number of blocks behind each) side
by side. With a mask a cell reads its valid tokens, x0 is the bilinear mean over those of its tokens that are valid (of
all the cell's valid tokens where it has none), and a cell without a valid token is not a valid output.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "token_packer":
            raise ValueError(f"this file holds the family 'token_packer', the config is of {config['family']!r}")
        ways = config["query"], config["cell_order"]
        if ways != ("bilinear, not antialiased", "row by row"):
            raise ValueError(f"this file downsamples bilinearly, not antialiased, row by row; the config says {ways}")
        width, out, eps = config["vision_width"], config["llm_width"], config["norm_eps"]
        activation = ACTIVATIONS[config["activation"]]

        def two_layers(wide: int, narrow: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(wide, narrow), activation(), nn.Linear(narrow, narrow))

        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1 = two_layers(config["levels"] * width, width)
        self.v_proj_1 = two_layers(config["levels"] * width, width)
        self.ln_q_1 = nn.LayerNorm(width, eps=eps)
        self.ln_k_1 = nn.LayerNorm(width, eps=eps)
        self.ln_v_1 = nn.LayerNorm(width, eps=eps)
        self.clip_attn = nn.MultiheadAttention(width, config["heads"], batch_first=True)
        self.mlp = two_layers(width, out)
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None, levels: torch.Tensor | None = None):
        if levels is None:
            raise ValueError(f"this compressor reads {self.config['levels']} earlier layers of the tower: levels=...")
        ignored = some = None
        if valid is not None:
            tokens, levels = (x.masked_fill(~valid[..., None], 0) for x in (tokens, levels))
            seen = self.cells(valid[..., None])[..., 0]
            some = seen.any(-1, keepdim=True)
            ignored = ~seen & some  # a cell without any reads its zeros, and its output is not valid
        query = self.ln_q_1(self.q_proj_1(self.downsampled(tokens, valid)))
        key = self.cells(self.ln_k_1(self.k_proj_1(levels)))
        value = self.cells(self.ln_v_1(self.v_proj_1(levels)))
        read, _ = self.clip_attn(query.flatten(0, 1)[:, None], key, value, key_padding_mask=ignored, need_weights=False)
        out = self.mlp(read.unflatten(0, (tokens.shape[0], -1))[:, :, 0])
        if some is None:
            return out
        some = some.unflatten(0, (tokens.shape[0], -1))
        return out.masked_fill(~some, 0), some[..., 0]

    def cells(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B * Q, M, C]: the tokens of each cell, row by row."""
        (rows, columns), (height, width) = self.config["grid"], self.config["cells"]
        split = x.reshape(x.shape[0], height, rows // height, width, columns // width, x.shape[-1])
        return split.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def downsampled(self, tokens: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """[B, N, C] -> [B, Q, C], in float32 as published."""
        size = tuple(self.config["cells"])

        def grid(x: torch.Tensor) -> torch.Tensor:
            return x.float().transpose(1, 2).unflatten(2, tuple(self.config["grid"]))

        def bilinear(x: torch.Tensor) -> torch.Tensor:
            return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)

        if valid is None:
            small = bilinear(grid(tokens))
        else:
            features, keep = grid(tokens), grid(valid[..., None])
            mass, all_mass = bilinear(keep), functional.adaptive_avg_pool2d(keep, size)
            mean = functional.adaptive_avg_pool2d(features, size) / all_mass.where(all_mass > 0, 1)
            small = torch.where(mass > 0, bilinear(features) / mass.where(mass > 0, 1), mean)
        return small.flatten(2).transpose(1, 2).to(tokens.dtype)
