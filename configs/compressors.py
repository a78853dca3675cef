"""The catalogue of compressors: name -> config for a number of LLM tokens, everything else at its published default.

`mlp` does not compress: it answers only to the tower's full number of tokens. Adding a compressor: one file in
tcjax/compressors, one line here, one row in tests/test_compressors.py.
"""

from tcjax.compressors import avg_pool, conv16, ldp, ldp_v2, mlp, pixel_shuffle, quecc, resampler, token_packer

CATALOGUE = {
    "mlp": lambda num_queries: mlp.Config(num_queries=num_queries),
    "avg_pool": lambda num_queries: avg_pool.Config(num_queries=num_queries),
    "pixel_shuffle": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries),
    "pixel_shuffle_mlp": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries, head="mlp"),
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries),
    "token_packer": lambda num_queries: token_packer.Config(num_queries=num_queries),
    "quecc": lambda num_queries: quecc.Config(num_queries=num_queries),
    "ldp": lambda num_queries: ldp.Config(num_queries=num_queries),
    "ldp_v2": lambda num_queries: ldp_v2.Config(num_queries=num_queries),
    "conv16": lambda num_queries: conv16.Config(num_queries=num_queries),
}

# The same families for the digit boards, whose tower is 96 wide and 4 blocks deep and whose LLM is 128 wide.
_LEVELS = (1, 2, 3)
BOARDS = CATALOGUE | {
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries, depth=2, heads=4, head_width=32),
    "token_packer": lambda num_queries: token_packer.Config(num_queries=num_queries, head_width=32, levels=_LEVELS),
    "quecc": lambda num_queries: quecc.Config(num_queries=num_queries, heads=3, levels=_LEVELS),
}
