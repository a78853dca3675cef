"""Where each query looks: assign_BQN as heat over the image it was read from.

Up to 16 queries get a panel each, scaled to their own strongest patch. More than 16 are shown together: which query
owns a patch (most of its weight), how much weight a patch gets from all of them, and the sharpest queries alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from tcjax.study.plots import DPI, FAINT, INK, save

FILE = "looks.npz"
MAX_PANELS = 16
_SHARPEST = 5
_GLOW = (1.0, 0.62, 0.12)
_WIDTH, _GAP, _LABEL = 9.2, 0.06, 0.17  # inches


class Looks(NamedTuple):
    """images_BYX3: uint8. assign_BQN: float32, of the grid's tokens alone. grid_HW: the tower's grid.

    questions: what was asked, one per image.
    """

    images_BYX3: np.ndarray
    assign_BQN: np.ndarray
    grid_HW: tuple[int, int]
    questions: list[str]


def read(run: Path) -> Looks | None:
    """looks.npz of a run's folder (images, assign, grid, questions); None if it left none."""
    path = run / FILE
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as held:
        H, W = (int(size) for size in held["grid"])
        questions = [str(question) for question in held["questions"]] if "questions" in held else []
        return Looks(held["images"], held["assign"], (H, W), questions)


def draw(looks: Looks, title: str, path: Path, *, boards: int = 2) -> Path:
    """One picture: a band per image, the image itself at the left."""
    boards, Q = min(boards, len(looks.images_BYX3)), looks.assign_BQN.shape[1]
    drawn = [_together(looks, board) if Q > MAX_PANELS else _each(looks, board) for board in range(boards)]
    count = len(drawn[0])
    lines = 1 if Q > MAX_PANELS or count <= 4 else 2
    columns = math.ceil(count / lines)
    side = min(_WIDTH / (columns + lines), 1.7)
    whole = lines * side + (lines - 1) * (_LABEL + _GAP)  # the image is as tall as the queries beside it
    width = whole + columns * (side + _GAP) + 2 * _GAP
    band = _LABEL + whole + 0.34
    figure = Figure(figsize=(width, 0.3 + boards * band), dpi=DPI)
    height = figure.get_figheight()

    def place(image_YX3: np.ndarray, label: str, left: float, top: float, size: float) -> None:
        """All in inches from the upper left corner."""
        axes = figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))
        axes.imshow(image_YX3, interpolation="nearest")
        axes.set_title(label, fontsize=7.5, color=INK, pad=2)
        axes.set_axis_off()

    figure.text(_GAP / width, 1 - 0.05 / height, title, fontsize=10.5, fontweight="bold", color=INK, va="top")
    for board, panels in enumerate(drawn):
        top = 0.3 + board * band
        question = looks.questions[board] if board < len(looks.questions) else ""
        figure.text(_GAP / width, 1 - top / height, question, fontsize=8.5, color=FAINT, va="top")
        top += 0.2 + _LABEL
        place(looks.images_BYX3[board], "image", _GAP, top, whole)
        for i, (label, image_YX3) in enumerate(panels.items()):
            line, column = divmod(i, columns)
            left = _GAP + whole + _GAP + column * (side + _GAP)
            place(image_YX3, label, left, top + line * (side + _LABEL + _GAP), side)
    return save(figure, path)


def lit(image_YX3: np.ndarray, weight_HW: np.ndarray) -> np.ndarray:
    """The image dim and grey; where the weight is, in its own colours with its dark parts aglow. float [Y, X, 3].

    Weights are relative to their own maximum.
    """
    Y, X, _ = image_YX3.shape
    alpha_YX1 = _enlarged(weight_HW / max(float(weight_HW.max()), 1e-12), Y, X)[..., None] ** 0.7
    dim_YX1 = image_YX3.mean(-1, keepdims=True) / 255 * 0.5 + 0.06
    return dim_YX1 * (1 - alpha_YX1) + _tinted(image_YX3, np.array(_GLOW)) * alpha_YX1


def owners(assign_QN: np.ndarray, grid_HW: tuple[int, int]) -> np.ndarray:
    """int [H, W]: which query gives a patch most weight; -1 where none gives any."""
    owner_N = np.where(assign_QN.max(0) > 0, assign_QN.argmax(0), -1)
    return owner_N.reshape(grid_HW)


def _each(looks: Looks, board: int) -> dict[str, np.ndarray]:
    """{label: picture} of every query."""
    image_YX3, (H, W) = looks.images_BYX3[board], looks.grid_HW
    return {f"query {q + 1}": lit(image_YX3, weight.reshape(H, W)) for q, weight in enumerate(looks.assign_BQN[board])}


def _together(looks: Looks, board: int) -> dict[str, np.ndarray]:
    """{label: picture} of all queries at once and of the sharpest."""
    image_YX3, assign_QN = looks.images_BYX3[board], looks.assign_BQN[board]
    Y, X, _ = image_YX3.shape
    owner_YX = _enlarged(owners(assign_QN, looks.grid_HW), Y, X)
    # Neighbouring numbers get distant hues: the golden ratio steps around the circle.
    hue_YX = (owner_YX * 0.61803) % 1
    tint_YX3 = hsv_to_rgb(np.stack([hue_YX, np.full_like(hue_YX, 0.55), 0.85 * (owner_YX >= 0)], axis=-1))
    sharpest = np.sort(np.argsort(-assign_QN.max(1), kind="stable")[:_SHARPEST])
    return {
        "who owns a patch": _tinted(image_YX3, tint_YX3),
        "all queries": lit(image_YX3, assign_QN.sum(0).reshape(looks.grid_HW)),
    } | {f"query {q + 1}": lit(image_YX3, assign_QN[q].reshape(looks.grid_HW)) for q in sharpest}


def _tinted(image_YX3: np.ndarray, tint_YX3: np.ndarray) -> np.ndarray:
    """The image's bright colours kept, its dark parts filled with the tint."""
    unit_YX3 = image_YX3 / 255
    return np.clip(unit_YX3 + 0.8 * tint_YX3 * (1 - unit_YX3.max(-1, keepdims=True)), 0, 1)


def _enlarged(patch_HW: np.ndarray, Y: int, X: int) -> np.ndarray:
    """Each pixel takes its patch's value."""
    H, W = patch_HW.shape
    return patch_HW[(np.arange(Y) * H // Y)[:, None], (np.arange(X) * W // X)[None]]
