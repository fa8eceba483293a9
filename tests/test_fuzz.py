"""Random and broken input: no exception but UserError, no verdict but the documented ones.

What is fuzzed is what strangers write: answers of a model, data files, YAML files. Comparing two answers is left to the
grader pool, which owns deadlines and crashes; here are the parts that run in the run's own process.
"""

import dataclasses
import functools
import json
import re
import traceback
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from adaptive_reasoning import adaptthink, formats, thinker
from adaptive_reasoning.adaptthink import read_authors_table
from adaptive_reasoning.benchmark.lenient import NUMBER, aime_answer, lenient_answer, lenient_same
from adaptive_reasoning.core.files import load_json, read_jsonl, truncate_jsonl
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.dialogue import STAGES, DialogueFormat
from adaptive_reasoning.formats.thinkless import Thinkless
from adaptive_reasoning.run.folder import read_config
from adaptive_reasoning.run.options import parse_args, parse_schedule, read_yaml
from adaptive_reasoning.tasks import control_tokens, math
from adaptive_reasoning.tasks.answers import MAX_ANSWER, boxed_answer, same_answer
from adaptive_reasoning.tasks.chain import parse_mix
from adaptive_reasoning.tasks.normalise import presentation_free, written_number
from adaptive_reasoning.tasks.think_template import answer_behind

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
    assert answer_behind(text) in (None, box)
    tagged = Arm.extract_answer(text)
    assert tagged is None or tagged in text
    assert Arm.format_of(text) in (*Arm.tags, "unknown")
    assert tagged is None or Arm.passes_gate(text)


@FAST
@given(responses)
def test_presentation_is_removed_once(text):
    """Removing presentation ends, and what it writes for a character ("\u2205" is \\emptyset) is short."""
    bare, unit = presentation_free(text)
    assert isinstance(bare, str) and len(bare) <= 12 * len(text) and isinstance(unit, str)


@FAST
@given(numbers)
def test_written_numbers_equal_themselves(number):
    parsed = written_number(number)
    if re.fullmatch(r"-?\d+/0+", number):
        assert parsed is None
    else:
        assert parsed is not None and (parsed.form in ("fraction", "unreduced") or same_answer(number, number))


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


verdicts = st.sampled_from(
    ["\\boxed{Yes}", "\\boxed{no.}", "\\boxed{ YES }", "\\boxed{}", "\\boxed{\\text{No}}", "yes", "No"]
)


@FAST
@given(st.lists(st.one_of(responses, verdicts), max_size=4).map("".join))
@example("\\boxed{\u0130}")  # a capital letter whose small form is two characters
@example("\\boxed{\x00}")
@example("\\text{" * 2000 + "\\boxed{Yes")
def test_every_gate_finds_a_piece_of_the_response_or_nothing(text):
    """The answers of all methods, the verdict of Thinker, and lenient scoring: no exception, no other value."""
    assert DialogueFormat.extract_answer(text, "verify") in ("yes", "no", None)
    for found in (
        DialogueFormat.extract_answer(text, "fast"),
        Arm.extract_answer(text),
        Thinkless.answer_by_first_token(text),
        Thinkless.answer_by_substring(text),
    ):
        assert found is None or found in text
    assert Thinkless.format_of(text) in (*Thinkless.tags, "malformed")
    assert Arm.empty_rationale(text) in (True, False, None)
    assert aime_answer(text) is None or abs(float(aime_answer(text))) < float("inf")
    lenient = lenient_answer(text)
    assert lenient is None or lenient in text


@FAST
@given(st.one_of(responses, st.text(max_size=20)), numbers)
def test_lenient_scoring_of_numbers_ends_in_a_verdict(answer, gold):
    """Where neither side holds a number math-verify decides, and the pool around it; everything before is ours."""
    if all(NUMBER.search(text) for text in (answer, gold)):
        try:
            assert lenient_same(answer, gold) in (True, False)
        except Exception as error:  # math-verify's and sympy's own, which the pool counts as errors
            assert "adaptive_reasoning" not in "".join(traceback.format_tb(error.__traceback__)[-1:])


def turn(answer, correct):
    return SimpleNamespace(
        answer=answer, correct=correct, score=float(correct), summary_logprob=None, num_tokens=3, cut=False
    )


