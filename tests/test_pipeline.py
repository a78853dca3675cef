"""Host side: literal rows, exact masks, exact pixels, an order that is a pure function of (seed, step, batch)."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from data.digit_boards import vocabulary
from data.digit_boards.boards import CHANCE
from tcjax.batch import Batch
from tcjax.config import Pixels, Source
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat, Template, Turn, load_tokenizer
from tcjax.pipeline.input import make_input
from tcjax.pipeline.preview import preview
from tcjax.pipeline.questions import questions
from tcjax.pipeline.source import open_source
from tests.tiny_boards import PIXELS, SOURCE, data_config, make_own, make_project

Q = 3
TURNS = [Turn("colour of 7 ?", "red"), Turn("read word ?", "4 7 1 9")]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_own(make_project(tmp_path_factory.mktemp("project")))


@pytest.fixture(scope="module")
def chat():
    return Chat(vocabulary.tokenizer())


def take(batches, num: int) -> list[Batch]:
    return [next(batches) for _ in range(num)]


def same(one: Batch, other: Batch) -> bool:
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# chat


def test_a_conversation_becomes_these_ids(chat):
    row = chat.render(TURNS, num_queries=Q, text_length=22)
    # <bos> <image>x3 <user> colour of 7 ? <assistant> red <end> <user> read word ? <assistant> 4 7 1 9 <end> <pad>x3
    expected = [1, 2, 2, 2, 3, 23, 24, 14, 38, 4, 17, 5, 3, 30, 31, 38, 4, 11, 14, 8, 16, 5, 0, 0, 0]
    assert row.tokens_S.tolist() == expected
    assert np.flatnonzero(row.supervised_S).tolist() == [10, 11, 17, 18, 19, 20, 21]
    assert np.flatnonzero(row.is_image_S).tolist() == [1, 2, 3]
    assert np.flatnonzero(row.valid_S).tolist() == list(range(22))
    assert row.dropped == 0


@pytest.mark.parametrize("num_queries", [0, 1, 7])
def test_q_placeholders_and_a_mask_that_does_not_depend_on_q(chat, num_queries):
    row, without = (chat.render(TURNS, num_queries=q, text_length=24) for q in (num_queries, 0))
    assert row.is_image_S.sum() == num_queries == (row.tokens_S == chat.image_id).sum()
    assert len(row.tokens_S) == num_queries + 24
    for name in ("tokens_S", "supervised_S", "valid_S"):
        np.testing.assert_array_equal(getattr(row, name)[~row.is_image_S], getattr(without, name))


def test_supervised_ids_decode_to_the_answers_and_their_end_marks(project):
    chat = Chat(load_tokenizer(project / "tokenizer.json"))
    prepared = open_source(project, SOURCE)
    for index in range(len(prepared)):
        turns = prepared[index].turns
        row = chat.render(turns, num_queries=Q, text_length=144)
        text = chat.tokenizer.decode(row.tokens_S[row.supervised_S], skip_special_tokens=False)
        assert text == " ".join(f"{turn.answer} <end>" for turn in turns)
        assert not row.dropped


def test_marks_of_several_tokens_keep_the_mask_exact():
    template = Template(begin="", user="list board :", assistant="word :", end="yes no")
    chat = Chat(vocabulary.tokenizer(), template)
    row = chat.render(TURNS, num_queries=2, text_length=40)
    spans = np.split(row.tokens_S, np.flatnonzero(np.diff(row.supervised_S.astype(int))) + 1)
    texts = [chat.tokenizer.decode(span, skip_special_tokens=False) for span in spans]
    assert texts[:4] == [
        "<image> <image> list board : colour of 7 ? word :",
        "red yes no",
        "list board : read word ? word :",
        "4 7 1 9 yes no",
    ]
    assert chat.end_ids == chat.encode("yes no")
    assert chat.decode([*chat.encode("red no"), *chat.end_ids, 3, 3]) == "red no"


def test_a_long_conversation_loses_whole_trailing_turns_and_counts_them(chat):
    whole = chat.render(TURNS, num_queries=Q, text_length=19)  # 1 + 8 + 10
    assert whole.dropped == 0
    cut = chat.render(TURNS, num_queries=Q, text_length=18)
    assert cut.dropped == 1
    assert cut.is_image_S.sum() == Q
    np.testing.assert_array_equal(cut.tokens_S[: Q + 9], whole.tokens_S[: Q + 9])
    assert cut.supervised_S.sum() == 2
    assert cut.valid_S.sum() == Q + 9
    with pytest.raises(ValueError, match=r"sample 'b-7' has 2 turns and none fits.*text_length=7"):
        chat.render(TURNS, num_queries=Q, text_length=7, name="b-7")


def test_a_prompt_continues_into_the_training_row(chat):
    prompt = chat.render_question("colour of 7 ?", num_queries=Q)
    row = chat.render(TURNS[:1], num_queries=Q, text_length=20)
    together = [*prompt, *chat.answer_ids("red")]
    assert row.tokens_S[row.valid_S].tolist() == together
    assert chat.decode(chat.answer_ids("red 7 blue 3")) == "red 7 blue 3"


# images


def test_pixels_are_those_of_pil_and_another_size_is_resized_bicubically():
    rng = np.random.default_rng(0)
    image_YX3 = rng.integers(0, 256, (6, 8, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(image_YX3).save(png, "PNG")
    np.testing.assert_array_equal(images.decode(png.getvalue(), Pixels(size_YX=(6, 8)), "a"), image_YX3)
    resized = np.asarray(Image.fromarray(image_YX3).resize((5, 9), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(images.decode(png.getvalue(), Pixels(size_YX=(9, 5)), "a"), resized)
    grey = io.BytesIO()
    Image.fromarray(image_YX3[..., 0]).save(grey, "PNG")
    expected = np.repeat(image_YX3[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(images.decode(grey.getvalue(), Pixels(size_YX=(6, 8)), "a"), expected)


def test_normalised_pixels_follow_the_formula():
    pixels = Pixels(size_YX=(1, 256), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    values = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=-1)
    exact = (values / 255 - np.array(pixels.mean)) / np.array(pixels.std)
    got = images.normalise(values, pixels)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact, atol=4e-7)


# input


def test_a_batch_holds_what_lies_on_disk(project):
    batch = next(make_input(data_config(), PIXELS, Q, root=project))
    prepared, chat = open_source(project, SOURCE), Chat(vocabulary.tokenizer())
    assert batch.images_BYX3.shape == (4, 64, 64, 3)
    assert batch.tokens_BS.shape == (4, Q + 144)
    assert batch.images_BYX3.dtype == np.uint8 and batch.grids_B2 is None
    assert batch.features_BNC is None
    assert batch.patch_labels_BNL is None
    for b, index in enumerate(batch.index_B):
        record = prepared[int(index)]
        with Image.open(io.BytesIO(record.images[0])) as image:
            np.testing.assert_array_equal(batch.images_BYX3[b], np.asarray(image))
        row = chat.render(record.turns, num_queries=Q, text_length=144)
        for name in ("tokens", "is_image", "supervised", "valid"):
            np.testing.assert_array_equal(getattr(batch, f"{name}_BS")[b], getattr(row, f"{name}_S"))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_restored_input_goes_on_with_the_same_batches(project, threads):
    config = data_config(threads=threads)
    batches = make_input(config, PIXELS, Q, root=project)
    take(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 4)  # across the end of the first epoch of 6 batches
    fresh = make_input(config, PIXELS, Q, root=project)
    fresh.set_state(state)
    assert all(same(*pair) for pair in zip(expected, take(fresh, 4), strict=True))
    batches.set_state(state)
    assert same(next(batches), expected[0])


def test_threads_do_not_change_the_order_and_seeds_do(project):
    def indices(**changes):
        return np.concatenate([b.index_B for b in take(make_input(data_config(**changes), PIXELS, Q, root=project), 3)])

    np.testing.assert_array_equal(indices(threads=0), indices(threads=3))
    assert not np.array_equal(indices(seed=0), indices(seed=1))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_see_the_global_batch(project, processes):
    config = data_config(sources=(dataclasses.replace(SOURCE, split="train[:22]"),))  # an epoch is no whole batch
    whole = take(make_input(config, PIXELS, Q, root=project), 12)
    shares = [
        take(make_input(config, PIXELS, Q, root=project, process_index=p, process_count=processes), 12)
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step].index_B for share in shares]
        assert {len(part) for part in parts} == {4 // processes}
        assert sorted(np.concatenate(parts)) == sorted(batch.index_B)
    with pytest.raises(ValueError, match=r"data.batch=4 cannot be shared equally by 3 processes"):
        make_input(config, PIXELS, Q, root=project, process_count=3)


def test_every_epoch_holds_every_sample_once_in_a_new_order(project):
    batches = make_input(data_config(), PIXELS, Q, root=project)
    epochs = [np.concatenate([batch.index_B for batch in take(batches, 6)]) for _ in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_sources_mix_by_weight(project):
    sources = (dataclasses.replace(SOURCE, weight=3.0), Source(path="own", split="train[:2]", weight=1.0))
    features = (np.zeros((24, 1, 2), np.float32), np.ones((2, 1, 2), np.float32))
    batches = make_input(data_config(sources=sources), PIXELS, Q, root=project, features=features)
    from_own = np.concatenate([batch.features_BNC[:, 0, 0] for batch in take(batches, 8)])
    assert from_own.sum() == 8
    for changes in (sources[:1], ()):
        with pytest.raises(ValueError, match="sources"):
            make_input(data_config(sources=changes), PIXELS, Q, root=project, features=features)
    with pytest.raises(ValueError, match=r"weights must be positive, got \[0.0\]"):
        make_input(data_config(sources=(dataclasses.replace(SOURCE, weight=0.0),)), PIXELS, Q, root=project)


def test_cached_features_replace_the_images_in_the_same_order(project):
    features = np.arange(24, dtype=np.float32)[:, None, None] * np.ones((1, 2, 3), np.float32)
    plain = take(make_input(data_config(), PIXELS, Q, root=project), 3)
    cached = take(make_input(data_config(), PIXELS, Q, root=project, features=features), 3)
    for one, other in zip(plain, cached, strict=True):
        assert other.images_BYX3 is None
        np.testing.assert_array_equal(other.features_BNC, features[one.index_B])
        assert same(one._replace(images_BYX3=None), other._replace(features_BNC=None))
    with pytest.raises(ValueError, match="23 cached features for the 24 records"):
        make_input(data_config(), PIXELS, Q, root=project, features=features[:23])


@pytest.mark.parametrize("patch", [4, 8])
def test_patch_labels_name_the_digit_and_colour_of_each_patch(project, patch):
    batch = next(make_input(data_config(), PIXELS, Q, root=project, patch=patch))
    fields = open_source(project, SOURCE)[int(batch.index_B[0])].fields
    times = np.ones((8 // patch, 8 // patch), int)
    expected = np.stack([np.kron(fields[name] + 1, times) for name in ("digit_cells", "colour_cells")], axis=-1)
    assert batch.patch_labels_BNL.dtype == np.int32
    np.testing.assert_array_equal(batch.patch_labels_BNL[0], expected.reshape(-1, 2))
    with pytest.raises(ValueError, match="has no dense labels"):
        make_input(data_config(sources=(Source(path="own"),)), PIXELS, Q, root=project, patch=patch)


# questions, preview


def test_the_evaluation_set_asks_each_task_once_per_board(project, chat):
    prepared = open_source(project, dataclasses.replace(SOURCE, split="test"))
    asked = questions(prepared, chat, num_queries=Q)
    assert len(asked.index_B) == 12 * len(CHANCE)
    for i in range(len(asked.index_B)):
        record, task = prepared[int(asked.index_B[i])], asked.task_B[i]
        tasks = [name.decode() for name in record.fields["task"]]
        assert record.turns[tasks.index(task)] == (asked.question_B[i], asked.answer_B[i])
        assert asked.chance_B[i] == np.float32(CHANCE[task])
        prompt = chat.render_question(asked.question_B[i], num_queries=Q)
        assert asked.tokens_BS[i, -len(prompt) :].tolist() == prompt
        assert asked.valid_BS[i].tolist() == [False] * (asked.tokens_BS.shape[1] - len(prompt)) + [True] * len(prompt)
        assert asked.is_image_BS[i].sum() == Q
        answer = asked.answer_BT[i]
        assert answer[answer >= 0].tolist() == list(chat.answer_ids(asked.answer_B[i]))
    few = questions(prepared, chat, num_queries=Q, boards=2, tasks=("read", "fine"))
    assert sorted(zip(few.index_B.tolist(), few.task_B.tolist(), strict=True)) == [
        (0, "fine"), (0, "read"), (1, "fine"), (1, "read"),
    ]  # fmt: skip
    assert few.rows(few.task_B == "read").answer_BT.shape == (2, 5)


def test_the_preview_shows_images_and_marks_what_is_supervised(project, chat, tmp_path):
    prepared = open_source(project, SOURCE)
    page = preview(prepared, chat, PIXELS, tmp_path / "a/page.html", num_queries=Q, text_length=144, rows=[0, 5])
    text = page.read_text()
    assert "<title>digit_boards/tiny/1.0.0 train</title>" in text
    assert text.count("data:image/png;base64,") == 2
    assert text.count("&lt;image&gt; x 3") == 2
    for index in (0, 5):
        for turn in prepared[index].turns:
            assert f"&lt;user&gt; {turn.question} &lt;assistant&gt; <b>{turn.answer} &lt;end&gt;</b>" in text
