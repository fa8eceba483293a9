"""A run evaluated as it evaluates itself: what its folder says about format, task and template, and its newest model.

python -m adaptive_reasoning.benchmark runs/toy-adaptthink-seed0 --eval_samples 4
"""

import dataclasses
from pathlib import Path

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.checkpoint import checkpoints
from adaptive_reasoning.run.folder import read_config
from adaptive_reasoning.run.journal import best_of
from adaptive_reasoning.run.options import checked

# What a saved model has in it already, and what is of the run alone.
OWN = {"model", "output_dir", "merge_adapter", "control_tokens", "chat_template", "report_to"}


def of_run(place: Path, cls: type) -> tuple[dict, list[str]]:
    """Return (options of `cls` that the run has, command line with its model and a folder for the results).

    Args:
        place: the folder of a run, or one of its checkpoints. Of a run the model in it is taken that its method kept
            (supervised runs choose one), else that of its newest checkpoint.

    Raises:
        UserError: it is no such folder, or there is no model in it yet.
    """
    folder = place.parents[1] if place.parent.name == "checkpoints" else place
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{place}: not the folder of a run, there is no {folder / 'config.yaml'}. Give the --output_dir of a run "
            "or one of its checkpoints; the folder of a model goes with --model."
        )
    config = read_config(folder / "config.yaml")
    if kept := config.get("format"):  # what the method made of its options
        config["answer_format"] = kept
    if not config.get("answer_format"):
        raise UserError(f"{folder / 'config.yaml'} names no answer_format. Give --model and --answer_format instead.")
    known = {f.name for f in dataclasses.fields(cls)} - OWN
    options = {name: value for name, value in config.items() if name in known and value is not None}
    model, step = model_of(folder, place)
    more = ["--model", str(model), "--output_dir", str(folder / "benchmark" / step)]
    return checked(options, folder / "config.yaml", cls), more + ["--merge_adapter"] * (model.name == "adapter")


def model_of(folder: Path, place: Path) -> tuple[Path, str]:
    """Return the folder of a model (or adapter), and the name of the checkpoint that it is from."""
    if place == folder and (folder / "model" / "config.json").is_file():
        return folder / "model", "model"
    there = [place] if place != folder else checkpoints(folder / "checkpoints")[::-1]
    if place == folder and there and (best := best_of(there[0])) is not None:
        there.sort(key=lambda path: path.name != f"step_{best:06d}")
    for checkpoint in there:
        for name, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
            if (checkpoint / name / file).is_file():
                return checkpoint / name, checkpoint.name
    raise UserError(f"{place}: no model is saved there yet. Wait for the first checkpoint, or lower --save_every.")
