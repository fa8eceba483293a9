"""The folder of a run: who writes it, that it is the same run as before, and what it reads beside its options."""

import dataclasses
import fcntl
import hashlib
import os
import socket
import time
from datetime import date, datetime
from pathlib import Path
from typing import IO

import yaml

from adaptive_reasoning.core.files import write_text_atomic
from adaptive_reasoning.errors import UserError, say
from adaptive_reasoning.learner.checkpoint import newest_checkpoint
from adaptive_reasoning.learner.runtime import all_gather, on_main
from adaptive_reasoning.tasks import prompts

# Options that a continued run may have other values of: how long it is, what it writes down, and what fits the machine.
# All others decide what is sampled or learnt, and a run has one value of each. `eval_every` decides neither, as the
# random numbers of an evaluation are its own; where reference accuracies are kept (`ref_cache`) matters before step 1.
MAY_CHANGE = {
    "max_steps", "save_every", "keep_checkpoints", "grader_workers", "grader_timeout", "samples_per_step", "report_to",
    "max_ungraded", "tokens_per_micro_batch", "rollout_rows", "gradient_checkpointing", "output_dir", "patience",
    "eval_every", "ref_cache",
}  # fmt: skip

LOCK = ".lock"
LOCK_SECONDS = 30.0  # for which a start waits for a killed predecessor, whose memory may take a while to be given back
_locks: dict[Path, IO] = {}  # open files of the folders that this process writes, until it ends


def lock_folder(folder: Path) -> None:
    """Keep every other process from writing a folder, for as long as this one lives: the kernel gives the lock back.

    A run that was killed may not be dead: the ranks of a killed launcher go on for a while. Two that write one folder
    would mix their rows and checkpoints without a word.

    Raises:
        UserError: another process holds it, and did for LOCK_SECONDS.
    """
    path = folder.resolve() / LOCK
    if earlier := _locks.pop(path, None):
        if path.exists() and os.path.samestat(os.fstat(earlier.fileno()), path.stat()):  # this process has it already
            _locks[path] = earlier
            return
        earlier.close()  # of a folder that was deleted since
    file, end, told = open(path, "a+", encoding="utf-8"), time.monotonic() + LOCK_SECONDS, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() > end:
                file.close()
                raise UserError(
                    f"{folder} is being written by {holder}. Wait until that run has ended, or end it with all its "
                    "processes and start the same command again; or choose another --output_dir."
                ) from None
            if not told:
                say(f"waiting for {holder} to end, which still writes {folder}")
                told = True
            time.sleep(0.1)
        except OSError as error:
            say(f"warning: {folder}: this file system has no locks ({error}): start no second run in this folder")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[path] = file


def take_folder(folder: Path) -> None:
    """Create a folder and take its lock.

    Raises:
        UserError: another process writes it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot write there: {error}") from error


def open_folder(
    folder: Path, algorithm: str, args, begun: bool | None = None, may_change=MAY_CHANGE, about: dict | None = None
) -> None:
    """Create the folder of a run with its config.yaml, or check that what is in it is this run; take its lock.

    Args:
        algorithm: name of what runs there; an evaluation and a cold start have one too.
        begun: whether the folder holds anything that would be continued; None: a checkpoint.
        may_change: options that it may be continued with other values of.
        about: texts that config.yaml has beside the options.

    Raises:
        UserError: it holds a run of another algorithm or with other options, or a finished one without checkpoints;
            its config.yaml is damaged, another process writes it, or it cannot be written to.
    """
    path, config = folder / "config.yaml", dataclasses.asdict(args)
    take_folder(folder)
    if begun is None:
        begun = newest_checkpoint(folder / "checkpoints") is not None
        if not begun and (folder / "summary.json").is_file():
            raise UserError(
                f"{folder} holds a finished run without any checkpoint, which cannot be continued; a new one would "
                "replace its results. Choose another --output_dir, or delete the folder."
            )
    if path.is_file() and begun:
        check_same(folder, read_config(path), algorithm, config, may_change)
    write_text_atomic(path, yaml.safe_dump({"algorithm": algorithm, **(about or {}), **config}, sort_keys=False))


def read_config(path: Path) -> dict:
    """Return the options in the config.yaml of a run."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, it is not valid YAML: {error}. {DAMAGED}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged, it holds no options but {type(config).__name__}. {DAMAGED}")
    return config


