"""The house: imports go down, no room knows a method, nothing hidden decides what is learnt."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adaptive_reasoning"
METHODS = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
ROOMS = ("errors", "core", "kernels", "tasks", "rollout", "learner", "report", "run", "formats", "benchmark", "ask")
SOURCES = {
    **{p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")},
    **{f"adaptive_reasoning.kernels.{p.stem}": p for p in (ROOT / "kernels").glob("*.py")},
}


def room_of(module: str) -> str:
    """Return the room of a module, "method" for what lies at the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "method"


def imports_of(path: Path) -> set[str]:
    """Return the modules of ours that a file names: in imports anywhere, and in strings that importlib may get."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adaptive_reasoning"):
            for name in node.names:
                deeper = f"{node.module}.{name.name}"
                found.add(deeper if deeper in SOURCES else node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("adaptive_reasoning")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if match := re.fullmatch(r"(adaptive_reasoning(?:\.\w+)+)", node.value):
                found.add(match[1] if match[1] in SOURCES else match[1].rpartition(".")[0])
    return found


def test_every_file_at_the_root_is_a_method_one_can_run():
    assert len(METHODS) >= 7
    for name in METHODS:
        assert re.search(r"^def main\(\) -> None:", (PACKAGE / f"{name}.py").read_text(), re.MULTILINE), name


@pytest.mark.parametrize("module", sorted(m for m in SOURCES if room_of(m) != "method"))
def test_imports_go_down(module):
    """A room imports itself and the rooms below it: so there is no circle of rooms, and no room imports a method."""
    mine = ROOMS.index(room_of(module))
    for other in imports_of(SOURCES[module]):
        if other == "adaptive_reasoning":
            continue
        assert room_of(other) != "method", f"{module} imports the method {other}"
        assert ROOMS.index(room_of(other)) <= mine, f"{module} imports {other}, which stands above it"


def test_there_is_no_circle_of_files():
    graph = {m: {o for o in imports_of(p) if o in SOURCES} - {m} for m, p in SOURCES.items()}
    graph = {m: {o for o in others if not o.endswith("__init__")} for m, others in graph.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in graph[module]:
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


@pytest.mark.parametrize("module", sorted(m for m in SOURCES if room_of(m) != "method"))
def test_no_room_names_a_method(module):
    """Code, not the text around it: names, attributes and strings that are a method's. Docstrings may show examples."""
    tree = ast.parse(SOURCES[module].read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        words = []
        if isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words = re.findall(r"\w+", node.value)
        named = set(words) & (set(METHODS) - {"merge"})
        assert not named, f"{module}, line {node.lineno}: names {named}"


def test_nothing_hidden_decides_what_is_learnt():
    """No option is asked for by name at run time, none is written after parsing, and `info` holds nothing learnt."""
    hidden = re.compile(
        r"(has|get|set)attr\((self\.|run\.)?args\b|\bargs\.\w+ (=|\+=|\|=) |"
        r"info\[\"(forced|correct|values|returns|advantages)\"\]"
    )
    for module, path in SOURCES.items():
        if module == "adaptive_reasoning.run.options":
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not hidden.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_no_file_is_longer_than_450_lines():
    long = {m: n for m, p in SOURCES.items() if (n := len(p.read_text().splitlines())) > 450}
    assert not long
