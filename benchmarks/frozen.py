"""The frozen models at their published sizes against transformers: CLIP-L/336 forward, and a Qwen2.5-0.5B training step.

    python -m benchmarks.frozen                                  float32, on a CPU
    python -m benchmarks.frozen --batch 32 --dtype bfloat16      what a GPU is asked
    python -m benchmarks.frozen --only tower

tower: pixels to the 576 tokens that LLaVA reads (23 of 24 blocks run on both sides). step: 64 visual and 128 text tokens,
96 of them supervised, through the frozen decoder to the loss, and the gradient back to the visual tokens, which is all that
a compressor's training asks of it. Same machine, same process, same random weights, same inputs. JAX, torch eager and
torch.compile, both with SDPA, take turns; the median of each is kept and `ratio` is the better torch time over ours.

`useful` is the share of the device's peak (`--peak`, TFLOP/s) that goes into FLOPs the mathematics needs: 2 N_v of a
tower, 4 N of a frozen decoder, whatever is recomputed not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.compressors import ROOT, markdown, measure, ratio, show, wait
from benchmarks.twins import llm_twin, take, tower_twin
from configs import llms, towers
from tcjax import loss
from tcjax.evaluate.cost import head_flops, llm_flops, tower_flops
from tcjax.llms.decoder import LlmConfig
from tcjax.record import write_json
from tcjax.towers.vit import VitConfig
from tcjax.train.log import environment

VISUAL, TEXT, SUPERVISED = 64, 128, 96
TOWER, LLM = towers.clip_l_336(), llms.qwen2_5_0_5b()


def tower(cfg: VitConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a forward pass by framework, and how far the two answers are apart."""
    theirs = tower_twin(cfg)
    module = nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))
    graphdef, state = take(module, theirs, cfg, arguments.dtype)
    device, theirs = _placed(theirs, arguments.dtype)
    pixels = np.random.default_rng(0).standard_normal((arguments.batch, *cfg.pixels.size_YX, 3), np.float32)
    images_BYX3 = jnp.asarray(pixels, arguments.dtype)
    images_B3YX = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device, getattr(torch, arguments.dtype))
    see = jax.jit(lambda state, images_BYX3: nnx.merge(graphdef, state)(images_BYX3))

    def run(model: Any) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            with torch.inference_mode():
                seen = model(images_B3YX).last_hidden_state[:, 1:]
            wait(device)
            return seen

        return forward

    ours, expected = np.asarray(see(state, images_BYX3), np.float32), run(theirs)().float().cpu().numpy()
    passes = {"jax": lambda: jax.block_until_ready(see(state, images_BYX3)), "torch": run(theirs)}
    if arguments.compile:
        passes["torch.compile"] = run(torch.compile(theirs))
    return _row(passes, arguments, tower_flops(cfg).total, _apart(ours, expected))


