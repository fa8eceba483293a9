"""Plan: what the preflight predicts against what runs on this machine need, memory and time, at three sizes.

Each size is a process of its own that takes real AdaptThink steps: the algorithm's own requests, advantage and loss,
the real engine, learner and checkpoint. A tiny model goes first through every phase; what the process holds afterwards
is the line "interpreter, libraries" (measured, not predicted). What comes on top is predicted from the config alone.
The peaks are the kernel's (VmHWM), read and set back at the end of each phase.

    make bench-plan                            # prints the table
    make bench-plan ARGS="--write"             # and puts the result into plan.json
    MALLOC_MMAP_THRESHOLD_=65536 make bench-plan       # with an allocator that gives everything freed back at once

Gradients and activations that are smaller than 32 MiB lie in glibc's heap, whose gaps count as memory of the process:
they are not in the plan. What a process has freed stays with it in part, so the peaks of the phases behind the largest
one are those of the heap; only the peak of the whole run is judged.

The times are compared with the plan's too, with the products and the bandwidth that a probe finds on this machine: a
ratio to look at, nothing is asserted about it.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import torch

RESULT = Path(__file__).parent / "plan.json"
MIB = 2**20
ALLOWED = 0.10  # the measured peak may differ from the predicted one by this share of it
STEPS = 2  # the first allocates the optimiser, the last is timed


@dataclass(frozen=True)
class Size:
    """A Qwen2 and the AdaptThink steps it takes."""

    vocab: int
    hidden: int
    layers: int
    intermediate: int
    tied: bool
    checkpointing: bool
    prompts: int = 4
    group: int = 4
    prompt_tokens: int = 64
    max_new_tokens: int = 128
    micro_batch: int = 1024

    def config(self):
        from transformers import Qwen2Config

        return Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            tie_word_embeddings=self.tied,
        )

    def options(self, folder: str):
        from adaptive_reasoning.adaptthink import Args

        return Args(
            model=folder,
            output_dir=folder,
            num_generations=self.group,
            prompts_per_step=self.prompts,
            max_prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            nothinking_max_new_tokens=self.max_new_tokens,
            rollout_rows=self.prompts * self.group,
            tokens_per_micro_batch=self.micro_batch,
            gradient_checkpointing=self.checkpointing,
            temperature=1.0,
            dtype="fp32",
            eval_top_p=1.0,  # nothing is evaluated
            ref_top_p=1.0,
            max_steps=STEPS,
        )


TINY = Size(vocab=300, hidden=64, layers=2, intermediate=128, tied=True, checkpointing=False)
SIZES = {
    "10M": Size(32_000, 192, 8, 768, tied=True, checkpointing=False, micro_batch=2048),
    "60M": Size(32_000, 512, 9, 1536, tied=False, checkpointing=False),
    "195M": Size(151_936, 768, 12, 2304, True, True, prompts=2, prompt_tokens=32, max_new_tokens=48, micro_batch=320),
}


def status(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS, what is held now, or VmHWM, the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def phase_peak() -> int:
    """Return the peak since the last call, and start anew from what is held now."""
    peak = status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def steps_of(size: Size, steps: int, peaks: dict[str, int], seconds: dict[str, float]) -> None:
    """Load the model, take real steps and save; note the peak of every phase and the seconds of the last step."""
    from adaptive_reasoning.adaptthink import Control, advantage, loss, plan_rollouts
    from adaptive_reasoning.core.episode import Episode
    from adaptive_reasoning.core.question import Question
    from adaptive_reasoning.learner.checkpoint import save_checkpoint
    from adaptive_reasoning.learner.learner import Learner
    from adaptive_reasoning.learner.model import load_config, load_model
    from adaptive_reasoning.learner.runtime import make_accelerator
    from adaptive_reasoning.rollout import Decoder, Engine, Sampling
    from adaptive_reasoning.rollout.engine import CPU_CACHE_BYTES

    def ended(phase: str) -> None:
        peaks[phase] = max(peaks.get(phase, 0), phase_peak())

    with tempfile.TemporaryDirectory() as folder:
        write_model(size, folder)
        args = size.options(folder)
        phase_peak()
        model, tokenizer = load_model(folder, args)
        learner = Learner(args, model, make_accelerator(args))
        engine = Engine(Decoder(load_config(folder)), args.rollout_rows, cache_bytes=CPU_CACHE_BYTES)
        engine.refresh(learner.named_weights())
        ended("load")
        numbers = torch.Generator().manual_seed(0)
        control = Control(1, [2], True)
        for step in range(steps):
            start = time.perf_counter()
            prompts = torch.randint(3, size.vocab, (size.prompts, size.prompt_tokens), generator=numbers).tolist()
            asked = [(i, Question(str(i), "", "", 1, ""), ids) for i, ids in enumerate(prompts)]
            done = engine.run(plan_rollouts(asked, control, args, (), step), Sampling(args.temperature))
            ended("rollout")
            rolled_out = time.perf_counter()
            episodes = [Episode.of(c, reward=float(c.response_ids[-1] % 2), info={"forced": 1}) for c in done]
            for e in episodes:
                e.mode = control.mode_of(e.response_ids)
                e.advantage = advantage(e, 0.5, args)
            for minibatch in learner.minibatches(episodes, 1, step):
                for mb in minibatch:
                    logprobs, _ = learner.score(mb)
                    mb.old_logprobs = torch.where(mb.forced, mb.old_logprobs, logprobs.detach())
                    learner.backward(loss(logprobs, mb, minibatch.counts, args)[0])
                ended("update")
                learner.step()
                ended("optimiser step")
            del done, episodes, mb, logprobs, minibatch
            updated = time.perf_counter()
            engine.refresh(learner.named_weights())
            ended("refresh")
            seconds |= {"rollout": rolled_out - start, "update": updated - rolled_out}
        save_checkpoint(Path(folder) / "checkpoint", learner, tokenizer, {"step": steps})
        ended("save")


def write_model(size: Size, folder: str) -> None:
    """Write random weights and a tokenizer; in a process of its own, so that nothing of it is counted."""
    command = [sys.executable, __file__, "--make", folder, "--size", json.dumps(asdict(size))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make(size: Size, folder: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(size.config()).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a").save_pretrained(folder)


def measure(size: Size, threads: int) -> dict:
    """Return {"baseline", "peaks": {phase: bytes}, "seconds"}; runs in the process that is measured."""
    torch.set_num_threads(threads)
    steps_of(TINY, 2, {}, {})  # libraries, thread pools, allocator: everything that a run of any size needs
    gc.collect()
    baseline, peaks, seconds = status("VmRSS"), {}, {}
    steps_of(size, STEPS, peaks, seconds)
    return {"baseline": baseline, "peaks": peaks, "seconds": seconds}


def in_fresh_process(size: Size, threads: int) -> dict:
    command = [sys.executable, __file__, "--size", json.dumps(asdict(size)), "--threads", str(threads)]
    done = subprocess.run([*command, "--measure"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def predict(size: Size, baseline: int, flops: float, bandwidth: float):
    """Return (memory plan, hours) of the run that `steps_of` takes, from the config and the options alone."""
    from adaptive_reasoning.plan.fit import plan_memory
    from adaptive_reasoning.plan.hours import Assumptions, plan_hours
    from adaptive_reasoning.plan.machine import Machine
    from adaptive_reasoning.plan.memory import Where
    from adaptive_reasoning.plan.shapes import shapes_of
    from adaptive_reasoning.rollout.engine import CPU_CACHE_BYTES

    shapes, args = shapes_of(size.config()), size.options("-")
    where = Where(cuda=False, longest_prompt=size.prompt_tokens, kv_cache=CPU_CACHE_BYTES, libraries=baseline)
    a = Assumptions(
        prompt_tokens=size.prompt_tokens,
        mean_response_tokens=size.max_new_tokens,
        cpu_gflops=flops / 1e9,
        cpu_gbs=bandwidth / 1e9,
    )
    memory = plan_memory(args, shapes, where)
    return memory, plan_hours(args, shapes, Machine(None), a, memory.cache_bytes), shapes


def compare(size: Size, threads: int) -> dict:
    """Measure and predict one size; all memory in MiB."""
    flops, bandwidth = harness.matmul_rate(), harness.read_rate(256 * MIB)
    found = in_fresh_process(size, threads)
    memory, hours, shapes = predict(size, found["baseline"], flops, bandwidth)
    measured, baseline = max(found["peaks"].values()), found["baseline"]
    planned = {line.name: line.seconds for line in hours.step}
    seconds = {"rollout": planned["decode"] + planned["prefill"], "update": planned["update"] + planned["optimiser"]}
    return {
        "parameters": shapes.parameters,
        "libraries_mib": round(baseline / MIB, 1),
        "measured_mib": round(measured / MIB, 1),
        "predicted_mib": round(memory.peak / MIB, 1),
        "measured_over_predicted": round(measured / memory.peak, 3),
        "without_libraries": round((measured - baseline) / (memory.peak - baseline), 3),
        "predicted_phase": memory.largest_phase,
        "measured_peaks_mib": {phase: round(peak / MIB, 1) for phase, peak in found["peaks"].items()},
        "seconds": {
            part: {"measured": round(found["seconds"][part], 2), "predicted": round(seconds[part], 2)}
            for part in seconds
        },
        "probe": {"gflops": round(flops / 1e9, 1), "gbs": round(bandwidth / 1e9, 1)},
    }


def show(results: dict[str, dict]) -> None:
    """Print memory and time of all sizes."""
    rows = []
    for name, r in results.items():
        numbers = (r["libraries_mib"], r["predicted_mib"], r["measured_mib"])
        ratios = (r["measured_over_predicted"], r["without_libraries"])
        rows.append(
            [name, f"{r['parameters'] / 1e6:.1f} M", *(f"{x:.0f}" for x in numbers), *(f"{x:.3f}" for x in ratios)]
        )
    head = [
        "memory, MiB",
        "parameters",
        "libraries",
        "predicted",
        "measured",
        "measured / predicted",
        "without libraries",
    ]
    harness.print_table(head, rows)
    rows = []
    for name, r in results.items():
        for part, s in r["seconds"].items():
            rows.append([f"{name} {part}", s["predicted"], s["measured"], f"{s['measured'] / s['predicted']:.2f}"])
    harness.print_table(["time of a step, s", "predicted", "measured", "measured / predicted"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sizes", nargs="*", help=f"of {', '.join(SIZES)}; all if none is given")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--write", action="store_true", help="put the result into plan.json")
    parser.add_argument("--size", help=argparse.SUPPRESS)  # of the processes that it starts
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.make:
        return make(Size(**json.loads(args.size)), args.make)
    if args.measure:
        return print(json.dumps(measure(Size(**json.loads(args.size)), args.threads)))
    if unknown := set(args.sizes) - set(SIZES):
        parser.error(f"unknown size {min(unknown)}: there are {', '.join(SIZES)}")
    torch.set_num_threads(args.threads)
    env = harness.environment(args.threads)
    harness.print_head("Plan against real AdaptThink steps on the CPU, fp32; a process of its own for each size", env)
    results = {name: compare(SIZES[name], args.threads) for name in args.sizes or SIZES}
    show(results)
    env["cores_of_others"].append(harness.cores_of_others())
    if args.write:
        kept = json.loads(RESULT.read_text())["sizes"] if RESULT.is_file() else {}
        sizes = {name: (kept | results)[name] for name in SIZES if name in kept | results}
        RESULT.write_text(json.dumps({**env, "sizes": sizes}, indent=1) + "\n")
    far = [name for name, r in results.items() if abs(r["measured_over_predicted"] - 1) > ALLOWED]
    print(json.dumps({"benchmark": "plan", **env, "sizes": results}))
    if far:
        raise SystemExit(f"more than {ALLOWED:.0%} away from the plan: {', '.join(far)}")


if __name__ == "__main__":
    main()
