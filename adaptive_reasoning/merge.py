"""ModelMerging: the weighted mean of a reasoner and another model, tensor by tensor. No data, no training, no GPU.

A baseline of AdaptThink's Table 1 (arXiv 2505.13417, section 5.2); the method is that of "Unlocking Efficient
Long-to-Short LLM Reasoning with Model Merging" (arXiv 2503.20641): average merging is w = 0.5, task arithmetic on the
other model with one task vector is w = alpha.

    make merge-1.5b                        # DeepSeek-R1-Distill-Qwen-1.5B with Qwen2.5-Math-1.5B, w = 0.7
    python -m adaptive_reasoning.merge --model REASONER --other OTHER --weight 0.5,0.7,0.9 --output_dir runs/merged

 1. theta = w theta_reasoner + (1 - w) theta_other for every parameter: layers, norms, biases, embeddings. In fp64,
    rounded once to the reasoner's type.
 2. Where one model has a tied output embedding and the other has not, the tied one is written out before the mean, and
    the result is untied. Two tied models stay tied.
 3. <output_dir>/w0.7 is a Hugging Face folder: the weights, and of the reasoner config, generation config, tokenizer
    and chat template. It is there whole or not at all; the same command goes on with the weights that are missing.

Tensors are read, merged and written one at a time, so the memory needed is that of the largest tensor. What the two
models do not have in common is refused by name: tensors, shapes, ordinary tokens, and the numbers of the config
that no shape shows. Other numbers of the config (the longest position, say) are the reasoner's, and printed.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from adaptive_reasoning.core.files import load_json, write_json_atomic
from adaptive_reasoning.errors import UserError, run_cli, say
from adaptive_reasoning.learner.checkpoint import PARTIAL, sync, sync_file
from adaptive_reasoning.learner.model import load_config, load_tokenizer
from adaptive_reasoning.learner.tensors import write_tensors
from adaptive_reasoning.run.folder import check_inputs, open_folder, weights_of
from adaptive_reasoning.run.options import parse_args

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SAME = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")  # no shape shows these
KEPT = ("rope_parameters", "rms_norm_eps", "max_position_embeddings")  # the reasoner's; told where the other's differ
SHARD_BYTES = 5 * 10**9  # of one file of the result
BLOCK = 2**22  # numbers merged at a time: 32 MiB in fp64
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")  # what of the reasoner's folder goes along
ABOUT = "merge.json"  # in every folder: from what it was made


@dataclass
class Args:
    """Options of merging."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Reasoner: a Hugging Face folder or a hub name (Qwen2, Qwen3 or Llama), with safetensors."""
    other: str = "Qwen/Qwen2.5-Math-1.5B"
    """Model to merge it with."""
    weight: str | float = "0.7"
    """w: the reasoner's share, in [0, 1]; several, comma separated, are a folder each."""
    rows: Literal["refuse", "cut"] = "refuse"
    """Embeddings with different numbers of rows: "refuse", or "cut" both to the rows that they have in common."""
    output_dir: str = "runs/merge"
    """Folder of the results. The same command again makes those that are missing."""

    def holds(self):
        raise UserError("--preflight plans training runs: a merge holds one tensor at a time, on the CPU.")


# --------------------------------------------------------------------------------------------------------- the method


def merge(reasoner: torch.Tensor, other: torch.Tensor, w: float) -> torch.Tensor:
    """Return w reasoner + (1 - w) other in fp64, rounded once to the reasoner's type; same shape, any of DTYPES.

    Not in fp32: its own rounding shows in fp32 results, where a model merged with itself would change, and in bf16 ones
    where the mean lies halfway between two numbers. w = 1 and w = 0 return the inputs bit for bit, -0.0 too.
    """
    if w in (0.0, 1.0):
        return reasoner if w else other.to(reasoner.dtype)
    return (w * reasoner.double() + (1 - w) * other.double()).to(reasoner.dtype)


def parse_weights(text: str) -> list[float]:
    """Return the weights of "0.7,0.5".

    Raises:
        UserError: one is no number in [0, 1], or stands there twice.
    """
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(0 <= w <= 1 for w in weights) or len(set(weights)) < len(weights):
        raise UserError(f"--weight {text!r}: takes numbers from 0 to 1, comma separated, each once, such as 0.7,0.5.")
    return weights


# ---------------------------------------------------------------------------------------------------- the two models


