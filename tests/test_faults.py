"""Fault drills: what a machine does to a run (full disks, kills, Ctrl-C), and that the same command goes on (P6)."""

import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive_reasoning.core.files import append_jsonl, read_jsonl
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.run import bank

ROOT = Path(__file__).parent.parent
CHAIN = (
    "--task chain --chain_questions 12 --chain_eval_questions 8 --prompts_per_step 4 --num_generations 4 --dtype fp32 "
    "--ref_samples 2 --max_new_tokens 16 --nothinking_max_new_tokens 8 --rollout_rows 64 --max_steps 2 --save_every 1 "
    "--eval_every 0"
)
GO_ON = "Free some space or mend the permissions, and start the same command again: it continues the run."


SFT = "--config experiments/cold_start_adaptthink.yaml --max_steps 5 --batch_size 8 --save_every 2".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of the laboratory that has seen a few rows."""
    folder, argv = tmp_path_factory.mktemp("model"), sys.argv
    sys.argv = ["sft", *SFT, "--output_dir", str(folder)]
    try:
        importlib.import_module("adaptive_reasoning.sft").main()
    finally:
        sys.argv = argv
    return folder / "model"


def training(model: Path, tmp_path: Path) -> list[str]:
    where = f"--model {model} --output_dir {tmp_path / 'run'} --ref_cache {tmp_path / 'ref'}"
    return f"--config experiments/toy_adaptthink.yaml {where} {CHAIN}".split()


def comparable(path: Path) -> list[dict]:
    """Return the rows of a metrics file without what a clock measured."""
    clocks = re.compile("time/|per_s|seconds_mean")
    return [{k: v for k, v in row.items() if not clocks.search(k)} for row in read_jsonl(path)]


# --- killed and started again


@pytest.mark.parametrize("lora", [0, 4])
def test_a_cold_start_continues_to_the_same_weights(go, tmp_path, lora):
    """P6. A checkpoint once held the learning rate as a NumPy number, and no resumed cold start could read it back.

    The process is killed after the model is in its place and before summary.json is: the model is then written again.
    """
    options = [*SFT, "--lora_rank", lora]
    assert go("sft", *options, "--output_dir", tmp_path / "whole") == (0, "")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss/po')
    assert go("sft", *options, "--output_dir", tmp_path / "killed") == (0, "")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    code, error = go("sft", *options, "--output_dir", tmp_path / "killed", "--learning_rate", "0.1")
    assert code == 2 and "holds a run with learning_rate = 0.003, now it is 0.1" in error


def test_an_evaluation_measures_only_what_is_not_finished(go, model, tmp_path, monkeypatch):
    """P6: killed in its second setting; results, samples and kept rows are those of an untouched evaluation."""
    options = f"--task chain --chain_eval_questions 10 --model {model} --max_new_tokens 8 --dtype fp32 --eval_samples 2"
    options = [*options.split(), "--maj_k", "2"]
    assert go("benchmark.__main__", *options, "--output_dir", tmp_path / "whole") == (0, "")
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "whole" / "config.yaml", tmp_path / "killed")
    lines = (tmp_path / "whole" / "finished.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "killed" / "finished.jsonl").write_bytes(lines[0] + lines[1][:-9])
    (tmp_path / "killed" / "samples.jsonl").write_text('{"step": 0, "sp')
    evaluate = importlib.import_module("adaptive_reasoning.benchmark.__main__")
    real, measured = evaluate.evaluate, []
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: (measured.append(a[2]), real(*a, **k))[1])
    assert go("benchmark.__main__", *options, "--output_dir", tmp_path / "killed") == (0, "")
    assert measured == ["always_think", "never_think"]
    for name in ("evaluation.json", "samples.jsonl", "finished.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    code, error = go("benchmark.__main__", *options, "--output_dir", tmp_path / "killed", "--chain_mix", "1")
    assert code == 2 and "holds a run with chain_mix" in error


def test_a_run_is_evaluated_again_from_its_folder_alone(go, model, tmp_path):
    """Nothing but the folder is given, and every number of the run's last evaluation comes out again."""
    assert go("adaptthink", *training(model, tmp_path), "--eval_samples", "2", "--eval_every", "1") == (0, "")
    run, found = tmp_path / "run", tmp_path / "run" / "benchmark" / "step_000002"
    assert go("benchmark.__main__", run) == (0, "")
    results = {row["setting"]: row["result"] for row in json.loads((found / "evaluation.json").read_text())}
    last = {row["setting"]: row["result"] for row in read_jsonl(run / "evaluations.jsonl") if row["step"] == 2}
    assert results == last and set(results) == {"adaptive", "always_think", "never_think"}
    assert results["adaptive"]["hybrid"] and "2" in results["adaptive"]["pass_at"]
    assert results["never_think"]["paired"].keys() == {"difference", "low", "high", "p"}
    assert "## chain" in (found / "evaluation.md").read_text()

    # A checkpoint of it, and a setting of one's own.
    assert go("benchmark.__main__", run / "checkpoints" / "step_000001", "--settings", "adaptive") == (0, "")
    (row,) = json.loads((run / "benchmark" / "step_000001" / "evaluation.json").read_text())
    (old,) = (row for row in read_jsonl(run / "evaluations.jsonl") if row["step"] == 1)
    assert row["result"] == old["result"] | {"hybrid": None}


