"""The memory plan against numbers worked out by hand for DeepSeek-R1-Distill-Qwen-1.5B, and what it refuses."""

import pytest
import torch
from adaptive_reasoning.learner.offload import OffloadedAdamW
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.plan.fit import Mend, fits, mends, needed, plan_memory
from adaptive_reasoning.plan.hours import checkpoint_bytes
from adaptive_reasoning.plan.memory import (
    GIB,
    USABLE,
    Where,
    activation_bytes_per_token,
    arena_growth,
    dialogue_bytes,
    fixed_items,
    kv_bytes_per_token,
    offload_copies,
    phase_bytes,
    state_bytes_per_parameter,
    trained_parameters,
)
from adaptive_reasoning.plan.shapes import shapes_of
from adaptive_reasoning.run.options import RunArgs
from adaptive_reasoning.run.preflight import checkpoints_ahead, preflight

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


EIGHT = Where(8, zero3=True)
ONE = Where(1)
CPU = Where(1, cuda=False)


def plan(shapes, **changes):
    """(name -> bytes, plan) of one of 8 GPUs of 80 GiB; options and the place can be changed."""
    facts = {"world_size": 8, "zero3": True, "longest_prompt": 1024, "memory": 80 * GIB}
    names = set(Where.__dataclass_fields__)
    args = RunArgs(**{k: v for k, v in changes.items() if k not in names})
    found = plan_memory(args, shapes, Where(**facts | {k: v for k, v in changes.items() if k in names}))
    return {item.name: item.bytes for item in found.items}, found


def sizes(args, shapes, where) -> dict[str, int]:
    return {item.name: item.bytes for item in fixed_items(args, shapes, where)[0]}


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