class Source:
    """The tensors of a model folder, found by name and read in blocks.

    Args:
        option: "--model" or "--other", for messages.
        name: a Hugging Face folder or a hub name.

    Raises:
        UserError: nothing there, a model of another family, no safetensors, or a damaged or missing file.
    """

    def __init__(self, option: str, name: str):
        self.title = f"{option} {name}"
        try:
            self.config = load_config(name)
        except UserError as error:
            raise UserError(str(error).replace("--model", option)) from error
        self.folder = Path(name).expanduser()
        if not self.folder.is_dir():
            try:
                self.folder = Path(snapshot_download(name, allow_patterns=[*BESIDE, "*.safetensors"]))
            except (OSError, ValueError) as error:
                raise UserError(f"{self.title}: cannot be downloaded: {error}") from error
        self.tied = bool(self.config.tie_word_embeddings)
        self.tensors = {}  # name -> (file, opened file)
        for path, names in self._files().items():
            try:
                opened = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.title}: {path} is missing or damaged: {error}") from error
            there = set(opened.keys())
            if lost := sorted(set(names or ()) - there):
                raise UserError(f"{self.title}: {path} lacks {lost[0]}, which the index says it holds.")
            self.tensors |= {key: (path, opened) for key in opened.keys() if names is None or key in names}
        if self.tied:  # what the file may have there is not read by anyone
            self.tensors.pop(HEAD, None)

    def _files(self) -> dict[Path, list[str] | None]:
        """Return {file: its tensors, None for all}, as transformers would find them."""
        one, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if one.is_file():
            return {one: None}
        if not index.is_file():
            raise UserError(
                f"{self.title}: no safetensors there (looked for {one.name} and {index.name} in {self.folder}). Load "
                "the model with transformers and save it with save_pretrained."
            )
        files: dict[Path, list[str] | None] = {}
        for key, file in load_json(index)["weight_map"].items():
            files.setdefault(self.folder / file, []).append(key)
        return files

    def find(self, name: str):
        """Return (file, opened file, key) of a tensor; of a tied output embedding, those of the input embedding."""
        key = EMBED if name == HEAD and self.tied else name
        return *self.tensors[key], key

    def slice(self, name: str):
        """Return the tensor as safetensors reads it in parts."""
        _, opened, key = self.find(name)
        return opened.get_slice(key)

    def where(self, name: str) -> str:
        return f"{self.find(name)[0]} ({self.title})"


