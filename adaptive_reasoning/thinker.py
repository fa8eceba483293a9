"""Thinker: learning to think fast and slow, by a dialogue of four stages with a reward each.

Paper: "Learning to Think Fast and Slow for Language Models" (Thinker), arXiv 2505.21097 (v1 May 2025, v2 NeurIPS 2025).
No code that we know of. PPO as in Open-Reasoner-Zero @ 3fdd9a0 (ORZ), on whose data the paper trains.

    make train-thinker-q1.5b               # Qwen2.5-1.5B on 8 GPUs
    make toy-thinker SEED=0                # the same file on arithmetic chains, minutes on a laptop

One policy holds a dialogue about a question with answer y*; every stage sees all that was said before:
    Fast     answer within a small budget                      R = 1{y_fast = y*}
    Verify   is that right? \\boxed{Yes} or \\boxed{No}          R = (1-p) 1{Yes} if y_fast = y*, else p 1{No}
    Slow     think again                                       R = 1{y_slow = y*}
    Summary  condense the slow work to concise steps           R = g (1 + c L),  g = 1{y_sum = y_slow}
p is the trailing accuracy of Fast: with it both constant verdicts earn the same. L = log pi(a_sum | the Fast prompt): a
summary should be something that Fast could say. In training the gold answer decides who goes on: a wrong Fast answer
goes to Slow whatever the verdict, a right Slow answer to the Summary. At inference the verdict decides, nobody is asked
for a summary, and Fast alone is a method of its own ("Thinker-Fast").

What differs from plain PPO on question and answer (`--environment qa`, the paper's baseline): the environment alone.
Every stage is a return of its own: R_k is paid on its last token, nothing flows to an earlier stage. With
gamma = lambda = 1 the advantage of each of its tokens is R_k - V_t. A dialogue is one episode, whose response holds all
turns, the user's masked: with an episode per stage the learner would run the earlier ones again in later prompts.

Evidence: [S] abstract, official README table or reviews; [R] remembered, not re-read; [O] ORZ; [D] our own choice.
What is unknown about the paper, and what stands here for it (options in backticks):

    U1   literal prompts              [D] after the figure as remembered; `formats/dialogue.py`
    U2   form of the log-prob term    [R] gate, sum, c = 1e-3; algebra [D]; `summary_logprob`, `logprob_coef`
    U3   which policy scores L        [D] the one that sampled, teacher-forced, at the sampling temperature (1)
    U4   window of p                  [D] 10 iterations before this one, clamped to [0.05, 0.95]; `accuracy_window`
    U5   budgets of R1 models         [D] as Qwen: 1000 / 6000 / 6000 / 1000 (1000 [S], 6000 [R])
    U6   Verify's budget in v2        [D] 6000 as in v1; one source says small; `verify_budget`
    U7   samples per question         [D] 16 (ORZ 64); `num_generations`
    U8   iterations                   [D] 1008, one pass over 129k questions; `max_steps`
    U9   temperature of evaluation    [D] 1.0, as training; `eval_top_p` 1.0
    U10  SFT of R1 before RL          [D] none; with `sft.py` if wanted
    U11  unparsable verdict           [D] in training wrong (reward 0); at inference No
    U12  box before a cut             [D] counts; `require_stop` for ORZ's rule
    U13  Slow wrong in training       [R] ends without Summary
    U14  normalisation, averaging     [O] advantages of all stages pooled, mean over tokens; `adv_norm`
    U15  template of base models      [D] ChatML without a system turn; `template`
    U16  setup of R1-Distill-7B       [D] as 1.5B; not reproduced
    U17  ablations                    [D] the six switches from `unweighted_verify` to `propagate`
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch.nn.utils.rnn import pad_sequence

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Metric
from adaptive_reasoning.errors import run_cli
from adaptive_reasoning.formats import dialogue
from adaptive_reasoning.formats.dialogue import STAGES, DialogueArgs, DialogueFormat
from adaptive_reasoning.learner.packing import Counts, MicroBatch
from adaptive_reasoning.rollout import request_seed
from adaptive_reasoning.rollout.dialogue import Dialogue, Turn
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
from adaptive_reasoning.run.stages import stage_metrics, stage_rows, stage_table


@dataclass
class Args(DialogueArgs, RunArgs):
    """Options of Thinker. The defaults are the run with Qwen2.5-1.5B as far as it is known.

    Those of the dialogue, budgets and prompts, are `DialogueArgs` in formats/dialogue.py.
    """

    model: str = "Qwen/Qwen2.5-1.5B"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: files with `problem` and `answer`, or hub data sets."""
    max_steps: PositiveInt = 1008
    """Training steps: one rollout batch each."""
    temperature: Positive = 1.0
    """Sampling temperature of training and evaluation; log-probs are taken at the same temperature."""
    eval_top_p: PositiveShare = 1.0
    """Nucleus of the evaluation sampler (training always samples from the whole distribution)."""
    max_prompt_tokens: PositiveInt = 2048
    """Questions with a longer prompt are left out of training, and counted."""
    max_new_tokens: PositiveInt = 14000
    """All responses of a dialogue together, for the memory plan; at least the sum of the budgets, and --qa_budget."""
    learning_rate: Positive = 1e-6
    """AdamW learning rate, constant."""
    warmup_steps: NonNegativeInt = 50
    """Steps over which the learning rate rises from zero."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""
    adam_beta2: ShareBelowOne = 0.95
    """AdamW second-moment decay."""

    answer_format: str = "dialogue"
    """Response format: "dialogue", or a subclass of it as module.Class."""
    logprob_coef: NonNegative = 1e-3
    """c: weight of the log-prob term in the Summary's reward."""
    summary_logprob: Literal["gated_sum", "ungated_sum", "gated_mean", "off"] = "gated_sum"
    """"gated_sum": g (1 + c L), default, our reading of the paper. "ungated_sum": g + c L. "gated_mean":
    g (1 + c L / T), c 0.1 to 0.3. "off": g."""
    accuracy_window: PositiveInt = 10
    """Iterations over which p, the accuracy of Fast, is taken."""
    unweighted_verify: bool = False
    """Pay every right verdict 1 instead of 1-p or p."""
    skip_summary: bool = False
    """Leave the Summary out."""
    verdict_transition: bool = False
    """Let the model's own verdict, not the gold answer, decide in training who goes on to Slow."""
    propagate: bool = False
    """Let rewards flow back to earlier stages, undiscounted at their borders."""
    gamma: ClosedUnitInterval = 1.0
    """Discount per token within a stage."""
    lam: ClosedUnitInterval = 1.0
    """lambda of GAE within a stage."""
    adv_norm: Literal["pooled", "per_stage", "none"] = "pooled"
    """Advantages normalised over all actions ("pooled", ORZ, default), those of each stage ("per_stage"), or "none"."""
    clip_low: Positive = 0.2
    """epsilon below 1."""
    clip_high: Positive = 0.2
    """epsilon above 1."""
    dual_clip: NonNegative = 0.0
    """For A < 0 cap a token's loss at -A times this (verl: 3); 0: no cap (ORZ)."""
    value_clip: NonNegative = 0.2
    """How far a value may move from its old one before its loss is clipped; 0: no clip."""
    prompts_per_step: PositiveInt = 128
    """Questions per rollout batch, over all processes."""
    num_generations: PositiveInt = 16
    """Dialogues per question."""
    minibatches_per_step: PositiveInt = 1
    """Updates of the policy per rollout batch; with 1 it is strictly on-policy."""
    critic_minibatches: PositiveInt = 12
    """Updates of the critic per rollout batch."""
    critic_learning_rate: Positive = 5e-6
    """AdamW learning rate of the critic."""

    def __post_init__(self):
        check_minibatches(self)
        dialogue.check_budgets(self)

    def holds(self) -> Holds:
        return Holds(
            questions=self.prompts_per_step,
            top_p=self.eval_top_p,
            critic=True,
            dialogues=self.environment == "dialogue",
            least_new_tokens=dialogue.least_new_tokens(self),
        )


