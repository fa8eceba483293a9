"""Evaluation: accuracy against tokens, free and with the mode forced, by difficulty, beside the paper's row.

    python -m adaptive_reasoning.evaluate --config experiments/eval_adaptthink_1_5b.yaml --model runs/.../model

The settings show what choosing when to think is worth: "adaptive" forces nothing, "always_think" and "never_think"
force the first token and bound what the model could reach.
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import yaml

from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.runtime import all_gather, make_accelerator
from adaptive_reasoning.options import RunArgs, parse_args
from adaptive_reasoning.report.console import aligned, evaluation_table, say
from adaptive_reasoning.report.files import append_jsonl, write_json_atomic, write_text_atomic
from adaptive_reasoning.report.stages import stage_rows, stage_table
from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling, request_seed
from adaptive_reasoning.rollout.dialogue import Dialogue, converse
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.task import Benchmark, load_task

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
    script: of dialogues (`rollout.dialogue`): they are held in place of single responses, and mode_of gets their turns.
    """

    settings: dict[str, tuple[tuple[int, float], ...]]
    mode_of: Callable[[list[int]], str]
    extract_answer: Callable[[str], str | None]
    modes: tuple[str, ...]
    check: Callable[[str, str], bool] | None = None
    script: object = None


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
    if protocol.script is not None:
        rows, samples = hold_dialogues(
            engine, grader, benchmark.name, jobs, protocol, setting, args, progress if rank == 0 else ""
        )
        if accelerator:
            rows = [row for part in all_gather(accelerator, rows) for row in part]
        result = summarise(rows, protocol.modes) | stage_table(rows)
        for level, part in result["by_difficulty"].items():
            part |= stage_table([row for row in rows if row["difficulty"] == level])
        return result, samples
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


