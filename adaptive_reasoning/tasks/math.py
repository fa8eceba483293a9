"""Math questions: local files, data sets of the hub, and the benchmarks known by name.

A row has `problem` (or `question`) and `answer`, perhaps a `level`; `choices` (CommonsenseQA, OpenBookQA) are written
behind the question, and the answer is the letter. Answers stay text as they are; only GSM8K's worked solutions are cut
down to what follows "####". Grading is `answers.same_answer` or what the algorithm names, through a `GraderPool`.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adaptive_reasoning.core.question import Benchmark, Question, Source
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks.answers import boxed_answer

DATA_FOLDER = "ADAPTIVE_REASONING_DATA"
"""Environment variable: a folder whose <name>_test.jsonl files stand in for the benchmarks of the hub."""

FILE_TYPES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Known:
    """A test set known by name."""

    hub: str  # data set, with ":config" where it has several
    split: str
    samples: int = 1  # responses per question in the paper's tables


BENCHMARKS = {
    "gsm8k": Known("openai/gsm8k:main", "test"),
    "math500": Known("HuggingFaceH4/MATH-500", "test"),
    "math": Known("DigitalLearningGmbH/MATH-lighteval", "test"),
    "csqa": Known("tau/commonsense_qa", "validation"),
    "obqa": Known("allenai/openbookqa:main", "test"),
    "svamp": Known("ChilleD/SVAMP", "test"),
    "bbh": Known("", "test"),
    "aime25": Known("math-ai/aime25", "test", samples=16),
    "aime24": Known("HuggingFaceH4/aime_2024", "train", samples=16),  # 30 questions: one sample each says little
}


PART = re.compile(r"(?:sorted\((?P<sorted>.+)\)|(?P<plain>.+))\[(?P<first>-?\d*):(?P<last>-?\d*)\]")
"""A part of a source, as Python would slice its rows: "gsm8k.jsonl[:100]", "sorted(tau/commonsense_qa)[-4929:]"."""


def load_questions(source: str, limit: int = 0, split: str = "train", beside: str = "") -> list[Question]:
    """Return the questions of a file, a hub data set or a benchmark, in their order.

    Args:
        source: path of a JSONL or Parquet file; else a name in `BENCHMARKS`; else a hub data set, "name:config" for one
            of its configurations. A path that exists wins.
        limit: only the first so many (0: all of them).
        split: split of a hub data set. Files have none, benchmarks their own.
        beside: a local data file; a benchmark's <name>_test.jsonl in its folder is taken rather than the hub's.

    The id of a question is "<file stem or data set>/<row, from 0>". "source[a:b]" is a part of a source, and
    "sorted(source)[a:b]" one in alphabetical order of the problems.

    Raises:
        UserError: file or data set missing, empty or malformed; the message names file and line (or row).
    """
    path, benchmark = Path(source), BENCHMARKS.get(source)
    if (part := PART.fullmatch(source)) and not path.exists():
        return _part(part, load_questions(part["sorted"] or part["plain"], 0, split, beside))[: limit or None]
    if benchmark and not path.exists():
        folders = [Path(f) for f in (os.environ.get(DATA_FOLDER), beside and Path(beside).parent) if f]
        stored = [f / f"{source}_test.jsonl" for f in folders if (f / f"{source}_test.jsonl").is_file()]
        if stored:
            path = stored[0]
        elif not benchmark.hub:
            raise UserError(
                f"{source}: no data set of the hub has it. Put {source}_test.jsonl in the folder {DATA_FOLDER}."
            )
        else:
            return _questions(_hub_rows(benchmark.hub, benchmark.split), source, source, limit)
    elif not path.exists() and path.suffix not in FILE_TYPES and not source.startswith((".", "/", "~")):
        return _questions(_hub_rows(source, split), source.split(":")[0].split("/")[-1], source, limit)
    return _questions(read_rows(path), path.stem, source, limit)


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("<file>, line 3", row) for every row of a JSONL or Parquet file (".parquet").

    Raises:
        UserError: the file is missing, holds no row, or a row is no object; the message names file and line (or row).
    """
    path, where = Path(path), ""
    if not path.is_file():
        names = ", ".join(BENCHMARKS)
        raise UserError(f"{path}: no such file. Give a JSONL or Parquet file, a hub data set, or one of {names}.")
    for where, row in _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with the fields as keys, found {row!r:.80}.")
        yield where, row
    if not where:
        raise UserError(f"{path} is empty. Give a file with one row per question.")


