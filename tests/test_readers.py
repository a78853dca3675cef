"""Every published schema becomes the same records, by random access and in little memory."""

import json
import tracemalloc

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.registered import skip_registration

from tcjax.config import Source
from tcjax.pipeline.readers import json_rows
from tcjax.pipeline.readers.files import expand
from tcjax.pipeline.readers.picked import pick
from tcjax.pipeline.sample import outline
from tcjax.pipeline.source import BadSample, Record, Turn, format_of, open_source
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
    # (sampling, rows) -> kept, by running the branch of llava/train/train.py that applies the strategy
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


# web-dataset


def test_a_web_dataset_of_captions(tmp_path):
    for shard in range(3):
        members = []
        for i in range(shard * 4, shard * 4 + 4):
            members += [(f"x/{i:04d}.jpg", image(i)), (f"x/{i:04d}.txt", b" red 7\n")]
            members.append((f"x/{i:04d}.json", json.dumps({"url": "u", "caption": "other"}).encode()))
        write_tar(tmp_path / f"wds/shard-{shard:03d}.tar", members)
    records = opened(tmp_path, "wds/shard-{000..002}.tar")
    assert len(records) == 12
    assert records[6] == Record((image(6),), "x/0006", [Turn("", "red 7")], {"url": "u"})
    assert everything(opened(tmp_path, "wds")) == everything(records)
    assert len(opened(tmp_path, "wds/shard-{000,002}.tar")) == 8
    assert records.resident_bytes < 100 * len(records)