@FAST
@given(st.sampled_from(["yes", "no", None]), st.booleans(), st.booleans(), st.floats(0.05, 0.95))
def test_thinker_pays_documented_rewards_only(verdict, right, fast_right, p):
    """Fast and Slow pay 0 or 1; a right verdict pays 1 - p or p, whichever makes both constant verdicts equal."""
    args = thinker.Args()
    turns = {"fast": turn("7", fast_right), "verify": turn(verdict, right), "slow": turn("7", right)}
    assert thinker.reward("fast", turns, p, args) in (0.0, 1.0)
    assert thinker.reward("slow", turns, p, args) in (0.0, 1.0)
    paid = thinker.reward("verify", turns, p, args)
    assert paid in (0.0, p, 1 - p) and (paid == 0.0 or right)
    for setting in ("train", "adaptive"):
        assert thinker.next_stage(dict(list(turns.items())[:2]), setting, args) in (*STAGES, None)


@FAST
@given(st.text(max_size=30))
@example("0:0.5,300:0.2")
@example("0:nan")
@example("0:1e400")
@example("\u0660:0.5")  # int() and float() read digits of any script
def test_a_schedule_is_pairs_or_an_error(text):
    try:
        pairs = parse_schedule("gamma_schedule", text, below=1.0)
    except UserError as error:
        assert "--gamma_schedule" in str(error)
        return
    assert pairs[0][0] == 0 and all(0 <= value < 1 for _, value in pairs)


@settings(FAST, max_examples=30)
@given(st.sampled_from([f.name for f in dataclasses.fields(adaptthink.Args)]), st.text(max_size=8))
@example("eval_samples", "1e3")
@example("delta", "infinity")
@example("gradient_checkpointing", "maybe")
def test_any_value_of_any_option_is_taken_or_refused(name, value):
    """Refused by us in one sentence, or by argparse with code 2; nothing else may come out."""
    try:
        args = parse_args(adaptthink.Args, [f"--{name}={value}"])
    except UserError as error:
        assert name in str(error)
    except SystemExit as stopped:
        assert stopped.code == 2
    else:
        assert isinstance(args, adaptthink.Args)


@FAST
@given(st.one_of(st.binary(max_size=80), st.lists(values.map(json.dumps).map(str.encode), max_size=4).map(b"\n".join)))
@example(b'{"step": 1}\n{"step": 2}\n{"ste')
@example(b'{"step": true}\n')
@example(b"[" * 5000 + b"\n")
@example(b"9" * 5000 + b"\n")
def test_damaged_files_of_a_run_are_read_or_named(tmp_path, content):
    """metrics.jsonl, config.yaml, reference.json and the authors' table, as any bytes.

    Brackets nested without end (RecursionError) and numbers of more than 4300 digits (a ValueError that is no
    JSONDecodeError) once ended in tracebacks, in data files too.
    """
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (
        read_jsonl,
        lambda p: read_yaml(p, adaptthink.Args),
        lambda p: list(math.read_rows(p)),
        lambda p: truncate_jsonl(p, 1),
        read_config,
        load_json,
    ):
        path.write_bytes(content)
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error)
    try:
        assert isinstance(read_authors_table(str(path), {}), dict)
    except UserError as error:
        assert str(path) in str(error)


@settings(FAST, max_examples=20)
@given(
    st.one_of(st.sampled_from(["auto", "<pad>", "<|end|>", "<|spare|>", "<think>"]), st.text(max_size=6)),
    st.text(max_size=8),
)
def test_a_control_slot_is_renamed_whole_or_refused(slot, new):
    """Same ids as before apart from the name, whatever that is, or one message."""
    before = slot_tokenizer()
    try:
        after = control_tokens.take(before, {new: slot})
    except UserError:
        return
    assert len(after) == len(before) and len(after.encode(new, add_special_tokens=False)) == 1
    assert after.encode("1+2", add_special_tokens=False) == before.encode("1+2", add_special_tokens=False)


@functools.cache
def slot_tokenizer():
    """The laboratory's tokenizer with one more special token that nothing uses."""
    tokenizer = formats.tokenizer("think")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|spare|>"]})
    return tokenizer
