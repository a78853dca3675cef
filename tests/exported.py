"""Small artifacts for the tests of tcjax.export: each case is built, planted and exported once per process."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from flax import nnx

from tcjax.compressors import (
    avg_pool,
    c_abstractor,
    chain,
    conv16,
    d_abstractor,
    decoder_resampler,
    elastic,
    gemma3_pool,
    idefics2_resampler,
    ldp,
    ldp_v2,
    learned_merge,
    matryoshka_pool,
    matryoshka_query,
    max_pool,
    mlp,
    patch_merger,
    per_frame,
    pixel_shuffle,
    qformer,
    quecc,
    query_merge,
    query_resampler,
    qwen_resampler,
    random_tokens,
    resampler,
    spatial_resampler,
    staged_pool,
    stride_tokens,
    token_learner,
    token_packer,
)
from tcjax.compressors.base import Widths
from tcjax.export.artifact import export
from tests.planted import planted

WIDTHS = Widths(grid_HW=(4, 6), vision_C=8, llm_D=12, text_D=10, levels=2)
CASES = {
    "mlp": mlp.Config(),
    "avg_pool": avg_pool.Config(num_queries=6, shape=(3, 2)),  # 4 rows into 3 bins: they overlap
    "avg_pool_after_mlp": avg_pool.Config(num_queries=9, order="mlp, then pool", depth=1),
    "max_pool": max_pool.Config(num_queries=6, shape=(3, 2)),
    "max_pool_after_mlp": max_pool.Config(num_queries=9, order="mlp, then pool"),
    "staged_pool": staged_pool.Config(num_queries=9, kernel=3, expand=2),
    "gemma3_pool": gemma3_pool.Config(num_queries=6),
    "matryoshka_pool": matryoshka_pool.Config(num_queries=6, scales=(1, 6, 24)),
    "random_tokens": random_tokens.Config(num_queries=10, seed=3),
    "stride_tokens": stride_tokens.Config(num_queries=9),
    "first_tokens": stride_tokens.Config(num_queries=10, mode="first"),
    "pixel_shuffle": pixel_shuffle.Config(num_queries=6),
    "pixel_shuffle_mlp": pixel_shuffle.Config(num_queries=6, head="mlp"),
    "pixel_shuffle_v1": pixel_shuffle.Config(num_queries=6, head="mlp", token_order="column by column"),
    "qwen2_vl": patch_merger.Config(num_queries=6),
    "qwen2_5_vl": patch_merger.Config(num_queries=6, form="qwen2_5_vl"),
    "qwen3_vl": patch_merger.Config(num_queries=6, form="qwen3_vl"),
    "qwen3_vl_deepstack": patch_merger.Config(num_queries=6, form="qwen3_vl_deepstack"),
    "mistral3": patch_merger.Config(num_queries=6, form="mistral3"),
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
    "learned_merge": learned_merge.Config(num_queries=5, scorer=8, merger=6, metric=4),
    "learned_merge_told": learned_merge.Config(num_queries=5, scorer=8, merger=6, metric=4, text=True, prior=True),
    "learned_merge_literal": learned_merge.Config(num_queries=20, scorer=8, literal=True),
    "query_merge": query_merge.Config(num_queries=3, inner=6, max_queries=5),
    "query_merge_literal": query_merge.Config(num_queries=5, inner=6, literal=True),
    "token_learner": token_learner.Config(num_queries=5, hidden=6),
    "qwen_resampler": qwen_resampler.Config(num_queries=3, max_queries=4, head_width=6),
    "minicpm_v2": qwen_resampler.Config(num_queries=4, form="minicpm_v2", head_width=6),
    "minicpm_v45": qwen_resampler.Config(num_queries=5, form="minicpm_v45", head_width=4),
    "uhd_resampler": qwen_resampler.Config(num_queries=4, form="uhd", head_width=6),
    "spatial_resampler": spatial_resampler.Config(num_queries=4, head_width=6),
    "matryoshka_query": matryoshka_query.Config(num_queries=3, max_queries=4, head_width=4),
    "decoder_resampler": decoder_resampler.Config(num_queries=3, max_queries=5, heads=2, feed_forward=20),
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
    return planted(CASES[case], WIDTHS)


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
