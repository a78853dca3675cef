"""The program that the partitioner wrote, of anything lowered: what tests of traffic read."""

import tempfile
from pathlib import Path
from typing import Any

import jax


def partitioned(lowered: Any) -> str:
    """Its text right after SPMD partitioning."""
    # An executable that comes out of the cache on disk was not partitioned now: such a one is never put there.
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        with tempfile.TemporaryDirectory() as folder:
            lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd.*"})
            (path,) = Path(folder).glob("*after_spmd-partitioning*")
            return path.read_text()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
