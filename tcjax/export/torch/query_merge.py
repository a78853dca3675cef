"""Query merge: tokens go to learned slots in shares, and count in them as much as they matter to the question.

    r_n = relevance of token n to the mean of the instruction's embeddings; 0 for all n where there is no instruction
    w_qn ~ softmax_q(slots_q . slot_key LN(x_n) / sqrt(inner)) exp(r_n),  summing to 1 over n
    out = W gelu(W (sum_n w_qn x_n))

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features, text=embeddings)      # [B, N, vision_width], [B, T, text_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid, embeddings, text_valid)   # bool masks [B, N], [B, T], True for real

Any N, any T. A text_valid that is all False is the null text: every token is equally relevant. An image without any
valid token has no valid output.
"""

import torch
from torch import nn

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "query_merge":
            raise ValueError(f"this file holds the family 'query_merge', the config is of {config['family']!r}")
        width, inner, out = config["vision_width"], config["inner"], config["llm_width"]
        self.slots = nn.Parameter(torch.randn(config["max_queries"], inner))
        self.norm = nn.LayerNorm(width, eps=config["norm_eps"])
        self.slot_key = nn.Linear(width, inner, bias=False)
        self.relevance = LiteralRelevance(config) if config["literal"] else Relevance(config)
        self.out = nn.Sequential(nn.Linear(width, out), ACTIVATIONS[config["activation"]](), nn.Linear(out, out))
        self.config = config

    def forward(
        self,
        tokens: torch.Tensor,
        valid: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_valid: torch.Tensor | None = None,
    ):
        if text is None:
            raise ValueError("this compressor is conditioned on the question: hand over text, [B, T, text_width]")
        if text_valid is None:
            text_valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
        count = text_valid.sum(1, keepdim=True)
        text = text.masked_fill(~text_valid[..., None], 0).sum(1) / count.clamp(min=1)
        normed = self.norm(tokens)
        relevance = self.relevance(tokens, normed, text).masked_fill(count == 0, 0)
        if valid is not None:
            relevance = relevance.masked_fill(~valid, -1e30)
        slots = self.slots[: self.config["num_queries"]]
        logits = slots @ self.slot_key(normed).transpose(1, 2) * slots.shape[-1] ** -0.5
        weights = (logits.log_softmax(dim=1) + relevance[:, None]).softmax(dim=2)
        out = self.out(weights @ tokens)
        if valid is None:
            return out
        some = valid.any(-1, keepdim=True).expand(-1, out.shape[1])
        return out.masked_fill(~some[..., None], 0), some


class Relevance(nn.Module):
    """Tokens and text in a shared learned space: [B, N, C] and [B, D] -> [B, N]."""

    def __init__(self, config: dict):
        super().__init__()
        self.norm = nn.LayerNorm(config["text_width"], eps=config["norm_eps"])
        self.key = nn.Linear(config["vision_width"], config["inner"], bias=False)
        self.query = nn.Linear(config["text_width"], config["inner"], bias=False)

    def forward(self, tokens: torch.Tensor, normed: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        query = self.query(self.norm(text))
        return (self.key(normed) @ query[..., None])[..., 0] * query.shape[-1] ** -0.5


class LiteralRelevance(nn.Module):
    """The plain product of tokens and text; a matrix only where their widths differ."""

    def __init__(self, config: dict):
        super().__init__()
        width, text = config["vision_width"], config["text_width"]
        self.query = nn.Identity() if width == text else nn.Linear(text, width, bias=False)

    def forward(self, tokens: torch.Tensor, normed: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return (tokens @ self.query(text)[..., None])[..., 0]
