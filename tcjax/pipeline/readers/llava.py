"""LLaVA's JSON, as published: the 558k captions, mix665k, and files like them (Cambrian's and LLaVA-NeXT's JSON lines).

    {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}

`image` is a path below `Source.images`, a list of them, or missing (text alone; mix665k then has `model` instead). Every
other key goes to `Record.fields`. Turns and `<image>` marks are examined as in conversation.py; a row with images and no
mark is refused, because LLaVA would train on it as text alone. A row is read from disk when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcjax.config import Source
from tcjax.pipeline.readers.conversation import Row, checked, spoken
from tcjax.pipeline.readers.files import files
from tcjax.pipeline.readers.image_folder import ImageFolder
from tcjax.pipeline.readers.json_rows import JsonRows
from tcjax.pipeline.readers.picked import Joined
from tcjax.pipeline.sample import Outline, Record, Records

_OURS = ("id", "image", "conversations")


class Llava:
    """One .json or .jsonl file with the folder its image paths start from."""

    label_names: tuple[str, ...] = ()

    def __init__(self, path: Path, images: Path):
        self.folder, self.split, self.name = path, "train", path.stem
        self.rows, self._images = JsonRows(path), ImageFolder(images)
        first = self.rows[0]
        if "conversations" not in first:
            raise ValueError(
                f"{path} is no file of conversations: its first row has the keys {sorted(first)} and lacks "
                f"'conversations'. (blip_laion_cc_sbu_558k_meta.json lies beside the file you want.)"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row, found = self._row(index)
        return conversation_record(row, found, found.get("image"), lambda path: self._images.read(path, row))

    def outline(self, index: int) -> Outline:
        """The turns and the number of images, without reading them."""
        row, found = self._row(index)
        record = conversation_record(row, found, found.get("image"), lambda path: b"")
        return Outline(record.image_id, record.turns, len(record.images))

    def image_names(self, index: int) -> list[str]:
        """What the file calls the row's images; the one that is read may have another suffix."""
        paths = self.rows[index].get("image") or []
        return [str(path) for path in paths] if isinstance(paths, list) else [str(paths)]

    def _row(self, index: int) -> tuple[Row, dict[str, Any]]:
        found = self.rows[index]
        return Row(f"{self.folder} row {index}", str(found.get("id", f"{self.folder.name}:{index}"))), found


def conversation_record(row: Row, found: dict[str, Any], paths: Any, read: Callable[[Any], bytes]) -> Record:
    """A row with `conversations` -> Record; `read` turns one of its images into bytes."""
    if "video" in found:
        raise row.bad("schema", "it is a video; only images and text are read")
    paths = paths if isinstance(paths, list) else [paths] if paths else []
    turns, fields = spoken(row, found.get("conversations"))
    turns = checked(row, turns, len(paths), marks_needed=True)
    fields |= {key: value for key, value in found.items() if key not in _OURS}
    return Record(tuple(read(path) for path in paths), row.image_id, turns, fields)


def open_llava(root: Path, source: Source) -> Records:
    """One file, or those that braces mean, end to end: LLaVA-NeXT writes "data/{a,b}.json"."""
    paths = files(root, source.path, ".json")
    parts = [Llava(path, root / source.images if source.images else path.parent) for path in paths]
    return parts[0] if len(parts) == 1 else Joined(parts, root / source.path, "train")
