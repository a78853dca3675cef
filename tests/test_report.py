"""From rows to sentences, warnings and pictures: a report says what the rows say, and fetches nothing."""

import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from tcjax.evaluate.statistics import proportion
from tcjax.study import curves, looks, paired, plots, rows, words
from tcjax.study.converged import converged
from tcjax.study.lints import lints
from tcjax.study.points import points, reference
from tcjax.study.report import report

CHANCE = {"count": 0.2, "read": 0.0, "caption": 0.0}


def row(compressor="resampler", Q=16, seed=0, count=0.8, read=0.6, **changes):
    """One row of 400 questions per task on a tower of 64 tokens."""
    accuracy = {task: proportion(share * 400, 400)._asdict() for task, share in (("count", count), ("read", read))}
    guess = {"count": proportion(80, 400)._asdict(), "read": proportion(0, 400)._asdict()}
    return {
        "run": f"{compressor}-{Q}-s{seed}",
        "compressor": compressor,
        "num_queries": Q,
        "seed": seed,
        "visual_tokens": Q,
        "ratio": 64 / Q,
        "accuracy": accuracy | {"caption": proportion(4, 400)._asdict()},
        "token_accuracy": {"count": count, "read": 0.9, "caption": 0.5},
        "chance": CHANCE,
        "controls": {"blank": guess},
        "mean_accuracy": (count + read) / 2,
        "prefill_flops": 1e9 + Q * 1e7,
        "kv_bytes": Q * 1024,
        "prefill_seconds": 0.01,
        "train_seconds": 60.0,
        "steps": 100,
        "converged": True,
        "fingerprint": f"{compressor}{Q}{seed}",
        "commit": "0123456789ab",
        "hardware": "2 CPU cores",
        "date": "2026-01-02T03:04:05+00:00",
        "command": "tcjax ablate experiments/s",
        "artifact": f"{compressor}-{Q}-s{seed}/artifact",
    } | changes


def clean_study():
    """Nothing to object to: a reference, the baseline at the same budgets, two seeds each."""
    return [
        made
        for seed in (0, 1)
        for made in (
            row("mlp", 64, seed, count=0.9, read=0.8),
            row("resampler", 16, seed, count=0.88, read=0.6),
            row("resampler", 4, seed, count=0.5, read=0.2),
            row("avg_pool", 16, seed, count=0.6, read=0.4),
            row("avg_pool", 4, seed, count=0.4, read=0.1),
        )
    ]


def test_the_last_row_of_a_fingerprint_wins(tmp_path):
    for made in (row(count=0.1), row(Q=4), row(count=0.7)):
        rows.append(tmp_path / "new", made)
    read, warnings = rows.read(tmp_path / "new")
    assert [(r["visual_tokens"], r["accuracy"]["count"]["mean"]) for r in read] == [(4, 0.8), (16, 0.7)]
    assert warnings == []


def test_a_line_cut_short_is_left_out_and_the_next_row_survives_it(tmp_path):
    rows.append(tmp_path, row())
    with (tmp_path / rows.FILE).open("a") as file:
        file.write('{"run": "cut of')
    assert len(rows.read(tmp_path)[0]) == 1
    rows.append(tmp_path, row(Q=4))
    read, warnings = rows.read(tmp_path)
    assert [r["visual_tokens"] for r in read] == [16, 4]
    assert warnings == ["rows.jsonl line 2 is broken (a writer was stopped halfway?) and was left out."]


def test_a_row_that_nobody_could_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lacks \['fingerprint'\]"):
        rows.append(tmp_path, row(fingerprint=None))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        rows.append(tmp_path, row(train_seconds=float("nan")))
    assert not (tmp_path / rows.FILE).exists()


def test_a_repeated_run_stands_in_the_report_once(tmp_path):
    rows.append(tmp_path, row(count=0.1, fingerprint="old"))
    rows.append(tmp_path, row(count=0.7, fingerprint="new"))
    read, warnings = rows.read_for_report(tmp_path)
    assert [r["fingerprint"] for r in read] == ["new"]
    assert "1 older row(s)" in warnings[0]


def losses(loss):
    return [{"step": 10 * (i + 1), "loss": float(value)} for i, value in enumerate(loss)]


def test_converged_means_that_twice_the_steps_would_gain_nothing():
    step = np.arange(1, 51) / 50
    assert converged(losses(1 + np.exp(-20 * step))) is True
    assert converged(losses(2 - step)) is False
    noise = np.random.default_rng(0).normal(0, 0.1, 50)
    assert converged(losses(1 + noise)) is True
    assert converged(losses((1 + noise) * step**-0.5)) is False, "a power law is seen through noise"
    assert converged(losses(step**-0.06)) is True, "doubling gains 4 %"
    assert converged(losses(step**-0.08)) is False, "doubling gains 5.4 %"
    assert converged(losses(np.zeros(50))) is True
    assert converged(losses([1.0] * 49 + [float("nan")])) is False
    assert converged(losses([3.0, 1.0])) is None
    assert converged([]) is None


