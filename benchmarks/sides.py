"""Two sides of a training step that do the same: `begin(batch)`, `run()` a step, `wait()` for its loss, `end()`.

Between begin and end a side holds the batch and its optimiser's state; the frozen weights it holds for good.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import jax
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh

from benchmarks.twins import compressor_twin, llm_twin, made_on, take, tell, tower_twin
from tcjax.batch import Batch
from tcjax.config import TrainConfig
from tcjax.interop import names
from tcjax.sharding import place, place_batch
from tcjax.train.optimiser import make_optimiser
from tcjax.train.state import compute_dtype, init, recompute, split
from tcjax.train.step import jit_step, make_step
from tcjax.vlm import VlmConfig

TURN = 3  # steps in a row


class Side(Protocol):
    def begin(self, batch: Batch) -> None: ...
    def run(self) -> None: ...
    def wait(self) -> tuple[float, float]:
        """Loss and gradient norm of the last step, once it is over."""
        ...

    def end(self) -> None: ...


class Ours:
    """What `tcjax.train.loop` runs, without its files."""

    def __init__(self, model: Any, config: TrainConfig, mesh: Mesh):
        recompute(model, config.remat)
        self.mesh, self.optimiser = mesh, make_optimiser(config)
        graphdef, trainable, frozen = split(model, config.trainable)
        self.frozen = place(frozen, mesh)
        # On the host: a step that runs out of memory may have taken its state with it.
        self.first = jax.tree.map(np.asarray, trainable)
        self.jitted: Any = None
        self.step = make_step(
            graphdef,
            self.optimiser,
            dtype=compute_dtype(config.compute),
            seed=config.seed,
            steps=config.steps,
        )

    def begin(self, batch: Batch) -> None:
        self.state = place(init(place(self.first, self.mesh), self.optimiser), self.mesh)
        self.batch, self.number = place_batch(batch, self.mesh), 0
        self.jitted = jit_step(self.step, self.state, self.mesh)

    def run(self) -> None:
        self.number += 1
        self.state, self.metrics = self.jitted(self.state, self.frozen, self.batch, np.int32(self.number))

    def wait(self) -> tuple[float, float]:
        return float(self.metrics.loss), float(self.metrics.grad_norm)

    def end(self) -> None:
        if self.jitted is not None:
            self.jitted.clear_cache()  # its program's memory
        self.state = self.batch = self.jitted = self.metrics = None
        gc.collect()


class Theirs:
    """transformers, the compressor's exported twin, and what a training loop in PyTorch does around them."""

    def __init__(self, config: VlmConfig, train: TrainConfig, device: torch.device, *, compiled: bool):
        self.train, self.device, self.dtype = train, device, getattr(torch, train.compute)
        self.pixels = config.one_tower.pixels
        with made_on(device, getattr(torch, train.frozen)):
            tower, llm = tower_twin(config.one_tower), llm_twin(config.llm)
        with made_on(device, torch.float32):
            compressor = compressor_twin(config.compressor, config.widths)  # pyright: ignore[reportArgumentType]
        if train.remat != "none":
            newer = getattr(llm, "activation_checkpointing_enable", None)  # its name from transformers 5.1x on
            (newer or llm.gradient_checkpointing_enable)({"use_reentrant": False})
        self.whole = Whole(tower, compressor.train(), llm.train(), self.dtype)  # nothing of it draws at random
        self.model = torch.compile(self.whole) if compiled else self.whole
        self.first = {name: tensor.cpu().clone() for name, tensor in compressor.state_dict().items()}

    def uncompiled(self) -> Theirs:
        """The same weights, eager."""
        other = object.__new__(Theirs)
        other.__dict__ |= self.__dict__ | {"model": self.whole}
        return other

    def begin(self, batch: Batch) -> None:
        train, compressor = self.train, self.whole.compressor
        compressor.load_state_dict(self.first)
        self.optimiser = torch.optim.AdamW(
            compressor.parameters(),
            lr=train.peak_lr,
            betas=(train.b1, train.b2),
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=True,
        )
        mean, std = (torch.tensor(values, device=self.device) for values in (self.pixels.mean, self.pixels.std))
        images_BYX3 = torch.from_numpy(batch.images_BYX3).to(self.device)
        pixels_BYX3 = ((images_BYX3 / 255 - mean) / std).to(getattr(torch, train.frozen))
        ids_BS = torch.from_numpy(batch.tokens_BS).long().to(self.device)
        supervised_BS = torch.from_numpy(batch.supervised_BS).to(self.device)
        labels_BS = torch.where(supervised_BS, ids_BS, -100)
        text_BT = ids_BS[:, int(batch.is_image_BS[0].sum()) :].contiguous()
        self.batch = pixels_BYX3.permute(0, 3, 1, 2).contiguous(), text_BT, labels_BS

    def run(self) -> None:
        self.loss = self.model(*self.batch)
        self.loss.backward()
        self.norm = torch.nn.utils.clip_grad_norm_(self.whole.compressor.parameters(), self.train.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def wait(self) -> tuple[float, float]:
        return self.loss.item(), self.norm.item()

    def end(self) -> None:
        self.optimiser = self.batch = self.loss = self.norm = None
        self.whole.compressor.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Whole(torch.nn.Module):
    """Pixels and text to the loss; the visual tokens come first."""

    def __init__(self, tower: Any, compressor: Any, llm: Any, dtype: torch.dtype):
        super().__init__()
        self.tower, self.compressor, self.llm, self.dtype = tower, compressor, llm, dtype

    def forward(self, pixels_B3YX: torch.Tensor, text_BT: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            tokens_BNC = self.tower(pixels_B3YX).last_hidden_state[:, 1:]
        # Its parameters and moments are float32, as ours.
        with torch.autocast(pixels_B3YX.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            visual_BQD = self.compressor(tokens_BNC).to(self.dtype)
        seq_BSD = torch.cat([visual_BQD, self.llm.get_input_embeddings()(text_BT)], 1)
        return self.llm(inputs_embeds=seq_BSD, labels=labels_BS).loss


def matched(model: Any, theirs: Theirs, config: VlmConfig) -> None:
    """Our model and theirs get the same weights: the frozen ones from theirs, the compressor's from ours."""
    for module, twin, cfg in (
        (model.tower, theirs.whole.tower, config.one_tower),
        (model.llm, theirs.whole.llm, config.llm),
    ):
        nnx.update(module, take(module, twin, cfg, "float32")[1])
    compressor: Any = config.compressor
    tell(theirs.whole.compressor, names.flatten(model.compressor), compressor, config.widths)
    theirs.first = {name: tensor.clone() for name, tensor in theirs.whole.compressor.state_dict().items()}


def attempt(side: Side, batch: Batch, what: Callable[[Side], Any]) -> Any:
    """What `what(side)` gives between begin and end; None if the memory does not do."""
    try:
        side.begin(batch)
        return what(side)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        side.end()


def fits(side: Side, batch: Batch) -> bool:
    """Whether the memory does for two steps: the second has all of the optimiser's state."""

    def two(side: Side) -> bool:
        side.run()
        side.run()
        side.wait()
        return True

    return attempt(side, batch, two) is not None


def timed(side: Side, seconds: float) -> dict[str, Any]:
    """Median seconds of a step, in turns of three steps, at least three of them, for about `seconds`; and the first loss."""
    side.run()  # compiles
    loss = side.wait()[0]
    side.run()
    side.wait()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        for _ in range(TURN):
            side.run()
        side.wait()
        taken.append((time.perf_counter() - start) / TURN)
    return {"seconds": median(taken), "fastest": min(taken), "slowest": max(taken), "turns": len(taken), "loss": loss}


def largest(does: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to an eighth of itself; ValueError if not even one sample does."""
    fitting, failing = 0, None
    batch = start
    while failing is None or (fitting and failing - fitting > max(1, fitting // 8)) or not fitting:
        if does(batch):
            fitting = batch
        else:
            failing = batch
        if failing == 1:
            raise ValueError("not even one sample fits the device's memory; choose a smaller size, or --remat full.")
        batch = 2 * batch if failing is None else (fitting + failing) // 2
    return fitting


def is_out_of_memory(error: BaseException) -> bool:
    """Of either framework, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error)
    return any(
        sign in said for sign in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "can't allocate memory")
    )
