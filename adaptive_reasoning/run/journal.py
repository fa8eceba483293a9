"""Journal: the folder of a run, from its lock to its summary. It needs no rollout, so every method has one.

    journal = Journal(args, "grpo", accelerator)
    journal.open(inputs)                            # lock, options, newest whole checkpoint
    learner = Learner(...)
    journal.restore(learner)                        # where a killed run stopped
    for step in journal.steps():
        ...
        journal.write({"step": step, ...}, samples)
        journal.save_if_due(learner, tokenizer)
    journal.finish()

Every random number of a run is a function of (seed, step, question, sample), so what continues it is weights,
optimiser, step number and `state`.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save

from adaptive_reasoning.core.files import (
    append_jsonl,
    load_json,
    read_jsonl,
    truncate_jsonl,
    write_bytes_atomic,
    write_json_atomic,
)
from adaptive_reasoning.core.metric import SHARED, Metric, eval_metrics, to_json
from adaptive_reasoning.errors import UserError, say
from adaptive_reasoning.learner.checkpoint import checkpoints, load_checkpoint, prune, save_checkpoint, whole_checkpoint
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.runtime import on_main, together
from adaptive_reasoning.report.console import Console
from adaptive_reasoning.report.page import write_page, write_report
from adaptive_reasoning.run.folder import MAY_CHANGE, check_inputs, check_reached, open_folder

ROWS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")


def best_of(checkpoint: Path) -> int | None:
    """Return the step of the best checkpoint that a run knew when it wrote this one, `state["best"]["step"]`."""
    return load_json(checkpoint / "state.json")["state"]["state"].get("best", {}).get("step")


class Journal:
    """What a run writes down, and where it continues.

    Args:
        args: the options of the run.
        algorithm: its name, in config.yaml and summary.json.
        may_change: options that a continued run may have other values of.
    """

    def __init__(self, args, algorithm: str, accelerator: Accelerator, may_change=MAY_CHANGE):
        self.args, self.algorithm, self.accelerator, self.may_change = args, algorithm, accelerator, may_change
        self.folder, self.main = Path(args.output_dir), accelerator.is_main_process
        self.metrics = dict(SHARED)  # what they mean
        self.unknown: set[str] = set()  # metrics that nobody declared
        self.step = self.continued = 0  # step reached, and the step at which this process continued
        self.started, self.spent = time.perf_counter(), 0.0  # spent: seconds of earlier parts of a resumed run
        self.state: dict = {}  # JSON values that are saved with every checkpoint, and come back from it
        self.inputs: dict[str, str] = {}
        self.about: dict[str, str] = {}  # what config.yaml has beside the options
        self.checkpoint: Path | None = None

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"

    # ------------------------------------------------------------------------------------------------- begin, continue

    def declare(self, metrics: dict[str, Metric], modes: dict[str, str]) -> None:
        """Declare what the method's own metrics mean, and those of evaluations. `modes`: mode -> its name in tables."""
        self.metrics |= {**metrics, **eval_metrics(modes)}

    def open(self, inputs: dict[str, str]) -> None:
        """Take the folder and find the newest whole checkpoint. `inputs`: digests of what is read (`inputs_of`).

        Raises:
            UserError: another run's folder, another process writes it, or it has gone further than --max_steps.
        """
        self.inputs = inputs
        on_main(
            self.accelerator,
            lambda: open_folder(self.folder, self.algorithm, self.args, may_change=self.may_change, about=self.about),
        )
        self.checkpoint, damaged = whole_checkpoint(self.root, self.accelerator)
        for line in damaged:
            self.say(f"warning: {line}")
        if self.checkpoint is not None:
            check_reached(self.checkpoint, self.args.max_steps)

    def restore(self, learner: Learner, critic: Learner | None = None) -> None:
        """Continue from the checkpoint, if there is one, and forget the rows behind it: they are written again."""
        if self.checkpoint is not None:
            saved = load_checkpoint(self.checkpoint, learner, critic)
            self.step, self.spent, self.state = saved["step"], saved["wall_s"], saved["state"]
            check_inputs(self.folder, saved["inputs"], self.inputs)
            self.continued = self.step
            self.say(f"continuing {self.folder} after step {self.step}")
        last = self.step if self.checkpoint else -1
        on_main(self.accelerator, lambda: [truncate_jsonl(self.folder / name, last) for name in ROWS])
        rows = read_jsonl(self.folder / "metrics.jsonl") if self.checkpoint and self.main else []
        on_main(self.accelerator, lambda: write_json_atomic(self.folder / "metrics.json", to_json(self.metrics)))
        self.console = Console(self.args.max_steps, self.metrics, rows)
        if self.args.report_to:
            options = {k: v for k, v in vars(self.args).items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers(self.algorithm, config=options)

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps still to do."""
        while self.step < self.args.max_steps:
            self.step += 1
            yield self.step

    @property
    def last(self) -> bool:
        """Whether the run has reached its last step."""
        return self.step == self.args.max_steps

    # ------------------------------------------------------------------------------------------------- rows

    def write(self, row: dict, samples: Sequence[dict] = (), show: bool = True) -> None:
        """Write and print (`show`) the metrics of a step ("step" in `row`), and sample rows."""

        def write():
            for key, value in row.items():
                plain = isinstance(value, (int, float)) and not isinstance(value, bool)
                assert plain or value is None, f"metric {key} is {type(value).__name__}, not a plain number"
            for key in row.keys() - self.metrics.keys() - self.unknown - {"step"}:
                self.unknown.add(key)
                say(f"warning: metric {key} is declared nowhere: add it to METRICS of the method")
            append_jsonl(self.folder / "metrics.jsonl", row)
            for sample in samples:
                append_jsonl(self.folder / "samples.jsonl", sample)
            if row["step"]:
                self.console.step(row, show)
            if self.args.report_to:
                self.accelerator.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

        on_main(self.accelerator, write)

    def write_evaluation(self, rows: list[dict], samples: list[dict]) -> None:
        """Write and print the results of one evaluation, and show them on the page."""

        def write():
            for sample in samples:
                append_jsonl(self.folder / "samples.jsonl", {"step": self.step, "split": "eval", **sample})
            for row in rows:
                append_jsonl(self.folder / "evaluations.jsonl", row)
            self.console.evaluation(rows)
            if not self.last:
                write_page(self.folder)

        on_main(self.accelerator, write)

    def evaluations(self, step: int | None = None) -> list[dict]:
        """Return the rows of evaluations.jsonl of one step, or of the newest one."""
        rows = read_jsonl(self.folder / "evaluations.jsonl")
        step = rows[-1]["step"] if step is None and rows else step
        return [row for row in rows if row["step"] == step]

    def keep(self, name: str, needed: list[int], measure: Callable[[], dict[int, float]]) -> dict[int, float]:
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

    def keep_tensors(self, name: str, measure: Callable[[], dict[str, torch.Tensor]]) -> Callable[[str], torch.Tensor]:
        """Return key -> tensor of what was measured before step 1: by a new run, each process its share; else read.

        Raises:
            UserError: a resumed run lacks the folder, or a key in it.
        """
        folder = self.folder / name
        if self.step == 0:
            on_main(self.accelerator, lambda: (shutil.rmtree(folder, ignore_errors=True), folder.mkdir()))
            data = save(measure(), {})
            together(
                self.accelerator,
                lambda: write_bytes_atomic(folder / f"{self.accelerator.process_index}.safetensors", data),
            )
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        places = {key: file for file in files for key in file.keys()}

        def find(key: str) -> torch.Tensor:
            if key not in places:
                raise UserError(f"{folder} lacks {key}, which is measured before step 1. Start the run anew.")
            return places[key].get_tensor(key)

        return find

    # ------------------------------------------------------------------------------------------------- keeping

    def save_if_due(self, learner: Learner, tokenizer, critic: Learner | None = None) -> None:
        """Write a checkpoint every `save_every` steps and after the last one."""
        if not (self.last or (self.args.save_every and self.step % self.args.save_every == 0)):
            return
        on_main(self.accelerator, lambda: self.root.mkdir(exist_ok=True))
        wall = self.spent + time.perf_counter() - self.started
        saved = {"step": self.step, "wall_s": wall, "state": self.state, "inputs": self.inputs}
        merge = self.last or self.state.get("best", {}).get("step") == self.step  # may be the model that is kept
        save_checkpoint(self.root / f"step_{self.step:06d}", learner, tokenizer, saved, critic, merge)
        on_main(self.accelerator, lambda: prune(self.root, self.args.keep_checkpoints, best_of))

    def finish(self) -> None:
        """Write summary.json, the curves and the page."""
        on_main(self.accelerator, self._summarise)

    def _summarise(self) -> None:
        summary = {
            "algorithm": self.algorithm,
            "task": self.args.task,
            "seed": self.args.seed,
            "steps": self.step,
            "wall_s": round(self.spent + time.perf_counter() - self.started, 1),
            "before": self._adaptive(0),
            "after": self._adaptive(self.args.max_steps),
        }
        write_json_atomic(self.folder / "summary.json", summary)
        write_report(self.folder)
        say(f"wrote {self.folder / 'summary.json'} and {self.folder / 'report.html'}")

    def _adaptive(self, step: int) -> dict | None:
        """Return the adaptive result of the first benchmark at a step."""
        rows = [row for row in self.evaluations(step) if row["setting"] == "adaptive"]
        return rows[0]["result"] if rows else None

    def close(self) -> None:
        """End the trackers. Not accelerator.end_training: it would take the process group away first."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def on_disk(self) -> dict:
        """Return what a new checkpoint has to find room beside: free bytes, steps done, checkpoints there."""
        there = checkpoints(self.root)
        parent = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        return {
            "disk_free": shutil.disk_usage(parent).free,
            "steps_done": int(there[-1].name.split("_")[1]) if there else 0,
            "checkpoints_there": len(there),
        }

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.main:
            say(text)
