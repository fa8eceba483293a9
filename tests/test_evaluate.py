"""Evaluation beyond one setting: consensus, the vote of k responses, the rows of the papers."""

import csv
import json

import pytest
import yaml

from adaptive_reasoning.benchmark.__main__ import Args, check_args
from adaptive_reasoning.benchmark.official import (
    answer_or_last_lines,
    official,
    official_answer,
    official_mode,
    same_choice,
    same_number,
    same_text,
)
from adaptive_reasoning.benchmark.papers import FOLDER, load_paper, paper_table
from adaptive_reasoning.benchmark.run_folder import of_run
from adaptive_reasoning.benchmark.tables import as_csv, as_markdown
from adaptive_reasoning.benchmark.votes import consensus, majority
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.run.evaluation import EvalSpec, summarise
from adaptive_reasoning.run.options import parse_args
from adaptive_reasoning.tasks.answers import verified_answer
from adaptive_reasoning.tasks.grader import GraderPool
from adaptive_reasoning.tasks.task import ExactGrader

SETTINGS = ("direct", "cot", "code", "long_cot")
ASKED, FALLBACK = SETTINGS[:3], "long_cot"


def row(answer, correct=False, tokens=10, question=0, sample=0, mode="direct"):
    return {"question": question, "sample": sample, "mode": mode, "difficulty": "1", "answer": answer,
            "correct": correct, "tokens": tokens}  # fmt: skip


def rows_of(*answers, tokens=(5, 20, 30, 100), correct=()):
    return {s: [row(a, s in correct, n, mode=s)] for s, a, n in zip(SETTINGS, answers, tokens)}


@pytest.mark.parametrize(
    "answers, taken, tokens, fallback",
    [
        (("7", "7", "7", "8"), "7", 55, False),
        (("7", "7", "6", "8"), "8", 155, True),
        (("7", "7", None, "8"), "8", 155, True),  # a missing answer is a disagreement
        ((None, None, None, "8"), "8", 155, True),  # three missing ones do not agree
        (("7", "7.0", "7", "8"), "8", 155, True),  # equal as text, not as numbers
        (("7", "6", "5", None), None, 155, True),
    ],
)
def test_consensus(answers, taken, tokens, fallback):
    """Tokens are those of the three cheap formats, and of the Long CoT where it is asked (specification, section 7)."""
    (got,) = consensus(rows_of(*answers), ASKED, FALLBACK)
    assert (got["answer"], got["tokens"], got["fallback"]) == (taken, tokens, fallback)
    assert got["mode"] == ("long_cot" if fallback else "direct")


def test_consensus_pairs_samples_of_one_question():
    rows = {s: [row(str(k + q), True, 1, q, k, s) for q in range(2) for k in (1, 0)] for s in SETTINGS}
    rows["code"] = rows["code"][::-1]
    assert [(r["question"], r["sample"], r["fallback"]) for r in consensus(rows, ASKED, FALLBACK)] == [
        (0, 1, False), (0, 0, False), (1, 1, False), (1, 0, False)
    ]  # fmt: skip
    assert summarise(consensus(rows, ASKED, FALLBACK), SETTINGS)["accuracy"] == 1


def votes(*answers, right, k=8, grader=None):
    rows = [row(a, a is not None and a in right, sample=i) for i, a in enumerate(answers)]
    ((verdict,),) = majority(rows, k, grader or ExactGrader()).values()
    return verdict


def test_majority():
    assert votes("A", "B", "B", right="B") == 1
    assert votes("A", "B", "B", "A", right="A") == 1  # a tie goes to the earliest
    assert votes("A", "B", "B", "A", right="B") == 0
    assert votes(None, None, None, "B", right="B") == 1  # no answer, no vote
    assert votes(None, None, right="B") == 0
    assert votes("A", "B", "B", right="A", k=2) == 1  # the first two only
    assert votes("$7$", "8", " 7", right="$7$") == 1  # the same text without dollar signs and spaces


