"""Time of a step and of a run, from nominal figures of the GPU and named assumptions. Nothing is measured on a GPU.

    decode    a step reads all weights and the keys and values of all live rows once: bytes / (bandwidth x share); not
              below its FLOPs; plus the host's work. Rows leave as their responses end, so the batch shrinks in the tail
    prefill   2 FLOPs a parameter and prompt token; each question's prompt once
    update    forward 2, backward 4, recomputation of gradient checkpointing 2 FLOPs a parameter and token, attention,
              and the output head, whose logits the backward pass computes again; critic and reference as well
    exchange  ZeRO-3 gathers the weights twice a micro-batch and scatters the gradients once, not hidden behind compute
The prediction for this machine's CPU is compared with a run by experiments/bench/bench_plan.py.
"""

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from adaptive_reasoning.plan.machine import Machine
from adaptive_reasoning.plan.memory import (
    has_critic,
    kv_bytes_per_token,
    rolls_out,
    state_bytes_per_parameter,
    trained_parameters,
)
from adaptive_reasoning.plan.shapes import Shapes
from adaptive_reasoning.tasks.math import BENCHMARKS

EVAL_QUESTIONS = {"gsm8k": 1319, "math500": 500, "math": 5000, "csqa": 1221, "obqa": 500, "svamp": 300,
                  "aime24": 30, "aime25": 30}  # fmt: skip
TRAINING_QUESTIONS = {
    "agentica-org/DeepScaleR-Preview-Dataset": 40_315,
    "tau/commonsense_qa,openai/gsm8k:main,DigitalLearningGmbH/MATH-lighteval": 24_714,
    "orz_57k.jsonl,orz_72k.jsonl": 129_000,
}
MOST_SIMULATED = 4096  # responses of a process; more of them take as much longer as there are more
TOKENS_AT_ONCE = 256  # the longest response is decoded in so many strides


@dataclass
class Assumptions:
    """What the hours rest on."""

    prompt_tokens: int = 150
    """Mean tokens of a prompt."""
    mean_response_tokens: int = 0
    """Mean tokens of a response, of a dialogue all turns together (0: mean_share of --max_new_tokens)."""
    mean_share: float = 0.15
    """Mean response as a share of --max_new_tokens, where mean_response_tokens is not given."""
    length_spread: float = 1.0
    """Standard deviation of the response length over its mean; lengths are log-normal, cut at --max_new_tokens."""
    decode_share: float = 0.6
    """Share of the memory bandwidth that decoding reaches."""
    decode_flops_share: float = 0.5
    """Share of the bf16 FLOPs that decoding can reach, where it is not bound by bandwidth."""
    decode_overhead_ms: float = 1.0
    """Milliseconds that a decode step takes beside: launching its graph, book-keeping."""
    prefill_share: float = 0.4
    """Share of the bf16 FLOPs that prefill reaches."""
    update_share: float = 0.35
    """Share of the bf16 FLOPs that forward and backward passes reach (recomputation counted as work)."""
    learned_share: float = 1.0
    """Share of the responses that the update learns from (those of advantage zero may be left out)."""
    link_share: float = 0.7
    """Share of the bandwidth between GPUs that an exchange reaches."""
    network_gbs: float = 50.0
    """GB/s that each GPU has to other machines (InfiniBand, 400 Gbit/s a GPU)."""
    host_gbs: float = 20.0
    """GB/s of CPU memory and PCIe for each GPU, where the optimiser is kept in CPU memory."""
    disk_gbs: float = 1.0
    """GB/s at which a checkpoint is written."""
    questions: int = 0
    """Training questions (0: those of the data sets that a plan knows)."""
    eval_responses: int = 0
    """Responses of one evaluation in one setting (0: those of the built-in benchmarks among --eval_data)."""
    eval_settings: int = 3
    """Settings evaluated before and after training (in between the adaptive one alone)."""
    cpu_gflops: float = 50.0
    """Matrix products of a plan without a GPU: 1e9 FLOP per second, fp32."""
    cpu_gbs: float = 10.0
    """Memory of a plan without a GPU: GB per second."""


@dataclass(frozen=True)
class Line:
    """One line of the hours."""

    name: str
    seconds: float
    how: str


