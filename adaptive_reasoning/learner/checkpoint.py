"""Checkpoints: a Hugging Face folder beside everything needed to continue exactly.

    checkpoints/step_000150/model/                 config, safetensors, tokenizer: opens with from_pretrained and vLLM
    checkpoints/step_000150/optimizer/rank_0.pt    AdamW state; under ZeRO-3 one shard a process, fp32 weights included
    checkpoints/step_000150/critic/                model/ and optimizer/ of the critic, where there is one
    checkpoints/step_000150/state.json             what the caller wants back, and how the learner was distributed

A checkpoint is written into a folder beside, synced to disk and renamed, so a folder with the final name is whole
whenever the process was killed. Files are read back with `weights_only=True`: nothing in them is executed.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.runtime import all_gather

PARTIAL = ".partial"  # ending of a folder that is being written or deleted
NAME = re.compile(r"step_(\d+)")


def save_checkpoint(folder, learner, tokenizer, state: dict, critic=None) -> None:
    """Write `folder`, whole or not at all. Every rank must call this; `state` (JSON values) is taken from rank 0.

    Raises:
        UserError: on all ranks, if any of them could not write (disk full, no permission). Nothing is left behind.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + PARTIAL)
    accelerator = learner.accelerator
    main = accelerator.is_main_process
    parts = [(partial, learner)] + ([(partial / "critic", critic)] if critic else [])
    # Collective operations come first: a rank that fails to write must not leave the others waiting in one.
    gathered = [(place, part, whole_weights(part), optimizer_shard(part)) for place, part in parts]

    def prepare():
        shutil.rmtree(partial, ignore_errors=True)
        for place, _ in parts:
            (place / "optimizer").mkdir(parents=True)

    def write():
        for place, part, weights, shard in gathered:
            if main:
                part.model.save_pretrained(place / "model", state_dict=weights)
            if main or part.zero3:
                with open(place / "optimizer" / f"rank_{accelerator.process_index}.pt", "wb") as file:
                    torch.save(shard, file)
        if main:
            tokenizer.save_pretrained(partial / "model")
            about = {"zero3": learner.zero3, "processes": accelerator.num_processes, "optimiser_steps": learner.steps}
            if critic:
                about["critic_steps"] = critic.steps
            (partial / "state.json").write_text(json.dumps({"learner": about, "state": state}, indent=1) + "\n")

    def finish():
        sync(partial)
        old = set_aside(folder) if folder.exists() else None  # the same step again, in a run continued from before it
        os.rename(partial, folder)
        sync_file(folder.parent)
        if old:
            shutil.rmtree(old)

    for action, everybody in ((prepare, False), (write, True), (finish, False)):
        error = attempt(action) if everybody or main else None
        failed = [message for message in all_gather(accelerator, error) if message]
        if failed:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            accelerator.wait_for_everyone()
            raise UserError(
                f"cannot write the checkpoint {folder}: {failed[0]}. Nothing was left behind; free some space or "
                "choose another --output_dir, and start the same command again."
            )


def attempt(action) -> str | None:
    """Run `action` and return None, or the message if it could not write."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save hides it behind an error of its own
            return str(error.__context__)
        raise
    return None


def whole_weights(learner) -> dict | None:
    """Return {name: tensor} of all weights on the main process, None on the others."""
    weights = {}
    for name, tensor in learner.named_weights():
        if learner.accelerator.is_main_process:
            weights[name] = tensor.cpu().clone() if learner.zero3 else tensor
    return weights or None


def optimizer_shard(learner) -> dict:
    """Return the optimiser state that this rank has to write, made of tensors and plain values only."""
    if not learner.zero3:
        return learner.optimizer.state_dict()
    learner.optimizer.checkpoint_event_prologue()
    shard = learner.optimizer.state_dict()
    learner.optimizer.checkpoint_event_epilogue()
    # Without objects of DeepSpeed's own classes the file can be read with weights_only=True.
    return {key: shard[key] for key in ("optimizer_state_dict", "fp32_flat_groups")}


def load_checkpoint(folder, learner, critic=None) -> dict:
    """Restore weights, optimiser and step number of the learner (and critic); return the `state` that was saved.

    Every rank must call this. The learner may have been built from any weights of the same shape.

    Raises:
        UserError: not a checkpoint, or one written under ZeRO-3 by another number of processes.
    """
    folder = Path(folder)
    path = folder / "state.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint: looked for {path}.")
    saved = json.loads(path.read_text())
    about, processes = saved["learner"], learner.accelerator.num_processes
    if about["zero3"] != learner.zero3 or (learner.zero3 and about["processes"] != processes):
        wrote = f"{about['processes']} processes {'with' if about['zero3'] else 'without'} ZeRO-3"
        raise UserError(
            f"{folder} was written by {wrote}, this run has {processes} {'with' if learner.zero3 else 'without'}. "
            f"Launch it as before, or start a new run with --model {folder / 'model'}."
        )
    if critic and "critic_steps" not in about:
        raise UserError(f"{folder} holds no critic. Start a new run with --model {folder / 'model'}.")
    restore(folder, learner, about["optimiser_steps"])
    if critic:
        restore(folder / "critic", critic, about["critic_steps"])
    return saved["state"]


def restore(folder: Path, learner, steps: int) -> None:
    """Read the weights and the optimiser of one learner back."""
    rank = learner.accelerator.process_index if learner.zero3 else 0
    shard = torch.load(folder / "optimizer" / f"rank_{rank}.pt", map_location="cpu", weights_only=True)
    if learner.zero3:
        optimizer = learner.optimizer
        optimizer.checkpoint_event_prologue()
        for key in ("loss_scaler", "dynamic_loss_scale", "overflow"):
            shard[key] = getattr(optimizer, key)
        optimizer.load_state_dict([None] * rank + [shard])  # it picks the entry of its rank
        optimizer.checkpoint_event_epilogue()
    else:
        learner.optimizer.load_state_dict(shard)
        tensors = {}
        for file in sorted((folder / "model").glob("*.safetensors")):
            tensors.update(load_file(file))
        with torch.no_grad():
            for name, parameter in learner.model.named_parameters():
                parameter.copy_(tensors[name])
    learner.steps = steps


def newest_checkpoint(root) -> Path | None:
    """Return the folder of the latest step in `root`, None where there is none. Unfinished ones do not count."""
    found = checkpoints(root)
    return found[-1] if found else None


def prune(root, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0: delete none) and what killed writers left behind.

    To be called by the main process alone, after `save_checkpoint`.
    """
    for leftover in Path(root).glob("step_*" + PARTIAL):
        shutil.rmtree(leftover)
    for folder in checkpoints(root)[:-keep] if keep else []:
        shutil.rmtree(set_aside(folder))


def checkpoints(root) -> list[Path]:
    folders = [f for f in Path(root).glob("step_*") if f.is_dir() and NAME.fullmatch(f.name)]
    return sorted(folders, key=lambda f: int(NAME.fullmatch(f.name)[1]))


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it no longer counts as one, also if the process dies while it is being deleted."""
    aside = folder.with_name(folder.name + ".old" + PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def sync(folder: Path) -> None:
    """Force a folder and everything in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_file(path)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
