"""Which devices exchange something: the four spellings of a collective's groups in HLO text.

{{0,1},{2,3}}                                          listed
[2,4]<=[4,2]T(1,0)                                     2 groups of 4: iota(8) as 4 x 2, transposed, read in rows
mesh['a'=2,'b'=4] {'b'}                                devices that differ in mesh axis b alone
mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b:(1)2'} the same with devices in another order and half an axis
{} or nothing                                          everyone
"""

from __future__ import annotations

import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]


def groups(attributes: str, partitions: int) -> Groups:
    """The groups of partition numbers that `replica_groups=` of an instruction names. ValueError for another spelling."""
    if "replica_groups=" not in attributes:
        return (tuple(range(partitions)),)
    text = attributes.split("replica_groups=", 1)[1]
    listed = re.match(r"\{((?:\{[\d,\s]*\},?\s*)*)\}", text)
    if listed:
        found = tuple(_ints(group) for group in re.findall(r"\{([\d,\s]*)\}", listed[1]))
        return tuple(group for group in found if group) or (tuple(range(partitions)),)
    shape = re.match(r"\[(\d+),(\d+)\](?=<=)", text)
    if shape:
        ids = _iota(text[shape.end() + 2 :]).reshape(int(shape[1]), int(shape[2]))
        return tuple(map(tuple, ids.tolist()))
    mesh = re.match(r"mesh\[([^\]]*)\](?:,? ?device_ids=\(([^{}]*|\{[\d,{}\s]*\})\))? \{([^}]*)\}", text)
    if mesh:
        return _along(mesh[1], mesh[2], mesh[3])
    raise ValueError(f"unknown spelling of replica_groups in this HLO text: {text[:100]}")


def pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """(from, to) of a collective-permute."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?\s*)*)\}", attributes)
    if not found:
        raise ValueError(f"a collective-permute of this HLO text names no source_target_pairs: {attributes[:100]}")
    numbers = _ints(found[1])
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)` or `[8]`: counting from 0 in that shape, transposed, flat again."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not shape:
        raise ValueError(f"unknown spelling of devices in this HLO text: {text[:100]}")
    sizes = _ints(shape[1])
    order = _ints(shape[2]) if shape[2] else tuple(range(len(sizes)))
    return np.arange(np.prod(sizes)).reshape(sizes).transpose(order).ravel()


def _along(axes: str, order: str | None, chosen: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
    num = int(np.prod(list(sizes.values())))
    if not order:
        ids = np.arange(num)
    elif order.startswith("["):
        ids = _iota(order)
    else:
        ids = np.array(_ints(order))
    coordinates = dict(zip(sizes, np.unravel_index(np.arange(num), tuple(sizes.values())), strict=True))
    for name, before, size in re.findall(r"'?([\w.\-]+?)'?(?::\((\d+)\)(\d+))?'?(?:,|$)", chosen):
        whole, here = sizes[name], coordinates[name]
        if not size:
            coordinates[name] = np.zeros_like(here)
            continue
        after = whole // (
            int(before) * int(size)
        )  # the axis read as before x size x after; size is what the group spans
        coordinates[name] = here // (int(size) * after) * (int(size) * after) + here % after
    found: dict[tuple, list[int]] = {}
    for device, *key in zip(ids.tolist(), *coordinates.values(), strict=True):
        found.setdefault(tuple(map(int, key)), []).append(device)
    return tuple(map(tuple, found.values()))
