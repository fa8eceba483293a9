"""Sandbox: run a program that a model wrote, in a process of its own that cannot stay, grow or write much.

Used at evaluation only, and only where it is asked for (`--execute_code`): ARM's appendix H takes the answer of the
program where it yields one, and the answer that the model wrote where it does not.

The program runs in an isolated Python (`-I`: no user packages, no environment, not the current folder) in an empty
folder that is deleted afterwards, in a process group that is killed at the deadline, with limits on CPU time, memory,
file size, open files and processes. That stops accidents: loops, memory, stray files. It is no wall against an
attacker: the program runs as this user and may read what this user may read. Give it a machine without secrets and
without a network.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile

SECONDS = 5.0
MEMORY_BYTES = 512 << 20
FILE_BYTES = 1 << 20
MARK = "\0answer\0"

# What runs inside: the limits first, then the program, then the answer of its last function without arguments.
RUNNER = f"""
import resource, sys
for limit, value in (
    (resource.RLIMIT_CPU, {int(SECONDS) + 1}), (resource.RLIMIT_AS, {MEMORY_BYTES}),
    (resource.RLIMIT_FSIZE, {FILE_BYTES}), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(limit, (value, value))
source, call = sys.stdin.read().split("\\0")
scope = {{"__name__": "__main__"}}
exec(compile(source, "<program>", "exec"), scope)
found = eval(call, scope) if call else None
answer = found.get("answer") if isinstance(found, dict) else found
if answer is not None:
    sys.stdout.write({MARK!r} + str(answer))
"""


def split_program(block: str) -> tuple[str, str]:
    """Return (program, call) of the text inside a CODE block: what stands before the line ">>> f()", and "f()".

    Without such a line the first function of the program is called.
    """
    program, prompt, rest = block.partition(">>>")
    if not prompt:
        program = re.split(r"^output\s*=", program, flags=re.M)[0]
    call = rest.strip().splitlines()[0].strip() if rest.strip() else ""
    if not call:
        functions = re.findall(r"^def (\w+)\(\s*\)", program, flags=re.M)
        call = f"{functions[0]}()" if functions else ""
    return program.strip(), call


def run_program(block: str, seconds: float = SECONDS) -> str | None:
    """Return the answer of the program in a CODE block, or None if it yields none: an error, a limit, no 'answer'."""
    program, call = split_program(block)
    if not program or not call or "\0" in block:
        return None
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", RUNNER], cwd=folder, env={"PATH": ""}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(f"{program}\0{call}", timeout=seconds)
        except subprocess.TimeoutExpired:
            out = ""
        finally:
            kill_group(process)
    answer = out.rpartition(MARK)[2] if MARK in out and process.returncode == 0 else ""
    return answer.strip()[:1000] or None


def kill_group(process: subprocess.Popen) -> None:
    """Kill the process and what it started, by its group, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.stdout.close()
    process.wait()


def executed(response: str) -> str:
    """Return the response with what its program computes in place of the answer that the model wrote.

    Unchanged where the response is not in the CODE format or the program yields nothing.
    """
    found = re.match(r"<CODE>(.*?)</CODE>", response, flags=re.S)
    answer = run_program(found[1]) if found else None
    if answer is None:
        return response
    return f"{response[: found.end()]}\n<ANSWER>\n{answer}\n</ANSWER>"
