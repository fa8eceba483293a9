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
 - mode: the first token. The code pays `<short>` anywhere, also for a thinking answer that prints it: `mode_rule`
   "substring". By the first token, a second control token is malformed like an unclosed thinking or a missing box: -1.
 - a first token that is no control token is a response token; the code trains it as a control token.
 - gamma: no value in the paper; 0.5 in the code, then 0.2 after 300 steps because 0.5 alone ends up too short.
   `gamma`, `gamma_schedule`.
 - the code's divergence 0.001 (k3), entropy bonus 0.001, clip range 0.2, beta2 0.95 and log-probs at temperature 0.6
   are followed; the paper has no values for these, no bonus, and beta2 0.999. 600 steps are the paper's.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from adaptive_reasoning.core.episode import Episode, by_group
from adaptive_reasoning.core.errors import run_cli
from adaptive_reasoning.learner.packing import Counts, MicroBatch
from adaptive_reasoning.rollout import Request, request_seed
from adaptive_reasoning.run.evaluation import Protocol
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
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.answers import boxed_answer, same_answer

STD_EPS = 1e-6
PER_MICRO_BATCH = ("code",)  # here an episode with A = 0 still enters a denominator


@dataclass
class Args(RunArgs):
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

    gamma: ClosedUnitInterval = 0.5
    """gamma of the reward: what a right answer loses by having thought."""
    gamma_schedule: str = ""
    """Another gamma after so many steps: "0:0.5,300:0.2" is 0.5 for 300 steps, then 0.2 (empty: --gamma)."""
    alpha: NonNegative = 0.001
    """alpha of Eq. 4: weight of the control token."""
    mode_rule: Literal["first_token", "substring"] = "first_token"
    """What the reward takes for the mode: "first_token" (paper), or "substring": `<short>` anywhere (code)."""
    std: Literal["unbiased", "none"] = "none"
    """Divide the advantage by the group's standard deviation: "unbiased", or "none" (Dr. GRPO)."""
    aggregation: Literal["paper", "code", "vanilla", "vanilla_code"] = "paper"
    """Weight of a token: "paper" (Eq. 4), "code" (per micro-batch), "vanilla" (Eq. 1), "vanilla_code" (token mean)."""
    clip_low: Positive = 0.2
    """epsilon below 1."""
    clip_high: Positive = 0.2
    """epsilon above 1 (DAPO: 0.28)."""
    kl_coef: NonNegative = 0.001
    """Weight of the divergence from the starting model (k3); 0 loads no reference model."""
    entropy_coef: NonNegative = 0.001
    """Weight of the entropy bonus (verl's default; in no paper)."""
    prompts_per_step: PositiveInt = 128
    """Questions per rollout batch, over all processes."""
    num_generations: PositiveInt = 8
    """G: responses per question."""
    minibatches_per_step: PositiveInt = 2
    """Optimiser steps per rollout batch."""

    def __post_init__(self):
        check_minibatches(self)


# ------------------------------------------------------------------------------------------ control tokens and prompts

TAGS = {"think": "think", "short": "short"}  # one token each, and </think>


def format_of(response: str) -> str:
    """Return the mode a response opens with, else "malformed"."""
    return next((mode for mode, tag in TAGS.items() if response.startswith(f"<{tag}>")), "malformed")


def extract_answer(response: str, mode_rule: str = "first_token") -> str | None:
    """Return the last box after the thinking; None, so r = -1, if it or the format is missing.

    "substring" (official code): after the first </think>, else after the first <short>, up to a second one.
    """
    tags = tuple(response.count(tag) for tag in ("<think>", "<short>", "</think>"))
    if mode_rule == "substring":
        mark = "</think>" if tags[0] and tags[2] else "<short>"
        return boxed_answer(response.split(mark)[1]) if mark in response else None
    if tags != {"think": (1, 0, 1), "short": (0, 1, 0)}.get(format_of(response)):
        return None
    return boxed_answer(response.split("</think>")[-1])


METRICS = {}


@dataclass
class Control:
    """How a response says which mode it is in."""

    tokens: dict[str, int]  # mode -> its control token
    mode_rule: str = "first_token"

    check = staticmethod(same_answer)

    @property
    def modes(self) -> tuple[str, ...]:
        return (*TAGS, "malformed")

    def mode_of(self, response_ids) -> str:
        """Return the mode of a response from its own first tokens."""
        return next((mode for mode, token in self.tokens.items() if token == response_ids[0]), "malformed")

    def extract_answer(self, response: str) -> str | None:
        return extract_answer(response, self.mode_rule)

    def opening(self, mode: str) -> tuple[tuple[int, float], ...]:
        """Return the token that forces a mode."""
        return ((self.tokens[mode], 1.0),)

    def findings(self) -> dict[str, str]:
        """Return the lines of the preflight table about the formats."""
        return {"formats": ", ".join(f"<{TAGS[mode]}> token {token}" for mode, token in self.tokens.items())}

    def eval_spec(self) -> Protocol:
        """Return how evaluation forces and tells modes apart."""
        forced = {"always_think": self.opening("think"), "never_think": self.opening("short")}
        return Protocol({"adaptive": (), **forced}, self.mode_of, self.extract_answer, self.modes, same_answer)


