"""Ada-GRPO: GRPO that pays more for a right answer in a format that is rare in its group, so that no format dies out.

Paper: "ARM: Adaptive Reasoning Model", arXiv 2505.20258v2, Eq. 1-4; code: TEAM-ARM/ARM @ cee2053.

    make toy-ada-grpo SEED=0               # keeps several formats where make toy-grpo collapses to one
    make sft-arm-3b                        # stage 1: the four formats, LoRA
    make train-ada-grpo-3b                 # stage 2: the ARM row of Table 1 (8 GPUs)

What differs from plain GRPO (grpo.py, `diff` them): the reward r_i of a sample is multiplied by
alpha_i(t) = 1 + (G/F_i - 1) w(t), where F_i of the G samples of its question share its format, right or wrong, and
w(t) = (1 + cos(pi t/T))/2 falls from 1 to 0. Nothing else.

Where paper [P] and code [C] disagree, and what we do (specification, section 9):
- Reward: [P] a right answer. [C] and a format gate: see `passes_gate`. We: [C].
- Tags: [P] <Code>, <Long CoT>, "special tokens". [C] <CODE>, <LONG_COT>, ordinary text. We: [C].
- Format: [P] the format of o_i. [C] the first tag found in prompt + response. We: what the response opens with, the
  same on clean data (the authors' next code does so too). No known tag: a fifth format, which carries no reward [C].
- Decay: [P] t = 0..T, w from 1 to exactly 0. [C] T = 19 steps x 9 epochs = 171, t = 1..170. We: [C], --total_steps.
- What decay does: [P] it brings the focus back to accuracy. In a group that is all right it cancels: the std shrinks
  with w, so the push to equal shares keeps its strength to the end. We: as [P, C]; --std raw, --std none and
  --drop_all_correct are three ways out, --decay none the paper's ablation.
- Std: [P] no eps. [C] unbiased, + 1e-6, in fp32, where equal shaped rewards give up to 0.3 of noise. We: fp64 and 0.
- Loss: [P] mean over each response, then over responses. [C] token mean per micro-batch. We: the token mean of the
  whole minibatch; --aggregation sequence_mean is [P], micro_batch is [C].
- Entropy bonus: [P] none. [C] 0.001. We: [C], --entropy_coef. KL: [C] k3 clamped to 10, in the loss. We: [C].
- Minibatches: [C] five of 180 questions and one of 124 with the weight 124/180. We: six equal ones.
- CommonsenseQA: [C] the alphabetical tail of the training set. We: [C] in ada_grpo_*.yaml, --data.
- Not in [P], from [C]: learning rate 1e-6, clip 0.2, weight decay 0.01, prompts up to 2,048 tokens.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from adaptive_reasoning import formats, kernels
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Alarm, Metric, mean
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.formats.arm import Arm
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
    """Options of Ada-GRPO. The defaults are ARM's run."""

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
    """"arm": ARM's four formats, with its gate. Or a format of your own, "module.Class", with another mode."""
    std: Literal["shaped", "raw", "none"] = "shaped"
    """Divide the advantage by the standard deviation of the "shaped" rewards, of the "raw" ones, or by "none"."""
    drop_all_correct: bool = False
    """Give questions that every response gets right advantage 0, as plain GRPO does."""
    decay: Literal["cosine", "none"] = "cosine"
    """w(t): "cosine" falls from 1 to 0, "none" stays at 1."""
    total_steps: NonNegativeInt = 0
    """T of the decay; 0: max_steps + 1, so that t = 1 .. T - 1 as in the official loop."""
    aggregation: Literal["token_mean", "sequence_mean", "constant", "micro_batch"] = "token_mean"
    """Weight of a token in the loss: "token_mean", "sequence_mean" (Eq. 3), "constant" (Dr. GRPO) or "micro_batch"."""
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
        self.total_steps = self.total_steps or self.max_steps + 1  # written into config.yaml: a resumed run keeps it
        if not self.max_steps < self.total_steps:
            raise UserError(f"--max_steps {self.max_steps}: must be less than --total_steps {self.total_steps}, T.")

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


extract_answer = Arm.extract_answer  # what is graded: the one answer block, behind one rationale or none


def reward(e: Episode, args) -> float:
    """Return r: 1 for a right answer that passes the gate, else 0; or what a task's own score or --reward gave."""
    return e.score


def advantages(episodes: list[Episode], args, step: int) -> list[float]:
    """Return A_i = (r'_i - mean r') / (std r' + 1e-6) of each episode, over the G samples of its question.

    r'_i = alpha_i(t) r_i, and alpha_i(t) = 1 + (G/F_i - 1) w(t) is the paper's G/F [F/G + (1 - F/G) (1 + cos(pi
    t/T))/2], Eq. 2-4. A wrong answer has r' = 0 whatever its alpha; the format it opened counts all the same. The std
    is the unbiased one. Group of one: not centred (official code: mean 0, std 1). In float64, and 0 where all shaped
    rewards are equal: in fp32 the mean misses them by one unit in the last place, and 1e-6 does not hide that.
    """
    t, T = step, args.total_steps
    assert 1 <= t < T, "w(t) never is exactly 1 or 0"
    w = (1 + math.cos(math.pi * t / T)) / 2 if args.decay == "cosine" else 1.0
    G = Counter(e.group for e in episodes)
    F = Counter((e.group, e.mode) for e in episodes)
    alpha = [1 + (G[e.group] / F[e.group, e.mode] - 1) * w for e in episodes]
    r = torch.tensor([e.reward for e in episodes], dtype=torch.float64, device=kernels.device())  # [B]
    shaped = torch.tensor(alpha, dtype=torch.float64, device=r.device) * r
    groups = Groups.of(torch.tensor([e.group for e in episodes], device=r.device))
    # "raw": the std of the unshaped rewards; where they are equal it is no unit to measure in, and A decays with w.
    base, std = r if args.std == "raw" else None, "none" if args.std == "none" else "unbiased"
    A = kernels.group_advantage(shaped, groups, std, STD_EPS, spread=STD_EPS, base=base).tolist()
    if args.drop_all_correct:
        missed = {e.group for e in episodes if not e.correct}
        A = [a if e.group in missed else 0.0 for e, a in zip(episodes, A)]
    return A


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
    run = Run(args, "ada_grpo", kind, reference=args.kl_coef > 0)
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
            for e, a in zip(episodes, advantages(episodes, args, step)):
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
