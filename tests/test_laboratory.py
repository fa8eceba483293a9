"""The laboratory's page on run folders made by hand: numbers pair up by seed, and what is missing is named."""

import json

import laboratory
import pytest
import yaml
from compare_seeds import over_steps
from laboratory import fact_rows, load_laboratory, seeds_of, write_laboratory

from adaptive_reasoning.core.metric import to_json
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.statistics import mode_metrics


def result(accuracy, tokens, **shares):
    modes = {mode: {"share": share, "accuracy": accuracy, "mean_tokens": tokens} for mode, share in shares.items()}
    levels = {
        "1": {"accuracy": accuracy, "mean_tokens": tokens, "modes": {mode: 0.0 for mode in shares} | {"think": 0.1}},
        "6": {"accuracy": accuracy, "mean_tokens": tokens, "modes": {mode: 0.0 for mode in shares} | {"think": 0.9}},
    }
    return {"accuracy": accuracy, "mean_tokens": tokens, "modes": modes, "by_difficulty": levels}


def write_run(folder, seed, algorithm, before, after, metric="mode/cot_share", **forced):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"algorithm": algorithm, "max_steps": 2, "seed": seed}))
    rows = [{"step": step, metric: step / 10} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [
        {"step": step, "setting": setting, "benchmark": "chain", "result": value}
        for step, settings in ((0, {"adaptive": before}), (2, {"adaptive": after, **forced}))
        for setting, value in settings.items()
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    summary = {"algorithm": algorithm, "task": "chain", "seed": seed, "steps": 2, "before": before, "after": after}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def folder(tmp_path):
    start = result(0.8, 50, direct=0.25, cot=0.25, code=0.25, long_cot=0.25)
    for seed in (0, 1):
        after = result(0.98, 40 + seed, direct=0.3, cot=0.3, code=0.04, long_cot=0.36)
        write_run(tmp_path / f"ada-grpo-seed{seed}", seed, "ada_grpo", start, after)
    for seed in (1, 2):
        after = result(0.99, 80 + seed, direct=0.0, cot=0.01, code=0.0, long_cot=0.99)
        write_run(tmp_path / f"grpo-seed{seed}", seed, "grpo", start, after)
    thinking = result(0.97, 60, think=1.0, short=0.0)
    for name in ("degrpo", "degrpo-vanilla"):
        after = result(0.95, 30, think=0.4, short=0.6)
        write_run(tmp_path / f"{name}-seed0", 0, "degrpo", after, after, always_think=thinking)
    return tmp_path


def facts(folder, title):
    runs, _ = load_laboratory(folder)
    section = next(s for s in laboratory.SECTIONS if s.title.startswith(title))
    return dict(fact_rows(section, seeds_of(section, runs)))


def test_numbers_are_paired_by_seed(folder):
    """Seed 1 alone has both runs: a mean over other seeds of the one and of the other would compare nothing."""
    found = facts(folder, "Ada-GRPO")
    assert found["GRPO: share of its largest format"] == "0.990"
    assert found["Ada-GRPO: formats with at least 5 %"] == "3"
    assert found["tokens, Ada-GRPO to GRPO"] == f"{41 / 81:.3f}"


def test_forced_settings_and_difficulties(folder):
    found = facts(folder, "DeGRPO")
    assert found["DeGRPO: think share, hardest minus easiest"] == "0.800"
    assert (found["DeGRPO: tokens"], found["DeGRPO forced to think: tokens"]) == ("30.0", "60.0")


def test_page_and_picture(folder):
    (folder / "thinker-seed0").mkdir()
    (folder / "thinker-seed0" / "config.yaml").write_text("algorithm: thinker\n")
    text = write_laboratory(folder)
    page = (folder / "laboratory.html").read_text()
    assert (folder / "laboratory.png").read_bytes().startswith(b"\x89PNG")
    assert "seeds 1: mean" in page and "U-curve" in page and page.count("data:image/png;base64,") == 2
    assert "AdaptThink: needs finished runs" in text and f"{folder / 'thinker-seed0'}: not finished" in text
    assert "http" not in page.replace("http-equiv", ""), "the page needs no network"


def test_an_empty_folder_says_how_to_fill_it(tmp_path):
    with pytest.raises(UserError, match="make laboratory"):
        write_laboratory(tmp_path)


def test_curves_are_smoothed_and_spread_over_the_runs(folder):
    runs, _ = load_laboratory(folder)
    points = over_steps(runs["grpo"], "mode/cot_share")
    assert [step for step, _ in points] == [1, 2] and all(s.count == 2 for _, s in points)
    assert points[0][1].mean == pytest.approx(0.15), "two steps, 0.1 and 0.2, within one moving mean of five"


def test_page_of_a_run_with_four_modes(tmp_path):
    """Settings, modes and charts come from the run folder: the page knows no method by name."""
    from adaptive_reasoning.report.page import write_page
    from adaptive_reasoning.report.run_folder import load_run

    start = result(0.8, 50, direct=0.25, cot=0.25, code=0.25, long_cot=0.25)
    forced = {
        "direct": result(0.5, 7, direct=1.0, cot=0.0, code=0.0, long_cot=0.0),
        "consensus": result(0.99, 90, direct=0.0, cot=0.6, code=0.0, long_cot=0.4),
    }
    write_run(tmp_path / "run", 0, "ada_grpo", start, start, **forced)
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(to_json(mode_metrics(Arm))))
    write_page(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert load_run(tmp_path / "run").forced("chain") == {"direct": "direct", "consensus": ""}
    assert "share of long_cot" in page and "<th>consensus</th>" in page and "Share of the modes in training" in page
