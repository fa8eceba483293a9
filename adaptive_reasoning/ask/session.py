"""Session: the model that is asked, its ways of answering, and one answer after another."""

import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from transformers.utils.logging import disable_progress_bar

from adaptive_reasoning import formats
from adaptive_reasoning.ask.paint import DIM, Painter, write
from adaptive_reasoning.benchmark.run_folder import found
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import ResponseFormat
from adaptive_reasoning.formats.dialogue import DialogueArgs
from adaptive_reasoning.formats.think import ThinkArgs
from adaptive_reasoning.formats.thinkless import ThinklessArgs
from adaptive_reasoning.learner.model import ADAPTER, load_config, load_model, load_tokenizer
from adaptive_reasoning.report.run_folder import DEAR
from adaptive_reasoning.rollout import Completion, Decoder, Engine, Request, Sampling, request_seed
from adaptive_reasoning.rollout.dialogue import Dialogue, converse
from adaptive_reasoning.run.evaluation import Evaluator, probability
from adaptive_reasoning.run.options import NonNegative, PositiveShare, parse_args
from adaptive_reasoning.run.start import from_adapter, from_gguf, is_gguf
from adaptive_reasoning.tasks import chat_template, prompts
from adaptive_reasoning.tasks.task import ExactGrader
from adaptive_reasoning.tasks.think_template import ThinkingArgs

OWN = ("model", "question", "mode", "seed")  # options that no run decides
QUICK = "fast"  # the stage that skips in a dialogue


@dataclass
class Args(DialogueArgs, ThinkArgs, ThinklessArgs, ThinkingArgs):
    """Options of a question. What a run has of them in its config.yaml is the default there."""

    model: str = ""
    """Folder of a run, a checkpoint, a model folder, a hub name or a GGUF file; may be given without --model."""
    question: str = ""
    """What to ask; empty: questions are read from the terminal, until Ctrl-D."""
    mode: str = ""
    """Way of answering: think, skip, or a mode or evaluation setting of the format; empty: the model chooses."""
    answer_format: str = ""
    """Response format, as for the benchmark; empty: that of the run, or what tokenizer and chat template show."""
    max_new_tokens: PositiveInt = 4096
    """Longest response in tokens, EOS included."""
    temperature: NonNegative = 0.6
    """Sampling temperature (0: greedy)."""
    top_p: PositiveShare = 0.95
    """Nucleus of the sampler; of a run that of its evaluations."""
    seed: NonNegativeInt = 0
    """Another seed, another answer."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Compute type."""

    rollout_rows = 1  # of a dialogue: one answer at a time

    def holds(self):
        raise UserError("--preflight plans training runs: those of a method.")


def parse(argv: list[str]) -> tuple[Args, str]:
    """Return the options, those of a run below those of the command line, and the model that was found.

    Raises:
        UserError: as `parse_args` and `found`.
    """
    argv = argv if not argv or argv[0].startswith("-") else ["--model", *argv]
    model, config = found(parse_args(Args, argv).model)
    config["top_p"] = config.get("eval_top_p")
    known = {f.name: config.get(f.name) for f in fields(Args) if f.name not in OWN}
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in known.items()}
    return parse_args(Args, [*(f"--{key}={text}" for key, text in texts.items() if text is not None), *argv]), model


def load(model: str, args) -> tuple:
    """Return (tokenizer, () -> model in fp32) of a folder, an adapter and its base, a hub name or a GGUF file."""
    disable_progress_bar()  # of the weights, in the middle of an answer
    if is_gguf(model):
        _, _, tokenizer, make = from_gguf(model)
    elif (Path(model) / ADAPTER).is_file() and not (Path(model) / "config.json").is_file():
        _, _, tokenizer, make = from_adapter(model)
    else:
        load_config(model)
        tokenizer, make = load_tokenizer(model), lambda: load_model(model, args)[0]
    return tokenizer, make


