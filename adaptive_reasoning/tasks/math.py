"""Math questions: local files, data sets of the hub, and the benchmarks known by name.

A row has a problem and an answer, perhaps a level; which columns and files are read is in docs/add_a_task_or_reward.md.
Options of a multiple-choice row are written behind the question as ARM writes them, and the answer is the letter; those
of GPQA, whose right one comes first, are shuffled by a random generator that the question seeds.
Answers stay text as they are; only GSM8K's worked solutions are cut down to what follows "####". Grading is
`answers.same_answer` or what the algorithm names, through a `GraderPool`.
"""

import math
import os
import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from adaptive_reasoning.core.question import Benchmark, Question, Source
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks.answers import boxed_answer
from adaptive_reasoning.tasks.rows import FILE_TYPES, READ, known_columns, read_rows, stem, table_rows

DATA_FOLDER = "ADAPTIVE_REASONING_DATA"
"""Environment variable: a folder whose <name>_test.jsonl files stand in for the benchmarks of the hub."""

PROBLEM = ("problem", "question_concat", "question", "question_stem", "input")
ANSWER = ("answer", "answerKey", "target")
LABEL = ("subfield", "level", "difficulty", "subject", "high-level domain")  # BBH's tasks are its subjects
UNREAD = re.compile(r"(option|choice)s?[ _-]?\w?", re.IGNORECASE)  # option_a, choice1: a column for each option
OWN_LETTER = re.compile(r"\(?([A-Z])[).:]\s*(.+)", re.DOTALL)  # "A) one"


@dataclass(frozen=True)
class Known:
    """A test set known by name."""

    hub: str  # data set, with ":config" where it has several, ":*" for all of them
    split: str
    samples: int = 1  # responses per question in the papers' tables, where a few questions say little
    gated: bool = False  # whether the hub asks for an account that has accepted terms


BENCHMARKS = {
    "gsm8k": Known("openai/gsm8k:main", "test"),
    "math500": Known("HuggingFaceH4/MATH-500", "test"),
    "math": Known("DigitalLearningGmbH/MATH-lighteval", "test"),
    "csqa": Known("tau/commonsense_qa", "validation"),
    "obqa": Known("allenai/openbookqa:main", "test"),
    "svamp": Known("ChilleD/SVAMP", "test"),
    "bbh": Known("SaylorTwift/bbh:*", "test"),
    "minerva": Known("math-ai/minervamath", "test"),
    "olympiad": Known("Hothan/OlympiadBench:OE_TO_maths_en_COMP", "train"),  # text only, in English
    "gpqa": Known("Idavidrein/gpqa:gpqa_diamond", "train", gated=True),
    "amc23": Known("math-ai/amc23", "test", samples=16),  # 40 questions
    "aime25": Known("math-ai/aime25", "test", samples=16),
    "aime24": Known("HuggingFaceH4/aime_2024", "train", samples=16),  # 30 questions
}


PART = re.compile(r"(?:sorted\((?P<sorted>.+)\)|(?P<plain>.+))\[(?P<first>-?\d*):(?P<last>-?\d*)\]")
"""A part of a source, as Python would slice its rows: "gsm8k.jsonl[:100]", "sorted(tau/commonsense_qa)[-4929:]"."""


