"""One of two processes of the watch's test; what goes wrong is its argument. RANK, WORLD_SIZE, MASTER_* are set."""

import os
import signal
import sys
import time

from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.learner.runtime import all_gather, make_accelerator, on_main
from adaptive_reasoning.learner.watch import Watch
from adaptive_reasoning.run.options import RunArgs

LIMIT = 6.0


def fail(text: str):
    raise UserError(text)


def main() -> None:
    what = sys.argv[1]
    accelerator = make_accelerator(RunArgs(dtype="fp32", patience=LIMIT))
    rank = accelerator.process_index
    all_gather(accelerator, rank)
    watch = Watch(accelerator, LIMIT)
    watch.phase("rollout", 17)
    if what == "hangs":
        if rank == 1:
            time.sleep(60)
        watch.phase("update", 17)
        all_gather(accelerator, rank)
    elif what == "is killed":
        time.sleep(1)  # has shown itself
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    elif what == "fails":
        if rank == 1:
            error = RuntimeError("out of memory")
            watch.stop(error)
            raise error
        time.sleep(60)
    else:
        assert what == "cannot write"
        try:
            on_main(accelerator, lambda: fail("the disk is full"))
        except UserError as error:
            watch.stop(error)
            raise


if __name__ == "__main__":
    run_cli(main)
