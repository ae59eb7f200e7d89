"""A progress bar for work that takes long and is done once."""

from __future__ import annotations

import sys

_CELLS = 30


def bar(part: float) -> str:
    """So much of the whole, 0 to 1, as in ``[######......]``."""
    done = round(_CELLS * min(1.0, max(0.0, part)))
    return f"[{'#' * done}{'.' * (_CELLS - done)}]"


class Progress:
    """One line of standard error, written again and again; nothing where that is no terminal."""

    def __init__(self, *, is_wanted: bool = True) -> None:
        self._is_shown = is_wanted and sys.stderr.isatty()

    def show(self, done: int, total: int, what: str) -> None:
        """What is done by now, and in words. Whatever is written next takes its place."""
        if self._is_shown:
            sys.stderr.write(f"{bar(done / total if total else 0.0)} {what}\x1b[K\r")
            sys.stderr.flush()

    def clear(self) -> None:
        """Take it off the screen."""
        if self._is_shown:
            sys.stderr.write("\x1b[K")
            sys.stderr.flush()
