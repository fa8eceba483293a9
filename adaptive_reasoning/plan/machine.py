"""Machines: the GPUs that are planned with, with their nominal figures, and how many of them there are."""

from dataclasses import dataclass

from adaptive_reasoning.core.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Figures are the maker's, dense (no sparsity); what is reached of them is an assumption."""

    title: str
    memory: float  # GiB that a program sees
    bandwidth: float  # of its memory, bytes per second
    flops: float  # bf16 matrix products, FLOP per second
    link: float  # to each other GPU of the machine, bytes per second and direction


GPUS = {
    "h100": Gpu("H100 SXM 80GB", 79.1, 3.35e12, 989e12, 450e9),
    "h200": Gpu("H200 SXM 141GB", 139.8, 4.8e12, 989e12, 450e9),
    "h800": Gpu("H800 SXM 80GB", 79.1, 3.35e12, 989e12, 200e9),
    "a100": Gpu("A100 SXM 80GB", 79.2, 2.04e12, 312e12, 300e9),
    "a100-40": Gpu("A100 SXM 40GB", 39.4, 1.56e12, 312e12, 300e9),
    "a800": Gpu("A800 SXM 80GB", 79.2, 2.04e12, 312e12, 200e9),
    "rtx4090": Gpu("RTX 4090 24GB", 23.6, 1.01e12, 165e12, 25e9),
}


@dataclass(frozen=True)
class Machine:
    """What a plan is for: `nodes` machines with `gpus` GPUs each; or one process on a CPU (`gpu` None)."""

    gpu: Gpu | None
    gpus: int = 1  # of one machine
    nodes: int = 1

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def memory(self) -> int | None:
        """Bytes of one GPU; None on the CPU, where nothing is checked."""
        return None if self.gpu is None else int(self.gpu.memory * GIB)

    @property
    def title(self) -> str:
        if self.gpu is None:
            return "1 process on the CPU"
        many = f"{self.nodes} machines x " if self.nodes > 1 else ""
        zero3 = ", ZeRO-3" if self.processes > 1 else ""
        return f"{many}{self.gpus} x {self.gpu.title}{zero3}"


def find_machine(gpu: str, gpus: int, nodes: int) -> Machine:
    """Return the machine of a GPU's short name ("cpu" for none) and of numbers.

    Raises:
        UserError: an unknown name, with the known ones, or numbers that no machine has.
    """
    for option, number in (("num_gpus", gpus), ("num_nodes", nodes)):
        if number < 1:
            raise UserError(f"--{option} {number}: must be greater than 0. For a plan without a GPU give --gpu cpu.")
    if gpu == "cpu":
        if gpus * nodes > 1:
            raise UserError(f"--gpu cpu: one process is planned, not {gpus * nodes}. Leave --num_gpus at 1.")
        return Machine(None)
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: not a GPU that a plan knows. Known are {', '.join(GPUS)}, and cpu.")
    return Machine(GPUS[gpu], gpus, nodes)
