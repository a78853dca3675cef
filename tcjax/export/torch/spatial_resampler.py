"""Spatial resampler: every query reads its own region of the grid. Keys are LLaVA-UHD v1's.

    x' = ln_kv(kv_proj(x));  k = R (x' + P_k),  v = R x';  z = attn(ln_q(query) + P_q, k, v);  y = ln_post(z) @ proj

    compressor = Compressor(json.load(open("compressor_config.json")))
    compressor.load_state_dict(safetensors.torch.load_file("compressor.safetensors"))
    tokens = compressor(features)                       # [B, N, vision_width] -> [B, Q, llm_width]
    tokens, valid = compressor(features, valid)         # with a bool mask [B, N], True for real tokens

N is the grid, row by row. R is torchvision's roi_align (not aligned, adaptive sampling) of regions x regions equal boxes,
as a matrix. With a mask a sample is the mean of its valid cells; a region without any is not valid.
"""

import torch
from torch import nn
from torch.nn import functional


class Compressor(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        if config["family"] != "spatial_resampler":
            raise ValueError(f"this file holds the family 'spatial_resampler', the config is of {config['family']!r}")
        if config["sampling"] != "roi_align, not aligned, adaptive":
            raise ValueError(
                f"this file samples as roi_align does, not aligned; the config says {config['sampling']!r}"
            )
        width, side, eps = config["llm_width"], config["regions"], config["norm_eps"]
        self.query = nn.Parameter(0.02 * torch.randn(side * side, width))
        self.pos_embed = nn.Parameter(sincos_2d(side, width), requires_grad=False)
        same = config["vision_width"] == width
        self.kv_proj = nn.Identity() if same else nn.Linear(config["vision_width"], width, bias=False)
        self.attn = nn.MultiheadAttention(width, config["heads"], batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_kv = nn.LayerNorm(width, eps=eps)
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.config = config

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None):
        batch = tokens.shape[0]
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
        values = self.ln_kv(self.kv_proj(tokens))
        keys = values + self.key_positions().to(values.dtype)
        matrix, regions = self.sampling().to(tokens.device), len(self.query)
        hidden = some = None
        if valid is not None:
            keys, values = (x.masked_fill(~valid[..., None], 0) for x in (keys, values))
            share, mass = matrix.sum(-1), (matrix @ valid.float()[..., None])[..., 0]
            some = (mass > 0).unflatten(1, (regions, -1)).any(-1)
            seen = ((mass > 0) | (share == 0)).reshape(batch * regions, -1)
            hidden = ~(seen | ~seen.any(-1, keepdim=True))
            matrix = matrix * (share / mass.where(mass > 0, 1))[..., None]  # now one per image
        keys, values = ((matrix @ x.float()).to(x.dtype) for x in (keys, values))
        keys, values = (x.reshape(batch * regions, -1, x.shape[-1]) for x in (keys, values))
        queries = self.ln_q(self.query) + self.pos_embed.to(self.query.dtype)
        queries = queries[:, None].repeat(batch, 1, 1)  # a region is a row of its own
        out = self.attn(queries, keys, values, key_padding_mask=hidden, need_weights=False)[0]
        out = self.ln_post(out.reshape(batch, -1, out.shape[-1])) @ self.proj
        if some is None:
            return out
        return out.masked_fill(~some[..., None], 0), some

    def key_positions(self) -> torch.Tensor:
        """[N, llm_width]"""
        height, width = self.config["grid"]
        side, size = self.config["regions"], self.config["llm_width"]
        square = self.pos_embed.float().reshape(1, side, side, size).permute(0, 3, 1, 2)
        resized = functional.interpolate(square, size=(height, width), mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1).reshape(height * width, size)

    def sampling(self) -> torch.Tensor:
        """[Q * M, N]: every row averages the cells around one of the M sample points of a region."""
        side = self.config["regions"]
        rows, columns = (
            torch.tensor(samples_along(size, side, num))
            for size, num in zip(self.config["grid"], self.config["samples"], strict=True)
        )
        outer = rows[:, None, :, None, :, None] * columns[None, :, None, :, None, :]
        return outer.flatten(4, 5).flatten(0, 3)


def samples_along(size: int, regions: int, num: int) -> list:
    """[regions][num][size]: how `num` bins per region average the cells along one axis."""
    weights = [[[0.0] * size for _ in range(num)] for _ in range(regions)]
    length = max(size / regions, 1.0) / num  # of a bin
    points = int(-(-length // 1))  # rounded up
    for region in range(regions):
        for bin in range(num):
            for point in range(points):
                at = region * size / regions + (bin + (point + 0.5) / points) * length
                if at > size:
                    continue
                low = min(int(at), size - 1)
                high = min(low + 1, size - 1)
                weights[region][bin][low] += (high - at if high > low else 1.0) / points
                weights[region][bin][high] += (at - low if high > low else 0.0) / points
    return weights


def sincos_2d(side: int, size: int) -> torch.Tensor:
    """[side * side, size]: the first half tells the column, the second half the row."""
    places = torch.arange(side)
    rows, columns = places.repeat_interleave(side), places.repeat(side)
    rates = 10000 ** (-torch.arange(size // 4) / (size / 4))
    angles = [place.float()[:, None] * rates for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
