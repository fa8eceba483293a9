"""Accuracy-token curves: budgets of thinking and a bias on the mode's token, against transformers and by hand."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from small_model import make_folder
from test_end_to_end import run_module
from transformers import AutoModelForCausalLM

from adaptive_reasoning import formats
from adaptive_reasoning.benchmark.__main__ import Args, check_args
from adaptive_reasoning.benchmark.__main__ import main as benchmark
from adaptive_reasoning.benchmark.curves import bars_of, closed_at, curve_table, mode_opening, values
from adaptive_reasoning.core.files import load_json, read_jsonl
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.model import load_tokenizer
from adaptive_reasoning.run.options import parse_args
from adaptive_reasoning.tasks import prompts

N, ANSWER, LONGEST = 7, 5, 30


def test_numbers_of_a_curve():
    assert values("budgets", "64, 0,16,0", int) == [0, 16, 64] and values("budgets", "", int) == []
    assert values("mode_bias", "4,-8,0.5", float) == [-8, 0.5, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--budgets 4,x", r"--budgets 4,x: takes whole numbers of tokens, 0 or more, comma separated"),
        ("--budgets=-1", "--budgets -1: takes whole numbers"),
        ("--mode_bias=0,inf", "--mode_bias 0,inf: takes finite numbers"),
        ("--budgets 4 --answer_format boxed", "the format boxed has no thinking to close. Take think"),
        ("--mode_bias 4 --answer_format boxed", "needs a mode with an opening; --bias_mode is empty, modes response"),
        ("--mode_bias 4 --bias_mode cot", "--bias_mode cot, modes thinking, nothinking"),
        ("--mode_bias 4 --answer_format dialogue", "a dialogue has a budget a turn already"),
    ],
)
def test_curves_that_cannot_be_had(options, message):
    with pytest.raises(UserError, match=message):
        check_args(parse_args(Args, options.split()))


def closing_of(name: str, budget: int, closing: str = "") -> tuple:
    """Return (text of `given`, of `unless`, of what is forced, place, longest response) of a laboratory's format."""
    form = formats.load(name)(formats.tokenizer(name), SimpleNamespace())
    args = SimpleNamespace(closing=closing, answer_tokens=ANSWER, max_new_tokens=LONGEST)
    found = closed_at(form, budget, args)
    if not found:
        return ()
    (f,) = found["forced"]
    text = lambda ids: form.tokenizer.decode(list(ids))  # noqa: E731
    assert not f.action and f.room == ANSWER
    return text(f.given), text(f.unless), text(i for i, _ in f.tokens), f.at


def test_every_format_closes_its_thinking_in_its_own_way():
    assert closing_of("think", N) == ("", "</think>", "\n</think>", N)
    assert closing_of("think", 0) == ("", "</think>", "</think>", 0)  # NoThinking, token for token
    assert closing_of("thinkless", N) == ("<think>", "</think>", "\n</think>", 1 + N)
    tag = len(formats.tokenizer("arm").encode("<LONG_COT>\n", add_special_tokens=False))
    assert closing_of("arm", N) == ("<LONG_COT>\n", "</LONG_COT", "\n</LONG_COT>\n<ANSWER>\n", tag + N)
    assert closing_of("think", N, r"Time is up.\n</think>\n\n")[2] == "Time is up.\n</think>\n\n"
    assert closing_of("think", LONGEST) == ()  # beyond the longest response: the free setting
    with pytest.raises(UserError, match="--budgets 28: leaves no room for an answer.*Take 27 or less"):
        closing_of("think", LONGEST - 2)


def test_the_bias_stands_where_the_openings_part():
    openings = {"a": (1, 2, 3, 9), "b": (1, 2, 4), "c": (1, 5, 6)}
    form = SimpleNamespace(opening=openings.get, forced_settings=lambda: {f"only {m}": m for m in openings})
    assert [mode_opening(form, m) for m in "abc"] == [(1, 2, 3), (1, 2, 4), (1, 5)]


