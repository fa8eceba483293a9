"""Rows of data files: JSONL, CSV (both also packed with gzip or zstd), Parquet, and a folder of shards.

What a file is shows in its first bytes; only CSV and JSONL are told apart by name. A row is {column: value}; the
columns in `COLUMNS` are found in upper or lower case (`Problem`), the others stay as they are written.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from adaptive_reasoning.errors import UserError

COLUMNS = ("problem", "question", "question_stem", "question_concat", "choices", "options", "solution", "response")
COLUMNS += ("answer", "answerKey", "level", "difficulty", "subject", "input", "target")  # the last two: BBH
COLUMNS += ("context", "final_answer", "subfield")  # OlympiadBench
COLUMNS += ("correct answer", *(f"incorrect answer {i}" for i in (1, 2, 3)), "high-level domain")  # GPQA
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst")
READ = "JSONL, CSV or Parquet"
PACKED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd"}  # first bytes -> name of the codec


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("<file>, line 3", row) for every row of a file or a folder of shards; for Parquet ("<file>, row 2", row).

    Lines count from 1, rows from 0; a row of CSV that goes over several lines has the number of its last. Empty cells
    of CSV are None, all others are text.

    Raises:
        UserError: the file is missing or empty, cannot be read, or a row is no object; the message names file and line
            (or row).
    """
    path, where = Path(path), ""
    for where, row in known_columns(_rows(path)):
        yield where, row
    if not where:
        raise UserError(f"{path} is empty. Give a file with one row per question.")


def stem(path: Path) -> str:
    """Return the name of a file without what says its form: "a" for a.jsonl.gz."""
    return Path(re.sub(r"\.(gz|zst)$", "", path.name, flags=re.IGNORECASE)).stem


def known_columns(rows: Iterable[tuple[str, object]]) -> Iterator[tuple[str, dict]]:
    """Yield the rows with the columns of `COLUMNS` under these names, however they are spelt."""
    spelt = {name.lower(): name for name in COLUMNS}
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with the fields as keys, found {row!r:.80}.")
        out = {}
        for name, value in row.items():
            known = spelt.get(name.strip().lower(), name)
            if out.get(known) is not None and value is not None:
                raise UserError(f"{where}: '{known}' is there twice, in two spellings. Keep one of the columns.")
            if out.get(known) is None:
                out[known] = value
        yield where, out


def table_rows(where: str, batches: Iterable) -> Iterator[tuple[str, dict]]:
    """Yield the rows of Arrow tables, numbered through; a number in single precision is the shortest that reads so."""
    number = 0
    for batch in batches:
        kinds = {field.name: field.type for field in batch.schema if re.search(r"\b(half)?float\b", str(field.type))}
        _once(batch.schema.names, where)
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            yield f"{where}, row {number}", row | {name: _double(kind, row[name]) for name, kind in kinds.items()}
            number += 1


def _double(kind, value):
    """Return 0.1 for the 0.10000000149011612 that Arrow makes of a 0.1 in single precision."""
    if isinstance(value, list):
        return [_double(getattr(kind, "value_type", kind), item) for item in value]
    if isinstance(value, dict):
        kinds = getattr(kind, "item_type", None)  # of a map; a struct has fields
        return {name: _double(kinds or kind.field(name).type, item) for name, item in value.items()}
    single = {"halffloat": np.float16, "float": np.float32}.get(str(kind))
    return value if value is None or single is None else float(str(single(value)))


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        if path.is_dir():
            for shard in _shards(path):
                yield from _rows(shard)
            return
        if not path.is_file():
            raise UserError(f"{path}: no such file. Give a file in {READ}, or a folder with its shards.")
        with path.open("rb") as file:
            head = file.read(4)
        name = path.name.lower()
        if head == b"PAR1" or name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif name.endswith((".csv", ".csv.gz", ".csv.zst")):
            yield from _csv_rows(path, _lines(path, head))
        else:
            yield from _jsonl_rows(_lines(path, head))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. It may be cut off, or not yours to read.") from error


def _shards(folder: Path) -> list[Path]:
    """Return the files of a folder in the order of their numbers.

    Raises:
        UserError: there is none, or their names differ in more than numbers (train-... beside test-...).
    """
    files = [p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(FILE_TYPES)]
    if len({re.sub(r"\d+", "0", p.name) for p in files}) != 1:
        names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
        found = ", ".join(names[:8]) + ", ..." * (len(names) > 8) or "nothing"
        raise UserError(
            f"{folder} is a folder, and not one with the shards of one data set: it holds {found}. Name a file, or a "
            f"folder whose files ({READ}) differ in their numbers alone."
        )
    return sorted(files, key=lambda p: [int(number) for number in re.findall(r"\d+", p.name)])


def _lines(path: Path, head: bytes) -> Iterator[tuple[str, str]]:
    """Yield ("<file>, line 3", text with its end) of a file in UTF-8, unpacked."""
    from pyarrow import input_stream

    codec = next((codec for first, codec in PACKED.items() if head.startswith(first)), None)
    # bytes: only "\n" ends a line, and a bad byte is found in its line
    with io.BufferedReader(input_stream(str(path), compression=codec)) if codec else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                yield where, line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where} is not UTF-8: {error}. Files are {READ}; text is UTF-8, packed with gzip or zstd or not."
                ) from error


def _jsonl_rows(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, object]]:
    for where, text in lines:
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is not JSON: {error}. A file not named .csv or .parquet needs one JSON object a line."
            ) from error
        if re.search(r"\\u[dD][89a-fA-F]", text):  # only so can half of a character get in
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                raise UserError(f"{where}: {half} is half of a character. Mend it, or drop the row.") from error
        yield where, row


def _once(names: list[str], where: str) -> None:
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise UserError(f"{where}: two columns are named {twice[0]!r}. Keep one of them.")


def _csv_rows(path: Path, lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((text for _, text in lines), strict=True)
    header = None
    try:
        for cells in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if header is None:
                header = cells
                _once(header, where)
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where} has {len(cells)} cells, the first line {len(header)}: {header!r:.80}. A cell with a "
                    "comma in it needs quotes."
                )
            yield where, {name: cell or None for name, cell in zip(header, cells)}
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num} is not CSV: {error}. Save the file as CSV with commas."
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield from table_rows(str(path), file.iter_batches())
    except UserError:
        raise
    except (ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
