"""Small artifacts for the tests of tcjax.export: each case is built, planted and exported once per process."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from flax import nnx

from tcjax.compressors import avg_pool, c_abstractor, d_abstractor, mlp, pixel_shuffle, resampler
from tcjax.compressors.base import Widths
from tcjax.export.artifact import export
from tests.planted import plant

WIDTHS = Widths(grid_HW=(4, 6), vision_C=8, llm_D=12, text_D=10, levels=2)
CASES = {
    "mlp": mlp.Config(),
    "avg_pool": avg_pool.Config(num_queries=6, shape=(3, 2)),  # 4 rows into 3 bins: they overlap
    "pixel_shuffle": pixel_shuffle.Config(num_queries=6),
    "pixel_shuffle_mlp": pixel_shuffle.Config(num_queries=6, head="mlp"),
    "resampler": resampler.Config(num_queries=5, depth=2, heads=2, head_width=4, ff_mult=2),
    "c_abstractor": c_abstractor.Config(num_queries=9, depth=2, hidden=12),  # 4 x 6 into 3 x 3: rows overlap
    "c_abstractor_bare": c_abstractor.Config(
        num_queries=6, shape=(2, 3), depth=2, hidden=8, mlp_depth=3, pos_emb=False, prenorm=True
    ),
    "d_abstractor": d_abstractor.Config(num_queries=9, width=16, depth=2, heads=2, points=3, feed_forward=10),
    "d_abstractor_bare": d_abstractor.Config(  # as wide as the LLM: no output_proj
        num_queries=6, shape=(3, 2), width=12, depth=2, heads=3, points=2, feed_forward=10, pooled_v_target="none"
    ),
    "resampler_video": resampler.Config(
        num_queries=3, depth=2, heads=2, head_width=4, ff_mult=2, max_queries=5, max_frames=2, max_media=3
    ),
}
PROVENANCE = {"tower": {"name": "tiny", "weights": "0f" * 32}, "training": {"steps": 2180}}
ROWS = [{"num_queries": 6, "accuracy": 0.51234}, {"num_queries": 24, "accuracy": 0.75, "seed": 1}]


def built(case: str) -> nnx.Module:
    return plant(CASES[case].build(WIDTHS, nnx.Rngs(0)))


@functools.cache
def artifact(case: str) -> Path:
    """A folder to read, never to change."""
    folder = Path(tempfile.mkdtemp(prefix="tcjax-artifact-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    export(built(case), CASES[case], WIDTHS, folder / case, provenance=PROVENANCE, study_rows=ROWS)
    return folder / case


def artifact_copy(case: str, folder: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(artifact(case), folder / case))
