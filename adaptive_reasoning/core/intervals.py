"""How sure an evaluation is: intervals clustered by question, paired differences, pass@k, Hybrid Accuracy.

Several samples of one question are not several questions: everything here takes one row of scores a question. A table
is {question: its scores, one a sample}.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

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


def freedom(means: np.ndarray) -> float:
    """Return the degrees of freedom of a variance over questions: heavy tails, a few hard questions, leave few."""
    d2 = (means - means.mean()) ** 2
    return 2 * len(means) / max((d2**2).mean() / d2.mean() ** 2 - 1, 2.0) if d2.any() else math.inf


def accuracy_interval(scores: Scores) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean of scores in 0 to 1, None for less than two questions.

    Wilson's, with the effective number of samples in place of the number: p (1 - p) over the variance of the mean that
    the questions themselves show. With one sample a question it is Wilson's own; with several, Student's quantile
    with the degrees of freedom of that variance. Coverage over simulated evaluations: tests/test_intervals.py.
    """
    means = np.array([np.mean(row) for row in scores.values()])
    samples = sum(len(row) for row in scores.values())
    if len(means) < 2:
        return None
    p, variance = float(means.mean()), float(means.var(ddof=1)) / len(means)
    n = min(p * (1 - p) / variance, samples) if variance else len(means)
    z = Z if samples == len(means) else quantile(freedom(means))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(a: Scores, b: Scores) -> dict[str, float] | None:
    """Return {"difference", "low", "high", "p"} of mean a minus mean b over the questions of both.

    The interval is Student's over the questions' differences. p is that of the sign-flip test: how often random signs
    make a mean at least as far from 0.

    Returns:
        None for less than two questions in common.
    """
    common = [q for q in a if q in b]
    if len(common) < 2:
        return None
    d = np.array([np.mean(a[q]) - np.mean(b[q]) for q in common])
    mean, half = float(d.mean()), quantile(freedom(d)) * float(d.std(ddof=1)) / math.sqrt(len(d))
    d = d[d != 0]
    p = 1.0
    if len(d):
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (FLIPS, len(d)))
        p = (1 + int((abs(signs @ d) >= abs(d.sum()) - 1e-9).sum())) / (FLIPS + 1)
    return {"difference": mean, "low": mean - half, "high": mean + half, "p": p}


def pass_at(scores: Scores, k: int) -> float:
    """Return the unbiased pass@k: the mean over questions of 1 - C(n - c, k) / C(n, k)   (arXiv 2107.03374, Eq. 1).

    n samples of a question of which c are right; every question needs n >= k.
    """
    rows = [(len(row), sum(score > 0 for score in row)) for row in scores.values()]
    assert all(n >= k for n, _ in rows), "pass@k needs k samples of every question"
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in rows) / len(rows)


def hybrid_accuracy(
    chosen: Mapping[object, Sequence[str]], forced: Mapping[str, Mapping[object, Sequence[tuple[float, float]]]]
) -> dict[str, float] | None:
    """Return {"hybrid_accuracy", "better_<mode>"}: how often the free responses took the better mode of their question.

    The better mode has the higher mean score of its forced responses; of equal ones the one with fewer tokens
    (Hybrid Accuracy of LHRM, arXiv 2505.14631, margin 0).

    Args:
        chosen: {question: modes of the free responses}.
        forced: {mode: {question: (score, tokens) of its forced responses}}; at least two modes.

    Returns:
        None where no question has free responses and all forced modes.
    """
    common = [q for q in chosen if all(q in rows for rows in forced.values())]
    if not common or len(forced) < 2:
        return None

    def worth(mode: str, q) -> tuple[float, float]:
        score, tokens = np.mean(np.array(forced[mode][q], float), axis=0)
        return float(score), -float(tokens)

    better = {q: max(forced, key=lambda mode: worth(mode, q)) for q in common}
    hits = [np.mean([mode == better[q] for mode in chosen[q]]) for q in common]
    shares = {f"better_{mode}": sum(m == mode for m in better.values()) / len(common) for mode in forced}
    return {"hybrid_accuracy": float(np.mean(hits)), **shares}
