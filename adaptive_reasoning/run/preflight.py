"""Preflight: what a run found and what memory it needs, said before anything heavy starts; it stops what cannot work.

Everything is computed from the model's config and the options, without loading a weight. `--preflight` prints the
memory plan of any other machine:

    python -m adaptive_reasoning.METHOD --config experiments/NAME.yaml --preflight --gpu h100 --num_gpus 8
    make plan-NAME GPU=a100 NUM_GPUS=8 NUM_NODES=2 ARGS="--max_new_tokens 8192"     # of `make train-NAME`
"""

from dataclasses import dataclass

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout.engine import CPU_CACHE_BYTES
from adaptive_reasoning.run.memory import (
    GIB,
    PHASES,
    USABLE,
    Holds,
    Item,
    MemoryPlan,
    Where,
    checkpoint_bytes,
    gib,
    merged_bytes,
    phase_bytes,
    plan_memory,
    trained_parameters,
)
from adaptive_reasoning.run.shapes import Shapes, find_config, shapes_of

GPUS = {  # GiB that a program sees
    "h100": 79.1, "h200": 139.8, "h800": 79.1, "a100": 79.2, "a100-40": 39.4, "a800": 79.2, "rtx4090": 23.6,
}  # fmt: skip


def preflight(
    args,
    holds: Holds,
    where: Where,
    *,
    model_config,
    device: str,
    questions: int,
    skipped: int = 0,
    findings: dict[str, str] | None = None,
    disk_free: int | None = None,
    steps_done: int = 0,
    checkpoints_there: int = 0,
) -> tuple[str, MemoryPlan]:
    """Return (table of what was found and planned, memory plan with the KV cache that fits).

    Args:
        args: the run's options; holds: what it holds beside the policy; where: the process that was found.
        model_config: `transformers` config of the model; nothing is loaded.
        device: what the run computes on, in words, e.g. "NVIDIA H100 80GB HBM3" or "CPU".
        questions: training questions left; skipped: those left out because their prompt is too long.
        findings: further lines as {name: text}: template, control tokens, evaluation sets, a run that is continued.
        disk_free: free bytes where checkpoints go, or None.
        steps_done, checkpoints_there: of a run that is continued.

    Raises:
        UserError: an unsupported model, no questions, too little memory or disk space; the message has the fix.
    """
    shapes = shapes_of(model_config)
    if questions < 1:
        raise UserError(
            f"{args.data}: no question is left, {skipped} have a prompt of more than --max_prompt_tokens "
            f"{args.max_prompt_tokens} tokens. Raise the limit or give other questions with --data."
        )
    many = where.world_size > 1
    how = ", ZeRO-3" if where.zero3 else ", data parallel" if many else ""
    memory = "" if where.memory is None else f", {gib(where.memory)} GiB" + " each" * many
    lines = [
        ("machine", f"{where.world_size} process{'es' * many}{how}; {device}{memory}"),
        ("model", f"{args.model}: {model_config.model_type}, {shapes.parameters / 1e9:.4g} B parameters, supported"),
        ("", f"{shapes.layers} layers, hidden {shapes.hidden}, vocabulary {shapes.vocab:,}, {args.dtype}"),
        *[("trained", lora_text(args, shapes))] * (args.lora_rank > 0),
        *(findings or {}).items(),
        ("questions", f"{questions:,}" + f", {skipped:,} more left out for length" * (skipped > 0)),
        ("longest", length_text(where.longest_prompt, args.max_new_tokens, model_config.max_position_embeddings)),
    ]
    saves = checkpoints_ahead(args, done=steps_done, there=checkpoints_there)
    size, disk = disk_text(args, holds, shapes, where.zero3, saves)
    if disk_free is not None:
        if size > disk_free:
            raise UserError(
                f"{disk} need {gib(size)} GiB, {gib(disk_free)} GiB are free at {args.output_dir}. Keep fewer "
                "(--keep_checkpoints), save less often (--save_every) or choose another --output_dir."
            )
        lines.append(("disk", f"{disk}, {gib(disk_free)} GiB free"))
    plan = plan_memory(args, holds, shapes, where)
    table = ["preflight", *(f"  {name:<16}{text}" for name, text in lines), *memory_lines(plan, where.memory)]
    return "\n".join(table), plan


def checkpoints_ahead(args, done: int = 0, there: int = 0) -> int:
    """Return how many more checkpoints have to find room on the disk at the same time.

    Args:
        args: `max_steps`, `save_every`, and `keep_checkpoints`: the next is written before the oldest is deleted.
        done: steps already taken; there: checkpoints on the disk.
    """
    steps, every, keep = args.max_steps, args.save_every, args.keep_checkpoints
    if done >= steps:
        return 0
    saves = steps // every - done // every if every else 0
    most = there + saves + (not every or steps % every != 0)  # the last step is always saved
    return max(0, (min(most, keep + 1) if keep else most) - there)


def disk_text(args, holds: Holds, shapes: Shapes, zero3: bool, saves: int) -> tuple[int, str]:
    """Return (bytes, in words) of the checkpoints to come."""
    each, merged = checkpoint_bytes(args, holds, shapes, zero3), merged_bytes(args, shapes) * (saves > 0)
    text = f"{saves} checkpoints x {gib(each)} GiB" + f" and the merged model of {gib(merged)} GiB" * (merged > 0)
    return saves * each + merged, text


