"""The plan as text."""

from adaptive_reasoning.plan.fit import gib
from adaptive_reasoning.plan.hours import Assumptions, Hours
from adaptive_reasoning.plan.memory import PHASES, USABLE, Item, MemoryPlan, phase_bytes


def memory_lines(plan: MemoryPlan, memory: int | None) -> list[str]:
    """Return the table of the memory of one process: a line an item, a column a phase."""
    head = "one process" if memory is None else "each GPU"
    lines = [f"  memory plan of {head} (GiB), phase by phase", " " * 26 + "".join(f"{phase:>8}" for phase in PHASES)]
    lines += [item_line(item) for item in plan.items]
    totals = phase_bytes(plan.items)
    lines.append(f"    {'total':<22}" + "".join(f"{gib(totals[phase]):>8}" for phase in PHASES))
    of = "not compared with the memory of this machine"
    if memory is not None:
        of = f"of {gib(memory)} GiB, of which {gib(int(USABLE * memory))} are planned with"
    lines.append(f"    {'peak':<22}{gib(plan.peak):>8}   in the phase {plan.largest_phase!r}; {of}")
    if plan.host:
        lines.append("  memory of the machine for each process, GiB")
        lines += [f"    {item.name:<22}{gib(item.bytes):>8}   {item.how}" for item in plan.host]
    return lines


def item_line(item: Item) -> str:
    cells = "".join(f"{gib(item.bytes) if phase in item.phases else '.':>8}" for phase in PHASES)
    return f"    {item.name:<22}{cells}   {item.how}"


def duration(seconds: float) -> str:
    """Return seconds, or hours where they are many."""
    return f"{seconds:.1f} s" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def hours_lines(hours: Hours) -> list[str]:
    """Return the table of a step and of the run."""
    lines = ["  time of one step (not measured on a GPU: nominal figures and the assumptions below)"]
    lines += [f"    {line.name:<14}{duration(line.seconds):>10}   {line.how}" for line in hours.step]
    lines.append(f"    {'step':<14}{duration(hours.step_seconds):>10}")
    lines.append("  time of the run")
    lines += [f"    {line.name:<14}{duration(line.seconds):>10}   {line.how}" for line in hours.run]
    lines.append(f"    {'run':<14}{duration(hours.run_seconds):>10}")
    if hours.epoch:
        epoch = duration(hours.epoch * hours.step_seconds)
        lines.append(f"    {'one epoch':<14}{epoch:>10}   {hours.epoch:,} steps, training alone")
    else:
        lines.append("    one epoch     unknown: give the number of training questions with --questions")
    if hours.unknown:
        lines.append(f"    not counted: evaluation on {', '.join(hours.unknown)}; give --eval_responses")
    return lines


def assumption_lines(a: Assumptions, docs: dict[str, str]) -> list[str]:
    """Return every assumption with its value and what it means; each is an option."""
    lines = ["  assumptions (each is an option)"]
    return lines + [f"    --{name:<22}{value:<8g} {docs[name]}" for name, value in vars(a).items()]
