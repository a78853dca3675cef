"""TokenLearner v1.1: an MLP on each token draws Q maps over the image; each map takes its mean of the tokens.

    y_q = sum_n softmax_n(W_2 gelu(W_1 LN(x_n) + b))_q x_n,  out = W gelu(W y)

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], any N
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

Names are scenic's Flax parameters. Its second bias is left out: the softmax over the image cancels it. An image without
any valid token has no valid output.
"""

import torch
from torch import nn

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "token_learner":
            raise ValueError(f"this file holds the family 'token_learner', the config is of {config['family']!r}")
        width, hidden, out = config["vision_width"], config["hidden"], config["llm_width"]
        self.LayerNorm_0 = nn.LayerNorm(width, eps=config["norm_eps"])
        self.token_masking = nn.ModuleDict(
            {"Dense_0": nn.Linear(width, hidden), "Dense_1": nn.Linear(hidden, config["num_queries"], bias=False)}
        )
        self.activation = ACTIVATIONS[config["activation"]]()
        self.out = nn.Sequential(nn.Linear(width, out), ACTIVATIONS[config["out_activation"]](), nn.Linear(out, out))

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
        hidden = self.activation(self.token_masking["Dense_0"](self.LayerNorm_0(tokens)))
        maps = self.token_masking["Dense_1"](hidden)
        if valid is None:
            return self.out(maps.softmax(dim=1).transpose(1, 2) @ tokens)
        maps = maps.masked_fill(~valid[..., None], -1e30)
        some = valid.any(-1, keepdim=True).expand(-1, maps.shape[-1])
        return self.out(maps.softmax(dim=1).transpose(1, 2) @ tokens).masked_fill(~some[..., None], 0), some
