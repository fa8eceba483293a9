"""Start: the model folder that a run starts from, where --model is not yet that.

    <output_dir>/start       an adapter merged into its base, a GGUF file as fp32, control tokens, a chat template:
                             whatever of these was asked for, in one folder that opens in plain transformers
    .../made_from.json       what it was made from

The main process writes it, whole or not at all, before anything heavy starts; a later start finds it there.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import is_gguf_available

from adaptive_reasoning.errors import UserError, say
from adaptive_reasoning.learner.model import (
    ADAPTER,
    TOKENIZER_FILES,
    adapter_config,
    check_vocabulary,
    generation_config,
    load_config,
    load_tokenizer,
)
from adaptive_reasoning.learner.runtime import is_zero3, on_main
from adaptive_reasoning.learner.weights import WEIGHTS, check_weights, find, read_json, weight_files
from adaptive_reasoning.rollout.decoder import check_supported
from adaptive_reasoning.run.folder import inputs_of, take_folder, weights_of
from adaptive_reasoning.tasks import control_tokens, prompts
from adaptive_reasoning.tasks.chat_template import chat_template

SOURCE = "made_from.json"
ROWS = 64  # a vocabulary that grows is filled up to a multiple, as kernels like it


def is_gguf(model: str) -> bool:
    return model.endswith(".gguf")


def start_of(args, accelerator, needed: tuple[str, ...] = ()) -> str:
    """Return the model to start from: --model, or the folder made of it.

    Args:
        needed: control tokens of the response format.

    Raises:
        UserError: whatever keeps the folder from being made, before a weight is loaded as far as that can be seen; or
            there is one that was made from something else.
    """
    edits = args.chat_template or args.control_tokens != control_tokens.MODEL
    if not (edits or args.merge_adapter or is_gguf(args.model)):
        return args.model
    if not args.model:
        raise UserError("--control_tokens and --chat_template change a model: name one with --model.")
    folder = Path(args.output_dir) / "start"
    unset_hf_deepspeed_config()  # under ZeRO-3 transformers would split what one process loads over all of them
    on_main(accelerator, lambda: prepare(args, folder, needed))
    if is_zero3(accelerator):
        set_hf_deepspeed_config(accelerator.state.deepspeed_plugin.dschf)
    return str(folder)


def prepare(args, folder: Path, needed: tuple[str, ...]) -> None:
    """Write the folder to start from, or find it there."""
    read = from_adapter if args.merge_adapter else from_gguf if is_gguf(args.model) else from_folder
    base, config, tokenizer, load = read(args.model)
    check_vocabulary(config, tokenizer)
    if args.chat_template:
        tokenizer.chat_template = chat_template(tokenizer, args.chat_template)
        prompts.prompt_text(tokenizer, "1+1")
    how = control_tokens.wanted(args.control_tokens, needed)
    new = [text for text in how if not control_tokens.is_token(tokenizer, text)]
    tokenizer = control_tokens.take(tokenizer, how)
    rows = {prompts.control_token(tokenizer, text): control_tokens.words(tokenizer, text) for text in new}
    for text in needed:
        prompts.control_token(tokenizer, text)
    source = {"model": args.model, "base": base, "weights": weights_of(args.model), **inputs_of({}, tokenizer)}
    take_folder(folder.parent)
    if folder.exists():
        if not (folder / SOURCE).is_file() or read_json(folder / SOURCE) != source:
            raise UserError(
                f"{folder} was not made from --model {args.model} as it is now, with these control tokens and this "
                "chat template. Delete that folder to make it anew, or choose another --output_dir."
            )
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    say(f"making {folder} from {args.model}" + f" and {base}" * (base != args.model))
    try:
        if read is from_folder and not rows:
            link(args.model, partial)
        else:
            model = load()
            set_rows(model, 1 + max(tokenizer.get_vocab().values()), rows)
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--model {args.model}: {folder} cannot be made of it: {error}") from error
    (partial / SOURCE).write_text(json.dumps(source), encoding="utf-8")
    check_weights(str(partial), load_config(str(partial)))
    os.rename(partial, folder)
    say(f"wrote {folder}")


def from_folder(model: str) -> tuple:
    """Return (model, config, tokenizer, () -> model) of a folder or hub name, in the type of its file."""
    config = load_config(model)
    check_weights(model, config, download=True)
    generation_config(model)
    path = Path(model).expanduser()
    return model, config, load_tokenizer(model), loader(str(path) if path.is_dir() else model, "auto")


def loader(model: str, dtype) -> Callable:
    return lambda: AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False)


def from_adapter(model: str) -> tuple:
    """Return (base, its config, tokenizer, () -> merged model in fp32) of an adapter, a folder or hub name."""
    path = adapter_config(model, download=True)
    base = read_json(path).get("base_model_name_or_path") if path else None
    if not base:
        raise UserError(
            f"--merge_adapter: --model {model} is no adapter: it has no {ADAPTER} that names its base. Leave "
            "--merge_adapter out, or name the adapter's folder."
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError("--merge_adapter needs the package peft: pip install 'adaptive-reasoning[peft]'.") from error
    try:
        config = load_config(base)
        check_weights(base, config, download=True)
        generation_config(base)
    except UserError as error:
        raise UserError(
            f"--merge_adapter: the base of {model} is {base} ({path}), and it is not at hand: {error} Correct "
            f"base_model_name_or_path in {path.name} if it lies elsewhere."
        ) from error
    tokenizer = load_tokenizer(model if any(find(model, file, download=True) for file in TOKENIZER_FILES) else base)

    def merged():
        whole = loader(base, torch.float32)()
        return PeftModel.from_pretrained(whole, model).merge_and_unload(safe_merge=True)  # refuses NaN

    return base, config, tokenizer, merged


def from_gguf(model: str) -> tuple:
    """Return (file, config, tokenizer, () -> dequantised model in fp32) of a GGUF file, as transformers reads it."""
    config, tokenizer = (read_gguf(model, kind) for kind in (AutoConfig, AutoTokenizer))
    tokenizer.name_or_path = model

    def dequantised():
        plain = GgufConfig(dequantize=True)
        whole, info = read_gguf(
            model, AutoModelForCausalLM, dtype=torch.float32, quantization_config=plain, output_loading_info=True
        )
        if wrong := [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]:
            raise UserError(f"--model {model}: its weights are not those of its config: {sorted(map(str, wrong))[0]}.")
        whole.hf_quantizer = None  # nothing of it is quantised any more, and quantised models are not written
        return whole

    return model, config, tokenizer, dequantised


def read_gguf(model: str, kind, **options):
    """Return what an Auto class of transformers reads from a GGUF file.

    Raises:
        UserError: no such file, one that cannot be read, or the package that reads it is not installed.
    """
    path = Path(model).expanduser()
    if not path.is_file():
        raise UserError(f"--model {model}: no such file (looked for {path.absolute()}).")
    if not is_gguf_available():
        raise UserError(
            f"--model {model}: a GGUF file is read with the package gguf: pip install 'adaptive-reasoning[gguf]'."
        )
    try:
        found = kind.from_pretrained(str(path.parent), gguf_file=path.name, **options)
        if kind is AutoConfig:
            check_supported(found)
    except Exception as error:  # a damaged file is found out anywhere in its reader
        raise UserError(f"--model {model}: cannot be read as a GGUF file of Qwen2, Qwen3 or Llama: {error}") from error
    return found


def set_rows(model, tokens: int, rows: dict[int, list[int]]) -> None:
    """Give each token of `rows` the mean of other rows, in both embeddings; the vocabulary grows to hold all tokens.

    Rows that are no token's are the mean of all: no likelier than the others on average.
    """
    before = model.config.vocab_size
    if tokens > before:
        model.resize_token_embeddings(tokens, pad_to_multiple_of=ROWS, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):  # tied: twice the same
            weight = layer.weight
            weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
            for row, ids in rows.items():
                weight[row] = weight[ids].float().mean(0).to(weight.dtype)


def link(model: str, folder: Path) -> None:
    """Make a folder of the weights of a model where they are, under links, and of copies of its configs."""
    folder.mkdir()
    index = next(path for file in WEIGHTS if (path := find(model, file)))
    for path in {index, *weight_files(model)}:
        (folder / path.name).symlink_to(path.resolve())
    for name in ("config.json", "generation_config.json"):
        if path := find(model, name):
            shutil.copyfile(path, folder / name)
