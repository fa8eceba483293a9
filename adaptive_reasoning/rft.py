"""RFT_MixThinking: fine-tuning on a model's own right answers, each question in the mode that suits it.

A baseline of AdaptThink's Table 1 (arXiv 2505.13417, section 5.2), which defines it in one sentence; no code is public.

    make toy-rft-mixthinking SEED=0        # skips the thinking of the easy chains, minutes on a laptop

 1. The starting model answers every training question N times as it likes, and N times with its thinking skipped
    (`</think>` forced); graded answers are kept in a bank, one a mode, and never re-tokenised.
 2. Where the share of right answers without thinking is at least that with it, the question is learnt from its right
    NoThinking answers, else from its right Thinking ones: one mode a question. A question without a right one teaches
    nothing.
 3. The loss is the mean negative log-prob over all response tokens, the first one and EOS included, at temperature 1
    whatever the sampler's was.

Thinking samples have a free first token; the few that skip their thinking by themselves are left out. A response cut at
its limit is wrong, and a row longer than the model's positions is dropped and counted. Without NoThinking samples
(`--nothinking_samples 0`) this is plain RFT.

Unknown about AdaptThink's run, and what stands here for it: N 16, sampler (temperature 0.6, nucleus 0.95, 16,384 tokens
and 4,096 without thinking: those of its own training), one row a question, learning rate 1e-5, batches of 128 rows,
about one epoch, cosine after a warm-up of a tenth. All right answers instead of one (`--rows_per_question 0`) weight an
easy question up to 16-fold, and the mean over tokens weights a Thinking row by its length (`--weighting`); both move
the share of NoThinking, so rows and tokens of each mode are logged.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Metric
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.formats.think import ThinkArgs
from adaptive_reasoning.learner.packing import Counts, MicroBatch, draw
from adaptive_reasoning.rollout import Sampling
from adaptive_reasoning.run.bank import Bank, free_samples
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.options import NonNegative, Positive, PositiveShare, RunArgs, parse_args
from adaptive_reasoning.run.run import Run

MODES = ("thinking", "nothinking")


@dataclass
class Args(ThinkArgs, RunArgs):
    """Options of RFT_MixThinking. The defaults are AdaptThink's samplers, and our choice where nothing is published."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: files with `problem` and `answer`, or hub data sets."""
    max_steps: PositiveInt = 280
    """Optimiser steps, one batch of rows each."""
    temperature: Positive = 0.6
    """Sampling temperature of the banks and of evaluation."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the evaluation sampler."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included."""
    learning_rate: Positive = 1e-5
    """AdamW learning rate at its peak."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""

    answer_format: str = "think"
    """Response format: think, or a class of your own as module.Class with the modes thinking and nothinking."""
    samples: PositiveInt = 16
    """N: Thinking responses per question in the bank."""
    nothinking_samples: NonNegativeInt = 16
    """NoThinking responses per question in the bank (0: plain RFT)."""
    nothinking_max_new_tokens: PositiveInt = 4096
    """Longest NoThinking response in the bank, EOS included."""
    sample_top_p: PositiveShare = 0.95
    """Nucleus of those responses."""
    rows_per_question: NonNegativeInt = 1
    """Most right answers that a question teaches with, the first ones of the bank (0: all of them)."""
    weighting: Literal["tokens", "rows", "questions"] = "tokens"
    """What weighs the same in the loss: every token, as in supervised fine-tuning, every row, or every question."""
    score_temperature: Positive = 1.0
    """Temperature of the log-probs in the loss."""
    batch_size: PositiveInt = 128
    """Rows per optimiser step, over all processes."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """"cosine" to zero behind the warm-up, or "constant"."""
    warmup_share: ClosedUnitInterval = 0.1
    """Share of the steps over which the learning rate rises from zero."""
    bank: str = "runs/bank"
    """Folder in which graded answers are kept."""

    def holds(self) -> Holds:
        return Holds(top_p=min(self.eval_top_p, self.sample_top_p))


