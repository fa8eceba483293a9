"""Bank: graded responses of the starting model, sampled once and kept with their token ids and log-probs.

What is kept is named after model, questions, prompts and sampler, so any run that would sample the same finds it, and
no run finds another's. One file holds one round of questions of one process, written whole or not at all: a killed run
goes on with the rounds that are missing, and a longer run adds the questions that a shorter one did not need. Pass
rates, such as AdaptThink's reference accuracies, read the files' headers alone.

    <folder>/<key>/about.json                what was sampled
    <folder>/<key>/<first question>.safetensors
        ids [sum T] int32, logprobs [sum T] fp32     all responses, one behind the other
        metadata "answers": one row a response       question, sample, tokens, correct, cut, mode, answer

8 bytes a token: 16 responses of 5,000 tokens to 40,000 questions are 26 GB. Processes share the folder's file system.
"""

import hashlib
import json
from collections.abc import Callable
from math import inf
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import write_bytes_atomic, write_json_atomic
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.runtime import all_gather, on_main
from adaptive_reasoning.rollout import Request, Sampling, request_seed
from adaptive_reasoning.run.folder import weights_of
from adaptive_reasoning.run.rewards import check_failures, failed_rewards, failures

STREAM = 104_729  # keeps the random numbers of banked samples apart from those of training
QUESTIONS_PER_ROUND = 256  # on each process; what a kill can cost


class Bank:
    """Graded responses to questions. Every process must create it with the same arguments.

    Args:
        run: an entered Run, whose replica holds the weights to sample from.
        needed: indices of questions of run.task.
        make_requests: question index -> its requests, tagged (question, index).
        folder: where responses are kept.

    Raises:
        UserError: a file is damaged, or a continued run, whose weights are others, lacks responses.
    """

    def __init__(
        self, run, needed: list[int], make_requests: Callable[[int], list[Request]], sampling: Sampling, folder: str
    ):
        about = {
            "model": digest("\1".join(weights_of(run.model))),
            "questions": digest("\0".join(f"{q.problem}\0{q.answer}" for q in run.task.questions)),
            "prompts": digest(repr(run.task.prompts)),  # the chat template is in them
            "requests": digest(repr([describe(r) for r in make_requests(0)])),
            "sampling": repr(sampling),
            "format": f"{type(run.form).__module__}.{type(run.form).__qualname__}",
            "dtype": run.args.dtype,
            **{what: digest(*text) for what, text in run.code.items()},  # files of one's own: a reward, a format
        }
        self.run, self.needed = run, needed
        self.folder = Path(folder) / digest(json.dumps(about))[:16]

        def begin():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.folder / "about.json", about)

        on_main(run.accelerator, begin)
        self.rows: dict[int, list[dict]] = {}  # question -> rows, in order of the samples
        self._read()
        todo = [i for i in needed if i not in self.rows]
        if todo and run.step:
            raise UserError(
                f"{self.folder} lacks {len(todo)} of the questions that {run.journal.folder} was begun with, and step "
                f"{run.step} is no longer the starting model. Restore it, or start the run anew."
            )
        if todo:
            run.journal.say(f"sampling answers of {run.args.model} to {len(todo)} questions, kept in {self.folder}")
        per_round = QUESTIONS_PER_ROUND * run.ranks
        for start in range(0, len(todo), per_round):
            mine = todo[start : start + per_round][run.rank :: run.ranks]
            requests = [request for i in mine for request in make_requests(i)]
            episodes = run.rollout(requests, sampling, f"answers {start}/{len(todo)}")
            failed, number = failures(run, episodes), run.sum([len(episodes)])[0]
            check_failures(run, {"reward/failed_share": failed_rewards(failed) / number}, failed)
            if episodes:
                write(self.folder / f"{mine[0]:08d}.safetensors", episodes)  # a question is in one file
            run.accelerator.wait_for_everyone()
        if todo:
            self._read()

    def _read(self) -> None:
        """Read the headers of all files, on the main process, for all."""

        def read():
            return [(path.name, rows_of(path)) for path in sorted(self.folder.glob("*.safetensors"))]

        found = on_main(self.run.accelerator, read)
        for name, rows in all_gather(self.run.accelerator, found)[0]:
            start = 0
            for question in dict.fromkeys(row["question"] for row in rows):
                self.rows[question] = []
            for row in rows:
                self.rows[row["question"]].append({**row, "file": name, "start": start})
                start += row["tokens"]

    def pass_rates(self) -> dict[int, float]:
        """Return {question: share of right responses, or mean score}, and tell the run how long its responses are."""
        known = {i: self.rows[i] for i in self.needed}
        rates = {i: sum(row.get("score", row["correct"]) for row in rows) / len(rows) for i, rows in known.items()}
        self.run.know_lengths({i: sum(row["tokens"] for row in rows) / len(rows) for i, rows in known.items()})
        mean = sum(rates.values()) / len(rates)
        self.run.journal.say(f"pass rates of {len(rates)} questions from {self.folder}: mean {mean:.3f}")
        return rates

    def episodes(self, rows: list[dict]) -> list[Episode]:
        """Return the responses of these rows, token for token as they were sampled. T response tokens each."""
        opened, out = {}, []
        for row in rows:
            file = opened.setdefault(row["file"], safe_open(self.folder / row["file"], "pt"))
            here = slice(row["start"], row["start"] + row["tokens"])
            task, i = self.run.task, row["question"]
            e = Episode(
                task.questions[i],
                i,
                torch.tensor(task.prompts[i]),
                file.get_slice("ids")[here].long(),
                file.get_slice("logprobs")[here],
                torch.ones(row["tokens"], dtype=torch.bool),
                "length" if row["cut"] else "stop",
                mode=row["mode"],
                answer=row["answer"],
                correct=row["correct"],
            )
            out.append(e)
        return out


