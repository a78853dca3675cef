"""The text of an XLA module as computations of instructions, and how often its loops turn.

    %while.8 = (s32[], f32[4,16]{1,0}) while(%tuple.3), condition=%cond, body=%body
    condition: ROOT compare(element 0, 5), direction=LT    body: element 0 becomes element 0 + 1    start: 0    -> 5 turns

Right after SPMD partitioning, and always on TPU, a loop does not say its length (`known_trip_count` is put there by a
later pass of the GPU and CPU compilers), so the counter is followed from the condition to the body and to the start.
A loop whose limit is data (the chunked loss stops at the last supervised position) has no length. It is then taken to
walk the arrays that it slices by its counter once from end to end: the most turns its shapes allow. It is marked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAMED = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\]")
SAME = ("copy", "convert", "bitcast", "reshape", "opt-barrier")


class Array(NamedTuple):
    """dtype as XLA spells it (bf16, s8, pred) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        for size in self.shape:
            bits *= size
        return -(-bits // 8)


class Instruction(NamedTuple):
    """result: its arrays, a tuple's in order. operands: names. inside: what the parentheses hold. after: the attributes."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    after: str

    def attribute(self, name: str) -> str | None:
        """The computation, number or word behind `name=`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.after)
        return found[1] if found else None

    def sizes(self, name: str) -> tuple[int, ...]:
        """The numbers of `name={1,2}`."""
        found = re.search(rf"\b{name}=\{{([\d,\s]*)\}}", self.after)
        return _numbers(found[1]) if found else ()

    @property
    def where(self) -> str:
        """The operation of the program that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.after)
        return found[1] if found else self.name


class Computation(NamedTuple):
    """Instructions by name, in an order in which operands come first."""

    instructions: dict[str, Instruction]
    root: Instruction

    def arrays(self, instruction: Instruction) -> list[Array]:
        """Its operands, those that are arrays."""
        held = [self.instructions[name].result for name in instruction.operands if name in self.instructions]
        return [result[0] for result in held if len(result) == 1]

    def live(self) -> dict[str, Instruction]:
        """Without what nobody reads: the partitioner leaves some, which the next pass removes."""
        keep = [self.root.name]
        keep += [name for name, one in self.instructions.items() if one.opcode in ("custom-call", "outfeed", "send")]
        seen: set[str] = set()
        while keep:
            name = keep.pop()
            if name not in seen and name in self.instructions:
                seen.add(name)
                keep += self.instructions[name].operands
        return {name: one for name, one in self.instructions.items() if name in seen}


class Module(NamedTuple):
    """partitions: devices that run it together."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


class Turns(NamedTuple):
    """of a loop. known: False where it depends on data, and `count` is the most that the shapes allow."""

    count: int
    known: bool


def parse(text: str) -> Module:
    """The module of an HLO text, as `compiled.as_text()` or an XLA dump writes it. ValueError if it is none."""
    computations: dict[str, Computation] = {}
    entry, name, found, root = "", "", {}, None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not _NAMED.match(line):
            name, found, root = head[2], {}, None
            entry = name if head[1] else entry
        elif name and line.rstrip() == "}":  # a Pallas kernel's attributes have lines that begin with }},
            if root is None:
                raise ValueError(f"computation {name} of this HLO text has no ROOT.")
            computations[name], name = Computation(found, root), ""
        elif name and _NAMED.match(line):
            one = _instruction(line)
            found[one.name] = one
            root = one if line.lstrip().startswith("ROOT ") else root
    if not entry:
        raise ValueError("this is no HLO text: no computation is marked ENTRY.")
    header = text.split("\n", 1)[0]
    if re.search(r"replica_count=(?!1\b)\d+", header):
        raise ValueError("the module runs as several replicas; programs of jax.jit have one, of many partitions.")
    partitions = re.search(r"num_partitions=(\d+)", header)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def turns(module: Module, caller: Computation, loop: Instruction) -> Turns:
    """How often the body of `loop`, a while instruction of `caller`, runs."""
    said = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.after)
    if said:
        return Turns(int(said[1]), True)
    body = module.computations[_called(loop, "body")]
    steps = _steps(module, body)
    count = _counted(module, caller, loop, body, steps)
    if count is not None:
        return Turns(count, True)
    counters = {element for element, step in steps.items() if isinstance(step, int) and step}
    state = {name for name, one in body.instructions.items() if _element(body, one) in counters}
    return Turns(max(_walked(module, body, state), default=1), False)


def called(instruction: Instruction) -> list[str]:
    """Computations that run whenever it runs; of a loop and a choice between branches see `turns` and `branches`."""
    if instruction.opcode == "call":
        return [_called(instruction, "to_apply")]
    if instruction.opcode in ("fusion", "async-start"):
        return [_called(instruction, "calls")]
    return []


def branches(instruction: Instruction) -> list[str]:
    """Computations of which a conditional runs one."""
    several = re.search(r"branch_computations=\{([^}]*)\}", instruction.after)
    if several:
        return re.findall(r"[\w.\-]+", several[1])
    return [_called(instruction, "true_computation"), _called(instruction, "false_computation")]


def _called(instruction: Instruction, attribute: str) -> str:
    name = instruction.attribute(attribute)
    if name is None:
        raise ValueError(f"{instruction.opcode} {instruction.name} of this HLO text names no {attribute}.")
    return name


