"""Evaluation of a model: accuracy against tokens, free and with the mode forced, by difficulty, beside a paper's rows.

    python -m adaptive_reasoning.benchmark --config experiments/eval_adaptthink_1_5b.yaml --model runs/.../model
    python -m adaptive_reasoning.benchmark runs/adaptthink-1.5b     # a run: its own format, task, options, newest model

Behind the folder of a run, or of one of its checkpoints, --config and the command line may say other things. A setting
that is finished is kept in finished.jsonl: after a kill the same command measures the others alone.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from adaptive_reasoning import formats
from adaptive_reasoning.benchmark import routers as router
from adaptive_reasoning.benchmark.curves import CurveArgs, check_curves, curve_numbers, report_curves, with_curves
from adaptive_reasoning.benchmark.lenient import aime_answer, lenient_answer, lenient_same
from adaptive_reasoning.benchmark.official import official
from adaptive_reasoning.benchmark.papers import load_paper, paper_table
from adaptive_reasoning.benchmark.run_folder import of_run
from adaptive_reasoning.benchmark.tables import write_tables
from adaptive_reasoning.benchmark.votes import consensus, majority
from adaptive_reasoning.core.files import append_jsonl, read_jsonl, write_bytes_atomic, write_json_atomic
from adaptive_reasoning.core.intervals import accuracy_interval, pass_at
from adaptive_reasoning.errors import UserError, run_cli, say
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.dialogue import DialogueArgs, DialogueFormat, check_budgets
from adaptive_reasoning.formats.think import ThinkArgs
from adaptive_reasoning.formats.thinkless import ThinklessArgs
from adaptive_reasoning.learner.model import load_model, whole_weights
from adaptive_reasoning.learner.runtime import all_gather, end, make_accelerator, on_main
from adaptive_reasoning.learner.watch import Watch
from adaptive_reasoning.report.console import evaluation_table
from adaptive_reasoning.rollout import Decoder, Engine
from adaptive_reasoning.run.evaluation import KEPT_SAMPLES, EvalSpec, Evaluator, compare, evaluate, summarise
from adaptive_reasoning.run.folder import MAY_CHANGE, check_inputs, data_of, inputs_of, keep_date, open_folder
from adaptive_reasoning.run.options import NonNegative, PositiveShare, RunArgs, parse_args
from adaptive_reasoning.run.start import start_of
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.task import Benchmark, load_task

DECODE = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
# What an evaluation may be continued with other values of.
CONTINUES = MAY_CHANGE | {"settings", "eval_data", "paper", "budgets", "mode_bias"}


@dataclass
class Args(DialogueArgs, ThinkArgs, ThinklessArgs, CurveArgs, RunArgs):
    """Options of a stand-alone evaluation."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Model to evaluate: a Hugging Face folder, a hub name, or a GGUF file (Qwen2, Qwen3 or Llama)."""
    eval_data: str = "gsm8k,math500,aime24"
    """Evaluation questions, comma separated: files, hub data sets, or the names of the built-in benchmarks."""
    temperature: NonNegative = 0.6
    """Sampling temperature (0: greedy)."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the sampler."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included."""

    answer_format: str = "think"
    """Response format: think, arm, thinkless, native, boxed, dialogue, or a class of your own as module.Class."""
    settings: str = ""
    """Settings to measure, comma separated; empty: all that the format has, apart from the routers."""
    maj_k: NonNegativeInt = 0
    """Report maj@k beside the mean over the samples: the vote of the first k responses (0: no vote)."""
    execute_code: bool = False
    """Run the programs of the CODE format, each in a sandboxed process, and take their answers (ARM's appendix H)."""
    paper: str = ""
    """Print a paper's rows beside ours: a name in benchmark/published such as arm-3b, or the path of a YAML file."""
    scoring: Literal["strict", "lenient", "official"] = "strict"
    """"strict": as in training; default, because it is what a model was taught. "lenient": as Thinkless' scripts: a box
    anywhere, other places, the first number; AIME as a float; thinking is `<think>` anywhere in the response.
    "official": as ARM's script: no format gate, and a rule for every benchmark."""
    instruction: str = ""
    """Text put before every problem, e.g. to ask for a box."""
    kept_samples: PositiveInt = KEPT_SAMPLES
    """Responses of every benchmark and setting that go into samples.jsonl, evenly from all."""
    judge_model: str = ""
    """Judge of router_judge: a folder or hub name; empty: the evaluated model itself."""
    judge_max_new_tokens: PositiveInt = 1024
    """Longest reply of the judge."""

    def holds(self):
        raise UserError("--preflight plans training runs: those of a method, not an evaluation.")


