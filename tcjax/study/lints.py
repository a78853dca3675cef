"""What a careful reader would object to: each lint is a sentence about these rows, or silent.

After the pitfalls that comparisons of token compressors have been seen to fall into: missing trivial baselines,
no reference on the same stack, tasks that hardly look at the image, one seed without intervals, mixed code or hardware.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tcjax.evaluate.scores import CAPTION
from tcjax.study.points import Point, chance, families, points, reference, tasks
from tcjax.study.rows import Row

BASELINE = "avg_pool"  # the trivial compressor that everyone must beat at the same budget
_MARGIN = 0.05


def lints(rows: list[Row]) -> list[str]:
    """Sentences, the gravest first; empty if there is nothing to object to."""
    made = points(rows)
    found: list[str] = []
    for lint in (_reference, _baseline, _duplicates, _convergence, _commits, _questions, _seeds, _steps, _hardware):
        found += lint(rows, made)
    return found + list(_language(rows, made))


def _reference(_: list[Row], made: list[Point]) -> Iterator[str]:
    if reference(made) is None:
        yield "No uncompressed reference (ratio 1) was measured: retention cannot be given. Add an `mlp` run."


def _baseline(_: list[Row], made: list[Point]) -> Iterator[str]:
    budgets = {point.visual_tokens for point in made if not point.is_reference}
    pooled = {point.visual_tokens for point in families(made).get(BASELINE, [])}
    if missing := sorted(budgets - pooled):
        yield f"The trivial baseline `{BASELINE}` is missing at {_list(missing)} tokens: nothing shows learning pays."


def _duplicates(rows: list[Row], _: list[Point]) -> Iterator[str]:
    counts = Counter((row["compressor"], row["visual_tokens"], row["seed"]) for row in rows)
    for (family, Q, seed), count in counts.items():
        if count > 1:
            yield (
                f"{count} different runs share {family}, {Q} tokens, seed {seed} and are averaged as if they were "
                f"seeds: give variants their own name, or remove rows of an older config."
            )


def _convergence(rows: list[Row], _: list[Point]) -> Iterator[str]:
    if late := [row["run"] for row in rows if row.get("converged") is False]:
        yield f"Not converged, twice the steps would have lowered the loss further: {_list(late)}. That may change the order."


def _commits(rows: list[Row], _: list[Point]) -> Iterator[str]:
    commits = dict.fromkeys(row.get("commit") or "" for row in rows)
    if len(commits) > 1:
        named = _list(commit or "none" for commit in commits)
        yield f"Rows come from {len(commits)} commits ({named}): code may differ."
    if changed := [commit for commit in commits if commit.endswith("+changes")]:
        yield f"Uncommitted changes were present ({_list(changed)}): the commit alone does not give these rows again."
    if "" in commits:
        yield "Some rows carry no commit: their code is unknown."


def _questions(rows: list[Row], _: list[Point]) -> Iterator[str]:
    for task in tasks(rows):
        numbers = {row["accuracy"][task]["n"] if task in row["accuracy"] else 0 for row in rows}
        if len(numbers) > 1:
            yield f"Task `{task}` was asked a different number of times in different rows ({_list(sorted(numbers))})."


def _seeds(_: list[Row], made: list[Point]) -> Iterator[str]:
    single = [point for point in made if len(point.rows) == 1]
    if len(single) == len(made):
        yield "One seed per point: the intervals cover the choice of questions, not the luck of training."
    elif single:
        names = [f"{point.compressor} at {point.visual_tokens}" for point in single]
        yield f"One seed only: {_list(names)}. Their intervals leave out the luck of training."


def _steps(rows: list[Row], _: list[Point]) -> Iterator[str]:
    trained = {row["steps"] for row in rows if row.get("steps")}
    if len(trained) > 1:
        yield f"Runs were trained for different numbers of steps ({_list(sorted(trained))})."


def _hardware(rows: list[Row], _: list[Point]) -> Iterator[str]:
    machines = dict.fromkeys(row["hardware"] for row in rows if row.get("hardware"))
    if len(machines) > 1:
        yield f"Measured on different hardware ({_list(machines)}): seconds are not comparable."


def _language(rows: list[Row], made: list[Point]) -> Iterator[str]:
    if not any(row.get("controls") for row in rows):
        yield "No controls (blank, shuffled or random image) were run: part of the accuracy may come from language alone."
    whole = reference(made)
    for task in tasks(rows):
        guess = chance(rows, task)
        if task == CAPTION or guess is None:
            continue
        if whole and task in whole.accuracy and whole.accuracy[task].low <= guess:
            yield f"Task `{task}` cannot show compression: the reference is not above chance ({guess:.0%})."
        for control in ("blank", "shuffled", "random"):
            found = [
                row["controls"][control][task] for row in rows if task in (row.get("controls") or {}).get(control, {})
            ]
            best = max(found, key=lambda estimate: estimate["low"], default=None)
            if best and best["low"] > guess + _MARGIN:
                yield f"With a {control} image, task `{task}` still reaches {best['mean']:.0%} (chance {guess:.0%})."


def _list(items) -> str:
    return ", ".join(str(item) for item in items)
