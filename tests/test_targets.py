"""The make targets of the papers' runs, as a user types them, with a small model on the CPU (P10)."""

import json
import os
from pathlib import Path

import pytest
from small_model import make_folder
from test_end_to_end import make

from adaptive_reasoning.core.files import read_jsonl

SMALL = (
    "--max_steps 2 --prompts_per_step 4 --num_generations 4 --max_new_tokens 24 --eval_limit 4 --eval_every 0 "
    "--save_every 1 --grader_workers 1 --rollout_rows 32 --tokens_per_micro_batch 2048 --minibatches_per_step 1"
)
BUDGETS = "--critic_minibatches 2 --fast_budget 8 --verify_budget 12 --slow_budget 12 --summary_budget 8 --qa_budget 16"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(model folder, file of questions): GSM8K where it lies, else the questions made beside the model."""
    folder = tmp_path_factory.mktemp("small") / "model"
    made = make_folder(folder)
    real = Path(os.environ.get("ADAPTIVE_REASONING_DATA", "nowhere")) / "gsm8k_train.jsonl"
    return folder, real if real.is_file() else made


def supervised(path: Path, questions: Path, responses) -> Path:
    rows = [(row["problem"], row["answer"]) for row in read_jsonl(questions)[:16]]
    lines = [json.dumps({"problem": p, "response": r(a)}) for p, a in rows for r in responses]
    path.write_text("\n".join(lines) + "\n")
    return path


def trained(target: str, model: Path, data: Path, out: Path, more: str = "", again: bool = False) -> None:
    """Run a target for two steps, and where asked a second time: it finds the run complete."""
    arguments = f"{SMALL} --eval_data {data} --train_limit 40 {more}"
    for _ in range(1 + again):
        done = make(target, MODEL=model, DATA=data, NUM_GPUS=0, OUT=out, ARGS=arguments)
    assert ("continuing" in done.stdout) == again
    rows = read_jsonl(out / "metrics.jsonl")[-2:]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0].get("loss/ref_kl", 0) < 0.01 and rows[1].get("thinker/verify_share", 1) == 1
    assert (out / "summary.json").is_file() and (out / "report.html").is_file()


@pytest.mark.slow
def test_arm_from_the_cold_start_to_the_evaluation(base, tmp_path):
    model, data = base
    formats = [lambda a, t=t: f"<{t}>\nso\n</{t}>\n<ANSWER>\n{a}\n</ANSWER>" for t in ("COT", "CODE", "LONG_COT")]
    rows = supervised(tmp_path / "rows.jsonl", data, [lambda a: f"<ANSWER>\n{a}\n</ANSWER>", *formats])
    make("sft-arm-3b", MODEL=model, DATA=rows, NUM_GPUS=0, OUT=tmp_path / "sft",
         ARGS="--epochs 0 --max_steps 4 --batch_size 8 --max_new_tokens 64 --eval_every 2 --save_every 2")  # fmt: skip
    scored = [r["validation/loss"] for r in read_jsonl(tmp_path / "sft" / "metrics.jsonl") if "validation/loss" in r]
    state = json.loads((tmp_path / "sft/checkpoints/step_000004/state.json").read_text())["state"]["state"]
    assert state["best"] == {"step": 2 + 2 * scored.index(min(scored)), "loss": min(scored)} and len(scored) == 2
    start = tmp_path / "sft" / "model"
    for target in ("train-grpo-3b", "train-ada-grpo-3b", "train-ada-grpo-14b"):
        trained(target, start, data, tmp_path / target, again=target == "train-ada-grpo-3b")
    sets = "csqa obqa gsm8k math svamp bbh aime25".split()
    for name in sets:  # found beside DATA
        row = {"problem": "1+1?\n(A)2  (B)3", "answer": "A" if name in ("csqa", "obqa", "bbh") else "2"}
        (tmp_path / f"{name}_test.jsonl").write_text(json.dumps(row) + "\n")
    few = "--eval_limit 3 --eval_samples 1 --max_new_tokens 16 --maj_k 0 --settings adaptive,direct"
    out = make("eval-ada-grpo-3b", MODEL=start, NUM_GPUS=0, OUT=tmp_path / "eval", DATA=rows, ARGS=few).stdout
    header = next(line for line in out.splitlines() if "mean of 7" in line)
    assert header.split()[:7] == sets and "paper, ARM, k=1" in out


@pytest.mark.slow
def test_thinkless_from_the_warm_up_to_the_evaluation(base, tmp_path):
    model, data = base
    answers = [lambda a: f"<think>\nLet me see.\n</think>\n\\boxed{{{a}}}", lambda a: f"<short>\n\\boxed{{{a}}}"]
    rows = supervised(tmp_path / "pairs.jsonl", data, answers)
    reserved(model)
    make("warmup-thinkless-1.5b", MODEL=model, DATA=rows, NUM_GPUS=0, OUT=tmp_path / "warm",
         ARGS="--max_steps 2 --batch_size 8 --max_new_tokens 64")  # fmt: skip
    start = tmp_path / "warm" / "model"
    trained("train-degrpo-1.5b", start, data, tmp_path / "run", again=True)
    out = make("eval-degrpo-1.5b", MODEL=start, NUM_GPUS=0, OUT=tmp_path / "eval",
               ARGS=f"--eval_data {data} --eval_limit 3 --eval_samples 1 --max_new_tokens 16").stdout  # fmt: skip
    assert "always_think" in out


def reserved(folder: Path) -> None:
    """Give the tokenizer of a model folder an unused added token, as Qwen2's has some."""
    path = folder / "tokenizer.json"
    if "<|quad_start|>" not in path.read_text():
        from adaptive_reasoning.learner.model import load_tokenizer

        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|quad_start|>"]})
        tokenizer.save_pretrained(folder)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)


@pytest.mark.slow
def test_thinker_with_its_two_templates(base, tmp_path):
    model, data = base
    for target in ("train-thinker-q1.5b", "train-thinker-r1.5b"):
        trained(target, model, data, tmp_path / target, f"{BUDGETS} --max_new_tokens 64")
    few = f"--eval_data {data} --eval_limit 3 --eval_samples 1 --max_new_tokens 64 {BUDGETS.partition('2 ')[2]}"
    out = make("eval-thinker-q1.5b", MODEL=model, NUM_GPUS=0, OUT=tmp_path / "eval", ARGS=few).stdout
    assert "adaptive" in out and "paper, Q1.5B Thinker-Fast" in out
