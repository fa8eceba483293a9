"""The memory plan against numbers worked out by hand for DeepSeek-R1-Distill-Qwen-1.5B, and what it refuses."""

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.options import RunArgs
from adaptive_reasoning.preflight import (
    GIB,
    USABLE,
    activation_bytes_per_token,
    checkpoint_bytes,
    checkpoints_ahead,
    estimate_rows,
    fixed_items,
    kv_bytes_per_token,
    memory_plan,
    preflight,
    shapes_of,
    state_bytes_per_parameter,
)

# 28 layers of  q, o 2 x 1536 x 1536 + 1536 | k, v 2 x (1536 x 256 + 256) | MLP 3 x 1536 x 8960 | two norms 2 x 1536
# = 46,797,824, two embeddings of 151,936 x 1536, one norm.
PARAMETERS = 28 * 46_797_824 + 2 * 151_936 * 1536 + 1536


@pytest.fixture(scope="module")
def config():
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
    )


@pytest.fixture(scope="module")
def shapes(config):
    return shapes_of(config)


def look(config, **changes):
    """Preflight of the 1.5B model on 8 GPUs of 80 GiB; options and arguments can be changed."""
    names = set(RunArgs.__dataclass_fields__)
    args = RunArgs(**{k: v for k, v in changes.items() if k in names})
    facts = {"device": "H100", "world_size": 8, "zero3": True, "device_memory": 80 * GIB, "questions": 40_000}
    facts |= {"longest_prompt": 1024} | {k: v for k, v in changes.items() if k not in names}
    return preflight(args, model_config=config, **facts)


def plan(shapes, **changes):
    facts = {"world_size": 8, "zero3": True, "longest_prompt": 1024, "memory": 80 * GIB, "arena": None}
    args = RunArgs(**{k: v for k, v in changes.items() if k not in facts})
    facts |= {k: v for k, v in changes.items() if k in facts}
    items, rows, cache = memory_plan(args, shapes, **facts)
    return {item.name: item.bytes for item in items}, rows, cache


def test_shapes_and_parameters(shapes):
    assert shapes.parameters == PARAMETERS == 1_777_088_000
    assert (shapes.layers, shapes.kv_heads, shapes.head_dim, shapes.vocab) == (28, 2, 128, 151_936)


def test_tied_embedding_is_counted_once():
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    for kind in (Qwen2Config, Qwen3Config, LlamaConfig):
        tied, untied = (shapes_of(kind(**sizes, tie_word_embeddings=tie)).parameters for tie in (True, False))
        assert untied - tied == 100 * 16


def test_kv_cache_is_28_kib_a_token(shapes):
    assert kv_bytes_per_token(shapes, 2) == 28 * 1024  # 2 x 28 layers x 2 heads x 128 x 2 bytes
    assert kv_bytes_per_token(shapes, 4) == 56 * 1024


def test_rows_that_fit():
    """A row of 1000 tokens of 1 KiB needs 1.5 times its size, because the arena grows by copying."""
    assert estimate_rows(10 * 1500 * 1024, 1024, 1000) == 10
    assert estimate_rows(10 * 1500 * 1024 - 1, 1024, 1000) == 9
    assert estimate_rows(-5, 1024, 1000) == 0


def test_state_of_the_learner(shapes):
    assert sum(state_bytes_per_parameter("bf16", zero3=True).values()) == 2 + 4 + 4 + 8
    assert sum(state_bytes_per_parameter("fp32", zero3=True).values()) == 4 + 4 + 4 + 8
    assert sum(state_bytes_per_parameter("bf16", zero3=False).values()) == 4 + 2 + 4 + 8
    assert sum(state_bytes_per_parameter("fp32", zero3=False).values()) == 4 + 4 + 8
    eight = {item.name: item.bytes for item in fixed_items(shapes, RunArgs(), 8, zero3=True)}
    assert eight["weights, optimiser"] == PARAMETERS * 18 // 8
    assert eight["rollout replica"] == PARAMETERS * 2
    assert eight["ZeRO-3 exchange"] == (10**9 + 5 * 10**8) * 2
    assert eight["output head"] == 151_936 * 1536 * 10 + 192 * 2**20
    one = {item.name: item.bytes for item in fixed_items(shapes, RunArgs(dtype="fp32"), 1, zero3=False)}
    assert one["weights, optimiser"] == PARAMETERS * 16
    assert one["rollout replica"] == PARAMETERS * 4
    assert "ZeRO-3 exchange" not in one


