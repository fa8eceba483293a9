"""Model folders that cannot be trained as they are: each is refused before anything is loaded, with the mend (P14).

A case breaks a copy of a tiny random folder. What a command makes of it is at the end, and in bad_input.yaml.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import write_model
from safetensors.torch import load_file, save_file
from small_model import make_folder
from test_learner_distributed import ENVIRONMENTS

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.critic import load_critic
from adaptive_reasoning.learner.model import generation_config, is_tied, load_config, load_model
from adaptive_reasoning.learner.weights import check_weights
from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling
from adaptive_reasoning.run.options import RunArgs
from adaptive_reasoning.run.start import start_of

ROOT = Path(__file__).parent.parent
FP32 = SimpleNamespace(dtype="fp32")
EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders by whether the embeddings are tied."""
    tmp = tmp_path_factory.mktemp("whole")
    return {tied: Path(write_model(tmp / str(tied), tied)) for tied in (False, True)}


@pytest.fixture
def broken(whole, tmp_path):
    """A function that returns a copy of a folder, changed by `edit(folder, weights, config)`."""

    def broken(edit, tied: bool = False) -> str:
        folder = tmp_path / "model"
        shutil.copytree(whole[tied], folder)
        weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        edit(folder, weights, config)
        if (folder / "model.safetensors").exists():
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return broken


def drop(part):
    return lambda f, w, c: [w.pop(key) for key in list(w) if part in key]


def configure(**values):
    return lambda f, w, c: c.update(values)


def add(**weights):
    return lambda f, w, c: w.update({key.replace("__", "."): t for key, t in weights.items()})


def one_layer(f, w, c):
    c.update(num_hidden_layers=1, layer_types=["full_attention"])


def other_head(f, w, c):
    w[HEAD] = w[EMBED] + 1


def float8(f, w, c):
    w[UP] = w[UP].to(torch.float8_e4m3fn)


def not_finite(f, w, c):
    w[UP][3, 3] = float("inf")


