"""Checkpoints: the trainable side, the optimiser, the data iterator's place, and who the frozen parts were.

Orbax v1, asynchronous; a step is there when its commit marker is, so a kill or a full disk in mid-save leaves the
previous one. Every process writes and reads what lies on its devices; how many there are, and their mesh, may change. Frozen weights are not saved: their content hashes are, and restoring beside other ones is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from tcjax.train.state import State


class Restored(NamedTuple):
    step: int
    state: State
    iterator: dict


class CheckpointMismatch(ValueError):
    """The checkpoint belongs to another run; the message names every fact that differs."""


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay.

    saved: called with the seconds that a save went on behind `save`, once that is known: in the next `wait`.
    """

    def __init__(self, folder: Path, *, keep: int = 2, saved: Callable[[float], None] = lambda seconds: None):
        self.folder, self._saved = folder, saved
        policies: dict[str, Any] = {  # orbax's own annotations do not admit its own policies
            "save_decision_policy": ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            "preservation_policy": ocp.training.preservation_policies.LatestN(keep),
        }
        self._saver = ocp.training.Checkpointer(str(folder.absolute()), cleanup_tmp_directories=True, **policies)
        self._pending: tuple[int, Any, float] | None = None
        self._told = False

    def latest(self) -> int | None:
        """The newest whole step, or None."""
        newest = self._saver.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: State, iterator: dict, identity: dict) -> None:
        """Start saving `step`; the arrays may be donated as soon as this returns. OSError if the previous save failed."""
        self.wait()
        if self.latest() == step:
            return
        items = {"state": state._asdict(), "iterator": iterator, "identity": identity}
        try:
            response = self._saver.save_checkpointables_async(step, items)
            self._pending = (step, response, time.time())
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Until the save under way is whole on disk. OSError naming the step that is safe if it failed."""
        if self._pending is None:
            return
        step, response, begun = self._pending
        self._pending = None
        try:
            if response is not None:
                response.result()
            self._saver.wait()
        except Exception as error:
            raise self._failed(step, error) from error
        folder = self.folder / str(step)  # it gets its name when it is whole
        if folder.exists():
            self._saved(max(folder.stat().st_ctime - begun, 0.0))

    def restore(self, like: State, identity: dict) -> Restored | None:
        """The newest checkpoint placed as `like` is; None if there is none. CheckpointMismatch if it is another run's."""
        step = self.latest()
        if step is None:
            return None
        facts = self._saver.load_checkpointables(step, {"identity": None, "iterator": None})
        check_identity(facts["identity"], identity, f"checkpoint {self.folder}/{step}")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict())
        state = self._saver.load_checkpointables(step, {"state": abstract})["state"]
        return Restored(step, State(**state), facts["iterator"])

    def close(self) -> None:
        """Wait for the save under way and let go of the folder. A failure that was told once is not raised again."""
        try:
            self.wait()
        finally:
            try:
                self._saver.close()
            except Exception:
                if not self._told:
                    raise

    def _failed(self, step: int, error: Exception) -> OSError:
        self._told = True
        safe = [c.step for c in self._saver.checkpoints if c.step != step]
        left = f"checkpoint {max(safe)} in {self.folder} is whole" if safe else "no earlier checkpoint exists"
        return OSError(f"saving checkpoint {step} failed ({error}); {left}. Free some space and run again: it resumes.")


def check_identity(found: dict, expected: dict, what: str) -> None:
    """CheckpointMismatch naming each differing fact, unless all are equal."""
    names = sorted(found.keys() | expected.keys())
    differing = [name for name in names if found.get(name) != expected.get(name)]
    if differing:
        lines = "\n".join(f"  {name}: {found.get(name)!r} there, {expected.get(name)!r} here" for name in differing)
        raise CheckpointMismatch(
            f"{what} belongs to another run:\n{lines}\nUse the same config, or another --out folder to start anew."
        )
