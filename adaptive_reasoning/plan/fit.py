"""Does it fit, and if not, which option mends it: every mend is applied to the plan before it is proposed."""

from copy import copy
from dataclasses import dataclass, replace

from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.plan.memory import (
    COLUMN_STEP,
    GIB,
    TRAINED,
    USABLE,
    Item,
    MemoryPlan,
    Where,
    arena_growth,
    fixed_items,
    kv_bytes_per_token,
    phase_bytes,
    rolls_out,
)
from adaptive_reasoning.plan.shapes import Shapes

FEW_ROWS = 32  # proposed where the logits of all rows are what does not fit
MOST_PROCESSES = 64


@dataclass(frozen=True)
class Mend:
    """A change that makes a plan fit: new values of options, and a new number of processes (0: as before)."""

    options: dict
    processes: int = 0

    def text(self, args, where: Where) -> str:
        """Return what to do, as a user types it."""
        words = []
        for name, value in self.options.items():
            old = getattr(args, name, False)
            if name == "offload_optimizer" and (where.zero3 or self.processes):
                words.append("launch with experiments/launch/zero3_8gpu_offload.yaml (optimiser in CPU memory)")
            elif isinstance(value, bool):
                words.append(f"set --{name} {str(value).lower()}")
            else:
                words.append(f"lower --{name} from {old:,} to {value:,} or less")
        if self.processes:
            words.append(f"take {self.processes} GPUs (NUM_GPUS=, NUM_NODES=), which share the optimiser")
        text = ", ".join(words)
        return text[0].upper() + text[1:]

    def apply(self, args, where: Where) -> tuple[object, Where]:
        """Return the options and the place with the change made."""
        args = copy(args)
        for name, value in self.options.items():
            setattr(args, name, value)
        return args, replace(where, world_size=self.processes, zero3=True) if self.processes else where


def gib(number: float) -> str:
    """Return bytes in GiB with two digits; what is smaller than that but not nothing shows as <0.01."""
    return "<0.01" if 0 < number < 0.005 * GIB else f"{number / GIB:.2f}"


