"""Model: loading a policy, and log-probs out of it without ever holding the logits of a whole micro-batch.

Code that a model brings along is never run: the three families are part of transformers, and anything else is refused.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.kernels import token_logprobs
from adaptive_reasoning.learner.weights import MALFORMED, UNQUANTISE, check_weights, find, read_json
from adaptive_reasoning.rollout.decoder import check_supported

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
ADAPTER = "adapter_config.json"


def load_config(name_or_path: str):
    """Return the config of a Hugging Face folder or hub name, checked: the part of loading that costs nothing.

    Raises:
        UserError: nothing there, an adapter, a model that `check_supported` refuses, or quantised weights.
    """
    if not name_or_path:
        raise UserError("--model is empty: name a folder with a Hugging Face model, or a model of the hub.")
    path = Path(name_or_path).expanduser()
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    check_no_adapter(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"--model {name_or_path}: the folder has no config.json (looked for {path / 'config.json'}). "
            "Give the folder that holds config.json, the safetensors and the tokenizer files."
        )
    if not path.is_dir() and (looks_like_path or path.exists()):
        raise UserError(
            f"--model {name_or_path}: no such folder (looked for {path.absolute()}). "
            "Give a folder with a Hugging Face model, or a hub name such as deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B."
        )
    try:
        config = AutoConfig.from_pretrained(str(path) if path.is_dir() else name_or_path, trust_remote_code=False)
    except (OSError, StrictDataclassError, *MALFORMED) as error:
        check_no_adapter(name_or_path, download=True)
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--model {name_or_path}: it brings code of its own, which is never run. Use Qwen2, Qwen3 or Llama."
            ) from error
        where = "its config.json cannot be read" if path.is_dir() else f"no folder {path.absolute()}, and as a hub name"
        raise UserError(f"--model {name_or_path}: {where}: {' '.join(str(error).split())}") from error
    try:
        check_supported(config)
    except UserError as error:
        raise UserError(f"--model {name_or_path}: {error}") from error
    for key in ("quantization_config", "compression_config", "quantization"):  # "quantization": MLX
        if found := getattr(config, key, None):
            method = f" ({found['quant_method']})" if "quant_method" in found else ""
            raise UserError(f"--model {name_or_path}: its config.json has {key}{method}: {UNQUANTISE}")
    return config


def check_no_adapter(name_or_path: str, download: bool = False) -> None:
    """Raise UserError where a folder or hub name holds an adapter, alone or beside weights, which would be put on top
    of them. `download`: look on the hub too."""
    if (path := adapter_config(name_or_path, download)) is None:
        return
    base = read_json(path).get("base_model_name_or_path")
    if find(name_or_path, "config.json"):
        raise UserError(
            f"--model {name_or_path}: an adapter ({path.name}) lies beside the weights. Take {path.name} and "
            "adapter_model.* out of the folder to use the weights as they are, or put them into a folder of their own "
            "and name that with --merge_adapter."
        )
    raise UserError(
        f"--model {name_or_path}: it is an adapter of {base} ({path.name}), not a whole model. --merge_adapter merges "
        "it into that model before the run."
    )


def adapter_config(name_or_path: str, download: bool = False) -> Path | None:
    """Return the configuration of an adapter that a folder or hub name holds, None where it holds none."""
    try:
        return find(name_or_path, ADAPTER, download)
    except UserError:  # no name that the hub knows, or no way to it: what is wrong is said by the caller
        return None


def load_model(name_or_path: str, args, kind=AutoModelForCausalLM, **options):
    """Return (model, tokenizer) of a Hugging Face folder or hub name, weights in fp32, ready for `Learner`.

    Under ZeRO-3 the weights are sharded while they are loaded; all ranks must call this after `make_accelerator`.

    Args:
        name_or_path: folder with config.json, safetensors and tokenizer files, or a hub name.
        args: `dtype` ("bf16" or "fp32") decides whether flash attention can be used.
        kind: the Auto class of the model, with its `options`: a critic has another head.

    Raises:
        UserError: as `load_config`, `check_weights` and `generation_config`, weights that are not finite, or weights or
            a tokenizer that cannot be read.
    """
    config, causal = load_config(name_or_path), kind is AutoModelForCausalLM
    check_weights(name_or_path, config, head=causal, download=True)
    generation_config(name_or_path)
    path = Path(name_or_path).expanduser()
    name = str(path) if path.is_dir() else name_or_path
    flash = torch.cuda.is_available() and args.dtype == "bf16" and is_flash_attn_2_available()
    try:
        model = kind.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation="flash_attention_2" if flash else "sdpa",
            trust_remote_code=False,
            attention_dropout=0.0,  # with dropout the first update would already be off-policy
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--model {name_or_path}: cannot load the weights: {error}") from error
    # What the rollout goes by; a file whose two embeddings differ has been refused.
    assert not causal or is_tied(model) == bool(config.tie_word_embeddings), "tied as the config says"
    for key, tensor in whole_weights(model):
        if key != "score.weight" and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(
                f"--model {name_or_path}: '{key}' holds values that are not finite (NaN or infinite): the weights are "
                "damaged. Copy them again, or take an earlier checkpoint."
            )
    tokenizer = load_tokenizer(name)
    check_vocabulary(model.config, tokenizer)
    return model, tokenizer


def is_tied(model) -> bool:
    """Return whether a model has one matrix for both embeddings: what it really does, whatever its config says."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def whole_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) of a model just loaded. ZeRO-3 splits it over the processes while it loads: each
    tensor is gathered for as long as it is looked at, and every process must run through all of them."""
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_id"):
            yield name, parameter
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield name, parameter


def check_vocabulary(config, tokenizer) -> None:
    """Raise UserError if the tokenizer has tokens for which the model has no row."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, the vocab_size of the model is "
            f"{config.vocab_size}: they do not belong together. Give a folder of a model with its own tokenizer."
        )


