"""The door: wrong words are answered in one line with the right ones, exit code 2, no trace; nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tcjax.cli import _ACCELERATORS, main

ROOT = Path(__file__).parents[1]


def test_no_verb_lists_the_verbs(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in ("train", "evaluate", "ablate", "report", "export", "compressors", "data"))


def test_a_wrong_verb_lists_the_right_ones(capsys):
    assert main(["trian"]) == 2
    assert "no verb 'trian'; choose one of train, evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nowhere.py"], "no such config file: nowhere.py"),
        (["train", "configs/boards.py:walk"], "has no function 'walk'"),
        (["evaluate", "runs/nowhere"], "runs/nowhere is not a run's folder"),
        (["export", "runs/nowhere", "--out", "x"], "runs/nowhere is not a run's folder"),
        (["export", "runs/nowhere", "--out", "x", "--to", "gguf"], "--to 'gguf' is unknown"),
        (["report", "runs/nowhere"], "holds no rows"),
        (["ablate", "experiments/nowhere"], "experiments/nowhere is not a study"),
        (["ablate", "experiments/num_queries", "--queries", "a,b"], "--queries takes whole numbers"),
        (["ablate", "experiments/num_queries", "--steps", "-5"], "--steps -5: takes a whole number from 1 up"),
        (["compressors", "--grid", "24"], "--grid takes two whole numbers"),
        (["compressors", "--grid", "0x4"], "--grid takes two whole numbers from 1 up"),
        (["compressors", "--widths", "a,b"], "--widths takes two whole numbers"),
        (["data", "mix", "data/digit_boards"], "data 'mix' is unknown"),
        (["data", "prepare", "docs"], "must hold exactly one"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith(f"tcjax {arguments[0]}: ") and "Traceback" not in error


def test_an_unknown_field_is_answered_by_its_neighbour(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "configs/boards.py", "--train.stepz", "5"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "--train.stepz" in error and "--train.steps" in error


def test_every_field_of_a_run_is_a_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "configs/boards.py", "--help"])
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    for flag in (
        "--model.compressor.num-queries",
        "--train.peak-lr",
        "--data.batch",
        "--mesh.fsdp",
        "--evaluate.boards",
    ):
        assert flag in page


def test_an_impossible_q_lists_the_possible(capsys):
    assert main(["train", "configs/boards.py:pooled", "--model.compressor.num-queries", "50"]) == 2
    error = capsys.readouterr().err
    assert "num_queries=50 is not a square pooling" in error and "possible: [1, 4, 9, 16, 25, 36, 49, 64" in error


def test_a_wrong_config_from_a_run_folder_names_the_valid_fields(tmp_path, capsys):
    resolved = {"is": "tcjax.config:Source", "path": "x", "slpit": "train"}
    (tmp_path / "run.json").write_text(json.dumps(resolved))
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "Source has no field 'slpit'; valid fields: ['path', " in capsys.readouterr().err


def test_the_catalogue_as_json_knows_which_q_a_grid_gives(capsys):
    assert main(["compressors", "--grid", "16x16", "--widths", "96,128", "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["pixel_shuffle"]["possible"] == [1, 4, 16, 64, 256]
    assert lines["mlp"]["possible"] == [256]
    assert lines["resampler"]["queries"] == "1 – 256" and lines["resampler"]["source"] == "Alayrac et al. 2022"
    assert all("artifact" in line["exports"] for line in lines.values() if line["possible"])
    assert lines["mlp"]["exports"] == [
        "artifact",
        "parts",
        "hf",
        "hf-remote",
        "llava",
        "onnx",
        "torch-export",
        "jax-export",
    ]
    assert lines["mlp"]["parameters"] == 96 * 128 + 128 + 128 * 128 + 128


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "tcjax 0.1.0\n"


def test_a_machine_without_accelerators_hears_nothing_of_them():
    if any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS):
        pytest.skip("this machine has something that may be an accelerator")
    environ = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "tcjax.cli", "compressors", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
