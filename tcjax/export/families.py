"""Which compressors have a PyTorch twin, and its source.

A family is one file in tcjax/compressors and its twin of the same name in tcjax/export/torch. A compressor made of others
(`parts` in its description) gets their twins' sources in its own file, each in a function of its family's name.
"""

from __future__ import annotations

import textwrap
from importlib import resources
from typing import Any

from flax import nnx

from tcjax.compressors.base import CompressorConfig, Widths

TWINS = resources.files("tcjax.export.torch")


def twins() -> list[str]:
    """Every family that can be exported."""
    named = (path.name.removesuffix(".py") for path in TWINS.iterdir() if path.name.endswith(".py"))
    return sorted(name for name in named if name not in ("__init__", "verify"))


def has_twin(config: Any) -> bool:
    """Whether this compressor can be exported."""
    return isinstance(config, CompressorConfig) and config.family in twins()


def describe(config: CompressorConfig, widths: Widths) -> dict[str, Any]:
    """The description of a compressor that has a twin; ValueError if it has none."""
    if not has_twin(config):
        raise ValueError(
            f"{type(config).__module__}.{type(config).__qualname__} has no PyTorch twin; these have one: {twins()}. "
            f"A new one needs tcjax/export/torch/<family>.py."
        )
    return config.describe(widths)


def twin_source(facts: dict) -> str:
    """The PyTorch file of this description, whole."""
    inner = sorted({family for part in facts.get("parts", []) for family in _families(part)})
    sources = [(TWINS / f"{facts['family']}.py").read_text()]
    for family in inner:
        body = textwrap.indent((TWINS / f"{family}.py").read_text(), "    ", lambda line: line.strip() != "")
        sources.append(f"def {family}():\n{body}\n    return Compressor\n")
    return "\n\n".join(sources)


def abstract(config: CompressorConfig, widths: Widths) -> Any:
    """The module without its numbers: shapes, and what its layers say of themselves."""
    return nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))


def _families(facts: dict) -> set[str]:
    return {facts["family"]}.union(*(_families(part) for part in facts.get("parts", [])))