def test_majority_of_equal_numbers():
    """0.5 and 1/2 are two texts and one answer: together they outvote the 3 that came first."""
    with GraderPool(1, 10, verified_answer) as grader:
        assert votes("3", "3", "0.5", "1/2", "\\frac{1}{2}", right=("0.5", "1/2"), grader=grader) == 1


def test_a_question_counts_once():
    rows = [row("A", True, sample=0), row("A", True, sample=1), row("B", False, question=1, sample=0)]
    assert majority(rows, 8, ExactGrader()) == {0: [True], 1: [False]}


def test_rows_of_the_paper():
    arm = {size: load_paper(f"arm-{size}")["rows"] for size in ("3b", "7b", "14b")}
    assert arm["7b"]["ARM, k=1"]["aime25"] == [16.7, 3253] and arm["3b"]["base, k=8"]["csqa"] == [75.5, 96]
    assert [sum(a for a, _ in arm["7b"][f"ARM, {s}"].values()) / 7 for s in ("direct", "long_cot")] == pytest.approx(
        [46.2, 74.5], abs=0.06
    )
    for size, average in {"3b": 756, "7b": 766, "14b": 853}.items():
        assert sum(n for _, n in arm[size]["ARM, k=1"].values()) / 7 == pytest.approx(average, abs=1)


def test_baselines_of_table_1():
    """Mean differences to the original model, as AdaptThink's Table 1 prints them: accuracy in points, length in %."""
    want = {"1.5b": {"O1-Pruner": (-1.0, -33.9), "TLMRE": (2.0, -25.3)},
            "7b": {"O1-Pruner": (-2.7, -24.7), "TLMRE": (1.0, -8.8)}}  # fmt: skip
    for size, methods in want.items():
        rows = load_paper(f"adaptthink-{size}")["rows"]
        for name, (accuracy, length) in methods.items():
            pairs = [(rows[name][b], rows["original, always think"][b]) for b in ("gsm8k", "math500", "aime24")]
            assert sum(a[0] - o[0] for a, o in pairs) / 3 == pytest.approx(accuracy, abs=0.06)
            assert sum(a[1] / o[1] - 1 for a, o in pairs) / 3 * 100 == pytest.approx(length, abs=0.06)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_published_rows_are_whole(path):
    """Every cell belongs to a benchmark of the paper, has as many numbers as the others, and is no text."""
    paper = load_paper(path.stem)
    cells = [cell for row in paper["rows"].values() for cell in row.values()]
    assert {b for row in paper["rows"].values() for b in row} <= {*paper["benchmarks"], "mean"}
    assert len({len(cell) for cell in cells}) == 1 and all(isinstance(x, (int, float)) for cell in cells for x in cell)
    assert all(0 <= cell[0] <= 100 for cell in cells)


def test_a_paper_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: accuracy %\nbenchmarks: [a, b]\nrows:\n  theirs: {a: [50.0]}\n")
    rows = [{"setting": "adaptive", "benchmark": "a", "result": {"accuracy": 0.25}}]
    lines = [" ".join(x.split()) for x in paper_table(rows, load_paper(str(tmp_path / "mine.yaml"))).splitlines()]
    assert lines[0] == "accuracy %, paper mine" and lines[-2:] == ["here, adaptive 25.0", "paper, theirs 50.0"]
    (tmp_path / "mine.yaml").write_text("rows: {}")
    with pytest.raises(UserError, match="needs title, benchmarks and rows"):
        load_paper(str(tmp_path / "mine.yaml"))


