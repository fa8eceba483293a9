"""Rollout on a GPU: tokens per second of the engine, random weights in the real shapes of 1.5B and 7B, bf16.

 decode   batches of 1, 32, 128 and 256 rows at contexts of 1k, 2k and 8k tokens, against the time that reading the
          weights and all keys and values once takes at the rate of the memory (the floor)
 mix      AdaptThink's lengths, half short and half log-normal, against `generate` and the continuous batching of
          transformers, and vLLM and nano-vLLM where they are installed

    python experiments/bench/gpu_rollout.py                 # both
    python experiments/bench/gpu_rollout.py decode --short  # the sizes that `make gpu-check` has the time for
    python experiments/bench/gpu_rollout.py --smoke         # tiny sizes on the CPU

There is no stop token: a request is done when its own budget is used up, and only tokens within it count.
"""

import gc
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec

from gpu_harness import (
    DEVICE,
    SMOKE,
    config_of,
    free_bytes,
    gpu_name,
    main_of,
    memory_rates,
    of_floor,
    print_table,
    random_decoder,
    random_model,
    synchronize,
)

# isort: split
import numpy as np
import torch

from adaptive_reasoning.rollout import Engine, Request, Sampling

SYNC_EVERY = 1 if DEVICE == "cpu" else 8
MARK = 16  # tokens after which the clock starts
STEPS = 16 if SMOKE else 128  # that are measured
ROOM = 6 * 2**30  # left free beside the cache: logits, prefill, graphs


def make_engine(decoder, rows: int) -> tuple[Engine, int]:
    """Return an engine whose cache takes the memory that is free, and the bytes of it."""
    cache = 2**28 if DEVICE == "cpu" else max(2**30, free_bytes() - ROOM)
    return Engine(decoder, max_rows=rows, cache_bytes=cache, sync_every=SYNC_EVERY), cache


def error_of(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {error}"[:300]}


# -------------------------------------------------------------------------------------------------------------- decode


def weight_bytes(decoder) -> int:
    """Return the bytes of weights that one step reads: all of them but the input embedding, of which it takes rows."""
    views = decoder.destinations.items()
    embedding = 0 if decoder.tied else decoder.embed.nbytes
    return sum(view.numel() * view.element_size() for _, view in views) - embedding


def seconds_of_steps(engine: Engine, rows: int, context: int, vocab: int) -> float:
    """Return the seconds that STEPS decode steps of `rows` rows take, the first at `context` tokens.

    One row more ends after MARK tokens and starts the clock, so that prefill is no part of it; all others end together.
    """
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, vocab, (rows + 1, max(1, context - MARK))).tolist()
    requests = [Request(p, MARK + STEPS, (), i) for i, p in enumerate(prompts)]
    requests[-1].max_new_tokens = MARK
    times = {}

    def on_finish(i: int, completion) -> None:
        synchronize()
        times.setdefault(len(completion.response_ids), time.perf_counter())

    engine.run(requests, Sampling(0.6), on_finish)
    return times[MARK + STEPS] - times[MARK]


def bench_decode(args) -> dict:
    rates, rows, results = memory_rates(), [], {}
    sizes = ("1.5B",) if SMOKE else ("1.5B", "7B")
    cases = [(size, B, context) for size in sizes for context in (1024, 2048, 8192) for B in (1, 32, 128, 256)]
    if args.short:
        cases = [("1.5B", B, context) for B, context in ((1, 2048), (32, 2048), (128, 2048), (256, 2048), (32, 8192))]
        cases.append(("7B", 128, 2048))
    if SMOKE:
        cases = [("1.5B", B, 40) for B in (1, 3)]
    most, longest = max(B for _, B, _ in cases) + 1, max(context for _, _, context in cases) + STEPS
    engine, loaded = None, ""
    for size, B, context in cases:
        if size != loaded:  # one engine a model, so that kernels are compiled and graphs captured once
            engine = decoder = None
            gc.collect()
            decoder, loaded = random_decoder(config_of(size)), size
            decoder.reserve_positions(longest)
            engine, room = make_engine(decoder, most)
        case, kv = f"{size}/{B}x{context}", decoder.cache_bytes_per_token()
        needed = (B + 1) * (context + MARK + STEPS) * kv
        try:
            if needed > room:
                raise MemoryError(f"keys and values of {needed / 2**30:.0f} GiB do not fit")
            seconds_of_steps(engine, B, 64, decoder.vocab)
            seconds = seconds_of_steps(engine, B, context, decoder.vocab)
        except Exception as error:  # the report is worth more than the first failure
            results[case] = error_of(error)
            rows.append([case, results[case]["error"], *[""] * 4])
            continue
        mean = context + STEPS / 2
        floor = weight_bytes(decoder) + B * mean * kv
        found = {"tokens_per_s": round(B * STEPS / seconds, 1), "ms_per_step": round(1e3 * seconds / STEPS, 3)}
        found |= {"gib_per_step": round(floor / 2**30, 2), **of_floor(floor, seconds / STEPS, rates)}
        results[case] = found
        rows.append([case, *found.values()])
    print_table(["decode", "tokens/s", "ms a step", "GiB a step", "of nominal", "of copy"], rows)
    return {**rates, **results}


# ----------------------------------------------------------------------------------------------------------------- mix


