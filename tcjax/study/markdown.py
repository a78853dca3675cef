"""report.md: the findings and the tables in Markdown, commit and fingerprint in every run's row."""

from __future__ import annotations

from tcjax.study.rows import Row
from tcjax.study.sheets import Sheet, controls, costs, results, runs


def markdown(title: str, rows: list[Row], sentences: list[str], warnings: list[str]) -> str:
    """The report without its pictures."""
    parts = [f"# {title}", "", *(f"- {sentence}" for sentence in sentences), ""]
    if warnings:
        parts += ["## Read with care", "", *(f"- {warning}" for warning in warnings), ""]
    parts += [
        "## Accuracy",
        "",
        "Exact match in per cent with 95 % intervals; ⚠ marks runs that had not converged.",
        "",
    ]
    parts += [
        *_table(results(rows)),
        "",
        "## Cost",
        "",
        "FLOPs are 2 × MACs and include the tower.",
        "",
        *_table(costs(rows)),
    ]
    language = controls(rows)
    if language:
        parts += ["", "## Controls", "", "The same questions without the right image.", "", *_table(language)]
    parts += ["", "## Runs", "", *_table(runs(rows)), ""]
    return "\n".join(parts)


def _table(table: Sheet) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(_cell(cell) for cell in cells) + " |"

    return [line(table.header), "|" + "---|" * len(table.header), *map(line, table.lines)]


def _cell(text: str) -> str:
    main, _, small = text.replace("|", "\\|").partition("\n")
    return f"{main} ({small})" if small else main
