"""DeGRPO (Thinkless): teach a model that can answer long or short to choose, with a decoupled loss.

Paper: "Thinkless: LLM Learns When to Think", arXiv 2505.13379; code: VainF/Thinkless @ aa225d2.

    make toy-degrpo SEED=0                 # think share rises with difficulty, on arithmetic chains
    make train-degrpo-1.5b                 # the paper's run (8 GPUs), after make warmup-thinkless-1.5b

The first token of a response is its mode: `<think>` (long) or `<short>`. What differs from plain GRPO:
 1. A right short answer earns 1, a right thinking one 1 - gamma, anything else -1.
 2. The advantage is the reward against the group's mean, not divided by the standard deviation.
 3. The mode is one token against thousands: GRPO gives it 1/(T_i + 1), less in a long answer than in a short one
    (Eq. 1). DeGRPO averages the parts apart (Eq. 4): alpha for the control token, 1/T_i for each of the T_i tokens
    after it. So it weighs as much as alpha T_i response tokens: what matters is alpha times the length.

Where paper and official code disagree (default first; every switch is an option below):
 - loss: Eq. 4, normalised over the whole step, so that no split changes it. The code takes alpha times the mean over
   the control tokens of a micro-batch and one mean over all its other tokens, and sums the micro-batches: `aggregation`
   "code" (summed over processes too, the official code averages those). Its vanilla lacks 1/(T_i + 1): "vanilla_code".
 - divergence and entropy: weighted as the loss weights response tokens, so per response with Eq. 4, which has them
   outside its normaliser; the code takes the mean over tokens. `kl_average` (and `aggregation` "code" has it).
 - mode: the first token. The code pays `<short>` anywhere, also for a thinking answer that prints it: `mode_rule`
   "substring". By the first token, a second control token is malformed like an unclosed thinking or a missing box: -1.
 - a first token that is no control token is a response token; the code trains it as a control token.
 - gamma: no value in the paper; 0.5 in the code, then 0.2 after 300 steps because 0.5 alone ends up too short. That
   second phase is a new run from the weights of step 300: they are its reference policy too, and AdamW starts anew
   (experiments/degrpo_1_5b_phase2.yaml). `gamma_schedule` changes gamma alone.
 - the code's divergence 0.001 (k3), entropy bonus 0.001, clip range 0.2, beta2 0.95 and log-probs at temperature 0.6
   are followed; the paper has no values for these, no bonus, and beta2 0.999. 600 steps are the paper's.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from adaptive_reasoning import formats, kernels
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Alarm, Metric, mean
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.formats.statistics import mode_metrics, mode_rows, mode_statistics
from adaptive_reasoning.formats.thinkless import Thinkless, ThinklessArgs
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
    parse_schedule,
)
from adaptive_reasoning.run.run import Run

STD_EPS = 1e-6
PER_MICRO_BATCH = ("code",)  # here an episode with A = 0 still enters a denominator


@dataclass
class Args(ThinklessArgs, RunArgs):
    """Options of DeGRPO. The defaults are the official 1.5B run, with Eq. 4 as the paper has it."""

    model: str = "Vinnnf/Thinkless-1.5B-Warmup"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: files with `problem` and `answer`, or hub data sets."""
    max_steps: PositiveInt = 600
    """Training steps: one rollout batch each."""
    temperature: Positive = 0.6
    """Sampling temperature of training and evaluation; log-probs are taken at the same temperature."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the evaluation sampler (training always samples from the whole distribution)."""
    max_prompt_tokens: PositiveInt = 1024
    """Questions with a longer prompt are left out of training, and counted."""
    max_new_tokens: PositiveInt = 24576
    """Longest response in tokens, EOS included."""
    learning_rate: Positive = 1e-6
    """AdamW learning rate, constant."""
    adam_beta2: ShareBelowOne = 0.95
    """AdamW second-moment decay."""

    answer_format: str = "thinkless"
    """"thinkless": `<think>` and `<short>`. Or a subclass of it, "module.Class", with one more control token."""
    control: Literal["slot", "native"] = "slot"
    """Control tokens: "slot": those of the format, `<short>` in a reserved slot. "native": the first tokens of the two
    openings of a hybrid chat template such as Qwen3's (docs/hybrid.md), behind a warm-up on pairs."""
    gamma: ClosedUnitInterval = 0.5
    """gamma of the reward: what a right answer loses by having thought (code; the paper has no number)."""
    gamma_schedule: str = ""
    """Another gamma after so many steps: "0:0.5,300:0.2" is 0.5 for 300 steps, then 0.2 (empty: --gamma)."""
    alpha: NonNegative = 0.001
    """alpha of Eq. 4: weight of the control token."""
    std: Literal["unbiased", "none"] = "none"
    """Divide the advantage by the group's standard deviation: "none" (paper and code, default), or "unbiased"."""
    aggregation: Literal["paper", "code", "vanilla", "vanilla_code"] = "paper"
    """Weight of a token: "paper" (Eq. 4; default, because no split changes it), "code" (per micro-batch),
    "vanilla" (Eq. 1) or "vanilla_code" (token mean)."""
    kl_average: Literal["as_loss", "sequence", "token"] = "as_loss"
    """Mean of k3 and entropy: "sequence" (of each response's mean), "token" (code: of all tokens; with aggregation
    "code" those of a micro-batch), "as_loss": "token" with the two aggregations of the code, else "sequence", so that
    a response pulls to the reference as much as it teaches. Default because the paper leaves it open."""
    clip_low: Positive = 0.2
    """epsilon below 1."""
    clip_high: Positive = 0.2
    """epsilon above 1 (DAPO: 0.28)."""
    kl_coef: NonNegative = 0.001
    """Weight of the divergence from the starting model (k3; code, the paper has no number); 0 loads no reference."""
    entropy_coef: NonNegative = 0.001
    """Weight of the entropy bonus (code, verl's default; in no paper)."""
    prompts_per_step: PositiveInt = 128
    """Questions per rollout batch, over all processes."""
    num_generations: PositiveInt = 8
    """G: responses per question."""
    minibatches_per_step: PositiveInt = 2
    """Optimiser steps per rollout batch."""

    def __post_init__(self):
        check_minibatches(self)
        if self.control == "native" and self.answer_format != "thinkless":
            raise UserError(
                f"--control native: takes the place of --answer_format {self.answer_format}. Leave that out."
            )

    def holds(self) -> Holds:
        return Holds(questions=self.prompts_per_step, top_p=self.eval_top_p, reference=self.kl_coef > 0)


