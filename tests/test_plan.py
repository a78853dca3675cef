"""`tcjax plan` says what fits on machines nobody here owns: names, facts, refusals, what is kept, exit codes."""

import dataclasses
import fcntl
import json
import re
import subprocess
import threading
import time

import pytest

from tcjax.cli import main
from tcjax.config import MeshConfig
from tcjax.plan import answers
from tcjax.plan import topology as topologies
from tcjax.plan.chips import CHIPS
from tcjax.plan.gpu import target
from tcjax.plan.plan import laid_out, plan
from tcjax.plan.search import candidates, largest_batch, search, what_fits
from tcjax.plan.topology import EXAMPLES, island_of, topology
from tcjax.plan.worker import Facts, Refused
from tests.tiny import a_run

GIB = 2**30

# Machines ------------------------------------------------------------------------------------------------------------

DEVICES = {  # name: chips, devices, islands, links of its least connected chip as a share of all
    "v5e:1x1": (1, 1, 1, 1.0),
    "v5e:4x4": (16, 16, 1, 2 / 4),
    "v5e:16x16": (256, 256, 1, 1.0),
    "v6e:8x16": (128, 128, 1, 3 / 4),
    "v4:2x2x1": (4, 4, 1, 2 / 6),
    "v5p:4x4x4": (64, 64, 1, 1.0),
    "tpu7x:2x2x2": (8, 16, 1, 3 / 6),
    "h100:8": (8, 8, 1, 1.0),
    "h200:2x8": (16, 16, 2, 1.0),
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_name_says_devices_islands_and_links(name):
    found = topology(name)
    kind = name.partition(":")[0]
    share = found.chip.ici_rate / CHIPS[kind].ici_rate
    assert (found.num_chips, found.num_devices, found.islands, share) == pytest.approx(DEVICES[name])
    assert found.chip.hbm_bytes == CHIPS[kind].hbm_bytes


@pytest.mark.parametrize("chip", CHIPS)
def test_every_example_is_a_machine(chip):
    for size in EXAMPLES[chip].split():
        assert topology(f"{chip}:{size}").num_devices > 0


def test_slices_multiply_and_are_islands():
    found = topology("v5e:16x16", 4)
    assert (found.num_devices, found.islands) == (1024, 4)


UNKNOWN = {
    ("v5e:4y4", 1): "is unknown; a chip and its sizes: v4:2x2x1",
    ("v7:2x2", 1): "h200:1 … h200:16x8",
    ("v5e", 1): "is unknown",
    ("v5e:3x3", 1): "first two sizes are even",
    ("v5e:4x4x4", 1): "a slice of v5e has 2 sizes; for instance 1x1, 2x2",
    ("v5p:4x4", 1): "a slice of v5p has 3 sizes",
    ("v4:1x1x1", 1): "a host has 2x2 chips",
    ("v5e:32x32", 1): "at most the 256 chips of a pod; --slices joins several",
    ("h100:16", 1): "GPUs of one host (at most 8), or HOSTSx8",
    ("h100:2x4", 1): "or HOSTSx8",
    ("v5e:4x4", 0): "slices=0: from 1 up",
    ("h200:8", 2): "more than 1 of TPUs only; GPUs say h200:HOSTSx8",
}


@pytest.mark.parametrize(("name", "slices"), UNKNOWN)
def test_an_unknown_machine_is_answered_by_the_known(name, slices):
    with pytest.raises(ValueError, match=re.escape(UNKNOWN[name, slices])):
        topology(name, slices)


def test_a_gpu_is_planned_with_the_memory_that_jax_takes(monkeypatch):
    assert topology("h200:8").chip.hbm_bytes == pytest.approx(0.75 * 143_771 * 2**20, rel=1e-9)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    chip = topology("h200:8").chip
    assert chip.hbm_bytes == pytest.approx(0.9 * 143_771 * 2**20, rel=1e-9)
    assert f"device_memory_size: {143_771 * 2**20}" in target(chip), "the compiler is told of all of it"


def test_islands_are_slices_of_tpus_and_hosts_of_gpus():
    class Tpu:
        platform, process_index = "tpu", 7

        def __init__(self, slice_index):
            self.slice_index = slice_index

    class Gpu:
        platform, slice_index = "gpu", 0

        def __init__(self, process_index):
            self.process_index = process_index

    assert island_of([Tpu(None), Tpu(0), Tpu(1)]) == [0, 0, 1]
    assert island_of([Gpu(0), Gpu(0), Gpu(1)]) == [0, 0, 1]


# What has to be installed --------------------------------------------------------------------------------------------


def versions(monkeypatch, **found):
    monkeypatch.setattr(topologies, "_version", lambda package: found.get(package.replace("-", "_")))


def test_a_missing_libtpu_is_named_with_what_brings_it(monkeypatch):
    versions(monkeypatch)
    with pytest.raises(
        ValueError, match=r"libtpu, which is not installed; .* wants libtpu .*pip install 'tcjax\[tpu\]'"
    ):
        topologies.require(CHIPS["v5e"])


def test_another_libtpu_than_jax_is_made_for_is_refused(monkeypatch):
    monkeypatch.setattr(topologies, "_asked_for", lambda package: "0.0.42.*")
    versions(monkeypatch, libtpu="0.0.51")
    with pytest.raises(
        ValueError, match=r"libtpu 0.0.51 is installed, jax .* libtpu 0.0.42.\*: pip install 'tcjax\[tpu\]'"
    ):
        topologies.require(CHIPS["v5e"])
    versions(monkeypatch, libtpu="0.0.42.1")
    assert topologies.require(CHIPS["v5e"]) is None


def test_jax_itself_says_which_libtpu_it_wants():
    assert topologies._asked_for("libtpu").startswith("0.0.")


def test_a_missing_or_other_gpu_compiler_is_named_with_what_brings_it(monkeypatch):
    versions(monkeypatch)
    with pytest.raises(ValueError, match=r"no GPU or CUDA is needed.*pip install 'tcjax\[gpu-plan\]'"):
        topologies.require(CHIPS["h100"])
    versions(monkeypatch, jax_cuda13_plugin="0.1.0")
    with pytest.raises(ValueError, match=r"jax-cuda13-plugin 0.1.0 is installed, jax .* wants its own version"):
        topologies.require(CHIPS["h100"])


# Plans, with a compiler that answers at once -------------------------------------------------------------------------


def facts(peak: int, available: int = 16 * GIB, mesh=None) -> Facts:
    memory = {"peak": peak, "available": available, "arguments": 5, "temporaries": peak - 5, "output": 4, "alias": 4}
    return Facts(
        mesh or {"data": 1, "fsdp": 16, "tensor": 1}, memory, 10**15, 10**10, 10**9, 0, {"bf16": 10**9}, [], [], 1.0
    )


class Compiler:
    """Takes `fixed` bytes and `per_row` for every row of a device; refuses what is more than 16 GiB."""

    def __init__(self, fixed: int, per_row: int):
        self.fixed, self.per_row, self.asked = fixed, per_row, []

    def __call__(self, run, where, depth):
        rows = run.data.batch // (run.mesh.data * run.mesh.fsdp * run.train.accumulate)
        self.asked.append((run.mesh.fsdp, rows, depth))
        need = self.fixed // run.mesh.fsdp + rows * self.per_row
        return Refused(need, 16 * GIB) if need > 16 * GIB else facts(need, mesh=dataclasses.asdict(run.mesh))


@pytest.fixture
def compiler(monkeypatch):
    made = Compiler(fixed=32 * GIB, per_row=GIB // 10)
    monkeypatch.setattr(answers, "ask", made)
    return made


RUN = dataclasses.replace(a_run(batch=32), mesh=MeshConfig(data=1, fsdp=-1))
V5E = topology("v5e:4x4")


def test_a_plan_says_what_fits_and_predicts_by_the_longest_quotient(tmp_path, compiler):
    found = plan(RUN, V5E, root=tmp_path)
    assert found.fits and found.mesh == {"data": 1, "fsdp": 16, "tensor": 1}
    assert found.peak == 32 * GIB // 16 + 2 * (GIB // 10)
    assert found.step_seconds == max(found.seconds.values()) == found.seconds["compute"] == 10**15 / 16 / (0.5 * 197e12)
    assert found.hours == found.step_seconds * RUN.train.steps / 3600 and found.bound == "compute"
    assert found.seconds["ici"] == 10**9 / (2 * 4.5e10), "a corner of an open 4x4 has two links"
    assert json.loads(json.dumps(found.to_json()))["useful_flops"] == found.useful_flops > 0


def test_an_answer_is_kept_and_another_question_is_another(tmp_path, compiler):
    first = plan(RUN, V5E, root=tmp_path)
    again = plan(RUN.replace(name="renamed"), V5E, root=tmp_path)
    assert not first.cached and again.cached and len(compiler.asked) == 1
    assert dataclasses.replace(again, name=first.name, cached=False) == first
    longer = RUN.replace(train=dataclasses.replace(RUN.train, steps=12))
    assert plan(longer, V5E, root=tmp_path).cached, "the number of steps is in no step"
    accumulated = RUN.replace(train=dataclasses.replace(RUN.train, accumulate=2))
    assert not plan(accumulated, V5E, root=tmp_path).cached
    assert not plan(RUN, topology("v6e:4x4"), root=tmp_path).cached
    assert not plan(RUN, V5E, root=tmp_path, depth="code").cached


def test_versions_flags_and_source_are_in_the_question(monkeypatch):
    run = laid_out(RUN, V5E)
    seen = [answers.fingerprint(run, V5E, "memory")]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=1")
    seen.append(answers.fingerprint(run, V5E, "memory"))
    monkeypatch.setattr(answers, "compiler", lambda chip: "libtpu 9")
    seen.append(answers.fingerprint(run, V5E, "memory"))
    monkeypatch.setattr(answers, "_source", lambda config: "edited")
    seen.append(answers.fingerprint(run, V5E, "memory"))
    assert len(set(seen)) == 4


def test_two_planners_of_one_step_compile_it_once(tmp_path, compiler):
    folder = tmp_path / "runs/plans"
    folder.mkdir(parents=True)
    path = folder / f"{answers.fingerprint(laid_out(RUN, V5E), V5E, 'memory')}.json"
    said, found = [], []
    with path.with_suffix(".lock").open("w") as other:  # the other planner, at work
        other.write("4711")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: found.append(plan(RUN, V5E, root=tmp_path, say=said.append)))
        waiting.start()
        until = time.monotonic() + 10
        while not said and time.monotonic() < until:
            time.sleep(0.01)
        assert said == ["process 4711 compiles the same step; waiting for its answer"] and not found
        path.write_text(json.dumps({"facts": vars(facts(GIB))}))
    waiting.join(10)
    assert found[0].cached and found[0].peak == GIB and not compiler.asked


def test_a_mesh_or_batch_that_does_not_divide_is_refused_before_anything_is_compiled(compiler):
    with pytest.raises(ValueError, match=r"fsdp=3.*does not multiply to the 16 devices"):
        laid_out(RUN, V5E, fsdp=3)
    with pytest.raises(ValueError, match=r"batch of 24 does not divide over 16"):
        laid_out(RUN, V5E, batch=24)
    with pytest.raises(
        ValueError, match=r"mesh.data=1 must be a multiple of the 2 slices.*--mesh.data 2 --mesh.fsdp -1"
    ):
        laid_out(RUN, topology("v5e:4x4", 2))
    assert not compiler.asked


def test_the_largest_batch_is_found_in_few_answers_to_a_sixteenth(tmp_path, compiler):
    found = largest_batch(RUN, V5E, root=tmp_path)
    assert found is not None
    most = (16 * GIB - 2 * GIB) // (GIB // 10)  # rows per device that fit: 140
    assert most * 15 / 16 <= found.batch / 16 <= most and len(compiler.asked) <= 5
    assert f"a batch of {found.batch:,} on data 1, fsdp 16, tensor 1 fits" in what_fits(found)


def test_no_batch_is_the_largest_where_not_even_one_row_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "ask", Compiler(fixed=32 * GIB, per_row=15 * GIB))
    assert largest_batch(RUN, V5E, root=tmp_path) is None
    assert "not even one row per device fits" in what_fits(None)