METRICS = {
    "rft/questions": Metric("Questions that teach: those with a right answer in the mode that was selected.", "count"),
    "rft/nothinking_question_share": Metric("Share of these that are learnt without thinking.", "share"),
    "rft/thinking_rows": Metric("Thinking rows that were selected.", "count"),
    "rft/nothinking_rows": Metric("NoThinking rows that were selected.", "count"),
    "rft/thinking_tokens": Metric("Response tokens of the Thinking rows.", "tokens"),
    "rft/nothinking_tokens": Metric("Response tokens of the NoThinking rows.", "tokens"),
    "rft/dropped_rows": Metric("Rows left out because they are longer than the model's positions.", "count", "0"),
    "rft/thinking_accuracy": Metric("Share of right answers among the Thinking samples of the bank.", "share"),
    "rft/nothinking_accuracy": Metric("Share of right answers among the NoThinking samples of the bank.", "share"),
    "rft/skipped_share": Metric("Share of the free samples that skipped their thinking and were left out.", "share"),
    "rft/nothinking_row_share": Metric(
        "Share of the step's rows that are NoThinking.", "share", panel="NoThinking of a step | What is learnt.",
        line="rows"),
    "rft/nothinking_token_share": Metric(
        "Share of the step's response tokens in NoThinking rows: what they weigh in the loss with --weighting tokens.",
        "share", panel="NoThinking of a step | What is learnt.", line="tokens"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the method


def right(rows: list[dict]) -> list[dict]:
    """Return the right answers; one that was cut at its limit is wrong, as it never ended."""
    return [row for row in rows if row["correct"] and not row["cut"]]


def select(thinking: list[dict], nothinking: list[dict], args) -> list[dict]:
    """Return the rows that a question teaches with: all right, all of one mode; none where no answer is right.

    NoThinking where Rbar_nothinking >= Rbar_thinking, the shares of right answers in each mode (0 where there are no
    samples), so a tie is NoThinking.

    Args:
        thinking, nothinking: the question's answers in the banks: "correct", "cut" and "tokens" of each.
    """
    rates = [len(right(rows)) / max(len(rows), 1) for rows in (thinking, nothinking)]
    rows = right(nothinking if rates[1] >= rates[0] else thinking)
    return rows[: args.rows_per_question or None]


def rate(args, step: int) -> float:
    """Return the learning rate of step 1, 2, ...: a linear warm-up, then the cosine to zero."""
    warmup = round(args.warmup_share * args.max_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    if args.lr_schedule == "constant":
        return args.learning_rate
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (args.max_steps - warmup)))


def loss(logprobs: torch.Tensor, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the loss and of the metrics.

    "tokens": the mean over the response tokens of the step. Else the mean over its rows of a row's mean, each times its
    weight (`Episode.advantage`, 1 on average over all rows).

    Shapes: logprobs [N] of all tokens of S sequences.
    """
    if args.weighting == "tokens":
        value = -logprobs.sum() / counts.tokens
    else:
        sums = torch.zeros_like(mb.sequence_advantages).index_add(0, mb.sequence, logprobs)  # [S]
        value = -(mb.sequence_advantages * sums / mb.lengths).sum() / counts.sequences
    return value, {"loss/policy": value.detach()}


def skipping_samples(run: Run, args):
    """Return what makes the NoThinking requests of a question: those of `free_samples`, with `</think>` forced."""
    return free_samples(run, args.nothinking_samples, run.form.opening("nothinking"), args.nothinking_max_new_tokens)


def choose(run: Run, banks: dict[str, Bank], args) -> list[dict]:
    """Return the rows of all questions in order, each with its "weight", and say what they are like.

    Raises:
        UserError: there are none.
    """
    free = banks["thinking"].rows
    thinking = {i: [row for row in free[i] if row["mode"] == "thinking"] for i in banks["thinking"].needed}
    skipping = banks["nothinking"].rows if "nothinking" in banks else {}
    room, dropped, rows, questions = run.config.max_position_embeddings, 0, [], 0
    for i in thinking:
        found = select(thinking[i], skipping.get(i, []), args)
        fit = [row for row in found if len(run.task.prompts[i]) + row["tokens"] <= room]
        dropped += len(found) - len(fit)
        questions += bool(fit)
        rows += [{**row, "of": len(fit)} for row in fit]
    if not rows:
        where = " and ".join(str(bank.folder) for bank in banks.values())
        raise UserError(
            f"{where}: no answer to learn from; {dropped} right ones are longer than {room} positions. Take questions "
            "that the model sometimes answers right, or more --samples."
        )
    for row in rows:  # of "questions": 1 / (rows of its question), times what makes the mean over all rows 1
        row["weight"] = len(rows) / questions / row["of"] if args.weighting == "questions" else 1.0
    numbers = {"questions": questions, "dropped_rows": dropped}
    for mode, pool in zip(MODES, (thinking, {i: skipping.get(i, []) for i in thinking})):
        mine, all_rows = [row for row in rows if row["mode"] == mode], sum(pool.values(), [])
        numbers |= {f"{mode}_rows": len(mine), f"{mode}_tokens": sum(row["tokens"] for row in mine)}
        numbers |= {f"{mode}_accuracy": len(right(all_rows)) / len(all_rows) if all_rows else None}
    skipped = {row["question"] for row in rows if row["mode"] == "nothinking"}
    numbers["nothinking_question_share"] = len(skipped) / questions
    numbers["skipped_share"] = 1 - sum(map(len, thinking.values())) / sum(len(free[i]) for i in thinking)
    if run.step == 0:
        run.journal.write({"step": 0, **{f"rft/{key}": value for key, value in numbers.items()}})
    run.journal.say("rows: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items() if value is not None))
    return rows


def episodes_of(banks: dict[str, Bank], rows: list[dict]) -> list[Episode]:
    """Return the answers of these rows, token for token as they were sampled, each with its weight."""
    episodes = []
    for mode, bank in banks.items():
        mine = [row for row in rows if row["mode"] == mode]
        for row, e in zip(mine, bank.episodes(mine)):
            e.advantage = row["weight"]
            episodes.append(e)
    return episodes


def mode_shares(run: Run, episodes: list[Episode]) -> dict[str, float]:
    """Return the share of NoThinking in the rows and in the tokens of the step, over all processes."""
    skips = [e.mode == "nothinking" for e in episodes]
    tokens = [e.num_tokens for e in episodes]
    sums = run.sum([sum(skips), len(skips), sum(n for n, skip in zip(tokens, skips) if skip), sum(tokens)])
    return {"rft/nothinking_row_share": sums[0] / sums[1], "rft/nothinking_token_share": sums[2] / sums[3]}


def main() -> None:
    args = parse_args(Args)
    kind = formats.load(args.answer_format)
    run = Run(args, "rft", kind, offline=True)
    form = kind(run.tokenizer, args)
    if not set(MODES) <= set(form.modes):
        raise UserError(
            f"--answer_format {args.answer_format}: its modes are {', '.join(form.modes)}, not {' and '.join(MODES)}."
        )
    with run.start(form, METRICS):
        learner, needed = run.learner, list(range(len(run.task.questions)))
        sampling = Sampling(args.temperature, args.sample_top_p)
        banks = {"thinking": Bank(run, needed, free_samples(run, args.samples), sampling, args.bank)}
        if args.nothinking_samples:
            banks["nothinking"] = Bank(run, needed, skipping_samples(run, args), sampling, args.bank)
        rows = choose(run, banks, args)
        run.evaluate_if_due()

        for step in run.steps():
            # --- the rows of the step
            numbers = draw(len(rows), args.batch_size, step, args.seed)[run.rank :: run.ranks]
            episodes = episodes_of(banks, [rows[n] for n in numbers])
            own = {"data/epoch": step * args.batch_size / len(rows), **mode_shares(run, episodes)}

            # --- update: one optimiser step
            (minibatch,) = learner.minibatches(episodes, 1, step)
            losses = []
            for mb in minibatch:
                logprobs, _ = learner.score(mb, temperature=args.score_temperature)
                value, stats = loss(logprobs, mb, minibatch.counts, args)
                learner.backward(value)
                losses.append(stats)
            update = learner.step(rate(args, step))

            # --- log, evaluate, save
            run.log_offline(own, losses, update, minibatch)
            if run.evaluation_due:
                run.refresh()
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)
