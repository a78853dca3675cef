"""Decoder resampler: learned queries through torch's own TransformerDecoder layers, with the image as their memory.

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], any N
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

No dropout. `out_proj` follows the last layer. An image without any valid token has no valid output.
"""

import torch
from torch import nn


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "decoder_resampler":
            raise ValueError(f"this file holds the family 'decoder_resampler', the config is of {config['family']!r}")
        if config["norm_order"] != "behind the sums":
            raise ValueError(f"this file norms behind the sums; the config says {config['norm_order']!r}")
        width = config["vision_width"]
        self.queries = nn.Parameter(torch.randn(config["max_queries"], width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                config["heads"],
                config["feed_forward"],
                dropout=0.0,
                activation=config["activation"],
                layer_norm_eps=config["norm_eps"],
                batch_first=True,
            )
            for _ in range(config["depth"])
        )
        self.out_proj = nn.Linear(width, config["llm_width"])
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        hidden = some = None
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
            some = valid.any(-1, keepdim=True)
            hidden = ~(valid | ~some)
        queries = self.queries[: self.config["num_queries"]].expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens, memory_key_padding_mask=hidden)
        out = self.out_proj(queries)
        if some is None:
            return out
        some = some.expand(-1, out.shape[1])
        return out.masked_fill(~some[..., None], 0), some