def lora_text(args, shapes: Shapes) -> str:
    """Return the line about what LoRA trains, and what it does not."""
    number = trained_parameters(args, shapes) / 1e6
    return (
        f"LoRA of rank {args.lora_rank}, alpha {args.lora_alpha}, on {args.lora_targets}: {number:.3g} M parameters; "
        "embeddings (rows of added tokens too), norms and head are frozen"
    )


def length_text(longest_prompt: int, max_new_tokens: int, positions: int) -> str:
    """Return the line about sequence lengths, with a warning where the model has not seen such positions."""
    longest = longest_prompt + max_new_tokens
    text = f"{longest_prompt:,} prompt + {max_new_tokens:,} response tokens = {longest:,}"
    if longest > positions:
        return f"{text}; WARNING: the model's config has {positions:,} positions, lower --max_new_tokens"
    return f"{text} of the model's {positions:,} positions"


def memory_lines(plan: MemoryPlan, memory: int | None) -> list[str]:
    """Return the table of the memory of one process: a line an item, a column a phase."""

    def line(item: Item) -> str:
        cells = "".join(f"{gib(item.bytes) if phase in item.phases else '.':>8}" for phase in PHASES)
        return f"    {item.name:<22}{cells}   {item.how}"

    head, of = "one process", "not compared with the memory of this machine"
    if memory is not None:
        head, of = "each GPU", f"of {gib(memory)} GiB, of which {gib(int(USABLE * memory))} are planned with"
    totals = phase_bytes(plan.items)
    lines = [
        f"  memory plan of {head} (GiB), phase by phase",
        " " * 26 + "".join(f"{phase:>8}" for phase in PHASES),
        *map(line, plan.items),
        f"    {'total':<22}" + "".join(f"{gib(totals[phase]):>8}" for phase in PHASES),
        f"    {'peak':<22}{gib(plan.peak):>8}   in the phase {plan.largest_phase!r}; {of}",
    ]
    if plan.host:
        lines.append("  memory of the machine for each process, GiB")
        lines += [f"    {item.name:<22}{gib(item.bytes):>8}   {item.how}" for item in plan.host]
    return lines


# --------------------------------------------------------------------------------------------------------- --preflight


@dataclass
class Place:
    """The machine of --preflight, which need not be there."""

    gpu: str = "h100"
    """GPU: h100, h200, h800, a100, a100-40, a800, rtx4090; or cpu."""
    num_gpus: int = 1
    """GPUs of one machine."""
    num_nodes: int = 1
    """Machines."""
    offload: bool = False
    """Launched with zero3_8gpu_offload.yaml, as by OFFLOAD=1, on one GPU too: ZeRO-3, its optimiser in CPU memory."""

    def where(self, longest_prompt: int) -> Where:
        """Return the process to plan for; UserError for a machine that is not known."""
        gpus = self.num_gpus * self.num_nodes
        if min(self.num_gpus, self.num_nodes) < 1:
            raise UserError(f"--num_gpus {self.num_gpus} --num_nodes {self.num_nodes}: must be 1 or more.")
        if self.gpu == "cpu":
            if gpus > 1 or self.offload:
                raise UserError("--gpu cpu: one process is planned. Leave --num_gpus, --num_nodes and --offload out.")
            return Where(cuda=False, longest_prompt=longest_prompt, kv_cache=CPU_CACHE_BYTES)
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu}: not a GPU that a plan knows. Known are {', '.join(GPUS)}, and cpu.")
        zero3, memory = gpus > 1 or self.offload, int(GPUS[self.gpu] * GIB)
        return Where(gpus, zero3, self.offload, longest_prompt=longest_prompt, memory=memory)


def print_plan(args, place: Place) -> None:
    """Print the memory plan of a run with these options on a machine that need not be there.

    Raises:
        UserError: an unknown machine or model, or too little memory; the message has the fix.
    """
    holds = args.holds()  # first: what is no training run says so
    if args.merge_adapter:
        raise UserError("--preflight plans with a whole model: name the adapter's base, without --merge_adapter.")
    where, config = place.where(args.max_prompt_tokens), find_config(args.model)
    shapes = shapes_of(config)
    plan = plan_memory(args, holds, shapes, where)
    many = f"{place.num_nodes} machines x " * (place.num_nodes > 1) + f"{place.num_gpus} x {place.gpu}"
    many = many + ", ZeRO-3" * where.zero3 + ", optimiser in CPU memory" * where.offload
    lines = [
        f"plan of {args.model} on {many if where.cuda else '1 process on the CPU'}",
        f"  {config.model_type}, {shapes.parameters / 1e9:.4g} B parameters, {shapes.layers} layers, hidden "
        f"{shapes.hidden}, vocabulary {shapes.vocab:,}; {args.dtype}",
        *[f"  {lora_text(args, shapes)}"] * (args.lora_rank > 0),
        f"  {length_text(args.max_prompt_tokens, args.max_new_tokens, config.max_position_embeddings)}",
        f"  {disk_text(args, holds, shapes, where.zero3, checkpoints_ahead(args))[1]} on disk",
    ]
    print("\n".join(lines + memory_lines(plan, where.memory)))
