"""Preference pairs out of a model's own answers, by DPO or SimPO: DPO_Shortest, OverThink, DAST.

Three baselines of AdaptThink's Table 1 (arXiv 2505.13417, section 5.2), whose own runs were never published. Losses:
DPO, arXiv 2305.18290, Eq. 7; SimPO, arXiv 2405.14734, Eq. 6. Pairs: `shortest` is AdaptThink's own description;
`overthink` arXiv 2412.21187; `dast` arXiv 2503.04472. Paper against code: docs/algorithms/{dpo,overthink,dast}.md.

    make toy-dpo SEED=0                    # shorter answers on arithmetic chains; also toy-overthink, toy-dast

 1. The starting model answers every training question N times; graded answers are kept in a bank and never
    re-tokenised.
 2. Pairs (y_w chosen, y_l rejected):
    shortest    y_w the shortest right answer, y_l the longest of all (`rejected`).
    overthink   y_w the same answer with its thinking cut behind the second attempt that is right, y_l as it was.
    dast        two right ones, the shorter wins; two wrong ones, the longer wins, up to a budget of tokens.
 3. Loss, the mean over the B pairs of a step of -log sigmoid(u):
    dpo         u = beta [log pi/pi_ref (y_w) - log pi/pi_ref (y_l)], log-probs are sums over the response tokens
    simpo       u = beta [log pi(y_w)/|y_w| - log pi(y_l)/|y_l|] - gamma, no reference
    at temperature 1 whatever the sampler's was. pi_ref is the starting model, scored once before step 1.
 4. Each pair is scored first, without gradient; u then tells what a token of either answer is worth, and the update is
    sum_s A_s sum_t log pi(y_s,t): exactly the gradient of the loss, and no two answers have to share a forward pass.

Lengths count all response tokens, EOS included. A response that was cut at its limit is wrong, and has no EOS: none is
appended. A pair longer than the model's positions is dropped and counted; nothing is ever cut to fit.

Unknown about AdaptThink's runs, and what stands here for it: N 16, sampler (temperature 0.6, nucleus 0.95, 16,384
tokens: its reference sampler), beta, gamma, learning rate, batch of 128 pairs, cosine after a warm-up of a tenth.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch.nn.functional import logsigmoid

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import load_json, write_json_atomic
from adaptive_reasoning.core.metric import Metric
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.formats.attempts import cut, outcome_efficiency, split_attempts, thinking_of
from adaptive_reasoning.formats.think import ThinkArgs
from adaptive_reasoning.learner.packing import draw
from adaptive_reasoning.learner.runtime import on_main
from adaptive_reasoning.rollout import Request, Sampling, request_seed
from adaptive_reasoning.run.bank import Bank, free_samples
from adaptive_reasoning.run.memory import Holds
from adaptive_reasoning.run.options import NonNegative, Positive, PositiveShare, RunArgs, ShareBelowOne, parse_args
from adaptive_reasoning.run.run import Run
from adaptive_reasoning.tasks import prompts

PAIRS_AT_A_TIME = 256  # of a process, while the reference is scored
MEASURED = 256  # questions of the first benchmark whose answers show the outcome efficiency
STREAM = 224_737  # of their random numbers


@dataclass
class Args(ThinkArgs, RunArgs):
    """Options. The defaults are those of DPO_Shortest; where nothing is published they are ours."""

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
    pairs: Literal["shortest", "overthink", "dast"] = "shortest"
    """How pairs are chosen: "shortest" (AdaptThink's DPO_Shortest), "overthink", or "dast"."""
    loss: Literal["dpo", "simpo"] = "dpo"
    """"dpo": sums of log-probs against the starting model. "simpo": means, no reference, a margin."""
    beta: Positive = 0.1
    """beta: the scale of the rewards. With "simpo" about 2, as its rewards are means."""
    gamma: NonNegative = 0.3
    """gamma: SimPO's margin itself (trl's simpo_gamma; princeton-nlp's gamma_beta_ratio is gamma / beta)."""
    score_temperature: Positive = 1.0
    """Temperature of the log-probs in the loss."""
    rejected: Literal["longest_any", "longest_correct", "kimi", "two_shortest"] = "longest_any"
    """Of pairs "shortest". "longest_any": of all samples (AdaptThink). "longest_correct": of the right ones (OverThink,
    SkyThought). "kimi": every longer wrong one, and right ones at least 1.5 times as long (k1.5). "two_shortest": the
    two shortest right ones, each against the longest right one (O1-Pruner)."""
    positive: Literal["fcs", "fcs_reflection"] = "fcs_reflection"
    """Of pairs "overthink": the thinking up to and with the first right attempt, or the second (the paper's best)."""
    negative: Literal["same", "longest"] = "same"
    """Of pairs "overthink". "same": each right answer against its own cut (AdaptThink). "longest": the question's
    longest right answer against the shortest cut (the paper)."""
    l_max: NonNegativeInt = 0
    """L_max of DAST's budget in tokens; 0: --max_new_tokens (the paper has 4,096 for both)."""
    delta: ShareBelowOne = 0.15
    """Share of DAST's pairs, over all questions, that goes because its margin is smallest (the paper: 0.15, 0.18)."""
    drop_cut: bool = False
    """Make no pair with a response that was cut at its limit."""
    samples: PositiveInt = 16
    """N: responses per question in the bank."""
    sample_top_p: PositiveShare = 0.95
    """Nucleus of those responses."""
    pairs_per_step: PositiveInt = 128
    """B: pairs per optimiser step, over all processes."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """"cosine" to zero behind the warm-up, or "constant"."""
    warmup_share: ClosedUnitInterval = 0.1
    """Share of the steps over which the learning rate rises from zero."""
    bank: str = "runs/bank"
    """Folder in which graded answers are kept."""

    def holds(self) -> Holds:
        return Holds(top_p=min(self.eval_top_p, self.sample_top_p))


REWARDS = "Implicit rewards | DPO: beta log pi/pi_ref. SimPO: beta times the mean log-prob."
METRICS = {
    "dpo/reward_accuracy": Metric(
        "Share of the pairs whose chosen answer has the higher implicit reward.", "share", "rises to 1", "right pairs",
        panel="Share of pairs in order | The chosen answer above the rejected one."),
    "dpo/margin": Metric(
        "Mean implicit reward of the chosen answer minus that of the rejected one.", "", "rises", panel=REWARDS,
        line="margin"),
    "dpo/chosen_reward": Metric(
        "Mean implicit reward of the chosen answers: beta log pi/pi_ref, or beta times the mean log-prob.", "",
        "should not fall far", panel=REWARDS, line="chosen"),
    "dpo/rejected_reward": Metric(
        "Mean implicit reward of the rejected answers.", "", "falls", panel=REWARDS, line="rejected"),
    "dpo/pairs": Metric("Pairs to learn from.", "count"),
    "dpo/dropped_pairs": Metric("Pairs left out because they are longer than the model's positions.", "count", "0"),
    "dpo/small_margins": Metric("DAST's pairs left out because their margin is among the smallest.", "count"),
    "dpo/wrong_pairs": Metric("Pairs whose chosen answer is wrong too: DAST's DICP.", "count"),
    "dpo/chosen_cut_share": Metric("Share of the pairs whose chosen answer was cut at its limit.", "share", "0"),
    "dpo/rejected_cut_share": Metric("Share of the pairs whose rejected answer was cut at its limit.", "share"),
    "dpo/rejected_wrong_share": Metric("Share of the pairs whose rejected answer is wrong.", "share"),
    "dpo/length_ratio": Metric("Mean length of the rejected answers over that of the chosen ones.", "", "above 1"),
    "dpo/outcome_efficiency": Metric(
        "Share of the thinking up to and with its first right attempt, 0 where none is; at every evaluation.", "share",
        "rises"),
}  # fmt: skip

Pair = tuple[dict, dict]  # (chosen, rejected), rows of the bank


# ------------------------------------------------------------------------------------------------ pairs: the shortest


def pairs_shortest(rows: list[dict], args) -> list[Pair]:
    """Return the pairs of one question, each rejected answer longer than the chosen one.

    Args:
        rows: the question's answers: "tokens", "correct" and "cut" of each. Of equal ones the first counts.
    """
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


# ----------------------------------------------------------------------------------------------------- pairs: DAST


def scores(lengths: list[int], correct: list[bool], l_max: int) -> list[float]:
    """Return DAST's score of each answer to one question: right ones in [0.1, 1], wrong ones in [-1, -0.1]."""
    p = sum(correct) / len(correct)
    L_r = sum(L for L, ok in zip(lengths, correct) if ok) / max(1, sum(correct))
    budget = p * L_r + (1 - p) * l_max
    over = [(L - budget) / budget for L in lengths]  # lambda_i
    return [max(0.5 - 0.5 * x, 0.1) if ok else min(0.9 * x - 0.1, -0.1) for x, ok in zip(over, correct)]


def pairs_dast(rows: list[dict], args) -> list[tuple[float, dict, dict]]:
    """Return (margin, chosen, rejected) of one question: its widest pair of right ones (DCP), of wrong ones (DICP)."""
    l_max = args.l_max or args.max_new_tokens
    score = scores([row["tokens"] for row in rows], [row["correct"] for row in rows], l_max)
    pairs = []
    for right in (True, False):
        mine = [i for i, row in enumerate(rows) if row["correct"] == right and not (args.drop_cut and row["cut"])]
        if mine:
            best, worst = max(mine, key=score.__getitem__), min(mine, key=score.__getitem__)
            pairs.append((score[best] - score[worst], rows[best], rows[worst]))
    return [pair for pair in pairs if pair[0] > 0]


def widest(margins: list[float], delta: float) -> list[int]:
    """Return which pairs stay when the share delta with the smallest margins goes, rounded down; of ties the first."""
    order = sorted(range(len(margins)), key=margins.__getitem__)
    return sorted(order[int(len(margins) * delta + 1e-9) :])


# -------------------------------------------------------------------------------------------------- pairs: OverThink


def kept_attempts(correct: list[bool], positive: str) -> int | None:
    """Return how many attempts y_w keeps: up to the first right one, or the second; None: there are too few."""
    right = [i + 1 for i, ok in enumerate(correct) if ok]
    number = {"fcs": 1, "fcs_reflection": 2}[positive]
    return right[number - 1] if len(right) >= number else None


def graded_attempts(run: Run, episodes: list[Episode]) -> list[list[tuple[str, bool]]]:
    """Return the attempts (text, whether it is right) of each response; one that cannot be graded is not right."""
    grader, split = run.grader, []
    for k, e in enumerate(episodes):
        thinking = thinking_of(run.tokenizer, e.response_ids)
        split.append(split_attempts(prompts.decode(run.tokenizer, thinking, ())))
        for j, (_, answer) in enumerate(split[-1]):
            if answer:
                grader.submit(answer, e.question, (k, j))
    right = {key for key, grade in grader.drain().items() if grade.correct}
    return [[(text, (k, j) in right) for j, (text, _) in enumerate(parts)] for k, parts in enumerate(split)]


def positive_of(run: Run, row: dict, e: Episode, attempts: list[tuple[str, bool]], args) -> dict | None:
    """Return y_w: the row with what `episodes_of` makes it from; None where there are too few right attempts."""
    number = kept_attempts([ok for _, ok in attempts], args.positive)
    thinking = thinking_of(run.tokenizer, e.response_ids)
    place = number and cut(run.tokenizer, thinking, "".join(text for text, _ in attempts[:number]))
    if not place:
        return None
    kept, close = place
    behind = len(thinking) + 1  # the response's own tokens behind `</think>`
    tokens = kept + len(close) + row["tokens"] - behind
    return {**row, "tokens": tokens, "whole": row["tokens"], "kept": kept, "close": close, "behind": behind}


def pairs_overthink(run: Run, bank: Bank, rows: dict[int, list[dict]], args) -> list[Pair]:
    """Return the pairs of all questions, in their order; each process splits and grades its share."""
    found = []
    for i in list(rows)[run.rank :: run.ranks]:
        right = [row for row in rows[i] if row["correct"]]
        episodes = bank.episodes(right)
        of_each = zip(right, episodes, graded_attempts(run, episodes))
        pairs = [(positive_of(run, row, e, attempts, args), row) for row, e, attempts in of_each]
        pairs = [pair for pair in pairs if pair[0]]
        if args.negative == "longest" and pairs:
            longest = max(right, key=lambda row: row["tokens"])
            pairs = [(min((chosen for chosen, _ in pairs), key=lambda row: row["tokens"]), longest)]
        found += [pair for pair in pairs if pair[0]["tokens"] < pair[1]["tokens"]]
    return sorted(run.gather(found), key=lambda pair: pair[0]["question"])


def measure_efficiency(run: Run, args) -> dict[str, float]:
    """Return the mean outcome efficiency of the weights that sample, on questions of the first benchmark; say it."""
    asked = list(enumerate(run.task.benchmarks[0].questions[:MEASURED]))[run.rank :: run.ranks]
    requests = [
        Request(
            prompts.render(run.tokenizer, q.problem), args.max_new_tokens, run.stop_ids,
            request_seed(args.seed, STREAM, i, 0), tag=(q, i),
        )
        for i, q in asked
    ]  # fmt: skip
    episodes = run.rollout(requests, Sampling(args.temperature, args.eval_top_p), "outcome efficiency")
    values = [
        outcome_efficiency(
            [len(run.tokenizer.encode(text, add_special_tokens=False)) for text, _ in attempts],
            [ok for _, ok in attempts],
        )
        for attempts in graded_attempts(run, episodes)
    ]
    total, number = run.sum([sum(values), len(values)])
    run.journal.say(f"outcome efficiency at step {run.step}: {total / number:.3f}")
    return {"dpo/outcome_efficiency": total / number}


# ------------------------------------------------------------------------------------------------------- the learning


def rate(args, step: int) -> float:
    """Return the learning rate of step 1, 2, ...: a linear warm-up, then the cosine to zero."""
    warmup = round(args.warmup_share * args.max_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    if args.lr_schedule == "constant":
        return args.learning_rate
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (args.max_steps - warmup)))