@dataclass(frozen=True)
class Hours:
    """What `plan_hours` found."""

    step: list[Line]  # parts of one training step
    run: list[Line]  # parts of the run; the first is all steps
    epoch: int | None  # steps of one pass over the questions; None: their number is not known
    unknown: tuple[str, ...]  # evaluation sets whose size a plan does not know: not counted
    rows_mean: float  # live rows of a decode step, on average

    @property
    def step_seconds(self) -> float:
        return sum(line.seconds for line in self.step)

    @property
    def run_seconds(self) -> float:
        return sum(line.seconds for line in self.run)


# --------------------------------------------------------------------------------------------------------------- parts


def mean_response(args, a: Assumptions) -> float:
    return min(a.mean_response_tokens or a.mean_share * args.max_new_tokens, args.max_new_tokens)


def lengths(number: int, mean: float, spread: float, cap: int) -> np.ndarray:
    """Return `number` response lengths in a fixed, mixed order: quantiles of a log-normal distribution cut at `cap`.

    The cut takes some of the mean away; the scale is raised until the mean of what is left is `mean` again.
    """
    if number == 0 or mean >= cap:
        return np.full(number, float(cap))
    sigma = np.sqrt(np.log1p(spread**2))
    z = normal_quantiles(number)
    low, high = 0.0, np.log(cap) + 8 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        found = np.clip(np.exp(middle + sigma * z), 1, cap).mean()
        low, high = (middle, high) if found < mean else (low, middle)
    return np.random.default_rng(0).permutation(np.clip(np.exp(low + sigma * z), 1, cap))


