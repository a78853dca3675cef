"""One digit board: 8 x 8 cells of 8 pixels, 7 to 10 handwritten digits in six colours, and what can be asked about it.

A board is a pure function of (seed, split, index): its generator is `np.random.default_rng([seed, split, index])`, so
neither the order of preparation nor the number of processes changes a pixel. One horizontal word of four digits lies
in adjacent cells; three to six more are scattered, never directly left or right of the word and never in a horizontal
run of three, so that "the word" is unambiguous.

Blind guessing is worth as little as possible: the numbers to be counted are drawn first and uniformly, and digits and
colours are interchangeable everywhere else, retries included. `CHANCE` is therefore known and not merely measured.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CELLS = 8
CELL_PIXELS = 8
SIZE = CELLS * CELL_PIXELS
WORD = 4
SCATTERED = (3, 6)
MAX_COUNT = 4

COLOURS = {
    "red": (255, 48, 48),
    "green": (48, 216, 64),
    "blue": (72, 104, 255),
    "yellow": (248, 224, 40),
    "magenta": (240, 56, 232),
    "cyan": (40, 224, 240),
}
COLOUR_NAMES = tuple(COLOURS)

# Every digit has exactly two look-alikes (two rings of five), so neither member of a pair is the better guess.
LOOK_ALIKES = {3: (8, 5), 8: (3, 0), 0: (8, 6), 6: (0, 5), 5: (6, 3)}
LOOK_ALIKES |= {1: (7, 4), 7: (1, 2), 2: (7, 9), 9: (2, 4), 4: (9, 1)}

# task: accuracy of the best guess that knows the question but not the image.
CHANCE = {
    "colour": 1 / len(COLOURS),
    "count": 1 / (MAX_COUNT + 1),
    "spatial": 1 / 9,  # the digit asked about is alone on its board, so the answer is one of the nine others
    "read": 10.0**-WORD,
    "fine": 1 / 2,
    "presence": 1 / 2,
    "caption": 0.0,  # 7 to 10 coloured digits: below 1e-12
}

_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


class Board(NamedTuple):
    """digit_cells, colour_cells: int8 [8, 8], -1 where empty. word: row, first column of the four-digit word."""

    digit_cells: np.ndarray
    colour_cells: np.ndarray
    word: tuple[int, int]


class Turn(NamedTuple):
    task: str
    question: str
    answer: str


def generator(seed: int, split: int, index: int) -> np.random.Generator:
    """The one source of randomness of board `index`: first `plan`, then `draw` read from it."""
    return np.random.default_rng([seed, split, index])


def plan(rng: np.random.Generator) -> tuple[Board, list[Turn]]:
    """A board and its conversation: 12 turns in random order, then the caption."""
    colours = rng.permutation(len(COLOURS))
    counts = rng.integers(0, MAX_COUNT + 1, 2)  # fixed before any retry: retries must not prefer easy counts
    total = int(rng.integers(max(WORD + SCATTERED[0], counts.sum()), WORD + SCATTERED[1] + 1))
    while True:
        cells, word = _place(rng, total)
        digits = rng.integers(0, 10, total)
        others = rng.choice(colours[2:], total - counts.sum())
        painted = rng.permutation(np.concatenate([np.repeat(colours[:2], counts), others]))
        digit_cells, colour_cells = np.full((2, CELLS, CELLS), -1, np.int8)
        for (row, column), digit, colour in zip(cells, digits, painted, strict=True):
            digit_cells[row, column], colour_cells[row, column] = digit, colour
        board = Board(digit_cells, colour_cells, word)
        turns = _ask(rng, board, colours[:2])
        if turns:
            return board, turns


def draw(rng: np.random.Generator, board: Board, scans: list[np.ndarray]) -> np.ndarray:
    """uint8 [64, 64, 3]. scans: per digit 0..9, float32 [number of scans, 8, 8] of ink between 0 and 1."""
    noise = _SMOOTH @ rng.random((_KNOTS, _KNOTS)) @ _SMOOTH.T
    image = (0.5 + noise)[..., None] * rng.uniform(6, 28, 3)
    rows, columns = np.nonzero(board.digit_cells >= 0)
    jitter = rng.integers(-1, 2, (len(rows), 2))
    brightness = rng.uniform(0.8, 1.0, len(rows))
    for row, column, (down, right), bright in zip(rows, columns, jitter, brightness, strict=True):
        ink_of = scans[board.digit_cells[row, column]]
        ink = ink_of[rng.integers(len(ink_of))]
        colour = np.array(COLOURS[COLOUR_NAMES[board.colour_cells[row, column]]]) * bright
        top = min(max(row * CELL_PIXELS + down, 0), SIZE - CELL_PIXELS)
        left = min(max(column * CELL_PIXELS + right, 0), SIZE - CELL_PIXELS)
        patch = image[top : top + CELL_PIXELS, left : left + CELL_PIXELS]
        np.maximum(patch, ink[..., None] * colour, out=patch)  # a jittered neighbour may overlap but erases nothing
    return image.round().astype(np.uint8)


def _place(rng: np.random.Generator, total: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Cells of `total` digits, the word's four first, and where the word begins."""
    word = (int(rng.integers(CELLS)), int(rng.integers(CELLS - WORD + 1)))
    cells = [(word[0], word[1] + i) for i in range(WORD)]
    while len(cells) < total:
        nearby = rng.random()
        row, column = (int(i) for i in rng.integers(0, CELLS, 2))
        if nearby < 0.5:  # above or below a digit that stands already
            row, column = cells[rng.integers(len(cells))]
            row += int(rng.choice((-1, 1)))
        elif nearby < 0.7 and len(cells) > WORD:  # beside a scattered one
            row, column = cells[rng.integers(WORD, len(cells))]
            column += int(rng.choice((-1, 1)))
        inside = 0 <= row < CELLS and 0 <= column < CELLS
        beside_word = row == word[0] and column in (word[1] - 1, word[1] + WORD)
        if inside and not beside_word and (row, column) not in cells and not _makes_run(cells, row, column):
            cells.append((row, column))
    return cells, word


