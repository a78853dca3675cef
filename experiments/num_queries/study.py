"""Study: how many visual tokens does a reader of digit boards need?

Every compressor learns from captions and questions through the frozen LLM, from the same boards in the same order, the
same number of steps. The reference is the projector the LLM was trained with: all 256 tokens, nothing to learn.

    tcjax ablate experiments/num_queries
    tcjax ablate experiments/num_queries --queries 1,2,4,8 --compressors resampler --seeds 3
"""

from configs import boards
from tcjax.config import Run

REFERENCE = "mlp"


def runs(
    queries: tuple[int, ...] = (64, 16, 4),
    compressors: tuple[str, ...] = ("resampler", "avg_pool"),
    seeds: int = 1,
    steps: int = 400,
) -> list[Run]:
    """The uncompressed reference, then every compressor at every number of queries, `seeds` times."""
    reference = boards.reference(name="num_queries/mlp-256-s0")
    return [reference] + [
        boards.compressed(f"num_queries/{name}-{num}-s{seed}", name, num, steps=steps, seed=seed)
        for seed in range(seeds)
        for name in compressors
        for num in queries
    ]
