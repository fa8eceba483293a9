"""LoRA in every method: its gradients and steps against full training, what is saved, the reference, the replica."""

import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from critic_worker import fresh_episodes, learn, make_pair
from distributed_worker import (
    accumulate,
    gradients,
    make_args,
    make_episodes,
    make_learner,
    train,
    weights,
)
from safetensors.torch import load_file
from test_end_to_end import ROOT, comparable, run_module
from test_two_processes import LAUNCHERS, equal_rows, equal_weights
from test_two_processes import go as go_on
from transformers import AutoModelForCausalLM

from adaptive_reasoning import formats
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.checkpoint import load_checkpoint, save_checkpoint
from adaptive_reasoning.learner.lora import LINEAR, lora_config, targets_of
from adaptive_reasoning.learner.model import load_config, load_model
from adaptive_reasoning.learner.runtime import make_accelerator
from adaptive_reasoning.rollout import Decoder
from adaptive_reasoning.run.options import RunArgs
from adaptive_reasoning.run.start import from_adapter
from adaptive_reasoning.tasks import chain

pytest.importorskip("peft", reason="LoRA is tested where peft is installed")
LORA = {"lora_rank": 4, "lora_alpha": 6}  # scale 1.5


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def adapters(learner) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Return {Hugging Face name of the weight: its (A, B)}."""
    found = dict(learner.model.named_parameters())
    ends = (".lora_A.default.weight", ".lora_B.default.weight")
    names = [name.removesuffix(ends[0]) for name in found if name.endswith(ends[0])]
    return {f"{name}.weight": tuple(found[name + end] for end in ends) for name in names}


def moved_learner(path: str, args):
    """Return a learner whose B are not zero."""
    learner = make_learner(path, args)
    with torch.no_grad():
        for _, B in adapters(learner).values():
            B.normal_(0.0, 0.1)
    return learner


def full_learner(path: str, args, start: dict[str, torch.Tensor]):
    """Return a learner of all weights that starts from these."""
    learner = make_learner(path, args)
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            parameter.copy_(start[name])
    return learner


# ---------------------------------------------------------------------------------------------------------- the learner


@pytest.mark.parametrize("name", ["tied", "untied", "qwen3", "llama"])
def test_gradients_are_those_of_full_training_projected(models, tmp_path, name):
    """With W = W0 + s B A and G = dL/dW: dL/dA = s B^T G and dL/dB = s G A^T, at weights where neither is zero."""
    learner = moved_learner(models[name], make_args(tmp_path, **LORA))
    full = full_learner(models[name], make_args(tmp_path), weights(learner))
    losses = [accumulate(each, each.minibatches(make_episodes(), 1, seed=0)[0]) for each in (learner, full)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    G, pairs = gradients(full), adapters(learner)
    assert len(pairs) == 2 * len(LINEAR)
    for key, (A, B) in pairs.items():
        largest = G[key].abs().max()
        torch.testing.assert_close(A.grad, 1.5 * B.T @ G[key], atol=float(1e-5 * largest), rtol=1e-4)
        torch.testing.assert_close(B.grad, 1.5 * G[key] @ A.T, atol=float(1e-5 * largest), rtol=1e-4)


def test_a_step_of_rank_width_is_a_step_of_full_training(models, tmp_path):
    """Where LoRA can do what full training does: A = [I; 0] of a rank above every width, B = 0, scale 1.

    Then dL/dB = dL/dW A^T = dL/dW, padded with zeros, which AdamW leaves alone; and dL/dA = B^T dL/dW = 0, so that A
    stays. B moves as W would, and W + B A with it: one step of AdamW without weight decay, before which nothing is
    clipped (the norm would be one over other parameters). From the second step on A moves too and the two part; with
    any other A the equality holds for no optimiser that scales every number by itself, as Adam does.
    """
    options = {"weight_decay": 0.0, "max_grad_norm": 1e9}
    learner = make_learner(models["untied"], make_args(tmp_path, lora_rank=96, lora_alpha=96, **options))
    with torch.no_grad():
        for A, _ in adapters(learner).values():
            A.copy_(torch.eye(*A.shape))
    before = weights(learner)
    full = full_learner(models["untied"], make_args(tmp_path, **options), before)
    for each in (learner, full):
        train(each, make_episodes(), 1)
    after, expected = weights(learner), weights(full)
    for key in adapters(learner):
        assert (expected[key] - before[key]).abs().median() > 0.9e-3, "the rate is 1e-3"
        torch.testing.assert_close(after[key], expected[key], atol=1e-4, rtol=0)
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - adapters(learner).keys())


def test_the_frozen_base_in_bf16_computes_what_autocast_does(models, tmp_path):
    """Bit for bit, at the start, where B is zero; what is rounded for a forward pass anyway takes two bytes."""
    for name in ("tied", "untied"):
        args = make_args(tmp_path, dtype="bf16", **LORA)
        learner, full = make_learner(models[name], args), make_learner(models[name], make_args(tmp_path, dtype="bf16"))
        ours, theirs = ([e for e in each.logprobs(make_episodes())] for each in (learner, full))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        kinds = {key: p.dtype for key, p in learner.model.named_parameters()}
        halves = {key for key, dtype in kinds.items() if dtype == torch.bfloat16}
        assert halves == {key for key in kinds if ".base_layer." in key or (key == "lm_head.weight")}
        assert train(learner, make_episodes(), 1)[0]["grad_norm"] > 0


def test_gradient_checkpointing_changes_nothing(models, tmp_path):
    """The embedding is frozen: the first layer's input needs no gradient, and all others are right."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        learner = moved_learner(models["tied"], make_args(tmp_path, gradient_checkpointing=checkpointing, **LORA))
        accumulate(learner, learner.minibatches(make_episodes(), 1, seed=0)[0])
        found.append([p.grad for pair in adapters(learner).values() for p in pair])
    for a, b in zip(*found):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_the_reference_is_the_base_and_training_goes_on_behind_it(models, tmp_path):
    learner, episodes = moved_learner(models["tied"], make_args(tmp_path, **LORA)), make_episodes()
    reference = make_learner(models["tied"], make_args(tmp_path), trainable=False)
    expected = reference.logprobs(episodes)
    assert not all(torch.allclose(a, b) for a, b in zip(learner.logprobs(episodes), expected))
    own = learner.logprobs(episodes)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(learner.logprobs(episodes, base=True), expected))
        before = weights(learner)
        train(learner, episodes, 1)
        assert any(not torch.equal(before[key], value) for key, value in weights(learner).items())
    assert not all(torch.equal(a, b) for a, b in zip(learner.logprobs(episodes), own))


