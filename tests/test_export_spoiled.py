"""What shapes and names cannot see: spoiled weights, semantics and code are caught by name or by the probes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tcjax.export.torch import verify
from tcjax.interop import tensors
from tests.exported import artifact_copy


def problems(folder: Path) -> str:
    return "\n".join(verify.check(folder, hashes=False)["problems"])


def spoil_weights(folder: Path, change) -> None:
    weights = tensors.load(folder / "compressor.safetensors")
    change(weights)
    tensors.save(folder / "compressor.safetensors", weights)


def spoil_config(folder: Path, **facts) -> None:
    path = folder / "compressor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def transpose(weights):
    weights["2.weight"] = weights["2.weight"].T


def swap_keys_and_values(weights):
    weights["layers.1.0.to_kv.weight"] = np.roll(weights["layers.1.0.to_kv.weight"], 8, axis=0)


def merge_channels_first(weights):
    wide_DE = weights["modality_projection.proj.weight"]
    weights["modality_projection.proj.weight"] = wide_DE.reshape(12, 4, 8).swapaxes(1, 2).reshape(12, 32)


def swap_feed_forwards(weights):
    """The queries get the text's."""
    for layer in ("qformer.encoder.layer.0.intermediate", "qformer.encoder.layer.0.output"):
        for name in [name for name in weights if name.startswith(f"{layer}.")]:
            queries = name.replace(layer, f"{layer}_query")
            weights[name], weights[queries] = weights[queries], weights[name]


def swap_rows_and_columns(weights):
    weights["reference_points"] = weights["reference_points"][..., ::-1].copy()


def turn_the_table(weights):
    weights["attn_pool.pos_embed"] = weights["attn_pool.pos_embed"].reshape(2, 2, 12).swapaxes(0, 1).reshape(4, 12)


def transpose_proj(weights):
    weights["proj"] = weights["proj"].T


def swap_projections(weights):
    keys, values = (weights[f"{name}_proj_1.2.weight"] for name in "kv")
    weights["k_proj_1.2.weight"], weights["v_proj_1.2.weight"] = values, keys


def turn_kernel(weights):
    weights["net_3.weight"] = np.ascontiguousarray(weights["net_3.weight"].swapaxes(2, 3))


def drop(weights):
    del weights["2.bias"]


def add(weights):
    weights["4.weight"] = np.ones(3, np.float32)


def misshape(weights):
    weights["0.weight"] = weights["0.weight"].T


def one_nan(weights):
    weights["layers.0.1.3.weight"] = weights["layers.0.1.3.weight"].copy()
    weights["layers.0.1.3.weight"][1, 2] = np.nan


