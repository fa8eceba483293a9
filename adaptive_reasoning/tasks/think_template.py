r"""Think template: how a chat template opens thinking, and how it skips it, found by rendering it.

A hybrid template (Qwen3, SmolLM3, GLM-4.5, DeepSeek-V3.1) has a switch that the user sets, and two prompts. A model
that shall choose needs one prompt, and the choice as a token of its own: both prompts, each with the text up to where
content starts, are tokenised and cut at the first token that differs. What is shared is the prompt x', the rests are
the openings of the two modes, so the parting token is always response token 0.

    Qwen3      on  ...assistant\n                            x'          ...assistant\n<think>
               off ...assistant\n<think>\n\n</think>\n\n     Thinking    \n
                                                             NoThinking  \n\n  </think>  \n\n

No model is named here: data are the tags of a thinking block and the names that switches have.

`template` is the chat template that gives x' wherever the switch is not given, and what it always gave where it is. It
goes into the tokenizer of a run once (`put`), so that every prompt is x', and is saved with each checkpoint, so that a
served model chooses by itself. Reading looks below the wrapping: a checkpoint reads as the model it came from.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from os.path import commonprefix
from typing import Literal

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.answers import boxed_answer

TAGS = (("<think>", "</think>"), ("<|channel>thought\n", "<channel|>"), ("[THINK]", "[/THINK]"))
SWITCHES = ("enable_thinking", "thinking")  # keyword arguments of a chat template
QUESTION, THOUGHTS, ANSWER = "What is 1+1?", "Okay, one and one.", "It is two."
AWKWARD = ("Why <think> at all?</think>", " 1+1 =\n\n", "{mark}2", "\n\u00fc\U0001f600\t")
LETTERS = "Okay"  # how thoughts may begin: nothing that joins with a newline or a tag
BEGIN, END = '{# adaptive_reasoning wraps #}{{ "" }}', '{{ "" }}{# adaptive_reasoning wrapped #}'  # no newline is lost


@dataclass
class ThinkingArgs:
    """Options about thinking in chat templates."""

    thinking: Literal["", "choose", "default", "on", "off"] = ""
    """Prompt of a chat template that can think: "choose" ends it where thinking and answering at once part, "default"
    leaves it as it is, "on" and "off" set its switch. Empty: "choose" for the formats think and native, else
    "default"."""
    think_opening: str = ""
    """Text that opens thinking behind the assistant's mark, where rendering does not find it; "\\n" is a newline."""
    skip_opening: str = ""
    """Text that skips thinking behind the assistant's mark, likewise."""
    think_system: str = ""
    """System text that asks for thinking, where that is the switch ("/think", "detailed thinking on")."""
    skip_system: str = ""
    """System text that forbids it ("/no_think", "detailed thinking off")."""


def answer_behind(response: str, opening: str = "<think>", closing: str = "</think>") -> str | None:
    """Return the last box behind the one closing tag; None if there is another tag (official adapt_think_rm)."""
    if (opening and opening in response) or response.count(closing) != 1:
        return None
    return boxed_answer(response.split(closing)[1])