def test_reference_policy_and_critic_are_counted(shapes):
    from types import SimpleNamespace

    args = SimpleNamespace(**vars(RunArgs()), kl_coef=0.001, critic_learning_rate=5e-6)
    eight = {item.name: item.bytes for item in fixed_items(shapes, args, 8, zero3=True)}
    assert eight["reference policy"] == PARAMETERS * 2 // 8 and eight["critic"] == eight["weights, optimiser"]
    one = {item.name: item.bytes for item in fixed_items(shapes, args, 1, zero3=False)}
    assert one["reference policy"] == PARAMETERS * (4 + 2), "fp32 weights and the bf16 copy of autocast"
    assert "reference policy" not in {item.name for item in fixed_items(shapes, RunArgs(), 8, zero3=True)}


def test_data_parallel_splits_nothing(shapes):
    (states, *_) = fixed_items(shapes, RunArgs(), 8, zero3=False)
    assert states.bytes == PARAMETERS * 18


def test_activations_by_hand(shapes):
    width = 8 * 1536 + 2 * (12 + 2) * 128 + 4 * 8960
    assert activation_bytes_per_token(shapes, 2, checkpointing=True) == 2 * (28 * 1536 + 2 * width) == 292_864
    assert activation_bytes_per_token(shapes, 2, checkpointing=False) == 2 * 29 * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_against_a_real_backward_pass(dtype):
    """The numbers a layer keeps, counted by autograd's own hooks, are those of the formula."""
    kept, tokens = {}, 256
    for layers in (1, 3):
        config = Qwen2Config(
            vocab_size=64,
            hidden_size=96,
            intermediate_size=560,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=1,
            attn_implementation="sdpa",
        )
        model = MODEL_FOR_CAUSAL_LM_MAPPING[Qwen2Config](config).to(dtype).train()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}  # tensors too, so that no storage is freed and its address counted for another

        def pack(tensor, saved=saved, parameters=parameters):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        kept[layers] = sum(size for size, _ in saved.values())
    measured = (kept[3] - kept[1]) / 2 / tokens
    assert measured == pytest.approx(dtype.itemsize * shapes_of(config).layer_width, rel=0.15)


def test_plan_fills_the_gpu_with_rows(shapes):
    """17,408 tokens x 28 KiB = 0.465 GiB a row, 0.697 with room to grow; the rest of the plan is fixed."""
    items, rows, cache = plan(shapes)
    row = 17_408 * 28 * 1024
    assert items["activations"] == 32_768 * 292_864
    assert items["KV arena"] == cache == rows * row
    rest = sum(size for name, size in items.items() if not name.startswith("KV arena"))
    limit = int(USABLE * 80 * GIB)
    assert rest + rows * row * 1.5 <= limit < rest + (rows + 1) * row * 1.5
    assert 60 < rows < 90


def test_no_more_rows_than_asked_for(shapes):
    items, rows, _ = plan(shapes, rollout_rows=8)
    assert rows == 8 and items["KV arena"] == 8 * 17_408 * 28 * 1024


def test_columns_are_rounded_up(shapes):
    _, rows, cache = plan(shapes, rollout_rows=2, longest_prompt=33, max_new_tokens=32)
    assert cache == rows * 96 * 28 * 1024


def test_long_sequence_is_a_micro_batch_of_its_own(shapes):
    items, _, _ = plan(shapes, tokens_per_micro_batch=1000)
    assert items["activations"] == 17_408 * 292_864


def test_arena_limit_bounds_rows_without_a_gpu(shapes):
    _, rows, cache = plan(shapes, memory=None, arena=4 * GIB, dtype="fp32", world_size=1, zero3=False)
    assert rows == 4 * GIB // (17_408 * 56 * 1024) == 4
    assert cache <= 4 * GIB
    assert plan(shapes, memory=None)[1] == RunArgs().rollout_rows


