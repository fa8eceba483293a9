"""Record: who may write a folder, what a continued run may not find changed, and metrics over processes."""

import fcntl
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.run import folder as record
from adaptive_reasoning.run.metrics import Drift, over_processes

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 7 on elsewhere", file=file, flush=True)
print("held", flush=True)
time.sleep(3600)
"""


def test_two_processes_cannot_write_one_folder(tmp_path, monkeypatch, capsys):
    """The ranks of a killed launcher once wrote on, for seconds, beside the run that was started again."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / record.LOCK)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(record, "LOCK_SECONDS", 0.3)
        with pytest.raises(UserError, match="is being written by process 7 on elsewhere. Wait until .* another --outp"):
            record.lock_folder(tmp_path)
        monkeypatch.setattr(record, "LOCK_SECONDS", 60.0)
        capsys.readouterr()
        threading.Timer(0.5, holder.send_signal, [signal.SIGKILL]).start()
        record.lock_folder(tmp_path)
        waiting = f"waiting for process 7 on elsewhere to end, which still writes {tmp_path}"
        assert capsys.readouterr().out.splitlines() == [waiting]
    finally:
        holder.kill()
        holder.communicate()
    record.lock_folder(tmp_path)  # another run in this process
    with open(tmp_path / record.LOCK, "a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_other_weights_of_the_model_are_found_however_large_the_file(tmp_path):
    """A run continued with another reference policy under the old name used to go on without a word."""
    tokenizer = SimpleNamespace(get_vocab=dict, chat_template="")
    path = tmp_path / "model.safetensors"

    def inputs(first: int) -> dict[str, str]:
        """A file of 8 MB whose embedding, at its start, was frozen."""
        path.write_bytes(bytes(4_000_000) + bytes([first]) * 4_000_000)
        return record.inputs_of({}, tokenizer, str(tmp_path))

    old = inputs(1)
    record.check_inputs(tmp_path, old, inputs(1))
    with pytest.raises(UserError, match=f"the model {tmp_path} has changed since"):
        record.check_inputs(tmp_path, old, inputs(2))
    assert record.weights_of("some/name") != record.weights_of("some/other")
    assert set(record.inputs_of({}, tokenizer)) == {"the tokenizer", "the chat template"}


def test_grader_rates_count_answers_and_not_processes():
    """A process with one answer, and that a timeout, once weighed as much as one with ninety-nine good ones."""

    def part(graded, slow, seconds):
        rates = {"grader/timeout_rate": slow, "grader/seconds_mean": seconds, "grader/graded": graded}
        return {"tokens": 8, "episodes": 2, "cut": 0, "correct": 1, "reward": 1.0, "grader": rates}

    row = over_processes([part(99, 0.0, 1.0), part(1, 1.0, 3.0), part(0, None, None)])
    assert (row["grader/timeout_rate"], row["grader/seconds_mean"]) == (0.01, 1.02) and "grader/graded" not in row
    row = over_processes([part(0, None, None)] * 2)
    assert row["grader/timeout_rate"] is None and row["grader/seconds_mean"] is None


def test_the_drift_of_all_processes_is_a_mean_over_tokens():
    three, one = Drift(ratio_sum=3.3, ratio_tokens=3, ratio_max=1.2, kl=0.06), Drift(0.5, 2, 0.4, 0.9, 1, 0.9, 0.02)
    row = Drift.over([three, one]).metrics()
    assert row["check/approx_kl"] == pytest.approx(0.02) and row["check/ratio_mean"] == pytest.approx(1.05)
    assert (row["check/ratio_max"], row["check/logprob_gap_mean"], row["check/logprob_gap_max"]) == (1.2, 0.25, 0.4)
    assert Drift().metrics() == {}, "no token was compared"
