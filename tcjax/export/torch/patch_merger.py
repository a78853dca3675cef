"""Patch merger: every token is normed, s x s neighbours side by side form one wide token, linear layers follow.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row, and so are the outputs; Q = N / s^2. Keys are those of the form that the config names: the
mergers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose own modules take blocks that are consecutive already and lay channels
in the order (row, column, channel), and Mistral 3's, in the order (channel, row, column). All have equal shapes.
Invalid tokens enter as 0, also behind the norm; an output is valid if any of its tokens is.
"""

import torch
from torch import nn

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}
LINEARS = {
    "qwen2_vl": None,  # mlp.0 and mlp.2
    "qwen2_5_vl": None,
    "qwen3_vl": ("linear_fc1", "linear_fc2"),
    "qwen3_vl_deepstack": ("linear_fc1", "linear_fc2"),
    "mistral3": ("linear_1", "linear_2"),
}
ORDERS = {"row, column, channel": (0, 1, 3, 2, 4, 5), "channel, row, column": (0, 1, 3, 5, 2, 4)}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "patch_merger":
            raise ValueError(f"this file holds the family 'patch_merger', the config is of {config['family']!r}")
        for field, known in (
            ("form", LINEARS),
            ("channel_order", ORDERS),
            ("norm", ("layer", "rms")),
            ("norm_place", ("token", "wide token")),
        ):
            if config[field] not in known:
                raise ValueError(f"{field} is one of {list(known)}, not {config[field]!r}")
        token, out, bias = config["vision_width"], config["llm_width"], config["bias"]
        wide = token * config["factor"] ** 2
        inner = (token, out, out) if config["merging_layer"] else (wide, wide, out)
        norm = (nn.LayerNorm if config["norm"] == "layer" else RMSNorm)(
            token if config["norm_place"] == "token" else wide, eps=config["norm_eps"]
        )
        first, last = nn.Linear(inner[0], inner[1], bias=bias), nn.Linear(inner[1], inner[2], bias=bias)
        self.activation = ACTIVATIONS[config["activation"]]()
        self.config = config
        if LINEARS[config["form"]] is None:
            self.ln_q = norm
            self.mlp = nn.Sequential(first, self.activation, last)
        else:
            self.norm = norm
            for name, linear in zip(LINEARS[config["form"]], (first, last), strict=True):
                self.add_module(name, linear)
        if config["merging_layer"]:
            self.patch_merger = nn.ModuleDict({"merging_layer": nn.Linear(wide, token, bias=False)})

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if valid is None:
            return self.project(self.merge(self.normed(tokens, "token")))
        keep = valid[..., None]
        some = self.merge(keep).any(-1)
        tokens = self.normed(tokens.masked_fill(~keep, 0), "token").masked_fill(~keep, 0)
        return self.project(self.merge(tokens)).masked_fill(~some[..., None], 0), some

    def normed(self, tokens: torch.Tensor, place: str) -> torch.Tensor:
        """The tokens normed if this is the place for it."""
        if self.config["norm_place"] != place:
            return tokens
        return (self.ln_q if LINEARS[self.config["form"]] is None else self.norm)(tokens)

    def merge(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, N / s^2, s * s * C]."""
        (rows, columns), s = self.config["grid"], self.config["factor"]
        split = tokens.reshape(tokens.shape[0], rows // s, s, columns // s, s, tokens.shape[-1])
        return split.permute(ORDERS[self.config["channel_order"]]).flatten(3, 5).flatten(1, 2)

    def project(self, wide: torch.Tensor) -> torch.Tensor:
        wide = self.normed(wide, "wide token")
        if self.config["merging_layer"]:
            wide = self.patch_merger["merging_layer"](wide)
        names = LINEARS[self.config["form"]]
        if names is None:
            return self.mlp(wide)
        return self.get_submodule(names[1])(self.activation(self.get_submodule(names[0])(wide)))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)
