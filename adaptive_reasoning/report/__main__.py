"""python -m adaptive_reasoning.report RUN_DIR [RUN_DIR ...]: write curves.png and report.html again."""

import argparse
from pathlib import Path

from adaptive_reasoning.errors import run_cli
from adaptive_reasoning.report.page import write_report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m adaptive_reasoning.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run (its --output_dir)")
    for folder in parser.parse_args(argv).runs:
        write_report(folder)
        print(f"{folder}: curves.png and report.html written", flush=True)


if __name__ == "__main__":
    run_cli(main)
