"""Supervised fine-tuning: the cold start that gives a model the formats before reinforcement learns when to use which.

    python -m adaptive_reasoning.sft --config experiments/cold_start_adaptthink.yaml

The loss is the mean negative log-prob over the response tokens of the batch, EOS included; prompts carry no loss. It
runs on the same learner as reinforcement: same packing, same log-probs, same checkpoints, and the same command
continues a run that was killed, to the same weights. LoRA through peft on request, merged into full weights at the end.

Training rows come from a file (JSONL or Parquet with `problem` and `response`), or, for the laboratory, from arithmetic
chains made by code. A row's mode token is supervised like any other, except where the recipe of its method says
otherwise (`tasks/formats`).
"""

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError, run_cli, say
from adaptive_reasoning.formats import Row, control_slot, load
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.packing import Counts
from adaptive_reasoning.learner.runtime import all_reduce, end, make_accelerator, on_main
from adaptive_reasoning.learner.watch import Watch
from adaptive_reasoning.run.adapter import start_of
from adaptive_reasoning.run.folder import MAY_CHANGE, check_same, inputs_of, read_config
from adaptive_reasoning.run.journal import Journal
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.options import Positive, RunArgs, parse_args
from adaptive_reasoning.tasks import chain, prompts

SHOW_EVERY = 50  # steps
CONTINUES = MAY_CHANGE - {"max_steps"}  # the schedule of the learning rate and the rows depend on how long it is
TEMPLATES = {"arm": load("arm").TEMPLATE}


@dataclass
class Args(RunArgs):
    """Options of supervised fine-tuning."""

    model: str = ""
    """Model to start from; empty with task "chain": a new small one."""
    task: Literal["math", "chain"] = "chain"
    """"chain": rows made by code. "math": rows from --data, with `problem` and `response`."""
    chain_mix: str = "0.2,0.2,0.15,0.15,0.15,0.15"
    """Share of the rows with 1, 2, ... operations (task "chain")."""
    max_steps: PositiveInt = 314
    """Training steps: one batch of rows each."""
    temperature: Positive = 1.0
    """Log-probs of supervised rows are taken at temperature 1."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included."""
    learning_rate: Positive = 2e-6
    """AdamW learning rate at its peak."""

    formats: str = "think"
    """Response format of chain rows: "think", "arm", "thinkless", "boxed", "dialogue", or your own as module.Class."""
    batch_size: PositiveInt = 128
    """Rows per optimiser step, over all processes."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """"cosine" to zero, or "constant"."""
    nothinking_rows: ClosedUnitInterval = 0.5
    """Share of the chain rows that are answered at once."""
    nothinking_supervised: ClosedUnitInterval = 0.05
    """Share of those rows in which the choice to answer at once is supervised too."""
    checks: str = ""
    """Shares of the thinking rows that check their work 0, 1, 2, ... times, e.g. 0.1,0.3,0.3,0.3 (empty: all once)."""
    slip: ClosedUnitInterval = 0.0
    """With --checks: probability that an operation of the first pass goes wrong; a quarter of it in a check."""
    pairs: bool = False
    """Rows of --data come in pairs, one question answered in both modes; both rows of a pair go into the same batch."""
    short_slot: str = ""
    """Thinkless: reserved token that becomes `<short>`, e.g. "<|quad_start|>"; "auto" finds one (empty: none)."""
    hidden_size: PositiveInt = 96
    """Width of the laboratory's model (task "chain" with an empty --model)."""
    layers: PositiveInt = 3
    """Depth of the laboratory's model."""
    lora_rank: NonNegativeInt = 0
    """Rank of LoRA on all linear layers (0: train all weights)."""
    lora_alpha: PositiveInt = 16
    """Scale of LoRA."""
    chat_template: Literal[("", *TEMPLATES, "thinkless")] = ""
    """Chat template to train with and to save: "" keeps the model's own, "arm" is "Human: {question}\\nAssistant:",
    "thinkless" is the model's own, but ends at the assistant's mark and keeps the thinking of finished answers."""
    epochs: NonNegativeInt = 0
    """Passes over the rows of --data, instead of --max_steps (0: --max_steps counts)."""
    warmup_share: ClosedUnitInterval = 0.0
    """Share of the steps over which the learning rate rises from zero, instead of --warmup_steps (0: that counts)."""

    def __post_init__(self):
        if self.task == "math" and not self.model:
            raise UserError("--model is empty: name the model to fine-tune.")
        if self.task == "math" and not self.data:
            raise UserError("--data is empty: name JSONL or Parquet files with `problem` and `response`.")
        if self.slip and not self.checks:
            raise UserError("--slip goes with --checks: name the shares of the rows with 0, 1, ... checks.")

    def holds(self) -> Holds:
        return Holds(rollout=False, lora_rank=self.lora_rank)


