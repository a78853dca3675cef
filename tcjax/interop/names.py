"""One table, both ways: each line says which leaf of an nnx module is which tensor of a PyTorch checkpoint.

    Name("blocks/attention/query/kernel", "model.layers.{L}.self_attn.q_proj.weight", "transpose")

A leaf is its "/"-joined path in the module's state. "{L}" stands for the layer index and says that the leaf carries a
leading L axis; the op then holds for every layer. "{2L+1}" is the same for published layers 1, 3, 5 and so on. Ops are a
closed set, each with its exact inverse: nothing is guessed from a rank, nothing is reshaped silently, and a name that
does not fit is an error that lists all that do not fit. A published tensor that is no leaf, because nothing trains it
(a table of positions), is a line with its `value`: written on export, compared on import.
A transposed square matrix has the right shape; only a forward pass can find it (tcjax.export does).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from tcjax.interop.mismatch import mismatch

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Name:
    """jax: path of a leaf. torch: published name on disk. op: one of OPS, what the layout takes.

    value: what the published tensor always holds; then there is no leaf and `jax` says nothing.
    """

    jax: str
    torch: str
    op: str = "same"
    value: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        assert self.op in OPS, f"{self.jax}: op {self.op!r} is none of {list(OPS)}"

    @property
    def is_stacked(self) -> bool:
        return _LAYER.search(self.torch) is not None

    def at(self, layer: int) -> str:
        """The published name of one layer's tensor: "{2L+1}" at layer 3 is 7."""
        return _LAYER.sub(lambda found: str(int(found[1] or 1) * layer + int(found[2] or 0)), self.torch)


_ROUNDING = 2.0**-8  # bfloat16's, of the largest value; float16 rounds 8 times less
_LAYER = re.compile(r"\{(\d*)L(?:\+(\d+))?\}")


