"""Accidents cost no more than they must: signals, kills, NaN, a full disk, another run's folder."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from tcjax.batch import Batch
from tcjax.interop.names import flatten
from tcjax.train.checkpoint import CheckpointMismatch
from tcjax.train.loop import NonFiniteLoss, Stopped
from tests.tiny import Batches, a_run, go, losses

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    model = go(out).model
    return losses(out), flatten(model)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path, uninterrupted, number):
    def accident(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped) as stopped:
        go(tmp_path, a_run(save_every=0), batches=Batches(before=accident))
    assert stopped.value.code == 128 + number
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4"]
    outcome = go(tmp_path, a_run(save_every=0))
    assert losses(tmp_path) == uninterrupted[0]
    for path, array in flatten(outcome.model).items():
        np.testing.assert_array_equal(array, uninterrupted[1][path], err_msg=path)


def test_a_finished_run_is_not_trained_again(tmp_path, uninterrupted):
    go(tmp_path)
    go(tmp_path, batches=Batches(before=lambda step: pytest.fail("a batch was read")))
    assert losses(tmp_path) == uninterrupted[0]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import tests.conftest
from tests.tiny import Batches, a_run, go
step = int(sys.argv[2])
go(Path(sys.argv[1]), a_run(save_every=2), batches=Batches(before=lambda s: s == step and os.kill(os.getpid(), signal.SIGKILL)))
"""


@pytest.mark.parametrize("step", [3, 6])
def test_killed_outright_it_resumes_with_the_same_losses(tmp_path, uninterrupted, step):
    script = KILLED.format(root=str(ROOT))
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(step)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    go(tmp_path, a_run(save_every=2))
    assert losses(tmp_path) == uninterrupted[0]


def test_a_nan_loss_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    class Poisoned(Batches):
        def __next__(self) -> Batch:
            batch = super().__next__()
            return batch._replace(images_BYX3=batch.images_BYX3 * np.nan) if self.step == 5 else batch

    with pytest.raises(NonFiniteLoss, match=r"step 5: loss nan.*last good checkpoint is step 4"):
        go(tmp_path, batches=Poisoned())
    assert not (tmp_path / "checkpoints/5").exists()


def test_another_runs_checkpoint_is_refused_by_every_differing_fact(tmp_path):
    go(tmp_path)
    with pytest.raises(CheckpointMismatch) as refused:
        go(tmp_path, identity={"model": "other", "tower.weights": "abc", "widths": 8})
    assert "model: 'tiny' there, 'other' here" in str(refused.value)
    assert "widths: None there, 8 here" in str(refused.value)
    assert "tower.weights" not in str(refused.value)


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import tests.conftest
from tests.tiny import Batches, a_run, go
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def fill(step):
    if step == 5:  # checkpoint 2 is whole by now, 4 may still be on its way
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # from now on no file can grow past 2000 bytes

try:
    go(Path(sys.argv[1]), a_run(save_every=2, log_every=100), batches=Batches(before=fill))
except OSError as error:
    print("REFUSED", error)
"""


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, uninterrupted):
    script = FULL.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    told = re.search(r"REFUSED saving checkpoint ([46]) failed .*checkpoint ([24]) in .* is whole", done.stdout)
    assert told and int(told[2]) == int(told[1]) - 2, done.stdout + done.stderr
    go(tmp_path, a_run(save_every=2))
    assert losses(tmp_path)[-2:] == uninterrupted[0][-2:]


def test_tree_mode_trains_alike(tmp_path, uninterrupted):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        go(tmp_path)
    np.testing.assert_allclose(losses(tmp_path), uninterrupted[0], rtol=1e-6)
