"""Tiny models, episodes and a toy loss for the learner's tests; run as a script, one rank of a distributed test.

    torchrun --standalone --nproc_per_node 2 tests/distributed_worker.py FOLDER

The process that stands for rank 0 leaves what it found in FOLDER/result.pt; the test compares it with one process.
"""

import json
import resource
import sys
from pathlib import Path

import torch

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.checkpoint import load_checkpoint, save_checkpoint
from adaptive_reasoning.learner.learner import Learner, NonFiniteError
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.runtime import all_gather, make_accelerator
from adaptive_reasoning.run.options import RunArgs

VOCABULARY = 97


def make_args(folder, **changes) -> RunArgs:
    options = {"dtype": "fp32", "learning_rate": 1e-3, "max_grad_norm": 0.05, "temperature": 0.7}
    options |= {"tokens_per_micro_batch": 60, "gradient_checkpointing": False, "output_dir": str(folder)}
    return RunArgs(**(options | changes))


def write_model(folder, tied: bool, family: str = "Qwen2") -> str:
    """Write a random two-layer model and a tokenizer as a Hugging Face folder; return its path."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = getattr(transformers, family + "Config")(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    getattr(transformers, family + "ForCausalLM")(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))).save_pretrained(
        folder
    )
    return str(folder)


def make_episodes(number: int = 10, groups: int = 5, seed: int = 0) -> list[Episode]:
    """Return random episodes of 5 to 20 tokens; every third one with advantage 0, some tokens that are no actions."""
    g = torch.Generator().manual_seed(seed)
    episodes = []
    for i in range(number):
        P, T = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 7), (3, 15)))
        mask = torch.ones(T, dtype=torch.bool)
        mask[2] = i % 4 != 1
        episode = Episode(
            question=Question(id=f"q{i % groups}", problem="", answer=""),
            group=i % groups,
            prompt_ids=torch.randint(VOCABULARY, (P,), generator=g),
            response_ids=torch.randint(VOCABULARY, (T,), generator=g),
            behaviour_logprobs=-4.5 + torch.rand(T, generator=g),
            action_mask=mask,
            finish_reason="stop",
            advantage=0.0 if i % 3 == 2 else float(torch.randn((), generator=g)),
        )
        if i % 2:
            episode.forced[0] = True
            episode.behaviour_logprobs[0] = -0.6931
        episodes.append(episode)
    return episodes


def make_learner(path: str, args, accelerator=None, **options) -> Learner:
    accelerator = accelerator or make_accelerator(args)
    model, _ = load_model(path, args)
    return Learner(args, model, accelerator, **options)


def toy_loss(logprobs, mb, counts):
    """The shape of AdaptThink's loss: the length-normalised ratio times the advantage, mean over sequences."""
    mean = torch.zeros_like(mb.sequence_advantages).index_add(0, mb.sequence, logprobs - mb.old_logprobs) / mb.lengths
    return -(mb.sequence_advantages * mean.exp()).sum() / counts.sequences


def accumulate(learner, minibatch) -> float:
    """Run all micro-batches of a step, forward and backward; return this rank's share of the loss."""
    total = 0.0
    for mb in minibatch:
        logprobs, _ = learner.score(mb)
        value = toy_loss(logprobs, mb, minibatch.counts)
        learner.backward(value)
        total += float(value.detach())
    return total


def train(learner, episodes, steps: int, minibatches: int = 1, first: int = 0, **options) -> list[dict]:
    """Return the statistics of `steps` x `minibatches` updates."""
    stats = []
    for step in range(first, first + steps):
        for minibatch in learner.minibatches(episodes, minibatches, seed=step, **options):
            loss = accumulate(learner, minibatch)
            loss = float(learner._reduce([loss], "sum"))
            stats.append({"loss": loss, "micro_batches": len(minibatch)} | learner.step(learner.args.learning_rate))
    return stats