class Shaped(Protocol):
    """Anything with a shape: an array, or a tensor that still lies in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Op(NamedTuple):
    to_torch: Callable[[np.ndarray], np.ndarray]
    to_jax: Callable[[np.ndarray], np.ndarray]


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _pixels_to_conv(kernel_PC: np.ndarray) -> np.ndarray:
    side = math.isqrt(kernel_PC.shape[0] // 3)
    assert side * side * 3 == kernel_PC.shape[0], f"rows of {kernel_PC.shape} are no square RGB patch"
    return kernel_PC.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _conv_to_pixels(weight_C3YX: np.ndarray) -> np.ndarray:
    return weight_C3YX.transpose(2, 3, 1, 0).reshape(-1, weight_C3YX.shape[0])


OPS = {
    "same": Op(_same, _same),
    "transpose": Op(np.transpose, np.transpose),  # kernel [in, out] <-> weight [out, in]
    # kernel [y * x * 3, out], rows in the order (y, x, colour) <-> convolution [out, 3, y, x] over square RGB patches
    "patches": Op(_pixels_to_conv, _conv_to_pixels),
    # kernel [y, x, in, out] <-> convolution [out, in, y, x]; a depthwise one has in = 1 on both sides
    "conv": Op(partial(np.transpose, axes=(3, 2, 0, 1)), partial(np.transpose, axes=(2, 3, 1, 0))),
    # kernel [in, out] <-> 1 x 1 convolution [out, in, 1, 1]
    "conv1x1": Op(lambda kernel: kernel.T[:, :, None, None], lambda weight: weight[:, :, 0, 0].T),
    "unsqueeze": Op(lambda leaf: leaf[None], lambda tensor: tensor[0]),  # [...] <-> [1, ...]
    "unsqueeze twice": Op(lambda leaf: leaf[None, None], lambda tensor: tensor[0, 0]),  # [...] <-> [1, 1, ...]
    "middle": Op(lambda leaf: leaf[:, None], lambda tensor: tensor[:, 0]),  # [n, ...] <-> [n, 1, ...]
}


def to_torch(arrays: Mapping[str, np.ndarray], names: Sequence[Name]) -> Arrays:
    """Leaves as the published tensors: C-contiguous copies in the leaves' own types.

    Raises:
        WeightMismatch: the arrays are not exactly the table's leaves.
    """
    table = _by_leaf(names)
    _refuse(mismatch({path: arrays[path].shape for path in arrays}, dict.fromkeys(table), "leaves"))
    tensors: Arrays = {}
    for name in names:
        for key, part in _parts(name, arrays.get(name.jax)):
            assert key not in tensors, f"two leaves are called {key!r}"
            tensors[key] = np.array(OPS[name.op].to_torch(part), order="C")
    return tensors


def from_torch(
    tensors: Mapping[str, np.ndarray], names: Sequence[Name], shapes: Shapes, *, ignore: Collection[str] = ()
) -> Arrays:
    """Published tensors as leaves: the inverse of `to_torch`, in the tensors' own types.

    Args:
        shapes: of every leaf, from `shapes(module)`.
        ignore: regular expressions; a tensor the table does not name may match one whole and is then left out.

    Raises:
        WeightMismatch: one error listing every missing, unexpected and misshapen tensor.
        ValueError: a tensor that nothing trains holds something else than our table says.
    """
    check(tensors, names, shapes, ignore=ignore)
    refuse_other_values(tensors, names)
    arrays: Arrays = {}
    for name in names:
        if name.value is not None:
            continue
        to_jax = OPS[name.op].to_jax
        if name.is_stacked:
            layers = range(shapes[name.jax][0])
            arrays[name.jax] = np.stack([to_jax(tensors[name.at(layer)]) for layer in layers])
        else:
            arrays[name.jax] = np.array(to_jax(tensors[name.torch]), order="C")
    return arrays


def check(
    tensors: Mapping[str, Shaped],
    names: Sequence[Name],
    shapes: Shapes,
    *,
    ignore: Collection[str] = (),
    what: str = "tensors",
) -> None:
    """WeightMismatch unless the tensors are exactly the table's, but for what `ignore` matches; see `from_torch`.

    what: the tensors in the message, "tensors of checkpoints/x".
    """
    table = _by_leaf(names)
    assert table.keys() == shapes.keys(), f"table and module differ in {sorted(table.keys() ^ shapes.keys())}"
    expected = published_shapes(names, shapes)
    dropped = re.compile("|".join(f"(?:{pattern})" for pattern in ignore)) if ignore else None
    found = {
        key: tensor.shape
        for key, tensor in tensors.items()
        if key in expected or dropped is None or not dropped.fullmatch(key)
    }
    _refuse(mismatch(found, expected, what))


def refuse_other_values(tensors: Mapping[str, np.ndarray], names: Sequence[Name]) -> None:
    """ValueError if a tensor that nothing trains holds something else than its line says."""
    for name in names:
        if name.value is not None:
            _refuse_another(name.torch, tensors[name.torch], name.value)


def published_shapes(names: Sequence[Name], shapes: Shapes) -> Shapes:
    """The shape every published tensor must have for leaves of these shapes."""
    published: Shapes = {}
    for name in names:
        weightless = None if name.value is not None else np.broadcast_to(np.uint8(0), shapes[name.jax])
        for key, part in _parts(name, weightless):
            assert key not in published, f"two leaves are called {key!r}"
            published[key] = OPS[name.op].to_torch(part).shape
    return published


def matching(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> Arrays:
    """The arrays themselves if they are exactly these leaves under our own paths; WeightMismatch otherwise."""
    _refuse(mismatch({path: arrays[path].shape for path in arrays}, shapes, "leaves"))
    return dict(arrays)


def flatten(module: nnx.Module | nnx.State) -> Arrays:
    """Every weight by its path, as numpy in its own type (bfloat16 stays bfloat16)."""
    return {path: np.asarray(leaf.get_value()) for path, leaf in _leaves(module)}


def shapes(module: nnx.Module | nnx.State) -> Shapes:
    """The shape of every weight by its path; also of an abstract module (nnx.eval_shape)."""
    return {path: tuple(leaf.get_value().shape) for path, leaf in _leaves(module)}


def assign(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace every weight of the module in place, each cast to the type and put where the old one lay.

    Raises:
        WeightMismatch: the arrays are not exactly the module's leaves.
    """
    arrays = matching(arrays, shapes(module))
    state = nnx.state(module, _WEIGHTS)
    for path, leaf in _leaves(state):
        old = leaf.get_value()
        new = np.asarray(arrays[path]).astype(old.dtype, copy=False)
        leaf.set_value(jax.device_put(new, getattr(old, "sharding", None), may_alias=False))
    nnx.update(module, state)


_WEIGHTS = nnx.Not(nnx.RngState)


def _leaves(module: nnx.Module | nnx.State) -> Iterator[tuple[str, nnx.Variable]]:
    state = module if isinstance(module, nnx.State) else nnx.state(module, _WEIGHTS)
    for path, leaf in nnx.to_flat_state(state):
        yield "/".join(map(str, path)), leaf


def _by_leaf(names: Sequence[Name]) -> dict[str, Name]:
    trained = [name for name in names if name.value is None]
    table = {name.jax: name for name in trained}
    assert len(table) == len(trained), "a leaf is named twice"
    return table


def _parts(name: Name, leaf: np.ndarray | None) -> Iterator[tuple[str, np.ndarray]]:
    leaf = leaf if name.value is None else name.value
    assert leaf is not None, name
    if not name.is_stacked:
        yield name.torch, leaf
        return
    for layer, part in enumerate(leaf):
        yield name.at(layer), part


def _refuse_another(key: str, found: np.ndarray, value: np.ndarray) -> None:
    """Published checkpoints are often rounded to half precision, their tables too."""
    size = np.abs(value.astype(np.float64)).max(initial=0)
    error = np.abs(found.astype(np.float64) - value.astype(np.float64)).max(initial=0)
    if not error <= _ROUNDING * size:
        raise ValueError(
            f"{key} is not the table that this config computes: off by up to {error:.2g}, where half precision explains "
            f"{_ROUNDING * size:.2g}. The checkpoint has other positions; look for another form or size in its config."
        )


def _refuse(error: ValueError | None) -> None:
    if error is not None:
        raise error
