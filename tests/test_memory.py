"""The memory plan against numbers worked out by hand for DeepSeek-R1-Distill-Qwen-1.5B, and what it refuses."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import memory_worker
import pytest
import torch
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, Qwen2Config, Qwen3Config

from adaptive_reasoning import ada_grpo, adaptthink, degrpo, grpo, rft, sft, thinker
from adaptive_reasoning.benchmark import __main__ as benchmark
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.runtime import offloads_optimizer
from adaptive_reasoning.rollout.batch_state import BatchState, Shape
from adaptive_reasoning.run import memory
from adaptive_reasoning.run.memory import (
    GIB,
    USABLE,
    Case,
    Holds,
    Where,
    changed,
    fixes,
    plan_memory,
    trained_parameters,
)
from adaptive_reasoning.run.options import RunArgs, parse_args
from adaptive_reasoning.run.preflight import GPUS, Place, checkpoints_ahead, preflight, print_plan
from adaptive_reasoning.run.shapes import ARCHITECTURES, built_in, find_config, shapes_of

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
# 28 layers of  q, o 2 x 1536 x 1536 + 1536 | k, v 2 x (1536 x 256 + 256) | MLP 3 x 1536 x 8960 | two norms 2 x 1536
# = 46,797,824, two embeddings of 151,936 x 1536, one norm.
PARAMETERS = 28 * 46_797_824 + 2 * 151_936 * 1536 + 1536
CONFIG = find_config("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
LONG = 16_384  # responses of AdaptThink
EIGHT = Where(8, zero3=True, memory=80 * GIB)
ONE, CPU = Where(), Where(cuda=False)


@pytest.fixture(scope="module")
def shapes():
    return shapes_of(CONFIG)


def case_of(shapes, where=EIGHT, holds=None, **options) -> Case:
    args = RunArgs(**{"max_new_tokens": LONG, **options})
    return Case(args, holds or args.holds(), shapes, where)


def sizes(case: Case) -> dict[str, int]:
    return {item.name: item.bytes for item in case.items()[0]}


def plan(shapes, where=EIGHT, **options):
    """(name -> bytes, plan)"""
    case = case_of(shapes, where, **options)
    found = plan_memory(case.args, case.holds, shapes, where)
    return {item.name: item.bytes for item in found.items}, found


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the model cards' safetensors
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", PARAMETERS),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
    ],
)
def test_built_in_models_have_the_published_number_of_parameters(name, parameters):
    assert name in ARCHITECTURES and shapes_of(find_config(name)).parameters == parameters


def test_tied_embedding_is_counted_once():
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    for kind in (Qwen2Config, Qwen3Config, LlamaConfig):
        tied, untied = (shapes_of(kind(**sizes, tie_word_embeddings=tie)).parameters for tie in (True, False))
        assert untied - tied == 100 * 16


def test_models_of_all_experiments_need_no_network():
    for module, pattern in ((adaptthink, "adaptthink_*"), (ada_grpo, "ada_grpo_*"), (degrpo, "degrpo_1_5b.y*"),
                            (grpo, "grpo_*"), (thinker, "thinker_*"), (rft, "rft_*"), (sft, "sft_arm_*")):  # fmt: skip
        found = sorted(EXPERIMENTS.glob(pattern))
        assert found
        for path in found:
            assert built_in(parse_args(module.Args, ["--config", str(path)]).model) in ARCHITECTURES, path
    assert built_in("runs/warmup-thinkless-1.5b/model/") == built_in("Vinnnf/Thinkless-1.5B-Warmup") is not None
    assert built_in("someone/charm-3b") is built_in("someone/arm-3b-instruct") is None


def test_unknown_model_names_those_that_need_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"(?s)nobody/nothing.*needs no network for: deepseek-ai/DeepSeek-R1-Distill"):
        find_config("nobody/nothing")
    with pytest.raises(UserError, match="--model is empty"):
        find_config("")


def test_a_folder_wins_over_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 77, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    config.save_pretrained("runs/sft-arm-3b/model")
    assert find_config("runs/sft-arm-3b/model").vocab_size == 77
    assert find_config("runs/sft-arm-7b/model").hidden_size == 3584


# ----------------------------------------------------------------------------------------------------------- the items


def test_kv_cache_is_28_kib_a_token(shapes):
    assert shapes.kv_bytes(2) == 28 * 1024  # 2 x 28 layers x 2 heads x 128 x 2 bytes
    assert shapes.kv_bytes(4) == 56 * 1024


def test_buffers_of_a_row_in_the_rollout():
    def size(new):
        state = BatchState(1, Shape(new, 1, 0, 0, 0, 0, 0), torch.device("cpu"))
        return sum(buffer.nbytes for buffer in state.all)

    assert size(100) - size(99) == memory.ROW_BYTES


def test_state_of_the_learner(shapes):
    def parameter(*how):
        return sum(size for size, _ in memory.state_bytes(*how).values())

    assert parameter("bf16", True) == 2 + 4 + 4 + 8 and parameter("fp32", True) == 4 + 4 + 4 + 8
    assert parameter("bf16", False) == 4 + 2 + 4 + 8 and parameter("fp32", False) == 4 + 4 + 8
    eight = sizes(case_of(shapes))
    parts = ("weight", "fp32 master", "gradient", "Adam")
    assert [eight[part] for part in parts] == [PARAMETERS * size // 8 for size in (2, 4, 4, 8)]
    assert eight["rollout replica"] == PARAMETERS * 2
    assert eight["ZeRO-3 exchange"] == (10**9 + 5 * 10**8) * 2
    assert eight["output head"] == 151_936 * 1536 * 10 + 192 * 2**20
    one = sizes(case_of(shapes, ONE, dtype="fp32"))
    assert one["fp32 weight"] + one["gradient"] + one["Adam"] == PARAMETERS * 16
    assert one["rollout replica"] == PARAMETERS * 4 and "ZeRO-3 exchange" not in one
    apart = sizes(case_of(shapes, Where(8)))  # data parallel: nothing is split
    assert sum(apart[part] for part in ("fp32 weight", "bf16 copy", "gradient", "Adam")) == PARAMETERS * 18


def test_what_exists_when(shapes):
    """Without ZeRO-3 gradients go after every step: the rollout does not have them, the moments of Adam it does."""
    items, _ = case_of(shapes, CPU, dtype="fp32").items()
    alive = {phase: {item.name for item in items if phase in item.phases} for phase in ("load", "rollout", "head")}
    assert "gradient" not in alive["rollout"] | alive["load"] and "gradient" in alive["head"]
    assert "Adam" in alive["rollout"] and "Adam" not in alive["load"]
    assert "sampling" not in alive["head"] and "activations" not in alive["rollout"]
    zero3, _ = case_of(shapes).items()
    assert "rollout" in next(item.phases for item in zero3 if item.name == "gradient"), "ZeRO-3 keeps its buffer"


def test_peak_is_the_largest_phase_and_not_the_sum(shapes):
    _, found = plan(shapes)
    totals = memory.phase_bytes(found.items)
    assert found.peak == max(totals.values()) == totals[found.largest_phase]
    assert found.peak < sum(item.bytes for item in found.items)


def test_reference_policy_and_critic_are_counted(shapes):
    holds = Holds(reference=True, critic=True)
    eight = sizes(case_of(shapes, holds=holds))
    assert eight["reference policy"] == PARAMETERS * 2 // 8
    assert all(eight[f"critic: {part}"] == eight[part] for part in ("weight", "fp32 master", "gradient", "Adam"))
    assert sizes(case_of(shapes, ONE, holds))["reference policy"] == PARAMETERS * 4
    assert not {"reference policy", "critic: Adam"} & sizes(case_of(shapes)).keys()


def test_methods_say_what_they_hold():
    for module in (grpo, ada_grpo, degrpo):
        assert module.Args().holds().reference and not module.Args(kl_coef=0.0).holds().reference
    assert thinker.Args().holds() == Holds(questions=128, critic=True, dialogues=True, least_new_tokens=14_000)
    assert not thinker.Args(environment="qa").holds().dialogues
    assert adaptthink.Args(eval_top_p=1.0, ref_top_p=0.9).holds().top_p == 0.9
    held = sft.Args().holds()
    assert (held.rollout, held.reference, held.critic) == (False, False, False)


def test_optimiser_in_cpu_memory(shapes):
    """ZeRO-3 with the offload launch file: fp32 masters, gradients and moments leave the GPU, on one GPU too."""
    for world_size in (1, 8):
        case = case_of(shapes, Where(world_size, zero3=True, offload=True))
        items, host = case.items()
        parts = {"fp32 master": 4, "gradient": 4, "Adam": 8}
        assert not parts.keys() & {item.name for item in items}
        away = {item.name: item.bytes for item in host}
        assert all(away[part] == PARAMETERS * size // world_size for part, size in parts.items())
        assert sum(away.values()) - away["checkpoint"] == PARAMETERS * 16 // world_size
        assert "optimiser scratch" not in sizes(case)


def test_a_checkpoint_passes_tensor_by_tensor(shapes):
    one, eight = ({i.name: i.bytes for i in case_of(shapes, where).items()[1]} for where in (ONE, EIGHT))
    assert one["checkpoint"] == 151_936 * 1536 * 4 and eight["checkpoint"] == 151_936 * 1536 * 2
    items, host = case_of(shapes, CPU, dtype="fp32").items()
    assert "checkpoint" not in {item.name for item in items + host}, "on the CPU nothing is copied"


def test_dialogues_are_kept_between_turns(shapes):
    """256 dialogues of 16,048 tokens of 28 KiB."""
    args, expected = thinker.Args(), 256 * (2048 + 14_000) * 28 * 1024
    on_gpu = Case(args, args.holds(), shapes, replace(EIGHT, longest_prompt=2048))
    assert {item.name: item.bytes for item in on_gpu.items()[1]}["dialogues"] == expected
    assert "dialogues" not in sizes(on_gpu), "on a GPU they wait in the memory of the machine"
    on_cpu = replace(on_gpu, where=replace(CPU, longest_prompt=2048))
    assert sizes(on_cpu)["dialogues"] == sizes(on_cpu)["dialogues going on"] == expected
    qa = thinker.Args(environment="qa")
    assert "dialogues" not in {item.name for item in Case(qa, qa.holds(), shapes, EIGHT).items()[1]}


def test_supervised_runs_have_no_rollout():
    args = parse_args(sft.Args, ["--config", str(EXPERIMENTS / "sft_arm_7b.yaml"), "--max_steps", "100"])
    holds, shapes = args.holds(), shapes_of(find_config(args.model))
    found = plan_memory(args, holds, shapes, EIGHT)
    items = {item.name: item.bytes for item in found.items}
    assert not {"rollout replica", "sampling", "KV cache"} & items.keys() and found.rows == found.cache_bytes == 0
    H, I, kv, r = 3584, 18_944, 512, args.lora_rank
    per_layer = (H + H) + 2 * (H + kv) + (H + H) + 2 * (H + I) + (I + H)  # q; k, v; o; gate, up; down
    assert r and trained_parameters(args, shapes) == r * 28 * per_layer
    assert items["Adam"] == trained_parameters(args, shapes) * 8 // 8
    assert items["base"] == shapes.parameters * 2 // 8, "ZeRO-3 splits it too, all of it in bf16"


def test_lora_by_hand(shapes):
    """Rank 16 on q (1536 to 1536) and v (1536 to 256), alpha 16, one GPU: the base in bf16, its embedding in fp32."""
    lora = {"lora_rank": 16, "lora_targets": "q_proj,v_proj"}
    trained, VH, matrix = 16 * 28 * (3072 + 1792), 151_936 * 1536, 1536 * 8960
    case = case_of(shapes, ONE, holds=Holds(reference=True), **lora)
    found = sizes(case)
    assert trained_parameters(case.args, shapes) == trained == 2_179_072
    assert found["base"] == PARAMETERS * 2 + VH * 2 and found["merged matrix"] == matrix * (4 + 4)
    assert [found[name] for name in ("fp32 weight", "bf16 copy", "gradient", "Adam")] == [
        trained * size for size in (4, 2, 4, 8)
    ]
    assert found["output head"] == 3 * 64 * 2**20 and "embedding" not in found, "frozen: no gradient"
    assert "reference policy" not in found, "it is the base"
    width = 8 * 1536 + 2 * (12 + 2) * 128 + 4 * 8960 + 2 * 16
    assert found["activations"] == 32_768 * 4 * (28 * 1536 + 2 * width)
    fp32 = sizes(case_of(shapes, CPU, dtype="fp32", **lora))
    assert fp32["base"] == PARAMETERS * 4 and fp32["merged matrix"] == matrix * 4 and "bf16 copy" not in fp32
    assert fp32["optimiser scratch"] == 2 * 16 * 8960 * 4
    tied = shapes_of(find_config("Qwen/Qwen2.5-1.5B"))
    assert sizes(case_of(tied, ONE, **lora))["output head"] == VH * 2 + 3 * 64 * 2**20, "autocast's copy of the head"
    critic = sizes(case_of(shapes, ONE, holds=Holds(critic=True), **lora))
    assert critic["critic: base"] == critic["base"] and critic["critic: Adam"] == trained * 8


def test_1_5b_at_16k_on_one_24_gb_card(capsys):
    """What docs/scaling.md says: not all weights; adapters, in smaller micro-batches than those of the paper's run."""
    argv = ["--config", str(EXPERIMENTS / "adaptthink_1_5b.yaml"), "--preflight", "--gpu", "rtx4090"]
    with pytest.raises(UserError, match="needs at least 53.80 GiB on each GPU, 21.71 GiB of it can be used"):
        parse_args(adaptthink.Args, argv)
    lora = [*argv, "--lora_rank", "16"]
    with pytest.raises(UserError, match="Lower --tokens_per_micro_batch from 32,768 to 25,067 or less"):
        parse_args(adaptthink.Args, lora)
    with pytest.raises(SystemExit):
        parse_args(adaptthink.Args, [*lora, "--tokens_per_micro_batch", "17408"])
    text = capsys.readouterr().out
    assert "LoRA of rank 16, alpha 16, on all-linear: 18.5 M parameters" in text
    assert "32 checkpoints x 0.21 GiB and the merged model of 6.62 GiB on disk" in text
    assert "10 rows x 17,408 tokens x 28 KiB; 256 were asked for" in text


