"""What an image's first answer token waits for, by the number of visual tokens: tower, compressor, LLM prefill, head.

    python -m benchmarks.prefill                                7B and 13B in bfloat16, one image: what a GPU is asked
    python -m benchmarks.prefill --sizes tiny --visual 64,16    on a CPU: proves that it works

Claims about faster first tokens at 1/4, 1/8, 1/16 of the tokens are claims about this. Random weights of LLaVA-1.5's shapes:
CLIP-L/336 -> 576 tokens -> compressor -> Q tokens beside `--text` others -> decoder with an empty cache -> logits of the last
position. 576 tokens go through LLaVA's MLP, fewer through the resampler. Each piece is compiled and timed by itself
and then all of them as one program, which is `first token`: the median of runs that each wait for their end, as an answer
does. `of all` and `prefill of all` are first token and prefill over those at the most tokens. Beside the times stand the
FLOPs that `tcjax.evaluate.cost` counts, and what share of the device's peak the prefill reaches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
from flax import nnx

from benchmarks.compressors import ROOT, markdown, show
from benchmarks.shapes import SIZES, one_device, peak_of, random_batch, random_model, shape
from tcjax.compressors.base import CompressorConfig
from tcjax.evaluate.cost import cost
from tcjax.evaluate.generate import prefill
from tcjax.record import write_json
from tcjax.sharding import place_batch
from tcjax.train.log import environment
from tcjax.train.state import cast, compute_dtype
from tcjax.vlm import VlmConfig


def model_of(size: str, num_queries: int) -> VlmConfig:
    """All tokens through LLaVA's MLP, fewer through the resampler."""
    every = SIZES[size][0].num_tokens
    return shape(size, num_queries, "mlp" if num_queries == every else "resampler")


def measure(
    model: Any, config: VlmConfig, arguments: argparse.Namespace, peak: float, known: dict[str, float]
) -> dict[str, Any]:
    """Milliseconds by piece and of the whole, with the FLOPs beside them. known: seconds that need not be measured again."""
    mesh, dtype = one_device(), compute_dtype(arguments.dtype)
    graphdef, state = nnx.split(model)
    state = cast(state, dtype)
    batch = place_batch(random_batch(config, arguments.batch, arguments.text, 0), mesh)
    batch = cast(batch, dtype)

    def piece(run: Callable) -> Callable:
        return jax.jit(lambda state, *given: run(nnx.merge(graphdef, state), *given))

    see, compress, embed, answer, whole = (
        piece(run)
        for run in (
            lambda model, batch: model.see(batch),
            lambda model, batch: model.compress(batch).tokens_BQD,
            lambda model, batch: model.embed(batch)[0],
            lambda model, seq_BSD, valid_BS: first_logits(model.llm, seq_BSD, valid_BS),
            lambda model, batch: prefill(model, batch, room=0),
        )
    )
    seen = batch._replace(images_BYX3=None, features_BNC=see(state, batch))
    seq_BSD = embed(state, seen)
    passes = {
        "tower": lambda: see(state, batch),
        "compressor": lambda: compress(state, seen),
        "prefill": lambda: answer(state, seq_BSD, batch.valid_BS),
        "first token": lambda: whole(state, batch),
    }
    taken = {name: known.get(name) or timed(run, arguments.seconds) for name, run in passes.items()}
    bill = cost(config, arguments.text)
    flops = {
        "tower": bill.tower_flops,
        "compressor": bill.compressor_flops,
        "prefill": bill.llm_flops,
        "first token": bill.prefill_flops,
    }
    row: dict[str, Any] = {
        "visual": config.num_queries,
        "milliseconds": {name: round(1e3 * seconds, 3) for name, seconds in taken.items()},
        "flops": {name: arguments.batch * number for name, number in flops.items()},
        "kv_bytes": arguments.batch * bill.kv_bytes,
    }
    if peak:
        row["useful"] = round(row["flops"]["prefill"] / taken["prefill"] / (1e12 * peak), 3)
    return row


def first_logits(llm: Any, seq_BSD: jax.Array, valid_BS: jax.Array) -> tuple[jax.Array, Any]:
    """As `tcjax.evaluate.generate.prefill`, from the sequence on; the cache is part of the answer."""
    hidden_BSD, cache = llm.prefill(seq_BSD, valid_BS, 0)
    return llm.logits(hidden_BSD[:, -1:])[:, 0], cache


def timed(run: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a run, at least five, for about `seconds`, after two that do not count."""
    for _ in range(2):
        jax.block_until_ready(run())  # the first compiles
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 5 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return median(taken)


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A head, then one line for each size and number of tokens; shares are of the size's first line."""
    lines = [
        [
            *("size", "visual tokens", "TFLOP", "tower ms", "compressor ms", "prefill ms", "first token ms"),
            *("prefill of all", "of all", "FLOPs of all", "useful", "cache MiB"),
        ]
    ]
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        spent, flops, all_of = row["milliseconds"], row["flops"], first.setdefault(row["size"], row)
        shares = (
            spent["prefill"] / all_of["milliseconds"]["prefill"],
            spent["first token"] / all_of["milliseconds"]["first token"],
            flops["first token"] / all_of["flops"]["first token"],
        )
        times = (f"{spent[name]:.2f}" for name in ("tower", "compressor", "prefill", "first token"))
        useful = f"{row['useful']:.2f}" if "useful" in row else "-"
        head = (row["size"], str(row["visual"]), f"{flops['first token'] / 1e12:.3f}")
        lines.append([*head, *times, *(f"{share:.2f}" for share in shares), useful, f"{row['kv_bytes'] / 2**20:.1f}"])
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="7b,13b", help=f"of {list(SIZES)}")
    parser.add_argument("--visual", default="576,256,144,64,32,16", help="numbers of visual tokens, the most first")
    parser.add_argument("--text", type=int, default=64, help="other tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="bfloat16 but on a CPU")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device; 0: as known")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement; five runs are always taken")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmarks/prefill.json")
    arguments = parser.parse_args(argv)
    device = jax.local_devices()[0]
    arguments.dtype = arguments.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    sizes, visual = arguments.sizes.split(","), [int(number) for number in arguments.visual.split(",")]
    if unknown := [size for size in sizes if size not in SIZES]:
        parser.error(f"--sizes {arguments.sizes}: {unknown} are none of {list(SIZES)}")
    peak = arguments.peak or peak_of(device.device_kind)
    facts = environment(ROOT) | {key: getattr(arguments, key) for key in ("batch", "text", "dtype")} | {"peak": peak}
    rows: list[dict[str, Any]] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        model = random_model(model_of(size, visual[0]), arguments.dtype, one_device())
        known: dict[str, float] = {}
        for number in visual:
            config = model_of(size, number)
            compressor: CompressorConfig = config.compressor  # pyright: ignore[reportAssignmentType]
            model.compressor = compressor.build(config.widths, nnx.Rngs(0))
            rows.append({"size": size} | measure(model, config, arguments, peak, known))
            known["tower"] = rows[-1]["milliseconds"]["tower"] / 1e3  # the same at any number
            print(json.dumps(rows[-1]), flush=True)
            write_json(arguments.out, {"environment": facts, "rows": rows})
        del model
    title = (
        f"From an image to the first token, batch {arguments.batch}, {arguments.text} text tokens, {arguments.dtype}, "
        f"{facts['hardware']}, commit {facts['commit']}"
    )
    show(table_of(rows), title)
    arguments.out.with_suffix(".md").write_text(markdown(table_of(rows), title))
    print(arguments.out)


if __name__ == "__main__":
    main()
