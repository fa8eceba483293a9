"""GRPO: group relative policy optimisation, the baseline the adaptive algorithms are measured against and diffed with.

Paper: "DeepSeekMath", arXiv 2402.03300, Eq. 3; code: verl 0.2 as vendored by TEAM-ARM/ARM @ cee2053.

    make toy-grpo SEED=0                   # collapses to one format, as in Fig. 2 of the ARM paper
    make train-grpo-3b                     # the SFT+GRPO row of ARM's Table 1 (8 GPUs)

A question gets G free samples; the advantage of each is its reward against the group's mean, in units of the group's
standard deviation. No critic. The model answers in one of ARM's four formats and chooses which; nothing here favours
any, and whichever is right most often takes all. With --answer_format boxed it is plain GRPO on boxed answers.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt

from adaptive_reasoning.core.episode import Episode, by_group
from adaptive_reasoning.core.errors import run_cli
from adaptive_reasoning.learner.packing import Counts, MicroBatch
from adaptive_reasoning.rollout import Request, request_seed
from adaptive_reasoning.run.evaluation import Protocol
from adaptive_reasoning.run.options import NonNegative, Positive, PositiveShare, RunArgs, check_minibatches, parse_args
from adaptive_reasoning.run.run import Run
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.answers import boxed_answer, verified_answer

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

    answer_format: Literal["tags", "boxed"] = "tags"
    """"tags": ARM's four formats, with its format gate. "boxed": one mode, the answer in the last \\\\boxed{}."""
    std: Literal["unbiased", "none"] = "unbiased"
    """Divide the advantage by the group's standard deviation: "unbiased", or "none" (Dr. GRPO)."""
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


# ------------------------------------------------------------------------------------------ control tokens and prompts

TAGS = {"direct": "ANSWER", "cot": "COT", "code": "CODE", "long_cot": "LONG_COT"}  # ordinary text, several tokens each


def format_of(response: str) -> str:
    """Return the format a response opens with, else "unknown"."""
    return next((mode for mode, tag in TAGS.items() if response.startswith(f"<{tag}>")), "unknown")


def passes_gate(response: str) -> bool:
    """Return whether a response opens with a tag and holds no rationale tag of another format (official code)."""
    mode = format_of(response)
    others = [tag for other, tag in TAGS.items() if other not in (mode, "direct")]
    return mode != "unknown" and not any(f"<{tag}>" in response or f"</{tag}>" in response for tag in others)


def extract_answer(response: str) -> str | None:
    """Return the text from the first <ANSWER> to the last </ANSWER>; None, so r = 0, without it or outside the gate."""
    start, end = response.find("<ANSWER>"), response.rfind("</ANSWER>")
    if not passes_gate(response) or start < 0 or end < start:
        return None
    return response[start + len("<ANSWER>") : end].strip()


def empty_rationale(response: str) -> bool | None:
    """Return whether the rationale is a shell, with nothing in it but "The answer is X"; None without a rationale."""
    mode = format_of(response)
    if mode in ("direct", "unknown"):
        return None
    text = response[len(TAGS[mode]) + 2 :].split(f"</{TAGS[mode]}>")[0].strip()
    return not re.sub(r"^(so |thus,? |therefore,? )?the (correct |final )?answer is[^\n]*", "", text, flags=re.I)


METRICS = {}


@dataclass
class Control:
    """How a response says which mode it is in."""

    tokenizer: object
    prompt_end: str = ""
    answer_format: str = "tags"

    check = staticmethod(verified_answer)

    @property
    def modes(self) -> tuple[str, ...]:
        return (*TAGS, "unknown") if self.answer_format == "tags" else ("response",)

    def mode_of(self, response_ids) -> str:
        """Return the mode of a response from its own first tokens."""
        opening = self.tokenizer.decode(list(response_ids[:16]), clean_up_tokenization_spaces=False)
        return format_of(opening) if self.answer_format == "tags" else "response"

    def extract_answer(self, response: str) -> str | None:
        return extract_answer(response) if self.answer_format == "tags" else boxed_answer(response)

    def opening(self, mode: str) -> tuple[tuple[int, float], ...]:
        """Return the tokens that force a format: its tag and the newline after it."""
        ids = self.tokenizer.encode(f"<{TAGS[mode]}>\n", add_special_tokens=False)
        return tuple((i, 1.0) for i in ids)

    def findings(self) -> dict[str, str]:
        """Return the lines of the preflight table about the formats."""
        if self.answer_format == "boxed":
            return {"formats": "boxed"}
        return {"formats": ", ".join(f"<{tag}>" for tag in TAGS.values()), "prompt ends in": repr(self.prompt_end)}

    def eval_spec(self) -> Protocol:
        """Return how evaluation forces and tells modes apart."""
        forced = {mode: self.opening(mode) for mode in TAGS} if self.answer_format == "tags" else {}
        return Protocol(
            {"adaptive": (), **forced}, self.mode_of, self.extract_answer, self.modes, verified_answer,
            consensus=tuple(forced),
        )  # fmt: skip


def control_tokens(tokenizer, args) -> Control:
    """Look up what the modes need; UserError if the tokenizer does not fit the method."""
    if args.answer_format == "boxed":
        return Control(tokenizer, answer_format="boxed")
    return Control(tokenizer, prompts.check_ends_at_assistant(tokenizer))


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
    """Return r: 1 for a right answer that passes the gate, else 0."""
    return float(e.correct)


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


def metric_rows(episodes: list[Episode]) -> list[dict]:
    """Return what `metrics` needs of each episode, as plain numbers that can travel between processes."""
    return [
        {"group": e.group, "mode": e.mode, "accuracy": float(e.correct), "tokens": e.num_tokens,
         "advantage": e.advantage, "empty": empty_rationale(e.text)}
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
        for key in ("accuracy", "tokens", "advantage"):
            out[f"mode/{mode}_{key}"] = mean(row[key] for row in mine)
        out[f"mode/{mode}_all_correct_groups"] = sum(found == {mode} for found in solved)
    out["group/all_wrong_share"] = mean(not any(row["accuracy"] for row in g) for g in groups.values())
    out["group/all_correct_share"] = len(solved) / len(groups)
    out["group/all_correct_mixed_share"] = sum(len(found) > 1 for found in solved) / len(groups)
    out["reward/correct_negative_share"] = mean(row["advantage"] < 0 for row in rows if row["accuracy"])
    out["rollout/empty_rationale_share"] = mean(row["empty"] for row in rows if row["empty"] is not None)
    return out


def main() -> None:
    args = parse_args(Args)
    run = Run(args, "grpo", METRICS, reference=args.kl_coef > 0)
    control = control_tokens(run.tokenizer, args)
    with run.start(control):
        learner = run.learner
        run.evaluate_if_due()

        for step in run.steps():
            # --- roll out: free samples; grading overlaps decoding
            questions = run.next_questions()
            episodes = run.rollout(plan_rollouts(questions, args, run.stop_ids, step))

            # --- reward and advantage
            for e in episodes:
                e.reward = reward(e, args)
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
