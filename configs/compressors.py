"""The catalogue of compressors: name -> config for a number of LLM tokens, everything else at its published default.

`mlp` does not compress: it answers only to the tower's full number of tokens. Adding a compressor: one file in
tcjax/compressors, one line here, one row in tests/test_compressors.py.
"""

from tcjax.compressors import avg_pool, c_abstractor, d_abstractor, mlp, pixel_shuffle, resampler

CATALOGUE = {
    "mlp": lambda num_queries: mlp.Config(num_queries=num_queries),
    "avg_pool": lambda num_queries: avg_pool.Config(num_queries=num_queries),
    "pixel_shuffle": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries),
    "pixel_shuffle_mlp": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries, head="mlp"),
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries),
    "c_abstractor": lambda num_queries: c_abstractor.Config(num_queries=num_queries),
    "d_abstractor": lambda num_queries: d_abstractor.Config(num_queries=num_queries),
}

# The same families for the digit boards, whose tower is 96 wide and whose LLM is 128 wide.
BOARDS = CATALOGUE | {
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries, depth=2, heads=4, head_width=32),
    "c_abstractor": lambda num_queries: c_abstractor.Config(num_queries=num_queries, depth=2, hidden=96),
    "d_abstractor": lambda num_queries: d_abstractor.Config(
        num_queries=num_queries, width=128, depth=2, heads=4, feed_forward=128
    ),
}
