"""Intervals hold what they promise, against scipy's own and by simulation; scores count what was said, no more."""

import math

import numpy as np
import pytest
from scipy import stats

from tcjax.evaluate.scores import (
    Answer,
    exact_match,
    is_right,
    mean_accuracy,
    retention,
    token_accuracy,
)
from tcjax.evaluate.statistics import Estimate, difference, over_seeds, over_tasks, over_tasks_and_seeds, proportion

END = 5


@pytest.mark.parametrize(("right", "n"), [(0, 7), (8, 10), (500, 1000), (7, 7)])
def test_a_proportion_has_wilsons_interval(right, n):
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(proportion(right, n), (right / n, theirs.low, theirs.high, n), atol=1e-12)


def test_a_proportion_outside_its_questions_is_refused():
    with pytest.raises(ValueError, match=r"right=3 of n=2"):
        proportion(3, 2)


def test_one_seed_keeps_its_own_interval():
    assert over_seeds([proportion(8, 10)]) == proportion(8, 10)


def test_seeds_that_agree_keep_the_interval_of_the_questions():
    """The same 10 questions thrice are still 10 questions."""
    np.testing.assert_allclose(over_seeds([proportion(8, 10)] * 3), proportion(8, 10), atol=1e-15)


def test_seeds_that_differ_add_students_t_in_quadrature():
    pooled = over_seeds([proportion(60, 100), proportion(70, 100), proportion(80, 100)])
    t_half = 4.302652729911275 * 0.1 / math.sqrt(3)
    low = 0.7 - math.hypot(0.7 - proportion(70, 100).low, t_half)
    assert pooled.n == 100
    np.testing.assert_allclose((pooled.mean, pooled.low), (0.7, low), atol=1e-12)
    assert proportion(70, 100).high < pooled.high <= 1.0


def test_seeds_with_fewer_questions_count_as_the_fewest():
    assert over_seeds([proportion(8, 10), proportion(16, 20)]) == proportion(8, 10)


def test_the_mean_over_tasks_weighs_tasks_and_not_questions():
    mean = over_tasks([proportion(1, 10), proportion(900, 1000)])
    assert mean.n == 1010
    np.testing.assert_allclose(mean.mean, 0.5)
    half = math.hypot(0.1 - proportion(1, 10).low, 0.9 - proportion(900, 1000).low) / 2
    np.testing.assert_allclose(mean.low, 0.5 - half)


def test_a_bad_seed_widens_the_mean_over_tasks():
    good, bad = [proportion(80, 100)] * 2, [proportion(60, 100)] * 2
    one, two = over_tasks_and_seeds([good]), over_tasks_and_seeds([good, bad])
    np.testing.assert_allclose(one, over_tasks(good), atol=1e-15)
    assert two.mean == pytest.approx(0.7)
    assert two.high - two.low > 3 * (one.high - one.low)


def test_intervals_cover_the_truth_95_times_in_100():
    """Three seeds, 200 questions: training noise and question noise both drawn, 400 times."""
    rng, n, truth, covered = np.random.default_rng(0), 200, 0.7, 0
    for _ in range(400):
        hard_n = rng.normal(0, 1, n)  # how hard each question is, the same for all seeds
        skill_r = rng.normal(stats.norm.ppf(truth) * math.sqrt(2.25), 0.5, 3)
        seeds = [proportion(int((hard_n + rng.normal(0, 1, n) < skill).sum()), n) for skill in skill_r]
        pooled = over_seeds(seeds)
        covered += pooled.low <= truth <= pooled.high
    assert 0.92 <= covered / 400 <= 1.0


