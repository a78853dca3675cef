"""The rows of the contract (tests/test_compressors.py): every compressor at a tiny size, and what it must refuse.

A new compressor is one row of CASES; its checksum is what the failing test prints.
"""

from tcjax.compressors import (
    avg_pool,
    c_abstractor,
    chain,
    d_abstractor,
    elastic,
    idefics2_resampler,
    learned_merge,
    mlp,
    per_frame,
    pixel_shuffle,
    qformer,
    query_merge,
    query_resampler,
    resampler,
    resize_image,
    token_learner,
)
from tcjax.compressors.base import Widths
from tests import grid_cases, pool_cases, sincos_cases

WIDTHS = Widths(grid_HW=(4, 6), vision_C=12, llm_D=16, text_D=10, levels=2)
LOOK = {"width": 8, "depth": 2, "heads": 2, "points": 2, "feed_forward": 10}
TINY = {"depth": 2, "heads": 2, "head_width": 4, "ff_mult": 2}
GROUPED = {"heads": 4, "kv_heads": 2, "head_width": 4, "ff_mult": 2}
APART = {"scorer": 8, "merger": 6, "metric": 6}  # the last one kept and the first dropped score differ by > 4 %
BERT = {"depth": 4, "width": 8, "heads": 2, "feed_forward": 16}

CASES = {  # name: (tiny config, Q, vdot(tokens, noise) with planted weights)
    "mlp": (mlp.Config(), 24, -25.53666),
    "mlp_3_layers": (mlp.Config(num_queries=24, depth=3), 24, 7.90116),
    "avg_pool": (avg_pool.Config(num_queries=9), 9, -2.42293),  # bins overlap: 4 rows -> 3
    "avg_pool_shaped": (avg_pool.Config(num_queries=6, shape=(2, 3)), 6, 3.96526),
    "pixel_shuffle": (pixel_shuffle.Config(num_queries=6), 6, 1.5206),
    "pixel_shuffle_mlp": (pixel_shuffle.Config(num_queries=6, head="mlp"), 6, 19.27796),
    "resampler": (resampler.Config(num_queries=5, **TINY), 5, 1.06527),
    "resampler_prefix": (resampler.Config(num_queries=3, max_queries=5, **TINY), 3, -8.71471),
    "resampler_video": (resampler.Config(num_queries=4, max_frames=3, media=1, max_media=2, **TINY), 4, -5.74115),
    "elastic": (elastic.Config(of=resampler.Config(num_queries=5, **TINY)), 5, 20.44692),
    "chain": (
        chain.Config(parts=(avg_pool.Config(num_queries=9), resampler.Config(num_queries=4, **TINY))),
        4,
        -2.84258,
    ),
    "per_frame": (per_frame.Config(each=resampler.Config(num_queries=4, **TINY)), 4, -4.93847),
    "resize_image": (resize_image.Config(num_queries=24, shape=(4, 6)), 24, -25.53666),
    "idefics2_resampler": (idefics2_resampler.Config(num_queries=5, depth=2, projection=8, **GROUPED), 5, 37.60905),
    "idefics2_resampler_prefix": (
        idefics2_resampler.Config(num_queries=3, max_queries=5, depth=1, projection=8, latents="ones", **GROUPED),
        3,
        -13.92754,
    ),
    "query_resampler": (query_resampler.Config(num_queries=5, width=8, **GROUPED), 5, 11.83464),
    "query_resampler_anywhere": (
        query_resampler.Config(num_queries=3, max_queries=4, width=8, depth=3, positions=False, **GROUPED),
        3,
        18.68648,
    ),
    "qformer": (qformer.Config(num_queries=5, **BERT), 5, 7.17879),
    "qformer_every_layer": (qformer.Config(num_queries=3, max_queries=5, cross_every=1, **BERT), 3, 18.0481),
    "qformer_text": (qformer.Config(num_queries=5, text=True, max_text=7, **BERT), 5, -0.22846),
    "qformer_own_words": (qformer.Config(num_queries=4, text=True, max_text=5, **BERT | {"width": 10}), 4, -14.55236),
    "learned_merge": (learned_merge.Config(num_queries=7, **APART), 7, -4.83617),
    "learned_merge_told": (learned_merge.Config(num_queries=6, text=True, prior=True, **APART), 6, -4.03389),
    "learned_merge_literal": (learned_merge.Config(num_queries=14, scorer=8, literal=True), 14, -16.62408),
    "query_merge": (query_merge.Config(num_queries=5, inner=6), 5, 4.27462),
    "query_merge_prefix": (query_merge.Config(num_queries=3, max_queries=5, inner=6), 3, 1.3034),
    "query_merge_literal": (query_merge.Config(num_queries=5, inner=6, literal=True), 5, 2.58572),
    "token_learner": (token_learner.Config(num_queries=5, hidden=8), 5, -0.86022),
    "c_abstractor": (c_abstractor.Config(num_queries=9, hidden=16, depth=2), 9, -6.2855),
    "c_abstractor_bare": (
        c_abstractor.Config(num_queries=6, shape=(2, 3), hidden=12, depth=2, mlp_depth=1, pos_emb=False, prenorm=True),
        6,
        3.23216,
    ),
    "c_abstractor_pool": (c_abstractor.Config(num_queries=9, depth=0), 9, -3.60995),
    "d_abstractor": (d_abstractor.Config(num_queries=9, **LOOK), 9, 3.68054),
    "d_abstractor_content": (
        d_abstractor.Config(num_queries=6, shape=(3, 2), pooled_v_target="tgt", pos_emb=False, **LOOK | {"width": 12}),
        6,
        -6.2042,
    ),
    **pool_cases.CASES,
    **sincos_cases.CASES,
    **grid_cases.CASES,
}
# Weights of published files that reach no output, {family: {path: layers}}: a key's bias cancels in the softmax, and the
# text is dropped after the last layer, the last group's second, so that its feed-forward there is for nothing.
UNFELT = {
    "qformer": {".*/key/bias": slice(None), "groups/layers/1/text_ff/.*": slice(-1, None)},
    "d_abstractor": {".*/key/bias": slice(None)},
    "matryoshka_query": {"ln_k/bias": slice(None)},
    **grid_cases.UNFELT,
}
# No gradient can reach these: their hard choice multiplies nothing by its scores. {case: path of what never learns}
UNREACHED = {"learned_merge_literal": "importance"}
SELECTING = {"random_tokens", "stride_tokens"}  # they leave most tokens unread on purpose
# Of a family whose cases cannot give 2.
FEWER = {"avg_pool": 4, "mlp": 4, "c_abstractor": 4} | pool_cases.FEWER | grid_cases.FEWER

