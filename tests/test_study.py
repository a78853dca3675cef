"""A study end to end in a user's own project folder: rows, skipping, going on, artifacts, controls."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tcjax import job
from tcjax.answer import distinct, evaluate_run
from tcjax.cli import main
from tcjax.config import Source
from tcjax.interop.tensors import content_hash
from tcjax.job import load_run, train_run
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat, load_tokenizer
from tcjax.pipeline.input import TooManyCorrupt
from tcjax.pipeline.questions import questions
from tcjax.pipeline.source import open_source
from tcjax.study import rows
from tcjax.train.checkpoint import CheckpointMismatch
from tcjax.train.feature_store import Features
from tcjax.train.log import read_metrics
from tests.tiny_boards import make_project

ROOT = Path(__file__).parents[1]

STUDY = '''
"""Two compressors on a tower and an LLM of width 16."""
import os, signal
from tcjax.compressors import avg_pool, resampler
from tcjax.config import DataConfig, EvaluateConfig, Pixels, Run, Source, TrainConfig
from tcjax.llms.decoder import LlmConfig
from tcjax.towers.vit import VitConfig
from tcjax.vlm import VlmConfig

TOWER = VitConfig(pixels=Pixels(size_YX=(64, 64)), patch=16, width=16, layers=1, heads=2, feed_forward=32,
                  activation="gelu", norm_eps=1e-6, class_token=False, patch_bias=True, pre_norm=False, post_norm=True)
LLM = LlmConfig(vocab=64, width=16, layers=1, heads=2, kv_heads=1, head_width=8, feed_forward=32, rope_theta=1e4,
                norm_eps=1e-5, tie=True)
CATALOGUE = {
    "avg_pool": lambda num: avg_pool.Config(num_queries=num),
    "resampler": lambda num: resampler.Config(num_queries=num, depth=1, heads=2, head_width=8),
}
SOURCE = Source(path="data/digit_boards")

def runs(queries=(4,), compressors=("avg_pool", "resampler"), seeds=1, steps=4):
    return [
        Run(
            name=f"tiny/{name}-{num}-s{seed}",
            model=VlmConfig(tower=TOWER, compressor=CATALOGUE[name](num), llm=LLM),
            data=DataConfig(sources=(SOURCE,), tokenizer="tokenizer.json", batch=8, threads=0),
            train=TrainConfig(steps=steps, seed=seed, feature_cache="float32", log_every=1, save_every=1),
            evaluate=EvaluateConfig(source=Source(path="data/digit_boards", split="test"), boards=4, batch=8),
        )
        for seed in range(seeds) for name in compressors for num in queries
    ]
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("project"))
    (root / "configs").mkdir()
    (root / "experiments/tiny").mkdir(parents=True)
    (root / "experiments/tiny/study.py").write_text(STUDY)
    return root


@pytest.fixture(scope="module")
def study(project) -> Path:
    assert main(["ablate", str(project / "experiments/tiny"), "--quiet"]) == 0
    return project / "runs/tiny"


def test_every_run_is_one_row_with_the_promised_keys(study):
    made, warnings = rows.read(study)
    assert [row["run"] for row in made] == ["avg_pool-4-s0", "resampler-4-s0"] and not warnings
    promised = "compressor num_queries seed visual_tokens ratio accuracy mean_accuracy prefill_flops kv_bytes "
    promised += "train_seconds fingerprint commit artifact token_accuracy controls chance converged steps"
    for row in made:
        assert set(promised.split()) <= set(row)
        assert set(row["accuracy"]) == {"colour", "count", "spatial", "read", "fine", "presence", "caption"}
        assert all(set(score) >= {"mean", "low", "high", "n"} for score in row["accuracy"].values())
        assert set(row["controls"]) == {"blank", "shuffled"}
        assert (row["visual_tokens"], row["ratio"], row["steps"], row["compiles"]) == (4, 4.0, 4, 1)
        assert row["prefill_seconds"] > 0 and row["train_seconds"] > 0


def test_a_finished_study_is_skipped_whole(study, project, capsys):
    before = (study / "rows.jsonl").read_bytes()
    assert main(["ablate", str(project / "experiments/tiny")]) == 0
    assert capsys.readouterr().err.count("finished before, skipped") == 2
    assert (study / "rows.jsonl").read_bytes() == before


def test_runs_share_the_features_of_one_tower(study, project):
    caches = list((project / "runs/features").iterdir())
    assert len(caches) == 2  # train and test[:4], once each for two compressors
    found = [Features(cache) for cache in caches]
    assert {(len(features), *features.shape) for features in found} == {(24, 16, 16), (4, 16, 16)}


def test_every_answer_is_written_beside_its_question(study):
    answers = [json.loads(line) for line in (study / "avg_pool-4-s0/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 * 7
    assert set(answers[0]) == {"index", "task", "question", "answer", "generated", "right"}


def test_pictures_have_one_row_of_shares_per_query(study):
    looks = np.load(study / "resampler-4-s0/looks.npz")
    assert looks["assign"].shape == (4, 4, 16) and looks["images"].dtype == np.uint8
    np.testing.assert_allclose(looks["assign"].sum(-1), 1, atol=1e-5)


def test_the_artifact_lies_beside_the_row_and_its_weights_are_the_trained_ones(study):
    artifact = study / rows.read(study)[0][1]["artifact"]
    certificate = json.loads((artifact / "parity.json").read_text())
    assert certificate["ran"]
    assert {"compressor.safetensors", "modeling_compressor.py", "golden.safetensors", "verify.py"} <= {
        path.name for path in artifact.iterdir()
    }


def test_export_of_a_run_equals_the_studys_own_artifact(study, tmp_path):
    run = study / "resampler-4-s0"
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    name = "compressor.safetensors"
    assert content_hash(tmp_path / "out" / name) == content_hash(run / "artifact" / name)  # metadata has no fixed order


def test_evaluating_again_gives_the_same_scores(study, capsys):
    run = study / "avg_pool-4-s0"
    assert main(["evaluate", str(run), "--json", "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out)
    row = rows.read(study)[0][0]
    assert again["accuracy"] == row["accuracy"] and again["controls"] == row["controls"]


def test_equal_prompts_are_asked_once_with_room_for_the_longest_answer(project):
    chat = Chat(load_tokenizer(project / "tokenizer.json"))
    asked = questions(open_source(project, Source(path="data/digit_boards")), chat, num_queries=4)
    rows, place = distinct(asked)
    assert len(rows) == len(set(asked.question_B)) < len(asked.question_B)
    np.testing.assert_array_equal(asked.question_B[rows][place], asked.question_B)
    length = (asked.answer_BT >= 0).sum(1)
    assert (length[rows][place] >= length).all()
    assert set(length[rows]) >= {length[asked.task_B == "caption"].max()}


@pytest.mark.parametrize("cached", ["float32", ""])
def test_questions_about_an_unreadable_image_are_not_asked_and_the_image_is_named(
    study, project, tmp_path, monkeypatch, cached
):
    def spoiled(encoded, pixels, image_id, read=images.read):
        if image_id == "test-00001":
            raise images.CorruptImage(image_id, "cut short")
        return read(encoded, pixels, image_id)

    monkeypatch.setattr(images, "read", spoiled)
    monkeypatch.setattr(job, "FEATURES", str(tmp_path / "features"))
    run = load_run(study / "avg_pool-4-s0")
    model, identity, _ = job.trained(run, root=project, out=study / "avg_pool-4-s0")
    run = run.replace(train=dataclasses.replace(run.train, feature_cache=cached))
    with pytest.raises(TooManyCorrupt, match=r"1 of 4 images.*max_corrupt=0.01 allows: \['test-00001'\]"):
        evaluate_run(run, model, identity, root=project, out=tmp_path, quiet=True)
    run = run.replace(data=dataclasses.replace(run.data, max_corrupt=0.25))
    scores = evaluate_run(run, model, identity, root=project, out=tmp_path, quiet=True)
    assert scores["corrupt_images"] == ["test-00001"]
    assert {score["n"] for score in scores["accuracy"].values()} == {3}
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (study / "avg_pool-4-s0/answers.jsonl").read_text().splitlines()]
    assert answers == [line for line in before if line["index"] != 1]


def test_the_report_is_one_self_contained_page(study):
    assert main(["report", str(study)]) == 0
    page = (study / "report.html").read_text()
    assert "avg_pool" in page and "resampler" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_checkpoint_of_another_compressor_is_refused_by_each_differing_fact(study, project):
    run = dataclasses.replace(load_run(study / "resampler-4-s0"), name="other")
    config = dataclasses.replace(run.model.compressor, num_queries=8, heads=1)
    other = run.replace(model=dataclasses.replace(run.model, compressor=config))
    before = {path: path.stat().st_mtime_ns for path in (study / "resampler-4-s0").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointMismatch) as refused:
        train_run(other, root=project, out=study / "resampler-4-s0", quiet=True)
    assert "model.compressor.num_queries: 4 there, 8 here" in str(refused.value)
    assert "model.compressor.heads: 2 there, 1 here" in str(refused.value)
    assert "model.tower" not in str(refused.value)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_longer_training_of_the_same_run_goes_on_where_it_ended(study, project, tmp_path):
    shutil.copytree(study / "avg_pool-4-s0", tmp_path / "run")
    run = load_run(tmp_path / "run")
    longer = run.replace(train=dataclasses.replace(run.train, steps=6))
    assert train_run(longer, root=project, out=tmp_path / "run", quiet=True).steps == 6
    steps = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_flags_widen_the_study(project, study, tmp_path):
    arguments = ["ablate", str(project / "experiments/tiny"), "--queries", "1,4", "--compressors", "avg_pool"]
    assert main([*arguments, "--seeds", "2", "--steps", "3", "--out", str(tmp_path / "wide"), "--quiet"]) == 0
    made = [(row["num_queries"], row["seed"], row["steps"]) for row in rows.read(tmp_path / "wide")[0]]
    assert made == [(1, 0, 3), (4, 0, 3), (1, 1, 3), (4, 1, 3)]


def test_an_impossible_q_is_said_before_the_first_run(project, tmp_path, capsys):
    arguments = ["ablate", str(project / "experiments/tiny"), "--queries", "4,5", "--compressors", "avg_pool"]
    assert main([*arguments, "--out", str(tmp_path / "never")]) == 2
    assert "num_queries=5 is not" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_another_config_of_the_same_name_keeps_what_it_finds(project, study, tmp_path):
    out = tmp_path / "moved"
    folder = project / "experiments/changed"
    folder.mkdir()
    text = STUDY.replace('compressors=("avg_pool", "resampler")', 'compressors=("avg_pool",)')
    (folder / "study.py").write_text(text)
    assert main(["ablate", str(folder), "--out", str(out), "--quiet"]) == 0
    (folder / "study.py").write_text(text.replace("steps=4", "steps=5"))
    assert main(["ablate", str(folder), "--out", str(out), "--quiet"]) == 0
    mark = rows.read(out)[0][0]["fingerprint"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["avg_pool-4-s0", f"avg_pool-4-s0.{mark}"]
    assert [row["steps"] for row in rows.read(out)[0]] == [4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_study_stopped_in_the_middle_of_a_run_goes_on(project, study, tmp_path, number):
    folder = project / f"experiments/stopped{number}"
    folder.mkdir()
    accident = f"""
