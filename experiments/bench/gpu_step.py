"""One AdaptThink step of the 1.5B architecture on one GPU, split by phase: rollout, grading wait, update, refresh.

The parts are those of a run: `adaptthink.plan_rollouts` and `adaptthink.loss`, Engine, GraderPool, Learner; random
weights in the real shapes, bf16 with fp32 master weights. Only the answers are made up: a random model writes none, so
what is graded is a text of its token ids. So many token ids are stop tokens that the lengths are long-tailed.

    python experiments/bench/gpu_step.py                                   # 16 questions x 16, up to 16,384 tokens
    python experiments/bench/gpu_step.py --short                           # 8 x 16, up to 2,048 tokens
    python experiments/bench/gpu_step.py --smoke                           # a tiny model on the CPU

The first step compiles and captures; the numbers are those of the last one.
"""

import gc
import operator
import sys
import tempfile
import time
from importlib.util import find_spec

from gpu_harness import (
    DEVICE,
    SMOKE,
    config_of,
    free_bytes,
    main_of,
    memory_rates,
    nominal,
    print_table,
    random_model,
    synchronize,
)

# isort: split
import torch

from adaptive_reasoning.adaptthink import Args, advantage, loss, plan_rollouts
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.rollout import Decoder, Engine, Sampling
from adaptive_reasoning.tasks.grader import GraderPool
from adaptive_reasoning.tasks.task import ExactGrader

PHASES = ("rollout", "grade_wait", "update", "refresh")


