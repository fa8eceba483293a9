"""The tables of docs/scaling.md: the same runs on one GPU and on 64, and the papers' own hours.

make scaling                                       # sets the tables of the page anew
python -m adaptive_reasoning.plan.scaling          # prints them
"""

import json
import re
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from adaptive_reasoning import ada_grpo, adaptthink, grpo
from adaptive_reasoning.core.errors import UserError, run_cli
from adaptive_reasoning.plan.command import Plan, plan_run
from adaptive_reasoning.plan.hours import Assumptions, plan_step
from adaptive_reasoning.plan.machine import GPUS, Machine
from adaptive_reasoning.plan.memory import USABLE
from adaptive_reasoning.plan.shapes import Shapes, find_config, shapes_of
from adaptive_reasoning.run.options import field_docs, parse_args

GIB = 2**30
PAGE = Path("docs/scaling.md")
MEASURED = Path("experiments/bench/plan.json")
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of the table -->)", re.DOTALL)
RUNS = {
    "1.5B": (adaptthink, "adaptthink_1_5b.yaml"),
    "7B": (adaptthink, "adaptthink_7b.yaml"),
    "14B": (ada_grpo, "ada_grpo_14b.yaml"),
}
STAGES = {  # (GPUs of a machine, machines, optimiser in CPU memory)
    "1 GPU": (1, 1, False),
    "1 GPU, offload": (1, 1, True),
    "8 GPUs": (8, 1, False),
    "8 GPUs, offload": (8, 1, True),
    "2 x 8 GPUs": (8, 2, False),
    "8 x 8 GPUs": (8, 8, False),
}
STATES = ("weight", "fp32 weight", "fp32 master", "gradient", "Adam", "reference policy")


@dataclass(frozen=True)
class Published:
    """What a paper says about the time of its run."""

    run: str
    module: object
    yaml: str
    machine: Machine
    step_s: float  # seconds of a training step
    said: str
    mean: int  # mean response tokens
    mean_from: str


EIGHT_A800 = Machine(GPUS["a800"], 8)
PAPERS = (
    Published("AdaptThink 1.5B", adaptthink, "adaptthink_1_5b.yaml", Machine(GPUS["h800"], 8), 32 * 3600 / 314,
              "32 h, 314 steps", 2772, "MATH-500 before training: half 4,887, half 658"),
    Published("AdaptThink 7B", adaptthink, "adaptthink_7b.yaml", Machine(GPUS["h800"], 8, 4), 28 * 3600 / 314,
              "28 h, 314 steps", 2186, "MATH-500 before training: half 3,674, half 697"),
    Published("Ada-GRPO 3B", ada_grpo, "ada_grpo_3b.yaml", EIGHT_A800, 770, "770 s a step", 620, "curve, 700 to 540"),
    Published("Ada-GRPO 7B", ada_grpo, "ada_grpo_7b.yaml", EIGHT_A800, 780, "780 s a step", 540, "curve, 600 to 480"),
    Published("GRPO 7B", grpo, "grpo_7b.yaml", EIGHT_A800, 1350, "1350 s a step", 950, "curve, 870 to 1,030"),
    Published("Ada-GRPO 14B", ada_grpo, "ada_grpo_14b.yaml", EIGHT_A800, 1200, "1150 to 1250 s a step", 510,
              "curve, 560 to 460"),
)  # fmt: skip


@lru_cache
def shapes_named(model: str) -> Shapes:
    return shapes_of(find_config(model))


def options(module, yaml: str):
    return parse_args(module.Args, ["--config", f"experiments/{yaml}"])


def cells(row: list) -> str:
    return "| " + " | ".join(str(cell) for cell in row) + " |"


def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join([cells(head), cells(["---"] + ["---:"] * (len(head) - 1)), *map(cells, rows)])


def plans() -> dict[str, dict[str, Plan | str]]:
    """Return {model: {stage: plan, or why it does not fit}}; a stage with offload only where it is of use."""
    found: dict[str, dict[str, Plan | str]] = {}
    for model, (module, yaml) in RUNS.items():
        found[model] = {}
        for stage, (gpus, nodes, offload) in STAGES.items():
            args, machine = options(module, yaml), Machine(GPUS["h100"], gpus, nodes)
            try:
                args.offload_optimizer = offload  # on one GPU the option alone, without ZeRO-3
                zero3_offload = offload and gpus * nodes > 1
                found[model][stage] = plan_run(args, machine, Assumptions(), zero3_offload, shapes_named(args.model))
            except UserError as error:
                found[model][stage] = str(error)
    return found


def memory_table(found) -> str:
    """Return the memory of each GPU in the largest phase."""
    head = [
        "GiB of each H100",
        "states",
        "replica",
        "update",
        "KV arena",
        "peak",
        "rows of the longest",
        "machine's memory",
    ]
    rows = []
    for model, stages in found.items():
        for stage, plan in stages.items():
            if isinstance(plan, str):
                least = re.search(r"needs at least ([\d.]+) GiB", plan).group(1)
                mend = plan.split(" GiB). ")[-1].rstrip(".")
                rows.append([f"{model}, {stage}", *["-"] * 3, "-", f"{least}: does not fit", "-", mend])
                continue
            items = {item.name: item.bytes / GIB for item in plan.memory.items}
            states = sum(items.get(name, 0) for name in STATES)
            update = sum(items.get(name, 0) for name in ("bf16 copy", "activations", "output head", "ZeRO-3 exchange"))
            host = sum(item.bytes for item in plan.memory.host if item.name != "checkpoint") / GIB * plan.machine.gpus
            numbers = (states, items["rollout replica"], update, items["KV arena"], plan.memory.peak / GIB)
            rows.append(
                [f"{model}, {stage}", *(f"{x:.1f}" for x in numbers), plan.memory.rows, f"{host:.0f}" if host else "-"]
            )
    return markdown(head, rows)


