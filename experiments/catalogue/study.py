"""Study: does every compressor of the catalogue learn to hand the digit boards over, and how far does a short training get?

All of them read the same boards in the same order for the same number of steps, with 16 tokens or, where the design has
no such number, with the nearest one it has. Those that are told the question read single questions instead.

    tcjax ablate experiments/catalogue
    tcjax ablate experiments/catalogue --compressors token_packer,quecc --steps 1000
"""

from configs import boards
from tcjax.config import Run

REFERENCE = "mlp"


def runs(
    queries: tuple[int, ...] = (16,),
    compressors: tuple[str, ...] = tuple(name for name in boards.CATALOGUE if name != "mlp"),
    seeds: int = 1,
    steps: int = 300,
) -> list[Run]:
    """The uncompressed reference, then every compressor at the numbers of tokens nearest to `queries`."""
    reference = boards.reference(name="catalogue/mlp-256-s0", test=100)
    return [reference] + [
        boards.compressed(f"catalogue/{name}-{num}-s{seed}", name, num, steps=steps, seed=seed, test=100)
        for seed in range(seeds)
        for name in compressors
        for num in sorted({_nearest(name, wanted, reference) for wanted in queries})
    ]


def _nearest(name: str, wanted: int, reference: Run) -> int:
    """The possible number of tokens nearest to `wanted` on the boards' grid, the smaller of two."""
    widths = reference.model.widths  # pyright: ignore[reportAttributeAccessIssue]
    for num in sorted(range(1, widths.num_tokens + 1), key=lambda num: (abs(num - wanted), num)):
        try:
            if boards.CATALOGUE[name](num).outputs(widths) == num:
                return num
        except ValueError:
            continue
    raise ValueError(f"{name} has no number of tokens on a {widths.grid_HW} grid.")
