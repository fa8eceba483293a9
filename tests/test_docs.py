"""The pages: links [`code`](file.py#L12) lead to a line that holds that code, and code and diffs in them work.

python tests/test_docs.py         # after an edit: sets every such line number anew
"""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.rollout import Forced
from adaptive_reasoning.tasks import chain

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[`([^`\n]+)`\]\(((?:\.\./)*[\w./]+\.(?:py|yaml))#L(\d+)\)")


def lines_of(page: Path, target: str) -> list[str]:
    return (page.parent / target).read_text().splitlines()


def test_every_link_into_the_code_leads_to_its_line():
    links = [(page, *link) for page in PAGES for link in LINK.findall(page.read_text())]
    assert len(links) >= 8
    wrong = []
    for page, code, target, number in links:
        lines = lines_of(page, target)
        if int(number) > len(lines) or code not in lines[int(number) - 1]:
            wrong.append(f"{page.name}: `{code}` is not in line {number} of {target}")
    assert not wrong, "\n".join(wrong) + "\nSet the line numbers anew with: python tests/test_docs.py"


def test_every_relative_link_exists():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_every_make_target_exists():
    targets = re.findall(r"^([\w.-]+(?: [\w.-]+)*):", (ROOT / "Makefile").read_text(), re.M)
    known = {name for line in targets for name in line.split()}
    patterns = [line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("plan-")]
    plans = tuple(name.rstrip("%") for line in patterns for name in line.split())
    for page in PAGES:
        for target in re.findall(r"(?:^    |`)make ([a-z][\w.-]*)", page.read_text(), re.M):
            if not target.endswith(("-", "...")):
                assert target in known or target.startswith(plans), f"{page.name}: there is no `make {target}`"


# --- docs/add_a_method.md: every diff is applied, imported and tried

METHOD = ROOT / "docs" / "add_a_method.md"
COPIED = {"rloo.py": "grpo.py"}  # a file that a diff changes -> the one it is a copy of


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def changed(diff: str) -> str:
    return re.search(r"^\+\+\+ b/(.+)$", diff, re.M)[1]


