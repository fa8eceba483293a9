"""Options: one dataclass, one YAML file, overrides on the command line.

    python -m adaptive_reasoning.adaptthink --config experiments/adaptthink_1_5b.yaml --max_steps 2

Every option is a field of the algorithm's `Args`; the string below a field is its help text. The YAML file sets
defaults, the command line wins. An unknown option or YAML key is an error: a misspelt option cannot go unnoticed.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from adaptive_reasoning.core.errors import UserError


@dataclass
class RunArgs:
    """Options every algorithm shares: where things are, how much of them, and how they are run."""

    # --- where
    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    output_dir: str = "runs/unnamed"
    """Folder of the run. The same command again continues the run found there."""
    task: str = "math"
    """Kind of question: "math" (data files or data sets) or "chain" (arithmetic made by code)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: JSONL or Parquet files with `problem` and `answer`, or hub data sets."""
    train_limit: int = 0
    """Use only the first so many training questions (0: all of them)."""
    eval_data: str = ""
    """Evaluation questions, comma separated: files, hub data sets, or the names of the built-in benchmarks."""
    eval_limit: int = 0
    """Use only the first so many questions of every evaluation set (0: all of them)."""
    eval_samples: int = 1
    """Responses per evaluation question (the built-in AIME benchmarks always take 16)."""
    chain_mix: str = "0.6,0.1,0.1,0.1,0.05,0.05"
    """Share of the questions with 1, 2, ... operations (task "chain")."""
    chain_questions: int = 960
    """Number of training questions (task "chain")."""
    chain_eval_questions: int = 600
    """Number of evaluation questions (task "chain")."""

    # --- how long
    seed: int = 0
    """Seed of everything random: the data order and every sampled token."""
    max_steps: int = 314
    """Training steps: one rollout batch each."""
    eval_every: int = 10
    """Evaluate every so many steps (0: only before and after training)."""
    save_every: int = 10
    """Write a checkpoint every so many steps (0: only at the end)."""
    keep_checkpoints: int = 0
    """Keep only the newest so many checkpoints (0: all of them)."""

    # --- rollout
    temperature: float = 0.6
    """Sampling temperature of training and evaluation; log-probs are taken at the same temperature."""
    eval_top_p: float = 0.95
    """Nucleus of the evaluation sampler (training always samples from the whole distribution)."""
    max_prompt_tokens: int = 1024
    """Questions with a longer prompt are left out of training, and counted."""
    max_new_tokens: int = 16384
    """Longest response in tokens, first token and EOS included."""
    rollout_rows: int = 256
    """Rows that decode side by side on one process."""
    batch_invariant: bool = False
    """For debugging: a sample's log-probs do not depend on its batch mates, bit for bit; as slow as a full batch."""

    # --- learner
    learning_rate: float = 2e-6
    """AdamW learning rate, constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    adam_beta1: float = 0.9
    """AdamW first-moment decay."""
    adam_beta2: float = 0.999
    """AdamW second-moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm over all parameters."""
    tokens_per_micro_batch: int = 32768
    """Most tokens (padding included) in one forward pass of the learner."""
    dtype: str = "bf16"
    """Compute type of learner and rollout: "bf16" or "fp32". Master weights are fp32 either way."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""

    # --- grading, logging
    grader_workers: int = 8
    """Processes that check answers (task "math")."""
    grader_timeout: float = 10.0
    """Seconds one answer may take before its worker is killed and the answer counts as not verified."""
    max_ungraded: float = 0.2
    """Stop when more than this share of a step's answers hang or crash the grader: their reward would be a guess."""
    samples_per_step: int = 4
    """Training responses per step that go into samples.jsonl."""
    patience: float = 7200.0
    """Seconds that processes wait for the slowest one before the run ends with its name and what it was doing."""
    report_to: str = ""
    """Trackers beside metrics.jsonl, comma separated: tensorboard, wandb, trackio."""


def field_docs(cls: type) -> dict[str, str]:
    """Return {field name: the string literal below it} for a dataclass and its bases."""
    docs = {}
    for klass in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(klass):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(klass))).body[0].body
        for node, below in zip(body, body[1:]):
            is_text = isinstance(below, ast.Expr) and isinstance(getattr(below.value, "value", None), str)
            if isinstance(node, ast.AnnAssign) and is_text:
                docs[node.target.id] = " ".join(below.value.value.split())
    return docs


def documented(cls: type) -> type:
    """Return the dataclass with the strings below its fields as help texts of the command line."""
    docs = field_docs(cls)
    fields = []
    for f in dataclasses.fields(cls):
        if f.name not in docs:
            raise AssertionError(f"option {cls.__name__}.{f.name} has no line of documentation below it")
        default = (
            {"default": f.default} if f.default is not dataclasses.MISSING else {"default_factory": f.default_factory}
        )
        # argparse formats help texts with %, so a literal percent sign is doubled.
        fields.append((f.name, f.type, field(**default, metadata={"help": docs[f.name].replace("%", "%%")})))
    return dataclasses.make_dataclass(cls.__name__, fields)


