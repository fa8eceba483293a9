"""O1-Pruner: prune reasoning offline, by the lengths and the accuracy of the model's own answers to a question.

Paper: "O1-Pruner: Length-Harmonizing Fine-Tuning for O1-Like Reasoning Pruning", arXiv 2501.12570; code:
StarDewXXX/O1-Pruner @ 04c0863. A baseline of AdaptThink's Table 1 (arXiv 2505.13417), which publishes none of its
options.

    make toy-o1-pruner SEED=0              # on arithmetic chains, minutes on a laptop
    make train-o1-pruner-1.5b              # R1-Distill-Qwen-1.5B on DeepScaleR (8 GPUs)

 1. The starting model answers every training question K times; graded answers are kept in a bank and never
    re-tokenised. An answer that was cut at its limit is wrong.
 2. The length-harmonising reward of an answer y of L tokens is R(y) = Lbar / L - 1 + lambda (A - Abar), where A is 1 if
    it is right and Lbar, Abar are means over all K answers to the question, right or wrong.
 3. m of the K answers, drawn once and whatever they are, are trained on.
 4. The weight w of an answer is its R, clipped to [-2, 4] and then z-scored over the whole data set (`normalise`).
 5. The loss is PPO's, off-policy from the starting model: mean of max(-w rho, -w clip(rho, 0.8, 1.2)), rho =
    exp(mean over the tokens of log pi - log pi_ref). Log-probs are those of temperature 1, whatever the sampler's was.
    pi_ref is scored once before step 1, token by token, and kept in the run's folder; no second model is held.

Where paper [P] and code [C] disagree, and what we do:
 - Ratio: [P] of the whole sequence, a product over tokens (Eq. 11). [C] their geometric mean. We: [C], `ratio`.
 - Weight: [P] R itself. [C] clipped and z-scored. Lbar / L has a mean above 1, so the z-score makes the weight of an
   answer of average length negative, right ones too where all are. We: [C], `normalise`. Equal weights: [C] divides 0
   by 0; here the run stops.
 - The m answers: [P] drawn inside the loop. [C] fixed before training. We: [C].
 - Cut: [C] trains on the first 3,072 tokens of prompt and response, the length is the whole one's. Not copied: nothing
   is cut. A row longer than the model's positions is dropped and counted.
 - Prompt: [C] samples with another one than it trains on. Not copied: one prompt for both.
 - lambda: an integer in [C]; any number here. Clip 0.2, m and the sampler are named in [C] alone.

Unknown about AdaptThink's run, and what stands here for it: K 16, sampler (temperature 0.6, nucleus 0.95, 16,384
tokens: its reference sampler), learning rate 2e-6 at 1.5B, batch of 128 answers.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

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

LEAST, MOST = -2.0, 4.0  # of a reward, before the z-score
ROWS_AT_A_TIME = 512  # of a process, while the reference is scored


@dataclass
class Args(ThinkArgs, RunArgs):
    """Options of O1-Pruner. The defaults are its code's, and our choice where nothing is published."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: files with `problem` and `answer`, or hub data sets."""
    max_steps: PositiveInt = 630
    """Optimiser steps, one batch of answers each (630: one epoch of DeepScaleR)."""
    temperature: Positive = 0.6
    """Sampling temperature of the bank and of evaluation."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the evaluation sampler."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included."""
    learning_rate: Positive = 2e-6
    """AdamW learning rate at its peak (the code: Adam-mini, 2e-7 at 7B)."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""
    max_grad_norm: Positive = 10.0
    """Gradients are scaled down to this norm over all parameters."""

    answer_format: str = "think"
    """Response format: think, arm, thinkless, boxed, or a class of your own as module.Class."""
    lam: NonNegative = 2.0
    """lambda: what being right is worth against length (the paper: 0, 1, 2, 5)."""
    ratio: Literal["sequence_mean", "sequence_product"] = "sequence_mean"
    """"sequence_mean" (code): geometric mean of the token ratios. "sequence_product" (paper, Eq. 11): their product."""
    normalise: Literal["zscore", "none"] = "zscore"
    """"zscore" (code): rewards clipped to [-2, 4], then z-scored over the data set. "none" (paper): as they are."""
    clip_low: Positive = 0.2
    """epsilon below 1."""
    clip_high: Positive = 0.2
    """epsilon above 1."""
    score_temperature: Positive = 1.0
    """Temperature of the log-probs in the loss."""
    samples: PositiveInt = 16
    """K: responses per question in the bank."""
    sample_top_p: PositiveShare = 0.95
    """Nucleus of those responses."""
    trained_samples: PositiveInt = 2
    """m: of the K responses, how many are trained on."""
    rows_per_step: PositiveInt = 128
    """Responses per optimiser step, over all processes."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """"cosine" to zero behind the warm-up, or "constant"."""
    warmup_share: ClosedUnitInterval = 0.1
    """Share of the steps over which the learning rate rises from zero."""
    bank: str = "runs/bank"
    """Folder in which graded answers are kept."""

    def __post_init__(self):
        if self.trained_samples > self.samples:
            raise UserError(f"--trained_samples {self.trained_samples}: there are only --samples {self.samples}.")

    def holds(self) -> Holds:
        return Holds(top_p=min(self.eval_top_p, self.sample_top_p))