def columns_of(args, where: Where) -> int:
    """Return the columns of the longest row, prompt included."""
    return -(-(where.longest_prompt + args.max_new_tokens) // COLUMN_STEP) * COLUMN_STEP


def row_bytes(args, shapes: Shapes, where: Where) -> tuple[int, int]:
    """Return the bytes of the longest row, and what it takes for a moment while slots grow by copying."""
    if not rolls_out(args):
        return 0, 0
    per_kv = kv_bytes_per_token(shapes, 2 if args.dtype == "bf16" else 4)
    columns = columns_of(args, where)
    growing = 0 if where.cuda else per_kv * arena_growth(where.longest_prompt, columns)[0]
    return per_kv * columns, growing


def needed(args, shapes: Shapes, where: Where) -> int:
    """Return the least memory a process needs: its largest phase with one row of the longest kind."""
    row, growing = row_bytes(args, shapes, where)
    totals = phase_bytes(fixed_items(args, shapes, where)[0])
    return max(size + row * (phase in TRAINED) + growing * (phase == "rollout") for phase, size in totals.items())


def fits(args, shapes: Shapes, where: Where) -> bool:
    return where.memory is None or needed(args, shapes, where) <= int(USABLE * where.memory)


def plan_memory(args, shapes: Shapes, where: Where) -> MemoryPlan:
    """Return the memory plan of one process.

    Args:
        args: `dtype`, `max_new_tokens`, `rollout_rows`, `tokens_per_micro_batch`, `gradient_checkpointing`, and where
            an algorithm has them `kl_coef`, `critic_learning_rate`, `offload_optimizer`, the budgets of a dialogue.

    Raises:
        UserError: it does not fit; the message says which options mend it.
    """
    if not fits(args, shapes, where):
        raise UserError(too_large(args, shapes, where))
    items, host = fixed_items(args, shapes, where)
    row, growing = row_bytes(args, shapes, where)
    columns, rows, room = columns_of(args, where), args.rollout_rows, where.arena
    if where.memory is not None and rolls_out(args):
        totals = phase_bytes(items)
        left = int(USABLE * where.memory) - max(totals[phase] for phase in TRAINED)
        if growing:
            left = min(left, int((int(USABLE * where.memory) - totals["rollout"]) * row / (row + growing)))
        room = left if room is None else min(room, left)
    if not rolls_out(args):
        return MemoryPlan(items, host, 0, 0)
    if room is not None:
        rows = min(rows, room // row)
    if rows < 1:
        raise UserError(
            f"one response of {where.longest_prompt + args.max_new_tokens:,} tokens (prompt included) needs {gib(row)} "
            f"GiB of cache, {gib(room)} GiB are set aside for it. "
            f"Lower --max_new_tokens (now {args.max_new_tokens:,})."
        )
    # Pages are given out as they are needed, so those left over from whole rows are of use as well.
    cache = rows * row if not where.cuda or room is None else min(room, args.rollout_rows * row)
    how = f"{rows} rows x {columns:,} tokens x {row / columns / 1024:g} KiB"
    how += f"; {args.rollout_rows} were asked for" * (rows < args.rollout_rows)
    items.append(Item("KV arena", cache, TRAINED, how))
    if growing:
        items.append(Item("KV arena growing", rows * growing, ("rollout",), "the narrower one, while it is copied"))
    return MemoryPlan(items, host, rows, cache)


# --------------------------------------------------------------------------------------------------------------- mends


def too_large(args, shapes: Shapes, where: Where) -> str:
    """Return the message: what is needed, the largest parts, and what mends it."""
    items = fixed_items(args, shapes, where)[0]
    totals = phase_bytes(items)
    phase = max(totals, key=totals.get)
    most = sorted((item for item in items if phase in item.phases), key=lambda item: -item.bytes)[:2]
    parts = ", ".join(f"{item.name} {gib(item.bytes)}" for item in most)
    what = (
        f"the run needs at least {gib(needed(args, shapes, where))} GiB on each GPU, "
        f"{gib(int(USABLE * where.memory))} GiB of it can be used (the largest parts: {parts} GiB)."
    )
    found = mends(args, shapes, where)
    if not found:
        return f"{what} Take a smaller model (--model) or GPUs with more memory: {MOST_PROCESSES} of these do not do."
    first, *others = (mend.text(args, where) for mend in found)
    return f"{what} {', or '.join([first, *map(lower_first, others)])}."


def lower_first(text: str) -> str:
    return text[0].lower() + text[1:]


def mends(args, shapes: Shapes, where: Where) -> list[Mend]:
    """Return the changes to propose, each of which makes the plan fit.

    First one of options that change neither result nor machine; where none does, a shorter response and more GPUs.
    """

    def works(mend: Mend) -> bool:
        changed, place = mend.apply(args, where)
        return fits(changed, shapes, place)

    free = harmless(args, shapes, where)
    singles = [Mend(dict([change])) for change in free.items()]
    together = [Mend(dict(list(free.items())[:count])) for count in range(2, len(free) + 1)]
    for mend in [*singles, *together]:
        if works(mend):
            return [leanest(mend, args, shapes, where)]
    everything, found = dict(free), []
    shorter = largest(lambda n: works(Mend({**shortened(everything, args, where, n), "max_new_tokens": n})),
                      1, args.max_new_tokens - 1)  # fmt: skip
    if shorter:
        shortest = {"max_new_tokens": shorter, **shortened(everything, args, where, shorter)}
        found.append(leanest(Mend(shortest), args, shapes, where, keep=("max_new_tokens",)))
    on_gpu = {name: value for name, value in everything.items() if name != "offload_optimizer"}
    processes = where.world_size
    while (processes := processes * 2) <= MOST_PROCESSES:
        for options in ({}, on_gpu, {**everything, "offload_optimizer": True}):
            if works(mend := Mend(options, processes)):
                return [*found, leanest(mend, args, shapes, where)]
    return found


def harmless(args, shapes: Shapes, where: Where) -> dict:
    """Return {option: value} of what saves memory and changes no result, the cheapest first."""
    longest = where.longest_prompt + args.max_new_tokens
    found = {}
    if args.tokens_per_micro_batch > longest:
        found["tokens_per_micro_batch"] = longest
    if not args.gradient_checkpointing:
        found["gradient_checkpointing"] = True
    if args.rollout_rows > FEW_ROWS and rolls_out(args):
        found["rollout_rows"] = FEW_ROWS
    # Under ZeRO-3 the launch file decides, in one process the option of the learner, where there is one.
    if not getattr(args, "offload_optimizer", not where.zero3):
        found["offload_optimizer"] = True
    return found


def shortened(options: dict, args, where: Where, max_new_tokens: int) -> dict:
    """Return the options with the micro-batch of a shorter longest response, which is what then fits."""
    tokens = where.longest_prompt + max_new_tokens
    if args.tokens_per_micro_batch <= tokens:
        return options
    return {**options, "tokens_per_micro_batch": tokens}


def leanest(mend: Mend, args, shapes: Shapes, where: Where, keep: tuple[str, ...] = ()) -> Mend:
    """Return the mend without what it does not need, with the largest micro-batch that fits: small ones are slow."""

    def works(options: dict) -> bool:
        changed, place = Mend(options, mend.processes).apply(args, where)
        return fits(changed, shapes, place)

    options, name = dict(mend.options), "tokens_per_micro_batch"
    for other in reversed([key for key in mend.options if key not in keep]):
        fewer = {key: value for key, value in options.items() if key != other}
        options = fewer if works(fewer) else options
    if name in options:
        options[name] = largest(lambda n: works({**options, name: n}), options[name], args.tokens_per_micro_batch)
    return Mend(options, mend.processes)


def largest(works, low: int, high: int) -> int:
    """Return the largest number in low .. high that works, of which all smaller ones do as well; 0 if none does."""
    if high < low or not works(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle) else (low, middle - 1)
    return low
