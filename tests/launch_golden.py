"""Comparison of a written job with its golden text."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden/launch"


def assert_golden(name: str, text: str) -> None:
    """`text` is what tests/golden/launch/`name` holds; UPDATE_GOLDEN=1 writes it there first."""
    path = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs; UPDATE_GOLDEN=1 writes it anew"
