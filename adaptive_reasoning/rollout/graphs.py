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


def capture_on_cuda(step: Callable[[], None], pool) -> Callable[[], None]:
    """Run a step a few times on a stream of its own, capture it, and return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread (NCCL's watchdog) may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Graphs:
    """Graphs of one engine.

    Args:
        capture: makes the replay of a step; `capture_on_cuda`, or what stands in for it in a test.
        pool: the memory the graphs share: only one of them runs at a time.
    """

    def __init__(self, capture: Callable = capture_on_cuda, pool=None):
        self.capture = capture
        self.pool = torch.cuda.graph_pool_handle() if pool is None and capture is capture_on_cuda else pool
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
            self.replays.clear()
            self.held = list(buffers)
        for size in sorted(sizes, reverse=True):
            if (sampling, size) not in self.replays:
                self.replays[sampling, size] = self.capture(lambda size=size: step(size), self.pool)

    def replay(self, sampling: Sampling, size: int) -> None:
        self.replays[sampling, size]()
