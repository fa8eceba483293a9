"""Memory of a run: what each phase holds, computed without loading a weight. The peak is that of the largest phase.

    load      weights, reference, critic and the rollout's replica exist, nothing was learned yet
    rollout   decoding: the KV cache, logits of all rows; no gradients, no activations
    head      the backward pass begins: all activations of a micro-batch, the gradients of those before it
    embed     it ends at the embedding, whose gradient is as large as the embedding
    step      AdamW
    save      a checkpoint

Every number is the size of a data structure of learner or rollout; nothing is fitted. Not counted: what an allocator
keeps of freed memory, fragments, and on a GPU the CUDA context, NCCL and cuBLAS (for them 8 % stay free, `USABLE`).
Checked on the CPU (tests/memory_worker.py); not measured on a GPU.
"""

from dataclasses import dataclass, replace
from itertools import combinations

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.lora import targets_of
from adaptive_reasoning.run.shapes import Shapes

GIB = 2**30
USABLE = 0.92  # of a GPU's memory; the rest is for the CUDA context, NCCL and gaps between allocations
LIVE_PARAMETERS = 10**9  # DeepSpeed's defaults: parameters that ZeRO-3 keeps gathered ...
REDUCE_BUCKET = 5 * 10**8  # ... and gradients that it collects before it exchanges them ...
SUB_GROUP = 10**9  # ... and parameters of one call of the optimiser
HEAD_CHUNK = 64 * 2**20  # of logits at a time (kernels/token_logprobs.py)
PREFILL_TOKENS = 8192  # of one prefill pass of the rollout
COLUMN_STEP = 32  # the cache is read in multiples of this many columns
LIBRARIES = 480 * 2**20  # of interpreter and libraries on the CPU, as measured
ROW_BYTES = 27  # of a row's buffers for each response token (rollout/batch_state.py)
LORA_RANK = 16  # proposed where all weights cannot be trained
FEW_ROWS = 32  # proposed where the logits of all rows are what does not fit
MOST_GPUS = 64
ONLY_TRAINED = ("fp32 master", "gradient", "Adam")  # parts that only trained parameters have; `offload` moves them

PHASES = ("load", "rollout", "head", "embed", "step", "save")
ALL, AFTER_LOAD, UPDATE = PHASES, PHASES[1:], ("head", "embed", "step")


@dataclass(frozen=True)
class Holds:
    """What a method's run holds beside the policy and its optimiser; `holds()` of its options says it."""

    rollout: bool = True  # a replica of the policy that samples
    questions: int = PREFILL_TOKENS  # of a step, over all processes: their prompts are prefilled
    top_p: float = 1.0  # the smallest nucleus it samples with
    reference: bool = False  # the frozen starting model
    critic: bool = False  # a value model with an optimiser of its own
    dialogues: bool = False  # keys and values of `rollout_rows` dialogues wait between turns
    least_new_tokens: int = 1  # --max_new_tokens has to be this at least


@dataclass(frozen=True)
class Where:
    """The process that a plan is for."""

    world_size: int = 1
    zero3: bool = False
    offload: bool = False  # under ZeRO-3: optimiser in CPU memory, as zero3_8gpu_offload.yaml has it
    cuda: bool = True  # rows of the rollout are lists of pages; else contiguous slots that grow by copying
    longest_prompt: int = 1024  # tokens
    memory: int | None = None  # bytes of the GPU; None: nothing is checked
    kv_cache: int | None = None  # most bytes that the KV cache may take; None: what is left
    libraries: int = LIBRARIES  # bytes of interpreter and libraries; they count on the CPU


