"""Rollout: tokens per second of our loop against `generate` and the continuous batching of transformers.

The same requests, the same weights (a Qwen2 of 6.8M parameters, fp32), in turns in the same process. Half of the
requests are short (8 to 32 tokens), half log-normal up to ten times as long (316). There is no stop token: a request is
done when its own budget is used up, and only tokens within a request's budget count.

`generate` runs a batch until its longest row is done. It is tried with a growing and with a static cache, in one batch
and in several; the fastest is what we compare with. Two more rows are there to be seen: `generate` on batches of
similar length, which needs to know the lengths beforehand (nobody does when a stop token decides), and transformers'
own continuous batching.
"""

import statistics
import sys
import time
from copy import deepcopy
from dataclasses import dataclass

import harness
import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling

SHORT, LONGEST = (8, 32), 316
PROMPT = (16, 48)
MEDIAN, SIGMA = 100, 0.6  # of the log-normal half
LARGE = 100  # requests: from here on one run takes up to a minute


class Workload:
    """n prompts with their budgets. Lengths are quantiles: the same mix whatever n is."""

    def __init__(self, n: int, vocab: int, longest: int = LONGEST):
        rng = np.random.default_rng(n)
        short = np.linspace(*SHORT, n // 2)
        z = [statistics.NormalDist().inv_cdf((i + 0.5) / (n - n // 2)) for i in range(n - n // 2)]
        long = np.clip(MEDIAN * np.exp(SIGMA * np.array(z)), SHORT[1] + 1, LONGEST)
        budgets = np.concatenate([short, long]) * longest / LONGEST
        self.budgets = rng.permutation(budgets.round().astype(int).clip(1)).tolist()
        self.prompts = [rng.integers(0, vocab, k).tolist() for k in rng.integers(PROMPT[0], PROMPT[1] + 1, n)]
        self.tokens = sum(self.budgets)
        self.by_length = np.argsort(-np.array(self.budgets), kind="stable").tolist()

    def requests(self) -> list[Request]:
        return [Request(p, b, (), seed) for seed, (p, b) in enumerate(zip(self.prompts, self.budgets))]


# -------------------------------------------------------------------------------------------------------- transformers


def options(sampled: bool) -> dict:
    """Return the sampling options of transformers that mean the same as our `Sampling`."""
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}


@dataclass(frozen=True)
class Setting:
    """How `generate` is given the requests."""

    size: int  # of a batch
    static: bool  # cache
    by_length: bool = False

    def __str__(self) -> str:
        return f"{self.size} a batch, {'static' if self.static else 'growing'} cache"


def generate(model, work: Workload, index: list[int], sampled: bool, **more):
    """Run the requests of `index` as one left-padded batch to its longest budget; return what `generate` returns."""
    width = max(len(work.prompts[i]) for i in index)
    ids = torch.zeros(len(index), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(index):
        n = len(work.prompts[i])
        ids[row, width - n :] = torch.tensor(work.prompts[i])
        mask[row, width - n :] = 1
    longest = max(work.budgets[i] for i in index)
    return model.generate(ids, attention_mask=mask, max_new_tokens=longest, use_cache=True, **options(sampled), **more)


def in_batches(model, work: Workload, setting: Setting, sampled: bool) -> None:
    order = work.by_length if setting.by_length else list(range(len(work.budgets)))
    more = {"cache_implementation": "static"} if setting.static else {}
    for start in range(0, len(order), setting.size):
        generate(model, work, order[start : start + setting.size], sampled, **more)


def fastest(model, work: Workload, settings: list[Setting]) -> Setting:
    """Run each setting once (greedy), print the times and return the fastest."""
    seconds = {s: harness.best(lambda s=s: in_batches(model, work, s, False), 1) for s in settings}
    print("\ngenerate tried with " + "; ".join(f"{s}: {t:.2f} s" for s, t in seconds.items()), flush=True)
    return min(seconds, key=seconds.get)


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
        # It changes how its model attends, so it gets one of its own.
        self.context = deepcopy(model).continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=memory
        )
        self.runs = 0

    def __enter__(self) -> "ContinuousBatching":
        self.manager = self.context.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)

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


# ---------------------------------------------------------------------------------------------------------- comparison


def compare_greedy(model, engine: Engine, work: Workload) -> dict:
    """Assert that greedy tokens are those of `generate`, and return the largest difference of their log-probs.

    Two tokens whose logits differ by less than rounding may swap; such a place is counted as a tie and its row is
    compared no further.
    """
    everything = {"return_dict_in_generate": True, "output_logits": True}
    out = generate(model, work, list(range(len(work.budgets))), False, **everything)
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
    print(
        f"greedy tokens equal generate's: {work.tokens} tokens of {len(work.budgets)} requests, {ties} ties;", end=" "
    )
    print(f"largest log-prob difference {gap:.1e}", flush=True)
    return {"greedy_tokens_compared": work.tokens, "greedy_ties": ties, "logprob_gap": float(f"{gap:.2g}")}


def measure(model, engine: Engine, work: Workload, sampled: bool, settings: dict[str, Setting], args) -> dict:
    """Measure one size in one mode and print its table."""
    sampling = Sampling(1.0 if sampled else 0.0)
    large = len(work.prompts) > LARGE

    def side(setting):
        return lambda: in_batches(model, work, setting, sampled)

    main = {"ours": lambda: engine.run(work.requests(), sampling), "generate": side(settings["generate"])}
    how = {"ours": f"up to {engine.max_rows} rows"} | {name: str(s) for name, s in settings.items()}
    for call in [main["ours"]] if large else main.values():  # warm-up
        call()
    seconds = harness.in_turns(main, min(2, args.repeats) if large else args.repeats)
    # There to be seen, so once is enough.
    seconds |= harness.in_turns({name: side(s) for name, s in settings.items() if name not in main}, 1)
    failure = None
    try:
        with ContinuousBatching(model, work, sampled) as batching:
            if not large:
                batching.run(work)
            seconds |= harness.in_turns({"continuous batching": lambda: batching.run(work)}, 1)
        how["continuous batching"] = f"up to {batching.rows} rows, pages of {batching.PAGE}"
    except Exception as error:  # whatever it is, it is the other side's, and it is printed
        failure = f"{type(error).__name__}: {error}"

    typical, rows, ratios = statistics.median(seconds["ours"]), [], {}
    for name, values in seconds.items():
        ratios[name] = harness.ratio(values, seconds["ours"] if name in main else [typical])
        rate = harness.spread([work.tokens / s for s in values])
        rows.append([name, how[name], harness.shown(rate, 0), harness.shown(ratios[name])])
    print(f"\n{len(work.prompts)} requests, {'sampled' if sampled else 'greedy'}, {work.tokens} tokens")
    harness.print_table(["", "setting", "tokens/s", "times as long as ours"], rows)
    if failure:
        print(f"continuous batching did not run: {failure}")
    print_roofline(model, engine, work, typical)
    return {
        "tokens": work.tokens,
        "seconds": {name: harness.spread(values) for name, values in seconds.items()},
        "times_as_long_as_ours": {name: value for name, value in ratios.items() if name != "ours"},
        "settings": how,
        "continuous_batching_failure": failure,
    }


def print_roofline(model, engine: Engine, work: Workload, seconds: float) -> None:
    """Print how much of the machine our loop uses: matrix products, and reading weights and cache."""
    d, config = engine.decoder, model.config
    parameters = sum(p.numel() for p in model.parameters())  # tied: each is read and used once a step
    cached = sum(b * len(p) + b * b / 2 for b, p in zip(work.budgets, work.prompts))  # tokens read by attention
    flop = 2 * parameters * work.tokens + 4 * config.num_hidden_layers * d.heads * d.head_dim * cached
    read = 4 * parameters * engine.stats["steps"] + d.cache_bytes_per_token() * cached
    rate, reading = flop / seconds, read / seconds
    most, most_reading = harness.matmul_rate(), harness.read_rate(4 * parameters)
    print(
        f"ours: {engine.stats['steps']} steps of {engine.stats['rows_mean']:.1f} rows; "
        f"{2 * parameters / 1e6:.1f} MFLOP a token, {rate / 1e9:.0f} of {most / 1e9:.0f} GFLOP/s ({rate / most:.0%}); "
        f"{4 * parameters / 1e6:.0f} MB of weights a step, with the cache {reading / 1e9:.1f} of "
        f"{most_reading / 1e9:.1f} GB/s ({reading / most_reading:.0%})",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv)
    start = time.perf_counter()
    env = harness.environment(args.threads)
    model = harness.small_model(args.smoke)
    vocab, parameters = model.config.vocab_size, sum(p.numel() for p in model.parameters())
    harness.print_head(f"Rollout: Qwen2 of {parameters / 1e6:.1f}M parameters, fp32", env)
    sizes, longest, checked = ((4, LARGE + 4), 40, 4) if args.smoke else ((8, 64, 512), LONGEST, 16)
    engine = Engine(Decoder.from_model(model))
    result = compare_greedy(model, engine, Workload(checked, vocab, longest))
    runs, static = {}, True
    for n in sizes:
        work = Workload(n, vocab, longest)
        if n > LARGE:  # trials would take minutes: the cache that won before
            settings = {"generate": Setting(n, static)}
        else:
            few = max(4, n // 4)
            best = fastest(model, work, [Setting(size, s) for size in (n, few) for s in (False, True)])
            settings = {"generate": best, "generate, by length": Setting(few, False, by_length=True)}
            static = best.static
        for sampled in (True,) if n > LARGE else (False, True):
            name = f"{n} {'sampled' if sampled else 'greedy'}"
            runs[name] = measure(model, engine, work, sampled, settings, args)
    compared = {
        f"ratio/{side}/{run}": ratio[0]
        for run, found in runs.items()
        for side, ratio in found["times_as_long_as_ours"].items()
    }
    print("\ngenerate takes so many times as long as ours:")
    print(", ".join(f"{run} {harness.shown(r['times_as_long_as_ours']['generate'])}" for run, r in runs.items()))
    result |= {"parameters": parameters, "runs": runs, "wall_s": round(time.perf_counter() - start, 1)}
    harness.finish("rollout", env, compared, result, args)


if __name__ == "__main__":
    sys.exit(main())
