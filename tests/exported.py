"""Small artifacts for the tests of tcjax.export: each case is built, planted and exported once per process."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from flax import nnx

from tcjax.compressors import (
    avg_pool,
    chain,
    decoder_resampler,
    elastic,
    idefics2_resampler,
    matryoshka_query,
    mlp,
    per_frame,
    pixel_shuffle,
    qformer,
    query_resampler,
    qwen_resampler,
    resampler,
    spatial_resampler,
)
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
    "qwen_resampler": qwen_resampler.Config(num_queries=3, max_queries=4, head_width=6),
    "minicpm_v2": qwen_resampler.Config(num_queries=4, form="minicpm_v2", head_width=6),
    "minicpm_v45": qwen_resampler.Config(num_queries=5, form="minicpm_v45", head_width=4),
    "uhd_resampler": qwen_resampler.Config(num_queries=4, form="uhd", head_width=6),
    "spatial_resampler": spatial_resampler.Config(num_queries=4, head_width=6),
    "matryoshka_query": matryoshka_query.Config(num_queries=3, max_queries=4, head_width=4),
    "decoder_resampler": decoder_resampler.Config(num_queries=3, max_queries=5, heads=2, feed_forward=20),
    "chain": chain.Config(parts=(avg_pool.Config(num_queries=9), pixel_shuffle.Config(num_queries=1))),
    "per_frame": per_frame.Config(each=avg_pool.Config(num_queries=4)),
    "elastic": elastic.Config(of=resampler.Config(num_queries=5, depth=2, heads=2, head_width=4, ff_mult=2)),
    "idefics2_resampler": idefics2_resampler.Config(
        num_queries=3, max_queries=5, depth=2, heads=4, kv_heads=2, head_width=4, ff_mult=2, projection=10
    ),
    "query_resampler": query_resampler.Config(
        num_queries=3, max_queries=5, width=6, heads=4, kv_heads=2, head_width=4, ff_mult=2
    ),
    "query_resampler_anywhere": query_resampler.Config(
        num_queries=4, width=6, heads=4, kv_heads=2, head_width=4, ff_mult=2, positions=False
    ),
    "qformer": qformer.Config(num_queries=3, depth=2, width=8, heads=2, feed_forward=16, max_queries=5),
    "qformer_text": qformer.Config(
        num_queries=5, depth=2, width=8, heads=2, feed_forward=16, cross_every=1, text=True, max_text=6
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
