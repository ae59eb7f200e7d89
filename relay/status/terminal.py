"""One terminal, taken over for full-screen drawing and restored on every way out.

Drawing and writing happen in a thread that always takes the latest frame: a terminal that does
not take its output costs frames, and holds up nobody. Only lines that have changed are written.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable, Sequence
from functools import partial

from relay.status.keys import KeyReader

Drawing = Callable[[int, int], Sequence[str]]

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"
_LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
# Terminals that know it show everything in between at once; the others ignore it.
_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h", "\x1b[?2026l"
_ESCAPE_WAIT_S = 0.05
_CLOSE_WAIT_S = 0.5
_FALLBACK_SIZE = (80, 24)


def can_show() -> bool:
    """Whether this process has a terminal for itself, able to draw on."""
    try:
        is_foreground = os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    except (OSError, ValueError, AttributeError):
        return False
    return is_terminal and is_foreground and os.environ.get("TERM", "dumb") != "dumb"


class Terminal:
    """Standard input and output as a screen and keys.

    ``on_key`` gets each key (see `KeyReader`), ``on_gone`` is called when the terminal hangs up or
    its drawing fails, with the error if there is one; both in the event loop's thread.
    """

    def __init__(
        self, on_key: Callable[[str], None], on_gone: Callable[[BaseException | None], None]
    ) -> None:
        self._on_key = on_key
        self._on_gone = on_gone
        self._input = sys.stdin.fileno()
        self._output = sys.stdout.fileno()
        self._keys = KeyReader()
        self._frames = _Frames(self._output)
        self._restore_input: Callable[[], None] | None = None
        self._escape: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """True while the frame given last has not been begun."""
        return self._frames.is_waiting

    def open(self) -> None:
        """Take the terminal over. To be undone with `close`."""
        loop = asyncio.get_running_loop()
        sys.stdout.flush()
        # Not TCSADRAIN: a terminal that takes no output would never return.
        self._restore_input = partial(
            termios.tcsetattr, self._input, termios.TCSANOW, termios.tcgetattr(self._input)
        )
        atexit.register(self.restore)
        try:
            _take_keys_singly(self._input)
            self._frames.start(lambda error: loop.call_soon_threadsafe(self._on_gone, error))
            loop.add_reader(self._input, self._read)
        except BaseException:
            self.restore()
            raise

    def show(self, drawing: Drawing) -> None:
        """Draw this next; ``drawing`` is called in another thread, with width and height."""
        self._frames.show(drawing)

    def redraw(self) -> None:
        """Write the next frame in full, whatever the screen seems to have."""
        self._frames.forget()

    def close(self) -> None:
        """Stop reading and drawing and give the terminal back. Idempotent."""
        with contextlib.suppress(OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._input)
        if self._escape is not None:
            self._escape.cancel()
        self.restore()

    def restore(self) -> None:
        """Give the terminal back, from any thread and without an event loop. Idempotent."""
        restore_input, self._restore_input = self._restore_input, None
        if restore_input is None:
            return
        atexit.unregister(self.restore)
        self._frames.stop()
        with contextlib.suppress(OSError, termios.error):
            restore_input()
        with contextlib.suppress(OSError):
            if select.select((), (self._output,), (), 0)[1]:
                os.write(self._output, _LEAVE.encode())

    def _read(self) -> None:
        try:
            data = os.read(self._input, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._input)
            self._on_gone(None)
            return
        if self._escape is not None:
            self._escape.cancel()
        self._tell(self._keys.feed(data))
        if self._keys.is_waiting:
            loop = asyncio.get_running_loop()
            self._escape = loop.call_later(_ESCAPE_WAIT_S, lambda: self._tell(self._keys.flush()))

    def _tell(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._on_key(key)


class _Frames:
    """The thread that draws and writes."""

    def __init__(self, output: int) -> None:
        self._output = output
        self._changed = threading.Condition()
        self._next: Drawing | None = None
        self._is_stopping = False
        self._on_screen: Sequence[str] = ()
        self._size = (0, 0)
        self._on_gone: Callable[[BaseException], object] = lambda _: None
        self._thread = threading.Thread(target=self._run, name="status view", daemon=True)

    @property
    def is_waiting(self) -> bool:
        return self._next is not None

    def start(self, on_gone: Callable[[BaseException], object]) -> None:
        self._on_gone = on_gone
        self._thread.start()

    def show(self, drawing: Drawing) -> None:
        with self._changed:
            self._next = drawing
            self._changed.notify()

    def forget(self) -> None:
        self._size = (0, 0)

    def stop(self) -> None:
        """End the thread, unless a stalled terminal holds it; then it ends with the process."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_WAIT_S)

    def _run(self) -> None:
        try:
            self._write(_ENTER)
            while (drawing := self._taken()) is not None:
                self._draw(drawing)
        except Exception as error:  # noqa: BLE001 - a frame that fails ends the view, not the relay
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to call
                self._on_gone(error)

    def _taken(self) -> Drawing | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or self._next is not None)
            drawing, self._next = self._next, None
            return None if self._is_stopping else drawing

    def _draw(self, drawing: Drawing) -> None:
        size = _size_of(self._output)
        if size != self._size:
            self._on_screen, self._size = (), size
        lines = drawing(*size)
        written = [] if self._on_screen else ["\x1b[2J"]
        for row, line in enumerate(lines):
            if row >= len(self._on_screen) or self._on_screen[row] != line:
                written.append(f"\x1b[{row + 1};1H{line}\x1b[0m")
        self._on_screen = lines
        if written:
            self._write(f"{_BEGIN_FRAME}{''.join(written)}{_END_FRAME}")

    def _write(self, text: str) -> None:
        rest = memoryview(text.encode("utf-8", "replace"))
        while rest:
            try:
                rest = rest[os.write(self._output, rest) :]
            except BlockingIOError:
                select.select((), (self._output,), (), 1.0)


def _take_keys_singly(terminal: int) -> None:
    """Keys at once and without echo. Ctrl-C stays a signal; Ctrl-Z would leave a drawn screen."""
    tty.setcbreak(terminal, termios.TCSANOW)
    attributes = termios.tcgetattr(terminal)
    attributes[6][termios.VSUSP] = os.fpathconf(terminal, "PC_VDISABLE").to_bytes(1, "little")
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)


def _size_of(terminal: int) -> tuple[int, int]:
    try:
        size = os.get_terminal_size(terminal)
    except OSError:
        return _FALLBACK_SIZE
    return (size.columns, size.lines) if size.columns and size.lines else _FALLBACK_SIZE