def hours_table(found) -> str:
    """Return the times of a step and of the run."""
    head = [
        "H100",
        "decode, s",
        "update, s",
        "exchange, s",
        "optimiser, s",
        "step, s",
        "run, h",
        "GPU-hours",
        "live rows",
    ]
    rows = []
    for model, stages in found.items():
        for stage, plan in stages.items():
            if isinstance(plan, str):
                continue
            parts = {line.name: line.seconds for line in plan.hours.step}
            shown = [f"{parts.get(name, 0):.1f}" for name in ("decode", "update", "exchange", "optimiser")]
            run = plan.hours.run_seconds / 3600
            shown += [f"{plan.hours.step_seconds:.0f}", f"{run:.1f}", f"{run * plan.machine.processes:.0f}"]
            rows.append([f"{model}, {stage}", *shown, f"{plan.hours.rows_mean:.0f}"])
    return markdown(head, rows)


def papers_table() -> str:
    """Return the papers' times beside ours, and what each assumption would have to be to explain the difference."""
    head = ["run", "published", "step, s", "predicted, s", "published / predicted", "mean response"]
    head += ["response that explains it", "shares that explain it"]
    rows = []
    for paper in PAPERS:
        args, a = options(paper.module, paper.yaml), Assumptions(mean_response_tokens=paper.mean)
        shapes, offload = shapes_named(args.model), False
        try:
            plan = plan_run(args, paper.machine, a, offload, shapes)
        except UserError:  # needs the optimiser in CPU memory, and the row says so
            offload = True
            plan = plan_run(args, paper.machine, a, offload, shapes)
        step = plan.hours.step_seconds

        def seconds(a: Assumptions, args=args, plan=plan, paper=paper) -> float:
            lines, _ = plan_step(args, plan.shapes, paper.machine, a, plan.memory.cache_bytes)
            return sum(line.seconds for line in lines)

        length, scale = explaining(seconds, paper.step_s, paper.mean, args.max_new_tokens)
        explained = f"{length:,}" if length else f"none up to {args.max_new_tokens:,}"
        place = paper.machine.title.removesuffix(", ZeRO-3") + ", ours with offload" * offload
        row = [
            paper.run,
            f"{paper.said} on {place}",
            f"{paper.step_s:.0f}",
            f"{step:.0f}",
            f"{paper.step_s / step:.1f}",
        ]
        rows.append([*row, f"{paper.mean:,} ({paper.mean_from})", explained, f"{scale:.2f} of each"])
    return markdown(head, rows)


def explaining(seconds, published: float, mean: int, cap: int) -> tuple[int, float]:
    """Return the mean response, and the factor on the shares reached, with which a step takes as long as published.

    Each alone, all else as assumed; the response is 0 if no length up to the cap does it.
    """

    low, high = 1, cap
    if seconds(Assumptions(mean_response_tokens=cap)) < published:
        high = 0
    while high and high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(Assumptions(mean_response_tokens=middle)) > published else (middle, high)
    # Every part of a step is inversely proportional to its share (the host's work per token goes the same way).
    return high, seconds(Assumptions(mean_response_tokens=mean)) / published


def assumptions_table() -> str:
    """Return all assumptions with their values."""
    docs, plain = field_docs(Assumptions), Assumptions()
    rows = [[f"`--{f.name}`", f"{getattr(plain, f.name):g}", docs[f.name]] for f in fields(Assumptions)]
    return markdown(["assumption", "value", "meaning"], rows)


def gpus_table() -> str:
    """Return the nominal figures of the GPUs."""
    head = ["`GPU=`", "GPU", "memory, GiB", "planned with, GiB", "bandwidth, TB/s", "bf16, TFLOP/s", "link, GB/s"]
    rows = []
    for name, g in GPUS.items():
        numbers = (f"{g.memory:g}", f"{g.memory * USABLE:.1f}", f"{g.bandwidth / 1e12:g}", f"{g.flops / 1e12:g}")
        rows.append([f"`{name}`", g.title, *numbers, f"{g.link / 1e9:g}"])
    return markdown(head, rows)


def checked_table() -> str:
    """Return the comparison with measured runs, as experiments/bench/bench_plan.py has written it down."""
    head = ["Qwen2", "libraries", "predicted, MiB", "measured, MiB", "measured / predicted", "without libraries"]
    head += ["rollout, measured / predicted time", "update, measured / predicted time"]
    rows = []
    for r in json.loads(MEASURED.read_text())["sizes"].values():
        memory = [f"{r[key]:,.0f}" for key in ("libraries_mib", "predicted_mib", "measured_mib")]
        ratios = [f"{r[key]:.2f}" for key in ("measured_over_predicted", "without_libraries")]
        times = [
            f"{t['measured']:.1f} / {t['predicted']:.1f} s" for t in (r["seconds"][k] for k in ("rollout", "update"))
        ]
        rows.append([f"{r['parameters'] / 1e6:.1f} M", *memory, *ratios, *times])
    return markdown(head, rows)


def tables() -> dict[str, str]:
    """Return {name: table} of the page."""
    found = plans()
    return {
        "memory": memory_table(found),
        "hours": hours_table(found),
        "papers": papers_table(),
        "checked": checked_table(),
        "gpus": gpus_table(),
        "assumptions": assumptions_table(),
    }


def page(text: str, made: dict[str, str]) -> str:
    """Return the text of the page with its tables set anew."""
    return MARK.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", text)


def main() -> None:
    made = tables()
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text(), made))
        print(f"wrote {PAGE}")
    else:
        print("\n\n".join(made.values()))


if __name__ == "__main__":
    run_cli(main)
