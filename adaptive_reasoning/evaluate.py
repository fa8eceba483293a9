"""Evaluation: accuracy against tokens, free and with the mode forced, by difficulty, beside the paper's row.

    python -m adaptive_reasoning.evaluate --config experiments/eval_adaptthink_1_5b.yaml --model runs/.../model

The settings show what choosing when to think is worth: "adaptive" forces nothing, "always_think" and "never_think"
force the first token and bound what the model could reach.
"""

from collections.abc import Callable
from dataclasses import dataclass

from adaptive_reasoning.learner.runtime import all_gather
from adaptive_reasoning.rollout import Engine, Request, Sampling, request_seed
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.task import Benchmark

EVAL_STREAM = 7_919  # keeps evaluation random numbers apart from those of training
KEPT_SAMPLES = 48  # responses per setting and evaluation that go into samples.jsonl


@dataclass
class Protocol:
    """What evaluation has to know about an algorithm.

    settings: name -> first tokens to force as (id, probability); the first setting is the adaptive one.
    mode_of: response ids -> mode, from token ids.
    extract_answer: response text -> the answer to grade, or None where the response breaks the format.
    modes: all modes, in the order of the tables.
    """

    settings: dict[str, tuple[tuple[int, float], ...]]
    mode_of: Callable[[list[int]], str]
    extract_answer: Callable[[str], str | None]
    modes: tuple[str, ...]


def evaluate(
    engine: Engine, grader, tokenizer, stop_ids, benchmark: Benchmark, protocol: Protocol, setting: str, args,
    accelerator=None, progress: str = "",
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Sample `benchmark.samples` responses to every question in one setting and grade them.

    The questions are dealt to the processes of `accelerator`; every process must call this. Responses are limited by
    args.max_new_tokens whatever their mode, sampled at args.temperature and args.eval_top_p, with random streams that
    depend on the question and sample alone: every evaluation of a run draws the same random numbers.

    Returns:
        the result (layout of design 6: accuracy, mean_tokens, modes, by_difficulty) and some rows for samples.jsonl.
    """
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    jobs = [(i, q, k) for i, q in enumerate(benchmark.questions) for k in range(benchmark.samples)][rank::ranks]
    requests = [
        Request(
            prompts.render(tokenizer, q.problem),
            args.max_new_tokens,
            stop_ids,
            request_seed(args.seed, EVAL_STREAM, i, k),
            forced=protocol.settings[setting],
        )
        for i, q, k in jobs
    ]
    texts: dict[int, str] = {}

    def on_finish(j, completion):
        texts[j] = prompts.decode(tokenizer, completion.response_ids.tolist(), stop_ids)
        answer = protocol.extract_answer(texts[j])
        if answer is not None:
            grader.submit(answer, jobs[j][1].answer, j)

    sampling = Sampling(args.temperature, args.eval_top_p)
    completions = engine.run(requests, sampling, on_finish, progress if rank == 0 else "")
    grades = grader.drain()
    rows = [
        {
            "question": i,
            "mode": protocol.mode_of(c.response_ids.tolist()),
            "difficulty": q.difficulty,
            "correct": j in grades and grades[j].correct,
            "tokens": len(c.response_ids),
        }
        for j, ((i, q, _), c) in enumerate(zip(jobs, completions))
    ]
    samples = [
        {
            "setting": setting,
            "benchmark": benchmark.name,
            "mode": rows[j]["mode"],
            "difficulty": jobs[j][1].difficulty,
            "problem": jobs[j][1].problem,
            "answer": jobs[j][1].answer,
            "response": texts[j],
            "reward": float(rows[j]["correct"]),
            "tokens": rows[j]["tokens"],
            "finish_reason": completions[j].finish_reason,
        }
        for j in range(0, len(jobs), max(1, len(jobs) // KEPT_SAMPLES))
    ]
    if accelerator:
        rows = [row for part in all_gather(accelerator, rows) for row in part]
    return summarise(rows, protocol.modes), samples


def summarise(rows: list[dict], modes: tuple[str, ...]) -> dict:
    """Return the result of graded responses: rows with mode, difficulty, correct and tokens.

    A question has the same number of samples everywhere, so means over responses are means over questions.
    """

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else None

    def accuracy_and_tokens(part):
        return {"accuracy": mean(r["correct"] for r in part), "mean_tokens": mean(r["tokens"] for r in part)}

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
