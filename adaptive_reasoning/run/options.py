"""Options: one dataclass, one YAML file, overrides on the command line.

    python -m adaptive_reasoning.adaptthink --config experiments/adaptthink_1_5b.yaml --max_steps 2

Every option is a field of the method's `Args`; its type says what it takes and the string below it is its help text.
The YAML file sets defaults, the command line wins. An unknown option or YAML key is an error. What two options of a
method need of each other is checked in the `__post_init__` of its `Args`.
"""

import argparse
import dataclasses
import difflib
import functools
import re
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt, restricted_number_type

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.preflight import Place, print_plan
from adaptive_reasoning.tasks.think_template import ThinkingArgs

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the string below a field is its help

# Every float option has one of these types, or ClosedUnitInterval: none of them takes nan or inf.
Finite = restricted_number_type("Finite", float, [(">", -inf), ("<", inf)])
Positive = restricted_number_type("Positive", float, [(">", 0), ("<", inf)])
NonNegative = restricted_number_type("NonNegative", float, [(">=", 0), ("<", inf)])
PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])
ShareBelowOne = restricted_number_type("ShareBelowOne", float, [(">=", 0), ("<", 1)])


@dataclass
class RunArgs(ThinkingArgs):
    """Options every method shares: where things are, how much of them, and how they are run."""

    # --- where
    model: str = ""
    """Model to start from: a Hugging Face folder, a hub name, or a GGUF file (Qwen2, Qwen3 or Llama)."""
    merge_adapter: bool = False
    """--model is an adapter (peft): merge it into its base once, at <output_dir>/start, and start from that."""
    control_tokens: str = "model"
    """Control tokens that the response format needs: "model": they have to be there; "reserved": reserved slots of the
    vocabulary are renamed; "add": new rows; or each by itself, "<think>=add,<short>=<|quad_start|>"."""
    chat_template: str = ""
    """Chat template to run with and to save: "" the model's own; "think": its own, but the prompt ends in `<think>`;
    "thinkless": its own, ending at the assistant's mark, thinking kept; "plain": its turn marks without a system text;
    "arm": "Human: {question}\\nAssistant:"; a Jinja file. Two of them as in "plain+think"."""
    output_dir: str = "runs/unnamed"
    """Folder of the run. The same command again continues the run found there."""
    task: str = "math"
    """Questions: "math" (data files or data sets), "chain", "words" (made by code), "reasoning-gym:chain_sum,..." (its
    options in brackets: "chain_sum(max_terms=3)"), or your own: "path/to/file.py:function", "module.function"."""
    data: str = ""
    """Training questions, comma separated: JSONL, CSV, Parquet with `problem` and `answer`, or hub data sets."""
    train_limit: NonNegativeInt = 0
    """Use only the first so many training questions (0: all of them)."""
    eval_data: str = ""
    """Evaluation questions, comma separated: files, hub data sets, or the names of the built-in benchmarks."""
    eval_limit: NonNegativeInt = 0
    """Use only the first so many questions of every evaluation set (0: all of them)."""
    eval_samples: PositiveInt = 1
    """Responses per evaluation question (the built-in AIME and AMC benchmarks always take 16)."""
    chain_mix: str = "0.6,0.1,0.1,0.1,0.05,0.05"
    """Share of the questions with 1, 2, ... operations (tasks "chain" and "words")."""
    chain_questions: PositiveInt = 960
    """Number of training questions (tasks "chain", "words" and "reasoning-gym")."""
    chain_eval_questions: PositiveInt = 600
    """Number of evaluation questions (tasks "chain", "words" and "reasoning-gym")."""

    # --- how long
    seed: NonNegativeInt = 0
    """Seed of everything random: the data order and every sampled token."""
    max_steps: PositiveInt = 100
    """Training steps: one rollout batch each."""
    eval_every: NonNegativeInt = 10
    """Evaluate every so many steps (0: only before and after training)."""
    save_every: NonNegativeInt = 10
    """Write a checkpoint every so many steps (0: only at the end)."""
    keep_checkpoints: NonNegativeInt = 0
    """Keep only the newest so many checkpoints (0: all of them)."""

    # --- rollout
    temperature: NonNegative = 1.0
    """Sampling temperature of training and evaluation; log-probs are taken at the same temperature."""
    eval_top_p: PositiveShare = 1.0
    """Nucleus of the evaluation sampler (training always samples from the whole distribution)."""
    max_prompt_tokens: PositiveInt = 1024
    """Questions with a longer prompt are left out of training, and counted."""
    max_new_tokens: PositiveInt = 4096
    """Longest response in tokens, first token and EOS included."""
    rollout_rows: PositiveInt = 256
    """Rows that decode side by side on one process."""
    batch_invariant: bool = False
    """For debugging: a sample's log-probs do not depend on its batch mates, bit for bit; as slow as a full batch."""

    # --- learner
    learning_rate: Positive = 1e-6
    """AdamW learning rate, constant."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from zero."""
    weight_decay: NonNegative = 0.01
    """AdamW weight decay."""
    adam_beta1: ShareBelowOne = 0.9
    """AdamW first-moment decay."""
    adam_beta2: ShareBelowOne = 0.999
    """AdamW second-moment decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm over all parameters."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: "stop" (default, because its cause is in the samples that are written
    down) or "skip" the update and go on, as verl does; counted as loss/skipped_updates."""
    tokens_per_micro_batch: PositiveInt = 32768
    """Most tokens (padding included) in one forward pass of the learner."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type of learner and rollout: "bf16" or "fp32". Master weights are fp32 either way."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""
    lora_rank: NonNegativeInt = 0
    """Train adapters of this rank beside frozen weights, LoRA (0: train all weights)."""
    lora_alpha: PositiveInt = 16
    """Scale of LoRA: what the adapters add is multiplied by alpha / rank."""
    lora_targets: str = "all-linear"
    """Linear layers with an adapter, comma separated, e.g. "q_proj,v_proj"; "all-linear": all of the decoder layers."""

    # --- grading, logging
    reward: str = ""
    """Your own reward, "path/to/file.py:function" or "module.function": (core.response.Response) -> number, which takes
    the place of 1 for right and 0 for wrong in the method's formula. Run in the graders; evaluations go without it."""
    grader_workers: PositiveInt = 8
    """Processes that check answers (not those of "chain" and "words"), and as many for --reward."""
    grader_timeout: Positive = 10.0
    """Seconds one answer or reward may take before its worker is killed and it counts as not verified."""
    max_ungraded: ClosedUnitInterval = 0.2
    """Stop when more than this share of a step's answers hang or crash the grader, or of its responses --reward: what
    they are worth would be a guess."""
    samples_per_step: NonNegativeInt = 4
    """Training responses per step that go into samples.jsonl."""
    patience: Positive = 7200.0
    """Seconds that processes wait for the slowest one before the run ends with its name and what it was doing."""
    report_to: str = ""
    """Trackers beside metrics.jsonl, comma separated: tensorboard, wandb, trackio."""

    def holds(self) -> Holds:
        """Return what a run of the method holds in memory beside the policy, for the memory plan."""
        return Holds(top_p=self.eval_top_p)


