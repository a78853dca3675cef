"""Learned merge: an importance network keeps Q of N tokens, a merger network adds what the dropped ones say.

    s = importance(x)                                         [B, N]; the Q highest stay, in their old order
    p = sigmoid(s / T + tau), sum p = Q                       tau by bisection
    a(n) = argmax_j e_n . e_j over the kept j                 e = unit(metric x); each dropped n goes to one kept j
    y_j = x_j + back(sum_n p_n h_n / (1 + sum_n p_n)),  h_n = gelu(kept x_j + dropped x_n)      over the n that go to j
    out = W gelu(W y)

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], any N
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens
    ... compressor(features, valid, text, text_valid, prior)      # of what the config's `needs` names

Equal scores: the earlier token stays. Fewer valid tokens than Q: the surplus outputs, at the end, are 0 and not valid.
With `literal` each dropped token, one after another, overwrites the kept token it is most like by an MLP of both.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}
EPS = 1e-6


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "learned_merge":
            raise ValueError(f"this file holds the family 'learned_merge', the config is of {config['family']!r}")
        width, out = config["vision_width"], config["llm_width"]
        activation = ACTIVATIONS[config["activation"]]
        if config["literal"]:
            hidden = config["scorer"]
            self.importance_network = nn.Sequential(
                nn.Linear(width, hidden), activation(), nn.Linear(hidden, 1), nn.Sigmoid()
            )
            self.merger_network = nn.Sequential(nn.Linear(2 * width, width), activation(), nn.Linear(width, width))
        else:
            self.importance_network = Importance(config)
            self.merger_network = Merger(config)
            self.metric = nn.Linear(width, config["metric"], bias=False)
        self.out = nn.Sequential(nn.Linear(width, out), activation(), nn.Linear(out, out))
        self.config = config

    def forward(
        self,
        tokens: torch.Tensor,
        valid: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_valid: torch.Tensor | None = None,
        prior: torch.Tensor | None = None,
    ):
        number, queries = tokens.shape[1], self.config["num_queries"]
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid
        tokens = tokens.masked_fill(~real[..., None], 0)
        if self.config["literal"]:
            scores = self.importance_network(tokens)[..., 0]
        else:
            scores = self.importance_network(tokens, real, text, text_valid, prior)
        index = top_indices(scores, real, queries)
        slot = index < number
        here = index[:, :, None] == torch.arange(number, device=tokens.device)  # [B, Q, N]: slot q keeps token n
        lost = real & ~here.any(1)
        index = index.clamp(max=number - 1)
        kept = tokens.take_along_dim(index[..., None], dim=1)
        if self.config["literal"]:
            kept = self.overwrite(kept, slot, tokens, lost)
        else:
            mass = soft_top_k(scores / self.config["temperature"], real, queries) * lost
            kept = kept + self.merge(kept, index, slot, tokens, mass)
        out = self.out(kept).masked_fill(~slot[..., None], 0)
        return out if valid is None else (out, slot)

    def merge(
        self, kept: torch.Tensor, index: torch.Tensor, slot: torch.Tensor, tokens: torch.Tensor, mass: torch.Tensor
    ) -> torch.Tensor:
        """What the kept tokens change by; mass [B, N] is 0 for them."""
        metric = self.metric(tokens)
        metric = metric * torch.rsqrt(metric.square().sum(-1, keepdim=True) + EPS**2)
        alike = metric @ metric.take_along_dim(index[..., None], dim=1).transpose(1, 2)
        goes = first_largest(alike.masked_fill(~slot[:, None], -2))
        hidden = self.merger_network(kept, tokens, goes)
        weights = functional.one_hot(goes, kept.shape[1]).to(tokens.dtype) * mass[..., None]  # [B, N, Q]
        mean = weights.transpose(1, 2) @ hidden / (1 + weights.sum(1)[..., None])
        return self.merger_network.get_submodule("back")(mean)

    def overwrite(self, kept: torch.Tensor, slot: torch.Tensor, tokens: torch.Tensor, lost: torch.Tensor):
        """One dropped token after another: an MLP of both takes the place of the kept token it is most like."""
        slots = torch.arange(kept.shape[1], device=kept.device)
        for token, is_lost in zip(tokens.unbind(1), lost.unbind(1), strict=True):
            alike = functional.cosine_similarity(kept, token[:, None], dim=-1)
            goes = first_largest(alike.masked_fill(~slot, -2))[:, None]
            pair = torch.cat([kept.take_along_dim(goes[..., None], dim=1)[:, 0], token], dim=-1)
            hit = (slots == goes) & is_lost[:, None]
            kept = torch.where(hit[..., None], self.merger_network(pair)[:, None], kept)
        return kept


class Importance(nn.Module):
    """Scores [B, N]: of the token, of all tokens together, of the text and of scores from elsewhere."""

    def __init__(self, config: dict):
        super().__init__()
        width, hidden, eps = config["vision_width"], config["scorer"], config["norm_eps"]
        self.norm = nn.LayerNorm(width, eps=eps)
        self.local = nn.Linear(width, hidden)
        self.mixed = nn.Linear(hidden, hidden)
        self.overall = nn.Linear(hidden, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.activation = ACTIVATIONS[config["activation"]]()
        if config["text"]:
            self.text_norm = nn.LayerNorm(config["text_width"], eps=eps)
            self.token_key = nn.Linear(width, config["metric"], bias=False)
            self.text_query = nn.Linear(config["text_width"], config["metric"], bias=False)
        if config["prior"]:
            self.trust = nn.Parameter(torch.ones(1))
        self.config = config

    def forward(self, tokens, valid, text, text_valid, prior) -> torch.Tensor:
        normed = self.norm(tokens)
        local = self.activation(self.local(normed))
        overall = self.overall(masked_mean(local, valid))
        scores = self.score(self.activation(self.mixed(local) + overall[:, None]))[..., 0]
        if self.config["text"]:
            if text is None:
                raise ValueError("this compressor is conditioned on the question: hand over text, [B, T, text_width]")
            if text_valid is None:
                text_valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            query = self.text_query(self.text_norm(masked_mean(text, text_valid)))
            query = query.masked_fill(~text_valid.any(-1, keepdim=True), 0)
            scores = scores + (self.token_key(normed) @ query[..., None])[..., 0] * query.shape[-1] ** -0.5
        if self.config["prior"]:
            if prior is None:
                raise ValueError("this compressor starts from scores of the tokens: hand over prior, [B, N]")
            log = torch.log(prior.masked_fill(~valid, 0) + EPS)[..., None]
            log = log - masked_mean(log, valid)[:, None]
            scores = scores + self.trust * (log * torch.rsqrt(masked_mean(log**2, valid) + EPS)[:, None])[..., 0]
        return scores


class Merger(nn.Module):
    """gelu(kept x_j + dropped x_n) for each n with its own j; `back` follows behind the sum over n."""

    def __init__(self, config: dict):
        super().__init__()
        width, hidden = config["vision_width"], config["merger"]
        self.kept = nn.Linear(width, hidden)
        self.dropped = nn.Linear(width, hidden, bias=False)
        self.back = nn.Linear(hidden, width, bias=False)
        self.activation = ACTIVATIONS[config["activation"]]()

    def forward(self, kept: torch.Tensor, tokens: torch.Tensor, goes: torch.Tensor) -> torch.Tensor:
        return self.activation(self.kept(kept).take_along_dim(goes[..., None], dim=1) + self.dropped(tokens))


def top_indices(scores: torch.Tensor, valid: torch.Tensor, number: int) -> torch.Tensor:
    """Where the best valid tokens are, ascending, then N for the slots that are left; equal scores: the earlier."""
    length = scores.shape[1]
    best = scores.masked_fill(~valid, float("-inf")).argsort(dim=-1, descending=True, stable=True)[:, :number]
    best = functional.pad(best, (0, number - best.shape[1]))
    rank = torch.arange(number, device=scores.device)
    return best.masked_fill(rank >= valid.sum(-1, keepdim=True), length).sort(dim=-1).values


def soft_top_k(logits: torch.Tensor, valid: torch.Tensor, number: int) -> torch.Tensor:
    """Shares in (0, 1) of the valid tokens that sum to `number`, or to 1e-3 less than there are."""
    count = valid.sum(-1, keepdim=True)
    margin, wanted = 10 + count.clamp(min=1).log(), (count - 1e-3).clamp(max=number)
    low = -logits.masked_fill(~valid, -1e9).amax(-1, keepdim=True) - margin
    high = -logits.masked_fill(~valid, 1e9).amin(-1, keepdim=True) + margin
    for _ in range(48):
        middle = (low + high) / 2
        too_much = (torch.sigmoid(logits + middle) * valid).sum(-1, keepdim=True) > wanted
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
    return torch.sigmoid(logits + (low + high) / 2) * valid


def first_largest(x: torch.Tensor) -> torch.Tensor:
    """argmax over the last axis that takes the first of equals."""
    places = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    return places.masked_fill(x < x.amax(-1, keepdim=True), x.shape[-1]).amin(-1)


def masked_mean(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
