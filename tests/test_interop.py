"""Names and tensors: one table both ways, one strict error, one writer that writes nothing but what was meant."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx

from tcjax.compressors import resampler
from tcjax.compressors.base import Widths
from tcjax.interop import names, tensors
from tcjax.interop.lines import fixed
from tcjax.interop.mismatch import WeightMismatch, collapse
from tcjax.interop.names import OPS, Name
from tests.planted import noise

SHAPES = {"patch/kernel": (12, 5), "blocks/query/kernel": (3, 4, 6), "blocks/norm/scale": (3, 4), "position": (7, 5)}
TABLE = [
    Name("patch/kernel", "embed.weight", "patches"),
    Name("blocks/query/kernel", "layers.{L}.q_proj.weight", "transpose"),
    Name("blocks/norm/scale", "layers.{L}.norm.weight", "same"),
    Name("position", "embed.position", "same"),
]


def planted(dtype=np.float32) -> dict[str, np.ndarray]:
    return {path: noise(*shape, seed=k).astype(dtype) for k, (path, shape) in enumerate(SHAPES.items())}


def assert_same_bits(found: dict[str, np.ndarray], meant: dict[str, np.ndarray]):
    assert found.keys() == meant.keys()
    for name, array in meant.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def small_resampler() -> nnx.Module:
    config = resampler.Config(num_queries=3, depth=2, heads=2, head_width=4, ff_mult=2)
    return config.build(Widths(grid_HW=(2, 2), vision_C=4, llm_D=6), nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_import_undoes_export_bit_for_bit(dtype):
    published = names.to_torch(planted(dtype), TABLE)
    assert all(tensor.flags.c_contiguous for tensor in published.values())
    assert {key: tensor.shape for key, tensor in published.items()} == names.published_shapes(TABLE, SHAPES)
    assert_same_bits(names.from_torch(published, TABLE, SHAPES), planted(dtype))


def test_layouts_are_the_published_ones():
    arrays = planted()
    published = names.to_torch(arrays, TABLE)
    assert len(published) == 2 + 2 * 3
    np.testing.assert_array_equal(published["layers.2.q_proj.weight"], arrays["blocks/query/kernel"][2].T)
    np.testing.assert_array_equal(published["layers.1.norm.weight"], arrays["blocks/norm/scale"][1])
    row, column, colour = 1, 0, 2  # of a 2 x 2 patch
    np.testing.assert_array_equal(
        published["embed.weight"][:, colour, row, column], arrays["patch/kernel"][(row * 2 + column) * 3 + colour]
    )


def test_patches_kernel_is_the_strided_convolution():
    weight_C3YX, image_3YX = noise(5, 3, 2, 2), noise(3, 4, 6, seed=1)
    theirs_CHW = torch.nn.functional.conv2d(torch.from_numpy(image_3YX), torch.from_numpy(weight_C3YX), stride=2)
    patch_NP = image_3YX.reshape(3, 2, 2, 3, 2).transpose(1, 3, 2, 4, 0).reshape(6, 12)
    ours_NC = patch_NP @ OPS["patches"].to_jax(weight_C3YX)
    np.testing.assert_allclose(ours_NC, theirs_CHW.flatten(1).T, atol=1e-5)


def test_one_error_lists_all_that_is_wrong():
    published = names.to_torch(planted(), TABLE)
    for layer in range(3):
        published[f"layers.{layer}.q_projection.weight"] = published.pop(f"layers.{layer}.q_proj.weight")
    published["layers.1.norm.weight"] = np.zeros(9, np.float32)
    published["embed.position"] = published["embed.position"].T
    with pytest.raises(WeightMismatch) as caught:
        names.from_torch(published, TABLE, SHAPES)
    message = str(caught.value)
    assert "MISSING (3)" in message
    assert "UNEXPECTED (3)" in message
    assert "SHAPE (2)" in message
    assert "layers.{0..2}.q_proj.weight   (did you mean the unexpected layers.{0..2}.q_projection.weight?)" in message
    assert "layers.1.norm.weight: [9] there, [4] asked for\n" in message + "\n"
    assert "embed.position: [5, 7] there, [7, 5] asked for   TRANSPOSED?" in message
    assert caught.value.missing == [f"layers.{layer}.q_proj.weight" for layer in range(3)]
    assert caught.value.misshapen == ["embed.position", "layers.1.norm.weight"]


def test_ignored_are_only_whole_names_that_the_table_has_no_use_for():
    published = names.to_torch(planted(), TABLE)
    published |= {"head.weight": np.ones(2), "layers.3.norm.weight": np.ones(4)}
    ignore = [r"head\.weight", r"layers\.\d+\.norm\.weight"]  # the second one matches wanted tensors, too
    assert_same_bits(names.from_torch(published, TABLE, SHAPES, ignore=ignore), planted())
    with pytest.raises(WeightMismatch, match=r"UNEXPECTED \(1\)\n    head\.weight"):
        names.from_torch(published, TABLE, SHAPES, ignore=["head", ignore[1]])


def test_a_leaf_that_the_table_lacks_is_not_dropped():
    with pytest.raises(WeightMismatch, match="bias"):
        names.to_torch(planted() | {"patch/bias": np.ones(5)}, TABLE)


TILT = np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_published_constant_is_written_and_no_leaf(dtype):
    """Also under the prefix of a part, as compressors of others give it; rounded checkpoints hold the same table."""
    table = [*TABLE, *(replace(name, jax=f"of/{name.jax}", torch=f"of.{name.torch}") for name in fixed("tilt", TILT))]
    published = names.to_torch(planted(), table)
    np.testing.assert_array_equal(published["of.tilt"], TILT, strict=True)
    assert {key: tensor.shape for key, tensor in published.items()} == names.published_shapes(table, SHAPES)
    rounded = published | {"of.tilt": published["of.tilt"].astype(dtype)}
    assert_same_bits(names.from_torch(rounded, table, SHAPES), planted())


@pytest.mark.parametrize("other", [TILT[::-1], TILT + 0.01, np.where(TILT == 1, np.nan, TILT)])
def test_another_constant_is_refused(other):
    table = [*TABLE, *fixed("tilt", TILT)]
    published = names.to_torch(planted(), table)
    with pytest.raises(ValueError, match=r"tilt is not the table .* off by up to .* explains 0\.0039"):
        names.from_torch(published | {"tilt": other}, table, SHAPES)
    with pytest.raises(WeightMismatch, match=r"tilt: \[4, 6\] there, \[6, 4\] asked for"):
        names.from_torch(published | {"tilt": TILT.T}, table, SHAPES)
    with pytest.raises(WeightMismatch, match=r"MISSING \(1\)\n    tilt"):
        names.from_torch(names.to_torch(planted(), TABLE), table, SHAPES)


@pytest.mark.parametrize("graph", [True, False])
def test_assign_replaces_every_weight_in_place(graph):
    with nnx.set_graph_mode(graph):
        module = small_resampler()
        meant = {path: noise(*shape, seed=k) for k, (path, shape) in enumerate(sorted(names.shapes(module).items()))}
        names.assign(module, meant)
        assert_same_bits(names.flatten(module), meant)
        np.testing.assert_array_equal(module.layers.to_kv.kernel[...], meant["layers/to_kv/kernel"])
        abstract = nnx.eval_shape(small_resampler)
        assert names.shapes(abstract) == names.shapes(module)
        names.assign(abstract, meant)
        assert_same_bits(names.flatten(abstract), meant)


def test_assign_keeps_the_modules_own_type_and_refuses_a_part():
    module = nnx.Linear(2, 3, param_dtype="bfloat16", rngs=nnx.Rngs(0))
    half = {"kernel": np.ones((2, 3), np.float16), "bias": np.zeros(3, np.float16)}
    names.assign(module, half)
    assert {array.dtype.name for array in names.flatten(module).values()} == {"bfloat16"}
    with pytest.raises(WeightMismatch, match=r"MISSING \(1\)\n    bias"):
        names.assign(module, {"kernel": half["kernel"]})


def test_names_are_collapsed_on_their_first_number():
    assert collapse(["a.0.1.w", "a.1.1.w", "a.0.3.w", "b.2.w", "b.5.w", "conv2d.w"]) == [
        "a.{0..1}.1.w",
        "a.0.3.w",
        "b.{2,5}.w",
        "conv2d.w",
    ]


AWKWARD = {  # views whose memory is not what they show
    "transposed": noise(3, 4).T,
    "strided": noise(6, 8)[::2, 1::3],
    "reversed": noise(5)[::-1],
    "fortran": np.asfortranarray(noise(3, 4)),
    "broadcast": np.broadcast_to(np.float32(2), (2, 3)),
    "big_endian": noise(4).astype(">f4"),
    "bfloat16": noise(3, 4).astype(ml_dtypes.bfloat16).T,
    "flags": np.array([[True, False, False], [True, True, False]]).T,
    "scalar": np.float32(3.5) * np.ones(()),
    "empty": np.zeros((0, 3), np.float32),
    "special": np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
}


def test_torch_reads_exactly_the_values_that_were_meant(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors.save(path, AWKWARD, {"note": "kept"})
    read = safetensors.torch.load_file(path)
    for name, array in AWKWARD.items():
        np.testing.assert_array_equal(read[name].float(), array.astype(np.float32), err_msg=name)
        assert read[name].shape == array.shape, name
    assert read["bfloat16"].dtype == torch.bfloat16
    assert tensors.load(path)["bfloat16"].dtype == ml_dtypes.bfloat16
    assert tensors.metadata(path) == {"format": "pt", "note": "kept"}
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    tensors.save(path, {"w": np.ones(3)})

    def save_something_else(arrays, file, metadata):
        safetensors.numpy.save_file({"w": np.array([1.0, 2.0, 4.0])}, file, metadata)

    monkeypatch.setattr(tensors, "save_file", save_something_else)
    with pytest.raises(OSError, match=r"differs .* \['w'\]; the old file stays"):
        tensors.save(path, {"w": np.array([1.0, 2.0, 3.0])})
    np.testing.assert_array_equal(tensors.load(path)["w"], np.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_files_that_are_no_weights_are_named(tmp_path):
    whole, cut, page = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors", tmp_path / "page.safetensors"
    tensors.save(whole, {"w": np.ones((50, 50))})
    cut.write_bytes(whole.read_bytes()[:-100])
    page.write_text("<html>not found</html>")
    for path in (cut, page):
        with pytest.raises(ValueError, match=f"{path.name} is no whole safetensors file"):
            tensors.load(path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        tensors.load(tmp_path / "nowhere")
    (tmp_path / "pickles").mkdir()
    with pytest.raises(ValueError, match="pickles holds no"):
        tensors.load(tmp_path / "pickles")


def test_a_folder_of_shards_is_one_checkpoint(tmp_path):
    tensors.save(tmp_path / "a.safetensors", {"x": np.zeros(2)})
    tensors.save(tmp_path / "b.safetensors", {"y": np.ones(2)})
    assert sorted(tensors.load(tmp_path)) == ["x", "y"]
    tensors.save(tmp_path / "copy.safetensors", {"y": np.zeros(2)})
    with pytest.raises(ValueError, match=r"copy\.safetensors repeats"):
        tensors.load(tmp_path)
    index = {"weight_map": {"x": "a.safetensors", "y": "copy.safetensors"}}
    (tmp_path / tensors.INDEX).write_text(json.dumps(index))
    np.testing.assert_array_equal(tensors.load(tmp_path)["y"], np.zeros(2))


def test_content_hash_is_of_the_content(tmp_path):
    arrays = {"b": noise(3, 4), "a": noise(4)}
    same = tensors.content_hash(arrays)
    tensors.save(tmp_path / "one", dict(reversed(arrays.items())), {"note": "other metadata"})
    assert tensors.content_hash(tmp_path / "one") == same
    assert tensors.content_hash({"b": np.asfortranarray(arrays["b"]), "a": arrays["a"]}) == same
    last_bit = arrays["a"].copy()
    last_bit.view(np.uint32)[3] ^= 1
    others = [
        arrays | {"a": last_bit},
        arrays | {"b": arrays["b"].reshape(4, 3)},
        arrays | {"a": arrays["a"].view(np.int32)},
        {"b": arrays["b"], "A": arrays["a"]},
    ]
    assert len({same, *map(tensors.content_hash, others)}) == 5