@functools.cache
def parser_of(cls: type, *more: type) -> ArgumentParser:
    """Return the parser of dataclasses; it is made once, which takes longer than to parse."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", type=str, default="", help="YAML file with options; the command line wins over it.")
    parser.add_argument("--preflight", action="store_true", help="Print the memory plan of the run, and end.")
    for each in (cls, *more):
        parser.add_class_arguments(each)
    for action in parser._actions:
        if action.dest in {f.name for each in (cls, *more) for f in dataclasses.fields(each) if f.type is bool}:
            action.nargs, action.const = "?", True  # --pairs is --pairs true
    return parser


def parse_args(cls: type, argv: list[str] | None = None, below: dict | None = None):
    """Return `cls` filled from `--config FILE.yaml` and the command line (which wins).

    Args:
        below: options (`checked`) that hold where neither gives another value.

    `--preflight` prints the memory plan instead, on the machine that the options of `Place` describe, and ends.

    Raises:
        UserError: an unknown option, a YAML file that is missing, is no mapping or has a key that is no option, or a
            value of the wrong type or out of range.
        SystemExit: code 0 after `--preflight` and `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = (cls, Place) if "--preflight" in argv else (cls,)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    try:
        config, rest = first.parse_known_args(argv)
        written = (below or {}) | (read_yaml(Path(config.config), cls) if config.config else {})
        options = parser_of(*asked).parse_args(rest, namespace=Namespace(written))
    except ArgumentError as error:
        raise UserError(in_words(error, *asked)) from error
    args, *place = (each(**{f.name: plain(options[f.name]) for f in dataclasses.fields(each)}) for each in asked)
    if place:
        print_plan(args, *place)
        raise SystemExit(0)
    return args


def plain(value):
    """Return a number of a type above as a plain int or float, which every library can write and read."""
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return kind(value) if kind else value


def in_words(error: Exception, *asked: type) -> str:
    """Return what jsonargparse says as one line that begins with the option."""
    text = " ".join(str(error).split())
    if unknown := re.match(r"unrecognized arguments: (\S+)", text):
        known = [f"--{f.name}" for each in asked for f in dataclasses.fields(each)]
        return f"unknown option {unknown[1]}.{suggestion(unknown[1], known)}"
    return re.sub(r'^Parser key "(\w+)":', r"--\1:", re.sub(r"<class '(\w+)'>|typing\.", r"\1", text))


def suggestion(name: str, known) -> str:
    """Return a sentence with the known option nearest to a misspelt one."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else " --help lists all options."


def read_yaml(path: Path, cls: type) -> dict:
    """Return the options in a YAML file, each checked against its field of `cls`."""
    if not path.is_file():
        raise UserError(
            f"--config {path}: no such file. Give the path of a YAML file, for example one of experiments/*.yaml."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}. Save the file as UTF-8.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options, found {type(values).__name__}.")
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            raise UserError(f"{path}: unknown option '{key}'.{suggestion(key, names)}")
        if value is None:  # which jsonargparse takes for "not given"
            raise UserError(f"{path}: option '{key}' has no value.")
    return checked(values, path, cls)


def checked(values: dict, path: Path, cls: type) -> dict:
    """Return the options of a file, each checked against its field of `cls`; UserError names file and option."""
    try:
        return parser_of(cls).parse_object(values, defaults=False).as_dict()
    except (ArgumentError, OverflowError) as error:
        raise UserError(f"{path}: {in_words(error, cls)}") from error


def check_minibatches(args) -> None:
    """Raise UserError where a step has fewer questions than optimiser steps."""
    if args.minibatches_per_step > args.prompts_per_step:
        raise UserError(
            f"--minibatches_per_step {args.minibatches_per_step}: needs as many questions a step, --prompts_per_step "
            f"is {args.prompts_per_step}."
        )


def parse_schedule(option: str, text: str, below: float) -> list[tuple[int, float]]:
    """Return [(steps done, value from there on)] of "0:0.5,300:0.2".

    Raises:
        UserError: not such pairs, the first for step 0, the steps rising, every value in [0, below).
    """
    try:
        pairs = [(int(step), float(value)) for step, value in (part.split(":") for part in text.split(","))]
    except ValueError:
        pairs = []
    steps = [step for step, _ in pairs]
    if steps[:1] != [0] or steps != sorted(set(steps)) or not all(0 <= value < below for _, value in pairs):
        raise UserError(
            f"--{option} {text!r}: needs pairs steps:value such as '0:0.5,300:0.2' (0.5 for 300 steps, then 0.2), the "
            f"first for step 0, the steps rising, every value in [0, {below:g})."
        )
    return pairs
