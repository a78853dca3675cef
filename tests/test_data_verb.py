"""`tcjax data`: everything that is wrong with a source at once, a page to look at, any source stored; with a run's eyes."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from data.digit_boards import vocabulary
from tcjax.cli import main
from tcjax.cli_data import Data
from tcjax.config import Pixels, Source
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat
from tcjax.pipeline.source import open_source
from tcjax.pipeline.store import SHARD
from tcjax.pipeline.verify import verify
from tests.published import fine_vision_rows, image, mix_rows, pretrain_rows, said, write_json, write_parquet
from tests.tiny_boards import OWN_BUILDER

PIXELS = Pixels(size_YX=(8, 8))

CONFIG = """
from pathlib import Path
from tcjax.config import DataConfig, Pixels, Run, Source, TrainConfig
from tests.tiny import TOWER, VLM
import dataclasses

def run():
    pixels = Pixels(size_YX=(16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    model = dataclasses.replace(VLM, tower=dataclasses.replace(TOWER, pixels=pixels))
    sources = (Source(path="llava/data.json", sampling="first:4"), Source(path="rows.parquet"))
    data = DataConfig(sources=sources, tokenizer="tokenizer.json", batch=2, text_length=40)
    return Run(name="a", model=model, data=data, train=TrainConfig(steps=1))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a tokenizer, a config of two sources, and their files."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/a.py").write_text(CONFIG)
    vocabulary.tokenizer().save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "llava", mix_rows())
    write_parquet(tmp_path / "rows.parquet", fine_vision_rows())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoiled_rows(folder) -> list[dict]:
    """Twelve rows beside their images, most of them wrong in a way of their own."""
    rows = pretrain_rows(11)
    write_json(folder, rows)
    rows[1]["conversations"] = rows[1]["conversations"][:1]
    rows[2]["conversations"][1]["value"] = " "
    rows[3]["conversations"][0]["value"] += " <image>"
    (folder / rows[4]["image"]).unlink()
    picture = folder / rows[5]["image"]
    picture.write_bytes(picture.read_bytes()[:-40])
    (folder / rows[6]["image"]).write_bytes(image(6, "GIF"))
    rows[7]["conversations"][1]["value"] = "purple"
    rows[8]["image"] = "../../etc/passwd"
    (folder / rows[9]["image"]).write_bytes(b"")
    rows[10]["conversations"] += said(0, marks=0, turns=9)
    rows += [{"id": "000000000", "conversations": [{"from": "system", "value": "s"}, *said(1, marks=0)]}]
    (folder / "data.json").write_text(json.dumps(rows))
    return rows


@pytest.mark.parametrize("threads", [1, 3])
def test_verify_finds_everything_and_does_not_stop_at_the_first(tmp_path, threads):
    spoiled_rows(tmp_path)
    records = open_source(tmp_path, Source(path="data.json"))
    steps = []
    report = verify(
        records,
        Chat(vocabulary.tokenizer()),
        PIXELS,
        text_length=40,
        threads=threads,
        progress=lambda *at: steps.append(at),
    )
    assert steps == [(i, 12) for i in range(1, 13)]
    assert report.problems == {
        "corrupt_images": 1, "wrong_extension": 1, "duplicate_ids": 1, "turns": 1, "empty_answers": 1, "image_marks": 1,
        "missing_images": 1, "outside_root": 1, "empty_images": 1, "dropped_turns": 1, "unknown_words": 1,
    }  # fmt: skip
    assert report.corrupt_images == ["000000005"]
    assert report.wrong_extension == ["000000006: 00000/000000006.jpg is GIF"]
    assert report.duplicate_ids == ["000000000"] and report.unknown_words == {"purple": 1}
    assert "data.json row 4: image '00001/000000004.jpg' is missing" in report.refused["missing_images"][0]
    assert list(report.dropped_turns) == ["000000010"]
    assert (report.records, report.images, report.text_only, report.system_turns) == (12, 5, 1, 1)
    assert report.longest_id == "000000010" and 30 < report.longest <= 40


def test_verify_counts_images_that_come_again_and_what_nothing_learns_from(tmp_path):
    rows = pretrain_rows(4)
    for row in rows[1:]:
        row["image"] = rows[0]["image"]
    write_json(tmp_path, rows)
    records = open_source(tmp_path, Source(path="data.json"))
    chat = Chat(vocabulary.tokenizer())
    report = verify(records, chat, PIXELS, text_length=40)
    assert report.problems == {} and report.repeated_images == 3
    assert len(verify(records, chat, PIXELS, text_length=4).unsupervised) == 4


