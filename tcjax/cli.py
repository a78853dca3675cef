"""The door: one thin verb per line. What a user can cause is one line on stderr and exit code 2, never a trace.

    tcjax train CONFIG [--field value ...]      CONFIG is file.py or file.py:function; any field by its dotted name
    tcjax evaluate RUN [--benchmark NAME --files DIR] | compare RUN RUN | generate RUN IMAGE QUESTION
    tcjax report STUDY_DIR | export RUN --out DIR | import CHECKPOINT --out DIR | ablate STUDY
    tcjax plan CONFIG --topology v5e:16x16      will it fit, and what would it cost; nobody needs to own one
    tcjax compressors | data prepare|verify|preview SOURCE

`TCJAX_TRACE=1` shows the trace as well.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import tcjax
from tcjax import processes
from tcjax.arguments import numbers, pair, parse
from tcjax.cli_answers import Compare, Evaluate, Generate, compare, evaluate, generate
from tcjax.cli_data import Data, data
from tcjax.cli_plan import Plan, plan
from tcjax.cli_weights import Export, Import, export_weights, import_weights

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """Train, score and export every run of a study; finished ones are skipped, interrupted ones go on.

    study: folder with study.py. queries, compressors: comma-separated; seeds: how many; steps: of every training. Left
    out, the study decides.
    out: where rows and runs go (default: runs/<study> in the project). run: only the study's run of this number, from 1, as
    a job of its own; several may go on at the same time. list: print the runs' names, one per line, and train nothing.
    coordinator, processes, process: HOST:PORT of process 0, how many there are, which one this is; left out, the
    environment, Slurm, Open MPI or the TPU says.
    """

    study: Positional[Path]
    queries: str = ""
    compressors: str = ""
    seeds: int = 0
    steps: int = 0
    out: Path | None = None
    quiet: bool = False
    run: int | None = None
    list: bool = False
    coordinator: str = ""
    processes: int = 0
    process: int = -1


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables, plots, attention pictures and one self-contained HTML page from a study's rows."""

    study_dir: Positional[Path]


@dataclass(frozen=True, kw_only=True)
class Compressors:
    """The catalogue as a table. grid: token grid, "24x24"; widths: vision and LLM width, "1024,4096"."""

    grid: str = "24x24"
    widths: str = "1024,4096"
    json: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"tcjax {tcjax.__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"tcjax: no verb {verb!r}; choose one of {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](rest)
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("TCJAX_TRACE"):
            if not processes.several():
                raise
            traceback.print_exc()
        print(f"tcjax {verb}: {error}", file=sys.stderr)
        return processes.end(2, error)
    except KeyboardInterrupt:
        print(f"tcjax {verb}: interrupted; run the same command again to go on.", file=sys.stderr)
        return processes.end(130)
    except Exception as error:
        if not processes.several():
            raise
        traceback.print_exc()
        return processes.end(1, error)


def _usage() -> str:
    lines = [
        f"tcjax {tcjax.__version__}: {(tcjax.__doc__ or '').partition(': ')[2].strip()}",
        "",
        "usage: tcjax VERB ...",
        "",
    ]
    texts = {"train": "Train a run: tcjax train configs/boards.py [--train.steps 100 ...]."}
    texts |= {name: (cls.__doc__ or "").strip().partition("\n")[0] for name, cls in _FORMS.items()}
    return "\n".join(lines + [f"  {name:<12}{texts[name]}" for name in VERBS] + ["", "tcjax VERB --help says more."])


_DRY = "--dry-run: parameters, memory, FLOPs, steps and the first sample, without loading or running anything."


