"""DPO on pairs of a model's own answers, the shortest right one against the longest: DPO_Shortest.

Loss: "Direct Preference Optimization", arXiv 2305.18290, Eq. 7. Pairs: a baseline of AdaptThink's Table 1 (arXiv
2505.13417, section 5.2), of which no code is public; the other ways to choose are those of the papers named below.

    make toy-dpo SEED=0                    # shorter answers on arithmetic chains, minutes on a laptop

 1. The starting model answers every training question K times; graded answers are kept in a bank and never
    re-tokenised.
 2. Chosen is the shortest right answer y_w, rejected y_l the longest of all (`rejected`). No pair where none is right,
    or where the chosen one is not shorter.
 3. The loss is -log sigmoid(beta [log pi/pi_ref (y_w) - log pi/pi_ref (y_l)]), the mean over the pairs. Log-probs are
    sums over all response tokens, EOS included, at temperature 1 whatever the sampler's was. pi_ref is the starting
    model, scored once before step 1; no second model is held.

Lengths count all response tokens. A response that was cut at its limit is wrong, and has no EOS: none is appended. With
"longest_any" the rejected answer to a hard question is mostly a cut one, so DPO also teaches to finish; `drop_cut`
leaves those out. A pair longer than the model's positions is dropped and counted.

Unknown about AdaptThink's run, and what stands here for it: K 16, sampler (temperature 0.6, nucleus 0.95, 16,384
tokens: its reference sampler), beta 0.1, learning rate 5e-6, batch of 128 pairs, cosine after a warm-up of a tenth.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch.nn.functional import logsigmoid

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Metric
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.formats.think import ThinkArgs
from adaptive_reasoning.learner.packing import Counts, MicroBatch
from adaptive_reasoning.rollout import Sampling
from adaptive_reasoning.run.bank import Bank, free_samples
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.options import NonNegative, Positive, PositiveShare, RunArgs, parse_args
from adaptive_reasoning.run.run import Run

PAIRS_AT_A_TIME = 256  # of a process, while the reference is scored


@dataclass
class Args(ThinkArgs, RunArgs):
    """Options of DPO. The defaults are AdaptThink's sampler, and our choice where nothing is published."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: files with `problem` and `answer`, or hub data sets."""
    max_steps: PositiveInt = 240
    """Optimiser steps, one batch of pairs each."""
    temperature: Positive = 0.6
    """Sampling temperature of the bank and of evaluation."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the evaluation sampler."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included."""
    learning_rate: Positive = 5e-6
    """AdamW learning rate at its peak."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""

    answer_format: str = "think"
    """Response format: think, arm, thinkless, boxed, or a class of your own as module.Class."""
    beta: Positive = 0.1
    """beta: how far the policy may go from the starting model."""
    score_temperature: Positive = 1.0
    """Temperature of the log-probs in the loss."""
    rejected: Literal["longest_any", "longest_correct", "kimi", "two_shortest"] = "longest_any"
    """"longest_any": of all samples (AdaptThink). "longest_correct": of the right ones (OverThink, SkyThought). "kimi":
    every longer wrong one, and right ones at least 1.5 times as long (k1.5). "two_shortest": the two shortest right
    ones, each against the longest right one (O1-Pruner)."""
    drop_cut: bool = False
    """Leave out responses that were cut at their limit."""
    samples: PositiveInt = 16
    """K: responses per question in the bank."""
    sample_top_p: PositiveShare = 0.95
    """Nucleus of those responses."""
    pairs_per_step: PositiveInt = 128
    """Pairs per optimiser step, over all processes."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """"cosine" to zero behind the warm-up, or "constant"."""
    warmup_share: ClosedUnitInterval = 0.1
    """Share of the steps over which the learning rate rises from zero."""
    bank: str = "runs/bank"
    """Folder in which graded answers are kept."""

    def holds(self) -> Holds:
        return Holds(top_p=min(self.eval_top_p, self.sample_top_p))


