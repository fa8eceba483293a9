"""From a folder of one's own, without touching the package: a mode, a metric, a reward, a task and a format more; and
reasoning-gym.

Each trains two steps, evaluates and appears on the page; the commands are a user's, in a process of their own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import blocks

from adaptive_reasoning import formats
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.tasks import chain

ROOT = Path(__file__).parent.parent
MINE = '''
"""Everything of one's own that the tests need."""

import re

from adaptive_reasoning import grpo
from adaptive_reasoning.core.metric import Metric
from adaptive_reasoning.core.question import Benchmark, Question, Source
from adaptive_reasoning.formats import ResponseFormat
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.thinkless import Thinkless


class Five(Arm):
    """ARM with a fifth mode."""

    tags = {**Arm.tags, "sketch": "SKETCH"}

    @classmethod
    def rationale(cls, question, mode):
        return "a sketch" if mode == "sketch" else super().rationale(question, mode)


class Three(Thinkless):
    """DeGRPO with a third mode."""

    tags = {**Thinkless.tags, "sketch": "sketch"}


class Digit(ResponseFormat):
    """A format from nothing: the first digit is the answer, and an even one is another mode."""

    modes = {"even": "even digit", "odd": "odd digit", "none": "no digit"}
    TOKENS = ("#",)

    def mode_of(self, response_ids):
        found = re.search(r"\\d", self.tokenizer.decode(list(response_ids)))
        return "none" if not found else "odd" if int(found[0]) % 2 else "even"

    def extract_answer(self, response):
        found = re.search(r"\\d", response)
        return found and found[0]

    @classmethod
    def response(cls, question, mode, rng):
        return question.answer


def doubles(args, train):
    """A task: twice a digit, modulo 10; graded as text."""
    asked = [Question(f"d/{i}", f"{i % 10}+{i % 10}", str(2 * i % 10), str(i % 2)) for i in range(24)]
    return Source(asked if train else [], [Benchmark("doubles", asked[:10])], exact=True)


def brief(e, args):
    """A reward: right answers, and a little for being brief."""
    return float(e.correct) + 0.1 / e.num_tokens


class Main:
    """A method of one's own in a few lines: GRPO with another reward, and a metric."""

    @staticmethod
    def main():
        metrics = grpo.metrics
        grpo.reward = brief
        grpo.METRICS = grpo.METRICS | {
            "mine/shortest": Metric("Tokens of the shortest response.", "tokens", "falls", panel="Mine | of this step.")
        }
        grpo.metrics = lambda episodes, form, run: metrics(episodes, form, run) | {
            "mine/shortest": min(run.gather([e.num_tokens for e in episodes])), "mine/undeclared": 1.0
        }
        grpo.main()


if __name__ == "__main__":
    Main.main()
