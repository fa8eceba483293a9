"""The pages walk through the code by line: a link [`code`](file.py#L12) has to lead to a line that holds that code.

python tests/test_docs.py         # after an edit: sets every such line number anew
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[`([^`\n]+)`\]\(((?:\.\./)*[\w./]+\.(?:py|yaml))#L(\d+)\)")


def lines_of(page: Path, target: str) -> list[str]:
    return (page.parent / target).read_text().splitlines()


def test_every_link_into_the_code_leads_to_its_line():
    links = [(page, *link) for page in PAGES for link in LINK.findall(page.read_text())]
    assert len(links) >= 8
    wrong = []
    for page, code, target, number in links:
        lines = lines_of(page, target)
        if int(number) > len(lines) or code not in lines[int(number) - 1]:
            wrong.append(f"{page.name}: `{code}` is not in line {number} of {target}")
    assert not wrong, "\n".join(wrong) + "\nSet the line numbers anew with: python tests/test_docs.py"


def test_every_relative_link_exists():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def main() -> None:
    for page in PAGES:

        def renumbered(match: re.Match, page=page) -> str:
            code, target, _ = match.groups()
            number = next((i for i, line in enumerate(lines_of(page, target), 1) if code in line), None)
            if number is None:
                raise SystemExit(f"{page.name}: {target} has no line with `{code}`: correct the link's text")
            return f"[`{code}`]({target}#L{number})"

        page.write_text(LINK.sub(renumbered, page.read_text()))


if __name__ == "__main__":
    main()
