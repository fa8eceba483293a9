"""GRPO: group relative policy optimisation, the baseline the adaptive algorithms are measured against and diffed with.

Paper: "DeepSeekMath", arXiv 2402.03300, Eq. 3; code: verl 0.2 as vendored by TEAM-ARM/ARM @ cee2053.

    make toy-grpo SEED=0                   # collapses to one format, as in Fig. 2 of the ARM paper
    make train-grpo-3b                     # the SFT+GRPO row of ARM's Table 1 (8 GPUs)

A question gets G free samples; the advantage of each is its reward against the group's mean, in units of the group's
standard deviation. No critic. The model answers in one of ARM's four formats and chooses which; nothing here favours
any, and whichever is right most often takes all. With --answer_format boxed it is plain GRPO on boxed answers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt

from adaptive_reasoning import formats, kernels
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Alarm, Metric, mean
from adaptive_reasoning.errors import run_cli
from adaptive_reasoning.formats.statistics import mode_metrics, mode_rows, mode_statistics
from adaptive_reasoning.kernels.group_advantage import Groups
from adaptive_reasoning.learner.packing import Counts, MicroBatch
from adaptive_reasoning.rollout import Request, request_seed
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.options import NonNegative, Positive, PositiveShare, RunArgs, check_minibatches, parse_args
from adaptive_reasoning.run.run import Run

STD_EPS = 1e-6
PER_MICRO_BATCH = ("micro_batch",)  # aggregations that depend on which sequences are together


@dataclass
class Args(RunArgs):
    """Options of GRPO. The defaults are ARM's baseline run."""

    model: str = "runs/sft-arm-3b/model"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: files with `problem` and `answer`, or hub data sets."""
    max_steps: PositiveInt = 170
    """Training steps: one rollout batch each."""
    temperature: Positive = 1.0
    """Sampling temperature of training and evaluation; log-probs are taken at the same temperature."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the evaluation sampler (training always samples from the whole distribution)."""
    max_prompt_tokens: PositiveInt = 2048
    """Questions with a longer prompt are left out of training, and counted."""
    max_new_tokens: PositiveInt = 4096
    """Longest response in tokens, EOS included."""
    learning_rate: Positive = 1e-6
    """AdamW learning rate, constant."""

    answer_format: str = "arm"
    """"arm": ARM's four formats, with its gate. "boxed": one mode, the last box. Or "module.Class" of your own."""
    std: Literal["unbiased", "none"] = "unbiased"
    """Divide the advantage by the group's standard deviation: "unbiased" (code, default), or "none" (Dr. GRPO)."""
    aggregation: Literal["token_mean", "sequence_mean", "constant", "micro_batch"] = "token_mean"
    """Mean: "token_mean" (default: no split changes it), "sequence_mean" (Eq. 3), "constant", "micro_batch" (code)."""
    clip_low: Positive = 0.2
    """epsilon below 1."""
    clip_high: Positive = 0.2
    """epsilon above 1 (DAPO: 0.28)."""
    kl_coef: NonNegative = 0.001
    """Weight of the divergence from the starting model (k3); 0 loads no reference model."""
    entropy_coef: NonNegative = 0.001
    """Weight of the entropy bonus (verl's default; in no paper)."""
    prompts_per_step: PositiveInt = 1024
    """Questions per rollout batch, over all processes."""
    num_generations: PositiveInt = 8
    """G: responses per question."""
    minibatches_per_step: PositiveInt = 6
    """Optimiser steps per rollout batch."""

    def __post_init__(self):
        check_minibatches(self)

    def holds(self) -> Holds:
        return Holds(questions=self.prompts_per_step, top_p=self.eval_top_p, reference=self.kl_coef > 0)


