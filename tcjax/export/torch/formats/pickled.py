"""Pickled weights (.bin, .pt, .pth): written as plain tensors, read with `weights_only` and never in any other way.

A pickle can run code when it is loaded; torch's `weights_only` unpickler refuses everything but tensors and containers.
What it does not refuse is size: a small file can declare enormous tensors, so the declared sizes are summed up first.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAX_RATIO = 4  # of what a zip unpacks to and its size; torch stores tensors uncompressed
LEGACY = b"\x80\x02"  # a bare pickle, as torch wrote them before 1.6


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write tensors only, so that weights_only loads them; arrays of types that torch knows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}, path)


def load(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file by its name, nested dicts ("state_dict", "model", "model_state_dict") unfolded.

    bfloat16 comes back as float32, exactly.

    Raises:
        ValueError: not a torch file, one that unpacks to far more than its size, or one that holds more than tensors.
    """
    _refuse_bomb(path)
    try:
        with torch.device("cpu"):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        # Only the line that names the object: the rest advises to load it nevertheless.
        named = next(
            (line.rstrip(".") for line in str(error).splitlines() if "nsupported" in line), "an unknown object"
        )
        raise ValueError(
            f"{path} holds more than tensors, and loading it could run code ({named}); it is not loaded. "
            f"Ask its author for a safetensors file, or convert it in a place where nothing can be lost."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AssertionError) as error:
        raise ValueError(f"{path} is no whole torch file ({error}); fetch or write it again.") from error
    tensors = dict(_tensors(found, path))
    _refuse_expanded(tensors, path)
    return {name: _numpy(tensor) for name, tensor in tensors.items()}


def _refuse_bomb(path: Path) -> None:
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(2) != LEGACY:
                raise ValueError(f"{path} is no torch file: neither a zip nor a pickle.")
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_RATIO * size:
        raise ValueError(
            f"{path} has {size:,} bytes and says that it unpacks to {unpacked:,}; torch stores tensors uncompressed, so "
            f"this file was made to fill the memory. It is not loaded."
        )


def _refuse_expanded(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A stride of 0 makes a huge tensor of one number: its memory is asked for only when somebody copies it."""
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    size = path.stat().st_size
    if declared > MAX_RATIO * size + 4096:  # tied weights are stored once and declared twice
        raise ValueError(
            f"{path} has {size:,} bytes and declares tensors of {declared:,}; this file was made to fill the memory. "
            f"It is not loaded."
        )


def _tensors(found: Any, path: Path, prefix: str = ""):
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a dict of tensors.")
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict) and name in ("state_dict", "model_state_dict", "model", "module"):
            yield from _tensors(value, path, prefix)
        # Optimiser states, step counts and settings are no weights.


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
