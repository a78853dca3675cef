"""The benchmark times the same computation on both sides, and says which."""

import dataclasses
import json

import pytest

from benchmarks import compressors, frozen, host
from tcjax.compressors import avg_pool, query_resampler
from tcjax.config import Pixels
from tests.compressor_cases import WIDTHS


def test_both_sides_compute_the_same_and_the_table_has_both(tmp_path, monkeypatch, capsys):
    told = query_resampler.Config(num_queries=6, width=16, heads=2, kv_heads=1, head_width=8)
    monkeypatch.setattr(compressors, "WIDTHS", WIDTHS)
    monkeypatch.setattr(
        compressors, "CATALOGUE", {"avg_pool": lambda num: avg_pool.Config(num_queries=num), "told": lambda num: told}
    )
    compressors.main(["--no-compile", "--turns", "1", "--out", str(tmp_path / "table.json")])
    recorded = json.loads((tmp_path / "table.json").read_text())
    assert {"commit", "hardware", "torch", "batch", "dtype"} <= set(recorded["environment"])
    assert {name: row["outputs"] for name, row in recorded["rows"].items()} == {
        "avg_pool": 16,
        "told": 6,
    }
    for row in recorded["rows"].values():
        assert row["difference"] < 1e-5
        for kind in ("forward", "backward"):
            assert row[kind]["ratio"] > 0
            assert "torch.compile" not in row[kind]
    table = (tmp_path / "table.md").read_text()
    assert "| avg_pool | 16 |" in table and "| told | 6 |" in table
    assert "told" in capsys.readouterr().out


def test_the_ratio_is_the_better_torch_time_over_ours():
    seconds = {"jax": 0.002, "torch": 0.003, "torch.compile": 0.001}
    assert compressors.ratio(seconds) == {"jax": 2.0, "torch": 3.0, "torch.compile": 1.0, "ratio": 0.5}


def test_frozen_models_are_the_same_on_both_sides(tmp_path, monkeypatch):
    tower = dataclasses.replace(
        frozen.TOWER, pixels=Pixels(size_YX=(28, 28)), width=32, layers=3, heads=2, feed_forward=48
    )
    llm = dataclasses.replace(
        frozen.LLM, vocab=97, width=32, layers=2, heads=4, kv_heads=2, head_width=8, feed_forward=48
    )
    monkeypatch.setattr(frozen, "TOWER", tower)
    monkeypatch.setattr(frozen, "LLM", llm)
    frozen.main(["--no-compile", "--turns", "1", "--peak", "0.1", "--out", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert set(rows) == {"tower", "step"}
    for row in rows.values():
        assert row["difference"] < 1e-5 and row["time"]["ratio"] > 0 and row["useful"]["jax"] > 0
    assert "| step |" in (tmp_path / "table.md").read_text()


def test_the_host_benchmark_compares_pixels_before_it_times_them(tmp_path, monkeypatch, capsys):
    small = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    monkeypatch.setattr(host, "PROCESSORS", {"clip": ("CLIPImageProcessor", small)})
    options = [
        "--no-workers",
        "--made",
        "6",
        "--scale",
        "0.1",
        "--cores",
        "1",
        "--batch",
        "2",
        "--count",
        "4",
        "--turns",
        "1",
    ]
    host.main([*options, "--out", str(tmp_path / "host.json")])
    recorded = json.loads((tmp_path / "host.json").read_text())
    assert recorded["environment"]["difference"]["largest"] <= 2
    row = recorded["rows"]["1"]
    assert row["ratio"] == pytest.approx(row["ours"] / row["no worker"], abs=0.05)
    assert row["milliseconds"]["ours"] > 0
    assert "| 1 | " in (tmp_path / "host.md").read_text()
    assert "CLIPImageProcessor" in capsys.readouterr().out