def control_tokens(tokenizer, args) -> Control:
    """Look up what the modes need; UserError if the tokenizer does not fit the method."""
    prompts.check_ends_at_assistant(tokenizer)
    think, short, _ = (prompts.control_token(tokenizer, tag) for tag in ("<think>", "<short>", "</think>"))
    return Control({"think": think, "short": short}, getattr(args, "mode_rule", "first_token"))


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
    """Return r: 1 for a right short answer, 1 - gamma for a right thinking one, -1 for a wrong or malformed one."""
    mode = e.mode
    if args.mode_rule == "substring":
        mode = "short" if "<short>" in e.text else "think"
    return {"short": 1.0, "think": 1.0 - gamma}.get(mode, -1.0) if e.correct else -1.0


def advantages(group: list[Episode], args) -> list[float]:
    """Return A_i = (r_i - mean r) / (std r + 1e-6) of the G samples of one question.

    The std is the unbiased one. In float64: with equal rewards that fp32 cannot represent, mean and std miss by one
    unit in the last place, and 1e-6 does not hide that. A group of one is not centred (official code: mean 0, std 1).
    """
    r = torch.tensor([e.reward for e in group], dtype=torch.float64)  # [G]
    mean, std = (r.mean(), r.std()) if len(r) > 1 else (0.0, 1.0)
    A = r - mean
    if args.std == "unbiased":
        A = A / (std + STD_EPS)
    return A.tolist()


def token_weights(mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight of each token in the surrogate and in the divergence and entropy [N].

    T counts response tokens: the control token is none of them, a first token that is no control token is one.
    """
    led = torch.tensor([e.mode in TAGS for e in mb.episodes], dtype=torch.bool, device=mb.lengths.device)[mb.sequence]
    control, L, S = led & (mb.position == 0), mb.lengths[mb.sequence].to(mb.advantages.dtype), counts.sequences
    T = (L - led.to(L.dtype)).clamp(min=1)  # [N] of the token's own response; 0 only where there is nothing to weigh
    n, N = (part.to(L.dtype).sum().clamp(min=1) for part in (control, ~control))  # of this micro-batch
    per_sequence, per_token = 1 / (L * S), torch.full_like(L, 1 / counts.tokens)
    return {
        "paper": (torch.where(control, args.alpha / S, 1 / (T * S)), per_sequence),  # Eq. 4
        "code": (torch.where(control, args.alpha / n, 1 / N), torch.full_like(L, 1 / max(len(L), 1))),
        "vanilla": (per_sequence, per_sequence),  # Eq. 1
        "vanilla_code": (per_token, per_token),
    }[args.aggregation]


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


def metric_rows(episodes: list[Episode]) -> list[dict]:
    """Return what `metrics` needs of each episode, as plain numbers that can travel between processes."""
    return [
        {"group": e.group, "mode": e.mode, "accuracy": float(e.correct), "tokens": e.num_tokens,
         "advantage": e.advantage, "first_prob": math.exp(e.behaviour_logprobs[0])}
        for e in episodes
    ]  # fmt: skip


def metrics(rows: list[dict], modes: tuple[str, ...]) -> dict[str, float | None]:
    """Return share, accuracy, length and advantage of each mode, and what shows a collapse or an empty diversity."""

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else None

    out, groups = {}, {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    solved = [{row["mode"] for row in g} for g in groups.values() if all(row["accuracy"] for row in g)]
    for mode in modes:
        mine = [row for row in rows if row["mode"] == mode]
        out[f"mode/{mode}_share"] = len(mine) / len(rows)
        out[f"degrpo/num_{mode}"] = len(mine)
        for key in ("accuracy", "tokens", "advantage"):
            out[f"mode/{mode}_{key}"] = mean(row[key] for row in mine)
        out[f"mode/{mode}_all_correct_groups"] = sum(found == {mode} for found in solved)
    out["group/all_wrong_share"] = mean(not any(row["accuracy"] for row in g) for g in groups.values())
    out["group/all_correct_share"] = len(solved) / len(groups)
    out["group/all_correct_mixed_share"] = sum(len(found) > 1 for found in solved) / len(groups)
    out["reward/correct_negative_share"] = mean(row["advantage"] < 0 for row in rows if row["accuracy"])
    first = {"think": lambda p: p, "short": lambda p: 1 - p}  # P(<think>): all but P(<short>)
    out["degrpo/first_think_prob"] = mean(first[r["mode"]](r["first_prob"]) for r in rows if r["mode"] in TAGS)
    return out


def main() -> None:
    args = parse_args(Args)
    gammas = parse_schedule("gamma_schedule", args.gamma_schedule or f"0:{args.gamma}", below=1.0)
    run = Run(args, "degrpo", METRICS, reference=args.kl_coef > 0)
    control = control_tokens(run.tokenizer, args)
    with run.start(control):
        learner = run.learner
        run.log_first_token("degrpo/first_think", control.tokens["think"])
        run.evaluate_if_due()

        for step in run.steps():
            # --- roll out: free samples; grading overlaps decoding
            questions = run.next_questions()
            episodes = run.rollout(plan_rollouts(questions, args, run.stop_ids, step))

            # --- reward and advantage
            for e in episodes:
                e.reward = reward(e, [gamma for done, gamma in gammas if done < step][-1], args)
            for group in by_group(episodes):
                for e, a in zip(group, advantages(group, args)):
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
            run.log(episodes, metrics(run.gather(metric_rows(episodes)), control.modes), losses, updates, minibatches)
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)
