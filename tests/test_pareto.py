"""The second laboratory's picture on run folders made by hand."""

import json
import re

import pareto
import pytest
import yaml
from test_laboratory import result

from adaptive_reasoning.errors import UserError

START = result(0.8, 50, thinking=0.9, nothinking=0.1)
FORCED = {
    "always_think": result(0.82, 55, thinking=1.0, nothinking=0.0),
    "never_think": result(0.4, 5, thinking=0.0, nothinking=1.0),
}


def write_run(folder, seed, after, before=START, forced=FORCED):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"algorithm": "x", "max_steps": 2, "seed": seed}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 2}) + "\n")
    rows = [(0, "adaptive", before), (2, "adaptive", after), *((0, name, e) for name, e in forced.items())]
    lines = [{"step": s, "setting": name, "benchmark": "chain", "result": e} for s, name, e in rows]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"algorithm": "x", "task": "chain", "seed": seed, "steps": 2, "before": before, "after": after}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"adaptthink-seed{seed}", seed, result(0.84, 20 + seed, thinking=0.5, nothinking=0.5))
        write_run(tmp_path / f"dpo-seed{seed}", seed, result(0.6, 25, thinking=1.0, nothinking=0.0), forced={})
    return tmp_path


def test_aes_by_hand():
    """Marco-o1 on MATH under O1-Pruner: 1156 to 657 tokens, 73.8 to 77.5 %: 0.4317 + 3 x 0.0501."""
    start, after = {"accuracy": 0.738, "mean_tokens": 1156}, {"accuracy": 0.775, "mean_tokens": 657}
    assert pareto.aes(after, start) == pytest.approx(0.4317 + 0.1504, abs=1e-4)
    # 1156 to 761, 73.8 to 71.8 %: the loss counts five times, which the paper's own table does not do.
    assert pareto.aes({"accuracy": 0.718, "mean_tokens": 761}, start) == pytest.approx(0.206, abs=1e-3)


def test_the_table_has_the_bounds_and_the_methods_by_their_score(folder):
    (folder / "merge-w0.7").mkdir()
    rows = [{"setting": "adaptive", "benchmark": "chain", "step": 0, "result": result(0.8, 40, thinking=1.0)}]
    (folder / "merge-w0.7" / "evaluation.json").write_text(json.dumps(rows))
    text = pareto.write_pareto(folder)
    whole, by_level = text.split("\n\n")
    names = [re.split("  +", line.strip())[0] for line in whole.splitlines()[1:]]
    bounds = ["starting model", "starting model, always_think", "starting model, never_think"]
    assert names[-6:] == [*bounds, "adaptthink", "merge-w0.7", "dpo"]
    assert "20.5 (20.0..21.0, sd 0.7)" in text
    dpo = (50 - 25) / 50 - 5 * 0.25
    assert f"{dpo:.2f}" in whole.splitlines()[-1]
    assert any("dpo" in line and "0.600 at 25.0 (0.50)" in line for line in by_level.splitlines())
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "pareto.md").read_text().count("\n") == 8 + 1 + 6


def test_each_seed_draws_its_own_evaluation_of_the_start(folder):
    """Random numbers of an evaluation are its seed's: the start is the mean, and has a spread like the methods."""
    write_run(folder / "dpo-seed2", 2, result(0.6, 25, thinking=1.0), before=result(0.83, 44, thinking=1.0))
    runs, _ = pareto.load_laboratory(folder)
    assert [e["mean_tokens"] for e in pareto.starts(runs)["starting model"]] == [50, 50, 44]
    assert "0.810 (0.800..0.830" in pareto.write_pareto(folder)


def test_runs_of_two_starting_models_are_refused(folder):
    write_run(folder / "rft-seed0", 0, START, before=result(0.7, 50, thinking=1.0))
    with pytest.raises(UserError, match="do not start from the same numbers"):
        pareto.write_pareto(folder)
