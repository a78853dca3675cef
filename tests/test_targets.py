"""The targets of `tcjax export`: each file is read back by what it was made for, and computes what was trained."""

import datetime
import json
import re

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tcjax.cli import main
from tcjax.compressors import avg_pool, mlp, pixel_shuffle, qformer, resampler
from tcjax.compressors.base import CompressorConfig
from tcjax.config import TrainConfig
from tcjax.export import jax_export, llava, onnx, torch_export
from tcjax.export.run import TARGETS, export_run
from tcjax.interop import names
from tcjax.record import to_dict, write_json
from tests import exported
from tests.hosted import IDENTITY, ROOT, TOWERS, a_model, a_run

RESAMPLER = resampler.Config(num_queries=3, depth=1, heads=2, head_width=8)
MERGE = exported.CASES["learned_merge"]
RUNS = {
    "mlp": a_run(mlp.Config()),
    "avg_pool": a_run(avg_pool.Config(num_queries=6, shape=(3, 2))),
    "pixel_shuffle": a_run(pixel_shuffle.Config(num_queries=4, head="mlp")),
    "resampler": a_run(RESAMPLER),
}


def export(target: str, case: str, out):
    run = RUNS[case]
    return export_run(target, run, a_model(run), IDENTITY, out=out / case, root=ROOT)


def measured(folder) -> dict:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["provenance"]["run"] == "hosted/siglip-llama"
    assert manifest["parity"]["ran"]
    return {row["case"]: row["relative"] for row in manifest["parity"]["cases"]}


def cases(case: str) -> set[str]:
    return {"plain", "masked", "faint"} | ({"odd"} if case == "resampler" else set())


@pytest.mark.parametrize("case", RUNS)
def test_torch_export_takes_any_batch_and_is_what_was_trained(case, tmp_path):
    folder = export("torch-export", case, tmp_path)
    apart = measured(folder)
    assert apart.keys() == cases(case) and max(apart.values()) < 2e-6
    assert sorted(path.name for path in folder.iterdir()) == [
        "compressor.pt2",
        "compressor_config.json",
        "golden.safetensors",
        "manifest.json",
    ]
    program = torch.export.load(folder / "compressor.pt2")
    assert program.example_inputs is None  # no pickle travels along
    features = torch.randn(5, 16, 16)
    tokens, valid = program.module()(tokens=features, valid=torch.ones(5, 16, dtype=torch.bool))
    assert valid.all() and tokens.shape == (5, RUNS[case].model.num_queries, 16)


