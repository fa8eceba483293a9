"""`--preflight`: the plan of a run, printed without loading a weight and without a GPU.

    python -m adaptive_reasoning.adaptthink --config experiments/adaptthink_1_5b.yaml --preflight --num_gpus 8
    make plan-adaptthink-1.5b GPU=a100 NUM_GPUS=8 NUM_NODES=2 ARGS="--max_new_tokens 8192 --decode_share 0.4"

Every algorithm and the supervised start understand it; what else stands on the line are options of the run and of the
plan (below).
"""

import dataclasses
import math
from dataclasses import dataclass

from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.plan.fit import plan_memory
from adaptive_reasoning.plan.hours import Assumptions, Hours, plan_hours
from adaptive_reasoning.plan.machine import Machine, find_machine
from adaptive_reasoning.plan.memory import LIBRARIES, MemoryPlan, Where
from adaptive_reasoning.plan.shapes import Shapes, find_config, shapes_of
from adaptive_reasoning.plan.table import assumption_lines, hours_lines, memory_lines
from adaptive_reasoning.run.options import field_docs, parse_args

CPU_ARENA = 4 << 30  # what a run on the CPU sets aside for keys and values
MAY_BE_ZERO = ("mean_response_tokens", "length_spread", "decode_overhead_ms", "questions", "eval_responses")


@dataclass
class Place:
    """Where the run is planned."""

    gpu: str = "h100"
    """GPU: h100, h200, h800, a100, a100-40, a800, rtx4090; or cpu."""
    num_gpus: int = 1
    """GPUs of one machine."""
    num_nodes: int = 1
    """Machines."""
    offload: bool = False
    """Launched with zero3_8gpu_offload.yaml, as by OFFLOAD=1, on one GPU too: ZeRO-3, its optimiser in CPU memory."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    machine: Machine
    where: Where
    shapes: Shapes
    memory: MemoryPlan
    hours: Hours


def plan_run(args, machine: Machine, a: Assumptions, offload: bool = False, shapes: Shapes | None = None) -> Plan:
    """Return the plan of a run with these options on a machine; the shapes are those of args.model.

    Raises:
        UserError: an unknown model, or too little memory; the message has the mend.
    """
    shapes = shapes or shapes_of(find_config(args.model))
    if offload:
        args.offload_optimizer = True
    where = Where(
        world_size=machine.processes,
        zero3=machine.processes > 1 or (offload and machine.gpu is not None),
        cuda=machine.gpu is not None,
        longest_prompt=args.max_prompt_tokens,
        memory=machine.memory,
        arena=None if machine.gpu else CPU_ARENA,
        libraries=0 if machine.gpu else LIBRARIES,
    )
    memory = plan_memory(args, shapes, where)
    return Plan(machine, where, shapes, memory, plan_hours(args, shapes, machine, a, memory.cache_bytes))


def parse_plan(cls: type, argv: list[str]):
    """Return (options of the run, Place, Assumptions) of a command line; its --preflight is left out.

    Raises:
        UserError: an unknown option, or a value that no plan can work with.
    """
    both = dataclasses.make_dataclass("Args", [], bases=(Place, Assumptions, cls))
    args = parse_args(both, [word for word in argv if word != "--preflight"])
    place, a = (
        kind(**{f.name: getattr(args, f.name) for f in dataclasses.fields(kind)}) for kind in (Place, Assumptions)
    )
    if not hasattr(args, "num_generations") and not hasattr(args, "batch_size"):
        raise UserError("--preflight plans training runs: those of an algorithm file, and of sft.")
    for name, value in vars(a).items():
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in MAY_BE_ZERO):
            raise UserError(f"--{name} {value}: must be a number greater than 0.")
        if name.endswith("share") and value > 1:
            raise UserError(f"--{name} {value}: is a share, at most 1.")
    return args, place, a


def print_plan(cls: type, argv: list[str]) -> None:
    """Print the plan of the run that this command line without --preflight would start."""
    args, place, a = parse_plan(cls, argv)
    machine = find_machine(place.gpu, place.num_gpus, place.num_nodes)
    config = find_config(args.model)
    plan = plan_run(args, machine, a, place.offload, shapes_of(config))
    docs, s = field_docs(Assumptions), plan.shapes
    assert set(docs) == {f.name for f in dataclasses.fields(Assumptions)}
    lines = [f"plan of {args.model} on {machine.title}"]
    lines.append(
        f"  {config.model_type}, {s.parameters / 1e9:.4g} B parameters, {s.layers} layers, hidden {s.hidden}, "
        f"vocabulary {s.vocab:,}; {args.dtype}; prompts to {args.max_prompt_tokens:,} tokens, responses to "
        f"{args.max_new_tokens:,}"
    )
    lines += memory_lines(plan.memory, machine.memory) + hours_lines(plan.hours) + assumption_lines(a, docs)
    print("\n".join(lines))
