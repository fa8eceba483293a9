"""What the GPU benchmarks share: sizes, random models, timing on the device, rooflines, the JSON line of a part.

Import it before torch: it decides whether there is a GPU (--smoke: no; Triton's interpreter and tiny sizes instead).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

SMOKE = "--smoke" in sys.argv
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "" if SMOKE else "0")  # before `harness`, which measures the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if SMOKE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from harness import print_table  # noqa: E402, F401

DEVICE = "cuda" if torch.cuda.is_available() and not SMOKE else "cpu"
DTYPE = torch.float32 if SMOKE else torch.bfloat16
V = 300 if SMOKE else 151_936
SHAPES = {"1.5B": (12, 2, 128), "7B": (28, 4, 128)}  # query heads, key/value heads, head size
HIDDEN = {"1.5B": 64 if SMOKE else 1536, "7B": 64 if SMOKE else 3584}
# DeepSeek-R1-Distill-Qwen, as their config.json has it: sizes only, the weights here are random.
ARCHITECTURES = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064},
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 101}  # fmt: skip
# Bytes per second of the memory and dense bf16 FLOP per second, of the data sheets.
NOMINAL = {
    "H200": (4.8e12, 989e12),
    "H100 PCIe": (2.0e12, 756e12),
    "H100 NVL": (3.9e12, 835e12),
    "H100": (3.35e12, 989e12),
    "A100-SXM4-80GB": (2.039e12, 312e12),
    "A100 80GB PCIe": (1.935e12, 312e12),
    "A100": (1.555e12, 312e12),
}


class Absent(ModuleType):
    """Stands for a module that is not installed and whose functions no benchmark calls."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def stand_in_for(*names: str) -> None:
    """Let files be imported that import `names` at their top, where those are not installed."""
    for name in names:
        if name not in sys.modules and find_spec(name) is None:
            sys.modules[name] = Absent(name)
            sys.modules[name].__spec__, sys.modules[name].__path__ = ModuleSpec(name, None), []


# The method files import them; nothing here is mathematics,
stand_in_for("math_verify", "latex2sympy2_extended", "latex2sympy2_extended.latex2sympy2")
stand_in_for("jsonargparse", "jsonargparse.typing", "docstring_parser")  # nor reads a command line by them


# --------------------------------------------------------------------------------------------------------- the device


def gpu_name() -> str | None:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else None


def nominal() -> tuple[float | None, float | None]:
    """Return (bytes per second, FLOP per second) of the data sheet, None where the GPU is not in the list."""
    name = gpu_name() or ""
    return next((rates for key, rates in NOMINAL.items() if key in name), (None, None))


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def free_bytes() -> int:
    """Return the free memory of the GPU; on the CPU some small number."""
    if DEVICE == "cpu":
        return 2**30
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def copy_rate() -> float:
    """Return the bytes per second of a copy on the device, reading and writing counted."""
    n = 2**16 if SMOKE else 2 * 2**30
    a, b = torch.empty(n, dtype=torch.uint8, device=DEVICE), torch.empty(n, dtype=torch.uint8, device=DEVICE)
    return 2 * n / (median_ms(lambda: b.copy_(a)) / 1e3)


def memory_rates() -> dict:
    """Return and print the memory rates that a roofline is drawn with: of the data sheet, and of a copy right now."""
    rates = {"nominal_gb_per_s": nominal()[0] and nominal()[0] / 1e9, "copy_gb_per_s": round(copy_rate() / 1e9, 1)}
    print(f"memory: {rates['nominal_gb_per_s']} GB/s by the data sheet, {rates['copy_gb_per_s']} GB/s measured (copy)")
    return rates


def of_floor(floor_bytes: float, seconds: float, rates: dict) -> dict:
    """Return which share of each memory rate moving `floor_bytes` in `seconds` is."""
    found = {}
    for key, label in (("nominal_gb_per_s", "of_nominal"), ("copy_gb_per_s", "of_copy")):
        found[label] = rates[key] and round(floor_bytes / seconds / 1e9 / rates[key], 3)
    return found


# -------------------------------------------------------------------------------------------------------------- timing