def load_tokenizer(name_or_path: str):
    """Return the tokenizer exactly as tokenizer.json has it.

    AutoTokenizer of transformers 5 rebuilds every tokenizer beside a Qwen2 config with Qwen2's own way of cutting text,
    whatever the file says; R1-Distill models bring their own. Without a tokenizer.json AutoTokenizer has to do.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(  # transformers would make an empty tokenizer of nothing
            f"--model {name_or_path}: the folder has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). Copy the "
            "tokenizer files of the model into it."
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(name_or_path)
    except (OSError, ValueError):
        pass
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name_or_path}: cannot load the tokenizer: {error}") from error


def generation_config(model: str):
    """Return the generation config of a folder or hub name, which may name more stop tokens; None where it has none.

    Raises:
        UserError: it is no JSON, or its EOS ids are no ids. transformers would go on without it.
    """
    if (path := find(model, "generation_config.json", download=True)) is None:
        return None
    content = read_json(path)
    ids = content.get("eos_token_id")
    if not all(type(i) is int and i >= 0 for i in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
        raise UserError(f"{path}: eos_token_id is {ids!r}. Give the id of a token, a whole number, or a list of them.")
    try:
        return GenerationConfig.from_pretrained(str(path.parent))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Mend it, or delete it.") from error


class LogprobHead(nn.Linear):
    """The output embedding, which also turns hidden states straight into log-probs of given tokens.

    It has to happen inside the forward pass of the module that owns the weight: that is when ZeRO-3 gathers it.
    """

    def forward(self, hidden, targets=None, temperature=1.0, with_entropy=False):
        """Return logits as nn.Linear does or, given targets [N] for hidden [N, H], (logprobs, entropy or None)."""
        if targets is None:
            return super().forward(hidden)
        dtype = self.weight.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        return token_logprobs(hidden.to(dtype), self.weight.to(dtype), targets, temperature, with_entropy=with_entropy)


def boundaries(position_ids: torch.Tensor | None) -> dict:
    """Return where the sequences of a packed row begin and end, by the names transformers hands to flash attention.

    It would find them by itself, from positions that restart, but once a layer, waiting for the device each time.
    SDPA does not read them: there transformers makes a block-diagonal mask out of the positions.

    Args:
        position_ids: [1, W], restarting with each sequence; None where every row is one sequence.
    """
    if position_ids is None:
        return {}
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    ends = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).int()  # [S + 1]
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


class Policy(nn.Module):
    """A causal language model whose forward pass returns log-probs of given tokens."""

    def __init__(self, model):
        super().__init__()
        assert type(model.lm_head) in (nn.Linear, LogprobHead) and model.lm_head.bias is None
        model.lm_head.__class__ = LogprobHead  # same parameters, same names in checkpoints, one more way to call it
        self.model = model

    def forward(self, input_ids, position_ids, predict_index, targets, temperature, with_entropy):
        """Return (logprobs [N] fp32, entropy [N] fp32 or None) of `targets`.

        Args: as in `packing.MicroBatch`; hidden states of B * W positions, of which N predict a target.
        """
        hidden = self.model.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **boundaries(position_ids)
        ).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, predict_index)  # [N, H]
        return self.model.lm_head(hidden, targets, temperature, with_entropy)