def test_the_replica_has_the_merged_weights(models, tmp_path):
    """Merged in fp32 out of what the learner holds, rounded once, where the replica is in bf16."""
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        args = make_args(tmp_path, dtype=dtype, **LORA)
        learner = moved_learner(models["untied"], args)
        replica = Decoder(load_config(models["untied"]), dtype=kind)
        replica.load(learner.named_weights())
        held, pairs = dict(learner.model.named_parameters()), adapters(learner)
        for key, (A, B) in pairs.items():
            W = held[key.replace(".weight", ".base_layer.weight")].double() + 1.5 * B.double() @ A.double()
            place = replica.destinations[key].double().reshape(W.shape)
            torch.testing.assert_close(place, W, atol=1e-7, rtol=1e-6 if dtype == "fp32" else 2**-8)
        AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_what_is_saved_opens_and_continues_bit_for_bit(models, tmp_path, name):
    """A checkpoint: peft's folder, the optimiser of the adapters alone and, at the end, the merged model."""
    from peft import PeftModel

    args, episodes = make_args(tmp_path, **LORA), make_episodes()
    learner, tokenizer = make_learner(models[name], args), load_model(models[name], args)[1]
    train(learner, episodes, 2)
    saved = tmp_path / "step_000002"
    save_checkpoint(saved, learner, tokenizer, {"step": 2})
    merged, expected = weights(learner), learner.logprobs(episodes)
    after = [s["loss"] for s in train(learner, episodes, 2, first=2)]

    base = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    opened = PeftModel.from_pretrained(base, saved / "adapter")
    assert opened.peft_config["default"].base_model_name_or_path == models[name]
    for key, tensor in opened.merge_and_unload().named_parameters():
        torch.testing.assert_close(tensor.detach(), merged[key], atol=1e-7, rtol=1e-6)
    whole = AutoModelForCausalLM.from_pretrained(saved / "model")
    assert whole.dtype == torch.float32
    assert all(torch.equal(p.detach(), merged[key]) for key, p in whole.named_parameters())
    same = make_learner(str(saved / "model"), make_args(tmp_path)).logprobs(episodes)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(same, expected))

    numbers = sum(p.numel() for pair in adapters(learner).values() for p in pair)
    state = load_file(saved / "optimizer" / "rank_0.safetensors")
    assert sum(t.numel() for t in state.values()) == 2 * numbers and all(".lora_" in key for key in state)
    alone = tmp_path / "step_000004"
    save_checkpoint(alone, learner, tokenizer, {"step": 4}, merge=False)
    assert sorted(p.name for p in alone.iterdir()) == ["adapter", "manifest.json", "optimizer", "state.json"]

    fresh = make_learner(models[name], args)
    assert load_checkpoint(saved, fresh) == {"step": 2}
    assert [s["loss"] for s in train(fresh, episodes, 2, first=2)] == after
    assert all(torch.equal(value, weights(fresh)[key]) for key, value in weights(learner).items())


