"""A study's runs as jobs of their own: numbered, listed, and writing their rows and features side by side."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tcjax.cli import main
from tcjax.study import ablate, rows
from tcjax.train.feature_store import Features, Layout, save_layout, write_shard

ROOT = Path(__file__).parents[1]
STUDY = """
from tests.tiny import VLM
from tcjax.config import Run, TrainConfig
from tests.tiny_boards import data_config

def runs(queries=(1, 4, 9), seeds=1):
    return [Run(name=f"three/{num}", model=VLM, data=data_config(), train=TrainConfig(steps=1)) for num in queries]
"""


def row(run: str) -> dict:
    return {"run": run, "compressor": "a", "seed": 0, "visual_tokens": 1, "ratio": 1.0, "fingerprint": run} | {
        "accuracy": {"count": {"mean": 0.5}},
        "mean_accuracy": 0.5,
    }


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of three runs that cost nothing."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.py").write_text(STUDY)
    monkeypatch.setattr(ablate, "run_rows", lambda run, mark, before, **_: [row(run.name) | {"fingerprint": mark}])
    return tmp_path / "study"


def names(folder: Path) -> list[str]:
    return [made["run"] for made in rows.read(folder)[0]]


def test_one_run_of_a_study_is_run_and_no_other(study, tmp_path):
    assert main(["ablate", str(study), "--run", "2", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert names(tmp_path / "out") == ["three/4"]
    assert main(["ablate", str(study), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert names(tmp_path / "out") == ["three/4", "three/1", "three/9"]


def test_the_runs_are_listed_by_name_one_per_line(study, capsys):
    assert main(["ablate", str(study), "--list"]) == 0
    assert capsys.readouterr().out == "three/1\nthree/4\nthree/9\n"
    assert main(["ablate", str(study), "--queries", "16", "--list"]) == 0
    assert capsys.readouterr().out == "three/16\n"


@pytest.mark.parametrize("number", ["9", "-1", "0"])
def test_a_run_that_is_not_there_is_refused_with_those_that_are(study, number, tmp_path, capsys):
    assert main(["ablate", str(study), "--run", number, "--out", str(tmp_path / "out")]) == 2
    said = "has 3 runs: 1 three/1, 2 three/4, 3 three/9." if number != "0" else "a study's runs count from 1"
    assert f"--run {number}: " in (err := capsys.readouterr().err) and said in err
    assert not (tmp_path / "out").exists()


APPEND = """
import json, sys, time
from pathlib import Path
from tcjax.study import rows
folder, name, row = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
(folder / name).touch()
while len(list(folder.glob("?"))) < 4:
    time.sleep(0.01)
for number in range(20):
    rows.append(folder, row | {"run": name, "fingerprint": f"{name}-{number}", "long": name * 20_000})
"""


def test_four_processes_append_their_rows_whole(tmp_path):
    command = [sys.executable, "-c", APPEND, str(tmp_path)]
    writers = [subprocess.Popen([*command, name, json.dumps(row(""))], cwd=ROOT) for name in "abcd"]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    made, warnings = rows.read(tmp_path)
    assert warnings == [] and len(made) == 4 * 20
    assert all(line["long"] == line["run"] * 20_000 for line in made)
    for name in "abcd":  # each writer's own order
        assert [line["fingerprint"] for line in made if line["run"] == name] == [f"{name}-{i}" for i in range(20)]


def test_runs_that_compute_the_same_features_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    layout = Layout(shape=(2, 3), dtype="float32", grids=False, records=4)
    entries = [[(np.full((2, 3), record, np.float32), None)] for record in range(4)]
    path = layout.path(tmp_path, 0)
    (tmp_path / f"{path.name}.other-1.writing").write_bytes(b"another run has begun, or was killed")
    save_layout(tmp_path, layout, {"tower": "t"})
    write_shard(path, entries)
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, "facts.json", "layout.json"]
    whole = path.read_bytes()

    class Overtaken(type(path)):
        """The path of a shard that another run finishes, and cleans up after, while this one is about to."""

        def replace(self, target):
            self.unlink()
            return super().replace(target)

    monkeypatch.setattr("tcjax.train.feature_store.unfinished", lambda path: Overtaken(path.with_name("mine.writing")))
    write_shard(path, entries)
    assert path.read_bytes() == whole and Features(tmp_path)(3)[0, 0] == 3
    path.unlink()
    with pytest.raises(FileNotFoundError):
        write_shard(path, entries)
    assert json.loads((tmp_path / "facts.json").read_text()) == {"tower": "t"}
