"""What a command names: one of ours by a short name, or an object of the user's own, from a module or a file.

package.module.attribute      package.module:attribute      folder/my_file.py:attribute
"""

import importlib
import importlib.util
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from adaptive_reasoning.errors import UserError


def named(name: str, known: dict[str, str], what: str, kind: str = "function"):
    """Return the object that `name` stands for.

    Args:
        known: short name -> "module.attribute".
        what, kind: what it is, for messages: "task", a "function".

    Raises:
        UserError: there is none of that name. An error inside the user's module keeps its traceback.
    """
    module, attribute = module_of(name, known, what, kind)
    try:
        return attrgetter(attribute)(module)
    except AttributeError as error:
        raise UserError(f"{what} {name!r}: the module {module.__name__} has no {attribute!r}.") from error


def module_of(name: str, known: dict[str, str], what: str, kind: str = "function") -> tuple[ModuleType, str]:
    """Return the module that holds what `name` stands for, imported, and its attribute there; as `named`."""
    path = known.get(name, name)
    module, _, attribute = path.rpartition(":" if ":" in path else ".")
    if module.endswith(".py"):
        return of_file(Path(module), f"{what} {name!r}"), attribute
    if not module or not attribute or attribute == "py":
        known_names = f"take {', '.join(known)}, or " if known else "take "
        raise UserError(
            f"there is no {what} {name!r}: {known_names}your own as module.{kind} or path/to/file.py:{kind}."
        )
    try:
        return importlib.import_module(module), attribute
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # a module that the user's module needs
            raise
        raise UserError(
            f"{what} {name!r}: there is no module {error.name!r} on the Python path. Start the command in its folder, "
            f"set PYTHONPATH, or name its file: path/to/file.py:{attribute}."
        ) from error


def of_file(path: Path, who: str) -> ModuleType:
    """Return the module in a file, run once. Its name is the file's path, which no other module has; what lies beside
    it can be imported, as beside a script."""
    name = str(path.expanduser().resolve())
    if name not in sys.modules:
        if not Path(name).is_file():
            raise UserError(f"{who}: there is no file {name}.")
        spec = importlib.util.spec_from_file_location(name, name)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(Path(name).parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def own_code(*modules: ModuleType) -> dict[str, list[str]]:
    """Return {"the file NAME": its text} of the modules that are not ours, for `inputs_of`."""
    files = [m.__file__ for m in modules if not m.__name__.startswith("adaptive_reasoning.") and hasattr(m, "__file__")]
    return {f"the file {Path(file).name}": [Path(file).read_bytes().decode("latin-1")] for file in sorted(set(files))}
