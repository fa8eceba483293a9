"""Random and broken input: no exception but UserError, no verdict but the documented ones.

What is fuzzed is what strangers write: answers of a model, data files, YAML files. Comparing two answers is left to the
grader pool, which owns deadlines and crashes; here are the parts that run in the run's own process.
"""

import json
import re

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from adaptive_reasoning import adaptthink, grpo
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.options import parse_args, read_yaml
from adaptive_reasoning.tasks import math
from adaptive_reasoning.tasks.answers import MAX_ANSWER, boxed_answer, presentation_free, same_answer, written_number
from adaptive_reasoning.tasks.chain import parse_mix

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Pieces that the rules look for, so that random texts come near them.
PIECES = [
    *(
        "</think>",
        "<think>",
        "\\boxed{",
        "\\boxed",
        "{",
        "}",
        "<ANSWER>",
        "</ANSWER>",
        "<COT>",
        "</COT>",
        "<CODE>",
        "</CODE>",
    ),
    *(
        "<LONG_COT>",
        "</LONG_COT>",
        "\\frac",
        "\\text{",
        "1,018",
        "-3/4",
        "^{",
        "_{8}",
        "\\%",
        "$",
        "\n",
        " ",
        "x=",
        "42",
    ),
]
responses = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=14).map("".join)
numbers = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.from_regex(r"-?[0-9]{1,3}/[0-9]{1,3}|[0-9]{0,3}\.[0-9]{1,3}", fullmatch=True),
)


@FAST
@given(responses)
@example("\\boxed{" * 50_000)
@example("<ANSWER>" * 1000 + "</ANSWER>" * 1000)
@example("\\boxed{" + "{" * 10_000 + "}" * 10_000 + "}")
def test_answers_are_found_or_not(text):
    """An answer is a piece of the response, balanced where braces decide; anything else is None."""
    box = boxed_answer(text)
    assert box is None or ("\\boxed{" + box + "}") in text and box.count("{") == box.count("}")
    assert adaptthink.extract_answer(text) in (None, box)
    tagged = grpo.extract_answer(text)
    assert tagged is None or tagged in text
    assert grpo.format_of(text) in (*grpo.TAGS, "unknown")
    assert tagged is None or grpo.passes_gate(text)


@FAST
@given(responses)
def test_presentation_is_removed_once(text):
    """Removing presentation ends, and leaves a text in which only less stands."""
    bare = presentation_free(text)
    assert isinstance(bare, str) and len(bare) <= len(text) + 2 * text.count("frac")


@FAST
@given(numbers)
def test_written_numbers_equal_themselves(number):
    parsed = written_number(number)
    if re.fullmatch(r"-?\d+/0+", number):
        assert parsed is None
    else:
        assert parsed is not None and (parsed.form == "fraction" or same_answer(number, number))


@FAST
@given(st.text(min_size=MAX_ANSWER + 1, max_size=MAX_ANSWER + 50))
def test_an_endless_box_is_wrong_and_never_parsed(answer):
    assert same_answer(answer, "1") is False


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(["problem", "question", "answer", "level", "choices", "answerKey", "x"])


@FAST
@given(
    st.lists(st.one_of(st.dictionaries(fields, values, max_size=5).map(json.dumps), st.text(max_size=20)), max_size=4)
)
def test_a_data_file_gives_questions_or_names_the_line(tmp_path, lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        questions = math.load_questions(str(path))
    except UserError as error:
        assert str(path) in str(error) or "is empty" in str(error)
    else:
        assert questions and all(q.problem.strip() and q.answer for q in questions)


@FAST
@given(st.binary(max_size=60))
def test_a_data_file_of_any_bytes(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    try:
        assert math.load_questions(str(path))
    except UserError as error:
        assert str(path) in str(error)


names = st.sampled_from(["model", "seed", "delta", "learning_rate", "forcing", "max_steps", "temperature", "nonsense"])


@FAST
@given(st.one_of(st.dictionaries(names, values, max_size=4).map(yaml.safe_dump), st.text(max_size=30)))
def test_a_yaml_file_gives_options_or_says_what_is_wrong(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        options = read_yaml(path, adaptthink.Args)
    except UserError as error:
        assert str(path) in str(error)
        return
    try:
        parse_args(adaptthink.Args, ["--config", str(path)])
    except UserError as error:
        assert any(name in str(error) for name in options)


@FAST
@given(st.one_of(st.text(max_size=12), st.lists(st.floats(), max_size=4).map(lambda x: ",".join(map(str, x)))))
def test_a_mix_is_a_distribution_or_an_error(mix):
    try:
        shares = parse_mix(mix)
    except UserError:
        return
    assert shares and min(shares) >= 0 and sum(shares) == pytest.approx(1)