def parse_args(cls: type, argv: list[str] | None = None):
    """Return `cls` filled from `--config FILE.yaml` and the command line (which wins).

    Raises:
        UserError: an unknown option, a YAML file that is missing, is no mapping or has a key that is no option, or a
            value out of range.
        SystemExit: argparse's own error (code 2) for a value of the wrong type; code 0 after `--preflight`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--preflight" in argv:
        from adaptive_reasoning.plan.command import print_plan  # which parses the rest of the line with this function

        print_plan(cls, argv)
        raise SystemExit(0)
    parser = HfArgumentParser(
        documented(cls), allow_abbrev=False, description=(inspect.getdoc(cls) or "").split("\n")[0]
    )
    parser.add_argument("--config", default="", help="YAML file with options; the command line wins over it.")
    parser.add_argument("--preflight", action="store_true", help="Print memory and hours of the run, and end.")
    config = parser.parse_known_args(argv)[0].config
    if config:
        parser.set_defaults(**read_yaml(Path(config), cls))
    parsed, *_, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [f"--{f.name}" for f in dataclasses.fields(cls)]
        raise UserError(f"unknown option {unknown[0]}.{suggestion(unknown[0], known)}")
    args = cls(**vars(parsed))
    check(args)
    return args


def suggestion(name: str, known) -> str:
    """Return a sentence with the known option nearest to a misspelt one."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else " --help lists all options."


def read_yaml(path: Path, cls: type) -> dict:
    """Return the options in a YAML file, checked against the fields of `cls`."""
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
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{path}: unknown option '{key}'.{suggestion(key, types)}")
        kind = types[key]
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            # YAML 1.1 reads 2e-6 as a string: the one trap worth mending for the user.
            try:
                value = values[key] = float(value)
            except ValueError:
                pass
        if kind in (int, float, str, bool) and (
            not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        ):
            raise UserError(f"{path}: option '{key}' needs a value of type {kind.__name__}, found {value!r}.")
    return values


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


POSITIVE = (  # of any algorithm
    "prompts_per_step",
    "num_generations",
    "minibatches_per_step",
    "nothinking_max_new_tokens",
    "clip_low",
    "clip_high",
    "ref_samples",
    "batch_size",
    "max_new_tokens",
    "max_prompt_tokens",
    "max_steps",
    "rollout_rows",
    "tokens_per_micro_batch",
    "grader_workers",
    "learning_rate",
    "grader_timeout",
    "patience",
    "max_grad_norm",
    "eval_samples",
    "fast_budget",
    "verify_budget",
    "slow_budget",
    "summary_budget",
    "qa_budget",
    "accuracy_window",
    "critic_minibatches",
    "critic_learning_rate",
    "judge_max_new_tokens",
    "chain_questions",
    "chain_eval_questions",
)
NOT_NEGATIVE = (
    "seed",
    "temperature",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "eval_limit",
    "train_limit",
    "warmup_steps",
    "weight_decay",
    "kl_coef",
    "entropy_coef",
    "logprob_coef",
    "dual_clip",
    "value_clip",
    "alpha",
)


CHOICES = {"dtype": ("bf16", "fp32"), "task": ("math", "chain")}  # an algorithm adds its own as a class attribute


def check(args) -> None:
    """Raise ValueError for values no run could work with; the message names the option and what it takes."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number.")
    for name in POSITIVE:
        if hasattr(args, name) and not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be greater than 0.")
    for name in NOT_NEGATIVE:
        if hasattr(args, name) and not getattr(args, name) >= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must not be negative.")
    for name, allowed in {**CHOICES, **getattr(args, "CHOICES", {})}.items():
        if getattr(args, name, allowed[0]) not in allowed:
            raise UserError(f"--{name} {getattr(args, name)}: takes {', '.join(allowed)}.")
    if hasattr(args, "prompts_per_step") and not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature}: training needs a temperature greater than 0.")
    if getattr(args, "minibatches_per_step", 1) > getattr(args, "prompts_per_step", 1):
        raise UserError(
            f"--minibatches_per_step {args.minibatches_per_step}: needs as many questions a step, --prompts_per_step "
            f"is {args.prompts_per_step}."
        )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name, 0.5) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must lie in [0, 1).")
    if getattr(args, "forcing", "") == "exact" and (args.num_generations * args.nothinking_share) % 1:
        raise UserError(
            f"--forcing exact: {args.nothinking_share:g} of --num_generations {args.num_generations} is no whole "
            "number of responses. Change one of them, or take --forcing coin."
        )
    for name in ("eval_top_p", "ref_top_p"):
        if not 0 < getattr(args, name, 1.0) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: must lie in (0, 1].")
    for name in ("max_ungraded", "nothinking_share", "nothinking_rows", "nothinking_supervised", "gamma", "lam"):
        if not 0 <= getattr(args, name, 0.5) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: must lie in [0, 1].")
