"""Every benchmark end to end: files of the published schema, a tiny random VLM, answers, scores, submissions, controls."""

import json

import numpy as np
import pytest

from tcjax.answer_suite import Benchmark, compare_runs, evaluate_suite
from tcjax.evaluate.suite import SUITES
from tcjax.pipeline.images import CorruptImage, normalise
from tcjax.pipeline.pictures import Noise, locate
from tcjax.reply import Asked, Responder
from tests import suite_files


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    suite_files.tiny_run(root)
    suite_files.tiny_run(root, "other", seed=1)
    for name, make in suite_files.FILES.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def responder(project) -> Responder:
    return Responder.of_folder(project / "run", root=project, batch=4)


def ask(responder, project, suite, **changes):
    files = project / suite
    images = suite_files.images_of(suite, files)
    benchmark = Benchmark(**{"name": suite, "files": files, "images": images, "max_tokens": 3} | changes)
    return evaluate_suite(responder, benchmark, out=project / "run", quiet=True)


@pytest.mark.parametrize("name", SUITES)
def test_a_benchmark_is_asked_judged_and_written(name, responder, project):
    found = ask(responder, project, name)
    place = project / f"run/benchmarks/{name}-{found['split']}-{found['mode']}"
    lines = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == found["questions"] > 0
    assert set(lines[0]) == {"id", "image", "question", "prediction", "truths", "score", "parts"}
    assert len({line["id"] for line in lines}) == len(lines)
    head = found["headline"]
    assert head["low"] <= head["mean"] <= head["high"] and head["mean"] == pytest.approx(found["metrics"][head["name"]])
    assert json.loads((place / "scores.json").read_text())["headline"] == head
    assert list((place / "submission").iterdir())


def test_what_is_asked_alone_is_answered_the_same(responder, project):
    """Batches, padding and buckets change no answer."""
    image = responder.picture((project / "gqa/images/n0.jpg").read_bytes(), "n0")
    asked = [Asked(f"Is it {'very ' * i}red?", (image,) if i % 3 else ()) for i in range(7)]
    together = responder.answers(asked, 4)
    alone = Responder.of_folder(project / "run", root=project, batch=1)
    assert together == [alone.answers([one], 4)[0] for one in asked]
    assert len(set(together)) > 1


def test_a_question_that_was_answered_is_not_asked_again(responder, project, monkeypatch):
    first = ask(responder, project, "vqav2", limit=3, max_tokens=2)
    asked = []
    answers = responder.answers
    monkeypatch.setattr(responder, "answers", lambda rows, n: asked.extend(rows) or answers(rows, n))
    assert ask(responder, project, "vqav2", max_tokens=2)["questions"] == 6 and len(asked) == 3
    asked.clear()
    assert ask(responder, project, "vqav2", limit=3, max_tokens=2)["headline"] == first["headline"] and not asked
    ask(responder, project, "vqav2", limit=3, max_tokens=4)  # another setting is another asking
    assert len(asked) == 3


def test_an_asking_that_was_killed_within_a_line_goes_on(responder, project, monkeypatch):
    whole = ask(responder, project, "textvqa")
    path = project / "run/benchmarks/textvqa-val-official/predictions.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    asked, answers = [], responder.answers
    monkeypatch.setattr(responder, "answers", lambda rows, n: asked.extend(rows) or answers(rows, n))
    assert ask(responder, project, "textvqa") == whole and len(asked) == 1
    assert sorted(path.read_text().splitlines()) == sorted(text.splitlines())


