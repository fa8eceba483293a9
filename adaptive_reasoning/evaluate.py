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

from adaptive_reasoning import router
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.runtime import all_gather, make_accelerator
from adaptive_reasoning.options import RunArgs, parse_args
from adaptive_reasoning.report.console import aligned, evaluation_table, say
from adaptive_reasoning.report.files import append_jsonl, write_json_atomic, write_text_atomic
from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling, request_seed
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.lenient import lenient_answer, lenient_same
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
    extra_tokens: what the paper's tables add to prompt and response for the template; None: they count responses.
    """

    settings: dict[str, tuple[tuple[int, float], ...]]
    mode_of: Callable[[list[int]], str]
    extract_answer: Callable[[str], str | None]
    modes: tuple[str, ...]
    check: Callable[[str, str], bool] | None = None
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
    jobs = [(i, q, k) for i, q in enumerate(benchmark.questions) for k in range(benchmark.samples)][rank::ranks]
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
            "sample": k,
            "mode": protocol.mode_of(c.response_ids.tolist()),
            "difficulty": q.difficulty,
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
        for j in range(0, len(jobs), max(1, len(jobs) // KEPT_SAMPLES))
    ]
    if accelerator:
        rows = [row for part in all_gather(accelerator, rows) for row in part]
    if keep is not None:
        keep += rows
    return summarise(rows, protocol.modes), samples


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

# Thinkless, Tables 1 and 2, arXiv 2505.13379: accuracy in % (lenient scoring), mean tokens with prompt and template,
# share of thinking in %. "math_algebra" is the algebra part of MATH (1187 questions), there called Minerva Algebra.
PAPER["thinkless-1.5b"] = {
    "R1-Distill-1.5B": {"aime24": (28.0, 18063, 100), "math_algebra": (95.77, 3029, 100), "math500": (86.08, 5675, 100),
                        "gsm8k": (83.47, 1919, 100)},
    "warm-up, always think": {"aime24": (30.67, 18685, 100), "math_algebra": (95.3, 3064, 100),
                              "math500": (83.6, 6209, 100), "gsm8k": (82.53, 2363, 100)},
    "warm-up, never think": {"aime24": (8.0, 3977, 0), "math_algebra": (90.51, 690, 0), "math500": (72.76, 989, 0),
                             "gsm8k": (82.02, 441, 0)},
    "router random": {"aime24": (14.67, 8093, 56.0), "math_algebra": (92.11, 1736, 49.28),
                      "math500": (76.08, 3096, 47.92), "gsm8k": (82.05, 1086, 50.99)},
    "router Q-7B": {"aime24": (16.67, 9296, 46.67), "math_algebra": (92.5, 795, 5.64), "math500": (79.48, 2748, 25.0),
                    "gsm8k": (85.87, 563, 2.35)},
    "Thinkless": {"aime24": (27.33, 7099, 100), "math_algebra": (94.59, 1144, 25.88), "math500": (81.84, 2555, 51.56),
                  "gsm8k": (84.18, 624, 13.31)},
}  # fmt: skip
COLUMN = {"thinkless-1.5b": "think"}  # the mode whose share a paper's table has; the others: NoThinking


@dataclass
class Args(RunArgs):
    """Options of a stand-alone evaluation."""

    algorithm: str = "adaptthink"
    """Whose control tokens, answer format and settings are used: adaptthink or degrpo."""
    settings: str = "adaptive,always_think,never_think"
    """Settings to measure, comma separated; router_random and router_judge pick between the two forced ones."""
    paper: str = ""
    """Print the paper's rows beside ours: "1.5b" or "7b" (AdaptThink), "thinkless-1.5b"."""
    scoring: str = "strict"
    """"strict": as in training. "lenient": a box anywhere, other places, the first number (Thinkless' scripts)."""
    instruction: str = ""
    """Text put before every problem, e.g. to ask for a box."""
    judge_model: str = ""
    """Judge of router_judge: a folder or hub name; empty: the evaluated model itself."""
    judge_max_new_tokens: int = 1024
    """Longest reply of the judge."""
    first_word: str = "Alright"
    """The word forced by always_think."""
    eval_data: str = "gsm8k,math500,aime24"
    """Evaluation questions, comma separated: files, hub data sets, or the names of the built-in benchmarks."""

    CHOICES: ClassVar = {
        "algorithm": ("adaptthink", "degrpo"),
        "paper": ("", *PAPER),
        "scoring": ("strict", "lenient"),
    }


