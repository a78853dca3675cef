"""How long a step would take: a prediction, from four quotients of which the largest wins (the roofline).

    compute    executed FLOPs / (efficiency * peak FLOP/s)         HBM    bytes / rate
    ICI, DCN   bytes that one device sends / its rate              step = the longest, as if the others hid behind it

efficiency is 0.5: what published trainings of dense LLMs reach of the bfloat16 peak. MaxText on v6e-256, Llama-3.1-8B
45 %, 70B 50 %; on v5p-512, Llama-2-70B 65 %; on v5e-256, 16B 61 %, 128B 56 %; on 64 tpu7x, Llama-3.1-70B 52 %; JAX-Toolbox
on 8 H100, Llama-2-7B 50 %; H200, Llama-3.1-70B 51 % (their own pages, 2025 and 2026). None has a frozen LLM, and theirs
are useful FLOPs, ours executed ones. Memory and network are at their peak rates, so those three are the least it can
take. Nothing here has been measured on the hardware it speaks about.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from tcjax.plan.traffic import Traffic

EFFICIENCY = 0.5


class Rates(Protocol):
    """Of one device: peak bfloat16 FLOP/s; bytes/s of its memory, to its island's other devices, to other islands."""

    @property
    def flops(self) -> float: ...

    @property
    def hbm_rate(self) -> float: ...

    @property
    def ici_rate(self) -> float: ...

    @property
    def dcn_rate(self) -> float: ...


class Prediction(NamedTuple):
    """Seconds per step, each as if it were alone."""

    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float

    @property
    def step_seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """What the step waits for: compute, HBM, ICI or DCN."""
        return ("compute", "HBM", "ICI", "DCN")[self.index(max(self))]


def predict(
    flops_per_device: float,
    hbm_bytes_per_device: float,
    traffic: Traffic,
    chip: Rates,
    *,
    efficiency: float = EFFICIENCY,
) -> Prediction:
    """A step's four times.

    Args:
        flops_per_device: executed ones, `executed_flops` over the number of devices.
        hbm_bytes_per_device: `hbm_bytes`.
        efficiency: fraction of the peak that matrix multiplications reach.

    Returns:
        Seconds; 197e12 FLOPs on a v5e (197e12 a second) at half its peak take 2.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency={efficiency} is a fraction of the peak: above 0, at most 1.")
    return Prediction(
        flops_per_device / (efficiency * chip.flops),
        hbm_bytes_per_device / chip.hbm_rate,
        _over(traffic.ici_bytes, chip.ici_rate, "ici_rate"),
        _over(traffic.dcn_bytes, chip.dcn_rate, "dcn_rate"),
    )


def _over(sent: int, rate: float, name: str) -> float:
    if sent and not rate:
        raise ValueError(
            f"the step sends {sent:,} bytes over a network that this chip does not have: {name} is {rate}."
        )
    return sent / rate if sent else 0.0