IMPOSSIBLE = {  # name: (config, what the message must say)
    "mlp": (mlp.Config(num_queries=6), r"num_queries=6 .* 4x6 grid; possible: \[24\]"),
    "avg_pool": (avg_pool.Config(num_queries=6), r"num_queries=6 .*shape=\(h, w\).* possible: \[1, 4, 9, 16\]"),
    "avg_pool_large": (avg_pool.Config(num_queries=25), r"possible: \[1, 4, 9, 16\]"),
    "avg_pool_negative": (avg_pool.Config(num_queries=-4), r"possible: \[1, 4, 9, 16\]"),
    "avg_pool_shape": (
        avg_pool.Config(num_queries=12, shape=(2, 3)),
        r"has 6 .* 4x6 grid: \[\(2, 6\), \(3, 4\), \(4, 3\)\]",
    ),
    "avg_pool_grid": (avg_pool.Config(num_queries=10, shape=(5, 2)), r"shape=\(5, 2\) .* \(1, 1\) to \(4, 6\)"),
    "pixel_shuffle": (pixel_shuffle.Config(num_queries=8), r"num_queries=8 .*; possible: \[6, 24\]"),
    "resampler": (resampler.Config(num_queries=0), r"num_queries=0: .* from 1 up"),
    "idefics2_resampler": (idefics2_resampler.Config(num_queries=0), r"num_queries=0: .* from 1 up to max_queries=0"),
    "query_resampler": (query_resampler.Config(num_queries=5, max_queries=4), r"num_queries=5: .* max_queries=4"),
    "qformer": (qformer.Config(num_queries=6, max_queries=5), r"num_queries=6: .* from 1 up to max_queries=5"),
    "learned_merge": (learned_merge.Config(num_queries=25), r"num_queries=25: .* 4x6 .* from 1 to 24 can be kept"),
    "query_merge": (query_merge.Config(num_queries=6, max_queries=5), r"num_queries=6: .* up to max_queries=5"),
    "token_learner": (token_learner.Config(num_queries=0), r"num_queries=0: .* from 1 up"),
    "c_abstractor": (c_abstractor.Config(num_queries=6), r"num_queries=6 .* possible: \[1, 4, 9, 16\]"),
    "d_abstractor": (d_abstractor.Config(num_queries=144), r"num_queries=144 .* possible: \[1, 4, 9, 16\]"),
    **pool_cases.IMPOSSIBLE,
    **sincos_cases.IMPOSSIBLE,
    **grid_cases.IMPOSSIBLE,
}
IMPOSSIBLE_CHOICES = [
    (pixel_shuffle.Config(num_queries=6, head="conv"), r"head='conv' .*\['linear', 'mlp'\]"),
    (mlp.Config(depth=0), "depth=0: .* at least 1"),
    (resampler.Config(heads=0), "heads=0: .* at least 1"),
    (idefics2_resampler.Config(projection=0), "projection=0: .* at least 1"),
    (idefics2_resampler.Config(kv_heads=5), r"kv_heads=5 must divide heads=16; possible: \[1, 2, 4, 8, 16\]"),
    (idefics2_resampler.Config(latents="zeros"), r"latents='zeros' .*\('normal', 'ones'\)"),
    (query_resampler.Config(head_width=0), "head_width=0: .* at least 1"),
    (query_resampler.Config(eps=0.0), "eps=0.0: must be above 0"),
    (query_resampler.Config(text_layers=2), "text_layers=2 of depth=2: .* 1 <= text_layers < depth"),
    (qformer.Config(cross_every=0), "cross_every=0: .* at least 1"),
    (qformer.Config(width=100), "heads=12 must divide width=100"),
    (qformer.Config(depth=12, cross_every=5), "cross_every=5 must divide depth=12"),
    (d_abstractor.Config(num_queries=4, pooled_v_target="both"), r"'both' .*\['query', 'tgt', 'none'\]"),
    *pool_cases.IMPOSSIBLE_CHOICES,
    *sincos_cases.IMPOSSIBLE_CHOICES,
    *grid_cases.IMPOSSIBLE_CHOICES,
]
