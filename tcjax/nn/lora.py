"""LoRA: a linear layer that stays as it is, and beside it an update of low rank that learns.

    y = x W + (alpha / U) (x A) B        A [in, U] uniform in +-1/sqrt(in),  B [U, out] zero:  a fresh one changes nothing

Source: Hu et al. 2021; initial values and scale are peft's. Departures: no dropout.
`attach` adds it to the layers of a finished model, so its first weights and the layers' own do not depend on one another;
`merged` is the same model without: W + (alpha / U) A B. Cost: 2 U (in + out) FLOPs per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.config import LoraConfig
from tcjax.nn.dense import Dense, rows
from tcjax.sharding import whole

PART = "lora"  # the name of what learns, in paths and in `TrainConfig.trainable`


class Lora(nnx.Module):
    """The update of one layer, or of a stack of layers (a leading L axis, as its kernel's)."""

    def __init__(self, layer: Dense, stack: tuple[int, ...], config: LoraConfig, *, rngs: nnx.Rngs):
        lead, (of_in, of_out) = "L" * len(stack), layer.axes
        bound, U = layer.in_features**-0.5, config.rank
        first = jax.random.uniform(rngs.params(), (*stack, layer.in_features, U), minval=-bound, maxval=bound)
        self.scale = config.alpha / U
        self.a = nnx.Param(first, axes=f"{lead}{of_in}U")
        self.b = nnx.Param(jnp.zeros((*stack, U, layer.out_features)), axes=f"{lead}U{of_out}")

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = (whole(leaf[...], leaf.get_metadata("axes").removeprefix("L")) for leaf in (self.a, self.b))
        return self.scale * rows(rows(x, a), b)


def attach(model: nnx.Module, stack: tuple[int, ...], config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Give every layer of `model` that `config.targets` names an update, in place.

    Args:
        model: whose linear layers have leaves with the leading axes `stack`, (layers,) for a decoder's blocks.

    Raises:
        ValueError: a target is no layer of the model.
    """
    layers = dict(linears(model))
    possible = sorted({path[-1] for path in layers})
    unknown = sorted(set(config.targets) - set(possible))
    if unknown or not config.targets:
        raise ValueError(f"lora.targets={config.targets} must name linear layers of the LLM, which are {possible}.")
    for path in sorted(layers):
        if path[-1] in config.targets:
            layers[path].lora = Lora(layers[path], stack, config, rngs=rngs)


def linears(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], Dense]]:
    """Every linear layer by its path."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Dense):
            yield tuple(map(str, path)), module


def is_lora(path: tuple[Any, ...]) -> bool:
    """Whether a leaf's path leads to an update and not to the model that it is attached to."""
    return PART in path


def merged(model: nnx.Module, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The leaves of `model` by their "/"-joined paths as a model without updates has them, every update added to its kernel.

    The sum is taken in float32 and has the kernel's type. Layers whose kernel is not among the leaves are left out.
    """
    plain = {path: leaf for path, leaf in leaves.items() if not is_lora(tuple(path.split("/")))}
    for names, layer in linears(model):
        path = "/".join(names)
        if layer.lora is None or f"{path}/kernel" not in leaves:
            continue
        kernel, a, b = (leaves[f"{path}/{leaf}"] for leaf in ("kernel", "lora/a", "lora/b"))
        update = layer.lora.scale * np.matmul(a.astype(np.float32), b.astype(np.float32))
        plain[f"{path}/kernel"] = (kernel.astype(np.float32) + update).astype(kernel.dtype)
    return plain