METRICS = {
    "o1_pruner/ratio_mean": Metric(
        "Mean ratio of the answers of the step, policy over starting model, as --ratio has it.", "", "slowly leaves 1"),
    "o1_pruner/rows": Metric("Answers that are trained on.", "count"),
    "o1_pruner/dropped_rows": Metric("Answers left out because they are longer than the model's positions.", "count",
                                     "0"),
    "o1_pruner/right_share": Metric("Share of those answers that are right.", "share"),
    "o1_pruner/cut_share": Metric("Share of those answers that were cut at their limit.", "share"),
    "o1_pruner/reward_mean": Metric(
        "Mean of their length-harmonising rewards. Over all K answers to a question it is never negative."),
    "o1_pruner/clipped_share": Metric("Share of those rewards outside [-2, 4].", "share", "near 0"),
    "o1_pruner/right_negative_share": Metric(
        "Share of the right answers whose weight is negative: their probability is lowered.", "share"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the method


def rewards(rows: list[dict], args) -> list[float]:
    """Return R_LH = Lbar / L - 1 + lambda (A - Abar) of each of the K answers to a question.

    Args:
        rows: the question's answers in the bank: "tokens", "correct" and "cut" of each. A cut one is wrong.
    """
    right = [row["correct"] and not row["cut"] for row in rows]
    mean_length = sum(row["tokens"] for row in rows) / len(rows)
    accuracy = sum(right) / len(rows)
    return [mean_length / row["tokens"] - 1 + args.lam * (a - accuracy) for row, a in zip(rows, right)]


def weights(values: list[float], args) -> list[float]:
    """Return the weights of all answers of the data set, given their rewards; the std is that of the population.

    Raises:
        UserError: the rewards are all equal, so there is nothing to learn.
    """
    w = np.array(values)
    if args.normalise == "zscore":
        w = w.clip(LEAST, MOST)
    if w.min() == w.max():
        raise UserError(
            f"the rewards of all {len(w)} answers are {w[0]:g}: nothing tells them apart. Take questions that the "
            "model answers at unlike lengths or sometimes wrongly, or more --samples."
        )
    return ((w - w.mean()) / w.std() if args.normalise == "zscore" else w).tolist()


def rate(args, step: int) -> float:
    """Return the learning rate of step 1, 2, ...: a linear warm-up, then the cosine to zero."""
    warmup = round(args.warmup_share * args.max_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    if args.lr_schedule == "constant":
        return args.learning_rate
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (args.max_steps - warmup)))


def loss(logprobs: torch.Tensor, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the loss (Eq. 11, the mean over the answers of the step) and of the metrics.

    Shapes: logprobs [N] of all tokens of S answers. mb.old_logprobs holds log pi_ref, mb.sequence_advantages the
    weights.
    """
    w = mb.sequence_advantages  # [S]
    log_ratio = torch.zeros_like(w).index_add(0, mb.sequence, logprobs - mb.old_logprobs)  # [S] sums over the tokens
    if args.ratio == "sequence_mean":
        log_ratio = log_ratio / mb.lengths
    ratio = log_ratio.exp()
    free = -w * ratio
    clipped = -w * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    value = torch.maximum(free, clipped).sum() / counts.sequences
    with torch.no_grad():
        stats = {
            "loss/policy": value.detach(),
            "loss/clip_fraction": (clipped > free).sum() / counts.sequences,
            "loss/approx_kl": -log_ratio.sum() / counts.sequences,
            "o1_pruner/ratio_mean": ratio.sum() / counts.sequences,
        }
    return value, stats


def choose(run: Run, bank: Bank, args) -> list[dict]:
    """Return m answers to every question, each with its "weight", in order, and say what they are like.

    Raises:
        UserError: there are none, or nothing tells them apart.
    """
    drawn = []
    for i in bank.needed:
        own, values = bank.rows[i], rewards(bank.rows[i], args)
        chosen = np.random.default_rng([args.seed, i]).permutation(len(own))[: args.trained_samples]
        drawn += [{**own[k], "reward": values[k]} for k in sorted(chosen.tolist())]
    room = run.config.max_position_embeddings
    rows = [row for row in drawn if len(run.task.prompts[row["question"]]) + row["tokens"] <= room]
    if not rows:
        raise UserError(f"all {len(drawn)} answers are longer than the model's {room} positions.")
    for row, w in zip(rows, weights([row["reward"] for row in rows], args)):
        row["weight"] = w
    right = [row for row in rows if row["correct"] and not row["cut"]]
    numbers = {
        "rows": len(rows),
        "dropped_rows": len(drawn) - len(rows),
        "right_share": len(right) / len(rows),
        "cut_share": sum(row["cut"] for row in rows) / len(rows),
        "reward_mean": sum(row["reward"] for row in rows) / len(rows),
        "clipped_share": sum(not LEAST <= row["reward"] <= MOST for row in rows) / len(rows),
        "right_negative_share": sum(row["weight"] < 0 for row in right) / max(len(right), 1),
    }
    if run.step == 0:
        run.journal.write({"step": 0, **{f"o1_pruner/{key}": value for key, value in numbers.items()}})
    run.journal.say("answers: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    return rows


def episodes_of(bank: Bank, rows: list[dict], numbers: list[int]) -> list[Episode]:
    """Return the answers of these rows, with their weights."""
    episodes = bank.episodes([rows[n] for n in numbers])
    for e, n in zip(episodes, numbers):
        e.reward, e.advantage = rows[n]["reward"], rows[n]["weight"]
    return episodes


def key_of(row: dict) -> str:
    """Return the name of an answer's log-probs; a bank that was sampled anew is noticed by its lengths."""
    return "/".join(str(row[name]) for name in ("question", "sample", "tokens"))


def reference_logprobs(run: Run, bank: Bank, rows: list[dict], args) -> dict[str, torch.Tensor]:
    """Return log pi_ref [T] of this process's share of all rows, by `key_of`, from the weights before step 1."""
    found = {}
    for start in range(0, len(rows), ROWS_AT_A_TIME * run.ranks):
        numbers = list(range(len(rows)))[start : start + ROWS_AT_A_TIME * run.ranks][run.rank :: run.ranks]
        scored = run.learner.logprobs(episodes_of(bank, rows, numbers), args.score_temperature)
        found |= {key_of(rows[n]): values for n, values in zip(numbers, scored)}
    return found


def main() -> None:
    args = parse_args(Args)
    kind = formats.load(args.answer_format)
    run = Run(args, "o1_pruner", kind, offline=True)
    form = kind(run.tokenizer, args)
    with run.start(form, METRICS):
        learner, needed = run.learner, list(range(len(run.task.questions)))
        bank = Bank(
            run, needed, free_samples(run, args.samples), Sampling(args.temperature, args.sample_top_p), args.bank
        )
        rows = choose(run, bank, args)
        reference = run.journal.keep_tensors("reference", lambda: reference_logprobs(run, bank, rows, args))
        run.evaluate_if_due()

        for step in run.steps():
            # --- the answers of the step, and what the starting model thinks of them
            numbers = draw(len(rows), args.rows_per_step, step, args.seed)[run.rank :: run.ranks]
            episodes = episodes_of(bank, rows, numbers)
            for e, n in zip(episodes, numbers):
                e.old_logprobs = reference(key_of(rows[n]))

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
            run.log_offline({"data/epoch": step * args.rows_per_step / len(rows)}, losses, update, minibatch)
            if run.evaluation_due:
                run.refresh()
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)