def test_slots_grow_by_doubling():
    """Prompt of 20 tokens: 64 columns (of 40, rounded up), then 192 (of 2 x 96), at last all that the longest needs."""
    assert memory.slot_growth(20, 64) == (0, 64)
    assert memory.slot_growth(20, 150) == (64, 150)
    assert memory.slot_growth(20, 500) == (448, 500)


def test_activations_by_hand(shapes):
    width = 8 * 1536 + 2 * (12 + 2) * 128 + 4 * 8960
    assert memory.activation_bytes_per_token(shapes, 2, True) == 2 * (28 * 1536 + 2 * width) == 292_864
    assert memory.activation_bytes_per_token(shapes, 2, False) == 2 * 29 * width


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


@pytest.mark.parametrize("name", memory_worker.SIZES)
def test_plan_is_within_ten_percent_of_recorded_peaks(name):
    size = memory_worker.SIZES[name]
    assert size.measured == pytest.approx(memory_worker.planned(size, size.libraries), rel=0.10)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_smallest_measured_run_is_within_ten_percent():
    """Real AdaptThink steps of the 10M model, in a process of its own, against the plan made from its config."""
    found = memory_worker.measure("10M")
    assert found["measured"] == pytest.approx(found["planned"], rel=0.10), found


# -------------------------------------------------------------------------------------------------------- the KV cache