def skip_one(learner, episodes) -> dict:
    """Return what a step says whose loss is not a number on the first rank, with --on_nonfinite skip."""
    learner.args.on_nonfinite, advantage = "skip", episodes[0].advantage if episodes else 0.0
    if learner.accelerator.process_index == 0:
        episodes[0].advantage = float("nan")
    (minibatch,) = learner.minibatches(episodes, 1, seed=0)
    accumulate(learner, minibatch)
    stats = learner.step(learner.args.learning_rate)
    if learner.accelerator.process_index == 0:
        episodes[0].advantage = advantage
    learner.args.on_nonfinite = "stop"
    return stats


def gradients(learner) -> dict[str, torch.Tensor]:
    """Return the whole gradient by name, on all ranks."""
    if not learner.zero3:
        return {name: p.grad.clone() for name, p in learner.model.named_parameters()}
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in learner.model.named_parameters()}


def weights(learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_weights()}


def save_on_a_full_disk(folder, learner, failing_rank: int) -> list[str]:
    """Return what every rank was told when the disk of one of them was full: files over 50 kB cannot be written."""
    tokenizer = load_model(str(folder / "untied"), learner.args)[1]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if learner.accelerator.process_index == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        save_checkpoint(folder / "step_000009", learner, tokenizer, {})
        told = "no error"
    except UserError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return all_gather(learner.accelerator, told)


# How the ten episodes are dealt to two ranks.
SHARES = {"uneven": [[0, 3], [1, 2, 4, 5, 6, 7, 8, 9]], "empty": [list(range(10)), []]}


def main(folder: Path) -> None:
    args = make_args(folder)
    accelerator = make_accelerator(args)
    rank, result = accelerator.process_index, {}
    for share, (name, tied) in zip(SHARES, (("tied", True), ("untied", False))):
        mine = [make_episodes()[i] for i in SHARES[share][rank]]
        learner = make_learner(str(folder / name), args, accelerator)
        learner.recompute_logprobs(mine)
        found = {"old": [e.old_logprobs for e in mine]}
        (minibatch,) = learner.minibatches(mine, 1, seed=0)
        found["loss"] = float(learner._reduce([accumulate(learner, minibatch)], "sum"))
        found["gradients"] = gradients(learner)
        found["first"] = learner.step(learner.args.learning_rate)
        found["stats"] = train(learner, mine, 2, minibatches=2, first=1, skip_zero_advantage=True)
        found["weights"] = weights(learner)
        if not tied:  # save, go on, and go on again from what was saved
            save_checkpoint(folder / "step_000003", learner, load_model(str(folder / name), args)[1], {"step": 3})
            found["after"] = train(learner, mine, 2, first=3)
            found["after_weights"] = weights(learner)
            learner = make_learner(str(folder / name), args, accelerator)
            found["state"] = load_checkpoint(folder / "step_000003", learner)
            found["restored_steps"] = learner.steps
            found["skipped"] = skip_one(learner, mine)
            found["again"] = train(learner, mine, 2, first=3)
            found["again_weights"] = weights(learner)

            found["full_disk"] = save_on_a_full_disk(folder, learner, failing_rank=1 if learner.zero3 else 0)

            reference = make_learner(str(folder / name), args, accelerator, trainable=False)
            found["reference"] = reference.logprobs(mine)

            before = weights(learner)
            if rank == 0:
                mine[0].advantage = float("nan")
            (minibatch,) = learner.minibatches(mine, 1, seed=0)
            accumulate(learner, minibatch)
            try:
                learner.step(learner.args.learning_rate)
                message = "no error"
            except NonFiniteError as error:
                message = str(error)
            same = all(torch.equal(a, b) for a, b in zip(before.values(), weights(learner).values()))
            (folder / f"stopped_{rank}.json").write_text(json.dumps({"message": message, "same": same}))
        result[share] = found
    if rank == 0:
        torch.save(result, folder / "result.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
