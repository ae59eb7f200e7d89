"""Texts of the status view: fit to be shown, as short as their place, as wide as their line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import datetime

from rich.text import Text


def clean(text: str) -> str:
    """Without control characters: no name and no error message can steer the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def wrapped(
    text: str, width: int, style: str, *, most: int, indent: int = 3, hanging: int = 0
) -> list[Text]:
    """At most so many lines, indented; what does not fit ends in an ellipsis.

    ``hanging``: how much further all but the first are indented.
    """
    lines = textwrap.wrap(
        clean(text),
        max(1, width - 1),
        max_lines=most,
        placeholder="…",
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hanging),
        break_on_hyphens=False,
    )
    return [Text(line, style) for line in lines]


def filled(lines: Sequence[Text], rows: int) -> list[Text]:
    """Exactly so many lines: cut, or with empty ones behind."""
    return [*lines[:rows], *(Text("") for _ in range(rows - len(lines)))]


def fitted(line: Text, width: int) -> Text:
    """The line exactly as wide as that, and whatever it is made of fit to be shown."""
    if not line.plain.isprintable():
        line.plain = clean(line.plain)
    line.truncate(max(0, width), overflow="ellipsis", pad=True)
    return line


def short(number: float) -> str:
    """At most four characters, as in ``12k``."""
    if number < 10 and number != int(number):
        return f"{number:.1f}"
    for unit, size in (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if number < size * 1000:
            return f"{number / size:.0f}{unit}"
    return f"{number / 1e12:.0f}T"


def duration(seconds: float) -> str:
    """In the two largest units, as in ``3m12s``."""
    whole = max(0, int(seconds))
    units = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m")]
    units.append((whole % 60, "s"))
    while units and not units[0][0]:
        del units[0]
    return "".join(f"{count}{unit}" for count, unit in units[:2] if count) or "0s"


def latency(seconds: float) -> str:
    """As in ``9.5ms``, and as a `duration` from a second on."""
    if seconds >= 1:
        return duration(seconds)
    return f"{seconds * 1000:.1f}ms" if seconds < 0.01 else f"{seconds * 1000:.0f}ms"


def clock(at: datetime) -> str:
    """The local time of day."""
    return at.astimezone().strftime("%H:%M:%S")
