"""Chat templates that --chat_template makes of a model's own: BASE, +END, or both, such as "plain+think".

BASE   (own)      the model's own template
       plain      its turn marks alone: no system text, no date, no tools
       arm        "Human: {question}\\nAssistant:" of LLaMA-Factory
       FILE.jinja a file
END    think      the prompt ends in `<think>` and a newline; of finished answers the thinking is cut, as R1 has it
       thinkless  the prompt ends at the assistant's mark; the thinking of finished answers is kept
"""

import json
import os
import re
from pathlib import Path

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks import prompts

# LLaMA-Factory's template "default", which ARM is trained with: EOS and a newline follow a finished answer.
ARM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Human: {{ message['content'] }}\n"
    "{% else %}Assistant:{{ message['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN = (
    "{{ START }}{% for message in messages %}{% if message['role'] == 'user' %}{{ USER + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ HEADER + message['content'] + END }}"
    "{% else %}{{ raise_exception('this chat template has turns of user and assistant alone') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ HEADER }}{% endif %}"
)
CUT_THOUGHTS = (  # before the template, whatever it does with the messages
    "{%- set cut = namespace(messages=[]) -%}{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' and m['content'] is string and '</think>' in m['content'] -%}"
    "{%- set cut.messages = cut.messages + [dict(m, content=m['content'].split('</think>')[-1])] -%}"
    "{%- else -%}{%- set cut.messages = cut.messages + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = cut.messages -%}"
)
OPEN = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
ENDS = ("think", "thinkless")


def chat_template(tokenizer, option: str) -> str:
    """Return the chat template of --chat_template for a model's tokenizer, which is left as it is.

    Raises:
        UserError: there is no such template, or the model's own cannot be edited in this way; the message has the mend.
    """
    base, _, end = option.rpartition("+") if option.rpartition("+")[2] in ENDS else (option, "", "")
    old = tokenizer.chat_template
    try:
        if base:
            tokenizer.chat_template = base_template(tokenizer, base)
        if end:
            tokenizer.chat_template = (think_template if end == "think" else thinkless_template)(tokenizer)
        return tokenizer.chat_template
    finally:
        tokenizer.chat_template = old


def base_template(tokenizer, base: str) -> str:
    """Return the template "arm", "plain" or that of a file."""
    if base in ("arm", "plain"):
        return ARM if base == "arm" else plain_template(tokenizer)
    if not os.path.isfile(base):  # of any text, that of a template too
        raise UserError(
            f"--chat_template {base[:80]}: no such file. Give the path of a Jinja file, or plain, arm, think, "
            "thinkless, or two of them such as plain+think."
        )
    try:
        return Path(base).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--chat_template {base}: is not UTF-8: {error}. Save the file as UTF-8.") from error


def plain_template(tokenizer) -> str:
    """Return a template of the turn marks that the model's own one writes, without its system text.

    Raises:
        UserError: there is no template, or it does not show its marks: a probe is not found in what it writes.
    """
    words = ("first question", "first response", "second question")
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), words)]
    text = prompts.chat_text(tokenizer, messages, add_generation_prompt=True)
    finished = prompts.chat_text(tokenizer, messages[:2])
    found = re.fullmatch("(.*)" + "(.*)".join(words) + "(.*)", text, re.DOTALL)
    start, _, between, header = found.groups() if found else [""] * 4
    end = finished.rpartition(words[1])[2]
    user = between.removeprefix(end)
    marked = text != prompts.chat_text(tokenizer, messages)  # an assistant's mark asks for the answer
    if not (marked and end and user and start.endswith(user) and between.startswith(end)):
        raise UserError(
            f"--chat_template plain: the chat template of {tokenizer.name_or_path!r} does not show the marks of its "
            f"turns: a probe gave {text!r}. Take --chat_template arm, or the path of a Jinja file."
        )
    bos = tokenizer.bos_token or ""
    begin = bos if text.startswith(bos) and not user.startswith(bos) else ""  # a turn's first mark may be the BOS token
    marks = {"START": begin, "USER": user, "HEADER": re.split("</?think>", header)[0], "END": end}
    return re.sub("|".join(marks), lambda m: json.dumps(marks[m[0]], ensure_ascii=False), PLAIN)


def think_template(tokenizer) -> str:
    """Return the tokenizer's chat template with a prompt that ends in `<think>` and a newline.

    Raises:
        UserError: its prompt does not end where an answer begins.
    """
    template, text = tokenizer.chat_template, prompts.prompt_text(tokenizer, "1+1")
    tail = text.rpartition("1+1")[2]
    if tail.endswith(prompts.THINK_OPEN + "\n"):
        return template
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "7"}]
    asked, finished = (prompts.chat_text(tokenizer, messages[:n]) for n in (1, 2))
    if text == asked or "think" in tail or not finished.startswith(text):
        raise UserError(
            f"--chat_template think cannot edit the chat template of {tokenizer.name_or_path!r}: its prompt ends in "
            f"{tail[-40:]!r}, which is not the assistant's mark. Take --chat_template plain+think, which keeps its "
            "turn marks alone, or the path of a Jinja file."
        )
    return CUT_THOUGHTS + template.removesuffix("\n") + OPEN  # Jinja drops the newline at the end of a template


BLOCK = re.compile(r"<think>(?:(?:\\n|\n)*</think>(?:\\n|\n)*|(?:\\n|\n)?)")  # an empty block, or one opened
CUT = re.compile(  # R1's template drops the thinking of finished answers
    r"\{%-?\s*if '</think>' in content\s*-?%\}\s*\{%-?\s*set content = content\.split\('</think>'\)\[-1\]\s*-?%\}\s*"
    r"\{%-?\s*endif\s*-?%\}"
)


def thinkless_template(tokenizer) -> str:
    """Return the tokenizer's chat template with Thinkless' two edits: no `<think>` prefilled, no thinking cut away.

    Raises:
        UserError: the edits do not lead to a prompt that ends at the assistant's mark, or answers are still cut.
    """
    edited = CUT.sub("", BLOCK.sub("", str(tokenizer.chat_template or "")))
    old, tokenizer.chat_template = tokenizer.chat_template, edited
    try:
        prompts.check_ends_at_assistant(tokenizer)
        answer = "<think>\na\n</think>\nb"
        messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": answer}]
        if answer not in prompts.chat_text(tokenizer, messages):
            raise UserError("Finished answers are changed (thinking is cut away).")
    except UserError as error:
        if not old:
            raise
        raise UserError(
            f"--chat_template thinkless cannot edit the chat template of {tokenizer.name_or_path!r}: without its "
            "<think> it still does not fit. Take --chat_template plain, which keeps its turn marks alone, or arm, "
            f"which replaces it. What is wrong with the edited one: {error}"
        ) from error
    finally:
        tokenizer.chat_template = old
    return edited


def template_mend(tokenizer) -> str:
    """Return what gives a tokenizer a chat template that ends at the assistant's mark."""
    try:
        thinkless_template(tokenizer)
    except UserError:
        return " --chat_template plain keeps its turn marks alone, and arm replaces it; both fit."
    return " --chat_template thinkless does it; plain keeps its turn marks alone, and arm replaces it."