@lru_cache
def normal_quantiles(number: int) -> np.ndarray:
    """Return the quantiles of a standard normal distribution at (i + 1/2) / number."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / number) for i in range(number)])


def decode_seconds(
    responses: np.ndarray, prompt: float, rows: int, shapes: Shapes, value_bytes: int, bandwidth: float, flops: float,
    overhead: float,
) -> tuple[float, float]:  # fmt: skip
    """Return (seconds, mean number of live rows) of decoding all responses, `rows` at most side by side.

    A row that ends makes room for the next response; behind the last one the batch shrinks, down to the longest alone.

    Args:
        bandwidth, flops: what is reached of them, per second; overhead: seconds of each step beside.
    """
    if len(responses) == 0:
        return 0.0, 0.0
    weights, per_kv = shapes.multiplied * value_bytes, kv_bytes_per_token(shapes, value_bytes)
    stride = max(1.0, float(responses.max()) / TOKENS_AT_ONCE)
    waiting, left, context = list(responses[::-1]), np.empty(0), np.empty(0)
    seconds = steps = row_steps = 0.0
    while waiting or len(left):
        new = [waiting.pop() for _ in range(min(rows - len(left), len(waiting)))]
        left, context = np.append(left, new), np.append(context, np.full(len(new), prompt))
        n, go = len(left), min(stride, float(left.max()))
        read = (weights + (context.sum() + n * go / 2) * per_kv) / bandwidth
        seconds += go * (max(read, 2 * shapes.multiplied * n / flops) + overhead)
        steps, row_steps = steps + go, row_steps + np.minimum(left, go).sum()
        left, context = left - go, context + go
        alive = left > 0
        left, context = left[alive], context[alive]
    return seconds, row_steps / steps


def forward_flops(shapes: Shapes, total: np.ndarray, responses: np.ndarray) -> tuple[float, float]:
    """Return the FLOPs of one forward pass: (layers with causal attention, output head).

    Args:
        total: tokens of each sequence, prompt included; responses: those that the head scores.
    """
    embeddings = shapes.embedding * (1 if shapes.tied else 2)
    layers = 2 * (shapes.parameters - embeddings) * total.sum()
    attention = 2 * shapes.layers * shapes.heads * shapes.head_dim * (total**2).sum()  # 4 for q k and p v, half of it
    return float(layers + attention), float(2 * shapes.embedding * responses.sum())


def gather_seconds(nbytes: float, machine: Machine, a: Assumptions) -> float:
    """Return the seconds until every GPU holds `nbytes` of which each had a share (or the reverse, a reduction)."""
    n, nodes = machine.processes, machine.nodes
    if n == 1:
        return 0.0
    inside = nbytes * (machine.gpus - 1) / machine.gpus / machine.gpu.link
    between = nbytes * (nodes - 1) / nodes / (machine.gpus * a.network_gbs * 1e9)
    return max(inside, between) / a.link_share


def checkpoint_bytes(args, shapes: Shapes, zero3: bool) -> int:
    """Return the size of one checkpoint: weights, Adam moments and, under ZeRO-3, fp32 masters beside the weights.

    Moments and masters are those of the trained parameters; a critic has all of it once more.
    """
    kept, trained = state_bytes_per_parameter(args.dtype, zero3), trained_parameters(args, shapes)
    weights = shapes.parameters * kept["weight" if zero3 else "fp32 weight"]
    return (weights + trained * (kept["Adam"] + kept.get("fp32 master", 0))) * (1 + has_critic(args))


# ----------------------------------------------------------------------------------------------------------------- all


def reached(machine: Machine, a: Assumptions) -> tuple[float, float]:
    """Return the nominal (bandwidth in bytes, FLOPs) per second of one GPU, or of the CPU."""
    if machine.gpu is None:
        return a.cpu_gbs * 1e9, a.cpu_gflops * 1e9
    return machine.gpu.bandwidth, machine.gpu.flops


def value_bytes(args, machine: Machine) -> int:
    return 2 if args.dtype == "bf16" and machine.gpu else 4


def rollout_seconds(
    args, shapes: Shapes, machine: Machine, a: Assumptions, arena_bytes: int | None, number: int
) -> tuple[float, float, int]:
    """Return (seconds, mean number of live rows, most rows) of decoding `number` responses on one GPU."""
    b, mean = value_bytes(args, machine), mean_response(args, a)
    tokens = (arena_bytes or 1 << 62) / kv_bytes_per_token(shapes, b)
    few = min(number, MOST_SIMULATED)
    rows = min(args.rollout_rows, few, max(1, int(tokens / (a.prompt_tokens + mean))))
    bandwidth, flops = reached(machine, a)
    seconds, live = decode_seconds(
        lengths(few, mean, a.length_spread, args.max_new_tokens), a.prompt_tokens, rows, shapes, b,
        bandwidth * a.decode_share, flops * a.decode_flops_share, a.decode_overhead_ms / 1e3,
    )  # fmt: skip
    return seconds * number / max(few, 1), live, rows


def plan_step(
    args, shapes: Shapes, machine: Machine, a: Assumptions, arena_bytes: int | None
) -> tuple[list[Line], float]:
    """Return (parts of one training step, mean number of live rows)."""
    n, mean = machine.processes, mean_response(args, a)
    if not rolls_out(args):
        own = max(1, -(-args.batch_size // n))
        return update_lines(args, shapes, machine, a, lengths(own, mean, a.length_spread, args.max_new_tokens)), 0.0
    own = max(1, -(-args.prompts_per_step * args.num_generations // n))
    seconds, live, rows = rollout_seconds(args, shapes, machine, a, arena_bytes, own)
    how = f"{own:,} responses of {mean:,.0f} tokens a GPU, {rows} rows at most, {live:.0f} on average"
    asked = -(-args.prompts_per_step // n) * a.prompt_tokens
    prefill = 2 * shapes.multiplied * asked / (reached(machine, a)[1] * a.prefill_share)
    lines = [Line("decode", seconds, how), Line("prefill", prefill, f"{asked:,} tokens")]
    return lines + update_lines(
        args, shapes, machine, a, lengths(own, mean, a.length_spread, args.max_new_tokens)
    ), live


def plan_hours(args, shapes: Shapes, machine: Machine, a: Assumptions, arena_bytes: int | None) -> Hours:
    """Return the time of a step and of the run.

    Args:
        arena_bytes: memory for keys and values of one GPU, from the memory plan; bounds the rows side by side.
    """
    n, steps, known = machine.processes, args.max_steps, questions_of(args, a)
    step, live = plan_step(args, shapes, machine, a, arena_bytes)
    run = [Line("training", steps * sum(line.seconds for line in step), f"{steps:,} steps")]
    unknown: tuple[str, ...] = ()
    if rolls_out(args):
        number, unknown = evaluation(args, a)
        between = (steps - 1) // args.eval_every if args.eval_every else 0  # the one after the last step is whole
        times = 2 * a.eval_settings + between
        once = rollout_seconds(args, shapes, machine, a, arena_bytes, -(-number // n))[0]
        run.append(Line("evaluation", times * once, f"{times} x {number:,} responses"))
        if getattr(args, "baseline", "") == "reference" and not args.ref_results:
            met = min(known or 1 << 62, steps * args.prompts_per_step)
            own = -(-met * args.ref_samples // n)
            before = rollout_seconds(args, shapes, machine, a, arena_bytes, own)[0]
            run.append(Line("reference", before, f"before step 1: {args.ref_samples} x {met:,} responses"))
    size = checkpoint_bytes(args, shapes, n > 1)
    saves = steps // args.save_every + (steps % args.save_every != 0) if args.save_every else 1
    run.append(Line("checkpoints", saves * size / (a.disk_gbs * 1e9), f"{saves} x {size / 1e9:.1f} GB"))
    each = args.prompts_per_step if rolls_out(args) else args.batch_size
    return Hours(step, run, known and max(1, known // each), unknown, live)


def update_lines(args, shapes: Shapes, machine: Machine, a: Assumptions, responses: np.ndarray) -> list[Line]:
    """Return the lines of the update of one step on one GPU, which learns from `responses` (their lengths)."""
    P, n, b = shapes.parameters, machine.processes, value_bytes(args, machine)
    bandwidth, flops = reached(machine, a)
    responses = responses * a.learned_share
    total = responses + a.prompt_tokens * a.learned_share
    layers, head = forward_flops(shapes, total, responses)
    again = int(args.gradient_checkpointing)
    work, parts = (3 + again) * layers + 4 * head, [f"{3 + again} passes"]
    minibatches = getattr(args, "minibatches_per_step", 1)
    forwards = 0
    if minibatches > 1 and getattr(args, "old_logprobs", "learner") == "learner":
        forwards, parts = forwards + 1, [*parts, "old log-probs"]
    if getattr(args, "kl_coef", 0):
        forwards, parts = forwards + 1, [*parts, "reference"]
    work += forwards * (layers + head)
    critic = has_critic(args)
    if critic:
        work, parts = work + (4 + again) * layers, [*parts, "critic and its values"]
    seconds = work / (flops * a.update_share)
    lines = [Line("update", seconds, f"{total.sum():,.0f} tokens a GPU: {', '.join(parts)}")]
    pieces = max(minibatches, -(-int(total.sum()) // args.tokens_per_micro_batch))
    critic_pieces = max(pieces, getattr(args, "critic_minibatches", 0)) if critic else 0
    if n > 1:
        passes = 3 * pieces + forwards * pieces + 4 * critic_pieces + int(rolls_out(args))
        how = f"{passes} times {P * b / 1e9:.1f} GB between GPUs ({pieces} micro-batches)"
        lines.append(Line("exchange", passes * gather_seconds(P * b, machine, a), how))
    own = trained_parameters(args, shapes) / n
    optimised = own * (minibatches + (args.critic_minibatches if critic else 0))
    if getattr(args, "offload_optimizer", False):
        how = "in CPU memory: 36 bytes a parameter"
        lines.append(Line("optimiser", optimised * 36 / (a.host_gbs * 1e9), how))
    else:
        how = "28 bytes a parameter"
        lines.append(Line("optimiser", optimised * 28 / (bandwidth * a.decode_share), how))
    return lines


def evaluation(args, a: Assumptions) -> tuple[int, tuple[str, ...]]:
    """Return (responses of one evaluation in one setting, names of the sets that are not counted)."""
    if a.eval_responses:
        return a.eval_responses, ()
    names = [name.strip() for name in args.eval_data.split(",") if name.strip()]
    if args.task == "chain":
        return args.chain_eval_questions, ()
    number = 0
    for name in set(names) & set(EVAL_QUESTIONS):
        found = min(EVAL_QUESTIONS[name], args.eval_limit or EVAL_QUESTIONS[name])
        number += found * max(BENCHMARKS[name].samples or 1, args.eval_samples)
    return number, tuple(name for name in names if name not in EVAL_QUESTIONS)


def questions_of(args, a: Assumptions) -> int | None:
    """Return the number of training questions, None where it is not known."""
    if args.task == "chain":
        return a.questions or args.chain_questions
    known = a.questions or TRAINING_QUESTIONS.get(args.data)
    return min(known, args.train_limit or known) if known else None
