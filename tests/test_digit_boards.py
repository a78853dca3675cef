"""The boards: literal example, function of (seed, split, index), disjoint handwriting, true answers, known chance."""

import io
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data.digit_boards import boards, vocabulary
from data.digit_boards import digit_boards_dataset_builder as builder
from data.digit_boards.boards import CELLS, CHANCE, COLOUR_NAMES, LOOK_ALIKES, WORD

STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

BOARD_0 = [  # row, column, digit, colour
    (0, 6, 9, "red"),
    (1, 0, 8, "red"),
    (1, 6, 3, "red"),
    (4, 7, 9, "green"),
    (5, 4, 6, "red"),
    (5, 5, 2, "magenta"),
    (5, 6, 6, "red"),
    (5, 7, 7, "green"),
    (7, 4, 4, "green"),
    (7, 5, 3, "cyan"),
]
TURNS_0 = [
    ("spatial", "left of 7 ?", "6"),
    ("presence", "any 2 ?", "yes"),
    ("spatial", "above 7 ?", "9"),
    ("count", "count blue ?", "0"),
    ("fine", "at 6 6 : 7 or 2 ?", "2"),
    ("presence", "any 0 ?", "no"),
    ("fine", "at 8 6 : 3 or 5 ?", "3"),
    ("count", "count yellow ?", "0"),
    ("spatial", "right of 4 ?", "3"),
    ("colour", "colour of 4 ?", "green"),
    ("colour", "colour of 7 ?", "green"),
    ("read", "read word ?", "6 2 6 7"),
    ("caption", "list board ?", "red 9 red 8 red 3 green 9 red 6 magenta 2 red 6 green 7 green 4 cyan 3"),
]


@pytest.fixture(scope="module")
def planned():
    """3,000 boards without their pixels."""
    return [boards.plan(boards.generator(7, 0, index)) for index in range(3_000)]


@pytest.fixture(scope="module")
def scans():
    return builder.scans_of("train", 0)


def test_board_0_is_this_board(scans):
    example = builder.example(0, "train", 0, scans)
    assert example["image_id"] == "train-00000"
    placed = [
        (
            int(row),
            int(column),
            int(example["digit_cells"][row, column]),
            COLOUR_NAMES[example["colour_cells"][row, column]],
        )
        for row, column in np.argwhere(example["digit_cells"] >= 0)
    ]
    assert placed == BOARD_0
    assert [(turn["task"], turn["question"], turn["answer"]) for turn in example["turns"]] == TURNS_0
    assert [turn["chance"] for turn in example["turns"]] == [CHANCE[task] for task, _, _ in TURNS_0]


def test_a_board_depends_on_seed_split_and_index_alone(scans):
    later_first = {index: builder.example(0, "train", index, scans) for index in (5, 3)}
    again = builder.example(0, "train", 3, scans)
    assert again["image"] == later_first[3]["image"]
    assert again["turns"] == later_first[3]["turns"]
    others = [(0, "train", 5), (1, "train", 3), (0, "test", 3)]
    assert len({again["image"], *(builder.example(*key, scans)["image"] for key in others)}) == 4


def test_handwriting_is_disjoint_and_every_split_has_every_digit():
    labels = load_digits().target
    indices = {split: builder.scan_indices(split, 0, labels) for split in builder.SPLITS}
    assert {split: len(of) for split, of in indices.items()} == {"train": 1197, "validation": 200, "test": 400}
    assert sorted(np.concatenate(list(indices.values()))) == list(range(1797))
    for of in indices.values():
        share = np.bincount(labels[of], minlength=10) / len(of)
        np.testing.assert_allclose(share, np.bincount(labels) / 1797, atol=0.006)


def test_there_is_one_word_and_nothing_else_looks_like_one(planned):
    for board, _ in planned:
        runs = []
        for row, taken in enumerate(board.digit_cells >= 0):
            text = "".join("x" if cell else " " for cell in taken)
            runs += [(row, text.index("x" * n), n) for n in range(3, CELLS + 1) if "x" * n in text.split()]
        assert runs == [(*board.word, WORD)]
        assert 7 <= (board.digit_cells >= 0).sum() <= 10
        np.testing.assert_array_equal(board.digit_cells >= 0, board.colour_cells >= 0)


def test_every_answer_follows_from_the_cells(planned):
    for board, turns in planned:
        assert Counter(turn.task for turn in turns) == {
            "colour": 2, "count": 2, "spatial": 3, "read": 1, "fine": 2, "presence": 2, "caption": 1,
        }  # fmt: skip
        assert turns[-1].task == "caption"
        assert len({turn.question for turn in turns if turn.task != "presence"}) == 11
        for turn in turns:
            assert turn.answer == _answer(board, turn), turn


