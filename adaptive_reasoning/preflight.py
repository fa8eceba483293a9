"""Preflight: what a run found and what it will need, printed before anything heavy starts; it stops what cannot work.

Everything is computed from the model's config, the options and a few numbers, without loading a weight. The memory plan
is arithmetic on the data structures of learner and rollout. It is an upper estimate: all of them are counted as if they
were alive together, although the working sets of learning and sampling take turns.
"""

from dataclasses import dataclass

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout.decoder import check_supported

GIB = 2**30
USABLE = 0.92  # of a GPU's memory; the rest is for the CUDA context, NCCL and gaps between allocations
CACHE_GROWTH = 1.5  # the KV arena doubles by copying: for a moment the old half and the new whole exist
LIVE_PARAMETERS = 10**9  # DeepSpeed's defaults: parameters that ZeRO-3 keeps gathered ...
REDUCE_BUCKET = 5 * 10**8  # ... and gradients that it collects before it exchanges them
HEAD_CHUNKS = 3 * 64 * 2**20  # logits, their exponentials and gradient, 64 MiB each (kernels/token_logprobs.py)
PREFILL_TOKENS = 8192  # of one prefill pass of the rollout
COLUMN_STEP = 32  # the arena is read in multiples of this many columns


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that memory depends on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int  # a tied output embedding counted once

    @property
    def layer_width(self) -> int:
        """Numbers that one decoder layer keeps for each token until its backward pass.

        Eight hidden states (input, outputs, two norms with their fp32 copies), q and the attention's result, k and v,
        and four of the MLP (gate, up, silu, product).
        """
        return 8 * self.hidden + 2 * (self.heads + self.kv_heads) * self.head_dim + 4 * self.intermediate


@dataclass(frozen=True)
class Item:
    """One line of the memory plan."""

    name: str
    bytes: int
    how: str  # the formula, with its numbers


@dataclass(frozen=True)
class Preflight:
    """What a run is told: the table for the reader, and how much the rollout may take."""

    table: str
    rows: int  # responses that decode side by side on one process
    cache_bytes: int  # of the KV arena


def shapes_of(config) -> Shapes:
    """Return the shapes of a `transformers` config.

    Raises:
        UserError: not a model that rollout and learner support.
    """
    check_supported(config)
    with torch.device("meta"):  # counts parameters without allocating one
        # Not from_config: under ZeRO-3 that would split the meta tensors over the processes.
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    heads = config.num_attention_heads
    return Shapes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def kv_bytes_per_token(shapes: Shapes, value_bytes: int) -> int:
    """Return the bytes of keys and values of one token: 2 x layers x key/value heads x head size x bytes."""
    return 2 * shapes.layers * shapes.kv_heads * shapes.head_dim * value_bytes


def estimate_rows(free_bytes: int, token_bytes: int, columns: int) -> int:
    """Return how many rows of `columns` tokens the KV arena can have in `free_bytes`, the room to grow included."""
    return max(0, int(free_bytes / (token_bytes * columns * CACHE_GROWTH)))


def state_bytes_per_parameter(dtype: str, zero3: bool) -> dict[str, int]:
    """Return what the learner keeps for each parameter, in bytes; ZeRO-3 splits every part over the processes."""
    fixed = {"gradient": 4, "Adam": 8}
    if zero3:
        return {"weight": 2 if dtype == "bf16" else 4, "fp32 master": 4} | fixed
    return {"fp32 weight": 4} | ({"bf16 copy": 2} if dtype == "bf16" else {}) | fixed


def checkpoint_bytes(shapes: Shapes, dtype: str, zero3: bool) -> int:
    """Return the size of one checkpoint: weights, Adam moments and, under ZeRO-3, fp32 masters beside the weights."""
    kept = state_bytes_per_parameter(dtype, zero3)
    return shapes.parameters * sum(v for k, v in kept.items() if k not in ("gradient", "bf16 copy"))


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


def activation_bytes_per_token(shapes: Shapes, value_bytes: int, checkpointing: bool) -> int:
    """Return the bytes of activations of one token of a micro-batch.

    With gradient checkpointing one hidden state per layer, and one layer's working set with its gradients; without, the
    working sets of all layers. Attention is assumed not to build a [tokens, tokens] matrix (flash or SDPA).
    """
    if checkpointing:
        return value_bytes * (shapes.layers * shapes.hidden + 2 * shapes.layer_width)
    return value_bytes * (shapes.layers + 1) * shapes.layer_width