def check_args(args) -> None:
    """Raise UserError for options that do not go together."""
    form = formats.load(args.answer_format)
    if args.paper and (mode := load_paper(args.paper)["mode"]) not in ("", *form.modes):
        raise UserError(f"--paper {args.paper}: its rows have the mode {mode}, {args.answer_format} has no such mode.")
    check_curves(args, form)
    if issubclass(form, DialogueFormat):
        check_budgets(args)
    if args.scoring == "official" and not issubclass(form, Arm):
        raise UserError(f"--scoring official: reads ARM's answer blocks, {args.answer_format} has none. Take strict.")
    if args.maj_k and issubclass(form, DialogueFormat):
        raise UserError("--maj_k: a dialogue already decides between two answers; there is no vote over dialogues.")
    if args.maj_k > args.eval_samples:
        raise UserError(f"--maj_k {args.maj_k}: needs as many responses a question, --eval_samples {args.maj_k}.")


def spec_of(tokenizer, args, benchmark: str = "") -> EvalSpec:
    """Return how the format is evaluated on a benchmark, with the scoring that was asked for."""
    form = formats.load(args.answer_format)(tokenizer, args)
    spec = with_curves(dataclasses.replace(form.eval_spec(), extra_tokens=form.template_tokens()), form, args)
    if args.scoring == "official":
        return official(spec, benchmark, partial(tokenizer.decode, **DECODE))
    if args.scoring == "strict":
        return spec

    def mode_of(response_ids) -> str:  # the scripts' think %: a response with <think> anywhere in it
        return "think" if "<think>" in tokenizer.decode(response_ids) else spec.mode_of(response_ids)

    extract = aime_answer if benchmark.startswith("aime") else lenient_answer
    mode_of = mode_of if "think" in spec.modes and not form.chooses else spec.mode_of
    return dataclasses.replace(spec, extract_answer=extract, check=lenient_same, mode_of=mode_of)


def wanted_settings(names: str, spec: EvalSpec) -> list[str]:
    """Return the settings to measure in order; consensus and routers are made from others, which come before them."""
    known = [*spec.settings, *(["consensus"] if spec.consensus else [])]
    routers = router.ROUTERS if set(router.ENDS.values()) <= set(spec.settings) else ()
    wanted = [name.strip() for name in names.split(",") if name.strip()] or known
    if not set(wanted) <= {*known, *routers}:
        raise UserError(f"--settings {names}: takes {', '.join((*known, *routers))}.")
    wanted = list(dict.fromkeys((*wanted, *spec.requests)))
    router.check_routers(wanted)
    if "consensus" in wanted:
        others = (w for w in wanted if w != "consensus")
        wanted = [*dict.fromkeys((*others, *spec.consensus, spec.fallback)), "consensus"]
    return sorted(wanted, key=lambda name: name in routers)


def finished(folder: Path, args, inputs: dict[str, str]) -> dict[tuple[str, str], dict]:
    """Return {(benchmark, setting): line of finished.jsonl} of what was measured before.

    Raises:
        UserError: the folder holds a training run, or an evaluation of other weights, data or options.
    """
    kept = folder / "finished.jsonl"
    if (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} holds a training run, whose files this would replace. Choose another --output_dir.")
    open_folder(folder, "benchmark", args, begun=kept.is_file(), may_change=CONTINUES)
    lines = read_jsonl(kept)
    for line in lines:
        check_inputs(folder, line["inputs"], {what: inputs.get(what) for what in line["inputs"]})
    return {(line["benchmark"], line["setting"]): line for line in lines}


