"""A run from its folder: its model, and what config.yaml says about format, task and options.

python -m adaptive_reasoning.benchmark runs/toy-adaptthink-seed0 --eval_samples 4
"""

import dataclasses
from pathlib import Path

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import MAKERS
from adaptive_reasoning.learner.checkpoint import checkpoints
from adaptive_reasoning.learner.model import ADAPTER
from adaptive_reasoning.run.folder import read_config
from adaptive_reasoning.run.journal import best_of
from adaptive_reasoning.run.options import checked

# What a saved model has in it already, and what is of the run alone.
OWN = {"model", "output_dir", "merge_adapter", "control_tokens", "chat_template", "report_to"}


def found(place: str) -> tuple[str, dict]:
    """Return (model, options of the run it is from; {} where it is from none).

    A folder is a run, one of its checkpoints, or a model or adapter. Of a run the model is taken that its method kept
    (supervised runs choose one), else that of its best checkpoint, else of the newest. What is no folder, a file or a
    name of the hub, is a model itself. `answer_format` is the format that the run made of its options.

    Raises:
        UserError: a folder without a model, or no place.
    """
    if not place:
        raise UserError("--model is empty: name the folder of a run, a model folder, a hub name or a GGUF file.")
    path = Path(place).expanduser()
    if not path.is_dir():
        return place, {}
    there = checkpoints(path / "checkpoints")[::-1]
    if there and (best := best_of(there[0])) is not None:
        there.sort(key=lambda checkpoint: checkpoint.name != f"step_{best:06d}")
    inside = [folder / name for folder in (path, *there) for name in ("", "model", "adapter")]
    model = next((p for p in inside if (p / "config.json").is_file() or (p / ADAPTER).is_file()), None)
    if model is None:
        raise UserError(
            f"--model {place}: no model is saved there yet (looked for config.json there, in model/ and in "
            "checkpoints/). Give the folder of a run that has saved a checkpoint, or of a model."
        )
    run = run_of(path)
    config = read_config(run / "config.yaml") if run else {}
    if config.get("task") in MAKERS:  # a cold start; what rows of data were like, the tokenizer shows
        config.setdefault("answer_format", config.get("formats"))
    if kept := config.get("format"):
        config["answer_format"] = kept
    return str(model), config


def run_of(path: Path) -> Path | None:
    """Return the folder of the run that a folder is, or is a checkpoint of, or a model in one."""
    above = [p for p in path.resolve().parents[:3] if (p / "checkpoints").is_dir()]
    return next((p for p in (path, *above) if (p / "config.yaml").is_file()), None)


def of_run(place: Path, cls: type) -> tuple[dict, list[str]]:
    """Return (options of `cls` that a run has, command line with its model and a folder for the results).

    Raises:
        UserError: it is neither a run nor a checkpoint of one, or there is no model in it yet.
    """
    run = run_of(place)
    if run is None:
        raise UserError(
            f"{place}: not the folder of a run, there is no {place / 'config.yaml'}. Give the --output_dir of a run "
            "or one of its checkpoints; the folder of a model goes with --model."
        )
    model, config = found(str(place))
    if not config.get("answer_format"):
        raise UserError(f"{run / 'config.yaml'} names no answer_format. Give --model and --answer_format instead.")
    known = {f.name for f in dataclasses.fields(cls)} - OWN
    options = {name: value for name, value in config.items() if name in known and value is not None}
    step = next((p.name for p in Path(model).parents if p.parent.name == "checkpoints"), "model")
    more = ["--model", model, "--output_dir", str(run / "benchmark" / step)]
    adapter = not (Path(model) / "config.json").is_file()
    return checked(options, run / "config.yaml", cls), more + ["--merge_adapter"] * adapter