def in_engine(config, work, rates: dict) -> tuple[float, int, dict]:
    """Return (seconds, tokens, how full the batch and the memory's rate were) of our engine, the better of two runs."""
    n, seconds, decoder = len(work.prompts), [], random_decoder(config)
    engine, _ = make_engine(decoder, n)
    for budgets in ([8] * n, work.budgets, work.budgets):  # the first compiles kernels and captures graphs
        requests = [Request(p, b, (), i) for i, (p, b) in enumerate(zip(work.prompts, budgets))]
        synchronize()
        start = time.perf_counter()
        done = engine.run(requests, Sampling(0.6))
        synchronize()
        seconds.append(time.perf_counter() - start)
    assert sum(len(c.response_ids) for c in done) == work.tokens
    kv = sum(b * (len(p) + b / 2) for p, b in zip(work.prompts, work.budgets)) * decoder.cache_bytes_per_token()
    floor, best = engine.stats["steps"] * weight_bytes(decoder) + kv, min(seconds[1:])
    return best, work.tokens, {"rows_mean": round(engine.stats["rows_mean"], 1), **of_floor(floor, best, rates)}


def in_generate(model, work) -> int:
    """Run all requests as one left-padded batch to the longest budget; return the tokens that count."""
    width = max(map(len, work.prompts))
    ids = torch.zeros(len(work.prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(work.prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    model.generate(
        ids.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=max(work.budgets), use_cache=True,
        do_sample=True, temperature=0.6, top_k=0, top_p=1.0,
    )  # fmt: skip
    return work.tokens


def in_continuous_batching(model, work, deadline: float) -> int:
    """Run the continuous batching of transformers; starting its thread and its cache is part of the time here."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max(work.budgets), eos_token_id=-1, pad_token_id=0, do_sample=True, temperature=0.6, top_k=0,
        top_p=1.0,
    )  # fmt: skip
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        for i, (prompt, budget) in enumerate(zip(work.prompts, work.budgets)):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=budget)
        left, tokens, end = len(work.prompts), 0, time.monotonic() + deadline
        while left:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                left, tokens = left - 1, tokens + len(result.generated_tokens)
            elif time.monotonic() > end or (result is None and not manager.is_running()):
                raise RuntimeError(f"{left} requests left after {deadline:.0f} s, or its thread has ended")
    return tokens


def other_engine(name: str, config, work) -> float:
    """Return the seconds of vLLM or nano-vLLM, which share one interface; loading and a first run are not counted."""
    from importlib import import_module

    module = import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        random_model(config).save_pretrained(folder)
        free_bytes()
        options = {"max_model_len": max(work.budgets) + 64, "enforce_eager": False}
        if name == "vllm":
            options |= {"skip_tokenizer_init": True, "gpu_memory_utilization": 0.5, "dtype": "bfloat16"}
        engine = module.LLM(folder, **options)
        prompts = [{"prompt_token_ids": p} for p in work.prompts] if name == "vllm" else work.prompts
        seconds = 0.0
        for budgets in ([8] * len(work.budgets), work.budgets):
            more = {"detokenize": False} if name == "vllm" else {}
            sampling = [module.SamplingParams(temperature=0.6, max_tokens=b, ignore_eos=True, **more) for b in budgets]
            start = time.perf_counter()
            engine.generate(prompts, sampling, use_tqdm=False)
            synchronize()
            seconds = time.perf_counter() - start
    return seconds


def bench_mix(args) -> dict:
    from bench_rollout import Workload  # after gpu_harness, which decides whether there is a GPU

    rates = memory_rates()
    n, longest = (4, 24) if SMOKE else (128, 1024) if args.short else (256, 4096)
    work, config = Workload(n, config_of("1.5B").vocab_size, longest), config_of("1.5B")
    results, rows = {"requests": n, "longest": max(work.budgets), "tokens": work.tokens}, []

    def note(side: str, seconds: float, tokens: int, more: dict | None = None) -> None:
        results[side] = {"seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1)} | (more or {})

    def attempt(side: str, call) -> None:
        synchronize()
        start = time.perf_counter()
        try:
            tokens = call()
            synchronize()
            note(side, time.perf_counter() - start, tokens)
        except Exception as error:  # the report is worth more than the first failure
            results[side] = error_of(error)

    try:
        note("engine", *in_engine(config, work, rates))
    except Exception as error:  # the report is worth more than the first failure
        results["engine"] = error_of(error)
    gc.collect()
    free_bytes()
    model = random_model(config)
    model.generation_config.eos_token_id = None
    first = Workload(n, config.vocab_size, min(16, longest))
    attempt("generate, first run", lambda: in_generate(model, first))
    attempt("generate", lambda: in_generate(model, work))
    if args.short:
        results["continuous batching"] = {"error": "left out with --short"}
    else:
        attempt("continuous batching", lambda: in_continuous_batching(model, work, 300.0))
    model = None
    gc.collect()
    free_bytes()
    for name in ("vllm", "nanovllm"):
        if find_spec(name) is None:
            results[name] = {"error": "not installed"}
        elif gpu_name() and not args.short:
            try:
                note(name, other_engine(name, config, work), work.tokens)
            except Exception as error:  # the report is worth more than the first failure
                results[name] = error_of(error)
    for side in ("engine", "generate", "continuous batching", "vllm", "nanovllm"):
        found = results.get(side, {})
        times = None
        if "seconds" in found and "seconds" in results["engine"]:
            times = found["times_as_long"] = round(found["seconds"] / results["engine"]["seconds"], 2)
        rows.append([side, found.get("error", found.get("seconds")), found.get("tokens_per_s"), times])
    lengths = f"median {statistics.median(work.budgets):.0f}, longest {max(work.budgets)}"
    print_table([f"{n} requests, {work.tokens} tokens, {lengths}", "seconds", "tokens/s", "times as long"], rows)
    return {**rates, **results}


def options(parser) -> None:
    parser.add_argument("--short", action="store_true", help="fewer and smaller cases")


if __name__ == "__main__":
    sys.exit(main_of({"decode": bench_decode, "mix": bench_mix}, __doc__, "gpu_rollout", more=options))
