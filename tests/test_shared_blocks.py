"""What the files of the GRPO family repeat must stay equal (P11)."""

import difflib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "adaptive_reasoning"
FAMILY = ["grpo", "ada_grpo", "degrpo"]
ALL = [*FAMILY, "adaptthink", "thinker"]


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
    drift = [
        line for line in difflib.unified_diff(blocks("grpo"), blocks(name), "grpo.py", f"{name}.py", "", "", 0, "")
    ]
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
    """The steps of the loop in their order, the core of an update, and how a run ends: the same words in all five."""
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
