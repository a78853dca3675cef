"""The catalogue of compressors: name -> config for a number of LLM tokens, everything else at its published default.

`mlp` does not compress: it answers only to the tower's full number of tokens. Adding a compressor: one file in
tcjax/compressors, one line here, one row in tests/compressor_cases.py.
"""

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
    pixel_shuffle,
    qformer,
    quecc,
    query_merge,
    query_resampler,
    qwen_resampler,
    random_tokens,
    resampler,
    resize_image,
    spatial_resampler,
    staged_pool,
    stride_tokens,
    token_learner,
    token_packer,
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
    "resize_image": lambda num_queries: resize_image.Config(num_queries=num_queries),
    "idefics2_resampler": lambda num_queries: idefics2_resampler.Config(num_queries=num_queries),
    "query_resampler": lambda num_queries: query_resampler.Config(num_queries=num_queries),
    "qformer": lambda num_queries: qformer.Config(num_queries=num_queries),
    "qformer_text": lambda num_queries: qformer.Config(num_queries=num_queries, text=True),  # InstructBLIP's
    "random_tokens": lambda num_queries: random_tokens.Config(num_queries=num_queries),
    "stride_tokens": lambda num_queries: stride_tokens.Config(num_queries=num_queries),
    "first_tokens": lambda num_queries: stride_tokens.Config(num_queries=num_queries, mode="first"),
    "learned_merge": lambda num_queries: learned_merge.Config(num_queries=num_queries),
    "learned_merge_text": lambda num_queries: learned_merge.Config(num_queries=num_queries, text=True),
    "query_merge": lambda num_queries: query_merge.Config(num_queries=num_queries),
    "token_learner": lambda num_queries: token_learner.Config(num_queries=num_queries),
    "token_packer": lambda num_queries: token_packer.Config(num_queries=num_queries),
    "quecc": lambda num_queries: quecc.Config(num_queries=num_queries),
    "ldp": lambda num_queries: ldp.Config(num_queries=num_queries),
    "ldp_v2": lambda num_queries: ldp_v2.Config(num_queries=num_queries),
    "conv16": lambda num_queries: conv16.Config(num_queries=num_queries),
    "c_abstractor": lambda num_queries: c_abstractor.Config(num_queries=num_queries),
    "d_abstractor": lambda num_queries: d_abstractor.Config(num_queries=num_queries),
    "qwen_resampler": lambda num_queries: qwen_resampler.Config(num_queries=num_queries),
    "minicpm_resampler": lambda num_queries: qwen_resampler.Config(num_queries=num_queries, form="minicpm_v45"),
    "uhd_resampler": lambda num_queries: qwen_resampler.Config(num_queries=num_queries, form="uhd"),
    "spatial_resampler": lambda num_queries: spatial_resampler.Config(num_queries=num_queries),
    "matryoshka_query": lambda num_queries: matryoshka_query.Config(num_queries=num_queries),
    "decoder_resampler": lambda num_queries: decoder_resampler.Config(num_queries=num_queries),
}

_LEVELS = (1, 2, 3)  # of the boards' tower, which has 4 blocks
_MERGE = {"scorer": 64, "merger": 64, "metric": 32}

# The same families for the digit boards, whose tower is 96 wide and whose LLM is 128 wide.
SMALL_BERT = {"depth": 2, "width": 128, "heads": 4, "feed_forward": 512, "cross_every": 1}
BOARDS = CATALOGUE | {
    "resampler": lambda num_queries: resampler.Config(num_queries=num_queries, depth=2, heads=4, head_width=32),
    "idefics2_resampler": lambda num_queries: idefics2_resampler.Config(
        num_queries=num_queries, depth=2, heads=4, kv_heads=2, head_width=32, projection=256
    ),
    "query_resampler": lambda num_queries: query_resampler.Config(
        num_queries=num_queries, width=96, heads=4, kv_heads=2, head_width=32
    ),
    "qformer": lambda num_queries: qformer.Config(num_queries=num_queries, **SMALL_BERT),
    "qformer_text": lambda num_queries: qformer.Config(num_queries=num_queries, text=True, max_text=64, **SMALL_BERT),
    "learned_merge": lambda num_queries: learned_merge.Config(num_queries=num_queries, **_MERGE),
    "learned_merge_text": lambda num_queries: learned_merge.Config(num_queries=num_queries, text=True, **_MERGE),
    "query_merge": lambda num_queries: query_merge.Config(num_queries=num_queries, inner=64),
    "token_packer": lambda num_queries: token_packer.Config(num_queries=num_queries, head_width=32, levels=_LEVELS),
    "quecc": lambda num_queries: quecc.Config(num_queries=num_queries, heads=3, levels=_LEVELS),
    "c_abstractor": lambda num_queries: c_abstractor.Config(num_queries=num_queries, depth=2, hidden=96),
    "d_abstractor": lambda num_queries: d_abstractor.Config(
        num_queries=num_queries, width=128, depth=2, heads=4, feed_forward=128
    ),
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


def wrapped(catalogue: dict) -> dict:
    """What is made of the others: one training for any Q, and 64 times fewer in three stages of 4."""
    return {
        "elastic": lambda num_queries: elastic.Config(of=catalogue["resampler"](num_queries)),
        # MQT's second stage draws its numbers of queries from 2, 4, ..., Q.
        "mqt": lambda num_queries: elastic.Config(
            of=catalogue["matryoshka_query"](num_queries), drawn_from=tuple(range(2, num_queries + 1, 2))
        ),
        "chain": lambda num_queries: chain.Config(
            parts=(
                catalogue["avg_pool"](16 * num_queries),
                catalogue["resampler"](4 * num_queries),
                catalogue["learned_merge"](num_queries),
            )
        ),
    }


CATALOGUE |= wrapped(CATALOGUE)
BOARDS |= wrapped(BOARDS)
