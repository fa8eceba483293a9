"""Training step: roll out, log-probs, update; ours against TRL's GRPOTrainer.

Both train the same Qwen2 of 6.8M parameters (fp32, CPU) on the same prompts with the same group size, temperature,
reward, GRPO advantage, clipped token loss, AdamW settings and one optimiser step a rollout batch. Each side is a
process of its own; they take their steps in turns. Two sets of lengths:

 fixed        no stop token: every response has the same length, so the two do exactly the same work
 long-tailed  each token ends a response with probability 1/60, as it would with a trained model; both sides draw
              their own lengths from that distribution, cut at 316
"""

import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import StringIO
from multiprocessing import get_context

import harness
import numpy as np
import torch

MEAN_LENGTH = 60  # of the long-tailed responses, before the cut


@dataclass(frozen=True)
class Plan:
    """One training set-up, the same for both sides."""

    stops: int  # so many token ids end a response (0: none)
    max_new_tokens: int
    prompts: int = 8  # a step
    group: int = 8  # responses to a prompt
    prompt_tokens: int = 32
    steps: int = 4  # the first is the warm-up
    threads: int = 2
    smoke: bool = False
    learning_rate: float = 1e-4

    def model(self):
        """Return the model; small weights in the output make all tokens about equally likely, stop tokens too."""
        model = harness.small_model(self.smoke)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(0.1)
        return model

    def questions(self, vocab: int) -> list[list[list[int]]]:
        """Return the prompts of each step; ids below `stops` are the stop tokens and do not occur."""
        rng = np.random.default_rng(0)
        return rng.integers(self.stops, vocab, (self.steps, self.prompts, self.prompt_tokens)).tolist()


def reward(response: list[int]) -> float:
    """Return something that differs within a group and costs nothing."""
    return float(response[0] % 2)


# ---------------------------------------------------------------------------------------------------------------- ours


def ours(pipe, plan: Plan) -> None:
    """Take one step for every message, with the parts that the algorithm files are made of."""
    from adaptive_reasoning.adaptthink import Args, loss, plan_rollouts
    from adaptive_reasoning.core.episode import Episode
    from adaptive_reasoning.core.question import Question
    from adaptive_reasoning.learner.learner import Learner
    from adaptive_reasoning.learner.runtime import make_accelerator
    from adaptive_reasoning.rollout import Decoder, Engine, Sampling

    torch.set_num_threads(plan.threads)
    args = Args(
        forcing="off",
        ratio="token",
        num_generations=plan.group,
        prompts_per_step=plan.prompts,
        max_new_tokens=plan.max_new_tokens,
        temperature=1.0,
        learning_rate=plan.learning_rate,
        weight_decay=0.0,
        tokens_per_micro_batch=2048,
        dtype="fp32",
        gradient_checkpointing=False,
    )
    model = plan.model()
    questions = plan.questions(model.config.vocab_size)
    learner = Learner(args, model, make_accelerator(args))
    engine = Engine(Decoder(model.config))
    engine.refresh(learner.named_weights())
    for step in range(plan.steps):
        pipe.recv()
        start = time.perf_counter()
        asked = [(i, Question(str(i), "", "", 1, ""), prompt) for i, prompt in enumerate(questions[step])]
        requests = plan_rollouts(asked, None, args, tuple(range(plan.stops)), step)
        done = engine.run(requests, Sampling(1.0))
        episodes = [Episode.of(c, reward=reward(c.response_ids.tolist())) for c in done]
        for g in range(plan.prompts):  # GRPO: A = (R - mean) / (std + 1e-4) within a group
            members = [e for e in episodes if e.group == g]
            rewards = torch.tensor([e.reward for e in members])
            for e, a in zip(members, (rewards - rewards.mean()) / (rewards.std() + 1e-4)):
                e.advantage = float(a)
        rolled_out = time.perf_counter()
        for minibatch in learner.minibatches(episodes, 1, step):
            for mb in minibatch:
                logprobs, _ = learner.score(mb)
                mb.old_logprobs = logprobs.detach()
                value, _ = loss(logprobs, mb, minibatch.counts, args)
                learner.backward(value)
            learner.step(args.learning_rate)
        engine.refresh(learner.named_weights())
        end = time.perf_counter()
        tokens = [e.num_tokens for e in episodes]
        pipe.send({"step": end - start, "rollout": rolled_out - start, "tokens": sum(tokens), "longest": max(tokens)})


# ----------------------------------------------------------------------------------------------------------------- TRL


def trl(pipe, plan: Plan) -> None:
    """Let a GRPOTrainer take one step for every message."""
    import logging
    import warnings

    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(plan.threads)
    disable_progress_bars()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model = plan.model()
    vocab = model.config.vocab_size
    # Token i is the word "i". The tokenizer's own stop token lies outside the model's vocabulary: it never occurs.
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token=str(vocab))
    model.generation_config.eos_token_id = list(range(plan.stops)) or None
    prompts = [" ".join(map(str, p)) for step in plan.questions(vocab) for p in step]
    times = {}

    def rewards(completion_ids, **_):
        times["rollout"] = time.perf_counter() - times["start"]
        tokens = list(map(len, completion_ids))
        times.update(tokens=sum(tokens), longest=max(tokens))
        return [reward(c) for c in completion_ids]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            pipe.recv()
            times["start"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            step = time.perf_counter() - times.pop("start")
            pipe.send({"step": step, **times})

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, max_steps=plan.steps, **trl_options(plan))
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[Turns()],
        )
        with redirect_stdout(StringIO()):  # it prints its metrics at the end
            trainer.train()


