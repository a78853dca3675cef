"""What a checkpoint costs: seconds that steps wait for it, and seconds it goes on beside them.

    python -m benchmarks.saves [--saves 8] [--every 20] [--folder DIR]

The state is a resampler of 64 queries and one layer, trainable parameters in float32 and AdamW's two moments, between
neighbours of two sizes: a tower of 768 and an LLM of 896, and LLaVA-1.5's 1024 and 4096. Between two saves a small program
keeps the device busy, as steps would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from tcjax.compressors import resampler
from tcjax.compressors.base import Widths
from tcjax.config import MeshConfig, TrainConfig
from tcjax.sharding import make_mesh, place
from tcjax.train.checkpoint import Checkpoints
from tcjax.train.log import hardware
from tcjax.train.optimiser import make_optimiser
from tcjax.train.state import State, init

CASES = {  # name: (feed-forward width by the tower's, tower, LLM)
    "768 -> 896": (1, 768, 896),
    "1024 -> 4096": (4, 1024, 4096),
}


def made_state(ff_mult: int, vision: int, llm: int) -> State:
    config = resampler.Config(num_queries=64, depth=1, heads=8, head_width=64, ff_mult=ff_mult)
    widths = Widths(grid_HW=(24, 24), vision_C=vision, llm_D=llm, text_D=llm)
    trainable = nnx.state(config.build(widths, nnx.Rngs(0)))
    mesh = make_mesh(MeshConfig())
    return place(init(place(trainable, mesh), make_optimiser(TrainConfig(steps=100))), mesh)


def measured(state: State, folder: Path, saves: int, every: int) -> dict:
    """Milliseconds, the first save (orbax starts its threads) apart."""
    behind: list[float] = []
    checkpoints = Checkpoints(folder, keep=2, saved=behind.append)
    work = jax.jit(lambda x: x @ x / jnp.linalg.norm(x))
    x, blocking = jnp.eye(512), []
    for save in range(1, saves + 2):
        for _ in range(every):
            x = work(x)
        x.block_until_ready()
        begun = time.perf_counter()
        checkpoints.save(save * every, state, {"next_index": save}, {"model": "measured"})
        blocking.append(1e3 * (time.perf_counter() - begun))
        time.sleep(2.0)  # steps of a larger model
    checkpoints.close()
    return {
        "megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
        "blocking_ms_first": blocking[0],
        "blocking_ms_median": statistics.median(blocking[1:]),
        "blocking_ms_max": max(blocking[1:]),
        "background_ms_median": 1e3 * statistics.median(behind[1:]),
        "hardware": hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary one)")
    asked = parser.parse_args()
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            found = measured(made_state(*case), Path(folder), asked.saves, asked.every)
        print(
            json.dumps({"state": name, **{key: v if isinstance(v, str) else round(v, 1) for key, v in found.items()}})
        )


if __name__ == "__main__":
    main()
