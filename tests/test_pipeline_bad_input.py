"""Bad input is met with a name: unreadable images, damaged shards, unknown words, folders that hold nothing."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.digit_boards import vocabulary
from tcjax.config import Source
from tcjax.pipeline import images, input, prepare
from tcjax.pipeline.chat import Chat, Template, Turn, load_tokenizer
from tcjax.pipeline.input import make_input
from tcjax.pipeline.questions import questions
from tcjax.pipeline.samples import Samples
from tcjax.pipeline.source import BrokenShard, open_source
from tcjax.pipeline.verify import verify
from tests.tiny_boards import FOLDER, PIXELS, SOURCE, data_config, make_own, make_project

Q = 3


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_own(make_project(tmp_path_factory.mktemp("project")))


@pytest.fixture(scope="module")
def chat():
    return Chat(vocabulary.tokenizer())


def take(batches, num: int) -> list:
    return [next(batches) for _ in range(num)]


def own_config(**changes):
    return data_config(sources=(Source(path="own", split="train[8:]"),), text_length=12, **changes)


def test_unreadable_images_are_skipped_counted_named_and_resumable(project):
    config = own_config(max_corrupt=0.02)
    batches = make_input(config, PIXELS, Q, root=project)
    seen = [batch.index_B for batch in take(batches, 28)]
    assert batches.corrupt == ["own-43", "own-83"]
    epoch = np.concatenate(seen)
    assert not set(epoch) & {35, 75}  # positions in the slice
    assert sorted(set(range(112)) - set(epoch)) == [35, 75]
    assert sorted(index for index in range(112) if (epoch == index).sum() == 2) == [36, 76]  # the next readable ones
    batches.set_state({"next_index": 3})
    np.testing.assert_array_equal(next(batches).index_B, seen[3])

    features = np.zeros((112, 1, 2), np.float32)
    features[[35, 75]] = np.nan
    cached = make_input(config, PIXELS, Q, root=project, features=features)
    np.testing.assert_array_equal([batch.index_B for batch in take(cached, 28)], seen)
    assert cached.corrupt == ["own-43", "own-83"]


def test_too_many_unreadable_images_stop_the_run(project):
    batches = make_input(own_config(max_corrupt=0.01), PIXELS, Q, root=project)
    with pytest.raises(input.TooManyCorrupt, match=r"2 of \d+ samples.*max_corrupt=0.01.*'own-43', 'own-83'"):
        take(batches, 28)


def test_a_share_that_only_chance_explains_does_not_stop_the_run():
    class Readable:
        folder, split = Path("x"), "train"

        def __len__(self):
            return 10_000

    samples = Samples(Readable(), None, data_config(max_corrupt=0.01), PIXELS, Q)
    samples._seen[:100] = True
    for index in range(4):  # 1 expected, 1 + 3 allowed
        samples._count(index, images.CorruptImage(f"x-{index}", "cut short"))
    with pytest.raises(input.TooManyCorrupt, match="5 of 100 samples"):
        samples._count(4, images.CorruptImage("x-4", "cut short"))


@pytest.fixture
def copy(project, tmp_path):
    shutil.copytree(project, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_missing_or_damaged_shard_is_named(copy):
    (shard,) = (copy / SOURCE.path).rglob("*-train.array_record-*")
    whole = shard.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 0):
        shard.write_bytes(whole[:length])
        with pytest.raises(
            BrokenShard, match=rf"{shard} is damaged: 24 records promised, 0 readable in {length} bytes"
        ):
            open_source(copy, SOURCE)
    shard.unlink()
    with pytest.raises(BrokenShard, match=rf"{shard} is missing; .*tcjax data prepare"):
        make_input(data_config(), PIXELS, Q, root=copy)
    assert len(open_source(copy, dataclasses.replace(SOURCE, split="test"))) == 12


def test_a_damaged_record_is_named_with_its_shard(copy):
    (shard,) = (copy / SOURCE.path).rglob("*-train.array_record-*")
    whole = bytearray(shard.read_bytes())
    at = whole.index(b"train-00004")  # ids and PNGs are stored as they are
    whole[at : at + 5] = b"TRAIN"
    shard.write_bytes(whole)
    prepared = open_source(copy, dataclasses.replace(SOURCE, split="train[3:]"))
    assert prepared[0].image_id == "train-00003"
    with pytest.raises(BrokenShard, match=rf"record 1 of 'train\[3:\]' is damaged in {shard}"):
        prepared[1]
    report = verify(prepared, Chat(vocabulary.tokenizer()), PIXELS, text_length=144)
    assert report.problems == {"unreadable": 1}
    assert report.records == 21


def test_what_was_never_prepared_or_prepared_twice_says_so(project, copy):
    with pytest.raises(ValueError, match="run: tcjax data prepare data/other"):
        open_source(project, Source(path="data/other"))
    with pytest.raises(ValueError, match=r"'training' is not a split of .*'test', 'train', 'validation'"):
        open_source(project, dataclasses.replace(SOURCE, split="training"))
    with pytest.raises(ValueError, match=r"'train\[:0\]' of .* is empty"):
        open_source(project, dataclasses.replace(SOURCE, split="train[:0]"))
    (info,) = (copy / SOURCE.path).rglob("dataset_info.json")
    shutil.copytree(info.parent, info.parent.with_name("1.1.0"))
    with pytest.raises(ValueError, match="holds several prepared datasets"):
        open_source(copy, SOURCE)


def test_preparing_again_changes_nothing_and_a_folder_without_builder_is_refused(project, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*.array_record-*")}
    assert len(before) == 4
    make_project(project)
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*.array_record-*")} == before
    with pytest.raises(ValueError, match=r"must hold exactly one \*_dataset_builder.py, found \[\]"):
        prepare.prepare(tmp_path)
    assert prepare.load_builder(FOLDER).Builder.VERSION == "1.0.0"


def test_unscorable_and_empty_evaluation_sets_are_refused(project, chat):
    with pytest.raises(ValueError, match=r"turns lack \['chance', 'task'\]"):
        questions(open_source(project, Source(path="own")), chat, num_queries=Q)
    with pytest.raises(ValueError, match="no question of tasks"):
        questions(open_source(project, SOURCE), chat, num_queries=Q, tasks=("smell",))


def test_verify_finds_nothing_in_the_boards_and_everything_in_a_bad_dataset(project, chat):
    good = verify(open_source(project, SOURCE), chat, PIXELS, text_length=144)
    assert good.problems == {}
    assert good.records == 24
    assert 100 < good.longest <= 144
    steps = []
    bad = verify(
        open_source(project, Source(path="own")), chat, PIXELS, text_length=8, progress=lambda *at: steps.append(at)
    )
    assert steps[-1] == (120, 120)
    assert bad.corrupt_images == ["own-3", "own-43", "own-83"]
    assert bad.unknown_words == {"purple": 1}
    assert bad.duplicate_ids == ["own-118"]
    assert bad.problems == {"corrupt_images": 3, "unknown_words": 1, "duplicate_ids": 1}
    short = verify(open_source(project, SOURCE), chat, PIXELS, text_length=100)
    assert set(short.problems) == {"dropped_turns"}
    assert len(verify(open_source(project, SOURCE), chat, PIXELS, text_length=5).unsupervised) == 24


def test_words_and_marks_the_tokenizer_lacks_are_named(chat, tmp_path):
    with pytest.raises(ValueError, match=r"no id for \['purple'\] in 'purple 7'"):
        chat.render([Turn("colour of 7 ?", "purple 7")], num_queries=Q, text_length=20)
    with pytest.raises(ValueError, match=r"Template.image='<picture>' is not one token"):
        Chat(vocabulary.tokenizer(), Template(image="<picture>"))
    with pytest.raises(ValueError, match=r"Template.end is empty"):
        Chat(vocabulary.tokenizer(), Template(end=""))
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("cut", [0, 8, 20, 60])
def test_what_cannot_be_decoded_is_a_corrupt_image_with_its_name(cut):
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(png, "PNG")
    with pytest.raises(images.CorruptImage, match="image 'board-7' cannot be read") as caught:
        images.decode(png.getvalue()[:cut], PIXELS, "board-7")
    assert caught.value.image_id == "board-7"
