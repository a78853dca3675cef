"""LLaVA-NeXT's mixture file: several conversation files, some rows of each, end to end as one source.

    datasets:
      - json_path: scienceqa.json        # .json or .jsonl
        sampling_strategy: first:1000    # all, first:N, end:N, random:N; N may be a share, "10%"

A json_path is taken below the mixture's own folder, then below the project's root. Image paths start from `Source.images`,
or from each file's own folder. The parts are one source, so each row comes up once per epoch as it does there; random
rows follow from `Source.seed` and the part's place in the list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tcjax.config import Source
from tcjax.pipeline.readers.llava import Llava
from tcjax.pipeline.readers.picked import Joined, picked

_KEYS = {"json_path", "sampling_strategy"}


def open_mixture(root: Path, source: Source) -> Joined:
    path = root / source.path
    parts = []
    for i, entry in enumerate(read_mixture(path)):
        file = _find(path, root, entry["json_path"])
        seed = int(np.random.SeedSequence([source.seed, i]).generate_state(1)[0])
        whole = Llava(file, root / source.images if source.images else file.parent)
        parts.append(picked(whole, entry["sampling_strategy"], seed))
    return Joined(parts, path, "train")


def read_mixture(path: Path) -> list[dict[str, str]]:
    """The entries, each with json_path and sampling_strategy."""
    if not path.is_file():
        raise ValueError(f"no file {path}.")
    try:
        found: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    datasets = found.get("datasets") if isinstance(found, dict) else None
    if not isinstance(datasets, list) or not datasets:
        raise ValueError(f"{path} is no mixture: it needs a list 'datasets' of {sorted(_KEYS)}.")
    entries = []
    for i, entry in enumerate(datasets):
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str) or not set(entry) <= _KEYS:
            raise ValueError(f"{path}: dataset {i} must have json_path and may have sampling_strategy, not {entry!r}.")
        if Path(entry["json_path"]).suffix not in (".json", ".jsonl"):
            raise ValueError(f"{path}: dataset {i}, {entry['json_path']!r}, is neither .json nor .jsonl.")
        entries.append({"sampling_strategy": "all"} | {key: str(value) for key, value in entry.items()})
    return entries


def _find(mixture: Path, root: Path, name: str) -> Path:
    places = [mixture.parent / name, root / name]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"{mixture} names {name!r}, and there is neither {places[0]} nor {places[1]}.")
