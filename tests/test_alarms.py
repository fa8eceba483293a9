"""Alarms: each fires on a made-up curve that breaks it, none on the curves of a run that is well."""

import re

import pytest

from adaptive_reasoning import ada_grpo, adaptthink, degrpo, grpo, thinker, tlmre
from adaptive_reasoning.core.metric import SHARED, Alarm
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.boxed import Boxed
from adaptive_reasoning.formats.statistics import mode_metrics
from adaptive_reasoning.formats.think import Think
from adaptive_reasoning.formats.thinkless import Thinkless
from adaptive_reasoning.report.alarms import Alarms
from adaptive_reasoning.run.leak import leak_metrics

METHODS = (grpo, ada_grpo, degrpo, tlmre, adaptthink, thinker)
DECLARED = {key: metric for method in METHODS for key, metric in method.METRICS.items()} | SHARED
for form in (Boxed, Arm, Thinkless, Think):
    DECLARED |= leak_metrics(form.modes, form.skips) | (mode_metrics(form) if form is not Think else {})

HEALTHY = {  # what a run that is well may log for as long as it likes
    "loss/policy": [-0.02, 0.01], "loss/grad_norm": [0.3, 0.5], "loss/entropy": [0.9, 0.4, 0.3],
    "loss/clip_fraction": [0.0, 0.05], "check/approx_kl": [0.0, 0.004], "loss/ref_kl": [0.0, 0.2],
    "check/logprob_gap_mean": [0.008], "check/logprob_gap_max": [0.2, 1.4, 0.3], "check/ratio_mean": [1.0, 1.003],
    "check/ratio_max": [1.2, 11.0, 1.6], "rollout/truncated_share": [0.3, 0.05], "reward/accuracy": [0.4, 0.0, 0.7],
    "learner/zero_advantage_share": [0.5, 0.92, 0.7], "grader/timeout_rate": [0.0, 0.01], "grader/error_rate": [0.0],
    "reward/failed_share": [0.0],
    "group/all_wrong_share": [0.3, 0.95, 0.2], "adapt_think/forced_share_gap": [0.0], "thinker/slow_share": [0.4, 0.0],
    "adapt_think/first_eot_prob": [0.001, 0.4, 0.8], "degrpo/first_think_prob": [0.5, 0.9, 0.6],
    "thinker/verify_unparsable_share": [0.01, 0.3],
    **{f"mode/{mode}_share": [0.25, 0.0, 0.5, 1.0] for mode in ("direct", "cot", "code", "long_cot", "think", "short")},
    **{f"leak/{mode}_share": [0.02, 0.2, 0.0] for mode in ("direct", "cot", "short", "nothinking")},
    "mode/unknown_share": [0.02, 0.3], "mode/malformed_share": [0.0],
}  # fmt: skip


def test_a_healthy_run_raises_no_alarm():
    watched = {key for key, metric in DECLARED.items() if metric.alarms}
    assert watched == set(HEALTHY), "every metric with an alarm has a healthy curve here"
    rows = [{"step": i + 1} | {key: curve[i % len(curve)] for key, curve in HEALTHY.items()} for i in range(200)]
    assert [alarm.text for alarm in Alarms(DECLARED, rows).raised] == []


ALARMS = [(key, rule) for key in HEALTHY for rule in DECLARED[key].alarms]


def broken_values(key: str, rule: Alarm) -> list[float | None]:
    """Return the values just beyond each bound of a rule."""
    values = [rule.below and rule.below * 0.99, None if rule.above is None else rule.above * 1.01 + 1e-6]
    values += [rule.of_start and rule.of_start * HEALTHY[key][0] * 0.99]
    return [value for value in values if value is not None] + [None] * rule.null


@pytest.mark.parametrize("key, rule", ALARMS, ids=[f"{key}: {rule.advice[:30]}" for key, rule in ALARMS])
def test_every_alarm_fires_on_its_curve_and_says_what_to_do(key, rule):
    for value in broken_values(key, rule):
        curve = [HEALTHY[key][0]] + [value] * rule.steps
        rows = [{"step": i + 1, key: x} for i, x in enumerate(curve)]
        assert rule in [alarm.rule for alarm in Alarms(DECLARED, rows).raised]
        assert rule not in [alarm.rule for alarm in Alarms(DECLARED, rows[:-1]).raised], "a step too early"
    assert broken_values(key, rule)
    assert re.search(r"look|lower|raise|take|start|check|compare|too easy", rule.advice), rule.advice
