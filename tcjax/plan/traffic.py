"""Bytes that one device sends in a step, read off the program that the partitioner wrote.

Give `traffic` the text right after SPMD partitioning (`compile(compiler_options={"xla_dump_to": folder,
"xla_dump_hlo_pass_re": "spmd.*"})` writes it): later TPU passes cut a collective into fused steps, GPU and CPU passes
change its type. R bytes are the whole array (of an all-gather what comes out, of the others what goes in), n devices
exchange it, over k islands (slices, or hosts) of m = n / k devices each. The rings that lie in an island first:

                        inside an island (ICI)      between islands (DCN)
    all-gather          (m - 1) / m  R              (k - 1) / (k m)  R        each shard leaves its island k - 1 times
    reduce-scatter      (m - 1) / m  R              (k - 1) / (k m)  R
    all-reduce          2 (m - 1) / m  R            2 (k - 1) / (k m)  R      the two above, one after the other
    all-to-all          (m - 1) / n  R              (n - m) / n  R
    collective-permute  R from a device to another one of its island, R to one of another

With one island: (n - 1) / n R, the ring's optimum. Where devices differ, the busiest counts. An all-reduce of which
only this device's share is read counts as a reduce-scatter: the TPU and GPU compilers make one of it. The array of
every collective is taken as it lies in memory; the (small) latency of a ring's steps is not here.

What is in a loop counts once per turn (tcjax/plan/hlo.py says how turns are known), of a conditional the heaviest branch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tcjax.plan.groups import Groups, groups, pairs
from tcjax.plan.hlo import SAME, Array, Computation, Instruction, Module, branches, called, parse, turns

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_UNKNOWN = ("ragged-all-to-all", "collective-broadcast", "send", "recv")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array of one collective instruction.

    dtype, shape: of the whole array R. bytes: of R. ici_bytes, dcn_bytes: sent by one device, once. times: per step.
    group: devices that exchange it. islands: over how many it reaches. where: the operation it comes from.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    ici_bytes: int
    dcn_bytes: int
    times: int
    group: int
    islands: int
    where: str

    @property
    def spans_islands(self) -> bool:
        return self.islands > 1


class OpenLoop(NamedTuple):
    """A loop with collectives inside whose length is data. turns: it was counted with, the most its shapes allow."""

    where: str
    turns: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one device and step. unknown_loops: counted at their longest, so that the bytes are an upper bound."""

    ici_bytes: int
    dcn_bytes: int
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[OpenLoop, ...] = ()

    def of(self, kind: str, dtype: str | None = None) -> int:
        """Bytes of whole arrays that collectives of a kind (and type) hand over in a step: what was gathered, say."""
        return sum(c.bytes * c.times for c in self.collectives if c.kind == kind and dtype in (None, c.dtype))

    def heaviest(self, most: int = 10) -> list[Collective]:
        return sorted(self.collectives, key=lambda c: -c.times * (c.ici_bytes + c.dcn_bytes))[:most]


def traffic(hlo: str, island_of: Sequence[int]) -> Traffic:
    """Count the collectives of a module.

    Args:
        hlo: text of the module, best right after SPMD partitioning.
        island_of: slice (or host) of every partition, in the order of the mesh's devices (`mesh.devices.flat`).
    """
    module = parse(hlo)
    if len(island_of) != module.partitions:
        raise ValueError(f"island_of names {len(island_of)} devices, the program runs on {module.partitions}.")
    found, loops = _walk(module, module.computations[module.entry], 1, tuple(island_of))
    ici, dcn = _sent(found)
    return Traffic(ici, dcn, tuple(found), tuple(loops))


def _sent(found: list[Collective]) -> tuple[int, int]:
    return sum(c.ici_bytes * c.times for c in found), sum(c.dcn_bytes * c.times for c in found)


