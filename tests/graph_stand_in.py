"""A CUDA graph on the CPU: records the operations of a step and plays them again on the same tensors.

As with the real thing, every number that came from Python is frozen at its value of the capture, every buffer is found
by its address, and a step that reads a tensor back to the host cannot be captured.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Recording(TorchDispatchMode):
    """Runs what happens inside and notes it down."""

    def __init__(self):
        super().__init__()
        self.calls = []  # (function, arguments, keywords, what it returned)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in READS, f"{function} reads a tensor back in the middle of a step"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        new = {}  # id of a tensor of the recording: the one that stands for it now

        def current(x):
            return new.get(id(x), x) if isinstance(x, torch.Tensor) else x

        with torch.inference_mode():
            for function, args, kwargs, out in self.calls:
                again = function(*tree_map(current, args), **tree_map(current, kwargs))
                pairs = zip(out, again) if isinstance(out, (tuple, list)) else [(out, again)]
                new.update((id(a), b) for a, b in pairs if isinstance(a, torch.Tensor))


class StandIn:
    """`capture` of `Graphs`: counts captures, replays and how often all graphs were given up."""

    def __init__(self):
        self.captures, self.replays, self.forgotten = 0, [], 0

    def forget(self) -> None:
        self.forgotten += 1

    def __call__(self, step):
        with Recording() as recording:
            step()
        self.captures += 1
        name = self.captures

        def replay():
            self.replays.append(name)
            recording.replay()

        return replay