def test_tables_of_the_papers():
    result = {"accuracy": 0.5, "mean_tokens": 100.0, "maj_accuracy": 0.75, "modes": {"long_cot": {"share": 0.25}}}
    text = paper_table([{"setting": "adaptive", "benchmark": "csqa", "result": result}], load_paper("arm-7b"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "here, adaptive 50.0 / 100 / 25.0 -" in lines and "here, adaptive, vote 75.0 / 100 / 25.0 -" in lines
    assert "paper, ARM, k=8 85.7 / 134 75.9 / 786" in lines and "paper, ARM, consensus 85.8 / 228 75.2 / 1856" in lines
    quick = {"accuracy": 0.5, "mean_tokens": 100.0, "modes": {"nothinking": {"share": 0.25}}}
    rows = [{"setting": "adaptive", "benchmark": "gsm8k", "result": quick}]
    text = paper_table(rows, load_paper("adaptthink-7b"))
    assert "50.0 / 100 / 25.0" in text and "91.0 / 309 / 99.6" in text
    text = paper_table([{**rows[0], "benchmark": "math500"}], load_paper("thinker-r1.5b"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "pass@1 in %, paper thinker-r1.5b" and lines[1] == "math500 mean of 8"
    assert "here, adaptive 50.00 -" in lines and "paper, R1.5B Thinker 88.51 50.98" in lines
    assert (
        paper_table([{**rows[0], "benchmark": "x"}], load_paper("arm-3b"))
        == "no benchmark here is in the paper's table"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--paper", "arm-3b"], "its rows have the mode long_cot, think has no such mode"),
        (["--answer_format", "arm", "--paper", "1.5b"], "--paper 1.5b: takes adaptthink-1.5b, .*, or the path"),
        (["--maj_k", "8"], "--maj_k 8: needs as many responses a question, --eval_samples 8"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        check_args(parse_args(Args, options))


# --- ARM's own scoring


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<COT>\na\n</COT>\n<ANSWER>\nB\n</ANSWER>", "B"),
        ("<COT>a</CODE> <ANSWER> (B) </ANSWER> or <ANSWER>C</ANSWER>", "(B) </ANSWER> or <ANSWER>C"),  # no gate; greedy
        ("no tag <ANSWER>7</ANSWER>", "7"),
        ("</ANSWER> 7 <ANSWER>", None),
        ("<LONG_COT>\none\ntwo\nthree\nfour\nfive\nsix \n", None),
    ],
)
def test_answers_that_the_official_script_reads(text, answer):
    assert official_answer(text) == answer
    assert answer_or_last_lines(text) == (answer or "\n".join(text.strip().split("\n")[-5:]))


@pytest.mark.parametrize(
    "text, mode",
    [("so <LONG_COT> and <COT>", "cot"), ("<CODE>", "code"), ("<LONG_COT>\n", "long_cot"), ("what?", "direct")],
)
def test_modes_that_the_official_script_reads(text, mode):
    assert official_mode(text) == mode


@pytest.mark.parametrize(
    "check, answer, gold, same",
    [
        (same_choice, "(B)", "B", True),
        (same_choice, "B.", "B", False),
        (same_text, "\\boxed{\\text{(A)}}", "A", True),
        (same_text, "a", "A", False),
        (same_text, "TRUE", "True", True),
        (same_text, "1", "True", True),
        (same_text, "0", "False", True),
        (same_text, "yes", "Yes", True),
        (same_text, "Invalid", "invalid", True),
        (same_text, "valid", "invalid", False),
        (same_text, "\\boxed{24}", "24", True),
        (same_text, "24.0", "24", False),
        (same_text, "} ]", "} ]", True),
        (same_text, "]", "} ]", False),
        (same_text, "( )", "", False),
        (same_text, "Bus abandon", "bus abandon", False),
        (same_number, "10,80", "1080", False),  # commas stay: training deletes them all
        (same_number, "10/2", "5", True),
        (same_number, "11/2", "\\frac{11}{2}", True),
        (same_number, "The answer is $204$.", "204", True),
    ],
)
def test_comparisons_of_the_official_script(check, answer, gold, same):
    assert check(answer, gold) == same


def test_every_benchmark_has_its_rule():
    spec = EvalSpec({"adaptive": ()}, None, None, {})
    rules = {name: official(spec, name, None) for name in ("csqa", "obqa", "bbh", "gsm8k", "math", "svamp", "aime25")}
    assert {n: s.check for n, s in rules.items()} == {
        "csqa": same_choice, "obqa": same_choice, "bbh": same_text, "gsm8k": same_number, "math": same_number,
        "svamp": same_number, "aime25": same_number}  # fmt: skip
    assert [n for n, s in rules.items() if s.extract_answer is answer_or_last_lines] == ["math", "aime25"]
    assert official(spec, "math", lambda ids: f"<CODE>{ids}").mode_of([1]) == "code"
    with pytest.raises(UserError, match="--scoring official: reads ARM's answer blocks, think has none"):
        check_args(parse_args(Args, ["--scoring", "official"]))


def test_macro_average_of_the_seven_sets():
    """The paper's own average comes out of its rows: 72.0 at 766 tokens (Table 1, 7B)."""
    paper = load_paper("arm-7b")
    result = {"accuracy": 0.5, "mean_tokens": 100.0, "modes": {"long_cot": {"share": 0.25}}}
    ours = [{"setting": "adaptive", "benchmark": b, "result": result} for b in paper["benchmarks"]]
    lines = paper_table(ours, paper).splitlines()
    assert len(paper["benchmarks"]) == 7 and lines[1].endswith("mean of 7")
    assert next(x for x in lines if "here, adaptive " in x).endswith("50.0 / 100 / 25.0")
    assert next(x for x in lines if "paper, ARM, k=1" in x).endswith("72.0 / 766")
    assert next(x for x in paper_table(ours[:6], paper).splitlines() if "here" in x).endswith("-")


# --- tables for other programs


def test_tables_of_an_evaluation():
    modes = {"think": {"share": 0.25, "accuracy": 1.0, "mean_tokens": 40.0}}
    E = {"accuracy": 0.5, "interval": [0.25, 0.75], "mean_tokens": 1234.5, "modes": modes, "by_difficulty": {},
         "questions": 10, "samples": 4, "pass_at": {"2": 0.625}}  # fmt: skip
    level = {"accuracy": 1.0, "interval": None, "mean_tokens": 8.0, "modes": {"think": 1.0}}
    paired = {"difference": -0.125, "low": -0.25, "high": 0.0, "p": 0.0625}
    hybrid = {"accuracy": 0.75, "interval": [0.5, 0.875], "better": {"think": 1.0}}
    rows = [
        {"benchmark": "a|b", "setting": "adaptive", "result": E | {"by_difficulty": {"2": level}, "hybrid": hybrid}},
        {"benchmark": "a|b", "setting": "always", "result": E | {"paired": paired, "maj_accuracy": 0.6}},
        {"benchmark": "old", "setting": "adaptive", "result": {"accuracy": 0.5, "mean_tokens": 9.0, "modes": modes,
                                                               "by_difficulty": {}}},
    ]  # fmt: skip
    found = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [(r["benchmark"], r["setting"], r["difficulty"]) for r in found] == [
        ("a|b", "adaptive", "2"), ("a|b", "adaptive", "all"), ("a|b", "always", "all"), ("old", "adaptive", "all")
    ]  # fmt: skip
    assert (found[0]["low"], found[0]["tokens"], found[0]["share_think"], found[0]["questions"]) == (
        "",
        "8.0",
        "1.0",
        "",
    )
    whole = {
        "low": "0.25",
        "high": "0.75",
        "tokens": "1234.5",
        "share_think": "0.25",
        "questions": "10",
        "samples": "4",
    }
    assert whole.items() <= found[1].items() and found[1]["pass@2"] == "0.625" and found[1]["hybrid_high"] == "0.875"
    assert (
        found[2]["adaptive_minus_this"] == "-0.125"
        and found[2]["difference_p"] == "0.0625"
        and found[2]["maj"] == "0.6"
    )
    assert found[3]["accuracy"] == "0.5" and found[3]["low"] == ""
    first, second = as_markdown(rows).split("\n\n## old\n")
    assert "| adaptive | 2 | 1.000 | - | 8.0 | 1.000 |" in first and "10 questions, 4 responses to each" in first
    assert "| always | all | 0.500 | 0.250..0.750 | 1,234.5 | 0.250 |" in first
    assert "- adaptive minus always: accuracy -0.125 (-0.250..+0.000), p = 0.062" in first
    assert "| adaptive | all | 0.500 | - | 9.0 | 0.250 |" in second


# --- a run from its folder


def a_run(folder, *models, best=None, **options):
    """Write what `of_run` reads of a run: config.yaml, and models or adapters of checkpoints."""
    folder.mkdir()
    for path in models:
        file = "adapter_config.json" if path.endswith("adapter") else "config.json"
        (folder / path).mkdir(parents=True)
        (folder / path / file).write_text("{}")
    for checkpoint in folder.glob("checkpoints/*"):
        (checkpoint / "state.json").write_text(
            json.dumps({"state": {"state": {"best": {"step": best}} if best else {}}})
        )
    config = {"algorithm": "x", "format": "adaptive_reasoning.formats.native.Native", "answer_format": "thinkless"}
    config |= {"task": "chain", "model": "start", "chat_template": "think", "delta": 0.1, "temperature": 0.7, **options}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_options_of_a_run_and_its_model(tmp_path):
    """The model that is evaluated is the run's, whatever --config says of protocol; the command line wins over all."""
    run = a_run(tmp_path / "run", "checkpoints/step_000010/model", "checkpoints/step_000020/model", seed=3)
    below, line = of_run(run, Args)
    assert below == {"answer_format": "adaptive_reasoning.formats.native.Native", "task": "chain", "temperature": 0.7,
                     "seed": 3}  # fmt: skip
    (tmp_path / "protocol.yaml").write_text("model: another\ntemperature: 0.6\neval_samples: 4\n")
    args = parse_args(Args, [*line, "--config", str(tmp_path / "protocol.yaml"), "--eval_samples", "8"], below)
    assert (args.model, args.seed, args.temperature, args.eval_samples, args.chat_template) == (
        str(run / "checkpoints/step_000020/model"), 3, 0.6, 8, ""
    )  # fmt: skip
    assert args.output_dir == str(run / "benchmark" / "step_000020")

    line = of_run(run / "checkpoints" / "step_000010", Args)[1]
    assert line[1::2] == [str(run / "checkpoints/step_000010/model"), str(run / "benchmark" / "step_000010")]
    best = a_run(tmp_path / "best", "checkpoints/step_000010/model", "checkpoints/step_000020/model", best=10)
    assert of_run(best, Args)[1][1] == str(best / "checkpoints/step_000010/model")
    lora = a_run(tmp_path / "lora", "checkpoints/step_000010/adapter")
    line = of_run(lora, Args)[1]
    assert line[1] == str(lora / "checkpoints/step_000010/adapter") and line[-1] == "--merge_adapter"
    supervised = a_run(tmp_path / "sft", "model", "checkpoints/step_000010/model")
    assert of_run(supervised, Args)[1][1] == str(supervised / "model")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not the folder of a run, there is no .*config.yaml.*goes with --model"):
        of_run(tmp_path, Args)
    with pytest.raises(UserError, match="no model is saved there yet"):
        of_run(a_run(tmp_path / "new"), Args)
    with pytest.raises(UserError, match="config.yaml: --temperature: "):
        of_run(a_run(tmp_path / "odd", "model", temperature=-1), Args)
    with pytest.raises(UserError, match="names no answer_format"):
        of_run(a_run(tmp_path / "older", "model", format=None, answer_format=None), Args)