def test_presampling_continues_with_the_rounds_that_are_missing(go, model, tmp_path, monkeypatch):
    """P6: a round is a file, written whole or not at all; what is sampled again is what was there, token for token."""
    monkeypatch.setattr(bank, "QUESTIONS_PER_ROUND", 3)
    assert go("adaptthink", *training(model, tmp_path)) == (0, "")
    (kept,) = (tmp_path / "ref").iterdir()
    whole, first = {p.name: p.read_bytes() for p in kept.iterdir()}, comparable(tmp_path / "run" / "metrics.jsonl")
    rounds = sorted(kept.glob("*.safetensors"))
    assert len(rounds) == 3 and all(len({row["question"] for row in bank.rows_of(p)}) <= 3 for p in rounds)
    rounds[1].unlink()
    shutil.rmtree(tmp_path / "run")
    assert go("adaptthink", *training(model, tmp_path)) == (0, "")
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == whole
    assert comparable(tmp_path / "run" / "metrics.jsonl") == first
    rounds[2].write_bytes(rounds[2].read_bytes()[:40])
    shutil.rmtree(tmp_path / "run")
    code, error = go("adaptthink", *training(model, tmp_path))
    assert code == 2 and f"{rounds[2]} is damaged" in error


def test_a_run_shortened_to_its_checkpoint_is_evaluated_as_a_whole_one(go, model, tmp_path):
    """It used to end without its last evaluation, and its summary had no "after"."""
    run = tmp_path / "run"
    assert go("adaptthink", *training(model, tmp_path)) == (0, "")
    shutil.rmtree(run / "checkpoints" / "step_000002")
    again = [*training(model, tmp_path), "--max_steps", "1", "--eval_every", "1", "--ref_cache", tmp_path / "other"]
    assert go("adaptthink", *again) == (0, "")
    rows = read_jsonl(run / "evaluations.jsonl")
    settings = ("adaptive", "always_think", "never_think")
    assert [(row["step"], row["setting"]) for row in rows] == [(s, k) for s in (0, 1) for k in settings]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["after"] == rows[3]["result"]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))  # adaptive alone
    assert go("adaptthink", *again) == (0, "")
    for row in rows[4:]:  # responses of the setting measured before are not kept
        del row["result"]["paired"]
    assert read_jsonl(run / "evaluations.jsonl") == rows


LAUNCHER = """
import subprocess, sys
rank = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(3600)"
subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]], start_new_session=True).wait()
"""


def test_the_kill_drill_kills_ranks_in_sessions_of_their_own(tmp_path):
    """It used to kill the group of the launcher alone, and the ranks wrote on beside the run that was started again."""
    from test_grader import alive, wait_until

    from experiments.drills.kill import kill_tree

    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path / "pid")])
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        rank = int((tmp_path / "pid").read_text())
        assert alive(rank) and os.getsid(rank) == rank
    finally:
        kill_tree(launcher)
    assert launcher.returncode == -signal.SIGKILL and not alive(rank)


