"""Weights of a model folder: what its files hold, compared with the model that its config describes.

By headers alone: names, shapes and types. Nothing is loaded, and every process finds the same. transformers would draw
a weight that the files lack at random, drop one that nothing takes, and go on.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from adaptive_reasoning.errors import UserError

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = {"F64", "F32", "F16", "BF16"} | {str(t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
HEADS = (HEAD, "score.weight")
BUFFER = re.compile(r"rotary_emb\.inv_freq$")  # in files of old Llamas; computed from the config today
QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|biases|SCB|absmax|quant_map|(nested_|weight_)\w+|weight\.[\w.]+|(input|output)_scale)$"
)
KEYS = {  # part of a name -> what in the config decides its shape
    ".mlp.": "intermediate_size and hidden_size",
    ".self_attn.": "hidden_size, num_attention_heads, num_key_value_heads and head_dim",
    "embed_tokens": "vocab_size and hidden_size",
    "lm_head": "vocab_size and hidden_size",
}

MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)  # what libraries raise for broken files


class Stored(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def find(name: str, file: str, download: bool = False) -> Path | None:
    """Return where a file of a folder or hub name is, None where there is none; of a hub name in the cache.

    Args:
        download: fetch it where it is on the hub only.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        return Path(hf_hub_download(name, file, local_files_only=not download))
    except EntryNotFoundError:
        return None
    except (OSError, HFValidationError) as error:
        raise UserError(f"--model {name}: cannot fetch {file} from the hub: {error}") from error


def weight_files(name: str, download: bool = False) -> list[Path]:
    """Return the files of weights that transformers would read, none where a hub name has not been fetched yet.

    Raises:
        UserError: a file that the index names is not there.
    """
    path = next((path for file in WEIGHTS if (path := find(name, file, download))), None)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{path} has no weight_map, which says what is in which file. Copy it again.")
    shards = {file: find(name, file, download) for file in sorted(set(places.values()))}
    if missing := [file for file, found in shards.items() if found is None]:
        if not Path(name).expanduser().is_dir() and not download:
            return []
        raise UserError(
            f"--model {name}: {missing[0]} is missing, one of the {len(shards)} files that {path} names. Copy all "
            "files of the model into the folder."
        )
    return list(shards.values())


def read_json(path: Path) -> dict:
    """Return the object in a JSON file that belongs to a model; UserError where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Copy the file of the model again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object but {type(content).__name__}. Copy the file of the model again.")
    return content


def tensors_in(path: Path, where: str) -> dict[str, Stored]:
    """Return {name: its header} of a file of weights; `where` begins the message where it cannot be read."""
    try:
        if path.suffix != ".safetensors":
            return {name: Stored(tuple(t.shape), str(t.dtype), path) for name, t in read_bin(path, "meta").items()}
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: Stored(tuple(s.get_shape()), s.get_dtype(), path) for name, s in slices.items()}
    except (OSError, SafetensorError, pickle.UnpicklingError, *MALFORMED) as error:
        raise UserError(f"{where}: cannot load the weights: {path}: {error}. Copy it again.") from error


def read_bin(path: Path, device: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that torch has saved; read when they are looked at, but for the oldest layout."""
    return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))


def read_tensor(name: str, path: Path) -> torch.Tensor:
    """Return one tensor of a file of weights."""
    if path.suffix != ".safetensors":
        return read_bin(path, "cpu")[name]
    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name)


