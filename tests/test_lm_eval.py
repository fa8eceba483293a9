"""The comparison with lm-evaluation-harness: both sides ask the same, and their answers are laid side by side."""

import json
import sys

import pytest
import yaml
from conftest import ROOT
from jinja2 import Environment

from adaptive_reasoning.benchmark.__main__ import Args
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.run.evaluation import Evaluator
from adaptive_reasoning.run.options import read_yaml
from adaptive_reasoning.tasks.task import Question

FOLDER = ROOT / "experiments" / "lm_eval"
sys.path.insert(0, str(FOLDER))
import compare  # noqa: E402


def test_both_sides_ask_the_same_and_stop_at_the_same_place():
    task = yaml.safe_load((FOLDER / "gsm8k_boxed.yaml").read_text())
    ours = read_yaml(FOLDER / "gsm8k_ours.yaml", Args)
    on = Evaluator(None, None, None, (), None, ours, instruction=ours["instruction"])
    want = on.text_of(Question("q", "How many?", "2"))
    write = Environment().from_string
    assert [write(task["doc_to_text"]).render({key: "How many?"}) for key in ("question", "problem")] == [want] * 2
    answers = [write(task["doc_to_target"]).render(answer=a) for a in ("1 + 1 = 2\n#### 2", "2")]
    assert answers == ["2", "2"] and ours["temperature"] == 0 and not task["generation_kwargs"]["do_sample"]
    assert ours["max_new_tokens"] == task["generation_kwargs"]["max_gen_toks"]
    assert ours["kept_samples"] == ours["eval_limit"] == 200


def test_wilson():
    """20 of 100, by Wilson's formula: 0.1334 to 0.2888. None of 200: 0 to 0.0188."""
    assert compare.wilson(20, 100) == pytest.approx((0.13337, 0.28883), abs=1e-4)
    assert compare.wilson(0, 200) == pytest.approx((0.0, 0.01884), abs=1e-4)


def test_responses_side_by_side(tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs" / "model"
    ours.mkdir(), theirs.mkdir(parents=True)
    said = [("a", "\\boxed{1}", 1.0), ("b", "it is 2", 0.0), ("c", "so 3 or", 0.0)]
    samples = [{"problem": p, "response": text, "reward": reward} for p, text, reward in said]
    (ours / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    rows = [
        {"filter": name, "doc": {"question": p}, "resps": [[text]], "exact_match": right}
        for name in ("boxed", "last-number")
        for p, text, right in (("c", "so 3 and", 0.0), ("b", "it is 2", 1.0), ("a", "\\boxed{1}\n", 1.0))
    ]
    (theirs / "samples_x_2026.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare.main([str(ours), str(theirs.parent)])
    text = capsys.readouterr().out
    assert "ours     0.333" in text and "1 of 3" in text and "lm-eval  0.667" in text
    assert "equal texts 2 of 3; other verdicts on 1: [1]" in text
    assert "  0: from character 5: 'or' and 'and'" in text
    (ours / "samples.jsonl").write_text(json.dumps(samples[0]) + "\n")
    with pytest.raises(UserError, match="1 questions .* 3, or others: give both 200"):
        compare.load(ours, theirs.parent)
    with pytest.raises(UserError, match="run both, with --log_samples"):
        compare.load(ours, tmp_path / "nothing")
