"""The catalogue of compressors: name -> config for a number of LLM tokens, everything else at its published default.

`mlp` does not compress: it answers only to the tower's full number of tokens. Adding a compressor: one file in
tcjax/compressors, one line here, one row in tests/test_compressors.py.
"""

from tcjax.compressors import avg_pool, learned_merge, mlp, pixel_shuffle, query_merge, resampler, token_learner

CATALOGUE = {
    "mlp": lambda num_queries: mlp.Config(num_queries=num_queries),
    "avg_pool": lambda num_queries: avg_pool.Config(num_queries=num_queries),
    "pixel_shuffle": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries),
    "pixel_shuffle_mlp": lambda num_queries: pixel_shuffle.Config(num_queries=num_queries, head="mlp"),
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries),
    "learned_merge": lambda num_queries: learned_merge.Config(num_queries=num_queries),
    "learned_merge_text": lambda num_queries: learned_merge.Config(num_queries=num_queries, text=True),
    "query_merge": lambda num_queries: query_merge.Config(num_queries=num_queries),
    "token_learner": lambda num_queries: token_learner.Config(num_queries=num_queries),
}

_MERGE = {"scorer": 64, "merger": 64, "metric": 32}

# The same families for the digit boards, whose tower is 96 wide and whose LLM is 128 wide.
BOARDS = CATALOGUE | {
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries, depth=2, heads=4, head_width=32),
    "learned_merge": lambda num_queries: learned_merge.Config(num_queries=num_queries, **_MERGE),
    "learned_merge_text": lambda num_queries: learned_merge.Config(num_queries=num_queries, text=True, **_MERGE),
    "query_merge": lambda num_queries: query_merge.Config(num_queries=num_queries, inner=64),
}
