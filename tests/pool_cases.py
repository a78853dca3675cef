"""The pools', mergers' and controls' rows of the contract (tests/test_compressors.py), on its 4 x 6 grid of width 12."""

from tcjax.compressors import (
    avg_pool,
    gemma3_pool,
    matryoshka_pool,
    max_pool,
    patch_merger,
    pixel_shuffle,
    random_tokens,
    staged_pool,
    stride_tokens,
)

CASES = {  # name: (tiny config, Q, vdot(tokens, noise) with planted weights)
    "avg_pool_after_mlp": (avg_pool.Config(num_queries=9, order="mlp, then pool", depth=3), 9, 4.00457),
    "max_pool": (max_pool.Config(num_queries=9), 9, -23.022),  # overlapping bins
    "max_pool_shaped": (max_pool.Config(num_queries=12, shape=(4, 3)), 12, -2.91923),  # whole windows
    "max_pool_after_mlp": (max_pool.Config(num_queries=12, shape=(2, 6), order="mlp, then pool"), 12, 45.09529),
    "staged_pool": (staged_pool.Config(num_queries=9, kernel=3, expand=2), 9, -5.4535),
    "staged_pool_shaped": (staged_pool.Config(num_queries=6, shapes=((4, 3), (2, 3)), kernel=3, expand=2), 6, 4.60607),
    "gemma3_pool": (gemma3_pool.Config(num_queries=24), 24, 115.40291),
    "matryoshka_pool": (matryoshka_pool.Config(num_queries=24), 24, -25.53666),
    "matryoshka_pool_two": (matryoshka_pool.Config(num_queries=24, scales=(6, 24), depth=1), 24, 60.47081),
    "random_tokens": (random_tokens.Config(num_queries=5), 5, 2.117),
    "stride_tokens": (stride_tokens.Config(num_queries=9), 9, 5.29342),
    "first_tokens": (stride_tokens.Config(num_queries=7, mode="first"), 7, -13.55064),
    "pixel_shuffle_v1": (pixel_shuffle.Config(num_queries=6, head="mlp", token_order="column by column"), 6, 22.58442),
    "patch_merger": (patch_merger.Config(num_queries=6), 6, -4.76229),
    "patch_merger_rms": (patch_merger.Config(num_queries=6, form="qwen2_5_vl"), 6, -1.60915),
    "patch_merger_wide": (patch_merger.Config(num_queries=6, form="qwen3_vl_deepstack"), 6, -4.73806),
    "patch_merger_mistral": (patch_merger.Config(num_queries=6, form="mistral3"), 6, -15.61424),
}

FEWER = {"max_pool": 4, "staged_pool": 4, "gemma3_pool": 6, "matryoshka_pool": 6, "stride_tokens": 4}

IMPOSSIBLE = {  # name: (config, what the message must say)
    "max_pool": (max_pool.Config(num_queries=6), r"num_queries=6 .*shape=\(h, w\).* possible: \[1, 4, 9, 16\]"),
    "staged_pool": (staged_pool.Config(num_queries=6), r"num_queries=6 .*; possible: \[1, 4, 9, 16\]"),
    "staged_pool_last": (
        staged_pool.Config(num_queries=4, shapes=((4, 3), (2, 3))),
        r"shape=\(2, 3\) has 6 tokens, num_queries=4",
    ),
    "staged_pool_growing": (
        staged_pool.Config(num_queries=6, shapes=((2, 2), (2, 3))),
        r"\(2, 3\) is no pooling of \(2, 2\)",
    ),
    "staged_pool_none": (staged_pool.Config(stages=0), "stages=0: .* at least 1"),
    "staged_pool_empty": (staged_pool.Config(shapes=()), "at least 1 stage"),
    "gemma3_pool": (gemma3_pool.Config(num_queries=9), r"num_queries=9 is not a whole k x k .*; possible: \[6, 24\]"),
    "matryoshka_scale": (matryoshka_pool.Config(num_queries=24, scales=(9, 24)), r"=9 is not .*; possible: \[6, 24\]"),
    "matryoshka_pool": (matryoshka_pool.Config(num_queries=6, scales=(1, 24)), r"none of the scales.*\[1, 24\]"),
    "patch_merger": (patch_merger.Config(num_queries=8), r"num_queries=8 .*; possible: \[6, 24\]"),
    "random_tokens": (random_tokens.Config(num_queries=25), "num_queries=25: must be from 1 up to .* 24 tokens"),
    "stride_tokens": (stride_tokens.Config(num_queries=6), r"num_queries=6 .*; possible: \[1, 4, 9, 16\]"),
    "first_tokens": (stride_tokens.Config(num_queries=0, mode="first"), "num_queries=0: must be from 1"),
}
IMPOSSIBLE_CHOICES = [
    (pixel_shuffle.Config(num_queries=6, token_order="v1"), r"token_order='v1' .*'column by column'"),
    (patch_merger.Config(num_queries=6, form="qwen"), r"form='qwen' .*\['qwen2_vl', 'qwen2_5_vl'"),
    (avg_pool.Config(num_queries=4, order="mlp"), r"order='mlp' .*\['pool, then mlp', 'mlp, then pool'\]"),
    (max_pool.Config(num_queries=4, order="mlp"), r"order='mlp' .*\['pool, then mlp', 'mlp, then pool'\]"),
    (avg_pool.Config(num_queries=4, depth=0), "depth=0: tokens of width 12 .* the LLM's width 16"),
    (max_pool.Config(num_queries=4, depth=-1), "depth=-1: .* at least 1 linear layer"),
    (stride_tokens.Config(num_queries=4, mode="last"), r"mode='last' .*\['grid', 'first'\]"),
    (random_tokens.Config(num_queries=4, seed=-1), "seed=-1: must be from 0"),
    (staged_pool.Config(num_queries=4, kernel=2), "kernel=2.* must be odd"),
]
