"""python -m adaptive_reasoning.report RUN_DIR [RUN_DIR ...]: write curves.png and report.html again.

With several finished runs it also prints a table of mean and spread over the seeds, before and after training;
--by OPTION groups the runs by an option of theirs, --plot FILE draws the groups into one picture.
"""

import argparse
from pathlib import Path

from adaptive_reasoning.core.errors import run_cli
from adaptive_reasoning.report.page import write_report
from adaptive_reasoning.report.run_folder import load_run
from adaptive_reasoning.report.seeds import plot, table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m adaptive_reasoning.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run (its --output_dir)")
    parser.add_argument("--by", default="", help="option the runs are grouped by in table and picture, e.g. delta")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of the groups (.png, .svg or .pdf)")
    args = parser.parse_args(argv)
    for folder in args.runs:
        write_report(folder)
        print(f"{folder}: curves.png and report.html written", flush=True)
    if len(args.runs) > 1 or args.by or args.plot:
        runs = [load_run(folder) for folder in args.runs]
        print("\n" + table(runs, args.by), flush=True)
        if args.plot:
            plot(runs, args.plot, args.by)
            print(f"\n{args.plot} written", flush=True)


if __name__ == "__main__":
    run_cli(main)
