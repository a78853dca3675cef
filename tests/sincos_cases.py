"""The rows of the resamplers with sin-cos positions, regions or a decoder for the contract (tests/test_compressors.py)."""

from tcjax.compressors import decoder_resampler, matryoshka_query, qwen_resampler, spatial_resampler

CASES = {  # name: (tiny config, Q, vdot(tokens, noise) with planted weights)
    "qwen_resampler": (qwen_resampler.Config(num_queries=9, head_width=8), 9, -19.53106),
    "qwen_resampler_prefix": (
        qwen_resampler.Config(num_queries=3, max_queries=4, head_width=8, post=False),
        3,
        5.29743,
    ),
    "omnilmm": (qwen_resampler.Config(num_queries=4, form="omnilmm", head_width=4), 4, -6.32458),
    "minicpm_v2": (qwen_resampler.Config(num_queries=4, form="minicpm_v2", head_width=8), 4, -7.07854),
    "minicpm_v25": (qwen_resampler.Config(num_queries=5, form="minicpm_v25", head_width=8), 5, -1.27553),
    "minicpm_v45": (qwen_resampler.Config(num_queries=5, form="minicpm_v45", head_width=16), 5, 3.36562),
    "uhd_resampler": (qwen_resampler.Config(num_queries=4, form="uhd", head_width=8), 4, 1.37828),
    "spatial_resampler": (spatial_resampler.Config(num_queries=9, head_width=8), 9, -0.47639),
    "matryoshka_query": (matryoshka_query.Config(num_queries=9, max_queries=9, head_width=6), 9, -0.03622),
    "matryoshka_content": (
        matryoshka_query.Config(num_queries=3, max_queries=9, head_width=4, key_content=True),
        3,
        -0.81093,
    ),
    "decoder_resampler": (decoder_resampler.Config(num_queries=5, heads=2, feed_forward=20), 5, -14.86598),
    "decoder_resampler_prefix": (
        decoder_resampler.Config(num_queries=3, max_queries=5, heads=3, feed_forward=20, depth=1),
        3,
        3.66479,
    ),
}

IMPOSSIBLE = {  # name: (config, what the message must say)
    "qwen_resampler": (
        qwen_resampler.Config(num_queries=5, head_width=8),
        r"max_queries=5 is no square, but form='qwen_vl' .* near it are 4 and 9\. num_queries may be any",
    ),
    "uhd": (qwen_resampler.Config(num_queries=8, form="uhd", head_width=8), r"max_queries=8 is no square.* 4 and 9"),
    "more_than_max": (
        qwen_resampler.Config(num_queries=5, max_queries=4, form="minicpm_v25", head_width=8),
        r"num_queries=5: .* up to max_queries=4",
    ),
    "form": (qwen_resampler.Config(form="minicpm"), r"form='minicpm' is none of \['qwen_vl', .* 'uhd'\]"),
    "spatial_resampler": (
        spatial_resampler.Config(num_queries=8, head_width=8),
        r"num_queries=8 is not a square number of regions of a 4x6 grid; possible: \[1, 4, 9, 16, 25, 36, 49, 64\]",
    ),
    "spatial_resampler_large": (spatial_resampler.Config(num_queries=81, head_width=8), r"num_queries=81 .* 49, 64\]"),
    "matryoshka_query": (matryoshka_query.Config(num_queries=257, head_width=6), r"num_queries=257: .*max_queries=256"),
    "matryoshka_table": (
        matryoshka_query.Config(num_queries=3, max_queries=8, head_width=6),
        r"max_queries=8 is no square, but matryoshka_query",
    ),
    "decoder_resampler": (decoder_resampler.Config(num_queries=0), r"num_queries=0: .* from 1 up"),
}
IMPOSSIBLE_CHOICES = [
    (qwen_resampler.Config(num_queries=4), r"head_width=128 does not divide .* width 16; .*\[1, 2, 4, 8, 16\]"),
    (qwen_resampler.Config(num_queries=4, head_width=8, frame_step=0), "frame_step=0: .* at least 1"),
    (spatial_resampler.Config(num_queries=4), r"head_width=128 does not divide .* width 16"),
    (matryoshka_query.Config(num_queries=4), r"head_width=64 does not divide .* width 12"),
    (decoder_resampler.Config(heads=5), "heads=5 must divide the width 12"),
    (decoder_resampler.Config(heads=4, depth=0), "depth=0: .* at least 1"),
]

KEYS = {  # the published names of exported cases, for tests/test_export.py
    "qwen_resampler": "attn_pool.attn.in_proj_bias attn_pool.attn.in_proj_weight attn_pool.attn.out_proj.bias "
    "attn_pool.attn.out_proj.weight attn_pool.kv_proj.weight attn_pool.ln_kv.bias attn_pool.ln_kv.weight "
    "attn_pool.ln_q.bias attn_pool.ln_q.weight attn_pool.pos_embed attn_pool.query ln_post.bias ln_post.weight proj",
    "minicpm_v2": "pos_embed",  # beside those of minicpm_v45, whose table is computed
    "minicpm_v45": "attn.in_proj_bias attn.in_proj_weight attn.out_proj.bias attn.out_proj.weight kv_proj.weight "
    "ln_kv.bias ln_kv.weight ln_post.bias ln_post.weight ln_q.bias ln_q.weight proj query",
    "uhd_resampler": "pos_embed",
    "spatial_resampler": "pos_embed",
    "matryoshka_query": "attn.in_proj_bias attn.in_proj_weight attn.out_proj.bias attn.out_proj.weight "
    "ln_k.bias ln_k.weight ln_q.bias ln_q.weight ln_v.bias ln_v.weight pos_embed proj query",
    "decoder_resampler": "queries out_proj.bias out_proj.weight "
    "layers.{i}.self_attn.in_proj_bias layers.{i}.self_attn.in_proj_weight layers.{i}.self_attn.out_proj.bias "
    "layers.{i}.self_attn.out_proj.weight layers.{i}.multihead_attn.in_proj_bias "
    "layers.{i}.multihead_attn.in_proj_weight layers.{i}.multihead_attn.out_proj.bias "
    "layers.{i}.multihead_attn.out_proj.weight layers.{i}.linear1.bias layers.{i}.linear1.weight "
    "layers.{i}.linear2.bias layers.{i}.linear2.weight layers.{i}.norm1.bias layers.{i}.norm1.weight "
    "layers.{i}.norm2.bias layers.{i}.norm2.weight layers.{i}.norm3.bias layers.{i}.norm3.weight",
}
BESIDE = dict.fromkeys(("minicpm_v2", "uhd_resampler", "spatial_resampler"), "minicpm_v45")  # whose keys it has, too