@pytest.mark.parametrize("case", RUNS)
def test_onnx_runs_in_onnxruntime(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = export("onnx", case, tmp_path)
    apart = measured(folder)
    assert apart.keys() == cases(case) and max(apart.values()) < 5e-6
    session = onnxruntime.InferenceSession(str(folder / "compressor.onnx"), providers=["CPUExecutionProvider"])
    features = np.random.RandomState(0).standard_normal((5, 16, 16)).astype(np.float32)
    tokens, valid = session.run(None, {"tokens": features, "valid": np.ones((5, 16), bool)})
    assert valid.all() and tokens.shape == (5, RUNS[case].model.num_queries, 16)
    assert not list(folder.glob("*.data"))  # the weights are inside


@pytest.mark.parametrize("case", RUNS)
def test_jax_export_runs_without_our_code_and_says_until_when(case, tmp_path):
    pytest.importorskip("flatbuffers")
    folder = export("jax-export", case, tmp_path)
    apart = measured(folder)
    assert apart.keys() == cases(case) and max(apart.values()) < 1e-6
    manifest = json.loads((folder / "manifest.json").read_text())
    days = datetime.date.fromisoformat(manifest["loads_until"]) - datetime.date.fromisoformat(manifest["written"])
    assert days.days == 180 and manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["any_num_tokens"] is (case == "resampler")
    program = jax.export.deserialize(bytearray((folder / "compressor.jax").read_bytes()))
    weights = load_file(folder / "compressor.safetensors")
    features = np.random.RandomState(0).standard_normal((5, 16, 16)).astype(np.float32)
    tokens, valid = program.call(weights, {"tokens": features, "valid": np.ones((5, 16), bool)})
    expected = a_model(RUNS[case]).compressor(features).tokens_BQD
    assert valid.all()
    np.testing.assert_allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_llava_reads_its_own_names_with_weights_only(depth, tmp_path):
    run = a_run(mlp.Config(depth=depth), "clip")
    model = a_model(run)
    folder = export_run("llava", run, model, IDENTITY, out=tmp_path / "out", root=ROOT)
    found = torch.load(folder / "mm_projector.bin", weights_only=True)
    inside = [f"{2 * k}." for k in range(depth)] if depth > 1 else [""]
    assert sorted(found) == sorted(f"model.mm_projector.{k}{x}" for k in inside for x in ("weight", "bias"))
    leaves = names.flatten(model.compressor)
    assert np.array_equal(found[f"model.mm_projector.{inside[0]}weight"].numpy(), leaves["mlp/linears/0/kernel"].T)
    config = json.loads((folder / "config.json").read_text())
    assert config["mm_projector_type"] == {1: "linear", 2: "mlp2x_gelu", 3: "mlp3x_gelu"}[depth]
    assert (config["mm_vision_select_layer"], config["mm_hidden_size"]) == (-2, 16)


def test_a_graph_that_disagrees_is_not_published(tmp_path, monkeypatch):
    from tcjax.export import artifact

    right = artifact.golden

    def wrong(*arguments):
        found = right(*arguments)
        return found | {"plain.out": found["plain.out"] * 1.01}

    monkeypatch.setattr(artifact, "golden", wrong)
    with pytest.raises(ValueError, match=r"parity: plain: off by"):
        export("torch-export", "mlp", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_size_that_torch_fixes_is_an_error_and_jax_fixes_the_tokens(tmp_path):
    """The greedy merge computes with both numbers in Python."""
    run = a_run(MERGE)
    with pytest.raises(ValueError, match=r"computes with the batch size, and torch.export fixes it"):
        export_run("torch-export", run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)
    assert list(tmp_path.iterdir()) == []
    pytest.importorskip("flatbuffers")
    export_run("jax-export", run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert not manifest["any_num_tokens"]
    assert {row["case"] for row in manifest["parity"]["cases"]} == {"plain", "masked", "faint"}


def test_another_kind_of_export_is_not_overwritten(tmp_path):
    run = RUNS["mlp"]
    export_run("artifact", run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)
    with pytest.raises(ValueError, match=r"holds something else than a torch.export program and stays as it is"):
        export_run("torch-export", run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)


# Who takes what ------------------------------------------------------------------------------------------------------


class Unknown(CompressorConfig):
    """A compressor of somebody's own, without a twin."""


@pytest.mark.parametrize(
    ("target", "run", "reason"),
    [
        ("llava", a_run(RESAMPLER), "LLaVA builds linear and mlpNx_gelu projectors only, not resampler"),
        ("llava", a_run(mlp.Config()), "LLaVA reads the tower before its last norm"),
        ("artifact", a_run(Unknown()), "test_targets has no PyTorch twin; these have one: avg_pool"),
        ("hf", a_run(Unknown()), "has no PyTorch twin"),
        ("hf", a_run(qformer.Config(), "eva"), "it reads the tower's class token too; train with qformer.Config(class"),
        ("onnx", a_run(mlp.Config()).replace(model=TOWERS["clip"]), "trains a VitConfig, which has no compressor"),
        ("parts", a_run(mlp.Config()).replace(train=TrainConfig(steps=1, trainable=("head",))), "trains ('head',)"),
    ],
)
def test_a_target_says_why_not(target, run, reason):
    assert reason in TARGETS[target].why_not(run)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = RUNS["mlp"]
    assert "torch, onnx, onnxscript must be installed" in onnx.why_not(run)
    assert "pip install 'tcjax[serve]'" in jax_export.why_not(run)
    assert "pip install 'tcjax[torch]'" in torch_export.why_not(run)
    assert "PyTorch is not installed" in llava.why_not(a_run(mlp.Config(), "clip"))


@pytest.fixture
def trained_folder(tmp_path):
    """A run of 0 steps in a project: the model as it was assembled from the seed."""
    (tmp_path / "configs").mkdir()
    run = a_run(mlp.Config(), "clip").replace(train=TrainConfig(steps=0))
    write_json(tmp_path / "runs/one/run.json", to_dict(run))
    return tmp_path / "runs/one"


def test_targets_lists_all_with_their_reasons(trained_folder, capsys):
    assert main(["export", str(trained_folder), "--targets", "--json"]) == 0
    lines = {line["target"]: line for line in json.loads(capsys.readouterr().out)}
    assert list(lines) == list(TARGETS)
    assert all(
        lines[name]["why_not"] == "" for name in ("artifact", "parts", "hf", "hf-remote", "llava", "torch-export")
    )
    assert main(["export", str(trained_folder), "--targets"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"llava\s.*mm_projector.bin.*yes", table)


def test_the_cli_writes_a_target_and_refuses_with_the_way_out(trained_folder, tmp_path, capsys):
    out = tmp_path / "projector"
    assert main(["export", str(trained_folder), "--out", str(out), "--to", "llava"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert (out / "mm_projector.bin").is_file()
    assert main(["export", str(trained_folder)]) == 2
    assert "--out DIR says where the export goes" in capsys.readouterr().err
    run = a_run(RESAMPLER).replace(train=TrainConfig(steps=0))
    write_json(trained_folder / "run.json", to_dict(run))
    assert main(["export", str(trained_folder), "--out", str(tmp_path / "x"), "--to", "hf"]) == 2
    assert re.search(
        r"--to hf cannot hold this run: no stock class computes resampler.*These can: artifact, parts, hf-remote",
        capsys.readouterr().err,
    )
