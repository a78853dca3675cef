"""Letters become shardings by one table; what cannot be sharded is replicated, what cannot be meshed is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tcjax.config import MeshConfig
from tcjax.sharding import check_batch, make_mesh, place, place_batch, spec


def test_one_size_may_be_left_open():
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (-1, -1, 1), (0, 8, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match=r"mesh|MeshConfig"):
        make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))


def test_a_letter_is_sharded_where_its_size_divides_and_an_axis_is_used_once():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert spec("CE", (6, 8), mesh) == PartitionSpec("fsdp", "tensor")
    assert spec("CD", (6, 8), mesh) == PartitionSpec("fsdp", None)
    assert spec("CE", (5, 7), mesh) == PartitionSpec(None, None)
    assert spec("LED", (4, 6, 8), mesh) == PartitionSpec(None, "tensor", "fsdp")
    assert spec("BSD", (4, 3, 5), mesh) == PartitionSpec(("data", "fsdp"), None, None)


def test_placing_changes_where_and_not_what():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    kernel = nnx.Param(jnp.arange(48.0).reshape(6, 8), axes="CE")
    placed = place({"kernel": kernel, "count": jnp.int32(3)}, mesh)
    assert placed["kernel"][...].addressable_shards[0].data.shape == (3, 4)
    np.testing.assert_array_equal(placed["kernel"][...], np.arange(48.0).reshape(6, 8))
    assert placed["count"].sharding.is_fully_replicated


def test_a_batch_is_cut_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = place_batch({"x": np.arange(24).reshape(8, 3), "none": None}, mesh)
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
    assert isinstance(batch["x"], jax.Array)


def test_a_batch_that_does_not_divide_says_by_what_it_must():
    with pytest.raises(ValueError, match="use a multiple of 16"):
        check_batch(24, make_mesh(MeshConfig()), accumulate=2)
