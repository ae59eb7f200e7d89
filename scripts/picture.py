"""Draws docs/status.svg: the demo's screen while its NATS server is dead, as a terminal shows it.

Runs the demo itself, in a pseudo-terminal, and presses the key that kills NATS.
"""

from __future__ import annotations

import re
import sys
from io import StringIO
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

from tests.status.emulator import Emulator

PICTURE = Path(__file__).parent.parent / "docs" / "status.svg"
COLUMNS, LINES = 108, 24

_BOUND_S = 120.0
# A minute's trend that has both in it: orders that flow, and orders that wait.
_RUNS_FOR_S, _DEAD_FOR_S = 20, 14


def main() -> int:
    terminal = Emulator("relay", ["demo"], columns=COLUMNS, lines=LINES)
    try:
        terminal.until(lambda screen: _up_s(screen) >= _RUNS_FOR_S, bound_s=_BOUND_S)
        terminal.type("x")
        dead_since_s = _up_s(terminal.until_shown("NATS is dead"))
        terminal.until(
            lambda screen: (
                "2 of 2 pipelines unwell" in screen and _up_s(screen) >= dead_since_s + _DEAD_FOR_S
            ),
            bound_s=_BOUND_S,
        )
        PICTURE.write_text(svg_of(terminal.screen), encoding="utf-8")
        terminal.type("qy")
        return terminal.wait(bound_s=_BOUND_S)
    finally:
        terminal.close()


def svg_of(screen: pyte.Screen) -> str:
    """The screen as it is, with its colours."""
    console = Console(record=True, width=screen.columns, file=StringIO(), force_terminal=True)
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        line = Text(end="")
        for style, run in groupby(cells, _style):
            line.append("".join(cell.data for cell in run), style)
        console.print(line, no_wrap=True, crop=True, end="\n")
    svg = console.export_svg(title="scripts/demo", unique_id="demo")
    # Whoever shows the picture loads nothing from elsewhere; any monospace font fits.
    return re.sub(r"\s*@font-face \{.*?\n    \}", "", svg, flags=re.DOTALL)


def _style(cell: pyte.screens.Char) -> str:
    colour = {"default": "", "brown": "yellow"}.get(cell.fg, cell.fg)
    words = ("bold" if cell.bold else "", "reverse" if cell.reverse else "", colour)
    return " ".join(word for word in words if word)


def _up_s(screen: str) -> int:
    up = re.search(r"up (\d+)s", screen)
    return int(up[1]) if up else 0


if __name__ == "__main__":
    sys.exit(main())
