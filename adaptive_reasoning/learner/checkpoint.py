"""Checkpoints: a Hugging Face folder beside everything needed to continue exactly.

    checkpoints/step_000150/model/                 config, safetensors, tokenizer: opens with from_pretrained and vLLM
    checkpoints/step_000150/adapter/               with LoRA: peft's folder and the tokenizer; model/, merged, is then
                                                   in the last checkpoint alone
    checkpoints/step_000150/optimizer/rank_0.safetensors   AdamW state, a file for every process that holds some of it;
                                                   any number of processes reads it back (`learner/shards.py`)
    checkpoints/step_000150/critic/                model/ (adapter/) and optimizer/ of the critic, where there is one
    checkpoints/step_000150/state.json             what the caller wants back, and how the learner was distributed
    checkpoints/step_000150/manifest.json          size and SHA-256 of every file above

A checkpoint is written into a folder beside, synced to disk and renamed, so a folder with the final name is whole
whenever the process was killed. What a disk does to it later is found by the manifest when the run continues: a
damaged checkpoint is renamed, and the one before it is taken. No file is a pickle: nothing in them is executed.
"""

import json
import os
import re
import shutil
import traceback
from collections.abc import Callable
from functools import partial as partial_of
from pathlib import Path

from safetensors import SafetensorError

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.runtime import all_gather, on_main, together
from adaptive_reasoning.learner.shards import restore, write_optimizer
from adaptive_reasoning.learner.tensors import digest_of, write_tensors

PARTIAL = ".partial"  # ending of a folder that is being written or deleted
DAMAGED = ".damaged"  # ending of a checkpoint that did not pass the check; left for the user to look at
NAME = re.compile(r"step_(\d+)")
MANIFEST = "manifest.json"


