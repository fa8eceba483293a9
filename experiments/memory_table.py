"""The memory of each GPU from one GPU to 64, for the papers' runs: the table of docs/scaling.md.

python experiments/memory_table.py                # prints it
python experiments/memory_table.py --write        # and sets that of the page anew
"""

import re
import sys
from pathlib import Path

from adaptive_reasoning import ada_grpo, adaptthink
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.run.memory import GIB, plan_memory
from adaptive_reasoning.run.options import parse_args
from adaptive_reasoning.run.preflight import Place
from adaptive_reasoning.run.shapes import find_config, shapes_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
MARK = re.compile(r"(<!-- table: memory -->\n).*?(<!-- end of the table -->)", re.DOTALL)
RUNS = {
    "1.5B": (adaptthink, "adaptthink_1_5b.yaml"),
    "7B": (adaptthink, "adaptthink_7b.yaml"),
    "14B": (ada_grpo, "ada_grpo_14b.yaml"),
}
STAGES = {
    "1 GPU": Place(),
    "1 GPU, offload": Place(offload=True),
    "8 GPUs": Place(num_gpus=8),
    "8 GPUs, offload": Place(num_gpus=8, offload=True),
    "2 x 8 GPUs": Place(num_gpus=8, num_nodes=2),
    "8 x 8 GPUs": Place(num_gpus=8, num_nodes=8),
}
HEAD = ("GiB of each H100", "states", "replica", "update", "KV cache", "peak", "longest rows", "machine's memory")
STATES = ("weight", "fp32 weight", "fp32 master", "gradient", "Adam", "reference policy")
UPDATE = ("bf16 copy", "activations", "output head", "ZeRO-3 exchange")


def row_of(args, shapes, place: Place) -> list[str]:
    """Return the cells of one run at one stage."""
    try:
        plan = plan_memory(args, args.holds(), shapes, place.where(args.max_prompt_tokens))
    except UserError as error:
        least, fix = re.search(r"needs at least ([\d.]+) GiB.* GiB\)\. (.*)\.$", str(error)).groups()
        return ["-"] * 4 + [f"{least}: does not fit", "-", fix]
    items = {item.name: item.bytes for item in plan.items}
    states, update = (sum(items.get(name, 0) for name in names) for names in (STATES, UPDATE))
    host = sum(item.bytes for item in plan.host if item.name != "checkpoint") * place.num_gpus
    numbers = (states, items["rollout replica"], update, items["KV cache"], plan.peak)
    return [*(f"{x / GIB:.1f}" for x in numbers), str(plan.rows), f"{host / GIB:.0f}" if host else "-"]


def table() -> str:
    """Return the table in Markdown."""
    rows = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1)]
    for model, (module, yaml) in RUNS.items():
        args = parse_args(module.Args, ["--config", str(ROOT / "experiments" / yaml)])
        shapes = shapes_of(find_config(args.model))
        rows += [[f"{model}, {stage}", *row_of(args, shapes, place)] for stage, place in STAGES.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    if "--write" in sys.argv[1:]:
        PAGE.write_text(MARK.sub(lambda match: f"{match[1]}{table()}\n{match[2]}", PAGE.read_text()))
        print(f"wrote {PAGE}")
    else:
        print(table())


if __name__ == "__main__":
    run_cli(main)
