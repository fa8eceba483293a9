"""Adapters (peft): merged into their base once, before the run that starts from them."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

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
from adaptive_reasoning.learner.weights import check_weights, find, read_json
from adaptive_reasoning.run.folder import weights_of

SOURCE = "merged_from.json"


def start_of(args, accelerator) -> str:
    """Return the model to start from: --model or, with --merge_adapter, that adapter merged into its base.

    Written whole or not at all to <output_dir>/merged by the main process, fp32; a later start finds it there.

    Raises:
        UserError: --model is no adapter, its base is not at hand or another one, peft is not installed, or the folder
            holds the merger of another adapter.
    """
    if not args.merge_adapter:
        return args.model
    folder = Path(args.output_dir) / "merged"
    unset_hf_deepspeed_config()  # under ZeRO-3 transformers would split what one process loads over all of them
    on_main(accelerator, lambda: merge(args.model, folder))
    if is_zero3(accelerator):
        set_hf_deepspeed_config(accelerator.state.deepspeed_plugin.dschf)
    return str(folder)


def merge(model: str, folder: Path) -> None:
    """Merge an adapter, a folder or hub name, into its base, and write the whole model to `folder`."""
    path = adapter_config(model, download=True)
    base = read_json(path).get("base_model_name_or_path") if path else None
    if not base:
        raise UserError(
            f"--merge_adapter: --model {model} is no adapter: it has no {ADAPTER} that names its base. Leave "
            "--merge_adapter out, or name the adapter's folder."
        )
    source = {"adapter": model, "base": base, "weights": weights_of(model)}
    if folder.exists():
        if not (folder / SOURCE).is_file() or read_json(folder / SOURCE) != source:
            raise UserError(
                f"{folder} was not merged from the adapter --model {model} as it is now. Delete that folder to merge "
                "anew, or choose another --output_dir."
            )
        return
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
    check_vocabulary(config, tokenizer)
    say(f"merging {model} into {base}")
    partial = folder.with_name(folder.name + ".partial")
    try:
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
        whole = PeftModel.from_pretrained(whole, model).merge_and_unload(safe_merge=True)  # refuses NaN
        shutil.rmtree(partial, ignore_errors=True)
        whole.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--merge_adapter: {model} cannot be merged into {base}: {error}") from error
    (partial / SOURCE).write_text(json.dumps(source), encoding="utf-8")
    check_weights(str(partial), load_config(str(partial)))
    os.rename(partial, folder)
    say(f"wrote {folder}")
