"""GraderPool: check answers in worker processes that cannot take the run down with them.

Some answers make sympy run forever, eat all memory or crash the interpreter. So every slot of the pool is one process
that answers over a pipe, and the run owns the deadline: a worker that misses it is killed by pid and replaced. A
failure is never a silent zero: every grade says ok, timeout or error, and `rates` counts them.

    with GraderPool(workers=8, timeout=10.0) as pool:
        pool.submit("\\frac12", "0.5", key=0)       # returns at once; grading overlaps whatever comes next
        pool.drain()                                # {0: Grade(correct=True, status="ok", ...)}

A slot is a fresh interpreter (never a fork of the run, so its threads and its CUDA do not matter) that imports the
checking function's module once, calls its `warm_up` if it has one, does no check itself, and forks the worker that
does. A killed worker is so replaced in milliseconds instead of the seconds that importing sympy and filling its caches
take: a hundred hanging answers cost their deadlines, no more. One thread of the run talks to all slots; the calling
thread may be any thread.

A verdict is a function of the answer and its reference alone, on whatever rank and after whatever other answers: hashes
and random numbers, by which sympy orders sets and tries points, start from the same seed for every answer. What a clock
decides cannot be such a function. An answer that missed its deadline is not tried again: a retry of every hanging
answer would double what they cost, and a slow machine shows in `rates`, which the run watches (--max_ungraded).
"""

import gc
import importlib
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from adaptive_reasoning.core.errors import UserError

START_SECONDS = 120.0  # a worker that is not ready by then never will be
MAX_START_FAILURES = 3  # in a row
CACHE_SIZE = 100_000  # verdicts kept for identical (answer, gold) pairs


@dataclass(frozen=True)
class Grade:
    """Verdict on one answer. `correct` is False unless the check itself said otherwise (status "ok")."""

    correct: bool
    status: str  # "ok", "timeout" (killed at the deadline) or "error" (the check raised or its process died)
    detail: str = ""  # what happened, where the status is not "ok"
    seconds: float = 0.0  # wall-clock time of the check


@dataclass(eq=False)
class _Slot:
    """One process that forks workers, its present worker, and what that is doing."""

    process: subprocess.Popen | None = None
    worker: int = 0  # pid
    ready: bool = False
    job: tuple | None = None  # the (answer, gold) pair in work
    number: int = 0  # of the job, counted by the slot: a reply to an earlier one comes too late
    begun: bool = False  # the worker has read the job
    started: float = 0.0  # monotonic time at which the process or, once it is ready, the job was started
    received: bytes = b""
    failures: int = 0  # starts in a row that led to nothing