import tcjax.train.loop as loop
from pathlib import Path
here = Path(__file__).with_name("stopped")
def wrapped(batch, mesh, place=loop.place_batch):
    wrapped.seen += 1
    if wrapped.seen == 7 and not here.exists():
        here.write_text("once")
        os.kill(os.getpid(), {int(number)})
    return place(batch, mesh)
wrapped.seen = 0
loop.place_batch = wrapped
"""
    (folder / "study.py").write_text(STUDY + accident)
    command = [sys.executable, "-m", "tcjax.cli", "ablate", str(folder), "--out", str(tmp_path / "out"), "--quiet"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    stopped = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert stopped.returncode == (-number if number == signal.SIGKILL else 128 + number), stopped.stderr
    assert len(rows.read(tmp_path / "out")[0]) == 1
    subprocess.run(command, env=environ, check=True, capture_output=True)
    for row in rows.read(study)[0]:
        whole = [line["loss"] for line in read_metrics(study / row["run"] / "metrics.jsonl")]
        parts = [line["loss"] for line in read_metrics(tmp_path / "out" / row["run"] / "metrics.jsonl")]
        assert parts == whole
    assert [row["accuracy"] for row in rows.read(tmp_path / "out")[0]] == [
        row["accuracy"] for row in rows.read(study)[0]
    ]
