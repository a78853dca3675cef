"""A source's fingerprint changes when any of its files does, and only then."""

import os

import pytest

from tcjax import identity
from tcjax.config import DataConfig, Source
from tcjax.pipeline.source import open_source
from tcjax.pipeline.store import store
from tcjax.record import fingerprint
from tests.published import fine_vision_rows, image, mix_rows, pretrain_rows, write_json, write_parquet, write_tar


def prints(root, path) -> str:
    source = Source(path=path, images="pictures")
    whole = fingerprint(DataConfig(sources=(source,), tokenizer="none"), root)
    assert whole != fingerprint(source, root)
    return fingerprint(source, root)


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_json(tmp_path / "lists", pretrain_rows(), "a.json")
    write_json(tmp_path / "lists", mix_rows(), "b.jsonl")
    (tmp_path / "lists/mix.yaml").write_text("datasets: [{json_path: a.json}, {json_path: lists/b.jsonl}]")
    for i in range(2):
        write_tar(tmp_path / f"wds/s-{i:03d}.tar", [("a.jpg", image(i)), ("a.txt", b"red")])
        write_parquet(tmp_path / f"hf/data/train-{i:05d}.parquet", fine_vision_rows(3 + i))
    store(open_source(tmp_path, Source(path="lists/a.json", images="lists")), tmp_path / "stored", source={})
    return tmp_path


CASES = {  # path of a source: a file whose bytes belong to it
    "lists/a.json": "lists/a.json",
    "lists/b.jsonl": "lists/b.jsonl",
    "lists/mix.yaml": "lists/a.json",
    "./lists/mix.yaml": "lists/b.jsonl",
    "lists/../lists/mix.yaml": "lists/mix.yaml",
    "wds/s-000.tar": "wds/s-000.tar",
    "wds": "wds/s-001.tar",
    "wds/s-{000..001}.tar": "wds/s-001.tar",
    "hf": "hf/data/train-00001.parquet",
    "stored": "stored/records.json",
}


@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("whole", [identity.WHOLE, 0])
def test_a_changed_byte_is_another_fingerprint(project, path, whole, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", whole)  # 0: as files of more than 2 GiB are identified
    monkeypatch.setattr(identity, "_END", 16)
    before, file = prints(project, path), project / CASES[path]
    assert prints(project, path) == before
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    about = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert prints(project, path) != before


def test_files_beside_a_source_and_loose_images_do_not_count(project):
    before = {path: prints(project, path) for path in CASES}
    (project / "pictures/x.jpg").write_bytes(image(1))
    (project / "pictures/records.json").write_text("{}")
    (project / "wds/README.md").write_text("x")
    assert {path: prints(project, path) for path in CASES} == before
    write_tar(project / "wds/s-002.tar", [("a.jpg", image(3))])
    changed = {path for path in CASES if prints(project, path) != before[path]}
    assert "wds" in changed and changed <= {"wds", "wds/s-{000..001}.tar"}


def test_choices_of_a_source_are_part_of_it_and_nothing_there_is_no_content(project):
    one = Source(path="lists/a.json")
    others = [Source(path="lists/a.json", **more) for more in ({"sampling": "first:2"}, {"seed": 1}, {"images": "x"})]
    assert len({fingerprint(source, project) for source in [one, *others]}) == 4
    assert identity.dataset(project, "gone.json") == identity.dataset(project, "pictures") == ""
    (project / "bad.yaml").write_text("datasets: [")
    assert identity.dataset(project, "bad.yaml") == identity.file_hash(project / "bad.yaml")