@dataclass(eq=False)
class GraderPool:
    """Pool of grading processes; a context manager.

    Args:
        workers: number of processes.
        timeout: seconds one check may take. Starting a worker is not charged to an answer.
        check: check(answer, gold) -> bool, a module-level function of an importable module. None: `same_answer`.
        memory_gib: address space of one worker (RLIMIT_AS); beyond it the check gets a MemoryError. 0: no limit.
    """

    workers: int
    timeout: float
    check: Callable[[str, str | int | float], bool] | None = None
    memory_gib: float = 4.0
    graded: int = field(default=0, init=False)  # grades handed out by drain(), of which ...
    timeouts: int = field(default=0, init=False)
    errors: int = field(default=0, init=False)

    def __post_init__(self):
        assert self.workers >= 1 and self.timeout > 0 and self.memory_gib >= 0
        if self.check is None:
            self._target = "adaptive_reasoning.tasks.answers:same_answer"  # by name: the parent need not import sympy
        else:
            self._target = f"{self.check.__module__}:{self.check.__qualname__}"
            assert "<" not in self._target and self.check.__module__ != "__main__", "workers have to import the check"
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[tuple] = deque()  # (answer, gold) pairs that wait for a worker
        self._keys: dict[tuple, list] = {}  # pair that waits or is in work -> keys it was submitted under
        self._cache: dict[tuple, Grade] = {}
        self._grades: dict[Hashable, Grade] = {}
        self._submitted: dict[Hashable, None] = {}  # keys since the last drain, in order
        self._counted: list[Grade] = []  # what `rates` is about
        self._failure: BaseException | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "GraderPool":
        assert self._thread is None, "a pool is entered once"
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._dispatch, name="grader-pool", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        """Kill all workers, answers in work included."""
        with self._changed:
            self._closing = True
        self._wake()
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def submit(self, answer: str, gold: str | int | float, key: Hashable) -> None:
        """Queue one answer and return at once. `key` names it in what drain() returns; identical pairs share a check.

        Raises:
            UserError: no worker can be started.
        """
        assert self._thread is not None, "submit inside `with GraderPool(...) as pool`"
        assert isinstance(answer, str) and isinstance(gold, (str, int, float))
        pair = (answer, gold, type(gold))
        with self._changed:
            self._raise_failure()
            assert key not in self._submitted, f"key {key!r} was submitted twice"
            self._submitted[key] = None
            if pair in self._cache:
                self._grades[key] = self._cache[pair]
            elif pair in self._keys:
                self._keys[pair].append(key)
            else:
                self._keys[pair] = [key]
                self._queue.append(pair)
        self._wake()

    def drain(self) -> dict[Hashable, Grade]:
        """Wait for everything submitted since the last call and return {key: Grade} in the order of submission.

        Raises:
            UserError: no worker can be started; the message says why.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._grades) == len(self._submitted))
            self._raise_failure()
            grades = {key: self._grades[key] for key in self._submitted}
            self._grades, self._submitted = {}, {}
        self._counted += grades.values()
        self.graded += len(grades)
        self.timeouts += sum(grade.status == "timeout" for grade in grades.values())
        self.errors += sum(grade.status == "error" for grade in grades.values())
        return grades

    def count_anew(self) -> None:
        """Let `rates` be about what is drained from here on: a step of a dialogue drains once a stage."""
        self._counted = []

    def rates(self) -> dict[str, float | None]:
        """Return the number of answers graded since `count_anew`, their rates of timeouts and errors, and mean seconds.

        Rates are None where nothing was graded.
        """
        n = len(self._counted)
        return {
            "grader/graded": n,
            "grader/timeout_rate": sum(g.status == "timeout" for g in self._counted) / n if n else None,
            "grader/error_rate": sum(g.status == "error" for g in self._counted) / n if n else None,
            "grader/seconds_mean": sum(g.seconds for g in self._counted) / n if n else None,
        }

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:  # 64 KiB of wake-up calls lie there already
            pass

    # --- the dispatcher thread: all that follows runs in it alone

    def _dispatch(self) -> None:
        slots = [_Slot() for _ in range(self.workers)]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        try:
            for slot in slots:
                self._start(slot)
            while not self._closing:
                for slot in slots:
                    self._assign(slot)
                limits = [self._limit(slot) for slot in slots]
                wait = min((t for t in limits if t is not None), default=None)
                for event, _ in self._selector.select(None if wait is None else max(0.0, wait - time.monotonic())):
                    if event.data is None:
                        os.read(self._wake_read, 65536)
                    else:
                        self._receive(event.data)
                for slot in slots:
                    self._enforce(slot)
        except BaseException as failure:  # handed to the calling thread, which would wait forever otherwise
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
        finally:
            for slot in slots:
                self._kill(slot)
            self._selector.close()

    def _start(self, slot: _Slot) -> None:
        """Start a worker. From this thread only: the kernel kills it when the thread that started it ends."""
        command = "from adaptive_reasoning.tasks.grader import serve; serve()"
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        slot.process = subprocess.Popen(
            [sys.executable, "-c", command, self._target, str(self.memory_gib), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C goes to the run, which closes the pool
        )
        slot.ready, slot.job, slot.received, slot.started = False, None, b"", time.monotonic()
        slot.worker = 0
        self._selector.register(slot.process.stdout, selectors.EVENT_READ, slot)

    def _kill(self, slot: _Slot) -> int | None:
        """Kill the slot's processes and return the exit code of the first (negative: a signal)."""
        process, slot.process = slot.process, None
        if process is None:
            return None
        self._selector.unregister(process.stdout)
        process.kill()
        self._kill_worker(slot)
        code = process.wait()
        process.stdin.close()
        process.stdout.close()
        return code

    def _kill_worker(self, slot: _Slot) -> None:
        """Kill the worker alone; its parent then reports the death and forks the next one."""
        worker, slot.worker, slot.ready = slot.worker, 0, False
        if worker:
            try:
                os.kill(worker, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has just died by itself

    def _limit(self, slot: _Slot) -> float | None:
        """Return the monotonic time at which the slot's patience ends, None if nothing is expected of it."""
        if slot.ready and slot.job is None:
            return None
        return slot.started + (self.timeout if slot.ready else START_SECONDS)

    def _assign(self, slot: _Slot) -> None:
        with self._changed:
            if not slot.ready or slot.job is not None or not self._queue:
                return
            slot.job = self._queue.popleft()
        answer, gold, _ = slot.job
        slot.started, slot.number, slot.begun = time.monotonic(), slot.number + 1, False
        try:
            _write(slot.process.stdin.fileno(), [slot.number, answer, gold])
        except BrokenPipeError:  # it died while idle: no fault of this answer, which goes to the next worker
            with self._changed:
                self._queue.appendleft(slot.job)
            self._kill(slot)
            self._start(slot)

    def _receive(self, slot: _Slot) -> None:
        chunk = os.read(slot.process.stdout.fileno(), 65536)
        if not chunk:
            return self._died(slot)
        *lines, slot.received = (slot.received + chunk).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "failure" in message:
                raise UserError(f"A grader process cannot import {self._target}: {message['failure']}")
            if "worker" in message:
                slot.worker, slot.ready, slot.failures = message["worker"], True, 0
            elif "died" in message:
                slot.worker = 0
                if slot.job is not None and slot.begun:  # else it died idle, and the next worker reads the job
                    self._finish(slot, False, "error", f"the worker died with exit code {message['died']}")
                if slot.job is None:
                    slot.ready, slot.started = False, time.monotonic()
            elif slot.job is None or message["number"] != slot.number:
                pass  # its deadline was over
            elif "begun" in message:
                slot.begun = True
            else:
                self._finish(slot, message["correct"], message["status"], message["detail"])
                if message["detail"] == "MemoryError":  # it ends itself: what else is broken in there nobody knows
                    slot.ready = False

    def _died(self, slot: _Slot) -> None:
        was_ready, code = slot.ready, self._kill(slot)
        if not was_ready:
            slot.failures += 1
            if slot.failures >= MAX_START_FAILURES:
                raise UserError(f"Grader processes die at their start (exit code {code}). Is memory or a limit short?")
        elif slot.job is not None:
            self._finish(slot, False, "error", f"the worker died with exit code {code}")
        self._start(slot)

    def _enforce(self, slot: _Slot) -> None:
        limit = self._limit(slot)
        if limit is None or time.monotonic() < limit:
            return
        if not slot.ready:
            raise UserError(f"A grader process is not ready after {START_SECONDS:.0f} s. Use fewer --grader_workers.")
        self._finish(slot, False, "timeout", f"no verdict after {self.timeout:g} s")
        if slot.begun:
            self._kill_worker(slot)
            slot.started = time.monotonic()
        else:  # the job is still in the pipe, where the next worker would find it
            self._kill(slot)
            self._start(slot)

    def _finish(self, slot: _Slot, correct: bool, status: str, detail: str) -> None:
        grade = Grade(correct, status, detail, time.monotonic() - slot.started)
        with self._changed:
            if status == "ok":  # a failure may be the machine's, so the next step tries again
                if len(self._cache) >= CACHE_SIZE:
                    self._cache.clear()
                self._cache[slot.job] = grade
            for key in self._keys.pop(slot.job):
                self._grades[key] = grade
            self._changed.notify_all()
        slot.job = None


# --- the worker process


def _write(pipe: int, message) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


def serve() -> None:
    """Main function of a slot: import the check, warm up, then keep one worker alive until the pipe closes.

    Command line: module:function, memory limit in GiB, pid of the run. One JSON document a line on stdin
    ([number, answer, gold]) and stdout: {"failure"}; {"worker": pid} when a worker is ready, {"died": exit code} when
    it is gone; {"number", "begun"} and {"number", "correct", "status", "detail"} for an answer.
    """
    target, memory_gib, parent = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    _die_with(parent)
    requests, replies, nothing = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # whatever the check prints must not end up between the replies
    try:
        module, name = target.split(":")
        check = importlib.import_module(module)
        for part in name.split("."):
            check = getattr(check, part)
        getattr(importlib.import_module(module), "warm_up", lambda: None)()
    except Exception as error:
        return _write(replies, {"failure": f"{type(error).__name__}: {error}"})
    os.dup2(nothing, 2)
    gc.freeze()  # a collection in a worker would touch, and so copy, every page it shares with its parent
    code = None
    while code != 0:  # a worker ends with 0 when the pipe is closed
        me, worker = os.getpid(), os.fork()
        if worker == 0:
            _die_with(me)
            _limit_memory(memory_gib)
            os._exit(_work(check, requests, replies))
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if code != 0:
            _write(replies, {"died": code})


def _work(check, requests: int, replies: int) -> int:
    """Answer requests until the pipe closes, and return the exit code of the worker: 0 when nothing is left to do."""
    _write(replies, {"worker": os.getpid()})
    received = b""
    while chunk := os.read(requests, 65536):
        received += chunk
        if not received.endswith(b"\n"):
            continue
        line, received = received, b""
        try:
            number, answer, gold = json.loads(line)
        except ValueError:
            continue  # the rest of a job that a worker died reading; its deadline ends it
        _write(replies, {"number": number, "begun": True})
        _seed()
        try:
            reply = {"correct": bool(check(answer, gold)), "status": "ok", "detail": ""}
        except BaseException as error:  # SystemExit too: whatever the check raises is a verdict that was not reached
            # The name alone: the message of a failed comparison may itself take forever to print.
            reply = {"correct": False, "status": "error", "detail": type(error).__name__}
        _write(replies, {"number": number, **reply})
        if reply["detail"] == "MemoryError":
            return 1
    return 0


def _seed() -> None:
    """Start the random numbers anew; sympy, where the check has imported it, tries random points of its own."""
    random.seed(0)
    if "sympy" in sys.modules:
        sys.modules["sympy"].core.random.seed(0)


def _die_with(parent: int) -> None:
    """On Linux, have the kernel kill this process when its parent dies. Elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def _limit_memory(gib: float) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if gib:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = int(gib * 2**30)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
