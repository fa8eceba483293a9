"""Kernels: one function per operation, the same signature whatever runs it.

Every operation has a plain-torch implementation that works on any device and dtype and serves as the reference of the
tests. `ADAPTIVE_REASONING_KERNELS` is the one switch: `torch` takes the plain-torch implementation everywhere, `auto`
(the default) takes the fastest one there is for the device of the inputs.
"""

import os

from adaptive_reasoning.kernels.token_logprobs import token_logprobs as torch_token_logprobs

from adaptive_reasoning.errors import UserError

SWITCH = "ADAPTIVE_REASONING_KERNELS"


def wanted() -> str:
    """Return "auto" or "torch", from the environment.

    Raises:
        UserError: the variable holds anything else.
    """
    value = os.environ.get(SWITCH, "auto")
    if value not in ("auto", "torch"):
        raise UserError(f"{SWITCH}={value}: takes auto or torch.")
    return value


def token_logprobs(hidden, weight, targets, temperature=1.0, chunk=None, with_entropy=False):
    """Log-probs (and entropies) of given tokens from hidden states: see `kernels/token_logprobs.py`."""
    wanted()  # a misspelt switch is an error also where there is nothing to choose from
    return torch_token_logprobs(hidden, weight, targets, temperature, chunk, with_entropy)