def load_questions(source: str, limit: int = 0, split: str = "train", beside: str = "") -> list[Question]:
    """Return the questions of a file, a hub data set or a benchmark, in their order.

    Args:
        source: path of a file (JSONL, CSV, Parquet) or a folder of its shards; else a name in `BENCHMARKS`; else a hub
            data set, "name:config" for one of its configurations. A path that exists wins.
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
        if not stored:
            return _questions(_hub_rows(benchmark.hub, benchmark.split, source), source, source, limit)
        path = stored[0]
    elif not path.exists():
        if not source.lower().endswith(FILE_TYPES) and not source.startswith((".", "/", "~")):
            return _questions(_hub_rows(source, split), source.split(":")[0].split("/")[-1], source, limit)
        names = ", ".join(BENCHMARKS)
        raise UserError(f"{path}: no such file. Give a file in {READ}, a hub data set, or one of {names}.")
    return _questions(read_rows(path), stem(path), source, limit)


def _questions(rows: Iterable[tuple[str, dict]], prefix: str, source: str, limit: int) -> list[Question]:
    questions, places = [], {}
    for where, row in rows:
        row = _in_usual_columns(row, where)
        problem, answer, options = _text(row, PROBLEM, where), _answer(row, where), _options(row, where)
        if options:
            written = next((row[name] for name in ANSWER if row.get(name) is not None), None)
            if isinstance(written, int) and "".join(options) == string.ascii_uppercase[: len(options)]:
                places[where] = answer
            problem += "\n" + "  ".join(f"({label}){text}" for label, text in options.items())
            answer = _letter(answer, options, where in places, where)
        label = next((name for name in LABEL if row.get(name) not in (None, "")), None)
        questions.append(
            Question(
                id=f"{prefix}/{len(questions)}",
                problem=problem,
                answer=answer,
                difficulty=label and _as_text(row[label], label, where).removeprefix("Level ").removesuffix(".0"),
                source=source,
            )
        )
        if len(questions) == limit:
            break
    if places and "0" not in places.values():
        where, answer = next(iter(places.items()))
        raise UserError(
            f"{where}: 'answer' {answer} is a place in the list of options, and nothing shows if it counts from 0. "
            "Write the letter."
        )
    if not questions:
        raise UserError(f"Data set {source} is empty. Give one with a row per question.")
    return questions


def _in_usual_columns(row: dict, where: str) -> dict:
    """Return a row of GPQA, OlympiadBench or BBH with its options and answer where other data sets have them."""
    if row.get("correct answer") is not None:
        names = ("correct answer", *(f"incorrect answer {i}" for i in (1, 2, 3)))
        texts = [_text(row, (name,), where) for name in names]
        order = np.random.default_rng(crc32(_text(row, PROBLEM, where).encode())).permutation(len(texts)).tolist()
        row = row | {"options": [texts[i] for i in order], "answer": string.ascii_uppercase[order.index(0)]}
    if isinstance(row.get("final_answer"), list):
        problem = "\n".join(text for text in (row.get("context"), _text(row, PROBLEM, where)) if text)
        row = row | {"problem": problem, "answer": ", ".join(map(str, row["final_answer"]))}
    if letter := re.fullmatch(r"\(([A-Z])\)", str(row.get("target"))):
        row = row | {"target": letter[1]}
    return row


def _answer(row: dict, where: str) -> str:
    """Return the reference: the answer, what follows "####" in it (GSM8K), or the box of a worked solution (MATH)."""
    if row.get("solution") is not None and all(row.get(name) is None for name in ANSWER):
        solution = _text(row, ("solution",), where)
        bare = re.findall(
            r"\\(?:boxed|f?box)\s*\{?([^\s{}$]+)", solution
        )  # "\\boxed 2", "\\fbox{2}": a handful of rows
        boxed = boxed_answer(solution) or (bare[-1] if bare else "")
        if not boxed.strip():
            raise UserError(f"{where}: 'solution' has no \\boxed{{...}}, and there is no 'answer'. Add it.")
        return boxed.strip()
    answer = _text(row, ANSWER, where).rpartition("####")[2].strip()
    if not answer:
        raise UserError(f"{where}: nothing follows '####' in 'answer'. Give every question an answer, or drop the row.")
    return answer


def _options(row: dict, where: str) -> dict[str, str]:
    """Return {label: text} of the options of a row: none, a list, {label: text}, or {"label": [...], "text": [...]}.

    Raises:
        UserError: they are in another form, or one of them is missing; or they are in columns of their own.
    """
    name = next((name for name in ("choices", "options") if row.get(name) is not None), None)
    if name is None:
        alone = next((n for n in row if UNREAD.fullmatch(n) and row[n] is not None), None)
        alone = alone or (row.get("A") is not None and row.get("B") is not None and "A")
        if alone:
            raise UserError(f"{where}: '{alone}' looks like an option. Write the options as a list in 'options'.")
        return {}
    labels, texts = None, row[name]
    if isinstance(texts, list):
        labels = list(string.ascii_uppercase[: len(texts)])
    elif isinstance(texts, dict) and {"label", "text"} <= set(texts):
        labels, texts = texts["label"], texts["text"]
    elif isinstance(texts, dict):
        labels, texts = list(texts), list(texts.values())
    if not (isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts)):
        raise UserError(
            f"{where}: '{name}' has to be a list of texts, or labels with their texts, found {row[name]!r:.80}."
        )
    labels = [_as_text(label, f"{name}: label", where).strip() for label in labels]
    texts = [_as_text(text, f"{name}: {label}", where).strip() for label, text in zip(labels, texts)]
    own = [OWN_LETTER.fullmatch(text) for text in texts]
    if all(own) and [match[1] for match in own] == labels:
        texts = [match[2] for match in own]
    if len(texts) < 2 or len({label.upper() for label in labels}) < len(labels):
        raise UserError(
            f"{where}: '{name}' needs two options or more with labels of their own, found {row[name]!r:.80}."
        )
    return dict(zip(labels, texts))


def _letter(answer: str, options: dict[str, str], place: bool, where: str) -> str:
    """Return the label that the answer means: a label, the text of one option alone, or (place) its number from 0."""
    bare = answer.strip("(). ").upper()
    found = {label for label, text in options.items() if label.upper() == bare or text == answer}
    if place and int(answer) in range(len(options)):
        found.add(list(options)[int(answer)])
    if len(found) != 1:
        raise UserError(
            f"{where}: 'answer' {answer!r:.80} means {'none' if not found else 'more than one'} of the options "
            f"{', '.join(options)}. Write the letter."
        )
    return found.pop()


def _text(row: dict, names: tuple[str, ...], where: str) -> str:
    """Return the first of the fields the row has, as text that is not empty."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        empty = next((name for name in names if name in row), None)
        if empty:
            raise UserError(f"{where}: '{empty}' has no value. Fill it in, or drop the row.")
        raise UserError(f"{where}: no field '{names[0]}' (fields: {', '.join(map(str, row)) or 'none'}). Add it.")
    return _as_text(row[name], names[0], where)


