"""The artifact: PyTorch computes what JAX trained, it comes back bit for bit, and nothing else passes for it."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tcjax.compressors import avg_pool, mlp, pixel_shuffle, resampler
from tcjax.compressors.base import Widths
from tcjax.export import families
from tcjax.export.artifact import ArtifactMismatch, export, load_artifact
from tcjax.export.torch import verify
from tcjax.interop import names, tensors
from tcjax.record import file_hash
from tests import grid_cases, sincos_cases
from tests.exported import CASES, PROVENANCE, ROWS, WIDTHS, artifact, artifact_copy, built

IDEFICS2_LAYER = (
    "input_latents_norm input_context_norm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
).split()
QFORMER = """attention.attention.query attention.attention.key attention.attention.value
    attention.output.dense attention.output.LayerNorm
    intermediate_query.dense output_query.dense output_query.LayerNorm"""
CROSS = """crossattention.attention.query crossattention.attention.key crossattention.attention.value
    crossattention.output.dense crossattention.output.LayerNorm"""


def both(prefix: str, modules: str) -> str:
    """Weight and bias of each."""
    return " ".join(f"{prefix}{module}.{name}" for module in modules.split() for name in ("bias", "weight"))


BLOCK = "conv1.conv.weight conv1.bn.weight conv1.bn.bias conv2.conv.weight conv2.bn.weight conv2.bn.bias se.fc1.weight "
BLOCK += "se.fc1.bias se.fc2.weight se.fc2.bias conv3.conv.weight conv3.bn.weight conv3.bn.bias"
BLOCKS = " ".join(f"net.{k}.b{b}.{key}" for k in (0, 2) for b in (1, 2) for key in BLOCK.split())
KEYS = {  # as published; a wrong name is only a warning to most loaders
    "mlp": "0.bias 0.weight 2.bias 2.weight",
    "avg_pool": "0.bias 0.weight 2.bias 2.weight",
    "avg_pool_after_mlp": "0.bias 0.weight",
    "max_pool": "0.bias 0.weight 2.bias 2.weight",
    "max_pool_after_mlp": "0.bias 0.weight 2.bias 2.weight",
    "staged_pool": "blocks.{i}.dwconv.bias blocks.{i}.dwconv.weight blocks.{i}.layer_scale_parameter "
    "blocks.{i}.layernorm.bias blocks.{i}.layernorm.weight blocks.{i}.pwconv1.bias blocks.{i}.pwconv1.weight "
    "blocks.{i}.pwconv2.bias blocks.{i}.pwconv2.weight "
    "mm_projector.0.bias mm_projector.0.weight mm_projector.2.bias mm_projector.2.weight",
    "gemma3_pool": "mm_input_projection_weight mm_soft_emb_norm.weight",
    "matryoshka_pool": "0.bias 0.weight 2.bias 2.weight",
    "random_tokens": "0.bias 0.weight 2.bias 2.weight",
    "stride_tokens": "0.bias 0.weight 2.bias 2.weight",
    "first_tokens": "0.bias 0.weight 2.bias 2.weight",
    "pixel_shuffle": "modality_projection.proj.weight",
    "pixel_shuffle_mlp": "mlp1.0.bias mlp1.0.weight mlp1.1.bias mlp1.1.weight mlp1.3.bias mlp1.3.weight",
    "chain": "parts.0.0.bias parts.0.0.weight parts.0.2.bias parts.0.2.weight parts.1.modality_projection.proj.weight",
    "per_frame": "each.0.bias each.0.weight each.2.bias each.2.weight",
    "elastic": "",
    "pixel_shuffle_v1": "mlp1.0.bias mlp1.0.weight mlp1.1.bias mlp1.1.weight mlp1.3.bias mlp1.3.weight",
    "qwen2_vl": "ln_q.bias ln_q.weight mlp.0.bias mlp.0.weight mlp.2.bias mlp.2.weight",
    "qwen2_5_vl": "ln_q.weight mlp.0.bias mlp.0.weight mlp.2.bias mlp.2.weight",
    "qwen3_vl": "linear_fc1.bias linear_fc1.weight linear_fc2.bias linear_fc2.weight norm.bias norm.weight",
    "qwen3_vl_deepstack": "linear_fc1.bias linear_fc1.weight linear_fc2.bias linear_fc2.weight norm.bias norm.weight",
    "mistral3": "linear_1.weight linear_2.weight norm.weight patch_merger.merging_layer.weight",
    "learned_merge": "importance_network.local.bias importance_network.local.weight importance_network.mixed.bias "
    "importance_network.mixed.weight importance_network.norm.bias importance_network.norm.weight "
    "importance_network.overall.weight importance_network.score.weight merger_network.back.weight "
    "merger_network.dropped.weight merger_network.kept.bias merger_network.kept.weight metric.weight "
    "out.0.bias out.0.weight out.2.bias out.2.weight",
    "learned_merge_told": "importance_network.text_norm.bias importance_network.text_norm.weight "
    "importance_network.text_query.weight importance_network.token_key.weight importance_network.trust",  # beside those
    "learned_merge_literal": "importance_network.0.bias importance_network.0.weight importance_network.2.bias "
    "importance_network.2.weight merger_network.0.bias merger_network.0.weight merger_network.2.bias "
    "merger_network.2.weight out.0.bias out.0.weight out.2.bias out.2.weight",
    "query_merge": "norm.bias norm.weight out.0.bias out.0.weight out.2.bias out.2.weight relevance.key.weight "
    "relevance.norm.bias relevance.norm.weight relevance.query.weight slot_key.weight slots",
    "query_merge_literal": "norm.bias norm.weight out.0.bias out.0.weight out.2.bias out.2.weight "
    "relevance.query.weight slot_key.weight slots",
    "token_learner": "LayerNorm_0.bias LayerNorm_0.weight out.0.bias out.0.weight out.2.bias out.2.weight "
    "token_masking.Dense_0.bias token_masking.Dense_0.weight token_masking.Dense_1.weight",
    "c_abstractor": f"{BLOCKS} pos_emb readout.0.bias readout.0.weight readout.2.bias readout.2.weight "
    "net.0.b1.downsample.conv.weight net.0.b1.downsample.bn.weight net.0.b1.downsample.bn.bias",
    "c_abstractor_bare": f"{BLOCKS} prenorm.bias prenorm.weight readout.0.bias readout.0.weight readout.2.bias "
    "readout.2.weight readout.4.bias readout.4.weight",
    "d_abstractor_bare": "input_proj.0.bias input_proj.0.weight query_position_embeddings.weight reference_points v_pos_emb "
    "layers.{i}.self_attn.k_proj.bias layers.{i}.self_attn.k_proj.weight layers.{i}.self_attn.v_proj.bias "
    "layers.{i}.self_attn.v_proj.weight layers.{i}.self_attn.q_proj.bias layers.{i}.self_attn.q_proj.weight "
    "layers.{i}.self_attn.out_proj.bias layers.{i}.self_attn.out_proj.weight layers.{i}.self_attn_layer_norm.bias "
    "layers.{i}.self_attn_layer_norm.weight layers.{i}.encoder_attn.sampling_offsets.bias "
    "layers.{i}.encoder_attn.sampling_offsets.weight layers.{i}.encoder_attn.attention_weights.bias "
    "layers.{i}.encoder_attn.attention_weights.weight layers.{i}.encoder_attn.value_proj.bias "
    "layers.{i}.encoder_attn.value_proj.weight layers.{i}.encoder_attn.output_proj.bias "
    "layers.{i}.encoder_attn.output_proj.weight layers.{i}.encoder_attn_layer_norm.bias "
    "layers.{i}.encoder_attn_layer_norm.weight layers.{i}.fc1.bias layers.{i}.fc1.weight layers.{i}.fc2.bias "
    "layers.{i}.fc2.weight layers.{i}.final_layer_norm.bias layers.{i}.final_layer_norm.weight",
    "resampler_video": "frame_embs media_time_embs",  # beside the resampler's
    "idefics2_resampler": "modality_projection.gate_proj.weight modality_projection.up_proj.weight "
    "modality_projection.down_proj.weight perceiver_resampler.latents perceiver_resampler.norm.weight "
    + " ".join(f"perceiver_resampler.layers.{{i}}.{key}.weight" for key in IDEFICS2_LAYER),
    "query_resampler_anywhere": "resize_linear.weight resize_linear.bias pre_mlp.0.weight pre_mlp.0.bias "
    "pre_mlp.2.weight pre_mlp.2.bias proj.0.weight proj.0.bias proj.2.weight proj.2.bias "
    "perceiver.latents perceiver.norm.weight "
    + " ".join(f"perceiver.layers.{{i}}.{key}.weight" for key in IDEFICS2_LAYER),
    "query_resampler": "position_embedding.weight",  # beside the former's
    "resampler": "latents norm.bias norm.weight out_proj.bias out_proj.weight "
    "layers.{i}.0.norm_latents.bias layers.{i}.0.norm_latents.weight layers.{i}.0.norm_media.bias "
    "layers.{i}.0.norm_media.weight layers.{i}.0.to_kv.weight layers.{i}.0.to_out.weight layers.{i}.0.to_q.weight "
    "layers.{i}.1.0.bias layers.{i}.1.0.weight layers.{i}.1.1.weight layers.{i}.1.3.weight",
    "qformer": f"query_tokens {both('', 'qformer.layernorm language_projection')} "
    f"{both('qformer.encoder.layer.{i}.', QFORMER)} {both('qformer.encoder.layer.0.', CROSS)}",
    "qformer_text": "query_tokens qformer.embeddings.position_embeddings.weight "
    f"{both('', 'qformer.embeddings.layernorm language_projection text_proj')} "
    f"{both('qformer.encoder.layer.{i}.', QFORMER + ' ' + CROSS)} "
    f"{both('qformer.encoder.layer.{i}.', 'intermediate.dense output.dense output.LayerNorm')}",
    **sincos_cases.KEYS,
}


BESIDE = {
    "resampler_video": "resampler",
    "elastic": "resampler",
    "query_resampler": "query_resampler_anywhere",
    "learned_merge_told": "learned_merge",
}
BESIDE |= sincos_cases.BESIDE
KEYS |= grid_cases.KEYS
KEYS["d_abstractor"] = f"{KEYS['d_abstractor_bare']} output_proj.bias output_proj.weight"


def published_keys(case: str) -> str:
    return KEYS[case] + (" " + KEYS[BESIDE[case]] if case in BESIDE else "")


@pytest.mark.parametrize("case", CASES)
def test_pytorch_computes_what_jax_computed(case):
    report = verify.check(artifact(case))
    assert report["problems"] == []
    odd = {"odd"} if families.describe(CASES[case], WIDTHS)["any_num_tokens"] else set()
    assert {row["case"] for row in report["cases"]} == {"plain", "masked", "faint"} | odd
    assert all(row["relative"] < 2e-6 for row in report["cases"]), report
    certificate = json.loads((artifact(case) / "parity.json").read_text())
    assert certificate["ran"]
    assert [row["relative"] for row in certificate["cases"]] == [row["relative"] for row in report["cases"]]
    assert certificate["weights"] == tensors.content_hash(artifact(case) / "compressor.safetensors")


def test_the_probes_are_three_shapes_a_mask_and_an_odd_number():
    golden = tensors.load(artifact("resampler") / "golden.safetensors")
    shapes = {name: array.shape for name, array in golden.items() if name.endswith(".tokens")}
    assert len(set(shapes.values())) == 4
    assert shapes["odd.tokens"][1] == 23
    full, padded, empty = golden["masked.valid"]
    assert full.all()
    assert 0 < padded.sum() < 24
    assert not empty.any()
    assert not golden["masked.out"][2].any()
    assert golden["masked.out_valid"].tolist() == [[True] * 5, [True] * 5, [False] * 5]


@pytest.mark.parametrize("case", CASES)
def test_import_undoes_export_bit_for_bit(case):
    module = built(case)
    loaded = load_artifact(artifact(case), config=CASES[case], widths=WIDTHS)
    assert (loaded.config, loaded.widths) == (CASES[case], WIDTHS)
    leaves = names.flatten(module)
    assert loaded.arrays.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(loaded.arrays[path], leaf, err_msg=path, strict=True)
    published = {key.replace("{i}", str(i)) for key in published_keys(case).split() for i in range(2)}
    assert tensors.load(artifact(case) / "compressor.safetensors").keys() == published


def test_every_config_keeps_its_table_complete():
    """At the published sizes and at depths the small cases do not have."""
    big = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096)
    for config in (mlp.Config(depth=1), mlp.Config(depth=3), avg_pool.Config(), pixel_shuffle.Config(num_queries=144)):
        table = config.names(big)
        leaves = names.shapes(families.abstract(config, big))
        assert {name.jax for name in table} == leaves.keys()
        assert len(names.published_shapes(table, leaves)) == len(table)


@pytest.mark.parametrize("family", families.twins())
def test_a_twin_imports_torch_only(family):
    tree = ast.parse((Path(verify.__file__).parent / f"{family}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"torch", "torch.nn", "itertools"}


@pytest.mark.parametrize("case", CASES)
def test_a_twin_survives_a_loader_that_builds_on_the_meta_device(case):
    """Such loaders lose every buffer and tensor attribute; only what is in the file may matter."""
    folder, modeling = artifact(case), {}
    exec((folder / "modeling_compressor.py").read_text(), modeling)
    with torch.device("meta"):
        twin = modeling["Compressor"](json.loads((folder / "compressor_config.json").read_text()))
    weights = {name: torch.from_numpy(array) for name, array in tensors.load(folder / "compressor.safetensors").items()}
    twin.load_state_dict(weights, assign=True)
    golden = {name: torch.from_numpy(array) for name, array in tensors.load(folder / "golden.safetensors").items()}
    assert verify.compare(twin, golden, "masked")["problem"] == ""


def test_a_fresh_process_without_jax_follows_the_readme():
    folder = artifact("resampler")
    readme = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    program = f"""
