"""Response formats of the user's own: classes in a module outside the package, named as module.Class."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from adaptive_reasoning import formats
from adaptive_reasoning.benchmark.__main__ import Args, wanted_settings
from adaptive_reasoning.benchmark.votes import consensus
from adaptive_reasoning.degrpo import reward
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.think import Think
from adaptive_reasoning.formats.thinkless import Thinkless
from adaptive_reasoning.sft import Args as SftArgs
from adaptive_reasoning.sft import episodes_of
from adaptive_reasoning.tasks import chain
from adaptive_reasoning.tasks.think_template import answer_behind

ROOT = Path(__file__).parent.parent
MODULE = '''
from adaptive_reasoning.formats import ResponseFormat, Row
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.thinkless import Thinkless
from adaptive_reasoning.tasks import chain


class FiveModes(Arm):
    """A fifth mode: one tag more, and what stands between its tags in the laboratory."""

    tags = {**Arm.tags, "sketch": "SKETCH"}

    @classmethod
    def rationale(cls, question, mode):
        return "about " + question.problem if mode == "sketch" else super().rationale(question, mode)


class ThreeModes(Thinkless):
    """A third mode: one control token more, and nothing else."""

    tags = {**Thinkless.tags, "outline": "outline"}


def same_digit(answer, target):
    return answer == target


class Arrow(ResponseFormat):
    """A format from nothing: the answer behind an arrow, "loud" where it ends in an exclamation mark."""

    modes = {"calm": "Calm", "loud": "Loud"}
    check = staticmethod(same_digit)

    def mode_of(self, response_ids):
        return "loud" if "!" in self.tokenizer.decode(response_ids) else "calm"

    def extract_answer(self, response):
        return response.partition("->")[2].strip("! ") or None

    def opening(self, mode):
        return tuple(self.tokenizer.encode("->", add_special_tokens=False))

    def forced_settings(self):
        return {"always_calm": "calm"}

    @classmethod
    def response(cls, question, mode, rng):
        return f"-> {question.answer}" + "!" * (mode == "loud")


NOT_A_FORMAT = 7
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_formats.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("my_formats", "needs_more"):
        sys.modules.pop(name, None)


def opened(name):
    """Return (format, its tokenizer from the laboratory)."""
    tokenizer = formats.tokenizer(name)
    return formats.load(name)(tokenizer, SimpleNamespace()), tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_fifth_mode_of_arm():
    form, tokenizer = opened("my_formats.FiveModes")
    assert list(form.modes) == ["direct", "cot", "code", "long_cot", "sketch", "unknown"]
    assert form.modes["sketch"] == "Sketch" and "sketch" not in Arm.tags
    text = "<SKETCH>\nabout 1+1\n</SKETCH>\n<ANSWER>\n2\n</ANSWER>"
    assert form.mode_of(ids_of(tokenizer, text)) == "sketch" and form.extract_answer(text) == "2"
    assert form.empty_rationale(text) is False
    mixed = "<COT>\nhm\n<SKETCH>\n</COT>\n<ANSWER>\n2\n</ANSWER>"  # its tag closes the gate of the others
    assert form.extract_answer(mixed) is None and Arm.extract_answer(mixed) == "2"
    assert tokenizer.decode(form.opening("sketch")) == "<SKETCH>\n"
    spec = form.eval_spec()
    assert list(spec.settings) == ["adaptive", "direct", "cot", "code", "long_cot", "sketch"]
    assert spec.settings["sketch"] == tuple((i, 1.0) for i in form.opening("sketch"))


def test_the_consensus_still_falls_back_on_the_long_cot():
    """It was the last tag, whatever that was: a fifth mode took the place of Long CoT without a word."""
    form, _ = opened("my_formats.FiveModes")
    spec = form.eval_spec()
    assert (spec.consensus, spec.fallback) == (("direct", "cot", "code"), "long_cot")
    asked = wanted_settings("adaptive,consensus", spec)
    assert asked == ["adaptive", "direct", "cot", "code", "long_cot", "consensus"]
    rows = {
        mode: [{"question": 0, "sample": 0, "mode": mode, "answer": mode, "correct": mode == "long_cot", "tokens": 1}]
        for mode in form.tags
    }
    (row,) = consensus(rows, spec.consensus, spec.fallback)
    assert row["mode"] == "long_cot" and row["correct"] and row["tokens"] == 4


def test_a_third_mode_of_thinkless():
    form, tokenizer = opened("my_formats.ThreeModes")
    assert list(form.modes) == ["think", "short", "outline", "malformed"]
    (token,) = form.opening("outline")
    assert token == form.tokens["outline"] and tokenizer.decode([token]) == "<outline>"
    right = "<outline>\n\\boxed{7}"
    assert form.mode_of(ids_of(tokenizer, right)) == "outline" and form.extract_answer(right) == "7"
    for broken in ("<outline><short>\\boxed{7}", "<outline>\\boxed{7}</think>", "<outline><outline>\\boxed{7}"):
        assert form.extract_answer(broken) is None
    assert form.extract_answer("<think>\n1\n</think>\n\\boxed{7}") == "7"
    assert list(form.eval_spec().settings) == ["adaptive", "always_think", "never_think", "always_outline"]


def test_what_degrpo_pays_for_a_third_mode():
    rule = SimpleNamespace(mode_rule="first_token")
    paid = {
        (mode, right): reward(SimpleNamespace(mode=mode, score=float(right), text=""), 0.2, rule)
        for mode in ("think", "short", "outline", "malformed")
        for right in (True, False)
    }
    assert [paid[mode, True] for mode in ("think", "short", "outline", "malformed")] == [0.8, 1.0, 1.0, -1.0]
    assert {paid[mode, False] for mode in ("think", "short", "outline", "malformed")} == {-1.0}


@pytest.mark.parametrize("name", ["FiveModes", "ThreeModes", "Arrow"])
def test_metrics_of_new_modes_are_declared(name):
    """Every metric of a mode has its meaning, whoever named the mode."""
    from adaptive_reasoning.formats.statistics import mode_metrics, mode_statistics

    form, _ = opened(f"my_formats.{name}")
    rows = [{"group": 0, "mode": mode, "accuracy": 1.0, "tokens": 5, "advantage": 0.1} for mode in list(form.modes)[:2]]
    got, declared = mode_statistics(rows, form.modes), mode_metrics(form)
    assert got.keys() == declared.keys() and all(m.meaning for m in declared.values())


@pytest.mark.parametrize("name", ["FiveModes", "ThreeModes", "Arrow"])
def test_a_cold_start_shows_new_modes(name):
    """Every mode is in the rows, and its text comes back from the tokenizer in the mode that was asked for."""
    form, tokenizer = opened(f"my_formats.{name}")
    args, n = SftArgs(formats=f"my_formats.{name}", max_steps=10), 4 * len(form.cold_start_modes())
    rows = form.rows(args, np.random.default_rng(0), n, 10)
    got = [form.mode_of(ids_of(tokenizer, row.response)) for row in rows]
    assert got == list(form.cold_start_modes()) * 4
    assert all(form.extract_answer(row.response) == row.question.answer for row in rows)
    for row, e in zip(rows, episodes_of(rows, tokenizer, 512)):
        assert tokenizer.decode(e.response_ids) == row.response + "<|end|>" and e.action_mask.all()


def test_a_format_from_nothing():
    form, tokenizer = opened("my_formats.Arrow")
    question = chain.make_question(np.random.default_rng(0), 2, "x")
    for mode in ("calm", "loud"):
        text = form.response(question, mode, None)
        assert form.mode_of(ids_of(tokenizer, text)) == mode and form.extract_answer(text) == question.answer
    spec = form.eval_spec()
    assert list(spec.settings) == ["adaptive", "always_calm"] and list(spec.modes) == ["calm", "loud"]
    assert spec.check is form.check and spec.check("7", "7")


@pytest.mark.parametrize(
    "name, message",
    [
        ("tags", "there is no response format 'tags': take think, arm"),
        ("no_such_module.MyFormat", "there is no module 'no_such_module' on the Python path"),
        ("my_formats.NoSuchClass", "the module my_formats has no 'NoSuchClass'"),
        ("my_formats.NOT_A_FORMAT", "it is no subclass of ResponseFormat"),
        ("my_formats", "there is no response format 'my_formats'"),
        ("", "there is no response format ''"),
    ],
)
def test_a_format_that_is_none(name, message):
    with pytest.raises(UserError, match=message):
        formats.load(name)


def test_a_method_takes_the_formats_it_can_train():
    assert formats.load("my_formats.ThreeModes", Thinkless).__name__ == "ThreeModes"
    with pytest.raises(UserError, match="it is no subclass of Think"):
        formats.load("arm", Think)
    with pytest.raises(UserError, match="this command samples single responses"):
        formats.load("dialogue")(formats.tokenizer("dialogue"), SimpleNamespace())
    tokenizer = formats.tokenizer("my_formats.ThreeModes")
    with pytest.raises(UserError, match="--mode_rule substring.*no other mode"):
        formats.load("my_formats.ThreeModes")(tokenizer, Args(mode_rule="substring"))


def test_an_error_in_the_users_module_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_nowhere"):
        formats.load("needs_more.MyFormat")


@pytest.mark.parametrize("name", ["FiveModes", "ThreeModes"])
def test_the_benchmark_measures_new_modes(name, module):
    """The user's command, with the module in the working directory; the package is not touched."""
    tokenizer = formats.tokenizer(f"my_formats.{name}")
    chain.tiny_model(tokenizer, hidden=32, layers=1).save_pretrained(module / "model")
    tokenizer.save_pretrained(module / "model")
    command = [sys.executable, "-m", "adaptive_reasoning.benchmark", "--answer_format", f"my_formats.{name}"]
    command += ["--model", "model", "--task", "chain", "--chain_eval_questions", "4", "--max_new_tokens", "16"]
    command += ["--dtype", "fp32", "--output_dir", "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=module, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    new = {"FiveModes": "sketch", "ThreeModes": "outline"}[name]
    assert new in done.stdout and (module / "out" / "evaluation.json").is_file()


def test_an_option_that_a_command_lacks_keeps_its_default():
    """GRPO has neither --first_word nor --mode_rule; the benchmark has all."""
    tokenizer = formats.tokenizer("think")
    word = tokenizer.encode("Okay", add_special_tokens=False)
    assert Think(tokenizer, Args(first_word="Okay")).word == word != Think(tokenizer, SimpleNamespace()).word
    assert (Args().first_word, Args().mode_rule, Args().fast_budget) == ("Alright", "first_token", 1000)


def test_boxed_has_a_cold_start():
    form, tokenizer = opened("boxed")
    rows = form.rows(SftArgs(formats="boxed"), np.random.default_rng(0), 6, 1)
    assert all(form.extract_answer(row.response) == row.question.answer for row in rows)
    assert list(form.eval_spec().settings) == ["adaptive"] and form.mode_of([1]) == "response"
    with pytest.raises(UserError, match="no tokens that force"):
        form.opening("response")


LENGTHS = [(1, [25, 37, 49, 61]), (3, [37, 61, 85, 109]), (6, [55, 97, 139, 181])]


@pytest.mark.parametrize("operations, lengths", LENGTHS)
def test_each_check_of_the_thinking_costs_another_pass(operations, lengths):
    """19 + 6n + k (6 + 6n) tokens for n operations and k checks."""
    tok, rng = formats.tokenizer("think"), np.random.default_rng(0)
    question = chain.make_question(rng, operations, "")
    texts = [Think.thinking(question, rng, k) for k in range(4)]
    assert [len(tok.encode(text, add_special_tokens=False)) + 1 for text in texts] == lengths
    assert all(answer_behind(text) == question.answer for text in texts)


def test_slips_cost_accuracy_and_a_check_mends_most_of_them():
    """0.9^n right without a check, 0.975^n with one or more; the boxed answer is the last pass's."""
    rng = np.random.default_rng(0)
    question = chain.make_question(rng, 4, "")
    for checks, expected in ((0, 0.9**4), (1, 0.975**4), (3, 0.975**4)):
        texts = [Think.thinking(question, rng, checks, slip=0.1) for _ in range(1500)]
        right = np.mean([answer_behind(text) == question.answer for text in texts])
        assert abs(right - expected) < 0.04, (checks, right)


def test_a_slip_goes_on_into_the_operations_behind_it():
    assert [value for _, value in chain.steps("1+1*2", slip=1.0, rng=np.random.default_rng(0))] == [3, 7]
    assert [text for text, _ in chain.steps("1+1*2", slip=1.0, rng=np.random.default_rng(0))] == ["1+1=3", "3*2=7"]


def test_the_second_laboratory_mixes_lengths():
    args = SftArgs(checks="0.5,0,0.5", slip=0.1, nothinking_rows=0.25)
    rows = Think.rows(args, np.random.default_rng(1), 400, step=1)
    thinking = [row.response for row in rows if not row.response.startswith("</think>")]
    found = {k: sum(text.count("let me check") == k for text in thinking) / len(thinking) for k in range(4)}
    assert found[1] == found[3] == 0 and abs(found[0] - 0.5) < 0.08 and abs(len(thinking) / 400 - 0.75) < 0.07


def test_slips_without_checks_are_refused():
    with pytest.raises(UserError, match="--slip goes with --checks"):
        SftArgs(slip=0.1)