def test_plan_fills_the_gpu(shapes):
    """A row is 17,408 tokens x 28 KiB = 0.465 GiB; pages take what the largest phase leaves, whole rows or not."""
    items, found = plan(shapes)
    assert items["activations"] == 32_768 * 292_864
    assert items["KV cache"] == found.cache_bytes and found.rows == found.cache_bytes // (17_408 * 28 * 1024)
    assert found.peak == int(USABLE * 80 * GIB)
    assert 100 < found.rows < 150


def test_rows_columns_and_micro_batch(shapes):
    items, found = plan(shapes, rollout_rows=8)
    assert found.rows == 8 and items["KV cache"] == 8 * 17_408 * 28 * 1024, "no more rows than asked for"
    _, found = plan(shapes, replace(EIGHT, longest_prompt=33), rollout_rows=2, max_new_tokens=32)
    assert found.cache_bytes == 2 * 96 * 28 * 1024, "columns are rounded up"
    items, _ = plan(shapes, tokens_per_micro_batch=1000)
    assert items["activations"] == 17_408 * 292_864, "a long sequence is a micro-batch of its own"


def test_limit_of_the_cache_bounds_rows_without_a_gpu(shapes):
    _, found = plan(shapes, replace(CPU, kv_cache=4 * GIB), dtype="fp32")
    assert found.rows == 4 * GIB // (17_408 * 56 * 1024) == 4 and found.cache_bytes <= 4 * GIB
    assert plan(shapes, CPU, dtype="fp32")[1].rows == RunArgs().rollout_rows
    with pytest.raises(UserError, match=r"one response of 17,408 tokens .*Lower --max_new_tokens \(now 16,384\)"):
        plan(shapes, replace(CPU, kv_cache=GIB // 4))


# -------------------------------------------------------------------------------------------------- what makes it fit


FIXES = [
    (Where(memory=16 * GIB), {}, r"ake \d+ GPUs .*, which share the optimiser"),
    (EIGHT, {"tokens_per_micro_batch": 400_000}, r"Lower --tokens_per_micro_batch from 400,000 to \d"),
    (replace(EIGHT, memory=40 * GIB), {"gradient_checkpointing": False}, r"et --gradient_checkpointing true"),
    (replace(EIGHT, memory=40 * GIB), {"max_new_tokens": 120_000}, r"ower --max_new_tokens from 120,000 to \d"),
    (replace(EIGHT, memory=24 * GIB, world_size=4), {"max_new_tokens": 4096}, r"ower --tokens_per_micro_batch"),
    (Where(memory=40 * GIB), {"max_new_tokens": 4096, "tokens_per_micro_batch": 4096}, r"Launch with .*offload.yaml"),
    (Where(memory=32 * GIB), {"max_new_tokens": 2048, "rollout_rows": 2048}, r"et|aunch|ower"),
    (
        replace(EIGHT, memory=20 * GIB),
        {"max_new_tokens": 512, "tokens_per_micro_batch": 1024, "rollout_rows": 8192},
        r"ower --rollout_rows from 8,192",
    ),
]


@pytest.mark.parametrize(("where", "options", "words"), FIXES)
def test_what_does_not_fit_names_a_fix_that_fits(shapes, where, options, words):
    """Every fix that is proposed is applied, and then the plan is made without an error."""
    with pytest.raises(UserError, match=words) as error:
        plan(shapes, where, **options)
    case = case_of(shapes, where, **options)
    assert fixes(case)
    for fix in fixes(case):
        after = changed(case, fix)
        assert plan_memory(after.args, after.holds, shapes, after.where).rows >= 1
        assert memory.fix_text(case, fix)[1:] in str(error.value)
        for name, value in fix.items():
            if name == "lora_rank":
                assert f"set --lora_rank {value} to train adapters alone" in str(error.value).lower()
            elif name not in ("offload", "gpus") and not isinstance(value, bool):
                assert f"--{name} from {getattr(case.args, name):,} to {value:,} or less" in str(error.value)


def test_proposed_micro_batch_is_the_largest_that_fits(shapes):
    case = case_of(shapes, tokens_per_micro_batch=400_000)
    (fix,) = fixes(case)
    assert changed(case, fix).fits() and list(fix) == ["tokens_per_micro_batch"]
    assert not changed(case, {"tokens_per_micro_batch": fix["tokens_per_micro_batch"] + 1}).fits()


def test_dialogues_are_not_cut_below_their_budgets():
    """A lower --max_new_tokens was proposed that the run then refused: its budgets add up to more."""
    args = parse_args(thinker.Args, ["--config", str(EXPERIMENTS / "thinker_r7b.yaml")])
    where = Place(gpu="a100-40", num_gpus=8).where(args.max_prompt_tokens)
    case = Case(args, args.holds(), shapes_of(find_config(args.model)), where)
    assert args.max_new_tokens == case.holds.least_new_tokens
    assert [set(fix) for fix in fixes(case)] == [
        {"lora_rank", "tokens_per_micro_batch"},
        {"gpus", "tokens_per_micro_batch", "offload"},
    ]


def test_where_no_fix_does_it_the_message_says_so(shapes):
    with pytest.raises(UserError, match="smaller model .* GPUs with more memory"):
        plan(shapes, replace(EIGHT, memory=GIB))
    assert fixes(case_of(shapes, replace(EIGHT, memory=GIB))) == []


@st.composite
def odd_cases(draw):
    """A model with sizes that none has (one layer, one head, a vocabulary of 3, tied or not), with odd options."""
    kv = draw(st.integers(1, 4))
    heads, head_dim = kv * draw(st.integers(1, 5)), 2 * draw(st.integers(1, 40))
    config = Qwen2Config(
        vocab_size=draw(st.integers(3, 300)), hidden_size=heads * head_dim, num_attention_heads=heads,
        num_key_value_heads=kv, num_hidden_layers=draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 500)), tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip
    args = draw(st.sampled_from((adaptthink, ada_grpo))).Args(
        max_new_tokens=draw(st.integers(1, 40_000)), rollout_rows=draw(st.integers(1, 3000)),
        tokens_per_micro_batch=draw(st.integers(1, 100_000)), gradient_checkpointing=draw(st.booleans()),
        dtype=draw(st.sampled_from(("bf16", "fp32"))),
    )  # fmt: skip
    holds = replace(args.holds(), critic=draw(st.booleans()))
    return Case(
        args, holds, shapes_of(config), Where(cuda=draw(st.booleans()), longest_prompt=draw(st.integers(1, 3000)))
    )


@given(odd_cases(), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_memory_of_odd_models(case, doublings):
    """More GPUs never need more memory each, a longer context never less; the peak is a phase's."""
    items, host = case.items()
    assert all(item.bytes >= 0 and item.how for item in items + host)
    assert case.needed() >= max(memory.phase_bytes(items).values()) > 0
    split = [changed(case, {"gpus": 2**k}).needed() for k in range(1, doublings + 1)]
    assert split == sorted(split, reverse=True)
    n = case.where.longest_prompt
    longer = [replace(case, where=replace(case.where, longest_prompt=m)).needed() for m in (n, n + 1, 2 * n + 50)]
    assert longer == sorted(longer)
    assert changed(case, {"max_new_tokens": case.args.max_new_tokens + 1000}).needed() >= case.needed()


@given(odd_cases(), st.floats(0.5, 2.0))
@settings(max_examples=25, deadline=None)
def test_every_fix_of_odd_models_fits(case, share):
    """Whatever does not fit, a fix that is proposed does; without one, the message says that none does."""
    case = replace(case, where=Where(longest_prompt=100))
    case = replace(case, where=replace(case.where, memory=int(share * case.needed())))
    if case.fits():
        assert plan_memory(case.args, case.holds, case.shapes, case.where).rows >= 1
        return
    with pytest.raises(UserError, match="needs at least") as error:
        plan_memory(case.args, case.holds, case.shapes, case.where)
    found = fixes(case)
    assert found or "smaller model" in str(error.value)
    for fix in found:
        after = changed(case, fix)
        assert plan_memory(after.args, after.holds, after.shapes, after.where).rows >= 1
        assert all(vars(case.args).get(name) != value for name, value in fix.items()), fix


# ------------------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 314, "save_every": 10}, 32),  # 10 .. 310, and 314
        ({"max_steps": 300, "save_every": 10}, 30),
        ({"max_steps": 314, "save_every": 0}, 1),
        ({"max_steps": 314, "save_every": 10, "keep_checkpoints": 3}, 4),  # the next before one is deleted
        ({"max_steps": 314, "save_every": 10, "done": 200, "there": 20}, 12),
        ({"max_steps": 314, "save_every": 10, "keep_checkpoints": 3, "done": 200, "there": 3}, 1),
        ({"max_steps": 314, "save_every": 10, "done": 314, "there": 32}, 0),
        ({"max_steps": 5, "save_every": 10}, 1),
    ],
)
def test_checkpoints_ahead(options, expected):
    done, there = options.pop("done", 0), options.pop("there", 0)
    assert checkpoints_ahead(RunArgs(**options), done, there) == expected


