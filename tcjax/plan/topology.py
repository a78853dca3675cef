"""Machines by name, and their devices without owning one.

    v5e:16x16, v6e:4x4           TPU, flat torus: chips in x, y          v4:4x4x4, v5p:4x4x8, tpu7x:2x2x2      in x, y, z
    h100:8, h200:8               GPUs of one host                        h100:2x8                              hosts x GPUs

Several TPU slices of one shape are joined by the data centre's network (`slices`), hosts of GPUs likewise. Devices come from
libtpu or from JAX's CUDA plugin, which compile for what they are told and touch no hardware.

An axis of a TPU slice closes to a ring where the machine has the links: 16 chips on v5e and v6e, and on v4, v5p and tpu7x
every axis of a slice of whole cubes of 4x4x4 (so does maxtext's table of accelerators). A chip at the edge of an open axis has
one neighbour there instead of two, and collectives wait for it: `chip.ici_rate` counts the links of that chip.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from tcjax.plan.chips import CHIPS, GPU_SHARE, Chip

FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
CUBIC = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16"
HOSTS = "1 2 4 8 2x8 4x8 16x8"
EXAMPLES = {name: HOSTS if not chip.axes else FLAT if chip.axes == 2 else CUBIC for name, chip in CHIPS.items()}

# What a planning process tells libtpu: no metadata server, no machine of its own, and no lock, which guards chips that
# nobody here opens. Host name and type are asked for and not used; without them it complains on stderr.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclass(frozen=True)
class Topology:
    """name: as asked for. chip: its rates and memory here. shape: chips, or hosts and GPUs. slices: TPU slices."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @property
    def islands(self) -> int:
        """Slices or hosts, between which the data centre's network is the only way."""
        return self.slices if self.chip.axes else self.shape[0]

    def devices(self) -> list[Any]:
        """JAX's devices, to compile for. ValueError if the compiler is missing, or of another version than JAX's."""
        require(self.chip)
        from jax.experimental import topologies

        with _made(self):
            if self.chip.axes:
                return topologies.get_topology_desc(self.name, "tpu", **_tpu(self)).devices
            from tcjax.plan.gpu import target

            hosts, gpus = self.shape
            return topologies.get_topology_desc(
                "", "cuda", target_config=target(self.chip), topology=f"1x{hosts}x{gpus}"
            ).devices


def topology(name: str, slices: int = 1) -> Topology:
    """The machine that "v5e:16x16" names. ValueError lists the known ones, or says which sizes there are."""
    kind, _, text = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        known = "; ".join(f"{chip}:{sizes.split()[0]} … {chip}:{sizes.split()[-1]}" for chip, sizes in EXAMPLES.items())
        raise ValueError(f"topology {name!r} is unknown; a chip and its sizes: {known}.")
    chip, shape = CHIPS[kind], tuple(map(int, text.split("x")))
    if not chip.axes and len(shape) == 1:
        shape = (1, *shape)
    fault = _fault(chip, shape)
    if fault:
        raise ValueError(f"topology {name!r}: {fault}; for instance {', '.join(EXAMPLES[kind].split())}.")
    if slices < 1 or (slices > 1 and not chip.axes):
        raise ValueError(f"slices={slices}: from 1 up, and more than 1 of TPUs only; GPUs say {kind}:HOSTSx8.")
    return Topology(name, _here(chip, shape), shape, slices)


def island_of(devices: Any) -> list[int]:
    """Of every device its slice (TPU) or host (GPU)."""
    return [(getattr(d, "slice_index", None) or 0) if d.platform == "tpu" else d.process_index for d in devices]