def paper_table(rows: list[dict], size: str) -> str:
    """Return our rows and the paper's for the benchmarks that both have: accuracy %, tokens, share of a mode."""
    there, mode = next(iter(PAPER[size].values())), COLUMN.get(size, "nothinking")
    names = [b for b in dict.fromkeys(r["benchmark"] for r in rows) if b in there]
    if not names:
        return "no benchmark here is in the paper's table"
    table = [["", *names]]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        ours = {r["benchmark"]: r["result"] for r in rows if r["setting"] == setting}
        cells = [
            f"{100 * ours[b]['accuracy']:.1f} / {ours[b].get('mean_tokens_paper', ours[b]['mean_tokens']):.0f} / "
            f"{100 * ours[b]['modes'].get(mode, {'share': 0})['share']:.1f}"
            for b in names
        ]
        table.append([f"here, {setting}", *cells])
    for name, published in PAPER[size].items():
        table.append([f"paper, {name}", *("{:.1f} / {} / {}".format(*published[b]) for b in names)])
    return f"accuracy % / tokens / {COLUMN.get(size, 'NoThinking')} %, paper {size}\n" + aligned(table)


def judge(args, make_engine, model, tokenizer, benchmarks, forced=()) -> dict[str, tuple[list[str], dict]]:
    """Return {benchmark: (pick of every question, numbers about the judge)}; every process asks about all questions."""
    engine, stop_ids = make_engine(model), prompts.stop_tokens(tokenizer, model.generation_config)
    problems = {b.name: [q.problem for q in b.questions] for b in benchmarks}
    return {
        name: router.judge_picks(engine, tokenizer, stop_ids, texts, args.judge_max_new_tokens, forced)
        for name, texts in problems.items()
    }


def main() -> None:
    args = parse_args(Args)
    algorithm = importlib.import_module(f"adaptive_reasoning.{args.algorithm}")
    accelerator = make_accelerator(args)
    model, tokenizer = load_model(args.model, args)
    protocol = algorithm.control_tokens(tokenizer, args).protocol()
    wanted = [name.strip() for name in args.settings.split(",") if name.strip()]
    routers = router.ROUTERS if set(router.ENDS.values()) <= set(protocol.settings) else ()
    unknown = [name for name in wanted if name not in (*protocol.settings, *routers)]
    if unknown or not wanted:
        raise UserError(f"--settings {args.settings}: takes {', '.join((*protocol.settings, *routers))}.")
    router.check_routers(wanted)
    if args.algorithm == "degrpo":  # whose paper counts prompt and template too
        protocol = dataclasses.replace(protocol, extra_tokens=prompts.template_tokens(tokenizer))
    if args.scoring == "lenient":
        protocol = dataclasses.replace(protocol, extract_answer=lenient_answer, check=lenient_same)
    stop_ids = prompts.stop_tokens(tokenizer, model.generation_config)
    task = load_task(args, tokenizer, train=False)
    if not task.benchmarks:
        raise UserError("--eval_data is empty: name files, hub data sets or built-in benchmarks.")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    device = accelerator.device

    def make_engine(model) -> Engine:
        return Engine(
            Decoder.from_model(model, device, dtype),
            args.rollout_rows,
            cache_bytes=4 << 30 if device.type == "cpu" else int(0.6 * torch.cuda.mem_get_info(device)[0]),
            sync_every=1 if device.type == "cpu" else 8,
        )

    judged = {}
    if "router_judge" in wanted and args.judge_model:  # first, so that its weights make room for those of the model
        judged = judge(args, make_engine, *load_model(args.judge_model, args), task.benchmarks)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    engine = make_engine(model)
    if "router_judge" in wanted and not args.judge_model:
        forced = protocol.settings["never_think"]  # its verdict, not its thoughts
        judged = judge(args, lambda _: engine, model, tokenizer, task.benchmarks, forced)
    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "samples.jsonl").unlink(missing_ok=True)
        write_text_atomic(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(args), sort_keys=False))
    rows = []
    with task.grader(args.grader_workers, args.grader_timeout, protocol.check) as grader:
        for benchmark in task.benchmarks:
            kept = {setting: [] for setting in wanted}
            for setting in wanted:
                if setting in router.ROUTERS:
                    continue
                result, samples = evaluate(
                    engine, grader, tokenizer, stop_ids, benchmark, protocol, setting, args, accelerator,
                    progress=f"evaluate {benchmark.name} {setting}", keep=kept[setting],
                )  # fmt: skip
                rows.append({"step": 0, "setting": setting, "benchmark": benchmark.name, "result": result})
                if accelerator.is_main_process:
                    for sample in samples:
                        append_jsonl(folder / "samples.jsonl", {"step": 0, "split": "eval", **sample})
            for setting in (name for name in wanted if name in router.ROUTERS):
                picks, more = router.coin_picks(len(benchmark.questions), args.seed), {}
                if setting == "router_judge":
                    picks, more = judged[benchmark.name]
                result = summarise(router.routed_rows(kept, picks), protocol.modes) | more
                rows.append({"step": 0, "setting": setting, "benchmark": benchmark.name, "result": result})
    if accelerator.is_main_process:
        write_json_atomic(folder / "evaluation.json", rows)
        say(evaluation_table(rows))
        if args.paper:
            say(paper_table(rows, args.paper))
        say(f"wrote {folder / 'evaluation.json'}")


if __name__ == "__main__":
    run_cli(main)
