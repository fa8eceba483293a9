"""Supervised fine-tuning: the cold start that gives a model the formats before reinforcement learns when to use which.

    python -m adaptive_reasoning.sft --config experiments/cold_start_adaptthink.yaml

The loss is the mean negative log-prob over the response tokens of the batch, EOS included; prompts carry no loss. With
`rows_per_mean` it is the mean of means over so many rows each, as a trainer has it that averages every micro-batch by
itself: a short row then weighs more, and with it its mode. Rows may be held out, and the checkpoint of lowest loss on
them kept. It runs on the same learner as reinforcement: same packing, same log-probs, same checkpoints, and the same
command continues a run that was killed, to the same weights. LoRA through peft on request, merged into full weights.

Training rows come from a file (JSONL, CSV or Parquet with `problem` and `response`), or, for the laboratory, from
arithmetic chains made by code. A row's mode token is supervised like any other, except where the recipe of its method
says otherwise (`formats`). Rows with `problem`, `thinking` (may be empty) and `answer` are for hybrid models such as
Qwen3: their openings are those of the chat template, as token ids, and are supervised on request only.
"""

import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Metric
from adaptive_reasoning.errors import UserError, run_cli, say
from adaptive_reasoning.formats import Row, load
from adaptive_reasoning.formats.rows import (
    batch_of,
    check_pairs,
    check_thinking,
    episodes_of,
    held_out,
    load_rows,
    share_of,
    text_of,
)
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.lora import lora_config
from adaptive_reasoning.learner.model import load_model, load_tokenizer
from adaptive_reasoning.learner.packing import Counts, MicroBatch
from adaptive_reasoning.learner.runtime import all_reduce, end, make_accelerator, on_main
from adaptive_reasoning.learner.watch import Watch
from adaptive_reasoning.run.folder import MAY_CHANGE, check_same, inputs_of, keep_date, read_config
from adaptive_reasoning.run.journal import Journal
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.options import NonNegative, Positive, RunArgs, ShareBelowOne, parse_args
from adaptive_reasoning.run.start import start_of
from adaptive_reasoning.tasks import chain, prompts
from adaptive_reasoning.tasks.chat_template import ENDS
from adaptive_reasoning.tasks.control_tokens import WORDS
from adaptive_reasoning.tasks.think_template import put

SHOW_EVERY = 50  # steps
CONTINUES = MAY_CHANGE - {"max_steps"}  # the schedule of the learning rate and the rows depend on how long it is
METRICS = {
    "validation/loss": Metric(
        "Mean negative log-prob of the rows that are held out, averaged as in training.", "nats",
        "falls; where it rises again the rows are learnt by heart",
        panel="Validation loss | Rows that are held out."),
}  # fmt: skip