def test_seeds_become_one_point():
    made = points([row(seed=0, count=0.7), row(seed=1, count=0.9, converged=False)])
    assert len(made) == 1
    point = made[0]
    assert (point.mean_accuracy.mean, point.seeds, point.converged) == (pytest.approx(0.7), [0, 1], False)
    assert point.accuracy["count"].mean == pytest.approx(0.8)
    assert point.accuracy["count"].high - point.accuracy["count"].low > 0.5, "t with one degree of freedom is wide"
    assert point.caption == 0.5


def test_the_headline_is_the_rows_in_words():
    first, resampler, pooled, *duels = words.headline(clean_study(), {})
    assert first.startswith(
        "Without compression, mlp hands the LLM 64 visual tokens: mean accuracy over the tasks 85.0"
    )
    said = resampler.replace("\N{NO-BREAK SPACE}", " ")
    # (0.88 / 0.9 + 0.6 / 0.8) / 2 and (0.5 / 0.9 + 0.2 / 0.8) / 2; the caption stays out.
    assert said.startswith(
        "resampler keeps 86 % of the reference's accuracy at 16 tokens (mean 74.0 %, 4× fewer) and 40 %"
    )
    # At 16 tokens, count fell by 0.02 within the noise; read lost 0.2 of 0.8.
    assert said.endswith("First to fall is read: from 80.0 % to 60.0 % at 16 tokens.")
    assert pooled.startswith("avg_pool keeps")
    assert [duel.rpartition(": ")[2] for duel in duels] == ["resampler is ahead, the intervals do not overlap."] * 2


def test_without_a_reference_nothing_is_kept():
    sentences = words.headline([row()], {})
    assert [s.replace("\N{NO-BREAK SPACE}", " ") for s in sentences] == [
        "resampler reaches mean 70.0 % at 16 tokens (4× fewer)."
    ]
    assert reference(points([row()])) is None


def test_no_task_is_said_to_fall_within_the_noise():
    sentences = words.headline([row("mlp", 64, count=0.8, read=0.62), row()], {})
    assert sentences[1].endswith("No task falls measurably below the reference.")


def answers(right):
    return {paired.Question(i // 2, "read" if i < 100 else "count", str(i)): bool(r) for i, r in enumerate(right)}


def test_runs_on_the_same_questions_are_paired():
    rng = np.random.default_rng(0)
    a = rng.random(200) < 0.75
    b = a & (rng.random(200) < 0.9)
    made = points([row("resampler"), row("avg_pool")])
    verdicts = {"resampler-16-s0": answers(a), "avg_pool-16-s0": answers(b)}
    gain = paired.gain(*made, verdicts)
    assert gain.mean == pytest.approx(a.mean() - b.mean())
    assert gain.low > 0
    assert "(paired 95" in words.headline([row("resampler", count=0.81), row("avg_pool")], verdicts)[-1]
    assert paired.gain(*made, verdicts | {"avg_pool-16-s0": answers(b[:150])}) is None, "other questions"
    assert paired.gain(*points([row(), row(seed=1), row("avg_pool")]), verdicts) is None, "several seeds"


def test_a_clean_study_has_no_warnings():
    assert lints(clean_study()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda rs: [r for r in rs if r["compressor"] != "mlp"], "No uncompressed reference"),
        (lambda rs: [r for r in rs if r["run"][:-3] != "avg_pool-4"], "`avg_pool` is missing at 4 tokens"),
        (
            lambda rs: rs + [row(run="again", fingerprint="again")],
            "2 different runs share resampler, 16 tokens, seed 0",
        ),
        (lambda rs: [rs[0] | {"converged": False}] + rs[1:], "Not converged.*: mlp-64-s0"),
        (lambda rs: [rs[0] | {"commit": "ba9876543210"}] + rs[1:], "from 2 commits"),
        (lambda rs: [r | {"commit": "0123+changes"} for r in rs], "Uncommitted changes"),
        (lambda rs: [r | {"commit": ""} for r in rs], "no commit"),
        (lambda rs: [r for r in rs if r["seed"] == 0], "One seed per point"),
        (lambda rs: rs[:-1], "One seed only: avg_pool at 4"),
        (lambda rs: [rs[0] | {"steps": 7}] + rs[1:], "different numbers of steps"),
        (lambda rs: [rs[0] | {"hardware": "TPU"}] + rs[1:], "different hardware"),
        (lambda rs: [r | {"controls": {}} for r in rs], "No controls"),
        (lambda rs: [r | {"chance": {"count": 0.9, "read": 0.0}} for r in rs], "`count` cannot show compression"),
        (lambda rs: [r | {"chance": {"count": 0.1, "read": 0.0}} for r in rs], "With a blank image, task `count`"),
        (
            lambda rs: [rs[0] | {"accuracy": {"count": proportion(9, 10)._asdict()}}] + rs[1:],
            "`count` was asked a diff",
        ),
    ],
)
def test_each_pitfall_is_named(changed, message):
    assert any(re.search(message, found) for found in lints(changed(clean_study()))), message


