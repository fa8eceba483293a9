"""How sure an evaluation is: intervals clustered by question, paired differences, pass@k, Hybrid Accuracy.

Several samples of one question are not several questions: everything here takes one row of scores a question. A table
is {question: its scores in 0 to 1, one a sample}. What the intervals cover in simulation: tests/test_intervals.py.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from adaptive_reasoning.core.metric import mean

Z = NormalDist().inv_cdf(0.975)
FLIPS = 10_000  # random signs of the paired test

Scores = Mapping[object, Sequence[float]]


def quantile(freedom: float) -> float:
    """Return Student's 97.5 % quantile by its expansion in 1 / degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    z, v = Z, max(freedom, 3.0)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def freedom(values: np.ndarray) -> float:
    """Return the degrees of freedom of a variance over questions: n - 1 for normal values, few for heavy tails.

    2 n / (kurtosis - (n - 3) / (n - 1)): those of the chi-square that varies as much as the variance does.
    """
    d2, n = (values - values.mean()) ** 2, len(values)
    return 2 * n / ((d2**2).mean() / d2.mean() ** 2 - (n - 3) / (n - 1)) if d2.any() else math.inf


def accuracy_interval(scores: Scores) -> list[float] | None:
    """Return [low, high], the 95 % interval of the mean over questions; None for less than two questions.

    Wilson's. With several samples a question the number of samples gives way to the effective one, p (1 - p) over the
    variance of the mean that the questions themselves show, and the normal quantile to Student's with the degrees of
    freedom of that variance (clustered by question: arXiv 2411.00640).
    """
    means = np.array([mean(row) for row in scores.values()])
    questions, samples = len(means), sum(map(len, scores.values()))
    if questions < 2:
        return None
    p, n, z = float(means.mean()), questions, Z
    if samples > questions and 0 < p < 1:
        variance = max(float(means.var(ddof=1)) / questions, p * (1 - p) / samples)
        n, z = p * (1 - p) / variance, quantile(freedom(means))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def paired_difference(a: Scores, b: Scores) -> dict[str, float] | None:
    """Return {"difference", "low", "high", "p"} of mean a minus mean b over the questions of both.

    The interval is Agresti and Min's (2005): as if two questions more were there, whose differences are one sample up
    and one sample down by half, so that two settings which never differ are not for certain the same. Several samples
    a question: Student's quantile, as in `accuracy_interval`. p is that of the sign-flip test: how often random signs
    of the differences make a mean at least as far from 0.

    Returns:
        None for less than two questions in common.
    """
    common = [q for q in a if q in b]
    if len(common) < 2:
        return None
    d = np.array([mean(a[q]) - mean(b[q]) for q in common])
    samples, n = max(len(a[q]) for q in common), len(d) + 2
    middle = float(d.sum()) / n
    variance = (float((d**2).sum()) + samples**-2) / n - middle**2
    half = (Z if samples == 1 else quantile(freedom(d))) * math.sqrt(variance / n)
    different, p = d[d != 0], 1.0
    if len(different):
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (FLIPS, len(different)))
        p = (1 + int((abs(signs @ different) >= abs(different.sum()) - 1e-9).sum())) / (FLIPS + 1)
    return {"difference": float(d.mean()), "low": middle - half, "high": middle + half, "p": p}


def pass_at(scores: Scores, k: int) -> float:
    """Return the unbiased pass@k: the mean over questions of 1 - C(n - c, k) / C(n, k)   (arXiv 2107.03374, Eq. 1).

    n samples of a question of which c are right; every question needs n >= k.
    """
    rows = [(len(row), sum(score > 0 for score in row)) for row in scores.values()]
    assert all(n >= k for n, _ in rows), "pass@k needs k samples of every question"
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in rows) / len(rows)


def hybrid_accuracy(
    chosen: Mapping[object, Sequence[str]], forced: Mapping[str, Mapping[object, Sequence[tuple[float, float]]]]
) -> dict | None:
    """Return {"accuracy", "interval", "better"}: how often the free responses took the better mode of their question.

    The better mode has the higher mean score of its forced responses; of equal ones the one with fewer tokens
    (Hybrid Accuracy of LHRM, arXiv 2505.14631, margin 0). `better` is the share of the questions by better mode: what
    a model that always takes one mode would have.

    Args:
        chosen: {question: modes of the free responses}.
        forced: {mode: {question: (score, tokens) of its forced responses}}.

    Returns:
        None for less than two modes, or where no question has free responses and all forced modes.
    """
    common = [q for q in chosen if all(q in rows for rows in forced.values())]
    if not common or len(forced) < 2:
        return None

    def worth(mode: str, q) -> tuple[float, float]:
        scores, tokens = zip(*forced[mode][q])
        return mean(scores), -mean(tokens)

    better = {q: max(forced, key=lambda mode: worth(mode, q)) for q in common}
    hits = {q: [float(mode == better[q]) for mode in chosen[q]] for q in common}
    return {
        "accuracy": mean([mean(row) for row in hits.values()]),
        "interval": accuracy_interval(hits),
        "better": {mode: mean([each == mode for each in better.values()]) for mode in forced},
    }
