"""What a command names: one of ours by a short name, or an object of the user's own by "module.attribute"."""

import importlib

from adaptive_reasoning.errors import UserError


def named(name: str, known: dict[str, str], what: str, kind: str = "function"):
    """Return the object that `name` stands for.

    Args:
        known: short name -> "module.attribute".
        what, kind: what it is, for messages: "task", a "function".

    Raises:
        UserError: there is none of that name. An import error inside the user's module keeps its traceback.
    """
    module, _, attribute = known.get(name, name).rpartition(".")
    if not module:
        raise UserError(f"there is no {what} {name!r}: take {', '.join(known)}, or your own as module.{kind}.")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # a module that the user's module needs
            raise
        raise UserError(
            f"{what} {name!r}: there is no module {error.name!r} on the Python path. Start the command in its folder, "
            "or set PYTHONPATH."
        ) from error
    if found is None:
        raise UserError(f"{what} {name!r}: the module {module} has no {attribute!r}.")
    return found
