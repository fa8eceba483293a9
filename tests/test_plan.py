"""The plan of a run: hours against numbers worked out by hand, what grows with what, the command, the page."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config

from adaptive_reasoning import ada_grpo, adaptthink, degrpo, sft, thinker
from adaptive_reasoning.benchmark import __main__ as evaluate
from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.plan import scaling
from adaptive_reasoning.plan.command import parse_plan, plan_run, print_plan
from adaptive_reasoning.plan.fit import fits, mends, needed, plan_memory
from adaptive_reasoning.plan.hours import (
    Assumptions,
    decode_seconds,
    forward_flops,
    gather_seconds,
    lengths,
    plan_hours,
)
from adaptive_reasoning.plan.machine import GPUS, Machine, find_machine
from adaptive_reasoning.plan.memory import GIB, Where, fixed_items, phase_bytes, trained_parameters
from adaptive_reasoning.plan.shapes import ARCHITECTURES, MADE_FROM, Shapes, built_in, find_config, shapes_of
from adaptive_reasoning.run.options import parse_args

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"


def config_of(module, name: str, *more: str):
    return parse_args(module.Args, ["--config", str(EXPERIMENTS / name), *more])


def plan_of(module, name: str, machine: Machine, *more: str, **assumed):
    return plan_run(config_of(module, name, *more), machine, Assumptions(**assumed))


H100 = GPUS["h100"]


def test_one_gpu_with_the_offload_launch_is_planned_as_zero3():
    """As `make train-... NUM_GPUS=1 OFFLOAD=1` launches it: fp32 masters and gradients leave the GPU too."""
    args, one = config_of(adaptthink, "adaptthink_1_5b.yaml"), Machine(H100, 1, 1)
    zero3 = plan_run(args, one, Assumptions(), offload=True)
    plain = plan_of(adaptthink, "adaptthink_1_5b.yaml", one, "--offload_optimizer", "true")
    assert zero3.where.zero3 and not plain.where.zero3
    assert not plan_run(args, find_machine("cpu", 1, 1), Assumptions(), offload=True).where.zero3


# ---------------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the model cards' safetensors
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
    ],
)
def test_built_in_models_have_the_published_number_of_parameters(name, parameters):
    assert shapes_of(built_in(name)).parameters == parameters


def test_models_of_all_experiments_need_no_network():
    assert set(MADE_FROM.values()) <= set(ARCHITECTURES)
    for module, pattern in ((adaptthink, "adaptthink_*"), (ada_grpo, "ada_grpo_*"), (degrpo, "degrpo_1_5b.y*"),
                            (thinker, "thinker_*"), (sft, "sft_arm_*")):  # fmt: skip
        found = sorted(EXPERIMENTS.glob(pattern))
        assert found
        for path in found:
            name = config_of(module, path.name).model
            assert MADE_FROM.get(name, name) in ARCHITECTURES, path


def test_unknown_model_names_those_that_need_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"(?s)nobody/nothing.*needs no network for: deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    ):
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


# -------------------------------------------------------------------------------------------------------- the machines


def test_unknown_gpu_names_the_known_ones():
    with pytest.raises(UserError, match="--gpu b300.*h100, h200, h800, a100, a100-40, a800, rtx4090, and cpu"):
        find_machine("b300", 8, 1)
    with pytest.raises(UserError, match="--num_gpus 0"):
        find_machine("h100", 0, 1)
    with pytest.raises(UserError, match="one process is planned, not 8"):
        find_machine("cpu", 8, 1)
    assert find_machine("cpu", 1, 1).memory is None
    assert find_machine("a100", 8, 2).processes == 16


# ----------------------------------------------------------------------------------------------------------- the hours


def tiny(**changes) -> Shapes:
    sizes = {"layers": 2, "hidden": 10, "intermediate": 20, "heads": 1, "kv_heads": 1, "head_dim": 10, "vocab": 100}
    return Shapes(**{**sizes, "parameters": 5000, "tied": False, **changes})


def test_decoding_by_hand():
    """Two rows of 4 tokens: 4 steps, each of which reads the 4,000 numbers of the weights, and keys and values.

    With strides of one token the middle of step i has contexts of 10 + i + 1/2: 2 x (10.5 + .. + 13.5) = 96 tokens of
    2 x 2 x 10 x 2 = 80 bytes in all four.
    """
    args = {"shapes": tiny(), "value_bytes": 2, "bandwidth": 1000.0, "flops": 1e12, "overhead": 0.5}
    seconds, live = decode_seconds(np.array([4.0, 4.0]), 10, 2, **args)
    assert live == 2
    assert seconds == pytest.approx((4 * 4000 * 2 + 96 * 80) / 1000 + 4 * 0.5)
    one_by_one, live = decode_seconds(np.array([4.0, 4.0]), 10, 1, **args)
    assert live == 1 and one_by_one == pytest.approx((8 * 4000 * 2 + 96 * 80) / 1000 + 8 * 0.5)
    slow = {**args, "flops": 2 * 4000 * 2 / 100}  # two rows take 100 s a step, however little is read
    assert decode_seconds(np.array([4.0, 4.0]), 10, 2, **slow)[0] == pytest.approx(4 * 100.5)


def test_the_tail_decodes_alone():
    args = {"shapes": tiny(), "value_bytes": 2, "bandwidth": 1000.0, "flops": 1e12, "overhead": 0.0}
    _, live = decode_seconds(np.array([100.0, 10.0, 10.0, 10.0]), 1, 4, **args)
    assert live == pytest.approx(130 / 100, rel=0.02)
    assert decode_seconds(np.empty(0), 1, 4, **args) == (0.0, 0.0)


def test_lengths_have_the_mean_that_was_asked_for():
    for mean in (50, 400, 900):
        found = lengths(512, mean, 1.0, 1000)
        assert found.mean() == pytest.approx(mean, rel=0.01) and found.max() <= 1000 and found.min() >= 1
    assert set(lengths(5, 2000, 1.0, 1000)) == {1000.0}
    assert lengths(64, 100, 0.0, 1000) == pytest.approx(100)
    assert lengths(64, 100, 2.0, 1000).std() > lengths(64, 100, 0.5, 1000).std()


def test_flops_by_hand():
    """Two embeddings of 1,000 and 3,000 others; one sequence of 30 tokens, 20 of them scored."""
    layers, head = forward_flops(tiny(), np.array([30.0]), np.array([20.0]))
    assert layers == 2 * 3000 * 30 + 2 * 2 * 1 * 10 * 30**2
    assert head == 2 * 1000 * 20
    assert forward_flops(tiny(tied=True), np.array([30.0]), np.array([20.0]))[0] == 2 * 4000 * 30 + 36_000


def test_exchange_by_hand():
    a = Assumptions(link_share=0.5, network_gbs=50)
    assert gather_seconds(1e9, Machine(H100), a) == 0
    assert gather_seconds(8e9, Machine(H100, 8), a) == pytest.approx(8e9 * 7 / 8 / 450e9 / 0.5)
    slow = Assumptions(link_share=0.5, network_gbs=25)  # 200 GB/s a machine: what sets the time is the network
    assert gather_seconds(8e9, Machine(H100, 8, 4), slow) == pytest.approx(8e9 * 3 / 4 / 200e9 / 0.5)


def test_update_by_hand():
    """4 passes with recomputation and 4 of the head, at 35 % of 989 TFLOP/s; all responses at the cap."""
    plan = plan_of(adaptthink, "adaptthink_1_5b.yaml", Machine(H100, 8), mean_response_tokens=16_384)
    shapes, total = plan.shapes, np.full(256, 16_384.0 + 150)
    layers, head = forward_flops(shapes, total, np.full(256, 16_384.0))
    update = next(line.seconds for line in plan.hours.step if line.name == "update")
    assert update == pytest.approx((4 * layers + 4 * head) / (989e12 * 0.35))
    without = plan_of(adaptthink, "adaptthink_1_5b.yaml", Machine(GPUS["h200"], 8), "--gradient_checkpointing", "false",
                      "--tokens_per_micro_batch", "4096", "--max_new_tokens", "4096",
                      mean_response_tokens=4096)  # fmt: skip
    layers, head = forward_flops(shapes, np.full(256, 4096.0 + 150), np.full(256, 4096.0))
    update = next(line.seconds for line in without.hours.step if line.name == "update")
    assert update == pytest.approx((3 * layers + 4 * head) / (989e12 * 0.35))


def test_the_run_is_the_sum_of_its_parts():
    plan = plan_of(adaptthink, "adaptthink_1_5b.yaml", Machine(H100, 8))
    parts = {line.name: line.seconds for line in plan.hours.run}
    assert parts["training"] == pytest.approx(314 * plan.hours.step_seconds)
    assert parts["checkpoints"] == pytest.approx(32 * 1_777_088_000 * 14 / 1e9)
    assert plan.hours.run_seconds == pytest.approx(sum(parts.values()))
    assert plan.hours.epoch == 40_315 // 128
    evaluations = {line.name: line.how for line in plan.hours.run}["evaluation"]
    assert evaluations.startswith("37 x "), "3 settings before and after, the adaptive one after steps 10, 20, .. 310"
    twenty = plan_of(adaptthink, "adaptthink_1_5b.yaml", Machine(H100, 8), "--max_steps", "20")
    assert {line.name: line.how for line in twenty.hours.run}["evaluation"].startswith("7 x "), "step 20 is the last"
    read = plan_of(adaptthink, "adaptthink_1_5b.yaml", Machine(H100, 8), "--ref_results", "table.json")
    assert "reference" in parts and "reference" not in {line.name for line in read.hours.run}


def test_reference_and_critic_cost_time():
    with_reference = plan_of(ada_grpo, "ada_grpo_7b.yaml", Machine(H100, 8))
    without = plan_of(ada_grpo, "ada_grpo_7b.yaml", Machine(H100, 8), "--kl_coef", "0")
    step = [sum(x.seconds for x in p.hours.step if x.name in ("update", "exchange")) for p in (with_reference, without)]
    assert step[0] > step[1]
    update = next(x for x in plan_of(thinker, "thinker_q1_5b.yaml", Machine(H100, 8)).hours.step if x.name == "update")
    assert "critic and its values" in update.how


def test_supervised_runs_have_no_rollout():
    plan = plan_of(sft, "sft_arm_7b.yaml", Machine(H100, 8), "--max_steps", "100")
    assert "decode" not in {line.name for line in plan.hours.step}
    assert not {"rollout replica", "sampling", "KV arena"} & {item.name for item in plan.memory.items}
    args = config_of(sft, "sft_arm_7b.yaml")
    H, I, kv, r = 3584, 18_944, 512, args.lora_rank
    per_layer = (H + H) + 2 * (H + kv) + (H + H) + 2 * (H + I) + (I + H)  # q; k, v; o; gate, up; down
    assert r and trained_parameters(args, plan.shapes) == r * 28 * per_layer
    items = {item.name: item.bytes for item in plan.memory.items}
    assert items["Adam"] == trained_parameters(args, plan.shapes) * 8 // 8
    merged = {item.name: item.bytes for item in plan.memory.host}["merged LoRA"]  # of every process, in bf16
    assert merged == (2 * plan.shapes.parameters - 2 * 152_064 * H) * 2


# ------------------------------------------------------------------------------------------------ what grows with what


@st.composite
def odd_models(draw):
    """A config with sizes that no model has: one layer, one head, a vocabulary of 3, tied or not."""
    kv = draw(st.integers(1, 4))
    heads, head_dim = kv * draw(st.integers(1, 5)), 2 * draw(st.integers(1, 40))
    return shapes_of(
        Qwen2Config(
            vocab_size=draw(st.integers(3, 300)), hidden_size=heads * head_dim, num_attention_heads=heads,
            num_key_value_heads=kv, num_hidden_layers=draw(st.integers(1, 3)),
            intermediate_size=draw(st.integers(1, 500)), tie_word_embeddings=draw(st.booleans()),
        )
    )  # fmt: skip


@st.composite
def odd_options(draw):
    module = draw(st.sampled_from((adaptthink, ada_grpo, thinker)))
    args = module.Args()
    args.max_new_tokens = draw(st.integers(1, 40_000))
    args.rollout_rows = draw(st.integers(1, 3000))
    args.tokens_per_micro_batch = draw(st.integers(1, 100_000))
    args.gradient_checkpointing = draw(st.booleans())
    args.dtype = draw(st.sampled_from(("bf16", "fp32")))
    args.offload_optimizer = draw(st.booleans())
    return args


@given(odd_models(), odd_options(), st.integers(1, 6), st.integers(1, 3000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_memory_of_odd_models(shapes, args, doublings, prompt, cuda):
    """More GPUs never need more memory each, a longer context never less; the peak is a phase's."""
    where = Where(1, False, cuda, prompt)
    items, host = fixed_items(args, shapes, where)
    assert all(item.bytes >= 0 and item.how for item in items + host)
    least = needed(args, shapes, where)
    assert least >= max(phase_bytes(items).values()) > 0
    split = [needed(args, shapes, Where(2**k, True, cuda, prompt)) for k in range(1, doublings + 1)]
    assert split == sorted(split, reverse=True)
    longer = [needed(args, shapes, Where(1, False, cuda, n)) for n in (prompt, prompt + 1, 2 * prompt + 50)]
    assert longer == sorted(longer)
    args.max_new_tokens += 1000
    assert needed(args, shapes, where) >= least


