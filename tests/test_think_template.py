"""Templates that can think: what is found by rendering our own small ones, and Qwen3's where it is installed."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.think_template import ThinkingArgs, put, read

TURNS = (  # <S> system, <U> user, <A> assistant, <E> end of a turn
    "{% for m in messages %}{% if m.role == 'system' %}<S>{{ m.content }}<E>{% elif m.role == 'user' %}"
    "<U>{{ m.content }}<E>{% else %}<A>"
)
END = "{{ m.content }}<E>{% endif %}{% endfor %}"
KEPT = "{{ '<think>\n' + m.reasoning_content | default('', true) + '\n</think>\n\n' }}" + END  # a block in every turn
OFF = "{% if add_generation_prompt %}<A>{% if enable_thinking is defined and not enable_thinking %}"
BLOCK = "{{ '<think>\n\n</think>\n\n' }}"
CUT = "{{ m.content.split('</think>')[-1] }}<E>{% endif %}{% endfor %}"  # thoughts are stripped
OPEN = "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"

TEMPLATES = {
    "after": TURNS + KEPT + OFF + BLOCK + "{% endif %}{% endif %}",
    "inside": TURNS + KEPT + OFF + BLOCK + OPEN,
    "inside, default off": TURNS + KEPT + "{% if add_generation_prompt %}<A>{% if not enable_thinking %}" + BLOCK + OPEN,
    "tight": TURNS + CUT + OFF + "<think></think>" + OPEN,
    "either": TURNS + CUT + "{% if add_generation_prompt %}<A>{{ '<think>' if thinking else '</think>' }}{% endif %}",
    "user word": (
        "{% set off = enable_thinking is defined and not enable_thinking %}{% for m in messages %}"
        "{% if m.role == 'user' %}<U>{{ m.content }}{% if off %}/nothink{% endif %}{% else %}<A>"
        "{{ '\n<think>' + m.reasoning_content | default('') + '</think>\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<A>{% if off %}{{ '\n<think></think>' }}{% endif %}{% endif %}"
    ),
    "system word": (
        "{% set off = enable_thinking is defined and not enable_thinking %}<S>{{ '/no_think' if off else '/think' }}<E>"
        + TURNS + END + "{% if add_generation_prompt %}<A>{% if off %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
    ),
    "system text": (
        TURNS + CUT + "{% if add_generation_prompt %}<A>{% if messages[0].role == 'system' and "
        "'/no_think' in messages[0].content %}" + BLOCK + "{% endif %}{% endif %}"
    ),
    "channel": (
        "{% if enable_thinking %}<S><|think|><E>{% endif %}" + TURNS + "{{ m.content.split('<channel|>')[-1] }}<E>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% if not enable_thinking %}"
        "{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
    ),
    "always": (
        TURNS + "{{ '<think>\n' + m.reasoning_content | default('') + '\n</think>\n' }}" + END + "{% if "
        "messages[-1].role == 'user' %}<A>{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
    ),
    "prefilled": TURNS + CUT + "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}",
}  # fmt: skip
SYSTEM = {"think_system": "/think", "skip_system": "/no_think"}
CLOSED = ("\n\n", "</think>", "\n\n")
TABLE = {  # x' ends in, moved, Thinking, NoThinking, exact, close, default
    "after": ("<think>", 1, ("\n",), CLOSED, True, "\n</think>\n\n", "on"),
    "inside": ("<think>", -1, ("\n",), CLOSED, True, "\n</think>\n\n", "on"),
    "inside, default off": ("<think>", -1, ("\n",), CLOSED, True, "\n</think>\n\n", "off"),
    "tight": ("<think>", -1, ("\n",), ("</think>",), True, "</think>", "on"),
    "either": ("<A>", -1, ("<think>",), ("</think>",), True, "</think>", "off"),
    "user word": ("<think>", 2, (), ("</think>",), False, "</think>\n", "on"),
    "system word": ("<think>", 1, ("\n",), ("\n\n", "</think>", "\n"), False, "\n</think>\n", "on"),
    "system text": ("<think>", 1, (), CLOSED, False, "\n</think>\n\n", "on"),
    "channel": ("\n", 3, (), ("<channel|>",), False, "<channel|>", "off"),
    "always": ("<think>", 1, ("\n",), ("\n\n", "</think>", "\n"), True, "\n</think>\n", "on"),
    "prefilled": ("\n", 0, (), ("</think>",), False, "\n</think>\n\n", "on"),
}
MARKS = ("<S>", "<U>", "<A>", "<E>", "<think>", "</think>", "<|channel>", "<channel|>", "<|think|>")


def words(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words and runs of newlines, marks and tags added: "\\n\\n" is one token."""
    texts = [
        "\n",
        "\n\n",
        "thought",
        "Okay",
        "/think",
        "/no_think",
        "/nothink",
        *"What is one and two It .,?!+1/".split(),
    ]
    texts += [c for c in map(chr, range(33, 127)) if c not in texts]
    pieces = Tokenizer(models.WordLevel({text: i for i, text in enumerate(["[UNK]", *texts])}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n|/?[a-z_A-Z]+|[^\s]|[ ]+"), "isolated")
    pieces.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<E>", chat_template=template)


def args_of(name: str) -> ThinkingArgs:
    return ThinkingArgs(**SYSTEM) if name == "system text" else ThinkingArgs()


def names(tokenizer, ids) -> tuple[str, ...]:
    return tuple(tokenizer.decode([i]) for i in ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_openings(name):
    tokenizer = words(TEMPLATES[name])
    found = read(tokenizer, args_of(name))
    x = put(tokenizer, args_of(name), True, "think") and prompts.render(tokenizer, "1+1")
    got = (names(tokenizer, x)[-1], found.moved, names(tokenizer, found.thinking), names(tokenizer, found.nothinking))
    assert (*got, found.exact, found.close, found.default) == TABLE[name]
    assert found.end == tokenizer.convert_tokens_to_ids("<U>" if name == "user word" else "<E>")