def median_ms(call: Callable, budget_s: float = 0.6) -> float:
    """Return the median time of one call in milliseconds, over as many calls as fit into the budget (3 to 50)."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=DEVICE)  # 256 MiB, several times the L2 cache
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(3, min(50, int(budget_s / max(1e-4, time.perf_counter() - start))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in events:
        flush.zero_()  # it also keeps the GPU busy while the call is being launched
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


def peak_bytes(call: Callable) -> int | None:
    """Return how much memory a call takes on top of its inputs; None without a GPU."""
    if DEVICE == "cpu":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def sides(calls: dict[str, Callable]) -> dict[str, dict]:
    """Return {side: {"ms", "gib"}}; a side that runs out of memory or fails says so and the others go on."""
    out = {}
    for side, call in calls.items():
        try:
            memory = peak_bytes(call)
            out[side] = {"ms": round(median_ms(call), 4), "gib": None if memory is None else round(memory / 2**30, 3)}
        except torch.OutOfMemoryError:
            out[side] = {"error": "out of memory"}
        except Exception as error:  # the report is worth more than the first failure
            out[side] = {"error": f"{type(error).__name__}: {error}"[:300]}
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return out


def normal(*shape, dtype=torch.bfloat16, scale=1.0):
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).mul_(scale).to(dtype)


def shown(side: dict, key: str = "ms"):
    return side.get("error", side.get(key))


# -------------------------------------------------------------------------------------------------------------- models


def config_of(size: str):
    """Return the config of a model: "1.5B" or "7B" with their real shapes, a tiny one with --smoke."""
    from transformers import Qwen2Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    shape = TINY if SMOKE else ARCHITECTURES[size]
    return Qwen2Config(
        **shape, max_position_embeddings=131_072, rope_theta=10_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def random_decoder(config):
    """Return a rollout replica with random weights of the size that training starts from: standard deviation 0.02."""
    from adaptive_reasoning.rollout import Decoder

    decoder = Decoder(config, DEVICE, DTYPE)

    def weights():
        for name, view in decoder.destinations.items():
            norm = "norm" in name
            yield name, (torch.ones if norm else torch.randn)(view.shape, device=DEVICE, dtype=DTYPE) * (norm or 0.02)

    decoder.load(weights())
    return decoder


def random_model(config, dtype=None):
    """Return a `transformers` model of this config on the device."""
    from transformers import AutoModelForCausalLM

    attention = "sdpa"
    if DEVICE == "cuda" and find_spec("flash_attn") is not None:
        attention = "flash_attention_2"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or DTYPE, attn_implementation=attention)
    return model.to(DEVICE).eval()


# ------------------------------------------------------------------------------------------------------------ the line


OURS = ("triton", "engine")  # sides of a comparison
EXCUSES = ("out of memory", "MemoryError", "accelerate is not installed")


def failures(results: dict, ours: bool = False) -> list[str]:
    """Return the errors of our own code in what a part found; those of others, or too little memory, are none."""
    found = []
    for key, value in results.items():
        if isinstance(value, dict):
            case = key[:1].isdigit() and "error" in value  # of decode, as "1.5B/128x2048"
            found += failures(value, ours or case or key.startswith(OURS))
        elif key == "error" and ours and not value.startswith(EXCUSES):
            found.append(value)
    return found


def main_of(parts: dict[str, Callable], doc: str, name: str, left_out: tuple[str, ...] = (), more=None) -> int:
    """Run the parts named on the command line (default: all but `left_out`), one table and one JSON line each.

    Args:
        more: adds options to the parser; then every part is called with the parsed options.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("part", nargs="*", help=f"any of {', '.join(parts)}; default: all but {left_out or 'none'}")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: does it run")
    if more:
        more(parser)
    args = parser.parse_args()
    unknown = [part for part in args.part if part not in parts]
    if unknown:
        parser.error(f"unknown part {unknown[0]}: takes {', '.join(parts)}")
    if DEVICE == "cpu" and not args.smoke:
        print("There is no GPU here: nothing was measured. --smoke runs tiny sizes on the CPU.")
        return 2
    torch.manual_seed(0)
    failed = []
    for part in args.part or [part for part in parts if part not in left_out]:
        start = time.perf_counter()
        results = parts[part](args) if more else parts[part]()
        line = {"benchmark": f"{name}/{part}", "smoke": args.smoke, "seconds": round(time.perf_counter() - start, 1)}
        line |= {"gpu": gpu_name(), "torch": torch.__version__}
        print(json.dumps({**line, "results": results}), flush=True)
        failed += failures(results)
    if failed:
        print(f"{len(failed)} of our own cases failed, the first with {failed[0]}")
    return 1 if failed else 0
