"""The rows of the contract (tests/test_compressors.py) of those that cut the grid into cells or convolve it."""

from tcjax.compressors import conv16, ldp, ldp_v2, quecc, token_packer

CASES = {  # name: (tiny config, Q, vdot(tokens, noise) with planted weights)
    "token_packer": (token_packer.Config(num_queries=6, head_width=4, levels=(1, 2)), 6, 1.74397),
    "quecc": (quecc.Config(num_queries=6, heads=2, levels=(1, 2)), 6, -2.01463),
    "quecc_last": (quecc.Config(num_queries=6, heads=3, levels=(1, 2), text_pool="last"), 6, -4.53426),
    "ldp": (ldp.Config(), 6, 3.22742),
    "ldp_v2": (ldp_v2.Config(num_queries=9), 9, -29.78502),  # bins overlap: 4 rows -> 3
    "ldp_v2_shaped": (ldp_v2.Config(num_queries=6, shape=(3, 2)), 6, -8.5902),
    "conv16": (conv16.Config(), 2, -22.86267),
    "conv16_neck": (conv16.Config(num_queries=2, neck=8), 2, 20.66046),
}
# One vector added to all keys of a softmax changes nothing: a published bias that reaches no output.
UNFELT = {"token_packer": {"norm_key/bias": slice(None)}, "quecc": {"key/norm/bias": slice(None)}}
FEWER = {"ldp_v2": 4}

IMPOSSIBLE = {  # name: (config, what the message must say)
    "token_packer": (
        token_packer.Config(num_queries=5),
        r"num_queries=5 .* equal cells .*possible: \[1, 2, 3, 4, 6, 8, 12, 24\]",
    ),
    "token_packer_shape": (
        token_packer.Config(num_queries=6, shape=(3, 2)),
        r"shape=\(3, 2\) .*num_queries=6 .*possible: \[\(1, 6\), \(2, 3\)\]",
    ),
    "token_packer_heads": (token_packer.Config(num_queries=6), "head_width=128 must divide .* C=12"),
    "quecc": (quecc.Config(num_queries=4, heads=2), r"num_queries=4 .* s x s cells .*possible: \[6, 24\]"),
    "quecc_heads": (quecc.Config(num_queries=6, heads=5), "heads=5 must divide .* C=12"),
    "ldp": (ldp.Config(num_queries=4), r"num_queries=4 .* one stride of 2 .*possible: \[6\]"),
    "ldp_v2": (ldp_v2.Config(num_queries=6), r"num_queries=6 .*possible: \[1, 4, 9, 16\]"),
    "conv16": (conv16.Config(num_queries=0), r"num_queries=0 .* two strides of 2 .*possible: \[2\]"),
}
IMPOSSIBLE_CHOICES = [
    (token_packer.Config(num_queries=6, head_width=4), r"levels=\(12, 16, 22, 23\) names 4 .* hands over 2; .*levels"),
    (token_packer.Config(num_queries=6, head_width=4, levels=()), r"levels=\(\) names 0 .*at least 1"),
    (quecc.Config(num_queries=6, heads=2, levels=(3,)), r"levels=\(3,\) names 1 .* hands over 2; .*levels"),
    (quecc.Config(num_queries=6, heads=2, levels=(1, 2), text_pool="max"), r"text_pool='max' .*\['mean', 'last'\]"),
    (conv16.Config(neck=-1), "neck=-1: .* or 0 for none"),
]

KEYS = {  # as published, for tests/test_export.py
    "token_packer": "clip_attn.in_proj_bias clip_attn.in_proj_weight clip_attn.out_proj.bias clip_attn.out_proj.weight "
    "k_proj_1.0.bias k_proj_1.0.weight k_proj_1.2.bias k_proj_1.2.weight ln_k_1.bias ln_k_1.weight ln_q_1.bias "
    "ln_q_1.weight ln_v_1.bias ln_v_1.weight mlp.0.bias mlp.0.weight mlp.2.bias mlp.2.weight q_proj_1.weight "
    "v_proj_1.0.bias v_proj_1.0.weight v_proj_1.2.bias v_proj_1.2.weight",
    "quecc": "0.clip_attn.in_proj_bias 0.clip_attn.in_proj_weight 0.clip_attn.out_proj.bias "
    "0.clip_attn.out_proj.weight 0.k_proj.0.bias 0.k_proj.0.weight 0.k_proj.2.bias 0.k_proj.2.weight 0.k_proj.3.bias "
    "0.k_proj.3.weight 0.q_downsample.bias 0.q_downsample.weight 0.q_proj.0.bias 0.q_proj.0.weight 0.q_proj.2.bias "
    "0.q_proj.2.weight 0.q_proj.3.bias 0.q_proj.3.weight 0.text_projection.0.bias 0.text_projection.0.weight "
    "0.text_projection.1.bias 0.text_projection.1.weight 0.v_proj.0.bias 0.v_proj.0.weight 0.v_proj.2.bias "
    "0.v_proj.2.weight 0.v_proj.3.bias 0.v_proj.3.weight 1.bias 1.weight 3.bias 3.weight",
    "ldp": "model.mlp.1.bias model.mlp.1.weight model.mlp.3.bias model.mlp.3.weight "
    + " ".join(
        f"model.mb_block.{block}.block.{name}"
        for block in (1, 2)
        for name in "0.0.weight 0.1.bias 0.1.weight 1.fc1.bias 1.fc1.weight 1.fc2.bias 1.fc2.weight 2.0.weight "
        "2.1.bias 2.1.weight".split()
    ),
    "ldp_v2": "mlp.mlp.0.bias mlp.mlp.0.weight mlp.mlp.2.bias mlp.mlp.2.weight peg.peg.0.bias peg.peg.0.weight",
    "conv16": "net_2.weight net_3.weight out_proj.bias out_proj.weight",
    "conv16_neck": "neck.0.weight neck.1.bias neck.1.weight neck.2.weight neck.3.bias neck.3.weight net_2.weight "
    "net_3.weight out_proj.bias out_proj.weight",
}
KEYS |= {"token_packer_oblong": KEYS["token_packer"], "quecc_last": KEYS["quecc"]}
