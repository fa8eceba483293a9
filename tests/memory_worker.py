"""Real AdaptThink steps in a process of its own, and the most memory it took, against the plan made from the config.

    python tests/memory_worker.py 10M 60M 195M 134M-lora        # minutes each; prints measured and planned MiB

A tiny model goes first through every phase; what the process holds afterwards is the line "interpreter, libraries"
(measured, not planned). The peaks are the kernel's (VmHWM), read and set back at the end of each phase. What a process
has freed stays with it in part, so the peak of the whole run is judged, not those of the phases.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

MIB = 2**20
STEPS = 2  # the first allocates the optimiser


@dataclass(frozen=True)
class Size:
    """A Qwen2 and the AdaptThink steps it takes; what was measured, in MiB: one thread, fp32, AMD EPYC, torch 2.13."""

    vocab: int
    hidden: int
    layers: int
    intermediate: int
    tied: bool
    checkpointing: bool
    prompts: int = 4
    prompt_tokens: int = 64
    max_new_tokens: int = 128
    micro_batch: int = 1024
    kv_heads: int = 1
    lora_rank: int = 0
    giving: bool = False  # freed memory back at once: without glibc's gaps, which are 1.5 GiB in thirty layers
    libraries: float = 0.0
    measured: float = 0.0

    def config(self):
        from transformers import Qwen2Config

        return Qwen2Config(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            intermediate_size=self.intermediate, num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.kv_heads, max_position_embeddings=1024, tie_word_embeddings=self.tied,
        )  # fmt: skip

    def options(self, folder: str):
        from adaptive_reasoning.adaptthink import Args

        return Args(
            model=folder, output_dir=folder, num_generations=4, prompts_per_step=self.prompts, max_steps=STEPS,
            max_prompt_tokens=self.prompt_tokens, max_new_tokens=self.max_new_tokens, temperature=1.0, dtype="fp32",
            nothinking_max_new_tokens=self.max_new_tokens, rollout_rows=self.prompts * 4, ref_top_p=1.0, eval_top_p=1.0,
            tokens_per_micro_batch=self.micro_batch, gradient_checkpointing=self.checkpointing,
            lora_rank=self.lora_rank,
        )  # fmt: skip


TINY = Size(300, 64, 2, 128, tied=True, checkpointing=False)
SIZES = {
    "10M": Size(32_000, 192, 8, 768, True, False, micro_batch=2048, libraries=473.2, measured=1166.2),
    "60M": Size(32_000, 512, 9, 1536, False, False, libraries=482.2, measured=2436.4),
    "195M": Size(151_936, 768, 12, 2304, True, True, prompts=2, prompt_tokens=32, max_new_tokens=48, micro_batch=320,
                 libraries=472.1, measured=5725.7),
    "134M-lora": Size(49_152, 576, 30, 1536, True, True, kv_heads=3, lora_rank=16, giving=True,
                      libraries=458.8, measured=2024.9),
}  # fmt: skip


def planned(size: Size, libraries: float) -> float:
    """Return the peak of the plan in MiB, with what the libraries of the measured process held."""
    from adaptive_reasoning.rollout.engine import CPU_CACHE_BYTES
    from adaptive_reasoning.run.memory import Where, plan_memory
    from adaptive_reasoning.run.shapes import shapes_of

    args, held = size.options("-"), int(libraries * MIB)
    where = Where(cuda=False, longest_prompt=size.prompt_tokens, kv_cache=CPU_CACHE_BYTES, libraries=held)
    return plan_memory(args, args.holds(), shapes_of(size.config()), where).peak / MIB


def status(key: str) -> float:
    """Return a line of /proc/self/status in MiB: VmRSS, what is held now, or VmHWM, the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def peak_of(size: Size, folder: Path) -> float:
    """Load the model, take real steps and save; return the peak in MiB."""
    import torch

    from adaptive_reasoning import formats
    from adaptive_reasoning.adaptthink import advantage, loss, plan_rollouts
    from adaptive_reasoning.core.episode import Episode
    from adaptive_reasoning.core.question import Question
    from adaptive_reasoning.learner.checkpoint import save_checkpoint
    from adaptive_reasoning.learner.learner import Learner
    from adaptive_reasoning.learner.model import load_config, load_model
    from adaptive_reasoning.learner.runtime import make_accelerator
    from adaptive_reasoning.rollout import Decoder, Engine, Sampling
    from adaptive_reasoning.rollout.engine import CPU_CACHE_BYTES

    args = size.options(str(folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    model, tokenizer = load_model(str(folder), args)
    form = formats.load("think")(tokenizer, args)
    learner = Learner(args, model, make_accelerator(args))
    engine = Engine(Decoder(load_config(str(folder))), args.rollout_rows, cache_bytes=CPU_CACHE_BYTES)
    engine.refresh(learner.named_weights())
    numbers = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        prompts = torch.randint(4, size.vocab, (size.prompts, size.prompt_tokens), generator=numbers).tolist()
        asked = [(i, Question(str(i), "", "", 1, ""), ids) for i, ids in enumerate(prompts)]
        done = engine.run(plan_rollouts(asked, form, args, (), step), Sampling(args.temperature))
        episodes = [Episode.of(c, reward=float(c.response_ids[-1] % 2)) for c in done]
        for e in episodes:
            e.mode = form.mode_of(e.response_ids)
            e.advantage = advantage(e, 0.5, args)
        for minibatch in learner.minibatches(episodes, 1, step):
            for mb in minibatch:
                logprobs, _ = learner.score(mb)
                mb.old_logprobs = torch.where(mb.forced, mb.old_logprobs, logprobs.detach())
                learner.backward(loss(logprobs, mb, minibatch.counts, args)[0])
            learner.step(args.learning_rate)
        del done, episodes, mb, logprobs, minibatch
        engine.refresh(learner.named_weights())
    save_checkpoint(folder / "checkpoint", learner, tokenizer, {"step": STEPS})
    return status("VmHWM")


def write_model(size: Size, folder: Path) -> None:
    """Write random weights and a tokenizer with `</think>`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(size.config()).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"</think>": 0, "Alright": 1, "[UNK]": 2, "a": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %} {{ m['content'] }} {% endfor %}{% if true %}<think>\n{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a", chat_template=template)
    tokenizer.save_pretrained(folder)


def measure(name: str) -> dict[str, float]:
    """Return {"libraries", "measured", "planned"} of a size in MiB."""

    giving = {"MALLOC_MMAP_THRESHOLD_": "65536"} if SIZES[name].giving else {}

    def run(*words: str) -> str:  # models are written by a process of their own, so that nothing of it is counted
        command, env = [sys.executable, __file__, *words], os.environ | giving
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout

    with tempfile.TemporaryDirectory() as folder:
        for which in ("tiny", name):
            run("write", which, folder)
        found = json.loads(run("steps", name, folder).splitlines()[-1])
    return found | {"planned": planned(SIZES[name], found["libraries"])}


def main(words: list[str]) -> None:
    sizes = {"tiny": TINY} | SIZES
    if words[0] == "write":
        write_model(sizes[words[1]], Path(words[2]) / words[1])
    elif words[0] == "steps":
        import torch

        torch.set_num_threads(1)
        size, folder = sizes[words[1]], Path(words[2])
        peak_of(replace(TINY, lora_rank=size.lora_rank), folder / "tiny")  # libraries, threads, allocator: of any run
        gc.collect()
        libraries = status("VmRSS")
        print(json.dumps({"libraries": libraries, "measured": peak_of(size, folder / words[1])}))
    else:
        for name in words:
            print(name, {part: round(mib, 1) for part, mib in measure(name).items()})


if __name__ == "__main__":
    main(sys.argv[1:])
