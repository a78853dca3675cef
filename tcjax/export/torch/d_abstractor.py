"""D-Abstractor: a grid of queries reads the image around learned reference points (Deformable DETR's decoder).

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width], Q = h * w
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. Keys are Honeybee's, whose checkpoints have them behind "abstractor."; transformers 5 calls
out_proj o_proj and fc1 mlp.fc1. With a mask the values of invalid tokens are 0; an image without a valid token has no
valid output.
"""

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "d_abstractor":
            raise ValueError(f"this file holds the family 'd_abstractor', the config is of {config['family']!r}")
        orders = config["point_order"], config["norm_order"]
        if orders != ("x, y", "after"):
            raise ValueError(f"this file has points (x, y) and norms after each residual; the config says {orders}")
        if config["pooled_v_target"] not in ("query", "tgt", "none"):
            raise ValueError(f"this file does not know pooled_v_target={config['pooled_v_target']!r}")
        vision, width, llm = config["vision_width"], config["width"], config["llm_width"]
        queries, (rows, columns) = config["num_queries"], config["grid"]
        learned = 2 * width if config["pooled_v_target"] == "none" else width
        self.input_proj = nn.ModuleList([nn.Linear(vision, width) if vision != width else nn.Identity()])
        if config["pos_emb"]:
            self.v_pos_emb = nn.Parameter(torch.randn(1, rows * columns, width))
        self.query_position_embeddings = nn.Embedding(queries, learned)
        self.reference_points = nn.Parameter(torch.rand(1, queries, 2))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["depth"]))
        self.output_proj = nn.Linear(width, llm) if width != llm else nn.Identity()
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
        tokens = self.input_proj[0](tokens)
        if self.config["pos_emb"]:
            tokens = tokens + self.v_pos_emb
        position, hidden = self.queries(tokens, valid)
        for layer in self.layers:
            hidden = layer(hidden, position, tokens, valid, self.reference_points)
        out = self.output_proj(hidden)
        if valid is None:
            return out
        some = valid.any(-1, keepdim=True).expand(-1, out.shape[1])
        return out.masked_fill(~some[..., None], 0), some

    def queries(self, tokens: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Their positions and their first hidden states."""
        learned = self.query_position_embeddings.weight.expand(tokens.shape[0], -1, -1)
        if self.config["pooled_v_target"] == "none":
            position, hidden = learned.chunk(2, dim=-1)
            return position, hidden
        if valid is None:
            pooled = self.pool(tokens)
        else:
            share = self.pool(valid[..., None].to(tokens.dtype))
            pooled = self.pool(tokens.masked_fill(~valid[..., None], 0)) / share.where(share > 0, 1)
        return (pooled, learned) if self.config["pooled_v_target"] == "query" else (learned, pooled)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, Q, C]; bin i of h covers rows floor(i H / h) ... ceil((i + 1) H / h) - 1."""
        grid = tokens.transpose(1, 2).unflatten(2, tuple(self.config["grid"]))
        return functional.adaptive_avg_pool2d(grid, tuple(self.config["pooled"])).flatten(2).transpose(1, 2)


class Layer(nn.Module):
    """Self-attention, deformable attention to the image, feed-forward; each residual, then normed."""

    def __init__(self, config: dict):
        super().__init__()
        width, eps = config["width"], config["norm_eps"]
        self.self_attn = SelfAttention(width, config["heads"])
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=eps)
        self.encoder_attn = DeformableAttention(width, config["heads"], config["points"], config["grid"])
        self.encoder_attn_layer_norm = nn.LayerNorm(width, eps=eps)
        self.activation = ACTIVATIONS[config["activation"]]()
        self.fc1 = nn.Linear(width, config["feed_forward"])
        self.fc2 = nn.Linear(config["feed_forward"], width)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden, position, tokens, valid, points) -> torch.Tensor:
        hidden = self.self_attn_layer_norm(hidden + self.self_attn(hidden, position))
        hidden = self.encoder_attn_layer_norm(hidden + self.encoder_attn(hidden + position, tokens, valid, points))
        return self.final_layer_norm(hidden + self.fc2(self.activation(self.fc1(hidden))))


class SelfAttention(nn.Module):
    """Positions are added to queries and keys, not to values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        placed = hidden + position
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.q_proj(placed), self.k_proj(placed), self.v_proj(hidden))
        )
        read = functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(read.transpose(1, 2).flatten(2))


class DeformableAttention(nn.Module):
    """Each head of a query reads `points` places, offsets in token widths from its reference point; bilinear."""

    def __init__(self, width: int, heads: int, points: int, grid: list[int]):
        super().__init__()
        self.heads, self.points, self.grid = heads, points, tuple(grid)
        self.sampling_offsets = nn.Linear(width, heads * points * 2)
        self.attention_weights = nn.Linear(width, heads * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def forward(self, placed, tokens, valid, points) -> torch.Tensor:
        rows, columns = self.grid
        values = self.value_proj(tokens)
        if valid is not None:
            values = values.masked_fill(~valid[..., None], 0)
        maps = values.transpose(1, 2).unflatten(1, (self.heads, -1)).flatten(0, 1).unflatten(2, self.grid)
        offsets = self.sampling_offsets(placed).unflatten(-1, (self.heads, self.points, 2))
        weights = self.attention_weights(placed).unflatten(-1, (self.heads, self.points)).softmax(-1)
        x = points[..., None, None, 0] + offsets[..., 0] / columns
        y = points[..., None, None, 1] + offsets[..., 1] / rows
        places = (2 * torch.stack([x, y], dim=-1) - 1).transpose(1, 2).flatten(0, 1)  # -1 ... 1 over the whole grid
        seen = functional.grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        read = (seen * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # [B * heads, A, Q]
        return self.output_proj(read.unflatten(0, (-1, self.heads)).flatten(1, 2).transpose(1, 2))
