"""Programs that a model wrote: right ones, broken ones, and ones that want to stay, grow or write."""

import time
from pathlib import Path

import pytest

from adaptive_reasoning.tasks import sandbox
from adaptive_reasoning.tasks.sandbox import executed, run_program, split_program

GOOD = "def f():\n    a = 6 * 7\n    return {'a': a, 'answer': a + 1}\n\n>>> f()\n\noutput = {'a': 42, 'answer': 99}\n"


def test_the_layout_of_the_paper():
    program, call = split_program(GOOD)
    assert program.endswith("'answer': a + 1}") and call == "f()"
    assert split_program("def g():\n    return {'answer': 1}\noutput = {'answer': 2}")[1] == "g()"
    assert split_program("x = 1") == ("x = 1", "")


def test_the_program_decides_and_not_what_the_model_believes():
    assert run_program(GOOD) == "43"
    response = f"<CODE>\n{GOOD}</CODE>\n<ANSWER>\n99\n</ANSWER>"
    assert executed(response) == f"<CODE>\n{GOOD}</CODE>\n<ANSWER>\n43\n</ANSWER>"


@pytest.mark.parametrize(
    "body",
    [
        "return {'value': 1}",  # no answer
        "return {'answer': 1 / 0}",
        "return {'answer': }",  # no Python
        "import sys; sys.exit(3)",
        "import os; os._exit(0)",
        "return {'answer': '1' * (1 << 30)}",  # memory
        "import os\n    os.fork()\n    return {'answer': 1}",  # more processes (root may: see below)
        "open('big', 'w').write('x' * (4 << 20))\n    return {'answer': 1}",
        "import numpy\n    return {'answer': numpy.nowhere}",
        "return undefined",
    ],
)
def test_a_program_without_a_result_leaves_the_answer_alone(body):
    if "fork" in body:
        import os

        if os.geteuid() == 0:
            pytest.skip("limits on processes do not hold for root")
    response = f"<CODE>\ndef f():\n    {body}\n>>> f()\n</CODE>\n<ANSWER>\n7\n</ANSWER>"
    assert executed(response) == response


def test_a_loop_ends_at_the_deadline_with_what_it_started():
    start = time.perf_counter()
    body = "import subprocess, sys\n    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    assert run_program(f"def f():\n    {body}    while True: pass\n>>> f()", seconds=1.0) is None
    assert time.perf_counter() - start < 10


def test_nothing_is_left_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    block = "def f():\n    import os\n    open('x', 'w').write('1')\n    return {'answer': os.listdir('.')}\n>>> f()"
    assert run_program(block) == "['x']"
    assert list(Path(tmp_path).iterdir()) == []


def test_the_environment_does_not_reach_the_program(monkeypatch):
    monkeypatch.setenv("SECRET", "7")
    assert (
        run_program("def f():\n    import os\n    return {'answer': os.environ.get('SECRET', 'no')}\n>>> f()") == "no"
    )


def test_other_formats_are_not_touched():
    for text in ("<COT>\n>>> f()\n</COT>\n<ANSWER>\n1\n</ANSWER>", "<CODE>\ndef f(): return 1\n>>> f()", ""):
        assert executed(text) == text