def test_checkpoint_size(shapes):
    """With LoRA it is that of the adapters; a critic has all of it once more."""

    def size(dtype="bf16", zero3=True, **holds):
        args = RunArgs(dtype=dtype, lora_rank=holds.pop("lora_rank", 0))
        return memory.checkpoint_bytes(args, Holds(**holds), shapes, zero3)

    assert size() == PARAMETERS * (2 + 4 + 8) and size("fp32", False) == PARAMETERS * (4 + 8)
    trained = trained_parameters(RunArgs(lora_rank=8), shapes)
    assert 0 < trained < PARAMETERS / 100
    assert size(lora_rank=8) == trained * (2 + 4 + 8) and size("fp32", False, lora_rank=8) == trained * (4 + 8)
    assert size(critic=True) == 2 * PARAMETERS * (2 + 4 + 8)


# -------------------------------------------------------------------------------------------------------- the preflight


def look(where=EIGHT, config=CONFIG, **changes):
    """(table, plan): preflight of the 1.5B model on 8 GPUs of 80 GiB; options and arguments can be changed."""
    names = set(RunArgs.__dataclass_fields__)
    options = {"max_new_tokens": LONG, "max_steps": 314, "save_every": 10} | {
        k: changes[k] for k in changes.keys() & names
    }
    args, facts = RunArgs(**options), {k: v for k, v in changes.items() if k not in names}
    facts = {"model_config": config, "device": "H100", "questions": 40_000} | facts
    return preflight(args, args.holds(), where, **facts)