@dataclass(frozen=True)
class Item:
    """One line of the memory plan."""

    name: str
    bytes: int
    phases: tuple[str, ...]  # in which it exists
    how: str  # the formula, with its numbers


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_memory` found."""

    items: list[Item]
    host: list[Item]  # of one process in the memory of the machine, beside the GPU's
    rows: int  # responses of the longest kind that the KV cache has room for
    cache_bytes: int  # of the KV cache

    @property
    def largest_phase(self) -> str:
        totals = phase_bytes(self.items)
        return max(totals, key=totals.get)

    @property
    def peak(self) -> int:
        return phase_bytes(self.items)[self.largest_phase]


def phase_bytes(items: list[Item]) -> dict[str, int]:
    """Return {phase: bytes alive in it}."""
    return {phase: sum(item.bytes for item in items if phase in item.phases) for phase in PHASES}


def gib(number: float) -> str:
    """Return bytes in GiB with two digits; what is smaller than that but not nothing shows as <0.01."""
    return "<0.01" if 0 < number < 0.005 * GIB else f"{number / GIB:.2f}"


def state_bytes(dtype: str, zero3: bool) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return {part: (bytes a parameter, when it exists)} of the learner; ZeRO-3 splits each over the processes."""
    if zero3:  # which has a buffer for the gradients; without, they go after every step
        weights = {"weight": (2 if dtype == "bf16" else 4, ALL), "fp32 master": (4, ALL)}
        return {**weights, "gradient": (4, ALL), "Adam": (8, AFTER_LOAD)}
    copy = {"bf16 copy": (2, ("head", "embed"))} if dtype == "bf16" else {}  # autocast makes it in the forward pass
    return {"fp32 weight": (4, ALL), **copy, "gradient": (4, UPDATE), "Adam": (8, AFTER_LOAD)}


def trained_parameters(args, s: Shapes) -> int:
    """Return how many parameters have a gradient and an optimiser: all, or LoRA's r (in + out) for every matrix."""
    if not args.lora_rank:
        return s.parameters
    return args.lora_rank * s.layers * sum(sum(s.linear[name]) for name in targets_of(args))


def checkpoint_bytes(args, holds: Holds, shapes: Shapes, zero3: bool) -> int:
    """Return the size of one checkpoint: of what is trained the weights, Adam's moments and ZeRO-3's fp32 masters; a
    critic has all of it once more."""
    weight = 2 if args.dtype == "bf16" and zero3 else 4
    return trained_parameters(args, shapes) * (weight + (12 if zero3 else 8)) * (1 + holds.critic)


def merged_bytes(args, shapes: Shapes) -> int:
    """Return the most that the merged model takes which LoRA writes beside its last adapter: fp32."""
    return shapes.parameters * 4 * (args.lora_rank > 0)


def activation_bytes_per_token(shapes: Shapes, value_bytes: int, checkpointing: bool, adapters: int = 0) -> int:
    """Return the bytes of activations of one token of a micro-batch; no attention matrix [tokens, tokens] is built.

    With gradient checkpointing a hidden state a layer and one layer's working set with its gradients; else all of them.
    `adapters` are numbers of a layer between A and B.
    """
    width = shapes.layer_width + adapters
    if checkpointing:
        return value_bytes * (shapes.layers * shapes.hidden + 2 * width)
    return value_bytes * (shapes.layers + 1) * width


def slot_growth(prompt: int, longest: int) -> tuple[int, int]:
    """Return the columns (before, after) the last growth of contiguous slots, made for a prompt, doubled by copying."""

    def columns(n: int) -> int:
        return min(-(-n // COLUMN_STEP) * COLUMN_STEP, longest)

    before, width = 0, columns(2 * prompt)
    while width < longest:
        before, width = width, columns(2 * columns(width + 1))
    return before, width


@dataclass(frozen=True)
class Case:
    """A run in a place. `args` are options of a run: its dtype, lengths, rows, micro-batch, gradient checkpointing."""

    args: object
    holds: Holds
    shapes: Shapes
    where: Where

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt included."""
        return self.where.longest_prompt + self.args.max_new_tokens

    @property
    def columns(self) -> int:
        """Columns of the longest row in the KV cache; 0 without a rollout."""
        return -(-self.longest // COLUMN_STEP) * COLUMN_STEP * self.holds.rollout

    @property
    def value(self) -> int:
        """Bytes of a value of the rollout and of what ZeRO-3 exchanges."""
        return 2 if self.args.dtype == "bf16" else 4

    @property
    def stream(self) -> int:
        """Bytes of a weight and of a hidden state of the learner: autocast over fp32 weights leaves them in fp32."""
        return self.value if self.where.zero3 else 4

    def states(self) -> tuple[list[Item], list[Item]]:
        """Return the lines of weights, gradients and optimisers, (on the device, on the host)."""
        P, where, trained = self.shapes.parameters, self.where, trained_parameters(self.args, self.shapes)
        n = where.world_size if where.zero3 else 1
        split, items, host = f" / {n} processes" if n > 1 else "", [], []
        for model in ("", "critic: ") if self.holds.critic else ("",):
            if self.args.lora_rank:
                rest = 0 if where.zero3 else self.shapes.embedding * (4 - self.value)  # the embedding stays in fp32
                how = f"{P / 1e9:.3g} B x {self.value}{split}, frozen" + ", the embedding x 4" * (rest > 0)
                items.append(Item(f"{model}base", (P * self.value + rest) // n, ALL, how))
            for part, (size, phases) in state_bytes(self.args.dtype, where.zero3).items():
                item = Item(model + part, trained * size // n, phases, f"{trained / 1e9:.3g} B x {size}{split}")
                (host if where.offload and part in ONLY_TRAINED else items).append(item)
        how = f"{P / 1e9:.2f} B x {self.stream}{split}, frozen"
        apart = self.holds.reference and not self.args.lora_rank  # else it is the base
        return [*items, Item("reference policy", P * self.stream // n * apart, ALL, how)], host

    def rollout(self) -> list[Item]:
        """Return the lines of the rollout, the KV cache left out."""
        s, b, rows, where, phase = self.shapes, self.value, self.args.rollout_rows, self.where, ("rollout",)
        (each, cut), new = (32, " (nucleus: sorted)") if self.holds.top_p < 1 else (16, ""), self.args.max_new_tokens
        asked = -(-self.holds.questions // where.world_size) * where.longest_prompt
        tokens, widest = max(where.longest_prompt, min(PREFILL_TOKENS, asked)), max(s.hidden, s.intermediate)
        return [
            Item("rollout replica", s.parameters * b, ALL, f"{s.parameters / 1e9:.2f} B x {b}, whole on every process"),
            Item("its output head", s.embedding * b * (s.tied and not where.cuda), ALL, "tied, but stored both ways"),
            Item("sampling", rows * (s.vocab * each + (new + 1) * ROW_BYTES), phase,
                 f"{rows} rows x {s.vocab:,} x {each}{cut}, buffers of {new:,}"),
            Item("prefill", tokens * (4 * widest * b + 2 * s.kv_bytes(b)), phase,
                 f"{tokens:,} tokens x (4 x {widest} x {b}, keys and values twice)"),
        ]  # fmt: skip

    def update(self) -> list[Item]:
        """Return the lines of the working set of an update."""
        args, s, where, b, stream = self.args, self.shapes, self.where, self.value, self.stream
        P, VH, VxH, zero3 = s.parameters, s.embedding, f"{s.vocab:,} x {s.hidden}", where.zero3
        tokens = max(args.tokens_per_micro_batch, self.longest)  # a sequence longer than the budget goes alone
        lora = args.lora_rank > 0
        ranks = args.lora_rank * len(targets_of(args))
        each = activation_bytes_per_token(s, stream, args.gradient_checkpointing, ranks)
        kept = "a hidden state a layer, one layer twice" if args.gradient_checkpointing else "all layers"
        # In bf16 the fp32 sum, the part that is added to it and the bf16 result exist at once.
        grad, chunks = (10, 3) if b == 2 else (4, 2)
        copies = 2 if s.tied else 1  # a tied weight's gradient from the head waits for that of the lookup
        head = f"gradient {VxH} x {grad}"
        if lora:  # frozen; of an embedding in fp32 that is the head too autocast makes a copy
            grad, copies = (b if s.tied and stream > b else 0), 0
            head = f"copy {VxH} x {grad}"
        trained = trained_parameters(args, s)
        live, bucket = min(P, LIVE_PARAMETERS), min(trained, REDUCE_BUCKET)
        widest = args.lora_rank * max(map(max, s.linear.values())) if lora else s.largest
        scratch = 0 if where.cuda else 2 * widest * 4  # fused on a GPU
        if zero3:
            scratch = min(trained // where.world_size, SUB_GROUP) * 4 * (not where.offload)
        return [
            Item("activations", tokens * each, ("head",), f"{tokens:,} tokens x {each / 1024:.0f} KiB, {kept}"),
            Item("output head", VH * grad + chunks * HEAD_CHUNK, ("head",),
                 f"{head}, " * (grad > 0) + f"{chunks} x 64 MiB logits"),
            Item("embedding", copies * VH * stream, ("embed",), f"{copies} gradients of {VxH} x {stream}"),
            Item("ZeRO-3 exchange", (live + bucket) * b * zero3, ("head", "embed"),
                 f"{live / 1e9:.2f} B gathered, {bucket / 1e9:.2f} B gradients on their way, x {b}"),
            Item("gathered layer", max(s.largest, (P - VH) // s.layers) * b * zero3, ("step", "save"),
                 "the largest of layers and embeddings"),
            Item("optimiser scratch", scratch, ("step",), "square roots of the second moments"),
            Item("merged matrix", s.hidden * s.intermediate * (8 if b == 2 else 4) * lora, ("step", "save"),
                 "one at a time in fp32, and its base in fp32"),
        ]  # fmt: skip

    def waiting(self) -> list[Item]:
        """Return what lies in the memory of the machine for a while: dialogues between turns, a checkpoint on its way.

        A checkpoint's tensors leave the device one at a time (learner/tensors.py).
        """
        s, args, stream, cuda = self.shapes, self.args, self.stream, self.where.cuda
        kept = args.rollout_rows * self.longest * s.kv_bytes(self.value) * self.holds.dialogues
        return [
            Item("dialogues", kept, ("rollout",),
                 f"{args.rollout_rows} dialogues x {self.longest:,} tokens at most, between turns"),
            Item("dialogues going on", kept * (not cuda), ("rollout",), "their copies while the next turn is run"),
            Item("checkpoint", s.largest * stream * cuda, ("save",),  # on the CPU the tensor itself is written
                 f"the largest tensor, {s.largest / 1e9:.2g} B x {stream}, on the first process"),
        ]  # fmt: skip

    def items(self) -> tuple[list[Item], list[Item]]:
        """Return all lines but those of the KV cache, (on the device, on the host)."""
        cuda, (states, host) = self.where.cuda, self.states()
        items = [Item("interpreter, libraries", self.where.libraries * (not cuda), ALL, "measured"), *states]
        items += (self.rollout() if self.holds.rollout else []) + self.update()
        (host if cuda else items).extend(self.waiting())
        return [item for item in items if item.bytes], [item for item in host if item.bytes]

    @property
    def row(self) -> int:
        """Bytes of the longest row in the KV cache; 0 without a rollout."""
        return self.shapes.kv_bytes(self.value) * self.columns

    def needed(self) -> int:
        """Return the least memory a process needs: its largest phase with one row of the longest kind."""
        totals = phase_bytes(self.items()[0])
        return max(size + self.row * (phase in AFTER_LOAD) for phase, size in totals.items())

    def fits(self) -> bool:
        return self.where.memory is None or self.needed() <= int(USABLE * self.where.memory)


def plan_memory(args, holds: Holds, shapes: Shapes, where: Where) -> MemoryPlan:
    """Return the memory plan of one process.

    Raises:
        UserError: it does not fit; the message says which options make it fit.
    """
    assert where.cuda or where.memory is None, "memory is compared on a GPU alone"
    case = Case(args, holds, shapes, where)
    if not case.fits():
        raise UserError(too_large(case))
    items, host = case.items()
    if not holds.rollout:
        return MemoryPlan(items, host, 0, 0)
    per_token, row, room = shapes.kv_bytes(case.value), case.row, where.kv_cache
    if where.memory is not None:
        totals = phase_bytes(items)
        left = int(USABLE * where.memory) - max(totals[phase] for phase in AFTER_LOAD)
        room = left if room is None else min(room, left)
    rows = args.rollout_rows if room is None else min(args.rollout_rows, room // row)
    if rows < 1:
        raise UserError(
            f"one response of {case.longest:,} tokens (prompt included) needs {gib(row)} GiB of KV cache, {gib(room)} "
            f"GiB are set aside for it. Lower --max_new_tokens (now {args.max_new_tokens:,})."
        )
    # Pages are given out as they are needed, so those left over from whole rows are of use as well.
    cache = rows * row if not where.cuda or room is None else min(room, args.rollout_rows * row)
    how = f"{rows} rows x {case.columns:,} tokens x {per_token / 1024:g} KiB"
    how += f"; {args.rollout_rows} were asked for" * (rows < args.rollout_rows)
    items.append(Item("KV cache", cache, AFTER_LOAD, how))
    growing = 0 if where.cuda else rows * slot_growth(where.longest_prompt, case.columns)[0] * per_token
    items.append(Item("KV cache growing", growing, ("rollout",), "the narrower one, while it is copied"))
    return MemoryPlan([item for item in items if item.bytes], host, rows, cache)


# --------------------------------------------------------------------------------------------------- what makes it fit


def too_large(case: Case) -> str:
    """Return the message: what is needed, the largest parts, and what makes it fit."""
    items = case.items()[0]
    totals = phase_bytes(items)
    phase = max(totals, key=totals.get)
    most = sorted((item for item in items if phase in item.phases), key=lambda item: -item.bytes)[:2]
    nothing = f"take a smaller model (--model) or GPUs with more memory: {MOST_GPUS} of these do not do"
    what = ", or ".join(fix_text(case, fix) for fix in fixes(case)) or nothing
    return (
        f"the run needs at least {gib(case.needed())} GiB on each GPU, {gib(int(USABLE * case.where.memory))} GiB of "
        f"it can be used (the largest parts: {', '.join(f'{item.name} {gib(item.bytes)}' for item in most)} GiB). "
        f"{what[0].upper()}{what[1:]}."
    )


def fix_text(case: Case, fix: dict) -> str:
    """Return what to do, as a user types it."""
    words = []
    for name, value in fix.items():
        if name == "offload":
            words.append("launch with experiments/launch/zero3_8gpu_offload.yaml (OFFLOAD=1: optimiser in CPU memory)")
        elif name == "gpus":
            words.append(f"take {value} GPUs (NUM_GPUS=, NUM_NODES=), which share the optimiser")
        elif name == "lora_rank":
            words.append(f"set --lora_rank {value} to train adapters alone (another result)")
        elif isinstance(value, bool):
            words.append(f"set --{name} {str(value).lower()}")
        else:
            words.append(f"lower --{name} from {vars(case.args)[name]:,} to {value:,} or less")
    return ", ".join(words)


def changed(case: Case, fix: dict) -> Case:
    """Return the case with a fix applied: {option: value}, "offload": True, "gpus": number of processes."""
    args = replace(case.args, **{name: value for name, value in fix.items() if name not in ("offload", "gpus")})
    where = case.where
    if "offload" in fix or "gpus" in fix:
        gpus, offload = fix.get("gpus", where.world_size), "offload" in fix or where.offload
        where = replace(where, zero3=True, offload=offload, world_size=gpus)
    return replace(case, args=args, where=where)


def least(case: Case, fix: dict) -> dict:
    """Return the fix with the fewest savings beside it, which change no result, so that it fits; {} if none do."""
    now = changed(case, fix)
    savings = (  # the cheapest first: (option, value, whether it saves anything)
        ("tokens_per_micro_batch", now.longest, now.args.tokens_per_micro_batch > now.longest),
        ("gradient_checkpointing", True, not now.args.gradient_checkpointing),
        ("rollout_rows", FEW_ROWS, now.args.rollout_rows > FEW_ROWS and now.holds.rollout),
        ("offload", True, not now.where.offload),
    )
    saved = {name: value for name, value, saves in savings if saves}
    for names in (names for count in range(len(saved) + 1) for names in combinations(saved, count)):
        found = fix | {name: saved[name] for name in names}
        if changed(case, found).fits():
            if (name := "tokens_per_micro_batch") in names:  # the largest that fits: small ones are slow
                low, high = found[name], now.args.tokens_per_micro_batch
                found[name] = largest(lambda n: changed(case, {**found, name: n}).fits(), low, high)  # noqa: B023
            return found
    return {}


def fixes(case: Case) -> list[dict]:
    """Return the fixes to propose, each of which makes it fit: savings; else a shorter response, LoRA, more GPUs."""
    if found := least(case, {}):
        return [found]
    name, tokens, gpus = "max_new_tokens", case.args.max_new_tokens, case.where.world_size
    shorter = largest(lambda n: bool(least(case, {name: n})), case.holds.least_new_tokens, tokens - 1)
    found = [least(case, {name: shorter})] if shorter else []
    if not case.args.lora_rank and (fix := least(case, {"lora_rank": LORA_RANK})):
        found.append(fix)
    while (gpus := 2 * gpus) <= MOST_GPUS:
        if fix := least(case, {"gpus": gpus}):
            return [*found, fix]
    return found


def largest(works, low: int, high: int) -> int:
    """Return the largest number in low .. high that works, of which all smaller ones do as well; 0 if none does."""
    if high < low or not works(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle) else (low, middle - 1)
    return low
