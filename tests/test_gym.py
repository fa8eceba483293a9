"""reasoning-gym by name: its questions by seed, its own scores in the graders, its difficulty in the tables."""

import dataclasses
from types import SimpleNamespace

import pytest

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks import gym
from adaptive_reasoning.tasks.grader import GraderPool

pytest.importorskip("reasoning_gym", reason='reasoning-gym is not installed: pip install -e ".[gym]"')


def source(task: str, seed: int = 0, train: bool = True, asked: int = 60, evaluated: int = 30):
    args = SimpleNamespace(
        task=f"reasoning-gym:{task}", seed=seed, chain_questions=asked, chain_eval_questions=evaluated, eval_samples=2
    )
    return gym.source(args, train)


SMALL = "chain_sum(min_terms=2,max_terms=2,min_digits=1,max_digits=1)"


def test_questions_by_seed_and_none_of_the_evaluation_in_training():
    """Single-digit sums are so few that the streams meet: 30 of about 170 texts are the evaluation's."""
    one, again, other = source(SMALL), source(SMALL), source(SMALL, seed=1)
    assert one.questions == again.questions != other.questions
    assert one.benchmarks == other.benchmarks == source(SMALL, train=False).benchmarks
    assert source(SMALL, train=False).questions == []
    evaluated = {q.problem for q in one.benchmarks[0].questions}
    free = {q.problem for q in gym.draw(gym.parse(SMALL)[0], 60, gym.SEEDS, "train")}
    assert free & evaluated, "without the check some would be trained on"
    assert not {q.problem for q in one.questions} & evaluated and len(one.questions) == 60
    assert len({q.id for q in one.questions}) == 60
    with pytest.raises(UserError, match="of 9000 questions .* are among those of the evaluation, and 900 for training"):
        source(SMALL, asked=900, evaluated=3000)


def test_several_data_sets_in_equal_parts_with_their_own_options():
    made = source("chain_sum(min_terms=3, max_terms=4), leg_counting")
    assert [(b.name, len(b.questions), b.samples) for b in made.benchmarks] == [
        ("chain_sum(min_terms=3, max_terms=4)", 15, 2), ("leg_counting", 15, 2),
    ]  # fmt: skip
    assert [q.source for q in made.questions] == ["chain_sum(min_terms=3, max_terms=4)"] * 30 + ["leg_counting"] * 30
    assert {q.difficulty for q in made.questions[:30]} == {"num_terms 3", "num_terms 4"}


@pytest.mark.parametrize(
    "metadata, want",
    [
        ({"difficulty": {"n": (3, 10)}, "n": 7}, "n 7"),
        ({"difficulty": {"n": (10, 100)}, "n": 33}, "n 22 to 33"),
        ({"difficulty": {"n": (10, 100)}, "n": 100}, "n 94 to 100"),
        ({"difficulty": {"words": (3, 20), "rotation": (1, 25)}, "rotation": 4}, "rotation 1 to 4"),
        ({"difficulty": {"p": 0.25, "n": [1, 2]}, "p": 0.25, "n": 1}, None),
        ({"difficulty": 3}, None),
        ({}, None),
    ],
)
def test_levels(metadata, want):
    assert gym.level(metadata) == want


def test_scores_in_the_graders():
    """1 is right; a right number in too long an answer gets its share; the scorer's own errors keep their text."""
    (question,) = source("chain_sum", asked=1, evaluated=1, train=False).benchmarks[0].questions
    (grid,) = source("spiral_matrix", asked=1, evaluated=1, train=False).benchmarks[0].questions
    broken = dataclasses.replace(question, id="broken", metadata={"no": "answer"})
    long = question.answer + "." * len(question.answer)
    with GraderPool(workers=1, timeout=60.0, score=gym.score) as pool:
        for key, (answer, of) in enumerate([
            (question.answer, question), (long, question), ("none", question), (grid.answer, grid),
        ]):  # fmt: skip
            pool.submit(answer, of, key)
        grades = pool.drain()
        pool.submit(question.answer + " ", broken, "broken")
        failed = pool.drain()["broken"]
    assert [grades[i].score for i in range(4)] == [1.0, 0.5, 0.0, 1.0]
    assert [grades[i].correct for i in range(4)] == [True, False, False, True]
    assert failed.status == "error" and failed.detail.startswith("KeyError: 'answer' (") and failed.score == 0


@pytest.mark.parametrize(
    "task, message",
    [
        ("", "needs names of data sets"),
        ("a b", "needs names of data sets"),
        ("chain_sum,chain_sum", "each once"),
        ("chain_sums", "there is no data set 'chain_sums'. It takes chain_sum, "),
        ("zzz", "there is no data set 'zzz'. It takes ab, acre, "),
        ("composite", "there is no data set 'composite'"),
        ("chain_sum(min_term=2)", "chain_sum has no option 'min_term'. It takes min_terms, "),
        ("chain_sum(seed=2)", r"no option 'seed' \(--seed and --chain_questions decide it\)"),
        ("chain_sum(2)", "name every value: min_terms, max_terms"),
        ("chain_sum(min_terms=x)", "min_terms is no plain value"),
        ("chain_sum(min_terms=7, max_terms=3)", "max_terms must be >= min_terms. Its options: min_terms"),
        ("chain_sum(min_terms='two')", "Its options: min_terms"),
    ],
)
def test_what_is_refused(task, message):
    with pytest.raises(UserError, match=message):
        source(task)
