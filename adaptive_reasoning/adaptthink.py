"""AdaptThink: teach a reasoning model when to skip its thinking, by reinforcement.

Paper: "AdaptThink: Reasoning Models Can Learn When to Think", arXiv 2505.13417. Code: THU-KEG/AdaptThink @ 84cf948.

    make train-adaptthink-1.5b             # the paper's run on 8 GPUs
    make toy-adaptthink SEED=0             # the same file on arithmetic chains, minutes on a laptop

The prompt x ends in an opened thinking block. A response y that starts with `</think>` is NoThinking, any other one is
Thinking (docs/hybrid.md: Qwen3's template has other openings). The policy shall skip the thinking as often as it can
without losing accuracy against its starting model (Eq. 2); with a penalty of fixed weight 1/delta that is (Eq. 6)

    maximise  E[ delta 1(y_1 = </think>) + R(x, y) - Rbar_ref(x) ]

What differs from plain GRPO:
 1. Half of the samples of a question are forced to start with `</think>`, half with "Alright" (Eq. 8), so both ways of
    answering are tried on every question even while the policy would never choose one. The behaviour probability of
    that first token is 0.5, and this is what its ratio is taken against: importance sampling.
 2. The advantage is A = delta 1(NoThinking) + R - Rbar_ref(x): not normalised, not centred, no group statistics. The
    baseline is the accuracy of the starting model on the question, measured once before training (Eq. 5).
 3. One ratio per sequence, the geometric mean of its token ratios, clipped; the loss is the plain mean over sequences.
 4. No KL, no entropy bonus, no critic; one optimiser step per rollout batch.

Where paper and official code disagree (default first; every switch is an option below):
 - ratio: the code's length-normalised exp(mean log ratio); the paper's Eq. 9 is the product. The product pins the mode
   probability near 0.5: once p(</think>) passes 0.6 every good NoThinking response is clipped. `ratio`.
 - forcing: the code's exact half per question; the paper's coin flip per sample. `forcing`.
 - NoThinking is cut at 4096 tokens in training; the paper says 16K for both. `nothinking_max_new_tokens`.
 - a right answer needs exactly one `</think>`, no `<think>`, and a literal \\boxed{} after it (code). formats/think.py.
 - delta is paid to wrong NoThinking answers too, so giving up on what the reference never solves has advantage +delta;
   `delta_on` "correct" withholds it (neither paper nor code).
 - reference samples: nucleus 0.95 and a free first token in the code, unlike the rollouts they are compared with.
   `ref_top_p` 1.0 removes half of that bias.
 - epochs: 1 in the paper (314 steps), 10 in the script, stopped by hand. `max_steps`.
 - log-probs are those of the temperature-0.6 distribution (code); w_start is one fixed word (code). Followed.
 - a NoThinking response cut at its limit gets a padding token counted as EOS in the code. Not copied: masks here come
   from lengths.
"""

import json
import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Alarm, Metric
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.formats.think import Think, ThinkArgs
from adaptive_reasoning.learner.packing import Counts, MicroBatch
from adaptive_reasoning.rollout import Forced, Request, Sampling, request_seed
from adaptive_reasoning.run.bank import Bank, free_samples
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.options import Finite, Positive, PositiveShare, RunArgs, check_minibatches, parse_args
from adaptive_reasoning.run.run import Run
from adaptive_reasoning.tasks import chain
from adaptive_reasoning.tasks.think_template import answer_behind