@given(odd_models(), odd_options(), st.floats(0.5, 2.0))
@settings(max_examples=25, deadline=None)
def test_every_mend_of_odd_models_fits(shapes, args, share):
    """Whatever does not fit, a mend that is proposed does; without one, nothing that could be lowered is left."""
    where = Where(1, longest_prompt=100)
    where = Where(1, longest_prompt=100, memory=int(share * needed(args, shapes, where)))
    if fits(args, shapes, where):
        assert plan_memory(args, shapes, where).rows >= 1
        return
    with pytest.raises(UserError, match="needs at least") as error:
        plan_memory(args, shapes, where)
    found = mends(args, shapes, where)
    assert found or "smaller model" in str(error.value)
    for mend in found:
        changed, place = mend.apply(args, where)
        assert plan_memory(changed, shapes, place).rows >= 1
        assert all(getattr(args, name, False) != value for name, value in mend.options.items()), mend


@given(st.integers(0, 5), st.integers(1, 5))
@settings(max_examples=5, deadline=None)
def test_more_gpus_never_take_longer_a_step(doublings, more):
    args, shapes, a = adaptthink.Args(), shapes_of(built_in("Qwen/Qwen2.5-1.5B")), Assumptions()
    few, many = (
        [
            line.seconds
            for line in plan_hours(args, shapes, Machine(H100, 2**k), a, 40 * GIB).step
            if line.name != "exchange"
        ]
        for k in (doublings, doublings + more)
    )
    assert sum(many) <= sum(few) * 1.001