def _as_text(value: object, name: str, where: str) -> str:
    """Return a text as it is and a number written out (0.00001, not 1e-05), else raise UserError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: '{name}' has no value (it is {value}). Fill it in, or drop the row.")
    if isinstance(value, float):
        return np.format_float_positional(value, trim="0")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' has to be text, found {value!r:.80}.")
    if not value.strip():
        raise UserError(f"{where}: '{name}' is empty. Fill it in, or drop the row.")
    return value


def _hub_rows(name: str, split: str, benchmark: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the rows of a data set of the hub; those of ":*" have the configuration as their subject.

    Raises:
        UserError: it cannot be loaded; for a benchmark the message says how to fetch it elsewhere.
    """
    try:
        from datasets import get_dataset_config_names, load_dataset
    except ImportError as error:
        raise UserError(f"Data set {name}: needs datasets. pip install datasets, or give a local file.") from error
    hub, _, config = name.partition(":")
    try:
        configs = get_dataset_config_names(hub) if config == "*" else [config or None]
        parts = {each: load_dataset(hub, each, split=split).with_format("arrow") for each in configs}
    except Exception as error:  # the hub, the network and every data format have exceptions of their own
        mend = (
            f"Check its name (owner/name, owner/name:config) and the network, or give a local file ({READ}); "
            f"{DATA_FOLDER} names a folder with <benchmark>_test.jsonl files."
        )
        if benchmark:
            login = f"Accept its terms at https://huggingface.co/datasets/{hub} and log in with `hf auth login`. "
            mend = login * BENCHMARKS[benchmark].gated + (
                f"For a machine without the network, `python -m adaptive_reasoning.tasks.fetch {benchmark}` on another "
                f"writes {benchmark}_test.jsonl: put it in a folder that {DATA_FOLDER} names, or beside --data."
            )
        raise UserError(
            f"Data set {name}, split {split}, cannot be loaded: {type(error).__name__}: {error}\n{mend}"
        ) from error
    for each, data in parts.items():
        for where, row in known_columns(table_rows(f"data set {name}, split {split}", data.iter(1000))):
            yield where, row | {"subject": each} if config == "*" else row


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
        raise UserError("--data is empty: name files (JSONL, CSV, Parquet), or data sets of the hub.")
    loaded = [load_questions(source, args.train_limit) for source in sources] if train else []
    whole = [PART.sub(lambda part: part["sorted"] or part["plain"], source) for source in sources]
    beside = next((source for source in whole if Path(source).exists()), "")
    benchmarks = []
    for name in filter(None, (part.strip() for part in args.eval_data.split(","))):
        known = BENCHMARKS.get(name)
        samples = known.samples if known and known.samples > 1 else args.eval_samples
        asked = load_questions(name, args.eval_limit, split="test", beside=beside)
        benchmarks.append(Benchmark(name if known else stem(Path(name)), asked, samples))
    return Source([question for part in loaded for question in part], benchmarks)
