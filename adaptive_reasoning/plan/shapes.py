"""The sizes of a model that memory and time depend on, and those of the papers' models."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Qwen2Config

from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.learner.model import load_config
from adaptive_reasoning.rollout.decoder import check_supported

# config.json of each: (hidden, intermediate, layers, heads, key/value heads, vocabulary, tied, positions)
ARCHITECTURES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151_936, False, 131_072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 18_944, 28, 28, 4, 152_064, False, 131_072),
    "Qwen/Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151_936, True, 131_072),
    "Qwen/Qwen2.5-3B": (2048, 11_008, 36, 16, 2, 151_936, True, 32_768),
    "Qwen/Qwen2.5-7B": (3584, 18_944, 28, 28, 4, 152_064, False, 131_072),
    "Qwen/Qwen2.5-14B": (5120, 13_824, 48, 40, 8, 152_064, False, 131_072),
}
# Models that a run of ours or of the authors makes out of one of them: they have its shape.
MADE_FROM = {
    "runs/sft-arm-3b/model": "Qwen/Qwen2.5-3B",
    "runs/sft-arm-7b/model": "Qwen/Qwen2.5-7B",
    "runs/sft-arm-14b/model": "Qwen/Qwen2.5-14B",
    "runs/warmup-thinkless-1.5b/model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "Vinnnf/Thinkless-1.5B-Warmup": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
}


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that memory and time depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int  # a tied output embedding counted once
    tied: bool

    @property
    def layer_width(self) -> int:
        """Numbers that one decoder layer keeps for each token until its backward pass.

        Eight hidden states (input, outputs, two norms with their fp32 copies), q and the attention's result, k and v,
        and four of the MLP (gate, up, silu, product).
        """
        return 8 * self.hidden + 2 * (self.heads + self.kv_heads) * self.head_dim + 4 * self.intermediate

    @property
    def embedding(self) -> int:
        """Numbers of one embedding, the largest weight of a model with a large vocabulary."""
        return self.vocab * self.hidden

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: all but an input embedding that is only looked up."""
        return self.parameters - (0 if self.tied else self.embedding)

    @property
    def largest(self) -> int:
        """Numbers of the largest weight."""
        return max(self.embedding, self.hidden * self.intermediate)


def shapes_of(config) -> Shapes:
    """Return the shapes of a `transformers` config.

    Raises:
        UserError: not a model that rollout and learner support.
    """
    check_supported(config)
    with torch.device("meta"):  # counts parameters without allocating one
        # Not from_config: under ZeRO-3 that would split the meta tensors over the processes.
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    heads = config.num_attention_heads
    return Shapes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        tied=bool(config.tie_word_embeddings),
    )


def find_config(name: str):
    """Return the config of a model: a folder that is there, one of `ARCHITECTURES`, or a hub name.

    Raises:
        UserError: neither; the message has the names that need no network.
    """
    if not name:
        raise UserError("--model is empty: a plan needs the model's config. Name a folder or a hub model with --model.")
    if not (Path(name).expanduser() / "config.json").is_file():
        known = MADE_FROM.get(name.rstrip("/"), name)
        if known in ARCHITECTURES:
            return built_in(known)
    try:
        return load_config(name)
    except UserError as error:
        names = ", ".join([*ARCHITECTURES, *MADE_FROM])
        raise UserError(f"{error} A plan needs no network for: {names}.") from error


def built_in(name: str) -> Qwen2Config:
    """Return the config of one of `ARCHITECTURES`."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied, positions = ARCHITECTURES[name]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=positions,
    )