DIFFS = {Path(changed(diff)).stem: diff for diff in blocks(METHOD, "diff")}


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """Return what applies a diff of the page to a copy of its file, imports the copy, and returns the module."""

    def load(name: str):
        path = Path(changed(DIFFS[name]))
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        if path.parts[0] == "adaptive_reasoning":
            shutil.copy(ROOT / path.parent / COPIED.get(path.name, path.name), file)
        subprocess.run(
            ["git", "apply", "--whitespace=error", "-"], cwd=tmp_path, input=DIFFS[name], text=True, check=True
        )
        assert all(len(line) <= 120 for line in file.read_text().splitlines())
        spec = importlib.util.spec_from_file_location(f"patched_{name}" if len(path.parts) > 1 else name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def episode(mode="", correct=True, tokens=4, group=0) -> Episode:
    return Episode(
        Question(f"q{group}", "1+1", "2"), group, torch.tensor([1, 2]), torch.arange(tokens), torch.zeros(tokens),
        torch.ones(tokens, dtype=torch.bool), "stop", mode=mode, correct=correct,
    )  # fmt: skip


def test_the_page_has_a_method_of_30_lines_and_four_ablations():
    assert list(DIFFS) == ["rloo", "ada_grpo", "thinker", "adaptthink", "second_sentence", "sketch"]
    added = [line for line in DIFFS["rloo"].splitlines()[2:] if line.startswith("+")]
    assert len(added) <= 30
    for page in (METHOD, ROOT / "README.md"):
        assert f"in {len(added)} changed lines" in page.read_text(), page


def test_rloo(patched):
    """0.2 x 4 of 8 tokens is a price of 0.1; the baseline of each is the mean of the other two."""
    rloo, args = patched("rloo"), SimpleNamespace(length_price=0.2, max_new_tokens=8)
    episodes = [episode(), episode(), episode(correct=False), episode(group=1)]
    for e in episodes:
        e.reward = rloo.reward(e, args)
    assert [e.reward for e in episodes] == pytest.approx([0.9, 0.9, 0, 0.9])
    assert rloo.advantages(episodes, args) == pytest.approx([0.45, 0.45, -0.9, 0.9])


@pytest.mark.parametrize(
    "mode, correct, want", [("long_cot", True, 0.95), ("cot", True, 0.9), ("direct", True, 1), ("cot", False, 0)]
)
def test_a_price_per_mode(patched, mode, correct, want):
    assert patched("ada_grpo").reward(episode(mode, correct, 1000), None) == pytest.approx(want)


def test_a_critic_with_a_lambda_of_its_own(patched):
    thinker, e = patched("thinker"), episode(tokens=3)
    d = SimpleNamespace(turns={"fast": SimpleNamespace(start=0, ids=[7, 8, 9], reward=1.0)})
    args = SimpleNamespace(gamma=1.0, lam=0.5, propagate=False, adv_norm="none")
    thinker.fill_advantages([e], [d], [torch.full((3,), 0.5)], args, lambda numbers: numbers)
    assert e.advantages.tolist() == pytest.approx([0.125, 0.25, 0.5])
    assert e.columns["returns"].tolist() == pytest.approx([1, 1, 1])


def test_forcing_at_the_second_sentence(patched):
    adaptthink, own = patched("adaptthink"), patched("second_sentence")
    tokenizer = chain.tokenizer(own.SecondSentence)
    args = adaptthink.Args(task="chain", num_generations=2)
    form = own.SecondSentence(tokenizer, args)
    skip, think = adaptthink.plan_rollouts([(0, Question("q", "1+1", "2"), [5])], form, args, (3,), step=1)
    assert skip.forced == (Forced(((form.eot, 0.5),), after=form.stops),)
    assert think.forced[0].tokens[0] == (form.word[0], 0.5)
    ids = tokenizer.encode("Alright, let me see.\n", add_special_tokens=False)
    assert form.mode_of(torch.tensor([*ids, form.eot])) == form.mode_of([form.eot]) == "nothinking"
    assert form.mode_of(torch.tensor([*ids, form.word[0], form.eot])) == form.mode_of(ids) == "thinking"


def test_a_fifth_mode(patched):
    form = patched("sketch").WithSketch
    assert formats.load("sketch.WithSketch") is form and list(form.modes)[-2:] == ["sketch", "unknown"]
    text = form.response(Question("q", "3*7+4", "5"), "sketch", None)
    assert form.format_of(text) == "sketch" and form.extract_answer(text) == "5"


SMALL = (
    "--max_steps 2 --chain_questions 16 --chain_eval_questions 8 --prompts_per_step 4 --num_generations 4 "
    "--rollout_rows 64 --eval_every 0 --save_every 2"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, base, response_format, options",
    [
        ("rloo", "grpo", "arm", ""),
        ("ada_grpo", "ada_grpo", "arm", ""),
        ("ada_grpo", "ada_grpo", "sketch.WithSketch", ""),
        ("thinker", "thinker", "dialogue", "--critic_minibatches 2 --lam 0.95"),
        ("adaptthink", "adaptthink", "second_sentence.SecondSentence", "--ref_samples 2"),
    ],
)
def test_every_diff_trains_two_steps(patched, tmp_path, monkeypatch, name, base, response_format, options):
    patched(name)
    if "." in response_format:
        patched(response_format.split(".")[0])
    tokenizer = chain.tokenizer(formats.load(response_format))
    tokenizer.save_pretrained(tmp_path / "model")
    chain.tiny_model(tokenizer, hidden=32, layers=2).save_pretrained(tmp_path / "model")
    command = [sys.executable, str(tmp_path / "adaptive_reasoning" / f"{name}.py")]
    command += ["--config", f"experiments/toy_{base}.yaml", "--model", str(tmp_path / "model")]
    command += ["--output_dir", str(tmp_path / "run"), "--answer_format", response_format, *SMALL.split()]
    if base == "adaptthink":
        command += ["--ref_cache", str(tmp_path / "reference")]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    done = subprocess.run([*command, *options.split()], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2
    assert "declared nowhere" not in done.stdout + done.stderr


# --- docs/add_a_task_or_reward.md


def test_the_task_and_the_verifier(tmp_path, monkeypatch):
    for code in blocks(ROOT / "docs" / "add_a_task_or_reward.md", "python"):
        (tmp_path / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert formats.load("my_format.Words").check(" Yes", "yes ")
    import my_task

    args = SimpleNamespace(chain_questions=3, chain_eval_questions=2, seed=0, eval_samples=1)
    source = my_task.doubling(args, train=True)
    assert [int(q.answer) for q in source.questions] == [2 * int(q.problem[2:]) for q in source.questions]
    assert [len(b.questions) for b in source.benchmarks] == [2] and source.score is my_task.score
    question = dataclasses.replace(source.questions[0], answer="34")
    assert [source.score(answer, question) for answer in ("34", "24", "35")] == [1, 0.5, 0]


def main() -> None:
    for page in PAGES:

        def renumbered(match: re.Match, page=page) -> str:
            code, target, _ = match.groups()
            number = next((i for i, line in enumerate(lines_of(page, target), 1) if code in line), None)
            if number is None:
                raise SystemExit(f"{page.name}: {target} has no line with `{code}`: correct the link's text")
            return f"[`{code}`]({target}#L{number})"

        page.write_text(LINK.sub(renumbered, page.read_text()))


if __name__ == "__main__":
    main()
