"""The laboratories' list and what runs it: commands, the time that is left, failures, and what is finished stays."""

import json
from pathlib import Path

import pytest
import run_laboratory
import yaml

from adaptive_reasoning.errors import UserError

LISTED = yaml.safe_load(run_laboratory.LIST.read_text())


def jobs(tmp_path, name="second", seeds=("0", "1"), more=()):
    return run_laboratory.jobs_of(LISTED[name] | {"folder": tmp_path / "here"}, list(seeds), list(more))


def test_every_command_of_the_list_names_files_that_exist(tmp_path):
    for name in LISTED:
        for step in (step for job in jobs(tmp_path, name) for step in job):
            method, *options = step.command
            module = Path(method.replace(".", "/"))
            assert module.is_dir() or module.with_suffix(".py").is_file(), method
            config = options[options.index("--config") + 1] if "--config" in options else None
            assert config is None or Path(config).is_file(), config
        assert Path("experiments", LISTED[name]["page"]).is_file()


def test_commands_carry_the_seed_and_what_is_common_and_later_options_win(tmp_path):
    first, *_, once = jobs(tmp_path, more=["--max_steps", "2"])
    (step,) = first
    assert step.folder == tmp_path / "here" / "adaptthink-seed0"
    assert step.command == [
        "adaptive_reasoning.adaptthink", "--config", "experiments/toy_adaptthink.yaml", "--model",
        "runs/cold-start-checks/model", "--temperature", "1.0", "--max_new_tokens", "192", "--seed", "0",
        "--max_steps", "2",
    ]  # fmt: skip
    assert once[1].command[-4:] == ["--other", f"{tmp_path}/here/direct/model", "--weight", "0.2"]
    assert len(jobs(tmp_path)) == 2 * len(LISTED["second"]["runs"]) + 1


def test_the_time_comes_from_finished_runs_of_the_same_name(tmp_path):
    made = [job for job in jobs(tmp_path) if job[0].folder.name.startswith("adaptthink")]
    every, steps, minutes = run_laboratory.left(made, 1)
    assert (every, steps, minutes) == (2, 2, 2 * LISTED["second"]["runs"]["adaptthink"][0])
    assert run_laboratory.left(made, 2)[2] == minutes / 2
    done = made[0][0].folder
    done.mkdir(parents=True)
    (done / "summary.json").write_text(json.dumps({"wall_s": 180.0}))
    assert run_laboratory.left(made, 1) == (2, 1, 3.0)
    assert run_laboratory.left(made, 4) == (2, 1, 3.0), "one run cannot be split"


def test_a_failure_shows_the_end_of_its_log_and_stops_the_rest(tmp_path, monkeypatch):
    steps = [run_laboratory.Step(tmp_path / "lab" / f"{name}-seed0", ["platform", "--nothing"], 1.0) for name in "abc"]
    bad = run_laboratory.Step(tmp_path / "lab" / "bad-seed0", ["adaptive_reasoning.nothing"], 1.0)
    with pytest.raises(
        UserError, match=r"bad-seed0 ended with code 1; the end of .*bad-seed0\.log:[^$]*No module named"
    ):
        run_laboratory.run_all([[bad], *([s] for s in steps)], 1)
    assert not (tmp_path / "lab" / "c-seed0.log").exists()


def test_the_plan_is_said_before_anything_runs(tmp_path, capsys):
    run_laboratory.main(["first", "second", "--root", str(tmp_path), "--seeds", "0 1 2", "--jobs", "2", "--plan"])
    runs = 3 * sum(len(LISTED[name]["runs"]) for name in ("first", "second")) + len(LISTED["second"]["once"])
    assert capsys.readouterr().out.startswith(f"0 of {runs} runs are finished; the others take about ")
    assert not list(tmp_path.iterdir())