def test_state_of_the_learner(shapes):
    assert sum(state_bytes_per_parameter("bf16", zero3=True).values()) == 2 + 4 + 4 + 8
    assert sum(state_bytes_per_parameter("fp32", zero3=True).values()) == 4 + 4 + 4 + 8
    assert sum(state_bytes_per_parameter("bf16", zero3=False).values()) == 4 + 2 + 4 + 8
    assert sum(state_bytes_per_parameter("fp32", zero3=False).values()) == 4 + 4 + 8
    eight = sizes(RunArgs(), shapes, EIGHT)
    parts = ("weight", "fp32 master", "gradient", "Adam")
    assert [eight[part] for part in parts] == [PARAMETERS * size // 8 for size in (2, 4, 4, 8)]
    assert eight["rollout replica"] == PARAMETERS * 2
    assert eight["ZeRO-3 exchange"] == (10**9 + 5 * 10**8) * 2
    assert eight["output head"] == 151_936 * 1536 * 10 + 192 * 2**20
    one = sizes(RunArgs(dtype="fp32"), shapes, ONE)
    assert one["fp32 weight"] + one["gradient"] + one["Adam"] == PARAMETERS * 16
    assert one["rollout replica"] == PARAMETERS * 4
    assert "ZeRO-3 exchange" not in one


def test_what_exists_when(shapes):
    """Without ZeRO-3 gradients go after every step: the rollout does not have them, the moments of Adam it does."""
    items, _ = fixed_items(RunArgs(dtype="fp32"), shapes, CPU)
    alive = {phase: {item.name for item in items if phase in item.phases} for phase in ("load", "rollout", "head")}
    assert "gradient" not in alive["rollout"] | alive["load"] and "gradient" in alive["head"]
    assert "Adam" in alive["rollout"] and "Adam" not in alive["load"]
    assert "sampling" not in alive["head"] and "activations" not in alive["rollout"]
    zero3, _ = fixed_items(RunArgs(), shapes, EIGHT)
    assert "rollout" in next(item.phases for item in zero3 if item.name == "gradient"), "ZeRO-3 keeps its buffer"


def test_peak_is_the_largest_phase_and_not_the_sum(shapes):
    _, found = plan(shapes)
    totals = phase_bytes(found.items)
    assert found.peak == max(totals.values()) == totals[found.largest_phase]
    assert found.peak < sum(item.bytes for item in found.items)


def test_reference_policy_and_critic_are_counted(shapes):
    from types import SimpleNamespace

    args = SimpleNamespace(**vars(RunArgs()), kl_coef=0.001, critic_learning_rate=5e-6)
    eight = sizes(args, shapes, EIGHT)
    assert eight["reference policy"] == PARAMETERS * 2 // 8
    assert all(eight[f"critic: {part}"] == eight[part] for part in ("weight", "fp32 master", "gradient", "Adam"))
    assert sizes(args, shapes, ONE)["reference policy"] == PARAMETERS * 4
    assert "reference policy" not in sizes(RunArgs(), shapes, EIGHT)


def test_data_parallel_splits_nothing(shapes):
    eight = sizes(RunArgs(), shapes, Where(8, zero3=False))
    parts = ("fp32 weight", "bf16 copy", "gradient", "Adam")
    assert sum(eight[part] for part in parts) == PARAMETERS * 18


def test_optimiser_in_cpu_memory(shapes):
    """One process sends Adam's moments away; ZeRO-3 the fp32 masters and the gradients as well.

    Either holds 16 bytes a parameter there: the plan of one process had missed the copies that AdamW works on.
    """
    from types import SimpleNamespace

    args = SimpleNamespace(**vars(RunArgs()))
    args.offload_optimizer = True
    for where, parts in ((ONE, {"Adam": 8}), (EIGHT, {"fp32 master": 4, "gradient": 4, "Adam": 8})):
        items, host = fixed_items(args, shapes, where)
        assert not parts.keys() & {item.name for item in items}
        away = {item.name: item.bytes for item in host}
        assert all(away[part] == PARAMETERS * size // where.world_size for part, size in parts.items())
        assert sum(away.values()) - away["checkpoint"] == PARAMETERS * 16 // where.world_size


def test_offloaded_adamw_holds_what_the_plan_says():
    """The bytes of its copies and moments between steps, counted on a real one; the gradients come during the step."""
    held = sum(size for size, phases in offload_copies(False).values() if "rollout" in phases) + 8  # the moments
    weight = torch.nn.Parameter(torch.randn(30, 40))
    weight.grad, optimizer = torch.randn(30, 40), OffloadedAdamW([weight])
    optimizer.step()
    (copy,) = optimizer.param_groups[0]["params"]
    tensors = [copy, *(x for x in optimizer.state[copy].values() if x.numel() > 1)]
    assert sum(x.nbytes for x in tensors) == held * weight.numel()
    assert copy.data_ptr() != weight.data_ptr()


def test_a_checkpoint_passes_tensor_by_tensor(shapes):
    """The plan had the whole model on the first process; only the largest tensor, an embedding, is ever there."""
    one, eight = (dict((i.name, i) for i in fixed_items(RunArgs(), shapes, where)[1]) for where in (ONE, EIGHT))
    assert one["checkpoint"].bytes == 151_936 * 1536 * 4 and eight["checkpoint"].bytes == 151_936 * 1536 * 2
    items, host = fixed_items(RunArgs(dtype="fp32"), shapes, CPU)
    assert "checkpoint" not in {item.name for item in items + host}, "on the CPU nothing is copied"


def test_dialogues_are_kept_between_turns(shapes):
    """The keys and values that Thinker keeps were missing from the plan: 256 dialogues of 16,048 tokens of 28 KiB."""
    from adaptive_reasoning.thinker import Args

    args, expected = Args(), 256 * (2048 + 14_000) * 28 * 1024
    where = Where(8, zero3=True, longest_prompt=2048)
    assert dialogue_bytes(args, shapes, 2048) == expected
    assert {item.name: item.bytes for item in fixed_items(args, shapes, where)[1]}["dialogues"] == expected
    assert "dialogues" not in sizes(args, shapes, where), "on a GPU they wait in the memory of the machine"
    assert sizes(args, shapes, Where(cuda=False, longest_prompt=2048))["dialogues"] == expected
    assert dialogue_bytes(Args(environment="qa"), shapes, 2048) == dialogue_bytes(RunArgs(), shapes, 2048) == 0


def test_slots_grow_by_doubling():
    """Prompt of 20 tokens: 64 columns (of 40, rounded up), then 192 (of 2 x 96), at last all that the longest needs."""
    assert arena_growth(20, 64) == (0, 64)
    assert arena_growth(20, 150) == (64, 150)
    assert arena_growth(20, 500) == (448, 500)


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


def test_plan_fills_the_gpu(shapes):
    """A row is 17,408 tokens x 28 KiB = 0.465 GiB; pages take what the largest phase leaves, whole rows or not."""
    items, found = plan(shapes)
    row = 17_408 * 28 * 1024
    assert items["activations"] == 32_768 * 292_864
    assert items["KV arena"] == found.cache_bytes and found.rows == found.cache_bytes // row
    assert found.peak == int(USABLE * 80 * GIB)
    assert 100 < found.rows < 150


def test_no_more_rows_than_asked_for(shapes):
    items, found = plan(shapes, rollout_rows=8)
    assert found.rows == 8 and items["KV arena"] == 8 * 17_408 * 28 * 1024


def test_columns_are_rounded_up(shapes):
    _, found = plan(shapes, rollout_rows=2, longest_prompt=33, max_new_tokens=32)
    assert found.cache_bytes == 2 * 96 * 28 * 1024


def test_long_sequence_is_a_micro_batch_of_its_own(shapes):
    items, _ = plan(shapes, tokens_per_micro_batch=1000)
    assert items["activations"] == 17_408 * 292_864


def test_arena_limit_bounds_rows_without_a_gpu(shapes):
    facts = {"memory": None, "cuda": False, "world_size": 1, "zero3": False}
    _, found = plan(shapes, arena=4 * GIB, dtype="fp32", **facts)
    assert found.rows == 4 * GIB // (17_408 * 56 * 1024) == 4
    assert found.cache_bytes <= 4 * GIB
    assert plan(shapes, **facts)[1].rows == RunArgs().rollout_rows


def test_arena_without_room_for_one_response(shapes):
    with pytest.raises(UserError, match="--max_new_tokens"):
        plan(shapes, memory=None, arena=GIB // 4)


MENDS = [
    ({"world_size": 1, "zero3": False, "memory": 24 * GIB}, r"take \d+ GPUs .*, which share the optimiser"),
    ({"tokens_per_micro_batch": 400_000}, r"Lower --tokens_per_micro_batch from 400,000 to \d"),
    ({"gradient_checkpointing": False, "memory": 40 * GIB}, r"et --gradient_checkpointing true"),
    ({"max_new_tokens": 120_000, "memory": 40 * GIB}, r"ower --max_new_tokens from 120,000 to \d"),
    ({"world_size": 4, "memory": 24 * GIB, "max_new_tokens": 4096}, r"."),
    ({"world_size": 1, "zero3": False, "memory": 32 * GIB, "max_new_tokens": 2048, "rollout_rows": 2048}, r"."),
]


@pytest.mark.parametrize(("changes", "words"), MENDS)
def test_what_does_not_fit_names_a_mend_that_fits(shapes, changes, words):
    """Every mend that is proposed is applied, and then the plan is made without an error."""
    with pytest.raises(UserError, match=words) as error:
        plan(shapes, **changes)
    names = set(Where.__dataclass_fields__)
    args = RunArgs(**{k: v for k, v in changes.items() if k not in names})
    facts = {"world_size": 8, "zero3": True, "longest_prompt": 1024, "memory": 80 * GIB}
    where = Where(**facts | {k: v for k, v in changes.items() if k in names})
    found = mends(args, shapes, where)
    assert found
    for mend in found:
        changed, place = mend.apply(args, where)
        assert plan_memory(changed, shapes, place).rows >= 1
        text = mend.text(args, where)
        assert text[1:] in str(error.value)
        for name, value in mend.options.items():
            assert isinstance(value, bool) or f"{name} from {getattr(args, name):,} to {value:,}" in text


def test_proposed_micro_batch_is_the_largest_that_fits(shapes):
    args, where = RunArgs(tokens_per_micro_batch=400_000), Where(8, True, memory=80 * GIB)
    (mend,) = mends(args, shapes, where)
    tokens = mend.options["tokens_per_micro_batch"]
    assert not fits(RunArgs(tokens_per_micro_batch=tokens + 1), shapes, where)
    assert needed(RunArgs(tokens_per_micro_batch=tokens), shapes, where) <= USABLE * 80 * GIB


def test_where_no_mend_does_it_the_message_says_so(shapes):
    with pytest.raises(UserError, match="smaller model .* GPUs with more memory"):
        plan(shapes, memory=GIB)
    assert mends(RunArgs(), shapes, Where(8, True, memory=GIB)) == []


def test_a_mend_reads_as_it_is_typed():
    where, args = Where(1), RunArgs()
    mend = Mend({"tokens_per_micro_batch": 18_000, "gradient_checkpointing": True, "offload_optimizer": True})
    assert mend.text(args, where) == (
        "Lower --tokens_per_micro_batch from 32,768 to 18,000 or less, set --gradient_checkpointing true, "
        "set --offload_optimizer true"
    )
    assert "zero3_8gpu_offload.yaml" in Mend({"offload_optimizer": True}, 16).text(args, where)


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
    """With LoRA the moments and masters are those of the adapters: they were counted for all parameters."""
    from types import SimpleNamespace

    args = RunArgs()
    assert checkpoint_bytes(args, shapes, zero3=True) == PARAMETERS * (2 + 4 + 8)
    assert checkpoint_bytes(RunArgs(dtype="fp32"), shapes, zero3=False) == PARAMETERS * (4 + 8)
    lora = SimpleNamespace(**vars(args), lora_rank=8)
    critic = SimpleNamespace(**vars(args), critic_learning_rate=1e-6)
    trained = trained_parameters(lora, shapes)
    assert 0 < trained < PARAMETERS / 100
    assert checkpoint_bytes(lora, shapes, zero3=True) == PARAMETERS * 2 + trained * (4 + 8)
    assert checkpoint_bytes(critic, shapes, zero3=True) == 2 * PARAMETERS * (2 + 4 + 8)


def test_table(config):
    found = look(config, skipped=3, findings={"control tokens": "</think> = 151649"}, disk_free=2000 * GIB)
    for text in (
        "8 processes, ZeRO-3; H100, 80.00 GiB each",
        "1.777 B parameters",
        "control tokens  </think> = 151649",
        "40,000, 3 more left out for length",
        "1,024 prompt + 16,384 response tokens = 17,408 of the model's 131,072 positions",
        "32 checkpoints x 23.17 GiB",
        "1.78 B x 8 / 8 processes",
        f"{found.rows} rows x 17,408 tokens x 28 KiB; 256 were asked for",
        "in the phase 'head'; of 80.00 GiB, of which 73.60 are planned with",
    ):
        assert text in found.table
    assert found.rows == found.cache_bytes // (17_408 * 28 * 1024)
    assert "WARNING" not in found.table and found.table.isascii()


def test_table_without_a_gpu(config):
    found = look(config, device="CPU", world_size=1, zero3=False, device_memory=None, dtype="fp32", arena=4 * GIB)
    assert "not compared with the memory of this machine" in found.table
    assert found.rows == 4


def test_launch_file_with_offload_is_seen(config):
    """A run that fits because its launch file keeps the optimiser in CPU memory must not be refused."""
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    from adaptive_reasoning.learner.runtime import offloads_optimizer

    for device, expected in (("cpu", True), ("none", False), (None, False)):
        plugin = SimpleNamespace(offload_optimizer_device=device)
        state = SimpleNamespace(deepspeed_plugin=plugin)
        accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
        assert offloads_optimizer(accelerator) is expected
    assert not offloads_optimizer(SimpleNamespace(distributed_type=DistributedType.NO))
    assert "fp32 master" in look(config).table.split("memory of the machine")[0]
    away = look(config, offload=True).table.split("memory of the machine")
    assert "fp32 master" not in away[0] and "fp32 master" in away[1]


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
