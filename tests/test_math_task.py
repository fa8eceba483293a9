"""math.py: questions from files, hub and benchmark names, and one clear message for every malformed file."""

import csv
import dataclasses
import gzip
import json
import os
import sys
import types
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks import fetch
from adaptive_reasoning.tasks.answers import same_answer
from adaptive_reasoning.tasks.math import BENCHMARKS, load_questions, read_rows

DATA = os.environ.get("ADAPTIVE_REASONING_DATA", "")


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("ADAPTIVE_REASONING_DATA", raising=False)


class Arrow(list):
    """Rows as a `datasets.Dataset` hands them out."""

    def with_format(self, name):
        assert name == "arrow"
        return self

    def iter(self, size):
        return (pyarrow.Table.from_pylist(self[i : i + size]) for i in range(0, len(self), size))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: {(name, config, split): rows}; what is not there raises as the real one does."""
    known = {}

    def load_dataset(name, config=None, split=None):
        if (name, config, split) not in known:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        return Arrow(known[name, config, split])

    def get_dataset_config_names(name):
        if not any(name == found for found, _, _ in known):
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        return [config for found, config, _ in known if found == name]

    of_the_hub = types.SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=get_dataset_config_names)
    monkeypatch.setitem(sys.modules, "datasets", of_the_hub)
    return known


ROWS = [
    {"problem": "1+1?", "answer": "2", "level": 3},
    {"question": "2+2?", "answer": 4, "level": "Level 5"},
    {"problem": "Name \u2028 it.", "answer": "\\frac{1}{2}", "solution": "..."},
]


def jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_jsonl(tmp_path):
    source = jsonl(tmp_path / "easy.jsonl")
    assert load_questions(source) == [
        Question("easy/0", "1+1?", "2", "3", source),
        Question("easy/1", "2+2?", "4", "5", source),
        Question("easy/2", "Name \u2028 it.", "\\frac{1}{2}", None, source),
    ]
    assert load_questions(source, limit=2) == load_questions(source)[:2]


def test_parquet_gives_the_same_questions(tmp_path):
    rows = [{"problem": r.get("problem") or r["question"], "answer": str(r["answer"])} for r in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "easy.parquet")
    (tmp_path / "other").mkdir()
    got = load_questions(str(tmp_path / "easy.parquet"))
    want = load_questions(jsonl(tmp_path / "other" / "easy.jsonl", rows))
    assert [(q.id, q.problem, q.answer) for q in got] == [(q.id, q.problem, q.answer) for q in want]


def test_read_rows_gives_the_rows_as_they_are(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"problem": "p", "response": "r"}, {}])
    assert list(read_rows(path)) == [(f"{path}, line 1", {"problem": "p", "response": "r"}), (f"{path}, line 2", {})]
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="none.jsonl is empty"):
        list(read_rows(tmp_path / "none.jsonl"))


def test_an_empty_hub_data_set(hub):
    hub["owner/none", None, "train"] = []
    with pytest.raises(UserError, match="owner/none is empty"):
        load_questions("owner/none")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem": "p", "answer": "1"}\n\n  \n{"problem": "q", "answer": "2"}\n\n')
    assert [q.id for q in load_questions(str(path))] == ["a/0", "a/1"]


GOOD = '{"problem": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (GOOD + "problem: p\n", "line 2 is not JSON"),
        (GOOD + "\n" + GOOD[:-5] + "\n", "line 3 is not JSON"),
        ("[\n", "line 1 is not JSON"),
        (GOOD + "[1, 2]\n", "line 2: expected an object"),
        (GOOD + "null\n", "line 2: expected an object"),
        ('{"answer": "1"}\n', r"line 1: no field 'problem' \(fields: answer\)"),
        (GOOD + '{"problem": "p"}\n', r"line 2: no field 'answer' \(fields: problem\)"),
        (GOOD + '{"problem": "p", "answer": null}\n', "line 2: 'answer' has no value"),
        (GOOD + "{}\n", "line 2: no field 'problem'"),
        (GOOD + '{"problem": " ", "answer": "1"}\n', "line 2: 'problem' is empty"),
        (GOOD + '{"problem": "p", "answer": ""}\n', "line 2: 'answer' is empty"),
        (GOOD + '{"problem": "p", "answer": "so ####  "}\n', "line 2: nothing follows '####'"),
        (GOOD + '{"problem": "p", "answer": ["1"]}\n', "line 2: 'answer' has to be text"),
        (GOOD + '{"problem": "\\uD83D", "answer": "1"}\n', r"line 2: \\ud83d is half of a character"),
        (GOOD + '{"problem": "p", "answer": true}\n', "line 2: 'answer' has to be text"),
    ],
)
def test_malformed_files_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_questions(str(path))
    assert str(path) in str(error.value)


def test_bytes_that_are_no_utf8_and_no_parquet(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(GOOD.encode() + b'{"problem": "\xff", "answer": "1"}\n')
    with pytest.raises(UserError, match="bad.jsonl, line 2 is not UTF-8"):
        load_questions(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="bad.parquet cannot be read as Parquet"):
        load_questions(str(tmp_path / "bad.parquet"))


def test_a_part_of_a_source(tmp_path):
    lines = [{"problem": text, "answer": str(i)} for i, text in enumerate(["b", "d", "A", "c"])]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = f"{tmp_path / 'q.jsonl'}"

    def problems(source, **more):
        return "".join(q.problem for q in load_questions(source, **more))

    assert problems(f"{path}[:2]") == "bd" and problems(f"{path}[-1:]") == "c" and problems(f"{path}[1:3]") == "dA"
    assert problems(f"sorted({path})[-3:]") == "bcd" and problems(f"sorted({path})[:]", limit=2) == "Ab"
    assert load_questions(f"sorted({path})[-1:]")[0].id == "q/1"  # the ids are those of the rows
    for source in (f"{path}[:5]", f"{path}[-5:]", f"{path}[2:2]"):
        with pytest.raises(UserError, match="there are 4 questions"):
            load_questions(source)


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "nowhere.parquet", "nowhere.JSONL.gz", "./nowhere", "/nowhere/data"]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(hub, source):
    with pytest.raises(UserError, match="no such file"):
        load_questions(source)


def test_hub_data_sets(hub):
    hub["owner/Deep", None, "train"] = [{"problem": "p", "answer": "1", "solution": "s"}] * 2
    assert load_questions("owner/Deep") == [Question(f"Deep/{i}", "p", "1", None, "owner/Deep") for i in range(2)]
    hub["openai/gsm8k", "main", "train"] = [{"question": "p", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}]
    assert load_questions("openai/gsm8k:main") == [Question("gsm8k/0", "p", "18", None, "openai/gsm8k:main")]


def test_hub_errors_name_data_set_and_mend(hub):
    with pytest.raises(UserError, match=r"(?s)owner/nothing, split train, .*ConnectionError.*give a local file"):
        load_questions("owner/nothing")
    hub["owner/odd", None, "test"] = [{"problem": "p", "answer": "1"}, {"prompt": "p"}]
    with pytest.raises(UserError, match="data set owner/odd, split test, row 1: 'problem' has no value"):
        load_questions("owner/odd", split="test")


def test_without_the_datasets_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_questions("owner/Deep")


def test_benchmarks_by_name(hub, tmp_path, monkeypatch):
    hub["openai/gsm8k", "main", "test"] = [{"question": "p", "answer": "so\n#### 1,018"}]
    hub["HuggingFaceH4/MATH-500", None, "test"] = [{"problem": "p", "answer": "x", "level": 2}]
    hub["HuggingFaceH4/aime_2024", None, "train"] = [{"problem": "p", "answer": "025"}]
    assert load_questions("gsm8k") == [Question("gsm8k/0", "p", "1,018", None, "gsm8k")]
    assert load_questions("math500") == [Question("math500/0", "p", "x", "2", "math500")]
    assert load_questions("aime24") == [Question("aime24/0", "p", "025", None, "aime24")]
    assert {name: benchmark.samples for name, benchmark in BENCHMARKS.items()} == {
        "gsm8k": 1,
        "math500": 1,
        "math": 1,
        "csqa": 1,
        "obqa": 1,
        "svamp": 1,
        "bbh": 1,
        "minerva": 1,
        "olympiad": 1,
        "gpqa": 1,
        "amc23": 16,
        "aime25": 16,
        "aime24": 16,
    }
    hub["tau/commonsense_qa", None, "validation"] = [
        {"question": "Why?", "choices": {"label": ["A", "B"], "text": ["this", "that"]}, "answerKey": "B"}
    ]
    assert load_questions("csqa") == [Question("csqa/0", "Why?\n(A)this  (B)that", "B", None, "csqa")]
    hub["tau/commonsense_qa", None, "validation"] = [{"question": "Why?", "choices": "A B", "answerKey": "B"}]
    with pytest.raises(UserError, match="'choices' has to be a list of texts, or labels with their texts"):
        load_questions("csqa")

    # A folder with local copies goes before the hub, a path of that name before both.
    jsonl(tmp_path / "math500_test.jsonl")
    monkeypatch.setenv("ADAPTIVE_REASONING_DATA", str(tmp_path))
    assert [q.id for q in load_questions("math500")] == [f"math500_test/{i}" for i in range(3)]
    assert load_questions("aime24")[0].id == "aime24/0"
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "math500", ROWS[:1])
    assert [q.id for q in load_questions("math500")] == ["math500/0"]


def test_benchmarks_of_physics_olympiads_and_competitions(hub):
    """Rows in the columns that these data sets of the hub have, and answers that the grader takes for theirs."""
    hub["math-ai/amc23", None, "test"] = [{"id": 0, "question": "How many?", "answer": "27.0", "url": "..."}]
    assert load_questions("amc23") == [Question("amc23/0", "How many?", "27.0", None, "amc23")]
    hub["math-ai/minervamath", None, "test"] = [{"question": "What mass?", "answer": "4.5e33"}]
    assert load_questions("minerva") == [Question("minerva/0", "What mass?", "4.5e33", None, "minerva")]
    hub["math-ai/aime25", None, "test"] = [{"problem": "p", "answer": "70", "id": "0"}]
    assert load_questions("aime25")[0].answer == "70"
    olympiad = {"id": 1, "subfield": "Algebra", "context": None, "solution": ["so"], "difficulty": "Competition"}
    hub["Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"] = [
        olympiad | {"question": "Find $x$.", "final_answer": ["$-2,1$"], "is_multiple_answer": True},
        olympiad | {"question": "Find $y$.", "final_answer": ["$2$", "$\\frac{1}{2}$"], "context": "Let $y>0$."},
    ]
    assert load_questions("olympiad") == [
        Question("olympiad/0", "Find $x$.", "$-2,1$", "Algebra", "olympiad"),
        Question("olympiad/1", "Let $y>0$.\nFind $y$.", "$2$, $\\frac{1}{2}$", "Algebra", "olympiad"),
    ]
    for answer, gold, same in (
        ("27", "27.0", True), ("26", "27.0", False), ("4.5 \\times 10^{33}", "4.5e33", True),
        ("4.4e33", "4.5e33", False), ("1, -2", "$-2,1$", True), ("2", "$2$, $\\frac{1}{2}$", False),
        ("\\frac{1}{2}, 2", "$2$, $\\frac{1}{2}$", True),
    ):  # fmt: skip
        assert same_answer(answer, gold) == same, (answer, gold)


def test_the_options_of_gpqa_are_shuffled_the_same_way_every_time(hub):
    rows = [
        {"Question": f"Which {i}?", "Correct Answer": " right\n", "High-level domain": "Physics", "Subdomain": "Optics"}
        | {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
        for i in range(40)
    ]
    hub["Idavidrein/gpqa", "gpqa_diamond", "train"] = rows
    questions = load_questions("gpqa")
    for i, q in enumerate(questions):
        asked, options = q.problem.split("\n")
        letter = dict(part.split(")", 1)[::-1] for part in options.replace("(", "").split("  "))
        assert asked == f"Which {i}?" and set(letter) == {"right", "wrong 1", "wrong 2", "wrong 3"}
        assert letter["right"] == q.answer and q.difficulty == "Physics" and list(letter.values()) == list("ABCD")
    assert {q.answer for q in questions} == set("ABCD")
    assert load_questions("gpqa[20:]") == questions[20:], "a question is shuffled alike wherever it stands"
    hub["Idavidrein/gpqa", "gpqa_diamond", "train"] = [rows[0] | {"Incorrect Answer 2": None}]
    with pytest.raises(UserError, match="row 0: 'incorrect answer 2' has no value"):
        load_questions("gpqa")


def test_the_tasks_of_bbh_are_its_levels(hub):
    hub["SaylorTwift/bbh", "navigate", "test"] = [{"input": "Do you return?\nOptions:\n- Yes\n- No", "target": "Yes"}]
    hub["SaylorTwift/bbh", "ruin_names", "test"] = [{"input": "Which?\nOptions:\n(A) a\n(B) b", "target": "(B)"}]
    assert [(q.problem[:5], q.answer, q.difficulty) for q in load_questions("bbh")] == [
        ("Do yo", "Yes", "navigate"), ("Which", "B", "ruin_names")
    ]  # fmt: skip


def test_a_benchmark_that_cannot_be_loaded_says_how_to_fetch_it(hub, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError) as error:
        load_questions("gpqa")
    for part in ("huggingface.co/datasets/Idavidrein/gpqa", "hf auth login", "ADAPTIVE_REASONING_DATA", "fetch gpqa"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="(?s)Couldn't reach.*fetch bbh` on another writes bbh_test.jsonl") as error:
        load_questions("bbh")
    assert "hf auth" not in str(error.value)

    # What it writes is what is read from the hub.
    hub["SaylorTwift/bbh", "navigate", "test"] = [{"input": "Return? \u00fc", "target": "(A)"}]
    found = load_questions("bbh")
    monkeypatch.chdir(tmp_path)
    fetch.main(["bbh"])
    assert capsys.readouterr().out == "bbh_test.jsonl: 1 questions\n"
    monkeypatch.setenv("ADAPTIVE_REASONING_DATA", str(tmp_path))
    hub.clear()
    (stored,) = load_questions("bbh")
    assert stored == dataclasses.replace(found[0], id="bbh_test/0")


def test_worked_solutions_and_the_fields_of_svamp(hub):
    """MATH of the hub has solutions alone, with the answer in the last box; a handful of boxes have no braces."""
    name = "DigitalLearningGmbH/MATH-lighteval"
    solutions = ["so $\\boxed{\\frac{1}{2}}$.", "so $\\boxed 2$.", "it is \\fbox{7}"]
    hub[name, None, "test"] = [{"problem": "p", "level": "Level 3", "solution": s, "type": "x"} for s in solutions]
    assert [q.answer for q in load_questions("math")] == ["\\frac{1}{2}", "2", "7"]
    hub[name, None, "test"] = [{"problem": "p", "solution": "so it is 7"}]
    with pytest.raises(UserError, match="row 0: 'solution' has no"):
        load_questions("math")
    hub["ChilleD/SVAMP", None, "test"] = [{"Body": "b.", "Question": "q?", "question_concat": "b. q?", "Answer": "5.0"}]
    assert load_questions("svamp") == [Question("svamp/0", "b. q?", "5.0", None, "svamp")]


def asked(path, text: str) -> list[list]:
    """Write a file and return problem, answer and difficulty of its questions."""
    path.write_text(text, encoding="utf-8")
    return [[q.problem, q.answer, q.difficulty] for q in load_questions(str(path))]


@pytest.mark.parametrize(
    "row, want",
    [
        ({"difficulty": "hard"}, ["p", "1", "hard"]),
        ({"difficulty": 8.0, "subject": "Algebra"}, ["p", "1", "8"]),
        ({"difficulty": 6.5, "level": None}, ["p", "1", "6.5"]),
        ({"difficulty": "x", "level": "Level 5"}, ["p", "1", "5"]),
        ({"level": 0}, ["p", "1", "0"]),
        ({"subject": "navigate", "difficulty": ""}, ["p", "1", "navigate"]),
        ({"level": ["1"]}, "'level' has to be text"),
        ({"level": float("nan")}, "'level' has no value"),
        ({"answer": 70.0}, ["p", "70.0", None]),
        ({"answer": 1e-05}, ["p", "0.00001", None]),
        ({"answer": "nan"}, ["p", "nan", None]),
        ({"answer": "None"}, ["p", "None", None]),
        ({"answer": float("nan")}, "'answer' has no value"),
        ({"answer": float("-inf")}, "'answer' has no value"),
        ({"answer": {"text": None}}, "'answer' has to be text"),
        ({"problem": float("nan")}, "'problem' has no value"),
        ({"problem": [None]}, "'problem' has to be text"),
        ({"score": float("nan")}, ["p", "1", None]),
        ({"problem": "p \ud83d?"}, r"\\ud83d is half of a character"),
        ({"options": ["a", "\udc4d"]}, r"\\udc4d is half of a character"),
        ({"problem": "p \U0001f44d \\ud83d"}, ["p \U0001f44d \\ud83d", "1", None]),
        ({"Problem": "P"}, "'problem' is there twice"),
        ({"ANSWER": None}, ["p", "1", None]),
    ],
)
def test_labels_numbers_and_missing_values(tmp_path, row, want):
    text = json.dumps({"problem": "p", "answer": "1"} | row)
    if isinstance(want, str):
        with pytest.raises(UserError, match="bad.jsonl, line 1: .*" + want):
            asked(tmp_path / "bad.jsonl", text)
    else:
        assert asked(tmp_path / "a.jsonl", text) == [want]


def test_columns_are_found_in_upper_and_lower_case(tmp_path):
    assert asked(tmp_path / "a.csv", "ID,Problem,Solution, Answer,LEVEL\n1,p,s,025,2\n") == [["p", "025", "2"]]
    assert asked(tmp_path / "a.jsonl", '{"Question": "q", "answerkey": "2", "Difficulty": 3}\n') == [["q", "2", "3"]]


XY = {"options": ["x", "y"]}


@pytest.mark.parametrize(
    "row, want",
    [
        (XY | {"answer": "B"}, ["q\n(A)x  (B)y", "B"]),
        (XY | {"answer": "(b)"}, ["q\n(A)x  (B)y", "B"]),
        (XY | {"answer": " y "}, ["q\n(A)x  (B)y", "B"]),
        (XY | {"answer": 0}, ["q\n(A)x  (B)y", "A"]),
        (XY | {"answer": 1}, "nothing shows if it counts from 0"),
        (XY | {"answer": 2}, "means none of the options A, B"),
        (XY | {"answer": "C"}, "'C' means none of the options A, B"),
        (XY | {"answer": "1"}, "'1' means none"),
        ({"choices": ["x", "y"], "answerKey": "A"}, ["q\n(A)x  (B)y", "A"]),
        ({"options": {"A": "x", "B": "y"}, "answer": "B"}, ["q\n(A)x  (B)y", "B"]),
        ({"options": {"a": "x", "b": "y"}, "answer": "B"}, ["q\n(a)x  (b)y", "b"]),
        ({"options": {"1": "x", "2": "y"}, "answer": 1}, ["q\n(1)x  (2)y", "1"]),
        ({"choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answer": "2"}, ["q\n(1)x  (2)y", "2"]),
        ({"options": ["A) x", "B) y"], "answer": "A"}, ["q\n(A)x  (B)y", "A"]),
        ({"options": [1.5, 20], "answer": 20}, "nothing shows|means none|more than one"),
        ({"options": ["1.5", "20"], "answer": "20"}, ["q\n(A)1.5  (B)20", "B"]),
        ({"options": [3, 0], "answer": 0}, "'0' means more than one"),
        ({"options": ["B", "A"], "answer": "A"}, "'A' means more than one"),
        ({"options": ["x", "x"], "answer": "x"}, "'x' means more than one"),
        ({"options": ["x", "x"], "answer": "A"}, ["q\n(A)x  (B)x", "A"]),
        ({"options": ["x", None], "answer": "A"}, "'options: B' has to be text, found None"),
        ({"options": ["x", float("nan")], "answer": "A"}, "'options: B' has no value"),
        ({"options": ["x", " "], "answer": "A"}, "'options: B' is empty"),
        ({"options": {"A": "x", "a": "y"}, "answer": "A"}, "labels of their own"),
        ({"options": ["x"], "answer": "A"}, "needs two options or more"),
        ({"options": [], "answer": "A"}, "needs two options or more"),
        ({"options": ["x"] * 27, "answer": "A"}, "has to be a list of texts"),
        ({"options": "x, y", "answer": "A"}, "has to be a list of texts, or labels with their texts, found 'x, y'"),
        ({"choices": {"label": ["A", "B"], "text": ["x"]}, "answer": "A"}, "has to be a list of texts"),
        ({"choices": {"label": "AB", "text": ["x", "y"]}, "answer": "A"}, "has to be a list of texts"),
        ({"option_a": "x", "option_b": "y", "answer": "A"}, "'option_a' looks like an option"),
        ({"A": "x", "B": "y", "answer": "A"}, "'A' looks like an option"),
        ({"options": None, "A": None, "B": "y", "answer": "A"}, ["q", "A"]),
    ],
)
def test_options_become_part_of_the_question_or_the_row_is_refused(tmp_path, row, want):
    text = json.dumps({"question": "q"} | row)
    if isinstance(want, str):
        with pytest.raises(UserError, match="a.jsonl, line 1: .*" + want):
            asked(tmp_path / "a.jsonl", text)
    else:
        assert asked(tmp_path / "a.jsonl", text) == [[*want, None]]


def test_places_count_from_0_where_the_file_shows_it(tmp_path):
    rows = [{"question": "q", "choices": ["x", "y", "z"], "answer": i} for i in (2, 1, 0)]
    assert [q.answer for q in load_questions(jsonl(tmp_path / "a.jsonl", rows))] == ["C", "B", "A"]


def test_parquet_holes_single_precision_and_arrays(tmp_path):
    def load(**columns):
        parquet.write_table(pyarrow.table({"problem": ["p", "q"]} | columns), tmp_path / "a.PARQUET")
        return [q.answer for q in load_questions(str(tmp_path / "a.PARQUET"))]

    for kind in (pyarrow.float16(), pyarrow.float32(), pyarrow.float64()):
        assert load(answer=pyarrow.array([0.1, 70], kind)) == ["0.1", "70.0"]
        for hole in (None, float("nan")):
            with pytest.raises(UserError, match="a.PARQUET, row 1: 'answer' has no value"):
                load(answer=pyarrow.array([1.5, hole], kind))
    options = pyarrow.array([[0.1, 2], [5, 0.3]], pyarrow.list_(pyarrow.float32()))
    assert load(options=options, answer=pyarrow.array(["0.1", "A"])) == ["A", "A"]
    mapping = pyarrow.array([{"A": "x", "B": "y"}, {"A": "x", "B": None}])
    with pytest.raises(UserError, match="row 1: 'options: B' has to be text"):
        load(options=mapping, answer=["A", "A"])
    named = pyarrow.array([[("A", 0.1), ("B", 2)]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.float32()))
    assert load(options=named, answer=["0.1", "B"]) == ["A", "B"]
    late = pyarrow.array([1, 2**60], pyarrow.timestamp("ms"))
    with pytest.raises(UserError, match="cannot be read as Parquet: Python int too large"):
        load(answer=["1", "2"], when=late)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["p"])] * 3, ["problem", "answer", "answer"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="twice.parquet: two columns are named 'answer'"):
        load_questions(str(tmp_path / "twice.parquet"))
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"\xff", b"2"]).buffers())
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load(answer=broken)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"problem;answer\np;1\n", "line 2: no field 'problem'"),
        ("a.csv", b"problem,answer\np\n", "line 2 has 1 cells, the first line 2"),
        ("a.csv", b"problem,answer\np,1,2\n", "line 2 has 3 cells"),
        ("a.csv", b"problem,answer\np,\n", "line 2: 'answer' has no value"),
        ("a.csv", b'problem,answer\n"p,1\n', "is not CSV: unexpected end of data"),
        ("a.csv", b"problem,answer,answer\np,1,2\n", "line 1: two columns are named 'answer'"),
        ("a.csv", b"problem,answer\n", "is empty"),
        ("a.csv", b"problem,answer\np,\xff\n", "line 2 is not UTF-8"),
        (
            "a.tsv",
            b"problem\tanswer\np\t1\n",
            "line 1 is not JSON: .* A file not named .csv or .parquet needs one JSON",
        ),
        ("a.xlsx", b"PK\x03\x04\xff", "line 1 is not UTF-8: .* Files are JSONL, CSV or Parquet"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:-12], "cannot be read: Truncated"),
        ("a.zst", b"(\xb5/\xfdnonsense", "cannot be read: "),
        ("a.jsonl.gz", gzip.compress(b"problem", mtime=0), "line 1 is not JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_questions(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_a_folder_of_shards_or_what_it_holds(tmp_path):
    def load():
        return [(q.id, q.problem) for q in load_questions(str(tmp_path))]

    with pytest.raises(UserError, match="it holds nothing"):
        load()
    for i in (10, 9):
        jsonl(tmp_path / f"part-{i}.jsonl", [{"problem": f"{i}", "answer": "1"}])
    (tmp_path / "_SUCCESS").write_text("")
    assert load() == [(f"{tmp_path.name}/0", "9"), (f"{tmp_path.name}/1", "10")]
    (tmp_path / "part-9.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="part-9.jsonl, line 1: expected an object"):
        load()
    (tmp_path / "test-1.jsonl").write_text(GOOD)
    (tmp_path / "more").mkdir()
    with pytest.raises(
        UserError, match="it holds _SUCCESS, more/, part-10.jsonl, part-9.jsonl, test-1.jsonl. Name a file"
    ):
        load()


def write(path: Path, rows: list[dict]) -> None:
    """Write rows in the form that the name says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pyarrow.output_stream(str(path), compression=codec) as packed:
        if ".csv" in path.name.lower():
            with path.with_suffix(".text").open("w+", newline="", encoding="utf-8") as file:
                out = csv.DictWriter(file, list(rows[0]))
                out.writeheader()
                out.writerows(rows)
            packed.write(path.with_suffix(".text").read_bytes())
        else:
            packed.write("".join(json.dumps(row) + "\n" for row in rows).encode())


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
words = words.filter(str.strip)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"Problem": words, "answer": words, "difficulty": words}), min_size=1, max_size=3)
)
def test_what_is_written_in_any_form_is_what_is_read(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    want = [(row["Problem"], row["answer"].rpartition("####")[2].strip(), row["difficulty"]) for row in rows]
    for name in ("a.jsonl", "a.jsonl.gz", "a.JSONL.zst", "a.csv", "a.CSV.gz", "a.parquet"):
        path = folder / name
        write(path, rows)
        assert [(q.problem, q.answer, q.difficulty) for q in load_questions(str(path))] == want, name


@pytest.mark.skipif(not DATA, reason="ADAPTIVE_REASONING_DATA does not name the folder with the benchmarks' files")
def test_every_file_of_the_data_folder_loads(monkeypatch):
    monkeypatch.setenv("ADAPTIVE_REASONING_DATA", DATA)
    for path in sorted(Path(DATA).glob("*.jsonl")):
        questions = load_questions(str(path))
        assert len(questions) == path.read_bytes().count(b"\n")
        assert all(q.difficulty for q in questions) == path.stem.startswith(("math", "bbh")), path
    for name in BENCHMARKS:
        if (Path(DATA) / f"{name}_test.jsonl").exists():
            assert load_questions(name)[0].id == f"{name}_test/0"
    assert len({q.difficulty for q in load_questions("bbh")}) == 27
    assert {q.difficulty for q in load_questions("math500")} == set("12345")
