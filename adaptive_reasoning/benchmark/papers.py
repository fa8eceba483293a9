"""The papers' published rows, and tables that show them beside ours."""

from adaptive_reasoning.benchmark.arm import ARM, arm_table
from adaptive_reasoning.report.console import aligned

# Published rows (accuracy in %, mean tokens, share of NoThinking in %): AdaptThink, Table 1, arXiv 2505.13417.
ADAPTTHINK = {
    "1.5b": {
        "original, always think": {"gsm8k": (79.0, 978, 0), "math500": (80.6, 4887, 0), "aime24": (29.4, 12073, 0)},
        "original, never think": {"gsm8k": (69.8, 280, 100), "math500": (67.2, 658, 100), "aime24": (14.0, 2190, 100)},
        "AdaptThink": {"gsm8k": (83.1, 480, 86.9), "math500": (82.0, 1782, 76.8), "aime24": (31.0, 6679, 40.4)},
    },
    "7b": {
        "original, always think": {"gsm8k": (87.9, 682, 0), "math500": (90.2, 3674, 0), "aime24": (53.5, 10306, 0)},
        "original, never think": {"gsm8k": (85.1, 283, 100), "math500": (80.6, 697, 100), "aime24": (24.2, 1929, 100)},
        "AdaptThink": {"gsm8k": (91.0, 309, 99.6), "math500": (92.0, 1875, 76.6), "aime24": (55.6, 8599, 6.3)},
    },
}

# Thinkless, Tables 1 and 2, arXiv 2505.13379: accuracy in % (lenient scoring), mean tokens with prompt and template,
# share of thinking in %. "math_algebra" is the algebra part of MATH (1187 questions), there called Minerva Algebra.
THINKLESS = {"thinkless-1.5b": {
    "R1-Distill-1.5B": {"aime24": (28.0, 18063, 100), "math_algebra": (95.77, 3029, 100), "math500": (86.08, 5675, 100),
                        "gsm8k": (83.47, 1919, 100)},
    "warm-up, always think": {"aime24": (30.67, 18685, 100), "math_algebra": (95.3, 3064, 100),
                              "math500": (83.6, 6209, 100), "gsm8k": (82.53, 2363, 100)},
    "warm-up, never think": {"aime24": (8.0, 3977, 0), "math_algebra": (90.51, 690, 0), "math500": (72.76, 989, 0),
                             "gsm8k": (82.02, 441, 0)},
    "router random": {"aime24": (14.67, 8093, 56.0), "math_algebra": (92.11, 1736, 49.28),
                      "math500": (76.08, 3096, 47.92), "gsm8k": (82.05, 1086, 50.99)},
    "router Q-7B": {"aime24": (16.67, 9296, 46.67), "math_algebra": (92.5, 795, 5.64), "math500": (79.48, 2748, 25.0),
                    "gsm8k": (85.87, 563, 2.35)},
    "Thinkless": {"aime24": (27.33, 7099, 100), "math_algebra": (94.59, 1144, 25.88), "math500": (81.84, 2555, 51.56),
                  "gsm8k": (84.18, 624, 13.31)},
}}  # fmt: skip