def test_arena_without_room_for_one_response(shapes):
    with pytest.raises(UserError, match="--max_new_tokens"):
        plan(shapes, memory=None, arena=GIB // 4)


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"world_size": 1, "zero3": False, "memory": 24 * GIB}, r"more GPUs .*smaller model"),
        ({"tokens_per_micro_batch": 400_000}, r"--tokens_per_micro_batch from 400,000 to \d"),
        ({"gradient_checkpointing": False, "memory": 40 * GIB}, r"--gradient_checkpointing true"),
        ({"max_new_tokens": 120_000, "memory": 40 * GIB}, r"Lower --max_new_tokens to about \d"),
    ],
)
def test_what_does_not_fit_says_what_to_lower(shapes, changes, mend):
    with pytest.raises(UserError, match=mend):
        plan(shapes, **changes)


def test_the_proposed_micro_batch_fits(shapes):
    with pytest.raises(UserError) as error:
        plan(shapes, tokens_per_micro_batch=400_000)
    proposal = int(str(error.value).split(" to ")[-1].split(" or ")[0].replace(",", ""))
    assert plan(shapes, tokens_per_micro_batch=proposal)[1] >= 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 314, "save_every": 10, "keep": 0}, 32),  # 10 .. 310, and 314
        ({"max_steps": 300, "save_every": 10, "keep": 0}, 30),
        ({"max_steps": 314, "save_every": 0, "keep": 0}, 1),
        ({"max_steps": 314, "save_every": 10, "keep": 3}, 4),  # the next one is written before one is deleted
        ({"max_steps": 314, "save_every": 10, "keep": 0, "done": 200, "there": 20}, 12),
        ({"max_steps": 314, "save_every": 10, "keep": 3, "done": 200, "there": 3}, 1),
        ({"max_steps": 314, "save_every": 10, "keep": 0, "done": 314, "there": 32}, 0),
        ({"max_steps": 5, "save_every": 10, "keep": 0}, 1),
    ],
)
def test_checkpoints_ahead(options, expected):
    assert checkpoints_ahead(**options) == expected


def test_checkpoint_size(shapes):
    assert checkpoint_bytes(shapes, "bf16", zero3=True) == PARAMETERS * (2 + 4 + 8)
    assert checkpoint_bytes(shapes, "fp32", zero3=False) == PARAMETERS * (4 + 8)


def test_table(config):
    found = look(config, skipped=3, findings={"control tokens": "</think> = 151649"}, disk_free=2000 * GIB)
    for text in (
        "8 processes, ZeRO-3; H100, 80.00 GiB each",
        "1.777 B parameters",
        "control tokens  </think> = 151649",
        "40,000, 3 more left out for length",
        "1,024 prompt + 16,384 response tokens = 17,408 of the model's 131,072 positions",
        "32 checkpoints x 23.17 GiB",
        "1.78 B x 18 bytes / 8 processes",
        f"{found.rows} rows x 17,408 tokens x 28 KiB; 256 were asked for",
    ):
        assert text in found.table
    assert found.cache_bytes == found.rows * 17_408 * 28 * 1024
    assert "WARNING" not in found.table and found.table.isascii()


def test_table_without_a_gpu(config):
    found = look(config, device="CPU", world_size=1, zero3=False, device_memory=None, dtype="fp32", arena=4 * GIB)
    assert "not compared with the memory of this machine" in found.table
    assert found.rows == 4


def test_long_responses_are_pointed_out(config):
    assert (
        "WARNING: the model's config has 131,072 positions"
        in look(config, max_new_tokens=131_072, device_memory=None).table
    )


def test_no_question_left(config):
    with pytest.raises(UserError, match="12 have a prompt of more than --max_prompt_tokens 1024"):
        look(config, questions=0, skipped=12)


def test_disk_too_small(config):
    with pytest.raises(UserError, match="32 more checkpoints of 23.17 GiB .*--keep_checkpoints"):
        look(config, disk_free=500 * GIB)
    assert "4 checkpoints" in look(config, disk_free=500 * GIB, keep_checkpoints=3).table


def test_unsupported_model():
    config = MistralConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match="mistral"):
        look(config)
