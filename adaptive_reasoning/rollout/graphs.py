"""CUDA graphs of the decode step: one for each batch size of a short list, captured once and replayed.

A decode step is some three hundred launches; at small batches the launches take longer than the work. A graph holds
them all. It also holds the addresses it was captured with, so graphs are thrown away when one of the buffers they read
is another one: the cache, the page table, the rows, the rotary angles. Weights are refreshed in place and stay valid.

A batch of n rows runs in the graph of the next larger size; rows n and up of it are finished ones, whose pages are the
trash page and whose results nobody reads.
"""

from collections.abc import Callable

import torch

from adaptive_reasoning.rollout.sampler import Sampling

WARM_UPS = 2  # kernels are compiled and the matrix library takes its work space before a capture


def buckets(rows: int) -> list[int]:
    """Return the batch sizes that get a graph: 1, 2, 4 ... 32, then every 32, and `rows` itself."""
    sizes = [1 << i for i in range(5)] + list(range(32, rows, 32))
    return [size for size in sizes if size < rows] + [rows]


class Capture:
    """Captures steps on CUDA: makes the replay of a step. The graphs share memory: only one of them runs at a time.

    Warm-up and capture share a stream, so that the matrix library's work space for it is taken before the capture and
    does not become part of the graphs' memory.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.forget()

    def forget(self) -> None:
        """Begin with fresh memory: torch refuses a pool all of whose graphs are gone."""
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run a step a few times, capture it, and return what replays it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread (NCCL's watchdog) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            step()
        return graph.replay


class Graphs:
    """Graphs of one engine.

    Args:
        capture: makes the replay of a step; None: a `Capture`. A test has something that stands in for it.
    """

    def __init__(self, capture=None):
        self.capture = capture or Capture()
        self.replays: dict[tuple[Sampling, int], Callable[[], None]] = {}
        self.held: list[object] = []  # the buffers that the graphs read

    def prepare(self, buffers: list[object], sampling: Sampling, sizes: list[int], step: Callable[[int], None]) -> None:
        """Capture what is missing, the largest first, so that the smaller ones fit into its memory.

        To be called while all rows are finished ones, because a warm-up runs the step.

        Args:
            buffers: everything a step reads and writes at a fixed address.
            step: runs a decode step of so many rows.
        """
        if [id(x) for x in buffers] != [id(x) for x in self.held]:
            if self.replays:
                self.replays.clear()
                self.capture.forget()
            self.held = list(buffers)
        for size in sorted(sizes, reverse=True):
            if (sampling, size) not in self.replays:
                self.replays[sampling, size] = self.capture(lambda size=size: step(size))

    def replay(self, sampling: Sampling, size: int) -> None:
        self.replays[sampling, size]()
