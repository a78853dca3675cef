"""Golden cases of kakaobrain/honeybee 68a8d84: weights, tokens and outputs of its own classes, and how ours meet them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from tcjax.compressors.base import CompressorConfig, Widths
from tcjax.interop import names, tensors
from tests.torch_layers import Values, section


class Original(NamedTuple):
    x_BNC: np.ndarray
    y_BQD: np.ndarray
    weights: Values
    widths: Widths


def golden(name: str) -> Values:
    return tensors.load(Path(__file__).parent / "golden" / f"{name}.safetensors")


def original(found: Values, case: str, grid_HW: tuple[int, int]) -> Original:
    x_BNC, y_BQD = found[f"{case}/tokens"], found[f"{case}/out"]
    widths = Widths(grid_HW=grid_HW, vision_C=x_BNC.shape[2], llm_D=y_BQD.shape[2])
    return Original(x_BNC, y_BQD, section(found, f"{case}/weights/"), widths)


def same_weights(module: nnx.Module, config: CompressorConfig, one: Original) -> None:
    """The module gives back the published tensors bit by bit, and no others."""
    back = names.to_torch(names.flatten(module), config.names(one.widths))
    assert back.keys() == one.weights.keys()
    for key, weight in one.weights.items():
        np.testing.assert_array_equal(back[key], weight, err_msg=key, strict=True)
