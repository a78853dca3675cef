"""What accelerators can do, from public pages: per device, as JAX counts devices.

    peak     bf16, dense (no sparsity)
    hbm      bytes that a program can have; rate of reading and writing them
    ici      bytes per second that leave a device over all its links inside a slice (TPU) or a host (GPU), one way
    dcn      bytes per second that leave it to other slices or hosts

Sources, per chip
    [cloud]  docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x: peaks 275, 197, 459, 918, 2307 TFLOP/s; HBM 1200,
             819, 2765, 1638, 7380 GB/s; chips of a pod 4096, 256, 8960, 256, 9216; four chips to a virtual machine of a
             multi-host slice; data centre network of v5p, v6e, tpu7x 50, 100, 100 Gb/s, of a v5e host of 8 chips 200 Gb/s.
    [book]   jax-ml.github.io/scaling-book, "How to think about TPUs" and "GPUs": ICI 4.5e10 B/s one way per link on v4 and
             v5e, 9e10 on v5p, v6e and tpu7x, as measured (the vendor's pages: 5e10 and 1e11); DCN 6.25e9 B/s per TPU, 3.125e9
             on v5e, 1.25e10 on v6e and tpu7x; 4 links on the flat tori (v5e, v6e), 6 on the others.
    [libtpu] what the compiler of libtpu 0.0.42 calls available: 30.75 (v4, megacore), 15.75, 95.74, 31.25, 94.75 GiB.
    [nvidia] data sheets of H100 SXM and H200 SXM: 1979 TFLOP/s with sparsity, so 989 without; 3.35 and 4.8 TB/s; NVLink 900
             GB/s both ways, so 450 one way; DGX: 8 GPUs and 8 x 400 Gb/s. nvidia-smi shows 81,559 and 143,771 MiB.

Derived: TPU ici is links times the one-way rate; a tpu7x chip is two devices, each with half of everything; of a GPU's
memory JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise (docs.jax.dev, "GPU memory allocation").
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB, _MIB = 2**30, 2**20
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes by itself


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator; numbers are per device.

    device_kind: as JAX prints it. devices_per_chip: what JAX calls a device may be half a chip. flops: bf16 FLOP/s.
    hbm_bytes, hbm_rate, ici_rate, dcn_rate: above. axes: of the network inside a slice; a GPU host has a switch (0).
    pod: most chips of one slice; of GPUs, of one host.
    """

    name: str
    platform: str
    device_kind: str
    devices_per_chip: int = 1
    flops: float
    hbm_bytes: int
    hbm_rate: float
    ici_rate: float
    dcn_rate: float
    chips_per_host: int
    axes: int = 0
    pod: int

    @property
    def links(self) -> int:
        """Neighbours of a chip in the middle of a slice."""
        return 2 * self.axes


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            platform="tpu",
            device_kind="TPU v4",
            flops=275e12,
            hbm_bytes=int(30.75 * _GIB),
            hbm_rate=1.2e12,
            ici_rate=6 * 4.5e10,
            dcn_rate=6.25e9,
            chips_per_host=4,
            axes=3,
            pod=4096,
        ),
        Chip(
            name="v5e",
            platform="tpu",
            device_kind="TPU v5 lite",
            flops=197e12,
            hbm_bytes=int(15.75 * _GIB),
            hbm_rate=8.19e11,
            ici_rate=4 * 4.5e10,
            dcn_rate=3.125e9,
            chips_per_host=4,
            axes=2,
            pod=256,
        ),
        Chip(
            name="v5p",
            platform="tpu",
            device_kind="TPU v5",
            flops=459e12,
            hbm_bytes=int(95.74 * _GIB),
            hbm_rate=2.765e12,
            ici_rate=6 * 9e10,
            dcn_rate=6.25e9,
            chips_per_host=4,
            axes=3,
            pod=8960,
        ),
        Chip(
            name="v6e",
            platform="tpu",
            device_kind="TPU v6 lite",
            flops=918e12,
            hbm_bytes=int(31.25 * _GIB),
            hbm_rate=1.638e12,
            ici_rate=4 * 9e10,
            dcn_rate=1.25e10,
            chips_per_host=4,
            axes=2,
            pod=256,
        ),
        Chip(
            name="tpu7x",
            platform="tpu",
            device_kind="TPU7x",
            devices_per_chip=2,
            flops=2307e12 / 2,
            hbm_bytes=int(94.75 * _GIB),
            hbm_rate=7.38e12 / 2,
            ici_rate=6 * 9e10 / 2,
            dcn_rate=1.25e10 / 2,
            chips_per_host=4,
            axes=3,
            pod=9216,
        ),
        Chip(
            name="h100",
            platform="cuda",
            device_kind="NVIDIA H100 80GB HBM3",
            flops=989e12,
            hbm_bytes=int(GPU_SHARE * 81_559 * _MIB),
            hbm_rate=3.35e12,
            ici_rate=4.5e11,
            dcn_rate=5e10,
            chips_per_host=8,
            pod=8,
        ),
        Chip(
            name="h200",
            platform="cuda",
            device_kind="NVIDIA H200",
            flops=989e12,
            hbm_bytes=int(GPU_SHARE * 143_771 * _MIB),
            hbm_rate=4.8e12,
            ici_rate=4.5e11,
            dcn_rate=5e10,
            chips_per_host=8,
            pod=8,
        ),
    )
}