METRICS = stage_metrics(STAGES, "thinker") | {
    "thinker/fast_trailing_accuracy": Metric(
        "p: accuracy of the Fast stage over the last iterations before this one, clamped; weighs the two verdicts.",
        "share", "rises"),
    "loss/value": Metric("Loss of the critic, mean over its optimiser steps of this step.", "", "falls"),
    "loss/value_clip_fraction": Metric(
        "Share of the action tokens whose value moved beyond the clip range of the value loss.", "share", "low"),
    "loss/value_grad_norm": Metric(
        "Largest norm of the critic's gradient in this step, before clipping.", "", "steady"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the method


def plan_rollouts(questions, args, step: int) -> list[Dialogue]:
    """Return the dialogues of one step, not yet begun: n of every (index in the task, question, prompt ids)."""
    samples = range(args.num_generations)
    return [Dialogue(question, i, request_seed(args.seed, step, i, k)) for i, question, _ in questions for k in samples]


def next_stage(turns: dict[str, Turn], setting: str, args) -> str | None:
    """Return the stage that comes next, None at the end. Training departs from inference in two places.

    A right Slow answer goes to the Summary; and the gold answer, not the verdict, decides who goes to Slow.
    """
    last = list(turns)[-1] if turns else ""
    if setting == "train" and last == "slow":
        return "summary" if turns["slow"].correct and not args.skip_summary else None
    verified = last == "verify" or (last == "fast" and args.skip_verify)
    if setting == "train" and verified and (args.skip_verify or not args.verdict_transition):
        return None if turns["fast"].correct else "slow"
    return dialogue.next_stage(turns, setting, args)


def reward(stage: str, turns: dict[str, Turn], p: float, args) -> float:
    """Return R of a stage: the four rewards of the paper (the baseline's one turn is paid like Fast and Slow)."""
    right = turns[stage].score  # 1 or 0; what "correct" means for a stage: `DialogueFormat.target`
    if stage in ("fast", "slow", "qa"):
        return right  # R_fast = 1{y_fast = y*}, R_slow = 1{y_slow = y*}
    if stage == "verify":  # R_verify = (1 - p) 1{Yes} if y_fast = y*, else p 1{No}
        if args.unweighted_verify:
            return right
        return (1 - p) * right if turns["fast"].correct else p * right
    g, c, L = right, args.logprob_coef, turns[stage].logprob  # R_summary = g (1 + c L), g = 1{y_sum = y_slow}
    if args.summary_logprob == "gated_mean":
        L = L / len(turns[stage].ids)
    paid = {"ungated_sum": g + c * L, "off": g}.get(args.summary_logprob, g * (1 + c * L))
    return max(0.0, paid)


def trailing_accuracy(history: list, own: list[float], window: int) -> float:
    """Return p of the last iterations, [correct, total] each (the first: of its `own`), and remember its own."""
    correct, total = map(sum, zip(*(history or [own])))
    history[:] = [*history, own][-window:]
    return min(max(correct / max(total, 1), 0.05), 0.95)


def summary_logprobs(dialogues: list[Dialogue], learner) -> None:
    """Fill L = sum_t log pi(a_sum,t | Fast prompt, a_sum,<t) of every Summary, under the weights that sampled it."""
    summarised = [d for d in dialogues if "summary" in d.turns]
    for d, values in zip(summarised, learner.logprobs([d.alone("summary") for d in summarised])):
        d.turns["summary"].logprob = float(values.sum())


def gae(rewards, values, last, gamma: float, lam: float, flow: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (advantages, returns) [B, T] of B sequences of actions, zeros behind the end of the shorter ones.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    return_t = A_t + V_t

    `last` [B, T] marks the last action of every stage: V and A of what follows count `flow` times there, 0 for the
    method, 1 to let rewards flow back to earlier stages.
    """
    pass_value = torch.full_like(values, gamma).masked_fill(last, flow)  # [B, T]
    pass_advantage = torch.full_like(values, gamma * lam).masked_fill(last, flow)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + pass_value[:, t] * next_value - values[:, t]
        next_advantage = delta + pass_advantage[:, t] * next_advantage
        next_value, advantages[:, t] = values[:, t], next_advantage
    return advantages, advantages + values


def normalise(values: torch.Tensor, total, unbiased: bool = False) -> torch.Tensor:
    """Return (A - mean) / standard deviation over the tokens of all processes, fp64.

    Args:
        values: [N] of this process.
        total: sums a list of numbers over all processes; every one of them must call this.
        unbiased: as verl whitens, (A - mean) / sqrt(unbiased variance + 1e-8). Else as ORZ does, with the population
            variance and a floor: (A - mean) / sqrt(max(variance, 1e-8)).
    """
    values = values.double()
    s, n = total([float(values.sum()), len(values)])
    centred = values - s / max(n, 1)
    (squares,) = total([float(centred.square().sum())])
    if unbiased:
        return centred * (squares / max(n - 1, 1) + 1e-8) ** -0.5
    return centred * max(squares / max(n, 1), 1e-8) ** -0.5


def token_rewards(d: Dialogue, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (rewards, ends of a stage, number of the stage) [T] of a dialogue of T response tokens."""
    rewards, last, stage = (torch.zeros(tokens) for _ in range(3))
    for name, turn in d.turns.items():
        end = turn.start + len(turn.ids)
        rewards[end - 1], last[end - 1] = turn.reward, 1  # R_k is paid on the last token of stage k
        stage[turn.start : end] = STAGES.index(name)
    return rewards, last, stage


def fill_advantages(episodes: list[Episode], dialogues: list[Dialogue], values: list, args, total) -> None:
    """Fill the columns "values" and "returns" and the advantages, [T] each, of every episode.

    Args:
        values: [T] of each episode, from the critic.
        total: sums a list of numbers over all processes; every one of them must call this.
    """
    # 1. What each token was paid, and the actions alone, of all stages one behind the other: user turns are no steps.
    paid = [token_rewards(d, e.num_tokens) for d, e in zip(dialogues, episodes)]
    acting = [e.action_mask for e in episodes]

    def of_actions(tensors) -> torch.Tensor:  # [B, A], zeros behind the last action of the shorter ones
        return pad_sequence([x[mask] for x, mask in zip(tensors, acting)] or [torch.zeros(0)], batch_first=True)

    rewards, last, stage = (of_actions([p[k] for p in paid]) for k in range(3))
    inside = of_actions(acting).bool()

    # 2. Generalised advantage estimation: every stage is a return of its own.
    A, returns = gae(rewards, of_actions(values), last.bool(), args.gamma, args.lam, flow=float(args.propagate))

    # 3. Normalised over the tokens of all stages, or of each.
    masks = {"pooled": [inside], "per_stage": [inside & (stage == k) for k in range(len(STAGES))], "none": []}
    for mask in masks[args.adv_norm]:
        A[mask] = normalise(A[mask], total).float()

    # 4. Back to the places of the actions in the response.
    for e, v, a, ret in zip(episodes, values, A, returns):
        n, mask = e.num_actions, e.action_mask
        e.advantages, of_returns = (torch.zeros(e.num_tokens).masked_scatter(mask, x[:n]) for x in (a, ret))
        e.columns |= {"values": v, "returns": of_returns}
        e.advantage = float(a[:n].mean())


def policy_loss(logprobs, entropy, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the clipped loss, the mean over the tokens of the step, and of the metrics.

    Shapes: logprobs, entropy [N]; `counts` are those of the whole step over all processes.
    """
    A = mb.advantages  # [N]
    log_ratio = logprobs - mb.old_logprobs
    ratio = log_ratio.exp()
    free = -A * ratio
    clipped = -A * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    token = torch.maximum(free, clipped)
    if args.dual_clip:
        token = torch.where(A < 0, torch.minimum(token, -A * args.dual_clip), token)
    value = token.sum() / counts.tokens
    stats = {"policy": value, "clip_fraction": (clipped > free).sum() / counts.tokens}
    stats |= {"approx_kl": -log_ratio.sum() / counts.tokens, "entropy": entropy.sum() / counts.tokens}
    return value, {f"loss/{key}": x.detach() for key, x in stats.items()}


def value_loss(values, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the mean of 0.5 max((V - G)^2, (clip(V) - G)^2), and of the metrics."""
    old_values, returns = mb.column("values"), mb.column("returns")  # [N]
    free, worst = (values - returns).square(), (values - returns).square()
    if args.value_clip:
        near = old_values + (values - old_values).clamp(-args.value_clip, args.value_clip)
        worst = torch.maximum(free, (near - returns).square())
    value = 0.5 * worst.sum() / counts.tokens
    return value, {"loss/value": value.detach(), "loss/value_clip_fraction": (worst > free).sum() / counts.tokens}


def value_metrics(losses: list[dict], updates: list[dict], total) -> dict[str, float]:
    """Return the means over the critic's updates of the additive shares `losses`, and its largest gradient norm."""
    keys = ("loss/value", "loss/value_clip_fraction")
    sums = total([sum(float(share[key]) for share in losses) for key in keys])
    out = {key: value / len(updates) for key, value in zip(keys, sums)}
    return out | {"loss/value_grad_norm": max(u["grad_norm"] for u in updates)}


def metrics(rows: list[dict], p: float) -> dict[str, float | None]:
    """Return Thinker's metrics over the dialogues of all processes (`rows` of `stage_rows`)."""
    table = stage_table(rows)
    out = {f"verify_{key}": x for key, x in table.get("verification", {}).items()}
    out["fast_trailing_accuracy"] = p if "fast" in table["stages"] else None
    out |= {f"{stage}_{key}": x for stage, numbers in table["stages"].items() for key, x in numbers.items()}
    return {f"thinker/{key}": value for key, value in out.items()}


def main() -> None:
    args = parse_args(Args)
    kind = formats.load(args.answer_format, DialogueFormat)
    run = Run(args, "thinker" if args.environment == "dialogue" else "thinker-qa", kind, critic=True)
    form = kind(run.tokenizer, args, next_stage)
    with run.start(form, METRICS):
        learner, critic = run.learner, run.critic
        run.evaluate_if_due()

        for step in run.steps():
            # --- roll out: whole dialogues, stage by stage; grading overlaps decoding
            dialogues = plan_rollouts(run.next_questions(), args, step)
            episodes = run.converse(dialogues)

            # --- reward and advantage
            if args.summary_logprob != "off":
                summary_logprobs(dialogues, learner)
            fast = [d.turns["fast"].correct for d in dialogues if "fast" in d.turns]
            counts = run.sum([sum(fast), len(fast)])
            p = trailing_accuracy(run.memory.setdefault("fast", []), counts, args.accuracy_window)
            for d, e in zip(dialogues, episodes):
                for stage, turn in d.turns.items():
                    turn.reward = reward(stage, d.turns, p, args)
                e.reward = sum(turn.reward for turn in d.turns.values())
                e.mode = form.mode_of(d.turns)
                e.correct = d.turns[e.mode].correct
            fill_advantages(episodes, dialogues, critic.values(episodes), args, run.sum)

            # --- update: the critic, one optimiser step per minibatch
            critic_losses, critic_updates = [], []
            for minibatch in critic.minibatches(episodes, args.critic_minibatches, step):
                for mb in minibatch:
                    values, _ = critic.score(mb)
                    value, stats = value_loss(values, mb, minibatch.counts, args)
                    critic.backward(value)
                    critic_losses.append(stats)
                critic_updates.append(critic.step(args.critic_learning_rate))

            # --- update: the policy, one optimiser step per minibatch
            on_policy = args.minibatches_per_step == 1
            if not on_policy:
                learner.recompute_logprobs(episodes)
            losses, updates = [], []
            minibatches = learner.minibatches(episodes, args.minibatches_per_step, step)
            for minibatch in minibatches:
                for mb in minibatch:
                    logprobs, entropy = learner.score(mb, with_entropy="detached")
                    if on_policy:  # pi_old is the policy itself: recomputing it would give these very numbers
                        mb.old_logprobs = logprobs.detach()
                    value, stats = policy_loss(logprobs, entropy, mb, minibatch.counts, args)
                    learner.backward(value)
                    losses.append(stats)
                    run.observe(mb, logprobs)
                updates.append(learner.step(args.learning_rate))
            run.refresh()

            # --- log, evaluate, save
            own = metrics(run.gather(stage_rows(dialogues, episodes)), p)
            own |= value_metrics(critic_losses, critic_updates, run.sum)
            run.log(episodes, own, losses, updates, minibatches)
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)
