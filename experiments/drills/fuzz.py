"""Coverage-guided fuzzing of the properties in tests/test_fuzz.py: answer gates, data files, YAML, format classifiers.

    python experiments/drills/fuzz.py                          # every property, a minute each
    python experiments/drills/fuzz.py --seconds 600 test_a_data_file_of_any_bytes

hypothesis draws a property's input from bytes, and atheris (libFuzzer) changes the bytes that reach new branches of
adaptive_reasoning. Nothing is said here about what is right: a property that raises in `make test` raises here. A
failing input stays in hypothesis' database, so `pytest tests/test_fuzz.py -k NAME` shrinks and shows it; inputs that
reached new branches stay in the folder, where the next call begins. Ends with 1 if one failed; the last line is JSON.
"""

import argparse
import functools
import inspect
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def properties() -> dict[str, object]:
    import test_fuzz

    return {name: test for name, test in vars(test_fuzz).items() if hasattr(test, "hypothesis")}


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Fuzz one property in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["adaptive_reasoning"]):
        test = properties()[name]
    inner = test.hypothesis.inner_test
    if "tmp_path" in inspect.signature(inner).parameters:
        folder = Path(tempfile.mkdtemp())

        @functools.wraps(inner)
        def with_folder(**drawn):
            inner(**drawn | {"tmp_path": folder})

        test.hypothesis.inner_test = with_folder
        test.__defaults__ = (folder,)  # pytest gives it where pytest calls
    one = test.hypothesis.fuzz_one_input
    found = [
        f"-max_total_time={seconds}",
        "-print_final_stats=1",
        "-len_control=0",
        "-max_len=16384",
        f"-artifact_prefix={corpus.parent}/{name}-",
    ]
    rng = random.Random(0)
    for i in range(32):  # hypothesis makes nothing of too few bytes, and libFuzzer begins with none
        (corpus / f"start-{i}").write_bytes(rng.randbytes(32 << i % 10))
    atheris.Setup([sys.argv[0], *found, str(corpus)], lambda data: one(data) and None)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="properties; all if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each property")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "fuzz", help="inputs that reached new branches")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:  # before anything of the project is imported, so that it is imported with its branches counted
        return fuzz(args.names[0], args.seconds, args.folder / args.names[0])
    known = list(properties())
    if unknown := set(args.names) - set(known):
        parser.error(f"no property named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = []
    for name in args.names or known:
        (args.folder / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, name, "--here", "--seconds", str(args.seconds), "--folder", args.folder]
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = done.stdout
        runs, branches = re.search(r"number_of_executed_units: (\d+)", said), re.findall(r" cov: (\d+)", said)
        row = {"property": name, "inputs": int(runs[1]) if runs else 0, "branches": int((branches or ["0"])[-1])}
        row["failed"] = done.returncode != 0 or not row["branches"]
        rows.append(row)
        verdict = "FAILED" if row["failed"] else "ok"
        print(f"{row['inputs']:>9,} inputs  {row['branches']:>5} branches  {verdict:<6}  {name}", flush=True)
        if row["failed"]:
            print("\n".join([line for line in said.splitlines() if not line.startswith("INFO: Instr")][-60:]))
    failed = [row["property"] for row in rows if row["failed"]]
    print(json.dumps({"drill": "fuzz", "seconds": args.seconds, "properties": rows, "failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
