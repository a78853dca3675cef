"""What a TPU slice or a GPU node is called by whom: `v5e:16x16` here and in `tcjax plan`, and what clouds make of it.

    generation  on GKE                machine                chips a host  devices a chip  accelerator type
    v4          tpu-v4-podslice       ct4p-hightpu-4t        4             1               v4-{2 chips}
    v5e         tpu-v5-lite-podslice  ct5lp-hightpu-{n}t     4 (1 of 1x1)  1               v5litepod-{chips}
    v5p         tpu-v5p-slice         ct5p-hightpu-4t        4             1               v5p-{2 chips}
    v6e         tpu-v6e-slice         ct6e-standard-{n}t     4 (1 of 1x1)  1               v6e-{chips}
    tpu7x       tpu7x                 tpu7x-standard-{n}t    4 (1)         2               on GKE alone

Chips are the product of the topology, hosts are chips over chips a host, devices are what a mesh counts. v4, v5p and tpu7x
are 3-D: up to 2x4x4 a few fixed shapes, from 4x4x4 on every side a multiple of 4, in rising order (v4: any order). A GPU
target is `h100:HOSTSxGPUS`, or `h100:GPUS` for one host.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from launch.job import LaunchError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation of TPU.

    selector: GKE's label gke-tpu-accelerator. machine: GKE's machine type; {n} is chips a host. type_name, cores: the
    accelerator type of queued resources is type_name-{cores * chips}; empty where GKE alone has it. runtime: its image.
    devices: jax devices of a chip. topologies: all of a 2-D generation, the smallest of a 3-D one, which goes on by fours up
    to `largest` chips.
    """

    selector: str
    machine: str
    type_name: str = ""
    cores: int = 1
    runtime: str = ""
    devices: int = 1
    topologies: tuple[str, ...]
    largest: int


GENERATIONS = {
    "v4": Generation(
        selector="tpu-v4-podslice",
        machine="ct4p-hightpu-{n}t",
        type_name="v4",
        cores=2,
        runtime="tpu-ubuntu2204-base",
        topologies=_CUBES,
        largest=4096,
    ),
    "v5e": Generation(
        selector="tpu-v5-lite-podslice",
        machine="ct5lp-hightpu-{n}t",
        type_name="v5litepod",
        runtime="v2-alpha-tpuv5-lite",
        topologies=_FLAT,
        largest=256,
    ),
    "v5p": Generation(
        selector="tpu-v5p-slice",
        machine="ct5p-hightpu-{n}t",
        type_name="v5p",
        cores=2,
        runtime="v2-alpha-tpuv5",
        topologies=_CUBES,
        largest=8960,
    ),
    "v6e": Generation(
        selector="tpu-v6e-slice",
        machine="ct6e-standard-{n}t",
        type_name="v6e",
        runtime="v2-alpha-tpuv6e",
        topologies=_FLAT,
        largest=256,
    ),
    "tpu7x": Generation(
        selector="tpu7x",
        machine="tpu7x-standard-{n}t",
        devices=2,
        topologies=("1x1x1", *_CUBES),
        largest=9216,
    ),
}

GPUS = {  # label gke-accelerator, SkyPilot's name, GPUs of the largest host
    "a100": ("nvidia-tesla-a100", "A100", 16),
    "a100-80gb": ("nvidia-a100-80gb", "A100-80GB", 8),
    "h100": ("nvidia-h100-80gb", "H100", 8),
    "h100-mega": ("nvidia-h100-mega-80gb", "H100-MEGA", 8),
    "h200": ("nvidia-h200-141gb", "H200", 8),
    "b200": ("nvidia-b200", "B200", 8),
    "l4": ("nvidia-l4", "L4", 8),
}


