"""Benchmarks of whole steps and prompts: both sides compute the same, the largest batch is found, the tables say it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import torch

from benchmarks import overhead, prefill, shapes, sides, train_step
from tcjax.compressors import resampler


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    """One layer of everything: what compiles longer shows nothing more."""
    tower, llm = shapes.SIZES["tiny"]
    tiny = dataclasses.replace(tower, layers=2), dataclasses.replace(llm, layers=1)  # CLIP's last block is not run
    monkeypatch.setitem(shapes.SIZES, "tiny", tiny)
    of = {"resampler": lambda num: resampler.Config(num_queries=num, depth=1), "mlp": shapes.CATALOGUE["mlp"]}
    monkeypatch.setattr(shapes, "CATALOGUE", of)


STEP = ["--size", "tiny", "--batch", "2", "--one-process", "--no-compile", "--seconds", "0", "--remat", "full"]


def test_a_training_step_is_the_same_on_both_sides_before_it_is_timed(tmp_path):
    options = ["--dtype", "bfloat16", "--peak", "0.1", "--out", str(tmp_path / "table.json")]
    train_step.main([*STEP, *options])
    recorded = json.loads((tmp_path / "table.json").read_text())
    facts, rows = recorded["environment"], {row["name"]: row for row in recorded["rows"]}
    assert {"commit", "hardware", "torch", "command"} <= set(facts) and facts["remat"] == "full"
    assert max(facts["difference"]["loss"], facts["difference"]["grad_norm"]) <= train_step.EQUAL
    assert set(rows) == {"jax", "torch"}
    for row in rows.values():
        assert row["useful"] == pytest.approx(2 / row["seconds"] * row["flops_per_sample"] / 1e11)
    assert rows["jax"]["ratio"] == pytest.approx(rows["torch"]["seconds"] / rows["jax"]["seconds"])
    assert "| jax | 2 | " in (tmp_path / "table.md").read_text()


def test_sides_that_differ_are_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(train_step, "matched", lambda *_: None)
    with pytest.raises(ValueError, match="the two sides compute different steps"):
        train_step.main([*STEP, "--out", str(tmp_path / "table.json")])
    assert not (tmp_path / "table.json").exists()


@pytest.mark.slow
def test_each_side_runs_in_a_process_of_its_own(tmp_path):
    options = [
        "--size",
        "tiny",
        "--batch",
        "1",
        "--seconds",
        "0",
        "--only",
        "jax",
        "--out",
        str(tmp_path / "table.json"),
    ]
    train_step.main(options)
    recorded = json.loads((tmp_path / "table.json").read_text())
    assert recorded["environment"]["command"] == " ".join(["python -m benchmarks.train_step", *options])
    assert [(row["name"], row["batch"], row["ratio"]) for row in recorded["rows"]] == [("jax", 1, None)]


def test_a_cpu_is_not_filled(tmp_path):
    arguments = train_step.parse(["--size", "tiny", "--one-process"])
    with pytest.raises(ValueError, match="name one with --batch"):
        train_step.peer("jax", arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_step_multiplies_in_the_type_that_is_asked(dtype):
    arguments = train_step.parse([*STEP, "--dtype", dtype])
    config, mesh = shapes.shape("tiny", 4), shapes.one_device()
    ours = sides.Ours(shapes.random_model(config, dtype, mesh), train_step.training(arguments), mesh)
    ours.begin(shapes.random_batch(config, 1, 4, 4))
    traced = str(ours.jitted.trace(ours.state, ours.frozen, ours.batch, jnp.int32(1)).jaxpr)
    products = [line.split("=")[0] for line in traced.splitlines() if "dot_general" in line]
    share = sum("bf16[" in result for result in products) / len(products)
    assert share == 0 if dtype == "float32" else share > 0.5  # logits and attention's scores are float32


@pytest.mark.parametrize("room", [1, 5, 32, 100, 1000])
@pytest.mark.parametrize("start", [1, 32, 300])
def test_the_largest_batch_is_found_to_an_eighth(room, start):
    asked = []
    found = sides.largest(lambda batch: asked.append(batch) or batch <= room, start)
    assert found <= room < found + max(2, found // 8 + 1)
    assert len(asked) <= 16 and len(set(asked)) == len(asked)


def test_no_batch_at_all_is_an_error():
    with pytest.raises(ValueError, match="not even one sample fits"):
        sides.largest(lambda batch: False, 32)


class Greedy:
    """A side whose steps want memory that no machine has, of one framework."""

    def __init__(self, allocate):
        self.allocate, self.ended = allocate, False

    def begin(self, batch):
        pass

    def run(self):
        self.allocate()

    def wait(self):
        return 0.0, 0.0

    def end(self):
        self.ended = True


MEMORY = 2**46


@pytest.mark.parametrize(
    "allocate",
    [lambda: jax.block_until_ready(jnp.zeros(MEMORY, jnp.float32)), lambda: torch.zeros(MEMORY)],
    ids=["jax", "torch"],
)
def test_a_step_that_runs_out_of_memory_does_not_fit_and_gives_back_what_it_had(allocate):
    side = Greedy(allocate)
    assert sides.fits(side, None) is False
    assert side.ended
    assert sides.fits(Greedy(lambda: None), None) is True


def test_another_error_is_not_taken_for_memory():
    def broken():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        sides.fits(Greedy(broken), None)


def test_rows_are_compared_at_the_same_batch_with_the_better_of_theirs():
    rows = [
        {"name": "torch", "batch": 8, "seconds": 2.0},
        {"name": "torch.compile", "batch": 8, "seconds": 1.0},
        {"name": "torch", "batch": 16, "seconds": None},
        {"name": "jax", "batch": 8, "seconds": 0.5},
        {"name": "jax", "batch": 16, "seconds": 0.9},
    ]
    judged = train_step.judged(rows, shapes.shape("tiny", 64), 0.0)
    assert [row.get("ratio") for row in judged] == [None, None, None, 2.0, None]
    lines = train_step.table_of(judged)
    assert lines[3] == ["torch", "16", "out of memory", "-", "-", "-"]
    assert lines[4] == ["jax", "8", "500.0", "16.00", "-", "2.00"]


def test_known_peaks_are_found_by_the_devices_name():
    assert (shapes.peak_of("NVIDIA H200"), shapes.peak_of("cpu")) == (989.0, 0.0)


def test_prefill_is_told_by_the_number_of_visual_tokens(tmp_path):
    options = ["--sizes", "tiny", "--visual", "64,16", "--text", "8", "--seconds", "0", "--peak", "0.1"]
    prefill.main([*options, "--out", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["visual"] for row in rows] == [64, 16]
    assert rows[0]["flops"]["prefill"] > 2.5 * rows[1]["flops"]["prefill"]
    assert rows[0]["kv_bytes"] * (16 + 8) == rows[1]["kv_bytes"] * (64 + 8)
    for row in rows:
        assert set(row["milliseconds"]) == {"tower", "compressor", "prefill", "first token"}
        assert min(row["milliseconds"].values()) > 0 and row["useful"] > 0
    table = (tmp_path / "table.md").read_text()
    assert "| tiny | 64 |" in table and "| tiny | 16 |" in table


def test_pythons_share_is_what_a_turn_takes_beyond_the_device(tmp_path):
    overhead.main(["--steps", "6", "--out", str(tmp_path / "table.json")])
    row = json.loads((tmp_path / "table.json").read_text())["rows"]["smallest"]
    assert row["overhead"] == pytest.approx(row["turn"] - row["device"], abs=2e-3)
    assert min(row["device"], row["place"], row["dispatch"]) > 0
    assert row["arrays"] == 49
