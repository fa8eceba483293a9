"""Evaluation: accuracy against tokens, free and with the mode forced, by difficulty.

The settings show what choosing when to think is worth: the first one forces nothing, the others force the first tokens
of a mode and bound what the model could reach.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from adaptive_reasoning.core.intervals import accuracy_interval, hybrid_accuracy, paired_difference, pass_at
from adaptive_reasoning.core.metric import mean
from adaptive_reasoning.errors import say
from adaptive_reasoning.learner.runtime import all_gather
from adaptive_reasoning.rollout import Engine, Request, Sampling, request_seed
from adaptive_reasoning.rollout.dialogue import Dialogue, converse
from adaptive_reasoning.run.leak import add_leaks
from adaptive_reasoning.run.sampling import sample_and_grade
from adaptive_reasoning.run.stages import stage_rows, stage_table
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.answers import same_answer
from adaptive_reasoning.tasks.task import Benchmark, Question
from adaptive_reasoning.tasks.think_template import ThinkTemplate

EVAL_STREAM = 7_919  # keeps evaluation random numbers apart from those of training
ASKED = 512  # questions of which the probability of an opening is taken
KEPT_SAMPLES = 48  # responses per benchmark and setting that go into samples.jsonl


@dataclass
class EvalSpec:
    """What evaluation has to know about a response format.

    settings: name -> first tokens to force as (id, probability); the first setting is the adaptive one.
    mode_of: response ids -> mode, from token ids.
    extract_answer: response text -> the answer to grade, or None where the response breaks the format.
    modes: mode -> its name, in the order of the tables.
    check: check(answer, target) -> bool, a function of a module that a grader process can import.
    consensus: settings whose answers have to agree; empty: there is no such setting.
    fallback: setting whose answer counts where those of `consensus` do not agree.
    script: of dialogues (`rollout.dialogue`): they are held in place of single responses, and mode_of gets their turns.
    extra_tokens: what published tables add to prompt and response for the template; None: they count responses.
    template: of a format with a chat template's own two modes: what opens them, and the template's own prompts.
    skips, traces: modes that skip the thinking, and (text, mode, tokens, whether it ended) -> what `run.leak` needs.
    requests: setting -> further arguments of its requests, which replace those that all settings have.
    """

    settings: dict[str, tuple[tuple[int, float], ...]]
    mode_of: Callable[[list[int]], str]
    extract_answer: Callable[[str], str | None]
    modes: dict[str, str]
    check: Callable[[str, str], bool] = same_answer
    consensus: tuple[str, ...] = ()
    fallback: str = ""
    script: object = None
    extra_tokens: int | None = None
    template: ThinkTemplate | None = None
    skips: tuple[str, ...] = ()
    traces: Callable[[str, str, int, bool], dict] | None = None
    requests: dict[str, dict] = field(default_factory=dict)


@dataclass
class Evaluator:
    """What is the same for every benchmark and setting of an evaluation.

    args: options max_new_tokens (of every response, whatever its mode), temperature, eval_top_p and seed.
    accelerator: questions are dealt to its processes, all of which evaluate; None: one process.
    instruction: text put before every problem.
    execute_code: run the programs of CODE blocks, each in a sandboxed process, and read the answer from their output.
    kept: responses of a benchmark and setting that go into samples.jsonl.
    """

    engine: Engine
    grader: object
    tokenizer: object
    stop_ids: tuple[int, ...]
    spec: EvalSpec
    args: object
    accelerator: object = None
    instruction: str = ""
    execute_code: bool = False
    kept: int = KEPT_SAMPLES

    def text_of(self, question: Question) -> str:
        return f"{self.instruction}\n{question.problem}" if self.instruction else question.problem

    def prompt_of(self, question: Question) -> list[int]:
        return prompts.render(self.tokenizer, self.text_of(question))

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.args.temperature, self.args.eval_top_p)

    def of_all(self, rows: list) -> list:
        """Return the rows of all processes, in order of process."""
        parts = all_gather(self.accelerator, rows) if self.accelerator else [rows]
        return [row for part in parts for row in part]


def evaluate(on: Evaluator, benchmark: Benchmark, setting: str, progress: str = "") -> tuple[dict, list, list]:
    """Sample `benchmark.samples` responses to every question in one setting and grade them.

    Random streams depend on the question and sample alone: every evaluation of a run draws the same random numbers.

    Returns:
        the result (`summarise`), the samples for samples.jsonl, and one row for every graded response; all three of
        all processes.
    """
    rank, ranks = (on.accelerator.process_index, on.accelerator.num_processes) if on.accelerator else (0, 1)
    everything = [(i, q, k) for i, q in enumerate(benchmark.questions) for k in range(benchmark.samples)]
    jobs = everything[rank::ranks]
    hold = respond if on.spec.script is None else hold_dialogues
    rows, texts = hold(on, jobs, setting, progress if rank == 0 else "")
    every = max(1, len(everything) // on.kept)  # the same responses are shown whatever the number of processes
    failed = next((j for j, row in enumerate(rows) if "grader" in row), None)  # one more sample: its reason is in it
    samples = []
    for j, ((_, q, _), row, (text, reason)) in enumerate(zip(jobs, rows, texts)):
        if (place := rank + j * ranks) % every == 0 or j == failed:
            sample = {"setting": setting, "benchmark": benchmark.name, "mode": row["mode"]}
            sample |= {"difficulty": q.difficulty, "problem": q.problem, "answer": q.answer, "response": text}
            sample |= {"reward": row.get("score", float(row["correct"])), "tokens": row["tokens"]}
            sample |= {"finish_reason": reason} | ({"grader": row["grader"]} if "grader" in row else {})
            samples.append((place, sample))
    rows = on.of_all(rows)
    samples = [sample for _, sample in sorted(on.of_all(samples), key=lambda pair: pair[0])]
    result = summarise(rows, on.spec.modes)
    if reasons := [row["grader"] for row in rows if "grader" in row]:
        result["ungraded"] = len(reasons)
        if rank == 0:
            say(f"warning: {len(reasons)} of {len(rows)} answers could not be graded, the first: {reasons[0]}")
    template = on.spec.template
    if template and len(template.nothinking) > 1 and setting == next(iter(on.spec.settings)):
        asked = [on.prompt_of(q) for q in benchmark.questions[:ASKED]]
        result["opening_rest_prob"] = probability(on, asked, template.nothinking, 1)
        result["unclosed_share"] = sum(row["unclosed"] for row in rows) / len(rows)
    if on.spec.script is not None:
        result |= stage_table(rows)
        for level, part in result["by_difficulty"].items():
            part |= stage_table([row for row in rows if row["difficulty"] == level])
    return result, samples, rows


def respond(on: Evaluator, jobs: list, setting: str, progress: str) -> tuple[list[dict], list[tuple[str, str]]]:
    """Sample one response for every job (index of the question, question, sample) and grade it.

    Returns:
        rows of graded responses, and of each (text, reason it ended).
    """
    template, extract = on.spec.template, on.spec.extract_answer
    thinking = template.own_settings().get(setting) if template else None  # in the template's own prompts
    if thinking is None:
        ask = partial(prompts.render, on.tokenizer)
    else:
        ask = partial(template.own_prompt, on=thinking)

        def extract(text: str) -> str | None:
            return on.spec.extract_answer(template.as_response([], text, thinking)[1])

    options = {"max_new_tokens": on.args.max_new_tokens, "forced": on.spec.settings[setting]}
    options |= on.spec.requests.get(setting, {})
    requests = [
        Request(
            ask(on.text_of(q)),
            stop_ids=on.stop_ids,
            seed=request_seed(on.args.seed, EVAL_STREAM, i, k),
            tag=(q, i),
            **options,
        )
        for i, q, k in jobs
    ]
    graded, _ = sample_and_grade(
        on.engine, on.grader, on.tokenizer, on.stop_ids, extract, requests, on.sampling, progress, on.execute_code
    )
    rows = []
    for (i, q, k), g in zip(jobs, graded):
        ids = g.completion.response_ids.tolist()
        ended = g.completion.finish_reason == "stop"
        said, text = (ids, g.text) if thinking is None else template.as_response(ids, g.text, thinking)
        row = {"question": i, "sample": k, "mode": on.spec.mode_of(said), "difficulty": q.difficulty}
        row |= {"answer": g.answer, "correct": g.correct, "tokens": len(ids)}
        row |= ({"score": g.score} if on.grader.score else {}) | ({"grader": g.trouble} if g.trouble else {})
        if template and len(template.nothinking) > 1:
            row["unclosed"] = template.unclosed(ids)
        if on.spec.skips:
            row["traces"] = on.spec.traces(text, row["mode"], len(said), ended)
        if setting in on.spec.requests:
            row["closed"] = not g.completion.action_mask.all().item()
        if on.spec.extra_tokens is not None:  # prompt, template and response, whose end token the template counts
            row["tokens_paper"] = len(g.completion.context_ids) + len(ids) - ended + on.spec.extra_tokens
        rows.append(row)
    return rows, [(g.text, g.completion.finish_reason) for g in graded]


def probability(on: Evaluator, asked: list[list[int]], tokens: tuple[int, ...], first: int = 0) -> float:
    """Return the mean probability that tokens[first:] follow prompts and tokens[:first]. On every process alike."""
    return float(logprobs_of(on, asked, tokens, first).exp().mean())


def logprobs_of(on: Evaluator, asked: list[list[int]], tokens: tuple[int, ...], first: int = 0) -> torch.Tensor:
    """Return the log-probs [B] fp32 that tokens[first:] follow prompts and tokens[:first]."""
    total = torch.zeros(len(asked))
    for j in range(first, len(tokens)):
        total += on.engine.first_logprobs([[*ids, *tokens[:j]] for ids in asked], tokens[j], on.args.temperature or 1.0)
    return total


def openings_line(on: Evaluator, benchmark: Benchmark) -> str:
    """Return what the model makes of the place where the openings part, before it is trained."""
    template, problems = on.spec.template, [q.problem for q in benchmark.questions[:ASKED]]
    asked = [prompts.render(on.tokenizer, problem) for problem in problems]
    skip = probability(on, asked, template.nothinking[:1])
    line = f"p(first token of NoThinking) {skip:.3g}"
    if template.thinking:
        think = probability(on, asked, template.thinking[:1])
        line += f", of Thinking {think:.3g}, of anything else {(other := max(0.0, 1 - skip - think)):.3g}"
        if other > 0.1:
            line += ". The model has not learnt to choose there: warm it up on supervised rows with `thinking`"
    if template.shared:
        own = [template.own_prompt(problem, True) for problem in problems]
        line += f"; p({template.text(template.shared)!r}) behind the template's own prompt "
        line += f"{probability(on, own, template.shared):.3g}"
    return line


def hold_dialogues(on: Evaluator, jobs: list, setting: str, progress: str) -> tuple[list[dict], list[tuple[str, str]]]:
    """Hold a dialogue for every job, as `respond` samples a response; its answer is that of the stage that counts."""
    dialogues = [Dialogue(q, i, request_seed(on.args.seed, EVAL_STREAM, i, k)) for i, q, k in jobs]
    converse(on.engine, on.grader, dialogues, on.spec.script, on.sampling, setting, progress)
    rows = stage_rows(dialogues)
    for row, d in zip(rows, dialogues):
        mode = on.spec.mode_of(d.turns)
        row |= {"question": d.group, "mode": mode, "difficulty": d.question.difficulty, "tokens": d.num_tokens}
        row["correct"] = d.turns[mode].correct
        row |= ({"score": d.turns[mode].score} if on.grader.score else {}) | ({"grader": d.grader} if d.grader else {})
    return rows, [(d.text, "length" if d.cut else "stop") for d in dialogues]


def summarise(rows: list[dict], modes: Iterable[str]) -> dict:
    """Return the result of graded responses: rows with question, mode, difficulty, correct and tokens.

    A question has the same number of samples everywhere, so means over responses are means over questions. `interval`
    is the 95 % interval of an accuracy, clustered by question; `pass_at` has k = 2, 4, ... up to that number.
    """

    def accuracy_and_tokens(part):
        out = {"accuracy": mean(r["correct"] for r in part), "mean_tokens": mean(r["tokens"] for r in part)}
        if rows and "score" in rows[0]:
            out["mean_score"] = mean(r["score"] for r in part)
        if rows and "tokens_paper" in rows[0]:
            out["mean_tokens_paper"] = mean(r["tokens_paper"] for r in part)
        return out

    def share(part, mode):
        return sum(r["mode"] == mode for r in part) / len(part)

    levels = sorted({r["difficulty"] for r in rows if r["difficulty"] is not None})
    by_level = {level: [r for r in rows if r["difficulty"] == level] for level in levels}
    scores = by_question(rows, "correct")
    samples = min(map(len, scores.values()))
    powers = [2**i for i in range(1, samples.bit_length())]
    return {
        **accuracy_and_tokens(rows),
        "interval": accuracy_interval(scores),
        "questions": len(scores),
        "samples": samples,
        "pass_at": {str(k): pass_at(scores, k) for k in powers},
        "modes": {
            mode: {"share": share(rows, mode), **accuracy_and_tokens([r for r in rows if r["mode"] == mode])}
            for mode in modes
        },
        "by_difficulty": {
            level: {
                **accuracy_and_tokens(part),
                "interval": accuracy_interval(by_question(part, "correct")),
                "modes": {mode: share(part, mode) for mode in modes},
            }
            for level, part in by_level.items()
        },
    }


def by_question(rows: list[dict], *columns: str) -> dict[int, list]:
    """Return {question: a value, or tuple of values, for every response}, the same on any number of processes."""
    out: dict[int, list] = {}
    for row in sorted(rows, key=lambda row: row["question"]):
        values = tuple(row[column] for column in columns)
        out.setdefault(row["question"], []).append(values if len(columns) > 1 else values[0])
    return out


def compare(results: dict[str, dict], graded: dict[str, list[dict]], spec: EvalSpec, known: list = ()) -> list:
    """Add to the results of one benchmark what they say about each other, question by question.

    Of the free setting (the first of the format) `hybrid`, its Hybrid Accuracy against the forced modes; of every other
    one `paired`, the accuracy of the free setting minus its own. Of all `leak`, where the format has modes that skip.

    Args:
        results, graded: setting -> result, and setting -> rows of its graded responses.
        known: what an evaluation before returned, for one of the free setting alone.

    Returns:
        [[question, usual tokens of its answer]], the yardstick of the leak.
    """
    if graded and spec.skips:
        known = [*add_leaks(results, graded, spec.skips, dict(known)).items()]
    free, *others = spec.settings
    if free not in graded:
        return list(known)
    mine = by_question(graded[free], "correct")
    for setting in graded.keys() - {free}:
        results[setting]["paired"] = paired_difference(mine, by_question(graded[setting], "correct"))
    forced = {}
    for setting in others:
        if spec.settings[setting] and setting in graded:
            (mode, _), *_ = Counter(row["mode"] for row in graded[setting]).most_common(1)
            forced.setdefault(mode, by_question(graded[setting], "correct", "tokens"))
    results[free]["hybrid"] = hybrid_accuracy(by_question(graded[free], "mode"), forced)
    return list(known)
