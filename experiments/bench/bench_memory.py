"""Memory: peak of log-probs plus backward at the vocabulary of Qwen2, chunked with recomputation against naive.

    naive   (hidden @ weight.T).log_softmax(-1).gather(targets)
    ours    kernels/token_logprobs.py

Each run is a fresh process. Its baseline is what it holds just before the call: the interpreter, torch, the weight and
the hidden states. What is counted comes on top: for both that includes the gradients of weight and hidden states.
"""

import resource
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import harness
import torch

VOCAB, HIDDEN, TOKENS = 151_936, 256, 4096
MIB = 2**20


def held(peak: bool) -> int:
    """Return the bytes of memory this process holds now, or the most it ever held."""
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux: the peak is all that can be asked for
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Not ru_maxrss: a process started from a larger one begins with the peak of that one.
    wanted = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(wanted))


def naive(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def ours(hidden, weight, targets):
    from adaptive_reasoning.kernels import token_logprobs

    return token_logprobs(hidden, weight, targets)[0]


SIDES = {"ours": ours, "naive": naive}


def measure(pipe, side: str, size: tuple[int, int, int], threads: int) -> None:
    """Send {"mib", "seconds", "logprob", "gradient"} of one run."""
    vocab, width, tokens = size
    torch.set_num_threads(threads)

    def run(tokens):
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, requires_grad=True)
        weight = torch.randn(vocab, width).mul_(width**-0.5).requires_grad_()
        targets = torch.randint(0, vocab, (tokens,))
        before, start = held(peak=False), time.perf_counter()
        logprobs = SIDES[side](hidden, weight, targets)
        logprobs.mean().backward()
        seconds = time.perf_counter() - start
        return held(peak=True) - before, seconds, float(logprobs.detach().mean()), float(hidden.grad.norm())

    size_of_warm_up = 2  # loads the libraries; far below the peak that follows
    run(size_of_warm_up)
    extra, seconds, logprob, gradient = run(tokens)
    pipe.send({"mib": extra / MIB, "seconds": seconds, "logprob": logprob, "gradient": gradient})


def in_fresh_process(side: str, size: tuple[int, int, int], threads: int) -> dict:
    spawn = get_context("spawn")
    pipe, theirs = spawn.Pipe()
    worker = spawn.Process(target=measure, args=(theirs, side, size, threads), daemon=True)
    worker.start()
    theirs.close()
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"the process of '{side}' ended early: too little memory? Its error is above.") from None
    finally:
        worker.join()


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv)
    start = time.perf_counter()
    env = harness.environment(args.threads)
    vocab, width, tokens = size = (1000, 16, 2048) if args.smoke else (VOCAB, HIDDEN, TOKENS)
    harness.print_head(f"Log-probs plus backward: {tokens} tokens, hidden {width}, vocabulary {vocab}, fp32", env)
    repeats = 1 if args.smoke else min(2, args.repeats)
    runs = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            runs[side].append(in_fresh_process(side, size, args.threads))
    for key in ("logprob", "gradient"):
        a, b = (runs[side][0][key] for side in SIDES)
        assert abs(a - b) <= 1e-4 * abs(b), f"mean {key}: ours {a}, naive {b}"

    memory = {side: [r["mib"] for r in found] for side, found in runs.items()}
    seconds = {side: [r["seconds"] for r in found] for side, found in runs.items()}
    flop = 2 * tokens * vocab * width  # of one product of hidden states and weight
    peak = harness.matmul_rate()
    rows = []
    for side, products in (("ours", 4), ("naive", 3)):  # forward, two gradients; ours computes the logits twice
        rate = products * flop / min(seconds[side])
        spreads = harness.shown(harness.spread(memory[side]), 0), harness.shown(harness.spread(seconds[side]))
        rows.append([side, *spreads, f"{rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s"])
    harness.print_table(["", "peak MiB", "seconds", "matrix products"], rows)
    share = min(memory["ours"]) / min(memory["naive"])
    slower = harness.ratio(seconds["ours"], seconds["naive"])
    print(f"memory: {share:.3f} of naive; time: {harness.shown(slower)} of naive")
    gradient, logits = 4 * vocab * width / MIB, 4 * tokens * vocab / MIB
    print(f"the gradient of the weight alone is {gradient:.0f} MiB, the logits of all tokens are {logits:.0f} MiB")
    compared = {"memory/ours MiB": round(min(memory["ours"]), 1), "memory/share of naive": round(share, 4)}
    result = {
        "size": {"vocabulary": vocab, "hidden": width, "tokens": tokens},
        "mib": {side: harness.spread(values) for side, values in memory.items()},
        "seconds": {side: harness.spread(values) for side, values in seconds.items()},
        "time_of_naive": slower,
        "wall_s": round(time.perf_counter() - start, 1),
    }
    harness.finish("memory", env, compared, result, args)


if __name__ == "__main__":
    sys.exit(main())