@dataclass
class Args(RunArgs):
    """Options of supervised fine-tuning."""

    model: str = ""
    """Model to start from; empty with task "chain": a new small one."""
    task: Literal["math", "chain", "words"] = "chain"
    """"chain", "words": rows made by code, arithmetic or stories. "math": rows of --data: `problem` and `response`."""
    chain_mix: str = "0.2,0.2,0.15,0.15,0.15,0.15"
    """Share of the rows with 1, 2, ... operations (tasks "chain" and "words")."""
    max_steps: PositiveInt = 314
    """Training steps: one batch of rows each."""
    temperature: Positive = 1.0
    """Log-probs of supervised rows are taken at temperature 1."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included."""
    learning_rate: Positive = 2e-6
    """AdamW learning rate at its peak."""

    formats: str = "think"
    """Format of rows made by code: "think", "arm", "thinkless", "boxed", "dialogue", or your own as module.Class."""
    batch_size: PositiveInt = 128
    """Rows per optimiser step, over all processes."""
    rows_per_mean: NonNegativeInt = 0
    """Rows whose tokens make one mean; the loss is the mean of the means. 0: one mean over all tokens of the batch."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """"cosine" down to --min_learning_rate, or "constant"."""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """The cosine begins behind the "warmup" (transformers, Megatron), or at the "start", and is cut by the warm-up."""
    min_learning_rate: NonNegative = 0.0
    """Where the cosine ends."""
    decay_vectors: bool = True
    """Weight decay on norms and biases too; false: on matrices alone, as transformers and Megatron have it."""
    validation_share: ShareBelowOne = 0.0
    """Share of the rows of --data that are held out (0: none)."""
    eval_every: NonNegativeInt = 100
    """Score the rows held out every so many steps, and after the last one (0: only then)."""
    keep: Literal["last", "best"] = "last"
    """The model that is written: of the "last" step, or of the scored one with the lowest loss on the rows held out."""
    nothinking_rows: ClosedUnitInterval = 0.5
    """Share of the rows made by code that are answered at once."""
    nothinking_supervised: ClosedUnitInterval = 0.05
    """Share of those rows in which the choice to answer at once is supervised too."""
    checks: str = ""
    """Shares of the thinking rows that check their work 0, 1, 2, ... times, e.g. 0.1,0.3,0.3,0.3 (empty: all once)."""
    slip: ClosedUnitInterval = 0.0
    """With --checks: probability that an operation of the first pass goes wrong; a quarter of it in a check."""
    supervise_opening: bool = False
    """Rows with `thinking`: supervise their opening too, which teaches to choose; false: what follows it alone."""
    pairs: bool = False
    """Rows of --data come in pairs, one question answered in both modes; both rows of a pair go into the same batch."""
    hidden_size: PositiveInt = 96
    """Width of the laboratory's model (task "chain" with an empty --model)."""
    layers: PositiveInt = 3
    """Depth of the laboratory's model."""
    epochs: NonNegativeInt = 0
    """Passes over the rows of --data, instead of --max_steps (0: --max_steps counts)."""
    warmup_share: ClosedUnitInterval = 0.0
    """Share of the steps over which the learning rate rises from zero, instead of --warmup_steps (0: that counts)."""

    def __post_init__(self):
        if self.task != "chain" and not self.model:
            raise UserError("--model is empty: name the model to fine-tune.")
        if self.task == "math" and not self.data:
            raise UserError(
                "--data is empty: name files (JSONL, CSV, Parquet) with `problem` and `response`, or with "
                "`problem`, `thinking` and `answer`."
            )
        if self.slip and self.task != "chain":
            raise UserError("--slip goes with --task chain: no other task works on from a wrong value.")
        if self.slip and not self.checks:
            raise UserError("--slip goes with --checks: name the shares of the rows with 0, 1, ... checks.")
        if self.task != "math" and self.validation_share:
            raise UserError("--validation_share: rows of --data are held out; code makes new ones in every step.")
        if self.keep == "best":
            if not self.validation_share:
                raise UserError("--keep best: needs rows to compare by, --validation_share 0.1 for example.")
            if self.save_every and self.eval_every % self.save_every:
                raise UserError(
                    f"--keep best: every step that is scored has to be saved, --eval_every {self.eval_every} is no "
                    f"multiple of --save_every {self.save_every}."
                )
            if self.eval_every and not self.save_every:
                raise UserError("--keep best: --save_every 0 saves the last step alone. Give that of --eval_every.")
        if self.rows_per_mean and self.batch_size % self.rows_per_mean:
            raise UserError(
                f"--rows_per_mean {self.rows_per_mean}: --batch_size {self.batch_size} is no multiple of it."
            )
        if self.min_learning_rate > self.learning_rate:
            raise UserError(f"--min_learning_rate {self.min_learning_rate}: is above --learning_rate.")

    def holds(self) -> Holds:
        return Holds(rollout=False)


def weigh(episodes: list[Episode], rows: int, args) -> list[Episode]:
    """Give every token its weight in the mean of means, a column "weight", and return the episodes.

    A token weighs 1 / (supervised tokens of the rows of its mean) / (number of means), whatever micro-batch or process
    it ends up in; a mean of fewer rows, the last of those held out, counts by its rows.

    Args:
        episodes: of whole means, in order.
        rows: of the whole batch, over all processes.
    """
    for i in range(0, len(episodes), args.rows_per_mean):
        part = episodes[i : i + args.rows_per_mean]
        tokens = sum(int(e.action_mask.sum()) for e in part)
        for e in part:
            e.columns["weight"] = torch.full((e.num_tokens,), len(part) / (max(1, tokens) * rows))
    return episodes


