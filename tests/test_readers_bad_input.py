"""What is wrong with a published file is refused by file, row and id; nothing is guessed and nothing leaves its root."""

import json
import tarfile

import pytest

from tcjax.config import Source
from tcjax.pipeline.source import BadSample, BrokenShard, open_source
from tests.published import fine_vision_rows, image, pretrain_rows, said, write_json, write_parquet, write_tar


def opened(root, path, **choices):
    return open_source(root, Source(path=str(path), **choices))


HUMAN, GPT = {"from": "human", "value": "<image>\nred ?"}, {"from": "gpt", "value": "yes"}

BAD_ROWS = {  # name: (changes of a good row, kind, reason)
    "odd": ({"conversations": [HUMAN, GPT, HUMAN]}, "turns", "3 turns: an odd number leaves a question without"),
    "two human": ({"conversations": [HUMAN, HUMAN]}, "turns", "turns 1 and 2 are both human's"),
    "two gpt": ({"conversations": [HUMAN, GPT, GPT, HUMAN]}, "turns", "turns 2 and 3 are both gpt's"),
    "gpt first": ({"conversations": [GPT, HUMAN]}, "turns", "the first turn is gpt's"),
    "system late": ({"conversations": [HUMAN, GPT, {"from": "system", "value": "x"}]}, "turns", "may only come first"),
    "system only": ({"conversations": [{"from": "system", "value": "x"}]}, "turns", "0 turns"),
    "a stranger": ({"conversations": [HUMAN, {"from": "bing", "value": "x"}]}, "turns", "turn 2 is from 'bing'; possible"),
    "no answer": ({"conversations": [HUMAN, {"from": "gpt", "value": " \n"}]}, "empty_answers", "answer of turn 1 is empty"),
    "a number": ({"conversations": [HUMAN, {"from": "gpt", "value": 5}]}, "schema", "the value of turn 2 is 5, not text"),
    "no value": ({"conversations": [HUMAN, {"from": "gpt"}]}, "schema", r"turn 2 must be \{'from', 'value'\}"),
    "no turns": ({"conversations": []}, "schema", "must be a list of turns"),
    "no list": ({"conversations": None}, "schema", "must be a list of turns, not None"),
    "no mark": ({"conversations": said(0, marks=0)}, "image_marks", "0 <image> marks for 1 images"),
    "two marks": ({"conversations": said(0, marks=2)}, "image_marks", "2 <image> marks for 1 images"),
    "a mark without image": ({"image": None}, "image_marks", "1 <image> marks for 0 images"),
    "a mark in an answer": (
        {"conversations": [HUMAN, {"from": "gpt", "value": "<image> yes"}]}, "image_marks", "answer of turn 1 holds <image>",
    ),
    "missing": ({"image": "00000/x.jpg"}, "missing_images", "image '00000/x.jpg' is missing below"),
    "a folder": ({"image": "00000"}, "missing_images", "is missing"),
    "upwards": ({"image": "../secret.jpg"}, "outside_root", r"'../secret.jpg' leads out of .*set Source.images"),
    "down and up": ({"image": "00000/../../secret.jpg"}, "outside_root", "leads out of"),
    "absolute": ({"image": "/etc/passwd"}, "outside_root", "'/etc/passwd' leads out of .* to /etc/passwd"),
    "a link out": ({"image": "link.jpg"}, "outside_root", "'link.jpg' leads out of .*secret.jpg"),
    "a linked folder out": ({"image": "folder/secret.jpg"}, "outside_root", "leads out of"),
    "upwards, other suffix": ({"image": "../secret.png"}, "outside_root", "leads out of"),
    "a link out, other suffix": ({"image": "link.png"}, "outside_root", "leads out of"),
    "empty file": ({"image": "empty.jpg"}, "empty_images", "image 'empty.jpg' has 0 bytes"),
    "a zero byte": ({"image": "a\0b"}, "schema", "holds a zero byte"),
    "a path that is none": ({"image": 5}, "schema", "an image path must be text, not 5"),
    "half an emoji": ({"conversations": [HUMAN, {"from": "gpt", "value": "\ud83d"}]}, "schema", "half a character"),
    "a video": ({"video": "a.mp4"}, "schema", "it is a video"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_of_conversations_is_named(name, tmp_path):
    changes, kind, reason = BAD_ROWS[name]
    rows = pretrain_rows(3)
    path = write_json(tmp_path / "set", rows)
    (tmp_path / "secret.jpg").write_bytes(image(0))
    (tmp_path / "set/link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "set/folder").symlink_to(tmp_path)
    (tmp_path / "set/empty.jpg").touch()
    path.write_text(json.dumps([rows[0], rows[1] | changes, rows[2]]))
    records = opened(tmp_path, "set/data.json")
    assert records[0].image_id == "000000000" and records[2].image_id == "000000002"
    with pytest.raises(BadSample, match=rf"'000000001' .*data\.json row 1: .*{reason}") as caught:
        records[1]
    assert caught.value.image_id == "000000001" and caught.value.kind == kind


def test_links_within_the_root_are_followed(tmp_path):
    path = write_json(tmp_path, pretrain_rows(1))
    picture = tmp_path / "00000/000000000.jpg"
    picture.rename(tmp_path / "real.jpg")
    picture.symlink_to("../real.jpg")
    assert opened(tmp_path, path.name)[0].images == (image(0),)
    (tmp_path / "linked").symlink_to(tmp_path)  # the root itself may be a link
    assert opened(tmp_path, path.name, images="linked")[0].images == (image(0),)


BAD_FILES = {  # name: (content, error, reason)
    "cut.json": (
        json.dumps(pretrain_rows())[:-200],
        BrokenShard,
        r"cut.json is cut short or damaged: row 8 at byte 1281 of 1396",
    ),
    "cut_between.json": (
        json.dumps([{"conversations": []}])[:-1],
        BrokenShard,
        "row 1 at byte 22 of 22 .*a comma or the end",
    ),
    "no_comma.json": ('[{"conversations": []} {"a": 1}]', BrokenShard, "row 1 at byte 23 of 32"),
    "numbers.json": ("[1, 2]", BrokenShard, "row 0 at byte 1 .*not an object"),
    "more.json": (json.dumps(pretrain_rows(1)) + "[]", BrokenShard, "row 1 at byte .*something follows the list"),
    "object.json": ('{"conversations": [],\n "b": 1}', BadSample, "row 0: it is not JSON"),
    "empty.json": ("", BrokenShard, "is empty: 0 bytes"),
    "none.json": ("[]", BrokenShard, "holds no row"),
    "text.jsonl": ("id,image", ValueError, "neither a JSON list"),
    "meta.json": (
        json.dumps([{"id": "1", "caption": "x", "url": "u"}]),
        ValueError,
        "lacks 'conversations'.*meta.json",
    ),
    "bad.yaml": ("datasets: [", ValueError, "is not YAML"),
    "list.yaml": ("- a", ValueError, "needs a list 'datasets'"),
    "keys.yaml": ("datasets: [{json_path: a.json, weight: 2}]", ValueError, "dataset 0 must have json_path"),
    "csv.yaml": ("datasets: [{json_path: a.csv}]", ValueError, "is neither .json nor .jsonl"),
    "gone.yaml": ("datasets: [{json_path: gone.json}]", ValueError, "names 'gone.json', and there is neither"),
    "no.tar": ("nothing of the kind" * 100, BrokenShard, "is cut short or no tar"),
    "gz.tar": (b"\x1f\x8b\x08rest", ValueError, "is compressed, and random access needs a plain tar"),
    "no.parquet": ("PAR1 but no more", BrokenShard, "is cut short or no parquet file"),
    "data.csv": ("a,b", ValueError, "format='of a .csv file' is unknown; possible"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_says_why(name, tmp_path):
    content, error, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=reason):
        opened(tmp_path, name)


def test_a_damaged_line_is_named_when_it_is_read(tmp_path):
    good = json.dumps({"id": "a", "conversations": said(0, marks=0)})
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good.encode(), good[:-9].encode(), b"[3]", b'{"a": "\xff"}']))
    records = opened(tmp_path, "a.jsonl")
    assert len(records) == 4 and records[0].image_id == "a"
    for index, reason in ((1, "not JSON"), (2, "a list, not an object"), (3, "not JSON: 'utf-8' codec")):
        with pytest.raises(BadSample, match=rf"a.jsonl row {index}: it is {reason}"):
            records[index]


@pytest.mark.parametrize(
    "sampling", ["some", "first", "first:", "first:0", "end:0%", "random:-3", "first:1.5%", "last:3"]
)
def test_a_sampling_that_means_nothing_is_refused(sampling, tmp_path):
    write_json(tmp_path, pretrain_rows(2))
    with pytest.raises(ValueError, match=rf"sampling '{sampling}' is unknown; possible: all, first:N"):
        opened(tmp_path, "data.json", sampling=sampling)
    (tmp_path / "mix.yaml").write_text(f"datasets: [{{json_path: data.json, sampling_strategy: '{sampling}'}}]")
    with pytest.raises(ValueError, match="is unknown; possible"):
        opened(tmp_path, "mix.yaml")


def test_choices_a_format_does_not_have_are_refused(tmp_path):
    write_json(tmp_path / "set", pretrain_rows(2))
    for choices, reason in (
        ({"split": "test"}, r"set/data.json \(llava\) has no splits, got 'test'"),
        ({"min_rating": 3}, r"min_rating=3: set/data.json \(llava\) has no ratings"),
        ({"format": "csv"}, "Source.format='csv' is unknown; possible"),
    ):
        with pytest.raises(ValueError, match=reason):
            opened(tmp_path, "set/data.json", **choices)
    with pytest.raises(ValueError, match=r"holds \['data.json'\]; name the file, not its folder"):
        opened(tmp_path, "set")
    with pytest.raises(ValueError, match=r"no file .*gone.json"):
        opened(tmp_path, "gone.json")


def test_tars_that_are_cut_missing_or_out_of_order(tmp_path):
    members = [("a.jpg", image(0)), ("a.txt", b"red"), ("b.jpg", image(1)), ("b.txt", b"red")]
    path = write_tar(tmp_path / "s-000.tar", members)
    with pytest.raises(BrokenShard, match=r"2 of 3 files are missing: \['.*s-001.tar', '.*s-002.tar'\]"):
        opened(tmp_path, "s-{000..002}.tar")
    with pytest.raises(ValueError, match=r"none of 'x-{0..3}.tar' is there"):
        opened(tmp_path, "x-{0..3}.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        data = tar.getmember("b.jpg").offset_data
    records = opened(tmp_path, path.name)
    path.write_bytes(whole[: data + 5])
    with pytest.raises(BrokenShard, match=r"s-000.tar is cut short or no tar: .*b.jpg should end at byte"):
        opened(tmp_path, path.name)
    with pytest.raises(BrokenShard, match="lost its end since it was opened: 'b' is cut short"):
        records[1]
    write_tar(path, [members[0], members[2], members[1], members[3]])
    with pytest.raises(ValueError, match=r"the files of 'a' do not follow each other.*sort=name"):
        opened(tmp_path, path.name)


def test_bad_samples_of_a_tar(tmp_path):
    cases = {
        "schema": [("a.jpg", image(0)), ("a.cls", b"3")],
        "missing_images": [("a.txt", b"red")],
        "empty_answers": [("a.jpg", image(0)), ("a.txt", b" \n")],
        "empty_images": [("a.jpg", b""), ("a.txt", b"red")],
        "image_marks": [("a.jpg", image(0)), ("a.txt", b"red <image>")],
        "turns": [("a.jpg", image(0)), ("a.json", json.dumps({"conversations": said(0)[:1]}).encode())],
    }
    for kind, members in cases.items():
        write_tar(tmp_path / "a.tar", members)
        with pytest.raises(BadSample, match=r"sample 'a' cannot be used \(.*a.tar row 0: ") as caught:
            opened(tmp_path, "a.tar")[0]
        assert caught.value.kind == kind
    for content, reason in ((b"{", "not JSON"), (b"[1]", "is a list, not an object"), (b"\xff", "not JSON")):
        write_tar(tmp_path / "a.tar", [("a.jpg", image(0)), ("a.json", content)])
        with pytest.raises(BadSample, match=reason):
            opened(tmp_path, "a.tar")[0]
    write_tar(tmp_path / "a.tar", [("a.jpg", image(0)), ("a.txt", b"\xff\xfe")])
    with pytest.raises(BadSample, match=r"its .txt is not UTF-8"):
        opened(tmp_path, "a.tar")[0]


def test_bad_samples_of_parquet(tmp_path):
    rows = fine_vision_rows(6)
    rows[0]["texts"][0]["assistant"] = ""
    rows[1]["texts"][0]["user"] = None
    rows[2]["images"][0]["bytes"] = b""
    rows[3]["texts"] = []
    rows[4]["images"][0] = {"bytes": None, "path": "../out.png"}
    rows[5]["texts"][0]["user"] = "<image> what ?"
    write_parquet(tmp_path / "a.parquet", rows)
    records = opened(tmp_path, "a.parquet")
    kinds = ("empty_answers", "schema", "empty_images", "turns", "outside_root", "image_marks")
    for index, kind in enumerate(kinds):
        with pytest.raises(BadSample, match=rf"sample 'a:{index}' .*a.parquet row {index} of") as caught:
            records[index]
        assert caught.value.kind == kind
    write_parquet(tmp_path / "b.parquet", [{"url": "u", "caption": "c"}])
    with pytest.raises(ValueError, match=r"has the columns \['url', 'caption'\]; it needs images and texts"):
        opened(tmp_path, "b.parquet")


def test_parquet_damaged_within_is_named(tmp_path):
    path = write_parquet(tmp_path / "a/train-0.parquet", fine_vision_rows())
    with pytest.raises(ValueError, match=r"'test' is not a split of .*a; it has \['train'\]"):
        opened(tmp_path, "a", split="test")
    whole = bytearray(path.read_bytes())
    whole[4:200] = bytes(196)
    path.write_bytes(whole)
    with pytest.raises(BrokenShard, match=r"train-0.parquet, row group 0, is damaged"):
        opened(tmp_path, "a")[0]
