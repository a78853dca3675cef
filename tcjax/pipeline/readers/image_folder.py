"""A folder of image files, read by the paths a published file names; no path leads out of it.

    ImageFolder(root).read("coco/train2017/000000033471.jpg", row) -> bytes

Absolute paths, `..` and links are followed to their end and refused if that lies outside the root. A file that is there
under another image suffix is read instead (OCR-VQA's JSON says .jpg where the download gave .gif or .png); `tcjax data
verify` names it.
"""

from __future__ import annotations

import os
from pathlib import Path

from tcjax.pipeline.encoded import SUFFIXES
from tcjax.pipeline.readers.conversation import Row

_OTHERS = tuple(dict.fromkeys(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))


class ImageFolder:
    """Image files below `root`."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self._real = os.path.realpath(root)

    def find(self, path: str, row: Row) -> Path:
        """The file that `path` names, perhaps under another suffix; BadSample if it is missing or outside the root."""
        if not isinstance(path, str) or not path:
            raise row.bad("schema", f"an image path must be text, not {path!r}")
        if "\0" in path:
            raise row.bad("schema", f"the image path {path!r} holds a zero byte")
        whole = os.path.join(self._real, path)
        real = self._inside(whole, path, row)
        if os.path.isfile(real):
            return Path(real)
        stem, ending = os.path.splitext(whole)
        stem = stem if ending.lower() in _OTHERS else whole
        for suffix in _OTHERS:
            for other in (stem + suffix, stem + suffix.upper()):
                if os.path.isfile(other):
                    return Path(self._inside(other, path, row))
        raise row.bad(
            "missing_images",
            f"image {path!r} is missing below {self.root}; download it, or set Source.images to the folder it lies in",
        )

    def read(self, path: str, row: Row) -> bytes:
        """The file's bytes; BadSample also if it has none."""
        found = self.find(path, row)
        encoded = found.read_bytes()
        if not encoded:
            raise row.bad("empty_images", f"image {path!r} has 0 bytes ({found})")
        return encoded

    def _inside(self, whole: str, path: str, row: Row) -> str:
        real = os.path.realpath(whole)
        if os.path.commonpath([real, self._real]) != self._real:
            raise row.bad(
                "outside_root",
                f"image {path!r} leads out of {self.root} to {real}; paths must stay below Source.images. "
                f"Where a link is meant, set Source.images to a folder above both, or copy the images",
            )
        return real