def test_every_family_keeps_its_colour_and_the_reference_is_grey():
    colour = plots.colours(clean_study())
    assert colour["mlp"] == plots.REFERENCE
    assert len(set(colour.values())) == 3
    assert plots.colours(clean_study()[::-1]) == colour, "the order of rows does not repaint the report"


def test_labels_do_not_overlap():
    placed = curves.spread({4: 0.50, 16: 0.51, 64: 0.99, 256: 0.995}, 0.1)
    heights = sorted(placed.values())
    assert min(np.diff(heights)) > 0.0999
    assert max(heights) <= 1
    assert list(placed) == [4, 16, 64, 256]


def test_a_query_lights_the_patch_it_looks_at():
    image_YX3 = np.full((8, 8, 3), 100, np.uint8)
    weight_HW = np.zeros((4, 4))
    weight_HW[1, 2] = 0.7
    bright_YX = looks.lit(image_YX3, weight_HW).sum(-1)
    assert (bright_YX[2:4, 4:6] > 2 * bright_YX[0, 0]).all()
    bright_YX[2:4, 4:6] = bright_YX[0, 0]
    np.testing.assert_allclose(bright_YX, bright_YX[0, 0])


def test_a_patch_belongs_to_the_query_with_most_weight():
    assign_QN = np.array([[0.5, 0.1, 0.0, 0.4], [0.2, 0.3, 0.0, 0.5]])
    assert looks.owners(assign_QN, (2, 2)).tolist() == [[0, 1], [-1, 1]]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder as a killed study leaves it: two runs with curves and pictures, a hostile command, a torn last line."""
    folder = tmp_path_factory.mktemp("runs") / "num_queries"
    for made in (row("mlp", 64, count=0.9, read=0.8), row("resampler", 16), row("resampler", 32, converged=False)):
        rows.append(folder, made)
    rows.append(folder, row("avg_pool", 16, command="tcjax <b>&</b>"))
    with (folder / rows.FILE).open("a") as file:
        file.write('{"run":')
    rng = np.random.default_rng(0)
    for run, Q in (("resampler-16-s0", 16), ("resampler-32-s0", 32)):
        (folder / run).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in losses(1 + np.exp(-np.arange(20) / 4)))
        (folder / run / "metrics.jsonl").write_text(text + '{"step": 210, "lo')
        assign_BQN = rng.dirichlet(np.ones(64), (2, Q)).astype(np.float32)
        images = rng.integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
        np.savez(folder / run / "looks.npz", images=images, assign=assign_BQN, grid=(8, 8), questions=["one", "two"])
    return folder, report(folder)


def test_a_report_is_written_whole(study):
    folder, written = study
    drawn = ["accuracy", "cost", "training", "looks-resampler-16", "looks-resampler-32"]
    assert list(written) == [*drawn, "html", "markdown"]
    for path in written.values():
        assert path.is_relative_to(folder)
        if path.suffix == ".png":
            height, width, _ = imread(path).shape
            assert min(height, width) > 300
            assert imread(path)[..., :3].std() > 0.03, f"{path} is blank"


def test_the_html_carries_everything_inside(study):
    html = study[1]["html"].read_text()
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]([^'\"]{0,30})", html)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^']*", "", html)
    assert "<script" not in html
    assert "<b>&</b>" not in html
    assert "tcjax &lt;b&gt;&amp;&lt;/b&gt;" in html


def test_html_and_markdown_say_the_same_numbers(study):
    html, text = study[1]["html"].read_text(), study[1]["markdown"].read_text()
    estimate = proportion(240, 400)
    interval = f"{100 * estimate.low:.1f}–{100 * estimate.high:.1f}"
    assert f"<td>60.0<small>{interval}</small></td>" in html
    assert f"| 60.0 ({interval}) |" in text
    assert "resampler ⚠" in html
    assert "resampler ⚠" in text
    assert "line 5 is broken" in html
    run = next(line for line in text.splitlines() if line.startswith("| resampler-16-s0"))
    assert "0123456789ab" in run
    assert "resampler160" in run, "the fingerprint"


def test_a_report_of_bare_rows_leaves_out_what_it_lacks(tmp_path):
    bare = {key: value for key, value in row().items() if key in rows.REQUIRED}
    rows.append(tmp_path, bare)
    assert set(report(tmp_path)) == {"accuracy", "html", "markdown"}


@pytest.mark.parametrize("text", [None, "", '{"run":'])
def test_an_empty_study_is_said_to_be_empty(tmp_path, text):
    if text is not None:
        (tmp_path / rows.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"rows.jsonl holds no rows: run the study first \(tcjax ablate"):
        report(tmp_path)