def format_of(tokenizer, args) -> ResponseFormat:
    """Return the response format: the one that was asked for, else what tokenizer and chat template show.

    Raises:
        UserError: the format does not fit, there is no chat template, or --mode of a template that has none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: the model was not made to be asked. "
            "Take its instruct version, or the checkpoint of a run, which has the template it was trained with."
        )
    name = args.answer_format
    if not name and tokenizer.chat_template == chat_template.ARM:
        name = "arm"
    elif not name and "<short>" in tokenizer.get_vocab():
        name = "thinkless"
    try:
        return formats.load(name or "think")(tokenizer, args)
    except UserError:
        if name or args.mode:
            raise
    return formats.load("boxed")(tokenizer, args)  # a template that never thinks


class Session:
    """A model that answers questions one after another.

    Raises:
        UserError: as `load` and `format_of`.
    """

    def __init__(self, args, model: str):
        self.args, self.asked, self.device = args, 0, "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer, make = load(model, args)
        self.form = format_of(self.tokenizer, args)
        self.spec = self.form.eval_spec()
        self.setting(args.mode)
        whole = make()
        self.stop_ids = prompts.stop_tokens(self.tokenizer, whole.generation_config)
        decoder = Decoder.from_model(whole, self.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
        self.engine = Engine(decoder, max_rows=1, sync_every=1)
        self.sampling = Sampling(args.temperature, args.top_p)

    def setting(self, mode: str) -> str:
        """Return the setting of an evaluation that a word stands for: its name, a mode, think, skip, or "free".

        Raises:
            UserError: there is none.
        """
        free, modes = next(iter(self.spec.settings)), self.form.modes
        known = {mode: name for name, mode in self.form.forced_settings().items()}
        known |= dict(zip(self.spec.settings, self.spec.settings))
        for word, candidates in (("think", DEAR), ("skip", (*self.form.skips, QUICK))):
            if there := [known[m] for m in candidates if m in modes and m in known]:
                known[word] = there[0]
        known |= {"": free, "free": free}
        if mode not in known:
            raise UserError(f"--mode {mode}: this model takes {', '.join(filter(None, known))}.")
        return known[mode]

    def shares(self, question: str) -> dict[str, float]:
        """Return {mode: probability that a response begins as one of it}, nothing forced, at the temperature."""
        on = Evaluator(self.engine, None, self.tokenizer, self.stop_ids, self.spec, self.args)
        begins = self.form.mode_openings()
        asked = [prompts.render(self.tokenizer, question)] if begins else []
        p = {mode: probability(on, asked, ids) for mode, ids in begins.items()}
        return {mode: p.get(mode, max(0.0, 1 - sum(p.values()))) for mode in self.form.modes if p}

    def answer(self, question: str, setting: str) -> None:
        """Print the answer while it is written, then the mode, its probability, tokens and seconds."""
        began, seed = time.perf_counter(), request_seed(self.args.seed, self.asked)
        self.asked += 1
        if self.spec.script is not None:
            return self.dialogue(question, setting, seed)
        template = self.spec.template
        own = template.own_settings().get(setting) if template else None  # the template's own prompt, with thinking?
        prompt = prompts.render(self.tokenizer, question) if own is None else template.own_prompt(question, own)

        def said(ids: list[int], text: str) -> tuple[list[int], str]:
            return (ids, text) if own is None else template.as_response(ids, text, own)

        def behind(ids: list[int], text: str) -> str | None:
            ids, text = said(ids, text)
            return self.form.answer_part(text, self.spec.mode_of(ids)) if ids else None

        forced = self.spec.settings[setting]
        painter = Painter(self.tokenizer, self.stop_ids, behind)
        completion = self.stream(Request(prompt, self.args.max_new_tokens, self.stop_ids, seed, forced), painter)
        seconds, n = time.perf_counter() - began, len(completion.response_ids)
        ids, text = said(completion.response_ids.tolist(), painter.text)
        mode, answer = self.spec.mode_of(ids), behind(completion.response_ids.tolist(), painter.text)
        ended = completion.finish_reason == "stop"
        tokens = 0 if answer is None else min(n, self.form.answer_tokens(text, answer, len(ids), ended))
        how = "forced" if forced else "chosen by the model" if own is None else f"asked for by the prompt {setting}"
        facts = {
            "mode": f"{self.form.modes[mode]}, {how}" if len(self.form.modes) > 1 else "it has no other",
            "p(mode)": ", ".join(f"{self.form.modes[m]} {p:.3g}" for m, p in self.shares(question).items()),
            "tokens": f"{n - tokens} thinking, {tokens} answer" + f"; cut at --max_new_tokens {n}" * (not ended),
            "seconds": f"{seconds:.2f} ({n / seconds:.0f} tokens/s)",
        }
        write("\n" + "".join(f"{name:<8} {fact}\n" for name, fact in facts.items() if fact))

    def stream(self, request: Request, painter: Painter) -> Completion:
        """Return the completion of a request, printed by the painter while it is written."""
        run = self.engine.stream([request], self.sampling, on_step=lambda _, ids: painter.step(ids.tolist()))
        ((_, completion),) = run
        painter.end(completion.response_ids.tolist())
        return completion

    def dialogue(self, question: str, setting: str, seed: int) -> None:
        """Print a dialogue turn by turn, the checks of an answer dim, then what it took."""
        began, d = time.perf_counter(), Dialogue(Question("asked", question, ""), 0, seed)

        class Aloud:  # the engine, as `converse` uses it
            @staticmethod
            def run(requests, sampling, on_finish, progress):
                stage = self.form.next_stage(d.turns, setting)
                write(f"[{stage}] ", DIM)
                painter = Painter(
                    self.tokenizer, self.form.stop_ids, lambda _, text: None if stage == "verify" else text
                )
                on_finish(0, self.stream(requests[0], painter))
                write("\n")

        converse(Aloud, ExactGrader(), [d], self.form, self.sampling, setting)
        tokens = ", ".join(f"{len(turn.ids)} {stage}" for stage, turn in d.turns.items())
        seconds = time.perf_counter() - began
        write(f"mode     {self.form.modes[self.spec.mode_of(d.turns)]}\ntokens   {tokens}\nseconds  {seconds:.2f}\n")


def hold(argv: list[str]) -> None:
    """Answer the question of the command line, or those that are typed; /think, /skip, /free change the mode."""
    args, model = parse(argv)
    session = Session(args, model)
    setting = session.setting(args.mode)
    if args.question:
        return session.answer(args.question, setting)
    terminal = sys.stdin.isatty()
    if terminal:
        write("Ask; /think, /skip or /free for the mode, Ctrl-D to end.\n")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return write("\n" * terminal)
        try:
            if line.startswith("/"):
                setting = session.setting(line[1:])
            elif line:
                session.answer(line, setting)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
