"""Dealing: which process answers which questions of a step, so that none waits long for the others.

All samples of a question are on one process, and a step ends when the last process has its last token. Questions are
dealt by the length their responses are expected to have, longest first, each to the process with the least to do that
has room left; every process gets the same number of questions (one more on the first ones where they do not come out
even). What is dealt does not change what is sampled: random numbers belong to the question, not to the process.
"""


def deal(expected: list[float], ranks: int) -> list[list[int]]:
    """Return for each process the places in `expected` of its questions, in rising order.

    A function of its arguments alone: every process computes the same shares.
    """
    n = len(expected)
    room = [n // ranks + (rank < n % ranks) for rank in range(ranks)]
    load, shares = [0.0] * ranks, [[] for _ in range(ranks)]
    for place in sorted(range(n), key=lambda place: (-expected[place], place)):
        rank = min((r for r in range(ranks) if len(shares[r]) < room[r]), key=lambda r: (load[r], r))
        shares[rank].append(place)
        load[rank] += expected[place]
    return [sorted(share) for share in shares]


def expected_tokens(batch: list[int], known: dict[int, float], prompts: list[list[int]]) -> list[float]:
    """Return the expected response tokens of each question of a step.

    Args:
        batch: indices of the questions.
        known: {index: mean response tokens} where the question was answered before: in the last epoch, or when its
            pass rate was measured.
        prompts: of all questions; among questions never met those with longer prompts are expected to take longer.
    """
    met = [known[i] for i in batch if i in known]
    usual = sum(met) / len(met) if met else 1.0
    prompt = sum(len(prompts[i]) for i in batch) / len(batch)
    return [known[i] if i in known else usual * len(prompts[i]) / prompt for i in batch]
