"""The user's own commands in a subprocess, with small models and few steps (P10), resume (P6), and what goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_model import make_folder

from adaptive_reasoning.core.files import read_jsonl

ROOT = Path(__file__).parent.parent
SMALL = (
    "--prompts_per_step 4 --num_generations 4 --ref_samples 2 --max_new_tokens 24 --nothinking_max_new_tokens 12 "
    "--eval_limit 5 --grader_workers 1 --rollout_rows 32 --tokens_per_micro_batch 2048"
)
CHAIN = (
    "--task chain --chain_questions 24 --chain_eval_questions 24 --prompts_per_step 4 --num_generations 4 "
    "--ref_samples 2 --max_new_tokens 32 --nothinking_max_new_tokens 8 --rollout_rows 64"
)


def make(target: str, cwd=ROOT, check=True, **variables):
    """Run `make target NAME=value ...` as a user does; return the finished process."""
    command = ["make", target, *(f"{k}={v}" for k, v in variables.items())]
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "ADAPTIVE_REASONING_DATA": ""}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_module(module: str, *options: str):
    """Run `python -m adaptive_reasoning.<module>` on the CPU; return the finished process."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [str(ROOT / ".venv/bin/python"), "-m", f"adaptive_reasoning.{module}", *options]
    if not Path(command[0]).exists():
        command[0] = "python3"
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model folder, questions file) with an R1-style tokenizer."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return folder, make_folder(folder)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """A chain model after a cold start of a few steps."""
    folder = tmp_path_factory.mktemp("cold")
    done = run_module(
        "sft", "--config", "experiments/cold_start_adaptthink.yaml", "--output_dir", str(folder), "--max_steps", "4",
        "--batch_size", "16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "model"


def comparable(folder: Path) -> list[dict]:
    """The metrics of a run without what a clock measured."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/") and "per_s" not in k
             and k != "grader/seconds_mean"} for row in rows]  # fmt: skip