def save_checkpoint(folder, learner, tokenizer, state: dict, critic=None, merge: bool = True) -> None:
    """Write `folder`, whole or not at all. Every rank must call this; `state` (JSON values) is taken from rank 0.

    Args:
        merge: with LoRA, write the merged model beside the adapter, as large as without LoRA.

    Raises:
        UserError: on all ranks, if any of them could not write (disk full, no permission). Nothing is left behind.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + PARTIAL)
    accelerator = learner.accelerator
    main = accelerator.is_main_process
    parts = [(partial, learner)] + ([(partial / "critic", critic)] if critic else [])
    files = []  # of weights: (path, whose, whether its adapter alone)
    for place, part in parts:
        if part.lora:
            files.append((place / "adapter" / "adapter_model.safetensors", part, True))
        if not part.lora or (merge and part is learner):
            files.append((place / "model" / "model.safetensors", part, False))
    written: dict[str, dict] = {}  # by this rank: {path in the checkpoint: {"bytes", "sha256"}}

    def note(path: Path, about: dict) -> None:
        written[path.relative_to(partial).as_posix()] = about

    def prepare():
        shutil.rmtree(partial, ignore_errors=True)
        for place, _ in parts:
            (place / "optimizer").mkdir(parents=True)
        for path, _, _ in files:
            path.parent.mkdir()

    def weights(path, part, adapter):
        if about := write_weights(path, part, adapter):
            note(path, about)

    def write():
        for place, part in parts:
            if main or part.zero3:
                path = place / "optimizer" / f"rank_{accelerator.process_index}.safetensors"
                note(path, write_optimizer(path, part))
        if main:
            for path, part, adapter in files:
                if adapter:
                    part.lora.save_pretrained(path.parent)
                else:
                    write_config(path.parent, part)
                if part is learner:
                    tokenizer.save_pretrained(path.parent)
            about = {"zero3": learner.zero3, "processes": accelerator.num_processes, "optimiser_steps": learner.steps}
            if critic:
                about["critic_steps"] = critic.steps
            (partial / "state.json").write_text(json.dumps({"learner": about, "state": state}, indent=1) + "\n")
            for path in partial.rglob("*"):
                if path.is_file() and path.suffix != ".safetensors":
                    note(path, digest_of(path))

    def finish():
        files = dict(sorted(everything.items()))
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        sync(partial)
        old = set_aside(folder) if folder.exists() else None  # the same step again, in a run continued from before it
        os.rename(partial, folder)
        sync_file(folder.parent)
        if old:
            shutil.rmtree(old)

    everything: dict[str, dict] = {}
    try:
        together(accelerator, prepare, everybody=False)
        for each in files:  # told after each: one whose disk is full must not leave the others in the next one
            together(accelerator, partial_of(weights, *each))
        together(accelerator, write)
        for part in all_gather(accelerator, written):
            everything |= part
        together(accelerator, finish, everybody=False)
    except Exception as error:  # the tokenizer's Rust code tells of a full disk in an exception of no particular kind
        known = isinstance(error, (OSError, SafetensorError, UserError))
        if not known and "os error" not in str(error):
            traceback.print_exc()  # a bug
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        raise UserError(
            f"cannot write the checkpoint {folder}: {'' if known else f'{type(error).__name__}: '}{error}. Nothing was "
            "left behind; free some space or choose another --output_dir, and start the same command again."
        ) from error


def write_weights(path: Path, learner, adapter: bool) -> dict | None:
    """Write the whole weights on the main process, gathered layer by layer; return {"bytes", "sha256"} there."""
    layout = [(name, tensor.dtype, tensor.shape) for name, tensor in learner.named_weights(adapter, meta=True)]
    weights = (tensor for _, tensor in learner.named_weights(adapter))
    try:
        if learner.accelerator.is_main_process:
            return write_tensors(path, layout, weights, {})
    finally:
        for _ in weights:  # also when the disk is full: the other ranks are gathering along
            pass
    return None


def write_config(folder: Path, learner) -> None:
    """Write what transformers keeps beside the weights, as its `save_pretrained` would."""
    model = learner.model
    model.config.dtype = "float32" if learner.lora else str(model.dtype).removeprefix("torch.")  # merged in fp32
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_checkpoint(folder, learner, critic=None) -> dict:
    """Restore weights, optimiser and step number of the learner (and critic); return the `state` that was saved.

    Every rank must call this. The learner may have been built from any weights of the same shape, and run on another
    number of processes, with or without ZeRO-3, than the one that wrote the checkpoint.

    Raises:
        UserError: not a checkpoint, or one of another model or without the critic.
    """
    folder = Path(folder)
    path = folder / "state.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint: looked for {path}.")
    saved = json.loads(path.read_text())
    about = saved["learner"]
    if critic and "critic_steps" not in about:
        raise UserError(f"{folder} holds no critic. Start a new run with --model {folder / 'model'}.")
    for place, part, steps in ((folder, learner, "optimiser_steps"), (folder / "critic", critic, "critic_steps")):
        if part:
            restore(place, part)
            part.steps = about[steps]
    return saved["state"]


def damage(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None if it is as it was written.

    Reading all of it takes a while, so each rank reads every `ranks`-th file.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text())["files"]
        for name, about in sorted(files.items(), key=lambda item: (item[1]["bytes"], item[0]))[rank::ranks]:
            file = folder / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != about["bytes"]:
                return f"{file} has {file.stat().st_size} bytes, {about['bytes']} were written"
            if digest_of(file)["sha256"] != about["sha256"]:
                return f"{file} has changed since it was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:  # of the file system, perhaps for a moment: nothing is known about the checkpoint
        raise UserError(
            f"{folder} cannot be read: {error}. Mend the file system and start the same command."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path} is not what was written: {error}"
    return None


def whole_checkpoint(root, accelerator) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is as it was written, and what was wrong with newer ones.

    Damaged ones are renamed, so that nothing takes them for checkpoints any more. All ranks find the same; every one
    must call this.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    told: list[str] = []
    while folder := all_gather(accelerator, newest_checkpoint(root))[0]:
        look = partial_of(damage, folder, accelerator.process_index, accelerator.num_processes)
        found = all_gather(accelerator, together(accelerator, look))
        if not any(found):
            return folder, told
        aside = folder.with_name(folder.name + DAMAGED)
        told.append(f"{next(filter(None, found))}: the checkpoint is kept as {aside.name} and not used")

        def rename(folder=folder, aside=aside):
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)

        on_main(accelerator, rename)
    if told:
        raise UserError(
            f"no checkpoint in {root} is whole. {'. '.join(told)}. Restore one from a copy, or start a new run: "
            "choose another --output_dir or delete this one."
        )
    return None, told


def newest_checkpoint(root) -> Path | None:
    """Return the folder of the latest step in `root`, None where there is none. Unfinished ones do not count."""
    found = checkpoints(root)
    return found[-1] if found else None


def prune(root, keep: int, best_of: Callable[[Path], int | None] = lambda checkpoint: None) -> None:
    """Delete all but the newest `keep` checkpoints (0: delete none) and what killed writers left behind.

    What `best_of` names, the step that one of the newest calls the best, stays as well.

    To be called by the main process alone, after `save_checkpoint`. Where a file of the newest one does not have its
    size any more nothing is deleted: one of the older ones will be needed.
    """
    for leftover in Path(root).glob("step_*" + PARTIAL):
        shutil.rmtree(leftover)
    there = checkpoints(root)
    if not keep or len(there) <= keep or not has_its_sizes(there[-1]):
        return
    best = {best_of(folder) for folder in there[-keep:]}
    for folder in there[:-keep]:
        if step_of(folder) not in best:
            shutil.rmtree(set_aside(folder))


def has_its_sizes(folder: Path) -> bool:
    """Return whether every file of a checkpoint is there in full length: no more than a look at the folder."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else -1 for name in files}
    return all(sizes[name] == about["bytes"] for name, about in files.items())


def checkpoints(root) -> list[Path]:
    folders = [f for f in Path(root).glob("step_*") if f.is_dir() and NAME.fullmatch(f.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(NAME.fullmatch(checkpoint.name)[1])


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