def loss(
    logp: torch.Tensor, tokens: torch.Tensor, ref: torch.Tensor | None, number: int, args
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return the share of the loss of these pairs, the advantage A of the tokens of each answer, and metrics.

    A = -d loss / d log pi of every token of the answer, written out.

    Args:
        logp: [B, 2] sums of log pi over the response tokens of (y_w, y_l).
        ref: the same of pi_ref; read by "dpo" alone.
        tokens: [B, 2] response tokens.
        number: pairs of the step, over all processes.
    """
    simpo = args.loss == "simpo"
    rewards = args.beta * (logp / tokens if simpo else logp - ref)  # [B, 2]
    margin = rewards[:, 0] - rewards[:, 1]  # [B]
    u = margin - args.gamma if simpo else margin
    value = -logsigmoid(u).sum() / number
    pull = args.beta * torch.sigmoid(-u)[:, None] / number  # [B, 1]
    advantage = torch.cat([pull, -pull], 1) / (tokens if simpo else 1)  # [B, 2]
    stats = {
        "loss/policy": value,
        "dpo/margin": margin.sum() / number,
        "dpo/reward_accuracy": (margin > 0).sum() / number,
        "dpo/chosen_reward": rewards[:, 0].sum() / number,
        "dpo/rejected_reward": rewards[:, 1].sum() / number,
    }
    return value, advantage, stats


def choose(run: Run, bank: Bank, args) -> tuple[list[Pair], dict]:
    """Return the pairs of all questions in order, and metrics of them.

    Raises:
        UserError: there are none.
    """
    rows = {i: [{**row, "correct": row["correct"] and not row["cut"]} for row in bank.rows[i]] for i in bank.needed}
    usable = {i: [row for row in of if not (args.drop_cut and row["cut"])] for i, of in rows.items()}
    numbers = {}
    if args.pairs == "shortest":
        found = [pair for of in usable.values() for pair in pairs_shortest(of, args)]
    elif args.pairs == "overthink":
        found = pairs_overthink(run, bank, usable, args)
    else:
        scored = [pair for of in rows.values() for pair in pairs_dast(of, args)]
        found = [scored[k][1:] for k in widest([margin for margin, _, _ in scored], args.delta)]
        numbers = {"small_margins": len(scored) - len(found)}
    room = run.config.max_position_embeddings

    def fits(row: dict) -> bool:
        return len(run.task.prompts[row["question"]]) + row["tokens"] <= room

    pairs = [pair for pair in found if all(map(fits, pair))]
    if not pairs:
        raise UserError(
            f"the bank in {bank.folder} gives no pair: {len(found)} before those longer than {room} positions were "
            "left out. Take questions that the model sometimes answers right, more --samples, or other --pairs."
        )
    numbers |= {
        "pairs": len(pairs),
        "dropped_pairs": len(found) - len(pairs),
        "wrong_pairs": sum(not chosen["correct"] for chosen, _ in pairs),
        "chosen_cut_share": sum(chosen["cut"] for chosen, _ in pairs) / len(pairs),
        "rejected_cut_share": sum(rejected["cut"] for _, rejected in pairs) / len(pairs),
        "rejected_wrong_share": sum(not rejected["correct"] for _, rejected in pairs) / len(pairs),
        "length_ratio": sum(r["tokens"] for _, r in pairs) / sum(c["tokens"] for c, _ in pairs),
    }
    run.journal.say("pairs: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    return pairs, {f"dpo/{key}": value for key, value in numbers.items()}


def episodes_of(bank: Bank, pairs: list[Pair], numbers: list[int]) -> list[Episode]:
    """Return the answers of these pairs, the chosen one before the rejected one, cut where `cut` says so."""
    rows = [row for n in numbers for row in pairs[n]]
    episodes = bank.episodes([{**row, "tokens": row.get("whole", row["tokens"])} for row in rows])
    for k, (row, e) in enumerate(zip(rows, episodes)):
        if "kept" in row:
            parts = e.response_ids[: row["kept"]], torch.tensor(row["close"]), e.response_ids[row["behind"] :]
            ids, zeros, mask = torch.cat(parts), torch.zeros(row["tokens"]), torch.ones(row["tokens"]).bool()
            episodes[k] = replace(e, response_ids=ids, behaviour_logprobs=zeros, action_mask=mask, forced=None)
    return episodes


def sums(run: Run, episodes: list[Episode], args) -> torch.Tensor:
    """Return the sums [B, 2] fp64 of log pi of (y_w, y_l) under the current weights. Every process must call this."""
    scored = run.learner.logprobs(episodes, args.score_temperature)
    return torch.tensor([float(values.double().sum()) for values in scored], dtype=torch.float64).view(-1, 2)


def reference_sums(run: Run, bank: Bank, pairs: list[Pair], args) -> dict[str, torch.Tensor]:
    """Return `sums` of this process's share of all pairs, by number, from the weights before step 1."""
    found, size = {}, PAIRS_AT_A_TIME * run.ranks
    for start in range(0, len(pairs), size):
        numbers = range(len(pairs))[start : start + size][run.rank :: run.ranks]
        scored = sums(run, episodes_of(bank, pairs, numbers), args)
        found |= {str(n): values.clone() for n, values in zip(numbers, scored)}
    return found


def main() -> None:
    args = parse_args(Args)
    kind = formats.load(args.answer_format)
    run = Run(args, "dpo", kind, offline=True)
    form = kind(run.tokenizer, args)
    if args.pairs == "overthink":
        prompts.control_token(run.tokenizer, "</think>")  # says at once where there is none
    with run.start(form, METRICS):
        learner, needed = run.learner, list(range(len(run.task.questions)))
        sampling = Sampling(args.temperature, args.sample_top_p)
        bank = Bank(run, needed, free_samples(run, args.samples), sampling, args.bank)
        file = run.journal.folder / "pairs.json"
        if run.step == 0:
            chosen, numbers = choose(run, bank, args)
            on_main(run.accelerator, lambda: write_json_atomic(file, chosen))
            numbers |= measure_efficiency(run, args) if args.pairs == "overthink" and run.evaluation_due else {}
            run.journal.write({"step": 0, **numbers})
        pairs = load_json(file)
        if any(bank.rows[row["question"]][row["sample"]]["start"] != row["start"] for pair in pairs for row in pair):
            raise UserError(f"the answers in {bank.folder} are not those that {file} names. Start the run anew.")
        reference = None
        if args.loss == "dpo":
            reference = run.journal.keep_tensors("reference", lambda: reference_sums(run, bank, pairs, args))
        run.evaluate_if_due()

        for step in run.steps():
            # --- the pairs of the step, and what each of their tokens is worth
            numbers = draw(len(pairs), args.pairs_per_step, step, args.seed)[run.rank :: run.ranks]
            episodes = episodes_of(bank, pairs, numbers)
            tokens = torch.tensor([e.num_tokens for e in episodes]).view(-1, 2)
            logp = sums(run, episodes, args)
            ref = reference and torch.cat([logp[:0], *(reference(str(n))[None] for n in numbers)])
            _, advantage, stats = loss(logp, tokens, ref, args.pairs_per_step, args)
            for e, value in zip(episodes, advantage.flatten().tolist()):
                e.advantage = value

            # --- update: one optimiser step
            (minibatch,) = learner.minibatches(episodes, 1, step)
            for mb in minibatch:
                logprobs, _ = learner.score(mb, temperature=args.score_temperature)
                learner.backward(-(mb.advantages * logprobs).sum())
            update = learner.step(rate(args, step))

            # --- log, evaluate, save
            own = {"data/epoch": step * args.pairs_per_step / len(pairs)}
            if run.evaluation_due:
                run.refresh()
                own |= measure_efficiency(run, args) if args.pairs == "overthink" else {}
            run.log_offline(own, [stats], update, minibatch)
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)
