"""Intervals by simulation, differences, pass@k and Hybrid Accuracy by hand."""

import itertools
import math

import numpy as np
import pytest

from adaptive_reasoning.core import intervals


def table(x) -> dict:
    return dict(enumerate(np.atleast_2d(np.asarray(x, float).T).T.tolist()))


@pytest.mark.parametrize("questions", [30, 500])
@pytest.mark.parametrize("samples", [1, 16])
@pytest.mark.parametrize("mean, alike", [(0.5, 1), (0.5, 1000), (0.8, 0.3), (0.9, 1), (0.9, 1000)])
def test_the_interval_covers_the_truth(questions, samples, mean, alike):
    """Difficulties of the questions are drawn from a beta distribution. Plain mean and standard error would cover 82 %
    of evaluations with 30 questions at an accuracy of 0.9. What is allowed are 2.5 standard errors of the simulation.
    """
    rng, evaluations = np.random.default_rng(0), 1000 if questions == 30 else 250
    hits = 0
    for _ in range(evaluations):
        right = rng.random((questions, samples)) < rng.beta(mean * alike, (1 - mean) * alike, questions)[:, None]
        low, high = intervals.accuracy_interval(table(right))
        hits += low <= mean <= high
    error = 2.5 * math.sqrt(0.95 * 0.05 / evaluations)
    assert 0.94 - error <= hits / evaluations <= 0.97 + error


def test_one_sample_a_question_is_wilsons_interval():
    low, high = intervals.accuracy_interval(table([1] * 8 + [0] * 2))
    n, p, z = 9, 0.8, 1.959964  # the variance over questions has n - 1
    middle, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2) / (1 + z * z / n),
    )
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_all_right_is_not_certain_and_one_question_says_nothing():
    assert intervals.accuracy_interval(table([1] * 30)) == pytest.approx((30 / (30 + 1.959964**2), 1.0), abs=1e-6)
    low, high = intervals.accuracy_interval(table([[1] * 16] * 30))
    assert high == 1.0 and low == pytest.approx(30 / (30 + intervals.Z**2)), "sixteen samples of a question are one"
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
    assert found["low"] < 0 < found["high"]
    same = intervals.paired_difference(a, a)
    assert same == {"difference": 0, "low": 0, "high": 0, "p": 1.0}
    assert intervals.paired_difference(a, {"other": [1.0]}) is None


def test_the_sign_flip_test_is_that_of_all_signs():
    d = np.array([0.5, 0.25, -0.125, 0.75, 1.0, -0.25])
    found = intervals.paired_difference(table(d), table(np.zeros(6)))
    every = [abs(np.dot(signs, d)) >= abs(d.sum()) for signs in itertools.product((-1, 1), repeat=6)]
    assert found["p"] == pytest.approx(np.mean(every), abs=0.02)


def test_paired_intervals_are_narrower_than_those_of_the_two_alone_and_cover(monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(intervals, "FLIPS", 10)
    hits, width = 0, []
    for _ in range(500):
        hard = rng.beta(1, 1, 100)
        a, b = (rng.random((100, 4)) < np.clip(hard + shift, 0, 1)[:, None] for shift in (0.0, 0.05))
        truth = float(np.mean(np.clip(hard, 0, 1)) - np.mean(np.clip(hard + 0.05, 0, 1)))
        found = intervals.paired_difference(table(a), table(b))
        hits += found["low"] <= truth <= found["high"]
        alone = intervals.accuracy_interval(table(a))
        width.append((found["high"] - found["low"]) / (alone[1] - alone[0]))
    assert 0.93 <= hits / 500 <= 0.985 and np.mean(width) < 0.9


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
    assert found["hybrid_accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert (found["better_thinking"], found["better_nothinking"]) == pytest.approx((1 / 3, 2 / 3))
    assert intervals.hybrid_accuracy(chosen, {"thinking": forced["thinking"]}) is None
