"""The make targets of the papers' runs, as a user types them, with a small model on the CPU (P10)."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_model import make_folder
from test_end_to_end import ROOT, make

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.learner.model import load_tokenizer
from adaptive_reasoning.run.bank import write

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
def test_the_baselines_of_adaptthinks_table(base, tmp_path):
    model, data = base
    trained("train-tlmre-1.5b", model, data, tmp_path / "tlmre")
    offline = SMALL.replace("--prompts_per_step 4 --num_generations 4", "--rows_per_step 4 --samples 4")
    offline = offline.replace("--minibatches_per_step 1", f"--eval_data {data} --train_limit 8 --bank {tmp_path}/bank")
    make("train-o1-pruner-1.5b", MODEL=model, DATA=data, NUM_GPUS=0, OUT=tmp_path / "o1", ARGS=offline)
    assert [row["step"] for row in read_jsonl(tmp_path / "o1" / "metrics.jsonl")] == [0, 1, 2]
    (tmp_path / "gsm8k.jsonl").write_bytes(data.read_bytes())  # a name that Table 1 has
    out = make("eval-tlmre-1.5b", MODEL=model, NUM_GPUS=0, OUT=tmp_path / "eval",
               ARGS=f"--eval_data {tmp_path}/gsm8k.jsonl --eval_limit 3 --max_new_tokens 16").stdout  # fmt: skip
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "paper, TLMRE 80.7 / 863 / 0" in lines and any(line.startswith("here, never_think") for line in lines)


@pytest.mark.slow
def test_rft_mixthinking_and_merging_to_their_evaluations(guesser, tmp_path):
    """On chains, where a tiny model is right at times; what was trained is merged with what it started from."""
    chains = "--task chain --chain_mix 1 --chain_questions 24 --chain_eval_questions 6 --max_new_tokens 24"
    own = f"--samples 4 --nothinking_samples 4 --batch_size 4 --bank {tmp_path / 'bank'}"
    arguments = f"{chains} {own} --max_steps 2 --save_every 1 --eval_every 0 --rollout_rows 32"
    out = tmp_path / "run"
    for _ in range(2):
        done = make("train-rft-mixthinking-1.5b", MODEL=guesser, NUM_GPUS=0, OUT=out, ARGS=arguments)
    assert "continuing" in done.stdout and [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [0, 1, 2]
    reasoner, merged = out / "checkpoints" / "step_000002" / "model", tmp_path / "merged"
    for said in (f"wrote {merged / 'w1'}", f"{merged / 'w1'} is complete"):
        done = make("merge-1.5b", MODEL=reasoner, OUT=merged, ARGS=f"--other {guesser} --weight 0.7,1")
        assert said in done.stdout
    for target, model in (("eval-merge-1.5b", merged / "w0.7"), ("eval-rft-mixthinking-7b", reasoner)):
        done = make(target, MODEL=model, NUM_GPUS=0, OUT=tmp_path / target, ARGS=chains)
        assert "never_think" in done.stdout and "in the paper's table" in done.stdout


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
    known = tmp_path / "math500.jsonl"  # a name that the paper's table has
    known.write_bytes(data.read_bytes())
    few = f"--eval_data {known} --eval_limit 3 --eval_samples 1 --max_new_tokens 64 {BUDGETS.partition('2 ')[2]}"
    out = make("eval-thinker-q1.5b", MODEL=model, NUM_GPUS=0, OUT=tmp_path / "eval", ARGS=few).stdout
    assert "adaptive" in out and "paper, Q1.5B Thinker-Fast" in out


PAIRS = (
    "--max_steps 3 --samples 2 --pairs_per_step 4 --max_new_tokens 128 --train_limit 40 --eval_limit 4 --eval_every 0 "
    "--save_every 1 --keep_checkpoints 0 --grader_workers 1 --rollout_rows 32 --tokens_per_micro_batch 2048"
)


def fill_bank(folder: Path, model: Path, data: Path) -> None:
    """Write handmade answers over those of an untrained model: two that are right, of three and of one attempt."""
    (path,) = folder.glob("*/*.safetensors")
    tokenizer, episodes = load_tokenizer(str(model)), []
    for i, row in enumerate(read_jsonl(data)[:40]):
        a = row["answer"]
        for more in (f"Wait, let me check: = {a}.\n\nHmm, once more: the answer is {a}.\n", ""):
            text = f"So x = {a}.\n\n{more}</think>\n\n\\boxed{{{a}}}"
            ids = torch.tensor([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])
            zeros, ones = torch.zeros(len(ids)), torch.ones(len(ids)).bool()
            e = Episode(
                Question(f"q{i}", "", a), i, torch.arange(2), ids, zeros, ones, "stop", mode="thinking", answer=a
            )
            e.correct = True
            episodes.append(e)
    write(path, episodes)


@pytest.mark.slow
def test_preference_pairs_from_one_bank_and_a_kill(base, tmp_path):
    """Three methods from the same answers; the first is killed with -9 in the middle and ends as if it had not been."""
    model, data = base
    given = {
        "MODEL": model,
        "DATA": data,
        "NUM_GPUS": 0,
        "ARGS": f"{PAIRS} --eval_data {data} --bank {tmp_path / 'bank'}",
    }
    done = make("train-dpo-shortest-1.5b", check=False, OUT=tmp_path / "run", **given)
    assert done.returncode and "gives no pair" in done.stderr, "an untrained model is never right"
    fill_bank(tmp_path / "bank", model, data)
    for target, pairs in (("train-overthink-1.5b", 40), ("train-dast-1.5b", 34), ("train-dpo-shortest-1.5b", 40)):
        make(target, OUT=tmp_path / target, **given)
        rows = read_jsonl(tmp_path / target / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[0]["dpo/pairs"] == pairs
        assert rows[0].get("dpo/outcome_efficiency", 0) == 0 and rows[0]["dpo/length_ratio"] > 1.2

    command = [
        "make",
        "train-dpo-shortest-1.5b",
        *(f"{k}={v}" for k, v in {**given, "OUT": tmp_path / "killed"}.items()),
    ]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not (tmp_path / "killed/checkpoints/step_000001/manifest.json").exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists(), "it was too late"
    assert "continuing" in make("train-dpo-shortest-1.5b", OUT=tmp_path / "killed", **given).stdout
    weights = [tmp_path / name / "checkpoints/step_000003/model/model.safetensors" for name in (target, "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
