"""A model is assembled where it belongs and is what an untraced build would be; what does not fit is refused in few words."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from tcjax.assemble import assemble
from tcjax.compressors import gemma3_pool
from tcjax.config import MeshConfig
from tcjax.interop import names, tensors
from tcjax.interop.mismatch import WeightMismatch
from tcjax.llms import decoder, published
from tcjax.nn.draw import drawn
from tcjax.sharding import make_mesh
from tests.tiny import LLM, VLM

SEED = 3
POOLED = dataclasses.replace(VLM, compressor=gemma3_pool.Config(num_queries=4))  # its start moves under XLA's fusion


@pytest.mark.parametrize("model", [VLM, POOLED], ids=["resampler", "gemma3_pool"])
def test_a_seed_starts_every_part_with_the_bits_of_a_build(tmp_path, model):
    """Whichever the mesh, and though nothing but the leaf under way is ever made."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found, identity = assemble(model, root=tmp_path, seed=SEED, mesh=mesh, trainable=("compressor",))
    meant = names.flatten(model.build(nnx.Rngs(SEED)))
    assert names.flatten(found).keys() == meant.keys()
    for path, array in names.flatten(found).items():
        np.testing.assert_array_equal(array, meant[path], strict=True, err_msg=path)
    assert identity["llm.weights"] == f"random from seed {SEED}"


def test_a_leaf_is_drawn_alone():
    wanted = "compressor/projection/kernel"
    ((path, array),) = drawn(lambda: POOLED.build(nnx.Rngs(SEED)), {wanted})
    assert path == wanted
    np.testing.assert_array_equal(array, names.flatten(POOLED.build(nnx.Rngs(SEED)))[wanted])


def downloaded(folder, **changes):
    """A folder as the hub has it: safetensors, and a config.json that says `changes` otherwise."""
    weights = names.to_torch(names.flatten(LLM.build(nnx.Rngs(1))), decoder.names(LLM))
    tensors.save(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(published.to_json(LLM) | changes))
    return dataclasses.replace(VLM, llm=dataclasses.replace(LLM, weights=folder.name))


def test_a_downloaded_llm_is_streamed_in_the_type_asked_for(tmp_path):
    config = downloaded(tmp_path / "llm")
    found, identity = assemble(config, root=tmp_path, frozen="bfloat16", trainable=("compressor",))
    meant = names.flatten(LLM.build(nnx.Rngs(1)))
    for path, array in names.flatten(found.llm).items():
        np.testing.assert_array_equal(array, meant[path].astype(array.dtype), err_msg=path)
        assert array.dtype.name == "bfloat16"
    assert identity["llm.weights"] == tensors.content_hash(tmp_path / "llm")
    assert {array.dtype.name for array in names.flatten(found.compressor).values()} == {"float32"}


def test_a_config_json_that_says_another_thing_is_refused_field_by_field(tmp_path):
    config = downloaded(tmp_path / "llm", rope_theta=5e5, rms_norm_eps=1e-6)
    with pytest.raises(ValueError, match="describes another LLM") as caught:
        assemble(config, root=tmp_path)
    message = str(caught.value)
    assert "rope_theta: 500000.0 there, 10000.0 asked for" in message
    assert "norm_eps: 1e-06 there, 1e-05 asked for" in message and len(message.splitlines()) == 4


def test_what_learns_is_float32_and_not_the_files_memory(tmp_path):
    config = downloaded(tmp_path / "llm")
    found, _ = assemble(config, root=tmp_path, frozen="bfloat16", trainable=("compressor", "llm"))
    assert {array.dtype.name for array in names.flatten(found.llm).values()} == {"float32"}
    assert {array.dtype.name for array in names.flatten(found.tower).values()} == {"bfloat16"}


def test_a_start_that_lacks_a_leaf_is_named(tmp_path):
    leaves = names.flatten(VLM.build(nnx.Rngs(0)).compressor)
    leaves.pop("queries", None) or leaves.popitem()
    tensors.save(tmp_path / "start.safetensors", leaves)
    with pytest.raises(WeightMismatch, match=r"leaves of .*start\.safetensors do not fit .*\n  MISSING \(1\)"):
        assemble(VLM, root=tmp_path, start={"compressor": "start.safetensors"})
