"""What the files of the GRPO family repeat must stay equal (P11)."""

import difflib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "adaptive_reasoning"
FAMILY = ["grpo", "ada_grpo", "degrpo", "tlmre"]
# TLMRE's return holds the divergence, so these lines stand above, with its advantages.
LOGPROBS_FIRST = {
    "tlmre": """
            if not on_policy:
                learner.recompute_logprobs(episodes)
            run.score_reference(episodes)""".strip("\n").splitlines()
}
ALL = [*FAMILY, "adaptthink", "thinker"]
OFFLINE = ["dpo", "o1_pruner"]


def lines(name: str) -> list[str]:
    return (FOLDER / f"{name}.py").read_text().splitlines()


def blocks(name: str) -> list[str]:
    """The lines of main() from "# --- update" on to the end of the file."""
    found = lines(name)
    main = found.index("def main() -> None:")
    start = next(i for i in range(main, len(found)) if found[i].strip().startswith("# --- update"))
    return found[start:]


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "grpo"])
def test_the_repeated_blocks_are_equal(name):
    base, own = blocks("grpo"), blocks(name)
    if above := LOGPROBS_FIRST.get(name):
        base = [line for line in base if line not in above and not line.strip().startswith("on_policy =")]
        assert "\n".join(above) in "\n".join(lines(name)).removesuffix("\n".join(own))
    drift = list(difflib.unified_diff(base, own, "grpo.py", f"{name}.py", "", "", 0, ""))
    assert not drift, f"{name}.py has drifted from grpo.py:\n" + "\n".join(drift)


@pytest.mark.parametrize("name", FAMILY)
def test_the_sections_are_in_the_same_order(name):
    wanted = ["class Args", "def plan_rollouts", "def reward", "def advantages", "def loss",
              "def metrics", "def main"]  # fmt: skip
    text = (FOLDER / f"{name}.py").read_text()
    places = [text.find("\n" + start) for start in wanted]
    assert -1 not in places and places == sorted(places), dict(zip(wanted, places))


@pytest.mark.parametrize("name", ALL)
def test_the_loop_reads_the_same_in_every_file(name):
    """The steps of the loop in their order, the core of an update, and how a run ends: the same words everywhere."""
    main = "\n".join(lines(name)).partition("\ndef main()")[2]
    steps = ["for step in run.steps():", "# --- roll out", "# --- reward and advantage", "# --- update",
             "learner.minibatches(", "for mb in minibatch:", "learner.score(mb", "learner.backward(value)",
             "losses.append(stats)", "run.observe(mb, logprobs)", "updates.append(learner.step(", "run.refresh()",
             "# --- log, evaluate, save", "run.log(episodes, "]  # fmt: skip
    places = [main.rfind(step) for step in steps]
    assert -1 not in places and places == sorted(places), dict(zip(steps, places))
    end = """
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()


if __name__ == "__main__":
    run_cli(main)"""
    assert main.endswith(end), main[-len(end) :]


def test_offline_methods_have_one_schedule_of_the_rate():
    schedules = {name: "\n".join(lines(name)).split("\ndef rate(")[1].split("\n\n\n")[0] for name in OFFLINE}
    assert len(set(schedules.values())) == 1, schedules
