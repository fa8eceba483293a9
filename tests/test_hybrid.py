"""A Qwen3-shaped model with a hybrid template, by the user's own commands: warm-up, two methods, resume, evaluation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import ASSISTANT, EOS, USER, make_folder
from test_think_template import TEMPLATES
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, Qwen3Config

from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.learner.model import load_tokenizer
from adaptive_reasoning.rollout import Decoder, Engine
from adaptive_reasoning.run.evaluation import EvalSpec, Evaluator, openings_line, probability
from adaptive_reasoning.run.options import RunArgs
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.task import Benchmark
from adaptive_reasoning.tasks.think_template import ThinkingArgs, put

ROOT = Path(__file__).parent.parent
OPTIONS = (
    "--prompts_per_step 4 --num_generations 4 --max_new_tokens 12 --grader_workers 1 --rollout_rows 32 --dtype fp32 "
    "--tokens_per_micro_batch 2048 --eval_limit 4 --eval_every 1 --save_every 1 --learning_rate 1e-3"
)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """(folder of the model, its questions). Byte-pair encoding in which "\\n\\n" is one token, as in Qwen3's."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    data = make_folder(folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    tokenizer.chat_template = TEMPLATES["after"].replace("<U>", USER).replace("<A>", ASSISTANT).replace("<E>", EOS)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder, data


def run(module: str, *options: str) -> str:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"adaptive_reasoning.{module}", *" ".join(options).split()]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "declared nowhere" not in done.stdout
    return done.stdout


def two_steps(module: str, *options: str) -> tuple[Path, str]:
    """Run two steps, and the second one again from the checkpoint of the first; return the folder and what was said."""
    folder = Path(options[-1].split()[-1])
    said = run(module, *options, "--max_steps 2")
    want = numbers(folder)
    shutil.rmtree(folder / "checkpoints" / "step_000002")
    assert "continuing" in run(module, *options, "--max_steps 2")
    assert numbers(folder) == want
    return folder, said


def numbers(folder: Path) -> list[dict]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if "time/" not in k and "_per_s" not in k and "seconds" not in k} for row in rows
    ]


def settings(folder: Path, step: int) -> list[str]:
    return [row["setting"] for row in read_jsonl(folder / "evaluations.jsonl") if row["step"] == step]


def test_the_probability_of_an_opening(hybrid):
    """Against the model's own distribution, token by token."""
    folder, _ = hybrid
    tokenizer, model = load_tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    found, _ = put(tokenizer, ThinkingArgs(), True, "think")
    spec = EvalSpec({"adaptive": ()}, found.mode_of, found.answer, {}, template=found)
    engine = Engine(Decoder.from_model(model, "cpu", torch.float32))
    on = Evaluator(engine, None, tokenizer, (), spec, RunArgs(temperature=0.7))
    asked = [prompts.render(tokenizer, text) for text in ("1+1", "How many apples are left?")]
    want = []
    for ids in asked:
        with torch.no_grad():
            logprobs = (model(torch.tensor([[*ids, *found.nothinking]])).logits[0] / 0.7).log_softmax(-1)
        want.append([float(logprobs[len(ids) - 1 + j, token].exp()) for j, token in enumerate(found.nothinking)])
    mean = lambda values: pytest.approx(sum(values) / len(values), rel=1e-4)  # noqa: E731
    assert probability(on, asked, found.nothinking, 1) == mean([b * c for _, b, c in want])
    assert probability(on, asked, found.nothinking) == mean([a * b * c for a, b, c in want])
    line = openings_line(on, Benchmark("b", [Question("q", "1+1", "2")], 1))
    assert "of anything else 0.9" in line and "warm it up" in line and "p('<think>') behind the template's own" in line


