"""Run twice by tests/test_stream.py: `python -m tests.two_processes FOLDER PORT NUMBER` assembles one model on two processes.

Prints JSON: hash (of the weights, as this process knows it), hashed (whether it computed it), copied (bytes it took out of
the file), mine (bytes of its shards) and all (bytes of the file's tensors).
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from tcjax.assemble import assemble
from tcjax.config import MeshConfig
from tcjax.interop import stream, tensors
from tcjax.sharding import make_mesh
from tests.peak_memory import Alone
from tests.tiny import LLM


def main(folder: str, port: str, number: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(number))
    copied, hashed = [], []
    fill, content_hash = stream._fill, tensors.content_hash
    stream._fill = lambda out, view: copied.append(view.nbytes) or fill(out, view)
    tensors.content_hash = lambda path: hashed.append(path) or content_hash(path)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2))
    model, identity = assemble(Alone(dataclasses.replace(LLM, weights="small")), root=Path(folder), mesh=mesh)
    leaves = jax.tree.leaves(model)
    print(
        json.dumps(
            {
                "hash": identity["llm.weights"],
                "hashed": bool(hashed),
                "copied": sum(copied),
                "mine": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
                "all": sum(leaf.nbytes for leaf in leaves),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
