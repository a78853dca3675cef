"""What `tcjax train CONFIG --dry-run` says is what the run would be."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from tcjax.cli import main
from tcjax.config import LoraConfig, MeshConfig, TrainConfig
from tcjax.dry_run import dry_run
from tcjax.train.state import num_parameters
from tests.tiny import VLM
from tests.tiny_boards import data_config, make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def run(project):
    from tcjax.config import Run

    return Run(name="dry", model=VLM, data=data_config(), train=TrainConfig(steps=12), mesh=MeshConfig(data=1))


def test_parameters_weights_and_moments_are_those_of_the_built_model(run, project):
    figures, model = dry_run(run, root=project), VLM.build(nnx.Rngs(0))
    for part in ("tower", "compressor", "llm"):
        assert figures["parameters"][part] == num_parameters(nnx.state(getattr(model, part)))
    assert figures["learning"] == {"compressor": figures["parameters"]["compressor"]}
    assert figures["weights"] == 4 * sum(figures["parameters"].values())
    assert figures["training"] == 3 * 4 * figures["parameters"]["compressor"]
    assert (figures["steps"], figures["samples"]) == (12, 12 * run.data.batch)
    assert figures["epochs"] == figures["samples"] / figures["records"]


def test_activations_follow_the_microbatch_and_weights_the_mesh(run, project):
    whole = dry_run(run, root=project)
    half = dry_run(run.replace(train=dataclasses.replace(run.train, accumulate=2)), root=project)
    per_row = whole["activations"] - half["activations"]
    assert per_row > 0
    assert whole["activations"] == pytest.approx(2 * per_row, rel=0.05), "all but a few constants belong to a row"
    spread = dry_run(run.replace(mesh=MeshConfig(data=1, fsdp=4)), root=project)
    assert whole["weights"] / 4 < spread["weights"] < whole["weights"]
    assert len(jax.devices()) == 8 and spread["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    with pytest.raises(ValueError, match=r"frozen='int9' is not one of \['float32', 'bfloat16', 'int8', 'nf4'\]"):
        dry_run(run.replace(train=dataclasses.replace(run.train, frozen="int9")), root=project)
    with pytest.raises(ValueError, match=r"does not divide over 3"):
        dry_run(run.replace(mesh=MeshConfig(data=3)), root=project)


def test_packed_rows_of_several_images_keep_more_and_promise_no_epochs(run, project):
    data = dataclasses.replace(run.data, images=3, batching="packed")
    plain, packed = dry_run(run, root=project), dry_run(run.replace(data=data), root=project)
    assert packed["activations"] > 1.1 * plain["activations"]
    assert packed["epochs"] is None and packed["records"] == plain["records"]


def test_a_frozen_llm_that_learns_keeps_more(run, project):
    more = dry_run(run.replace(train=TrainConfig(steps=1, trainable=("compressor", "llm"))), root=project)
    assert more["flops"] > dry_run(run, root=project)["flops"]
    assert set(more["learning"]) == {"compressor", "llm"}


def test_updates_of_low_rank_are_a_part_of_their_own(run, project):
    lora = LoraConfig(rank=3)
    figures = dry_run(
        run.replace(train=TrainConfig(steps=1, trainable=("compressor", "lora"), lora=lora)), root=project
    )
    plain = dry_run(run, root=project)
    assert figures["parameters"] == plain["parameters"] | {"lora": figures["learning"]["lora"]}
    assert figures["learning"] == {**plain["learning"], "lora": 2 * 3 * (2 * 32 + 2 * 24 + 3 * 48)}
    positions = VLM.num_queries + run.data.text_length
    assert figures["flops"] - plain["flops"] == 6 * figures["learning"]["lora"] * positions * run.data.batch


def test_the_sample_is_the_first_row_and_missing_data_is_said(run, project):
    sample = dry_run(run, root=project)["sample"]
    assert sum(piece["positions"] for piece in sample if not piece["text"]) == VLM.num_queries
    assert any("<end>" in piece["text"] for piece in sample if piece["supervised"])
    absent = run.data.sources[0]
    data = dataclasses.replace(run.data, sources=(dataclasses.replace(absent, path="data/absent"),))
    figures = dry_run(run.replace(data=data), root=project)
    assert figures["sample"] is None and "tcjax data prepare data/absent" in figures["missing"]


def test_the_command_line_prints_a_table_or_json_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "own.py"
    config.write_text(
        "from tests.tiny import VLM\n"
        "from tests.tiny_boards import data_config\n"
        "from tcjax.config import Run, TrainConfig\n"
        "def run():\n"
        '    """From nobody; no hours."""\n'
        '    return Run(name="own", model=VLM, data=data_config(), train=TrainConfig(steps=3))\n'
    )
    assert main(["train", str(config), "--dry-run", "--mesh.data", "1"]) == 0
    printed = capsys.readouterr().out
    assert "From nobody; no hours." in printed and "useful FLOPs per step" in printed and "no sample" in printed
    assert main(["train", str(config), "--dry-run", "--json", "--mesh.data", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert not (tmp_path / "runs").exists()
