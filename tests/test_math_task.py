"""math.py: questions from files, hub and benchmark names, and one clear message for every malformed file."""

import json
import sys
import types

import pytest

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks.math import BENCHMARKS, load_questions, read_rows


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("ADAPTIVE_REASONING_DATA", raising=False)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: {(name, config, split): rows}; what is not there raises as the real one does."""
    known = {}

    def load_dataset(name, config=None, split=None):
        if (name, config, split) not in known:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        return known[name, config, split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
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
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

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
        (GOOD + '{"problem": "p", "answer": null}\n', "line 2: no field 'answer'"),
        (GOOD + "{}\n", "line 2: no field 'problem'"),
        (GOOD + '{"problem": " ", "answer": "1"}\n', "line 2: 'problem' is empty"),
        (GOOD + '{"problem": "p", "answer": ""}\n', "line 2: 'answer' is empty"),
        (GOOD + '{"problem": "p", "answer": "so ####  "}\n', "line 2: nothing follows '####'"),
        (GOOD + '{"problem": "p", "answer": ["1"]}\n', "line 2: 'answer' has to be text"),
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
    with pytest.raises(UserError, match="bad.parquet is no Parquet file"):
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


@pytest.mark.parametrize("source", ["nowhere.jsonl", "nowhere.parquet", "./nowhere", "/nowhere/data", "."])
def test_a_missing_file_is_not_looked_for_on_the_hub(hub, source):
    with pytest.raises(UserError, match="no such file"):
        load_questions(source)


def test_hub_data_sets(hub):
    hub["owner/Deep", None, "train"] = [{"problem": "p", "answer": "1", "solution": "s"}] * 2
    assert load_questions("owner/Deep") == [Question(f"Deep/{i}", "p", "1", None, "owner/Deep") for i in range(2)]
    hub["openai/gsm8k", "main", "train"] = [{"question": "p", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}]
    assert load_questions("openai/gsm8k:main") == [Question("gsm8k/0", "p", "18", None, "openai/gsm8k:main")]


def test_hub_errors_name_data_set_and_mend(hub):
    with pytest.raises(UserError, match=r"(?s)owner/nothing, split train, .*ConnectionError.*give a local JSONL"):
        load_questions("owner/nothing")
    hub["owner/odd", None, "test"] = [{"problem": "p", "answer": "1"}, {"prompt": "p"}]
    with pytest.raises(UserError, match="data set owner/odd, split test, row 1: no field 'problem'"):
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
        "aime25": 16,
        "aime24": 16,
    }
    hub["tau/commonsense_qa", None, "validation"] = [
        {"question": "Why?", "choices": {"label": ["A", "B"], "text": ["this", "that"]}, "answerKey": "B"}
    ]
    assert load_questions("csqa") == [Question("csqa/0", "Why?\n(A)this  (B)that", "B", None, "csqa")]
    hub["tau/commonsense_qa", None, "validation"] = [{"question": "Why?", "choices": "A B", "answerKey": "B"}]
    with pytest.raises(UserError, match="'choices' needs 'label' and 'text'"):
        load_questions("csqa")

    # A folder with local copies goes before the hub, a path of that name before both.
    jsonl(tmp_path / "math500_test.jsonl")
    monkeypatch.setenv("ADAPTIVE_REASONING_DATA", str(tmp_path))
    assert [q.id for q in load_questions("math500")] == [f"math500_test/{i}" for i in range(3)]
    assert load_questions("aime24")[0].id == "aime24/0"
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "math500", ROWS[:1])
    assert [q.id for q in load_questions("math500")] == ["math500/0"]


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
