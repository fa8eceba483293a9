"""Files of a run folder, written so that a process killed at any moment leaves them readable.

JSON lines are appended whole and flushed; everything else goes to a temporary file in the same folder, is synced and
renamed. NaN and infinity are not JSON: they become null on the way out.
"""

import json
import math
import os
from pathlib import Path

from adaptive_reasoning.errors import UserError


def append_jsonl(path: Path, obj: dict) -> None:
    """Append `obj` as one line and flush. NaN and infinities become null. A torn last line is removed first.

    Raises:
        TypeError: a value that JSON cannot hold (a tensor, a NumPy scalar).
        UserError: the disk is full, or the file cannot be written. The torn line goes with the next append or resume.
    """
    line = _to_json(obj).encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes its JSON escape
    try:
        with open(path, "ab", buffering=0) as file:
            _mend_tail(path)
            while line:
                line = line[file.write(line) :]
    except OSError as error:
        raise _cannot_write(path, error) from error


def read_jsonl(path: Path) -> list[dict]:
    """Return the objects of a JSON-lines file; [] if there is no such file.

    A last line without its newline that does not parse is what a killed process leaves behind: it is dropped.

    Raises:
        UserError: any other line that is not a JSON object; names the file and the line.
    """
    return [obj for _, obj in _lines(path)]


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop the rows with step > `last_step`, and a torn last line; the rows kept stay byte for byte the same.

    Used on resume: rows after the last checkpoint are written again. A file that does not exist is left alone.

    Raises:
        UserError: a broken line, or a row without "step"; names the file and the line.
    """
    if not Path(path).is_file():
        return
    kept = []
    for number, (raw, obj) in enumerate(_lines(path), start=1):
        if not isinstance(obj.get("step"), int):
            raise UserError(f'{path}, line {number}: no whole number under "step". Delete that line and start again.')
        if obj["step"] <= last_step:
            kept.append(raw + b"\n")
    write_bytes_atomic(path, b"".join(kept))


def write_json_atomic(path: Path, obj) -> None:
    """Write `obj` as indented JSON: either the old file or the whole new one is found there. NaN becomes null."""
    write_bytes_atomic(path, (_to_json(obj, indent=2) + "\n").encode("utf-8", "backslashreplace"))


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8: either the old file or the whole new one is found there. Lone surrogates become "?"."""
    write_bytes_atomic(path, text.encode("utf-8", "replace"))


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file in the same folder, sync it, rename it to `path`, sync the folder.

    Raises:
        UserError: the disk is full, or the file cannot be written; what was there before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself is only safe once the folder is on disk
        finally:
            os.close(folder)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}. Free some space or mend the permissions, and start the same "
        "command again: it continues the run."
    )


def _to_json(obj, indent: int | None = None) -> str:
    return json.dumps(_finite(obj), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value):
    """Return `value` with every NaN and infinity replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _lines(path: Path) -> list[tuple[bytes, dict]]:
    """Return (raw line without newline, object) of every line; the only place that decides what a torn line is."""
    if not Path(path).is_file():
        return []
    *whole, tail = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, raw in enumerate(whole, start=1):
        obj = _parse(raw)
        if obj is None:
            raise UserError(
                f"{path}, line {number}: not a JSON object: {raw[:60]!r}. "
                "Only the last line of a killed run can be torn, so the file was changed or damaged: "
                "delete that line, or restore the file."
            )
        rows.append((raw, obj))
    last = _parse(tail)
    return rows if last is None else rows + [(tail, last)]


def _parse(raw: bytes) -> dict | None:
    try:
        obj = json.loads(raw.decode("utf-8"), parse_constant=lambda _: None)  # NaN from another writer
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number without end, brackets without end
        return None
    return obj if isinstance(obj, dict) else None


def _mend_tail(path: Path) -> None:
    """Make the file end with a newline: finish a whole last line, cut a torn one, so that no append glues onto it."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        data = file.read()
        start = data.rfind(b"\n") + 1
        if _parse(data[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def load_json(path: Path):
    """Return the content of a JSON file; UserError with file and place where it is broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}. Restore it, or start anew elsewhere.") from error