def _train(arguments: list[str]) -> int:
    from tcjax import content

    if not arguments or arguments[0].startswith("-"):
        print(
            "usage: tcjax train CONFIG [--out DIR] [--field value ...]\n\nCONFIG is file.py or file.py:function, for instance"
        )
        print("configs/boards.py; `tcjax train CONFIG --help` lists every field with its default.")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    config, root = content.find(arguments[0])
    default = config()
    run_type = type(default)
    form = dataclasses.make_dataclass(
        "train",
        [
            ("run", Annotated[run_type, tyro.conf.arg(name="")]),
            ("out", Path | None),
            ("dry_run", bool),
            ("json", bool),
            ("quiet", bool),
            ("coordinator", Annotated[str, tyro.conf.arg(help="HOST:PORT of process 0, if there are several.")]),
            ("processes", Annotated[int, tyro.conf.arg(help="How many processes train together.")]),
            ("process", Annotated[int, tyro.conf.arg(help="Which of them this is, from 0.")]),
        ],
        namespace={"__doc__": f"Train {default.name}; any field can be given. {_DRY}"},
    )
    asked: Any = tyro.cli(
        form,
        args=arguments[1:],
        default=form(default, None, False, False, False, "", 0, -1),
        prog=f"tcjax train {arguments[0]}",
        config=(tyro.conf.AvoidSubcommands,),
    )

    if asked.dry_run:
        from tcjax.dry_run import dry_run, show

        figures = dry_run(asked.run, root=root)
        if asked.json:
            print(json.dumps(figures, indent=1))
        else:
            show(asked.run, figures, about=inspect.getdoc(config) or "")
        return 0

    from tcjax.train.goodput import process_start

    began = process_start()
    processes.join(asked.coordinator, asked.processes, asked.process, quiet=asked.quiet)

    from tcjax.job import train_run

    out = asked.out or root / "runs" / asked.run.name
    outcome = train_run(asked.run, root=root, out=out, quiet=asked.quiet, began=began)
    if processes.is_first() and not asked.quiet:
        print(f"{asked.run.name}: {outcome.steps} steps in {outcome.seconds:.0f} s; {out}")
    return 0


def _ablate(arguments: list[str]) -> int:
    asked = parse(Ablate, arguments)

    from tcjax.study.ablate import Choice, ablate, study_runs

    for flag, value in (("--seeds", asked.seeds), ("--steps", asked.steps)):
        if value < 0:
            raise ValueError(f"{flag} {value}: takes a whole number from 1 up; left out, the study decides.")
    choice = Choice(
        queries=numbers(asked.queries, "--queries"),
        compressors=tuple(name.strip() for name in asked.compressors.split(",")) if asked.compressors else None,
        seeds=asked.seeds or None,
        steps=asked.steps or None,
    )
    if asked.list:
        print(*(run.name for run in study_runs(asked.study, choice)[0]), sep="\n")
        return 0
    if asked.run == 0:
        raise ValueError("--run 0: a study's runs count from 1; left out, all of them are run.")
    processes.join(asked.coordinator, asked.processes, asked.process, quiet=asked.quiet)
    study = ablate(asked.study, choice, only=asked.run or 0, out=asked.out, quiet=asked.quiet)
    if processes.is_first():
        print(study)
    return 0


def _report(arguments: list[str]) -> int:
    asked = parse(Report, arguments)

    from tcjax.study.report import report

    for path in report(asked.study_dir).values():
        print(path)
    return 0


def _compressors(arguments: list[str]) -> int:
    asked = parse(Compressors, arguments)

    from tcjax import content
    from tcjax.study.catalogue import catalogue_table

    catalogue = content.project_root(Path.cwd()) / "configs/compressors.py"
    if not catalogue.is_file():
        raise ValueError(f"the catalogue is a project's configs/compressors.py, and {Path.cwd()} lies in no project.")
    module, _ = content.load(catalogue)
    grid_HW, (vision, llm) = pair(asked.grid, "--grid"), pair(asked.widths, "--widths")
    catalogue_table(module.CATALOGUE, grid_HW, vision, llm, as_json=asked.json)
    return 0


_FORMS: dict[str, type] = {
    "evaluate": Evaluate,
    "compare": Compare,
    "generate": Generate,
    "ablate": Ablate,
    "report": Report,
    "export": Export,
    "import": Import,
    "plan": Plan,
    "compressors": Compressors,
    "data": Data,
}
VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": evaluate,
    "compare": compare,
    "generate": generate,
    "ablate": _ablate,
    "report": _report,
    "export": export_weights,
    "import": import_weights,
    "plan": plan,
    "compressors": _compressors,
    "data": data,
}

if __name__ == "__main__":
    raise SystemExit(main())
