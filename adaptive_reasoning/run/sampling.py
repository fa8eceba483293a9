"""Sampling: responses of the policy, graded while others still decode. The replica of the weights, and the grader."""

import time
from collections.abc import Iterable

import torch

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.learner.watch import Watch
from adaptive_reasoning.rollout import Completion, Decoder, Engine, Request, Sampling
from adaptive_reasoning.rollout.dialogue import Dialogue, converse
from adaptive_reasoning.tasks import prompts


class Sampler:
    """The rollout engine with a replica of the policy's weights, and the grader. A context manager.

    Args:
        args: options `temperature`, `dtype`, `rollout_rows`, `batch_invariant`.
        config: of the model.
        form: the response format: how a response says its mode and its answer.
        grader: from `Task.grader`.
        cache_bytes: memory of the KV cache.
        show: whether this process draws progress bars.
    """

    def __init__(self, args, config, tokenizer, stop_ids, form, grader, watch: Watch, device, cache_bytes, show: bool):
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        self.engine = Engine(
            Decoder(config, device, dtype), args.rollout_rows, cache_bytes, batch_invariant=args.batch_invariant
        )
        self.args, self.tokenizer, self.stop_ids, self.form = args, tokenizer, stop_ids, form
        self.grader, self.watch, self.show = grader, watch, show
        self.seconds: dict[str, float] = {}  # "rollout" and "grade_wait" of the latest rollout

    def __enter__(self) -> "Sampler":
        self.grader.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.grader.__exit__(*exception)

    def refresh(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Bring new weights into the replica, tensor by tensor."""
        self.engine.refresh(weights)

    def rollout(
        self, requests: list[Request], step: int, sampling: Sampling | None = None, progress: str = "rollout"
    ) -> list[Episode]:
        """Generate responses and grade them as they end. Each request's tag is (question, index in the task).

        The episodes come back in order, with text, mode, answer and `correct`, which is False where there is no answer.
        """
        self.watch.phase("rollout", step)
        start = time.perf_counter()
        texts: dict[int, str] = {}
        answers: dict[int, str] = {}

        def on_finish(i: int, completion: Completion) -> None:
            texts[i] = prompts.decode(self.tokenizer, completion.response_ids.tolist(), self.stop_ids)
            answer = self.form.extract_answer(texts[i])
            if answer is not None:
                answers[i] = answer
                self.grader.submit(answer, requests[i].tag[0].answer, i)

        sampling = sampling or Sampling(self.args.temperature)
        completions = self.engine.run(requests, sampling, on_finish, progress if self.show else "")
        self.seconds["rollout"] = time.perf_counter() - start
        self.watch.phase("grade", step)
        start = time.perf_counter()
        grades = self.grader.drain()
        self.seconds["grade_wait"] = time.perf_counter() - start
        episodes = []
        for i, completion in enumerate(completions):
            e = Episode.of(completion, text=texts[i], answer=answers.get(i))
            e.mode = self.form.mode_of(completion.response_ids)
            if i in grades:
                e.correct = grades[i].correct
                e.grader = "" if grades[i].status == "ok" else f"{grades[i].status}: {grades[i].detail}"
            episodes.append(e)
        return episodes

    def converse(self, dialogues: list[Dialogue], step: int) -> list[Episode]:
        """Hold dialogues in the setting "train" of the format and return them as episodes, in order."""
        self.watch.phase("rollout", step)
        start, progress = time.perf_counter(), "rollout" if self.show else ""
        sampling = Sampling(self.args.temperature)
        waited = converse(self.engine, self.grader, dialogues, self.form, sampling, "train", progress)
        self.seconds |= {"rollout": time.perf_counter() - start - waited, "grade_wait": waited}
        return [d.episode() for d in dialogues]
