"""Resized image: the simplest way to fewer tokens. The image is made smaller before the tower, and nothing is learned.

    y = MLP(tower(resize(image)))        Q = h * w patches, bilinear with antialiasing; positions resized bicubically

The baseline every table needs: what it cannot reach, compression must be worth. The tower gets cheaper too, by N / Q.
`of_tower` asks for the smaller grid; the projector is LLaVA's, so the artifact is an `mlp` whose provenance says how the
image was resized. Cost: Q (C D + D^2) multiplications per image, and the tower's at Q patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flax import nnx

from tcjax.compressors import mlp
from tcjax.compressors.base import Widths
from tcjax.compressors.queries import GridConfig
from tcjax.interop.names import Name


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """num_queries: h * w. shape: (h, w) of the resized image's patches; None takes the square."""

    num_queries: int = 64
    elastic = "pooling"

    @property
    def family(self) -> str:
        """Of what is trained; how the image gets smaller is the tower's affair."""
        return "mlp"

    def build(self, widths: Widths, rngs: nnx.Rngs) -> mlp.MlpProjector:
        return mlp.Config().build(self._seen(widths), rngs)

    def of_tower(self) -> dict:
        side = math.isqrt(max(self.num_queries, 0))
        if self.shape is None and side**2 != self.num_queries:
            raise ValueError(f"num_queries={self.num_queries} is no square; shape=(h, w) gives others.")
        return {"shrunk_HW": self.shape or (side, side)}

    def describe(self, widths: Widths) -> dict:
        return mlp.Config().describe(self._seen(widths))

    def names(self, widths: Widths) -> list[Name]:
        return mlp.Config().names(self._seen(widths))

    def _seen(self, widths: Widths) -> Widths:
        return replace(widths, grid_HW=self.out_grid(widths))