SPOILED_WEIGHTS = {
    "transposed square weight": ("mlp", transpose, r"parity: plain: off by"),
    "swapped keys and values": ("resampler", swap_keys_and_values, r"parity: plain: off by"),
    "channel-major merge": ("pixel_shuffle", merge_channels_first, r"parity: plain: off by"),
    "swapped feed-forwards": ("qformer_text", swap_feed_forwards, r"parity: plain: off by"),
    "points as (y, x)": ("d_abstractor", swap_rows_and_columns, r"parity: plain: off by"),
    "swapped projections": ("token_packer", swap_projections, r"parity: plain: off by"),
    "kernel with rows for columns": ("conv16", turn_kernel, r"parity: plain: off by"),
    "dropped key": ("mlp", drop, r'load: .*Missing key\(s\) in state_dict: "2\.bias"'),
    "extra key": ("mlp", add, r'load: .*Unexpected key\(s\) in state_dict: "4\.weight"'),
    "wrong shape": ("mlp", misshape, r"load: .*size mismatch for 0\.weight"),
    "NaN": ("resampler", one_nan, r"load: layers\.0\.1\.3\.weight is not finite"),
    "rows and columns of a table": ("qwen_resampler", turn_the_table, r"parity: plain: off by"),
    "transposed raw parameter": ("uhd_resampler", transpose_proj, r"parity: plain: off by"),
}
SPOILED_CONFIG = {
    "tanh GELU in the mlp": ("mlp", {"activation": "gelu_pytorch_tanh"}, r"parity: plain: off by"),
    "tanh GELU in the resampler": ("resampler", {"activation": "gelu_pytorch_tanh"}, r"parity: plain: off by"),
    "eps in the resampler": ("resampler", {"norm_eps": 1e-6}, r"parity: faint: off by"),
    "eps in the pixel shuffle": ("pixel_shuffle_mlp", {"norm_eps": 1e-6}, r"parity: faint: off by"),
    "eps in the idefics2 resampler": ("idefics2_resampler", {"norm_eps": 1e-6}, r"parity: faint: off by"),
    "the image before the question": ("query_resampler", {"reading_order": "image, text"}, r"load: .*'image, text'"),
    "eps in the C-Abstractor's blocks": ("c_abstractor", {"norm_eps": 1e-6}, r"parity: \w+: off by"),
    "eps before the C-Abstractor's blocks": ("c_abstractor_bare", {"prenorm_eps": 1e-5}, r"parity: faint: off by"),
    "eps in the D-Abstractor": ("d_abstractor", {"norm_eps": 1e-6}, r"parity: \w+: off by"),
    "content in place of positions": ("d_abstractor", {"pooled_v_target": "tgt"}, r"parity: plain: off by"),
    "other heads": ("resampler", {"heads": 4, "head_width": 2}, r"parity: plain: off by"),
    "other heads in the Q-Former": ("qformer", {"heads": 4}, r"parity: plain: off by"),
    "other bins": ("avg_pool", {"pooled": [2, 3]}, r"parity: plain: off by"),
    "another number of tokens": ("avg_pool", {"pooled": [2, 2]}, r"output is \[2, 4, 12\], JAX gave \[2, 6, 12\]"),
    "turned grid": ("pixel_shuffle", {"grid": [6, 4]}, r"parity: plain: off by"),
    "another merge order": (
        "pixel_shuffle",
        {"channel_order": "channel, row, column"},
        r"load: .*'channel, row, column'",
    ),
    "eps in the token packer": ("token_packer", {"norm_eps": 1e-5}, r"parity: faint: off by"),
    "other cells": ("token_packer", {"cells": [1, 6]}, r"parity: plain: off by"),
    "another query": ("token_packer", {"query": "antialiased"}, r"load: .*'antialiased'"),
    "the last word for the mean": ("quecc", {"text_pool": "last"}, r"parity: plain: off by"),
    "eps in the LDP": ("ldp", {"norm_eps": 1e-6}, r"parity: faint: off by"),
    "another place of the pool": ("avg_pool", {"order": "mlp, then pool"}, r"parity: plain: off by"),
    "an unknown place of the pool": ("avg_pool", {"order": "mlp"}, r"load: .*'mlp'"),
    "another merge order in the merger": ("mistral3", {"channel_order": "row, column, channel"}, r"plain: off by"),
    "blocks column by column": ("pixel_shuffle_mlp", {"output_order": "column by column"}, r"plain: off by"),
    "eps in the merger": ("qwen2_5_vl", {"norm_eps": 1e-5}, r"parity: faint: off by"),
    "another draw": ("random_tokens", {"seed": 4}, r"parity: plain: off by"),
    "another lattice": ("stride_tokens", {"mode": "first"}, r"parity: plain: off by"),
    "another stage": ("staged_pool", {"stages": [[4, 6], [4, 4], [3, 3]]}, r"parity: plain: off by"),
    "other temperature of the shares": ("learned_merge", {"temperature": 0.2}, r"parity: plain: off by"),
    "exact GELU in the maps": ("token_learner", {"activation": "gelu"}, r"parity: plain: off by"),
    "another family": ("avg_pool", {"family": "mlp"}, r"load: .*'avg_pool', the config is of 'mlp'"),
    "positions on the queries": ("minicpm_v2", {"queries_have_positions": False}, r"parity: plain: off by"),
    "resized positions": ("minicpm_v2", {"key_positions": "resized"}, r"parity: plain: off by"),
    "exact positions": ("uhd_resampler", {"key_positions": "exact"}, r"parity: plain: off by"),
    "unknown positions": ("uhd_resampler", {"key_positions": "learned"}, r"load: .*'learned'"),
    "eps in the single layer": ("minicpm_v45", {"norm_eps": 1e-5}, r"parity: faint: off by"),
    "other samples": ("spatial_resampler", {"samples": [3, 3]}, r"parity: plain: off by"),
    "other sampling": ("spatial_resampler", {"sampling": "aligned"}, r"load: .*'aligned'"),
    "the image in the keys": ("matryoshka_query", {"key_content": True}, r"parity: plain: off by"),
    "GELU in the decoder": ("decoder_resampler", {"activation": "gelu"}, r"parity: plain: off by"),
    "norms before": ("decoder_resampler", {"norm_order": "before"}, r"load: .*'before'"),
}
SPOILED_CODE = {
    "padding is read": (
        "resampler",
        "tokens.masked_fill(~valid[..., None], 0)",
        "tokens * 1",
        r"parity: masked: output is not finite",
    ),
    "padding is attended to": ("resampler", "torch.cat([valid,", "torch.cat([valid | True,", r"parity: masked: off by"),
    "padded text is attended to": (
        "qformer_text",
        "torch.cat([everyone, text_valid]",
        "torch.cat([everyone, text_valid | True]",
        r"parity: plain: off by",
    ),
    "text reads the image": (
        "qformer_text",
        "queries, text = hidden[:, :num_queries], hidden[:, num_queries:]",
        "queries, text = hidden, hidden[:, num_queries:]",
        r"parity: plain: (off by|.*size)",
    ),
    "convolutions see padding": (
        "c_abstractor",
        "inner = inner.masked_fill(~keep, 0)",
        "inner = inner * 1",
        r"parity: masked: off by",
    ),
    "values of padding are read": (
        "d_abstractor",
        "values = values.masked_fill(~valid[..., None], 0)",
        "values = values * 1",
        r"parity: masked: off by",
    ),
    "an empty bin is valid": ("avg_pool", "some = share > 0", "some = share >= 0", r"parity: masked: other outputs"),
    "padding of the question is read": (
        "query_resampler",
        "self.seen(text_valid), self.seen(valid)",
        "None, self.seen(valid)",
        r"parity: plain: off by",
    ),
    "other heads share": (
        "idefics2_resampler",
        ".repeat_interleave(self.shared_by, dim=1)",
        ".repeat(1, self.shared_by, 1, 1)",
        r"parity: plain: off by",
    ),
    "padding wins": ("max_pool", 'float("-inf")', "0.0", r"parity: masked: off by"),
    "the norm's bias is read": (
        "qwen2_vl",
        '"token").masked_fill(~keep, 0)',
        '"token")',
        r"parity: masked: off by",
    ),
    "the mlp's bias is averaged": (
        "matryoshka_pool",
        "masked_fill(~keep, 0)).masked_fill(~keep, 0)",
        "masked_fill(~keep, 0))",
        r"parity: masked: off by",
    ),
    "kept in order of score": (
        "learned_merge",
        "keepdim=True), length).sort(dim=-1).values",
        "keepdim=True), length)",
        r"parity: masked: other outputs|parity: plain: off by",
    ),
    "dropped tokens add nothing": (
        "learned_merge",
        "kept = kept + self.merge(",
        "kept = kept + 0 * self.merge(",
        r"parity: plain: off by",
    ),
    "padded text is read": (
        "query_merge",
        "text.masked_fill(~text_valid[..., None], 0)",
        "text",
        r"parity: plain: output is not finite",
    ),
    "no text is a text": (
        "quecc",
        "self.text_projection(vector).masked_fill(count == 0, 0)",
        "self.text_projection(vector)",
        r"parity: (masked|plain): off by",
    ),
    "a convolution reads padding": (
        "conv16",
        "grid = zeroed(layer(grid), keep)",
        "grid = layer(grid)",
        r"parity: masked: off by",
    ),
    "padding weighs channels": (
        "ldp",
        "read.sum((2, 3), keepdim=True) / keep.sum",
        "read.mean((2, 3), keepdim=True) / keep.sum",
        r"parity: masked: off by",
    ),
    "queries in another order": (
        "resampler",
        "latents = self.norm_latents(latents)",
        "latents = self.norm_latents(latents).flip(1)",
        r"parity: plain: off by",
    ),
    "unseen samples count": (
        "spatial_resampler",
        "share / mass.where(mass > 0, 1)",
        "share.expand_as(mass)",
        r"parity: masked: off by",
    ),
}