def free_samples(run, number: int, opening: tuple[int, ...] = (), limit: int = 0) -> Callable[[int], list[Request]]:
    """Return what makes the requests of a question: `number` samples, free but for the first tokens, `opening`.

    Args:
        limit: most tokens of each, at most --max_new_tokens; 0: those.
    """
    first, limit = tuple((token, 1.0) for token in opening), min(limit or inf, run.args.max_new_tokens)

    def make_requests(i: int) -> list[Request]:
        question, prompt_ids = run.task.questions[i], run.task.prompts[i]
        seeds = [request_seed(run.args.seed, STREAM, i, k) for k in range(number)]
        return [Request(prompt_ids, limit, run.stop_ids, s, first, tag=(question, i)) for s in seeds]

    return make_requests


def write(path: Path, episodes: list[Episode]) -> None:
    """Write one round of responses, whole or not at all."""
    places: dict[int, int] = {}
    rows = []
    for e in episodes:
        sample = places[e.group] = places.get(e.group, -1) + 1
        row = {"question": e.group, "sample": sample, "tokens": e.num_tokens, "correct": e.correct, "score": e.score}
        rows.append({**row, "cut": e.finish_reason == "length", "mode": e.mode, "answer": e.answer})
    tensors = {
        "ids": torch.cat([e.response_ids for e in episodes]).int(),
        "logprobs": torch.cat([e.behaviour_logprobs for e in episodes]),
    }
    write_bytes_atomic(path, save(tensors, {"answers": json.dumps(rows)}))


def rows_of(path: Path) -> list[dict]:
    """Return the rows in the header of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["answers"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}. Delete it: its questions are then sampled again.") from error


def describe(request: Request) -> tuple:
    """Return what about a request changes its responses, its prompt left out (the questions are in the key)."""
    return request.max_new_tokens, request.stop_ids, request.forced, request.seed, len(request.prompt_ids)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
