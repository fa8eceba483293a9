"""GraderPool: check answers in worker processes that cannot take the run down with them.

Some answers make sympy run forever, eat all memory or crash the interpreter. So a check runs in a worker process, with
a deadline and a memory limit. A failure is never a silent zero: every grade says ok, timeout or error, and `rates`
counts them.

    with GraderPool(workers=8, timeout=10.0) as pool:
        pool.submit("\\frac12", "0.5", key=0)       # returns at once; grading overlaps whatever comes next
        pool.drain()                                # {0: Grade(correct=True, status="ok", ...)}

The run starts one server, a fresh interpreter (never a fork of the run, so its threads and its CUDA do not matter). The
server imports the checking function's module, calls its `warm_up` if it has one, and keeps a pebble ProcessPool of
workers forked from itself: a killed worker is replaced in milliseconds, without importing sympy again. A timer of the
kernel ends a worker whose check misses its deadline, whatever code it hangs in; pebble sees the death and forks the
next one. Where the server itself ends, the run starts another and sends it what has no verdict yet.

A check says whether an answer equals its reference, or scores it with a number; what is neither, NaN among it, is an
error. `--reward` is such a check of whole responses, in a pool of its own.

A verdict is a function of the answer and its reference alone, on whatever rank and after whatever other answers: hashes
and random numbers, by which sympy orders sets and tries points, start from the same seed for every answer. What a clock
decides cannot be such a function. An answer that missed its deadline is not tried again: a retry of every hanging
answer would double what they cost, and a slow machine shows in `rates`, which the run watches (--max_ungraded).
"""

import contextlib
import gc
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from numbers import Real

from adaptive_reasoning.core.named import module_of, named
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.core.response import Response
from adaptive_reasoning.errors import UserError

START_SECONDS = 120.0  # a server that is not ready by then never will be
MAX_STARTS = 3  # in a row without a verdict
OUT_OF_MEMORY = 99  # exit code of a worker
LOST_SECONDS = 2.0  # past its deadline a check without an end is taken for lost
MOST_CHARS = 300  # of what an error says
SAME_ANSWER = "adaptive_reasoning.tasks.answers:same_answer"  # by name: the parent need not import sympy


@dataclass(frozen=True)
class Grade:
    """Verdict on one answer. The score is 0 unless the check itself said otherwise (status "ok")."""

    score: float  # 1 or 0 of a check that says true or false
    status: str  # "ok", "timeout" (killed at the deadline) or "error" (the check raised or its process died)
    detail: str = ""  # what happened, where the status is not "ok"
    seconds: float = 0.0  # wall-clock time of the check; 0 where its process died before the deadline

    @property
    def correct(self) -> bool:
        return self.score >= 1