def test_error_bars():
    results = [{"accuracy": 0.5, "interval": [0.25, 0.625]}, {"accuracy": 1.0, "interval": [0.9, 1.0]}]
    low, high = bars_of(results)
    assert low == pytest.approx([0.25, 0.1]) and high == pytest.approx([0.125, 0.0])
    assert bars_of([*results, {"accuracy": 0.5}]) is None


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """(model folder, evaluation's folder, questions): the user's own command on a random model, greedy."""
    folder = tmp_path_factory.mktemp("curves")
    data = make_folder(folder / "model")
    done = run_module(
        "benchmark", "--model", str(folder / "model"), "--eval_data", str(data), "--eval_limit", "4",
        "--budgets", f"0,{N},{LONGEST}", "--mode_bias=-3,0,60", "--temperature", "0", "--max_new_tokens", str(LONGEST),
        "--answer_tokens", str(ANSWER), "--dtype", "fp32", "--settings", "adaptive", "--grader_workers", "1",
        "--output_dir", str(folder / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "model", folder / "out", read_jsonl(data)[:4], done.stdout


@pytest.mark.slow
def test_budgets_equal_those_of_transformers(greedy):
    """Generated to N tokens, closed, and generated on: the same texts and lengths."""
    folder, out, questions, _ = greedy
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    stop, end = prompts.stop_tokens(tokenizer), tokenizer.encode("</think>", add_special_tokens=False)

    def generate(ids: list[int], n: int) -> list[int]:
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n, eos_token_id=list(stop))
        return made[0, len(ids) :].tolist()

    def reference(prompt: list[int], budget: int) -> list[int]:
        thought = generate(prompt, budget) if budget else []
        if budget >= LONGEST or end[0] in thought or (thought and thought[-1] in stop):
            return generate(prompt, LONGEST)
        thought += tokenizer.encode("\n" * (budget > 0) + "</think>", add_special_tokens=False)
        return thought + generate(prompt + thought, ANSWER)

    samples = read_jsonl(out / "samples.jsonl")
    closed = 0
    for budget in (0, N, LONGEST):
        mine = [s for s in samples if s["setting"] == f"budget {budget}"]
        assert [s["problem"] for s in mine] == [q["problem"] for q in questions]
        for sample in mine:
            ids = reference(prompts.render(tokenizer, sample["problem"]), budget)
            assert (sample["response"], sample["tokens"]) == (prompts.decode(tokenizer, ids, stop), len(ids))
            closed += len(ids) < LONGEST and end[0] in ids
    assert closed >= 6


@pytest.mark.slow
def test_the_probability_of_a_mode_before_and_after(greedy):
    folder, out, questions, text = greedy
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    end = tokenizer.encode("</think>", add_special_tokens=False)[0]
    results = {row["setting"]: row["result"] for row in load_json(out / "evaluation.json")}
    asked = [prompts.render(tokenizer, q["problem"]) for q in questions]
    logits = torch.cat([model(torch.tensor([ids])).logits[:, -1].double() for ids in asked])
    for name, b in (("bias -3", -3.0), ("bias +0", 0.0), ("bias +60", 60.0)):
        moved = logits.clone()
        moved[:, end] += b
        want = [x.softmax(-1)[:, end].mean().item() for x in (logits, moved)]
        assert [results[name][k] for k in ("mode_prob_free", "mode_prob")] == pytest.approx(want, rel=1e-4)
    assert results["bias +60"]["modes"]["nothinking"]["share"] == 1  # greedy, too
    assert "p(mode), free" in text and "closed" in text and (out / "tradeoff.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_curves_of_a_trained_model_have_the_free_setting_in_them(guesser, tmp_path, monkeypatch):
    """The same noise everywhere: what was not closed is the free response, and choices of a mode are nested."""
    options = f"--task chain --chain_eval_questions 40 --model {guesser} --temperature 1 --eval_top_p 1 --dtype fp32"
    options += " --max_new_tokens 80 --budgets 0,6,20,40,80 --answer_tokens 8 --mode_bias=-4,-1,0,1,4"
    options += f" --settings adaptive --eval_samples 2 --output_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["benchmark", *options.split()])
    monkeypatch.chdir(ROOT)
    benchmark()
    rows = {line["setting"]: line["rows"] for line in read_jsonl(tmp_path / "finished.jsonl")}
    free = rows["adaptive"]
    assert 5 < sum(r["mode"] == "nothinking" for r in free) < 75 and all("closed" not in r for r in free)

    def without(row: dict) -> dict:
        return {key: value for key, value in row.items() if key != "closed"}

    assert list(map(without, rows["bias +0"])) == list(map(without, rows["budget 80"])) == free
    open_still = 0
    before, tokens = None, []
    for budget in (0, 6, 20, 40, 80):
        now = rows[f"budget {budget}"]
        closed = {i for i, row in enumerate(now) if row["closed"]}
        for i, (row, its) in enumerate(zip(now, free)):
            if i in closed:
                assert its["tokens"] > budget and budget + 2 <= row["tokens"] + (budget == 0) <= budget + 2 + 8 + 1
                assert budget == 0 or its["mode"] == "thinking"
            else:
                assert without(row) == its
                open_still += 1
        assert before is None or closed < before
        before, tokens = closed, [*tokens, sum(row["tokens"] for row in now)]
    assert not before and open_still > 80 and tokens == sorted(tokens)
    chosen: set[int] = set()
    for b in ("-4", "-1", "+0", "+1", "+4"):
        now = {i for i, row in enumerate(rows[f"bias {b}"]) if row["mode"] == "nothinking"}
        assert chosen <= now and (b in ("+0", "-4") or chosen < now)
        chosen = now
    shares = {
        row["setting"]: row["result"]["modes"]["nothinking"]["share"] for row in load_json(tmp_path / "evaluation.json")
    }
    table = curve_table(load_json(tmp_path / "evaluation.json"))
    assert f"{shares['bias +4']:.3f}" in table.splitlines()[-1]
    # Continued with one budget more: what was measured is kept.
    monkeypatch.setattr(sys, "argv", ["benchmark", *options.replace("0,6,20", "0,6,10,20").split()])
    kept = (tmp_path / "finished.jsonl").read_text()
    benchmark()
    added = (tmp_path / "finished.jsonl").read_text().removeprefix(kept)
    assert [json.loads(line)["setting"] for line in added.splitlines()] == ["budget 10"]