def _instruction(line: str) -> Instruction:
    named = _NAMED.match(line)
    assert named
    start = named.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opens = line.index("(", end)
    closes = _closing(line, opens)
    inside = line[opens + 1 : closes]
    result = tuple(Array(dtype, _numbers(shape)) for dtype, shape in _ARRAY.findall(line[start:end]))
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(named[2], line[end:opens].strip(), result, operands, inside, line[closes + 1 :])


def _closing(line: str, opens: int) -> int:
    """The parenthesis that closes the one at `opens`, strings skipped."""
    depth, quoted = 0, False
    for at in range(opens, len(line)):
        mark = line[at]
        if mark == '"' and line[at - 1] != "\\":
            quoted = not quoted
        elif not quoted and mark in "()":
            depth += 1 if mark == "(" else -1
            if not depth:
                return at
    raise ValueError(f"an instruction of this HLO text ends before its parentheses close: {line.strip()[:80]}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _counted(module: Module, caller: Computation, loop: Instruction, body: Computation, steps: dict) -> int | None:
    """Turns of a counter that starts, steps and stops at constants; None for anything else."""
    test = _value(module, module.computations[_called(loop, "condition")], None)
    if not (isinstance(test, tuple) and test[0] == "compare"):
        return None
    _, direction, counter, limit = test
    if not (isinstance(counter, tuple) and counter[0] == "element"):
        mirrored = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}
        direction, counter, limit = mirrored.get(direction), limit, counter
    if not (isinstance(counter, tuple) and counter[0] == "element"):
        return None
    if isinstance(limit, tuple) and limit[0] == "element" and steps.get(limit[1]) == 0:  # carried along, never changed
        limit = _start(module, caller, loop, limit[1])
    first, step = _start(module, caller, loop, counter[1]), steps.get(counter[1])
    if not (isinstance(first, int) and isinstance(limit, int) and isinstance(step, int) and step):
        return None
    ahead = (limit - first) * (1 if step > 0 else -1)
    if direction in ("LE", "GE"):
        ahead += 1
    rising = direction in ("LT", "LE") and step > 0
    falling = direction in ("GT", "GE") and step < 0
    if rising or falling or (direction == "NE" and ahead >= 0 and ahead % abs(step) == 0):
        return max(-(-ahead // abs(step)), 0)
    return None


def _steps(module: Module, body: Computation) -> dict[int, int | None]:
    """{element of the loop's state: what a turn adds to it}, None for what is no counter."""
    steps: dict[int, int | None] = {}
    for element, name in enumerate(body.root.operands):
        value = _value(module, body, body.instructions[name])
        if value == ("element", element):
            steps[element] = 0
        elif isinstance(value, tuple) and value[0] == "add" and ("element", element) in value:
            other = value[2] if value[1] == ("element", element) else value[1]
            steps[element] = other if isinstance(other, int) else None
        else:
            steps[element] = None
    return steps


def _start(module: Module, caller: Computation, loop: Instruction, element: int) -> Any:
    state = caller.instructions[loop.operands[0]]
    while state.opcode in SAME:
        state = caller.instructions[state.operands[0]]
    if state.opcode != "tuple":
        return None
    return _value(module, caller, caller.instructions[state.operands[element]])


def _value(module: Module, inside: Computation, one: Instruction | None, given: tuple = (("state",),)) -> Any:
    """An int, ("element", i) of the loop's state, ("add", a, b), ("compare", direction, a, b), or None: anything else."""
    one = inside.root if one is None else one
    several = [inside.instructions[name] for name in one.operands if name in inside.instructions]
    if one.opcode == "parameter":
        index = int(one.inside)
        return given[index] if index < len(given) else None
    if one.opcode == "constant":
        return int(one.inside) if re.fullmatch(r"-?\d+", one.inside) else None
    if one.opcode in SAME and several:
        return _value(module, inside, several[0], given)
    if one.opcode == "get-tuple-element" and _value(module, inside, several[0], given) == ("state",):
        return ("element", int(one.attribute("index") or 0))
    if one.opcode in ("add", "subtract", "compare"):
        left, right = (_value(module, inside, operand, given) for operand in several)
        if one.opcode == "compare":
            return ("compare", one.attribute("direction"), left, right)
        if one.opcode == "subtract":
            right = -right if isinstance(right, int) else None
        return left + right if isinstance(left, int) and isinstance(right, int) else ("add", left, right)
    if one.opcode in ("fusion", "call"):
        there = module.computations[called(one)[0]]
        return _value(module, there, None, tuple(_value(module, inside, operand, given) for operand in several))
    return None


def _element(body: Computation, one: Instruction) -> int | None:
    if one.opcode != "get-tuple-element" or body.instructions[one.operands[0]].opcode != "parameter":
        return None
    return int(one.attribute("index") or 0)


def _walked(module: Module, inside: Computation, moving: set[str]) -> Iterator[int]:
    """Turns that each slice at a moving place needs to reach the end of its array."""
    moving = set(moving)
    for name, one in inside.instructions.items():
        moves = [operand in moving for operand in one.operands]
        if not any(moves):
            continue
        moving.add(name)
        if one.opcode == "dynamic-slice":
            whole, part = inside.arrays(one)[0].shape, one.sizes("dynamic_slice_sizes")
            for size, taken, moved in zip(whole, part, moves[1:], strict=True):
                if moved and taken:
                    yield -(-size // taken)
        for there in called(one):
            parameters = module.computations[there].instructions.values()
            given = {p.name for p in parameters if p.opcode == "parameter" and moves[int(p.inside)]}
            yield from _walked(module, module.computations[there], given)
