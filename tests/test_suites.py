"""What the benchmarks' definitions say: readers, prompts, normalisation, edge cases, checked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from tcjax.evaluate.statistics import proportion
from tcjax.evaluate.suite import SUITES, compare, score
from tcjax.evaluate.suites import captions, coco, cub, docvqa, gqa, mme, pope, ptb, scienceqa, textvqa, vqav2
from tcjax.evaluate.suites.question import Judged, Question, counted, share
from tcjax.evaluate.suites.soft_accuracy import normalise, soft_accuracy
from tests import suite_files

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

NORMALISED = {
    "Yes.": "yes",
    "The Red Car": "red car",
    "10.5": "10.5",
    "1,000": "1000",
    "U.S.A.": "usa",
    "t-shirt": "t shirt",
    "black/white": "black white",
    "hello,world": "hello world",
    "a, b": "b",
    "dont": "don't",
    "Im": "im",
    "youre": "you're",
    "$5": "$5",
    "two": "2",
    "none": "0",
    "a an the": "",
    "what?! no": "what no",
    "-5": "5",
    "v1.0.": "v1.0",
    "3:30 pm": "3:30 pm",
    "6'2\"": "6'2",
    "...": "",
}


@pytest.mark.parametrize(("text", "plain"), NORMALISED.items())
def test_vqa_normalisation(text, plain):
    assert normalise(text) == plain


@pytest.mark.parametrize(("matches", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_so_many_of_ten_people(matches, value):
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert soft_accuracy("red", answers, "always") == pytest.approx(value)


def test_ten_equal_answers_are_not_normalised_by_the_official_scorer():
    for said, truth in (("Yes", "yes"), ("two", "2")):
        assert soft_accuracy(said, [truth] * 10, "official") == 0
        assert soft_accuracy(said, [truth] * 10, "always") == 1
    assert soft_accuracy(" yes\n", ["yes"] * 10, "official") == 1


def test_the_33rd_full_stop_stays():
    assert normalise("a." * 33) == "a" * 33 + "."


def test_vlmevalkit_keeps_a_full_stop_after_a_digit():
    assert normalise("v1.0.", "vlmevalkit") == "v1.0." and normalise("cat.", "vlmevalkit") == "cat"


# Readers and prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_every_mode_reads_scores_and_submits(name, tmp_path):
    suite_files.FILES[name](tmp_path)
    suite = SUITES[name]
    assert suite.TITLE and suite.FILES and next(iter(suite.SPLITS))
    for mode in suite.MODES:
        questions = suite.read(tmp_path, next(iter(suite.SPLITS)), mode)
        assert len({question.id for question in questions}) == len(questions)
        if name == "coco" and mode != "approx" and ptb.find_jar() is None:
            continue
        right = [question.truths[0].upper() if name == "scienceqa" else question.truths[0] for question in questions]
        report = score(name, questions, right, mode)
        assert report.headline.mean == pytest.approx(report.metrics[suite.HEADLINE])
        assert report.headline.low <= report.headline.mean <= report.headline.high
        assert suite.submission(questions, right, mode) and suite.max_tokens(mode) >= 0
        for image in questions[0].images:
            assert not image.startswith("/")


@pytest.mark.parametrize(
    ("name", "most"), [("gqa", 100), ("docvqa", 100), ("pope", 100), ("mme", 2000), ("scienceqa", 100), ("cub", 100)]
)
def test_the_truth_scores_all_there_is(name, most, tmp_path):
    suite_files.FILES[name](tmp_path)
    questions = SUITES[name].read(tmp_path, next(iter(SUITES[name].SPLITS)), SUITES[name].MODES[0])
    assert score(name, questions, [question.truths[0] for question in questions]).headline.mean == pytest.approx(most)


def test_prompts_and_image_places(tmp_path):
    make = {name: suite_files.FILES[name](tmp_path / name) for name in suite_files.FILES}
    first = vqav2.read(make["vqav2"])[0]
    assert first.prompt == "What is 0?" + SHORT and first.id == "100" and first.fields["answer_type"] == "yes/no"
    assert first.images == ("val2014/COCO_val2014_000000000009.jpg", "COCO_val2014_000000000009.jpg")
    assert not vqav2.read(make["vqav2"], "test")[0].truths
    assert gqa.read(make["gqa"])[1].prompt == "Is it 1?" + SHORT
    assert gqa.read(make["gqa"])[0].fields["entailed"] == ["071"]  # neither itself nor what is not asked
    told = [textvqa.read(make["textvqa"], "val", mode)[0].prompt for mode in textvqa.MODES]
    assert told == [
        "what is the brand 0?" + SHORT,
        "what is the brand 0?\nReference OCR token: DAKOTA, 0" + SHORT,
        "What is the brand 0?" + SHORT,
    ]
    assert docvqa.read(make["docvqa"])[0].images == ("documents/pyb0.png", "pyb0.png")
    assert pope.read(make["pope"])[0].prompt == "Is there a thing 0 in the image?"
    assert pope.read(make["pope"], "popular", "llava")[0].prompt == "Is there a thing 0 in the image?" + SHORT
    assert mme.read(make["mme"])[0].prompt == "Is it 0 or Yes? Please answer yes or no."
    assert mme.read(make["mme"], "OCR", "llava")[0].prompt == "Is it 0 or Yes?" + SHORT
    assert coco.read(make["coco"])[0].prompt == "Provide a one-sentence caption for the provided image."
    assert len(coco.read(make["coco"])) == 3 and len(coco.read(make["coco"], "val2014")[0].truths) == 5
    science = scienceqa.read(make["scienceqa"])
    assert science[0].prompt == "Context: N/A\nQuestion: Which is 0?\nOptions: (A) a cat (B) a dog" + LETTER
    assert science[3].images == () and science[0].images[1] == "1/image.png"
    lmms = scienceqa.read(make["scienceqa"], "test", "lmms-eval")[1].prompt
    assert lmms == "Context: Look closely.\nWhich is 1?\nA. a cat\nB. a dog\nC. a bee" + LETTER
    birds = cub.read(make["cub"])
    assert len(birds) == 4 and birds[0].choices == ("Black footed Albatross", "Crow", "Fish Crow")


def test_llavas_own_question_file_is_taken_word_for_word(tmp_path):
    suite_files.textvqa(tmp_path)
    lines = []
    for i in range(4):
        text = f"What is the brand {i}?\nReference OCR token: A, B{SHORT}"
        lines.append(json.dumps({"question_id": f"003a{i // 2}", "image": "x.jpg", "text": text}))
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text("\n".join(lines))
    assert textvqa.read(tmp_path, "val", "llava")[1].prompt == json.loads(lines[1])["text"]
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text(lines[0])
    with pytest.raises(ValueError, match="lacks question 34603"):
        textvqa.read(tmp_path, "val", "llava")


SPOILED = {  # suite: (file, its new content or None to remove it, what is said)
    "vqav2": ("v2_mscoco_val2014_annotations.json", {"annotations": []}, "question 100 of .* has no annotation"),
    "gqa": ("testdev_balanced_questions.json", {"1": {"question": "?"}}, r"lacks \['imageId'\]"),
    "textvqa": ("TextVQA_0.5.1_val.json", {"data": {}}, "'data' of .* is a dict"),
    "docvqa": ("val_v1.0.json", None, "needs val_v1.0.json or val_v1.0_withQT.json"),
    "pope": ("coco/coco_pope_random.json", '{"question_id": 1}', r"lacks \['image', 'text', 'label'\]"),
    "mme": ("Your_Results/OCR.txt", "0.jpg\tIs it?\tYes\n1.jpg\tIs it?\tNo\n", "two consecutive lines per image"),
    "coco": ("dataset_coco.json", "[]", "holds a list; COCO captions expects {images"),
    "scienceqa": ("pid_splits.json", {"test": ["99"]}, "lists problem 99 of test, which"),
    "cub": ("classes.txt", "1 2 3\n", "expected are two columns, class name"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_missing_or_foreign_file_is_refused_with_what_was_expected(name, tmp_path):
    suite_files.FILES[name](tmp_path)
    file, content, said = SPOILED[name]
    if content is None:
        (tmp_path / file).unlink()
    else:
        suite_files.write(tmp_path / file, content)
    with pytest.raises(ValueError, match=said):
        SUITES[name].read(tmp_path, next(iter(SUITES[name].SPLITS)), SUITES[name].MODES[0])


def test_text_that_is_no_json_is_refused_with_the_schema(tmp_path):
    (tmp_path / "testdev_balanced_questions.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON .*; GQA expects {qid:"):
        gqa.read(tmp_path)
    suite_files.pope(tmp_path)
    (tmp_path / "coco/coco_pope_random.json").write_text("[]\n")
    with pytest.raises(ValueError, match=r"line 1 of .* holds a list"):
        pope.read(tmp_path)


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "mode", "heard"),
    [
        ("NO", "official", "yes"),
        ("", "official", "yes"),
        ("none", "official", "yes"),
        ("It is not. Yes", "official", "no"),
        ("no,", "official", "no"),
        ("Yes. No", "official", "yes"),
        ("NO ", "lmms-eval", "no"),
        ("no.", "lmms-eval", "other"),
        ("yes and no", "vlmevalkit", "other"),
        ("No.", "vlmevalkit", "no"),
    ],
)
def test_pope_parser(said, mode, heard):
    assert pope.parse(said, mode) == heard


@pytest.mark.parametrize(
    ("said", "mode", "heard"),
    [
        ("not sure", "official", "no"),
        ("i think yes", "official", "other"),
        ("Yes, it is", "official", "yes"),
        ("yes\n", "official", "yes"),
        ("   yes", "official", "other"),
        ("   yes", "lmms-eval", "yes"),
        ("y", "official", "other"),
        ("y", "lmms-eval", "yes"),
    ],
)
def test_mme_parser(said, mode, heard):
    assert mme.parse(said, mode) == heard


def test_mme_example_of_two_images(tmp_path):
    suite_files.mme(tmp_path)
    questions = mme.read(tmp_path, "existence")
    report = score("mme", questions, ["yes", "no", "yes", "yes"])
    found = {name: report.metrics[f"{name}/existence"] for name in ("acc", "acc+", "score")}
    assert found == {"acc": 75, "acc+": 50, "score": 125} and report.metrics["cognition"] == 0


@pytest.mark.parametrize(
    ("said", "answers", "official", "lmms"),
    [
        ("cat", ["cat"], 1, 1),
        ("cats", ["cat"], 0.75, 0.75),
        ("abxy", ["abcd"], 0.5, 0.5),
        ("xyz", ["abc"], 0, 0),
        ("", ["abc"], 0, 0),
        ("none", ["none"], 0, 1),
        ("cats", ["dog", "cat"], 0.75, 0.75),
        ("a  b", ["a b"], 0.75, 1),
        (" cat ", ["cot"], 2 / 3, 0.8),
    ],
)
def test_anls(said, answers, official, lmms):
    assert docvqa.anls(said, answers) == pytest.approx(official)
    assert docvqa.anls(said, answers, "lmms-eval") == pytest.approx(lmms)


def test_gqa_modes_differ_in_what_they_ignore(tmp_path):
    suite_files.gqa(tmp_path)
    questions = gqa.read(tmp_path)
    said = ["Red.", "yes.", "red", "Yes", "RED", "yes"]
    right = {mode: [judged.score for judged in score("gqa", questions, said, mode).each] for mode in gqa.MODES}
    assert right == {"official": [0, 0, 1, 0, 0, 1], "llava": [1] * 6, "lmms-eval": [1] * 6}


CAPTIONS = [
    ("a red bus on the street", ["a red bus on the street", "a bus driving down a city street"]),
    ("two cats sleep on a couch", ["two cats sleeping on a sofa", "a pair of cats on a couch"]),
    ("a man riding a wave", ["a man riding a wave on a surfboard", "surfer on a big wave"]),
]


@pytest.mark.parametrize(
    ("images", "cider"), [(3, [5.551307, 2.164295, 3.740339]), (2, [5.551307, 2.467173]), (1, [0.0])]
)
def test_cider_of_the_example(images, cider):
    said, references = zip(*CAPTIONS[:images], strict=True)
    found = captions.cider_d([text.split() for text in said], [[text.split() for text in some] for some in references])
    np.testing.assert_allclose(found, cider, atol=1e-6)


def test_bleu_and_rouge_of_the_example():
    questions = [Question(str(i), "", (str(i),), tuple(refs), {}) for i, (_, refs) in enumerate(CAPTIONS)]
    report = score("coco", questions, [said for said, _ in CAPTIONS], "approx")
    bleu = [report.metrics[f"BLEU-{n}"] for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(bleu, [94.1176, 89.8177, 83.7158, 77.8172], atol=1e-4)
    assert report.headline.mean == pytest.approx(381.8647, abs=1e-4)
    rouge = [captions.rouge_l(said.split(), [text.split() for text in refs]) for said, refs in CAPTIONS]
    np.testing.assert_allclose(rouge, [1.0, 0.666667, 0.738499], atol=1e-6)


def test_exact_captions_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(ptb.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"Java is not installed.*--mode approx"):
        ptb.exact(["a dog"])
    monkeypatch.setattr(ptb.shutil, "which", lambda name: "java")
    monkeypatch.setattr(ptb, "find_jar", lambda: None)
    with pytest.raises(ValueError, match=r"stanford-corenlp-3\.4\.1\.jar of the package pycocoevalcap is not found"):
        ptb.exact(["a dog"])


# Intervals -----------------------------------------------------------------------------------------------------------


def test_a_share_with_an_image_each_has_wilsons_interval(tmp_path):
    suite_files.cub(tmp_path)
    questions = cub.read(tmp_path)
    found = score("cub", questions, [questions[0].truths[0]] * 4).headline
    wilson = proportion(2, 4)
    assert found[:3] == pytest.approx([100 * part for part in wilson[:3]])


def judge(scores):
    return [Judged(value, counted(value, ["accuracy"])) for value in scores]


def test_questions_of_one_image_are_drawn_together():
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.random(60), 10)
    from tcjax.evaluate.suite import headline

    clustered = headline("vqav2", judge(scores), [f"{i // 10}" for i in range(600)], "official")
    alone = headline("vqav2", judge(scores), [f"{i}" for i in range(600)], "official")
    assert clustered.mean == pytest.approx(alone.mean) == pytest.approx(100 * scores.mean())
    assert 2 < (clustered.high - clustered.low) / (alone.high - alone.low) < 4.5  # the square root of 10


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(1)
    a = rng.random(300)
    b = np.clip(a - 0.02 + rng.normal(0, 0.01, 300), 0, 1)
    of_a, of_b, gain = compare("vqav2", judge(a), judge(b), [f"{i}" for i in range(300)], "official")
    assert gain.mean == pytest.approx(of_a.mean - of_b.mean) and gain.low > 0
    assert gain.high - gain.low < 0.2 * (of_a.high - of_a.low)


def test_predictions_must_belong_to_questions_whose_answers_are_known(tmp_path):
    suite_files.vqav2(tmp_path)
    with pytest.raises(ValueError, match="6 questions and 5 predictions"):
        score("vqav2", vqav2.read(tmp_path), ["x"] * 5)
    with pytest.raises(ValueError, match="answers of this split of vqav2 are not published"):
        score("vqav2", vqav2.read(tmp_path, "test"), ["x"] * 6)


def test_a_share_of_nothing_is_0():
    assert share(1.0, 0.0) == 0 and list(share(np.array([1.0, 1.0]), np.array([0.0, 2.0]))) == [0, 0.5]


def test_the_guide_names_every_benchmark_mode_and_file():
    guide = (Path(__file__).parents[1] / "docs/benchmarks.md").read_text()
    for name, suite in SUITES.items():
        (row,) = (line for line in guide.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {', '.join(suite.MODES)} |" in row
        assert suite.HEADLINE in row
