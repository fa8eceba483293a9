"""Thinking hidden in answers that skip it: the words against the official script's, the rest by hand."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_think_template import TEMPLATES, words

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import from_json, to_json
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats.think import Think
from adaptive_reasoning.report.alarms import Alarms
from adaptive_reasoning.report.panels import training_panels
from adaptive_reasoning.report.run_folder import Run
from adaptive_reasoning.run.leak import (
    WORDS,
    add_leaks,
    leak_metrics,
    leak_row,
    leaks,
    reasoning_words,
    traces_of,
    yardsticks,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "leak_words.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_words_of_the_official_script(case):
    found = reasoning_words(case["inputs"]["text"])
    assert {word: found.count(word) for word in WORDS} == case["expected"]["counts"]
    assert len(found) == case["expected"]["total"] and list(WORDS) == GOLDEN["conventions"]["words"]


@pytest.mark.parametrize(
    "text, n", [("so it is 7", 0), ("Wait, 7", 1), ("waiting", 0), ("hmmm", 0), ("let  me\nTHINK", 1), ("await", 0)]
)
def test_words_by_hand(text, n):
    assert len(reasoning_words(text)) == n


def row(question, mode, tokens, words=None, tags=False, difficulty="1"):
    traces = {"answer_tokens": tokens} | ({} if words is None else {"words": words, "tags": tags})
    return {"question": question, "mode": mode, "traces": traces, "difficulty": difficulty}


THOUGHT = [row(0, "think", 5), row(0, "think", 7), row(1, "think", None), row(2, "malformed", None)]


def test_the_yardstick_is_the_mean_answer_behind_a_thinking():
    assert yardsticks([*THOUGHT, row(0, "short", 100, words=0), row(3, "think", 4)]) == {0: 6, 3: 4}


def test_shares_by_hand():
    """h of question 0 is 6: 12 tokens are not long, 13 are. Question 1 has none: 99 tokens are not counted as long."""
    answers = [
        row(0, "short", 12, words=0), row(0, "short", 13, words=0), row(1, "short", 99, words=0),
        row(0, "short", 3, words=2), row(1, "short", 3, words=1, tags=True),
    ]  # fmt: skip
    (table,) = leaks(answers, ["short"], yardsticks(THOUGHT)).values()
    cut = row(0, "short", None, words=0)  # an ARM rationale that is not closed has no answer yet
    assert leaks([*answers, cut], ["short"], yardsticks(THOUGHT))["short"]["long"] == 1 / 3
    assert table == {
        "answers": 5, "share": 3 / 5, "words": 2 / 5, "words_per_answer": 3 / 5, "long": 1 / 3, "tags": 1 / 5
    }  # fmt: skip
    empty = leaks(THOUGHT, ["short"], {})["short"]
    assert empty["answers"] == 0 and set(empty.values()) == {0, None}
    metrics = leak_row([*THOUGHT, *answers], ["short"])
    assert metrics["leak/short_share"] == 3 / 5 and metrics["leak/short_long"] == 1 / 3
    assert metrics.keys() | {"eval/short_leak_share"} == leak_metrics({"short": "Short"}, ["short"]).keys()


def test_evaluations_are_measured_by_the_thinking_of_the_same_question():
    """Forced thinking is the yardstick of the free answers; an evaluation of one setting goes by the last one."""
    free = [row(0, "short", 13, words=0), row(1, "short", 3, words=0, difficulty="2")]
    rows = {"adaptive": free, "always_think": THOUGHT, "never_think": [row(0, "short", 12, words=1)]}
    results = {name: {"by_difficulty": {"1": {}, "2": {}}} for name in rows}
    known = add_leaks(results, rows, ["short"], {})
    assert known == {0: 6}
    assert results["adaptive"]["leak"]["short"]["share"] == 1 / 2
    assert [results["adaptive"]["by_difficulty"][level]["leak"]["short"] for level in "12"] == [1, 0]
    assert results["never_think"]["leak"]["short"]["words"] == 1
    assert results["always_think"]["leak"]["short"]["share"] is None
    later = {"adaptive": {"by_difficulty": {}}}
    assert add_leaks(later, {"adaptive": free}, ["short"], known) == known
    assert later["adaptive"]["leak"]["short"]["long"] == 1  # question 1 has no yardstick


def opened(name):
    if name == "native":
        tokenizer = words(TEMPLATES["after"], more=["Wait", "seven", "eight"])
    else:
        tokenizer = formats.tokenizer(name)
    return formats.load(name)(tokenizer, SimpleNamespace())


SAYS = {  # format -> (response, mode, behind the thinking or the opening, reasoning words, a tag of the thinking)
    "think": [
        ("</think>\n\\boxed{7}", "nothinking", "\n\\boxed{7}", 0, False),
        ("</think>\nWait, 3*7=1\n\\boxed{7}", "nothinking", "\nWait, 3*7=1\n\\boxed{7}", 1, False),
        ("</think>\n7</think>\n\\boxed{7}", "nothinking", "\n7</think>\n\\boxed{7}", 0, True),
        ("Okay\n</think>\n\\boxed{7}", "thinking", "\n\\boxed{7}", None, None),
        ("Okay\n", "thinking", None, None, None),
    ],
    "thinkless": [
        ("<short>\n\\boxed{7}", "short", "\n\\boxed{7}", 0, False),
        ("<short>\n<think>Okay</think>\n\\boxed{7}", "short", "\n<think>Okay</think>\n\\boxed{7}", 1, True),
        ("<think>\nOkay\n</think>\n\\boxed{7}", "think", "\n\\boxed{7}", None, None),
        ("\\boxed{7}", "malformed", None, None, None),
    ],
    "arm": [
        ("<ANSWER>\n7\n</ANSWER>", "direct", "<ANSWER>\n7\n</ANSWER>", 0, False),
        ("<ANSWER>\n7\n</ANSWER><COT>", "direct", "<ANSWER>\n7\n</ANSWER><COT>", 0, True),
        ("<COT>\nWait\n</COT>\n<ANSWER>\n7", "cot", "\n<ANSWER>\n7", 1, False),
        ("<COT>\n<LONG_COT>\n</COT>\n7", "cot", "\n7", 0, True),
        ("<COT>\n7", "cot", None, 0, False),
        ("<LONG_COT>\nWait\n</LONG_COT>\n7", "long_cot", "\n7", None, None),
        ("7", "unknown", None, None, None),
    ],
    "native": [
        ("\n\n</think>\n\nseven", "short", "seven", 0, False),
        ("\n\n</think>\n\nWait <think>", "short", "Wait <think>", 1, True),
        ("\nWait\n</think>\n\nseven", "think", "\n\nseven", None, None),
        ("seven", "malformed", None, None, None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name, says", [(name, case) for name, cases in SAYS.items() for case in cases])
def test_what_each_format_shows_of_a_response(name, says):
    form, (response, mode, answer, found, tags) = opened(name), says
    ids = form.tokenizer.encode(response, add_special_tokens=False)
    assert form.mode_of(ids) == mode and form.answer_part(response, mode) == answer
    traces = form.traces(response, mode, len(ids) + 1, True)  # and an end token
    assert (traces.get("words"), traces.get("tags")) == (found, tags)
    rest = None if answer is None else len(form.tokenizer.encode(answer, add_special_tokens=False)) + 1
    assert traces["answer_tokens"] == rest
    cut = form.traces(response, mode, len(ids), False)["answer_tokens"]
    assert cut == (rest and rest - 1 if mode in form.skips else None), "a thinking that was cut is no yardstick"


def test_every_format_with_a_mode_that_skips_knows_what_begins_it():
    for name in SAYS:
        form = opened(name)
        begun = form.mode_openings()
        assert set(form.skips) <= set(begun) and len(form.modes) - len(begun) == 1
        for mode, ids in begun.items():
            assert ids == tuple(form.opening(mode)[: len(ids)])
            text = form.tokenizer.decode(form.opening(mode)) + "seven"
            assert form.mode_of(form.tokenizer.encode(text, add_special_tokens=False)) == mode


def test_a_step_of_adaptthink_by_hand():
    """An answer has 6 tokens behind `</think>`; worked out once more behind it, it is long and says Wait."""
    form = opened("think")
    said = {"Okay, let me see.\n3*7=1\nSo it is 1.\n</think>\n\\boxed{1}": "thinking",
            "</think>\n\\boxed{1}": "nothinking",
            "</think>\nWait, let me check.\n3*7=1\nSo it is 1.\n\\boxed{1}": "nothinking"}  # fmt: skip
    episodes = []
    for text, mode in said.items():
        n = len(form.tokenizer.encode(text, add_special_tokens=False)) + 1
        empty, action = torch.zeros(n), torch.ones(n, dtype=torch.bool)
        e = Episode(Question("q", "3*7", "1"), 4, empty[:1].long(), empty.long(), empty, action, "stop")
        episodes.append(replace(e, mode=mode, text=text))
    rows = traces_of(episodes, form)
    assert yardsticks(rows) == {4: 6} and rows[1]["traces"] == {"answer_tokens": 6, "words": 0, "tags": False}
    found = leak_row(rows, form.skips)
    assert found == {
        "leak/nothinking_share": 0.5, "leak/nothinking_words": 0.5, "leak/nothinking_words_per_answer": 0.5,
        "leak/nothinking_long": 0.5, "leak/nothinking_tags": 0,
    }  # fmt: skip
    assert traces_of(episodes, formats.load("boxed")(form.tokenizer, SimpleNamespace())) == []


def test_the_alarm_waits_for_the_mode_to_be_chosen_more_often():
    declared = from_json(to_json(leak_metrics(Think.modes, Think.skips)))
    declared |= from_json(to_json({"eval/nothinking_share": declared["eval/nothinking_leak_share"]}))

    def raised(leak, shares):
        rows = [{"step": i, "leak/nothinking_share": leak} for i in range(1, 8)]
        return [
            a.key for a in Alarms(declared, [row | {"eval/nothinking_share": s} for row, s in zip(rows, shares)]).raised
        ]

    rising, falling = [0.1, *[0.3] * 6], [0.3, *[0.1] * 6]
    assert raised(0.2, rising) == ["leak/nothinking_share"]
    assert raised(0.2, falling) == raised(0.2, [0.3] * 7) == raised(0.05, rising) == []
    alone = Alarms(declared, [{"step": i, "leak/nothinking_share": 0.2} for i in range(6)])
    assert len(alone.raised) == 1, "without evaluations the leak alone counts"


def test_the_panel_shows_training_and_every_setting():
    def evaluation(step, setting, share):
        modes = {"thinking": {"share": 1 - share}, "nothinking": {"share": share}}
        result = {"accuracy": 0.5, "mean_tokens": 9.0, "modes": modes, "by_difficulty": {}}
        table = {"nothinking": {"share": None if share == 0 else share / 2}}
        return {"step": step, "setting": setting, "benchmark": "chain", "result": result | {"leak": table}}

    rows = [evaluation(0, "adaptive", 0), evaluation(0, "never_think", 1), evaluation(2, "adaptive", 0.5)]
    steps = [{"step": i, "leak/nothinking_share": i / 10} for i in (1, 2)]
    run = Run(Path("run"), {}, steps, [], rows, None)
    panel = next(panel for panel in training_panels(run) if panel.title.startswith("Thinking hidden"))
    assert {line.label: line.points for line in panel.lines} == {
        "nothinking": [(1, 0.1), (2, 0.2)],
        "nothinking, free choice": [(2, 0.25)],
        "nothinking, never think": [(0, 0.5)],
    }  # fmt: skip
    bare = Run(Path("run"), {}, [{"step": 1}], [], [{**rows[0], "result": {**rows[0]["result"], "leak": {}}}], None)
    assert not any(panel.title.startswith("Thinking hidden") for panel in training_panels(bare))