def test_the_search_takes_the_fewest_shares_that_win(tmp_path, compiler):
    said = []
    found = search(RUN, V5E, root=tmp_path, say=said.append)
    assert candidates(RUN, V5E) == [(16, 1), (8, 2), (4, 4), (1, 16)], "a tiny model fits anywhere by its own bytes"
    fits = {row["mesh"]["fsdp"]: row["fits"] for row in found.search["meshes"]}
    assert fits == {1: False, 2: False, 4: True, 16: True}
    assert found.fits and found.mesh["fsdp"] == 16, "equal predictions and traffic: less memory wins"
    assert found.search["largest"]["batch"] == 16 * found.search["rows_per_device"] > RUN.data.batch
    asked = len(compiler.asked)
    assert search(RUN, V5E, root=tmp_path) == dataclasses.replace(found, cached=True) and len(compiler.asked) == asked
    assert said[0].startswith("mesh data 16, fsdp 1, tensor 1: does not fit: needs 32.20 GiB of 16.00 GiB")


# The verb ------------------------------------------------------------------------------------------------------------

CONFIG = """
import dataclasses
from tests.tiny import a_run
from tcjax.config import MeshConfig

def run():
    return dataclasses.replace(a_run(batch=32), mesh=MeshConfig(data=1, fsdp=-1))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(topologies, "_version", lambda package: "0.10.2")
    monkeypatch.setattr(topologies, "_asked_for", lambda package: "")
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs/tiny_plan.py"
    path.write_text(CONFIG)
    return str(path)


def test_the_verb_prints_a_table_or_json_and_fits_is_0(config, compiler, capsys):
    assert main(["plan", config, "--topology", "v5e:4x4", "--train.steps", "7200"]) == 0
    printed = capsys.readouterr().out
    assert "2.20 of 15.75" not in printed and "2.20 of 16.00 GiB" in printed and "fits: 14% of the memory" in printed
    assert "predicted step" in printed and "1.27 hours" in printed
    assert main(["plan", config, "--topology", "v5e:4x4", "--batch", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == 64


def test_what_does_not_fit_is_3_and_says_what_would(config, compiler, capsys):
    assert main(["plan", config, "--topology", "v5e:4x4", "--batch", "3200", "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert not said["fits"] and said["verdict"] == "does not fit: needs 22.00 GiB of 16.00 GiB per device"
    assert "a batch of 2,2" in said["would_fit"] and "on data 1, fsdp 16, tensor 1 fits" in said["would_fit"]
    assert main(["plan", config, "--topology", "v5e:4x4", "--batch", "3200", "--search"]) == 0, (
        "a batch that fits is found"
    )
    assert "does not fit" in capsys.readouterr().out


BAD = {
    "v5e:5x5": "topology 'v5e:5x5'",
    "v5e:4x4 --mesh.fsdp 5": "does not multiply to the 16 devices",
    "v5e:4x4 --batch 17": "a global batch of 17 does not divide",
    "v5e:4x4 --batch -1": "--batch -1: takes a whole number",
}


@pytest.mark.parametrize("words", BAD)
def test_a_wrong_question_is_one_line_and_2(words, config, compiler, capsys):
    assert main(["plan", config, "--topology", *words.split()]) == 2
    error = capsys.readouterr().err
    assert BAD[words] in error and error.startswith("tcjax plan: ") and error.count("\n") == 1


def test_a_compiler_that_dies_is_told_with_its_last_words(tmp_path, monkeypatch):
    from tcjax.plan import worker

    def dies(command, **how):
        how["stderr"].write("a line\nlibtpu has no idea\n")
        how["stderr"].flush()
        return subprocess.CompletedProcess(command, -6)

    monkeypatch.setattr(worker.subprocess, "run", dies)
    with pytest.raises(ValueError, match="ended with code -6 and no answer: a line / libtpu has no idea"):
        worker.ask(laid_out(RUN, V5E), V5E, "memory")
