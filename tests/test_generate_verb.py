"""tcjax evaluate --benchmark, compare and generate at the door: answers come out, wrong words are answered in one line."""

import io
import json
import sys

import pytest

from tcjax.cli import main
from tcjax.reply import Asked, Responder
from tests import suite_files


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    suite_files.tiny_run(root)
    suite_files.pope(root / "pope")
    suite_files.picture(root / "dog.jpg", 1)
    (root / "broken.jpg").write_bytes(b"no image")
    return root


def test_an_answer_is_streamed_and_is_the_batchs(project, capsys):
    responder = Responder.of_folder(project / "run", root=project, batch=1)
    image = responder.picture((project / "dog.jpg").read_bytes(), "dog")
    asked = Asked("What is it?", (image,))
    pieces = list(responder.stream(asked, 12))
    (whole,) = responder.answers([asked], 12)
    assert len(pieces) > 1 and "".join(pieces).strip() == whole
    assert main(["generate", str(project / "run"), str(project / "dog.jpg"), "What is it?", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == "".join(pieces) + "\n"
    words = [str(project / "run"), str(project / "dog.jpg"), "What is it?", "--max-tokens", "12", "--json"]
    assert main(["generate", *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"question": "What is it?", "answer": "".join(pieces)}


def test_a_question_needs_no_image(project, capsys):
    assert main(["generate", str(project / "run"), "What is it?", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_questions_are_read_at_a_terminal_until_an_empty_line(project, capsys, monkeypatch):
    typed = io.StringIO("one?\ntwo?\n\nthree?\n")
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["generate", str(project / "run"), str(project / "dog.jpg"), "--max-tokens", "2"]) == 0
    assert typed.readline() == "three?\n" and capsys.readouterr().out.count("> ") == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "{root}/pope", "{root}/dog.jpg", "what?"], "pope is not a run's folder"),
        (["generate", "{root}/run", "{root}/cat.jpg", "what is it?"], "no such image file: {root}/cat.jpg"),
        (["generate", "{root}/run", "{root}/cat.jpg"], "no such image file: {root}/cat.jpg"),
        (["generate", "{root}/run", "{root}/broken.jpg", "what?"], "broken.jpg' cannot be read"),
        (["generate", "{root}/run", "{root}/dog.jpg"], "no question: tcjax generate RUN image.jpg"),
        (["generate", "{root}/run", "a <image> b"], "holds image marks of its own"),
        (["generate", "{root}/run", "what?", "--max-tokens", "0"], "--max-tokens 0: takes a whole number from 1 up"),
        (
            ["evaluate", "{root}/run", "--benchmark", "vqa", "--files", "{root}"],
            "benchmark 'vqa' is unknown; choose one",
        ),
        (
            ["evaluate", "{root}/run", "--benchmark", "pope", "--files", "{root}", "--mode", "x"],
            "has no mode 'x'; choose",
        ),
        (["evaluate", "{root}/run", "--benchmark", "pope"], "--files DIR names the folder"),
        (["evaluate", "{root}/run", "--split", "val"], "--split: only with --benchmark NAME"),
        (["evaluate", "{root}/run", "--benchmark", "pope", "--files", "{root}"], "needs coco_pope_random.json or"),
        (["evaluate", "{root}/run", "--benchmark", "pope", "--files", "{root}", "--batch", "0"], "--batch 0"),
        (["compare", "{root}/run", "{root}/pope"], "have no benchmark in common"),
    ],
)
def test_bad_input_is_one_clear_line(words, said, project, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main([word.replace("{root}", str(project)) for word in words]) == 2
    error = capsys.readouterr().err
    assert said.replace("{root}", str(project)) in error and error.startswith(f"tcjax {words[0]}: ")


def test_a_benchmark_and_a_comparison_at_the_door(project, capsys):
    words = ["evaluate", str(project / "run"), "--benchmark", "pope", "--files", str(project / "pope"), "--quiet"]
    words += ["--limit", "6", "--max-tokens", "2", "--controls", "blank,random", "--mode", "llava"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "pope all, mode llava" in table and "blank" in table and "precision/random" in table
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] == 6 and list(found["controls"]) == ["blank", "random"]
    assert main(["compare", str(project / "run"), str(project / "run"), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    names = ["pope-all-llava", "pope-all-llava-blank", "pope-all-llava-random"]
    assert [line["benchmark"] for line in lines] == names and all(line["gain"]["mean"] == 0 for line in lines)
    assert main(["compare", str(project / "run"), str(project / "run")]) == 0
    assert "a - b" in capsys.readouterr().out