def loss(logprobs: torch.Tensor, mb: MicroBatch, counts: Counts, args) -> torch.Tensor:
    """Return this micro-batch's share of the step's loss: negative log-probs [N] of the supervised tokens, averaged.

    `rows_per_mean` 0: one mean over all tokens of the step. Else ARM's code, LLaMA-Factory on transformers 4.45: a mean
    over each 4 rows, and the mean of these means.
    """
    if args.rows_per_mean:
        return -(logprobs * mb.column("weight")).sum()
    return -logprobs.sum() / counts.tokens


def validation_loss(learner: Learner, episodes: list[Episode]) -> float:
    """Return the loss on rows held out; `episodes` are this process's, and every process has to call this.

    Raises:
        UserError: it is not a finite number.
    """
    sums = [0.0, 0.0]
    for e, logprobs in zip(episodes, learner.logprobs(episodes)):
        weight = e.columns.get("weight", torch.ones(e.num_tokens)).double() * e.action_mask
        sums = [sums[0] - float((logprobs.double() * weight).sum()), sums[1] + float(weight.sum())]
    total, weights = all_reduce(learner.accelerator, sums, "sum").tolist()
    if not math.isfinite(total):
        raise UserError("the loss on the rows held out is not finite: lower --learning_rate, and start anew.")
    return total / weights


def rate(args, step: int) -> float:
    """Return the learning rate of step 1, 2, ... before the warm-up: a plain float, as checkpoints need it."""
    if args.lr_schedule == "constant":
        return args.learning_rate
    start, low = args.warmup_steps if args.cosine_from == "warmup" else 0, args.min_learning_rate
    angle = math.pi * max(0, step - 1 - start) / max(1, args.max_steps - start)
    return low + (args.learning_rate - low) * 0.5 * (1 + math.cos(angle))


def needed_tokens(args, rows: list[Row]) -> tuple[str, ...]:
    """Return the control tokens that the rows hold, and those of the formats that made rows and template are for."""
    end = args.chat_template.rpartition("+")[2]
    kinds = [end] * (end in ENDS) + [args.formats] * (args.task != "math")
    needed = [tag for kind in kinds for tag in load(kind).needed_tokens()]
    return tuple(dict.fromkeys(needed + [tag for tag in WORDS if any(tag in row.response for row in rows)]))


def start_tokenizer(args, model: str, needed: tuple[str, ...]):
    """Return the tokenizer to train with and to save, of a model or of the laboratory.

    Raises:
        UserError: a control token is split, so that no method or evaluation would take the trained model.
    """
    tokenizer = load_tokenizer(model) if model else formats.tokenizer(args.formats)
    for text in needed:
        prompts.control_token(tokenizer, text)
    return tokenizer


def start_model(args, name: str, tokenizer):
    """Return the model to train."""
    if name:
        model, _ = load_model(name, args)
    else:
        model = chain.tiny_model(tokenizer, args.hidden_size, args.layers, args.seed)
    return model


