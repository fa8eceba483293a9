"""The benchmarks: each runs at tiny sizes and ends in one JSON line; their checks can fail."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCH = str(Path(__file__).parent.parent / "experiments" / "bench")
SMOKE = ["--smoke", "--repeats", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def bench(monkeypatch, tmp_path):
    """Make the benchmarks importable, keep the baselines file out of reach, and give the threads back."""
    monkeypatch.syspath_prepend(BENCH)
    import harness

    threads = torch.get_num_threads()
    monkeypatch.setattr(harness, "BASELINES", tmp_path / "baselines.json")
    yield
    torch.set_num_threads(threads)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.slow
def test_rollout_runs(capsys):
    import bench_rollout

    bench_rollout.main(SMOKE)
    result = last_line(capsys)
    assert result["benchmark"] == "rollout" and result["smoke"] and result["greedy_tokens_compared"] > 0
    assert result["logprob_gap"] < 1e-4
    assert set(result["runs"]) == {"4 greedy", "4 sampled", "104 sampled"}
    for run in result["runs"].values():
        assert run["continuous_batching_failure"] is None
        assert {"generate", "continuous batching"} <= set(run["times_as_long_as_ours"])


def test_rollout_compares_tokens_for_real():
    """With other weights in the engine than in the model, the comparison of greedy tokens must fail."""
    import bench_rollout
    import harness

    from adaptive_reasoning.rollout import Decoder, Engine

    model = harness.small_model(smoke=True)
    work = bench_rollout.Workload(4, model.config.vocab_size, 40)
    engine = Engine(Decoder.from_model(model))
    bench_rollout.compare_greedy(model, engine, work)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(AssertionError, match="greedy token"):
        bench_rollout.compare_greedy(model, engine, work)


@pytest.mark.parametrize("n", [8, 64, 512])
def test_workload_is_the_long_tailed_mix(n):
    import bench_rollout

    budgets = sorted(bench_rollout.Workload(n, 8192).budgets)
    short, long = budgets[: n // 2], budgets[n // 2 :]
    assert (short[0], short[-1]) == (8, 32)
    assert long[0] > 32 and 150 < long[-1] <= 316 and (n < 64 or long[-1] == 316)


@pytest.mark.slow
def test_step_without_trl_measures_ours_alone(monkeypatch, capsys):
    import bench_step

    monkeypatch.setattr(bench_step, "find_spec", lambda name: None)
    bench_step.main(SMOKE)
    text = capsys.readouterr().out
    assert "trl is not installed" in text
    result = json.loads(text.strip().splitlines()[-1])
    assert list(result["runs"]["long-tailed"]) == ["ours"] and result["runs"]["long-tailed"]["ours"]["tokens"] > 0


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: make bench installs it")
def test_step_against_trl(capsys):
    import bench_step

    bench_step.main(SMOKE)
    found = last_line(capsys)["runs"]["long-tailed"]
    assert found["ratio"][0] > 0
    for side in ("ours", "TRL"):
        assert 0 < found[side]["longest"] <= 12 and found[side]["tokens"] <= 4 * 12


def test_memory_runs(capsys):
    import bench_memory

    bench_memory.main(SMOKE)
    result = last_line(capsys)
    assert result["mib"]["ours"][0] < result["mib"]["naive"][0]
    assert result["memory/ours MiB"] > 0


def test_check_names_what_differs_from_the_baseline(capsys):
    import harness

    env = harness.environment(1)
    harness.print_head("a test", env)
    write, compare = (harness.arguments("", [flag]) for flag in ("--write-baseline", "--check"))
    compared = {"ratio/generate": 6.0, "memory/ours MiB": 280.0}
    harness.finish("some", env, compared, {}, write)
    harness.finish("some", env, {"ratio/generate": 6.5, "memory/ours MiB": 281.0}, {}, compare)
    assert "within tolerance" in capsys.readouterr().out
    assert len(harness.check("some", env, {"ratio/generate": 5.0, "memory/ours MiB": 290.0})) == 2
    assert "not measured" in harness.check("some", env, {"memory/ours MiB": 280.0})[0]
    assert harness.check("other", env, compared) == []


def test_smoke_sizes_cannot_become_a_baseline():
    import harness

    with pytest.raises(SystemExit):
        harness.arguments("", ["--smoke", "--write-baseline"])


def test_turns_start_with_another_side_each_time():
    import harness

    order = []
    sides = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = harness.in_turns(sides, 3)
    assert order == list("abc" + "bca" + "cab") and all(len(v) == 3 for v in seconds.values())
    assert harness.in_turns({}, 2) == {}
    assert harness.ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == [3.0, 2.0, 4.0]