def test_a_caption_in_json_a_webp_and_several_images(tmp_path):
    members = [
        ("a.json", b'{"caption": "blue 3", "width": 8}'), ("a.webp", image(0, "WEBP")),
        ("b.0.png", image(1, "PNG")), ("b.1.PNG", image(2, "PNG")), ("b.txt", b"yes"), ("b.cls", b"4"), ("README", b"x"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    assert everything(opened(tmp_path, "a.tar")) == [
        Record((image(0, "WEBP"),), "a", [Turn("", "blue 3")], {"width": 8}),
        Record((image(1, "PNG"), image(2, "PNG")), "b", [Turn("", "yes")], {}),
    ]


def test_braces_expand_as_in_a_shell():
    assert expand("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand("plain.tar") == ["plain.tar"]
    for wrong, reason in (("{5..3}.tar", "counts from 5 down to 3"), ("{x}.tar", "mean nothing")):
        with pytest.raises(ValueError, match=reason):
            expand(wrong)


# parquet


def test_fine_vision_rows(tmp_path):
    rows = fine_vision_rows()
    write_parquet(tmp_path / "chartqa/train-00000-of-00002.parquet", rows[:7])
    write_parquet(tmp_path / "chartqa/train-00001-of-00002.parquet", rows[7:])
    write_parquet(tmp_path / "chartqa/test-00000-of-00001.parquet", rows[:2])
    records = opened(tmp_path, "chartqa")
    assert len(records) == 10 and len(opened(tmp_path, "chartqa", split="test")) == 2
    record = records[8]
    assert record.images == (image(80, "PNG"), image(81, "PNG"))
    assert record.turns == [Turn("colour of 8 ?", "3")] and record.image_id == "train-00001-of-00002:8"
    assert record.fields["source"] == "chartqa" and record.fields["relevance_ratings"] == [4]
    assert records[3].images == ()
    order = np.random.default_rng(0).permutation(10)  # row groups come and go
    assert [records[int(i)].turns for i in order] == [
        [Turn(text["user"], text["assistant"]) for text in rows[int(i)]["texts"]] for i in order
    ]
    assert len(records._held) == 2


def test_ratings_keep_the_texts_that_nanovlm_would(tmp_path):
    rows = fine_vision_rows()
    rows[4]["relevance_ratings"] = [None]
    rows[2]["relevance_ratings"] = None
    rows[5]["formatting_ratings"] = [1, 4]
    write_parquet(tmp_path / "a.parquet", rows)

    def kept(row: dict, least: int) -> list[Turn]:  # nanoVLM, data/datasets.py, _get_messages
        names = [f"{name}_ratings" for name in ("relevance", "image_correspondence", "visual_dependency", "formatting")]
        good = []
        for i, text in enumerate(row["texts"]):
            if not any(row[n] is not None and row[n][i] is not None and row[n][i] < least for n in names):
                good.append(Turn(text["user"], text["assistant"]))
        return good

    for least in (1, 3, 4, 5):
        expected = [turns for row in rows if (turns := kept(row, least))]
        records = opened(tmp_path, "a.parquet", min_rating=least)
        assert [record.turns for record in everything(records)] == expected
        for record in everything(records):
            ratings = record.fields["relevance_ratings"]
            assert ratings is None or len(ratings) == len(record.turns)
    with pytest.raises(ValueError, match="holds no row rated 6 or more"):
        opened(tmp_path, "a.parquet", min_rating=6)


def test_the_cauldron_has_no_ratings_and_llava_onevision_has_conversations(tmp_path):
    rows = [{"images": [{"bytes": image(1), "path": None}], "texts": [{"user": "a", "assistant": "b", "source": "s"}]}]
    write_parquet(tmp_path / "cauldron.parquet", rows)
    assert opened(tmp_path, "cauldron.parquet")[0].turns == [Turn("a", "b")]
    with pytest.raises(ValueError, match=r"min_rating=3, and .* has none of \['relevance_ratings'"):
        opened(tmp_path, "cauldron.parquet", min_rating=3)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/x.jpg").write_bytes(image(2))
    rows = [{"id": "q1", "image": {"bytes": None, "path": "x.jpg"}, "conversations": said(1), "data_source": "ai2d"}]
    write_parquet(tmp_path / "ov.parquet", rows)
    record = opened(tmp_path, "ov.parquet", images="pictures")[0]
    assert record == Record((image(2),), "q1", [Turn("<image>\ncolour of 1 ?", "blue")], {"data_source": "ai2d"})


# TFDS


def make_coco(folder):
    """A tiny dataset with the features of TFDS's published coco_captions (object_detection/coco.py), without TensorFlow."""
    with skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            name = "coco_captions"
            VERSION = tfds.core.Version("1.1.0")

            def _info(self):
                features = tfds.features
                box = {"id": np.int64, "area": np.int64, "bbox": features.BBoxFeature(), "is_crowd": np.bool_}
                return self.dataset_info_from_configs(
                    features=features.FeaturesDict({
                        "image": features.Image(encoding_format="jpeg"),
                        "image/filename": features.Text(),
                        "image/id": np.int64,
                        "objects": features.Sequence(box | {"label": features.ClassLabel(num_classes=80)}),
                        "captions": features.Sequence({"text": np.str_, "id": np.int64}),
                    })
                )  # fmt: skip

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(6), "val": self._generate_examples(2)}

            def _generate_examples(self, num):
                for i in range(num):
                    corners = tfds.features.BBox(0.0, 0.25, 0.5, 1.0)
                    box = {"area": 3, "bbox": corners, "id": i, "is_crowd": False, "label": 4}
                    captions = [{"id": 10 * i + k, "text": f"red {k} \n"} for k in range(5)]
                    name = f"COCO_train2014_{i:012d}.jpg"
                    yield i, {
                        "image": image(i), "image/filename": name, "image/id": 1000 + i,
                        "objects": [box], "captions": captions,
                    }  # fmt: skip

    Tiny.code_path = epath.Path(__file__)
    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()


def test_coco_captions_of_tfds(tmp_path):
    make_coco(tmp_path / "tfds")
    records = opened(tmp_path, "tfds")
    assert len(records) == 6 and len(opened(tmp_path, "tfds/coco_captions", split="val[:1]")) == 1
    found = {record.image_id: record for record in everything(records)}
    assert sorted(found) == [str(1000 + i) for i in range(6)]
    record = found["1003"]
    assert record.images == (image(3),)
    assert record.turns == [Turn("", f"red {k}") for k in range(5)]
    assert record.fields["caption_ids"] == [30, 31, 32, 33, 34]
    assert record.fields["image/filename"] == b"COCO_train2014_000000000003.jpg"


# all of them


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