def split(f, w, c, lost: str = "", hole: str = ""):
    """Write the weights in two files, without one of them, or with a tensor that the index alone has."""
    names, files = sorted(w), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, (names[:9], names[9:])):
        save_file({key: w[key] for key in part if key != hole}, f / file, {"format": "pt"})
    places = {key: files[i >= 9] for i, key in enumerate(names)}
    (f / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (f / "model.safetensors").unlink()
    if lost:
        (f / lost).unlink()


def as_bin(f, w, c, hole: str = "", legacy: bool = False):
    weights = {key: t for key, t in w.items() if key != hole}
    torch.save(weights, f / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (f / "model.safetensors").unlink()


def junk(f, w, c):
    as_bin(f, w, c)
    (f / "pytorch_model.bin").write_bytes(b"<html>" * 40)


FILE, BY_CONFIG = "{f}/model.safetensors", "the model of config.json"
REFUSED = {  # name -> (what is broken, whether the folder is tied, parts of the message)
    "no head": (drop(HEAD), False, [f"{FILE} lacks '{HEAD}'", "set tie_word_embeddings to true"]),
    "no head of an untied config": (configure(tie_word_embeddings=False), True, [f"lacks '{HEAD}'"]),
    "no embedding": (drop(EMBED), True, [f"{FILE} lacks '{EMBED}' and 1 more weights"]),
    "no last layer": (drop("layers.1."), False, [
        "lacks 'model.layers.1.self_attn.q_proj.weight' and 11 more weights", "set num_hidden_layers to 1"]),
    "no norm": (drop("model.norm"), False, [
        f"{FILE} lacks 'model.norm.weight', which {BY_CONFIG}", "Copy the weights again"]),
    "no bias": (drop("0.self_attn.q_proj.bias"), False, ["lacks 'model.layers.0.self_attn.q_proj.bias'"]),
    "hole in a shard": (lambda *a: split(*a, hole=UP), False, [f"{{f}} lacks '{UP}'"]),
    "lost shard": (lambda *a: split(*a, lost="model-00002-of-00002.safetensors"), False, [
        "model-00002-of-00002.safetensors is missing, one of the 2 files that {f}/model.safetensors.index.json names"]),
    "hole in a pickle": (lambda *a: as_bin(*a, hole=UP), False, [f"{{f}}/pytorch_model.bin lacks '{UP}'"]),
    "no pickle": (junk, False, ["cannot load the weights: {f}/pytorch_model.bin: "]),
    "more layers": (one_layer, False, [
        f"{FILE} holds 'model.layers.1.", f"and 11 more weights, which {BY_CONFIG} does not have",
        "num_hidden_layers to 2"]),
    "a bias": (add(model__layers__0__mlp__up_proj__bias=torch.zeros(96)), False, [
        "holds 'model.layers.0.mlp.up_proj.bias'", "What nothing takes would be dropped"]),
    "a value head": (add(v_head__weight=torch.zeros(1, 64)), False, ["holds 'v_head.weight'"]),
    "other MLP": (configure(intermediate_size=112), False, [
        f"'model.layers.0.mlp.gate_proj.weight' in {FILE} has shape [96, 64], {BY_CONFIG} has [112, 64]",
        "correct intermediate_size and hidden_size"]),
    "other heads": (configure(head_dim=8), False, ["q_proj.weight' in", "[32, 64]", "head_dim in config.json"]),
    "other vocabulary": (configure(vocab_size=99), True, [f"'{EMBED}' in", "[99, 64]", "vocab_size"]),
    "tied, but not the same": (other_head, True, [
        f"tie_word_embeddings true, and '{HEAD}' in {FILE} is not '{EMBED}'", "Set tie_word_embeddings to false"]),
    "tied over untied": (configure(tie_word_embeddings=True), False, ["Set tie_word_embeddings to false"]),
    "layers and their types": (configure(num_hidden_layers=1), False, [
        "config.json cannot be read", "`layer_types` (2)"]),
    "no number of layers": (configure(num_hidden_layers="two"), False, ["config.json cannot be read", "expected int"]),
    "no heads": (configure(num_attention_heads=0, head_dim=None), False, ["describes no model that can be built"]),
    "no activation": (configure(hidden_act="nonsense"), False, ["hidden_act 'nonsense': only silu is supported"]),
    **{f"quantised: {method}": (configure(quantization_config={"quant_method": method}), False, [
        f"has quantization_config ({method}): quantised weights cannot be trained here", "bf16, fp16 or fp32"])
       for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8")},
    "quantised: MLX": (configure(quantization={"bits": 4}), False, ["config.json has quantization: quantised"]),
    "quantised: unsaid": (float8, False, [f"{FILE} holds '{UP}' (F8_E4M3): quantised weights"]),
    "quantised: packed": (add(model__layers__0__mlp__up_proj__qweight=torch.zeros(8, 96, dtype=torch.int32)), False, [
        "up_proj.qweight' (I32): quantised weights"]),
    "adapter in the weights": (add(model__layers__0__mlp__up_proj__lora_A__weight=torch.zeros(2, 64)), False, [
        "up_proj.lora_A.weight', of an adapter that was never merged", "merge_and_unload"]),
    "adapter beside the weights": (
        lambda f, w, c: (f / "adapter_config.json").write_text("{}"), False, [
            "an adapter (adapter_config.json) lies beside the weights", "--merge_adapter"]),
    "infinite": (not_finite, False, [f"'{UP}' holds values that are not finite", "Copy them again"]),
    "no JSON": (lambda f, w, c: (f / "generation_config.json").write_text("{"), False, [
        "{f}/generation_config.json is not valid JSON"]),
    "no object": (lambda f, w, c: (f / "generation_config.json").write_text("[]"), False, ["no JSON object but list"]),
    "no ids": (lambda f, w, c: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'), False, [
        "{f}/generation_config.json: eos_token_id is '</s>'"]),
}  # fmt: skip
LATE = ("infinite", "no JSON", "no object", "no ids")  # which the headers of the weights do not show


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_mend(broken, name, monkeypatch):
    edit, tied, message = REFUSED[name]
    folder = broken(edit, tied)
    if name not in LATE:  # nothing is loaded
        monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", None)
    with pytest.raises(UserError) as refused:
        load_model(folder, FP32)
    for part in message:
        assert part.replace("{f}", folder) in str(refused.value)


def headless(f, w, c):
    """As the backbone alone is saved: no prefix."""
    for key in list(w):
        w[key.removeprefix("model.")] = w.pop(key)


SOUND = {
    "tied": (lambda f, w, c: None, True),
    "tied, both there": (lambda f, w, c: w.update({HEAD: w[EMBED].clone()}), True),
    "tied, the head alone": (lambda f, w, c: w.update({HEAD: w.pop(EMBED)}), True),
    "tied, without prefix": (headless, True),
    "old buffers": (add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)), False),
    "bf16": (lambda f, w, c: w.update({key: t.bfloat16() for key, t in w.items()}), False),
    "two files": (split, False),
    "pickle": (as_bin, False),
    "old pickle": (lambda *a: as_bin(*a, legacy=True), False),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_folders_load_and_the_rollout_is_the_model(broken, name):
    edit, tied = SOUND[name]
    model, _ = load_model(broken(edit, tied), FP32)
    decoder = Decoder.from_model(model)
    assert is_tied(model) == decoder.tied == tied
    got = Engine(decoder).run([Request([3, 4, 5], 9, (), 0)], Sampling(1.0))[0]
    ids = torch.tensor([[3, 4, 5, *got.response_ids.tolist()]])
    with torch.no_grad():
        logprobs = model.eval()(ids).logits[0, 2:-1].log_softmax(-1)
    assert (logprobs.gather(-1, got.response_ids[:, None])[:, 0] - got.logprobs).abs().max() < 1e-5


def test_a_rollout_that_would_tie_two_embeddings_is_refused(whole):
    """Whatever the config says: transformers unties a model whose file holds two embeddings."""
    model, _ = load_model(str(whole[False]), FP32)
    model.config.tie_word_embeddings = True
    with pytest.raises(UserError, match="'lm_head.weight' is not part of"):
        Decoder.from_model(model)


def test_a_critic_needs_no_output_embedding(broken):
    folder = broken(lambda f, w, c: (w.pop(HEAD), w.update({"score.weight": torch.ones(1, 64)})))
    assert not load_critic(folder, FP32).score.weight.any()
    with pytest.raises(UserError, match=f"lacks '{HEAD}'"):
        load_model(folder, FP32)


def test_a_critic_needs_the_backbone(broken):
    with pytest.raises(UserError, match="lacks 'model.norm.weight'"):
        load_critic(broken(drop("model.norm")), FP32)


def test_more_stop_tokens_come_with_the_folder(broken):
    folder = broken(lambda f, w, c: (f / "generation_config.json").write_text('{"eos_token_id": [3, 1]}'))
    assert generation_config(folder).eos_token_id == [3, 1]
    (Path(folder) / "generation_config.json").unlink()
    assert generation_config(folder) is None


# ------------------------------------------------------------------------------------------------------------ adapters


def write_adapter(base: Path, folder: Path) -> torch.Tensor:
    """Write a random adapter of the query projections; return layer 0's merged weight W + (alpha / r) B A."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.manual_seed(5)
    for A_or_B in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(A_or_B["default"].weight)
    model.save_pretrained(folder)
    return weight + 3 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()


def test_an_adapter_is_merged_once(whole, tmp_path):
    from accelerate import Accelerator

    adapter, accelerator = tmp_path / "adapter", Accelerator(cpu=True)
    wanted = write_adapter(whole[True], adapter)
    with pytest.raises(UserError, match=f"{adapter}: it is an adapter of {whole[True]} .* --merge_adapter merges it"):
        load_config(str(adapter))
    args = RunArgs(model=str(adapter), output_dir=str(tmp_path / "out"), dtype="fp32")
    assert start_of(args, accelerator) == args.model
    args.merge_adapter = True
    folder = start_of(args, accelerator)
    model, tokenizer = load_model(folder, args)
    assert is_tied(model) and len(tokenizer) == 97
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight, wanted, rtol=0, atol=1e-5)
    written = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert start_of(args, accelerator) == folder
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == written, "a second start finds it"
    assert not list((tmp_path / "out").glob("*.partial"))
    args.output_dir, args.control_tokens = str(tmp_path / "more"), "add"  # both at once
    model, tokenizer = load_model(start_of(args, accelerator, ("<short>",)), args)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight, wanted, rtol=0, atol=1e-5)
    assert is_tied(model) and len(tokenizer) == 98 and model.config.vocab_size == 128
    args.output_dir, args.control_tokens = str(tmp_path / "out"), "model"
    write_adapter(whole[False], adapter)
    with pytest.raises(UserError, match="was not made from --model .* as it is now"):
        start_of(args, accelerator)


def test_an_adapter_whose_base_is_not_at_hand(whole, tmp_path, go):
    write_adapter(whole[True], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(whole[True]), str(tmp_path / "gone")))
    options = ["--model", tmp_path / "adapter", "--output_dir", tmp_path / "out", "--dtype", "fp32", "--merge_adapter"]
    code, error = go("grpo", "--task", "chain", *options)
    assert code == 2 and f"the base of {tmp_path}/adapter is {tmp_path}/gone" in error and "no such folder" in error
    code, error = go("benchmark.__main__", *options[2:], "--model", whole[True])
    assert code == 2 and f"--model {whole[True]} is no adapter" in error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ what the commands say

SMALL = (
    "--task math --prompts_per_step 4 --num_generations 4 --ref_samples 1 --max_new_tokens 8 --grader_workers 1 "
    "--nothinking_max_new_tokens 8 --tokens_per_micro_batch 2048 --eval_data= --dtype fp32 --max_steps 1"
).split()


@pytest.mark.slow
def test_two_processes_under_zero3(whole, tmp_path):
    """Both say the same, a weight split over them is looked at whole, and one merges what both load split."""
    pytest.importorskip("deepspeed", reason="ZeRO-3 is tested where DeepSpeed is installed")
    for name, edit in (("lacking", drop("model.norm")), ("infinite", not_finite)):
        weights = load_file(shutil.copytree(whole[True], tmp_path / name) / "model.safetensors")
        edit(None, weights, None)
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
    wanted = float(write_adapter(whole[True], tmp_path / "adapter").sum())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | ENVIRONMENTS["zero3"]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, ROOT / "tests" / "models_worker.py", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == two and one["split"] and one["tied"] and abs(one["sum"] - wanted) < 1e-3
    assert "lacks 'model.norm.weight'" in one["lacking"] and f"'{UP}' holds values that are not" in one["infinite"]


@pytest.mark.slow
def test_the_command_ends_with_the_sentence(tmp_path):
    """A real process: return code 2, one line, and nothing in the folder of the run."""
    data = make_folder(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if k != HEAD}, path, {"format": "pt"})
    model = ["-m", "adaptive_reasoning.adaptthink", "--model", path.parent, "--data", data]
    done = subprocess.run(
        [sys.executable, *model, "--output_dir", tmp_path / "run", *SMALL], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "preflight" not in done.stdout
    assert f"error: --model {tmp_path}/model: {path} lacks '{HEAD}', which the model of config.json has." in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["grpo", "sft", "benchmark.__main__"])
def test_every_command_refuses(broken, tmp_path, go, module):
    folder = broken(drop("model.norm"))
    more = ["--formats", "arm"] if module == "sft" else []  # whose control tokens it need not have
    code, error = go(module, "--model", folder, "--dtype", "fp32", "--output_dir", tmp_path / "out", *more)
    assert code == 2 and f"{folder}/model.safetensors lacks 'model.norm.weight'" in error


def test_a_gap_in_the_first_step_stops_the_run(tmp_path, go, monkeypatch):
    """A replica that is not the learner's model, here by its final norm."""
    from adaptive_reasoning.rollout.engine import Engine

    refresh = Engine.refresh

    def other(self, weights):
        refresh(self, weights)
        self.decoder.norm.mul_(1.5)

    monkeypatch.setattr(Engine, "refresh", other)
    data = make_folder(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--data", data, "--output_dir", tmp_path / "run", *SMALL]
    code, error = go("adaptthink", *options, "--save_every", "1")
    assert code == 2 and "step 1: sampler and learner disagree about the log-probs" in error
    assert "tie_word_embeddings" in error and "precision" in error and "temperature" in error
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["check/logprob_gap_mean"] > 1e-3, "the row that shows it is written"
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_headers_of_a_whole_folder_pass(whole):
    for folder in whole.values():
        check_weights(str(folder), load_config(str(folder)))


def test_the_names_that_case_files_are_tried_by():
    """Programs outside the tree that check public bug reports import these, and call them like this."""
    from adaptive_reasoning import ada_grpo, adaptthink
    from adaptive_reasoning.errors import UserError
    from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling  # noqa: F401
    from adaptive_reasoning.tasks import chain
    from adaptive_reasoning.tasks.math import load_questions
    from adaptive_reasoning.tasks.prompts import render

    assert issubclass(UserError, ValueError) and callable(load_questions)
    assert adaptthink.extract_answer("I think.</think> \\boxed{7}.") == "7"
    assert ada_grpo.extract_answer("<COT>I think.</COT>\n<ANSWER>7</ANSWER>") == "7"
    assert render(chain.tokenizer("adaptthink"), "3*7")
