"""TLMRE: among the right answers to a question the shorter ones earn more, so reasoning gets cheaper.

Paper: "Training Language Models to Reason Efficiently", arXiv 2502.04463; code: Zanette-Labs/efficient-reasoning
@ e3611e4 (its OpenRLHF). A baseline of AdaptThink's Table 1 (arXiv 2505.13417), which publishes none of its options.

    make toy-tlmre SEED=0                  # on arithmetic chains, minutes on a laptop
    make train-tlmre-1.5b                  # R1-Distill-Qwen-1.5B on DeepScaleR (8 GPUs)

What differs from plain GRPO (grpo.py, `diff` them):
 1. The reward of a right answer of L tokens is 1 - alpha sigmoid((L - mean) / (std + 1e-7)); mean and std (population)
    are those of the right answers to the same question. A wrong one earns 0. One that was cut has no EOS: it counts as
    wrong and does not enter the statistics. So a wrong answer never changes the reward of another one.
 2. The advantage is REINFORCE's, leave one out: A_i = r_i - mean of the other rewards of the question.
 3. The divergence from the starting model stands in the return of each token, not in the loss: return_t =
    clamp(A, -10, 10) - beta sum_{s >= t} (log pi_old - log pi_ref)(y_s), the estimate called k1.
 4. The returns are whitened over all tokens of the rollout batch, on all processes together.
 5. The loss is a token mean of each response, then a mean over responses; two optimiser steps a rollout batch.

Where paper [P] and code [C] disagree, and what we do:
 - Advantage: [P] leave one out. [C] whitened besides, which leaves only its relative size. We: [C], --advantage rloo.
 - Divergence: [P] plain leave one out. [C] 0.001, in the return. We: [C], --kl_coef 0 is [P].
 - Length: [C] prompt + response without special tokens, + BOS: a constant for a question, gone in the z-score. We: all
   response tokens, EOS included.
 - Prompt: [C] trains without the `<think>` that it evaluates with. Not copied: one prompt for both.
 - Questions whose answers are all right are kept [C]: their advantages are pure pressure on length. We: [C].
 - A reward linear in the length is the code's default, and not implemented there. Left out.
"""

from dataclasses import dataclass
from statistics import pstdev
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from adaptive_reasoning import formats, kernels
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Alarm, Metric, mean
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.formats.statistics import mode_metrics, mode_rows, mode_statistics
from adaptive_reasoning.kernels.group_advantage import Groups
from adaptive_reasoning.learner.packing import Counts, MicroBatch
from adaptive_reasoning.rollout import Request, request_seed
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.options import (
    NonNegative,
    Positive,
    PositiveShare,
    RunArgs,
    ShareBelowOne,
    check_minibatches,
    parse_args,
)
from adaptive_reasoning.run.run import Run

STD_EPS = 1e-7  # of the lengths
LARGEST = 10.0  # of an advantage, before the divergence is taken off
LEAST_VARIANCE = 1e-8  # of the returns
PER_MICRO_BATCH = ("micro_batch",)  # aggregations that depend on which sequences are together