def _makes_run(cells: list[tuple[int, int]], row: int, column: int) -> bool:
    """Would a digit here stand in a horizontal run of three or more?"""
    taken = [(row, column + step) in cells for step in (-2, -1, 1, 2)]
    return (taken[0] and taken[1]) or (taken[1] and taken[2]) or (taken[2] and taken[3])


def _ask(rng: np.random.Generator, board: Board, counted: np.ndarray) -> list[Turn]:
    """The conversation, or [] if this board cannot answer every kind of question."""
    cells = [(int(row), int(column)) for row, column in np.argwhere(board.digit_cells >= 0)]
    digits = {cell: int(board.digit_cells[cell]) for cell in cells}
    colours = {cell: COLOUR_NAMES[board.colour_cells[cell]] for cell in cells}
    present = sorted(set(digits.values()))
    absent = [digit for digit in range(10) if digit not in present]
    alone = [cell for cell in cells if list(digits.values()).count(digits[cell]) == 1]
    spatial: dict[str, list[Turn]] = {}
    for row, column in alone:
        for where, (down, right) in _DIRECTIONS.items():
            beside = (row + down, column + right)
            if beside in digits:
                question = f"{where} {digits[row, column]} ?"
                spatial.setdefault(where, []).append(Turn("spatial", question, str(digits[beside])))
    if len(alone) < 2 or not absent or sum(map(len, spatial.values())) < 3:
        return []

    turns = [Turn("colour", f"colour of {digits[cell]} ?", colours[cell]) for cell in _pick(rng, alone, 2)]
    for colour in counted:
        count = int((board.colour_cells == colour).sum())
        turns.append(Turn("count", f"count {COLOUR_NAMES[colour]} ?", str(count)))
    for _ in range(3):  # the direction first: left and right are common, above and below are rare
        where = _pick(rng, sorted(spatial), 1)[0]
        turns.append(spatial[where].pop(rng.integers(len(spatial[where]))))
        spatial = {key: left for key, left in spatial.items() if left}
    row, column = board.word
    turns.append(Turn("read", "read word ?", " ".join(str(digits[row, column + i]) for i in range(WORD))))
    for row, column in _pick(rng, cells, 2):
        digit = digits[row, column]
        pair = rng.permutation([digit, rng.choice(LOOK_ALIKES[digit])])
        turns.append(Turn("fine", f"at {row + 1} {column + 1} : {pair[0]} or {pair[1]} ?", str(digit)))
    for there in rng.random(2) < 0.5:  # two coins: with one yes and one no, the first answer would tell the second
        turns.append(Turn("presence", f"any {rng.choice(present if there else absent)} ?", "yes" if there else "no"))
    turns = [turns[i] for i in rng.permutation(len(turns))]
    return [*turns, Turn("caption", "list board ?", " ".join(f"{colours[cell]} {digits[cell]}" for cell in cells))]


def _pick(rng: np.random.Generator, items: list, num: int) -> list:
    return [items[i] for i in rng.choice(len(items), num, replace=False)]


def _linear_upsampling(num_in: int, num_out: int) -> np.ndarray:
    """float64 [num_out, num_in]: linear interpolation between `num_in` knots from edge to edge."""
    at = np.linspace(0, num_in - 1, num_out)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(num_in)))


_KNOTS = 5
_SMOOTH = _linear_upsampling(_KNOTS, SIZE)
