"""What a block says will come out, compared with what came out."""

from __future__ import annotations

import re


def is_as_said(expected: str, actual: str, *, figures_vary: bool = False) -> bool:
    """True where the texts are equal but for ``…``, and for figures where these vary."""
    pattern = "".join(_of_line(line, figures_vary=figures_vary) for line in expected.splitlines())
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in actual.splitlines())) is not None


_ANY_LINES = r"(?:[^\n]*\n)*?"


def _of_line(line: str, *, figures_vary: bool) -> str:
    if line == "…":
        return _ANY_LINES
    parts = [_varied(part) if figures_vary else re.escape(part) for part in line.split("…")]
    return "[^\n]*?".join(parts) + r"\n"


def _varied(part: str) -> str:
    """Any figure for a figure, and as much space as it takes."""
    pieces = re.split(r"(\d+(?:\.\d+)?| +)", part)
    return "".join(
        re.escape(piece) if number % 2 == 0 else " +" if piece.isspace() else r"\d+(?:\.\d+)?"
        for number, piece in enumerate(pieces)
    )