BLOCKS, BLOCK_BYTES = 64, 1 << 16  # of a file of weights
DAMAGED = "Delete it to continue with the options of this command, or choose another --output_dir."


def check_same(folder: Path, old: dict, algorithm: str, new: dict, may_change=MAY_CHANGE) -> None:
    """Raise UserError if the folder holds a run with other options; those in `may_change` may differ."""
    if (found := old.pop("algorithm", algorithm)) != algorithm:
        raise UserError(f"{folder} holds a run of {found}, not of {algorithm}. Choose another --output_dir.")
    differ = [k for k in new if k in old and old[k] != new[k] and k not in may_change]
    if differ:
        k = differ[0]
        raise UserError(
            f"{folder} holds a run with {k} = {old[k]!r}, now it is {new[k]!r}. Choose another --output_dir, "
            "or give the old value to continue that run."
        )


def data_of(task) -> dict[str, list[str]]:
    """Return {what: texts} of the questions of a task, by where they come from."""
    parts: dict[str, list[str]] = {}
    for q in task.questions:
        parts.setdefault(f"the training data {q.source or q.id.split('/')[0]}", []).append(text_of(q))
    for benchmark in task.benchmarks:
        parts[f"the evaluation data {benchmark.name}"] = [text_of(q) for q in benchmark.questions]
    return parts


def text_of(question) -> str:
    return f"{question.problem}\0{question.answer}\0{question.difficulty}"


def inputs_of(data: dict[str, list[str]], tokenizer, model: str | None = None) -> dict[str, str]:
    """Return {what: digest} of what a run reads beside its options, saved with every checkpoint.

    Data counts by its content: a file may be written again as it was. `model` is given where its weights are read again
    by a continued run, as those of a reference policy are; what is trained comes from the checkpoint.
    """
    parts = dict(data)
    if model:
        parts[f"the model {model}"] = weights_of(model)
    parts["the tokenizer"] = [f"{text}\0{i}" for text, i in sorted(tokenizer.get_vocab().items())]
    parts["the chat template"] = [str(tokenizer.chat_template)]
    return {
        what: hashlib.sha256("\1".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        for what, texts in parts.items()
    }


def keep_date(tokenizer, folder: Path, accelerator) -> None:
    """Fix the date that a chat template prints at the day on which the folder was begun: a run that is continued
    tomorrow has the same prompts. Every process has to call this."""

    def day() -> str:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, date.today().isoformat())
        return path.read_text().strip()

    if prompts.is_dated(tokenizer):
        path = folder / "prompt_date.txt"
        prompts.fix_date(tokenizer, datetime.fromisoformat(all_gather(accelerator, on_main(accelerator, day))[0]))


def check_inputs(folder: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Raise UserError where data, tokenizer, chat template or model are no longer what the run was begun with."""
    changed = [what for what in dict.fromkeys([*old, *new]) if old.get(what) != new.get(what)]
    if old and changed:
        raise UserError(
            f"{changed[0]} has changed since {folder} was begun, and a continued run would mix two. Put back what it "
            "was, or start a new run with another --output_dir."
        )


def check_reached(checkpoint: Path, max_steps: int) -> None:
    """Raise UserError where a run would end before the step that its newest checkpoint has reached."""
    if max_steps < (reached := int(checkpoint.name.split("_")[1])):
        raise UserError(
            f"--max_steps {max_steps}: the run in {checkpoint.parent.parent} has reached step {reached} already. Give "
            f"--max_steps {reached} or more, or choose another --output_dir for a shorter run."
        )


def weights_of(model: str) -> list[str]:
    """Return texts that differ where the weights of a folder or file do, in no time at any size; a hub name is its own.

    Of every file its size and 64 blocks spread over it, which training changes even where single layers are frozen.
    """
    place = Path(model).expanduser()
    files = [place] if place.is_file() else place.glob("*")
    texts = [] if place.exists() else [model]
    for path in sorted(p for p in files if p.suffix in (".safetensors", ".bin", ".gguf")):
        size, state = path.stat().st_size, hashlib.sha256()
        with open(path, "rb") as file:
            for i in range(BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * i // (BLOCKS - 1))
                state.update(file.read(BLOCK_BYTES))
        texts.append(f"{path.name}\0{size}\0{state.hexdigest()}")
    return texts