'''
SHORT = (
    "--task chain --chain_questions 16 --chain_eval_questions 10 --prompts_per_step 4 --num_generations 4 "
    "--max_new_tokens 12 --max_prompt_tokens 64 --rollout_rows 64 --minibatches_per_step 1 --max_steps 2 "
    "--eval_every 0 --dtype fp32 --gradient_checkpointing false --tokens_per_micro_batch 2048 --kl_coef 0 "
    "--entropy_coef 0"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def train(folder: Path, form: str, *command: str) -> tuple[Path, str]:
    """Write an untrained model with the format's tokenizer, run the command on it, and return (run folder, output)."""
    tokenizer = chain.tokenizer(formats.load(form))
    chain.tiny_model(tokenizer, hidden=32, layers=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    done = run(folder, form, *command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "run", done.stdout


def environment(folder: Path) -> dict[str, str]:
    path = f"{folder}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run(folder: Path, form: str, *command: str) -> subprocess.CompletedProcess:
    options = [*SHORT.split(), "--model", "model", "--output_dir", "run", "--answer_format", form]
    return subprocess.run(
        [sys.executable, *command[:2], *options, *command[2:]], cwd=folder, env=environment(folder),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def page_of(run: Path, steps: int = 2) -> str:
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl") if row["step"]] == list(range(1, steps + 1))
    return (run / "report.html").read_text()


@pytest.mark.slow
def test_a_fifth_mode_of_arm(folder):
    run, _ = train(folder, "mine.Five", "-m", "adaptive_reasoning.ada_grpo")
    settings = {row["setting"] for row in read_jsonl(run / "evaluations.jsonl")}
    assert settings == {"adaptive", "direct", "cot", "code", "long_cot", "sketch"}
    (forced,) = {row["result"]["modes"]["sketch"]["share"] for row in read_jsonl(run / "evaluations.jsonl")
                 if row["setting"] == "sketch" and row["step"] == 2}  # fmt: skip
    assert forced == 1.0 and "mode/sketch_share" in page_of(run)


@pytest.mark.slow
def test_a_third_mode_of_degrpo(folder):
    run, _ = train(folder, "mine.Three", "-m", "adaptive_reasoning.degrpo")
    rows = read_jsonl(run / "metrics.jsonl")
    assert all(f"degrpo/num_{mode}" in rows[-1] for mode in ("think", "short", "sketch", "malformed"))
    assert {"always_think", "never_think"} < {row["setting"] for row in read_jsonl(run / "evaluations.jsonl")}
    assert "mode/sketch_share" in page_of(run)


@pytest.mark.slow
def test_a_format_from_nothing_on_a_task_of_ones_own(folder):
    run, _ = train(folder, "mine.Digit", "-m", "adaptive_reasoning.grpo", "--task", "mine.doubles")
    evaluated = read_jsonl(run / "evaluations.jsonl")
    assert {row["benchmark"] for row in evaluated} == {"doubles"}
    assert set(evaluated[0]["result"]["modes"]) == {"even", "odd", "none"}
    assert json.loads((run / "summary.json").read_text())["task"] == "mine.doubles" and "even" in page_of(run)


@pytest.mark.slow
def test_a_reward_and_a_metric(folder):
    run, said = train(folder, "arm", "-m", "mine")
    rows = read_jsonl(run / "metrics.jsonl")
    assert 0 < rows[-1]["reward/mean"] != rows[-1]["reward/accuracy"]
    page = page_of(run)
    assert rows[-1]["mine/shortest"] >= 1 and "Tokens of the shortest response." in page and ">Mine<" in page
    assert said.count("metric mine/undeclared is declared nowhere") == 1 and "mine/undeclared" in page


GRPO = ("-m", "adaptive_reasoning.grpo")


@pytest.mark.slow
def test_the_task_and_the_reward_of_the_page_from_files_anywhere(folder):
    """They train two steps, go on from there, evaluate and reach the page; a changed file is named."""
    form = f"{folder}/mine.py:Digit"
    (folder / "elsewhere").mkdir()
    for code in blocks(ROOT / "docs" / "add_a_task_or_reward.md", "python"):
        (folder / "elsewhere" / code.split()[1]).write_text(code)
    own = ["--task", "elsewhere/my_task.py:doubling", "--reward", "elsewhere/my_reward.py:reward"]
    own += ["--max_new_tokens", "32", "--chain_eval_questions", "100"]  # an untrained model seldom says a digit
    path, said = train(folder, form, *GRPO, *own)
    page, rows = page_of(path), read_jsonl(path / "metrics.jsonl")
    assert "declared nowhere" not in said and "--reward returned" in page and "doubling" in page
    rows = [row for row in rows if row["step"]]
    assert all(row["reward/failed_share"] == 0 for row in rows)
    assert all(row["reward/mean"] == row["reward/score_mean"] > row["reward/accuracy"] for row in rows)
    results = [row["result"] for row in read_jsonl(path / "evaluations.jsonl")]
    assert results and all(r["accuracy"] < r["mean_score"] for r in results)

    done = run(folder, form, *GRPO, *own, "--max_steps", "3")
    assert done.returncode == 0 and "continuing run after step 2" in done.stdout, done.stderr[-3000:]
    page_of(path, steps=3)
    reward = folder / "elsewhere" / "my_reward.py"
    reward.write_text(reward.read_text().replace("0.1", "0.2"))
    done = run(folder, form, *GRPO, *own, "--max_steps", "4")
    assert done.returncode == 2 and "the file my_reward.py has changed since run was begun" in done.stderr


@pytest.mark.slow
def test_rewards_that_fail(folder):
    """One that fails on some responses is counted and shown with its text; one that always fails ends the run."""
    (folder / "bad.py").write_text(
        "import time\n\n\ndef some(r):\n    return 1 / (r.tokens - 12)\n\n\n"
        "def nan(r):\n    return float('nan')\n\n\ndef hangs(r):\n    time.sleep(3600)\n"
    )
    path, said = train(folder, "mine.Digit", *GRPO, "--reward", "bad.py:some", "--max_ungraded", "1")
    text = "reward: error: ZeroDivisionError: division by zero (bad.py, line 5)"
    rows = [row for row in read_jsonl(path / "metrics.jsonl") if row["step"]]
    cut = [row["rollout/truncated_share"] for row in rows]
    assert (
        0 < cut[0] == pytest.approx(rows[0]["reward/failed_share"], abs=0.1) and f"could not be scored: {text}" in said
    )
    assert said.count(text) == 1 and text in page_of(path) and "--reward fails" in (path / "report.html").read_text()
    assert any(row.get("grader") == text for row in read_jsonl(path / "samples.jsonl"))
    for name, why in (("nan", "it returned nan, not a finite number"), ("hangs", "timeout: no verdict after 0.2 s")):
        more = ("--output_dir", name, "--grader_timeout", "0.2", "--max_steps", "1")
        done = run(folder, "mine.Digit", *GRPO, "--reward", f"bad.py:{name}", *more)
        assert done.returncode == 2 and f"--reward bad.py:{name} failed on 100% of the responses" in done.stderr
        assert why in done.stderr and read_jsonl(folder / name / "metrics.jsonl")[-1]["reward/failed_share"] == 1


@pytest.mark.slow
def test_reasoning_gym(folder):
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip('reasoning-gym is not installed: pip install -e ".[gym]"')
    task = "reasoning-gym:chain_sum(min_terms=2,max_terms=3,min_digits=1,max_digits=1),leg_counting(max_animals=4)"
    own = ["--task", task, "--max_prompt_tokens", "300", "--max_new_tokens", "8"]
    path, said = train(folder, "mine.Digit", *GRPO, *own)
    assert "declared nowhere" not in said and "reward/score_mean" in read_jsonl(path / "metrics.jsonl")[-1]
    done = run(folder, "mine.Digit", *GRPO, *own, "--max_steps", "3")
    assert done.returncode == 0 and "continuing run after step 2" in done.stdout, done.stderr[-3000:]
    page = page_of(path, steps=3)
    assert "num_terms 2" in page and "num_animals 4" in page and "leg_counting(max_animals=4)" in page
    result = read_jsonl(path / "evaluations.jsonl")[0]["result"]
    assert set(result["by_difficulty"]) == {"num_terms 2", "num_terms 3"} and "mean_score" in result
    evaluate = [sys.executable, "-m", "adaptive_reasoning.benchmark", "--model", "run/checkpoints/step_000003/model"]
    evaluate += ["--answer_format", "mine.Digit", "--task", task, "--chain_eval_questions", "6", "--output_dir", "eval"]
    evaluate += ["--max_new_tokens", "8", "--dtype", "fp32", "--max_prompt_tokens", "300"]
    done = subprocess.run(evaluate, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "num_terms 2" in done.stdout, done.stderr[-3000:]