def test_an_adapter_is_a_model_to_start_from(models, tmp_path):
    """--merge_adapter makes of a checkpoint's adapter what the merged model beside it is."""
    args = make_args(tmp_path, **LORA)
    learner = make_learner(models["tied"], args)
    train(learner, make_episodes(), 1)
    save_checkpoint(tmp_path / "step_000001", learner, load_model(models["tied"], args)[1], {})
    *_, load = from_adapter(str(tmp_path / "step_000001" / "adapter"))
    load().save_pretrained(tmp_path / "merged")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("step_000001/model", "merged"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], atol=1e-7, rtol=1e-6)
    with pytest.raises(UserError, match="it is an adapter of .*--merge_adapter merges it"):
        load_model(str(tmp_path / "step_000001" / "adapter"), args)


def test_a_critic_has_adapters_of_its_own_and_a_whole_head(models, tmp_path, monkeypatch):
    monkeypatch.setattr("critic_worker.make_args", lambda folder: make_args(folder, **LORA))
    learner, critic = make_pair(models["tied"], tmp_path, make_accelerator(make_args(tmp_path)))
    episodes = fresh_episodes(range(10))
    trained = {key for key, p in critic.model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and all(".lora_" in key for key in trained - {"score.weight"})
    losses = learn(critic, episodes, 2)
    assert losses[-1] < losses[0] and critic.model.score.weight.abs().max() > 0
    train(learner, episodes, 1)
    tokenizer = load_model(models["tied"], learner.args)[1]
    save_checkpoint(tmp_path / "step_000001", learner, tokenizer, {}, critic)
    assert not (tmp_path / "step_000001" / "critic" / "model").exists()
    following = learn(critic, episodes, 1, first=2)
    other, fresh = make_pair(models["tied"], tmp_path, learner.accelerator)
    load_checkpoint(tmp_path / "step_000001", other, fresh)
    assert learn(fresh, episodes, 1, first=2) == following


# ---------------------------------------------------------------------------------------------------------- bad input


def test_targets():
    assert targets_of(RunArgs(lora_rank=4)) == list(LINEAR)
    assert targets_of(RunArgs(lora_rank=4, lora_targets="q_proj, v_proj")) == ["q_proj", "v_proj"]
    with pytest.raises(UserError, match="--lora_targets q_proj,lm_head: 'lm_head' gets no adapter. Known are q_proj, "):
        targets_of(RunArgs(lora_rank=4, lora_targets="q_proj,lm_head"))
    assert lora_config(RunArgs()) is None


def test_without_peft_the_command_says_what_to_install(go, models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for command in ("grpo", "sft"):
        code, error = go(command, "--model", models["tied"], "--lora_rank", 4, "--output_dir", tmp_path / "run")
        assert code == 2 and error.endswith("pip install 'adaptive-reasoning[peft]'.\n")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- the runs


TINY = (
    "--task chain --chain_mix 1 --chain_questions 12 --chain_eval_questions 8 --prompts_per_step 4 --num_generations 4 "
    "--rollout_rows 64 --max_steps 2 --eval_every 0 --save_every 1 --keep_checkpoints 0 --lora_rank 4 --dtype fp32 "
    "--learning_rate 1e-3"
)
OFFLINE = (
    "--chain_mix 1 --chain_questions 24 --chain_eval_questions 8 --samples 6 --max_steps 2 --max_new_tokens 64 "
    "--eval_every 0 --save_every 1 --keep_checkpoints 0 --lora_rank 4 --learning_rate 1e-3 --temperature 1"
)
SPLIT = " --minibatches_per_step 2 --tokens_per_micro_batch 256"
METHODS = {  # method: (format of its model, options)
    "grpo": ("arm", f"{TINY}{SPLIT} --max_new_tokens 24 --kl_coef 0.01 --entropy_coef 0.01"),
    "ada_grpo": ("arm", f"{TINY}{SPLIT} --max_new_tokens 24 --kl_coef 0.01 --entropy_coef 0.01"),
    "tlmre": ("think", f"{TINY}{SPLIT} --answer_format boxed --max_new_tokens 24 --kl_coef 0.01"),
    "degrpo": ("thinkless", f"{TINY}{SPLIT} --max_new_tokens 24 --kl_coef 0.01 --entropy_coef 0.01"),
    "adaptthink": ("think", f"{TINY} --max_new_tokens 24 --nothinking_max_new_tokens 8 --ref_samples 2"),
    "thinker": ("dialogue", f"{TINY}{SPLIT} --critic_minibatches 2 --max_new_tokens 64 --fast_budget 8 "
                            "--verify_budget 12 --slow_budget 12 --summary_budget 8"),
    "o1_pruner": ("think", f"{OFFLINE} --rows_per_step 8"),
    "dpo": ("think", f"{OFFLINE} --pairs_per_step 4"),
    "rft": ("think", f"{OFFLINE} --nothinking_samples 6 --batch_size 4"),
    "sft": ("", "--max_steps 2 --batch_size 8 --save_every 1 --keep_checkpoints 0 --lora_rank 4"),
}  # fmt: skip
YAML = {"rft": "toy_rft_mixthinking", "sft": "cold_start_adaptthink"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_adapters(guesser, tmp_path, method):
    """Two steps by the user's command; the adapters have moved and nothing else, and the merged model opens."""
    form, options = METHODS[method]
    model = guesser
    if method == "thinker":  # whose untrained answers earn nothing
        cold = "--config experiments/cold_start_thinker.yaml --batch_size 32 --warmup_steps 5 --chain_mix 1 --layers 2"
        run_module("sft", *cold.split(), "--max_steps", "150", "--output_dir", str(tmp_path / "cold"))
        model = tmp_path / "cold" / "model"
    elif form not in ("", "think"):
        model, tokenizer = tmp_path / "model", formats.tokenizer(form)
        chain.tiny_model(tokenizer, hidden=32, layers=2).save_pretrained(model)
        tokenizer.save_pretrained(model)
    own = {"model": model} if form else {}
    own |= {"output_dir": tmp_path / "run"} | ({"bank": tmp_path / "bank"} if "--samples" in options else {})
    own |= {"ref_cache": tmp_path / "ref"} if method == "adaptthink" else {}
    command = [*options.split(), *(str(word) for key, value in own.items() for word in (f"--{key}", value))]
    done = run_module(method, "--config", f"experiments/{YAML.get(method, f'toy_{method}')}.yaml", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = (tmp_path / "run" / "checkpoints" / f"step_00000{step}" for step in (1, 2))
    assert (first / "adapter" / "adapter_config.json").is_file() and not (first / "model").exists()
    assert all(t.abs().max() > 0 for t in load_file(last / "adapter" / "adapter_model.safetensors").values())
    after = AutoModelForCausalLM.from_pretrained(last / "model").state_dict()
    if form:
        before = AutoModelForCausalLM.from_pretrained(model).state_dict()
        moved = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        assert moved == {key for key in before if key.endswith(tuple(f"{name}.weight" for name in LINEAR))}
    assert (last / "critic" / "adapter").is_dir() == (method == "thinker")


def lora_run(go, guesser, folder, *more):
    options = f"--config experiments/toy_grpo.yaml {TINY} --answer_format boxed --max_new_tokens 24 --kl_coef 0.05"
    return go("grpo", *options.split(), "--max_steps", 4, "--model", guesser, "--output_dir", folder, *more)


def test_a_run_continues_to_the_same_weights(go, guesser, tmp_path):
    """P6, with the reference that is the base: killed behind step 2, it ends in the numbers of the whole run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert lora_run(go, guesser, whole) == (0, "")
    rows = read_jsonl(whole / "metrics.jsonl")
    assert rows[0]["loss/ref_kl"] == pytest.approx(0, abs=1e-9) and rows[3]["loss/ref_kl"] > 0
    assert all(row["check/logprob_gap_max"] < 1e-4 and row["loss/grad_norm"] > 0 for row in rows)
    shutil.copytree(whole, killed)
    for step in (3, 4):
        shutil.rmtree(killed / "checkpoints" / f"step_00000{step}")
    (killed / "summary.json").unlink()
    for name, value in (("rank", 8), ("alpha", 4), ("targets", "q_proj")):
        code, error = lora_run(go, guesser, killed, f"--lora_{name}", value)
        assert code == 2 and f"holds a run with lora_{name} = " in error
    code, error = lora_run(go, guesser, killed, "--lora_rank", 0)
    assert code == 2 and "holds a run with lora_rank = 4, now it is 0" in error
    assert lora_run(go, guesser, killed) == (0, "")
    assert comparable(killed) == comparable(whole)
    files = [path.relative_to(whole) for path in whole.glob("checkpoints/step_000004/**/*.safetensors")]
    assert len(files) == 3 and all((killed / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_a_run_whose_base_has_changed_is_not_continued(go, guesser, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(guesser, model)
    assert lora_run(go, model, run, "--max_steps", 1) == (0, "")
    other = AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    other.save_pretrained(model)
    code, error = lora_run(go, model, run)
    assert code == 2 and re.search(f"the model {model} has changed since", error)


@pytest.mark.slow
def test_a_killed_process_goes_on(guesser, tmp_path):
    """kill -9 once the first checkpoint stands; the command again ends in the numbers of a run that nobody touched."""
    command = [sys.executable, "-m", "adaptive_reasoning.grpo", "--config", "experiments/toy_grpo.yaml", *TINY.split()]
    command += f"--answer_format boxed --max_new_tokens 24 --kl_coef 0.05 --max_steps 6 --model {guesser}".split()
    killed = subprocess.Popen([*command, "--output_dir", tmp_path / "killed"], cwd=ROOT, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 200
    while not (tmp_path / "killed" / "checkpoints" / "step_000001").is_dir():
        assert killed.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(20)
    for name in ("killed", "whole"):
        done = subprocess.run([*command, "--output_dir", tmp_path / name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and ("continuing" in done.stdout) == (name == "killed"), done.stderr
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    pair = [tmp_path / name / "checkpoints/step_000006/model/model.safetensors" for name in ("killed", "whole")]
    assert pair[0].read_bytes() == pair[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["two", "ddp"])
def test_two_processes_train_adapters_as_one_does(guesser, tmp_path, launcher, monkeypatch):
    """ZeRO-3 and data parallelism; then the last step once more, each on the other's number of processes."""
    ddp = ["env", "ACCELERATE_USE_CPU=true", sys.executable, "-m", "torch.distributed.run", "--standalone"]
    monkeypatch.setitem(LAUNCHERS, "ddp", [*ddp, "--nproc_per_node", "2"])
    options = f"--config experiments/toy_grpo.yaml {TINY}{SPLIT} --answer_format boxed --max_new_tokens 24"
    options += f" --kl_coef 0.05 --entropy_coef 0.01 --prompts_per_step 5 --learning_rate 2e-4 --model {guesser}"

    def start(where, name):
        return go_on(where, "-m", "adaptive_reasoning.grpo", *options.split(), "--output_dir", tmp_path / name)

    def compare():
        equal_rows(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "many")))
        last = [tmp_path / name / "checkpoints" / "step_000002" for name in ("one", "many")]
        equal_weights(*last)
        pair = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in last]
        assert pair[0].keys() == pair[1].keys()
        assert all(torch.allclose(pair[0][key], pair[1][key], atol=1e-4) for key in pair[0])

    start("one", "one")
    start(launcher, "many")
    compare()
    for where, name in ((launcher, "one"), ("one", "many")):
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_000002")
        assert "after step 1" in start(where, name)
    compare()


@pytest.mark.slow
def test_zero3_in_bf16_trains_adapters(guesser, tmp_path):
    """As on GPUs: the base and the adapters that are computed with in bf16, the adapters' masters in fp32."""
    options = f"--config experiments/toy_grpo.yaml {TINY} --answer_format boxed --max_new_tokens 24 --kl_coef 0.05"
    options += f" --dtype bf16 --model {guesser} --output_dir {tmp_path / 'run'}"
    go_on("two", "-m", "adaptive_reasoning.grpo", *options.split())
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(row["loss/grad_norm"] > 0 for row in rows) and rows[1]["loss/ref_kl"] > 0
    last = tmp_path / "run" / "checkpoints" / "step_000002"
    kinds = {t.dtype for t in load_file(last / "optimizer" / "rank_0.safetensors").values()}
    assert kinds == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(last / "model").dtype == torch.float32
