"""Evaluation: accuracy against tokens, free and with the mode forced, by difficulty, beside the paper's row.

    python -m adaptive_reasoning.evaluate --config experiments/eval_adaptthink_1_5b.yaml --model runs/.../model

The settings show what choosing when to think is worth: "adaptive" forces nothing, "always_think" and "never_think"
force the first token and bound what the model could reach. ARM's settings force one of its four tags; "consensus" takes
the answer the three cheap formats agree on, else the Long CoT's, from the very samples of the forced settings.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling, request_seed
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.sandbox import executed
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
    consensus: settings whose answers have to agree, and behind them the one to fall back on; empty: no such setting.
    """

    settings: dict[str, tuple[tuple[int, float], ...]]
    mode_of: Callable[[list[int]], str]
    extract_answer: Callable[[str], str | None]
    modes: tuple[str, ...]
    check: Callable[[str, str], bool] | None = None
    consensus: tuple[str, ...] = ()


def evaluate(
    engine: Engine, grader, tokenizer, stop_ids, benchmark: Benchmark, protocol: Protocol, setting: str, args,
    accelerator=None, progress: str = "",
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Return the result of one setting (layout of design 6) and some rows for samples.jsonl: `graded`, summarised."""
    rows, samples = graded(
        engine, grader, tokenizer, stop_ids, benchmark, protocol, setting, args, accelerator, progress
    )
    return summarise(rows, protocol.modes), samples


def graded(
    engine: Engine, grader, tokenizer, stop_ids, benchmark: Benchmark, protocol: Protocol, setting: str, args,
    accelerator=None, progress: str = "",
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Sample `benchmark.samples` responses to every question in one setting and grade them.

    The questions are dealt to the processes of `accelerator`; every process must call this. Responses are limited by
    args.max_new_tokens whatever their mode, sampled at args.temperature and args.eval_top_p, with random streams that
    depend on the question and sample alone: every evaluation of a run draws the same random numbers.

    Returns:
        one row a response, of all processes: question, sample, mode, difficulty, answer (None where the format has
        none), correct, tokens (forced ones included); and some rows for samples.jsonl.
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
    answers: dict[int, str] = {}

    def grade(j):
        answer = protocol.extract_answer(texts[j])
        if answer is not None:
            answers[j] = answer
            grader.submit(answer, jobs[j][1].answer, j)

    programs = {}
    pool = ThreadPoolExecutor(os.cpu_count()) if getattr(args, "execute_code", False) else None

    def on_finish(j, completion):
        texts[j] = prompts.decode(tokenizer, completion.response_ids.tolist(), stop_ids)
        if pool is None:
            grade(j)
        else:
            programs[j] = pool.submit(executed, texts[j])

    sampling = Sampling(args.temperature, args.eval_top_p)
    completions = engine.run(requests, sampling, on_finish, progress if rank == 0 else "")
    for j, program in programs.items():
        texts[j] = program.result()
        grade(j)
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
    return rows, samples


def consensus(rows_of: dict[str, list[dict]], settings: tuple[str, ...]) -> list[dict]:
    """Return the rows of the setting "consensus", made from the rows of the settings that it asks.

    Where the answers of all settings but the last are the same text, and none is missing, that is the answer; else it
    is the last one's, whose tokens are spent as well. A row has the mode of the response whose answer it takes.
    """
    *cheap, last = ({(r["question"], r["sample"]): r for r in rows_of[setting]} for setting in settings)
    rows = []
    for key in cheap[0]:
        asked = [rows[key] for rows in cheap]
        answers = {r["answer"] for r in asked}
        agreed = len(answers) == 1 and None not in answers
        taken = asked[0] if agreed else last[key]
        tokens = sum(r["tokens"] for r in asked) + (0 if agreed else taken["tokens"])
        rows.append({**taken, "tokens": tokens, "fallback": not agreed})
    return rows


def majority(rows: list[dict], k: int, grader) -> float:
    """Return maj@k: the share of questions whose most frequent answer of the first k samples is right.

    Two answers are peers if they are the same text without spaces and dollar signs, or else by the grader, the earlier
    one as its reference: math-verify for numbers and LaTeX, the same letter for letters. Ties go to the earliest, a
    missing answer has no vote, and a question without any answer is wrong.
    """
    questions: dict[int, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["sample"]):
        questions.setdefault(row["question"], []).append(row)
    voters = {i: [r for r in part[:k] if r["answer"] is not None] for i, part in questions.items()}

    def key(row):
        return row["answer"].replace(" ", "").replace("$", "")

    for i, part in voters.items():
        texts = list({key(r): r["answer"] for r in reversed(part)}.items())[::-1]  # different ones, earliest first
        for n, (text, answer) in enumerate(texts):
            for earlier, reference in texts[:n]:
                grader.submit(answer, reference, (i, earlier, text))
    same = {pair for pair, grade in grader.drain().items() if grade.correct}

    def peers(i, row):
        a = key(row)
        return sum(key(r) == a or (i, key(r), a) in same or (i, a, key(r)) in same for r in voters[i])

    winners = [max(part, key=lambda r: peers(i, r)) if part else None for i, part in voters.items()]
    return sum(bool(r and r["correct"]) for r in winners) / len(winners)


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
ADAPTTHINK = {
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


def arm_rows(table: str) -> dict[str, dict[str, tuple]]:
    """Return {row: {benchmark: (accuracy in %, mean tokens)}} of a table: a name, seven accuracies, seven means."""
    names = ("csqa", "obqa", "gsm8k", "math", "svamp", "bbh", "aime25")
    rows = {}
    for line in table.strip().splitlines():
        name, accuracies, tokens = line.split("|")
        pairs = zip(accuracies.split(), tokens.split(), strict=True)
        rows[name.strip()] = {b: (float(a), int(n)) for b, (a, n) in zip(names, pairs, strict=True)}
    return rows


# ARM, arXiv 2505.20258v2: Table 1 (k = 1: pass@1, k = 8: maj@8), and Table 2 (settings of 7B, pass@1).
ARM = {
    "3b": arm_rows("""
        base, k=1     | 66.5 65.8 66.9 37.7 71.3 38.4  0.0 |  97 120 150  419  76 232 1393
        base, k=8     | 75.5 77.4 80.9 50.8 83.7 47.1  0.0 |  96 100 149  424  85 240 1544
        SFT, k=1      | 72.8 72.4 35.7 20.9 62.3 37.4  0.0 |  99 108 145  229 126 311  694
        SFT, k=8      | 75.5 77.4 56.0 27.6 74.7 43.5  0.0 |  97 103 132  231 108 309  537
        SFT+GRPO, k=1 | 79.7 79.0 88.7 66.6 92.0 52.6  6.7 | 425 501 788 1586 630 994 3027
        SFT+GRPO, k=8 | 80.3 80.0 91.4 74.0 94.7 56.2  6.7 | 429 506 802 1590 638 996 3247
        ARM, k=1      | 79.8 78.0 83.8 62.9 89.7 50.0  6.7 | 118 156 346 1013 264 436 2958
        ARM, k=8      | 80.1 78.0 90.8 72.8 95.0 53.8  6.7 | 123 169 359 1036 246 430 3083"""),
    "7b": arm_rows("""
        base, k=1     | 76.7 78.6 81.6 50.1 81.0 51.7  3.3 |  64  83 156  376  99 182  767
        base, k=8     | 82.0 86.4 89.9 64.7 89.7 62.0  3.3 |  66  74 156  370  92 183  881
        SFT, k=1      | 80.8 81.2 54.4 30.4 76.0 48.2  0.0 | 136 150 184  348 126 245 1239
        SFT, k=8      | 83.9 84.6 79.4 42.4 88.0 56.0  0.0 | 141 137 185  361 141 274 1023
        SFT+GRPO, k=1 | 83.1 82.2 92.8 79.4 93.7 64.3 16.7 | 491 651 739 1410 587 1133 3196
        SFT+GRPO, k=8 | 83.7 84.6 94.8 84.9 95.3 69.3 20.0 | 496 625 745 1415 586 1135 3145
        ARM, k=1      | 86.1 84.4 89.2 73.9 92.0 61.4 16.7 | 136 159 305  889 218 401 3253
        ARM, k=8      | 85.7 85.8 93.7 82.6 95.3 67.9 20.0 | 134 154 297  893 218 413 3392
        ARM, direct   | 84.1 81.8 22.9 23.1 67.0 44.7  0.0 |  10  10  11   13  11  21   12
        ARM, cot      | 81.3 77.4 85.0 70.9 86.7 49.7 10.0 |  33  35 124  633  66 101 2010
        ARM, code     | 84.4 81.6 84.2 65.9 88.3 57.9 10.0 | 140 147 285  559 182 344 1821
        ARM, long_cot | 84.0 87.4 91.8 77.2 94.3 66.9 20.0 | 259 294 426 1220 340 660 4130
        ARM, consensus| 85.8 87.0 92.9 78.4 95.7 66.4 20.0 | 228 260 777 2281 433 1039 7973"""),
    "14b": arm_rows("""
        base, k=1     | 79.9 83.8 84.9 52.7 84.7 56.8  3.3 |  56  60 132  335  77 139  611
        base, k=8     | 83.8 90.2 92.3 68.4 91.7 67.4  3.3 |  55  60 131  325  81 131  735
        SFT, k=1      | 81.8 88.0 62.6 37.4 84.0 53.5  0.0 | 155 140 161  276 152 254  527
        SFT, k=8      | 85.0 91.4 86.4 48.8 91.7 64.4  3.3 | 149 141 165  288 140 247  493
        SFT+GRPO, k=1 | 85.4 93.0 94.8 81.7 93.7 70.5 20.0 | 558 531 693 1805 565 945 4031
        SFT+GRPO, k=8 | 85.8 94.2 96.1 87.1 95.3 77.0 20.0 | 552 537 696 1810 565 943 3723
        ARM, k=1      | 85.3 91.8 92.5 79.1 93.3 66.6 20.0 | 146 128 294  903 212 420 3871
        ARM, k=8      | 85.6 91.8 96.3 86.4 95.7 72.1 23.3 | 145 134 293  910 189 415 3996"""),
}
PAPER = {"adaptthink": ADAPTTHINK, "grpo": ARM, "ada_grpo": ARM}
# What is printed behind accuracy and tokens: the share of a mode, as far as the paper has it.
PAPER_MODE = {
    "adaptthink": ("NoThinking", "nothinking"),
    "grpo": ("Long CoT", "long_cot"),
    "ada_grpo": ("Long CoT", "long_cot"),
}


@dataclass
class Args(RunArgs):
    """Options of a stand-alone evaluation."""

    algorithm: str = "adaptthink"
    """Whose control tokens, answer format and settings are used: adaptthink, grpo or ada_grpo (the same two)."""
    settings: str = ""
    """Settings to measure, comma separated; empty: all that the algorithm has."""
    maj_k: int = 0
    """Report maj@k beside the mean over the samples: the vote of the first k responses (0: no vote)."""
    execute_code: bool = False
    """Run the programs of the CODE format, each in a sandboxed process, and take their answers (ARM's appendix H)."""
    answer_format: str = "tags"
    """Answers of grpo and ada_grpo: "tags" (ARM's formats) or "boxed"."""
    paper: str = ""
    """Print the paper's rows beside ours: "1.5b" or "7b" (AdaptThink), "3b", "7b" or "14b" (ARM)."""
    first_word: str = "Alright"
    """The word forced by always_think."""
    eval_data: str = "gsm8k,math500,aime24"
    """Evaluation questions, comma separated: files, hub data sets, or the names of the built-in benchmarks."""

    CHOICES: ClassVar = {"algorithm": tuple(PAPER), "paper": ("", "1.5b", "3b", "7b", "14b")}


def paper_table(rows: list[dict], algorithm: str, size: str) -> str:
    """Return our rows and the paper's for the benchmarks that both have: accuracy %, tokens, share of one mode %."""
    published = PAPER[algorithm][size]
    label, mode = PAPER_MODE[algorithm]
    names = [b for b in dict.fromkeys(r["benchmark"] for r in rows) if b in next(iter(published.values()))]
    if not names:
        return "no benchmark here is in the paper's table"
    table = [["", *names]]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        ours = {r["benchmark"]: r["result"] for r in rows if r["setting"] == setting}
        for title, key in ((setting, "accuracy"), (f"{setting}, vote", "maj_accuracy")):
            if key in ours[names[0]]:
                cells = [
                    f"{100 * ours[b][key]:.1f} / {ours[b]['mean_tokens']:.0f} / "
                    f"{100 * ours[b]['modes'].get(mode, {'share': 0})['share']:.1f}"
                    for b in names
                ]
                table.append([f"here, {title}", *cells])
    for name, row in published.items():
        table.append([f"paper, {name}", *(" / ".join(map(str, row[b])) for b in names)])
    return f"accuracy % / tokens / {label} %, paper {size}\n" + aligned(table)


def check_args(args) -> None:
    """Raise UserError for options that do not go together."""
    if args.paper and args.paper not in PAPER[args.algorithm]:
        raise UserError(f"--paper {args.paper}: the paper of {args.algorithm} has {', '.join(PAPER[args.algorithm])}.")
    if args.maj_k > args.eval_samples:
        raise UserError(f"--maj_k {args.maj_k}: needs as many responses a question, --eval_samples {args.maj_k}.")


def main() -> None:
    args = parse_args(Args)
    check_args(args)
    algorithm = importlib.import_module(f"adaptive_reasoning.{args.algorithm}")
    accelerator = make_accelerator(args)
    model, tokenizer = load_model(args.model, args)
    protocol = algorithm.control_tokens(tokenizer, args).protocol()
    known = [*protocol.settings, *(["consensus"] if protocol.consensus else [])]
    wanted = [name.strip() for name in args.settings.split(",") if name.strip()] or known
    if [name for name in wanted if name not in known]:
        raise UserError(f"--settings {args.settings}: takes {', '.join(known)}.")
    if "consensus" in wanted:  # made from the settings it asks, so these are measured first
        wanted = [*dict.fromkeys((*(w for w in wanted if w != "consensus"), *protocol.consensus)), "consensus"]
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
            graded_rows: dict[str, list[dict]] = {}
            for setting in wanted:
                if setting == "consensus":
                    graded_rows[setting], samples = consensus(graded_rows, protocol.consensus), []
                else:
                    graded_rows[setting], samples = graded(
                        engine, grader, tokenizer, stop_ids, benchmark, protocol, setting, args, accelerator,
                        progress=f"evaluate {benchmark.name} {setting}",
                    )  # fmt: skip
                result = summarise(graded_rows[setting], protocol.modes)
                if setting == "consensus":
                    fallbacks = [row["fallback"] for row in graded_rows[setting]]
                    result["fallback_share"] = sum(fallbacks) / len(fallbacks)
                if args.maj_k:
                    result["maj_accuracy"] = majority(graded_rows[setting], args.maj_k, grader)
                rows.append({"step": 0, "setting": setting, "benchmark": benchmark.name, "result": result})
                if accelerator.is_main_process:
                    for sample in samples:
                        append_jsonl(folder / "samples.jsonl", {"step": 0, "split": "eval", **sample})
    if accelerator.is_main_process:
        write_json_atomic(folder / "evaluation.json", rows)
        say(evaluation_table(rows))
        for row in rows:
            for key, title in (("maj_accuracy", f"maj@{args.maj_k}"), ("fallback_share", "Long CoT asked")):
                if key in row["result"]:
                    say(f"  {row['benchmark']}, {row['setting']}: {title} {row['result'][key]:.3f}")
        if args.paper:
            say(paper_table(rows, args.algorithm, args.paper))
        say(f"wrote {folder / 'evaluation.json'}")


if __name__ == "__main__":
    run_cli(main)
