"""Seconds go where they were spent, and steps that had to be done again are lost."""

import json
from pathlib import Path

import pytest

from tcjax.train.goodput import FILE, Goodput, process_start, summary, told


class Clock:
    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now


def process(folder: Path, began: float, steps: range, *, save_every: int = 4, code: int | None = None) -> None:
    """One process: 3 s to start, 1 to restore, 5 to compile, then per step 0.25 waiting and 2 working, 0.5 per save."""
    clock = Clock(began + 3)
    log = Goodput(folder / FILE, began=began, clock=clock)
    log.spend("init")
    clock.now += 1
    log.spend("restore")
    log.start(steps.start - 1)
    for step in steps:
        clock.now += 0.25
        log.spend("data")
        if step == steps.start:
            clock.now += 5
            log.spend("compile")
        clock.now += 2
        if step == steps.start:
            log.first(step)
        log.stepped(step)
        if step % save_every == 0:
            clock.now += 0.5
            log.spend("save")
            log.background(0.75)
    if code is None:
        log.close()
    else:
        log.end(code)


def test_planted_seconds_are_found_again(tmp_path):
    process(tmp_path, 1000.0, range(1, 9), code=0)
    found = summary(tmp_path)
    assert found["seconds"] == {
        "init": 3, "compile": 5, "restore": 1, "data": 2, "step": 16, "save": 1, "lost": 0, "down": 0
    }  # fmt: skip
    assert (found["wall"], found["goodput"], found["background"]) == (28, 16 / 28, 1.5)
    assert (found["processes"], found["lost_steps"], found["first_steps"]) == (1, 0, [3 + 1 + 0.25 + 5 + 2])
    line = "goodput 57.1% of 28.0 s: init 3.0, compile 5.0, restore 1.0, data 2.0, step 16.0, save 1.0 s"
    assert told(found) == line


def test_steps_behind_the_checkpoint_of_a_kill_are_lost_and_the_time_in_between_is_down(tmp_path):
    process(tmp_path, 1000.0, range(1, 7))  # killed behind step 6; checkpoint 4
    last = 1000 + 3 + 1 + 5 + 6 * 2.25 + 0.5
    process(tmp_path, last + 40, range(5, 9), code=0)
    found = summary(tmp_path / FILE)
    assert found["lost_steps"] == 2 and found["processes"] == 2
    seconds = found["seconds"]
    assert (seconds["lost"], seconds["down"], seconds["step"], seconds["data"]) == (4.5, 40, 16, 2)
    assert found["wall"] == last + 40 - 1000 + 3 + 1 + 5 + 4 * 2.25 + 0.5
    assert "lost (2 steps) 4.5, down 40.0 s" in told(found) and ", 2 processes" in told(found)


def test_steps_lost_twice_are_lost_twice(tmp_path):
    process(tmp_path, 0.0, range(1, 7))
    process(tmp_path, 100.0, range(5, 7))
    process(tmp_path, 200.0, range(5, 9), code=0)
    found = summary(tmp_path)
    assert found["lost_steps"] == 4 and found["seconds"]["lost"] == 9 and found["seconds"]["step"] == 16


@pytest.mark.parametrize(("code", "down"), [(0, 0), (130, 0), (2, 0), (143, 50)])
def test_only_what_wants_to_be_restarted_is_waited_for(tmp_path, code, down):
    process(tmp_path, 0.0, range(1, 5), code=code)
    process(tmp_path, 18.5 + 50, range(5, 9), code=0)
    assert summary(tmp_path)["seconds"]["down"] == down


def test_a_line_torn_by_a_kill_is_left_out_and_the_next_stands_alone(tmp_path):
    process(tmp_path, 0.0, range(1, 7))
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text[:-20])  # within the line of step 6
    process(tmp_path, 100.0, range(5, 9), code=0)
    found = summary(tmp_path)
    assert found["lost_steps"] == 1 and found["processes"] == 2


def test_lines_come_once_a_second_at_most(tmp_path):
    clock = Clock(0.0)
    log = Goodput(tmp_path / FILE, clock=clock)
    log.start(0)
    for step in range(1, 1001):
        clock.now += 1 / 64
        log.stepped(step)
    log.end(0)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", *["progress"] * 15, "end"]
    assert summary(tmp_path)["seconds"]["step"] == 1000 / 64


def test_no_log_is_an_error_and_no_path_writes_none(tmp_path):
    Goodput(None).end(0)
    with pytest.raises(ValueError, match=r"goodput\.jsonl holds no goodput log; `tcjax train` writes one"):
        summary(tmp_path)


def test_a_process_knows_when_it_started():
    assert Path("/proc/self").exists() is False or 0 < Clock(process_start())() <= Goodput(None)._mark
