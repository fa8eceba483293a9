"""Optimiser state that any number of processes can write and any other number can read.

Every process writes the part that it holds, by parameter name: for each tensor of the state a flat piece. Under ZeRO-3
process r of R holds the elements [r n, (r + 1) n) of the flattened parameter, n = ceil(size / R); without ZeRO-3 the
main process holds all of it. Pieces in order of process, end to end, are therefore the whole tensor, and a process
reads just the elements that it is going to hold. Three tensors a parameter, fp32:

    <name>.exp_avg  <name>.exp_avg_sq    Adam's moments
    <name>.master                        the weight, under ZeRO-3 alone: elsewhere model/ or adapter/ has it in fp32

With LoRA there is state of the adapters alone; frozen weights are as they were loaded from --model.
"""

from pathlib import Path

import torch

from adaptive_reasoning.learner.lora import saved_name
from adaptive_reasoning.learner.tensors import Pieces, write_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


def write_optimizer(path: Path, learner) -> dict:
    """Write what this process holds; return {"bytes", "sha256"} of the file. No collective operation."""
    pieces, steps = [], set()
    places = zero3_places(learner.optimizer) if learner.zero3 else {}
    # State is kept by the optimiser's entry, in its order.
    entries = [p for group in learner.optimizer.param_groups for p in group["params"]]
    for i, (name, parameter) in enumerate(trainable(learner)):
        if learner.zero3:
            index, offset = places[id(parameter)]
            flat = learner.optimizer.fp32_partitioned_groups_flat[index]
            state = learner.optimizer.optimizer.state[flat]
            a, b = held(learner, parameter)
            here = slice(offset, offset + b - a)
            pieces.append((f"{name}.master", flat.detach()[here]))
        else:
            state, here = learner.optimizer.state[entries[i]], slice(None)
        if state:  # none before the first step
            steps.add(float(state["step"]))
            pieces += [(f"{name}.{key}", state[key].reshape(-1)[here]) for key in MOMENTS]
    assert len(steps) <= 1, f"parameters have taken different numbers of steps: {steps}"
    layout = [(key, piece.dtype, piece.shape) for key, piece in pieces]
    step = str(int(max(steps, default=0)))
    return write_tensors(path, layout, (piece for _, piece in pieces), {"adam_step": step})


@torch.no_grad()
def restore(folder: Path, learner) -> None:
    """Read weights and optimiser of a learner back, whoever wrote them. Every process must call this.

    Raises:
        UserError: the files are of a model of another shape.
    """
    files = sorted((folder / "optimizer").glob("rank_*.safetensors"), key=lambda f: int(f.stem.split("_")[1]))
    weights = folder / ("adapter" if learner.lora else "model")
    optimizer, model = Pieces(files), Pieces(sorted(weights.glob("*.safetensors")))
    step = int(optimizer.metadata[0]["adam_step"])

    def weight(name, a, b, total):
        key = f"{name}.master"
        if key in optimizer:
            return optimizer.read(key, a, b, total)
        return model.read(saved_name(name) if learner.lora else name, a, b, total)

    if learner.zero3:
        restore_zero3(learner, optimizer, weight, step)
        return
    state = {}
    for i, (name, parameter) in enumerate(trainable(learner)):
        n = parameter.numel()
        parameter.copy_(weight(name, 0, n, n).view_as(parameter))
        moments = {key: optimizer.read(f"{name}.{key}", 0, n, n).view(parameter.shape) for key in MOMENTS if step}
        state[i] = {"step": torch.tensor(float(step)), **moments} if step else {}
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})


def restore_zero3(learner, pieces: Pieces, weight, step: int) -> None:
    """Fill this process's partitions: fp32 weights, moments, and the weights that the forward pass gathers."""
    optimizer = learner.optimizer
    optimizer.checkpoint_event_prologue()
    if optimizer.persistent_parameters:  # small ones, kept whole on every process
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    places = zero3_places(optimizer)
    for name, parameter in trainable(learner):
        index, offset = places[id(parameter)]
        flat, total = optimizer.fp32_partitioned_groups_flat[index], parameter.ds_numel
        state = optimizer.optimizer.state[flat]
        a, b = held(learner, parameter)
        here = slice(offset, offset + b - a)
        flat.data[here] = weight(name, a, b, total).to(flat.device)
        if not step:
            continue
        state["step"] = torch.tensor(float(step))
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(flat.data))
            state[key][here] = pieces.read(f"{name}.{key}", a, b, total).to(flat.device)
    for flat, half in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat):
        half.data.copy_(flat.data)
    optimizer.checkpoint_event_epilogue()


def trainable(learner) -> list[tuple]:
    """Return (name, parameter) of what the optimiser has, in its order."""
    named = [(name, p) for name, p in learner.model.named_parameters() if p.requires_grad]
    return sorted(named, key=lambda item: learner.undecayed(item[1]))


def held(learner, parameter) -> tuple[int, int]:
    """Return which elements [a, b) of the flattened parameter this process holds under ZeRO-3."""
    n = parameter.partition_numel()
    a = min(learner.accelerator.process_index * n, parameter.ds_numel)
    return a, min(a + n, parameter.ds_numel)


def zero3_places(optimizer) -> dict[int, tuple[int, int]]:
    """Return {id(parameter): (number of its flat partition, offset in it)} of DeepSpeed's ZeRO-3 optimiser."""
    places = {}
    for index, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            places[id(parameter)] = (index, offset)
            offset += parameter.partition_numel()
    return places
