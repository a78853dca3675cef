"""A compressor that is told the question, and one training scored at several numbers of tokens, from study to row."""

import json
from pathlib import Path

import numpy as np
import pytest

from tcjax.cli import main
from tcjax.study import rows
from tests.test_study import STUDY
from tests.tiny_boards import make_project

TOLD = (
    STUDY.replace("import avg_pool, resampler", "import elastic, query_resampler, resampler")
    .replace(
        '"avg_pool": lambda num: avg_pool.Config(num_queries=num),',
        '"told": lambda num: query_resampler.Config(num_queries=num, width=16, depth=2, heads=2, head_width=8, kv_heads=1),',
    )
    .replace('"resampler": lambda num: resampler', '"elastic": lambda num: elastic.Config(of=resampler')
    .replace("heads=2, head_width=8),\n}", "heads=2, head_width=8)),\n}")
    .replace('compressors=("avg_pool", "resampler")', 'compressors=("told", "elastic")')
    .replace("batch=8, threads=0)", 'batch=8, threads=0, turns=int(name == "told"))')
    .replace(
        "boards=4, batch=8)",
        'boards=4, batch=8, queries=() if name == "told" else (2,),\n'
        '                controls=("blank",) + (("null_text", "shuffled_text") if name == "told" else ()))',
    )
    .replace('name=f"tiny/', 'label=name, name=f"tiny/')
)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("project"))
    (root / "configs").mkdir()
    (root / "experiments/tiny").mkdir(parents=True)
    (root / "experiments/tiny/study.py").write_text(TOLD)
    assert main(["ablate", str(root / "experiments/tiny"), "--quiet"]) == 0
    return root / "runs/tiny"


def test_the_told_compressor_has_its_controls(study):
    told = rows.read(study)[0][0]
    assert told["run"] == "told-4-s0"
    assert set(told["controls"]) == {"blank", "null_text", "shuffled_text"}
    certificate = json.loads((study / told["artifact"] / "parity.json").read_text())
    assert certificate["ran"] and certificate["cases"]


def test_pictures_of_a_told_compressor_name_the_question(study):
    looks = np.load(study / "told-4-s0/looks.npz")
    assert all("?" in question or ":" in question for question in looks["questions"])


def test_one_training_is_a_row_per_number_of_tokens(study):
    few, all_of_them = rows.read(study)[0][1:]
    assert [few["run"], all_of_them["run"]] == ["elastic-4-s0@2", "elastic-4-s0"]
    assert (few["visual_tokens"], few["ratio"], few["artifact"]) == (2, 8.0, None)
    assert all_of_them["visual_tokens"] == 4 and few["prefill_flops"] < all_of_them["prefill_flops"]
    assert few["train_seconds"] == all_of_them["train_seconds"]


def test_evaluate_takes_the_numbers_on_the_command_line(study, capsys):
    few = rows.read(study)[0][1]
    assert main(["evaluate", str(study / "elastic-4-s0"), "--queries", "2,3", "--json", "--quiet"]) == 0
    two, three = json.loads(capsys.readouterr().out)
    assert two["accuracy"] == few["accuracy"]
    assert three["visual_tokens"] == 3
    assert main(["evaluate", str(study / "elastic-4-s0"), "--queries", "5", "--quiet"]) == 2
    assert "from 1 up to max_queries=4" in capsys.readouterr().err


def test_a_text_control_needs_a_compressor_that_is_told(study, capsys):
    folder = study / "elastic-4-s0"
    resolved = json.loads((folder / "run.json").read_text())
    resolved["evaluate"]["controls"] = ["null_text"]
    (folder / "run.json").write_text(json.dumps(resolved))
    assert main(["evaluate", str(folder), "--quiet"]) == 2
    assert "controls ['null_text'] are unknown" in capsys.readouterr().err
