"""QueCC: each cell of the grid becomes one token, steered by the question. Keys are llava-token-compression's.

    x <- x + text_projection(t);  q = q_downsample(q_proj(x)),  k = k_proj(l),  v = v_proj(l)
    y = mlp(clip_attn(q, k, v))                each query attends to its own s x s cell; l = its tokens in `levels`

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features, text=text, levels=levels)  # [B, N, C], [B, T, text_width], [B, N, levels * C]
    tokens, valid = compressor(features, valid, text, text_valid, levels)

N is the grid, row by row; `levels` has the tower's hidden states of `layers` (the number of blocks behind each) side
by side. `text` are embeddings of the instruction, of which `text_pool` takes the mean or the last; bool masks are True
for real tokens, and a row without text adds nothing. With a mask a cell reads its valid tokens, the convolution reads 0
for the others, and a cell without a valid token is not a valid output.
"""

import torch
from torch import nn

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Sequential):
    """The module, then LLaVA's projector."""

    def __init__(self, config: dict):
        if config["family"] != "quecc":
            raise ValueError(f"this file holds the family 'quecc', the config is of {config['family']!r}")
        if config["cell_order"] != "row by row":
            raise ValueError(f"this file cuts cells row by row; the config says {config['cell_order']!r}")
        if config["text_pool"] not in ("mean", "last"):
            raise ValueError(f"text_pool is 'mean' or 'last', not {config['text_pool']!r}")
        width, out = config["vision_width"], config["llm_width"]
        super().__init__(Cells(config), nn.Linear(width, out), ACTIVATIONS[config["activation"]](), nn.Linear(out, out))
        self.config = config

    def forward(
        self,
        tokens: torch.Tensor,
        valid: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_valid: torch.Tensor | None = None,
        levels: torch.Tensor | None = None,
    ):
        if text is None or levels is None:
            raise ValueError(
                f"this compressor reads the question and {self.config['levels']} earlier layers of the tower: "
                f"text=..., levels=..."
            )
        if text_valid is None:
            text_valid = torch.ones_like(text[..., 0], dtype=torch.bool)
        read, some = self[0](tokens, valid, text, text_valid, levels)
        out = self[3](self[2](self[1](read)))
        return out if some is None else (out.masked_fill(~some[..., None], 0), some)


class Cells(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width, s, eps = config["vision_width"], config["factor"], config["norm_eps"]
        activation = ACTIVATIONS[config["activation"]]

        def projection(wide: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(wide, width), activation(), nn.Linear(width, width), nn.LayerNorm(width, eps=eps)
            )

        self.clip_attn = nn.MultiheadAttention(width, config["heads"], batch_first=True)
        self.q_proj = projection(width)
        self.k_proj = projection(config["levels"] * width)
        self.v_proj = projection(config["levels"] * width)
        self.q_downsample = nn.Conv2d(width, width, kernel_size=s, stride=s, groups=width)
        self.text_projection = nn.Sequential(nn.Linear(config["text_width"], width), nn.LayerNorm(width, eps=eps))
        self.config = config

    def forward(
        self,
        tokens: torch.Tensor,
        valid: torch.Tensor | None,
        text: torch.Tensor,
        text_valid: torch.Tensor,
        levels: torch.Tensor,
    ):
        ignored = some = None
        if valid is not None:
            tokens, levels = (x.masked_fill(~valid[..., None], 0) for x in (tokens, levels))
            seen = self.cells(valid[..., None])[..., 0]
            some = seen.any(-1, keepdim=True)
            ignored = ~seen & some  # a cell without any reads its zeros, and its output is not valid
            some = some[:, 0].unflatten(0, (tokens.shape[0], -1))
        query = self.q_proj(tokens + self.asked(text, text_valid)[:, None])
        if valid is not None:
            query = query.masked_fill(~valid[..., None], 0)
        query = self.q_downsample(query.transpose(1, 2).unflatten(2, tuple(self.config["grid"])))
        query = query.flatten(2).transpose(1, 2).flatten(0, 1)[:, None]
        key, value = self.cells(self.k_proj(levels)), self.cells(self.v_proj(levels))
        read, _ = self.clip_attn(query, key, value, key_padding_mask=ignored, need_weights=False)
        return read.unflatten(0, (tokens.shape[0], -1))[:, :, 0], some

    def asked(self, text: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """[B, T, text_width] -> [B, C]: what the question adds to every visual token."""
        count = valid.sum(1, keepdim=True)
        text = text.masked_fill(~valid[..., None], 0)
        if self.config["text_pool"] == "mean":
            vector = text.sum(1) / count.clamp(min=1)
        else:
            is_last = valid & (valid.cumsum(1) == count)
            vector = text.masked_fill(~is_last[..., None], 0).sum(1)
        return self.text_projection(vector).masked_fill(count == 0, 0)

    def cells(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B * Q, M, C]: the tokens of each cell, row by row."""
        (rows, columns), s = self.config["grid"], self.config["factor"]
        split = x.reshape(x.shape[0], rows // s, s, columns // s, s, x.shape[-1])
        return split.transpose(2, 3).flatten(3, 4).flatten(0, 2)
