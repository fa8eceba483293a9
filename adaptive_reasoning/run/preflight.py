"""Preflight: what a run found and what it will need, printed before anything heavy starts; it stops what cannot work.

Everything is computed from the model's config, the options and a few numbers, without loading a weight. The memory plan
is that of `plan/`; `--preflight` prints it for any other machine, and the hours.
"""

from copy import copy
from dataclasses import dataclass

from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.plan.fit import gib, plan_memory
from adaptive_reasoning.plan.hours import checkpoint_bytes
from adaptive_reasoning.plan.memory import LIBRARIES, Where
from adaptive_reasoning.plan.shapes import shapes_of
from adaptive_reasoning.plan.table import memory_lines


@dataclass(frozen=True)
class Preflight:
    """What a run is told: the table for the reader, and how much the rollout may take."""

    table: str
    rows: int  # responses that decode side by side on one process
    cache_bytes: int  # of the KV arena


def checkpoints_ahead(max_steps: int, save_every: int, keep: int, done: int = 0, there: int = 0) -> int:
    """Return how many more checkpoints have to find room on the disk at the same time.

    Args:
        keep: the newest so many are kept (0: all); the next one is written before the oldest is deleted.
        done: steps already taken; `there` checkpoints lie on the disk.
    """
    if done >= max_steps:
        return 0
    saves = max_steps // save_every - done // save_every if save_every else 0
    saves += not save_every or max_steps % save_every != 0  # the last step is always saved
    most = there + saves
    return max(0, (min(most, keep + 1) if keep else most) - there)


def preflight(
    args,
    *,
    model_config,
    device: str,
    world_size: int = 1,
    zero3: bool = False,
    device_memory: int | None = None,
    arena: int | None = None,
    offload: bool = False,
    questions: int,
    skipped: int = 0,
    longest_prompt: int,
    findings: dict[str, str] | None = None,
    disk_free: int | None = None,
    steps_done: int = 0,
    checkpoints_there: int = 0,
) -> Preflight:
    """Return the table of what was found and planned, and the size of the KV arena that fits.

    Args:
        args: the run's options.
        model_config: `transformers` config of the model; nothing is loaded.
        device: what the run computes on, in words, e.g. "NVIDIA H100 80GB HBM3" or "CPU".
        world_size: processes; zero3: whether they share the learner's state.
        device_memory: bytes of one GPU, None where nothing is checked against it (CPU).
        arena: most bytes the KV arena may take, or None for as much as fits.
        offload: the launch file keeps the optimiser in CPU memory.
        questions: training questions left; skipped: those left out because their prompt is too long.
        longest_prompt: tokens of the longest prompt that is left.
        findings: further lines as {name: text}: template, control tokens, evaluation sets, a run that is continued.
        disk_free: free bytes where checkpoints go, or None.
        steps_done, checkpoints_there: of a run that is continued.

    Raises:
        UserError: an unsupported model, no questions, too little memory or disk space; the message has the mend.
    """
    shapes = shapes_of(model_config)
    if questions < 1:
        raise UserError(
            f"{args.data}: no question is left, {skipped} have a prompt of more than --max_prompt_tokens "
            f"{args.max_prompt_tokens} tokens. Raise the limit or give other questions with --data."
        )
    how = "" if world_size == 1 else ", ZeRO-3" if zero3 else ", data parallel"
    memory = "" if device_memory is None else f", {gib(device_memory)} GiB" + " each" * (world_size > 1)
    lines = [
        ("machine", f"{world_size} process{'es' * (world_size > 1)}{how}; {device}{memory}"),
        ("model", f"{args.model}: {model_config.model_type}, {shapes.parameters / 1e9:.4g} B parameters, supported"),
        ("", f"{shapes.layers} layers, hidden {shapes.hidden}, vocabulary {shapes.vocab:,}, {args.dtype}"),
        *(findings or {}).items(),
        ("questions", f"{questions:,}" + f", {skipped:,} more left out for length" * (skipped > 0)),
        ("longest", length_text(longest_prompt, args.max_new_tokens, model_config.max_position_embeddings)),
    ]
    saves = checkpoints_ahead(
        args.max_steps, args.save_every, args.keep_checkpoints, done=steps_done, there=checkpoints_there
    )
    size = checkpoint_bytes(args, shapes, zero3)
    if disk_free is not None:
        if saves * size > disk_free:
            raise UserError(
                f"{saves} more checkpoints of {gib(size)} GiB need {gib(saves * size)} GiB, {gib(disk_free)} GiB are "
                f"free at {args.output_dir}. Keep fewer (--keep_checkpoints), save less often (--save_every) or choose "
                "another --output_dir."
            )
        lines.append(("disk", f"{saves} checkpoints x {gib(size)} GiB, {gib(disk_free)} GiB free"))

    if offload:
        args = copy(args)
        args.offload_optimizer = True
    cuda = device_memory is not None
    where = Where(world_size, zero3, cuda, longest_prompt, device_memory, arena, 0 if cuda else LIBRARIES)
    plan = plan_memory(args, shapes, where)
    table = ["preflight", *(f"  {name:<16}{text}" for name, text in lines), *memory_lines(plan, device_memory)]
    return Preflight("\n".join(table), plan.rows, plan.cache_bytes)


def length_text(longest_prompt: int, max_new_tokens: int, positions: int) -> str:
    """Return the line about sequence lengths, with a warning where the model has not seen such positions."""
    longest = longest_prompt + max_new_tokens
    text = f"{longest_prompt:,} prompt + {max_new_tokens:,} response tokens = {longest:,}"
    if longest > positions:
        return f"{text}; WARNING: the model's config has {positions:,} positions, lower --max_new_tokens"
    return f"{text} of the model's {positions:,} positions"
