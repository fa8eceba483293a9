"""One rank of the critic's distributed test: policy and critic side by side, trained, saved and continued.

torchrun --standalone --nproc_per_node 2 tests/critic_worker.py FOLDER
"""

import sys
from pathlib import Path

import torch
from distributed_worker import make_args, make_episodes, train, weights, write_model

from adaptive_reasoning.learner.checkpoint import load_checkpoint, save_checkpoint
from adaptive_reasoning.learner.critic import Critic, load_critic
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.runtime import all_reduce, end, make_accelerator
from adaptive_reasoning.thinker import normalise, value_loss

SHARES = [[0, 3], [1, 2, 4, 5, 6, 7, 8, 9]]  # how the ten episodes are dealt to two ranks


ENGINES = []  # of DeepSpeed, to be taken apart at the end: four in one process


class Settings:
    value_clip = 0.2


def make_pair(path, folder, accelerator):
    """Return (policy, critic), the policy first: ZeRO-3 completes its configuration with it."""
    args = make_args(folder)
    args.critic_learning_rate = 2e-3
    learner = Learner(args, load_model(path, args)[0], accelerator)
    critic = Critic(args, load_critic(path, args), accelerator)
    if learner.zero3:
        ENGINES.extend([learner.engine, critic.engine])
    return learner, critic


def fresh_episodes(ranks) -> list:
    episodes = [make_episodes()[i] for i in ranks]
    for e in episodes:
        e.forced = torch.zeros(e.num_tokens, dtype=torch.bool)
    return episodes


def total_of(critic):
    """Return the function that sums numbers over all processes."""
    return lambda values: all_reduce(critic.accelerator, values, "sum").tolist()


def learn(critic, episodes, steps, first=0) -> list[float]:
    """Train towards returns that differ between episodes, two updates a step; return the losses over all ranks."""
    losses = []
    for e, v in zip(episodes, critic.values(episodes)):
        e.columns |= {"values": v, "returns": torch.full((e.num_tokens,), e.advantage)}
    for step in range(first, first + steps):
        for minibatch in critic.minibatches(episodes, 2, seed=step):
            total = 0.0
            for mb in minibatch:
                values, _ = critic.score(mb)
                value, _ = value_loss(values, mb, minibatch.counts, Settings)
                critic.backward(value)
                total += float(value.detach()) * mb.weight
            critic.step(critic.args.critic_learning_rate)
            losses += total_of(critic)([total])
    return losses


def check(folder: Path, accelerator, mine: list) -> dict:
    """Return what training both, saving and continuing gave."""
    learner, critic = make_pair(str(folder / "model"), folder, accelerator)
    found = {"first": learn(critic, mine, 2), "policy": [s["loss"] for s in train(learner, mine, 1)]}
    found["values"] = critic.values(mine)
    found["normalised"] = normalise(
        torch.cat([v[e.action_mask] for e, v in zip(mine, found["values"])]), total_of(critic)
    )
    tokenizer = load_model(str(folder / "model"), learner.args)[1]
    save_checkpoint(folder / "step_000001", learner, tokenizer, {"step": 1}, critic)
    found["after"] = learn(critic, mine, 1, first=2) + [s["loss"] for s in train(learner, mine, 1, first=1)]
    learner, critic = make_pair(str(folder / "model"), folder, accelerator)
    load_checkpoint(folder / "step_000001", learner, critic)
    found["again"] = learn(critic, mine, 1, first=2) + [s["loss"] for s in train(learner, mine, 1, first=1)]
    found["weights"] = weights(critic)
    return found


def main(folder: Path) -> None:
    accelerator = make_accelerator(make_args(folder))
    rank = accelerator.process_index
    if rank == 0:
        write_model(folder / "model", tied=True)
    accelerator.wait_for_everyone()
    found = check(folder, accelerator, fresh_episodes(SHARES[rank]))
    if rank == 0:
        torch.save(found, folder / "result.pt")
    end(accelerator, ENGINES)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
