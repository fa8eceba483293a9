"""The sizes of a model that its memory depends on, and those of the papers' models, so that a plan needs no network."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, Qwen2Config

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.model import load_config
from adaptive_reasoning.run.start import is_gguf, read_gguf

# config.json of each: (hidden, intermediate, layers, heads, key/value heads, vocabulary, tied, positions)
ARCHITECTURES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151_936, False, 131_072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 18_944, 28, 28, 4, 152_064, False, 131_072),
    "Qwen/Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151_936, True, 131_072),
    "Qwen/Qwen2.5-3B": (2048, 11_008, 36, 16, 2, 151_936, True, 32_768),
    "Qwen/Qwen2.5-7B": (3584, 18_944, 28, 28, 4, 152_064, False, 131_072),
    "Qwen/Qwen2.5-14B": (5120, 13_824, 48, 40, 8, 152_064, False, 131_072),
}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "vocab_size", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip
# A cold start keeps the shape of its model: what the folder of a run of ours, or the authors' name on the hub, ends in.
MADE_FROM = {
    "arm-3b": "Qwen/Qwen2.5-3B",
    "arm-7b": "Qwen/Qwen2.5-7B",
    "arm-14b": "Qwen/Qwen2.5-14B",
    "thinkless-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
}


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that memory depends on."""

    layers: int
    hidden: int
    intermediate: int
    q: int  # heads x head size
    kv: int  # key/value heads x head size
    vocab: int
    parameters: int  # a tied output embedding counted once
    tied: bool

    @property
    def layer_width(self) -> int:
        """Numbers that one decoder layer keeps for each token until its backward pass.

        Eight hidden states (input, outputs, two norms with their fp32 copies), q and the attention's result, k and v,
        and four of the MLP (gate, up, silu, product).
        """
        return 8 * self.hidden + 2 * (self.q + self.kv) + 4 * self.intermediate

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer: {name: (numbers in, numbers out)}."""
        inner = {"q_proj": (self.hidden, self.q), "o_proj": (self.q, self.hidden)}
        inner |= dict.fromkeys(("k_proj", "v_proj"), (self.hidden, self.kv))
        inner |= dict.fromkeys(("gate_proj", "up_proj"), (self.hidden, self.intermediate))
        return inner | {"down_proj": (self.intermediate, self.hidden)}

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def largest(self) -> int:
        """Numbers of the largest weight."""
        return max(self.embedding, self.hidden * self.intermediate)

    def kv_bytes(self, value_bytes: int) -> int:
        """Return the bytes of keys and values of one token: 2 x layers x key/value heads x head size x bytes."""
        return 2 * self.layers * self.kv * value_bytes


def shapes_of(config) -> Shapes:
    """Return the shapes of a `transformers` config."""
    with torch.device("meta"):  # counts parameters without allocating one
        # Not from_config: under ZeRO-3 that would split the meta tensors over the processes.
        parameters = sum(p.numel() for p in MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).parameters())
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // heads
    sizes = (config.num_hidden_layers, hidden, config.intermediate_size, heads * head, kv_heads * head)
    return Shapes(*sizes, config.vocab_size, parameters, bool(config.tie_word_embeddings))


def built_in(name: str) -> str | None:
    """Return which of `ARCHITECTURES` a model has by its name, None if that is not known."""
    ends = re.search(r"[/-]([a-z]+-[\d.]+b)(-warmup)?(/model)?/?$", name.lower())
    return name if name in ARCHITECTURES else MADE_FROM.get(ends[1]) if ends else None


def find_config(name: str):
    """Return the config of a model: that of a folder or GGUF file, the built-in one, or that of a hub name.

    Raises:
        UserError: neither; the message has the names that need no network.
    """
    if not name:
        raise UserError("--model is empty: a plan needs the model's config. Name a folder or a hub model with --model.")
    if not (Path(name).expanduser() / "config.json").is_file() and (known := built_in(name)):
        return Qwen2Config(**dict(zip(FIELDS, ARCHITECTURES[known])))
    if is_gguf(name):
        return read_gguf(name, AutoConfig)
    try:
        return load_config(name)
    except UserError as error:
        raise UserError(f"{error} A plan needs no network for: {', '.join(ARCHITECTURES)}.") from error
