"""Prompts and control tokens: rendered and looked up once, checked before anything heavy starts."""

import json
import re
from collections.abc import Callable
from datetime import datetime

from jinja2 import TemplateError

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError

THINK_OPEN = "<think>"
NOW = "strftime_now"  # what chat templates ask for the date
DATE = re.compile(rf"{NOW}\(\s*(['\"])([^'\"]*)\1\s*\)")


def render(tokenizer, problem: str) -> list[int]:
    """Return the prompt ids of a question: the tokenizer's own chat template, the problem as the only user message."""
    return tokenizer(prompt_text(tokenizer, problem), add_special_tokens=False)["input_ids"]


def prompt_text(tokenizer, problem: str) -> str:
    """Return the prompt as text.

    Raises:
        UserError: the tokenizer has no chat template, or one that is no Jinja.
    """
    return chat_text(tokenizer, [{"role": "user", "content": problem}], add_generation_prompt=True)


def chat_text(tokenizer, messages: list[dict], **options) -> str:
    """Return messages as the chat template writes them; raises as `prompt_text`."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: give one with "
            "--chat_template, arm or the path of a Jinja file."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError, TypeError) as error:  # the latter from Python's methods, which templates call
        what = f"the chat template of {tokenizer.name_or_path!r} cannot be rendered"
        raise UserError(
            f"{what}: {str(error).rstrip('.')}. Mend it in its folder, or give another with --chat_template."
        ) from error


def fix_date(tokenizer, day: datetime) -> None:
    """Make a chat template that prints today's date (Llama 3, SmolLM3, gpt-oss) print that of `day`, whenever it runs.

    Raises:
        UserError: it asks for the date in a form that is no literal.
    """
    template = str(tokenizer.chat_template)
    forms = [text for _, text in DATE.findall(template)]
    if len(forms) < template.count(f"{NOW}("):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} computes how it prints the date, so prompts differ from "
            f"day to day. Write a date in place of {NOW}(...)."
        )
    dates = json.dumps({text: day.strftime(text) for text in forms}, ensure_ascii=False)
    macro = f"{{% macro {NOW}(form) %}}{{{{ {dates}[form] }}}}{{% endmacro %}}"  # it hides the function of that name
    tokenizer.chat_template = f'{macro}{{{{ "" }}}}{template}'


def is_dated(tokenizer) -> bool:
    """Return whether prompts depend on the day on which they are rendered."""
    template = str(tokenizer.chat_template)
    return isinstance(tokenizer.chat_template, str) and f"{NOW}(" in template and f"macro {NOW}(" not in template


def check_ends_at_assistant(tokenizer, mend: Callable[..., str] = lambda tokenizer: "") -> str:
    """Return how the prompt ends, e.g. '<|Assistant|>'.

    Args:
        mend: tokenizer -> what else the message says.

    Raises:
        UserError: the prompt goes on after the assistant's mark, with `<think>` (then the mode is chosen already) or
            with a newline or anything else that the template does not write before a finished answer: the control
            token would not stand where it was trained.
    """
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "7"}]
    text = prompt_text(tokenizer, "1+1")
    finished = chat_text(tokenizer, messages)
    if THINK_OPEN in text or not finished.startswith(text + "7"):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} must end right at the assistant's mark with "
            f"add_generation_prompt, without {THINK_OPEN!r} or a newline, as it stands before an answer "
            f"({finished[-40:]!r}); found {text[-40:]!r}.{mend(tokenizer)}"
        )
    return text.rpartition("1+1")[2]


def template_tokens(tokenizer) -> int:
    """Return how many tokens the template writes around one question and one answer, the end token included."""
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 2


def control_token(tokenizer, text: str) -> int:
    """Return the id of a control token such as `</think>`.

    Raises:
        UserError: the tokenizer splits the text or does not know it; the message shows the pieces.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if (pieces := tokenizer.convert_ids_to_tokens(ids)) != [text]:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} does not hold {text!r} as one token; it reads it as "
            f"{pieces}. --control_tokens add gives it a row of the vocabulary."
        )
    return ids[0]


def stop_tokens(tokenizer, generation_config=None) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's EOS, and those of the generation config.

    Raises:
        UserError: there is none.
    """
    more = getattr(generation_config, "eos_token_id", None)
    more = [] if more is None else [more] if isinstance(more, int) else list(more)
    ids = tuple(dict.fromkeys(i for i in [tokenizer.eos_token_id, *more] if i is not None))
    if not ids:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token: responses could never end.")
    return ids


def decode(tokenizer, response_ids, stop_ids: tuple[int, ...]) -> str:
    """Return a response as text without its final stop token; thinking tags stay, special token or not."""
    ids = list(response_ids)
    if ids and ids[-1] in stop_ids:
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def fitting(questions: list[Question], tokenizer, limit: int) -> tuple[list[Question], list[list[int]]]:
    """Return the questions whose prompt has at most `limit` tokens, and their prompt ids.

    Raises:
        UserError: none is left; the message says how long the shortest is.
    """
    prompts = [render(tokenizer, q.problem) for q in questions]
    kept = [i for i, ids in enumerate(prompts) if len(ids) <= limit]
    if not kept:
        shortest = min(map(len, prompts))
        raise UserError(
            f"every prompt is longer than --max_prompt_tokens {limit}: the shortest of {len(prompts)} has {shortest} "
            "tokens. Raise the limit."
        )
    return [questions[i] for i in kept], [prompts[i] for i in kept]
