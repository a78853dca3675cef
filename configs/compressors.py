"""The catalogue of compressors: name -> config for a number of LLM tokens, everything else at its published default.

`mlp` does not compress: it answers only to the tower's full number of tokens. Adding a compressor: one file in
tcjax/compressors, one line here, one row in tests/test_compressors.py.
"""

from tcjax.compressors import (
    avg_pool,
    gemma3_pool,
    matryoshka_pool,
    max_pool,
    mlp,
    patch_merger,
    pixel_shuffle,
    random_tokens,
    resampler,
    staged_pool,
    stride_tokens,
)

CATALOGUE = {
    "mlp": lambda num_queries: mlp.Config(num_queries=num_queries),
    "avg_pool": lambda num_queries: avg_pool.Config(num_queries=num_queries),
    "avg_pool_after_mlp": lambda num_queries: avg_pool.Config(num_queries=num_queries, order="mlp, then pool"),
    "max_pool": lambda num_queries: max_pool.Config(num_queries=num_queries),
    "staged_pool": lambda num_queries: staged_pool.Config(num_queries=num_queries),
    "gemma3_pool": lambda num_queries: gemma3_pool.Config(num_queries=num_queries),
    "matryoshka_pool": lambda num_queries: matryoshka_pool.Config(num_queries=num_queries),
    "pixel_shuffle": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries),
    "pixel_shuffle_mlp": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries, head="mlp"),
    "qwen2_vl_merger": lambda num_queries: patch_merger.Config(num_queries=num_queries),
    "qwen2_5_vl_merger": lambda num_queries: patch_merger.Config(num_queries=num_queries, form="qwen2_5_vl"),
    "qwen3_vl_merger": lambda num_queries: patch_merger.Config(num_queries=num_queries, form="qwen3_vl"),
    "mistral3_merger": lambda num_queries: patch_merger.Config(num_queries=num_queries, form="mistral3"),
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries),
    "random_tokens": lambda num_queries: random_tokens.Config(num_queries=num_queries),
    "stride_tokens": lambda num_queries: stride_tokens.Config(num_queries=num_queries),
    "first_tokens": lambda num_queries: stride_tokens.Config(num_queries=num_queries, mode="first"),
}

# The same families for the digit boards, whose tower is 96 wide and whose LLM is 128 wide.
BOARDS = CATALOGUE | {
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries, depth=2, heads=4, head_width=32),
}