def trl_options(plan: Plan) -> dict:
    """Return the options of GRPOConfig: the same mathematics as ours, nothing beside it, and the fastest settings.

    Tried and slower: the growing cache (by 3 %), micro-batches of 16 or 8 responses with accumulation (by 5 %), and
    transformers' continuous batching for the rollout (2.4 times the step).
    """
    return {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_vllm": False,
        "cache_implementation": "static",
        "per_device_train_batch_size": plan.prompts * plan.group,
        "gradient_accumulation_steps": 1,
        "num_generations": plan.group,
        "num_iterations": 1,
        "max_completion_length": plan.max_new_tokens,
        "beta": 0.0,
        "temperature": 1.0,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "shuffle_dataset": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


# ---------------------------------------------------------------------------------------------------------- comparison


def take_turns(plan: Plan, sides: dict) -> dict[str, list[dict]]:
    """Run the sides in processes of their own, step by step in turns; return their steps after the first."""
    spawn = get_context("spawn")
    pipes, workers, steps = {}, {}, {name: [] for name in sides}
    for name, target in sides.items():
        pipes[name], theirs = spawn.Pipe()
        workers[name] = spawn.Process(target=target, args=(theirs, plan), daemon=True)
        workers[name].start()
        theirs.close()
    for i in range(plan.steps):
        for name in list(sides) if i % 2 else list(sides)[::-1]:
            pipes[name].send("step")
            try:
                found = pipes[name].recv()
            except EOFError:
                raise SystemExit(f"{name} ended in the middle of step {i + 1}; its error is above.") from None
            if i:
                steps[name].append(found)
    for worker in workers.values():
        worker.join(60)
    return steps


def compare(name: str, plan: Plan, sides: dict) -> dict:
    """Measure one set of lengths and print its table."""
    steps = take_turns(plan, sides)
    print(f"\n{name}: {plan.prompts} prompts of {plan.prompt_tokens} tokens x {plan.group} responses", end="")
    print(f" of {'at most ' if plan.stops else ''}{plan.max_new_tokens} tokens; {plan.steps - 1} steps each")
    rows, found = [], {}
    for side, taken in steps.items():
        seconds = {
            "step": [s["step"] for s in taken],
            "rollout": [s["rollout"] for s in taken],
            "update": [s["step"] - s["rollout"] for s in taken],
        }
        found[side] = {k: harness.spread(v) for k, v in seconds.items()}
        found[side]["tokens"] = float(np.mean([s["tokens"] for s in taken]))
        found[side]["longest"] = float(np.mean([s["longest"] for s in taken]))
        times = [harness.shown(found[side][k]) for k in ("step", "rollout", "update")]
        rows.append([side, *times, f"{found[side]['tokens']:.0f}", f"{found[side]['longest']:.0f}"])
    harness.print_table(["", "step s", "rollout s", "update s", "tokens", "longest"], rows)
    if "TRL" in steps:
        both = [[s["step"] for s in steps[side]] for side in ("TRL", "ours")]
        found["ratio"] = harness.ratio(*both)
        print(f"a step of TRL takes {harness.shown(found['ratio'])} times as long as ours")
    return found


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv)
    start = time.perf_counter()
    env = harness.environment(args.threads)
    sides = {"ours": ours, "TRL": trl}
    if find_spec("trl") is None:
        del sides["TRL"]
        print("trl is not installed, so there is nothing to compare with: make bench installs it")
    size = {"threads": args.threads, "steps": 1 + args.repeats}
    if args.smoke:
        size = {"threads": args.threads, "steps": 2, "prompts": 2, "group": 2, "prompt_tokens": 5, "smoke": True}
    vocab = harness.small_model(args.smoke).config.vocab_size
    plans = {
        "fixed": Plan(stops=0, max_new_tokens=128, **size),
        "long-tailed": Plan(stops=round(vocab / MEAN_LENGTH), max_new_tokens=12 if args.smoke else 316, **size),
    }
    if args.smoke:
        del plans["fixed"]
    harness.print_head("Training step: Qwen2 of 6.8M parameters, fp32, one optimiser step a rollout batch", env)
    if "TRL" in sides:
        words = ", ".join(f"{k} {v}" for k, v in trl_options(plans["long-tailed"]).items())
        print(f"GRPOTrainer with {words}")
    found = {name: compare(name, plan, sides) for name, plan in plans.items()}
    compared = {f"ratio/TRL/{name}": part["ratio"][0] for name, part in found.items() if "ratio" in part}
    result = {"plans": {name: asdict(plan) for name, plan in plans.items()}, "runs": found}
    harness.finish("step", env, compared, result | {"wall_s": round(time.perf_counter() - start, 1)}, args)


if __name__ == "__main__":
    sys.exit(main())
