"""Run: what surrounds the loop of a method that samples. Model and runtime, journal, sampler, evaluation, checkpoints.

A method file decides what to sample, what it is worth and what to minimise; a run carries that out. Nothing here knows
any method: what a run needs besides the policy, a frozen reference or a critic, is said by the method.

    kind = formats.load(args.answer_format)
    run = Run(args, "grpo", kind, reference=args.kl_coef > 0)
    form = kind(run.tokenizer, args)
    with run.start(form, METRICS):
        run.evaluate_if_due()
        for step in run.steps():
            episodes = run.rollout(requests)
            ...
            run.log(episodes, own_metrics, losses, updates, minibatches)
            run.evaluate_if_due()
            run.save_if_due()
        run.finish()
"""

import sys
import time
from collections.abc import Iterator

import torch

from adaptive_reasoning.core.episode import Episode, sample_row
from adaptive_reasoning.core.metric import GAP_LIMIT, OPENING_METRICS, Metric
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.critic import Critic, load_critic
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.lora import lora_config
from adaptive_reasoning.learner.model import (
    check_vocabulary,
    generation_config,
    load_config,
    load_model,
    load_tokenizer,
)
from adaptive_reasoning.learner.packing import MicroBatch
from adaptive_reasoning.learner.runtime import (
    all_gather,
    all_reduce,
    end,
    is_zero3,
    make_accelerator,
    offloads_optimizer,
)
from adaptive_reasoning.learner.watch import Watch
from adaptive_reasoning.learner.weights import check_weights
from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling
from adaptive_reasoning.rollout.dialogue import Dialogue, converse
from adaptive_reasoning.rollout.engine import CPU_CACHE_BYTES
from adaptive_reasoning.run import rewards
from adaptive_reasoning.run.balance import deal, expected_tokens
from adaptive_reasoning.run.evaluation import Evaluator, compare, evaluate, openings_line
from adaptive_reasoning.run.folder import data_of, inputs_of, keep_date
from adaptive_reasoning.run.journal import Journal
from adaptive_reasoning.run.leak import leak_metrics, leak_row, traces_of
from adaptive_reasoning.run.memory import Where
from adaptive_reasoning.run.metrics import Drift, counts_of, mean_losses, over_processes, picked, sums_of
from adaptive_reasoning.run.preflight import preflight
from adaptive_reasoning.run.sampling import sample_and_grade
from adaptive_reasoning.run.start import start_of
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.grader import GraderPool
from adaptive_reasoning.tasks.task import load_task