def test_table():
    table, found = look(skipped=3, findings={"control tokens": "</think> = 151649"}, disk_free=2000 * GIB)
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
        assert text in table
    assert found.rows == found.cache_bytes // (17_408 * 28 * 1024)
    assert "WARNING" not in table and table.isascii()


def test_table_without_a_gpu():
    table, found = look(replace(CPU, kv_cache=4 * GIB), device="CPU", dtype="fp32")
    assert "not compared with the memory of this machine" in table
    assert found.rows == 4


def test_launch_file_with_offload_is_seen():
    """A run that fits because its launch file keeps the optimiser in CPU memory must not be refused."""
    for device, expected in (("cpu", True), ("none", False), (None, False)):
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(offload_optimizer_device=device))
        accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
        assert offloads_optimizer(accelerator) is expected
    assert not offloads_optimizer(SimpleNamespace(distributed_type=DistributedType.NO))
    assert "fp32 master" in look()[0].split("memory of the machine")[0]
    away = look(replace(EIGHT, offload=True))[0].split("memory of the machine")
    assert "fp32 master" not in away[0] and "fp32 master" in away[1]


def test_long_responses_are_pointed_out():
    text = "WARNING: the model's config has 131,072 positions"
    assert text in look(replace(EIGHT, memory=None), max_new_tokens=131_072)[0]