def test_controls_ask_the_same_questions_about_other_images(responder, project, monkeypatch):
    seen: dict[str, list] = {}
    control = [""]
    answers = responder.answers

    def listen(rows, tokens):
        seen.setdefault(control[0], []).extend(row.images[0][0] for row in rows)
        return answers(rows, tokens)

    monkeypatch.setattr(responder, "answers", listen)
    for control[0] in ("own", "blank", "shuffled", "random"):
        controls = () if control[0] == "own" else (control[0],)
        found = ask(responder, project, "docvqa", controls=controls, max_tokens=5)
        assert list(found["controls"]) == list(controls)
    own, blank, shuffled, random = (np.stack(seen[name]) for name in ("own", "blank", "shuffled", "random"))
    own, shuffled = normalise(own, responder.pixels), normalise(shuffled, responder.pixels)
    assert not blank.any()
    np.testing.assert_array_equal(shuffled, own[[2, 3, 0, 1]])
    assert np.abs(random - own).min() >= 0 and np.abs(random[0] - random[2]).max() > 0.5
    np.testing.assert_array_equal(random[0], random[1])  # two questions about one image see one noise
    np.testing.assert_allclose(random.mean((0, 1, 2)), own.mean((0, 1, 2)), atol=0.1)
    np.testing.assert_allclose(random.std((0, 1, 2)), own.std((0, 1, 2)), atol=0.1)


def test_a_split_whose_answers_are_hidden_gives_a_submission_and_no_score(responder, project):
    found = ask(responder, project, "vqav2", split="test")
    assert "headline" not in found
    rows = json.loads(
        (project / "run/benchmarks/vqav2-test-official/submission/v2_OpenEnded_mscoco_results.json").read_text()
    )
    assert [row["question_id"] for row in rows] == list(range(100, 106)) and set(rows[0]) == {"question_id", "answer"}


def test_two_runs_are_compared_question_by_question(responder, project):
    other = Responder.of_folder(project / "other", root=project, batch=4)
    ask(responder, project, "pope")
    evaluate_suite(
        other, Benchmark(name="pope", files=project / "pope", max_tokens=3), out=project / "other", quiet=True
    )
    (found,) = compare_runs(project / "run", project / "other")
    assert found.title == "pope-all-official" and found.headline == "F1"
    assert found.gain.mean == pytest.approx(found.a.mean - found.b.mean)
    (same,) = compare_runs(project / "other", project / "other")
    assert same.gain[:3] == (0.0, 0.0, 0.0)


def test_runs_without_a_common_benchmark_or_with_other_questions_are_not_compared(project, tmp_path):
    with pytest.raises(ValueError, match="no benchmark in common"):
        compare_runs(project / "run", tmp_path)
    place = tmp_path / "benchmarks/pope-all-official"
    place.mkdir(parents=True)
    own = project / "run/benchmarks/pope-all-official"
    (place / "scores.json").write_text((own / "scores.json").read_text())
    (place / "answers.jsonl").write_text("\n".join((own / "answers.jsonl").read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"answered 18 questions and .* 17 others"):
        compare_runs(project / "run", tmp_path)


def test_wrong_words_and_missing_files_are_answered_with_the_right_ones(responder, project, tmp_path):
    for changes, said in (
        ({"name": "vqa"}, "benchmark 'vqa' is unknown; choose one of vqav2, gqa"),
        ({"mode": "llava2"}, "has no mode 'llava2'; choose one of official, llava, lmms-eval"),
        ({"split": "vall"}, "has no split 'vall'; choose one of val, train"),
        ({"controls": ("grey",)}, r"controls \['grey'\] are unknown; choose among blank, shuffled, random"),
        ({"files": tmp_path / "nowhere"}, "is not a folder; --files names the one with v2_OpenEnded"),
        ({"files": tmp_path}, "needs v2_OpenEnded_mscoco_val2014_questions.json in .* which is not there"),
        ({"images": tmp_path}, "3 of 3 images are not below .* --images names the folder"),
        ({"limit": -1}, "limit=-1"),
    ):
        with pytest.raises(ValueError, match=said):
            ask(responder, project, "vqav2", **changes)


def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    for place in ("../secret.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(ValueError, match="leads out of"):
            locate(tmp_path / "in", [place])
    assert locate(tmp_path / "in", ["a.jpg", "b/a.jpg"]) is None


def test_an_image_that_cannot_be_read_is_named(responder, project, tmp_path):
    suite_files.docvqa(tmp_path)
    (tmp_path / "documents/pyb1.png").write_bytes(b"not an image")
    with pytest.raises(CorruptImage, match=r"documents/pyb1\.png"):
        ask(responder, project, "docvqa", files=tmp_path, images=tmp_path, max_tokens=1)


def test_noise_needs_an_image_to_be_like():
    with pytest.raises(ValueError, match="at least one readable image"):
        Noise([])
