"""A process that hangs, dies or fails ends the others with its name and what it was doing."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaptive_reasoning.learner import runtime, watch
from adaptive_reasoning.learner.watch import Watch, span

HERE = Path(__file__).resolve().parent


class Store(dict):
    """What the watch uses of a process group's store."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.fixture
def three(monkeypatch):
    """Three watches with a common store and a clock set by hand; their threads do not run."""
    clock, store = SimpleNamespace(now=1000.0), Store()
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(runtime, "arrivals", 0)
    made = []
    for rank in range(3):
        w = Watch(SimpleNamespace(process_index=0, num_processes=1), limit=7200.0)
        w.rank, w.ranks, w.store = rank, 3, store
        w.seen = {r: (None, clock.now) for r in range(3)}
        made.append(w)

    def go(seconds, alive=(0, 1, 2)):
        """Let time pass in tens of seconds; return what process 0 found wrong."""
        for _ in range(int(seconds / 10)):
            clock.now += 10
            for w in made:
                if w.rank in alive:
                    w._write()
            if found := made[0]._look():
                return found

    return made, go


def test_processes_that_keep_up_may_take_any_time(three):
    made, go = three
    for step in (1, 2):
        for name in ("rollout", "update"):
            for w in made:
                w.phase(name, step)
            assert go(30_000) is None, "nobody waits for anybody"


def test_the_one_that_others_wait_for_is_named_with_its_phase(three):
    made, go = three
    for w in made:
        w.phase("rollout", 17)
    assert go(3000) is None
    for w in made[:2]:
        w.phase("update", 17)
    assert go(7000) is None
    found = go(400)
    assert "process 2 has been in phase rollout, step 17 for 2.8 h, and the others have waited for 2.0 h" in found
    assert "--patience 7200" in found and "process 1" not in found


def test_waiting_begins_anew_with_every_place(three):
    """The slow one moves on in time, again and again: it is slow and not stuck."""
    made, go = three
    for step in range(5):
        for w in made[:2]:
            w.phase("rollout", step)
        assert go(6000) is None
        made[2].phase("rollout", step)
        assert go(6000) is None


def test_collective_operations_count_as_places(three, monkeypatch):
    """In one and the same phase: the others have come to an exchange, one has not."""
    made, go = three
    made[1]._write, plain = (lambda: None), made[1]._write

    def ahead():
        monkeypatch.setattr(runtime, "arrivals", 1)
        plain()
        monkeypatch.setattr(runtime, "arrivals", 0)

    made[1]._write = ahead
    for w in made:
        w.phase("evaluate aime24 adaptive", 20)
    found = go(8000)
    assert "process 0 has been in phase evaluate aime24 adaptive, step 20" in found and "process 2 has" in found
    assert "process 1" not in found


def test_an_error_before_the_first_phase_is_told(three):
    """A run whose second process could not read its model: the first had waited for five minutes of silence."""
    made, go = three
    made[1].thread = SimpleNamespace(join=lambda seconds: None)
    with pytest.raises(OSError), made[1].telling():
        raise OSError("no such folder")
    assert go(30, alive=(0, 2)) is None
    assert "process 1 ended in phase start: OSError: no such folder" in go(20, alive=(0, 2))


def test_silence_and_errors_are_told_and_a_process_that_is_done_is_not_missed(three):
    made, go = three
    for w in made:
        w.phase("rollout", 3)
    assert go(20) is None
    found = go(400, alive=(0, 1))
    assert found == "process 2 has given no sign of life for 5 min; it was last in phase rollout, step 3"
    made[2]._write("RuntimeError: out of memory", ended=True)
    assert go(30, alive=(0, 1)) is None, "time for this process to meet the same error by itself"
    assert go(30, alive=(0, 1)) == "process 2 ended in phase rollout, step 3: RuntimeError: out of memory"
    made[2]._write(ended=True)
    assert go(9000, alive=(0, 1)) is None
    assert [span(s) for s in (45, 720, 7300)] == ["45 s", "12 min", "2.0 h"]


def launch(what: str) -> list[tuple[int, str]]:
    """Return (exit code, stderr) of two processes over gloo."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(HERE.parent), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in (0, 1):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, str(HERE / "watch_worker.py"), what]
        started.append(subprocess.Popen(command, env=environment | own, stderr=subprocess.PIPE, text=True))
    return [(p.returncode, err) for p in started for _, err in [p.communicate(timeout=200)]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "codes", "message"),
    [
        ("hangs", (3, 3), "process 1 has been in phase rollout, step 17 for"),
        ("is killed", (3, -9), "process 1 has given no sign of life for"),
        ("fails", (3, 1), "process 1 ended in phase rollout, step 17: RuntimeError: out of memory"),
        ("cannot write", (2, 2), "error: the disk is full"),
    ],
)
def test_two_processes(what, codes, message):
    """No process is left waiting, whatever becomes of the other one; without a watch each case would take 2 hours."""
    (code0, told0), (code1, told1) = launch(what)
    assert (code0, code1) == codes, (told0, told1)
    assert message in told0 + told1, (told0, told1)
    if what == "cannot write":
        assert "disk" not in told1, "the process that failed tells it, once"
