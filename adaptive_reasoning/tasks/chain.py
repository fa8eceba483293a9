"""Arithmetic chains: the laboratory. Questions without end, exact answers, and a model small enough for a laptop.

A question is `3*7+4-9`, worked out from left to right modulo 10; its difficulty is the number of operations. One
operation can be answered at once, six cannot: where the line runs is what "when to think" has to find out.

How a chain is answered is a matter of the method: `formats`.
"""

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adaptive_reasoning.core.question import Benchmark, Question, Source
from adaptive_reasoning.errors import UserError

SPLIT = (  # how Qwen2 cuts text before byte-pair encoding: letters together, digits one by one, a space with its word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


FORMS: dict[str, type] = {}
"""Formats that a method file makes known by the method's name, for `tokenizer(name)`."""


def tokenizer(form) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the laboratory: byte-pair encoding as in Qwen2, trained on chains in one format
    (a class of `formats`, or its name in `FORMS`).

    It is built the way `transformers` builds every Qwen2 tokenizer, so AutoTokenizer opens the folder alike.
    """
    form = FORMS[form] if isinstance(form, str) else form
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.NFC()
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    asked = [make_question(rng, 1 + i % 6, "") for i in range(200)]
    modes = form.cold_start_modes()
    pieces.train_from_iterator((form.response(q, mode, rng) for q in asked for mode in modes), trainer)
    # As in R1's tokenizer, the marks of a turn are special tokens, the marks of thinking are ordinary ones.
    pieces.add_special_tokens(list(form.SPECIAL))
    pieces.add_tokens([AddedToken(text, normalized=False) for text in form.TOKENS])
    finished = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<pad>",
        chat_template=form.TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return form.finish(finished)


def steps(problem: str, slip: float = 0.0, rng: np.random.Generator | None = None) -> list[tuple[str, int]]:
    """Return the operations of a chain as (text such as "3*7=1", value), from left to right modulo 10.

    With probability `slip` an operation comes out one too high, and the next ones go on from there.
    """
    value, out = int(problem[0]), []
    for i in range(1, len(problem), 2):
        op, operand = problem[i], int(problem[i + 1])
        new = {"+": value + operand, "-": value - operand, "*": value * operand}[op] % 10
        if slip and rng.random() < slip:
            new = (new + 1) % 10
        out.append((f"{value}{op}{operand}={new}", new))
        value = new
    return out


def make_question(rng: np.random.Generator, operations: int, name: str) -> Question:
    """Return a random chain with the given number of operations."""
    digits = rng.integers(0, 10, operations + 1)
    ops = rng.choice(list("+-*"), operations)
    problem = str(digits[0]) + "".join(f"{op}{digit}" for op, digit in zip(ops, digits[1:]))
    work = steps(problem)
    return Question(name, problem, str(work[-1][1]), str(operations), "chain", tuple(text for text, _ in work))


def parse_mix(mix: str, option: str = "--chain_mix", of: str = "1, 2, ... operations") -> list[float]:
    """Return the shares in "0.4,0.2,..." of the questions with 1, 2, ... operations, or of what an option counts.

    Raises:
        UserError: not a list of non-negative numbers with a positive sum.
    """
    try:
        shares = [float(x) for x in mix.split(",")]
    except ValueError:
        shares = []
    if not shares or not 0 < sum(shares) < float("inf") or min(shares) < 0:
        raise UserError(f"{option} {mix!r}: needs comma-separated shares for {of}, e.g. 0.4,0.3,0.3.")
    return [share / sum(shares) for share in shares]


def questions(n: int, mix: str, seed: int, name: str, make=make_question) -> list[Question]:
    """Return n questions whose difficulties hold the shares of `mix` exactly (up to rounding), in random order.

    Args:
        make: (rng, operations, name) -> question.
    """
    shares = parse_mix(mix)
    rng = np.random.default_rng([seed, n])
    edges = np.round(np.cumsum(shares) * n).astype(int)
    operations = np.searchsorted(edges, np.arange(n), side="right") + 1
    rng.shuffle(operations)
    return [make(rng, int(ops), f"{name}/{i}") for i, ops in enumerate(operations)]


def tiny_model(tok: PreTrainedTokenizerFast, hidden: int = 96, layers: int = 3, seed: int = 0):
    """Return a freshly initialised Qwen2 of about 0.3M parameters that fits the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tok),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,  # the usual 0.02 is made for widths of thousands
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def source(args, train: bool) -> Source:
    """Return training chains, if they are wanted, and the benchmark "chain", the same for every seed."""
    asked = questions(args.chain_questions, args.chain_mix, args.seed, "chain/train") if train else []
    evaluation = questions(args.chain_eval_questions, args.chain_mix, 1_000_003, "chain/eval")
    return Source(asked, [Benchmark("chain", evaluation, args.eval_samples)], exact=True)