def options_of(given, folder: str) -> Args:
    """Return the options of the run that is imitated."""
    prompts, longest, budget = (2, 12, 256) if SMOKE else (8, 2048, 16_384) if given.short else (16, 16_384, 32_768)
    return Args(
        prompts_per_step=prompts,
        num_generations=4 if SMOKE else 16,
        max_new_tokens=longest,
        nothinking_max_new_tokens=max(2, longest // 4),
        tokens_per_micro_batch=budget,
        rollout_rows=256,
        dtype="fp32" if SMOKE else "bf16",
        output_dir=folder,
    )


class Modes:
    """AdaptThink's two modes by their first token, without a tokenizer."""

    def opening(self, mode: str) -> tuple[int, ...]:
        return (1,) if mode == "nothinking" else (2,)

    def mode_of(self, response_ids: list[int]) -> str:
        return "nothinking" if response_ids[0] == 1 else "thinking"


def one_step(step: int, args: Args, learner, engine, pool, stop_ids, seconds: dict) -> list[Episode]:
    """Take one step as `adaptthink.main` does; add the seconds of each phase to `seconds`."""

    def lap(phase: str) -> None:
        synchronize()
        now = time.perf_counter()
        seconds[phase] = seconds.get(phase, 0.0) + now - lap.since
        lap.since = now

    synchronize()
    lap.since = time.perf_counter()
    vocab, form = engine.decoder.vocab, Modes()
    generator = torch.Generator().manual_seed(step)
    asked = [
        (i, Question(str(i), "", "7"), torch.randint(3, vocab, (8 if SMOKE else 128,), generator=generator).tolist())
        for i in range(args.prompts_per_step)
    ]

    def on_finish(i: int, completion) -> None:
        pool.submit(" ".join(map(str, completion.response_ids[-20:].tolist())), "7", (step, i))

    requests = plan_rollouts(asked, form, args, stop_ids, step)
    completions = engine.run(requests, Sampling(args.temperature), on_finish)
    lap("rollout")
    grades = pool.drain()
    lap("grade_wait")
    episodes = [Episode.of(c) for c in completions]
    for i, e in enumerate(episodes):
        e.mode, e.reward = form.mode_of(e.response_ids.tolist()), float(grades[step, i].correct)
        e.advantage = advantage(e, 0.5, args)
    for minibatch in learner.minibatches(episodes, 1, step, skip_zero_advantage=True):
        for mb in minibatch:
            logprobs, _ = learner.score(mb)
            mb.old_logprobs = torch.where(mb.forced, mb.old_logprobs, logprobs.detach())
            learner.backward(loss(logprobs, mb, minibatch.counts, args)[0])
            if "gap" not in seconds:  # of the engine's log-probs to the learner's, before the first update
                gap = (logprobs.detach() - mb.behaviour_logprobs).abs()[~mb.forced]
                seconds["gap"] = float(gap.mean())
        seconds["micro_batches"] = len(minibatch)
        learner.step(args.learning_rate)
    lap("update")
    engine.refresh(learner.named_weights())
    lap("refresh")
    return episodes


def bench_step(given) -> dict:
    if find_spec("accelerate") is None:
        print("accelerate is not installed: left out")
        return {"error": "accelerate is not installed"}
    from adaptive_reasoning.learner.learner import Learner
    from adaptive_reasoning.learner.runtime import make_accelerator

    rates, found = memory_rates(), {}
    with tempfile.TemporaryDirectory() as folder:
        args = options_of(given, folder)
        config = config_of("1.5B")
        model = random_model(config, torch.float32)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        accelerator = make_accelerator(args)
        learner = Learner(args, model, accelerator)
        decoder = Decoder(config, DEVICE, torch.float32 if SMOKE else torch.bfloat16)
        parameters = sum(p.numel() for p in model.parameters())
        # What the update will need besides weights and replica, that are there already: Adam, gradients, the bf16 copy
        # of autocast, and activations (the plan of `preflight`).
        later = parameters * (8 + 4 + 2) + (8 << 30) + 700_000 * (args.tokens_per_micro_batch)
        cache = 2**26 if DEVICE == "cpu" else max(4 << 30, free_bytes() - later)
        engine = Engine(decoder, args.rollout_rows, cache, sync_every=1 if DEVICE == "cpu" else 8)
        engine.refresh(learner.named_weights())
        # A random model takes every token about equally often: k stop ids end a response after vocab / k tokens.
        stop_ids = tuple(range(3, 3 + max(1, round(config.vocab_size / (args.max_new_tokens / 4)))))
        # A check that the workers can import without torch; in this process where pebble is not installed.
        with GraderPool(2, 10.0, operator.eq) if find_spec("pebble") else ExactGrader() as pool:
            for step in range(2):
                seconds = {}
                episodes = one_step(step, args, learner, engine, pool, stop_ids, seconds)
                found.setdefault("logprob_gap", seconds.pop("gap"))
        tokens = sum(e.num_tokens for e in episodes)
        learned = sum(len(e.prompt_ids) + e.num_tokens for e in episodes if e.advantage)
        total = sum(seconds[phase] for phase in PHASES)
        found |= {phase: round(seconds[phase], 3) for phase in PHASES} | {"step": round(total, 3)}
        found |= {"responses": len(episodes), "tokens": tokens, "longest": max(e.num_tokens for e in episodes)}
        found |= {"tokens_per_s": round(tokens / seconds["rollout"], 1), "micro_batches": seconds["micro_batches"]}
        # Forward, forward once more (checkpointing) and backward: 8 FLOP a parameter and token.
        flops = 8 * parameters * learned / seconds["update"]
        found["update_tflops"] = round(flops / 1e12, 1)
        found["of_nominal_flops"] = nominal()[1] and round(flops / nominal()[1], 3)
        if DEVICE == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        found |= {"parameters": parameters, "attention": model.config._attn_implementation}
        found["grader"] = type(pool).__name__
        model = learner = engine = decoder = None
        gc.collect()
        free_bytes()
    rows = [[phase, found[phase], f"{found[phase] / found['step']:.0%}"] for phase in (*PHASES, "step")]
    print_table([f"{found['responses']} responses, {tokens} tokens", "seconds", "share"], rows)
    said = ("tokens_per_s", "update_tflops", "of_nominal_flops", "logprob_gap", "peak_gib", "attention")
    print(", ".join(f"{key} {found[key]}" for key in said if key in found))
    return {**rates, **found}


def options(parser) -> None:
    parser.add_argument("--short", action="store_true", help="fewer and shorter responses")


if __name__ == "__main__":
    sys.exit(main_of({"step": bench_step}, __doc__, "gpu_step", more=options))