def _walk(
    module: Module, computation: Computation, times: int, island_of: tuple[int, ...]
) -> tuple[list[Collective], list[OpenLoop]]:
    """What a computation sends when it runs `times` times, what it calls included."""
    found: list[Collective] = []
    loops: list[OpenLoop] = []

    def visit(name: str, times: int) -> None:
        there, open_there = _walk(module, module.computations[name], times, island_of)
        found.extend(there)
        loops.extend(open_there)

    live = computation.live()
    for one in live.values():
        if one.opcode == "while":
            turn = turns(module, computation, one)
            before = len(found)
            visit(one.attribute("body") or "", times * turn.count)
            if not turn.known and len(found) > before:
                loops.append(OpenLoop(one.where, turn.count))
        elif one.opcode == "conditional":
            each = [_walk(module, module.computations[name], times, island_of) for name in branches(one)]
            heaviest = max(each, key=lambda branch: sum(_sent(branch[0])))
            found.extend(heaviest[0])
            loops.extend(heaviest[1])
        elif one.opcode.removesuffix("-start") in _KINDS:
            found.extend(_collectives(module, computation, live, one, times, island_of))
        elif one.opcode.removesuffix("-start") in _UNKNOWN:
            raise ValueError(
                f"{one.opcode} {one.name} cannot be counted; give the text of the module right after SPMD partitioning "
                "(xla_dump_hlo_pass_re='spmd.*'), in which transfers are still collectives."
            )
        for name in called(one):
            visit(name, times)
    return found, loops


def _collectives(
    module: Module,
    computation: Computation,
    live: dict[str, Instruction],
    one: Instruction,
    times: int,
    island_of: tuple[int, ...],
) -> Iterator[Collective]:
    kind = one.opcode.removesuffix("-start")
    arrays = computation.arrays(one)
    if kind == "collective-permute":
        ici, dcn = _edges(pairs(one.after), island_of)
        array = arrays[0]
        size, spans = array.num_bytes, 2 if dcn else 1
        if ici or dcn:
            yield Collective(kind, *array, size, size * ici, size * dcn, times, 2, spans, one.where)
        return
    together = _groups(one, kind, module.partitions)
    n = max(map(len, together))
    if n == 1:
        return
    if kind == "all-to-all" and len(arrays) > 1:  # one operand per receiver
        arrays = [Array(arrays[0].dtype, (len(arrays), *arrays[0].shape))]
    for array in arrays:
        kept = kind
        if kind == "all-reduce" and len(arrays) == 1 and _shared_out(live, one, n):
            kept = "reduce-scatter"
        if kind == "all-gather":
            axis = one.sizes("dimensions")[0]
            grown = tuple(size * n if at == axis else size for at, size in enumerate(array.shape))
            array = array._replace(shape=grown)
        islands = max(len({island_of[device] for device in group}) for group in together)
        ici, dcn = _cost(kept, array.num_bytes, together, island_of)
        yield Collective(kept, *array, array.num_bytes, ici, dcn, times, n, islands, one.where)


def _groups(one: Instruction, kind: str, partitions: int) -> Groups:
    """Without global ids the numbers are replicas; there is one, so that all partitions, or none, take part."""
    if kind != "all-to-all" and "use_global_device_ids=true" not in one.after:
        everyone = tuple(range(partitions))
        return (everyone,) if "channel_id=" in one.after else tuple((device,) for device in everyone)
    return groups(one.after, partitions)


def _shared_out(live: dict[str, Instruction], one: Instruction, n: int) -> bool:
    """Whether every reader, behind copies and reshapes, takes one n-th of it."""
    readers = [other for other in live.values() if one.name in other.operands]
    size = math.prod(one.result[0].shape)

    def shares(reader: Instruction) -> bool:
        if reader.opcode in SAME:
            return _shared_out(live, reader, n)
        return reader.opcode == "dynamic-slice" and math.prod(reader.result[0].shape) * n == size

    return bool(readers) and all(map(shares, readers))


def _edges(sent: tuple[tuple[int, int], ...], island_of: tuple[int, ...]) -> tuple[int, int]:
    """Whether some device sends inside its island, and whether one sends out of it."""
    moved = [island_of[start] == island_of[end] for start, end in sent if start != end]
    return int(any(moved)), int(not all(moved))


def _cost(kind: str, whole: int, together: Groups, island_of: tuple[int, ...]) -> tuple[int, int]:
    """(ICI, DCN) bytes of the busiest device; the table at the top."""
    ici, dcn = 0, 0
    for group in {tuple(sorted(_islands(group, island_of))) for group in together}:
        n, k, most, least = sum(group), len(group), max(group), min(group)
        if kind == "all-to-all":
            inside, out = (most - 1) * whole / n, (n - least) * whole / n
        else:
            twice = 2 if kind == "all-reduce" else 1
            inside, out = twice * (most - 1) * whole / most, twice * (k - 1) * whole / (k * least)
        ici, dcn = max(ici, math.ceil(inside)), max(dcn, math.ceil(out))
    return ici, dcn


def _islands(group: tuple[int, ...], island_of: tuple[int, ...]) -> list[int]:
    """How many of a group's devices lie on each island that it reaches."""
    where = [island_of[device] for device in group]
    return [where.count(island) for island in set(where)]