def hold_dialogues(
    engine, grader, benchmark: str, jobs: list, protocol: Protocol, setting: str, args, progress: str
) -> tuple[list[dict], list[dict]]:
    """Hold a dialogue for every job instead of sampling one response; return what `evaluate` makes of responses."""
    dialogues = [Dialogue(q, i, request_seed(args.seed, EVAL_STREAM, i, k)) for i, q, k in jobs]
    converse(engine, grader, dialogues, protocol.script, Sampling(args.temperature, args.eval_top_p), setting, progress)
    rows = stage_rows(dialogues)
    for row, d in zip(rows, dialogues):
        mode = protocol.mode_of(d.turns)
        row |= {"question": d.group, "mode": mode, "difficulty": d.question.difficulty, "tokens": d.num_tokens}
        row["correct"] = d.turns[mode].correct
    samples = []
    for row, d in list(zip(rows, dialogues))[:: max(1, len(jobs) // KEPT_SAMPLES)]:
        samples.append({"setting": setting, "benchmark": benchmark, "mode": row["mode"]})
        samples[-1] |= {"difficulty": row["difficulty"], "problem": d.question.problem, "answer": d.question.answer}
        samples[-1] |= {"response": d.text, "reward": float(row["correct"]), "tokens": row["tokens"]}
        samples[-1] |= {"finish_reason": "length" if d.cut else "stop"}
    return rows, samples


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


# Published rows (accuracy in %, mean tokens, share of NoThinking in %): AdaptThink, Table 1, arXiv 2505.13417.
PAPER = {
    "1.5b": {
        "original, always think": {"gsm8k": (79.0, 978, 0), "math500": (80.6, 4887, 0), "aime24": (29.4, 12073, 0)},
        "original, never think": {"gsm8k": (69.8, 280, 100), "math500": (67.2, 658, 100), "aime24": (14.0, 2190, 100)},
        "AdaptThink": {"gsm8k": (83.1, 480, 86.9), "math500": (82.0, 1782, 76.8), "aime24": (31.0, 6679, 40.4)},
    },
    "7b": {
        "original, always think": {"gsm8k": (87.9, 682, 0), "math500": (90.2, 3674, 0), "aime24": (53.5, 10306, 0)},
        "original, never think": {"gsm8k": (85.1, 283, 100), "math500": (80.6, 697, 100), "aime24": (24.2, 1929, 100)},
        "AdaptThink": {"gsm8k": (91.0, 309, 99.6), "math500": (92.0, 1875, 76.6), "aime24": (55.6, 8599, 6.3)},
    },
}

# Thinker, README table of its second version: pass@1 in % (mean of 16 samples) on eight benchmarks, and their mean.
THINKER_BENCHMARKS = ("math500", "aime24", "aime25", "gpqa", "olympiad", "amc23", "minerva", "college")
THINKER = {
    "q1.5b": {
        "Q1.5B pretrained": ((9.05, 0.00, 0.00, 4.55, 3.09, 4.06, 2.30, 7.40), 3.81),
        "Q1.5B QA baseline": ((59.82, 4.10, 2.43, 20.52, 26.05, 35.36, 19.25, 37.42), 25.62),
        "Q1.5B Thinker": ((64.45, 6.25, 2.22, 19.21, 28.21, 39.06, 20.38, 38.82), 27.33),
        "Q1.5B Thinker-Fast": ((59.82, 4.58, 1.25, 21.28, 24.52, 34.53, 17.85, 37.58), 25.18),
        "ORZ-1.5B (quoted)": ((58.0, 3.5, 1.0, 16.8, None, None, None, None), None),
        "SimpleRL-1.5B (quoted)": ((59.0, 4.2, None, None, 21.0, 35.0, 20.2, None), None),
    },
    "r1.5b": {
        "R1.5B pretrained": ((76.21, 17.50, 17.92, 13.76, 37.46, 55.94, 24.82, 38.85), 35.31),
        "R1.5B QA baseline": ((86.24, 35.42, 23.75, 25.69, 49.22, 72.81, 32.08, 42.02), 45.90),
        "R1.5B Thinker": ((88.51, 38.96, 26.67, 37.41, 55.49, 83.59, 34.77, 42.46), 50.98),
        "R1.5B Thinker-Fast": ((81.35, 18.33, 14.58, 28.85, 45.68, 66.41, 31.39, 41.74), 41.05),
    },
    "r7b": {  # the rows of Thinker and the end of the baseline's are not known to us
        "R7B pretrained": ((84.05, 37.50, 28.54, 17.58, 37.92, 36.41, 34.49, 40.72), 39.65),
        "R7B QA baseline": ((91.03, 47.50, 34.58, None, None, None, None, None), None),
    },
}


@dataclass
class Args(RunArgs):
    """Options of a stand-alone evaluation."""

    algorithm: str = "adaptthink"
    """Whose control tokens, answer format and settings are used: adaptthink or thinker."""
    settings: str = "adaptive,always_think,never_think"
    """Settings to measure, comma separated."""
    paper: str = ""
    """Print the paper's rows beside ours: "1.5b" or "7b" (AdaptThink), "q1.5b", "r1.5b" or "r7b" (Thinker)."""
    first_word: str = "Alright"
    """The word forced by always_think."""
    eval_data: str = "gsm8k,math500,aime24"
    """Evaluation questions, comma separated: files, hub data sets, or the names of the built-in benchmarks."""

    # --- Thinker's dialogue, as in thinker.py
    environment: str = "thinker"
    """Thinker: "thinker" for dialogues, "qa" for the baseline's one turn."""
    stage_prompts: str = "paper"
    """Thinker: the user's turns, "paper" or "chain"."""
    template: str = "auto"
    """Thinker: marks of a turn, "auto", "chatml" or "own"."""
    fast_budget: int = 1000
    """Thinker: most tokens of a Fast response."""
    verify_budget: int = 6000
    """Thinker: most tokens of a Verify response."""
    slow_budget: int = 6000
    """Thinker: most tokens of a Slow response."""
    summary_budget: int = 1000
    """Thinker: most tokens of a Summary, of which evaluation has none."""
    qa_budget: int = 8000
    """Thinker: most tokens of the baseline's response."""
    require_stop: bool = False
    """Thinker: a response cut at its budget has no answer."""
    skip_verify: bool = False
    """Thinker: the model was trained without Verify; every question goes to Slow."""

    CHOICES: ClassVar = {
        "algorithm": ("adaptthink", "thinker"),
        "paper": ("", *PAPER, *THINKER),
        "environment": ("thinker", "qa"),
        "stage_prompts": ("paper", "chain"),
        "template": ("auto", "chatml", "own"),
    }


def paper_table(rows: list[dict], size: str) -> str:
    """Return our rows and the paper's for the benchmarks that both have: accuracy %, tokens, NoThinking %."""
    names = [b for b in dict.fromkeys(r["benchmark"] for r in rows) if b in PAPER[size]["AdaptThink"]]
    if not names:
        return "no benchmark here is in the paper's table"
    table = [["", *names]]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        ours = {r["benchmark"]: r["result"] for r in rows if r["setting"] == setting}
        cells = [
            f"{100 * ours[b]['accuracy']:.1f} / {ours[b]['mean_tokens']:.0f} / "
            f"{100 * ours[b]['modes'].get('nothinking', {'share': 0})['share']:.1f}"
            for b in names
        ]
        table.append([f"here, {setting}", *cells])
    for name, published in PAPER[size].items():
        table.append([f"paper, {name}", *("{:.1f} / {} / {}".format(*published[b]) for b in names)])
    return f"accuracy % / tokens / NoThinking %, paper {size}\n" + aligned(table)


def thinker_table(rows: list[dict], size: str) -> str:
    """Return accuracy in % on the benchmarks of Thinker's table that were measured, and the plain mean of the eight."""
    names = [b for b in THINKER_BENCHMARKS if b in {r["benchmark"] for r in rows}]
    found = {}
    for r in rows:
        found.setdefault(f"here, {r['setting']}", {})[r["benchmark"]] = 100 * r["result"]["accuracy"]
    lines = {name: ([part[b] for b in names], mean_of_eight(part)) for name, part in found.items()}
    for name, (values, average) in THINKER[size].items():
        lines[f"paper, {name}"] = ([dict(zip(THINKER_BENCHMARKS, values))[b] for b in names], average)
    table = [["", *names, "mean of 8"]]
    table += [
        [name, *("-" if x is None else f"{x:.2f}" for x in (*values, mean))] for name, (values, mean) in lines.items()
    ]
    return f"pass@1 in %, paper {size}\n" + aligned(table)


def mean_of_eight(accuracies: dict[str, float]) -> float | None:
    """Return the plain mean of the eight columns, None if one is missing."""
    values = [accuracies.get(b) for b in THINKER_BENCHMARKS]
    return None if None in values else sum(values) / len(values)


def main() -> None:
    args = parse_args(Args)
    algorithm = importlib.import_module(f"adaptive_reasoning.{args.algorithm}")
    accelerator = make_accelerator(args)
    model, tokenizer = load_model(args.model, args)
    protocol = algorithm.control_tokens(tokenizer, args).protocol()
    wanted = [name.strip() for name in args.settings.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in protocol.settings]
    if unknown or not wanted:
        raise UserError(f"--settings {args.settings}: takes {', '.join(protocol.settings)}.")
    stop_ids = prompts.stop_tokens(tokenizer, model.generation_config)
    task = load_task(args, tokenizer, train=False)
    if not task.benchmarks:
        raise UserError("--eval_data is empty: name files, hub data sets or built-in benchmarks.")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    device = accelerator.device
    engine = Engine(
        Decoder.from_model(model, device, dtype),
        args.rollout_rows,
        cache_bytes=4 << 30 if device.type == "cpu" else int(0.6 * torch.cuda.mem_get_info(device)[0]),
        sync_every=1 if device.type == "cpu" else 8,
    )
    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "samples.jsonl").unlink(missing_ok=True)
        write_text_atomic(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(args), sort_keys=False))
    rows = []
    with task.grader(args.grader_workers, args.grader_timeout, protocol.check) as grader:
        for benchmark in task.benchmarks:
            for setting in wanted:
                result, samples = evaluate(
                    engine, grader, tokenizer, stop_ids, benchmark, protocol, setting, args, accelerator,
                    progress=f"evaluate {benchmark.name} {setting}",
                )  # fmt: skip
                rows.append({"step": 0, "setting": setting, "benchmark": benchmark.name, "result": result})
                if accelerator.is_main_process:
                    for sample in samples:
                        append_jsonl(folder / "samples.jsonl", {"step": 0, "split": "eval", **sample})
    if accelerator.is_main_process:
        write_json_atomic(folder / "evaluation.json", rows)
        say(evaluation_table(rows))
        if args.paper:
            say((thinker_table if args.paper in THINKER else paper_table)(rows, args.paper))
        say(f"wrote {folder / 'evaluation.json'}")


if __name__ == "__main__":
    run_cli(main)
