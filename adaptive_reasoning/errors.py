"""UserError: a mistake the user can mend, shown as one message instead of a traceback."""

import sys


class UserError(ValueError):
    """What is wrong, where (file, line, key or token), and the mend."""


def run_cli(main) -> None:
    """Run `main()`. A UserError ends the process with its message alone and code 2; a bug keeps its traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
