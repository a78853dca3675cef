"""Which files a path means: one file, a folder's, or those counted in braces.

"shard-{000..002}.tar" -> shard-000.tar, shard-001.tar, shard-002.tar        "{a,b}.tar" -> a.tar, b.tar
"""

from __future__ import annotations

import re
from pathlib import Path

from tcjax.pipeline.sample import BrokenShard

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(text: str) -> list[str]:
    """Brace expansion as a shell does it, numbers keeping their leading zeros; ValueError for braces that mean nothing."""
    found = _BRACES.search(text)
    if not found:
        return [text]
    if counted := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = int(counted[1]), int(counted[2])
        if last < first:
            raise ValueError(f"{text!r} counts from {first} down to {last}; write the smaller number first.")
        width = max(map(len, counted.groups())) if counted[1].startswith("0") else 0
        words = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in found[1]:
        words = found[1].split(",")
    else:
        raise ValueError(f"{text!r} has braces that mean nothing; write {{000..012}} or {{a,b}}.")
    return [whole for word in words for whole in expand(text[: found.start()] + word + text[found.end() :])]


def files(root: Path, path: str, suffix: str) -> list[Path]:
    """The files of one kind that `path` means, in order; those of a folder include its subfolders'.

    Raises:
        ValueError: there is no such file.
        BrokenShard: some of those counted in braces are missing.
    """
    if (root / path).is_dir():
        found = sorted((root / path).rglob(f"*{suffix}"))
        if not found:
            raise ValueError(f"{root / path} holds no *{suffix} file.")
        return found
    found = [root / path] if (root / path).is_file() else [root / name for name in expand(path)]
    missing = [str(file) for file in found if not file.is_file()]
    if len(missing) == len(found):
        raise ValueError(f"no file {missing[0]}." if len(found) == 1 else f"none of {path!r} is there below {root}.")
    if missing:
        raise BrokenShard(f"{len(missing)} of {len(found)} files are missing: {missing[:8]}; download them again.")
    return found