def _questions(rows: Iterable[tuple[str, dict]], stem: str, source: str, limit: int) -> list[Question]:
    questions = []
    for where, row in rows:
        level = row.get("level")
        questions.append(
            Question(
                id=f"{stem}/{len(questions)}",
                problem=_text(row, ("problem", "question", "question_stem", "question_concat"), where)
                + _options(row, where),
                answer=_answer(row, where),
                difficulty=None if level is None else str(level).removeprefix("Level "),
                source=source,
            )
        )
        if not questions[-1].answer:
            raise UserError(
                f"{where}: nothing follows '####' in 'answer'. Give every question an answer, or drop the row."
            )
        if len(questions) == limit:
            break
    if not questions:
        raise UserError(f"Data set {source} is empty. Give one with a row per question.")
    return questions


def _answer(row: dict, where: str) -> str:
    """Return the reference: the answer, what follows "####" in it (GSM8K), or the box of a worked solution (MATH)."""
    if "solution" in row and row.get("answer") is None:
        solution = _text(row, ("solution",), where)
        bare = re.findall(
            r"\\(?:boxed|f?box)\s*\{?([^\s{}$]+)", solution
        )  # "\\boxed 2", "\\fbox{2}": a handful of rows
        boxed = boxed_answer(solution) or (bare[-1] if bare else "")
        if not boxed.strip():
            raise UserError(f"{where}: 'solution' has no \\boxed{{...}}, and there is no 'answer'. Add it.")
        return boxed.strip()
    return _text(row, ("answer", "answerKey", "Answer"), where).rpartition("####")[2].strip()


def _options(row: dict, where: str) -> str:
    """Return the options of a multiple-choice row of the hub as ARM writes them: "\\n(A)one  (B)two", else ""."""
    if "choices" not in row:
        return ""
    choices = row["choices"]
    if not isinstance(choices, dict) or not {"label", "text"} <= set(choices):
        raise UserError(f"{where}: 'choices' needs 'label' and 'text', found {choices!r:.80}.")
    return "\n" + "  ".join(f"({label}){text}" for label, text in zip(choices["label"], choices["text"]))


def _text(row: dict, names: tuple[str, ...], where: str) -> str:
    """Return the first of the fields the row has, as text that is not empty."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        raise UserError(f"{where}: no field '{names[0]}' (fields: {', '.join(map(str, row)) or 'none'}). Add it.")
    if not isinstance(value, str):
        raise UserError(f"{where}: '{names[0]}' has to be text, found {value!r:.80}.")
    if not value.strip():
        raise UserError(f"{where}: '{names[0]}' is empty. Fill it in, or drop the row.")
    return value


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:  # bytes: only "\n" ends a line, and a bad byte is found in its line
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8: {error}. Save the file as UTF-8.") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON: {error}. The file needs one JSON object a line.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow. pip install pyarrow, or give a JSONL file.") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file: {error}") from error
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"Data set {name}: needs datasets. pip install datasets, or give a local file.") from error
    hub, _, config = name.partition(":")
    try:
        rows = load_dataset(hub, config or None, split=split)
    except Exception as error:  # the hub, the network and every data format have exceptions of their own
        raise UserError(
            f"Data set {name}, split {split}, cannot be loaded: {type(error).__name__}: {error}\n"
            f"Check its name (owner/name, owner/name:config) and the network, or give a local JSONL or Parquet file; "
            f"{DATA_FOLDER} names a folder with <benchmark>_test.jsonl files."
        ) from error
    yield from ((f"data set {name}, split {split}, row {i}", row) for i, row in enumerate(rows))


def _part(part: re.Match, questions: list[Question]) -> list[Question]:
    """Return the questions that a match of PART asks for; UserError where there are fewer than it counts on."""
    if part["sorted"]:
        questions = sorted(questions, key=lambda q: q.problem)
    bounds = [int(text) if text else None for text in part.group("first", "last")]
    found = questions[slice(*bounds)]
    if not found or max(abs(b or 0) for b in bounds) > len(questions):
        raise UserError(f"{part[0]}: there are {len(questions)} questions. Ask for a part of these.")
    return found


def source(args, train: bool) -> Source:
    """Return the questions of --data, if they are wanted, and those of --eval_data.

    Raises:
        UserError: no --data where questions are wanted, or one of the sources is missing or malformed.
    """
    sources = [part.strip() for part in args.data.split(",") if part.strip()]
    if train and not sources:
        raise UserError("--data is empty: name JSONL or Parquet files, or data sets of the hub.")
    loaded = [load_questions(source, args.train_limit) for source in sources] if train else []
    whole = [PART.sub(lambda part: part["sorted"] or part["plain"], source) for source in sources]
    beside = next((source for source in whole if Path(source).is_file()), "")
    benchmarks = []
    for name in filter(None, (part.strip() for part in args.eval_data.split(","))):
        known = BENCHMARKS.get(name)
        samples = known.samples if known and known.samples > 1 else args.eval_samples
        asked = load_questions(name, args.eval_limit, split="test", beside=beside)
        benchmarks.append(Benchmark(name if known else Path(name).stem, asked, samples))
    return Source([question for part in loaded for question in part], benchmarks)
