"""Pass rates: how often a model solves each question, sampled once and kept.

Results are lines of a file named after a key of model, questions and sampler, so that any run that would measure the
same thing finds them, and no run finds another's. One line holds one round of questions, appended when the round is
finished: a killed measurement goes on with the very rounds that an untouched one would have had, and a longer run adds
the questions that a shorter one did not need.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.core.files import append_jsonl, read_jsonl
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.learner.runtime import all_gather
from adaptive_reasoning.rollout import Request, Sampling

QUESTIONS_PER_ROUND = 256  # on each process; what a kill can cost


def pass_rates(
    run,
    needed: list[int],
    make_requests: Callable[[int], list[Request]],
    sampling: Sampling,
    extract_answer,
    folder: str,
) -> dict[int, float]:
    """Return {question index: share of right responses} for the questions `needed`.

    Args:
        run: an entered Run whose engine holds the weights to measure. Every process must call this.
        needed: indices into run.task.questions.
        make_requests: question index -> its requests, tagged (question, index).
        extract_answer: response text -> answer to grade, or None.
        folder: where results are kept.
    """
    about = {
        "model": fingerprint(run.args.model),
        "questions": digest("\0".join(f"{q.problem}\0{q.answer}" for q in run.task.questions)),
        "prompts": digest(repr(run.task.prompts)),  # the chat template is in them
        "requests": digest(repr([describe(r) for r in make_requests(0)])),
        "sampling": repr(sampling),
        "dtype": run.args.dtype,
    }
    path = Path(folder) / f"pass_rate_{digest(json.dumps(about))[:16]}.jsonl"
    if run.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            append_jsonl(path, {"about": about})
    run.accelerator.wait_for_everyone()
    known = {row["question"]: row for line in read_jsonl(path) for row in line.get("round", [])}
    todo = [i for i in needed if i not in known]
    run.accelerator.wait_for_everyone()
    if todo:
        run.say(f"measuring the pass rate of {run.args.model} on {len(todo)} questions, kept in {path}")
    per_round = QUESTIONS_PER_ROUND * run.ranks
    for start in range(0, len(todo), per_round):
        mine = todo[start : start + per_round][run.rank :: run.ranks]
        requests = [request for i in mine for request in make_requests(i)]
        episodes = run.rollout(requests, extract_answer, sampling, f"pass rates {start}/{len(todo)}")
        rows: dict[int, dict] = {}
        for e in episodes:
            row = rows.setdefault(e.group, {"question": e.group, "n": 0, "correct": 0, "tokens": 0, "cut": 0})
            row["n"] += 1
            row["correct"] += int(e.info["correct"])
            row["tokens"] += e.num_tokens
            row["cut"] += e.finish_reason == "length"
        done = [row for part in all_gather(run.accelerator, list(rows.values())) for row in part]
        known |= {row["question"]: row for row in done}
        if run.main:
            append_jsonl(path, {"round": done})
    rates = {i: known[i]["correct"] / known[i]["n"] for i in needed}
    run.lengths |= {i: known[i]["tokens"] / known[i]["n"] for i in needed}
    run.say(f"pass rates of {len(rates)} questions from {path}: mean {sum(rates.values()) / len(rates):.3f}")
    return rates


def read_authors_table(path: str, questions: dict[int, Question]) -> dict[int, float]:
    """Return {question index: reference accuracy} from the authors' JSON list, looked up by the problem's text.

    Rows are {"problem", "answer", "metrics": {"avg_acc_thinking", ...}}; the first, "__OVERALL__", holds means.

    Raises:
        UserError: the file cannot be read or has another layout, or a question is not in it.
    """
    try:
        table = {
            row["problem"].strip(): row["metrics"]["avg_acc_thinking"] for row in json.loads(Path(path).read_text())
        }
        if wrong := [v for v in table.values() if not isinstance(v, (int, float)) or not 0 <= v <= 1]:
            raise TypeError(f"an accuracy of {wrong[0]!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--ref_results {path}: cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--ref_results {path}: expected a list of {{problem, answer, metrics: {{avg_acc_thinking}}}}, "
            f"stumbled over {error}."
        ) from error
    missing = [q for q in questions.values() if q.problem.strip() not in table]
    if missing:
        raise UserError(
            f"--ref_results {path}: {len(missing)} of {len(questions)} questions are not in it, the first is "
            f"{missing[0].id}: {missing[0].problem[:80]!r}. Measure them instead: leave --ref_results empty."
        )
    return {i: float(table[q.problem.strip()]) for i, q in questions.items()}


def describe(request: Request) -> tuple:
    """Return what about a request changes its responses, its prompt left out (the questions are in the key)."""
    return (
        request.max_new_tokens, request.stop_ids, request.forced, request.allowed_first, request.closer, request.seed,
        len(request.prompt_ids),
    )  # fmt: skip


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(model: str) -> str:
    """Return what identifies the weights: the name on the hub, or a hash over the files of a local folder."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    state = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        state.update(file.name.encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                state.update(block)
    return state.hexdigest()