def step(cfg: LlmConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of loss and gradient by framework, and how far the two gradients are apart."""
    theirs = llm_twin(cfg)
    module = nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))
    graphdef, state = take(module, theirs, cfg, arguments.dtype)
    device, theirs = _placed(theirs, arguments.dtype)
    random, B, S = np.random.default_rng(0), arguments.batch, VISUAL + TEXT
    visual = random.standard_normal((B, VISUAL, cfg.width), np.float32) * cfg.width**-0.5
    tokens_BS = random.integers(0, cfg.vocab, (B, S)).astype(np.int32)
    supervised_BS = np.broadcast_to(np.arange(S) >= S - SUPERVISED, (B, S))

    def total(visual_BQD: jax.Array, state: Any, tokens_BS: jax.Array, supervised_BS: jax.Array) -> jax.Array:
        llm = nnx.merge(graphdef, state)
        seq_BSD = jnp.concatenate([visual_BQD, llm.embed(tokens_BS[:, VISUAL:])], axis=1)
        terms = loss.next_token(llm(seq_BSD), llm.table_VD, tokens_BS, supervised_BS)
        return terms.total / terms.count

    learn, given = jax.jit(jax.value_and_grad(total)), jnp.asarray(visual, arguments.dtype)
    told = (state, jnp.asarray(tokens_BS), jnp.asarray(supervised_BS))
    visual_BQD = torch.from_numpy(visual).to(device, getattr(torch, arguments.dtype)).requires_grad_()
    ids_BS = torch.from_numpy(tokens_BS).long().to(device)
    labels_BS = torch.where(torch.from_numpy(supervised_BS.copy()).to(device), ids_BS, -100)

    def run(model: Any) -> Callable[[], torch.Tensor]:
        def backward() -> torch.Tensor:
            visual_BQD.grad = None
            text_BTD = theirs.get_input_embeddings()(ids_BS[:, VISUAL:])
            model(inputs_embeds=torch.cat([visual_BQD, text_BTD], 1), labels=labels_BS).loss.backward()
            wait(device)
            assert visual_BQD.grad is not None
            return visual_BQD.grad

        return backward

    ours, expected = np.asarray(learn(given, *told)[1], np.float32), run(theirs)().float().cpu().numpy()
    passes = {"jax": lambda: jax.block_until_ready(learn(given, *told)), "torch": run(theirs)}
    if arguments.compile:
        passes["torch.compile"] = run(torch.compile(theirs))
    blocks = llm_flops(cfg, S)
    useful = 2 * (blocks.weights + head_flops(cfg, SUPERVISED)) + 3 * blocks.attention
    return _row(passes, arguments, useful, _apart(ours, expected))


def _placed(model: Any, dtype: str) -> tuple[torch.device, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() and dtype == "bfloat16" else "cpu")
    return device, model.to(device, getattr(torch, dtype))


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _row(passes: dict[str, Callable], arguments: argparse.Namespace, flops: int, apart: float) -> dict[str, Any]:
    seconds = measure(passes, turns=arguments.turns, seconds=arguments.seconds)
    row: dict[str, Any] = {"flops_per_sample": flops, "difference": apart, "time": ratio(seconds)}
    if arguments.peak:
        row["useful"] = {
            name: round(arguments.batch * flops / time / (1e12 * arguments.peak), 3) for name, time in seconds.items()
        }
    return row


def table_of(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A head, then one line for each measurement."""
    lines = [
        ["what", "GFLOP / sample", "jax", "torch", "torch.compile", "ratio", "useful jax", "useful torch", "difference"]
    ]
    for name, row in rows.items():
        times, useful = row["time"], row.get("useful", {})
        cells = ["-" if (ms := times.get(key)) is None else f"{ms:.1f}" for key in ("jax", "torch", "torch.compile")]
        shares = [f"{useful[key]:.2f}" if key in useful else "-" for key in ("jax", "torch")]
        flops = f"{row['flops_per_sample'] / 1e9:.0f}"
        lines.append([name, flops, *cells, f"{times['ratio']:.2f}", *shares, f"{row['difference']:.0e}"])
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="tower,step")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=3, help="of each framework, three runs each")
    parser.add_argument("--seconds", type=float, default=120, help="per measurement; one turn is always taken")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device, for the useful share")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmarks/frozen.json")
    arguments = parser.parse_args(argv)
    kinds: dict[str, Callable[[], dict]] = {
        "tower": lambda: tower(TOWER, arguments),
        "step": lambda: step(LLM, arguments),
    }
    wanted = [name for name in arguments.only.split(",") if name]
    if not wanted or set(wanted) - set(kinds):
        parser.error(f"--only {arguments.only}: choose among {list(kinds)}")
    facts = environment(ROOT) | {"torch": torch.__version__, "batch": arguments.batch, "dtype": arguments.dtype}
    rows: dict[str, dict[str, Any]] = {}
    for name in wanted:
        rows[name] = kinds[name]()
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
