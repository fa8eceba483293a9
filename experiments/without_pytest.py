"""Run test files where pytest is not installed: marks, parameters and plain fixtures, enough for the tests for a GPU.

    failed = run_files([Path("tests/test_kernels_gpu.py")])

What a test asks for beyond that (tmp_path, monkeypatch, parameters of fixtures) is not there: it is left out by name.
"""

import inspect
import itertools
import sys
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType


class Marks(ModuleType):
    """Stands for pytest.mark: `parametrize` is remembered on the function, any other mark does nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: args[0] if args and callable(args[0]) else lambda function: function

    @staticmethod
    def parametrize(names, values, **_):
        names = [x.strip() for x in names.split(",")] if isinstance(names, str) else list(names)
        cases = [dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in values]

        def remember(function):
            function.parameters = [*getattr(function, "parameters", []), cases]
            return function

        return remember


def stand_in() -> ModuleType:
    """Return what stands for the module pytest; asking it for anything but marks and fixtures is an AttributeError."""
    module = ModuleType("pytest")
    module.mark = Marks("pytest.mark")

    def fixture(function=None, autouse=False, **_):
        def remember(function):
            function.is_fixture, function.autouse = True, autouse
            return function

        return remember if function is None else remember(function)

    module.fixture = fixture
    return module


def prepared(function, fixtures: dict, values: dict, stack: ExitStack):
    """Call a test or a fixture with its parameters out of `values`, else out of `fixtures`, each made once."""
    for name in inspect.signature(function).parameters:
        if name not in values:
            values[name] = prepared(fixtures[name], fixtures, values, stack)
    given = {name: values[name] for name in inspect.signature(function).parameters}
    if inspect.isgeneratorfunction(function):
        return stack.enter_context(contextmanager(function)(**given))
    return function(**given)


def missing(function, fixtures: dict, known: set[str]) -> set[str]:
    """Return the names of parameters that nothing provides."""
    found = set()
    for name in inspect.signature(function).parameters:
        if name not in known:
            found |= missing(fixtures[name], fixtures, set()) if name in fixtures else {name}
    return found


def run_files(paths: list[Path], call: bool = True) -> int:
    """Run the tests of these files, print a line for each that fails and return how many do; call=False only loads."""
    if "pytest" not in sys.modules:
        sys.modules["pytest"] = stand_in()
    passed, failed, left_out = 0, 0, []

    def complain(where: str, error: Exception) -> None:
        print(f"FAILED {where}: {type(error).__name__}: {str(error)[:500]}", flush=True)

    for path in paths:
        try:
            shared, module = import_module("conftest"), import_module(path.stem)
        except Exception as error:  # the report is worth more than the first failure
            failed += 1
            complain(path.name, error)
            continue
        fixtures = {k: f for m in (shared, module) for k, f in vars(m).items() if getattr(f, "is_fixture", False)}
        for name, test in vars(module).items():
            if not (name.startswith("test_") and inspect.isfunction(test) and test.__module__ == module.__name__):
                continue
            for case in itertools.product(*getattr(test, "parameters", [])):
                values = {k: v for part in case for k, v in part.items()}
                label = f"{path.name} {name}" + (f"[{', '.join(map(str, values.values()))}]" if values else "")
                if not call or missing(test, fixtures, set(values)):
                    left_out.append(label)
                    continue
                try:
                    with ExitStack() as stack:
                        for automatic in [f for f in fixtures.values() if f.autouse]:
                            prepared(automatic, fixtures, values, stack)
                        prepared(test, fixtures, values, stack)
                    passed += 1
                except Exception as error:
                    failed += 1
                    complain(label, error)
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    print(f"{passed} tests without pytest passed, {failed} failed, {len(left_out)} left out", flush=True)
    return failed
