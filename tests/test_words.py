"""Stories made by code: what they say is what is worked out, and no story is in training and in the evaluation."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from adaptive_reasoning.formats import MAKERS, load
from adaptive_reasoning.sft import Args
from adaptive_reasoning.tasks import words
from adaptive_reasoning.tasks.think_template import answer_behind

FIVE = "0.2,0.2,0.2,0.2,0.2"


def told(problem: str) -> int:
    """Return the answer of a story from its sentences alone."""
    first, *sentences, asked = re.split(r"(?<=[.]) ", problem)
    name, value = first.split()[0], int(first.split()[2])
    assert asked == f"How many {first.split()[3][:-1]} does {name} have now?"
    for sentence in sentences:
        n = int(found[0]) if (found := re.findall(r"\d+", sentence)) else 2
        if "doubles" in sentence or "as many again" in sentence:
            value *= 2
        elif "equally" in sentence or "half" in sentence:
            assert value % 2 == 0, problem
            value //= 2
        else:
            gains = re.search(rf"buys|finds|arrive|gives {n} to {name}\.", sentence)
            assert gains or re.search(r"gives|loses|sells|break", sentence), sentence
            value += n if gains else -n
        assert 0 < value <= words.LARGEST
    return value


@pytest.mark.parametrize("operations", [1, 2, 3, 4, 5])
def test_a_story_says_what_is_worked_out(operations):
    rng = np.random.default_rng(operations)
    for _ in range(200):
        q = words.make_question(rng, operations, "story")
        assert told(q.problem) == int(q.answer) and q.difficulty == str(len(q.work)) == str(operations)
        values = [q.problem.split()[2]]
        for text in q.work:
            left, new = text.split("=")
            assert re.match(r"\d+", left)[0] == values[-1] and eval(left) == int(new)
            values.append(new)
        assert values[-1] == q.answer


def test_no_story_of_the_evaluation_is_in_training():
    args = SimpleNamespace(chain_mix=FIVE, chain_questions=3000, chain_eval_questions=500, eval_samples=1, seed=3)
    made = words.source(args, train=True)
    (benchmark,) = made.benchmarks
    asked, held = {q.problem for q in made.questions}, {q.problem for q in benchmark.questions}
    assert not asked & held and not any(map(words.held_out, asked)) and all(map(words.held_out, held))
    assert [sum(q.difficulty == str(k) for q in benchmark.questions) for k in range(1, 6)] == [100] * 5
    args.seed = 4
    other = words.source(args, train=True)
    assert other.benchmarks == made.benchmarks and other.questions != made.questions
    rows = load("think").rows(Args(model="any", task="words", chain_mix=FIVE), np.random.default_rng(0), 200, 1)
    assert not any(words.held_out(row.question.problem) for row in rows)


@pytest.mark.parametrize("name", ["think", "thinkless", "arm", "boxed"])
def test_every_format_answers_a_story_in_each_of_its_modes(name):
    form, rng = load(name), np.random.default_rng(0)
    q = MAKERS["words"](rng, 3, "story")
    for mode in form.cold_start_modes():
        response = form.response(q, mode, rng)
        read = answer_behind if name == "think" else getattr(form, "answer_by_first_token", form.extract_answer)
        assert read(response) == q.answer
        assert (q.work[-1] in response) == (mode in ("thinking", "think", "code", "long_cot", "response"))


def test_a_story_is_thought_over_once_and_a_chain_twice():
    rng = np.random.default_rng(0)
    story, chain = (MAKERS[task](rng, 2, "") for task in ("words", "chain"))
    for q, times in ((story, 1), (chain, 2)):
        response = load("think").response(q, "thinking", rng)
        assert all(response.count(text) == times for text in set(q.work)) and response.count("check") == times - 1