def test_preflight_refuses():
    with pytest.raises(UserError, match="12 have a prompt of more than --max_prompt_tokens 1024"):
        look(questions=0, skipped=12)
    with pytest.raises(UserError, match="32 checkpoints x 23.17 GiB need .*--keep_checkpoints"):
        look(disk_free=500 * GIB)
    assert "4 checkpoints" in look(disk_free=500 * GIB, keep_checkpoints=3)[0]
    assert (
        "32 checkpoints x 0.12 GiB and the merged model of 6.62 GiB, 20.00" in look(disk_free=20 * GIB, lora_rank=8)[0]
    )
    with pytest.raises(UserError, match="32 checkpoints x 0.12 GiB and the merged model of 6.62 GiB need 10.47 GiB"):
        look(disk_free=10 * GIB, lora_rank=8)


# ---------------------------------------------------------------------------------------------------------- the command


def test_command_prints_the_plan_and_ends(tmp_path, capsys):
    argv = ["--config", str(EXPERIMENTS / "adaptthink_1_5b.yaml"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        parse_args(adaptthink.Args, [*argv, "--preflight", "--gpu", "a100", "--num_gpus", "4", "--num_nodes", "2"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("2 machines x 4 x a100, ZeRO-3", "1.777 B parameters", "1.78 B x 8 / 8 processes",
                 "in the phase 'head'; of 79.20 GiB", "= 17,408 of the model's 131,072 positions",
                 "32 checkpoints x 23.17 GiB on disk"):  # fmt: skip
        assert part in text
    assert not (tmp_path / "run").exists()


def test_command_for_a_dialogue_with_a_critic_and_offload(capsys):
    args = parse_args(thinker.Args, ["--config", str(EXPERIMENTS / "thinker_r7b.yaml")])
    print_plan(args, Place(num_gpus=8, num_nodes=2, offload=True))
    text = capsys.readouterr().out
    assert "optimiser in CPU memory" in text.split("\n")[0]
    assert "critic: Adam" in text and "256 dialogues x 16,048 tokens at most, between turns" in text


def test_command_without_a_gpu(capsys):
    print_plan(adaptthink.Args(dtype="fp32", max_new_tokens=512), Place(gpu="cpu"))
    text = capsys.readouterr().out
    assert "1 process on the CPU" in text and "not compared with the memory" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "b300"], f"--gpu b300: .* Known are {', '.join(GPUS)}, and cpu"),
        (["--num_gpus", "0"], "--num_gpus 0"),
        (["--gpu", "cpu", "--num_gpus", "8"], "one process is planned"),
        (["--gpu", "cpu", "--offload", "true"], "one process is planned"),
        (["--num_gpu", "8"], "unknown option --num_gpu. Did you mean '--num_gpus'"),
        (["--rollout_rows", "0"], "--rollout_rows"),
        (["--model", "Qwen/Qwen2.5-14B"], "needs at least .* GiB"),
    ],
)
def test_command_refuses(argv, message):
    with pytest.raises(UserError, match=message):
        parse_args(adaptthink.Args, ["--preflight", *argv])


