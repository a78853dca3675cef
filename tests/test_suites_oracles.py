"""Equal to the original scorers on generated predictions; tests/golden/suites.json says which were run."""

import json
from pathlib import Path

import numpy as np
import pytest

from tcjax.evaluate.suite import score
from tcjax.evaluate.suites import captions, docvqa, gqa, mme, pope, ptb, scienceqa
from tcjax.evaluate.suites.question import Question
from tcjax.evaluate.suites.soft_accuracy import DIALECTS, soft_accuracy

GOLDEN = json.loads((Path(__file__).parent / "golden/suites.json").read_text())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_soft_accuracy(dialect):
    cases = GOLDEN["soft_accuracy"]
    ours = [soft_accuracy(case["prediction"], case["answers"], dialect) for case in cases]
    theirs = [case[dialect] for case in cases]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # stored with six digits
    assert 0.2 < np.mean(theirs) < 0.9


def yes_no(labels):
    return [
        Question(f"{i}", "", (f"{i // 6}",), (label,), {"kind": "random", "question_id": i, "question": ""})
        for i, label in enumerate(labels)
    ]


def test_pope_as_llava_and_its_authors_score_it():
    golden = GOLDEN["pope"]
    for mode in ("official", "llava"):
        found = score("pope", yes_no(golden["labels"]), golden["predictions"], mode).metrics
        theirs = golden["llava"]
        names = {
            "Accuracy": "accuracy",
            "Precision": "precision",
            "Recall": "recall",
            "F1 score": "F1",
            "Yes ratio": "yes",
        }
        for name, metric in names.items():
            assert found[metric] == pytest.approx(100 * theirs[name], abs=1e-9)


def test_pope_as_lmms_eval_scores_it():
    golden = GOLDEN["pope"]
    found = score("pope", yes_no(golden["labels"]), golden["predictions"], "lmms-eval").metrics
    for metric, value in golden["lmms-eval"].items():
        assert found[metric] == pytest.approx(100 * value, abs=1e-9)


def test_pope_as_vlmevalkit_reads_it():
    golden = GOLDEN["pope"]
    names = {"Yes": "yes", "No": "no", "Unknown": "other"}
    ours = [pope.parse(said, "vlmevalkit") for said in golden["predictions"]]
    assert ours == [names[theirs] for theirs in golden["vlmevalkit"]]


def test_mme():
    golden, questions = GOLDEN["mme"], []
    subtasks = mme.PERCEPTION + mme.COGNITION
    each = len(golden["truths"]) // len(subtasks)
    for i, truth in enumerate(golden["truths"]):
        fields = {"subtask": subtasks[i // each], "number": i % each}
        questions.append(Question(f"{i}", "", (f"{i // 2}",), (truth,), fields))
    found = score("mme", questions, golden["predictions"], "official").metrics
    for subtask, value in golden["per"].items():
        assert found[f"score/{subtask}"] == pytest.approx(value, abs=1e-9)
    for mode in ("official", "lmms-eval"):
        found = score("mme", questions, golden["predictions"], mode).metrics
        for metric, value in golden[mode].items():
            assert found[metric] == pytest.approx(value, abs=1e-9)


def test_scienceqa():
    golden = GOLDEN["scienceqa"]
    cases = list(zip(golden["predictions"], golden["choices"], golden["answers"], strict=True))
    llava = [scienceqa.parse(said, ["x"] * num, "llava") for said, num, _ in cases]
    assert [scienceqa.LETTERS.index(letter) if letter else -1 for letter in llava] == golden["llava"]
    lmms = [scienceqa.parse(said, ["x"] * num, "lmms-eval") for said, num, _ in cases]
    right = [letter == scienceqa.LETTERS[answer] for letter, (_, _, answer) in zip(lmms, cases, strict=True)]
    assert [float(verdict) for verdict in right] == golden["lmms-eval"]


def test_anls():
    cases = GOLDEN["anls"]
    ours = [docvqa.anls(case["prediction"], case["answers"], "lmms-eval") for case in cases]
    np.testing.assert_allclose(ours, [case["lmms-eval"] for case in cases], atol=1e-6)


def test_gqa(tmp_path):
    golden = GOLDEN["gqa"]
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(golden["questions"]))
    questions = gqa.read(tmp_path)
    found = score("gqa", questions, [golden["predictions"][q.id] for q in questions], "official").metrics
    theirs = golden["official"]
    assert theirs["consistency"] > 0
    for metric in ("accuracy", "binary", "open", "consistency", "distribution"):
        assert found[metric] == pytest.approx(theirs[metric], abs=1e-9)
    for kind, name in (("structural", "accuracyPerStructuralType"), ("semantic", "accuracyPerSemanticType")):
        for which, value in theirs[name].items():
            assert found[f"{kind}/{which}"] == pytest.approx(value, abs=1e-9)


def test_captions_on_tokenised_text():
    golden = GOLDEN["captions"]
    said = [text.split() for text in golden["hyp"]]
    references = [[text.split() for text in some] for some in golden["gts"]]
    np.testing.assert_allclose(captions.cider_d(said, references), golden["CIDEr-D"], atol=1e-8)
    rouge = [captions.rouge_l(*pair) for pair in zip(said, references, strict=True)]
    np.testing.assert_allclose(rouge, golden["ROUGE-L"], atol=1e-8)
    counts = [captions.bleu_counts(*pair) for pair in zip(said, references, strict=True)]
    summed = captions.BleuCounts(*(tuple(np.sum(part, 0)) if np.ndim(part[0]) else sum(part) for part in zip(*counts)))  # noqa: B905
    np.testing.assert_allclose(captions.bleu(summed), golden["BLEU"], atol=1e-11)


@pytest.mark.parametrize(("text", "words"), GOLDEN["captions"]["ptb"])
def test_words_as_stanfords_tokenizer_has_them(text, words):
    assert ptb.approximate([text]) == [words]


def test_stanfords_tokenizer_itself_where_it_is_installed():
    texts, words = zip(*GOLDEN["captions"]["ptb"], strict=True)
    try:
        found = ptb.exact(texts)
    except ValueError as error:
        pytest.skip(str(error))
    assert found == list(words)
