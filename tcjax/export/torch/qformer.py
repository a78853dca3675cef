"""Q-Former: learned queries, and if asked the instruction, through a small BERT that reads the image. Keys are
transformers' Blip2ForConditionalGeneration or, with text, InstructBlipForConditionalGeneration.

    h = LN([query_tokens ; text + positions])            the text only if the config says so
    h <- LN(h + W_o softmax(q k^T / sqrt(A)) v)          queries and text see each other, nobody sees padding
    z <- LN(z + W_o' softmax(q' k'^T / sqrt(A)) v')      the queries z read the image, in every `cross_every`th layer
    z <- LN(z + W_2 gelu(W_1 z))                         the text likewise, with weights of its own
    y = language_projection(z)                           the text's rows are dropped

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], any N
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens
    tokens = compressor(features, text=text, text_valid=text_valid)     # [B, T, text_width] and its bool mask [B, T]

`text` is the instruction's embeddings without positions. `text_proj` (text width to width) is ours and only there where
the two differ; everything else loads into transformers' classes as it is. Everything is float32 or all one type.
An image without any valid token has no valid output; a row whose text is all masked is the Q-Former without text.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": lambda: nn.GELU(), "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "qformer":
            raise ValueError(f"this file holds the family 'qformer', the config is of {config['family']!r}")
        orders = config["norm_order"], config["sequence_order"]
        if orders != ("after the sum", "queries, text"):
            raise ValueError(
                f"this file has its norms (after the sum) of a sequence of (queries, text); the config says {orders}"
            )
        width = config["width"]
        self.query_tokens = nn.Parameter(torch.randn(1, config["max_queries"], width))
        if config["text"] and config["text_width"] != width:
            self.text_proj = nn.Linear(config["text_width"], width)
        self.qformer = QFormer(config)
        self.language_projection = nn.Linear(width, config["llm_width"])
        self.config = config

    def forward(
        self,
        tokens: torch.Tensor,
        valid: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_valid: torch.Tensor | None = None,
    ):
        queries = self.query_tokens[:, : self.config["num_queries"]].expand(tokens.shape[0], -1, -1)
        text, text_valid = self.read(text, text_valid) if self.config["text"] else (None, None)
        some = seen = None
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
            some = valid.any(-1, keepdim=True)
            seen = (valid | ~some)[:, None, None]  # an empty image shows its zeros; a softmax needs something
        out = self.language_projection(self.qformer(queries, text, text_valid, tokens, seen))
        if some is None:
            return out
        some = some.expand(-1, out.shape[1])
        return out.masked_fill(~some[..., None], 0), some

    def read(self, text: torch.Tensor | None, text_valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The instruction in the width of the queries, and which of it is real."""
        if text is None:
            raise ValueError("this compressor is conditioned on the instruction: give text, and text_valid if padded")
        if text.shape[1] > self.config["max_text"]:
            raise ValueError(f"the text has {text.shape[1]} positions, at most {self.config['max_text']} can be read")
        if text_valid is None:
            text_valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        text = text.masked_fill(~text_valid[..., None], 0)
        return (self.text_proj(text) if self.config["text_width"] != self.config["width"] else text), text_valid


class QFormer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["text"]:
            self.embeddings = Embeddings(config)
        else:
            self.layernorm = nn.LayerNorm(config["width"], eps=config["norm_eps"])
        self.encoder = Encoder(config)

    def forward(self, queries, text, text_valid, tokens, seen) -> torch.Tensor:
        known = None
        if text is None:
            hidden = self.layernorm(queries)
        else:
            hidden = self.embeddings(queries, text)
            everyone = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
            known = torch.cat([everyone, text_valid], dim=1)[:, None, None]
        for layer in self.encoder.layer:
            hidden = layer(hidden, known, tokens, seen, queries.shape[1])
        return hidden[:, : queries.shape[1]]


class Embeddings(nn.Module):
    """Positions for the text, one norm over queries and text."""

    def __init__(self, config: dict):
        super().__init__()
        self.position_embeddings = nn.Embedding(config["max_text"], config["width"])
        self.layernorm = nn.LayerNorm(config["width"], eps=config["norm_eps"])

    def forward(self, queries: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        text = text + self.position_embeddings.weight[: text.shape[1]]
        return self.layernorm(torch.cat([queries, text], dim=1))


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        every = config["cross_every"]
        self.layer = nn.ModuleList(Layer(config, crosses=i % every == 0) for i in range(config["depth"]))


class Layer(nn.Module):
    def __init__(self, config: dict, crosses: bool):
        super().__init__()
        self.attention = Attention(config, config["width"])
        self.crossattention = Attention(config, config["vision_width"]) if crosses else None
        if config["text"]:
            self.intermediate, self.output = Intermediate(config), Output(config, config["feed_forward"])
        self.intermediate_query, self.output_query = Intermediate(config), Output(config, config["feed_forward"])
        self.has_text = config["text"]

    def forward(self, hidden, known, tokens, seen, num_queries: int) -> torch.Tensor:
        hidden = self.attention(hidden, hidden, known)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if self.crossattention is not None:
            queries = self.crossattention(queries, tokens, seen)
        queries = self.output_query(self.intermediate_query(queries), queries)
        if not self.has_text:
            return queries
        return torch.cat([queries, self.output(self.intermediate(text), text)], dim=1)


class Attention(nn.Module):
    """What x reads from a source, added to x and normed."""

    def __init__(self, config: dict, source_width: int):
        super().__init__()
        self.attention = Projections(config["width"], source_width)
        self.output = Output(config, config["width"])
        self.heads = config["heads"]

    def forward(self, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        projections = self.attention
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (projections.query(x), projections.key(source), projections.value(source))
        )
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(read.transpose(1, 2).flatten(2), x)


class Projections(nn.Module):
    def __init__(self, width: int, source_width: int):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class Intermediate(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.dense = nn.Linear(config["width"], config["feed_forward"])
        self.activation = ACTIVATIONS[config["activation"]]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(x))


class Output(nn.Module):
    """A linear layer, the sum with what came before, and the norm of that."""

    def __init__(self, config: dict, num_in: int):
        super().__init__()
        self.dense = nn.Linear(num_in, config["width"])
        self.LayerNorm = nn.LayerNorm(config["width"], eps=config["norm_eps"])

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + before)