def test_a_paired_difference_is_sharper_than_two_intervals_and_the_same_every_time():
    rng = np.random.default_rng(1)
    a = rng.random(500) < 0.8
    b = a & (rng.random(500) < 0.95)  # b errs where a errs, and a little more
    gain = difference(a, b, samples=2000)
    assert gain == difference(a, b, samples=2000)
    assert gain.mean == pytest.approx(a.mean() - b.mean())
    assert gain.low > 0, "unpaired intervals of 0.80 and 0.76 would overlap"
    assert proportion(b.sum(), 500).high > proportion(a.sum(), 500).low


def test_questions_of_one_image_stand_or_fall_together():
    """Ten copies of each image's question carry no more information than one."""
    rng = np.random.default_rng(2)
    a, b = rng.random(60) < 0.7, rng.random(60) < 0.5
    once = difference(a, b, samples=4000)
    copied = difference(np.repeat(a, 10), np.repeat(b, 10), images=np.repeat(np.arange(60), 10), samples=4000)
    blind = difference(np.repeat(a, 10), np.repeat(b, 10), samples=4000)
    np.testing.assert_allclose(copied[:3], once[:3], atol=1e-12)
    assert blind.high - blind.low < 0.5 * (copied.high - copied.low)


def test_weights_let_tasks_weigh_the_same():
    a, b = [True] * 9 + [False], [True] * 9 + [True]  # 9 questions of one task, 1 of another
    assert difference(a, b).mean == pytest.approx(-0.1)
    assert difference(a, b, weights=[1 / 9] * 9 + [1]).mean == pytest.approx(-0.5)


def test_answers_of_unequal_number_cannot_be_paired():
    with pytest.raises(ValueError, match=r"have \[3, 2, 3, 3\] entries"):
        difference([True] * 3, [True] * 2)


ANSWERS = [
    Answer("read", [1, 2, 3, 4], [1, 2, 3, 4, END, 9]),  # right; what follows the end mark does not count
    Answer("read", [1, 2, 3, 4], [1, 2, 9, 4, END]),  # 3 of 4
    Answer("count", [7, END], [7, END, END]),  # right; the answer may carry its end mark
    Answer("count", [7], [7, 7, 7]),  # says too much: wrong, 1 of 3 tokens
    Answer("caption", [1, 2], [END]),  # says nothing: wrong, 0 of 2
]


def test_an_answer_is_right_if_all_of_it_is_said_and_no_more():
    assert is_right(ANSWERS, END).tolist() == [True, False, True, False, False]
    accuracy = exact_match(ANSWERS, END)
    assert accuracy["read"] == proportion(1, 2)._asdict()
    assert list(accuracy) == ["read", "count", "caption"]


def test_any_of_several_ids_ends_an_answer():
    assert is_right(ANSWERS, (9, END)).tolist() == [True, False, True, False, False]
    assert is_right([Answer("read", [1, 2], [1, 2, 9, 3])], (9, END)).tolist() == [True]
    assert is_right([Answer("read", [1, 2], [1, 2])], ()).tolist() == [True]


def test_token_accuracy_counts_positions_and_length():
    assert token_accuracy(ANSWERS, END) == {"read": 7 / 8, "count": 2 / 4, "caption": 0.0}


def test_the_mean_leaves_the_caption_out():
    accuracy = exact_match(ANSWERS, END)
    assert mean_accuracy(accuracy).mean == 0.5
    assert mean_accuracy({"caption": Estimate(0.25, 0, 1, 4)._asdict()}).mean == 0.25


def test_retention_is_the_mean_of_the_tasks_own_ratios():
    assert retention({"a": 0.4, "b": 0.9, "caption": 0.0}, {"a": 0.8, "b": 0.9, "caption": 0.5}) == pytest.approx(0.75)
    assert retention({"a": 0.4}, {"a": 0.0}) is None


@pytest.mark.parametrize(
    ("answers", "message"),
    [([], "no answers to score"), ([Answer("read", [], [1])], r"question 0 \(read\) has no answer")],
)
def test_nothing_to_score_is_said(answers, message):
    with pytest.raises(ValueError, match=message):
        exact_match(answers, END)