@dataclass
class Args(ThinkArgs, RunArgs):
    """Options of AdaptThink. The defaults are the official 1.5B run."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Model to start from: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama)."""
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"
    """Training questions, comma separated: files with `problem` and `answer`, or hub data sets."""
    max_steps: PositiveInt = 314
    """Training steps: one rollout batch each."""
    temperature: Positive = 0.6
    """Sampling temperature of training and evaluation; log-probs are taken at the same temperature."""
    eval_top_p: PositiveShare = 0.95
    """Nucleus of the evaluation sampler (training always samples from the whole distribution)."""
    max_new_tokens: PositiveInt = 16384
    """Longest response in tokens, EOS included."""
    learning_rate: Positive = 2e-6
    """AdamW learning rate, constant."""

    answer_format: str = "think"
    """"think": R1's thinking block. Or a subclass of it of your own, "module.Class"."""
    delta: Finite = 0.05
    """delta of Eq. 4: how much accuracy one skipped thinking may cost."""
    prompts_per_step: PositiveInt = 128
    """Questions per rollout batch, over all processes."""
    num_generations: PositiveInt = 16
    """Responses per question."""
    nothinking_share: ClosedUnitInterval = 0.5
    """Share of the responses forced into NoThinking, and the behaviour probability of that first token (Eq. 8)."""
    forcing: Literal["exact", "coin", "off"] = "exact"
    """"exact" (code; default, less noise): as many of every question. "coin" (Eq. 8): per sample. "off": none."""
    count_forced: bool = False
    """Train on the forced tokens behind the first too, whose gradient has one direction only (docs/hybrid.md)."""
    nothinking_max_new_tokens: PositiveInt = 4096
    """Longest NoThinking response in training (code; the paper has max_new_tokens for both)."""
    baseline: Literal["reference", "online"] = "reference"
    """"reference" (Eq. 5, default): measured before training. "online": mean Thinking reward of the question now."""
    delta_on: Literal["all", "correct"] = "all"
    """"all" (paper and code, default): delta for every NoThinking response. "correct": only for right ones."""
    ratio: Literal["sequence_mean", "sequence_product", "token"] = "sequence_mean"
    """"sequence_mean" (code, default: Eq. 9 pins p near 0.6), "sequence_product" (Eq. 9), "token" (plain PPO)."""
    token_average: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"] = "token_mean"
    """Normaliser with ratio "token": "token_mean", "seq_mean_token_sum" or "seq_mean_token_mean"."""
    clip_low: Positive = 0.2
    """epsilon below 1."""
    clip_high: Positive = 0.2
    """epsilon above 1."""
    minibatches_per_step: PositiveInt = 1
    """Optimiser steps per rollout batch."""
    old_logprobs: Literal["learner", "behaviour"] = "learner"
    """pi_old: "learner" recomputes it before the update (code, default), "behaviour" takes the sampler's."""
    ref_samples: PositiveInt = 16
    """K of Eq. 5: responses per question for the reference accuracy."""
    ref_top_p: PositiveShare = 0.95
    """Nucleus of those responses (code; 1, that of the rollouts, halves the bias of the baseline)."""
    ref_results: str = ""
    """Read the reference accuracies from a table in the authors' JSON layout instead of measuring them."""
    ref_cache: str = "runs/reference"
    """Folder in which measured reference accuracies are kept."""

    def __post_init__(self):
        check_minibatches(self)
        if self.reward and self.ref_results:
            raise UserError("--ref_results: they are no means of --reward. Leave it empty: these are measured.")
        if self.forcing == "exact" and (self.num_generations * self.nothinking_share) % 1:
            raise UserError(
                f"--forcing exact: {self.nothinking_share:g} of --num_generations {self.num_generations} is no whole "
                "number of responses. Change one of them, or take --forcing coin."
            )

    def holds(self) -> Holds:
        return Holds(questions=self.prompts_per_step, top_p=min(self.eval_top_p, self.ref_top_p))