METRICS = {
    "dpo/reward_accuracy": Metric(
        "Share of the pairs whose chosen answer has the higher implicit reward.", "share", "rises to 1", "right pairs",
        panel="Share of pairs in order | The chosen answer above the rejected one."),
    "dpo/margin": Metric(
        "Mean implicit reward of the chosen answer minus that of the rejected one: beta times the difference of their "
        "log ratios.", "", "rises", panel="Implicit rewards | beta log pi/pi_ref.", line="margin"),
    "dpo/chosen_reward": Metric(
        "Mean implicit reward of the chosen answers, beta log pi/pi_ref.", "", "should not fall far below 0",
        panel="Implicit rewards | beta log pi/pi_ref.", line="chosen"),
    "dpo/rejected_reward": Metric(
        "Mean implicit reward of the rejected answers.", "", "falls",
        panel="Implicit rewards | beta log pi/pi_ref.", line="rejected"),
    "dpo/pairs": Metric("Pairs that the bank gave.", "count"),
    "dpo/dropped_pairs": Metric("Pairs left out because they are longer than the model's positions.", "count", "0"),
    "dpo/rejected_cut_share": Metric("Share of the pairs whose rejected answer was cut at its limit.", "share"),
    "dpo/rejected_wrong_share": Metric("Share of the pairs whose rejected answer is wrong.", "share"),
    "dpo/length_ratio": Metric("Mean length of the rejected answers over that of the chosen ones.", "", "above 1"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the method


def pairs_of(rows: list[dict], args) -> list[tuple[dict, dict]]:
    """Return the pairs (chosen, rejected) of one question, each rejected answer longer than the chosen one.

    Args:
        rows: the question's answers in the bank: "tokens", "correct" and "cut" of each. Of equal ones the first counts.
    """
    rows = [row for row in rows if not (args.drop_cut and row["cut"])]
    right = sorted((row for row in rows if row["correct"]), key=lambda row: row["tokens"])
    if not right:
        return []
    shortest, longest_right = right[0], max(right, key=lambda row: row["tokens"])
    pairs = {
        "longest_any": [(shortest, max(rows, key=lambda row: row["tokens"]))],
        "longest_correct": [(shortest, longest_right)],
        "kimi": [(shortest, r) for r in rows if r["tokens"] >= (1.5 if r["correct"] else 1.0) * shortest["tokens"]],
        "two_shortest": [(chosen, longest_right) for chosen in right[:2]],
    }[args.rejected]
    return [(chosen, rejected) for chosen, rejected in pairs if chosen["tokens"] < rejected["tokens"]]


def batch_of(number: int, step: int, args) -> list[int]:
    """Return the pairs of step 1, 2, ...: every epoch a new permutation of all of them, one behind the other."""
    first, out = (step - 1) * args.pairs_per_step, []
    while len(out) < args.pairs_per_step:
        epoch, at = divmod(first + len(out), number)
        out += (
            np.random.default_rng([args.seed, epoch])
            .permutation(number)[at:][: args.pairs_per_step - len(out)]
            .tolist()
        )
    return out


def rate(args, step: int) -> float:
    """Return the learning rate of step 1, 2, ...: a linear warm-up, then the cosine to zero."""
    warmup = round(args.warmup_share * args.max_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    if args.lr_schedule == "constant":
        return args.learning_rate
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (args.max_steps - warmup)))


def loss(logprobs: torch.Tensor, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the loss (Eq. 7, the mean over the pairs of the step) and of the metrics.

    Shapes: logprobs [N] of all tokens of S sequences: pairs, the chosen one before the rejected one.
    """
    log_ratio = mb.sums(logprobs - mb.ref_logprobs).view(-1, 2)  # [S / 2, 2] log pi/pi_ref of (y_w, y_l)
    rewards = args.beta * log_ratio
    margin = rewards[:, 0] - rewards[:, 1]
    pairs = counts.sequences / 2
    value = -logsigmoid(margin).sum() / pairs
    with torch.no_grad():
        stats = {
            "loss/policy": value.detach(),
            "dpo/margin": margin.sum() / pairs,
            "dpo/reward_accuracy": (margin > 0).sum() / pairs,
            "dpo/chosen_reward": rewards[:, 0].sum() / pairs,
            "dpo/rejected_reward": rewards[:, 1].sum() / pairs,
        }
    return value, stats


def choose(run: Run, bank: Bank, args) -> list[tuple[dict, dict]]:
    """Return the pairs of all questions in order, and say what they are like.

    Raises:
        UserError: there are none.
    """
    found = [pair for i in bank.needed for pair in pairs_of(bank.rows[i], args)]
    room = run.config.max_position_embeddings

    def fits(row: dict) -> bool:
        return len(run.task.prompts[row["question"]]) + row["tokens"] <= room

    pairs = [pair for pair in found if all(map(fits, pair))]
    if not pairs:
        raise UserError(
            f"the bank in {bank.folder} gives no pair: {len(found)} before those longer than {room} positions were "
            "left out. Take questions that the model sometimes answers right, more --samples, or another --rejected."
        )
    numbers = {
        "pairs": len(pairs),
        "dropped_pairs": len(found) - len(pairs),
        "rejected_cut_share": sum(rejected["cut"] for _, rejected in pairs) / len(pairs),
        "rejected_wrong_share": sum(not rejected["correct"] for _, rejected in pairs) / len(pairs),
        "length_ratio": sum(r["tokens"] for _, r in pairs) / sum(c["tokens"] for c, _ in pairs),
    }
    if run.step == 0:
        run.journal.write({"step": 0, **{f"dpo/{key}": value for key, value in numbers.items()}})
    run.journal.say("pairs: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    return pairs


def episodes_of(bank: Bank, pairs: list[tuple[dict, dict]], numbers: list[int]) -> list[Episode]:
    """Return the answers of these pairs, the chosen one before the rejected one."""
    episodes = bank.episodes([row for n in numbers for row in pairs[n]])
    for k, e in enumerate(episodes):
        e.pair, e.advantage = numbers[k // 2], 1.0 - 2.0 * (k % 2)  # not 0, with which the learner leaves it out
    return episodes


def reference_logprobs(run: Run, bank: Bank, pairs: list[tuple[dict, dict]], args) -> dict[str, torch.Tensor]:
    """Return log pi_ref [T] of this process's share of all pairs, by "number/side", from the weights before step 1."""
    found = {}
    for start in range(0, len(pairs), PAIRS_AT_A_TIME * run.ranks):
        numbers = list(range(len(pairs)))[start : start + PAIRS_AT_A_TIME * run.ranks][run.rank :: run.ranks]
        scored = run.learner.logprobs(episodes_of(bank, pairs, numbers), args.score_temperature)
        found |= {f"{numbers[k // 2]}/{k % 2}": values for k, values in enumerate(scored)}
    return found


def main() -> None:
    args = parse_args(Args)
    run = Run(args, "dpo", offline=True)
    form = formats.load(args.answer_format)(run.tokenizer, args)
    with run.start(form, METRICS):
        learner, needed = run.learner, list(range(len(run.task.questions)))
        bank = Bank(
            run, needed, free_samples(run, args.samples), Sampling(args.temperature, args.sample_top_p), args.bank
        )
        pairs = choose(run, bank, args)
        reference = run.journal.keep_tensors("reference", lambda: reference_logprobs(run, bank, pairs, args))
        run.evaluate_if_due()

        for step in run.steps():
            # --- the pairs of the step, and what the starting model thinks of them
            numbers = batch_of(len(pairs), step, args)[run.rank :: run.ranks]
            episodes = episodes_of(bank, pairs, numbers)
            for k, e in enumerate(episodes):
                e.ref_logprobs = reference(f"{e.pair}/{k % 2}")

            # --- update: one optimiser step
            (minibatch,) = learner.minibatches(episodes, 1, step, together="pair")
            losses = []
            for mb in minibatch:
                logprobs, _ = learner.score(mb, temperature=args.score_temperature)
                value, stats = loss(logprobs, mb, minibatch.counts, args)
                learner.backward(value)
                losses.append(stats)
            update = learner.step(rate(args, step))

            # --- log, evaluate, save
            run.log_offline({"data/epoch": step * args.pairs_per_step / len(pairs)}, losses, update, minibatch)
            if run.evaluation_due:
                run.refresh()
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)
