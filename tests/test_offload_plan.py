"""One 80 GB GPU without DeepSpeed trains R1-Distill-Qwen-1.5B at 16k tokens, by the arithmetic of the preflight."""

import pytest
from test_kernels_compile import MODELS, V
from transformers import Qwen2Config

from adaptive_reasoning.adaptthink import Args
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.preflight import preflight

GIB = 2**30
HIDDEN, HEADS, KV_HEADS = MODELS["1.5B"]
CONFIG = Qwen2Config(
    hidden_size=HIDDEN, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, vocab_size=V, max_position_embeddings=131_072, tie_word_embeddings=False,
)  # fmt: skip


def plan(gib: float, **options):
    """Return the preflight of the official AdaptThink options, 16,384 response tokens, on one GPU of so many GiB."""
    args = Args(max_new_tokens=16_384, **options)
    return preflight(
        args, model_config=CONFIG, device="a GPU", device_memory=int(gib * GIB), questions=1000, longest_prompt=1024
    )


def test_1_5b_at_16k_fits_an_80_gb_gpu():
    """With the options of the paper, gradient checkpointing among them; enough rows decode side by side."""
    default = plan(79.2)
    assert default.rows >= 16 and default.cache_bytes >= 16 * 17_408 * 28 * 1024
    assert plan(79.2, offload_optimizer=True).rows >= default.rows


def test_what_does_not_fit_names_a_mend():
    with pytest.raises(UserError, match="checkpointing|micro_batch"):
        plan(79.2, gradient_checkpointing=False)
    with pytest.raises(UserError, match="GiB"):
        plan(39.0)
