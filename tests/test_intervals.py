"""Intervals by simulation, differences, pass@k and Hybrid Accuracy by hand."""

import itertools
import math

import numpy as np
import pytest

from adaptive_reasoning.core import intervals


def table(x) -> dict:
    return dict(enumerate(np.atleast_2d(np.asarray(x, float).T).T.tolist()))


@pytest.mark.parametrize("alike", [0.3, 1, 1000])
@pytest.mark.parametrize("samples", [1, 16])
@pytest.mark.parametrize("questions", [30, 500])
def test_the_interval_covers_the_truth(questions, samples, alike):
    """93 to 97 % of the intervals, over models whose accuracy is anywhere between 10 and 90 %.

    Difficulties of the questions are drawn from beta distributions, from all or nothing (0.3) to all alike (1000). The
    plain mean and standard error would cover 82 % of evaluations with 30 questions at an accuracy of 0.9.
    """
    rng, evaluations, hits = np.random.default_rng(1), {30: 2000, 500: 1000}[questions], 0
    for _ in range(evaluations):
        truth = rng.uniform(0.1, 0.9)
        solved = rng.beta(truth * alike, (1 - truth) * alike, questions)
        low, high = intervals.accuracy_interval(table(rng.random((questions, samples)) < solved[:, None]))
        hits += low <= truth <= high
    assert 0.93 <= hits / evaluations <= 0.97


@pytest.mark.parametrize("samples", [1, 16])
@pytest.mark.parametrize("questions", [30, 500])
def test_the_paired_interval_covers_the_truth_and_is_narrower(questions, samples, monkeypatch):
    """Of two settings, the second of which solves every question a little more often."""
    monkeypatch.setattr(intervals, "FLIPS", 10)
    rng, evaluations, hits, width = np.random.default_rng(1), {30: 1000, 500: 300}[questions], 0, []
    for _ in range(evaluations):
        alike, truth = 2.0, rng.uniform(0.2, 0.8)
        solved = rng.beta(truth * alike, (1 - truth) * alike, questions)
        better = solved + 0.1 * (1 - solved)
        a, b = (table(rng.random((questions, samples)) < p[:, None]) for p in (solved, better))
        found = intervals.paired_difference(a, b)
        hits += found["low"] <= -0.1 * (1 - truth) <= found["high"]
        low, high = intervals.accuracy_interval(a)
        width.append((found["high"] - found["low"]) / (high - low))
    assert 0.93 <= hits / evaluations <= 0.97
    assert np.mean(width) < {1: 1.25, 16: 0.75}[samples], "of two independent evaluations: 1.41"


def test_one_sample_a_question_is_wilsons_interval():
    n, p, z = 10, 0.8, 1.959964
    middle = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2) / (1 + z * z / n)
    assert intervals.accuracy_interval(table([1] * 8 + [0] * 2)) == pytest.approx([middle - half, middle + half])


def test_sixteen_samples_of_a_question_are_not_sixteen_questions():
    """Where all samples of a question are alike they say no more than one; where they are independent, nearly 16."""
    one = intervals.accuracy_interval(table([1] * 20 + [0] * 10))
    alike = intervals.accuracy_interval(table([[1] * 16] * 20 + [[0] * 16] * 10))
    assert alike == pytest.approx(one, abs=0.02)
    mixed = intervals.accuracy_interval(table([[1, 1, 0] * 5 + [1]] * 30))
    assert mixed[1] - mixed[0] < 0.5 * (one[1] - one[0])


def test_all_right_is_not_certain_and_one_question_says_nothing():
    assert intervals.accuracy_interval(table([1] * 30)) == pytest.approx([30 / (30 + intervals.Z**2), 1.0])
    assert intervals.accuracy_interval(table([[1] * 16] * 30)) == pytest.approx([30 / (30 + intervals.Z**2), 1.0])
    assert intervals.accuracy_interval(table([1])) is None
    assert intervals.accuracy_interval({}) is None


def test_students_quantile():
    for v, value in ((3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1e9, 1.95996)):
        assert intervals.quantile(v) == pytest.approx(value, rel=0.02 if v < 5 else 0.003)


def test_a_paired_difference_by_hand():
    a, b = table([1, 1, 1, 0, 1]), table([0, 1, 0, 0, 1])
    found = intervals.paired_difference(a, b)
    assert found["difference"] == pytest.approx(0.4)
    # Two questions differ, both for a: of the four signs two are as far from 0.
    assert found["p"] == pytest.approx(0.5, abs=0.02)
    # Seven questions, one half of a question up and one down: mean 2/7, squares (2 + 1) / 7.
    half = 1.959964 * math.sqrt((3 / 7 - (2 / 7) ** 2) / 7)
    assert (found["low"], found["high"]) == pytest.approx((2 / 7 - half, 2 / 7 + half))
    same = intervals.paired_difference(a, a)
    assert (same["difference"], same["p"]) == (0, 1.0) and same["low"] == -same["high"] < 0
    assert intervals.paired_difference(a, {"other": [1.0]}) is None


def test_the_sign_flip_test_is_that_of_all_signs():
    d = np.array([0.5, 0.25, -0.125, 0.75, 1.0, -0.25])
    found = intervals.paired_difference(table(d), table(np.zeros(6)))
    every = [abs(np.dot(signs, d)) >= abs(d.sum()) for signs in itertools.product((-1, 1), repeat=6)]
    assert found["p"] == pytest.approx(np.mean(every), abs=0.02)


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    rows = table([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    for k in (1, 2, 4, 6):
        by_hand = np.mean([np.mean([max(c) for c in itertools.combinations(row, k)]) for row in rows.values()])
        assert intervals.pass_at(rows, k) == pytest.approx(by_hand)


def test_hybrid_accuracy_by_hand():
    forced = {
        "thinking": {"a": [(1, 50), (1, 60)], "b": [(1, 70), (0, 70)], "c": [(0, 90)]},
        "nothinking": {"a": [(1, 5), (1, 5)], "b": [(0, 5), (0, 5)], "c": [(0, 5)]},
    }
    # Better: a nothinking (equal, fewer tokens), b thinking, c nothinking (neither is right).
    chosen = {"a": ["nothinking", "thinking"], "b": ["thinking", "thinking"], "c": ["thinking"], "d": ["thinking"]}
    found = intervals.hybrid_accuracy(chosen, forced)
    assert found["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["better"] == {"thinking": pytest.approx(1 / 3), "nothinking": pytest.approx(2 / 3)}
    assert found["interval"] == intervals.accuracy_interval({"a": [1, 0], "b": [1, 1], "c": [0]})
    assert intervals.hybrid_accuracy(chosen, {"thinking": forced["thinking"]}) is None
    assert intervals.hybrid_accuracy({"d": ["thinking"]}, forced) is None