@dataclass
class Args(RunArgs):
    """Options of TLMRE. The defaults are its code's, at AdaptThink's scale; [U]: nobody published it, our choice."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: files with `problem` and `answer`, or hub data sets."""
    max_steps: PositiveInt = 314
    """Training steps: one rollout batch each ([U]: one epoch of DeepScaleR; the paper: 100)."""
    temperature: Positive = 1.0
    """Sampling temperature of training and evaluation; log-probs are taken at the same temperature."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the evaluation sampler (training always samples from the whole distribution)."""
    max_prompt_tokens: PositiveInt = 1024
    """Questions with a longer prompt are left out of training, and counted."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included (the code: 32,000)."""
    learning_rate: Positive = 2e-6
    """AdamW learning rate, constant behind the warm-up (the code: 5e-6 at 1.5B, 2e-6 at 7B)."""
    warmup_steps: NonNegativeInt = 19
    """Optimiser steps over which the learning rate rises from zero: 3 % of 628."""
    adam_beta2: ShareBelowOne = 0.95
    """AdamW second-moment decay."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""

    answer_format: str = "think"
    """"think": R1's thinking block. "boxed": one mode, the last box. Or "module.Class" of your own."""
    alpha: ClosedUnitInterval = 0.1
    """alpha: the most that length can cost a right answer (the paper: 0, 0.05, 0.1, 0.2, 0.4)."""
    advantage: Literal["whitened", "rloo"] = "whitened"
    """"whitened" (code): the returns in units of their spread over all tokens. "rloo" (paper): as they are."""
    aggregation: Literal["token_mean", "sequence_mean", "constant", "micro_batch"] = "sequence_mean"
    """Weight of a token in the loss: "token_mean", "sequence_mean" (code), "constant" (Dr. GRPO) or "micro_batch"."""
    clip_low: Positive = 0.2
    """epsilon below 1."""
    clip_high: Positive = 0.2
    """epsilon above 1 (DAPO: 0.28)."""
    kl_coef: NonNegative = 0.001
    """Weight of the divergence from the starting model in the return (k1); 0 (paper) loads no reference model."""
    entropy_coef: NonNegative = 0.0
    """Weight of an entropy bonus, which TLMRE does not have."""
    prompts_per_step: PositiveInt = 128
    """Questions per rollout batch, over all processes ([U]: AdaptThink's; the code: 32)."""
    num_generations: PositiveInt = 8
    """G: responses per question, at least two."""
    minibatches_per_step: PositiveInt = 2
    """Optimiser steps per rollout batch."""

    def __post_init__(self):
        check_minibatches(self)
        if self.num_generations < 2:
            raise UserError("--num_generations 1: the baseline is the mean of the other samples. Give at least 2.")

    def holds(self) -> Holds:
        return Holds(questions=self.prompts_per_step, top_p=self.eval_top_p, reference=self.kl_coef > 0)