@pytest.mark.slow
def test_two_steps_of_adaptthink_resume_and_evaluation(hybrid, tmp_path):
    folder, data = hybrid
    config = "--config experiments/adaptthink_1_5b.yaml"
    options = (config, OPTIONS, f"--ref_samples 1 --nothinking_max_new_tokens 8 --data {data} --eval_data {data}")
    options += (f"--ref_cache {tmp_path / 'ref'} --samples_per_step 16",)
    a, said = two_steps("adaptthink", *options, f"--model {folder} --output_dir {tmp_path / 'a'}")
    end = "<think>', and with NoThinking is the off one"
    for line in ("choose: the prompt ends in", end, "on ends in", "NoThinking '\\n\\n</think>\\n\\n' ["):
        assert line in said
    assert settings(a, 2) == ["adaptive", "always_think", "never_think", "template_on"]
    last = numbers(a)[-1]
    assert 0 < last["eval/opening_rest_prob"] < 1 and 0 <= last["leak/nothinking_share"] <= 1
    assert last["adapt_think/forced_nothinking_share"] == 0.5
    samples = [row for row in read_jsonl(a / "samples.jsonl") if row["split"] == "train"]
    assert len(samples) == 32
    for row in samples:  # the whole opening stands there; "tokens" counts actions
        skips = row["mode"] == "nothinking"
        assert row["response"].startswith("\n\n</think>\n\n" if skips else "\n")
        assert row["tokens"] == (6 if skips else 12) or row["finish_reason"] == "stop"

    model = a / "checkpoints" / "step_000002" / "model"
    tokenizer, first = load_tokenizer(str(model)), load_tokenizer(str(folder))
    assert prompts.prompt_text(tokenizer, "1") == prompts.prompt_text(first, "1") + "<think>"
    asked = {"conversation": [{"role": "user", "content": "1"}], "tokenize": False, "add_generation_prompt": True}
    for state in (True, False):
        texts = [t.apply_chat_template(**asked, enable_thinking=state) for t in (tokenizer, first)]
        assert texts[0] == texts[1]

    small = f"--eval_data {data} --eval_limit 4 --dtype fp32 --max_new_tokens 12 --model {model}"
    assert "on ends in" in run("benchmark", small, f"--output_dir {tmp_path / 'bench'}")
    rows = json.loads((tmp_path / "bench" / "evaluation.json").read_text())
    assert [row["setting"] for row in rows] == ["adaptive", "always_think", "never_think", "template_on"]
    again = run("adaptthink", *options, f"--model {model} --max_steps 1 --output_dir {tmp_path / 'c'}")
    assert "choose: the prompt ends in" in again, "a checkpoint is a model to start from"
    saved = load_tokenizer(str(tmp_path / "c" / "checkpoints" / "step_000001" / "model"))
    assert saved.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_two_steps_of_degrpo_behind_a_warm_up_on_pairs(hybrid, tmp_path):
    folder, data = hybrid
    rows = [
        {"problem": row["problem"], "thinking": thoughts, "answer": "\\boxed{7}"}
        for row in read_jsonl(data)
        for thoughts in ("Let me think.", "")
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warm = f"--task math --data {path} --pairs --supervise_opening --batch_size 16 --max_steps 150 --learning_rate 3e-3"
    said = run("sft", warm, f"--dtype fp32 --save_every 0 --model {folder} --output_dir {tmp_path / 'sft'}")
    assert "choose: the prompt ends in" in said
    options = (
        "--config experiments/degrpo_1_5b.yaml",
        OPTIONS,
        "--control native --minibatches_per_step 1 --max_new_tokens 24",
    )
    options += (f"--data {data} --eval_data {data} --model {tmp_path / 'sft' / 'model'}",)
    a, _ = two_steps("degrpo", *options, f"--output_dir {tmp_path / 'a'}")
    first, last = numbers(a)[0], numbers(a)[-1]
    assert 0.2 < first["degrpo/first_think_prob"] < 0.8, "the warm-up teaches both openings"
    assert last["degrpo/num_think"] and last["degrpo/num_short"] and last["degrpo/num_malformed"] <= 2
    assert last["eval/opening_rest_prob"] > 0.9
    assert settings(a, 2) == ["adaptive", "always_think", "never_think", "template_on"]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["on", "off"])
def test_grpo_in_one_mode(hybrid, tmp_path, state):
    folder, data = hybrid
    options = ("--config experiments/grpo_3b.yaml", OPTIONS, f"--answer_format boxed --thinking {state} --data {data}")
    options += (f"--eval_data= --kl_coef 0 --minibatches_per_step 1 --model {folder} --output_dir {tmp_path / 'a'}",)
    said = run(
        "grpo", *options, f"--eval_data= --kl_coef 0 --max_steps 1 --model {folder} --output_dir {tmp_path / 'a'}"
    )
    assert f"  {'thinking':<16}{state}\n" in said and "on ends in" in said
    saved = prompts.prompt_text(load_tokenizer(str(tmp_path / "a" / "checkpoints" / "step_000001" / "model")), "1")
    assert saved.endswith(ASSISTANT if state == "on" else "<think>\n\n</think>\n\n")
