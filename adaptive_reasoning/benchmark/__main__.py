"""Evaluation of a model: accuracy against tokens, free and with the mode forced, by difficulty, beside the paper's row.

    python -m adaptive_reasoning.benchmark --config experiments/eval_adaptthink_1_5b.yaml --model runs/.../model

A setting that is finished is kept in finished.jsonl: after a kill the same command measures the others alone.
"""

import dataclasses
import importlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from adaptive_reasoning.benchmark import routers as router
from adaptive_reasoning.benchmark.lenient import lenient_answer, lenient_same
from adaptive_reasoning.benchmark.papers import PAPERS
from adaptive_reasoning.benchmark.votes import consensus, majority
from adaptive_reasoning.core.errors import UserError, run_cli, say
from adaptive_reasoning.core.files import append_jsonl, read_jsonl, write_bytes_atomic, write_json_atomic
from adaptive_reasoning.learner.model import load_model, whole_weights
from adaptive_reasoning.learner.runtime import all_gather, end, make_accelerator, on_main
from adaptive_reasoning.learner.watch import Watch
from adaptive_reasoning.report.console import evaluation_table
from adaptive_reasoning.rollout import Decoder, Engine
from adaptive_reasoning.run.evaluation import Protocol, evaluate, summarise
from adaptive_reasoning.run.folder import MAY_CHANGE, check_inputs, data_of, inputs_of, open_folder
from adaptive_reasoning.run.options import NonNegative, PositiveShare, RunArgs, parse_args
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.task import load_task

CONTINUES = MAY_CHANGE | {"settings", "eval_data", "paper"}  # what an evaluation may be continued with other values of