# ---------------------------------------------------------------------------------------------------------- the command


def test_command_prints_the_plan_and_ends(tmp_path, capsys):
    argv = ["--config", str(EXPERIMENTS / "adaptthink_1_5b.yaml"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        parse_args(adaptthink.Args, [*argv, "--preflight", "--gpu", "a100", "--num_gpus", "4", "--decode_share", "0.3"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("4 x A100 SXM 80GB, ZeRO-3", "1.777 B parameters", "1.78 B x 8 / 4 processes", "in the phase 'head'",
                 "one epoch", "before step 1: 16 x 40,192 responses", "--decode_share          0.3"):  # fmt: skip
        assert part in text
    assert all(f"--{name} " in text for name in vars(Assumptions()))
    assert not (tmp_path / "run").exists()


def test_command_says_what_is_not_known(capsys):
    argv = ["--gpu", "cpu", "--dtype", "fp32", "--data", "mine.jsonl", "--eval_data", "a.jsonl,aime24"]
    print_plan(adaptthink.Args, [*argv, "--max_new_tokens", "512"])
    text = capsys.readouterr().out
    assert "give the number of training questions with --questions" in text
    assert "not counted: evaluation on a.jsonl" in text and "480 responses" in text
    assert "1 process on the CPU" in text and "not compared with the memory" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "h1000"], "--gpu h1000: .* Known are h100"),
        (["--decode_share", "1.5"], "--decode_share 1.5: is a share, at most 1"),
        (["--disk_gbs", "0"], "--disk_gbs 0.0: must be a number greater than 0"),
        (["--mean_response_tokens", "-1"], "--mean_response_tokens -1"),
        (["--num_gpu", "8"], "unknown option --num_gpu"),
        (["--rollout_rows", "0"], "--rollout_rows 0: must be greater than 0"),
        (["--model", "Qwen/Qwen2.5-14B"], "needs at least .* GiB"),
    ],
)
def test_command_refuses(argv, message):
    with pytest.raises(UserError, match=message):
        print_plan(adaptthink.Args, argv)


