"""Ask a model: its answer as it is written, thinking dim and answer bright, then the mode and how likely each was.

    make ask RUN=runs/quickstart Q="3*7+4-9"
    python -m adaptive_reasoning.ask RUN_OR_MODEL --question "How many ...?" --mode skip

RUN_OR_MODEL is the folder of a run (its kept or newest model, with its format and sampling), a checkpoint, a model as a
folder, hub name or GGUF file. Without a question it reads questions from the terminal until Ctrl-D.
"""

import signal
import sys

from adaptive_reasoning.errors import INTERRUPTED, run_cli


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may stop reading
    sys.stdout.reconfigure(errors="replace")  # and need not read UTF-8
    try:
        from adaptive_reasoning.ask.session import hold  # torch takes seconds, in which Ctrl-C is no traceback either

        hold(sys.argv[1:])
    except KeyboardInterrupt:
        print(flush=True)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run_cli(main)
