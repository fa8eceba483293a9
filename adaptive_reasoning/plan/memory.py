"""Memory: what each phase of a run holds, computed without loading a weight. The peak is that of the largest phase.

    load      weights, reference, critic and the rollout's replica exist, nothing was learned yet
    rollout   decoding: the arena of keys and values, logits of all rows; no gradients, no activations
    head      the backward pass begins: all activations of a micro-batch, the gradients of those before it
    embed     it ends at the embedding, whose gradient is as large as the embedding
    step      AdamW
    save      a checkpoint

Every number is the size of a data structure of learner or rollout; nothing is fitted. Not counted: what an allocator
keeps of freed memory, fragments, and on a GPU the CUDA context, NCCL and cuBLAS (for them 8 % stay free, `USABLE`).
Checked on the CPU by experiments/bench/bench_plan.py; not measured on a GPU.
"""

from dataclasses import dataclass

from adaptive_reasoning.plan.shapes import Shapes

GIB = 2**30
USABLE = 0.92  # of a GPU's memory; the rest is for the CUDA context, NCCL and gaps between allocations
LIVE_PARAMETERS = 10**9  # DeepSpeed's defaults: parameters that ZeRO-3 keeps gathered ...
REDUCE_BUCKET = 5 * 10**8  # ... and gradients that it collects before it exchanges them ...
SUB_GROUP = 10**9  # ... and parameters of one call of the optimiser
HEAD_CHUNK = 64 * 2**20  # of logits at a time (kernels/token_logprobs.py)
PREFILL_TOKENS = 8192  # of one prefill pass of the rollout
COLUMN_STEP = 32  # the arena is read in multiples of this many columns
LIBRARIES = 480 * 2**20  # of interpreter and libraries on the CPU, as experiments/bench/bench_plan.py has measured it
ROW_BYTES = 21  # of a row's buffers for each response token (rollout/rows.py)

PHASES = ("load", "rollout", "head", "embed", "step", "save")
ALL, TRAINED = PHASES, PHASES[1:]
UPDATE = ("head", "embed", "step")


@dataclass(frozen=True)
class Item:
    """One line of the memory plan."""

    name: str
    bytes: int
    phases: tuple[str, ...]  # in which it exists
    how: str  # the formula, with its numbers