import sys
for package in ("jax", "jaxlib", "flax", "tcjax", "ml_dtypes"):
    sys.modules[package] = None
sys.path.insert(0, ".")
import torch
from safetensors.torch import load_file
golden = load_file("golden.safetensors")
features = golden["odd.tokens"]
{readme.group(1)}
assert torch.allclose(tokens, golden["odd.out"], atol=1e-5)
tokens, valid = compressor(golden["masked.tokens"], golden["masked.valid"])
assert torch.equal(valid, golden["masked.out_valid"])
import verify
sys.exit(verify.main())
"""
    done = subprocess.run([sys.executable, "-I", "-B", "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "everything holds" in done.stdout
    assert done.stdout.count("e-0") >= 8  # four cases, two errors each


@pytest.mark.parametrize(
    "name", ["compressor.safetensors", "modeling_compressor.py", "golden.safetensors", "verify.py"]
)
def test_a_changed_or_missing_file_is_named(tmp_path, name):
    folder = artifact_copy("mlp", tmp_path)
    path = folder / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert verify.check(folder)["problems"] == [f"hashes: {name} is not the file the manifest was written with"]
    with pytest.raises(ArtifactMismatch, match=re.escape(repr([name]))):
        load_artifact(folder)
    path.unlink()
    assert verify.check(folder)["problems"] == [f"hashes: {name} is missing"]
    with pytest.raises(ArtifactMismatch, match=re.escape(repr([name]))):
        load_artifact(folder)


def test_changed_code_is_not_executed(tmp_path):
    folder = artifact_copy("mlp", tmp_path)
    (folder / "modeling_compressor.py").write_text("raise SystemExit('executed')\n")
    assert "modeling_compressor.py" in verify.check(folder)["problems"][0]


def test_an_artifact_for_another_model_is_refused_fact_by_fact():
    with pytest.raises(ArtifactMismatch) as caught:
        load_artifact(
            artifact("resampler"),
            config=resampler.Config(num_queries=7, depth=2, heads=2, head_width=4, ff_mult=2),
            widths=Widths(grid_HW=(4, 6), vision_C=8, llm_D=16),
        )
    assert str(caught.value).splitlines()[1:] == ["  llm_width: 12, 16", "  max_queries: 5, 7", "  num_queries: 5, 7"]


def test_a_config_that_contradicts_the_manifest_is_refused(tmp_path):
    folder = artifact_copy("resampler", tmp_path)
    facts = json.loads((folder / "compressor_config.json").read_text())
    (folder / "compressor_config.json").write_text(json.dumps(facts | {"norm_eps": 1e-6}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["compressor_config.json"] = file_hash(folder / "compressor_config.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactMismatch, match="norm_eps: 1e-06, 1e-05"):
        load_artifact(folder)


def test_the_same_input_gives_the_same_artifact(tmp_path):
    """To the byte, but for the order in which safetensors' header lists its metadata."""

    def content(folder: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        for path in folder.iterdir():
            weights = path.suffix == ".safetensors"
            found[path.name] = (tensors.content_hash(path), tensors.metadata(path)) if weights else path.read_text()
        manifest = json.loads((folder / "manifest.json").read_text())
        return found | {"manifest.json": {**manifest, "files": sorted(manifest["files"])}}

    export(built("mlp"), CASES["mlp"], WIDTHS, tmp_path / "again", provenance=PROVENANCE, study_rows=ROWS)
    assert len(content(tmp_path / "again")) == 8
    assert content(tmp_path / "again") == content(artifact("mlp"))


def test_the_card_says_what_where_from_and_how_well():
    text = (artifact("pixel_shuffle") / "README.md").read_text()
    for line in (
        "# pixel_shuffle: 24 visual tokens become 6",
        "| training.steps | 2180 |",
        "| num_queries | accuracy | seed |",
        "| 6 | 0.5123 |  |",
        "tokens = compressor(features)  # [batch, 24, 8] -> [batch, 6, 12]",
    ):
        assert line in text
    assert "PyTorch equals JAX to" in tensors.metadata(artifact("pixel_shuffle") / "compressor.safetensors")["tcjax"]


def test_without_pytorch_the_artifact_is_written_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    certificate = export(built("mlp"), CASES["mlp"], WIDTHS, tmp_path / "out", provenance={})
    assert not certificate["ran"]
    assert certificate["note"].startswith("not run here")
    monkeypatch.undo()
    assert verify.check(tmp_path / "out")["problems"] == []
    assert "not run here" in (tmp_path / "out" / "README.md").read_text()


def test_a_twin_that_disagrees_is_not_published(tmp_path, monkeypatch):
    folder = artifact_copy("mlp", tmp_path)
    wrong = {"depth": 2, "activation": "gelu_pytorch_tanh"}
    monkeypatch.setattr(mlp.Config, "semantics", lambda config, widths: wrong)
    with pytest.raises(ValueError, match=r"nothing was exported:[^$]*parity: plain: off by"):
        export(built("mlp"), CASES["mlp"], WIDTHS, folder, provenance={})
    assert verify.check(folder)["problems"] == []  # the earlier artifact is untouched
    assert [path.name for path in folder.parent.iterdir()] == ["mlp"]


def test_what_cannot_be_exported_is_refused_with_names(tmp_path):
    module = built("mlp")
    with pytest.raises(ValueError, match="mlp/linears/1/kernel"):
        export(module, mlp.Config(depth=1), WIDTHS, tmp_path / "out", provenance={})
    with pytest.raises(ValueError, match="no PyTorch twin; these have one"):
        export(module, WIDTHS, WIDTHS, tmp_path / "out", provenance={})
    bias = module.mlp.linears[1].bias
    bias.set_value(bias[...].at[3].set(np.inf))
    with pytest.raises(ValueError, match=r"not finite: \['mlp/linears/1/bias'\]"):
        export(module, CASES["mlp"], WIDTHS, tmp_path / "out", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_only_an_artifact_is_replaced(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "manifest.json").write_text('{"kind": "something else"}')
    with pytest.raises(ValueError, match="stays as it is"):
        export(built("mlp"), CASES["mlp"], WIDTHS, precious, provenance={})
    with pytest.raises(ArtifactMismatch, match="is no tcjax compressor artifact"):
        load_artifact(precious)
    folder = artifact_copy("mlp", tmp_path)
    export(built("mlp"), CASES["mlp"], WIDTHS, folder, provenance={"run": "second"})
    assert load_artifact(folder).manifest["provenance"] == {"run": "second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp", "precious"]
