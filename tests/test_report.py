"""What a run leaves for a person, on synthetic run folders: six difficulties, 150 steps, both modes."""

import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import compare_seeds as seeds
import laboratory
import pytest
import yaml
from accelerate import Accelerator

from adaptive_reasoning import ada_grpo, adaptthink, degrpo, grpo, thinker
from adaptive_reasoning.core import files
from adaptive_reasoning.core.metric import SHARED, Metric, eval_metrics, from_json, to_json
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.statistics import mode_metrics
from adaptive_reasoning.formats.think import Think
from adaptive_reasoning.formats.thinkless import Thinkless
from adaptive_reasoning.report import console
from adaptive_reasoning.report.__main__ import main
from adaptive_reasoning.report.alarms import Alarms
from adaptive_reasoning.report.curves import svgs
from adaptive_reasoning.report.page import render, write_report
from adaptive_reasoning.report.panels import INK, MODE_COLOURS, Line, Panel, result_panels, smooth, training_panels
from adaptive_reasoning.report.run_folder import Run, difficulty_order, load_run
from adaptive_reasoning.report.sample_table import MOST_CHARS_EACH, choose, sample_table
from adaptive_reasoning.run.journal import Journal

DECLARED = SHARED | adaptthink.METRICS | eval_metrics(Think.modes)
LEVELS = range(1, 7)
MIX = (0.4, 0.2, 0.1, 0.1, 0.1, 0.1)
HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \u65e5 \U0001f600 \\boxed{1} {{7*7}} {# -->"


def result(progress: float, rng: random.Random, delta: float = 0.1, forced: str = "") -> dict:
    """Return E of a model that has learned `progress` (0 to 1) of when to think."""
    levels = {}
    for level in LEVELS:
        quick = progress / (1 + math.exp(4 * (level - 1 - 10 * delta * progress)))
        quick = {"always_think": 0.0, "never_think": 1.0}.get(forced, quick)
        direct = min(0.99, 1.02 - 0.16 * (level - 1) + 0.1 * progress)
        thought = 0.985 - 0.01 * level + 0.01 * progress + rng.uniform(-0.01, 0.01)
        tokens = quick * 4.0 + (1 - quick) * (11 + 6.5 * level)
        levels[str(level)] = {
            "accuracy": quick * direct + (1 - quick) * thought,
            "mean_tokens": tokens,
            "modes": {"thinking": 1 - quick, "nothinking": quick},
        }
    mean = {key: sum(m * levels[str(d)][key] for m, d in zip(MIX, LEVELS)) for key in ("accuracy", "mean_tokens")}
    quick = sum(m * levels[str(d)]["modes"]["nothinking"] for m, d in zip(MIX, LEVELS))
    modes = {}
    for mode, share, tokens in (("thinking", 1 - quick, 33.0), ("nothinking", quick, 4.0)):
        some = share > 0
        modes[mode] = {
            "share": share,
            "accuracy": mean["accuracy"] if some else None,
            "mean_tokens": tokens if some else None,
        }
    return {**mean, "modes": modes, "by_difficulty": levels}


def metric_row(step: int, steps: int, rng: random.Random) -> dict:
    """Return a row with every metric that is declared."""
    progress = 1 / (1 + math.exp(-10 * (step / steps - 0.4)))
    row = {key: rng.uniform(0.2, 0.4) for key in DECLARED}
    row |= {
        "step": step,
        "time/step_s": rng.uniform(0.8, 0.95),
        "time/rollout_s": rng.uniform(0.5, 0.6),
        "time/update_s": rng.uniform(0.25, 0.3),
        "time/eval_s": 3.1 if step % 10 == 0 else None,
        "rollout/tokens": 8000 - 1500 * progress,
        "rollout/tokens_per_s": rng.uniform(1500, 1800),
        "rollout/response_tokens_mean": 20 - 3 * progress + rng.gauss(0, 0.6),
        "reward/accuracy": 0.72 + 0.1 * progress + rng.gauss(0, 0.02),
        "loss/policy": -0.02 + rng.gauss(0, 0.01),
        "loss/grad_norm": 0.5 + rng.expovariate(4),
        "loss/learning_rate": 1e-4,
        "check/logprob_gap_mean": 1.2e-6 * rng.uniform(0.8, 1.4),
        "grader/timeout_rate": 0.0,
        "grader/error_rate": 0.0,
        "reward/failed_share": 0.0,
        "learner/zero_advantage_share": 0.1,
        "adapt_think/forced_share_gap": 0.0,
        "adapt_think/nothinking_accuracy": None if step == 3 else 0.55 + 0.15 * progress + rng.gauss(0, 0.03),
        "adapt_think/thinking_accuracy": 0.97 + rng.gauss(0, 0.01),
        "adapt_think/thinking_tokens": 33 + rng.gauss(0, 0.8),
        "adapt_think/first_eot_prob": 0.004 + 0.45 * progress + rng.gauss(0, 0.004),
    }
    return row


def sample(step: int, i: int, rng: random.Random) -> dict:
    level, quick = rng.choice(LEVELS), rng.random() < 0.4
    terms = "".join(f"{rng.choice('+-*')}{rng.randint(1, 9)}" for _ in range(level))
    answer, right = rng.randint(0, 9), rng.random() < 0.85
    steps = "".join(f"\n{rng.randint(1, 9)}+{rng.randint(1, 9)}={rng.randint(0, 9)}" for _ in range(level))
    start = "</think>" if quick else f"Alright{steps}\n</think>"
    row = {
        "step": step,
        "split": "train" if i % 3 else "eval",
        "mode": "nothinking" if quick else "thinking",
        "difficulty": str(level),
        "problem": f"{rng.randint(1, 9)}{terms}",
        "answer": str(answer),
        "response": f"{start}\\boxed{{{answer if right else (answer + 1) % 10}}}",
        "reward": float(right),
        "tokens": 4 if quick else 11 + 6 * level,
        "finish_reason": "stop",
    }
    return row | ({"advantage": round(rng.uniform(-0.9, 0.5), 4)} if i % 3 else {"setting": "adaptive"})


def make_run(folder, steps=150, max_steps=150, seed=0, delta=0.1, samples_per_step=4, finished=True):
    """Write a run folder as the runner does, with the helpers it uses."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    options = {"task": "chain", "model": "chain-tiny", "seed": seed, "delta": delta, "max_steps": max_steps, "data": ""}
    files.write_text_atomic(folder / "config.yaml", yaml.safe_dump({"algorithm": "adaptthink", **options}))
    files.write_json_atomic(folder / "metrics.json", to_json(DECLARED))
    files.append_jsonl(folder / "metrics.jsonl", {"step": 0, "adapt_think/first_eot_prob": 0.004})
    for step in range(0, steps + 1):
        ends = step in (0, max_steps)
        for setting in ("adaptive", "always_think", "never_think") if ends else ("adaptive",):
            if ends or step % 10 == 0:
                E = result(1 / (1 + math.exp(-10 * (step / max_steps - 0.4))) if step else 0.0, rng, delta)
                if setting != "adaptive":
                    E = result(step / max_steps, rng, delta, setting)
                row = {"step": step, "setting": setting, "benchmark": "chain", "result": E}
                files.append_jsonl(folder / "evaluations.jsonl", row)
        if step:
            files.append_jsonl(folder / "metrics.jsonl", metric_row(step, max_steps, rng))
            for i in range(samples_per_step):
                files.append_jsonl(folder / "samples.jsonl", sample(step, i, rng))
    if finished:
        run = load_run(folder)
        before, after = run.before_after("chain")
        summary = {"algorithm": "adaptthink", "task": "chain", "seed": seed, "steps": steps, "wall_s": 171.3}
        files.write_json_atomic(folder / "summary.json", {**summary, "before": before, "after": after})
    return folder


def page(folder) -> str:
    run = load_run(folder)
    return render(run, sample_table(run))


class Tags(HTMLParser):
    """Counts tags, collects addresses and event handlers, and checks that tags are closed in order."""

    VOID = {"meta", "input", "br", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.counts, self.open, self.addresses, self.handlers = {}, [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# ------------------------------------------------------------------------------------------------ files


def test_jsonl_round_trip_writes_null_for_what_json_cannot_hold(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {"step": 1, "a": float("nan"), "b": [float("inf"), 1e-7], "c": "\u2028 \u65e5 \ud800", "d": {"e": -math.inf}}
    files.append_jsonl(path, row)
    files.append_jsonl(path, {"step": 2})
    assert path.read_bytes().count(b"\n") == 2
    assert files.read_jsonl(path) == [{**row, "a": None, "b": [None, 1e-7], "d": {"e": None}}, {"step": 2}]
    assert files.read_jsonl(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("torn", ['{"step": 2, "te', '{"step": 2, "text": "\u65e5'.encode()[:-1], "{"])
def test_a_torn_last_line_is_dropped_and_nothing_is_glued_onto_it(tmp_path, torn):
    """Pins: appending after a kill wrote behind the torn line, which made a broken line in the middle of the file."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + (torn if isinstance(torn, bytes) else torn.encode()))
    assert files.read_jsonl(path) == [{"step": 1}]
    files.append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}')  # whole but for its newline: kept
    files.append_jsonl(path, {"step": 2})
    assert files.read_jsonl(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("broken", ['{"step": 2', "[1, 2]", ""])
def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        files.read_jsonl(path)


def test_truncate_keeps_the_rows_up_to_the_step_byte_for_byte(tmp_path):
    path = tmp_path / "samples.jsonl"
    kept = b'{"step":1,  "x": 1.10}\n{"step": 2}\n{"step": 1}\n'
    path.write_bytes(kept + b'{"step": 3}\n{"step": 4, "torn')
    files.truncate_jsonl(path, 2)
    assert path.read_bytes() == kept
    files.truncate_jsonl(tmp_path / "absent.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]
    path.write_text('{"step": 1}\n{"no": 1}\n')
    with pytest.raises(UserError, match="line 2"):
        files.truncate_jsonl(path, 2)


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_json_atomic(path, {"old": math.nan})

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space"):
        files.write_json_atomic(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": None}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


# -------------------------------------------------------------------------------------------------- metrics, alarms


def test_every_metric_has_a_meaning_and_the_file_keeps_it():
    methods = (grpo, ada_grpo, degrpo, adaptthink, thinker)
    declared = DECLARED | mode_metrics(Arm) | mode_metrics(Thinkless) | degrpo.numbers(Thinkless)
    declared |= {key: metric for method in methods for key, metric in method.METRICS.items()}
    units: dict[str, set] = {}
    for key, metric in declared.items():
        assert metric.meaning.endswith("."), key
        assert metric.unit in ("", "share", "tokens", "tokens/s", "seconds", "count", "nats"), key
        units.setdefault(metric.panel, set()).add(metric.unit)
    assert all(len(found) == 1 for title, found in units.items() if title), "one chart has one unit"
    assert from_json(json.loads(json.dumps(to_json(declared)))) == declared


@dataclass
class Options:
    """What a journal needs of the options of a run."""

    output_dir: str
    max_steps: int = 3
    report_to: tuple = ()


def test_a_metric_of_ones_own_is_drawn_and_one_that_nobody_declared_is_a_plain_row(tmp_path, capsys):
    """Pins: a metric without a line of meaning ended the run, after the rollout and the update had been paid for."""
    journal = Journal(Options(str(tmp_path / "run")), "mine", Accelerator(cpu=True))
    mine = {
        "mine/calm": Metric(
            "How calm it is.", "share", "higher", "calm", panel="Calm & storm | In this step.", line="calm"
        ),
        "mine/storm": Metric("How stormy it is.", "share", panel="Calm & storm | In this step.", line="storm"),
    }
    journal.declare(mine, {"sketch": "Sketch"})
    journal.open({})
    journal.restore(None)
    for step in journal.steps():
        journal.write({"step": step, "mine/calm": step / 4, "mine/storm": 0.5, "mine/wind": 7.0 * step})
    for bad in ("0.5", True):
        with pytest.raises(AssertionError, match="mine/calm is"):
            journal.write({"step": 4, "mine/calm": bad})
    out = capsys.readouterr().out
    assert "calm 0.750" in out and out.count("mine/wind is declared nowhere") == 1 == out.count("warning")
    run = load_run(tmp_path / "run")
    assert [row["mine/wind"] for row in run.metrics] == [7.0, 14.0, 21.0]
    assert run.declared == SHARED | mine | eval_metrics({"sketch": "Sketch"})
    text = render(run, sample_table(run))
    assert (
        "<b>Calm &amp; storm</b><span>In this step.</span>" in text and "How calm it is. <em>Good: higher.</em>" in text
    )
    chart = re.search(r"<b>Calm &amp; storm</b>.*?<svg.*?</svg>", text, re.S)[0]
    assert re.findall(r"</i>(.*?) <b>(.*?)</b>", chart) == [("calm", "75.0%"), ("storm", "50.0%")]
    assert re.search(r"<code>mine/wind</code>.*?<td>7</td><td>21</td>.*?Declared nowhere", text, re.S)
    (tmp_path / "run" / "metrics.json").unlink()  # as in folders of an older version
    text = page(tmp_path / "run")
    assert "<code>mine/calm</code>" in text and "How calm" not in text and "Calm &amp; storm" not in text


def test_an_alarm_is_raised_once_after_enough_steps_in_a_row():
    def rows(values):
        return [{"step": i + 1, "reward/accuracy": v} for i, v in enumerate(values)]

    assert Alarms(SHARED, rows([0.0] * 4 + [0.5] + [0.0] * 4)).raised == []
    (alarm,) = Alarms(SHARED, rows([0.5] + [0.0] * 8)).raised
    assert (alarm.first_step, alarm.last_step) == (2, 9) and "steps 2 to 9" in alarm.text
    alarms = Alarms(SHARED, rows([0.0] * 4))
    assert len(alarms.see({"step": 5, "reward/accuracy": 0.0})) == 1
    assert alarms.see({"step": 6, "reward/accuracy": 0.0}) == []
    assert Alarms(SHARED, [{"step": 1, "reward/accuracy": None, "reward/mean": None}]).raised == []
    assert len(Alarms(SHARED, [{"step": 1, "loss/policy": None}]).raised) == 1


# ------------------------------------------------------------------------------------------------ console


def test_a_step_is_one_plain_line_with_its_alarms_below(capsys, monkeypatch):
    clock = iter((100.0, 102.0, 104.5))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    follow = console.Console(150, DECLARED)
    row = metric_row(12, 150, random.Random(0)) | {"time/step_s": 1.5, "time/eval_s": 0.5, "loss/policy": None}
    follow.step(row)
    line, alarm = capsys.readouterr().out.splitlines()
    assert line.startswith("step  12/150 | acc 0.") and line.endswith(" 1.50 s | ETA 0:03:27")
    assert re.search(r"tokens   \d\d\.\d \| p\(</think>\) 0\.\d{3} \|.* loss      - \| grad ", line)
    assert re.search(r" 1,\d{3} tok/s", line) and line.isascii()
    assert alarm.startswith("!!! ALARM loss/policy = null (step 12)")
    follow.step(row | {"step": 13})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" | ETA 0:04:00")  # 137 steps of (1.5 + 2.0) / 2 s: what came between the two counts


def test_steps_that_do_not_say_how_long_they_took_are_timed(capsys, monkeypatch):
    """Supervised steps were said to end in 0 s."""
    clock = iter((100.0, 102.0, 104.5))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    follow = console.Console(101, DECLARED)
    follow.step({"step": 1})
    assert "ETA" not in capsys.readouterr().out
    follow.step({"step": 2}, show=False)
    follow.step({"step": 3})
    assert capsys.readouterr().out.strip().endswith("ETA 0:03:40")  # 98 steps of (2.0 + 2.5) / 2 s


def test_alarms_are_coloured_on_a_terminal_only(monkeypatch):
    (alarm,) = Alarms(SHARED, [{"step": 1, "loss/policy": None}]).raised
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert console.alarm_line(alarm).startswith("\033[")
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.alarm_line(alarm).startswith("!!!")


def test_the_evaluation_table_is_aligned_and_has_the_bounds(tmp_path):
    rows = [row for row in load_run(make_run(tmp_path / "r", steps=1)).evaluations if row["step"] == 0]
    title, header, rule, *body = console.evaluation_table(rows).splitlines()
    assert title == "evaluation at step 0: chain"
    assert header.split() == ["difficulty", "accuracy", "tokens", "thinking", "nothinking"]
    assert [line.split()[0] for line in body] == [*"123456", "all", "always_think", "never_think"]
    assert {len(line) for line in (header, rule, *body)} == {len(header)}
    assert body[-1].split()[1:] == [f"{rows[2]['result']['accuracy']:.3f}", "4.0", "0.000", "1.000"]


def test_what_an_evaluation_is_sure_of_is_shown_wherever_its_accuracy_is(tmp_path):
    """The table of the console, the table, the cards and the curve of the page; older runs have no intervals."""
    plain, folder = (make_run(tmp_path / name, steps=20, finished=False) for name in ("plain", "sure"))
    rows = load_run(folder).evaluations
    for row in rows:
        level = row["result"]["by_difficulty"]["6"]
        level["interval"], row["result"]["interval"] = [0.5, 0.75], [0.7, 0.8125]
        if row["setting"] == "always_think":
            row["result"]["paired"] = {"difference": -0.0125, "low": -0.03, "high": 0.005, "p": 0.0001}
        elif row["setting"] == "adaptive" and row["step"] == 0:
            row["result"] |= {"pass_at": {"2": 0.875}, "maj_k": 4, "maj_accuracy": 0.9, "maj_interval": [0.8, 1.0]}
            row["result"]["hybrid"] = {"accuracy": 0.6, "interval": [0.5, 0.7], "better": {"thinking": 1.0}}
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = [row for row in rows if row["step"] == 0]
    title, header, rule, *body = console.evaluation_table(first).splitlines()
    assert header.split()[:4] == ["difficulty", "accuracy", "95%", "tokens"]
    assert [line.split()[2] for line in body[:8]] == ["-"] * 5 + ["0.500..0.750"] + ["0.700..0.812"] * 2
    said = [
        "Hybrid Accuracy 0.600 (0.500..0.700): took the better mode of the question, which is thinking for 1.000",
        "adaptive minus always_think: accuracy -0.013 (-0.030..+0.005), p < 0.001",
        "adaptive: pass@2 0.875, maj@4 0.900 (0.800..1.000)",
    ]
    assert [line.strip() for line in body[9:]] == said
    text = page(folder)
    assert text.count("<small>70.0 to 81.2%</small>") >= 3 and "<small>50.0 to 75.0%</small>" in text
    assert all(f"<li>{line}</li>" in text.replace("&lt;", "<") for line in said), "of the step that has all settings"
    assert "<small>" not in page(plain)
    bars = [[line.points for line in result_panels(load_run(f))[0].lines] for f in (folder, plain)]
    tokens = load_run(folder).before_after("chain")[1]["mean_tokens"]
    assert [[(tokens, 0.7), (tokens, 0.8125)] in lines for lines in bars] == [True, False]
    panels = [training_panels(load_run(f))[0] for f in (folder, plain)]
    assert panels[0].title == "Accuracy" and [bool(line.band) for line in panels[0].lines] == [
        True,
        False,
        False,
        False,
    ]
    assert ["PolyCollection" in chart for chart in svgs(panels)] == [True, False], "a band goes before the next panel"


# ------------------------------------------------------------------------------------------------ charts


def test_difficulties_sort_as_people_read_them():
    labels = ["10", "2", "Level 10", "Level 9", "1", "hard"]
    assert sorted(labels, key=difficulty_order) == ["1", "2", "10", "Level 9", "Level 10", "hard"]


def test_the_moving_mean_is_centred_and_shorter_at_the_ends():
    points = [(x, y) for x, y in enumerate((1.0, 2.0, 6.0, 0.0))]
    assert smooth(points, 3) == [(0, 1.5), (1, 3.0), (2, pytest.approx(8 / 3)), (3, 3.0)]
    assert smooth(points, 1) == points and smooth([], 5) == []


def test_thousands_of_steps_make_a_small_picture_with_round_ticks():
    points = [(step, (-1.0) ** step * step) for step in range(10_000)]
    many, one = svgs([Panel("t", "n", [Line("a", p, INK)], "share") for p in (points, points[:1])])
    assert len(many) < 150_000
    assert set(re.findall(r">(.?[\d.]+)</text>", one)) == {"\u22121", "0", "1"}, "steps are whole numbers"
    assert 3 <= len(re.findall(r">[\d.\u2212]+%</text>", many)) <= 7


def test_a_line_that_is_no_mode_has_no_colour_of_a_mode():
    """Pins: a stage without an evaluated mode was drawn in the colour of another stage."""
    stages = ("fast", "verify", "slow", "summary")
    row = {"step": 1} | {f"thinker/{stage}_share": 0.5 for stage in stages}
    E = {"accuracy": None, "mean_tokens": None, "modes": dict.fromkeys(("fast", "slow"), {"share": 0.5})}
    evaluation = {"step": 0, "setting": "adaptive", "benchmark": "chain", "result": E}
    run = Run(Path(), {}, [row], [], [evaluation], None, thinker.METRICS)
    (panel,) = training_panels(run)
    colours = {line.label: line.colour for line in panel.lines}
    assert len(set(colours.values())) == 4 and (colours["fast"], colours["slow"]) == MODE_COLOURS[:2]


# ------------------------------------------------------------------------------------------------ page


def test_write_report_makes_a_page_that_needs_nothing_else(tmp_path, capsys):
    folder = make_run(tmp_path / "chain")
    write_report(folder)
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (folder / "report.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert all(address.startswith("#") for address in tags.addresses)
    assert not re.search(r"url\((?!#)|@import|https://", text)
    assert "default-src 'none'" in text and '"status">finished' in text
    for heading in ("Result", "When it thinks", "Training", "Samples", "Metrics"):
        assert f">{heading}</h2>" in text
    for key in load_run(folder).metric_keys():
        assert f"<code>{key}</code>" in text
    before, after = load_run(folder).before_after("chain")
    for label, old, new in (
        ("all", before, after), ("6", before["by_difficulty"]["6"], after["by_difficulty"]["6"]),
        ("never_think", *load_run(folder).before_after("chain", "never_think")),
    ):  # fmt: skip
        cells = [f"{100 * old['accuracy']:.1f}%", f"{100 * new['accuracy']:.1f}%"]
        assert f"<th>{label}</th><td>{cells[0]}</td><td>{cells[1]}</td>" in text
    assert "what a coin that picks the mode would give" in text
    assert not list(folder.glob(".*")) and capsys.readouterr().out == ""
    assert page(folder) == text  # the same folder gives the same page


def test_untrusted_text_stays_text(tmp_path):
    """Responses, problems, options, names and labels come from models and data sets: none of it becomes markup."""
    plain = make_run(tmp_path / "plain", steps=2, max_steps=2)
    hostile = make_run(tmp_path / "<u>hostile", steps=2, max_steps=2)
    rows = [json.loads(line) for line in (hostile / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row |= dict.fromkeys(("response", "problem", "answer", "mode", "difficulty", "finish_reason", "split"), HOSTILE)
    (hostile / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    renamed = (hostile / "evaluations.jsonl").read_text().replace('"1": {', json.dumps(HOSTILE) + ": {")
    (hostile / "evaluations.jsonl").write_text(renamed.replace('"thinking"', json.dumps(HOSTILE + "t")))
    (hostile / "config.yaml").write_text(yaml.safe_dump({"model": HOSTILE, "seed": 0}))
    good, bad = Tags(page(plain)), Tags(page(hostile))
    for tag in ("script", "img", "u"):
        assert bad.counts.get(tag, 0) == good.counts.get(tag, 0)
    assert bad.handlers == good.handlers == ["onsubmit"]
    assert {unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page(hostile), re.S)} == {HOSTILE}
    assert page(hostile).count("{{7*7}}") > 10 and "49 {# -->" not in page(hostile)


@pytest.mark.parametrize("steps", [0, 1, 37])
def test_a_run_in_progress_has_a_page(tmp_path, steps):
    text = page(make_run(tmp_path / "going", steps=steps, finished=False))
    Tags(text)
    assert f"in progress: step {steps} of 150" in text and "<p>adaptthink &middot; task chain" in text
    assert not re.search(r"\b(inf|nan|None|Infinity|NaN)\b", text.split("<script>")[0])
    assert ("step 0 to step 30" in text) == (steps == 37)


def test_what_is_missing_is_said_not_guessed(tmp_path):
    folder = make_run(tmp_path / "run", steps=10)
    (folder / "samples.jsonl").unlink()
    (folder / "evaluations.jsonl").unlink()
    text = page(folder)  # before and after still come from the summary
    assert "No samples yet." in text and "step 0 to step 10" in text
    (folder / "summary.json").unlink()
    text = page(folder)
    assert "No evaluation yet." in text and ">Result</h2>" not in text
    nothing = {key: None for key in DECLARED} | {"step": 1, "unknown/metric": 3.0}
    (folder / "metrics.jsonl").write_text(json.dumps(nothing) + "\n")
    text = page(folder)
    assert "<code>unknown/metric</code>" in text and "loss/policy = null (step 1)" in text
    (folder / "metrics.jsonl").unlink()
    write_report(folder)
    assert "No training step yet." in (folder / "report.html").read_text()
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match="not the folder of a run"):
        load_run(folder)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = make_run(tmp_path / "run", steps=1, max_steps=1)
    for text, fault in (("- 1", "expected a mapping|not valid"), ("{", "not valid (YAML|JSON)"), ("[1]", "found list")):
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}.*({fault})"):
            load_run(folder)


def test_several_benchmarks_without_difficulties_or_answers(tmp_path):
    folder = tmp_path / "math"
    folder.mkdir()
    for step, name in ((0, "gsm8k"), (0, "aime24"), (10, "gsm8k"), (10, "aime24")):
        E = {**result(step / 20, random.Random(0)), "by_difficulty": {}}
        if name == "aime24":
            E |= {"accuracy": None, "mean_tokens": None}
        row = {"step": step, "setting": "adaptive", "benchmark": name, "result": E}
        files.append_jsonl(folder / "evaluations.jsonl", row)
    text = page(folder)
    Tags(text)
    assert "<h3>gsm8k</h3>" in text and "<h3>aime24</h3>" in text
    assert "\u2013" in text


def test_ten_thousand_samples_are_cut_down_fairly_and_it_is_said(tmp_path, capsys, monkeypatch):
    folder, rng = make_run(tmp_path / "many", steps=1, finished=False), random.Random(0)
    rows = [sample(1 + i // 70, i, rng) for i in range(10_000)]
    rows[5000] |= {"mode": "rare", "response": "x" * (MOST_CHARS_EACH + 5)}
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("adaptive_reasoning.report.page.write_curves", lambda run: None)
    write_report(folder)
    assert "shows 2,000 of 10,000 samples" in capsys.readouterr().out
    text = (folder / "report.html").read_text()
    assert "<b>2,000 of 10,000</b>" in text and "5 characters left out" in text
    table = sample_table(load_run(folder))
    mode = table["columns"].index("mode")
    assert "rare" in table["choices"]["mode"] and sum(row[0][mode] == "rare" for row in table["rows"]) == 1
    steps = [row[0][0] for row in table["rows"]]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) > 130
    kinds = [{"split": "eval", "mode": mode, "right": True} for mode in "aaaaaabbbbbbc"]
    assert "".join(row["mode"] for row in choose(kinds, 5)) == "aabbc"


# ------------------------------------------------------------------------------------------------ several runs


def test_the_table_over_seeds_has_mean_range_and_deviation(tmp_path):
    runs = [load_run(make_run(tmp_path / f"s{seed}", seed=seed, samples_per_step=0)) for seed in range(3)]
    lines = seeds.table(runs).splitlines()
    assert lines[0] == "3 runs, seed 0, 1, 2"
    after = [run.summary["after"]["by_difficulty"]["6"]["accuracy"] for run in runs]
    mean = sum(after) / 3
    std = (sum((x - mean) ** 2 for x in after) / 2) ** 0.5
    (line,) = [line for line in lines if re.match(r"accuracy +6 ", line)]
    assert f"{mean:.3f} ({min(after):.3f}..{max(after):.3f}, sd {std:.3f})" in line
    assert len([line for line in lines if "share of nothinking" in line]) == 7
    (alone,) = [line for line in seeds.table(runs[:1]).splitlines() if re.match(r"accuracy +6 ", line)]
    assert "sd" not in alone
    for value in (0.1, 27.9):  # their mean over three runs misses them by a rounding error: no bar can be drawn
        assert seeds.spread([value] * 3).mean == value
    assert seeds.spread([-1e-9, 1e-9]).text(1) == "0.0 (0.0..0.0, sd 0.0)" and seeds.spread([None]) is None


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    one = make_run(tmp_path / "one", steps=1, max_steps=1)
    with pytest.raises(UserError, match="both have seed 0"):
        seeds.table([load_run(one), load_run(one)])
    going = make_run(tmp_path / "going", steps=1, finished=False, seed=1)
    with pytest.raises(UserError, match="going: no summary.json"):
        seeds.table([load_run(one), load_run(going)])
    with pytest.raises(UserError, match="no option 'delat'.*delta"):
        seeds.table([load_run(one)], "delat")
    other = load_run(make_run(tmp_path / "other", steps=1, max_steps=1, seed=1))
    other.summary["task"] = "math"
    with pytest.raises(UserError, match="differ in task"):
        seeds.table([load_run(one), other])
    other.summary |= {"task": "chain", "before": None}
    with pytest.raises(UserError, match="was not evaluated"):
        seeds.table([load_run(one), other])
    files.append_jsonl(one / "metrics.jsonl", {"step": 2})  # continued with more steps: the summary is an old one
    with pytest.raises(UserError, match="not finished"):
        seeds.table([load_run(one)])


def test_the_command_groups_runs_and_draws_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adaptive_reasoning.report.page.write_curves", lambda run: None)
    folders = [
        make_run(tmp_path / f"d{delta}_{seed}", seed=seed, delta=delta, samples_per_step=0)
        for delta in (0.1, 0.05, 0)
        for seed in (0, 1)
    ]
    picture = tmp_path / "delta.png"
    seeds.main([*map(str, folders), "--by", "delta", "--plot", str(picture)])
    out = capsys.readouterr().out
    assert re.findall(r"^(delta [\d.]+): 2 runs, seed 0, 1$", out, re.M) == ["delta 0", "delta 0.05", "delta 0.1"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="delta.xyz"):
        seeds.main([str(folders[0]), "--plot", str(tmp_path / "delta.xyz")])
    main([*map(str, folders)])
    assert capsys.readouterr().out.count("report.html written") == 6


@pytest.mark.parametrize("command", [["-m", "adaptive_reasoning.report"], [seeds.__file__], [laboratory.__file__]])
def test_the_commands_end_with_one_message_for_a_mistake(tmp_path, command):
    done = subprocess.run([sys.executable, *command, str(tmp_path / "absent")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "absent" in done.stderr
    assert "Traceback" not in done.stderr