# --- a full disk


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_is_one_message_and_the_run_goes_on_later(go, model, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("/dev/full")
    code, error = go("adaptthink", *training(model, tmp_path))
    assert (code, error.strip()) == (
        2,
        f"error: cannot write {tmp_path / 'run' / name}: No space left on device. {GO_ON}",
    )
    (tmp_path / "run" / name).unlink()
    assert go("adaptthink", *training(model, tmp_path)) == (0, "")
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_a_full_disk_while_the_reference_table_is_written(go, model, tmp_path, monkeypatch):
    write = os.fsync

    def full(handle):
        if "reference.json" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    monkeypatch.setattr(os, "fsync", full)
    code, error = go("adaptthink", *training(model, tmp_path))
    assert code == 2 and f"cannot write {tmp_path / 'run' / 'reference.json'}: No space left on device" in error
    assert not list((tmp_path / "run").glob("*reference*")) and not list((tmp_path / "run").glob(".*.tmp"))
    monkeypatch.setattr(os, "fsync", write)
    assert go("adaptthink", *training(model, tmp_path)) == (0, "")


def test_a_torn_append_is_cut_by_the_next_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "x')
    append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    with pytest.raises(UserError, match="cannot write .*: Is a directory. Free some space"):
        append_jsonl(tmp_path, {"step": 3})


# --- clocks and Ctrl-C


def test_no_duration_depends_on_the_clock_on_the_wall():
    """It may be set back while a run goes on: a deadline would then never come, a speed would be negative."""
    wall = re.compile(r"\btime\.time\(|datetime\.(now|utcnow)\(|from time import .*\btime\b")
    files = [p for folder in ("adaptive_reasoning", "kernels", "experiments") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50 and [p.name for p in files if wall.search(p.read_text())] == []


GRADING = """
import sys, time
from pathlib import Path
from adaptive_reasoning.errors import run_cli
from adaptive_reasoning.tasks.grader import GraderPool
import test_grader

class Slow:
    def __enter__(self): return self
    def __exit__(self, *_):
        Path(sys.argv[1] + ".closing").touch()
        time.sleep(float(sys.argv[2]))

def main():
    with Slow(), GraderPool(1, 3600.0, test_grader.note_pid) as pool:
        pool.submit(sys.argv[1], "hang", 0)
        pool.drain()

run_cli(main)
"""


@pytest.mark.parametrize("presses, closing", [(1, 0), (2, 3600)])
def test_ctrl_c_once_closes_and_twice_ends(tmp_path, presses, closing):
    """Once: the graders are gone and one line is said. Twice: at once, whatever is still being closed."""
    from test_grader import alive, wait_until

    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.Popen(
        [sys.executable, "-c", GRADING, str(tmp_path / "pid"), str(closing)],
        env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until((tmp_path / "pid").exists)
        run.send_signal(signal.SIGINT)
        wait_until((tmp_path / "pid.closing").exists)
        if presses == 2:
            run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert error == ("interrupted; the same command continues from what was saved\n" if presses == 1 else "")
    wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))


LATE = """
import os, signal
from adaptive_reasoning.errors import run_cli

class Late:  # taken apart with the modules, after the interpreter has given its signal handlers back
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT):
        kill(pid, number)

late = Late()

def main():
    signal.raise_signal(signal.SIGINT)

run_cli(main)
"""


def test_ctrl_c_while_the_interpreter_ends():
    """It had ended the process by the signal, -2, in place of 130."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LATE], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command continues from what was saved\n")


def test_an_error_before_the_folder_is_opened_is_told(tmp_path, monkeypatch):
    from adaptive_reasoning import adaptthink
    from adaptive_reasoning.formats.think import Think
    from adaptive_reasoning.learner.watch import Watch
    from adaptive_reasoning.run.options import parse_args
    from adaptive_reasoning.run.run import Run

    told = []
    monkeypatch.setattr(Watch, "stop", lambda self, error=None: told.append(error))
    args = parse_args(adaptthink.Args, ["--model", str(tmp_path / "no model"), "--dtype", "fp32"])
    with pytest.raises(Exception) as raised:
        Run(args, "adaptthink", Think)
    assert told == [raised.value]


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_a_run_and_the_same_command_again(model, tmp_path, presses):
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "adaptive_reasoning.adaptthink", *training(model, tmp_path)]
    run = subprocess.Popen([*command, "--max_steps", "100000"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 200
        while not (tmp_path / "run" / "checkpoints" / "step_000002").exists():
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        for _ in range(presses):
            run.send_signal(signal.SIGINT)
            time.sleep(0.02)
        _, error = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in error
    done = max(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step_??????"))
    again = subprocess.run(
        [*command, "--max_steps", str(done + 1)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 0 and f"after step {done}" in again.stdout, again.stderr[-2000:]
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == list(range(done + 2))