@dataclass(frozen=True)
class Entry:
    """One tensor of the result."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan(reasoner: Source, other: Source, args) -> list[Entry]:
    """Return the tensors of the result in the reasoner's order.

    Raises:
        UserError: the models do not fit; the message names tensor and file, or the key of the config.
    """
    for key in SAME:
        mine, theirs = getattr(reasoner.config, key, None), getattr(other.config, key, None)
        if mine != theirs:
            raise UserError(
                f"{key} is {mine!r} in {reasoner.title}, {theirs!r} in {other.title}: they cannot be merged."
            )
    names = list(reasoner.tensors)
    if reasoner.tied and not other.tied:
        names.append(HEAD)
    theirs = {*other.tensors} | ({HEAD} if other.tied and not reasoner.tied else set())
    for one, two, extra in ((reasoner, other, set(names) - theirs), (other, reasoner, theirs - set(names))):
        if extra:
            name = min(extra)
            raise UserError(f"{name} is in {one.where(name)}, {two.title} has no such tensor: they cannot be merged.")
    entries = []
    for name in names:
        a, b = reasoner.slice(name), other.slice(name)
        for source, part in ((reasoner, a), (other, b)):
            if part.get_dtype() not in DTYPES or not part.get_shape():
                found = f"{part.get_dtype()} of shape {part.get_shape()}"
                raise UserError(f"{name} in {source.where(name)} is {found}: takes arrays of {', '.join(DTYPES)}.")
        shape, there = tuple(a.get_shape()), tuple(b.get_shape())
        if shape != there:
            fits = name in (EMBED, HEAD) and shape[1:] == there[1:]
            if not (fits and args.rows == "cut"):
                raise UserError(
                    f"{name} is {list(shape)} in {reasoner.where(name)}, {list(there)} in {other.where(name)}: they "
                    "cannot be merged." + " --rows cut takes the rows that they have in common." * fits
                )
            shape = (min(shape[0], there[0]), *shape[1:])
        entries.append(Entry(name, DTYPES[a.get_dtype()], shape))
    check_tokens(reasoner, other, next(e.shape[0] for e in entries if e.name == EMBED))
    return entries


def check_tokens(reasoner: Source, other: Source, rows: int) -> None:
    """Raise UserError where a row of the embeddings is another token in each model, control tokens left out.

    Those are given new names by a fine-tuned model, as R1-Distill does, and keep their rows.
    """
    mine = load_tokenizer(str(reasoner.folder))
    if len(mine) > rows:
        raise UserError(f"the tokenizer of {reasoner.title} has {len(mine)} tokens, the embeddings {rows} rows.")
    try:
        theirs = load_tokenizer(str(other.folder))
    except UserError:
        say(f"{other.title} has no tokenizer: whether its rows are the same tokens is not known")
        return
    added = {*mine.get_added_vocab().values(), *theirs.get_added_vocab().values()}
    names = {i: token for token, i in theirs.get_vocab().items()}
    for token, i in sorted(mine.get_vocab().items(), key=lambda item: item[1]):
        if i not in added and names.get(i, token) != token:
            raise UserError(
                f"token {i} is {token!r} in the tokenizer of {reasoner.title}, {names[i]!r} in that of {other.title}: "
                "their embeddings cannot be merged."
            )


# ------------------------------------------------------------------------------------------------------- the results


def merged(reasoner: Source, other: Source, entries: list[Entry], w: float) -> Iterator[torch.Tensor]:
    """Yield the tensors of the result, each merged when it is asked for, into the memory of the one before."""
    memory = torch.empty(max(entry.bytes for entry in entries), dtype=torch.uint8)
    for entry in entries:
        a, b = reasoner.slice(entry.name), other.slice(entry.name)
        out = memory[: entry.bytes].view(entry.dtype).view(entry.shape)
        step = max(1, BLOCK // max(1, math.prod(entry.shape[1:])))
        for start in range(0, entry.shape[0], step):
            block = slice(start, min(start + step, entry.shape[0]))
            out[block] = merge(a[block], b[block], w)
        yield out


def shards(entries: list[Entry]) -> list[list[Entry]]:
    """Return the tensors by file: at most SHARD_BYTES each, in order; in a file the wider types first (alignment)."""
    out, size = [[]], 0
    for entry in entries:
        if out[-1] and size + entry.bytes > SHARD_BYTES:
            out.append([])
            size = 0
        out[-1].append(entry)
        size += entry.bytes
    return [sorted(part, key=lambda entry: -entry.dtype.itemsize) for part in out]


def write_result(folder: Path, reasoner: Source, other: Source, entries: list[Entry], w: float, about: dict) -> None:
    """Write the folder of one weight, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for path in sorted({path for pattern in BESIDE for path in reasoner.folder.glob(pattern)}):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, partial / path.name)
        config = load_json(reasoner.folder / "config.json")
        config["vocab_size"] = next(e.shape[0] for e in entries if e.name == EMBED)
        config["tie_word_embeddings"] = HEAD not in {e.name for e in entries}
        write_json_atomic(partial / "config.json", config)
        write_json_atomic(partial / ABOUT, about)
        parts, places = shards(entries), {}
        for number, part in enumerate(parts, start=1):
            name = "model" + f"-{number:05d}-of-{len(parts):05d}" * (len(parts) > 1) + ".safetensors"
            layout = [(e.name, e.dtype, e.shape) for e in part]
            write_tensors(partial / name, layout, merged(reasoner, other, part, w), {})
            places |= {e.name: name for e in part}
        if len(parts) > 1:
            index = {"metadata": {"total_size": sum(e.bytes for e in entries)}, "weight_map": places}
            write_json_atomic(partial / "model.safetensors.index.json", index)
        sync(partial)
        os.rename(partial, folder)
        sync_file(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}. Free some space, and start the same command again."
        ) from error


def name_of(w: float) -> str:
    """Return the folder of a weight: w0.7, w1."""
    return f"w{w!r}".removesuffix(".0")


def main() -> None:
    args = parse_args(Args)
    weights, folder = parse_weights(str(args.weight)), Path(args.output_dir)
    reasoner, other = Source("--model", args.model), Source("--other", args.other)
    entries = plan(reasoner, other, args)
    about = {"method": "w model + (1 - w) other", "model": args.model, "other": args.other, "rows": args.rows}
    texts = {source.title: "\1".join(weights_of(str(source.folder))) for source in (reasoner, other)}
    inputs = {title: hashlib.sha256(text.encode()).hexdigest()[:32] for title, text in texts.items()}
    begun = any(path.name not in ("config.yaml", ".lock") for path in folder.glob("*"))
    open_folder(folder, "merge", args, begun, may_change={"weight", "output_dir"})
    todo = []
    for w in weights:
        if (there := folder / name_of(w)).is_dir():
            check_inputs(there, load_json(there / ABOUT)["inputs"], inputs)
            say(f"{there} is complete")
        else:
            todo.append(w)
    size, free = sum(e.bytes for e in entries), shutil.disk_usage(folder).free
    if size * len(todo) > free:
        raise UserError(
            f"--output_dir {folder}: {len(todo)} x {size / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free."
        )
    for key in KEPT:
        mine, theirs = getattr(reasoner.config, key), getattr(other.config, key)
        if mine != theirs:
            say(f"{key}: {mine} as the reasoner has it; the other model has {theirs}")
    for w in todo:
        write_result(folder / name_of(w), reasoner, other, entries, w, {**about, "weight": w, "inputs": inputs})
        say(f"wrote {folder / name_of(w)}: {len(entries)} tensors, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    run_cli(main)