def require(chip: Chip) -> None:
    """ValueError, with what to install, unless the compiler for this chip is here in the version that JAX is made for."""
    jax = metadata.version("jax")
    if chip.axes:
        wanted = _asked_for("libtpu")
        found = _version("libtpu")
        if found is None:
            raise ValueError(
                f"{chip.name} is compiled for by libtpu, which is not installed; jax {jax} wants libtpu {wanted}: "
                "pip install 'tcjax[tpu]'."
            )
        if wanted and not _matches(found, wanted):
            raise ValueError(
                f"libtpu {found} is installed, jax {jax} is made for libtpu {wanted}: pip install 'tcjax[tpu]'."
            )
        return
    found = {name: _version(name) for name in ("jax-cuda13-plugin", "jax-cuda12-plugin")}
    have = [f"{name} {version}" for name, version in found.items() if version]
    if not have:
        raise ValueError(
            f"{chip.name} is compiled for by JAX's CUDA plugin, which is not installed (no GPU or CUDA is needed); "
            f"jax {jax} wants jax-cuda13-plugin {jax}: pip install 'tcjax[gpu-plan]'."
        )
    if jax not in found.values():
        raise ValueError(
            f"{' and '.join(have)} is installed, jax {jax} wants its own version: pip install 'tcjax[gpu-plan]'."
        )


def compiler(chip: Chip) -> str:
    """Name and version of what compiles for it, for fingerprints; "" where nothing does."""
    names = ("libtpu",) if chip.axes else ("jax-cuda13-plugin", "jax-cuda12-plugin")
    return next((f"{name} {version}" for name in names if (version := _version(name))), "")


def _fault(chip: Chip, shape: tuple[int, ...]) -> str:
    if not chip.axes:
        if len(shape) != 2 or shape[1] > chip.chips_per_host or (shape[0] > 1 and shape[1] != chip.chips_per_host):
            return f"GPUs of one host (at most {chip.chips_per_host}), or HOSTSx{chip.chips_per_host}"
        return ""
    if len(shape) != chip.axes:
        return f"a slice of {chip.name} has {chip.axes} sizes"
    alone = math.prod(shape) == 1 and chip.name not in ("v4", "v5p")
    if not alone and (shape[0] % 2 or shape[1] % 2):
        return "the first two sizes are even, since a host has 2x2 chips"
    if math.prod(shape) > chip.pod:
        return f"a slice has at most the {chip.pod} chips of a pod; --slices joins several"
    return ""


def _rings(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Which axes close."""
    if chip.axes == 2:
        return tuple(size == 16 for size in shape)
    return (all(size % 4 == 0 for size in shape),) * 3


def _here(chip: Chip, shape: tuple[int, ...]) -> Chip:
    """The chip with what a device of this machine has of memory and links."""
    if not chip.axes:
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_SHARE))
        return replace(chip, hbm_bytes=int(chip.hbm_bytes / GPU_SHARE * share))
    if math.prod(shape) == 1:
        return chip
    links = sum(2 if ring else int(size > 1) for size, ring in zip(shape, _rings(chip, shape), strict=True))
    return replace(chip, ici_rate=chip.ici_rate * links / chip.links)


def _tpu(asked: Topology) -> dict[str, Any]:
    options: dict[str, Any] = {"num_slices": asked.slices}
    options["wrap"] = tuple((*_rings(asked.chip, asked.shape), False)[:3])
    options["chips_per_host_bounds"] = (1, 1, 1) if math.prod(asked.shape) == 1 else (2, 2, 1)
    if asked.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # else a chip is two devices, which jax.make_mesh cannot lay out
    return options


@contextmanager
def _made(asked: Topology) -> Iterator[None]:
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"{compiler(asked.chip)} has no {asked.name} x {asked.slices}: {said}") from error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _asked_for(package: str) -> str:
    """The version of a package that jax's own extras ask for, "0.0.42.*"; "" if they ask for none."""
    for line in metadata.requires("jax") or []:
        found = re.match(rf"{package}\s*\(?==\s*([\d.*]+)", line)
        if found:
            return found[1]
    return ""


def _matches(version: str, wanted: str) -> bool:
    return version == wanted or (wanted.endswith(".*") and version.startswith(wanted[:-1]))