@dataclass
class Args(RunArgs):
    """Options of a stand-alone evaluation."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Model to evaluate: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    eval_data: str = "gsm8k,math500,aime24"
    """Evaluation questions, comma separated: files, hub data sets, or the names of the built-in benchmarks."""
    temperature: NonNegative = 0.6
    """Sampling temperature (0: greedy)."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the sampler."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included."""

    algorithm: Literal[tuple(PAPERS)] = "adaptthink"
    """Whose control tokens, answer format and settings are used: adaptthink, grpo, ada_grpo, degrpo or thinker."""
    settings: str = ""
    """Settings to measure, comma separated; empty: all that the algorithm has, apart from the routers of degrpo."""
    maj_k: NonNegativeInt = 0
    """Report maj@k beside the mean over the samples: the vote of the first k responses (0: no vote)."""
    execute_code: bool = False
    """Run the programs of the CODE format, each in a sandboxed process, and take their answers (ARM's appendix H)."""
    answer_format: Literal["tags", "boxed"] = "tags"
    """Answers of grpo: "tags" (ARM's formats) or "boxed"."""
    paper: Literal[("", *(size for rows, _ in PAPERS.values() for size in rows))] = ""
    """Print the paper's rows beside ours: "1.5b" or "7b" (AdaptThink), "3b", "7b" or "14b" (ARM), "q1.5b", "r1.5b" or
    "r7b" (Thinker), "thinkless-1.5b"."""
    scoring: Literal["strict", "lenient"] = "strict"
    """"strict": as in training. "lenient": a box anywhere, other places, the first number (Thinkless' scripts)."""
    instruction: str = ""
    """Text put before every problem, e.g. to ask for a box."""
    judge_model: str = ""
    """Judge of router_judge: a folder or hub name; empty: the evaluated model itself."""
    judge_max_new_tokens: PositiveInt = 1024
    """Longest reply of the judge."""
    first_word: str = "Alright"
    """The word forced by always_think."""

    # --- Thinker's dialogue, as in thinker.py
    environment: Literal["thinker", "qa"] = "thinker"
    """Thinker: "thinker" for dialogues, "qa" for the baseline's one turn."""
    stage_prompts: Literal["paper", "chain"] = "paper"
    """Thinker: the user's turns, "paper" or "chain"."""
    template: Literal["auto", "chatml", "own"] = "auto"
    """Thinker: marks of a turn, "auto", "chatml" or "own"."""
    fast_budget: PositiveInt = 1000
    """Thinker: most tokens of a Fast response."""
    verify_budget: PositiveInt = 6000
    """Thinker: most tokens of a Verify response."""
    slow_budget: PositiveInt = 6000
    """Thinker: most tokens of a Slow response."""
    summary_budget: PositiveInt = 1000
    """Thinker: most tokens of a Summary, of which evaluation has none."""
    qa_budget: PositiveInt = 8000
    """Thinker: most tokens of the baseline's response."""
    require_stop: bool = False
    """Thinker: a response cut at its budget has no answer."""
    skip_verify: bool = False
    """Thinker: the model was trained without Verify; every question goes to Slow."""


def check_args(args) -> None:
    """Raise UserError for options that do not go together."""
    known = PAPERS[args.algorithm][0]
    if args.paper and args.paper not in known:
        raise UserError(f"--paper {args.paper}: the paper of {args.algorithm} has {', '.join(known)}.")
    if args.maj_k and args.algorithm == "thinker":
        raise UserError("--maj_k: a dialogue already decides between two answers; there is no vote over dialogues.")
    if args.maj_k > args.eval_samples:
        raise UserError(f"--maj_k {args.maj_k}: needs as many responses a question, --eval_samples {args.maj_k}.")


def wanted_settings(names: str, protocol: Protocol) -> list[str]:
    """Return the settings to measure in order; consensus and routers are made from others, which come before them."""
    known = [*protocol.settings, *(["consensus"] if protocol.consensus else [])]
    routers = router.ROUTERS if set(router.ENDS.values()) <= set(protocol.settings) else ()
    wanted = [name.strip() for name in names.split(",") if name.strip()] or known
    if not set(wanted) <= {*known, *routers}:
        raise UserError(f"--settings {names}: takes {', '.join((*known, *routers))}.")
    router.check_routers(wanted)
    if "consensus" in wanted:
        wanted = [*dict.fromkeys((*(w for w in wanted if w != "consensus"), *protocol.consensus)), "consensus"]
    return sorted(wanted, key=lambda name: name in routers)


def judge(args, make_engine, model, tokenizer, benchmarks, forced=()) -> dict[str, tuple[list[str], dict]]:
    """Return {benchmark: (pick of every question, numbers about the judge)}; every process asks about all questions."""
    engine, stop_ids = make_engine(model), prompts.stop_tokens(tokenizer, model.generation_config)
    problems = {b.name: [q.problem for q in b.questions] for b in benchmarks}
    return {
        name: router.judge_picks(engine, tokenizer, stop_ids, texts, args.judge_max_new_tokens, forced)
        for name, texts in problems.items()
    }


def finished(folder: Path, args, inputs: dict[str, str]) -> dict[tuple[str, str], dict]:
    """Return {(benchmark, setting): line of finished.jsonl} of what was measured before; write samples.jsonl from it.

    Raises:
        UserError: the folder holds a training run, or an evaluation of other weights, data or options.
    """
    kept = folder / "finished.jsonl"
    if (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} holds a training run, whose files this would replace. Choose another --output_dir.")
    open_folder(folder, args.algorithm, args, begun=kept.is_file(), may_change=CONTINUES)
    lines = read_jsonl(kept)
    for line in lines:
        check_inputs(folder, line["inputs"], {what: inputs.get(what) for what in line["inputs"]})
    samples = folder / "samples.jsonl"
    write_bytes_atomic(samples, b"")
    for line in lines:
        for sample in line["samples"]:
            append_jsonl(samples, sample)
    return {(line["benchmark"], line["setting"]): line for line in lines}


def main() -> None:
    args = parse_args(Args)
    check_args(args)
    accelerator = make_accelerator(args)
    with Watch(accelerator, args.patience) as watch:
        measure(args, accelerator, watch)
    end(accelerator)


def measure(args, accelerator, watch: Watch) -> None:
    """Measure every benchmark in every setting; keep each as it is finished, and write evaluation.json."""
    watch.phase("load")
    algorithm = importlib.import_module(f"adaptive_reasoning.{args.algorithm}")
    model, tokenizer = load_model(args.model, args)
    protocol = algorithm.control_tokens(tokenizer, args).protocol()
    wanted = wanted_settings(args.settings, protocol)
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
        decoder = Decoder(model.config, device, dtype)
        decoder.load(whole_weights(model))
        return Engine(decoder, args.rollout_rows, batch_invariant=args.batch_invariant)

    folder, data = Path(args.output_dir), data_of(task)

    def begin():
        inputs = inputs_of(data, tokenizer, args.model)
        return inputs, finished(folder, args, inputs)

    inputs, kept = all_gather(accelerator, on_main(accelerator, begin))[0]
    if kept and accelerator.is_main_process:
        say(f"continuing {folder}: {', '.join(f'{b} {s}' for b, s in kept)} measured before")
    judged, due = {}, [b for b in task.benchmarks if (b.name, "router_judge") not in kept]
    if "router_judge" in wanted and due and args.judge_model:  # first, so that its weights make room for the model's
        judged = judge(args, make_engine, *load_model(args.judge_model, args), due)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    engine = make_engine(model)
    if "router_judge" in wanted and due and not args.judge_model:
        forced = protocol.settings["never_think"]  # its verdict, not its thoughts
        judged = judge(args, lambda _: engine, model, tokenizer, due, forced)
    rows = []
    with task.grader(args.grader_workers, args.grader_timeout, protocol.check) as grader:
        for benchmark in task.benchmarks:
            graded: dict[str, list[dict]] = {setting: [] for setting in wanted}
            for setting in wanted:
                if line := kept.get((benchmark.name, setting)):
                    graded[setting] = line["rows"]
                    rows.append(line["row"])
                    continue
                samples, more = [], {}
                watch.phase(f"evaluate {benchmark.name} {setting}")
                if setting == "consensus":
                    graded[setting] = consensus(graded, protocol.consensus)
                    more = {"fallback_share": sum(r["fallback"] for r in graded[setting]) / len(graded[setting])}
                    result = summarise(graded[setting], protocol.modes) | more
                elif setting in router.ROUTERS:
                    picks = router.coin_picks(len(benchmark.questions), args.seed)
                    if setting == "router_judge":
                        picks, more = judged[benchmark.name]
                    graded[setting] = router.routed_rows(graded, picks)
                    result = summarise(graded[setting], protocol.modes) | more
                else:
                    result, samples = evaluate(
                        engine, grader, tokenizer, stop_ids, benchmark, protocol, setting, args, accelerator,
                        progress=f"evaluate {benchmark.name} {setting}", keep=graded[setting],
                    )  # fmt: skip
                if args.maj_k:
                    result["maj_accuracy"] = majority(graded[setting], args.maj_k, grader)
                rows.append({"step": 0, "setting": setting, "benchmark": benchmark.name, "result": result})
                samples = [{"step": 0, "split": "eval", **sample} for sample in samples]
                mine = {k: v for k, v in inputs.items() if k not in data or k.endswith(f" {benchmark.name}")}
                line = {"benchmark": benchmark.name, "setting": setting, "row": rows[-1], "inputs": mine}
                line |= {"rows": graded[setting], "samples": samples}
                on_main(accelerator, partial(append_jsonl, folder / "finished.jsonl", line))
                for sample in samples if accelerator.is_main_process else ():  # made again of the lines if torn
                    append_jsonl(folder / "samples.jsonl", sample)

    def report():
        write_json_atomic(folder / "evaluation.json", rows)
        say(evaluation_table(rows))
        for row in rows:
            for key, title in (("maj_accuracy", f"maj@{args.maj_k}"), ("fallback_share", "Long CoT asked")):
                if key in row["result"]:
                    say(f"  {row['benchmark']}, {row['setting']}: {title} {row['result'][key]:.3f}")
        if args.paper:
            say(PAPERS[args.algorithm][1](rows, args.paper))
        say(f"wrote {folder / 'evaluation.json'}")

    on_main(accelerator, report)


if __name__ == "__main__":
    run_cli(main)
