"""UserError: a mistake the user can mend, shown as one message instead of a traceback."""

import sys


class UserError(ValueError):
    """What is wrong, where (file, line, key or token), and the mend."""


class ElsewhereError(UserError):
    """Another process met an error, and prints it; this one ends with it."""


def run_cli(main) -> None:
    """Run `main()`. A UserError ends the process with its message alone and code 2; a bug keeps its traceback."""
    try:
        main()
    except ElsewhereError:
        sys.exit(2)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