@dataclass(eq=False)
class GraderPool:
    """Pool of grading processes; a context manager.

    Args:
        workers: number of processes.
        timeout: seconds one check may take. Starting a worker is not charged to an answer.
        check: check(answer, gold) -> bool or a finite number, a module-level function of an importable module that
            leaves SIGALRM alone, or its name (`core.named`). None: `same_answer`.
        memory_gib: address space of one worker (RLIMIT_AS); beyond it the check gets a MemoryError. 0: no limit.
        score: such a function (answer, question), for the answers whose gold is a whole question. None: `check`
            compares with the question's answer.
        kept: verdicts to keep for identical (answer, gold) pairs.
    """

    workers: int
    timeout: float
    check: Callable[[str, str | int | float], bool] | str | None = None
    memory_gib: float = 4.0
    score: Callable[[str, Question], float] | None = None
    kept: int = 100_000

    def __post_init__(self):
        assert self.workers >= 1 and self.timeout > 0 and self.memory_gib >= 0
        check = self.check or SAME_ANSWER
        self._targets = (name_of(check), name_of(self.score or check))
        self._changed = threading.Condition()  # guards everything below
        self._waiting: dict[tuple, list] = {}  # (answer, gold, type of gold) without a verdict -> its keys
        self._cache: dict[tuple, Grade] = {}
        self._grades: dict[Hashable, Grade | None] = {}  # of the keys since the last drain, in order; None: waits
        self._counted: list[Grade] = []  # what `rates` is about
        self._failure: BaseException | None = None
        self._closing = self._ready = False
        self._server: subprocess.Popen | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "GraderPool":
        assert self._thread is None, "a pool is entered once"
        self._thread = threading.Thread(target=self._supervise, name="grader-pool", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        """Kill all workers, answers in work included."""
        with self._changed:
            self._closing = True
            self._kill()
        self._thread.join()

    def submit(self, answer: str, gold: Hashable, key: Hashable) -> None:
        """Queue one answer and return at once. `key` names it in what drain() returns; identical pairs share a check.

        Raises:
            UserError: no worker can be started.
        """
        assert self._thread is not None, "submit inside `with GraderPool(...) as pool`"
        if isinstance(gold, Question) and self.score is None:
            gold = gold.answer
        assert isinstance(answer, str)
        pair = (answer, gold, type(gold))
        with self._changed:
            self._raise_failure()
            assert key not in self._grades, f"key {key!r} was submitted twice"
            self._grades[key] = self._cache.get(pair)
            if pair in self._waiting:
                self._waiting[pair].append(key)
            elif self._grades[key] is None:
                self._waiting[pair] = [key]
                self._send(pair)

    def drain(self) -> dict[Hashable, Grade]:
        """Wait for everything submitted since the last call and return {key: Grade} in the order of submission.

        Raises:
            UserError: no worker can be started; the message says why.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._waiting)
            self._raise_failure()
            grades, self._grades = self._grades, {}
        self._counted += grades.values()
        return grades

    def count_anew(self) -> None:
        """Let `rates` be about what is drained from here on: a step of a dialogue drains once a stage."""
        self._counted = []

    def rates(self) -> dict[str, float | None]:
        """Return the number of answers graded since `count_anew`, their rates of timeouts and errors, and mean seconds.

        Rates are None where nothing was graded.
        """
        grades, n = self._counted, len(self._counted)
        return {
            "grader/graded": n,
            "grader/timeout_rate": sum(g.status == "timeout" for g in grades) / n if n else None,
            "grader/error_rate": sum(g.status == "error" for g in grades) / n if n else None,
            "grader/seconds_mean": sum(g.seconds for g in grades) / n if n else None,
        }

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send(self, pair: tuple) -> None:
        if self._ready:
            with contextlib.suppress(OSError):  # the server is gone: the next one is sent all that waits
                self._connection.send(pair)

    def _kill(self) -> int | None:
        """Kill the server, if there is one, and its workers, which are one process group; return its exit code."""
        server, self._server, self._ready = self._server, None, False
        if server is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have just ended
                os.killpg(server.pid, signal.SIGKILL)
            return server.wait()

    # --- the thread that starts servers and hears them; the kernel kills a server when the thread that started it ends

    def _supervise(self) -> None:
        starts = 0
        try:
            while self._start():
                starts = 1 if self._listen() else starts + 1
                with self._changed:
                    code = self._kill()
                    self._connection.close()
                if starts >= MAX_STARTS:
                    raise UserError(f"Grader processes die (exit code {code}). Is memory or a limit short?")
        except BaseException as failure:  # handed to the calling thread, which would wait forever otherwise
            with self._changed:
                self._failure = failure
                self._kill()
                self._changed.notify_all()

    def _start(self) -> bool:
        """Start a server, unless the pool closes."""
        command = "from adaptive_reasoning.tasks.grader import serve; serve()"
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with self._changed:
            if self._closing:
                return False
            self._connection, theirs = Pipe()
            self._server = subprocess.Popen(
                [sys.executable, "-c", command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C goes to the run, which closes the pool
            )  # fmt: skip
            theirs.close()
        return True

    def _listen(self) -> bool:
        """Take the server's verdicts until it ends, and return whether there was one."""
        answered, patience = False, START_SECONDS + 3 * self.timeout
        with contextlib.suppress(EOFError, OSError):  # the server has ended
            self._connection.send((os.getpid(), self._targets, self.workers, self.timeout, self.memory_gib))
            if not self._connection.poll(START_SECONDS):
                raise UserError(f"A grader is not ready after {START_SECONDS:.0f} s. Use fewer --grader_workers.")
            if failure := self._connection.recv():
                raise UserError(f"A grader process cannot import {' or '.join(set(self._targets))}: {failure}")
            with self._changed:
                self._ready = True
                for pair in self._waiting:
                    self._send(pair)
            while True:
                waiting = bool(self._waiting)
                if self._connection.poll(patience):
                    self._finish(*self._connection.recv())
                    answered = True
                elif waiting:  # a worker was killed from outside while it held the lock of all
                    break
        return answered

    def _finish(self, pair: tuple, grade: Grade) -> None:
        with self._changed:
            if grade.status == "ok":  # a failure may be the machine's, so the next step tries again
                if len(self._cache) >= self.kept:
                    self._cache.clear()
                self._cache[pair] = grade
            for key in self._waiting.pop(pair):
                self._grades[key] = grade
            if not self._waiting:
                self._changed.notify_all()


def name_of(function: Callable | str) -> str:
    """Return the name by which a worker imports a function."""
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    assert "<" not in name and not name.startswith("__main__"), "workers have to import the check"
    return name


# --- the server and its workers

_checks: list[Callable] = []  # of a server, for answers and for whole questions; its workers inherit them


def serve() -> None:
    """Main function of the server, on the connection whose file descriptor is on the command line.

    It is sent the settings, then (answer, gold, type) tuples, and sends "" once it is ready or why it cannot be, then
    ((answer, gold, type), Grade) in any order. It ends with the connection, or where the pool breaks.
    """
    run = Connection(int(sys.argv[1]))
    parent, targets, workers, timeout, memory_gib = run.recv()
    _die_with(parent)
    try:
        from pebble import ProcessPool

        for target in dict.fromkeys(targets):
            getattr(module_of(target, {}, "check")[0], "warm_up", lambda: None)()
        _checks[:] = [named(target, {}, "check") for target in targets]
    except Exception as error:
        return run.send(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    gc.freeze()  # a collection in a worker would touch, and so copy, every page it shares with its parent
    pool = ProcessPool(workers, 0, _prepare, (run, os.getpid(), memory_gib), get_context("fork"))
    sending = threading.Lock()

    def schedule(pair: tuple, tries: int) -> None:
        # The deadline is the kernel's; pebble's is for a worker that ended with exit code 0, which it overlooks.
        future = pool.schedule(_check, (*pair[:2], timeout), timeout=timeout + LOST_SECONDS)
        future.add_done_callback(lambda future: finish(pair, tries, future))

    def finish(pair: tuple, tries: int, future) -> None:
        error = future.exception()
        code = getattr(error, "exitcode", None)
        if error is None:
            grade = future.result()
        elif code == -signal.SIGALRM:
            grade = Grade(0.0, "timeout", f"no verdict after {timeout:g} s", timeout)
        elif code is None and not isinstance(error, TimeoutError):
            return  # the pool is broken: the server ends, and the run sends the answer to the next one
        elif tries == 1:  # pebble may take the answer before it for the one that its worker died of
            schedule(pair, tries=2)
            return
        elif code == OUT_OF_MEMORY:
            grade = Grade(0.0, "error", "MemoryError")
        else:
            how = f"died with exit code {code}" if code else "ended without a verdict"
            grade = Grade(0.0, "error", f"the worker {how}")
        with sending:
            run.send((pair, grade))

    run.send("")
    with contextlib.suppress(EOFError):
        while pool.active:  # until it breaks, as after the death of an idle worker
            if run.poll(1.0):
                schedule(run.recv(), tries=1)


def _prepare(run: Connection, parent: int, memory_gib: float) -> None:
    """Set up a worker."""
    import resource

    _die_with(parent)
    run.close()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for the check to return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_gib:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = int(memory_gib * 2**30)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _check(answer: str, gold, timeout: float) -> Grade:
    """Grade one answer in a worker, which SIGALRM ends at the deadline."""
    random.seed(0)
    if "sympy" in sys.modules:  # it tries random points of its own
        sys.modules["sympy"].core.random.seed(0)
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, timeout)
    score, status, detail = 0.0, "ok", ""
    try:
        check = _checks[isinstance(gold, Question)]
        said = check(gold) if isinstance(gold, Response) else check(answer, gold)
        said = said.item() if hasattr(said, "item") else said  # of NumPy or torch
        if isinstance(said, Real) and math.isfinite(said):
            score = float(said)
        else:
            status, detail = "error", f"it returned {repr(said)[:MOST_CHARS]}, not a finite number"
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # what else is broken in there nobody knows
    except BaseException as error:  # SystemExit too: whatever the check raises is a verdict that was not reached
        status, detail = "error", _in_words(error)  # before the deadline: to print it may itself take forever
    signal.setitimer(signal.ITIMER_REAL, 0)
    return Grade(score, status, detail, time.monotonic() - start)


def _in_words(error: BaseException) -> str:
    """Return kind and text of an error, and the line that raised it."""
    name = type(error).__name__
    try:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{name}: {' '.join(str(error).split())}"[:MOST_CHARS]
            + f" ({os.path.basename(last.filename)}, line {last.lineno})"
        )
    except Exception:
        return name


def _die_with(parent: int) -> None:
    """On Linux, have the kernel kill this process when its parent dies. Elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