# Thinker, README table of its second version: pass@1 in % (mean of 16 samples) on eight benchmarks, and their mean.
THINKER_BENCHMARKS = ("math500", "aime24", "aime25", "gpqa", "olympiad", "amc23", "minerva", "college")
THINKER = {
    "q1.5b": {
        "Q1.5B pretrained": ((9.05, 0.00, 0.00, 4.55, 3.09, 4.06, 2.30, 7.40), 3.81),
        "Q1.5B QA baseline": ((59.82, 4.10, 2.43, 20.52, 26.05, 35.36, 19.25, 37.42), 25.62),
        "Q1.5B Thinker": ((64.45, 6.25, 2.22, 19.21, 28.21, 39.06, 20.38, 38.82), 27.33),
        "Q1.5B Thinker-Fast": ((59.82, 4.58, 1.25, 21.28, 24.52, 34.53, 17.85, 37.58), 25.18),
        "ORZ-1.5B (quoted)": ((58.0, 3.5, 1.0, 16.8, None, None, None, None), None),
        "SimpleRL-1.5B (quoted)": ((59.0, 4.2, None, None, 21.0, 35.0, 20.2, None), None),
    },
    "r1.5b": {
        "R1.5B pretrained": ((76.21, 17.50, 17.92, 13.76, 37.46, 55.94, 24.82, 38.85), 35.31),
        "R1.5B QA baseline": ((86.24, 35.42, 23.75, 25.69, 49.22, 72.81, 32.08, 42.02), 45.90),
        "R1.5B Thinker": ((88.51, 38.96, 26.67, 37.41, 55.49, 83.59, 34.77, 42.46), 50.98),
        "R1.5B Thinker-Fast": ((81.35, 18.33, 14.58, 28.85, 45.68, 66.41, 31.39, 41.74), 41.05),
    },
    "r7b": {  # the rows of Thinker and the end of the baseline's are not known to us
        "R7B pretrained": ((84.05, 37.50, 28.54, 17.58, 37.92, 36.41, 34.49, 40.72), 39.65),
        "R7B QA baseline": ((91.03, 47.50, 34.58, None, None, None, None, None), None),
    },
}


def share_table(rows: list[dict], published: dict[str, dict], size: str, mode: str) -> str:
    """Return our rows and the paper's for the benchmarks that both have: accuracy %, tokens, share of a mode in %."""
    there = next(iter(published.values()))
    names = [b for b in dict.fromkeys(r["benchmark"] for r in rows) if b in there]
    if not names:
        return "no benchmark here is in the paper's table"
    table = [["", *names]]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        ours = {r["benchmark"]: r["result"] for r in rows if r["setting"] == setting}
        cells = [
            f"{100 * ours[b]['accuracy']:.1f} / {ours[b].get('mean_tokens_paper', ours[b]['mean_tokens']):.0f} / "
            f"{100 * ours[b]['modes'].get(mode, {'share': 0})['share']:.1f}"
            for b in names
        ]
        table.append([f"here, {setting}", *cells])
    for name, values in published.items():
        table.append([f"paper, {name}", *("{:.1f} / {} / {}".format(*values[b]) for b in names)])
    return f"accuracy % / tokens / {'NoThinking' if mode == 'nothinking' else mode} %, paper {size}\n" + aligned(table)


def adaptthink_table(rows: list[dict], size: str) -> str:
    return share_table(rows, ADAPTTHINK[size], size, "nothinking")


def thinkless_table(rows: list[dict], size: str) -> str:
    return share_table(rows, THINKLESS[size], size, "think")


def thinker_table(rows: list[dict], size: str) -> str:
    """Return accuracy in % on the benchmarks of Thinker's table that were measured, and the plain mean of the eight."""
    names = [b for b in THINKER_BENCHMARKS if b in {r["benchmark"] for r in rows}]
    found = {}
    for r in rows:
        found.setdefault(f"here, {r['setting']}", {})[r["benchmark"]] = 100 * r["result"]["accuracy"]
    lines = {name: ([part[b] for b in names], mean_of_eight(part)) for name, part in found.items()}
    for name, (values, average) in THINKER[size].items():
        lines[f"paper, {name}"] = ([dict(zip(THINKER_BENCHMARKS, values))[b] for b in names], average)
    table = [["", *names, "mean of 8"]]
    table += [
        [name, *("-" if x is None else f"{x:.2f}" for x in (*values, mean))] for name, (values, mean) in lines.items()
    ]
    return f"pass@1 in %, paper {size}\n" + aligned(table)


def mean_of_eight(accuracies: dict[str, float]) -> float | None:
    """Return the plain mean of the eight columns, None if one is missing."""
    values = [accuracies.get(b) for b in THINKER_BENCHMARKS]
    return None if None in values else sum(values) / len(values)


PAPERS = {  # algorithm -> (published rows by model size, the function that prints them beside ours)
    "adaptthink": (ADAPTTHINK, adaptthink_table),
    "grpo": (ARM, arm_table),
    "ada_grpo": (ARM, arm_table),
    "degrpo": (THINKLESS, thinkless_table),
    "thinker": (THINKER, thinker_table),
}
