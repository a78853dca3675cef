"""The catalogue of compressors: name -> config for a number of LLM tokens, everything else at its published default.

`mlp` does not compress: it answers only to the tower's full number of tokens. Adding a compressor: one file in
tcjax/compressors, one line here, one row in tests/test_compressors.py.
"""

from tcjax.compressors import (
    avg_pool,
    decoder_resampler,
    matryoshka_query,
    mlp,
    pixel_shuffle,
    qwen_resampler,
    resampler,
    spatial_resampler,
)

CATALOGUE = {
    "mlp": lambda num_queries: mlp.Config(num_queries=num_queries),
    "avg_pool": lambda num_queries: avg_pool.Config(num_queries=num_queries),
    "pixel_shuffle": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries),
    "pixel_shuffle_mlp": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries, head="mlp"),
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries),
    "qwen_resampler": lambda num_queries: qwen_resampler.Config(num_queries=num_queries),
    "minicpm_resampler": lambda num_queries: qwen_resampler.Config(num_queries=num_queries, form="minicpm_v45"),
    "uhd_resampler": lambda num_queries: qwen_resampler.Config(num_queries=num_queries, form="uhd"),
    "spatial_resampler": lambda num_queries: spatial_resampler.Config(num_queries=num_queries),
    "matryoshka_query": lambda num_queries: matryoshka_query.Config(num_queries=num_queries),
    "decoder_resampler": lambda num_queries: decoder_resampler.Config(num_queries=num_queries),
}

# The same families for the digit boards, whose tower is 96 wide and whose LLM is 128 wide.
BOARDS = CATALOGUE | {
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries, depth=2, heads=4, head_width=32),
    "qwen_resampler": lambda num_queries: qwen_resampler.Config(num_queries=num_queries, head_width=32),
    "minicpm_resampler": lambda num_queries: qwen_resampler.Config(
        num_queries=num_queries, form="minicpm_v45", head_width=32
    ),
    "uhd_resampler": lambda num_queries: qwen_resampler.Config(num_queries=num_queries, form="uhd", head_width=32),
    "spatial_resampler": lambda num_queries: spatial_resampler.Config(num_queries=num_queries, head_width=32),
    "matryoshka_query": lambda num_queries: matryoshka_query.Config(num_queries=num_queries, head_width=32),
    "decoder_resampler": lambda num_queries: decoder_resampler.Config(
        num_queries=num_queries, heads=4, feed_forward=384
    ),
}
