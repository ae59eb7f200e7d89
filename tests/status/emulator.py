"""A terminal of our own with a program in it: its screen with its styles, its keys, its size."""

from __future__ import annotations

import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import pexpect
import pyte

REPOSITORY = Path(__file__).resolve().parents[2]
BOUND_S = 15.0


def styles_of(screen: pyte.Screen) -> str:
    """Each run of cells that are not plain, a line each: row, columns, attributes and its text."""
    runs = []
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        column = 1
        for style, run in groupby(cells, _style):
            text = "".join(cell.data for cell in run)
            if style:
                runs.append(f"{row + 1}:{column}-{column + len(text) - 1} {style}: {text.strip()}")
            column += len(text)
    return "".join(f"{run.rstrip()}\n" for run in runs)


def _style(cell: pyte.screens.Char) -> str:
    colour = "" if cell.fg == "default" else cell.fg
    words = ("bold" if cell.bold else "", "reverse" if cell.reverse else "", colour)
    return " ".join(word for word in words if word)


class Emulator:
    """`python -m MODULE ARGUMENTS` in a pseudo-terminal; `output` is every byte that it wrote."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        columns: int = 80,
        lines: int = 24,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        plain = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.output = b""
        self._child = pexpect.spawn(
            sys.executable,
            ["-m", module, *arguments],
            dimensions=(lines, columns),
            cwd=str(REPOSITORY),
            env={**plain, "TERM": "xterm-256color", "TZ": "UTC", **(environment or {})},
            timeout=BOUND_S,
            # Tests that run in the background ignore it, and so would the program.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.attributes = termios.tcgetattr(self._child.child_fd)

    @property
    def text(self) -> str:
        """What is on the screen, without the spaces at the ends of lines."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    @property
    def styles(self) -> str:
        """How it is shown; see `styles_of`."""
        return styles_of(self.screen)

    def until(self, condition: Callable[[str], bool], *, bound_s: float = BOUND_S) -> str:
        """Read until the screen's text is as wanted; the text."""
        deadline = time.monotonic() + bound_s
        while not condition(self.text):
            assert time.monotonic() < deadline, f"the screen stayed\n{self.text}"
            self._read(0.1)
        return self.text

    def until_shown(self, *texts: str) -> str:
        return self.until(lambda screen: all(text in screen for text in texts))

    def until_gone(self, text: str) -> str:
        return self.until(lambda screen: text not in screen)

    def type(self, keys: str) -> None:
        self._child.send(keys)

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self.screen.reset()
        self._child.setwinsize(lines, columns)

    def hang_up(self) -> None:
        """Be gone, as a window that is closed."""
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, self._child.child_fd)
        os.close(nothing)

    def signal(self, number: int) -> None:
        self._child.kill(number)

    def wait(self, *, reads: bool = True, bound_s: float = BOUND_S) -> int:
        """Read to the end; the exit code, negative for a signal."""
        deadline = time.monotonic() + bound_s
        while reads and self._read(0.1):
            assert time.monotonic() < deadline, f"it did not end\n{self.text}"
        while self._child.isalive():
            assert time.monotonic() < deadline, "it did not end"
            time.sleep(0.01)
        self.attributes_after = self._attributes()
        status = self._child.exitstatus
        return -self._child.signalstatus if status is None else status

    def close(self) -> None:
        self._child.close(force=True)

    def _attributes(self) -> object:
        fd = self._child.child_fd
        return termios.tcgetattr(fd) if os.isatty(fd) else None

    def _read(self, timeout_s: float) -> bool:
        try:
            data = self._child.read_nonblocking(65_536, timeout_s)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.output += data
        self._stream.feed(data)
        return True
