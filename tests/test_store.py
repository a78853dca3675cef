"""Stored records equal their source row by row; a preparation goes on where it stopped and is whole or not there."""

import json

import numpy as np
import pytest

from tcjax.config import Source
from tcjax.pipeline.readers.stored import MANIFEST, pack, unpack
from tcjax.pipeline.sample import BadSample, BrokenShard, Record, Turn
from tcjax.pipeline.source import open_source
from tcjax.pipeline.store import store
from tests.published import fine_vision_rows, mix_rows, write_json, write_parquet
from tests.tiny_boards import SOURCE, make_project


def opened(root, path, **choices):
    return open_source(root, Source(path=str(path), **choices))


def same(one: Record, other: Record) -> bool:
    np.testing.assert_equal(one.fields, other.fields)  # arrays among them
    return one[:3] == other[:3]


def test_a_record_survives_packing():
    fields = {
        "grid": np.arange(6, dtype=np.int32).reshape(2, 3), "share": np.float32(0.5), "task": np.array([b"a", b"b"], object),
        "raw": b"\x00\xff", "nested": {"array": [1, {"bytes": None}], "x": [True, 0.1, "猫"]}, "empty": np.zeros((0, 2)),
    }  # fmt: skip
    record = Record((b"", b"\x00png", b"x"), "naïve", [Turn("<image> a\n", "b"), Turn("", "\u2028")], fields)
    again = unpack(pack(record))
    assert same(again, record)
    assert again.fields["grid"].dtype == np.int32 and again.fields["task"].dtype == object
    assert isinstance(again.fields["share"], np.float32)
    assert unpack(pack(Record((), "t", [], {}))) == Record((), "t", [], {})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = make_project(tmp_path_factory.mktemp("project"), train=9, validation=1, test=3)
    write_json(root / "llava", mix_rows())
    write_parquet(root / "rows.parquet", fine_vision_rows())
    return root


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("path", [SOURCE.path, "llava/data.json", "rows.parquet"])
def test_stored_records_equal_the_source_row_by_row(project, tmp_path, path, threads):
    records = opened(project, path)
    steps = []
    out = store(
        records,
        tmp_path / "out",
        source={"path": path},
        shard=4,
        threads=threads,
        progress=lambda *at: steps.append(at),
    )
    stored = opened(tmp_path, "out")
    assert len(stored) == len(records) and stored.label_names == records.label_names
    assert all(same(stored[i], records[i]) for i in reversed(range(len(records))))
    assert steps == [(i + 1, len(records)) for i in range(len(records))]
    facts = json.loads((out / MANIFEST).read_text())
    assert facts["records"] == len(records) and [shard["records"] for shard in facts["shards"]] == [
        4,
        4,
        len(records) - 8,
    ]
    assert sorted(file.name for file in out.iterdir()) == sorted(
        [MANIFEST, *(shard["file"] for shard in facts["shards"])]
    )
    assert not (tmp_path / "out.preparing").exists()
    assert len(opened(tmp_path, "out", sampling="first:30%")) == -(-len(records) * 3 // 10)


def test_a_preparation_that_was_cut_short_goes_on_and_is_not_there_before(project, tmp_path):
    records = opened(project, "llava/data.json")
    read, dies_at = [], 6

    class Watched:
        name, folder, split, label_names = records.name, records.folder, records.split, records.label_names

        def __len__(self):
            return len(records)

        def __getitem__(self, index):
            read.append(index)
            if index == dies_at:
                raise OSError("the disk is gone")
            return records[index]

    out = tmp_path / "out"
    with pytest.raises(OSError, match="the disk is gone"):
        store(Watched(), out, source={}, shard=2)
    assert not out.exists() and (tmp_path / "out.preparing").is_dir()
    shard = tmp_path / "out.preparing/00001-of-00005.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])  # the machine went down before all of it was on the disk
    dies_at = -1
    read.clear()
    store(Watched(), out, source={}, shard=2)
    assert read == [2, 3, 6, 7, 8, 9]
    assert all(same(opened(tmp_path, "out")[i], records[i]) for i in range(10))

    read.clear()
    assert store(Watched(), out, source={}, shard=2) == out and not read
    with pytest.raises(ValueError, match="out is there already and holds something else"):
        store(Watched(), out, source={"content": "other"}, shard=2)
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    store(records, tmp_path / "again", source={}, shard=2)
    assert whole[MANIFEST] == (tmp_path / "again" / MANIFEST).read_bytes()  # hashes and all

    dies_at = 5
    with pytest.raises(OSError, match="the disk is gone"):
        store(Watched(), tmp_path / "third", source={"v": 1}, shard=2)
    dies_at = -1
    read.clear()
    store(Watched(), tmp_path / "third", source={"v": 2}, shard=2)  # begun from other data: nothing of it is kept
    assert read == list(range(10))


def test_bad_rows_stop_a_preparation_or_are_left_out_and_named(tmp_path):
    rows = mix_rows()
    for i in (1, 4, 5):
        rows[i]["conversations"] = rows[i]["conversations"][:-1]
    write_json(tmp_path, rows)
    records = opened(tmp_path, "data.json")
    with pytest.raises(BadSample, match=r"data.json row 1: 3 turns: an odd number"):
        store(records, tmp_path / "out", source={})
    store(records, tmp_path / "out", source={}, shard=2, leave_out=True)
    stored = opened(tmp_path, "out")
    assert [stored[i].image_id for i in range(len(stored))] == [rows[i]["id"] for i in (0, 2, 3, 6, 7, 8, 9)]
    facts = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert [reason.split("'")[1] for reason in facts["left_out"]] == [rows[i]["id"] for i in (1, 4, 5)]
    assert [shard["file"][:5] for shard in facts["shards"]] == ["00000", "00001", "00003", "00004"]  # 2 held nothing
    write_json(tmp_path / "all", [row | {"conversations": []} for row in rows])
    with pytest.raises(ValueError, match=r"none of the 10 rows of .* is a sample; run `tcjax data verify`"):
        store(opened(tmp_path, "all/data.json"), tmp_path / "none", source={}, leave_out=True)
    with pytest.raises(ValueError, match="0 records per shard"):
        store(records, tmp_path / "x", source={}, shard=0)


def test_a_folder_that_is_something_else_is_left_alone(project, tmp_path):
    (tmp_path / "out.preparing").mkdir()
    (tmp_path / "out.preparing/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"out.preparing is in the way and no preparation of ours; remove it"):
        store(opened(project, "llava/data.json"), tmp_path / "out", source={})
    assert (tmp_path / "out.preparing/thesis.tex").exists()


def test_damaged_stored_records_are_named(project, tmp_path):
    out = store(opened(project, "llava/data.json"), tmp_path / "out", source={}, shard=5)
    shard = out / "00001-of-00002.array_record"
    whole = shard.read_bytes()
    spoiled = bytearray(whole)
    spoiled[whole.index(b"text7") + 1] ^= 1
    shard.write_bytes(spoiled)
    stored = opened(tmp_path, "out")
    assert stored[6].image_id == "000000000006"
    with pytest.raises(BrokenShard, match=r"record 7 is damaged in .*00001-of-00002"):
        stored[7]
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        BrokenShard, match=rf"00001-of-00002.array_record is damaged: {len(whole) - 1} of {len(whole)} bytes"
    ):
        opened(tmp_path, "out")
    shard.unlink()
    with pytest.raises(BrokenShard, match=r"00001-of-00002.array_record is missing; remove"):
        opened(tmp_path, "out")
    facts = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(facts | {"version": 9}))
    with pytest.raises(ValueError, match="is of version 9; this tcjax reads 1"):
        opened(tmp_path, "out")