@pytest.mark.parametrize("spoiled", SPOILED_WEIGHTS)
def test_wrong_weights_are_caught(tmp_path, spoiled):
    case, change, message = SPOILED_WEIGHTS[spoiled]
    folder = artifact_copy(case, tmp_path)
    spoil_weights(folder, change)
    assert re.search(message, problems(folder), re.DOTALL)


@pytest.mark.parametrize("spoiled", SPOILED_CONFIG)
def test_wrong_semantics_are_caught(tmp_path, spoiled):
    case, facts, message = SPOILED_CONFIG[spoiled]
    folder = artifact_copy(case, tmp_path)
    spoil_config(folder, **facts)
    assert re.search(message, problems(folder), re.DOTALL)


@pytest.mark.parametrize("spoiled", SPOILED_CODE)
def test_wrong_code_is_caught(tmp_path, spoiled):
    case, right, wrong, message = SPOILED_CODE[spoiled]
    path = artifact_copy(case, tmp_path) / "modeling_compressor.py"
    assert path.read_text().count(right) == 1
    path.write_text(path.read_text().replace(right, wrong))
    assert re.search(message, problems(path.parent))


def test_no_probe_is_no_proof(tmp_path):
    folder = artifact_copy("mlp", tmp_path)
    tensors.save(folder / "golden.safetensors", {})
    assert problems(folder) == "parity: golden.safetensors holds no case"
