"""A page of the documentation: its blocks, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Executed from top to bottom, and section by section.
WHOLE_PAGES = (
    "README.md",
    "docs/RELAY.md",
    "docs/SQL.md",
    "docs/OPERATIONS.md",
    "docs/QUESTIONS.md",
)
SECTIONED_PAGE = "docs/PATTERNS.md"
EXECUTED_PAGES = (*WHOLE_PAGES, SECTIONED_PAGE)

EVENTUALLY, BACKGROUND, FIGURES_VARY = "eventually", "in the background", "figures vary"
NOT_EXECUTED = "not executed: "

_COMMENT = re.compile(r"<!-- (.*) -->")
_FENCE = re.compile(r"```(\w*)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`\n]*`")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line`` is that of its fence, counted from 1."""

    page: str
    line: int
    language: str
    text: str
    marker: str
    section: str = ""
    """The nearest heading of the second level above; empty before the first."""

    @property
    def reason_not_executed(self) -> str | None:
        """Why it is not executed; None where it is."""
        if not self.marker.startswith(NOT_EXECUTED):
            return None
        return self.marker.removeprefix(NOT_EXECUTED)

    @property
    def place(self) -> str:
        """Where to look."""
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    """The text of a page of the repository."""
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = read(page).splitlines()
    number = 0
    section = ""
    while number < len(lines):
        if lines[number].startswith("## "):
            section = lines[number].removeprefix("## ")
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        end = lines.index("```", number + 1)
        comment = _COMMENT.fullmatch(lines[number - 1]) if number else None
        found.append(
            Block(
                page=page,
                line=number + 1,
                language=fence[1],
                text="\n".join(lines[number + 1 : end]),
                marker="" if comment is None or _is_of_a_part(comment[1]) else comment[1],
                section=section,
            )
        )
        number = end + 1
    return found


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(anchor)
    return found


def links(page: str) -> Iterator[str]:
    """The targets of a page's links."""
    yield from _LINK.findall(_CODE.sub("", prose(page)))


def _is_of_a_part(comment: str) -> bool:
    return comment.startswith(("generated: ", "end: "))