def resolved(args, rows: list[Row] | None):
    """Return the options with --epochs and --warmup_share as numbers of steps; UserError where rows and batch clash."""
    if not rows:
        return args
    if args.batch_size > len(rows):
        raise UserError(
            f"a step needs {args.batch_size} rows, {args.data} has {len(rows)} to train on: lower --batch_size."
        )
    if args.epochs:
        args = replace(args, max_steps=-(-args.epochs * len(rows) // args.batch_size))
    return args


def may_change(args) -> set[str]:
    """Return the options that a run may be continued with other values of."""
    return CONTINUES - ({"eval_every"} if args.keep == "best" else set())  # which step is best depends on it


def main() -> None:
    args = parse_args(Args)
    lora_config(args)  # says at once what is wrong with it
    rows = load_rows(args.data) if args.task == "math" else []
    if args.pairs and rows:
        check_pairs(rows, args.batch_size)
    parts = held_out(rows, args)
    args = resolved(args, parts[0])
    if args.warmup_share:
        args = replace(args, warmup_steps=round(args.warmup_share * args.max_steps))
    folder = Path(args.output_dir)
    if (folder / "summary.json").is_file() and (folder / "model" / "config.json").is_file():
        check_same(folder, read_config(folder / "config.yaml"), "sft", asdict(args), may_change(args))
        say(f"{folder / 'model'} is complete")
        return
    accelerator = make_accelerator(args)
    with Watch(accelerator, args.patience) as watch:
        watch.phase("train")
        learner = train(args, *parts, accelerator, watch)
    end(accelerator, [learner.engine] if learner.zero3 else [])


def train(args, file_rows: list[Row], validation_rows: list[Row], accelerator, watch: Watch) -> Learner:
    """Train from the newest checkpoint or the start, and write the model; without `file_rows` code makes the rows."""

    def made_rows(step: int) -> list[Row]:
        rng = np.random.default_rng([args.seed, step])
        rows = load(args.formats).rows(args, rng, args.batch_size, step)
        # The modes of a chain follow on each other; rows of a file are in random order.
        return [rows[i] for i in rng.permutation(len(rows))] if args.rows_per_mean else rows

    def episodes(rows: list[Row]) -> list[Episode]:
        mine = share_of(rows, args, accelerator)
        mine = episodes_of(mine, tokenizer, args.max_new_tokens, template, args.supervise_opening)
        return weigh(mine, len(rows), args) if args.rows_per_mean else mine

    everything = [*file_rows, *validation_rows]
    needed = needed_tokens(args, everything)
    name = start_of(args, accelerator, needed)
    tokenizer = start_tokenizer(args, name, needed)
    keep_date(tokenizer, Path(args.output_dir), accelerator)
    template, lines = put(tokenizer, args, any(r.thinking is not None for r in everything), "of these rows")
    if lines and accelerator.is_main_process:
        say("\n".join(f"  {title:<12}{text}" for title, text in lines.items()))
    if template:
        check_thinking(everything, template)
    model = start_model(args, name, tokenizer)
    data = {f"the training data {args.data}": [text_of(row) for row in everything]}
    frozen = args.model if args.lora_rank else None  # whose weights are read again
    journal = Journal(args, "sft", accelerator, may_change=may_change(args))
    journal.declare(METRICS, {})
    journal.open(inputs_of(data, tokenizer, frozen))
    learner = Learner(args, model, accelerator, decay_vectors=args.decay_vectors)
    journal.restore(learner)
    validation = episodes(validation_rows)

    for step in journal.steps():
        watch.phase("train", step)
        rows = batch_of(file_rows, step, args) if file_rows else made_rows(step)
        (minibatch,) = learner.minibatches(episodes(rows), 1, step)
        total = 0.0
        for mb in minibatch:
            logprobs, _ = learner.score(mb)
            value = loss(logprobs, mb, minibatch.counts, args)
            learner.backward(value)
            total += float(value.detach()) * mb.weight
        update = learner.step(rate(args, step))
        row = {"step": step, "loss/policy": float(all_reduce(accelerator, [total], "sum"))}
        row |= {f"loss/{key}": value for key, value in update.items()}
        scored = bool(validation_rows) and (journal.last or (args.eval_every and step % args.eval_every == 0))
        if scored:
            watch.phase("validate", step)
            row["validation/loss"] = value = validation_loss(learner, validation)
            if args.keep == "best" and value < journal.state.get("best", {}).get("loss", math.inf):
                journal.state["best"] = {"step": step, "loss": value}
        journal.write(row, show=step % SHOW_EVERY == 0 or scored or journal.last)
        journal.save_if_due(learner, tokenizer)
    place_model(journal)
    journal.finish()
    return learner


def place_model(journal: Journal) -> None:
    """Write <folder>/model whole or not at all: that of the checkpoint to keep."""
    args, model = journal.args, journal.folder / "model"
    partial, old = model.with_name("model.partial"), model.with_name("model.old")
    step = journal.state["best"]["step"] if args.keep == "best" else journal.step

    def place():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(journal.root / f"step_{step:06d}" / "model", partial)
        shutil.rmtree(old, ignore_errors=True)
        if model.exists():  # of a process that was killed before it could write summary.json
            os.rename(model, old)
        os.rename(partial, model)
        shutil.rmtree(old, ignore_errors=True)
        say(f"wrote {model}, of step {step}")

    on_main(journal.accelerator, place)


if __name__ == "__main__":
    run_cli(main)