def test_options_of_the_machine_belong_to_preflight():
    with pytest.raises(UserError, match="unknown option --num_gpus"):
        parse_args(adaptthink.Args, ["--num_gpus", "8"])
    with pytest.raises(UserError, match="--preflight plans training runs"):
        parse_args(benchmark.Args, ["--preflight", "--model", "Qwen/Qwen2.5-3B"])


@pytest.mark.slow
def test_command_line_as_a_user_types_it():
    """What does not fit ends with code 2 and one line."""
    line = ["-m", "adaptive_reasoning.ada_grpo", "--config", "experiments/ada_grpo_14b.yaml", "--preflight"]
    refused = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "the run needs at least" in refused.stderr and " GPUs (NUM_GPUS=" in refused.stderr


def test_table_of_the_page_is_that_of_the_command(monkeypatch):
    """An edit of the plan that leaves docs/scaling.md behind fails here."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import memory_table

    page = memory_table.PAGE.read_text()
    (found,) = memory_table.MARK.finditer(page)
    assert found[0] == f"{found[1]}{memory_table.table()}\n{found[2]}", "python experiments/memory_table.py --write"
    assert all(name in page for name in GPUS)
    for size in memory_worker.SIZES.values():
        numbers = (size.libraries, memory_worker.planned(size, size.libraries), size.measured)
        assert "| " + " | ".join(f"{x:,.0f}" for x in numbers) + f" | {size.measured / numbers[1]:.2f} |" in page
