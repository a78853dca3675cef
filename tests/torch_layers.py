"""Plain torch for our leaves: what a parity test writes its formulas with, and published weights into both frameworks."""

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.nn import functional

from tcjax.compressors.base import Compressed, CompressorConfig, Context, Widths
from tcjax.export import families
from tcjax.interop import names
from tests.planted import leaves

Values = dict[str, np.ndarray]


def section(golden: Values, prefix: str) -> Values:
    """The arrays whose keys begin so, without the beginning."""
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def loaded(config: CompressorConfig, widths: Widths, weights: Values) -> nnx.Module:
    """The module with a published state dict in it: every tensor of it is used."""
    module = nnx.eval_shape(lambda: config.build(widths, nnx.Rngs(0)))
    names.assign(module, names.from_torch(weights, config.names(widths), names.shapes(module)))
    return module


def twin(room: ModuleType, config: CompressorConfig, widths: Widths, weights: Values) -> torch.nn.Module:
    """The PyTorch twin in `room` with a published state dict in it, loaded strictly."""
    found = room.Compressor(families.describe(config, widths))
    found.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=True)
    return found.eval()


def values(module: nnx.Module) -> Values:
    return {path: np.array(leaf.get_value()) for path, leaf in leaves(module).items()}


@partial(jax.jit, static_argnames="graphdef")
def _compress(graphdef, state, x_BNC, context):
    return nnx.merge(graphdef, state)(x_BNC, context._replace(assign=True))


def compress(module: nnx.Module, x_BNC: np.ndarray, **told: np.ndarray | None) -> Compressed:
    """Compiled, with the assignment; `told` are fields of the context."""
    context = Context(**{name: jnp.asarray(value) for name, value in told.items() if value is not None})
    return _compress(*nnx.split(module), x_BNC, context)


def off(found, expected) -> float:
    """The largest difference, as a share of the largest expected value; both have the same shape."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def kernel(value: Values, name: str) -> torch.Tensor:
    return torch.from_numpy(value[f"{name}/kernel"].T.copy())


def conv_kernel(value: Values, name: str) -> torch.Tensor:
    return torch.from_numpy(value[f"{name}/kernel"].transpose(3, 2, 0, 1).copy())


def line(value: Values, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = value.get(f"{name}/bias")
    return functional.linear(x, kernel(value, name), None if bias is None else torch.from_numpy(bias))


def normed(value: Values, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    scale, bias = (torch.from_numpy(value[f"{name}/{part}"]) for part in ("scale", "bias"))
    return functional.layer_norm(x, x.shape[-1:], scale, bias, eps=eps)


def two(value: Values, name: str, x: torch.Tensor) -> torch.Tensor:
    """linear, exact GELU, linear"""
    return line(value, f"{name}/linears/1", functional.gelu(line(value, f"{name}/linears/0", x)))


def attention(value: Values, heads: int) -> torch.nn.MultiheadAttention:
    module = torch.nn.MultiheadAttention(value["attention/out_proj/bias"].size, heads, batch_first=True)
    module.load_state_dict(
        {
            "in_proj_weight": kernel(value, "attention/in_proj"),
            "in_proj_bias": torch.from_numpy(value["attention/in_proj/bias"]),
            "out_proj.weight": kernel(value, "attention/out_proj"),
            "out_proj.bias": torch.from_numpy(value["attention/out_proj/bias"]),
        }
    )
    return module


def ragged(grid_HW: tuple[int, int]) -> np.ndarray:
    """Four images: whole, padded right and below, with holes, with one valid token."""
    H, W = grid_HW
    valid_BHW = np.ones((4, H, W), bool)
    valid_BHW[1, :, W - 4 :] = valid_BHW[1, H - 3 :] = False
    valid_BHW[2] = np.random.RandomState(0).random_sample((H, W)) < 0.4
    valid_BHW[3] = False
    valid_BHW[3, H // 2, W // 2] = True
    return valid_BHW.reshape(4, -1)
