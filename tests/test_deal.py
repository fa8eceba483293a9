"""Questions dealt to processes by expected length."""

import random

import pytest

from adaptive_reasoning.run.balance import deal, expected_tokens
from adaptive_reasoning.run.metrics import picked


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 5, 24, 128])
def test_every_question_is_dealt_once_and_evenly(n, ranks):
    expected = [random.Random(n).expovariate(1e-3) for _ in range(n)]
    shares = deal(expected, ranks)
    assert sorted(place for share in shares for place in share) == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert all(share == sorted(share) for share in shares) and deal(expected, ranks) == shares
    if ranks == 1:
        assert shares == [list(range(n))], "one process keeps the order of the step"


def test_the_slowest_process_has_little_more_than_the_others():
    """Log-normal lengths as of reasoning models: dealt in order the slowest waits for a third more than the mean."""
    rng = random.Random(0)
    for _ in range(20):
        expected = [rng.lognormvariate(8, 1) for _ in range(128)]
        mean = sum(expected) / 8
        slowest = max(sum(expected[j] for j in share) for share in deal(expected, 8))
        assert slowest < 1.02 * max(mean, max(expected)), "the bound that no dealing can beat, nearly reached"
        in_order = max(sum(expected[r::8]) for r in range(8))
        assert slowest < in_order


def test_expectation_is_what_was_seen_else_the_length_of_the_prompt():
    prompts = [[0] * n for n in (10, 30, 20, 20)]
    assert expected_tokens([0, 1, 2, 3], {}, prompts) == [0.5, 1.5, 1.0, 1.0]
    assert expected_tokens([0, 1, 2, 3], {2: 100.0, 3: 300.0}, prompts) == [100.0, 300.0, 100.0, 300.0]
    assert expected_tokens([3, 2], {2: 100.0, 3: 300.0}, prompts) == [300.0, 100.0]


def test_the_same_samples_are_written_down_whoever_has_them():
    batch = [7, 3, 9, 5]
    alone = [q for q in batch for _ in range(4)]
    one = [alone[j] for _, j in picked([alone], batch, 3, step=2)]
    groups = [[7, 7, 7, 7, 5, 5, 5, 5], [3, 3, 3, 3, 9, 9, 9, 9]]
    two = picked(groups, batch, 3, step=2)
    assert [groups[rank][j] for rank, j in two] == one and len(one) == 3
    assert {rank for rank, _ in two} == {0, 1}
    assert picked([[], [3]], batch, 3, step=1) == [(1, 0)] and picked([[], []], batch, 3, step=1) == []