def begin(folder: Path, args, task, tokenizer, accelerator) -> tuple[dict[str, str], dict[tuple[str, str], dict]]:
    """Open the folder on the main process; return (what is read beside the options, what was measured before)."""

    def read():
        code = task.code(sys.modules[formats.load(args.answer_format).__module__])
        inputs = inputs_of(data_of(task) | code, tokenizer, args.model)
        return inputs, finished(folder, args, inputs)

    inputs, kept = all_gather(accelerator, on_main(accelerator, read))[0]
    if kept and accelerator.is_main_process:
        say(f"continuing {folder}: {', '.join(f'{b} {s}' for b, s in kept)} measured before")
    return inputs, kept


def engines(args, model, tokenizer, spec: EvalSpec, due: list[Benchmark], device) -> tuple[Engine, dict]:
    """Return the engine of the model, and {benchmark: (the judge's pick of every question, numbers about it)}.

    A judge of its own answers first, so that its weights make room for the model's.

    Args:
        due: benchmarks whose questions have to be judged; every process asks about all of them.
    """
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32

    def make_engine(model) -> Engine:
        decoder = Decoder(model.config, device, dtype)
        decoder.load(whole_weights(model))
        return Engine(decoder, args.rollout_rows, batch_invariant=args.batch_invariant)

    def judge(engine, model, tokenizer, forced=()) -> dict[str, tuple[list[str], dict]]:
        stop_ids = prompts.stop_tokens(tokenizer, model.generation_config)
        ask = partial(router.judge_picks, engine, tokenizer, stop_ids)
        return {b.name: ask([q.problem for q in b.questions], args.judge_max_new_tokens, forced) for b in due}

    if not due or not args.judge_model:
        engine = make_engine(model)
        # The model itself: its verdict is wanted, not its thoughts.
        return engine, judge(engine, model, tokenizer, spec.settings["never_think"]) if due else {}
    other, words = load_model(args.judge_model, args)
    judged = judge(make_engine(other), other, words)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return make_engine(model), judged


def measure_setting(
    on: Evaluator, benchmark: Benchmark, setting: str, graded: dict[str, list[dict]], judged: dict
) -> tuple[dict, list[dict], list[dict]]:
    """Return (result, samples, graded rows) of a setting; consensus and routers use those of settings in `graded`."""
    if setting == "consensus":
        rows = consensus(graded, on.spec.consensus, on.spec.fallback)
        more = {"fallback_share": sum(r["fallback"] for r in rows) / len(rows)}
    elif setting in router.ROUTERS:
        coin = router.coin_picks(len(benchmark.questions), on.args.seed)
        picks, more = judged[benchmark.name] if setting == "router_judge" else (coin, {})
        rows = router.routed_rows(graded, picks)
    else:
        result, samples, rows = evaluate(on, benchmark, setting, f"evaluate {benchmark.name} {setting}")
        return result | curve_numbers(on, benchmark, setting, rows), samples, rows
    return summarise(rows, on.spec.modes) | more, [], rows


def measure_benchmark(
    on: Evaluator, benchmark: Benchmark, wanted: list[str], kept: dict, judged: dict, keep: Callable, watch: Watch
) -> list[dict]:
    """Return the rows of evaluation.json of one benchmark; `keep` takes the line of each newly measured setting."""
    graded: dict[str, list[dict]] = {}
    rows = []
    for setting in wanted:
        if line := kept.get((benchmark.name, setting)):
            graded[setting] = line["rows"]
            rows.append(line["row"])
            continue
        watch.phase(f"evaluate {benchmark.name} {setting}")
        result, samples, graded[setting] = measure_setting(on, benchmark, setting, graded, judged)
        if on.args.maj_k:
            votes = majority(graded[setting], on.args.maj_k, on.grader)
            vote = {"maj_k": on.args.maj_k, "maj_accuracy": pass_at(votes, 1)}
            result |= vote | {"maj_interval": accuracy_interval(votes)}
        rows.append({"step": 0, "setting": setting, "benchmark": benchmark.name, "result": result})
        line = {"benchmark": benchmark.name, "setting": setting, "row": rows[-1], "rows": graded[setting]}
        keep(line | {"samples": [{"step": 0, "split": "eval", **sample} for sample in samples]})
    compare({row["setting"]: row["result"] for row in rows}, graded, on.spec)
    return rows


