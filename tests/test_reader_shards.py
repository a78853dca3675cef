"""Tars, parquet and TFDS folders become records by random access; literal rows."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.registered import skip_registration

from tcjax.config import Source
from tcjax.pipeline.readers.files import expand
from tcjax.pipeline.source import Record, Turn, open_source
from tests.published import fine_vision_rows, image, said, write_parquet, write_tar


def everything(records) -> list[Record]:
    return [records[i] for i in range(len(records))]


def opened(root, path, **choices):
    return open_source(root, Source(path=str(path), **choices))


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


def test_what_tfds_prepared_for_tensorflow_or_of_another_kind_is_refused(tmp_path):
    make_coco(tmp_path / "tfds")
    (info,) = (tmp_path / "tfds").rglob("dataset_info.json")
    (features,) = (tmp_path / "tfds").rglob("features.json")
    whole, fields = info.read_text(), features.read_text()
    info.write_text(whole.replace("array_record", "tfrecord"))
    with pytest.raises(
        ValueError, match=r"was prepared as tfrecord, which only TensorFlow reads; .*file_format=array_record"
    ):
        opened(tmp_path, "tfds")
    info.write_text(whole)
    features.write_text(fields.replace('"captions"', '"sentences"'))
    with pytest.raises(
        ValueError, match=r"has the features \['image', .*'sentences'\]; a dataset needs image, image_id"
    ):
        opened(tmp_path, "tfds")
