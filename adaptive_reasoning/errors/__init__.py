"""UserError: a mistake the user can mend, shown as one message instead of a traceback."""

import atexit
import os
import signal
import sys
import threading

from tqdm import tqdm

INTERRUPTED = 130  # what a shell calls the end by Ctrl-C


class UserError(ValueError):
    """What is wrong, where (file, line, key or token), and the mend."""


class ElsewhereError(UserError):
    """Another process met an error, and prints it; this one ends with it."""


def run_cli(main) -> None:
    """Run `main()`. A UserError ends the process with its message alone and code 2; a bug keeps its traceback.

    Ctrl-C ends it with code 130 once what is open is closed, the graders among it; a second one at once. Whatever was
    being written is whole or goes with the next start, as after any other death.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except ElsewhereError:
        sys.exit(2)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        before = signal.getsignal(signal.SIGINT)  # stays: another one would cut through the end of the interpreter
        # Which gives handlers back to the system before it is through, but not "ignore".
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        print("interrupted; the same command continues from what was saved", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    finally:
        if signal.getsignal(signal.SIGINT) is not before:  # for callers that go on, as tests do
            signal.signal(signal.SIGINT, before)


def _interrupt(number, frame) -> None:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    raise KeyboardInterrupt


def say(text: str) -> None:
    """Print above the progress bar, at once: a log file read while the run goes on is never a step behind."""
    tqdm.write(text)
    sys.stdout.flush()
