"""Run: everything around an algorithm's loop. Where it writes, what it runs on, how it continues, what it reports.

An algorithm file decides what to sample, what it is worth and what to minimise; a run carries that out: the folder of
the run, the model on its runtime, rollouts with grading in the background, metrics, evaluations, checkpoints. Nothing
here knows any algorithm. Every random number is a function of (seed, step, question, sample), so a resumed run needs no
state but weights, optimiser and step number.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from adaptive_reasoning.core.episode import Episode, sample_row
from adaptive_reasoning.core.errors import UserError, say
from adaptive_reasoning.core.files import append_jsonl, load_json, read_jsonl, truncate_jsonl, write_json_atomic
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.learner.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
    whole_checkpoint,
)
from adaptive_reasoning.learner.critic import Critic, load_critic
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.model import (
    check_vocabulary,
    generation_config,
    load_config,
    load_model,
    load_tokenizer,
)
from adaptive_reasoning.learner.packing import MicroBatch, logprob_gap, token_ratios
from adaptive_reasoning.learner.runtime import (
    all_gather,
    end,
    is_zero3,
    make_accelerator,
    offloads_optimizer,
    on_main,
)
from adaptive_reasoning.learner.watch import Watch
from adaptive_reasoning.report import glossary
from adaptive_reasoning.report.console import Console
from adaptive_reasoning.report.page import write_page, write_report
from adaptive_reasoning.rollout import Completion, Decoder, Engine, Request, Sampling
from adaptive_reasoning.rollout.dialogue import Dialogue, converse
from adaptive_reasoning.rollout.engine import CPU_CACHE_BYTES
from adaptive_reasoning.run import journal as record
from adaptive_reasoning.run.balance import deal, expected_tokens
from adaptive_reasoning.run.evaluation import Protocol, evaluate
from adaptive_reasoning.run.preflight import preflight
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.task import load_task


class Run:
    """One training run; a context manager.

    Args:
        args: the algorithm's options (RunArgs and its own).
        algorithm: name for summary.json.
        check: check(answer, gold) -> bool for the grader; None: `answers.same_answer`.

    Raises:
        UserError: whatever is wrong with model, data, template or folder, before anything heavy starts.
    """

    def __init__(self, args, algorithm: str, check: Callable[[str, str], bool] | None = None):
        self.args, self.algorithm, self.started = args, algorithm, time.perf_counter()
        self.folder = Path(args.output_dir)
        self.accelerator = make_accelerator(args)
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.watch = Watch(self.accelerator, args.patience)
        with self.watch.telling():
            self.config = load_config(args.model)
            self.tokenizer = load_tokenizer(args.model)
            check_vocabulary(self.config, self.tokenizer)
            self.stop_ids = prompts.stop_tokens(self.tokenizer, generation_config(args.model))
            self.task = load_task(args, self.tokenizer)
            self.task.batch(1, args.prompts_per_step, args.seed)  # says at once if there are too few questions
            read_again = args.model if getattr(args, "kl_coef", 0) else None  # the reference policy, by a continued run
            self.inputs = record.inputs_of(record.data_of(self.task), self.tokenizer, read_again)
            self.grader = self.task.grader(args.grader_workers, args.grader_timeout, check)
        self.step = self.continued = 0  # step reached, and the step at which this process continued
        self.spent = 0.0  # seconds of earlier parts of a resumed run
        self.clock: dict[str, float] = {}
        self.memory: dict = {}  # what an algorithm keeps from step to step: JSON values, saved with every checkpoint
        self.lengths: dict[int, float] = {}  # {question: mean response tokens} where known, the same on every process
        self.cache_bytes = CPU_CACHE_BYTES
        self.latest: dict | None = None  # adaptive result of the newest evaluation

    def preflight(self, control: dict[str, str]) -> None:
        """Print what was found and what memory it will take; stop with the mend where something will not work.

        Args:
            control: the algorithm's control tokens in words, e.g. {"</think>": "token 151649"}.
        """
        with self.watch.telling():
            device = self.accelerator.device
            cuda = device.type == "cuda"
            root = self.folder / "checkpoints"
            newest = newest_checkpoint(root)
            plan = preflight(
                self.args,
                model_config=self.config,
                device=torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
                world_size=self.ranks,
                zero3=is_zero3(self.accelerator),
                device_memory=torch.cuda.get_device_properties(device).total_memory if cuda else None,
                arena=None if cuda else CPU_CACHE_BYTES,
                offload=offloads_optimizer(self.accelerator),
                questions=len(self.task.questions),
                skipped=self.task.skipped,
                longest_prompt=max(map(len, self.task.prompts)),
                findings={
                    **control,
                    "evaluation": ", ".join(f"{b.name} ({len(b.questions)})" for b in self.task.benchmarks),
                },
                disk_free=shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free,
                steps_done=int(newest.name.split("_")[1]) if newest else 0,
                checkpoints_there=len(checkpoints(root)),
            )
            self.say(plan.table)
            self.cache_bytes = plan.cache_bytes

    def __enter__(self) -> "Run":
        """Distribute the model, continue from the newest checkpoint if there is one, and open the folder."""
        with self.watch.telling():
            return self._open()

    def _open(self) -> "Run":
        args = self.args
        self.watch.phase("load")
        on_main(self.accelerator, lambda: record.open_folder(self.folder, self.algorithm, args))
        checkpoint, damaged = whole_checkpoint(self.folder / "checkpoints", self.accelerator)
        for line in damaged:
            self.say(f"warning: {line}")
        if checkpoint is not None:
            record.check_reached(checkpoint, args.max_steps)
        self.learner = Learner(args, load_model(args.model, args)[0], self.accelerator)
        self.reference = None  # the frozen starting model, where the loss holds the policy near it
        if getattr(args, "kl_coef", 0):
            self.reference = Learner(args, load_model(args.model, args)[0], self.accelerator, trainable="none")
        self.critic = None  # of an actor-critic algorithm: values of tokens
        if hasattr(args, "critic_learning_rate"):
            self.critic = Critic(args, load_critic(args.model, args), self.accelerator)
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, self.learner, self.critic)
            self.step, self.spent, self.memory = state["step"], state["wall_s"], state.get("memory", {})
            self.lengths = dict(state.get("lengths", []))
            record.check_inputs(self.folder, state.get("inputs", {}), self.inputs)
            self.continued = self.step
            self.say(f"continuing {self.folder} after step {self.step}")

        def forget():  # what came after the checkpoint is written again
            for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
                truncate_jsonl(self.folder / name, self.step if checkpoint else -1)

        on_main(self.accelerator, forget)
        if checkpoint is not None and (seen := read_jsonl(self.folder / "evaluations.jsonl")):
            self.latest = next(row["result"] for row in seen if row["step"] == seen[-1]["step"])  # as it was then
        device = self.accelerator.device
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        self.engine = Engine(
            Decoder(self.config, device, dtype),
            args.rollout_rows,
            cache_bytes=self.cache_bytes,
            batch_invariant=args.batch_invariant,
        )
        self.engine.refresh(self.learner.named_weights())
        rows = read_jsonl(self.folder / "metrics.jsonl") if checkpoint and self.main else []
        self.console = Console(args.max_steps, rows)
        if args.report_to:
            options = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers(self.algorithm, config=options)
        self.grader.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.grader.__exit__(kind, error, trace)
        self.watch.stop(error)
        for tracker in self.accelerator.trackers:  # not end_training: it would take the process group away first
            tracker.finish()
        if error is None:
            parts = [part for part in (self.learner, self.reference, self.critic) if part is not None and part.zero3]
            end(self.accelerator, [part.engine for part in parts])

    # ------------------------------------------------------------------------------------------------- the loop

    def steps(self) -> Iterator[int]:
        """Yield the step numbers still to do, after the evaluation of the untrained model."""
        while self.step < self.args.max_steps:
            self.step += 1
            self.clock |= {"step": time.perf_counter()}
            self.grader.count_anew()
            self.gap, self.ratio, self.kl, self.sampled_at = [0.0, 0, 0.0], [0.0, 0, 0.0], 0.0, self.learner.steps
            yield self.step

    def next_questions(self) -> list[tuple[int, Question, list[int]]]:
        """Return this process's share of the step's questions as (index in the task, question, prompt ids)."""
        batch = self.task.batch(self.step, self.args.prompts_per_step, self.args.seed)
        shares = deal(expected_tokens(batch, self.lengths, self.task.prompts), self.ranks)
        return [(i, self.task.questions[i], self.task.prompts[i]) for i in (batch[j] for j in shares[self.rank])]

    def rollout(
        self,
        requests: list[Request],
        extract_answer: Callable[[str], str | None],
        sampling: Sampling | None = None,
        progress: str = "rollout",
    ) -> list[Episode]:
        """Generate responses and grade them as they end.

        Each request's tag is (question, group). Every episode comes back with its text and info["correct"], which is
        False where `extract_answer` found no answer; info["forced"] counts its forced first tokens.
        """
        self.watch.phase("rollout", self.step)
        start = time.perf_counter()
        texts: dict[int, str] = {}

        def on_finish(i: int, completion: Completion) -> None:
            texts[i] = prompts.decode(self.tokenizer, completion.response_ids.tolist(), self.stop_ids)
            answer = extract_answer(texts[i])
            if answer is not None:
                self.grader.submit(answer, requests[i].tag[0].answer, i)

        sampling = sampling or Sampling(self.args.temperature)
        completions = self.engine.run(requests, sampling, on_finish, progress if self.main else "")
        self.clock["rollout"] = time.perf_counter() - start
        self.watch.phase("grade", self.step)
        start = time.perf_counter()
        grades = self.grader.drain()
        self.clock["grade_wait"] = time.perf_counter() - start
        episodes = []
        for i, c in enumerate(completions):
            info = {"forced": len(c.request.forced), "correct": i in grades and grades[i].correct}
            if i in grades and grades[i].status != "ok":
                info["grader"] = f"{grades[i].status}: {grades[i].detail}"
            episodes.append(Episode.of(c, text=texts[i], info=info))
        self.watch.phase("update", self.step)
        self.clock["update"] = time.perf_counter()
        return episodes

    def converse(self, dialogues: list[Dialogue], script) -> list[Episode]:
        """Hold dialogues in the setting "train" of their script and return them as episodes, in order."""
        self.watch.phase("rollout", self.step)
        start, progress = time.perf_counter(), "rollout" if self.main else ""
        sampling = Sampling(self.args.temperature)
        waited = converse(self.engine, self.grader, dialogues, script, sampling, "train", progress)
        self.watch.phase("update", self.step)
        now = time.perf_counter()
        self.clock |= {"rollout": now - start - waited, "grade_wait": waited, "update": now}
        return [d.episode() for d in dialogues]

    def score_reference(self, episodes: list[Episode]) -> None:
        """Fill `ref_logprobs` of each episode, where there is a reference policy. Every process must call this."""
        if self.reference is not None:
            for episode, values in zip(episodes, self.reference.logprobs(episodes)):
                episode.ref_logprobs = values

    def observe(self, mb: MicroBatch, logprobs: torch.Tensor) -> None:
        """Note what only the forward pass of the update knows.

        The distance of the learner's log-probs from the sampler's (they saw the same tokens under the same weights, so
        anything but rounding is a bug; minibatches behind the first update do not count), the ratios of the update, and
        each episode's info["first_logprob"].
        """
        with torch.no_grad():
            if self.learner.steps == self.sampled_at:
                total, number, largest = logprob_gap(mb, logprobs)
                self.gap = [self.gap[0] + float(total), self.gap[1] + number, max(self.gap[2], float(largest))]
            if mb.weight:
                total, number, largest, kl = token_ratios(mb, logprobs)
                self.kl += float(kl)
                self.ratio = [self.ratio[0] + float(total), self.ratio[1] + number, max(self.ratio[2], float(largest))]
            first = mb.position == 0
            rows, values = mb.sequence[first].tolist(), logprobs[first].tolist()
        for row, value in zip(rows, values):
            mb.episodes[row].info["first_logprob"] = value

    def refresh(self) -> None:
        """Bring the new weights into the rollout replica, layer by layer."""
        self.watch.phase("refresh", self.step)
        self.engine.refresh(self.learner.named_weights())

    def table(self, name: str, needed: list[int], measure: Callable[[], dict[int, float]]) -> dict[int, float]:
        """Return {question index: number} as it was before step 1: measured by a new run, read by a resumed one.

        Raises:
            UserError: a resumed run lacks the file, or asks for questions that were not measured.
        """
        path = self.folder / name
        if self.step == 0:
            values = measure()
            on_main(self.accelerator, lambda: write_json_atomic(path, values))
        elif not path.is_file():
            raise UserError(f"{path} is missing: it holds numbers measured before step 1. Start the run anew.")
        values = {int(i): value for i, value in load_json(path).items()}
        if missing := [i for i in needed if i not in values]:
            raise UserError(
                f"{path} lacks {len(missing)} of the questions that --max_steps {self.args.max_steps} would meet, and "
                "they have to be measured before step 1. Give the old --max_steps, or start a new run."
            )
        return values

    def first_token_metrics(self, name: str, token: int) -> None:
        """Log the probability of a first token over the questions of the first benchmark, as metrics of step 0."""
        if self.step or not self.task.benchmarks:
            return
        asked = [prompts.render(self.tokenizer, q.problem) for q in self.task.benchmarks[0].questions[:512]]
        logprobs = self.engine.first_logprobs(asked, token, self.args.temperature)
        row = {"step": 0, f"{name}_prob": float(logprobs.exp().mean()), f"{name}_logprob": float(logprobs.mean())}
        self._write_metrics(row)

    def log(self, episodes: list[Episode], own: dict, losses: list[dict], updates: list[dict], minibatches) -> None:
        """Write and print the metrics of one step.

        Args:
            episodes: of this process.
            own: the algorithm's metrics, already over all processes.
            losses: per micro-batch, additive shares {"loss/...": tensor} that sum to the step's value over all ranks.
            updates: what learner.step() returned.
            minibatches: what learner.minibatches() returned.

        Raises:
            UserError: on all processes, if more answers than --max_ungraded could not be graded.
        """
        self.watch.phase("log", self.step)
        now = time.perf_counter()
        lengths: dict[int, list[int]] = {}
        for e in episodes:
            lengths.setdefault(e.group, []).append(e.num_tokens)
        mine = {
            "tokens": sum(e.num_actions for e in episodes),
            "episodes": len(episodes),
            "cut": sum(e.finish_reason == "length" for e in episodes),
            "correct": sum(e.info["correct"] for e in episodes),
            "reward": sum(e.reward for e in episodes),
            "gap": self.gap,
            "ratio": self.ratio,
            "kl": self.kl,
            "grader": self.grader.rates(),
            "losses": record.sums_of(losses),
            "groups": [e.group for e in episodes],
        }
        parts = all_gather(self.accelerator, mine | {"lengths": lengths})
        self.lengths |= {i: sum(tokens) / len(tokens) for part in parts for i, tokens in part["lengths"].items()}
        row = {
            "step": self.step,
            **record.over_processes(parts, len(minibatches)),
            "loss/grad_norm": max(u["grad_norm"] for u in updates),
            "loss/learning_rate": updates[-1]["learning_rate"],
            "learner/zero_advantage_share": sum(m.zero_advantage for m in minibatches) / len(minibatches),
            "learner/micro_batches": sum(map(len, minibatches)),
            "data/epoch": self.task.epoch(self.step, self.args.prompts_per_step),
            "data/skipped_prompts": self.task.skipped,
            "time/step_s": now - self.clock["step"],
            "time/rollout_s": self.clock["rollout"],
            "time/grade_wait_s": self.clock["grade_wait"],
            "time/update_s": now - self.clock["update"],
            **own,
        }
        row["rollout/tokens_per_s"] = row["rollout/tokens"] / self.clock["rollout"]
        ungraded = sum(row.get(f"grader/{kind}_rate") or 0.0 for kind in ("timeout", "error"))
        if self.latest is not None:
            row |= {f"eval/{mode}_share": part["share"] for mode, part in self.latest["modes"].items()}
        if "eval" in self.clock:
            row["time/eval_s"] = self.clock.pop("eval")
        batch = self.task.batch(self.step, self.args.prompts_per_step, self.args.seed)
        chosen = record.picked([part["groups"] for part in parts], batch, self.args.samples_per_step, self.step)
        kept = {j: sample_row(episodes[j], self.step, "train") for rank, j in chosen if rank == self.rank}
        kept = all_gather(self.accelerator, kept)
        self._write_metrics(row, [kept[rank][j] for rank, j in chosen])
        if ungraded > self.args.max_ungraded:
            slow, broken = (row[f"grader/{kind}_rate"] or 0.0 for kind in ("timeout", "error"))
            raise UserError(
                f"step {self.step}: {ungraded:.0%} of the answers could not be graded (timeouts {slow:.0%}, errors "
                f"{broken:.0%}), more than --max_ungraded {self.args.max_ungraded}. Look at 'grader' in "
                f"{self.folder / 'samples.jsonl'}; raise --grader_timeout or --grader_workers if the machine is too "
                "slow. The same command continues the run from its newest checkpoint."
            )

    def _write_metrics(self, row: dict, samples: Sequence[dict] = ()) -> None:
        def write():
            glossary.check(row)
            append_jsonl(self.folder / "metrics.jsonl", row)
            for sample in samples:
                append_jsonl(self.folder / "samples.jsonl", sample)
            if row["step"]:
                self.console.step(row)
            if self.args.report_to:
                self.accelerator.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

        on_main(self.accelerator, write)

    def gather(self, rows: list[dict]) -> list[dict]:
        """Return the rows of all processes, in order of process."""
        return [row for part in all_gather(self.accelerator, rows) for row in part]

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluate_if_due(self, protocol: Protocol) -> None:
        """Evaluate before the first step, every `eval_every` steps and after the last one.

        Before and after training all settings of the protocol are measured, in between the adaptive one alone. A step
        is evaluated before its checkpoint is written, so a run that continues there lacks only what another
        `max_steps` or `eval_every` asks for.
        """
        first, last = self.step == 0, self.step == self.args.max_steps
        due = first or last or (self.args.eval_every and self.step % self.args.eval_every == 0)
        if not due or not self.task.benchmarks:
            return
        start = time.perf_counter()
        settings = list(protocol.settings) if first or last else list(protocol.settings)[:1]
        there = self.evaluations(self.step) if self.step == self.continued else []
        known = {(row["benchmark"], row["setting"]) for row in there}
        rows, samples_of_all = [], []
        for benchmark in self.task.benchmarks:
            for setting in (s for s in settings if (benchmark.name, s) not in known):
                self.watch.phase(f"evaluate {benchmark.name} {setting}", self.step)
                result, samples = evaluate(
                    self.engine, self.grader, self.tokenizer, self.stop_ids, benchmark, protocol, setting, self.args,
                    self.accelerator, progress=f"evaluate {benchmark.name} {setting}",
                )  # fmt: skip
                rows.append({"step": self.step, "setting": setting, "benchmark": benchmark.name, "result": result})
                samples_of_all += samples
        if not rows:
            return
        self.latest = (there or rows)[0]["result"]

        def write():
            for sample in samples_of_all:
                append_jsonl(self.folder / "samples.jsonl", {"step": self.step, "split": "eval", **sample})
            for row in rows:
                append_jsonl(self.folder / "evaluations.jsonl", row)
            self.console.evaluation(rows)
            if not last:
                write_page(self.folder)

        on_main(self.accelerator, write)
        self.clock["eval"] = time.perf_counter() - start

    def evaluations(self, step: int) -> list[dict]:
        """Return the rows of evaluations.jsonl of one step."""
        return [row for row in read_jsonl(self.folder / "evaluations.jsonl") if row["step"] == step]

    # ------------------------------------------------------------------------------------------------- keeping

    def save_if_due(self) -> None:
        """Write a checkpoint every `save_every` steps and after the last one."""
        last = self.step == self.args.max_steps
        if not (last or (self.args.save_every and self.step % self.args.save_every == 0)):
            return
        self.watch.phase("save", self.step)
        root = self.folder / "checkpoints"
        on_main(self.accelerator, lambda: root.mkdir(exist_ok=True))
        state = {"step": self.step, "wall_s": self.spent + time.perf_counter() - self.started, "memory": self.memory}
        state["lengths"] = sorted(self.lengths.items())
        state["inputs"] = self.inputs
        save_checkpoint(root / f"step_{self.step:06d}", self.learner, self.tokenizer, state, self.critic)
        on_main(self.accelerator, lambda: prune(root, self.args.keep_checkpoints))

    def finish(self) -> None:
        """Write summary.json, the curves and the page."""
        self.watch.phase("report", self.step)
        on_main(self.accelerator, self._summarise)

    def _summarise(self) -> None:
        before, after = self._adaptive(0), self._adaptive(self.args.max_steps)
        summary = {
            "algorithm": self.algorithm,
            "task": self.args.task,
            "seed": self.args.seed,
            "steps": self.step,
            "wall_s": round(self.spent + time.perf_counter() - self.started, 1),
            "before": before,
            "after": after,
        }
        write_json_atomic(self.folder / "summary.json", summary)
        write_report(self.folder)
        say(f"wrote {self.folder / 'summary.json'} and {self.folder / 'report.html'}")

    def _adaptive(self, step: int) -> dict | None:
        """Return the adaptive result of the first benchmark at a step."""
        rows = [row for row in self.evaluations(step) if row["setting"] == "adaptive"]
        return rows[0]["result"] if rows else None

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.main:
            say(text)
