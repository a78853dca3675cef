"""Every published schema becomes the same records, by random access and in little memory."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.digit_boards import vocabulary
from tcjax.config import DataConfig, Source
from tcjax.pipeline.chat import Chat
from tcjax.pipeline.lengths import measured
from tcjax.pipeline.readers import json_rows
from tcjax.pipeline.readers.picked import pick
from tcjax.pipeline.sample import outline
from tcjax.pipeline.source import BadSample, Record, Turn, format_of, open_source
from tcjax.pipeline.store import store
from tests.published import (
    fine_vision_rows,
    image,
    mix_rows,
    pretrain_rows,
    said,
    tar_of,
    write_json,
    write_parquet,
    write_tar,
)


def everything(records) -> list[Record]:
    return [records[i] for i in range(len(records))]


def opened(root, path, **choices):
    return open_source(root, Source(path=str(path), **choices))


# LLaVA's JSON


def test_the_558k_captions(tmp_path):
    write_json(tmp_path, pretrain_rows(), "blip_laion_cc_sbu_558k.json")
    records = opened(tmp_path, "blip_laion_cc_sbu_558k.json")
    assert len(records) == 10
    assert records[4] == Record((image(4),), "000000004", [Turn("colour of 4 ?\n<image>", "yes")], {})
    assert records[5] == Record((image(5),), "000000005", [Turn("<image>\ncolour of 5 ?", "red")], {})


def test_mix665k_with_rows_of_text_alone(tmp_path):
    write_json(tmp_path / "playground", mix_rows())
    records = opened(tmp_path, "playground/data.json")
    assert [len(record.images) for record in everything(records)] == [1, 1, 1, 0, 1, 1, 1, 0, 1, 1]
    text = records[3]
    assert text.images == () and text.fields == {"model": ""} and len(text.turns) == 3
    assert records[5].turns == [
        Turn("<image>\ncolour of 5 ?", "red"),
        Turn("colour of 6 ?", "blue"),
        Turn("colour of 7 ?", "4 7 1 9"),
    ]


def test_several_images_of_a_row_and_images_elsewhere(tmp_path):
    rows = [{"id": 7, "image": ["a.jpg", "b/c.jpg"], "conversations": said(1, marks=2), "data_source": "mix"}]
    write_json(tmp_path / "pictures", rows)
    (tmp_path / "pictures/data.json").rename(tmp_path / "data.json")
    (record,) = everything(opened(tmp_path, "data.json", images="pictures"))
    assert record == Record(
        (image(0), image(1)), "7", [Turn("<image>\n<image>\ncolour of 1 ?", "blue")], {"data_source": "mix"}
    )


def test_json_lines_lists_and_any_white_space_are_the_same_rows(tmp_path, monkeypatch):
    rows = mix_rows()
    rows[2]["conversations"][1]["value"] = 'naïve 猫 \u2028 🐝 \\ " }, {'
    write_json(tmp_path, rows, "a.json")
    expected = everything(opened(tmp_path, "a.json"))
    assert expected[2].turns[0].answer == 'naïve 猫 \u2028 🐝 \\ " }, {'
    write_json(tmp_path, rows, "b.json", ensure_ascii=False, indent=2)
    write_json(tmp_path, rows, "c.jsonl")
    text = (tmp_path / "c.jsonl").read_text(encoding="utf-8")
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").rstrip().encode())
    (tmp_path / "e.json").write_bytes(b"\xef\xbb\xbf\n" + (tmp_path / "b.json").read_bytes() + b"\n \n")
    monkeypatch.setattr(json_rows, "_PIECE", 37)  # rows, characters and white space across pieces
    for name in ("a.json", "b.json", "c.jsonl", "d.jsonl", "e.json"):
        assert everything(opened(tmp_path, name)) == expected


LEAVES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), min_size=1, max_size=6),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 1]),
    piece=st.integers(1, 50),
)
@settings(max_examples=150, deadline=None, database=None)
def test_any_list_of_objects_is_found_again_row_by_row(rows, ascii_only, indent, piece):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_rows, "_PIECE", piece)
            found = json_rows.JsonRows(path)
        assert [found[i] for i in range(len(found))] == rows


def test_a_big_file_takes_eight_bytes_per_row_and_is_never_whole_in_memory(tmp_path):
    row = json.dumps({"id": "0", "conversations": said(0, marks=0, turns=2), "model": "x" * 700})
    num = 20_000
    (tmp_path / "big.json").write_text("[" + ", ".join([row] * num) + "]")
    assert (tmp_path / "big.json").stat().st_size > 18e6
    tracemalloc.start()
    records = opened(tmp_path, "big.json")
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == num
    assert records.rows.resident_bytes == 8 * (num + 1)
    assert held < 10 * num + 100_000
    assert most < 16e6  # one piece of the file as bytes, as text, and the next
    assert records[num - 1].fields == {"model": "x" * 700}


def test_a_file_under_another_suffix_is_read(tmp_path):
    rows = pretrain_rows(3)
    write_json(tmp_path, rows)
    for i, suffix in ((0, ".gif"), (1, ".PNG")):
        path = tmp_path / rows[i]["image"]
        path.unlink()
        path.with_suffix(suffix).write_bytes(image(i, suffix[1:].upper()))
    records = opened(tmp_path, "data.json")
    assert [record.images[0][:3] for record in everything(records)] == [b"GIF", b"\x89PN", b"\xff\xd8\xff"]


def test_a_system_turn_is_kept_aside(tmp_path):
    rows = [{"id": "a", "conversations": [{"from": "system", "value": "be brief"}, *said(0, marks=0)]}]
    (record,) = everything(opened(tmp_path, write_json(tmp_path, rows).name))
    assert record.fields == {"system": "be brief"} and record.turns == [Turn("colour of 0 ?", "red")]


# sampling and mixtures


def test_sampling_counts_as_llava_next_does():
    # (sampling, rows) -> kept, by running the lines of LLaVA-NeXT's llava/train/train.py (df17966) that apply a strategy
    for (sampling, total), kept in {
        ("first:3", 10): 3, ("first:30", 10): 10, ("first:10%", 11): 2, ("first:7%", 100): 7, ("first:29%", 100): 29,
        ("end:4", 10): 4, ("end:33%", 10): 4, ("end:100%", 7): 7, ("random:1%", 665_298): 6653, ("random:5", 10): 5,
    }.items():  # fmt: skip
        index = pick(sampling, total)
        assert index is not None and len(index) == kept
    assert pick("all", 10) is None
    np.testing.assert_array_equal(pick("first:3", 10), [0, 1, 2])
    np.testing.assert_array_equal(pick("end:30%", 10), [7, 8, 9])
    one, same, other = pick("random:50", 1000, 1), pick("random:50", 1000, 1), pick("random:50", 1000, 2)
    np.testing.assert_array_equal(one, same)
    assert len(set(one)) == 50 and not np.array_equal(one, other) and max(one) > 500


def test_a_mixture_is_its_parts_end_to_end(tmp_path):
    first, second = pretrain_rows(), mix_rows()
    write_json(tmp_path / "lists", first, "a.json")
    write_json(tmp_path / "more", second, "b.jsonl")
    (tmp_path / "lists/mix.yaml").write_text(
        "datasets:\n"
        "  - json_path: a.json # beside the mixture\n"
        "    sampling_strategy: end:25%\n"
        "  - json_path: more/b.jsonl\n"
        "  - {json_path: a.json, sampling_strategy: 'random:4'}\n"
    )
    records = opened(tmp_path, "lists/mix.yaml")
    a, b = everything(opened(tmp_path, "lists/a.json")), everything(opened(tmp_path, "more/b.jsonl"))
    found = everything(records)
    assert found[:13] == a[7:] + b
    assert len(found) == 17 and all(record in a for record in found[13:])
    assert everything(opened(tmp_path, "lists/mix.yaml")) == found
    others = [everything(opened(tmp_path, "lists/mix.yaml", seed=seed))[13:] for seed in range(1, 5)]
    assert any(other != found[13:] for other in others)
    assert everything(opened(tmp_path, "lists/mix.yaml", sampling="first:2")) == a[7:9]
    write_json(tmp_path / "lists", second, "b.json")
    assert everything(opened(tmp_path, "lists/{a,b}.json")) == a + b


# all of them


def test_threads_read_what_one_would(tmp_path):
    rows = mix_rows()
    write_json(tmp_path, rows)
    write_tar(tmp_path / "a.tar", tar_of(rows, tmp_path))
    write_parquet(tmp_path / "a.parquet", fine_vision_rows(), group=2)
    store(opened(tmp_path, "data.json"), tmp_path / "stored", source={}, shard=3)
    order = [int(i) for i in np.random.default_rng(0).integers(0, 10, 300)]
    for path in ("data.json", "a.tar", "a.parquet", "stored"):
        records = opened(tmp_path, path)
        expected = everything(records)
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(records.__getitem__, order)) == [expected[i] for i in order]


def test_an_outline_needs_no_image(tmp_path):
    rows = mix_rows()
    path = write_json(tmp_path, rows)
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: data.json, sampling_strategy: 'end:3'}]")
    for row in rows:
        if "image" in row:
            (tmp_path / row["image"]).unlink()
    record = opened(tmp_path, path.name)
    assert [outline(record, i).num_images for i in range(10)] == [1, 1, 1, 0, 1, 1, 1, 0, 1, 1]
    assert outline(opened(tmp_path, "mix.yaml"), 1) == outline(record, 8)
    with pytest.raises(BadSample, match="is missing"):
        record[8]
    data = DataConfig(sources=(), tokenizer="none", text_length=40, threads=0)
    lengths = measured(record, Chat(vocabulary.tokenizer()), data)
    assert lengths.known == {} and lengths.images_R.tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1, 1]


def test_the_same_rows_in_every_format(tmp_path):
    rows = mix_rows()
    write_json(tmp_path, rows, "a.json")
    write_json(tmp_path, rows, "b.jsonl")
    (tmp_path / "c.yml").write_text("datasets: [{json_path: a.json}]")
    write_tar(tmp_path / "d.tar", tar_of(rows, tmp_path))
    columns = {"id": None, "image": None, "conversations": None, "model": None}
    held = [columns | row for row in rows]
    for row in held:
        if row["image"]:
            row["image"] = {"bytes": (tmp_path / row["image"]).read_bytes(), "path": row["image"]}
    write_parquet(tmp_path / "e.parquet", held)
    expected = [record[:3] for record in everything(opened(tmp_path, "a.json"))]
    for name, kind in {
        "a.json": "llava", "b.jsonl": "llava", "c.yml": "mixture", "d.tar": "webdataset", "e.parquet": "parquet",
    }.items():  # fmt: skip
        assert format_of(tmp_path, Source(path=name)) == kind
        records = opened(tmp_path, name)
        assert [record[:3] for record in everything(records)] == expected
        outlines = [outline(records, i) for i in range(10)]
        assert outlines == [(name, turns, len(images)) for images, name, turns in expected]
    assert [
        record[:3] for record in everything(opened(tmp_path, "a.json", format="llava", sampling="end:3"))
    ] == expected[7:]
