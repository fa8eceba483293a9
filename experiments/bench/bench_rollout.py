"""Rollout: tokens per second of our loop against `generate` and the continuous batching of transformers.

The same requests, the same weights (a Qwen2 of 6.8M parameters, fp32), in turns in the same process. Half of the
requests are short (8 to 32 tokens), half log-normal up to ten times as long (316). There is no stop token: a request is
done when its own budget is used up, and only tokens within a request's budget count.

`generate` runs a batch until its longest row is done. It is tried with a growing and with a static cache and with one
or several batches, and the fastest of these is what we compare with. Two further rows know or do more: `generate`
with the requests sorted by length, which needs the lengths beforehand (nobody knows them when a stop token decides),
and transformers' own continuous batching.
"""

import sys
import time
from statistics import NormalDist

import harness
import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling

SHORT, LONGEST = (8, 32), 316
PROMPT = (16, 48)
MEDIAN, SIGMA = 100, 0.6  # of the log-normal half


class Workload:
    """n prompts with their budgets. Lengths are quantiles: the same mix whatever n is."""

    def __init__(self, n: int, vocab: int, longest: int = LONGEST):
        rng = np.random.default_rng(n)
        half = n // 2
        z = np.array([NormalDist().inv_cdf((i + 0.5) / (n - half)) for i in range(n - half)])
        long = np.clip(MEDIAN * np.exp(SIGMA * z), SHORT[1] + 1, LONGEST) * longest / LONGEST
        short = np.linspace(*SHORT, half) * longest / LONGEST
        self.budgets = rng.permutation(np.concatenate([short, long]).round().astype(int).clip(1)).tolist()
        self.prompts = [rng.integers(0, vocab, k).tolist() for k in rng.integers(PROMPT[0], PROMPT[1] + 1, n)]
        self.tokens = sum(self.budgets)
        self.sorted = np.argsort(-np.array(self.budgets), kind="stable").tolist()

    def requests(self) -> list[Request]:
        return [Request(p, b, (), seed) for seed, (p, b) in enumerate(zip(self.prompts, self.budgets))]


def options(sampled: bool) -> dict:
    """Return the sampling options of transformers that mean the same as our `Sampling`."""
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}


