"""The door: one thin verb per line. What a user can cause is one line on stderr and exit code 2, never a trace.

    tcjax train CONFIG [--field value ...]      CONFIG is file.py or file.py:function; any field by its dotted name
    tcjax evaluate RUN [--benchmark NAME --files DIR] | compare RUN RUN | generate RUN IMAGE QUESTION
    tcjax report STUDY_DIR | export RUN --out DIR | import CHECKPOINT --out DIR | ablate STUDY
    tcjax plan CONFIG --topology v5e:16x16      will it fit, and what would it cost; nobody needs to own one
    tcjax compressors | data prepare|verify|preview SOURCE

`TCJAX_TRACE=1` shows the trace as well.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

import tcjax
from tcjax import processes
from tcjax.arguments import numbers, pair, parse, parse_run
from tcjax.cli_answers import Compare, Evaluate, Generate, compare, evaluate, generate
from tcjax.cli_data import Data, data
from tcjax.cli_plan import Plan, plan
from tcjax.cli_weights import Export, Import, export_weights, import_weights

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a run; any of its fields can be given. What was interrupted goes on from its newest checkpoint.

    out: the run's folder (default: runs/<name> in the project). dry_run: parameters, memory, FLOPs, steps and the first
    sample, without loading or running anything; json: these for machines.
    coordinator, processes, process: HOST:PORT of process 0, how many train together, which one this is; left out, the
    environment, Slurm, Open MPI or the TPU says.
    """

    out: Path | None = None
    dry_run: bool = False
    json: bool = False
    quiet: bool = False
    coordinator: str = ""
    processes: int = 0
    process: int = -1


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
    _look_for_no_accelerators()
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


# What Linux shows of NVIDIA, TPU, AMD and other accelerators, and of GPUs in its Windows subsystem.
_ACCELERATORS = ("nvidia*", "accel*", "vfio/*", "kfd", "dri", "dxg")


def _look_for_no_accelerators() -> None:
    """JAX is not sent to look for what is not there: the compilers that `tcjax plan` needs would complain at length."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


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


def _train(arguments: list[str]) -> int:
    from tcjax import content

    if not arguments or arguments[0].startswith("-"):
        print(
            "usage: tcjax train CONFIG [--out DIR] [--field value ...]\n\nCONFIG is file.py or file.py:function, for instance"
        )
        print("configs/boards.py; `tcjax train CONFIG --help` lists every field with its default.")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    config, root = content.find(arguments[0])
    asked, run = parse_run(Train, config(), "train", arguments)
    if asked.dry_run:
        from tcjax.dry_run import dry_run, show

        figures = dry_run(run, root=root)
        if asked.json:
            print(json.dumps(figures, indent=1))
        else:
            show(run, figures, about=inspect.getdoc(config) or "")
        return 0

    from tcjax.train.goodput import process_start

    began = process_start()
    processes.join(asked.coordinator, asked.processes, asked.process, quiet=asked.quiet)

    from tcjax.job import train_run

    out = asked.out or root / "runs" / run.name
    outcome = train_run(run, root=root, out=out, quiet=asked.quiet, began=began)
    if processes.is_first() and not asked.quiet:
        print(f"{run.name}: {outcome.steps} steps in {outcome.seconds:.0f} s; {out}")
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
