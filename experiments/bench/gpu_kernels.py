"""Kernels on a GPU: each against plain torch, with the bytes or FLOP per second it reaches.

 token_logprobs     forward and backward at V = 151,936: Triton, torch in chunks, torch with all logits, Liger
 decode_attention   bytes of keys and values per second, against a copy measured in the same run
 group_advantage, sample, rms_norm, rope_and_store

    python experiments/bench/gpu_kernels.py                        # all of them
    python experiments/bench/gpu_kernels.py decode_attention       # one
    python experiments/bench/gpu_kernels.py tune                   # other block sizes than the chosen ones
    python experiments/bench/gpu_kernels.py --smoke                # tiny sizes in Triton's interpreter, on the CPU

Times are medians; the L2 cache is overwritten before every run. One table and one line of JSON a part.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

from gpu_harness import DEVICE, HIDDEN, SHAPES, SMOKE, V, copy_rate, main_of, normal, print_table, shown, sides

# isort: split
import torch
from adaptive_reasoning.kernels import torch_version, triton_version
from adaptive_reasoning.kernels.group_advantage import Groups


def both(name: str, *args, **kwargs) -> dict[str, Callable]:
    """Return the two implementations of an operation on the same inputs."""
    return {
        "triton": lambda: triton_version(name)(*args, **kwargs),
        "torch": lambda: torch_version(name)(*args, **kwargs),
    }


def speedup(found: dict) -> float | None:
    """Return how many times faster Triton is than torch."""
    a, b = found["torch"].get("ms"), found["triton"].get("ms")
    return None if a is None or b is None else round(a / b, 2)


# ---------------------------------------------------------------------------------------------------------------- parts


def bench_token_logprobs() -> dict:
    """Log-probs, forward and backward to hidden and weight, bf16. Ours takes 4 matrix products, 8 N V H FLOP."""
    H, rows, results = HIDDEN["1.5B"], [], {}
    weight = normal(V, H, scale=0.05).requires_grad_()
    liger = None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
    except ImportError:
        print("liger-kernel is not installed: left out")
    for N in (20, 33) if SMOKE else (4096, 16_384, 65_536):
        hidden = normal(N, H).requires_grad_()
        targets = torch.randint(V, (N,), device=DEVICE)

        def naive(hidden=hidden, targets=targets):
            logits = (hidden @ weight.t()).float()
            return logits.log_softmax(-1).gather(1, targets[:, None]).sum()

        def ours(version, entropy=False, hidden=hidden, targets=targets):
            logprobs, entropies = version("token_logprobs")(hidden, weight, targets, 1.0, None, entropy)
            return logprobs.sum() + entropies.sum() if entropy else logprobs.sum()

        forward = {
            "triton": lambda ours=ours: ours(triton_version),
            "triton, entropy": lambda ours=ours: ours(triton_version, True),
            "torch in chunks": lambda ours=ours: ours(torch_version),
            "torch, all logits": naive,
        }
        if liger is not None and not SMOKE:
            forward["liger (cross entropy)"] = lambda h=hidden, t=targets: liger(weight, h, t)

        def with_backward(call, hidden=hidden):
            def run():
                return torch.autograd.grad(call(), (hidden, weight))

            return run

        only_forward = sides({k: torch.no_grad()(f) for k, f in forward.items() if k.startswith("triton")})
        found = sides({k: with_backward(f) for k, f in forward.items()})
        for side, value in found.items():
            value["forward_ms"] = only_forward.get(side, {}).get("ms")
            if side == "triton" and value.get("ms"):
                value["tflops"] = round(8 * N * V * H / value["ms"] / 1e9, 1)
            flops = value.get("tflops")
            rows.append([f"{N} tokens, {side}", value["forward_ms"], shown(value), value.get("gib"), flops])
        with torch.no_grad():
            n = min(N, 2048)
            a, b = (f("token_logprobs")(hidden[:n], weight, targets[:n])[0] for f in (triton_version, torch_version))
            results[f"gap_to_torch/{N}"] = (a - b).abs().max().item()
        results[str(N)] = found
    print_table(["token_logprobs, bf16", "forward ms", "with backward ms", "peak GiB", "TFLOP/s"], rows)
    return results


PAGE = 64  # columns, the engine's


def scattered_pages(B: int, k: int, columns: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a pool of pages [P, 2k, C, D] and a table [B, W] int32 that gives each row pages from all over it."""
    width = -(-columns // PAGE)
    order = torch.randperm(B * width, device=DEVICE).to(torch.int32)
    return normal(B * width, 2 * k, PAGE, D), order.view(B, width)


def bench_decode_attention() -> dict:
    """One layer, bf16, all rows of the same length, and a long-tailed batch where they differ: over scattered pages, as
    the engine runs it, over contiguous rows, and torch over contiguous rows."""
    rate, rows, results = copy_rate(), [], {}
    results["copy_gb_per_s"] = round(rate / 1e9, 1)
    for size, (h, k, D) in SHAPES.items():
        for B in (1, 3) if SMOKE else (1, 32, 128, 256):
            for context in (70, "tail") if SMOKE else (1024, 2048, 8192, "tail"):
                longest = (90 if SMOKE else 8192) if context == "tail" else context
                try:
                    pool, table = scattered_pages(B, k, longest, D)
                    q, lengths = normal(B, h, D), torch.full((B,), longest, device=DEVICE)
                    if context == "tail":  # half of the rows short, a few long
                        torch.manual_seed(0)
                        lengths = torch.exp(6.5 + torch.randn(B)).clamp(1, longest).long().to(DEVICE)
                    nbytes = 2 * k * D * 2 * int(lengths.sum())
                    found = sides({"triton": partial(triton_version("decode_attention"), q, pool, lengths, table)})
                    del pool
                    cache = normal(B, 2 * k, longest, D)
                    calls = both("decode_attention", q, cache, lengths)
                    calls["contiguous"] = calls.pop("triton")
                    if B * longest > 2**19:  # SDPA with a mask is slow, one size is enough to know
                        calls.pop("torch")
                    found |= sides(calls)
                    del cache
                except torch.OutOfMemoryError:
                    found, nbytes = {"triton": {"error": "out of memory"}}, 0
                triton_side = found["triton"]
                if triton_side.get("ms"):
                    triton_side["gb_per_s"] = round(nbytes / triton_side["ms"] / 1e6, 1)
                    triton_side["of_copy"] = round(triton_side["gb_per_s"] * 1e9 / rate, 3)
                results[f"{size}/{B}x{context}"] = found
                speeds = [triton_side.get("gb_per_s"), triton_side.get("of_copy")]
                others = [shown(found.get(name, {})) for name in ("contiguous", "torch")]
                rows.append([f"{size}, {B} x {context}", shown(triton_side), *speeds, *others])
    title = f"decode_attention, copy {rate / 1e9:.0f} GB/s"
    print_table([title, "ms", "GB/s", "of copy", "contiguous ms", "torch ms"], rows)
    return results


def small(title: str, cases: dict[str, tuple[dict, int]]) -> dict:
    """Measure {case: (calls, bytes)}, print the table and return it."""
    rows, results = [], {}
    for case, (calls, nbytes) in cases.items():
        found = sides(calls)
        found["speedup"] = speedup(found)
        if found["triton"].get("ms"):
            found["gb_per_s"] = round(nbytes / found["triton"]["ms"] / 1e6, 1)
        results[case] = found
        rows.append([case, shown(found["triton"]), shown(found["torch"]), found["speedup"], found.get("gb_per_s")])
    print_table([title, "triton ms", "torch ms", "times", "GB/s"], rows)
    return results


def bench_group_advantage() -> dict:
    """8,192 rewards in groups of 16, alone and measured by other numbers."""
    B, G = (8, 4) if SMOKE else (8192, 16)
    groups = Groups.of(torch.arange(B, device=DEVICE) // G)
    rewards = torch.randint(2, (B,), device=DEVICE).double()
    base = torch.rand(B, device=DEVICE, dtype=torch.float64)
    name = "group_advantage"
    cases = {
        "plain": (both(name, rewards, groups), 40 * B),
        "with a base": (both(name, rewards, groups, base=base), 48 * B),
    }
    return small(name, cases)


def bench_sample() -> dict:
    """Logits in fp32; without a cut, greedy, and with the nucleus that evaluation uses."""
    cases = {}
    for B in (2,) if SMOKE else (1, 128, 256):
        logits, uniform = normal(B, V, dtype=torch.float32, scale=3.0), torch.rand(B, device=DEVICE)
        for label, cut in {"T 0.6": (0.6,), "greedy": (0.0,), "top_p 0.95": (0.6, 0, 0.95)}.items():
            cases[f"{B} rows, {label}"] = (both("sample", logits, uniform, *cut), 4 * B * V)
    return small("sample", cases)


def bench_rms_norm() -> dict:
    """rms_norm with and without residual, and rope_and_store, of a decode batch and of a prefill."""
    cases = {}
    for size, (h, k, D) in SHAPES.items():
        H = HIDDEN[size]
        for R in (3,) if SMOKE else (1, 256, 16_384):
            x, weight, residual = normal(R, H), normal(H), normal(R, H)
            cases[f"rms_norm {size}, {R}"] = (both("rms_norm", x, weight, 1e-6), 4 * R * H)
            cases[f"rms_norm with residual {size}, {R}"] = (both("rms_norm", x, weight, 1e-6, residual), 8 * R * H)
            qkv, cache = normal(R, h + 2 * k, D), normal(min(R, 256), 2 * k, 128, D)
            angles = torch.polar(torch.ones(128, D // 2), torch.rand(128, D // 2)).to(DEVICE)
            place = torch.arange(R, device=DEVICE)
            table = (place % len(cache)).int().unsqueeze(1)  # one page a row
            args = (qkv, angles, place // len(cache) % 128, cache, table)
            cases[f"rope_and_store {size}, {R}"] = (both("rope_and_store", *args), 4 * R * (h + 2 * k) * D)
    return small("rms_norm, rope_and_store", cases)


def bench_tune() -> dict:
    """Other tiles and numbers of parts than the chosen ones; the first row of each list is the choice of the file."""
    forward, attention = (import_module(f"adaptive_reasoning.kernels.{x}_triton") for x in TUNED)
    rows, results = [], {}

    def measure(label: str, call: Callable, setting: dict, module) -> None:
        before = {key: getattr(module, key) for key in setting}
        vars(module).update(setting)
        try:
            found = sides({"triton": call})["triton"]
        finally:
            vars(module).update(before)
        for name, value in setting.items():
            value = value.get(2, value.get(key)) if isinstance(value, dict) else value
            results[f"{label}, {name} {value}"] = found
            rows.append([f"{label}, {name} {value}", shown(found)])

    N, H = (20, 64) if SMOKE else (16_384, HIDDEN["1.5B"])
    hidden, weight = normal(N, H).requires_grad_(), normal(V, H, scale=0.05).requires_grad_()
    targets = torch.randint(V, (N,), device=DEVICE)
    key = (2, forward.capability() >= 90)
    chosen = forward.TILES[key]
    tiles = [chosen, (128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3)]
    tiles += [(128, 256, 32, 8, 4), (64, 256, 64, 4, 4), (128, 256, 128, 8, 2)]

    @torch.no_grad()
    def run_forward():
        forward.token_logprobs(hidden, weight, targets)

    def run_both():
        return torch.autograd.grad(forward.token_logprobs(hidden, weight, targets)[0].sum(), (hidden, weight))

    for tile in tiles[: 2 if SMOKE else None]:
        measure("forward", run_forward, {"TILES": forward.TILES | {key: tile}}, forward)
        measure("forward and backward", run_both, {"TILES": forward.TILES | {key: tile}}, forward)
    for most in (8, 4, 16, 32)[: 1 if SMOKE else None]:
        measure("forward", run_forward, {"MOST_TILES": most}, forward)
    for mib in (512, 256, 1024, 2048)[: 1 if SMOKE else None]:
        measure("forward and backward", run_both, {"WORKSPACE_BYTES": mib * 2**20}, forward)
    for size, B, context in [("1.5B", 1, 70)] if SMOKE else [("1.5B", 1, 2048), ("1.5B", 128, 2048), ("7B", 256, 2048)]:
        h, k, D = SHAPES[size]
        q, cache = normal(B, h, D), normal(B, 2 * k, context, D)
        lengths = torch.full((B,), context, device=DEVICE)

        def attend(q=q, cache=cache, lengths=lengths):
            attention.decode_attention(q, cache, lengths)

        label = f"attention {size} {B} x {context}"
        tiles = [attention.TILES[2], (64, 4, 2), (64, 4, 4), (64, 2, 3), (128, 4, 2), (128, 8, 3), (32, 4, 4)]
        for tile in tiles[: 1 if SMOKE else None]:
            measure(label, attend, {"TILES": attention.TILES | {2: tile}}, attention)
        for waves in (6, 2, 4, 8, 12)[: 1 if SMOKE else None]:
            measure(label, attend, {"WAVES": waves}, attention)
    print_table(["setting", "ms"], rows)
    return results


TUNED = ("token_logprobs", "decode_attention")
PARTS = {
    "token_logprobs": bench_token_logprobs,
    "decode_attention": bench_decode_attention,
    "group_advantage": bench_group_advantage,
    "sample": bench_sample,
    "rms_norm": bench_rms_norm,
    "tune": bench_tune,
}


if __name__ == "__main__":
    sys.exit(main_of(PARTS, __doc__, "gpu_kernels", left_out=("tune",)))