def generate(model, work: Workload, index: list[int], sampled: bool, static: bool, **more):
    """Run the requests of `index` as one left-padded batch to its longest budget; return what `generate` returns."""
    width = max(len(work.prompts[i]) for i in index)
    ids = torch.zeros(len(index), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(index):
        n = len(work.prompts[i])
        ids[row, width - n :] = torch.tensor(work.prompts[i])
        mask[row, width - n :] = 1
    if static:
        more["cache_implementation"] = "static"
    longest = max(work.budgets[i] for i in index)
    return model.generate(ids, attention_mask=mask, max_new_tokens=longest, use_cache=True, **options(sampled), **more)


def in_batches(model, work: Workload, order: list[int], size: int, sampled: bool, static: bool) -> None:
    for start in range(0, len(order), size):
        generate(model, work, order[start : start + size], sampled, static)


class ContinuousBatching:
    """transformers' continuous batching; starting its thread and its cache is not part of the time.

    More than 64 rows make it slower here (on the CPU each row attends to the pages of all), and left to itself its
    cache takes most of the machine's memory.
    """

    ROWS, PAGE = 64, 32

    def __init__(self, model, work: Workload, sampled: bool):
        config = GenerationConfig(max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0, **options(sampled))
        self.rows = min(self.ROWS, len(work.prompts))
        memory = ContinuousBatchingConfig(
            page_size=self.PAGE,
            num_blocks=self.rows * (-(-(LONGEST + PROMPT[1]) // self.PAGE) + 1),
            max_requests_per_batch=self.rows,
            max_batch_tokens=1024,
        )
        self.context = model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=memory
        )
        self.manager = self.context.__enter__()
        self.runs = 0

    def run(self, work: Workload) -> None:
        self.runs += 1
        for i, (prompt, budget) in enumerate(zip(work.prompts, work.budgets)):
            self.manager.add_request(prompt, request_id=f"{self.runs}-{i}", max_new_tokens=budget)
        left, tokens = len(work.prompts), 0
        while left:
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                left, tokens = left - 1, tokens + len(result.generated_tokens)
            elif result is None and not self.manager.is_running():
                raise RuntimeError("its thread has ended")
        assert tokens == work.tokens, f"continuous batching made {tokens} tokens, asked for {work.tokens}"

    def close(self) -> None:
        self.context.__exit__(None, None, None)


def compare_greedy(model, engine: Engine, work: Workload) -> dict:
    """Assert that greedy tokens are those of `generate`, and return the largest difference of their log-probs.

    Two tokens whose logits differ by less than rounding may swap; such a place is counted as a tie and its row is
    compared no further.
    """
    out = generate(
        model, work, range(len(work.budgets)), False, False, return_dict_in_generate=True, output_logits=True
    )
    logits = torch.stack(out.logits, 1)  # [B, T, V]
    theirs = out.sequences[:, -logits.shape[1] :]
    gap, ties = 0.0, 0
    for row, c in enumerate(engine.run(work.requests(), Sampling(0.0))):
        n = len(c.response_ids)
        differ = (theirs[row, :n] != c.response_ids).nonzero().flatten().tolist()
        if differ:
            n = differ[0]
            two = logits[row, n].topk(2)
            assert float(two.values[0] - two.values[1]) < 1e-4 and c.response_ids[n] in two.indices, (
                f"greedy token {n} of request {row} is {int(c.response_ids[n])}, generate says {int(theirs[row, n])}"
            )
            ties += 1
        picked = logits[row, :n].log_softmax(-1).gather(-1, theirs[row, :n, None])[:, 0]
        gap = max(gap, float((picked - c.logprobs[:n]).abs().max()) if n else 0.0)
    tokens = sum(work.budgets)
    print(f"greedy tokens equal generate's: {tokens} tokens of {len(work.budgets)} requests, {ties} ties;", end=" ")
    print(f"largest log-prob difference {gap:.1e}", flush=True)
    return {"greedy_tokens_compared": tokens, "greedy_ties": ties, "logprob_gap": float(f"{gap:.2g}")}


def fastest(candidates: dict) -> tuple[str, dict[str, float]]:
    """Run each candidate once (their warm-up as well) and return the fastest one's name with all times."""
    seconds = {name: harness.in_turns({name: call}, 1)[name][0] for name, call in candidates.items()}
    return min(seconds, key=seconds.get), {name: round(s, 2) for name, s in seconds.items()}


def measure(model, engine: Engine, n: int, sampled: bool, plan: dict, args) -> dict:
    """Measure one size in one mode and print its table."""
    work = Workload(n, model.config.vocab_size, plan["longest"])
    sampling = Sampling(1.0 if sampled else 0.0)
    sizes = plan["batches"][n]
    kinds = {"growing": False, "static": True}

    def batches(order, size, static):
        return lambda: in_batches(model, work, order, size, sampled, static)

    plain = {f"{s} a batch, {kind} cache": batches(range(n), s, st) for s in sizes for kind, st in kinds.items()}
    known = {f"{s} a batch, {kind} cache": batches(work.sorted, s, st) for s in sizes for kind, st in kinds.items()}
    tried = {}
    if n <= plan["try_up_to"]:
        name, tried["generate"] = fastest(plain)
        sorted_name, tried["generate, sorted"] = fastest(known)
    else:  # every run takes a minute: take what should be the best there
        name, sorted_name = (f"{size} a batch, static cache" for size in sizes)
    engine.run(work.requests(), sampling)
    sides = {"ours": lambda: engine.run(work.requests(), sampling), "generate": plain[name]}
    once = {"generate, sorted": known[sorted_name]}
    batching = failure = None
    try:
        batching = ContinuousBatching(model, work, sampled)
        batching.run(work)
        once["continuous batching"] = lambda: batching.run(work)
    except Exception as error:  # whatever it is, it is the other side's, and it is printed
        failure = f"{type(error).__name__}: {error}"
    if n <= plan["try_up_to"]:
        sides, once = sides | once, {}
    seconds = harness.in_turns(sides, args.repeats if n <= plan["try_up_to"] else min(2, args.repeats))
    seconds |= harness.in_turns(once, 1) if once else {}
    settings = {"ours": f"up to {engine.max_rows} rows", "generate": name, "generate, sorted": sorted_name}
    if batching is not None:
        batching.close()
        settings["continuous batching"] = f"up to {batching.rows} rows, pages of {batching.PAGE}"
    ours, rows, ratios = seconds["ours"], [], {}
    for side, values in seconds.items():
        ratios[side] = harness.ratio(values, ours[: len(values)] if len(values) > 1 else [float(np.median(ours))])
        rate = harness.spread([work.tokens / s for s in values])
        rows.append([side, settings.get(side, ""), harness.shown(rate, 0), harness.shown(ratios[side])])
    print(f"\n{n} requests, {'sampled' if sampled else 'greedy'}, {work.tokens} tokens, longest {max(work.budgets)}")
    harness.print_table(["", "setting", "tokens/s", "times as long as ours"], rows)
    if failure:
        print(f"continuous batching did not run: {failure}")
    if tried:
        words = [f"{k}: " + ", ".join(f"{a} {b} s" for a, b in v.items()) for k, v in tried.items()]
        print("tried: " + "; ".join(words))
    print_roofline(model, engine, work, float(np.median(ours)), args)
    return {
        "tokens": work.tokens,
        "seconds": {side: harness.spread(values) for side, values in seconds.items()},
        "times_as_long_as_ours": {side: value for side, value in ratios.items() if side != "ours"},
        "settings": settings,
        "tried_seconds": tried,
        "continuous_batching_failure": failure,
    }


def print_roofline(model, engine: Engine, work: Workload, seconds: float, args) -> None:
    """Print how much of the machine our loop uses: matrix products, and reading weights and cache."""
    d, config = engine.decoder, model.config
    weights = 4 * sum(p.numel() for p in model.parameters())  # tied: read once as the output embedding
    flop = 2 * sum(p.numel() for p in model.parameters())
    lengths = sum(b * len(p) + b * b / 2 for b, p in zip(work.budgets, work.prompts))  # cached tokens read
    flop_attention = 4 * config.num_hidden_layers * d.heads * d.head_dim * lengths
    read = engine.stats["steps"] * weights + lengths * d.cache_bytes_per_token()
    done, peak = (flop * work.tokens + flop_attention) / seconds, harness.matmul_rate()
    got, fastest_read = read / seconds, harness.read_rate(weights)
    print(
        f"ours: {engine.stats['steps']} steps of {engine.stats['rows_mean']:.1f} rows; "
        f"{flop / 1e6:.1f} MFLOP a token, {done / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s ({done / peak:.0%}); "
        f"{weights / 1e6:.0f} MB of weights a step, {got / 1e9:.1f} of {fastest_read / 1e9:.1f} GB/s read "
        f"({got / fastest_read:.0%})",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv)
    # Requests: sizes of the batches that generate is tried with; the last entry is too slow for trials.
    plan = {"batches": {8: (8, 4), 64: (64, 16), 512: (512, 64)}, "longest": LONGEST, "compared": 16}
    if args.smoke:
        plan = {"batches": {4: (4, 2), 8: (8, 4)}, "longest": 40, "compared": 4}
    plan["try_up_to"] = sorted(plan["batches"])[-2]
    start = time.perf_counter()
    env = harness.environment(args.threads)
    model = harness.small_model(args.smoke)
    parameters = sum(p.numel() for p in model.parameters())
    harness.print_head(f"Rollout: Qwen2 of {parameters / 1e6:.1f}M parameters, fp32", env)
    engine = Engine(Decoder.from_model(model))
    result = compare_greedy(model, engine, Workload(plan["compared"], model.config.vocab_size, plan["longest"]))
    compared, sizes = {}, {}
    for n in plan["batches"]:
        for mode in ("greedy", "sampled") if n <= plan["try_up_to"] else ("sampled",):
            found = sizes[f"{n} {mode}"] = measure(model, engine, n, mode == "sampled", plan, args)
            for side, value in found["times_as_long_as_ours"].items():
                compared[f"ratio/{side}/{n} {mode}"] = value[0]
    result |= {"parameters": parameters, "runs": sizes, "wall_s": round(time.perf_counter() - start, 1)}
    headline = ", ".join(f"{compared[f'ratio/generate/{n} sampled']:.1f} with {n}" for n in plan["batches"])
    print(f"\ngenerate takes so many times as long as ours, sampled: {headline} requests")
    harness.finish("rollout", env, compared, result, args)


if __name__ == "__main__":
    sys.exit(main())
