"""Evaluation: accuracy against tokens, free and with the mode forced, by difficulty.

The settings show what choosing when to think is worth: "adaptive" forces nothing, "always_think" and "never_think"
force the first token and bound what the model could reach. ARM's settings force one of its four tags; "consensus" takes
the answer that the three cheap formats agree on, else the Long CoT's, from the samples of the forced settings.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adaptive_reasoning.learner.runtime import all_gather
from adaptive_reasoning.rollout import Engine, Request, Sampling, request_seed
from adaptive_reasoning.rollout.dialogue import Dialogue, converse
from adaptive_reasoning.run.stages import stage_rows, stage_table
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.sandbox import executed
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
    check: check(answer, gold) -> bool, a function of a module that a grader process can import; None: `same_answer`.
    consensus: settings whose answers have to agree, and behind them the one to fall back on; empty: no such setting.
    script: of dialogues (`rollout.dialogue`): they are held in place of single responses, and mode_of gets their turns.
    extra_tokens: what the paper's tables add to prompt and response for the template; None: they count responses.
    """

    settings: dict[str, tuple[tuple[int, float], ...]]
    mode_of: Callable[[list[int]], str]
    extract_answer: Callable[[str], str | None]
    modes: tuple[str, ...]
    check: Callable[[str, str], bool] | None = None
    consensus: tuple[str, ...] = ()
    script: object = None
    extra_tokens: int | None = None


def evaluate(
    engine: Engine, grader, tokenizer, stop_ids, benchmark: Benchmark, protocol: Protocol, setting: str, args,
    accelerator=None, progress: str = "", keep: list | None = None,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Sample `benchmark.samples` responses to every question in one setting and grade them.

    The questions are dealt to the processes of `accelerator`; every process must call this. Responses are limited by
    args.max_new_tokens whatever their mode, sampled at args.temperature and args.eval_top_p, with random streams that
    depend on the question and sample alone: every evaluation of a run draws the same random numbers. `keep` receives
    the graded rows of all processes.

    Returns:
        the result (layout of design 6: accuracy, mean_tokens, modes, by_difficulty) and some rows for samples.jsonl.
    """
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    everything = [(i, q, k) for i, q in enumerate(benchmark.questions) for k in range(benchmark.samples)]
    jobs = everything[rank::ranks]
    every = max(1, len(everything) // KEPT_SAMPLES)  # the same responses are shown whatever the number of processes
    shown = [j for j in range(len(jobs)) if (rank + j * ranks) % every == 0]

    def of_all(rows: list) -> list:
        return [row for part in (all_gather(accelerator, rows) if accelerator else [rows]) for row in part]

    def in_order(samples: list[dict]) -> list[dict]:
        pairs = of_all([(rank + j * ranks, sample) for j, sample in zip(shown, samples)])
        return [sample for _, sample in sorted(pairs, key=lambda pair: pair[0])]

    if protocol.script is not None:
        rows, samples = hold_dialogues(
            engine, grader, benchmark.name, jobs, protocol, setting, args, progress if rank == 0 else "", shown
        )
        rows = of_all(rows)
        result = summarise(rows, protocol.modes) | stage_table(rows)
        for level, part in result["by_difficulty"].items():
            part |= stage_table([row for row in rows if row["difficulty"] == level])
        return result, in_order(samples)
    requests = [
        Request(
            prompts.render(tokenizer, asked(q.problem, args)),
            args.max_new_tokens,
            stop_ids,
            request_seed(args.seed, EVAL_STREAM, i, k),
            forced=protocol.settings[setting],
        )
        for i, q, k in jobs
    ]
    texts: dict[int, str] = {}
    answers: dict[int, str] = {}
    programs = {}  # those that run in the sandbox while decoding goes on
    sandboxes = ThreadPoolExecutor(os.cpu_count()) if getattr(args, "execute_code", False) else None

    def grade(j):
        answer = protocol.extract_answer(texts[j])
        if answer is not None:
            answers[j] = answer
            grader.submit(answer, jobs[j][1].answer, j)

    def on_finish(j, completion):
        texts[j] = prompts.decode(tokenizer, completion.response_ids.tolist(), stop_ids)
        if sandboxes is None:
            grade(j)
        else:
            programs[j] = sandboxes.submit(executed, texts[j])

    sampling = Sampling(args.temperature, args.eval_top_p)
    completions = engine.run(requests, sampling, on_finish, progress if rank == 0 else "")
    for j, program in programs.items():
        texts[j] = program.result()
        grade(j)
    if sandboxes:
        sandboxes.shutdown()
    grades = grader.drain()
    rows = [
        {
            "question": i,
            "sample": k,
            "mode": protocol.mode_of(c.response_ids.tolist()),
            "difficulty": q.difficulty,
            "answer": answers.get(j),
            "correct": j in grades and grades[j].correct,
            "tokens": len(c.response_ids),
        }
        for j, ((i, q, k), c) in enumerate(zip(jobs, completions))
    ]
    if protocol.extra_tokens is not None:
        for row, c in zip(rows, completions):
            row["tokens_paper"] = (
                len(c.context_ids) + row["tokens"] - (c.finish_reason == "stop") + protocol.extra_tokens
            )
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
        for j in shown
    ]
    rows = of_all(rows)
    if keep is not None:
        keep += rows
    return summarise(rows, protocol.modes), in_order(samples)


def hold_dialogues(
    engine, grader, benchmark: str, jobs: list, protocol: Protocol, setting: str, args, progress: str, shown: list[int]
) -> tuple[list[dict], list[dict]]:
    """Hold a dialogue for every job instead of sampling one response; return the rows, and samples of those `shown`."""
    dialogues = [Dialogue(q, i, request_seed(args.seed, EVAL_STREAM, i, k)) for i, q, k in jobs]
    converse(engine, grader, dialogues, protocol.script, Sampling(args.temperature, args.eval_top_p), setting, progress)
    rows = stage_rows(dialogues)
    for row, d in zip(rows, dialogues):
        mode = protocol.mode_of(d.turns)
        row |= {"question": d.group, "mode": mode, "difficulty": d.question.difficulty, "tokens": d.num_tokens}
        row["correct"] = d.turns[mode].correct
    samples = []
    for row, d in ((rows[j], dialogues[j]) for j in shown):
        samples.append({"setting": setting, "benchmark": benchmark, "mode": row["mode"]})
        samples[-1] |= {"difficulty": row["difficulty"], "problem": d.question.problem, "answer": d.question.answer}
        samples[-1] |= {"response": d.text, "reward": float(row["correct"]), "tokens": row["tokens"]}
        samples[-1] |= {"finish_reason": "length" if d.cut else "stop"}
    return rows, samples


def asked(problem: str, args) -> str:
    """Return the user's message: the problem, below the instruction where there is one."""
    instruction = getattr(args, "instruction", "")
    return f"{instruction}\n{problem}" if instruction else problem


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
