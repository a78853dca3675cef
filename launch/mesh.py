"""Whether the mesh a command asks for is the machine it gets: --mesh.data, --mesh.fsdp and --mesh.tensor against devices.

The flags alone are read. What they leave open the config decides, and the training itself refuses a mesh of another size;
so that several slices are not paid for in vain, they are asked for in words: --mesh.data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from launch.job import LaunchError

AXES = ("data", "fsdp", "tensor")


def asked(command: Sequence[str]) -> dict[str, int]:
    """{axis: size} of the --mesh flags in a command; what is absent, the config decides."""
    found = {}
    for place, word in enumerate(command):
        name, equals, value = word.partition("=")
        axis = name.removeprefix("--mesh.")
        if not name.startswith("--mesh.") or axis not in AXES:
            continue
        value = value if equals else "".join(command[place + 1 : place + 2])
        if not re.fullmatch(r"-1|[1-9]\d*", value):
            raise LaunchError(f"{name} {value!r}: a mesh axis takes a whole number from 1 up, or -1 for what is left.")
        found[axis] = int(value)
    return found


def faults(command: Sequence[str], devices: int, replicas: int = 1) -> Iterator[str]:
    """Whether the --mesh flags of a command use all devices, with whole copies of `data` on every slice."""
    wanted = asked(command)
    sizes = {axis: size for axis, size in wanted.items() if size != -1}
    said, used = " ".join(f"--mesh.{axis} {size}" for axis, size in wanted.items()), math.prod(sizes.values())
    closed = len(sizes) == len(AXES)
    if (used != devices) if closed else devices % used:
        wants = f"is a mesh of {used}" if closed else f"does not divide the {devices}"
        yield f"{said} {wants}, but the job has {devices} devices: change the mesh or the accelerator"
    elif replicas > 1 and "data" not in wanted and "train" in command:  # a study has no such flags
        yield f"data goes across the {replicas} slices, and the command leaves it to the config: say --mesh.data {replicas}"
    elif (data := sizes.get("data", devices // used if len(sizes) == 2 else 0)) % replicas:
        yield f"{said}: data is {data}, which {replicas} slices cannot share evenly; make it a multiple of {replicas}"