def measure(args, accelerator, watch: Watch) -> None:
    """Measure every benchmark in every setting; keep each as it is finished, and write evaluation.json."""
    watch.phase("load")
    kind = formats.load(args.answer_format)
    model, tokenizer = load_model(start_of(args, accelerator, kind.needed_tokens()), args)
    keep_date(tokenizer, Path(args.output_dir), accelerator)
    spec = spec_of(tokenizer, args)
    lines = kind(tokenizer, args).prompt_lines
    if lines and accelerator.is_main_process:
        say("\n".join(f"  {name:<12}{text}" for name, text in lines.items()))
    wanted = wanted_settings(args.settings, spec)
    task, folder = load_task(args, tokenizer, train=False), Path(args.output_dir)
    if not task.benchmarks:
        raise UserError("--eval_data is empty: name files, hub data sets or built-in benchmarks.")
    inputs, kept = begin(folder, args, task, tokenizer, accelerator)
    data = data_of(task)

    def keep(line: dict) -> None:
        mine = {k: v for k, v in inputs.items() if k not in data or k.endswith(f" {line['benchmark']}")}
        on_main(accelerator, partial(append_jsonl, folder / "finished.jsonl", line | {"inputs": mine}))

    due = [b for b in task.benchmarks if "router_judge" in wanted and (b.name, "router_judge") not in kept]
    engine, judged = engines(args, model, tokenizer, spec, due, accelerator.device)
    stop_ids = prompts.stop_tokens(tokenizer, model.generation_config)
    rows = []
    # A grader for each rule of comparison in a row; it starts while the first answers are sampled.
    for check, group in groupby(task.benchmarks, lambda b: spec_of(tokenizer, args, b.name).check):
        with task.grader(args.grader_workers, args.grader_timeout, check) as grader:
            for b in group:
                scored = spec_of(tokenizer, args, b.name)
                on = Evaluator(
                    engine, grader, tokenizer, stop_ids, scored, args, accelerator, args.instruction,
                    args.execute_code, args.kept_samples,
                )  # fmt: skip
                rows += measure_benchmark(on, b, wanted, kept, judged, keep, watch)
    on_main(accelerator, partial(report, folder, args, spec, rows))


def report(folder: Path, args, spec: EvalSpec, rows: list[dict]) -> None:
    """Write evaluation.json, .csv and .md, and samples.jsonl, and print the results beside the paper's."""
    write_tables(folder, rows)
    write_json_atomic(folder / "evaluation.json", rows)
    write_bytes_atomic(folder / "samples.jsonl", b"")
    for sample in (sample for line in read_jsonl(folder / "finished.jsonl") for sample in line["samples"]):
        append_jsonl(folder / "samples.jsonl", sample)
    say(evaluation_table(rows))
    report_curves(folder, rows)
    for row in rows:
        if "fallback_share" in row["result"]:
            asked = f"{spec.modes.get(spec.fallback)} asked {row['result']['fallback_share']:.3f}"
            say(f"  {row['benchmark']}, {row['setting']}: {asked}")
    if args.paper:
        say(paper_table(rows, load_paper(args.paper)))
    say(f"wrote {folder / 'evaluation.json'}, evaluation.csv and evaluation.md")


def main() -> None:
    argv, below = sys.argv[1:], {}
    if argv and not argv[0].startswith("-"):
        below, of_the_run = of_run(Path(argv[0]), Args)
        argv = [*of_the_run, *argv[1:]]
    args = parse_args(Args, argv, below)
    check_args(args)
    accelerator = make_accelerator(args)
    with Watch(accelerator, args.patience) as watch:
        measure(args, accelerator, watch)
    end(accelerator)


if __name__ == "__main__":
    run_cli(main)