# What the metrics of this file mean; those of modes and groups are in formats/statistics.py.
METRICS = {
    "loss/ref_kl": Metric(
        "Divergence of the policy from the starting model: k3 estimate, clamped to [-10, 10], weighted like the loss.",
        "nats", "small",
        alarms=(Alarm("the policy is far from the starting model: raise --kl_coef or lower the rate", above=5.0),)),
    "degrpo/first_think_prob": Metric(
        "Mean probability of <think> as the first token, as the responses of this step show it (a short one: 1 - "
        "P(<short>)); step 0: over the evaluation questions.", "share",
        "about 0.5 after the warm-up; rises, then falls as the short answers improve", "p(<think>)",
        alarms=(
            Alarm("the model takes <think> on every question for twenty steps: raise --alpha or --gamma, or give it "
                  "more easy questions", above=0.995, steps=20),
            Alarm("the model takes <short> on every question for twenty steps: lower --gamma (a --gamma_schedule), as "
                  "the authors did after 300 steps", below=0.005, steps=20))),
    "degrpo/first_think_logprob": Metric("Mean log-probability of <think> as the first token, at step 0.", "nats"),
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


def reward(e: Episode, gamma: float, args) -> float:
    """Return r: 1 - gamma for a right thinking answer, 1 for any other right one, -1 for a wrong or malformed one.

    A task's own score or --reward, s in place of 1 or 0, pays s r(right) - (1 - s).
    """
    mode = e.mode
    if args.mode_rule == "substring":
        mode = "short" if "<short>" in e.text else "think"
    if mode == Thinkless.malformed:
        return -1.0
    right = 1.0 - gamma if mode == "think" else 1.0
    return e.score * right - (1 - e.score)


def advantages(episodes: list[Episode], args) -> list[float]:
    """Return A_i = (r_i - mean r) / (std r + 1e-6) of each episode, over the G samples of its question.

    The std is the unbiased one; with --std none A_i = r_i - mean r. Sums are in float64: with equal rewards that fp32
    cannot represent, mean and std miss by one unit in the last place, and 1e-6 does not hide that. A group of one is
    not centred (official code: mean 0, std 1).
    """
    r = torch.tensor([e.reward for e in episodes], dtype=torch.float64, device=kernels.device())  # [B]
    groups = Groups.of(torch.tensor([e.group for e in episodes], device=r.device))
    return kernels.group_advantage(r, groups, std=args.std, eps=STD_EPS).tolist()


def token_weights(mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight of each token in the surrogate and in the divergence and entropy [N].

    T counts response tokens: the control token is none of them, a first token that is no control token is one.
    """
    S, length = counts.sequences, mb.lengths[mb.sequence].to(mb.advantages.dtype)  # [N] of the token's own response
    of_code = args.aggregation in ("code", "vanilla_code")
    per_sequence = 1 / (length * S)
    per_token = torch.full_like(length, 1 / max(len(length) if args.aggregation == "code" else counts.tokens, 1))
    weight = per_token if args.kl_average == "token" or (args.kl_average == "as_loss" and of_code) else per_sequence
    if args.aggregation in ("vanilla", "vanilla_code"):  # Eq. 1; one mean over all tokens
        return per_token if of_code else per_sequence, weight
    opened = torch.tensor([e.mode != Thinkless.malformed for e in mb.episodes], dtype=torch.bool, device=length.device)
    opened = opened[mb.sequence]  # [N] whether the token's response has a control token
    control = opened & (mb.position == 0)
    if args.aggregation == "paper":  # Eq. 4; T is 0 only where there is nothing to weigh
        T = (length - opened.to(length.dtype)).clamp(min=1)
        return torch.where(control, args.alpha / S, 1 / (T * S)), weight
    n, N = (part.to(length.dtype).sum().clamp(min=1) for part in (control, ~control))  # "code": of this micro-batch
    return torch.where(control, args.alpha / n, 1 / N), weight


def loss(logprobs, entropy, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the loss (Eq. 4, to be minimised) and of the metrics.

    Shapes: logprobs, entropy [N] of all tokens of S sequences; `counts` are those of the whole step over all processes,
    so the shares of all micro-batches add up to the loss whatever the split.
    """
    A, (share, weight) = mb.advantages, token_weights(mb, counts, args)  # [N]
    log_ratio = logprobs - mb.old_logprobs
    ratio = log_ratio.exp()
    free = -A * ratio
    clipped = -A * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    value = policy = (torch.maximum(free, clipped) * share).sum()
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


def numbers(form) -> dict[str, Metric]:
    """Return what the numbers of responses mean."""
    good = {"short": "not 0 for long", Thinkless.malformed: "0"}
    return {
        f"degrpo/num_{mode}": Metric(f"Responses of this step in mode {name}.", "count", good.get(mode, ""))
        for mode, name in form.modes.items()
    }


def think_prob(e: Episode, form: Thinkless) -> float | None:
    """Return P(<think>) as the first token, from the one that was sampled: with two modes, all but P(the other).

    None where that token does not tell: it is no control token, or there are more modes. Step 0 has it in any case.
    """
    if e.mode == Thinkless.malformed or len(form.tokens) != 2:
        return None
    p = math.exp(e.behaviour_logprobs[0])
    return p if e.mode == "think" else 1 - p


def metrics(episodes: list[Episode], form: Thinkless, run) -> dict[str, float | None]:
    """Return the metrics of the step over all processes: modes and groups, and what the control token has become."""
    own = mode_statistics(run.gather(mode_rows(episodes)), form.modes)
    modes = run.gather([e.mode for e in episodes])
    own |= {f"degrpo/num_{mode}": modes.count(mode) for mode in form.modes}
    think = run.gather([think_prob(e, form) for e in episodes])
    return own | {"degrpo/first_think_prob": mean(think)}


def main() -> None:
    args = parse_args(Args)
    gammas = parse_schedule("gamma_schedule", args.gamma_schedule or f"0:{args.gamma}", below=1.0)
    kind = formats.load("native" if args.control == "native" else args.answer_format, Thinkless)
    run = Run(args, "degrpo", kind, reference=args.kl_coef > 0)
    form = kind(run.tokenizer, args)
    with run.start(form, METRICS | mode_metrics(form) | numbers(form)):
        learner = run.learner
        run.log_first_token("degrpo/first_think", form.tokens["think"])
        run.evaluate_if_due()

        for step in run.steps():
            # --- roll out: free samples; grading overlaps decoding
            questions = run.next_questions()
            episodes = run.rollout(plan_rollouts(questions, args, run.stop_ids, step))

            # --- reward and advantage
            for e in episodes:
                e.reward = reward(e, [gamma for done, gamma in gammas if done < step][-1], args)
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
