"""Watch: what every process is doing, so that one that hangs or dies ends all of them with its name instead of a wait.

A thread on every process writes its phase and a sign of life into the store of the process group, and reads those of
the others. All processes go through the same phases and collective operations in the same order, so the one that has
come to the fewest is the one that the others wait for. The thread has its own connection: it works while the main
thread waits in a collective operation, and that is what it is for.

    watch = Watch(accelerator, limit=7200)
    watch.phase("rollout", step=17)

It ends the process with code 3 when
- one process is still in a phase `limit` seconds after the first has left it,
- one has given no sign of life for as long, five minutes at the most: killed, or its machine is gone,
- one has told that an error ends it, and this one has not ended by itself a while later.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator

from adaptive_reasoning.learner import runtime

SILENCE = 300.0  # seconds without a sign of life after which a process counts as gone
INTERVAL = 10.0  # seconds between signs of life
CODE = 3  # of a process that the watch ends


class Watch:
    """The watch of one process; without others there is nothing to watch.

    Args:
        limit: seconds that the others may wait for a process.
    """

    def __init__(self, accelerator: Accelerator, limit: float):
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.limit, self.silence = limit, min(limit, SILENCE)
        self.interval = min(INTERVAL, limit / 10)
        self.entered, self.now = 0, ("start", 0)  # phases entered so far; (name, step) of this one
        self.beats, self.waiting = 0, (-1, 0.0)
        self.since = time.monotonic()
        self.stopping = threading.Event()
        self.thread = None
        if self.ranks > 1:
            self.store = dist.distributed_c10d._get_default_store().clone()
            self.seen = {r: (None, time.monotonic()) for r in range(self.ranks)}  # last state of each, and since when
            self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self.thread.start()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stop(error)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Where this process ends by an error, tell the others, which would wait for it."""
        try:
            yield
        except BaseException as error:
            self.stop(error)
            raise

    def phase(self, name: str, step: int = 0) -> None:
        """Note that this process enters a phase. All processes have to enter the same ones in the same order."""
        self.entered, self.now, self.since = self.entered + 1, (name, step), time.monotonic()

    def stop(self, error: BaseException | None = None) -> None:
        """End the watch; with an error, tell the others that this process ends."""
        self.stopping.set()
        if self.thread is None:
            return
        self.thread.join(5 * self.interval + 1)
        try:
            self._write(None if error is None else f"{type(error).__name__}: {str(error)[:500]}", ended=True)
        except dist.DistError:
            pass  # the process that keeps the store has ended before this one

    def _write(self, error: str | None = None, ended: bool = False) -> None:
        name, step = self.now
        self.beats += 1
        state = {"beat": self.beats, "entered": self.entered + runtime.arrivals, "phase": name, "step": step}
        state["error"] = error
        state |= {"seconds": time.monotonic() - self.since, "ended": ended}
        self.store.set(f"watch/{self.rank}", json.dumps(state))

    def _run(self) -> None:
        while not self.stopping.wait(self.interval):
            try:
                self._write()
                problem = self._look()
            except dist.DistError as error:  # the store is kept by the first process or its launcher
                problem = f"process 0, which keeps the store of the run, does not answer any more ({error})"
            if problem and not self.stopping.is_set():
                print(f"error: {problem}", file=sys.stderr, flush=True)
                os._exit(CODE)

    def _look(self) -> str | None:
        """Return what is wrong, or None."""
        now, states = time.monotonic(), {}
        for r in range(self.ranks):
            key = f"watch/{r}"
            state = json.loads(self.store.get(key)) if self.store.check([key]) else None
            if state != self.seen[r][0]:
                self.seen[r] = (state, now)
            states[r] = state
        here = {r: state for r, state in states.items() if state and not state["ended"]}
        for r, state in states.items():
            quiet = now - self.seen[r][1]
            if state and state["error"] and quiet > 3 * self.interval + 1:  # time for this process to end by itself
                return f"process {r} ended {describe(state)}: {state['error']}"
            if quiet > self.silence and not (state and state["ended"]):
                last = describe(state) if state else "before its first phase"
                return f"process {r} has given no sign of life for {span(quiet)}; it was last {last}"
        first = max((state["entered"] for state in here.values()), default=0)
        late = {r: state for r, state in here.items() if state["entered"] < first}
        if late:
            slowest = min(state["entered"] for state in late.values())
            waited = self._waited(slowest)
            # The late one lets the others speak first: its end breaks the operation that they wait in.
            if waited > self.limit + (3 * self.interval if self.rank in late else 0):
                named = [f"process {r} has been {describe(s)} for {span(s['seconds'])}"
                         for r, s in late.items() if s["entered"] == slowest]  # fmt: skip
                return (
                    f"{'; '.join(named)}, and the others have waited for {span(waited)}, longer than --patience "
                    f"{self.limit:g}. The same command continues the run from its newest checkpoint."
                )
        return None

    def _waited(self, slowest: int) -> float:
        """Return the seconds for which this thread has seen the slowest process at that place and another beyond it."""
        if self.waiting[0] != slowest:
            self.waiting = (slowest, time.monotonic())
        return time.monotonic() - self.waiting[1]


def describe(state: dict) -> str:
    """Return "in phase rollout, step 17"."""
    return f"in phase {state['phase']}" + (f", step {state['step']}" if state["step"] else "")


def span(seconds: float) -> str:
    """Return a time in words: 45 s, 12 min, 2.0 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
