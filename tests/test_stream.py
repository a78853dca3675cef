"""Weights go from the file to their shards: the right piece in the right type, little memory, and every fault named."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tcjax.config import MeshConfig
from tcjax.interop import hashes, names, stream, tensors
from tcjax.interop.mismatch import WeightMismatch
from tcjax.interop.names import Name
from tcjax.interop.stream import Place
from tcjax.llms import decoder
from tcjax.sharding import make_mesh
from tests.peak_memory import WIDE
from tests.planted import noise
from tests.tiny import LLM

ROOT = Path(__file__).parents[1]
LEAVES = {  # op: (leaf, its spec on a mesh of 2 x 2 x 2)
    "same": ((8, 6), ("fsdp", "tensor")),
    "transpose": ((8, 6), ("fsdp", "tensor")),
    "patches": ((12, 8), (None, "tensor")),
    "conv": ((3, 3, 4, 6), (None, None, "fsdp", "tensor")),
    "conv1x1": ((8, 6), (None, "fsdp")),
    "unsqueeze": ((8, 6), ("tensor", None)),
    "middle": ((8, 6), ("fsdp", None)),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("op", LEAVES)
def test_every_shard_is_its_piece_of_the_leaf(tmp_path, op, stacked):
    """In the wanted type, whichever the file has; for every op, stacked over layers or not, cut along any axis."""
    shape, spec = LEAVES[op]
    name = Name("leaf", "layers.{2L+1}.w" if stacked else "w", op)
    whole = noise(*((4, *shape) if stacked else shape))
    spec = ("data", *spec) if stacked else spec
    tensors.save(tmp_path / "w.safetensors", names.to_torch({"leaf": whole.astype(ml_dtypes.bfloat16)}, [name]))
    sharding = NamedSharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), PartitionSpec(*spec))
    place = Place(whole.shape, jnp.float32, sharding)
    leaf = stream.leaf(name, tensors.find(tmp_path), place)
    assert leaf.sharding == sharding and leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, whole.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert len({shard.index for shard in leaf.addressable_shards} if sys.version_info >= (3, 12) else "any") > 1
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, leaf[shard.index])


def test_a_block_that_is_no_whole_tensor_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", 40)
    arrays = {"w": noise(7, 5), "scalar": np.array(3, np.float32), "empty": np.zeros((0, 3), np.float32)}
    tensors.save(tmp_path / "w.safetensors", arrays)
    stored, here = tensors.find(tmp_path), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name, array in arrays.items():
        found = stream.leaf(Name(name, name), stored, Place(array.shape, np.float32, here))
        np.testing.assert_array_equal(found, array, strict=True)
    turned = stream.leaf(Name("w", "w", "transpose"), stored, Place((5, 7), np.float32, here, owned=True))
    np.testing.assert_array_equal(turned, arrays["w"].T)


def shards(folder: Path) -> Path:
    """Two shards and their index."""
    tensors.save(folder / "model-1.safetensors", {"a": noise(4, 4), "b": noise(3)})
    tensors.save(folder / "model-2.safetensors", {"c": noise(5)})
    of = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (folder / tensors.INDEX).write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": of}))
    return folder


def test_the_index_says_which_files_are_read(tmp_path):
    tensors.save(shards(tmp_path) / "another.safetensors", {"a": np.zeros(1)})
    assert {name: stored.shape for name, stored in tensors.find(tmp_path).items()} == {
        "a": (4, 4),
        "b": (3,),
        "c": (5,),
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: (at / "model-2.safetensors").unlink(), r"lacks 1 of the 2 shards .*: model-2\.safetensors;"),
        (lambda at: os.truncate(at / "model-1.safetensors", 150), r"model-1\.safetensors is no whole safetensors file"),
        (
            lambda at: tensors.save(at / "model-1.safetensors", {"a": noise(4, 4)}),
            r"index\.json names 1 of its 3 tensors where they are not: b in model-1\.safetensors; .* fetch them again",
        ),
        (lambda at: (at / tensors.INDEX).write_text("{"), r"index\.json is no index"),
        (
            lambda at: (at / tensors.INDEX).write_text('{"weight_map": {"a": "../x"}}'),
            r"names '\.\./x'; a shard lies in",
        ),
    ],
)
def test_what_is_wrong_with_a_download_is_named(tmp_path, spoil, message):
    spoil(shards(tmp_path))
    with pytest.raises(ValueError, match=message):
        tensors.find(tmp_path)


def test_another_architecture_is_one_short_error():
    """A Llama's table on CLIP's tensors: three names of either side, not six hundred."""
    shapes = names.shapes(nnx.eval_shape(lambda: replace(WIDE, layers=40).build(nnx.Rngs(0))))
    table = decoder.names(replace(WIDE, layers=40))
    clip = {f"vision_model.{part}{k}.weight": np.zeros(1) for k in range(30) for part in "abcdefghij"}
    with pytest.raises(WeightMismatch) as caught:
        names.check(clip, table, shapes, what="tensors of checkpoints/clip")
    message = str(caught.value)
    assert message.startswith("none of these 300 tensors of checkpoints/clip is one of the 363 that are asked for")
    assert len(message.splitlines()) == 1 + 2 * (1 + 3 + 1) and "more lines" in message
    assert len(caught.value.missing) == 363 and len(caught.value.unexpected) == 300


def test_a_hash_is_computed_once_and_again_after_any_change(tmp_path, monkeypatch):
    folder, memory, computed = shards(tmp_path), tmp_path / "runs", []
    real = tensors.content_hash
    monkeypatch.setattr(tensors, "content_hash", lambda path: computed.append(path) or real(path))

    def asked() -> str:
        return hashes.content_hash(folder, memory)

    first = asked()
    assert first == real(tensors.load(folder)) == asked() and len(computed) == 1
    times = os.stat(folder / "model-2.safetensors")
    os.utime(folder / "model-2.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert asked() == first and len(computed) == 2
    tensors.save(folder / "model-2.safetensors", {"c": noise(5, seed=1)})
    assert asked() == real(folder) != first and len(computed) == 3
    next(memory.glob("*.json")).write_text("{")
    assert asked() == real(folder) and len(computed) == 4


def checkpoint(folder: Path, cfg: decoder.LlmConfig) -> None:
    shapes = names.shapes(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    published = names.published_shapes(decoder.names(cfg), shapes)
    tensors.save(folder / "model.safetensors", {k: rng.standard_normal(s, np.float32) for k, s in published.items()})


def run(*command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoint(root / "small", LLM)
    checkpoint(root / "wide", WIDE)
    return root


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
@pytest.mark.parametrize("frozen", ["float32", "bfloat16"])
def test_the_host_holds_the_shards_and_little_more_than_one_tensor(checkpoints, frozen):
    """A file of 186 MB whose largest tensor is 50 MB: its arrays and 1.3 of those, mapped pages counted."""
    found = result(run("tests.peak_memory", str(checkpoints), frozen))
    assert found["largest"] == 16_384 * 768 * 4
    assert found["shards"] < found["peak"] < found["shards"] + 1.3 * found["largest"], found


def test_two_processes_read_their_own_halves_and_agree_who_it_is(tmp_path):
    """The first one hashes the file and tells the other; each takes from it exactly the bytes of its own shards."""
    checkpoint(tmp_path / "small", LLM)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    alone = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    pair = [run("tests.two_processes", str(tmp_path), port, str(number), **alone) for number in range(2)]
    one, other = map(result, pair)
    assert one["hash"] == other["hash"] == tensors.content_hash(tmp_path / "small")
    assert one["hashed"] and not other["hashed"]
    for found in (one, other):
        assert found["copied"] == found["mine"] < found["all"] * 0.6, found
