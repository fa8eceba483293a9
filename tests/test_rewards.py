"""--reward: what a function of the user's own is told, what it pays in every method, and what becomes of its errors."""

from types import SimpleNamespace

import pytest
import torch
from test_docs import ROOT, blocks

from adaptive_reasoning import ada_grpo, adaptthink, degrpo, grpo, thinker, tlmre
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.named import module_of, named, own_code
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout.dialogue import Dialogue, Turn
from adaptive_reasoning.run.evaluation import summarise
from adaptive_reasoning.run.rewards import (
    check_failures,
    failures,
    paid_responses,
    paid_turns,
    pay,
    reward_module,
    score_metrics,
)
from adaptive_reasoning.tasks.grader import GraderPool

MINE = '''
"""Rewards that behave as the response says."""
import math
import numpy
from beside import BONUS


def reward(r):
    if r.text == "raise":
        raise ValueError("no number")
    while r.text == "hang":
        pass
    kinds = {"nan": math.nan, "inf": -math.inf, "text": "0.5", "nothing": None, "yes": True}
    kinds["numpy"] = numpy.float32(0.25)
    return kinds[r.text] if r.text in kinds else r.score + BONUS
'''


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "my_reward.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("BONUS = 0.5\n")
    return f"{tmp_path}/my_reward.py:reward"


def episode(text="", correct=True, tokens=4, mode="", group=0, given=None, finish="stop") -> Episode:
    return Episode(
        Question(f"q{group}", "1+1", "2", "easy", metadata={"terms": 2}), group, torch.tensor([1, 2]),
        torch.arange(tokens), torch.zeros(tokens), torch.ones(tokens, dtype=torch.bool), finish, mode=mode,
        text=text, answer="2", correct=correct, given=given,
    )  # fmt: skip


def test_a_failing_reward_is_counted_with_its_text_and_takes_nothing_else_along(mine):
    """Rewards of other responses stay what they are; nothing that fails is a 0 without a word."""
    texts = ["right", "raise", "hang", "nan", "inf", "text", "nothing", "numpy", "yes"]
    episodes = [episode(text) for text in texts] + [episode("wrong", correct=False)]
    with GraderPool(workers=2, timeout=3.0, check=mine, kept=0) as pool:
        assert pay(pool, paid_responses(episodes)) > 0
    assert [e.score for e in episodes] == [1.5, 0, 0, 0, 0, 0, 0, 0.25, 1.0, 0.5]
    assert [e.correct for e in episodes] == [True] * 9 + [False], "accuracy is the grader's"
    said = {e.text: e.grader for e in episodes if e.grader}
    assert said == {
        "raise": "reward: error: ValueError: no number (my_reward.py, line 10)",
        "hang": "reward: timeout: no verdict after 3 s",
        "nan": "reward: error: it returned nan, not a finite number",
        "inf": "reward: error: it returned -inf, not a finite number",
        "text": "reward: error: it returned '0.5', not a finite number",
        "nothing": "reward: error: it returned None, not a finite number",
    }

    lines = []
    run = SimpleNamespace(
        gather=lambda rows: rows, told=set(), step=3, journal=SimpleNamespace(say=lines.append, folder=ROOT),
        args=SimpleNamespace(max_ungraded=0.2, reward="my_reward.py:reward"),
    )  # fmt: skip
    failed = failures(run, episodes)
    failures(run, episodes)
    failures(run, episodes)
    assert len(failed) == 6 and len(lines) == 6, "three new reasons a step, each once"
    assert lines[0].startswith("warning: step 3: 1 could not be scored: reward: error: ValueError: no number")
    parts = [{"score": 3.25, "episodes": 10}, {"score": 0.0, "episodes": 10}]
    row = score_metrics(False, True, failed, parts)
    assert row == {"reward/score_mean": 0.1625, "reward/failed_share": 0.3}
    with pytest.raises(UserError, match="my_reward.py:reward failed on 30% .* The first: reward: error: ValueEr"):
        check_failures(run, row, failed)
    run.args.max_ungraded = 0.3
    check_failures(run, row, failed)


def test_what_a_reward_is_told():
    ((_, _, r),) = paid_responses([episode("<think>hm</think>2", tokens=5, mode="thinking", finish="length")])
    assert (r.problem, r.target, r.answer, r.difficulty, r.metadata) == ("1+1", "2", "2", "easy", {"terms": 2})
    assert (r.text, r.thinking) == ("<think>hm</think>2", "hm")
    assert (r.mode, r.tokens, r.cut, r.score) == ("thinking", 5, True, 1)
    assert paid_responses([episode("2")])[0][2].thinking is None


