"""Every Triton kernel compiles for sm_80 and sm_90 at the shapes of the papers, without a spilled register. No GPU
needed.

The launches themselves are run, on tensors of the meta device, with a driver that only says which GPU it would be. So
what is compiled is what a GPU would get: types, alignments, block sizes, stages.

    python tests/test_kernels_compile.py                # the table of registers, spills and shared memory
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may take
MODELS = {"1.5B": (1536, 12, 2), "7B": (3584, 28, 4)}  # hidden size, query heads, key/value heads
V, D = 151_936, 128


def launches():
    """Return {name: function that launches kernels at full size}."""
    from adaptive_reasoning.kernels import triton_version
    from adaptive_reasoning.kernels.group_advantage import Groups

    def new(*shape, dtype=torch.float32, grad=False):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

    def ints(*shape):
        return new(*shape, dtype=torch.int64)

    def logprobs(dtype, hidden, with_entropy):
        states, weight = new(5000, hidden, dtype=dtype, grad=True), new(V, hidden, dtype=dtype, grad=True)
        value, entropy = triton_version("token_logprobs")(states, weight, ints(5000), 0.6, None, with_entropy)
        (value.sum() + entropy.sum() if with_entropy else value.sum()).backward()

    def advantage():
        groups = Groups(ints(8192), ints(513), ints(8192))
        for dtype in (torch.float32, torch.float64):
            triton_version("group_advantage")(new(8192, dtype=dtype), groups)
            for std, base in (("unbiased", None), ("unbiased", new(8192, dtype=dtype)), ("none", None)):
                triton_version("group_advantage")(new(8192, dtype=dtype), groups, std, base=base)

    def attention(dtype, h, k):
        for B in (1, 512):
            q, cache = new(B, h + 2 * k, D, dtype=dtype)[:, :h], new(512, 2 * k, 8192, D, dtype=dtype)
            triton_version("decode_attention")(q, cache, ints(B))
            for C in (16, 64):
                pages = new(4096, 2 * k, C, D, dtype=dtype)
                triton_version("decode_attention")(q, pages, ints(B), new(B, 256, dtype=torch.int32))

    def sampling():
        logits, uniform = new(64, V), new(64)
        for cut in ((1.0,), (0.0,), (0.6, 50), (0.6, 0, 0.95), (0.6, 50, 0.95)):
            triton_version("sample")(logits, uniform, *cut)

    def layer(dtype, hidden, h, k):
        norm, store = triton_version("rms_norm"), triton_version("rope_and_store")
        x, weight = new(64, hidden, dtype=dtype), new(hidden, dtype=dtype)
        norm(x, weight, 1e-6)
        norm(x, weight, 1e-6, new(64, hidden, dtype=dtype))
        norm(new(64, h + 2 * k, D, dtype=dtype)[:, :h], new(D, dtype=dtype), 1e-6)
        for C, table in ((8192, None), (64, new(64, 256, dtype=torch.int32))):
            store(
                new(64, h + 2 * k, D, dtype=dtype), new(8192, D // 2, dtype=torch.complex64), ints(64),
                new(512, 2 * k, C, D, dtype=dtype), table,
            )  # fmt: skip

    jobs = {"group_advantage": advantage, "sample": sampling}
    for dtype in (torch.bfloat16, torch.float32):
        label = str(dtype).removeprefix("torch.")
        for size, (hidden, h, k) in MODELS.items():
            jobs[f"decode_attention {size} {label}"] = lambda d=dtype, h=h, k=k: attention(d, h, k)
            jobs[f"rms_norm, rope_and_store {size} {label}"] = lambda d=dtype, H=hidden, h=h, k=k: layer(d, H, h, k)
        for entropy in (False, True):
            name = f"token_logprobs {label}" + " entropy" * entropy
            jobs[name] = lambda d=dtype, e=entropy: logprobs(d, 1536, e)
    return jobs


class Driver:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("meta")


def compiled(capability: int):
    """Yield (job, kernel) of every kernel that the launches of this GPU need, once each."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, found = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kernel))
        return kernel

    driver.set_active(Driver(capability))
    JITFunction.run, seen = compile_only, set()
    try:
        for job, launch in launches().items():
            launch()
            for name, kernel in found:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    yield job, name, kernel
            found.clear()
    finally:
        JITFunction.run = run


def resources(kernel, capability: int) -> dict:
    """Return what ptxas -v, the one that triton brings, says about a kernel."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", f"--gpu-name=sm_{capability}" + "a" * (capability == 90), file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said))),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def report(capability: int) -> None:
    for job, name, kernel in compiled(capability):
        row = {"capability": capability, "job": job, "kernel": name, **resources(kernel, capability)}
        print(json.dumps(row), flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(capability):
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(capability)], capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    sources = "".join(path.read_text() for path in (Path(__file__).parents[1] / "kernels").glob("*_triton.py"))
    assert {row["kernel"] for row in rows} == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert len(rows) >= 30
    assert [row for row in rows if row["spilled"]] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[capability]] == []


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for number in map(int, sys.argv[1:] or ("80", "90")):
        report(number)