@pytest.mark.slow
def test_paper_run_on_real_questions(small, tmp_path):
    """make train-adaptthink-1.5b: presampling, rollouts, grading, two updates, checkpoint, evaluation, page."""
    model, data = small
    options = dict(MODEL=model, DATA=data, NUM_GPUS=0, OUT=tmp_path / "run")
    arguments = f"--max_steps 2 --eval_every 0 --eval_data {data} --ref_cache {tmp_path / 'ref'} {SMALL}"
    out = make("train-adaptthink-1.5b", ARGS=arguments, **options).stdout
    run = tmp_path / "run"
    assert "memory plan" in out and "pass rates of " in out
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [0, 1, 2]
    steps = read_jsonl(run / "metrics.jsonl")[1:]
    assert all(row["adapt_think/forced_nothinking_share"] == 0.5 for row in steps)
    assert all(row["check/logprob_gap_max"] < 1e-4 for row in steps)
    # P5: before the first update every ratio is 1, except that of the forced first tokens.
    assert steps[0]["loss/clip_fraction"] == 0
    settings = [(r["step"], r["setting"]) for r in read_jsonl(run / "evaluations.jsonl")]
    assert settings == [(s, k) for s in (0, 2) for k in ("adaptive", "always_think", "never_think")]
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary) == ["algorithm", "task", "seed", "steps", "wall_s", "before", "after"]
    assert set(summary["after"]["modes"]) == {"thinking", "nothinking"}
    assert set(summary["after"]["by_difficulty"]) == {"1", "2", "3"}
    assert (run / "report.html").stat().st_size > 10_000 and (run / "curves.png").is_file()

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_000002" / "model")
    # The same command again finds the run complete and changes nothing.
    before = (run / "metrics.jsonl").read_bytes()
    assert "continuing" in make("train-adaptthink-1.5b", ARGS=arguments, **options).stdout
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_equals_an_uninterrupted_one(laboratory, tmp_path):
    """P6 and P1: two steps, then two more by the same command; metrics and weights are those of four at once."""
    config = ["--config", "experiments/toy_adaptthink.yaml", "--model", str(laboratory), *CHAIN.split()]
    config += [
        "--ref_cache",
        str(tmp_path / "ref"),
        "--eval_every",
        "2",
        "--save_every",
        "1",
        "--chain_questions",
        "16",
    ]

    def go(name, steps):
        done = run_module("adaptthink", *config, "--output_dir", str(tmp_path / name), "--max_steps", str(steps))
        assert done.returncode == 0, done.stderr[-2000:]

    go("whole", 4)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    # As after a kill during step 3: its checkpoint does not exist, its metrics may, and a write was under way.
    for step in (3, 4):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step_00000{step}")
    (tmp_path / "resumed" / "checkpoints" / "step_000003.partial").mkdir()
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    (tmp_path / "resumed" / "summary.json").unlink()
    go("resumed", 4)
    assert comparable(tmp_path / "resumed") == comparable(tmp_path / "whole")
    weights = [tmp_path / n / "checkpoints/step_000004/model/model.safetensors" for n in ("whole", "resumed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # The step it continues from was evaluated before its checkpoint was written: not again, and it is remembered.
    for file in ("samples.jsonl", "evaluations.jsonl"):
        rows = [read_jsonl(tmp_path / n / file) for n in ("whole", "resumed")]
        assert rows[0] == rows[1], file
    after = [json.loads((tmp_path / n / "summary.json").read_text())["after"] for n in ("whole", "resumed")]
    assert after[0] == after[1]
    assert not list((tmp_path / "resumed" / "checkpoints").glob("*.partial"))


@pytest.mark.slow
def test_the_authors_reference_table_is_read_instead_of_sampling(small, tmp_path):
    model, data = small
    rows = read_jsonl(data)
    table = [{"problem": "__OVERALL__", "answer": "", "metrics": {"avg_acc_thinking": 0.5}}]
    table += [{"problem": r["problem"] + "\n", "answer": r["answer"],
               "metrics": {"n_responses": 16, "avg_acc_thinking": 0.25}} for r in rows]  # fmt: skip
    (tmp_path / "ref.json").write_text(json.dumps(table))
    common = ["--config", "experiments/adaptthink_1_5b.yaml", "--model", str(model), "--data", str(data)]
    common += ["--dtype", "fp32", "--max_steps", "1", "--eval_data", "", *SMALL.split()]
    done = run_module(
        "adaptthink", *common, "--output_dir", str(tmp_path / "a"), "--ref_results", str(tmp_path / "ref.json")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_jsonl(tmp_path / "a" / "metrics.jsonl")[-1]["adapt_think/ref_accuracy_mean"] == 0.25
    (tmp_path / "ref.json").write_text(json.dumps(table[:5]))
    done = run_module(
        "adaptthink", *common, "--output_dir", str(tmp_path / "b"), "--ref_results", str(tmp_path / "ref.json")
    )
    assert done.returncode == 2 and "are not in it, the first is questions/" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    "--ratio sequence_product --forcing coin --baseline online --delta_on correct",
    "--ratio token --token_average seq_mean_token_mean --forcing off --minibatches_per_step 2",
    "--old_logprobs behaviour --nothinking_share 0.25 --first_word Okay --report_to tensorboard",
])  # fmt: skip
def test_every_switch_trains(laboratory, tmp_path, options):
    done = run_module(
        "adaptthink", "--config", "experiments/toy_adaptthink.yaml", "--model", str(laboratory), *CHAIN.split(),
        "--ref_cache", str(tmp_path / "ref"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1",
        *options.split(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["algorithm"] == "adaptthink"
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert bool(events) == ("tensorboard" in options)


def test_supervised_rows_from_a_file_with_lora(small, tmp_path):
    model, _ = small
    rows = [{"problem": f"{i}+1?", "response": f"</think>\n\\boxed{{{i + 1}}}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = run_module(
        "sft", "--task", "math", "--model", str(model), "--data", str(tmp_path / "rows.jsonl"), "--dtype", "fp32",
        "--lora_rank", "4", "--max_steps", "3", "--batch_size", "4", "--learning_rate", "1e-3", "--output_dir",
        str(tmp_path / "sft"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and all("_proj" in name for name in changed)


# --- what goes wrong on the way: one message, code 2, nothing half-written (bad input: test_bad_input.py)


def test_a_full_disk_while_a_checkpoint_is_written(small, tmp_path):
    """A file size limit stands in for a full disk: the write fails in the middle, and nothing half-written is left."""
    folder, questions = small
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from adaptive_reasoning import adaptthink\n"
        "from adaptive_reasoning.errors import run_cli\n"
        "run_cli(adaptthink.main)\n"
    )
    command = [str(ROOT / ".venv/bin/python") if (ROOT / ".venv").exists() else "python3", "-c", script]
    command += ["--config", "experiments/adaptthink_1_5b.yaml", "--model", str(folder), "--data", str(questions)]
    command += ["--dtype", "fp32", "--eval_data", "", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    command += ["--ref_cache", str(tmp_path / "ref"), *SMALL.split()]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "cannot write the checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_run_whose_answers_cannot_be_graded_stops(laboratory, tmp_path):
    """P7: a grader that fails on everything is not a model that is wrong on everything."""
    script = (
        "from adaptive_reasoning import adaptthink\n"
        "from adaptive_reasoning.errors import run_cli\n"
        "from adaptive_reasoning.tasks.task import ExactGrader\n"
        "ExactGrader.rates = lambda self: {'grader/timeout_rate': 0.3, 'grader/error_rate': 0.1, 'grader/graded': 10}\n"
        "run_cli(adaptthink.main)\n"
    )
    command = [sys.executable, "-c", script, "--config", "experiments/toy_adaptthink.yaml", *CHAIN.split()]
    command += ["--model", str(laboratory), "--ref_cache", str(tmp_path / "ref"), "--output_dir", str(tmp_path / "run")]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "step 1: 40% of the answers could not be graded (timeouts 30%, errors 10%)" in done.stderr
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["grader/timeout_rate"] == 0.3


def test_an_unknown_option_is_one_line_and_code_2():
    """Bad input as the command line sees it; the table of it is in test_bad_input.py."""
    done = run_module("adaptthink", "--detla", "1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1] == "error: unknown option --detla. Did you mean '--delta'?"


@pytest.mark.slow
def test_the_other_targets(small, laboratory, tmp_path):
    """Two steps of every other make target that trains or evaluates."""
    model, data = small
    arguments = f"--max_steps 2 --eval_data {data} --ref_cache {tmp_path / 'ref'} {SMALL}"
    make("train-adaptthink-7b", MODEL=model, DATA=data, NUM_GPUS=0, OUT=tmp_path / "7b", ARGS=arguments)
    make(
        "eval-adaptthink-1.5b", MODEL=model, NUM_GPUS=0, OUT=tmp_path / "eval",
        ARGS=f"--eval_data {data} --eval_limit 6 --max_new_tokens 16",
    )  # fmt: skip
    assert len(json.loads((tmp_path / "eval" / "evaluation.json").read_text())) == 3
    for target in ("toy-adaptthink", "quickstart"):
        make(
            target,
            MODEL=laboratory,
            OUT=tmp_path / target,
            ARGS=f"--max_steps 2 --ref_cache {tmp_path / 'ref'} {CHAIN}",
        )
        assert (tmp_path / target / "report.html").is_file()


@pytest.mark.slow
def test_paper_run_on_gsm8k(small, tmp_path):
    """Real questions of GSM8K for training and all three benchmarks beside the data file, two steps."""
    folder = os.environ.get("ADAPTIVE_REASONING_DATA")
    if not folder:
        pytest.skip("ADAPTIVE_REASONING_DATA is not set: no real questions here")
    arguments = f"--max_steps 2 --eval_limit 4 --ref_cache {tmp_path / 'ref'} " + SMALL.replace("--eval_limit 5", "")
    data = Path(folder) / "gsm8k_train.jsonl"
    make("train-adaptthink-1.5b", MODEL=small[0], DATA=data, NUM_GPUS=0, OUT=tmp_path / "run", ARGS=arguments)
    rows = read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert {r["benchmark"] for r in rows} == {"gsm8k", "math500", "aime24"}