def check_weights(name: str, config, head: bool = True, download: bool = False) -> None:
    """Raise UserError unless the files hold every weight of the model of the config, and no other, in its shape.

    Args:
        name: folder or hub name; a hub name that has not been fetched yet passes, unless `download` fetches it.
        config: from `load_config`.
        head: whether the output embedding counts; a critic has another head.
    """
    where, files = f"--model {name}", weight_files(name, download)
    found = {key: s for file in files for key, s in tensors_in(file, where).items() if not BUFFER.search(key)}
    if not files:
        if Path(name).expanduser().is_dir():
            raise UserError(f"{where}: cannot load the weights: the folder has none (looked for {', '.join(WEIGHTS)}).")
        return
    wanted = shapes_wanted(name, config)
    # Of a model saved without its head, whose names lack the prefix.
    found = {key if key in wanted or f"model.{key}" not in wanted else f"model.{key}": s for key, s in found.items()}
    for key, stored in found.items():
        if ".lora_" in key or ".base_layer." in key:
            raise UserError(f"{where}: {stored.file} holds '{key}', of an adapter that was never merged. {MERGE}")
        if stored.dtype not in FLOATS or (key not in wanted and QUANTISED.search(key)):
            raise UserError(f"{where}: {stored.file} holds '{key}' ({stored.dtype}): {UNQUANTISE}")
    if not head:
        for each in HEADS:
            wanted.pop(each, None), found.pop(each, None)
    elif config.tie_word_embeddings and {HEAD, EMBED} & set(found):
        check_tied(where, found)
        wanted |= {key: wanted[EMBED] for key in (HEAD, EMBED)}
        found |= {key: found.get(key) or found[other] for key, other in ((HEAD, EMBED), (EMBED, HEAD))}
    place = files[0] if len(files) == 1 else files[0].parent
    if missing := [key for key in wanted if key not in found]:
        what = f"{place} lacks {named(missing)}, which the model of config.json has."
        raise UserError(f"{where}: {what} {mend_missing(missing, found, config)}")
    if extra := [key for key in found if key not in wanted]:
        what = f"{found[extra[0]].file} holds {named(extra)}, which the model of config.json does not have."
        raise UserError(f"{where}: {what} {mend_extra(found, config)}")
    for key, shape in wanted.items():
        if found[key].shape != shape:
            sizes = next((text for part, text in KEYS.items() if part in key), "hidden_size")
            raise UserError(
                f"{where}: '{key}' in {found[key].file} has shape {list(found[key].shape)}, the model of config.json "
                f"has {list(shape)}. The two are not of one model: correct {sizes} in config.json, or copy both again."
            )


MERGE = "Merge it first (peft: merge_and_unload), or name the adapter's own folder with --merge_adapter."
LAYERS = "num_hidden_layers to {} in config.json (and layer_types, where it has them, to as many)"
UNQUANTISE = "quantised weights cannot be trained here. Give the model in bf16, fp16 or fp32 that they were made from."


def shapes_wanted(name: str, config) -> dict[str, tuple[int, ...]]:
    """Return {weight: shape} of the model of a config; it is built without memory."""
    try:
        with torch.device("meta"):  # not from_config: under ZeRO-3 that would split the meta tensors
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except (ArithmeticError, *MALFORMED) as error:
        raise UserError(f"--model {name}: its config.json describes no model that can be built: {error}") from error
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def named(keys: list[str]) -> str:
    """Return the first of the weights, and how many more there are."""
    return f"'{keys[0]}'" + f" and {len(keys) - 1} more weights" * (len(keys) > 1)


def layers_in(keys) -> int:
    """Return how many decoder layers the names speak of."""
    return 1 + max((int(n[1]) for key in keys if (n := re.match(r"model\.layers\.(\d+)\.", key))), default=-1)


def mend_missing(missing: list[str], found: dict, config) -> str:
    """Return what the user can do about weights that are not there."""
    if missing == [HEAD]:
        return (
            "It would be drawn at random. If the model has one matrix for both embeddings, set tie_word_embeddings to "
            "true in config.json; otherwise copy the weights again."
        )
    layers = layers_in(found)
    if 0 < layers < config.num_hidden_layers and all(layers_in([key]) > layers for key in missing):
        return f"Copy the weights again or, if these are all layers, set {LAYERS.format(layers)}."
    return "What is missing would be drawn at random. Copy the weights again, or the config.json that belongs to them."


def mend_extra(found: dict, config) -> str:
    """Return what the user can do about weights that nothing takes."""
    if (layers := layers_in(found)) > config.num_hidden_layers:
        return f"Copy the config.json of these weights, or set {LAYERS.format(layers)}."
    return "What nothing takes would be dropped. Copy the config.json of these weights, or take it out of the file."


def check_tied(where: str, found: dict[str, Stored]) -> None:
    """Raise UserError where a tied model's file has an output embedding that is not the input embedding."""
    if not {HEAD, EMBED} <= set(found) or found[HEAD].shape != found[EMBED].shape:
        return  # one serves as both; or the shapes are reported
    if not torch.equal(*(read_tensor(key, found[key].file) for key in (HEAD, EMBED))):
        raise UserError(
            f"{where}: config.json has tie_word_embeddings true, and '{HEAD}' in {found[HEAD].file} is not "
            f"'{EMBED}'. Set tie_word_embeddings to false in config.json to use it, or take it out of the file."
        )
