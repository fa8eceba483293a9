"""Evaluation: accuracy against tokens, free and with the mode forced, by difficulty.

The settings show what choosing when to think is worth: "adaptive" forces nothing, the others force a mode and bound
what the model could reach.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from accelerate import Accelerator

from adaptive_reasoning.learner.runtime import all_gather
from adaptive_reasoning.rollout import Completion, Engine, Request, Sampling, request_seed
from adaptive_reasoning.rollout.dialogue import Dialogue, converse
from adaptive_reasoning.run.stages import stage_rows, stage_table
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.sandbox import executed
from adaptive_reasoning.tasks.task import Benchmark

EVAL_STREAM = 7_919  # keeps evaluation random numbers apart from those of training
KEPT_SAMPLES = 48  # responses per setting and evaluation that go into samples.jsonl


@dataclass
class EvalSpec:
    """What evaluation has to know about a response format.

    settings: name -> first tokens to force as (id, probability); the first setting is the adaptive one.
    mode_of: response ids -> mode, from token ids.
    extract_answer: response text -> the answer to grade, or None where the response breaks the format.
    modes: all modes, in the order of the tables.
    check: check(answer, target) -> bool, a function of a module that a grader process can import.
    consensus: settings whose answers have to agree; empty: there is no setting "consensus".
    fallback: the setting whose answer counts where they do not.
    script: of dialogues (`rollout.dialogue`): they are held in place of single responses, and mode_of gets their turns.
    extra_tokens: what the paper's tables add to prompt and response for the template; None: they count responses.
    """

    settings: dict[str, tuple[tuple[int, float], ...]]
    mode_of: Callable[[list[int]], str]
    extract_answer: Callable[[str], str | None]
    modes: tuple[str, ...]
    check: Callable[[str, str], bool]
    consensus: tuple[str, ...] = ()
    fallback: str = ""
    script: object = None
    extra_tokens: int | None = None


@dataclass
class Evaluator:
    """Samples and grades responses to benchmarks.

    Responses are limited by max_new_tokens whatever their mode. Random streams depend on the question and the sample
    alone: every evaluation of a run draws the same random numbers, on any number of processes.

    instruction: text put before every problem; execute_code: run the programs in responses and take their output.
    """

    engine: Engine
    grader: object
    tokenizer: object
    stop_ids: tuple[int, ...]
    spec: EvalSpec
    sampling: Sampling
    max_new_tokens: int
    seed: int
    accelerator: Accelerator | None = None
    instruction: str = ""
    execute_code: bool = False

    def measure(
        self, benchmark: Benchmark, setting: str, progress: str = "", keep: list | None = None
    ) -> tuple[dict, list[dict]]:
        """Sample `benchmark.samples` responses to every question in a setting. Every process must call this.

        Args:
            progress: title of the progress bar on the main process.
            keep: receives the graded rows of all processes.

        Returns:
            the result (accuracy, mean_tokens, modes, by_difficulty) and some rows for samples.jsonl.
        """
        a = self.accelerator
        rank, ranks = (a.process_index, a.num_processes) if a else (0, 1)
        everything = [(i, q, k) for i, q in enumerate(benchmark.questions) for k in range(benchmark.samples)]
        jobs, places = everything[rank::ranks], range(rank, len(everything), ranks)
        every = max(1, len(everything) // KEPT_SAMPLES)  # the same ones are shown whatever the number of processes
        hold = self._respond if self.spec.script is None else self._converse
        rows, samples = hold(jobs, setting, progress if rank == 0 else "")
        shown = [(place, sample) for place, sample in zip(places, samples) if place % every == 0]
        rows, shown = self._of_all(rows), sorted(self._of_all(shown), key=lambda pair: pair[0])
        if keep is not None:
            keep += rows
        about = {"setting": setting, "benchmark": benchmark.name}
        result = summarise(rows, self.spec.modes)
        if self.spec.script is not None:
            result |= stage_table(rows)
            for level, part in result["by_difficulty"].items():
                part |= stage_table([row for row in rows if row["difficulty"] == level])
        return result, [about | sample for _, sample in shown]

    def _of_all(self, rows: list) -> list:
        return [row for part in (all_gather(self.accelerator, rows) if self.accelerator else [rows]) for row in part]

    def _respond(self, jobs: list, setting: str, progress: str) -> tuple[list[dict], list[dict]]:
        """Return a row and a sample of every job (index of the question, question, number of the sample)."""
        requests = [
            Request(
                prompts.render(self.tokenizer, f"{self.instruction}\n{q.problem}" if self.instruction else q.problem),
                self.max_new_tokens,
                self.stop_ids,
                request_seed(self.seed, EVAL_STREAM, i, k),
                forced=self.spec.settings[setting],
            )
            for i, q, k in jobs
        ]
        texts, answers = {}, {}
        programs = {}  # those that run in the sandbox while decoding goes on
        sandboxes = ThreadPoolExecutor(os.cpu_count()) if self.execute_code else None

        def grade(j: int) -> None:
            answer = self.spec.extract_answer(texts[j])
            if answer is not None:
                answers[j] = answer
                self.grader.submit(answer, jobs[j][1].answer, j)

        def on_finish(j: int, completion: Completion) -> None:
            texts[j] = prompts.decode(self.tokenizer, completion.response_ids.tolist(), self.stop_ids)
            if sandboxes is None:
                grade(j)
            else:
                programs[j] = sandboxes.submit(executed, texts[j])

        completions = self.engine.run(requests, self.sampling, on_finish, progress)
        for j, program in programs.items():
            texts[j] = program.result()
            grade(j)
        if sandboxes:
            sandboxes.shutdown()
        grades = self.grader.drain()
        rows, samples = [], []
        for j, ((i, q, k), c) in enumerate(zip(jobs, completions)):
            row = {"question": i, "sample": k, "mode": self.spec.mode_of(c.response_ids.tolist())}
            row |= {"difficulty": q.difficulty, "answer": answers.get(j), "tokens": len(c.response_ids)}
            row["correct"] = j in grades and grades[j].correct
            if self.spec.extra_tokens is not None:
                stop = c.finish_reason == "stop"
                row["tokens_paper"] = len(c.context_ids) + row["tokens"] - stop + self.spec.extra_tokens
            rows.append(row)
            samples.append(sample_of(row, q, texts[j], c.finish_reason))
        return rows, samples

    def _converse(self, jobs: list, setting: str, progress: str) -> tuple[list[dict], list[dict]]:
        """Hold a dialogue for every job instead of sampling one response."""
        dialogues = [Dialogue(q, i, request_seed(self.seed, EVAL_STREAM, i, k)) for i, q, k in jobs]
        converse(self.engine, self.grader, dialogues, self.spec.script, self.sampling, setting, progress)
        rows, samples = stage_rows(dialogues), []
        for row, d in zip(rows, dialogues):
            mode = self.spec.mode_of(d.turns)
            row |= {"question": d.group, "mode": mode, "difficulty": d.question.difficulty, "tokens": d.num_tokens}
            row["correct"] = d.turns[mode].correct
            samples.append(sample_of(row, d.question, d.text, "length" if d.cut else "stop"))
        return rows, samples


def sample_of(row: dict, question, text: str, finish_reason: str) -> dict:
    """Return a row of samples.jsonl."""
    return {
        "mode": row["mode"],
        "difficulty": question.difficulty,
        "problem": question.problem,
        "answer": question.answer,
        "response": text,
        "reward": float(row["correct"]),
        "tokens": row["tokens"],
        "finish_reason": finish_reason,
    }


def summarise(rows: list[dict], modes: tuple[str, ...]) -> dict:
    """Return the result of graded responses: rows with mode, difficulty, correct and tokens.

    A question has the same number of samples everywhere, so means over responses are means over questions.
    """

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else None

    def accuracy_and_tokens(part):
        out = {"accuracy": mean(r["correct"] for r in part), "mean_tokens": mean(r["tokens"] for r in part)}
        if rows and "tokens_paper" in rows[0]:
            out["mean_tokens_paper"] = mean(r["tokens_paper"] for r in part)
        return out

    def share(part, mode):
        return sum(r["mode"] == mode for r in part) / len(part)

    levels = sorted({r["difficulty"] for r in rows if r["difficulty"] is not None})
    by_level = {level: [r for r in rows if r["difficulty"] == level] for level in levels}
    return {
        **accuracy_and_tokens(rows),
        "modes": {
            mode: {"share": share(rows, mode), **accuracy_and_tokens([r for r in rows if r["mode"] == mode])}
            for mode in modes
        },
        "by_difficulty": {
            level: {**accuracy_and_tokens(part), "modes": {mode: share(part, mode) for mode in modes}}
            for level, part in by_level.items()
        },
    }