MODES = "Responses of this step, by the mode they were sampled in."
ACCURACY, TOKENS = f"Accuracy per mode in training | {MODES}", f"Tokens per mode in training | {MODES}"
METRICS = {
    "adapt_think/forced_nothinking_share": Metric(
        "Share of NoThinking responses, forced or (with forcing off) by choice.", "share", "what was asked for"),
    "adapt_think/forced_share_gap": Metric(
        "Distance of that share from the one asked for.", "share", "0; coin flips scatter by a few points",
        alarms=(Alarm("the forced share is not the one asked for: check --forcing, and the first tokens in the samples",
                      above=0.1),)),
    "adapt_think/nothinking_accuracy": Metric(
        "Share of the forced NoThinking responses that are right.", "share", panel=ACCURACY, line="nothinking"),
    "adapt_think/thinking_accuracy": Metric(
        "Share of the forced Thinking responses that are right.", "share", panel=ACCURACY, line="thinking"),
    "adapt_think/nothinking_reward": Metric("Mean reward of the NoThinking responses, delta not included."),
    "adapt_think/thinking_reward": Metric("Mean reward of the Thinking responses."),
    "adapt_think/reward_gap": Metric(
        "NoThinking reward minus Thinking reward. A question moves to NoThinking where this gap is above -delta.", "",
        "rises towards 0"),
    "adapt_think/nothinking_tokens": Metric(
        "Mean length of the NoThinking responses.", "tokens", panel=TOKENS, line="nothinking"),
    "adapt_think/thinking_tokens": Metric(
        "Mean length of the Thinking responses.", "tokens", panel=TOKENS, line="thinking"),
    "adapt_think/first_eot_prob": Metric(
        "Mean probability of NoThinking's first token, over its responses of this step (step 0: the evaluation "
        "questions): the first sign of progress. In evaluations the nucleus cuts it while it is improbable.", "share",
        "rises, then settles between 0 and 1", "p(</think>)",
        alarms=(
            Alarm("</think> is almost certain on every question for twenty steps: the model has stopped thinking "
                  "altogether; lower --delta", above=0.995, steps=20),
            Alarm("</think> is still below 0.0001 after a hundred steps: check that forced first tokens get gradient "
                  "and that nothinking_accuracy is above 0", below=1e-4, steps=100))),
    "adapt_think/first_eot_logprob": Metric(
        "The same as a log-probability: shows movement while the probability still reads 0.", "nats", "rises"),
    "adapt_think/first_ratio_mean": Metric(
        "Mean ratio of the first token, policy over the probability it was forced with.", "", "between 0 and 2"),
    "adapt_think/advantage_mean": Metric(
        "Mean advantage, delta * 1(NoThinking) + reward - reference accuracy. Not centred, by design.", "", "rises"),
    "adapt_think/ref_accuracy_mean": Metric("Mean reference accuracy of the questions of this step.", "share"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the method


def forced(form: Think, mode: str, share: float, count: bool = False) -> tuple:
    """Return the first tokens of a mode with their behaviour probabilities (Eq. 8); `share` is NoThinking's.

    The first token is the choice. The others follow from it, with probability 1: no actions, unless `count`.
    """
    first, *others = form.opening(mode)
    rest = [Forced(tuple((token, 1.0) for token in others), at=1, action=count)] if others else []
    return ((first, share if mode == "nothinking" else 1 - share), *rest)


def plan_rollouts(questions, form: Think, args, stop_ids, step: int) -> list[Request]:
    """Return the requests of one step: for every question, some samples forced to skip thinking, the others to think.

    `questions` holds (index in the task, question, prompt ids); the index is the group of the samples.
    """
    requests = []
    for i, question, prompt_ids in questions:
        n = args.num_generations
        coins = np.random.default_rng([args.seed, step, i]).random(n) < args.nothinking_share
        for k in range(n):
            skip = bool(coins[k]) if args.forcing == "coin" else k < round(n * args.nothinking_share)
            mode = "nothinking" if skip else "thinking"
            first = () if args.forcing == "off" else forced(form, mode, args.nothinking_share, args.count_forced)
            limit = min(args.nothinking_max_new_tokens, args.max_new_tokens) if skip and first else args.max_new_tokens
            seed = request_seed(args.seed, step, i, k)
            requests.append(Request(prompt_ids, limit, stop_ids, seed, first, tag=(question, i)))
    return requests


extract_answer = answer_behind  # what is graded: the last box behind the one </think>
chain.FORMS["adaptthink"] = Think


def reward(e: Episode) -> float:
    """Return R(x, y): 1 for a well-formed right answer, else 0; or what a task's own score or --reward gave."""
    return e.score


def advantage(e: Episode, baseline: float, args) -> float:
    """Return A(x, y) = delta 1(y_1 = </think>) + R(x, y) - Rbar_ref(x)   (Eq. 6)."""
    pays = e.mode == "nothinking" and (args.delta_on == "all" or e.correct)
    return args.delta * pays + e.reward - baseline


def baselines(episodes: list[Episode], reference: dict[int, float] | None) -> dict[int, float]:
    """Return {group: baseline}: Rbar_ref(x) of Eq. 5, or without one the mean Thinking reward of the group."""
    groups = {e.group for e in episodes}
    if reference is not None:
        return {g: reference[g] for g in groups}
    thinking = {g: [e.reward for e in episodes if e.group == g and e.mode == "thinking"] for g in groups}
    return {g: sum(rewards) / len(rewards) if rewards else 0.0 for g, rewards in thinking.items()}


def loss(logprobs: torch.Tensor, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the loss (Eq. 9) and of the metrics.

    Shapes: logprobs [N] of all tokens of S sequences; `counts` are those of the whole step over all processes, so the
    shares of all micro-batches add up to the loss whatever the split. mb.old_logprobs holds log pi_IS: pi_old, and
    log 0.5 for the forced first token.
    """
    if args.ratio == "token":
        A = mb.advantages  # [N]
        weight = {
            "token_mean": torch.full_like(A, 1 / counts.tokens),
            "seq_mean_token_sum": torch.full_like(A, 1 / counts.sequences),
            "seq_mean_token_mean": 1 / (mb.lengths[mb.sequence] * counts.sequences).to(A.dtype),
        }[args.token_average]
    else:
        A = mb.sequence_advantages  # [S]
        weight = torch.full_like(A, 1 / counts.sequences)
    log_ratio = logprobs - mb.old_logprobs  # [N]
    if args.ratio != "token":
        log_ratio = torch.zeros_like(A).index_add(0, mb.sequence, log_ratio)  # [S] sum over the tokens of a sequence
    if args.ratio == "sequence_mean":
        log_ratio = log_ratio / mb.lengths
    ratio = log_ratio.exp()
    free = -A * ratio
    clipped = -A * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    value = (torch.maximum(free, clipped) * weight).sum()
    with torch.no_grad():
        stats = {
            "loss/policy": value.detach(),
            "loss/clip_fraction": ((clipped > free) * weight).sum(),
            "loss/approx_kl": (-log_ratio * weight).sum(),
        }
    return value, stats


def score_first_token(episodes: list[Episode], learner) -> None:
    """Keep log pi(</think> | x) of questions whose NoThinking responses all have advantage 0, for `metrics`.

    The update does not score those. The prompt alone decides, so one response of a question has it for all of them, and
    a delta that leaves no advantage 0, such as 0.05, costs nothing. Every process must call this, before the update.
    """
    skips = [e for e in episodes if e.mode == "nothinking"]
    scored = {e.group for e in skips if e.teaches}
    unscored = list({e.group: e for e in skips if e.group not in scored}.values())
    cut = ("response_ids", "behaviour_logprobs", "action_mask")
    firsts = [replace(e, forced=None, **{name: getattr(e, name)[:1] for name in cut}) for e in unscored]
    for e, values in zip(unscored, learner.logprobs(firsts)):
        e.info["first_logprob"] = float(values[0])


def note_first_token(mb: MicroBatch, logprobs: torch.Tensor) -> None:
    """Keep log pi(y_1 | x) before the update of each episode, for `metrics`. Shapes: logprobs [N]."""
    first = mb.position == 0
    for row, value in zip(mb.sequence[first].tolist(), logprobs.detach()[first].tolist()):
        mb.episodes[row].info["first_logprob"] = value


def metric_rows(episodes: list[Episode], base: dict[int, float]) -> list[dict]:
    """Return what `metrics` needs of each episode, as plain numbers that can travel between processes."""
    rows = []
    skips = [e for e in episodes if e.mode == "nothinking"]
    of_question = {e.group: e.info["first_logprob"] for e in skips if "first_logprob" in e.info}
    for e in episodes:
        row = {"mode": e.mode, "reward": e.reward, "accuracy": float(e.correct), "tokens": e.num_tokens}
        row |= {"advantage": e.advantage, "ref_accuracy": base[e.group]}
        first = e.info.get("first_logprob")  # None where the episode taught nothing
        if first is not None:
            row["ratio"] = float(np.exp(first - e.behaviour_logprobs[0].item()))
        if e.mode == "nothinking":  # the same prompt, the same probability
            first = of_question[e.group] if first is None else first
            row |= {"eot_logprob": first, "eot_prob": float(np.exp(first))}
        rows.append(row)
    return rows


def metrics(rows: list[dict], args) -> dict[str, float | None]:
    """Return AdaptThink's metrics over the episodes of all processes (official names; p(</think>) is the headline)."""

    def mean(key, *modes):
        values = [r[key] for r in rows if key in r and (not modes or r["mode"] in modes)]
        return sum(values) / len(values) if values else None

    n, share = args.num_generations, sum(r["mode"] == "nothinking" for r in rows) / len(rows)
    asked = {"exact": round(n * args.nothinking_share) / n, "coin": args.nothinking_share, "off": share}[args.forcing]
    out = {"forced_nothinking_share": share, "forced_share_gap": abs(share - asked)}
    for mode in ("nothinking", "thinking"):
        out |= {f"{mode}_{key}": mean(key, mode) for key in ("accuracy", "reward", "tokens")}
    if None not in (out["nothinking_reward"], out["thinking_reward"]):
        out["reward_gap"] = out["nothinking_reward"] - out["thinking_reward"]
    out |= {f"first_{key}": mean(key, "nothinking") for key in ("eot_prob", "eot_logprob")}
    out |= {"first_ratio_mean": mean("ratio")}
    out |= {f"{key}_mean": mean(key) for key in ("advantage", "ref_accuracy")}
    return {f"adapt_think/{key}": value for key, value in out.items()}


def reference_accuracy(run: Run, args) -> dict[int, float] | None:
    """Return {question index: Rbar_ref(x)} (Eq. 5): K Thinking samples of the starting model, graded; None: online.

    Nothing is forced but the template's opening, where Thinking has one. A resumed run reads the table it started with.
    """
    if args.baseline == "online":
        return None
    needed = run.task.ahead(args.max_steps, args.prompts_per_step, args.seed)

    def measure() -> dict[int, float]:
        if args.ref_results:
            return read_authors_table(args.ref_results, {i: run.task.questions[i] for i in needed})
        requests = free_samples(run, args.ref_samples, run.form.template.thinking)
        sampling = Sampling(args.temperature, args.ref_top_p)
        return Bank(run, needed, requests, sampling, args.ref_cache).pass_rates()

    return run.journal.keep("reference.json", needed, measure)


def comparable(problem: str) -> str:
    """Return a problem without what decode(encode(text)), through which the authors' keys went, may change.

    Composed letters (NFC), the space in "is 2 ." and "do n't", at the ends, and how much of it is between words.
    """
    text = re.sub(r"\s+(?=n't\b)", "", unicodedata.normalize("NFC", problem))
    return " ".join(re.sub(r"\s+(?=[^\w\s])|(?<=[^\w\s])\s+", "", text).split())


def read_authors_table(path: str, questions: dict[int, Question]) -> dict[int, float]:
    """Return {question index: reference accuracy} from the authors' JSON list, looked up by the problem's text.

    Rows are {"problem", "answer", "metrics": {"avg_acc_thinking", ...}}; the first, "__OVERALL__", holds means. A
    question whose very text is not there takes the row whose text is `comparable`.

    Raises:
        UserError: the file cannot be read or has another layout, a question is not in it, or rows of different
            accuracies may be its own.
    """
    try:
        rows = json.loads(Path(path).read_text())
        table = [(row["problem"].strip(), row["metrics"]["avg_acc_thinking"]) for row in rows]
        if wrong := [v for _, v in table if not isinstance(v, (int, float)) or not 0 <= v <= 1]:
            raise TypeError(f"an accuracy of {wrong[0]!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--ref_results {path}: cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        layout = "a list of {problem, answer, metrics: {avg_acc_thinking}}"
        raise UserError(f"--ref_results {path}: expected {layout}, stumbled over {error}.") from error
    exact, near = {}, {}  # text -> accuracies of its rows
    for problem, accuracy in table:
        exact.setdefault(problem, set()).add(accuracy)
        near.setdefault(comparable(problem), set()).add(accuracy)
    found = {i: exact.get(q.problem.strip()) or near.get(comparable(q.problem), set()) for i, q in questions.items()}
    for fault, wrong in (
        ("are not in it", [i for i, values in found.items() if not values]),
        ("have rows of different accuracies", [i for i, values in found.items() if len(values) > 1]),
    ):
        if wrong:
            first, *others = (questions[i] for i in wrong)
            more = f" (then {', '.join(q.id for q in others[:9])}{', ...' * (len(others) > 9)})" if others else ""
            raise UserError(
                f"--ref_results {path}: {len(wrong)} of {len(questions)} questions {fault}, the first is {first.id}: "
                f"{first.problem[:80]!r}{more}. Measure them instead: leave --ref_results empty."
            )
    return {i: float(*values) for i, values in found.items()}


def main() -> None:
    args = parse_args(Args)
    kind = formats.load(args.answer_format, Think)
    run = Run(args, "adaptthink", kind)
    form = kind(run.tokenizer, args)
    with run.start(form, METRICS):
        learner = run.learner
        reference = reference_accuracy(run, args)
        run.log_first_token("adapt_think/first_eot", form.eot)
        run.evaluate_if_due()

        for step in run.steps():
            # --- roll out: half of the samples forced into each mode; grading overlaps decoding
            questions = run.next_questions()
            episodes = run.rollout(plan_rollouts(questions, form, args, run.stop_ids, step))

            # --- reward and advantage
            for e in episodes:
                e.reward = reward(e)
            base = baselines(episodes, reference)
            for e in episodes:
                e.advantage = advantage(e, base[e.group], args)

            # --- update: one optimiser step per minibatch
            on_policy = args.old_logprobs == "learner" and args.minibatches_per_step == 1
            if args.old_logprobs == "learner" and not on_policy:
                learner.recompute_logprobs(episodes)
            score_first_token(episodes, learner)
            losses, updates = [], []
            minibatches = learner.minibatches(episodes, args.minibatches_per_step, step, skip_zero_advantage=True)
            for minibatch in minibatches:
                for mb in minibatch:
                    logprobs, _ = learner.score(mb)
                    if on_policy:  # pi_old is the policy itself: recomputing it would give these very numbers
                        mb.old_logprobs = torch.where(mb.forced, mb.old_logprobs, logprobs.detach())
                    value, stats = loss(logprobs, mb, minibatch.counts, args)
                    learner.backward(value)
                    losses.append(stats)
                    run.observe(mb, logprobs)
                    note_first_token(mb, logprobs)
                updates.append(learner.step(args.learning_rate))
            run.refresh()

            # --- log, evaluate, save
            run.log(episodes, metrics(run.gather(metric_rows(episodes, base)), args), losses, updates, minibatches)
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)
