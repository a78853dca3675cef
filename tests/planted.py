"""Weights and inputs that nothing can change: drawn by numpy's frozen RandomState from the leaf's path and shape alone.

Initialisers, seeds, JAX and flax versions have no say, so a checksum over planted weights pins the arithmetic.
"""

import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Unit normal float32."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def leaves(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Every parameter by its "/"-joined path."""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def plant(module: nnx.Module) -> nnx.Module:
    """Replace every parameter in place: matrices ~ N(0, 1/fan_in), vectors ~ 0.1 N(0, 1), norm scales around 1."""
    for path, leaf in leaves(module).items():
        value = noise(*leaf.get_value().shape, seed=zlib.crc32(path.encode()))
        is_vector = len(leaf.get_metadata("axes").lstrip("L")) == 1
        value *= 0.1 if is_vector else value.shape[-2] ** -0.5
        leaf.set_value(jnp.asarray(value + path.endswith("scale"), jnp.float32))
    return module


def planted(config: Any, *widths: Any) -> nnx.Module:
    """What the config builds, planted. Of its own first weights only the shapes are computed: drawing them takes longer."""
    return plant(nnx.eval_shape(lambda: config.build(*widths, nnx.Rngs(0))))