def load_rows(path: str) -> list[Row]:
    """Return the rows of a JSONL or Parquet file with `problem` and `response`.

    Raises:
        UserError: the file is missing or empty, or a row lacks a field; the message names file and row.
    """
    from adaptive_reasoning.tasks.math import read_rows

    rows = []
    for where, row in read_rows(path):
        for key in ("problem", "response"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise UserError(f"{where}: a supervised row needs '{key}' as a non-empty text, found {row.get(key)!r}.")
        rows.append(Row(Question(where, row["problem"], ""), row["response"]))
    return rows


def check_pairs(rows: list[Row], batch_size: int) -> None:
    """Raise UserError unless rows 1 and 2, 3 and 4, ... hold one problem each, with the two control tokens in front."""
    if batch_size % 2 or len(rows) % 2:
        raise UserError(f"--pairs: --batch_size ({batch_size}) and the number of rows ({len(rows)}) have to be even.")
    for one, other in zip(rows[::2], rows[1::2]):
        openings = {row.response.partition(">")[0] + ">" for row in (one, other)}
        if one.question.problem != other.question.problem or openings != {"<think>", "<short>"}:
            raise UserError(
                f"{other.question.id}: this row and the one before it have to be a pair: the same 'problem', and one "
                f"'response' that starts with <think> and one that starts with <short>; found {sorted(openings)}."
            )


def batch_of(rows: list[Row], step: int, args) -> list[Row]:
    """Return the rows of step 1, 2, ...: an epoch is a permutation of the rows, or of the pairs."""
    unit = 2 if args.pairs else 1
    size, number = args.batch_size // unit, len(rows) // unit
    order = np.random.default_rng([args.seed, (step - 1) * size // number])
    first = (step - 1) * size % number
    picked = np.roll(order.permutation(number), -first)[:size]
    return [rows[unit * i + j] for i in picked for j in range(unit)]


def episodes_of(rows: list[Row], tokenizer, limit: int) -> list[Episode]:
    """Return rows as episodes with advantage 1, which the learner packs and scores; cut at `limit` tokens."""

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    asked = encode([prompts.prompt_text(tokenizer, r.prompt or r.question.problem) for r in rows])
    answered = encode([r.response for r in rows])
    turns = iter(encode([text for r in rows for turn in r.turns for text in turn]))
    end = tokenizer.eos_token_id
    episodes = []
    for i, (row, prompt_ids, first) in enumerate(zip(rows, asked, answered)):
        ids, mask = [*first, end], [t >= row.start for t in range(len(first) + 1)]
        for _ in row.turns:
            between, response = next(turns), next(turns)
            ids += [*between, *response, end]
            mask += [False] * len(between) + [True] * (len(response) + 1)
        ids, mask = torch.tensor(ids[:limit]), torch.tensor(mask[:limit])
        zeros = torch.zeros(len(ids))
        episodes.append(Episode(row.question, i, torch.tensor(prompt_ids), ids, zeros, mask, "stop", advantage=1.0))
    return episodes


def loss(logprobs: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Return this micro-batch's share of the mean negative log-prob over the supervised tokens of the step."""
    return -logprobs.sum() / counts.tokens


def rate(args, step: int) -> float:
    """Return the learning rate of step 1, 2, ... before the warm-up: a plain float, as checkpoints need it."""
    if args.lr_schedule == "constant":
        return args.learning_rate
    # With a share of warm-up the cosine begins behind it, as in transformers.
    start = args.warmup_steps if args.warmup_share else 0
    angle = math.pi * max(0, step - 1 - start) / (args.max_steps - start)
    return args.learning_rate * 0.5 * (1 + math.cos(angle))


def start_model(args, accelerator):
    """Return (model to train, tokenizer)."""
    if args.model:
        model, tokenizer = load_model(start_of(args, accelerator), args)
        if args.short_slot:
            if args.lora_rank:
                raise UserError("--short_slot: LoRA leaves the embedding of `<short>` untrained. Set --lora_rank 0.")
            tokenizer = control_slot.take_slot(tokenizer, "<short>", args.short_slot, model)
    else:
        tokenizer = formats.tokenizer(args.formats)
        model = chain.tiny_model(tokenizer, args.hidden_size, args.layers, args.seed)
    if args.chat_template == "thinkless":
        tokenizer.chat_template = control_slot.thinkless_template(tokenizer)
    elif args.chat_template:
        tokenizer.chat_template = TEMPLATES[args.chat_template]
    if not args.lora_rank:
        return model, tokenizer
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora_rank needs the package peft: pip install 'adaptive-reasoning[peft]'.") from error
    config = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(args.seed)  # A is drawn at random
    get_peft_model(model, config)  # puts the adapters into the model itself
    return model, tokenizer


def merged(weights: Iterable[tuple[str, torch.Tensor]], scale: float) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of a model with LoRA in it, W + scale B A in place of each layer with adapters.

    From the gathered tensors rather than with peft's `merge_and_unload`, which would see the shards of ZeRO-3.
    """
    found = {name: tensor.cpu().clone() for name, tensor in weights}
    out = {}
    for name, tensor in found.items():
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            A, B = (found[f"{layer}.lora_{x}.default.weight"] for x in "AB")
            tensor = tensor + scale * (B @ A)
        out[name.replace(".base_layer", "")] = tensor
    return out


def resolved(args, rows: list[Row] | None):
    """Return the options with --epochs and --warmup_share as numbers of steps; UserError where rows and batch clash."""
    if not rows:
        return args
    if args.batch_size > len(rows):
        raise UserError(f"a step needs {args.batch_size} rows, {args.data} has {len(rows)}: lower --batch_size.")
    if args.pairs:
        check_pairs(rows, args.batch_size)
    if args.epochs:
        args = replace(args, max_steps=-(-args.epochs * len(rows) // args.batch_size))
    return args


def main() -> None:
    args = parse_args(Args)
    rows = load_rows(args.data) if args.task == "math" else None
    args = resolved(args, rows)
    if args.warmup_share:
        args = replace(args, warmup_steps=round(args.warmup_share * args.max_steps))
    folder = Path(args.output_dir)
    if (folder / "summary.json").is_file() and (folder / "model" / "config.json").is_file():
        check_same(folder, read_config(folder / "config.yaml"), "sft", asdict(args), CONTINUES)
        say(f"{folder / 'model'} is complete")
        return
    accelerator = make_accelerator(args)
    with Watch(accelerator, args.patience) as watch:
        watch.phase("train")
        learner = train(args, rows, accelerator)
    end(accelerator, [learner.engine] if learner.zero3 else [])


def train(args, file_rows: list[Row] | None, accelerator) -> Learner:
    """Train from the newest checkpoint, or from the start, and write the model."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    model, tokenizer = start_model(args, accelerator)
    data = {f"the training data {args.data}": [f"{r.question.problem}\0{r.response}" for r in file_rows or []]}
    frozen = args.model if args.lora_rank else None  # whose weights are read again
    journal = Journal(args, "sft", accelerator, may_change=CONTINUES)
    journal.open(inputs_of(data, tokenizer, frozen))
    learner = Learner(args, model, accelerator, trainable="marked" if args.lora_rank else "all")
    journal.restore(learner)

    for step in journal.steps():
        if file_rows is None:
            rows = load(args.formats).rows(args, np.random.default_rng([args.seed, step]), args.batch_size, step)
        else:
            rows = batch_of(file_rows, step, args)
        episodes = episodes_of(rows[rank::ranks], tokenizer, args.max_new_tokens)
        (minibatch,) = learner.minibatches(episodes, 1, step)
        total = 0.0
        for mb in minibatch:
            logprobs, _ = learner.score(mb)
            value = loss(logprobs, minibatch.counts)
            learner.backward(value)
            total += float(value.detach()) * mb.weight
        update = learner.step(rate(args, step))
        row = {"step": step, "loss/policy": float(all_reduce(accelerator, [total], "sum"))}
        row |= {f"loss/{key}": value for key, value in update.items()}
        journal.write(row, show=step % SHOW_EVERY == 0 or journal.last)
        journal.save_if_due(learner, tokenizer)
    place_model(journal, learner, tokenizer)
    journal.finish()
    return learner


def place_model(journal: Journal, learner: Learner, tokenizer) -> None:
    """Write <folder>/model whole or not at all: that of the last checkpoint, or LoRA merged into full weights."""
    args, model = journal.args, journal.folder / "model"
    partial, old = model.with_name("model.partial"), model.with_name("model.old")
    weights = None
    if args.lora_rank:
        named = learner.named_weights()
        weights = merged(named if journal.main else (), args.lora_alpha / args.lora_rank)
        for _ in named:  # the others gather along
            pass

    def place():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(journal.root / f"step_{journal.step:06d}" / "model", partial)
        if weights is not None:
            for file in partial.glob("*.safetensors*"):
                file.unlink()
            learner.model.save_pretrained(partial, state_dict=weights)
        shutil.rmtree(old, ignore_errors=True)
        if model.exists():  # of a process that was killed before it could write summary.json
            os.rename(model, old)
        os.rename(partial, model)
        shutil.rmtree(old, ignore_errors=True)
        say(f"wrote {model}")

    on_main(learner.accelerator, place)


if __name__ == "__main__":
    run_cli(main)