def fixed_items(shapes: Shapes, args, world_size: int, zero3: bool) -> list[Item]:
    """Return the lines of the plan that neither the micro-batch nor the number of rows changes."""
    P, V, H = shapes.parameters, shapes.vocab, shapes.hidden
    b = 2 if args.dtype == "bf16" else 4
    parts = state_bytes_per_parameter(args.dtype, zero3)
    split = world_size if zero3 else 1
    how = f"{P / 1e9:.2f} B x {sum(parts.values())} bytes"
    how += (f" / {split} processes" if zero3 else "") + f" ({', '.join(f'{k} {v}' for k, v in parts.items())})"
    items = [Item("weights, optimiser", P * sum(parts.values()) // split, how)]
    if getattr(args, "kl_coef", 0):
        frozen = 2 if zero3 and args.dtype == "bf16" else 4 + 2 * (args.dtype == "bf16")
        how = f"{P / 1e9:.2f} B x {frozen} bytes" + (f" / {split} processes" if zero3 else "") + ", frozen"
        items.append(Item("reference policy", P * frozen // split, how))
    if getattr(args, "critic_learning_rate", 0):
        how = "a model of the same size with an optimiser of its own"
        items.append(Item("critic", P * sum(parts.values()) // split, how))
    items.append(Item("rollout replica", P * b, f"{P / 1e9:.2f} B x {b} bytes, whole on every process"))
    if zero3:
        live, bucket = min(P, LIVE_PARAMETERS), min(P, REDUCE_BUCKET)
        how = f"{live / 1e9:.2f} B gathered weights, {bucket / 1e9:.2f} B gradients in exchange, x {b} bytes"
        items.append(Item("ZeRO-3 exchange", (live + bucket) * b, how))
    # In bf16 the fp32 sum, the part that is added to it and the bf16 result exist at once.
    head = 10 if b == 2 else 4
    how = f"gradient of {V:,} x {H} x {head} bytes, and chunks of 64 MiB logits"
    items.append(Item("output head", V * H * head + HEAD_CHUNKS, how))
    rows, widest = args.rollout_rows, max(H, shapes.intermediate)
    how = f"{rows} rows x {V:,} x 12 bytes (logits, weights, random), prefill of {PREFILL_TOKENS} tokens"
    items.append(Item("rollout sampling", rows * V * 12 + PREFILL_TOKENS * 4 * widest * b, how))
    return items


def memory_plan(
    args, shapes: Shapes, *, world_size: int, zero3: bool, longest_prompt: int, memory: int | None, arena: int | None
) -> tuple[list[Item], int, int]:
    """Return (lines, rows of the KV arena, bytes of the KV arena) for one process.

    Args:
        args: `dtype`, `max_new_tokens`, `rollout_rows`, `tokens_per_micro_batch`, `gradient_checkpointing`.
        longest_prompt: tokens of the longest prompt that is kept.
        memory: bytes of the device; None plans without a limit.
        arena: most bytes the KV arena may take, or None.

    Raises:
        UserError: it does not fit; the message says which option to lower, and to what.
    """
    items = fixed_items(shapes, args, world_size, zero3)
    b = 2 if args.dtype == "bf16" else 4
    longest = longest_prompt + args.max_new_tokens
    columns = -(-longest // COLUMN_STEP) * COLUMN_STEP
    # A sequence is never cut, so one that is longer than the budget is a micro-batch of its own.
    tokens = max(args.tokens_per_micro_batch, longest)
    # Autocast over fp32 weights leaves the stream of hidden states in fp32.
    stream = b if zero3 else 4
    per_token = activation_bytes_per_token(shapes, stream, args.gradient_checkpointing)
    kept = "one hidden state a layer, one layer's working set twice" if args.gradient_checkpointing else "all layers"
    items.append(Item("activations", tokens * per_token, f"{tokens:,} tokens x {per_token / 1024:.0f} KiB ({kept})"))

    per_kv = kv_bytes_per_token(shapes, b)
    used = sum(item.bytes for item in items)
    limit = None if memory is None else int(USABLE * memory)
    if limit is not None:
        check_fits(args, items, limit, longest, per_token, int(per_kv * columns * CACHE_GROWTH))
    room = float("inf") if limit is None else limit - used
    if arena is not None:
        room = min(room, arena * CACHE_GROWTH)
    rows = args.rollout_rows if room == float("inf") else min(args.rollout_rows, estimate_rows(room, per_kv, columns))
    if rows < 1:
        raise UserError(
            f"one response of {longest:,} tokens (prompt included) needs {gib(per_kv * columns)} GiB of cache, "
            f"{gib(arena)} GiB are set aside for it. Lower --max_new_tokens (now {args.max_new_tokens:,})."
        )
    cache = rows * columns * per_kv
    how = f"{rows} rows x {columns:,} tokens x {per_kv / 1024:g} KiB"
    items.append(Item("KV arena", cache, how + f"; {args.rollout_rows} were asked for" * (rows < args.rollout_rows)))
    items.append(Item("KV arena growing", int(cache * (CACHE_GROWTH - 1)), "the old half, while it is copied"))
    return items, rows, cache


def check_fits(args, items: list[Item], limit: int, longest: int, per_token: int, row: int) -> None:
    """Raise UserError if `items` and one row of the KV arena (`row` bytes) do not fit into `limit` bytes.

    Args:
        longest: tokens of the longest sequence; `per_token` bytes of activations each.
    """
    fixed = sum(item.bytes for item in items if item.name != "activations")
    total = sum(item.bytes for item in items) + row
    if total <= limit:
        return
    what = f"the run needs at least {gib(total)} GiB on each GPU, {gib(limit)} GiB of it can be used"
    most = max(items, key=lambda item: item.bytes)
    what += f" (the largest part: {most.name}, {gib(most.bytes)} GiB)."
    fitting = (limit - fixed - row) // per_token
    if fitting >= longest:
        mend = f"Lower --tokens_per_micro_batch from {args.tokens_per_micro_batch:,} to {fitting:,} or less."
    elif not args.gradient_checkpointing:
        mend = "Set --gradient_checkpointing true."
    elif fixed + row < limit:
        mend = f"A response of {longest:,} tokens is too long to learn from. Lower --max_new_tokens to about "
        mend += f"{max(1, fitting - longest + args.max_new_tokens):,}, or take more GPUs (NUM_GPUS=)."
    else:
        mend = "Take more GPUs (NUM_GPUS=), which share the optimiser, or a smaller model (MODEL=)."
    raise UserError(f"{what} {mend}")


def preflight(
    args,
    *,
    model_config,
    device: str,
    world_size: int = 1,
    zero3: bool = False,
    device_memory: int | None = None,
    arena: int | None = None,
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
    size = checkpoint_bytes(shapes, args.dtype, zero3) * (2 if hasattr(args, "critic_learning_rate") else 1)
    if disk_free is not None:
        if saves * size > disk_free:
            raise UserError(
                f"{saves} more checkpoints of {gib(size)} GiB need {gib(saves * size)} GiB, {gib(disk_free)} GiB are "
                f"free at {args.output_dir}. Keep fewer (--keep_checkpoints), save less often (--save_every) or choose "
                "another --output_dir."
            )
        lines.append(("disk", f"{saves} checkpoints x {gib(size)} GiB, {gib(disk_free)} GiB free"))

    items, rows, cache = memory_plan(
        args, shapes, world_size=world_size, zero3=zero3, longest_prompt=longest_prompt, memory=device_memory,
        arena=arena,
    )  # fmt: skip
    table = ["preflight", *(f"  {name:<16}{text}" for name, text in lines)]
    table.append(f"  memory plan of {'one process' if device_memory is None else 'each GPU'} (GiB)")
    table += [f"    {item.name:<20}{gib(item.bytes):>8}   {item.how}" for item in items]
    total = sum(item.bytes for item in items)
    of = "not compared with the memory of this machine"
    if device_memory is not None:
        of = f"of {gib(device_memory)}, of which {gib(int(USABLE * device_memory))} are planned with"
    table.append(f"    {'total':<20}{gib(total):>8}   {of}")
    return Preflight("\n".join(table), rows, cache)


def length_text(longest_prompt: int, max_new_tokens: int, positions: int) -> str:
    """Return the line about sequence lengths, with a warning where the model has not seen such positions."""
    longest = longest_prompt + max_new_tokens
    text = f"{longest_prompt:,} prompt + {max_new_tokens:,} response tokens = {longest:,}"
    if longest > positions:
        return f"{text}; WARNING: the model's config has {positions:,} positions, lower --max_new_tokens"
    return f"{text} of the model's {positions:,} positions"


def gib(number: int) -> str:
    """Return bytes in GiB with two digits; what is smaller than that but not nothing shows as <0.01."""
    return "<0.01" if 0 < number < 0.005 * GIB else f"{number / GIB:.2f}"
