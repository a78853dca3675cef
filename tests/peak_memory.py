"""Run by tests/test_stream.py in a process of its own: `python -m tests.peak_memory FOLDER TYPE` prints bytes as JSON.

peak      growth of the resident set while `assemble` runs: the kernel's high-water mark, reset before, pages of mapped
          files included
shards    bytes of all arrays of the model on all (fake CPU) devices, which lie in this process's memory, too
largest   bytes of the largest tensor of the folder
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
from flax import nnx

from tcjax.assemble import assemble
from tcjax.config import MeshConfig
from tcjax.interop import tensors
from tcjax.llms.decoder import LlmConfig
from tcjax.sharding import make_mesh
from tests.tiny import LLM

WIDE = LlmConfig(
    vocab=16_384,
    width=768,
    layers=3,
    heads=6,
    kv_heads=6,
    head_width=128,
    feed_forward=2048,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie=False,
)


@dataclasses.dataclass(frozen=True)
class Alone:
    """A model that is nothing but an LLM."""

    llm: LlmConfig

    def build(self, rngs):
        return nnx.Dict(llm=self.llm.build(rngs))


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def main(folder: str, frozen: str) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model, _ = assemble(Alone(dataclasses.replace(LLM, weights="small")), root=Path(folder), mesh=mesh, frozen=frozen)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model, _ = assemble(Alone(dataclasses.replace(WIDE, weights="wide")), root=Path(folder), mesh=mesh, frozen=frozen)
    jax.block_until_ready(model)
    peak = status("VmHWM") - before
    shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
    largest = max(stored.mapped().nbytes for stored in tensors.find(Path(folder) / "wide").values())
    print(json.dumps({"peak": peak, "shards": shards, "largest": largest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