@dataclass(frozen=True)
class Where:
    """What a plan is for, beside options and model."""

    world_size: int = 1
    zero3: bool = False
    cuda: bool = True  # rows of the rollout are lists of pages; else contiguous slots that grow by copying
    longest_prompt: int = 1024  # tokens
    memory: int | None = None  # bytes of the device; None: nothing is checked
    arena: int | None = None  # most bytes that keys and values may take; None: what is left
    libraries: int = 0  # bytes of interpreter and libraries, where they count (the CPU)


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_memory` found."""

    items: list[Item]
    host: list[Item]  # of one process in the memory of the machine, beside the GPU's
    rows: int  # responses of the longest kind that the arena has room for
    cache_bytes: int  # of the arena

    @property
    def peak(self) -> int:
        return max(phase_bytes(self.items).values())

    @property
    def largest_phase(self) -> str:
        totals = phase_bytes(self.items)
        return max(totals, key=totals.get)


def phase_bytes(items: list[Item]) -> dict[str, int]:
    """Return {phase: bytes alive in it}."""
    return {phase: sum(item.bytes for item in items if phase in item.phases) for phase in PHASES}


# ------------------------------------------------------------------------------------------------------------ formulas


def kv_bytes_per_token(shapes: Shapes, value_bytes: int) -> int:
    """Return the bytes of keys and values of one token: 2 x layers x key/value heads x head size x bytes."""
    return 2 * shapes.layers * shapes.kv_heads * shapes.head_dim * value_bytes


def state_bytes_per_parameter(dtype: str, zero3: bool) -> dict[str, int]:
    """Return what the learner keeps for each parameter, in bytes; ZeRO-3 splits every part over the processes."""
    fixed = {"gradient": 4, "Adam": 8}
    if zero3:
        return {"weight": 2 if dtype == "bf16" else 4, "fp32 master": 4} | fixed
    return {"fp32 weight": 4} | ({"bf16 copy": 2} if dtype == "bf16" else {}) | fixed


def trained_parameters(args, shapes: Shapes) -> int:
    """Return how many parameters have a gradient and an optimiser: all, or LoRA's r (in + out) for every matrix."""
    rank = getattr(args, "lora_rank", 0)
    if not rank:
        return shapes.parameters
    H, I, q, kv = shapes.hidden, shapes.intermediate, shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    return rank * shapes.layers * (2 * (H + q) + 2 * (H + kv) + 3 * (H + I))


def rolls_out(args) -> bool:
    """Whether the run samples: supervised fine-tuning, which has a batch size instead, does not."""
    return not hasattr(args, "batch_size")


def has_critic(args) -> bool:
    """Whether the run learns a critic: one whose options have its learning rate (run.py)."""
    return hasattr(args, "critic_learning_rate")


def state_phases(part: str, zero3: bool) -> tuple[str, ...]:
    """Return when a part exists. ZeRO-3 has a buffer for the gradients; without, they go after every step."""
    if part == "gradient":
        return ALL if zero3 else UPDATE
    if part == "bf16 copy":
        return ("head", "embed")  # autocast makes it in the forward pass
    return TRAINED if part == "Adam" else ALL


def offloaded(zero3: bool) -> tuple[str, ...]:
    """Return the parts that an optimiser in CPU memory takes off the GPU."""
    return ("fp32 master", "gradient", "Adam") if zero3 else ("Adam",)


def offload_copies(zero3: bool) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return {what an optimiser in CPU memory holds beside those parts: (bytes a parameter, phases)}.

    `OffloadedAdamW` (learner/offload.py) takes its step on copies of the weights, which it keeps, and of the gradients.
    """
    return {} if zero3 else {"copy of weights": (4, ALL), "copy of gradients": (4, ("step",))}


def activation_bytes_per_token(shapes: Shapes, value_bytes: int, checkpointing: bool) -> int:
    """Return the bytes of activations of one token of a micro-batch.

    With gradient checkpointing one hidden state per layer, and one layer's working set with its gradients; without, the
    working sets of all layers. Attention is assumed not to build a [tokens, tokens] matrix (flash or SDPA).
    """
    if checkpointing:
        return value_bytes * (shapes.layers * shapes.hidden + 2 * shapes.layer_width)
    return value_bytes * (shapes.layers + 1) * shapes.layer_width


def micro_batch_tokens(args, longest: int) -> int:
    """Return the tokens of the largest micro-batch: a sequence longer than the budget is one of its own."""
    return max(args.tokens_per_micro_batch, longest)


def stream_bytes(args, zero3: bool) -> int:
    """Return the bytes of a value of the hidden states. Autocast over fp32 weights leaves them in fp32."""
    return 2 if args.dtype == "bf16" and zero3 else 4


def arena_growth(prompt: int, longest: int) -> tuple[int, int]:
    """Return the columns of contiguous slots (before, after) their last growth; they double by copying.

    Args:
        prompt: tokens of the shortest context, for which the first width is made; longest: tokens of the longest row.
    """

    def columns(n: int) -> int:
        return min(-(-n // COLUMN_STEP) * COLUMN_STEP, longest)

    before, width = 0, columns(2 * prompt)
    while width < longest:
        before, width = width, columns(2 * columns(width + 1))
    return before, width


# --------------------------------------------------------------------------------------------------------------- items


def model_items(args, shapes: Shapes, where: Where) -> tuple[list[Item], list[Item]]:
    """Return the lines of weights, gradients and optimisers, (on the device, on the host)."""
    P, b, trained = shapes.parameters, 2 if args.dtype == "bf16" else 4, trained_parameters(args, shapes)
    n = where.world_size if where.zero3 else 1
    split = f" / {n} processes" if n > 1 else ""
    parts = state_bytes_per_parameter(args.dtype, where.zero3)
    offload = getattr(args, "offload_optimizer", False)
    away, copies = (offloaded(where.zero3), offload_copies(where.zero3)) if offload else ((), {})
    items, host = [], []
    for model in ["", "critic: "] if has_critic(args) else [""]:
        for part, size in parts.items():
            number = trained if part in ("gradient", "Adam", "fp32 master") else P
            how = f"{number / 1e9:.3g} B x {size}{split}"
            item = Item(f"{model}{part}", number * size // n, state_phases(part, where.zero3), how)
            (host if part in away else items).append(item)
        for part, (size, phases) in copies.items():
            host.append(Item(f"{model}{part}", trained * size, phases, f"{trained / 1e9:.3g} B x {size}"))
    if getattr(args, "kl_coef", 0):
        frozen = 2 if where.zero3 and b == 2 else 4
        items.append(Item("reference policy", P * frozen // n, ALL, f"{P / 1e9:.2f} B x {frozen}{split}, frozen"))
    return items, host


def learner_items(args, shapes: Shapes, where: Where) -> list[Item]:
    """Return the lines of the working set of an update."""
    P, V, H, b = shapes.parameters, shapes.vocab, shapes.hidden, 2 if args.dtype == "bf16" else 4
    items = []
    tokens = micro_batch_tokens(args, where.longest_prompt + args.max_new_tokens)
    per_token = activation_bytes_per_token(shapes, stream_bytes(args, where.zero3), args.gradient_checkpointing)
    kept = "a hidden state a layer, one layer twice" if args.gradient_checkpointing else "all layers"
    items.append(
        Item("activations", tokens * per_token, ("head",), f"{tokens:,} tokens x {per_token / 1024:.0f} KiB, {kept}")
    )
    # In bf16 the fp32 sum, the part that is added to it and the bf16 result exist at once.
    head, chunks = (10, 3) if b == 2 else (4, 2)
    items.append(Item("output head", V * H * head + chunks * HEAD_CHUNK, ("head",),
                      f"gradient {V:,} x {H} x {head}, {chunks} x 64 MiB logits"))  # fmt: skip
    grad = stream_bytes(args, where.zero3)
    copies = 2 if shapes.tied else 1  # a tied weight's gradient from the head waits for that of the lookup
    items.append(Item("embedding", copies * V * H * grad, ("embed",), f"{copies} gradients of {V:,} x {H} x {grad}"))
    if where.zero3:
        live, bucket = min(P, LIVE_PARAMETERS), min(P, REDUCE_BUCKET)
        how = f"{live / 1e9:.2f} B gathered, {bucket / 1e9:.2f} B gradients on their way, x {b}"
        items.append(Item("ZeRO-3 exchange", (live + bucket) * b, ("head", "embed"), how))
        layer = max(shapes.largest, (P - shapes.embedding) // shapes.layers) * b
        items.append(Item("gathered layer", layer, ("step", "save"), "the largest of layers and embeddings"))
    if getattr(args, "offload_optimizer", False):
        scratch = 0
    elif where.zero3:
        scratch = min(trained_parameters(args, shapes) // where.world_size, SUB_GROUP) * 4
    else:
        scratch = 0 if where.cuda else 2 * shapes.largest * 4  # fused on a GPU
    items.append(Item("optimiser scratch", scratch, ("step",), "square roots of the second moments"))
    return items


def rollout_items(args, shapes: Shapes, where: Where) -> list[Item]:
    """Return the lines of the rollout, the arena left out."""
    P, V, b = shapes.parameters, shapes.vocab, 2 if args.dtype == "bf16" else 4
    items = [Item("rollout replica", P * b, ALL, f"{P / 1e9:.2f} B x {b}, whole on every process")]
    if shapes.tied and not where.cuda:
        items.append(Item("its output head", shapes.embedding * b, ALL, "tied, but stored the other way round as well"))
    cut = min(getattr(args, "eval_top_p", 1.0), getattr(args, "ref_top_p", 1.0)) < 1
    each = 32 if cut else 16
    rows = args.rollout_rows
    how = f"{rows} rows x {V:,} x {each}{' (nucleus: sorted)' * cut}, buffers of {args.max_new_tokens:,}"
    items.append(Item("sampling", rows * (V * each + (args.max_new_tokens + 1) * ROW_BYTES), ("rollout",), how))
    prompts = -(-getattr(args, "prompts_per_step", PREFILL_TOKENS) // where.world_size)
    tokens = max(where.longest_prompt, min(PREFILL_TOKENS, prompts * where.longest_prompt))
    widest = max(shapes.hidden, shapes.intermediate)
    per_kv = kv_bytes_per_token(shapes, b)
    how = f"{tokens:,} tokens x (4 x {widest} x {b}, keys and values twice)"
    items.append(Item("prefill", tokens * (4 * widest * b + 2 * per_kv), ("rollout",), how))
    return items


def dialogue_bytes(args, shapes: Shapes, longest_prompt: int) -> int:
    """Return the bytes of keys and values that dialogues of several turns keep between them; 0 for one turn.

    Thinker holds `rollout_rows` dialogues at a time; the longest has its prompt and all responses.
    """
    if not hasattr(args, "fast_budget") or getattr(args, "environment", "") == "qa":
        return 0
    b = 2 if args.dtype == "bf16" else 4
    return args.rollout_rows * (longest_prompt + args.max_new_tokens) * kv_bytes_per_token(shapes, b)


def save_items(args, shapes: Shapes, where: Where) -> list[Item]:
    """Return the lines of what waits in the memory of the machine while a checkpoint is written.

    Tensors leave the device one at a time (learner/tensors.py). LoRA alone is merged as a whole, after the last step
    (sft.py): on every process all weights, and the merged ones of all layers beside them.
    """
    items, size = [], 2 if args.dtype == "bf16" and where.zero3 else 4
    if where.cuda:  # on the CPU what is written is the tensor itself
        how = f"the largest tensor, {shapes.largest / 1e9:.2g} B x {size}, on the first process"
        items.append(Item("checkpoint", shapes.largest * size, ("save",), how))
    if getattr(args, "lora_rank", 0):
        P, layers = shapes.parameters, shapes.parameters - shapes.embedding * (1 if shapes.tied else 2)
        how = f"({P / 1e9:.2f} B + {layers / 1e9:.2f} B of the layers) x {size}, after the last step"
        items.append(Item("merged LoRA", (P + layers) * size, ("save",), how))
    return items


def fixed_items(args, shapes: Shapes, where: Where) -> tuple[list[Item], list[Item]]:
    """Return all lines but those of the arena, (on the device, on the host)."""
    items = [Item("interpreter, libraries", where.libraries, ALL, "measured")] if where.libraries else []
    states, host = model_items(args, shapes, where)
    items += states + (rollout_items(args, shapes, where) if rolls_out(args) else [])
    items += learner_items(args, shapes, where)
    kept = dialogue_bytes(args, shapes, where.longest_prompt)
    if kept:
        how = f"{args.rollout_rows} dialogues x {where.longest_prompt + args.max_new_tokens:,} tokens at most"
        if where.cuda:
            host.append(Item("dialogues", kept, ("rollout",), how + ", between turns"))
        else:
            items.append(Item("dialogues", kept, ("rollout",), how + ", between turns"))
            items.append(Item("dialogues going on", kept, ("rollout",), "their copies while the next turn is run"))
    (host if where.cuda else items).extend(save_items(args, shapes, where))
    return [item for item in items if item.bytes], host
