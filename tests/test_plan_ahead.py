"""The compilers themselves, ahead of time and without an accelerator: what they say is what can be counted by hand."""

import dataclasses
import importlib.util
import math

import jax
import pytest
from jax.sharding import AbstractMesh

from configs import llava
from tcjax.config import MeshConfig, Run
from tcjax.plan.compile import DoesNotFit, _refused
from tcjax.plan.plan import Plan, laid_out, plan
from tcjax.plan.topology import topology
from tcjax.plan.traffic import traffic
from tcjax.shapes import abstract_batch, held, parts
from tcjax.sharding import MESH_AXES
from tests.tiny import a_run

GIB = 2**30
TINY = dataclasses.replace(a_run(batch=32), mesh=MeshConfig(data=1, fsdp=-1))

for_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tcjax[tpu])")
for_gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no CUDA compiler is installed (tcjax[gpu-plan])"
)


def bytes_of(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def arguments(run: Run, mesh: dict[str, int]) -> int:
    """By hand: weights, two moments, the optimiser's and the step's number, and the rows of a device but for their index,
    which only compressors that draw at random read."""
    _, trainable, frozen = parts(run)
    on = AbstractMesh(tuple(mesh.values()), MESH_AXES)
    own = abstract_batch(run, run.data.batch // (mesh["data"] * mesh["fsdp"]))
    return 3 * held(trainable, on) + held(frozen, on) + bytes_of(own._replace(index_B=None)) + 4 + 4


def ahead(run: Run, name: str, tmp_path, slices: int = 1, **mesh: int) -> Plan:
    where = topology(name, slices)
    return plan(laid_out(run, where, **mesh), where, root=tmp_path)


@pytest.mark.slow
@for_gpu
def test_a_gpu_step_has_the_arguments_that_are_counted_to_the_byte(tmp_path):
    found = ahead(TINY, "h200:8", tmp_path)
    assert found.fits and found.arguments == arguments(TINY, found.mesh)
    assert found.arguments < found.peak < GIB and found.dcn_bytes == 0 and found.ici_bytes


@pytest.mark.slow
@for_tpu
def test_a_tpu_step_has_the_arguments_that_are_counted_and_gathers_frozen_weights_twice(tmp_path):
    """The real 7B: XLA lays arrays out in tiles, which costs it a thousandth."""
    run = llava.pretrain_7b()
    found = ahead(run, "v5e:4x4", tmp_path)
    by_hand = arguments(run, found.mesh)
    assert found.fits and by_hand <= found.arguments <= 1.002 * by_hand
    _, _, frozen = parts(run)
    assert found.gathered["bf16"] <= 2 * bytes_of(frozen)
    assert found.executed_flops > found.useful_flops and found.dcn_bytes == 0
    assert found.compile_seconds < 120


@pytest.mark.slow
@for_tpu
def test_between_slices_go_only_gradients_of_what_learns_and_the_loss(tmp_path):
    found = ahead(TINY, "v5e:2x2", tmp_path, slices=2, data=2)
    _, trainable, _ = parts(TINY)
    assert found.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    # Shared out over a slice first; what does not divide goes whole. Loss, accuracy and count are three numbers.
    assert bytes_of(trainable) / 4 <= found.dcn_bytes <= bytes_of(trainable) + 64


@pytest.mark.slow
@for_tpu
def test_one_device_sends_nothing(tmp_path):
    found = ahead(TINY, "v5e:1x1", tmp_path)
    assert (
        found.fits and found.ici_bytes == found.dcn_bytes == 0 and not found.gathered and found.peak > found.arguments
    )


@pytest.mark.slow
@for_tpu
def test_what_the_compiler_refuses_is_told_in_bytes(tmp_path):
    """Float32 weights of 27 GB, whole on a device of 15.75 GiB."""
    run = llava.pretrain_7b()
    run = run.replace(
        train=dataclasses.replace(run.train, frozen="float32"), data=dataclasses.replace(run.data, batch=16)
    )
    found = ahead(run, "v5e:4x4", tmp_path, data=16, fsdp=1)
    assert not found.fits and found.available == 15.75 * GIB and found.peak > 25 * GIB
    assert found.verdict.startswith("does not fit: needs ") and found.verdict.endswith("of 15.75 GiB per device")


KERNEL = """HloModule step, num_partitions=2

ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %kernel = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="splash"}
  ROOT %whole = f32[8]{0} all-gather(%kernel), channel_id=1, replica_groups={{0,1}}, dimensions={0}, use_global_device_ids=true
}
"""


def test_a_kernel_whose_attributes_take_several_lines_is_read_over():
    assert traffic(KERNEL, [0, 0]).ici_bytes == 16


REFUSALS = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (72.00G) exceeds available "
    "HBM (15.75G).": (72 * GIB, int(15.75 * GIB)),
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. "
    "Exceeded hbm capacity by 768.00M.": (int(16.5 * GIB), int(15.75 * GIB)),
}


@pytest.mark.parametrize("said", REFUSALS, ids=["temporaries", "used"])
def test_both_ways_of_the_compiler_to_say_too_much_are_read(said):
    refused = _refused(RuntimeError(said))
    assert isinstance(refused, DoesNotFit) and (refused.needs, refused.has) == REFUSALS[said]


def test_another_error_of_the_compiler_is_passed_on_in_one_line():
    refused = _refused(RuntimeError("INTERNAL: no tile sizes\nstack"))
    assert (
        not isinstance(refused, DoesNotFit) and str(refused) == "the compiler refused the step: INTERNAL: no tile sizes"
    )