def test_the_verb_verifies_a_file_with_its_own_flags(project, capsys):
    spoiled_rows(project / "bad")
    flags = ["--tokenizer", "tokenizer.json", "--size", "8x8", "--text-length", "40"]
    assert main(["data", "verify", "bad/data.json", *flags]) == 1
    printed = capsys.readouterr().out
    assert "bad/data.json train: 12 records, 5 images (0 came before), 1 without; longest conversation" in printed
    assert "  turns: 1\n    sample '000000001' cannot be used" in printed and "11 problems" in printed
    assert main(["data", "verify", "bad/data.json", *flags, "--sampling", "first:1"]) == 0
    assert capsys.readouterr().out.endswith("no problems\n")
    assert main(["data", "verify", "bad/data.json", *flags, "--json", "--threads", "1"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["source"]["path"] == "bad/data.json" and report["problems"]["outside_root"] == 1
    kinds = ",".join(report["problems"])
    assert main(["data", "verify", "bad/data.json", *flags, "--allow", kinds]) == 0
    assert "turns: 1, allowed" in capsys.readouterr().out


def test_the_verb_sees_as_a_run_does(project, capsys):
    assert main(["data", "verify", "--config", "configs/a.py", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["records"], second["records"]) == (4, 10) and second["images"] == 9
    assert main(["data", "verify", "llava/data.json", "--config", "configs/a.py", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["records"] == 4  # the config's own sampling holds
    assert main(["data", "verify", "llava/data.json", "--config", "configs/a.py", "--sampling", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["records"] == 10
    assert main(["data", "verify", "rows.parquet", "--config", "configs/a.py", "--text-length", "3"]) == 1
    assert "unsupervised: " in capsys.readouterr().out


def test_the_page_shows_the_conversation_and_the_pixels_of_the_tower(project, capsys):
    assert main(["data", "preview", "--config", "configs/a.py", "--rows", "9", "--out", "pages/a.html"]) == 0
    first, second = capsys.readouterr().out.split()
    page = (project / first).read_text()
    assert "<title>data first:4 train</title>" in page
    assert page.count("<section>") == 4 and page.count("<img ") == 3  # one row is text alone
    assert "row 3, text3: 0 images, 6 of" in page
    assert re.search(r"<b>[^<]*blue &lt;end&gt;</b>", page)
    assert "&lt;image&gt; x 4" in page
    pictures = re.findall(r'base64,([^"]+)"', page)
    pixels = Pixels(size_YX=(16, 16))
    for i, picture in enumerate(pictures):
        with Image.open(io.BytesIO(base64.b64decode(picture))) as shown:
            np.testing.assert_array_equal(np.asarray(shown), images.decode(image(i), pixels, "a"))
    page = (project / second).read_text()
    assert page.count("<section>") == 9 and page.count("<img ") == sum(i % 3 for i in range(9))


def test_the_page_names_rows_that_cannot_be_used(project):
    spoiled_rows(project / "bad")
    flags = ["--tokenizer", "tokenizer.json", "--rows", "20", "--out", "page.html"]
    assert main(["data", "preview", "bad/data.json", *flags]) == 0
    page = (project / "page.html").read_text()
    assert page.count("<section>") == 12 and page.count('class="refused"') == 8
    assert "row 8: sample &#x27;000000008&#x27; cannot be used" in page and "leads out of" in page
    assert "no id for [&#x27;purple&#x27;]" in page


def test_the_verb_stores_any_source(project, capsys):
    command = ["data", "prepare", "llava/data.json", "--out", "stored", "--shard", "4"]
    assert main(command) == 0
    assert capsys.readouterr().out == "stored: 10 records in 3 files, 0 rows left out\n"
    one, other = (open_source(project, Source(path=path)) for path in ("llava/data.json", "stored"))
    assert [one[i] for i in range(10)] == [other[i] for i in range(10)]
    assert main(command) == 0  # it is there
    path = project / "llava/data.json"
    path.write_text(path.read_text().replace("blue", "red"))
    assert main(command) == 2
    assert "stored is there already and holds something else" in capsys.readouterr().err
    assert Data(action="prepare").shard == SHARD


def test_the_verb_still_runs_a_folders_own_builder(project, capsys):
    (project / "own").mkdir()
    (project / "own/own_dataset_builder.py").write_text(OWN_BUILDER)
    assert main(["data", "prepare", "own"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "own/prepared/own/2.0.0"
    flags = ["--tokenizer", "tokenizer.json", "--size", "8x8", "--json"]
    assert main(["data", "verify", "own", *flags]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["problems"] == {"corrupt_images": 3, "duplicate_ids": 1, "unknown_words": 1}
    assert main(["data", "verify", "own", *flags, "--split", "train[4:7]"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify"], "tcjax data verify SOURCE: name a dataset folder or file"),
        (["prepare", "--config", "configs/a.py"], "tcjax data prepare SOURCE: name"),
        (["verify", "gone.json"], "no file "),
        (["verify", "x-{0..2}.tar"], "none of 'x-{0..2}.tar' is there"),
        (["verify", "llava"], "name the file, not its folder"),
        (["verify", "llava/data.json", "--size", "8"], "--size takes two whole numbers"),
        (["verify", "llava/data.json", "--tokenizer", "gone.json"], "no tokenizer at gone.json"),
        (["preview", "llava/data.json", "--rows", "0"], "--rows 0: takes a whole number"),
        (["prepare", "gone.json", "--out", "x"], "no file "),
    ],
)
def test_bad_words_are_one_clear_line(project, arguments, said, capsys):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("tcjax data: ")
