"""A Qwen3-shaped model with a hybrid template, by the user's own commands: every method, resume, evaluation.

With QWEN3_TOKENIZER=folder the model has Qwen3's own tokenizer (tests/test_think_template.py says where it is from).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import ASSISTANT, EOS, USER, make_folder, write_model
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
    if own := os.environ.get("QWEN3_TOKENIZER"):
        tokenizer = load_tokenizer(own)
    else:
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
        tokenizer.chat_template = TEMPLATES["after"].replace("<U>", USER).replace("<A>", ASSISTANT).replace("<E>", EOS)
    write_model(folder, tokenizer, Qwen3Config, head_dim=32, tie_word_embeddings=True)
    return folder, data


@pytest.fixture(scope="module")
def warmed(hybrid, tmp_path_factory):
    """(folder of the model behind a warm-up on pairs: it answers 7, with and without thinking; its questions)."""
    folder, data = hybrid
    tmp = tmp_path_factory.mktemp("warmed")
    asked = read_jsonl(data)
    pairs = [
        {"problem": row["problem"], "thinking": thoughts, "answer": "\\boxed{7}"}
        for row in asked
        for thoughts in ("Let me think.", "")
    ]
    write_jsonl(tmp / "pairs.jsonl", pairs)
    write_jsonl(tmp / "questions.jsonl", [row | {"answer": "7" if i % 2 else "8"} for i, row in enumerate(asked)])
    warm = f"--task math --data {tmp / 'pairs.jsonl'} --pairs --supervise_opening --batch_size 16 --max_steps 150"
    warm += " --learning_rate 3e-3 --dtype fp32 --save_every 0"
    assert "choose: the prompt ends in" in run("sft", warm, f"--model {folder} --output_dir {tmp / 'sft'}")
    return tmp / "sft" / "model", tmp / "questions.jsonl"


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    assert re.search(r"of anything else (0\.9|1)", line) and "warm it up" in line
    assert "p('<think>') behind the template's own" in line


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
    assert (
        0 < last["eval/opening_rest_prob"] < 1
        and last["eval/unclosed_share"] == 0
        and 0 <= last["leak/nothinking_share"] <= 1
    )
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


RL = f"{OPTIONS} --minibatches_per_step 1 --temperature 1 --max_new_tokens 24"
OFFLINE = (
    "--samples 6 --max_new_tokens 24 --temperature 1 --sample_top_p 1 --grader_workers 1 --rollout_rows 32 "
    "--dtype fp32 --tokens_per_micro_batch 2048 --eval_limit 4 --eval_every 1 --save_every 1"
)
FREE = ["adaptive", "always_think", "never_think", "template_on"]  # settings of the openings
METHODS = {  # options behind the experiment's own, settings of the evaluation
    "degrpo": ("degrpo_1_5b", f"{RL} --control native", FREE),
    "tlmre": ("tlmre_1_5b", RL, FREE),
    "o1_pruner": ("o1_pruner_1_5b", f"{OFFLINE} --rows_per_step 8", FREE),
    "rft": ("rft_mixthinking_1_5b", f"{OFFLINE} --nothinking_samples 6 --batch_size 4", FREE),
    "dpo": ("dpo_shortest_1_5b", f"{OFFLINE} --pairs_per_step 4", FREE),
    "grpo": ("grpo_3b", f"{RL} --kl_coef 0 --answer_format boxed --thinking on", ["adaptive"]),
    "ada_grpo": (
        "ada_grpo_3b", f"{RL} --kl_coef 0 --chat_template plain",
        ["adaptive", "direct", "cot", "code", "long_cot"],
    ),
    "thinker": (
        "thinker_q1_5b",
        f"{OPTIONS} --chat_template plain --num_generations 2 --critic_minibatches 2 --fast_budget 8 "
        "--verify_budget 12 --slow_budget 12 --summary_budget 8 --qa_budget 16 --max_new_tokens 40",
        ["adaptive", "fast", "slow", "qa"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_every_method_behind_a_warm_up(warmed, tmp_path, method):
    """AdaptThink has a test of its own above."""
    (folder, data), (config, options, settled) = warmed, METHODS[method]
    options += f" --data {data} --eval_data {data} --model {folder}"
    if "--samples" in options:
        options += f" --bank {tmp_path / 'bank'}"
    a, _ = two_steps(method, f"--config experiments/{config}.yaml", options, f"--output_dir {tmp_path / 'a'}")
    assert settings(a, 2) == settled
    first, last = numbers(a)[0], numbers(a)[-1]
    assert last["step"] == 2
    if settled == FREE:
        assert last["eval/opening_rest_prob"] > 0.9
    if method == "degrpo":
        assert 0.2 < first["degrpo/first_think_prob"] < 0.8, "the warm-up teaches both openings"
        assert last["degrpo/num_think"] and last["degrpo/num_short"] and last["degrpo/num_malformed"] <= 2


@pytest.mark.slow
def test_grpo_without_thinking(hybrid, tmp_path):
    folder, data = hybrid
    options = ("--config experiments/grpo_3b.yaml", OPTIONS, f"--answer_format boxed --thinking off --data {data}")
    options += (f"--eval_data= --kl_coef 0 --max_steps 1 --model {folder} --output_dir {tmp_path / 'a'}",)
    said = run("grpo", *options, "--minibatches_per_step 1")
    assert f"  {'thinking':<16}off\n" in said and "on ends in" in said
    saved = prompts.prompt_text(load_tokenizer(str(tmp_path / "a" / "checkpoints" / "step_000001" / "model")), "1")
    assert saved.endswith("<think>\n\n</think>\n\n")