# What the metrics of this file mean; those of modes and groups are in formats/statistics.py.
METRICS = {
    "loss/ref_kl": Metric(
        "Divergence of the policy from the starting model: k3 estimate, clamped to [-10, 10], weighted like the loss.",
        "nats", "small",
        alarms=(Alarm("the policy is far from the starting model: raise --kl_coef or lower the rate", above=5.0),)),
    "rollout/empty_rationale_share": Metric(
        'Share of the rationales that hold nothing but "The answer is X".', "share",
        "low: else the modes are labels alone"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the method


def plan_rollouts(questions, args, stop_ids, step: int) -> list[Request]:
    """Return the requests of one step: G free samples of every question.

    `questions` holds (index in the task, question, prompt ids); the index is the group of the samples.
    """
    requests = []
    for i, question, prompt_ids in questions:
        for k in range(args.num_generations):
            seed = request_seed(args.seed, step, i, k)
            requests.append(Request(prompt_ids, args.max_new_tokens, stop_ids, seed, tag=(question, i)))
    return requests


def reward(e: Episode, args) -> float:
    """Return r: 1 for a right answer that passes the gate, else 0; or what a task's own score or --reward gave."""
    return e.score


def advantages(episodes: list[Episode], args) -> list[float]:
    """Return A_i = (r_i - mean r) / (std r + 1e-6) of each episode, over the G samples of its question.

    The std is the unbiased one; with --std none A_i = r_i - mean r. Sums are in float64: with equal rewards that fp32
    cannot represent, mean and std miss by one unit in the last place, and 1e-6 does not hide that. A group of one is
    not centred (official code: mean 0, std 1).
    """
    r = torch.tensor([e.reward for e in episodes], dtype=torch.float64, device=kernels.device())  # [B]
    groups = Groups.of(torch.tensor([e.group for e in episodes], device=r.device))
    return kernels.group_advantage(r, groups, std=args.std, eps=STD_EPS).tolist()


def token_weights(mb: MicroBatch, counts: Counts, args) -> torch.Tensor:
    """Return the weight of each token in the loss [N]; over the whole step they sum to 1 (but for "constant").

    "micro_batch" is verl's dynamic batching: a token mean per micro-batch, weighted by its share of the sequences. It
    depends on how the step is split; the others do not.
    """
    T = mb.lengths[mb.sequence].to(mb.advantages.dtype)  # [N] length of the token's own response
    return {
        "token_mean": torch.full_like(T, 1 / counts.tokens),
        "sequence_mean": 1 / (T * counts.sequences),
        "constant": torch.full_like(T, 1 / (counts.sequences * args.max_new_tokens)),
        "micro_batch": torch.full_like(T, len(mb.lengths) / (max(len(T), 1) * counts.sequences)),
    }[args.aggregation]


def loss(logprobs, entropy, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the loss (Eq. 3, to be minimised) and of the metrics.

    Shapes: logprobs, entropy [N] of all tokens of S sequences; `counts` are those of the whole step over all processes,
    so the shares of all micro-batches add up to the loss whatever the split.
    """
    A, weight = mb.advantages, token_weights(mb, counts, args)  # [N]
    log_ratio = logprobs - mb.old_logprobs
    ratio = log_ratio.exp()
    free = -A * ratio
    clipped = -A * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    value = policy = (torch.maximum(free, clipped) * weight).sum()
    mean = torch.full_like(weight, 1 / counts.tokens)
    stats = {"loss/clip_fraction": ((clipped > free) * mean).sum(), "loss/approx_kl": (-log_ratio * mean).sum()}
    if args.kl_coef:
        d = mb.ref_logprobs - logprobs
        k3 = ((d.exp() - d - 1).clamp(-10, 10) * weight).sum()
        value = value + args.kl_coef * k3
        stats["loss/ref_kl"] = k3
    if args.entropy_coef:
        H = (entropy * weight).sum()
        value = value - args.entropy_coef * H
        stats["loss/entropy"] = H
    return value, {"loss/policy": policy.detach(), **{key: x.detach() for key, x in stats.items()}}


def metrics(episodes: list[Episode], form, run) -> dict[str, float | None]:
    """Return the metrics of the step over all processes: modes and groups, and whether the modes are labels alone."""
    own = mode_statistics(run.gather(mode_rows(episodes)), form.modes)
    empty = run.gather([form.empty_rationale(e.text) for e in episodes])
    return own | {"rollout/empty_rationale_share": mean(empty)}


def main() -> None:
    args = parse_args(Args)
    kind = formats.load(args.answer_format)
    run = Run(args, "grpo", kind, reference=args.kl_coef > 0)
    form = kind(run.tokenizer, args)
    with run.start(form, METRICS | mode_metrics(form)):
        learner = run.learner
        run.evaluate_if_due()

        for step in run.steps():
            # --- roll out: free samples; grading overlaps decoding
            questions = run.next_questions()
            episodes = run.rollout(plan_rollouts(questions, args, run.stop_ids, step))

            # --- reward and advantage
            for e in episodes:
                e.reward = reward(e, args)
            for e, a in zip(episodes, advantages(episodes, args)):
                e.advantage = a

            # --- update: one optimiser step per minibatch
            on_policy = args.minibatches_per_step == 1
            if not on_policy:
                learner.recompute_logprobs(episodes)
            run.score_reference(episodes)
            losses, updates = [], []
            plain = not (args.kl_coef or args.entropy_coef or args.aggregation in PER_MICRO_BATCH)  # A = 0: no gradient
            minibatches = learner.minibatches(episodes, args.minibatches_per_step, step, skip_zero_advantage=plain)
            for minibatch in minibatches:
                for mb in minibatch:
                    logprobs, entropy = learner.score(mb, with_entropy=args.entropy_coef > 0)
                    if on_policy:  # pi_old is the policy itself: recomputing it would give these very numbers
                        mb.old_logprobs = logprobs.detach()
                    value, stats = loss(logprobs, entropy, mb, minibatch.counts, args)
                    learner.backward(value)
                    losses.append(stats)
                    run.observe(mb, logprobs)
                updates.append(learner.step(args.learning_rate))
            run.refresh()

            # --- log, evaluate, save
            run.log(episodes, metrics(episodes, form, run), losses, updates, minibatches)
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)
