"""report.html: one file with everything inside, readable on a phone, in light and dark; no script, nothing fetched."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import NamedTuple

from tcjax.study.rows import Row
from tcjax.study.sheets import Sheet, controls, costs, results, runs


class Picture(NamedTuple):
    """path: a PNG. caption: what it shows, also its text for those who cannot see it."""

    path: Path
    caption: str


def html(
    title: str, rows: list[Row], sentences: list[str], warnings: list[str], plots: list[Picture], looks: list[Picture]
) -> str:
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1>", "<ul class='headline'>", *_items(sentences), "</ul>"]
    if warnings:
        body += ["<section class='care'><h2>Read with care</h2><ul>", *_items(warnings), "</ul></section>"]
    body += ["<h2>Accuracy and cost</h2>", *map(_picture, plots)]
    body += [
        "<h2>All results</h2>",
        "<p>Exact match in per cent; small: 95 % interval. <b>kept</b>: mean over the tasks of accuracy divided by the "
        "uncompressed reference's. <b>mean</b> and <b>kept</b> leave the caption out. ⚠: had not converged.</p>",
        _table(results(rows)),
        "<p>FLOPs are 2 × MACs; tower, compressor and the LLM's prefill with the question are all counted.</p>",
        _table(costs(rows)),
    ]
    language = controls(rows)
    if language:
        body += [
            "<h2>Controls</h2>",
            "<p>The same questions with a blank image, or another sample's: what still scores is owed to language. "
            "Below chance: without a board the model gives answers that no question of the task has.</p>",
            "<details><summary>Table</summary>",
            _table(language),
            "</details>",
        ]
    if looks:
        body += [
            "<h2>Where the queries look</h2>",
            "<p>Light marks the patches a query takes its content from, relative to its own strongest patch.</p>",
            *map(_picture, looks),
        ]
    body += ["<h2>How it was produced</h2>", *_facts(rows), _table(runs(rows))]
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


def _items(sentences: list[str]) -> list[str]:
    return [f"<li>{_code(sentence)}</li>" for sentence in sentences]


def _code(sentence: str) -> str:
    """Escaped, with `names` in code type."""
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(escape(sentence).split("`")))


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f"<figure><div class='wide'><img alt='{caption}' src='data:image/png;base64,{data}'></div>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Sheet) -> str:
    head = "".join(f"<th>{_cell(cell)}</th>" for cell in table.header)
    lines = ("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in line) + "</tr>" for line in table.lines)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _cell(text: str) -> str:
    main, _, small = text.partition("\n")
    return escape(main) + (f"<small>{escape(small)}</small>" if small else "")


def _facts(rows: list[Row]) -> list[str]:
    """Commands, machines, commits and days, each once."""
    named = {"Command": "command", "Hardware": "hardware", "Commit": "commit"}
    found = {name: list(dict.fromkeys(row[key] for row in rows if row.get(key))) for name, key in named.items()}
    days = sorted(str(row["date"])[:10] for row in rows if row.get("date"))
    if days:
        found["Date"] = [days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"]
    lines = [f"<dt>{name}</dt><dd>{'<br>'.join(map(escape, values))}</dd>" for name, values in found.items() if values]
    return [f"<dl>{''.join(lines)}</dl>"]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --ink: #22262b; --faint: #646b75; --paper: #fff; --card: #f5f6f8; --line: #e1e4e8; --care: #fff6e0; --edge: #e5a400;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #9aa2ad; --paper: #16191d; --card: #1f2329; --line: #32373f; --care: #2d2616; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p { color: var(--faint); margin: .6rem 0; }
code { font-size: .9em; background: var(--card); border-radius: 4px; padding: 0 .25em; }
.headline { padding-left: 1.2rem; font-size: 1.06rem; }
.headline li { margin: .45rem 0; }
.care { background: var(--care); border-left: 4px solid var(--edge); border-radius: 6px; padding: .7rem 1rem; }
.care h2 { margin: 0 0 .3rem; font-size: 1rem; }
.care ul { margin: 0; padding-left: 1.1rem; }
.care li { margin: .25rem 0; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; }
figure .wide { background: #fff; margin: 0; }
figure img { display: block; width: 100%; max-width: 60rem; min-width: 38rem; padding: 8px; margin: 0 auto; }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .4rem; }
.wide { overflow-x: auto; margin: .8rem 0 1.4rem; border: 1px solid var(--line); border-radius: 8px; }
summary { cursor: pointer; color: var(--faint); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap; vertical-align: top; }
th, td { border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { background: var(--card); color: var(--faint); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th:first-child { background: var(--card); }
td small, th small { display: block; color: var(--faint); font-size: .76rem; font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
"""