def test_only_training_runs_are_planned():
    with pytest.raises(UserError, match="--preflight plans training runs"):
        parse_plan(evaluate.Args, [])


@pytest.mark.slow
def test_command_line_as_a_user_types_it():
    """What does not fit ends with code 2 and one line."""
    line = ["-m", "adaptive_reasoning.thinker", "--config", "experiments/thinker_r7b.yaml", "--preflight", "--num_gpus"]
    refused = subprocess.run([sys.executable, *line, "1"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "the run needs at least" in refused.stderr and " GPUs (NUM_GPUS=" in refused.stderr


def test_command_for_a_dialogue_with_a_critic(capsys):
    argv = ["--config", str(EXPERIMENTS / "thinker_r7b.yaml"), "--num_gpus", "8", "--num_nodes", "2"]
    print_plan(thinker.Args, argv)
    text = capsys.readouterr().out
    assert "critic: Adam" in text and "256 dialogues x 16,048 tokens at most, between turns" in text


# ------------------------------------------------------------------------------------------------------------- the page


def test_tables_of_the_page_are_those_of_the_command(monkeypatch):
    """An edit of the plan that leaves docs/scaling.md behind fails here: `make scaling` sets it anew."""
    monkeypatch.chdir(ROOT)
    text = scaling.PAGE.read_text()
    made = scaling.tables()
    assert {name for _, name, _ in scaling.MARK.findall(text)} == set(made)
    assert scaling.page(text, made) == text, "docs/scaling.md is out of date: make scaling"


def test_committed_measurements_are_within_ten_percent():
    sizes = json.loads((EXPERIMENTS / "bench" / "plan.json").read_text())["sizes"]
    assert len(sizes) == 3
    for name, result in sizes.items():
        assert abs(result["measured_over_predicted"] - 1) <= 0.10, name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_smallest_measured_run_is_within_ten_percent(monkeypatch):
    """Real AdaptThink steps of the 10M model, in a process of its own, against the plan made from its config."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "bench"))
    import bench_plan

    result = bench_plan.compare(bench_plan.SIZES["10M"], threads=1)
    assert abs(result["measured_over_predicted"] - 1) <= bench_plan.ALLOWED, result
