"""A whole VLM of width 16 and batches for it: what tests of training and evaluation share."""

from pathlib import Path

import numpy as np
from flax import nnx

from tcjax.batch import Batch
from tcjax.compressors import resampler
from tcjax.config import DataConfig, Pixels, Run, Source, TrainConfig
from tcjax.llms.decoder import LlmConfig
from tcjax.towers.vit import VitConfig
from tcjax.train.loop import Outcome, train
from tcjax.vlm import VlmConfig

VOCAB, TEXT, QUERIES = 24, 10, 4
IDENTITY = {"model": "tiny", "tower.weights": "abc"}

TOWER = VitConfig(
    pixels=Pixels(size_YX=(16, 16)),
    patch=4,
    width=16,
    layers=1,
    heads=2,
    feed_forward=32,
    activation="gelu",
    norm_eps=1e-6,
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    post_norm=True,
)
LLM = LlmConfig(
    vocab=VOCAB,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=8,
    feed_forward=32,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie=True,
)
VLM = VlmConfig(tower=TOWER, compressor=resampler.Config(num_queries=QUERIES, depth=1, heads=2, head_width=8), llm=LLM)


def a_run(batch: int = 8, model: object = VLM, **train) -> Run:
    """Six steps of the tiny VLM, a checkpoint after each."""
    defaults = {"steps": 6, "peak_lr": 1e-2, "weight_decay": 0.1, "save_every": 1, "log_every": 1}
    return Run(
        name="tiny/run",
        model=model,
        data=DataConfig(sources=(Source(path="none"),), tokenizer="none", batch=batch),
        train=TrainConfig(**(defaults | train)),
    )


def a_model(seed: int = 0) -> nnx.Module:
    return VLM.build(nnx.Rngs(seed))


def batch_at(step: int, batch: int = 8) -> Batch:
    """Batch number `step`, a pure function of it: random images, random text, a third of it supervised."""
    rng = np.random.default_rng([7, step])
    S = QUERIES + TEXT
    is_image_BS = np.zeros((batch, S), bool)
    is_image_BS[:, 1 : 1 + QUERIES] = True
    valid_BS = np.arange(S) < rng.integers(S - 3, S + 1, (batch, 1))
    return Batch(
        tokens_BS=rng.integers(0, VOCAB, (batch, S)).astype(np.int32),
        is_image_BS=is_image_BS,
        supervised_BS=(rng.random((batch, S)) < 0.3) & ~is_image_BS & valid_BS,
        valid_BS=valid_BS,
        index_B=np.arange(batch, dtype=np.int32),
        images_BYX3=rng.normal(size=(batch, 16, 16, 3)).astype(np.float32),
    )


class Batches:
    """The resumable iterator of `batch_at`; `before(step)` is called before each, for accidents."""

    def __init__(self, batch: int = 8, before=lambda step: None):
        self.step, self.batch, self.before = 0, batch, before

    def __next__(self) -> Batch:
        self.step += 1
        self.before(self.step)
        return batch_at(self.step, self.batch)

    def get_state(self) -> dict:
        return {"step": self.step}

    def set_state(self, state: dict) -> None:
        self.step = state["step"]

    def counts(self) -> dict[str, int]:
        return {"dropped_turns": self.step}

    def report(self) -> str:
        return f"left out: {self.step} turns"


def losses(out: Path) -> list[float]:
    """The logged losses of a run's folder."""
    from tcjax.train.log import read_metrics

    return [line["loss"] for line in read_metrics(out / "metrics.jsonl")]


def go(out: Path, run: Run | None = None, *, batches=None, identity=IDENTITY, model=None) -> Outcome:
    """Train the tiny VLM in `out`."""
    run = run or a_run()
    return train(
        run,
        model or a_model(),
        batches or Batches(run.data.batch),
        root=Path(__file__).parents[1],
        out=out,
        identity=identity,
        flops=lambda positions, supervised: 1e3 * positions,
        quiet=True,
    )
