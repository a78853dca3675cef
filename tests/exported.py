"""Small artifacts for the tests of tcjax.export: each case is built, planted and exported once per process."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from flax import nnx

from tcjax.compressors import avg_pool, conv16, ldp, ldp_v2, mlp, pixel_shuffle, quecc, resampler, token_packer
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
    "resampler_video": resampler.Config(
        num_queries=3, depth=2, heads=2, head_width=4, ff_mult=2, max_queries=5, max_frames=2, max_media=3
    ),
    "token_packer": token_packer.Config(num_queries=6, head_width=4, levels=(1, 2)),
    "token_packer_oblong": token_packer.Config(num_queries=4, head_width=4, levels=(1, 2)),  # cells of 2 x 3
    "quecc": quecc.Config(num_queries=6, heads=2, levels=(1, 2)),
    "quecc_last": quecc.Config(num_queries=6, heads=2, levels=(1, 2), text_pool="last"),
    "ldp": ldp.Config(),
    "ldp_v2": ldp_v2.Config(num_queries=6, shape=(3, 2)),  # 4 rows into 3 bins: they overlap
    "conv16": conv16.Config(),
    "conv16_neck": conv16.Config(neck=4),
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
