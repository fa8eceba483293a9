"""Paint: a response on the terminal while it is written, thinking dim and answer bright."""

import os
import re
import sys
from collections.abc import Callable

from tokenizers.decoders import DecodeStream

from adaptive_reasoning.tasks import prompts

DIM, BRIGHT, PLAIN = "\033[2m", "\033[1m", "\033[0m"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model's own escape sequences stay out of the terminal


def write(text: str, style: str = "") -> None:
    """Print at once. On a terminal in a style, unless NO_COLOR is set; it ends with the text, whatever comes next."""
    if sys.stdout.isatty():
        text = CONTROL.sub("\ufffd", text)
        if style and text and "NO_COLOR" not in os.environ:
            text = f"{style}{text}{PLAIN}"
    sys.stdout.write(text)
    sys.stdout.flush()


class Painter:
    """Prints the text of one response as its tokens come, in whole characters.

    Args:
        stop_ids: ids that end a response and are not shown.
        behind: (response ids, text) -> what stands behind the thinking so far, None while it goes on.
    """

    def __init__(self, tokenizer, stop_ids: tuple[int, ...], behind: Callable[[list[int], str], str | None]):
        self.tokenizer, self.stop_ids, self.behind = tokenizer, stop_ids, behind
        self.decoding, self.seen, self.text = DecodeStream(skip_special_tokens=False), 0, ""
        self.answer_at: int | None = None  # where in the text the answer begins

    def step(self, ids: list[int]) -> None:
        """Print what is new in the response, whose tokens so far are `ids`."""
        new = [i for i in ids[self.seen :] if i not in self.stop_ids]
        self.seen = len(ids)
        chunks = (self.decoding.step(self.tokenizer.backend_tokenizer, i) for i in new)
        self._write(ids, "".join(filter(None, chunks)))

    def end(self, ids: list[int]) -> None:
        """Print what is left, characters that were cut too: the text is then that of `prompts.decode`."""
        self.step(ids)
        self._write(ids, prompts.decode(self.tokenizer, ids, self.stop_ids).removeprefix(self.text))

    def _write(self, ids: list[int], new: str) -> None:
        begun, self.text = len(self.text), self.text + new
        if self.answer_at is None and (answer := self.behind(ids, self.text)) is not None:
            self.answer_at = len(self.text) - len(answer)
        dim = len(self.text) if self.answer_at is None else max(0, self.answer_at - begun)
        write(new[:dim], DIM)
        write(new[dim:], BRIGHT)