def _answer(board: boards.Board, turn: boards.Turn) -> str:
    """The answer by a second way: read off the grids, not off what generation remembers."""
    digits, colours = board.digit_cells, board.colour_cells
    words = turn.question.removesuffix(" ?").split()

    def only(digit: str) -> tuple[int, int]:
        (found,) = np.argwhere(digits == int(digit))
        return int(found[0]), int(found[1])

    match turn.task:
        case "colour":
            return COLOUR_NAMES[colours[only(words[2])]]
        case "count":
            return str(np.sum(colours == COLOUR_NAMES.index(words[1])))
        case "spatial":
            (row, column), (down, right) = only(words[-1]), STEPS[" ".join(words[:-1])]
            assert 0 <= row + down < CELLS
            assert 0 <= column + right < CELLS
            return str(digits[row + down, column + right])
        case "read":
            row, column = board.word
            return " ".join(map(str, digits[row, column : column + WORD]))
        case "fine":
            shown = int(digits[int(words[1]) - 1, int(words[2]) - 1])
            pair = {int(words[4]), int(words[6])}
            assert shown in pair
            assert pair - {shown} <= set(LOOK_ALIKES[shown])
            return str(shown)
        case "presence":
            return "yes" if int(words[1]) in digits else "no"
        case _:
            at = np.argwhere(digits >= 0)
            return " ".join(f"{COLOUR_NAMES[colours[row, column]]} {digits[row, column]}" for row, column in at)


def test_look_alikes_are_mutual_and_every_digit_has_two():
    assert sorted(LOOK_ALIKES) == list(range(10))
    assert all(
        len(set(pair)) == 2 and all(digit in LOOK_ALIKES[other] for other in pair)
        for digit, pair in LOOK_ALIKES.items()
    )


@pytest.mark.parametrize("task", [task for task in CHANCE if task not in ("read", "caption")])
def test_blind_answers_score_chance(planned, task):
    # A blind guesser learns the commonest answer to each question, then answers one question on each other board.
    learned = defaultdict(Counter)
    for _, turns in planned[:800]:
        for turn in turns:
            learned[_asked(turn)][turn.answer] += turn.task == task
    first = [next(turn for turn in turns if turn.task == task) for _, turns in planned[800:]]
    right = sum(learned[_asked(turn)].most_common(1)[0][0] == turn.answer for turn in first)
    assert abs(right / len(first) - CHANCE[task]) < 3 * _deviation(task, len(first))


def _deviation(task: str, total: int) -> float:
    """Standard deviation of the share of right answers among `total` independent guesses."""
    return (CHANCE[task] * (1 - CHANCE[task]) / total) ** 0.5


def _asked(turn: boards.Turn) -> str:
    """The question; of a fine one only its pair, because a place rarely repeats."""
    words = turn.question.split()
    return " ".join(sorted((words[4], words[6]))) if turn.task == "fine" else turn.question


@pytest.mark.parametrize("task", ["colour", "count", "presence", "spatial"])
def test_no_constant_answer_beats_chance(planned, task):
    answers = Counter(next(turn.answer for turn in turns if turn.task == task) for _, turns in planned)
    share = answers.most_common(1)[0][1] / answers.total()
    assert share <= CHANCE[task] + 3 * _deviation(task, answers.total())


def test_spatial_questions_ask_in_all_four_directions(planned):
    asked = Counter(turn.question.rsplit(" ", 2)[0] for _, turns in planned for turn in turns if turn.task == "spatial")
    assert set(asked) == set(STEPS)
    assert min(asked.values()) > 0.15 * asked.total()


def test_ink_of_the_named_colour_stands_in_its_cell(scans):
    for index in range(20):
        example = builder.example(0, "train", index, scans)
        image_YX3 = np.asarray(Image.open(io.BytesIO(example["image"]))).astype(int)
        assert image_YX3.shape == (64, 64, 3)
        for row, column in np.argwhere(example["digit_cells"] >= 0):
            patch = image_YX3[row * 8 + 1 : row * 8 + 7, column * 8 + 1 : column * 8 + 7].reshape(-1, 3)
            mean = patch[patch.max(-1) > 150].mean(0)
            palette = np.array(list(boards.COLOURS.values()))
            cosine = palette @ mean / np.linalg.norm(palette, axis=1)
            assert COLOUR_NAMES[cosine.argmax()] == COLOUR_NAMES[example["colour_cells"][row, column]]
        empty = np.kron(example["digit_cells"] < 0, np.ones((8, 8), bool))
        inner = np.tile(np.pad(np.ones((6, 6), bool), 1), (8, 8))  # jitter reaches one pixel into the neighbour
        assert image_YX3[empty & inner].max() < 60


def test_every_word_is_in_the_committed_vocabulary(planned):
    made = vocabulary.tokenizer()
    assert made.get_vocab_size() == 64
    assert (Path(__file__).parents[1] / "configs/boards_base/tokenizer.json").read_text() == made.to_str(pretty=True)
    words = {word for _, turns in planned for turn in turns for text in turn[1:] for word in text.split()}
    assert words == set(vocabulary.WORDS)
    longest = max(1 + sum(3 + len(f"{turn.question} {turn.answer}".split()) for turn in turns) for _, turns in planned)
    assert longest <= 144
