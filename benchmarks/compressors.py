"""Every compressor against its PyTorch twin: forward, and forward with backward, at N=576, C=1024, D=4096.

    python -m benchmarks.compressors                                every one of the catalogue, 64 tokens where possible
    python -m benchmarks.compressors --only resampler,qformer       some of them
    python -m benchmarks.compressors --batch 64 --dtype bfloat16    what a GPU is asked

Same machine, same process, same weights, same inputs. JAX, torch eager and torch.compile take turns; a turn is a few
runs in a row, as steps of a training are, after one that does not count, which takes the memory the others gave back. The
median of each is kept. The backward pass is by the parameters, as in training. `ratio` is the better torch time over ours:
above 1 we are faster. `mlp` is nothing but two products of matrices, so its ratio says how fast either framework multiplies
here. Prints a table; writes it as Markdown and, with commit, hardware and versions, as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.twins import compressor_twin, tell
from configs.compressors import CATALOGUE
from tcjax.compressors.base import CompressorConfig, Context, Widths
from tcjax.export.families import has_twin
from tcjax.interop import names
from tcjax.record import write_json
from tcjax.train.log import environment

ROOT = Path(__file__).parents[1]
WIDTHS = Widths(grid_HW=(24, 24), vision_C=1024, llm_D=4096, text_D=4096)
TEXT = 32
FIELDS = {"text": "text_BTD", "levels": "levels_BNE", "prior": "prior_BN"}


def configured(make: Callable[[int], CompressorConfig]) -> tuple[CompressorConfig, Widths] | None:
    """At 64 tokens, or at the largest smaller number, or else the smallest; with the widths it asks of the tower."""
    for num in (*range(64, 0, -1), *range(65, WIDTHS.num_tokens + 1)):
        try:
            config = make(num)
            widths = config.asked(WIDTHS)
            config.outputs(widths)
        except ValueError:
            continue
        return config, widths
    return None


def measure(passes: dict[str, Callable[[], None]], *, turns: int, seconds: float) -> dict[str, float]:
    """Median seconds of each: `turns` of three runs, fewer if all of them take longer than about `seconds`."""
    for run in passes.values():
        run()  # compiles
    taken: dict[str, list[float]] = {name: [] for name in passes}
    begun = time.perf_counter()
    for turn in range(turns):
        if turn and time.perf_counter() - begun > seconds:
            break
        for name, run in passes.items():
            run()
            for _ in range(3):
                start = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in taken.items()}


def one(config: CompressorConfig, widths: Widths, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds by pass and framework, and how far the two answers are apart."""
    dtype = jnp.dtype(arguments.dtype)
    torch_dtype = getattr(torch, arguments.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() and arguments.dtype == "bfloat16" else "cpu")
    random, B, N = np.random.default_rng(0), arguments.batch, widths.num_tokens
    shapes = {
        "tokens": (B, N, widths.vision_C),
        "text": (B, TEXT, widths.text_D),
        "levels": (B, N, widths.levels * widths.vision_C),
        "prior": (B, N),
    }
    inputs = {
        name: np.abs(random.standard_normal(shape, np.float32))
        if name == "prior"
        else random.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
        if name == "tokens" or name in config.needs
    }

    module = config.build(widths, nnx.Rngs(0))
    arrays = names.flatten(module)
    graphdef, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    told = {name: jnp.asarray(array, dtype) for name, array in inputs.items()}
    target = jnp.asarray(random.standard_normal((B, config.outputs(widths), widths.llm_D), np.float32), dtype)

    def compress(state: Any, told: dict) -> jax.Array:
        context = Context(**{FIELDS[name]: array for name, array in told.items() if name != "tokens"})
        return nnx.merge(graphdef, state)(told["tokens"], context).tokens_BQD

    forward = jax.jit(compress)
    # The loss too, as torch computes it: without it XLA drops the last layer's product.
    backward = jax.jit(
        jax.value_and_grad(lambda state, told: (compress(state, told) * target).astype(jnp.float32).sum())
    )

    twin = compressor_twin(config, widths)
    tell(twin, arrays, config, widths)
    twin = twin.to(device, torch_dtype).train()
    given = {name: torch.from_numpy(array).to(device, torch_dtype) for name, array in inputs.items()}
    goal = torch.from_numpy(np.array(target, np.float32)).to(device, torch_dtype)

    def torch_forward(model: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                model(**given)
            wait(device)

        return run

    def torch_backward(model: Any) -> Callable[[], None]:
        def run() -> None:
            twin.zero_grad(set_to_none=True)
            (model(**given) * goal).sum().backward()
            wait(device)

        return run

    with torch.inference_mode():
        theirs = twin(**given).float().cpu().numpy()
    ours = np.asarray(forward(state, told), np.float32)
    compiled = torch.compile(twin) if arguments.compile else None
    row: dict[str, Any] = {
        "outputs": config.outputs(widths),
        "parameters": sum(array.size for array in arrays.values()),
        "difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    }
    for kind, mine, make in (("forward", forward, torch_forward), ("backward", backward, torch_backward)):
        passes = {
            "jax": lambda mine=mine: jax.block_until_ready(mine(state, told)),
            "torch": make(twin),
        }
        if compiled is not None:
            passes["torch.compile"] = make(compiled)
        row[kind] = ratio(measure(passes, turns=arguments.turns, seconds=arguments.seconds))
    return row


def ratio(seconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each, and the better torch time over ours."""
    best = min(time for name, time in seconds.items() if name != "jax")
    return {name: round(1e3 * time, 3) for name, time in seconds.items()} | {"ratio": round(best / seconds["jax"], 3)}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table_of(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A head, then one line for each compressor, milliseconds."""
    passes = [(kind, key) for kind in ("forward", "backward") for key in ("jax", "torch", "torch.compile", "ratio")]
    head = ["compressor", "Q", "M param", *(f"{kind} {key}" for kind, key in passes), "difference"]
    lines = [head]
    for name, row in rows.items():
        times = [(row[kind].get(key), 2 if key == "ratio" else 1) for kind, key in passes]
        cells = ["-" if time is None else f"{time:.{digits}f}" for time, digits in times]
        lines.append([name, str(row["outputs"]), f"{row['parameters'] / 1e6:.1f}", *cells, f"{row['difference']:.0e}"])
    return lines


def show(lines: list[list[str]], title: str) -> None:
    table = Table(title=title)
    for column in lines[0]:
        table.add_column(column, justify="left" if column == lines[0][0] else "right")
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=160).print(table)


def markdown(lines: list[list[str]], title: str) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]]), ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of the catalogue, separated by commas")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=3, help="of each framework, three runs each")
    parser.add_argument("--seconds", type=float, default=20, help="per compressor and pass; one turn is always taken")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmarks/compressors.json")
    arguments = parser.parse_args(argv)
    wanted = [name for name in arguments.only.split(",") if name] or list(CATALOGUE)
    unknown = sorted(set(wanted) - set(CATALOGUE))
    if unknown:
        parser.error(f"{unknown} are not in the catalogue; it has {list(CATALOGUE)}")
    facts = environment(ROOT) | {"torch": torch.__version__, "batch": arguments.batch, "dtype": arguments.dtype}
    rows: dict[str, dict[str, Any]] = {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        found = configured(CATALOGUE[name])
        if found is None or not has_twin(found[0]):
            print(f"{name}: no PyTorch twin to compare with, left out", flush=True)
            continue
        rows[name] = one(*found, arguments)
        print(name, json.dumps(rows[name]), flush=True)
        write_json(arguments.out, {"environment": facts, "rows": rows})
        jax.clear_caches()
        torch.compiler.reset()
        gc.collect()
    title = f"Milliseconds, median; batch {arguments.batch}, {arguments.dtype}, {facts['hardware']}, commit {facts['commit']}"
    show(table_of(rows), title)
    arguments.out.with_suffix(".md").write_text(markdown(table_of(rows), title))
    print(arguments.out)


if __name__ == "__main__":
    main()
