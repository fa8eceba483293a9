"""Votes: answers of several responses to one question made into one, from the graded rows of an evaluation."""


def consensus(rows_of: dict[str, list[dict]], asked: tuple[str, ...], fallback: str) -> list[dict]:
    """Return the rows of the setting "consensus", made from the rows of the settings that it asks.

    Where the answers of `asked` are the same text, and none is missing, that is the answer; else it is that of the
    setting `fallback`, whose tokens are spent as well. A row has the mode of the response whose answer it takes.
    """
    cheap, last = [by_sample(rows_of[setting]) for setting in asked], by_sample(rows_of[fallback])
    rows = []
    for key in cheap[0]:
        found = [rows[key] for rows in cheap]
        answers = {r["answer"] for r in found}
        agreed = len(answers) == 1 and None not in answers
        taken = found[0] if agreed else last[key]
        tokens = sum(r["tokens"] for r in found) + (0 if agreed else taken["tokens"])
        rows.append({**taken, "tokens": tokens, "fallback": not agreed})
    return rows


def by_sample(rows: list[dict]) -> dict[tuple[int, int], dict]:
    return {(row["question"], row["sample"]): row for row in rows}


def majority(rows: list[dict], k: int, grader) -> dict[int, list[bool]]:
    """Return {question: [whether its most frequent answer of the first k samples is right]}: maj@k is their mean.

    Two answers are peers if they are the same text without spaces and dollar signs, or else by the grader, the earlier
    one as its reference: math-verify for numbers and LaTeX, the same letter for letters. Ties go to the earliest, a
    missing answer has no vote, and a question without any answer is wrong.
    """
    questions: dict[int, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["sample"]):
        questions.setdefault(row["question"], []).append(row)
    voters = {i: [r for r in part[:k] if r["answer"] is not None] for i, part in questions.items()}

    def key(row):
        return row["answer"].replace(" ", "").replace("$", "")

    for i, part in voters.items():
        texts = list({key(r): r["answer"] for r in reversed(part)}.items())[::-1]  # different ones, earliest first
        for n, (text, answer) in enumerate(texts):
            for earlier, reference in texts[:n]:
                grader.submit(answer, reference, (i, earlier, text))
    same = {pair for pair, grade in grader.drain().items() if grade.correct}

    def peers(i, row):
        a = key(row)
        return sum(key(r) == a or (i, key(r), a) in same or (i, a, key(r)) in same for r in voters[i])

    winners = {i: max(part, key=lambda r: peers(i, r)) if part else None for i, part in voters.items()}
    return {i: [bool(r and r["correct"])] for i, r in winners.items()}