@dataclass(frozen=True)
class Slice:
    """A TPU slice, `generation:topology`."""

    generation: str
    topology: str

    @property
    def facts(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        return product(self.topology)

    @property
    def chips_per_host(self) -> int:
        return min(4, self.chips)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """As a mesh counts: v5e:4x4 has 16, tpu7x:2x2x1 has 8."""
        return self.chips * self.facts.devices

    @property
    def machine(self) -> str:
        return self.facts.machine.format(n=self.chips_per_host)

    @property
    def accelerator_type(self) -> str:
        """As queued resources name it: v5e:4x4 is v5litepod-16, v5p:2x2x1 is v5p-8."""
        if not self.facts.type_name:
            raise LaunchError(
                f"{self.generation} is had on GKE alone, not as queued resources: use the route gke_jobset."
            )
        return f"{self.facts.type_name}-{self.chips * self.facts.cores}"

    @property
    def usual(self) -> bool:
        """Whether the accelerator type alone says this topology: the type gives the shape nearest to a cube."""
        return len(sides(self.topology)) == 2 or self.topology == _nearest_cube(self.chips)


@dataclass(frozen=True)
class Gpus:
    """Hosts of one kind of GPU, `kind:HOSTSxGPUS`."""

    kind: str
    hosts: int
    per_host: int

    @property
    def selector(self) -> str:
        return GPUS[self.kind][0]

    @property
    def sky_name(self) -> str:
        return GPUS[self.kind][1]

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host


def parse(text: str) -> Slice | Gpus:
    """`v5e:16x16`, `v5p:4x4x4`, `h100:8`, `h100:2x8`; anything else is refused with what is known."""
    kind, colon, shape = text.partition(":")
    if kind in GENERATIONS and colon:
        return tpu(kind, shape)
    if kind in GPUS and colon:
        return _gpus(kind, shape)
    raise LaunchError(
        f"accelerator {text!r} is not known: write GENERATION:TOPOLOGY as in v5e:4x4 ({', '.join(GENERATIONS)}) "
        f"or KIND:HOSTSxGPUS as in h100:2x8 ({', '.join(GPUS)})."
    )


def tpu(generation: str, topology: str) -> Slice:
    facts = GENERATIONS[generation]
    if topology in facts.topologies or _goes_on(generation, topology):
        return Slice(generation, topology)
    beyond = ""
    if len(sides(facts.topologies[0])) == 3:
        order = "" if generation == "v4" else ", in rising order"
        beyond = f", or sides that are multiples of 4{order}, up to {facts.largest} chips (4x4x8, 8x8x8)"
    raise LaunchError(
        f"accelerator {generation}:{topology} is no slice of {generation}; it has {', '.join(facts.topologies)}{beyond}."
    )


def sides(topology: str) -> tuple[int, ...]:
    """4x4x8 as numbers; () for what is no topology."""
    return tuple(map(int, topology.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology) else ()


def product(topology: str) -> int:
    return math.prod(sides(topology))


def _goes_on(generation: str, topology: str) -> bool:
    facts, shape = GENERATIONS[generation], sides(topology)
    if len(shape) != 3 or len(sides(facts.topologies[0])) != 3 or any(side % 4 for side in shape):
        return False
    return math.prod(shape) <= facts.largest and (generation == "v4" or list(shape) == sorted(shape))


def _nearest_cube(chips: int) -> str:
    small = {product(shape): shape for shape in _CUBES}
    if chips in small:
        return small[chips]
    cubes = chips // 64
    pairs = [(a, b, cubes // a // b) for a in range(1, cubes + 1) for b in range(a, cubes + 1) if cubes % (a * b) == 0]
    best = min((each for each in pairs if each[2] >= each[1]), key=lambda each: each[2] - each[0])
    return "x".join(str(4 * side) for side in best)


def _gpus(kind: str, shape: str) -> Gpus:
    words, most = shape.split("x"), GPUS[kind][2]
    if not all(re.fullmatch(r"[1-9]\d*", word) for word in words) or len(words) > 2:
        raise LaunchError(f"accelerator {kind}:{shape}: write {kind}:HOSTSxGPUS, as in {kind}:8 or {kind}:2x8.")
    hosts, gpus = (1, int(words[0])) if len(words) == 1 else (int(words[0]), int(words[1]))
    if gpus > most:
        raise LaunchError(
            f"accelerator {kind}:{shape}: a host has at most {most} GPUs of that kind; write {kind}:HOSTSx{most} for more."
        )
    return Gpus(kind, hosts, gpus)