# What the metrics of this file mean; those of modes and groups are in formats/statistics.py.
METRICS = {
    "loss/ref_kl": Metric(
        "Divergence of the policy that sampled from the starting model: mean of log pi_old - log pi_ref (k1).",
        "nats", "small",
        alarms=(Alarm("the policy is far from the starting model: raise --kl_coef or lower the rate", above=5.0),)),
    "tlmre/right_tokens": Metric("Mean length of the right responses.", "tokens", "falls"),
    "tlmre/right_spread": Metric(
        "Standard deviation of the lengths of the right responses to one question, mean over the questions.", "tokens",
        "above 0: else the reward cannot tell a long answer from a short one"),
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


def rewards(episodes: list[Episode], args) -> list[float]:
    """Return r_i = 1{right} (1 - alpha sigmoid(z_i)), z_i = (L_i - mean L) / (std L + 1e-7), of each episode.

    Mean and std (population) are over the right responses to the question; a cut one is none of them. Where there is
    one alone, or all are equally long, z = 0. A task's own score or --reward takes the place of 1{right}: right are
    those with more than 0, and a number below 0 is the reward itself.
    """
    right = [i for i, e in enumerate(episodes) if e.score > 0 and e.finish_reason == "stop"]
    device = kernels.device()
    L = torch.tensor([episodes[i].num_tokens for i in right], dtype=torch.float64, device=device)  # [R]
    groups = Groups.of(torch.tensor([episodes[i].group for i in right], device=device))
    z = kernels.group_advantage(L, groups, std="population", eps=STD_EPS)
    z = torch.where(groups.offsets.diff()[groups.index] > 1, z, 0.0)  # a group of one is not centred
    r = torch.tensor([e.score for e in episodes], dtype=torch.float64).clamp(max=0)
    r[right] = torch.tensor([episodes[i].score for i in right]) * (1 - args.alpha * z.sigmoid()).cpu()
    return r.tolist()


def advantages(episodes: list[Episode], args, run) -> list[torch.Tensor]:
    """Return the return of each token, [T] fp32 an episode, from rewards and log-probs; of all tokens whitened.

    A_i = r_i - mean of the other rewards of the question = (r_i - mean r) n / (n - 1)
    return_t = clamp(A_i, -10, 10) - kl_coef sum_{s >= t} (log pi_old - log pi_ref)(y_s)
    whitened: (return - mean) / sqrt(max(variance, 1e-8)), over all tokens of all processes; population variance

    Sums are in float64. Every process must call this, also one without episodes.
    """
    r = torch.tensor([e.reward for e in episodes], dtype=torch.float64, device=kernels.device())  # [B]
    groups = Groups.of(torch.tensor([e.group for e in episodes], device=r.device))
    n = groups.offsets.diff()[groups.index]
    A = kernels.group_advantage(r, groups, std="none") * n / (n - 1)
    returns = [torch.zeros(0, dtype=torch.float64)]
    for e, a in zip(episodes, A.clamp(-LARGEST, LARGEST).tolist()):
        k1 = (e.old_logprobs - e.ref_logprobs).double() if args.kl_coef else torch.zeros(e.num_tokens).double()
        returns.append(a - args.kl_coef * k1.flip(0).cumsum(0).flip(0))
    x = torch.cat(returns)  # [N] all tokens of this process
    if args.advantage == "whitened":
        number, total = run.sum([len(x), float(x.sum())])
        mean = total / number
        (squares,) = run.sum([float((x - mean).square().sum())])
        x = (x - mean) / max(squares / number, LEAST_VARIANCE) ** 0.5
    return list(x.float().split([e.num_tokens for e in episodes]))


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
    """Return this micro-batch's share of the loss (PPO's clip, to be minimised) and of the metrics.

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
    if args.kl_coef:  # which the advantages hold already
        stats["loss/ref_kl"] = ((mb.old_logprobs - mb.ref_logprobs) * mean).sum()
    if args.entropy_coef:
        H = (entropy * weight).sum()
        value = value - args.entropy_coef * H
        stats["loss/entropy"] = H
    return value, {"loss/policy": policy.detach(), **{key: x.detach() for key, x in stats.items()}}


def metrics(episodes: list[Episode], form, run) -> dict[str, float | None]:
    """Return the metrics of the step over all processes: modes and groups, and how long right responses are."""
    own = mode_statistics(run.gather(mode_rows(episodes)), form.modes)
    lengths: dict[int, list[int]] = {}  # of the right responses to each question
    for group, tokens in run.gather([(e.group, e.num_tokens) for e in episodes if e.reward]):
        lengths.setdefault(group, []).append(tokens)
    own["tlmre/right_tokens"] = mean(tokens for group in lengths.values() for tokens in group)
    own["tlmre/right_spread"] = mean(pstdev(group) for group in lengths.values() if len(group) > 1)
    return own


def main() -> None:
    args = parse_args(Args)
    kind = formats.load(args.answer_format)
    run = Run(args, "tlmre", kind, reference=args.kl_coef > 0)
    form = kind(run.tokenizer, args)
    with run.start(form, METRICS | mode_metrics(form)):
        learner = run.learner
        run.evaluate_if_due()

        for step in run.steps():
            # --- roll out: free samples; grading overlaps decoding
            questions = run.next_questions()
            episodes = run.rollout(plan_rollouts(questions, args, run.stop_ids, step))

            # --- reward and advantage, which holds the divergence
            on_policy = args.minibatches_per_step == 1 and not args.kl_coef
            if not on_policy:
                learner.recompute_logprobs(episodes)
            run.score_reference(episodes)
            for e, r in zip(episodes, rewards(episodes, args)):
                e.reward = r
            for e, a in zip(episodes, advantages(episodes, args, run)):
                e.advantages, e.advantage = a, float(a.mean())

            # --- update: one optimiser step per minibatch
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
