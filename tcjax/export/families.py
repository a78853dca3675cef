"""Which compressors can be exported: per family, what its semantics are in plain words and which leaf is which tensor.

A family is one file in tcjax/compressors, one twin of the same name in tcjax/export/torch, and one line in FAMILIES.
The description is the twin's config: everything the computation depends on, nothing that a library default decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from tcjax.compressors import avg_pool, mlp, pixel_shuffle, resampler
from tcjax.compressors.base import Widths
from tcjax.interop.names import Name

SCHEMA = 1


class Family(NamedTuple):
    """config: the compressor's dataclass. describe: its own facts. names: the table for a description."""

    config: type
    describe: Callable[[Any, Widths], dict]
    names: Callable[[dict], list[Name]]


def family_of(config: Any) -> str:
    """The family's name, which is also its twin's; ValueError if it has none."""
    for name, family in FAMILIES.items():
        if isinstance(config, family.config):
            return name
    raise ValueError(
        f"{type(config).__module__}.{type(config).__qualname__} has no PyTorch twin; those of {list(FAMILIES)} have. "
        f"A new one needs tcjax/export/torch/<family>.py and a line in tcjax/export/families.py."
    )


def has_twin(config: Any) -> bool:
    """Whether this compressor can be exported."""
    return any(isinstance(config, family.config) for family in FAMILIES.values())


def describe(config: Any, widths: Widths) -> dict:
    """What compressor_config.json says. JSON types only."""
    name = family_of(config)
    facts = {
        "schema": SCHEMA,
        "family": name,
        "grid": list(widths.grid_HW),
        "token_order": "row by row",
        "vision_width": widths.vision_C,
        "llm_width": widths.llm_D,
        "num_queries": config.outputs(widths),
        "any_num_tokens": False,
    }
    return facts | FAMILIES[name].describe(config, widths)


def abstract(config: Any, widths: Widths) -> Any:
    """The module without its numbers: shapes, and what its layers say of themselves."""
    return nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))


def _mlp(config: mlp.Config, widths: Widths) -> dict:
    return {"depth": config.depth, "activation": "gelu"}


def _mlp_names(facts: dict) -> list[Name]:
    """LLaVA's mm_projector: an nn.Sequential whose even members are the linear layers."""
    return [line for k in range(facts["depth"]) for line in _linear(f"mlp/linears/{k}", str(2 * k))]


def _avg_pool(config: avg_pool.Config, widths: Widths) -> dict:
    return {"pooled": list(config.pooled(widths)), "order": "pool, then mlp", "depth": 2, "activation": "gelu"}


def _pixel_shuffle(config: pixel_shuffle.Config, widths: Widths) -> dict:
    facts = {"factor": config.factor(widths), "channel_order": "row, column, channel", "head": config.head}
    if config.head == "mlp":
        facts |= {"norm_eps": abstract(config, widths).norm.eps, "activation": "gelu"}
    return facts


def _pixel_shuffle_names(facts: dict) -> list[Name]:
    """Idefics3's connector or InternVL's mlp1."""
    if facts["head"] == "linear":
        return [Name("head/kernel", "modality_projection.proj.weight", "transpose")]
    return [*_norm("norm", "mlp1.0"), *_linear("head/linears/0", "mlp1.1"), *_linear("head/linears/1", "mlp1.3")]


def _resampler(config: resampler.Config, widths: Widths) -> dict:
    return {
        "any_num_tokens": True,
        "depth": config.depth,
        "heads": config.heads,
        "head_width": config.head_width,
        "feed_forward": config.ff_mult * widths.vision_C,
        "activation": "gelu",
        "norm_eps": abstract(config, widths).norm.eps,
        "attended_order": "image, latents",
        "kv_order": "keys, values",
    }


def _resampler_names(facts: dict) -> list[Name]:
    """OpenFlamingo's perceiver; out_proj is ours."""
    norms = {"norm_media": "0.norm_media", "norm_latents": "0.norm_latents", "norm_ff": "1.0"}
    kernels = {"to_q": "0.to_q", "to_kv": "0.to_kv", "to_out": "0.to_out", "ff_in": "1.1", "ff_out": "1.3"}
    return [
        Name("latents", "latents", "same"),
        *(line for ours, theirs in norms.items() for line in _norm(f"layers/{ours}", f"layers.{{L}}.{theirs}")),
        *(
            Name(f"layers/{ours}/kernel", f"layers.{{L}}.{theirs}.weight", "transpose")
            for ours, theirs in kernels.items()
        ),
        *_norm("norm", "norm"),
        *_linear("out_proj", "out_proj"),
    ]


def _linear(ours: str, theirs: str) -> list[Name]:
    return [Name(f"{ours}/kernel", f"{theirs}.weight", "transpose"), Name(f"{ours}/bias", f"{theirs}.bias", "same")]


def _norm(ours: str, theirs: str) -> list[Name]:
    return [Name(f"{ours}/scale", f"{theirs}.weight", "same"), Name(f"{ours}/bias", f"{theirs}.bias", "same")]


FAMILIES = {
    "mlp": Family(mlp.Config, _mlp, _mlp_names),
    "avg_pool": Family(avg_pool.Config, _avg_pool, _mlp_names),
    "pixel_shuffle": Family(pixel_shuffle.Config, _pixel_shuffle, _pixel_shuffle_names),
    "resampler": Family(resampler.Config, _resampler, _resampler_names),
}