def turn(correct: bool, given=None) -> Turn:
    return Turn(0, torch.zeros(4), torch.zeros(4), False, "two", "2", correct, given)


def test_the_turns_of_a_dialogue_that_answer_the_question_are_paid_each_by_itself(mine):
    d = Dialogue(Question("q", "1+1", "2"), 0, 0, {"fast": turn(False), "verify": turn(True), "slow": turn(True)})
    target = {"fast": d.question, "verify": "no", "slow": d.question}
    with GraderPool(workers=1, timeout=60.0, check=mine, kept=0) as pool:
        pay(pool, paid_turns([d], lambda stage, d: target[stage]))
    assert [t.score for t in d.turns.values()] == [0.5, 1.0, 1.5] and not d.grader


def test_what_every_method_makes_of_a_score():
    args = SimpleNamespace(mode_rule="first_token", unweighted_verify=False, delta=0.1, delta_on="all", alpha=0.5)
    half = episode(given=0.5, mode="think")
    assert grpo.reward(half, args) == ada_grpo.reward(half, args) == adaptthink.reward(half) == 0.5
    assert degrpo.reward(half, 0.2, args) == pytest.approx(0.5 * 0.8 - 0.5)
    assert degrpo.reward(episode(mode="think"), 0.2, args) == 0.8 and degrpo.reward(episode(), 0.2, args) == 1.0
    assert degrpo.reward(episode(correct=False), 0.2, args) == -1.0
    turns = {"fast": turn(False, 0.25), "slow": turn(True, 2.0)}
    assert thinker.reward("fast", turns, 0.4, args) == 0.25 and thinker.reward("slow", turns, 0.4, args) == 2.0
    # One response with a score above 0, so z = 0 and 1 - alpha sigmoid(z) = 0.75; below 0 it is the score itself.
    paid = [episode(given=0.5), episode(given=-0.5), episode(given=0.0)]
    assert tlmre.rewards(paid, args) == pytest.approx([0.375, -0.5, 0.0])


def test_an_evaluation_has_the_mean_score_beside_the_accuracy():
    row = {"mode": "a", "difficulty": None, "tokens": 3, "question": 0}
    rows = [{**row, "correct": s >= 1, "score": s} for s in (1.0, 0.5, 0.0, 0.5)]
    result = summarise(rows, ["a"])
    assert (result["accuracy"], result["mean_score"], result["modes"]["a"]["mean_score"]) == (0.25, 0.5, 0.5)
    assert "mean_score" not in summarise([{**row, "correct": True}], ["a"])


def test_the_example_on_the_page(tmp_path):
    (code,) = [c for c in blocks(ROOT / "docs" / "add_a_task_or_reward.md", "python") if c.startswith("# my_reward.py")]
    (tmp_path / "my_reward.py").write_text(code)
    reward = named(f"{tmp_path}/my_reward.py:reward", {}, "reward")
    right, wrong, none = (episode(f"{'x' * n}</think>2", c) for n, c in ((1000, True), (1000, False), (0, False)))
    none.answer = None
    assert [reward(r) for _, _, r in paid_responses([right, wrong, none])] == pytest.approx([0.9, 0.1, 0.0])


def test_names_of_files_and_modules(mine, tmp_path):
    assert named(mine, {}, "reward") is named(mine, {}, "reward"), "a file is run once"
    assert named("os.path:join", {}, "x") is named("os.path.join", {}, "x")
    module, _ = module_of(mine, {}, "reward")
    import sys as built_in

    import adaptive_reasoning.tasks.chain as ours

    assert own_code(module, module, ours, built_in) == {"the file my_reward.py": [MINE]}
    for name, message in (
        (f"{tmp_path}/other.py:reward", "there is no file .*other.py"),
        (f"{tmp_path}/my_reward.py:rewards", "has no 'rewards'"),
        ("my_reward.py", "take your own as module.function or path/to/file.py:function"),
        ("my_module_of_nowhere.reward", "or name its file: path/to/file.py:reward"),
    ):
        with pytest.raises(UserError, match=message):
            reward_module(name, "grpo", False)
    (tmp_path / "broken.py").write_text("import module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError):  # with its traceback: the mistake is in the user's file
        reward_module(f"{tmp_path}/broken.py:reward", "grpo", False)
