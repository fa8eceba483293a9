"""Runtime: the one Accelerator, and the few collective operations that the learner needs.

The same code runs in one CPU process, on one GPU, and under `accelerate launch` with data parallelism or DeepSpeed
ZeRO-3. Every rank must call the functions of this file in the same order.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from transformers.utils.logging import disable_progress_bar

from adaptive_reasoning.errors import ElsewhereError, UserError

arrivals = 0  # collective operations of this file that this process has come to; the watch compares them

LATER = 60.0  # seconds by which a collective operation gives up after the watch, whose message says more


def make_accelerator(args) -> Accelerator:
    """Return the Accelerator for `args.dtype` ("bf16" or "fp32"), configured by `accelerate launch` where used.

    Raises:
        UserError: the launch asks for a way of distributing that the learner does not know.
    """
    disable_progress_bar()  # the bars of loading and saving weights would cut through the run's own lines
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and warns that it found none
    wants_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wants_deepspeed and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"):
        # accelerate would quietly train with plain data parallelism instead.
        raise UserError(
            "ACCELERATE_USE_CPU switches DeepSpeed off. For ZeRO-3 on the CPU leave it out and set DS_ACCELERATOR=cpu."
        )
    group = {"timeout": timedelta(seconds=args.patience + LATER)}
    if wants_deepspeed and not torch.cuda.is_available():
        group["backend"] = "gloo"  # without it accelerate believes that there is one process only
    trackers = [name.strip() for name in args.report_to.split(",") if name.strip()]
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if args.dtype == "bf16" else "no",
            kwargs_handlers=[InitProcessGroupKwargs(**group)],
            log_with=trackers or None,
            project_dir=args.output_dir if trackers else None,
        )
    except ValueError as error:
        raise UserError(f"--report_to {args.report_to}: {error}") from error
    if len(accelerator.log_with) < len(trackers):
        raise UserError(f"--report_to {args.report_to}: not all of them are installed, e.g. pip install tensorboard.")
    kind = accelerator.distributed_type
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    if kind not in known:
        raise UserError(f"accelerate is set to {kind}: use one process, plain data parallelism or DeepSpeed ZeRO-3.")
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage != 3:
            raise UserError(f"the DeepSpeed configuration has ZeRO stage {stage}: set zero_stage to 3.")
        # DeepSpeed 0.19 calls two functions that torch 2.13 wants renamed: one warning for each gathered weight.
        warnings.filterwarnings("ignore", r".*(reduce_scatter|all_gather_into)_tensor` is deprecated", FutureWarning)
    return accelerator


def is_zero3(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def arrive() -> None:
    """Count that this process has come to another collective operation."""
    global arrivals
    arrivals += 1


def offloads_optimizer(accelerator: Accelerator) -> bool:
    """Whether the launch file keeps ZeRO-3's optimiser in CPU memory."""
    return is_zero3(accelerator) and accelerator.state.deepspeed_plugin.offload_optimizer_device not in (None, "none")


def all_reduce(accelerator: Accelerator, values, op: str) -> torch.Tensor:
    """Return the elementwise "sum", "max" or "min" over all ranks of `values`: numbers or a tensor, fp64, on the CPU.

    fp64 counts exactly to 2**53, and non-finite values stay non-finite in a sum.
    """
    values = torch.as_tensor(values, dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes > 1:
        arrive()
        values = values.clone()
        dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op])
    return values.cpu()


def all_gather(accelerator: Accelerator, value) -> list:
    """Return the list of every rank's `value`, any small picklable object, in order of ranks."""
    if accelerator.num_processes == 1:
        return [value]
    arrive()
    values = [None] * accelerator.num_processes
    dist.all_gather_object(values, value)
    return values


def together(accelerator: Accelerator, action: Callable, everybody: bool = True):
    """Run `action` on all ranks, or the main one alone, and return its result; an error on one is an error on all.

    What only one rank does, or only one rank can fail at, goes through here: else the others would wait for it. The
    rank that fails raises its own error, which it prints; the others raise ElsewhereError with the same words.
    """
    result, error = None, None
    if everybody or accelerator.is_main_process:
        try:
            result = action()
        except Exception as caught:
            error = caught
    told = None if error is None else f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}"
    failed = [(rank, text) for rank, text in enumerate(all_gather(accelerator, told)) if text is not None]
    if error is not None:
        raise error
    if failed:
        rank, text = failed[0]
        raise ElsewhereError(f"process {rank}: {text}")
    return result


def on_main(accelerator: Accelerator, action: Callable):
    """Run `action` on the main process alone; return its result there and None elsewhere. As `together`."""
    return together(accelerator, action, everybody=False)


def end(accelerator: Accelerator, engines: Iterable = ()) -> None:
    """Take the processes apart in order: DeepSpeed's engines first, then the process group they talk through.

    Left to the interpreter, threads of the group may outlive what they use, and abort a process that was done.
    """
    for engine in engines:
        engine.destroy()
    if accelerator.num_processes > 1 and dist.is_initialized():
        accelerator.wait_for_everyone()
        dist.destroy_process_group()