@dataclass(frozen=True)
class ThinkTemplate:
    """How one tokenizer's chat template thinks.

    write(messages, on, **options): the text of messages in its own template; `on` None leaves the switch alone.
    """

    tokenizer: object = field(repr=False)
    original: str = field(repr=False)
    write: Callable[..., str] = field(repr=False)
    kind: str  # "switch", or "prefilled": its prompt opens thinking, and there is no way to switch that off
    switch: str  # what is set, for the table: a keyword argument, "system text" or ""
    given: str  # Jinja: whether the user has set it
    choose: str  # Jinja: sets it to thinking
    default: str  # "on" or "off": which prompt comes where nothing is set
    ends: tuple[str, str, str]  # what stands behind the question: thinking on, off, and in x'
    thinking: tuple[int, ...]  # token ids behind x'; empty: whatever does not begin as NoThinking does
    nothinking: tuple[int, ...]
    cut: int  # characters that x' has fewer than the template's thinking prompt
    add: str  # and those that it has more
    shared: tuple[int, ...]  # tokens that x' has more: a model that thinks writes them by itself
    moved: int  # tokens that x' has more, or fewer (negative)
    exact: bool  # x' and NoThinking are the template's own off-prompt, token for token
    tags: tuple[str, str]
    close: str  # between thoughts and answer
    end: int  # token that ends a turn

    def mode_of(self, response_ids) -> str:
        """Return "nothinking" for a response to x' that begins with the whole opening, else "thinking"."""
        n = len(self.nothinking)
        return "nothinking" if tuple(int(i) for i in response_ids[:n]) == self.nothinking else "thinking"

    def unclosed(self, response_ids) -> bool:
        """Return whether a response has NoThinking's parting token, and then does not close the block."""
        return int(response_ids[0]) == self.nothinking[0] and self.mode_of(response_ids) == "thinking"

    def text(self, ids) -> str:
        return prompts.decode(self.tokenizer, ids, ())

    def answer(self, response: str) -> str | None:
        """Return the last box behind the one closing tag of a response to x'; tags count behind the opening."""
        return answer_behind(response.removeprefix(self.text(self.thinking)), *self.tags)

    def answer_part(self, response: str, skips: bool) -> str | None:
        """Return what stands behind NoThinking's opening if a response to x' skips, else behind the first closing tag;
        None where that is not there yet."""
        if skips:
            return response.removeprefix(self.text(self.nothinking))
        _, closed, answer = response.removeprefix(self.text(self.thinking)).partition(self.tags[1])
        return answer if closed else None

    def closing(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """Return what opens thinking behind x', the closing tag, and the text between thoughts and answer.

        Where only the prompt shows the tags, that ends with the tag, as NoThinking does: the model goes on by itself.
        """
        tag = self.tags[1]
        text = self.close if self.kind == "switch" else "".join(self.close.partition(tag)[:2])
        return self.thinking, tuple(encode(self.tokenizer, tag)), text

    def row(self, thoughts: str, answer: str) -> tuple[list[int], int]:
        """Return the response ids of a supervised row, end token included, and the number of those of its opening.

        Newlines around the thoughts go, as templates take them off: two in front could be NoThinking's first token.
        """
        thoughts, answer = thoughts.strip("\n"), answer.lstrip("\n")
        opening = self.thinking if thoughts else self.nothinking
        text = f"{thoughts}{self.close}{answer}" if thoughts else answer
        return [*opening, *encode(self.tokenizer, text), self.end], len(opening)

    # ------------------------------------------------------------------------------------------------- own prompts

    def own_settings(self) -> dict[str, bool]:
        """Return {setting of an evaluation: thinking on}: the template's own prompts that no forced setting equals.

        Where x' goes on from the thinking prompt, a model opens its thinking by itself there. Where it is shorter, that
        prompt is x' with Thinking forced; and with `exact` the other one is x' with NoThinking forced.
        """
        own = {"template_on": True} if self.moved > 0 else {}
        return own | ({"template_off": False} if self.kind == "switch" and not self.exact else {})

    def own_prompt(self, question: str, on: bool) -> list[int]:
        """Return the prompt ids that the template itself writes, thinking on or off."""
        return encode(self.tokenizer, self.write([message("user", question)], on, add_generation_prompt=True))

    def as_response(self, ids: list[int], text: str, on: bool) -> tuple[list[int], str]:
        """Return ids and text of a response to a prompt of the template's own as they would stand behind x'."""
        if not on:
            return [*self.nothinking, *ids], self.text(self.nothinking) + text
        n = len(self.shared)
        return ids[n * (tuple(ids[:n]) == self.shared) :], text.removeprefix(self.text(self.shared))

    # ------------------------------------------------------------------------------------------------- the template

    def template(self, thinking: str = "choose") -> str:
        """Return the chat template for a value of --thinking: "choose", "on" or "off".

        Raises:
            UserError: there is no switch to set on or off.
        """
        body = BEGIN + self.original.removesuffix("\n") + END
        if thinking == "choose":
            if self.kind == "prefilled" and not (self.cut or self.add):
                return self.original
            whole = f"ar_whole[:-{self.cut}]" if self.cut else "ar_whole"
            whole += f" ~ {json.dumps(self.add, ensure_ascii=False)}" if self.add else ""
            return (
                f"{{% set ar_own = {self.given or 'false'} or not add_generation_prompt %}}"
                f"{{% if not ar_own %}}{self.choose}{{% endif %}}{{% set ar_whole %}}{body}{{% endset %}}"
                f"{{% if ar_own %}}{{{{ ar_whole }}}}{{% else %}}{{{{ {whole} }}}}{{% endif %}}"
            )
        if self.switch not in SWITCHES:
            raise refusal(
                self.tokenizer,
                f"has no keyword argument that switches thinking (looked for {' and '.join(SWITCHES)})",
                "Leave --thinking out.",
            )
        value = "true" if thinking == "on" else "false"
        return f"{{% if not {self.given} %}}{{% set {self.switch} = {value} %}}{{% endif %}}{body}"

    def lines(self, thinking: str) -> dict[str, str]:
        """Return the lines of the preflight table, for a value of --thinking."""
        on, off, choose = map(repr, self.ends)
        out = {} if self.kind == "prefilled" and not self.moved else {"thinking": thinking}
        out["template"] = f"ends in {on}"
        if self.kind == "switch":
            out["template"] = f"{self.switch}, default {self.default}: on ends in {on}, off in {off}"
        if thinking == "choose":
            if out.get("thinking"):
                out["thinking"] += (
                    f": the prompt ends in {choose}" + ", and with NoThinking is the off one" * self.exact
                )
            think = f"Thinking {self.text(self.thinking)!r} {[*self.thinking]}" if self.thinking else "else Thinking"
            out["openings"] = f"NoThinking {self.text(self.nothinking)!r} {[*self.nothinking]}, {think}"
        return out


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def message(role: str, content: str, **more) -> dict[str, str]:
    return {"role": role, "content": content, **more}


def refusal(tokenizer, what: str, mend: str) -> UserError:
    return UserError(f"the chat template of {tokenizer.name_or_path!r} {what}. {mend}")


def original_of(tokenizer) -> str:
    """Return the chat template without what `template` put around it; "" where there is none."""
    text = tokenizer.chat_template or ""
    text = text.get("default", "") if isinstance(text, dict) else text
    return text.partition(BEGIN)[2].rpartition(END)[0] if BEGIN in text else text


def put(tokenizer, args, chooses: bool, name: str) -> tuple[ThinkTemplate | None, dict[str, str]]:
    """Put the chat template that --thinking asks for into the tokenizer.

    Args:
        args: options of the command; where they are no `ThinkingArgs`, the defaults hold.
        chooses: whether the response format has the template's own two modes.
        name: of the format, for messages.

    Returns:
        what was read, and lines for the preflight table; None where a template has nothing to do with thinking and
        nothing was asked.

    Raises:
        UserError: a template that cannot do what is asked, or an answer to --thinking that does not fit the format.
    """
    options = args if isinstance(args, ThinkingArgs) else ThinkingArgs()
    asked = options.thinking or ("choose" if chooses else "default")
    if (asked == "choose") != chooses:
        mend = "Leave it out, or give choose." if chooses else "Give default, on or off."
        how = "tells modes apart by the template's openings" if chooses else "has modes of its own"
        raise UserError(f"--thinking {asked}: the format {name} {how}. {mend}")
    try:
        found = read(tokenizer, options)
    except UserError:
        if asked == "default":
            return None, {}
        raise
    if asked != "default":
        tokenizer.chat_template = found.template(asked)
    return found, found.lines(asked)


def read(tokenizer, args: ThinkingArgs) -> ThinkTemplate:
    """Return how the tokenizer's chat template thinks, wrapped or not.

    Raises:
        UserError: it does not, or not in a way that leaves a choice; each kind has its own message, with a mend.
    """
    original, given = original_of(tokenizer), "--think_opening and --skip_opening"
    think, skip = (text.replace("\\n", "\n") for text in (args.think_opening, args.skip_opening))
    asked, refuse = [message("user", QUESTION)], partial(refusal, tokenizer)

    def writer(switch: str) -> Callable[..., str]:
        def write(messages: list[dict], on: bool | None = None, **options) -> str:
            system = {True: args.think_system, False: args.skip_system, None: ""}[on]
            if on is not None and switch in SWITCHES:
                options[switch] = on
            messages = [message("system", system)] * bool(system) + messages
            return prompts.chat_text(tokenizer, messages, chat_template=original, **options)

        return write

    plain = writer("")(asked, add_generation_prompt=True)  # says so where there is no template, or no Jinja
    tags = next((pair for pair in TAGS if any(tag in original for tag in pair)), None)
    if not tags and not (think and skip):
        if "reasoning_effort" in original:
            raise refuse(
                "has levels of effort and no way to skip thinking",
                f"Say what opens thinking and what skips it with {given}, e.g. for channels "
                "'<|channel|>analysis<|message|>' and '<|channel|>final<|message|>'.",
            )
        raise refuse(
            f"must open a thinking block, and has no tag of one (looked for {', '.join(a.strip() for a, _ in TAGS)}): "
            "the model never thinks",
            "--chat_template think, or plain+think where it cannot be edited, opens one (--control_tokens add gives "
            "the tags), for a supervised start; plain GRPO with --answer_format boxed takes the model as it is.",
        )

    def tail(text: str) -> str:
        return text.rpartition(QUESTION)[2]

    # 1. The switch is what changes the text behind the question; else what changes any.
    ways = ["system text"] if args.think_system or args.skip_system else SWITCHES
    pairs = {way: [writer(way)(asked, state, add_generation_prompt=True) for state in (True, False)] for way in ways}
    switch = next((way for way, (on, off) in pairs.items() if tail(on) != tail(off)), "")
    switch = switch or next((way for way, (on, off) in pairs.items() if on != off), "")
    write, (on, off) = writer(switch), pairs.get(switch, (plain, plain))

    # 2. What stands before the first tag of the thinking prompt is the mark; behind it the off-prompt skips thinking.
    opening, closing = tags or ("", "")
    behind = tail(on)
    at = min((behind.find(tag) for tag in (opening, closing) if tag and tag in behind), default=len(behind))
    mark, own = behind[:at], behind[at:]
    base = on.removesuffix(own)
    added = max((mark.rfind(token.content) for token in tokenizer.added_tokens_decoder.values()), default=-1)
    token = mark[max(0, added) :]  # the mark from its last token on: GLM has "/nothink" before it
    if not skip:
        block = tail(off).rpartition(token)[2] if switch and token in tail(off) else ""
        if switch and closing not in tail(off):
            raise refuse(
                f"changes only words before the answer where thinking is off, the prompt ends in {tail(off)!r}: "
                "nothing in it skips thinking",
                f"Where a system text is the switch give --think_system and --skip_system; or say with {given} what "
                "opens thinking and what skips it.",
            )
        if switch and closing not in block:
            raise refuse(
                f"has another mark before the answer where thinking is off: {behind!r}, and {tail(off)!r}",
                f"Say with {given} what opens thinking behind the first of them, and what skips it.",
            )
        if not switch and not own:
            raise refuse(
                f"must end in an opened thinking block or have a switch ({', '.join(SWITCHES)}); found {behind!r}",
                "If the model thinks by itself, give --think_opening '<think>\\n' --skip_opening "
                "'<think>\\n</think>'; if a system text is the switch, --think_system and --skip_system.",
            )
        skip = block if switch else own + closing

    # 3. What opens thinking, and stands between thoughts and answer: as the template writes a finished turn.
    close, turns = skip, [message("assistant", ANSWER, reasoning_content=THOUGHTS)]
    if tags:
        between, _, rest = skip.partition(opening)[2].partition(closing)
        close = "\n" * ("\n" in between) + closing + (rest if switch else "\n\n")
        block = opening + "\n" * (not opening.endswith("\n")) + THOUGHTS + close
        turns.append(message("assistant", block + ANSWER))
    before = token + opening  # where thoughts are stripped
    for turn in turns:
        text, kept, after = tail(write([*asked, turn], True)).partition(THOUGHTS)
        if kept and closing in after.partition(ANSWER)[0]:
            before, close = text, after.partition(ANSWER)[0]
            break
    think = think or own or before.rpartition(token)[2] or opening
    turns = [*asked, message("assistant", ANSWER), *asked]
    next_token = encode(tokenizer, write(turns, True).partition(ANSWER)[2])[:1]
    end = next((i for i in next_token if i in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)

    # 4. Both openings behind the question, tokenised, part at the first token that differs.
    def parts(question: str) -> tuple[tuple[int, ...], ...]:
        start = write([message("user", question)], True, add_generation_prompt=True).removesuffix(own)
        opened, more, skipped = (tuple(encode(tokenizer, start + t)) for t in (think, think + LETTERS, skip))
        k = len(commonprefix([more, skipped]))
        if k == len(skipped):
            raise refuse(f"has openings that do not part: {think!r} and {skip!r}", f"Give {given}.")
        if more[: len(opened)] != opened or len(opened) < k:
            joins = f"{think!r} joins with the letters behind it in one token"
            raise refuse(f"opens thinking with text that is no token: {joins}", f"Give {given}.")
        return more[:k], opened[k:], skipped[k:]

    x, thinking, nothinking = parts(QUESTION)
    texts = [(base + think)[:c] for c in range(len(base + think), 0, -1)]
    text = next((text for text in texts if tuple(encode(tokenizer, text)) == x), None)
    shared = commonprefix([on, text or ""])
    of_on, asks = tuple(encode(tokenizer, on)), f"{switch} is defined" if switch in SWITCHES else ""
    system = json.dumps([message("system", args.think_system)] * bool(args.think_system), ensure_ascii=False)
    out = ThinkTemplate(
        tokenizer, original, write,
        kind="switch" if switch else "prefilled",
        switch=switch,
        given=asks or 'messages[0]["role"] == "system"' * bool(switch),
        choose=f"{{% set {switch} = true %}}" if asks else f"{{% set messages = {system} + messages %}}" * bool(switch),
        default="off" if switch and plain == off else "on",
        ends=(tail(on), tail(off), tail(text or "")),
        thinking=thinking, nothinking=nothinking,
        cut=len(on) - len(shared), add=(text or "")[len(shared) :], shared=x[len(of_on) :], moved=len(x) - len(of_on),
        exact=bool(switch) and base + skip == off,
        tags=tags or ("", prompts.decode(tokenizer, nothinking, ())), close=close, end=end,
    )  # fmt: skip
    for question in (QUESTION, *(q.format(mark=mark) for q in AWKWARD)):
        one = [message("user", question)]
        wrapped = prompts.chat_text(tokenizer, one, chat_template=out.template(), add_generation_prompt=True)
        if text is None or parts(question) != (tuple(encode(tokenizer, wrapped)), thinking, nothinking):
            raise refuse(
                f"cannot be cut where {think!r} and {skip!r} part: the tokenizer joins the text before that place with "
                f"what follows, as for the question {question!r}",
                f"Say with {given} what opens thinking and what skips it so that they part at a token.",
            )
    return out