class Run:
    """One training run; a context manager.

    Args:
        args: the method's options (RunArgs and its own).
        algorithm: name for config.yaml and summary.json.
        kind: class of the response format: which control tokens the model has to have.
        reference: keep the starting model for `score_reference`: a frozen copy or, with LoRA, the policy's own base.
        critic: have a critic beside the policy.
        offline: the method learns from answers of the starting model, not from rollouts of its own steps.

    Raises:
        UserError: whatever is wrong with model, data or folder, before anything heavy starts.
    """

    def __init__(self, args, algorithm: str, kind, reference=False, critic=False, offline=False):
        self.args, self.has_reference, self.has_critic = args, reference, critic
        assert (reference, critic) == (args.holds().reference, args.holds().critic), "what the memory plan counts"
        self.accelerator = make_accelerator(args)
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.watch = Watch(self.accelerator, args.patience)
        self.journal = Journal(args, algorithm, self.accelerator)
        with self.watch.telling():
            lora_config(args)  # says at once what is wrong with it
            self.modules = [sys.modules[kind.__module__], *rewards.reward_module(args.reward, algorithm, offline)]
            self.model = start_of(args, self.accelerator, kind.needed_tokens())
            self.config = load_config(self.model)
            check_weights(self.model, self.config)
            self.tokenizer = load_tokenizer(self.model)
            keep_date(self.tokenizer, self.journal.folder, self.accelerator)
            check_vocabulary(self.config, self.tokenizer)
            self.stop_ids = prompts.stop_tokens(self.tokenizer, generation_config(self.model))
        self.offline = offline
        self.told: set[str] = set()  # what kept responses from being scored
        self.clock: dict[str, float] = {}  # when the step and its update began; seconds of what came before it
        self.cache_bytes = CPU_CACHE_BYTES
        self.latest: dict | None = None  # adaptive result of the newest evaluation

    @property
    def step(self) -> int:
        return self.journal.step

    @property
    def memory(self) -> dict:
        """What a method keeps from step to step: JSON values, saved with every checkpoint."""
        return self.journal.state.setdefault("memory", {})

    def start(self, form, metrics: dict[str, Metric]) -> "Run":
        """Print what was found and what memory it will take; stop with a fix where something will not work.

        Args:
            form: the response format. Sampling, grading and evaluation all take it from here.
            metrics: what the method's own metrics mean.
        """
        with self.watch.telling():
            self.form, self.spec = form, form.eval_spec()
            follows = self.spec.template and len(self.spec.template.nothinking) > 1
            self.journal.about["format"] = f"{type(form).__module__}.{type(form).__qualname__}"
            more = leak_metrics(form.modes, form.skips) | (OPENING_METRICS if follows else {})
            self.journal.declare(metrics | more, form.modes)
            self.task = load_task(self.args, self.tokenizer)  # prompts as the format wants them
            if not self.offline:  # says at once if there are too few questions
                self.task.batch(1, self.args.prompts_per_step, self.args.seed)
            device = self.accelerator.device
            cuda = device.type == "cuda"
            where = Where(
                world_size=self.ranks,
                zero3=is_zero3(self.accelerator),
                offload=offloads_optimizer(self.accelerator),
                cuda=cuda,
                longest_prompt=max(map(len, self.task.prompts)),
                memory=torch.cuda.get_device_properties(device).total_memory if cuda else None,
                kv_cache=None if cuda else CPU_CACHE_BYTES,
            )
            table, plan = preflight(
                self.args,
                self.args.holds(),
                where,
                model_config=self.config,
                device=torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
                questions=len(self.task.questions),
                skipped=self.task.skipped,
                findings={
                    **form.prompt_lines,
                    **form.findings(),
                    "evaluation": ", ".join(f"{b.name} ({len(b.questions)})" for b in self.task.benchmarks),
                },
                **self.journal.on_disk(),
            )
            self.journal.say(table)
            self.cache_bytes = plan.cache_bytes
        return self

    def __enter__(self) -> "Run":
        """Distribute the model, continue from the newest checkpoint if there is one, and open the folder."""
        with self.watch.telling():
            args, journal = self.args, self.journal
            self.watch.phase("load")
            read_again = args.model if self.has_reference or args.lora_rank else None  # by a continued run
            self.code = self.task.code(*self.modules)
            journal.open(inputs_of(data_of(self.task) | self.code, self.tokenizer, read_again))
            self.learner = Learner(args, load_model(self.model, args)[0], self.accelerator)
            self.reference = self.critic = None
            if self.has_reference and not args.lora_rank:
                model = load_model(self.model, args)[0]
                self.reference = Learner(args, model, self.accelerator, trainable=False)
            if self.has_critic:
                self.critic = Critic(args, load_critic(self.model, args), self.accelerator)
            journal.restore(self.learner, self.critic)
            if self.step and (seen := journal.evaluations()):
                self.latest = seen[0]["result"]
            dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
            replica = Decoder(self.config, self.accelerator.device, dtype)
            invariant = args.batch_invariant
            self.engine = Engine(replica, args.rollout_rows, self.cache_bytes, batch_invariant=invariant)
            self.grader = self.task.grader(args.grader_workers, args.grader_timeout, self.form.check)
            self.engine.refresh(self.learner.named_weights())
            self.grader.__enter__()
            self.rewards = None
            if args.reward:  # a response has one reward: nothing is kept
                self.rewards = GraderPool(args.grader_workers, args.grader_timeout, args.reward, kept=0).__enter__()
            self.sampler = (self.engine, self.grader, self.tokenizer, self.stop_ids)
            self.evaluator = Evaluator(*self.sampler, self.spec, args, self.accelerator)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for pool in filter(None, (self.grader, self.rewards)):
            pool.__exit__(kind, error, trace)
        self.watch.stop(error)
        self.journal.close()
        if error is None:
            parts = [part for part in (self.learner, self.reference, self.critic) if part is not None and part.zero3]
            end(self.accelerator, [part.engine for part in parts])

    # ------------------------------------------------------------------------------------------------- the loop

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps still to do."""
        for step in self.journal.steps():
            self.clock |= {"step": time.perf_counter()}
            self.grader.count_anew()
            self.drift, self.sampled_at = Drift(), self.learner.steps
            yield step

    def next_questions(self) -> list[tuple[int, Question, list[int]]]:
        """Return this process's share of the step's questions as (index in the task, question, prompt ids)."""
        batch = self.task.batch(self.step, self.args.prompts_per_step, self.args.seed)
        shares = deal(expected_tokens(batch, self._lengths(), self.task.prompts), self.ranks)
        return [(i, self.task.questions[i], self.task.prompts[i]) for i in (batch[j] for j in shares[self.rank])]

    def _lengths(self) -> dict[int, float]:
        """Return {question: mean response tokens} where known, the same on every process."""
        return dict(self.journal.state.get("lengths", []))

    def know_lengths(self, lengths: dict[int, float]) -> None:
        """Remember mean response tokens of questions; every process has to be told the same."""
        self.journal.state["lengths"] = sorted((self._lengths() | lengths).items())

    def rollout(
        self, requests: list[Request], sampling: Sampling | None = None, progress: str = "rollout"
    ) -> list[Episode]:
        """Generate responses and grade them as they end. Each request's tag is (question, index in the task).

        The episodes come back in order, with text, mode, answer and `correct`, which is False where there is no answer.
        """
        self.watch.phase("rollout", self.step)
        start, sampling = time.perf_counter(), sampling or Sampling(self.args.temperature)
        graded, waited = sample_and_grade(
            *self.sampler, self.form.extract_answer, requests, sampling, progress if self.main else "",
            sampled=lambda: self.watch.phase("grade", self.step),
        )  # fmt: skip
        episodes = [g.episode(self.form.mode_of(g.completion.response_ids)) for g in graded]
        if self.rewards:
            waited += rewards.pay(self.rewards, rewards.paid_responses(episodes))
        self._sampled(start, waited)
        return episodes

    def converse(self, dialogues: list[Dialogue]) -> list[Episode]:
        """Hold dialogues as in training, and return each as one episode, in order."""
        self.watch.phase("rollout", self.step)
        start, progress = time.perf_counter(), "rollout" if self.main else ""
        sampling = Sampling(self.args.temperature)
        waited = converse(self.engine, self.grader, dialogues, self.form, sampling, "train", progress)
        if self.rewards:
            waited += rewards.pay(self.rewards, rewards.paid_turns(dialogues, self.form.target))
        self._sampled(start, waited)
        return [d.episode() for d in dialogues]

    def _sampled(self, start: float, waited: float) -> None:
        """Note when the rollout began and how long it waited for grades: the update begins."""
        self.watch.phase("update", self.step)
        self.clock["update"] = time.perf_counter()
        self.clock |= {"rollout": self.clock["update"] - start - waited, "grade_wait": waited}

    def score_reference(self, episodes: list[Episode]) -> None:
        """Fill `ref_logprobs` of each episode, where there is a reference policy. Every process must call this."""
        if self.has_reference:
            own = self.reference is None  # LoRA: the starting model is the base, at every step and after every restart
            values = self.learner.logprobs(episodes, base=True) if own else self.reference.logprobs(episodes)
            for episode, each in zip(episodes, values):
                episode.ref_logprobs = each

    def observe(self, mb: MicroBatch, logprobs: torch.Tensor) -> None:
        """Note how far the learner's log-probs [N] are from the sampler's and from those before the update."""
        with torch.no_grad():
            self.drift.see(mb, logprobs, first_update=self.learner.steps == self.sampled_at)

    def refresh(self) -> None:
        """Bring the new weights into the rollout replica, layer by layer."""
        self.watch.phase("refresh", self.step)
        self.engine.refresh(self.learner.named_weights())

    def sum(self, values: list[float]) -> list[float]:
        """Return the elementwise sum of numbers over all processes, every one of which must call this."""
        return all_reduce(self.accelerator, values, "sum").tolist()

    def gather(self, rows: list) -> list:
        """Return the rows of all processes, plain values that can travel, in order of process."""
        return [row for part in all_gather(self.accelerator, rows) for row in part]

    # ------------------------------------------------------------------------------------------------- metrics

    def log_first_token(self, name: str, token: int) -> None:
        """Log the probability of a first token over the questions of the first benchmark, as metrics of step 0."""
        if self.step or not self.task.benchmarks:
            return
        asked = [prompts.render(self.tokenizer, q.problem) for q in self.task.benchmarks[0].questions[:512]]
        logprobs = self.engine.first_logprobs(asked, token, self.args.temperature)
        row = {"step": 0, f"{name}_prob": float(logprobs.exp().mean()), f"{name}_logprob": float(logprobs.mean())}
        self.journal.write(row)

    def log(self, episodes: list[Episode], own: dict, losses: list[dict], updates: list[dict], minibatches) -> None:
        """Write and print the metrics of one step.

        Args:
            episodes: of this process.
            own: the method's metrics, already over all processes.
            losses: per micro-batch, additive shares {"loss/...": tensor} that sum to the step's value over all ranks.
            updates: what learner.step() returned.
            minibatches: what learner.minibatches() returned.

        Raises:
            UserError: on all processes, if sampler and learner disagree in the first step, or if more answers than
                --max_ungraded could not be graded.
        """
        self.watch.phase("log", self.step)
        args, clock, now = self.args, self.clock, time.perf_counter()
        mine = counts_of(episodes, self.grader.rates())
        mine |= {"losses": sums_of(losses), "drift": self.drift, "traces": traces_of(episodes, self.form)}
        parts = all_gather(self.accelerator, mine)
        lengths = {i: sum(tokens) / len(tokens) for part in parts for i, tokens in part["lengths"].items()}
        self.know_lengths(lengths)
        row = {
            "step": self.step,
            **over_processes(parts),
            **mean_losses([part["losses"] for part in parts], len(minibatches)),
            **Drift.over([part["drift"] for part in parts]).metrics(),
            "loss/grad_norm": max(u["grad_norm"] for u in updates),
            "loss/learning_rate": updates[-1]["learning_rate"],
            "learner/zero_advantage_share": sum(m.zero_advantage for m in minibatches) / len(minibatches),
            "learner/micro_batches": sum(map(len, minibatches)),
            "data/epoch": self.task.epoch(self.step, args.prompts_per_step),
            "data/skipped_prompts": self.task.skipped,
            "time/step_s": now - clock["step"],
            "time/rollout_s": clock["rollout"],
            "time/grade_wait_s": clock["grade_wait"],
            "time/update_s": now - clock["update"],
            **own,
        }
        row |= leak_row([trace for part in parts for trace in part["traces"]], self.form.skips)
        row["rollout/tokens_per_s"] = row["rollout/tokens"] / clock["rollout"]
        if args.on_nonfinite == "skip":
            row["loss/skipped_updates"] = sum(u["skipped_updates"] for u in updates)
        row |= self._evaluated()
        failed = rewards.failures(self, episodes)
        row |= rewards.score_metrics(bool(self.task.score), bool(args.reward), failed, parts)
        batch = self.task.batch(self.step, args.prompts_per_step, args.seed)
        chosen = picked([part["groups"] for part in parts], batch, args.samples_per_step, self.step)
        broken = [(rank, j) for rank, part in enumerate(parts) for j in part["failed"][:1]]  # the samples say why
        chosen += [place for place in broken if place not in chosen]
        kept = {j: sample_row(episodes[j], self.step, "train") for rank, j in chosen if rank == self.rank}
        kept = all_gather(self.accelerator, kept)
        self.journal.write(row, [kept[rank][j] for rank, j in chosen])
        self._check_gap(row.get("check/logprob_gap_mean"))
        rewards.check_failures(self, row, failed)

    def _check_gap(self, gap: float | None) -> None:
        """Raise UserError where sampler and learner disagree in the first step."""
        limit = GAP_LIMIT[self.args.dtype]
        if self.step == 1 and gap is not None and not gap <= limit:
            raise UserError(
                f"step 1: sampler and learner disagree about the log-probs of the same tokens by {gap:.3g} "
                f"on average, more than the {limit:g} that {self.args.dtype} may round (check/logprob_gap_mean): the "
                "sampled responses are not of the model that is trained. Likely they hold different weights "
                "(tie_word_embeddings in config.json against the file; a model family that the rollout gets wrong), "
                "or compute in another precision (with --dtype fp32 the gap is near 0 if that is all), or at another "
                "temperature. Nothing was saved of this step."
            )

    def log_offline(self, own: dict, losses: list[dict], update: dict, minibatch) -> None:
        """Write and print the metrics of one step of an offline method, whose step is one optimiser step.

        Args:
            own: the method's metrics, already over all processes.
            losses, minibatch: as in `log`; update: what learner.step() returned.
        """
        self.watch.phase("log", self.step)
        row = {
            "step": self.step,
            **mean_losses(all_gather(self.accelerator, sums_of(losses)), 1),
            **{f"loss/{key}": value for key, value in update.items()},
            "learner/micro_batches": len(minibatch),
            "time/step_s": time.perf_counter() - self.clock["step"],
            **own,
        }
        self.journal.write(row | self._evaluated())

    def _evaluated(self) -> dict[str, float]:
        """Return the metrics of the newest evaluation, and its seconds in the first step behind it."""
        row = {} if "eval" not in self.clock else {"time/eval_s": self.clock.pop("eval")}
        if self.latest is not None:
            row |= {f"eval/{mode}_share": part["share"] for mode, part in self.latest["modes"].items()}
            leak = self.latest.get("leak", {})  # of a run that began before there was any: none
            row |= {f"eval/{mode}_leak_share": table["share"] for mode, table in leak.items()}
            row |= {key: self.latest[name] for key in OPENING_METRICS if (name := key.split("/")[1]) in self.latest}
        return row

    # ------------------------------------------------------------------------------------------------- keeping

    @property
    def evaluation_due(self) -> bool:
        at = self.step == 0 or self.journal.last or (self.args.eval_every and self.step % self.args.eval_every == 0)
        return bool(at and self.task.benchmarks)

    def evaluate_if_due(self) -> None:
        """Evaluate before the first step, every `eval_every` steps and after the last one.

        Before and after training all settings of the format are measured, in between the adaptive one alone. A step is
        evaluated before its checkpoint is written, so a run that continues there lacks only what another `max_steps`
        or `eval_every` asks for.
        """
        first, last = self.step == 0, self.journal.last
        if not self.evaluation_due:
            return
        start = time.perf_counter()
        settings = list(self.spec.settings) if first or last else list(self.spec.settings)[:1]
        there = self.journal.evaluations(self.step) if self.step == self.journal.continued else []
        known = {(row["benchmark"], row["setting"]) for row in there}
        rows, samples_of_all = [], []
        for benchmark in self.task.benchmarks:
            results, graded = {}, {}
            for setting in (s for s in settings if (benchmark.name, s) not in known):
                title = f"evaluate {benchmark.name} {setting}"
                self.watch.phase(title, self.step)
                results[setting], samples, graded[setting] = evaluate(self.evaluator, benchmark, setting, title)
                samples_of_all += samples
            kept = self.journal.state.setdefault("answer_tokens", {})  # {benchmark: [[question, yardstick]]}
            kept[benchmark.name] = compare(results, graded, self.spec, kept.get(benchmark.name, []))
            about = {"step": self.step, "benchmark": benchmark.name}
            rows += [{**about, "setting": setting, "result": result} for setting, result in results.items()]
        if not rows:
            return
        if first and self.spec.template:
            self.journal.say(openings_line(self.evaluator, self.task.benchmarks[0]))
        self.latest = (there or rows)[0]["result"]
        self.journal.write_evaluation(rows, samples_of_all)
        self.clock["eval"] = time.perf_counter() - start

    def save_if_due(self) -> None:
        """Write a checkpoint every `save_every` steps and after the last one."""
        self.watch.phase("save", self.step)
        self.journal.save_if_due(self.learner, self.tokenizer, self.critic)

    def finish(self) -> None:
        """Write summary.json, the curves and the page."""
        self.watch.phase("report", self.step)
        self.journal.finish()
