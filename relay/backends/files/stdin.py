"""Stdin as a source: read without blocking the event loop, by one pipeline at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from relay.backends.files.errors import file_errors
from relay.backends.files.line import Entry, Line, LineBuffer, decode_line
from relay.backends.files.options import DEFAULT_MAX_LINE_BYTES, FileSourceOptions
from relay.context import BackendContext
from relay.contracts import Batch, NothingExpires, sorted_out
from relay.errors import ConfigurationError, EndOfInput, NotConnected

IDLE_POLL_S = 1.0

_CHUNK_BYTES = 256 * 1024


class StdinInput:
    """A stream of the process, read by one pipeline at a time.

    ``undelivered`` holds what was read and is in nobody's hands; it stays here when a pipeline
    releases it, so that the next one on this stream loses nothing.
    """

    def __init__(self, file: int, name: str = "stdin") -> None:
        self.name = name
        self.undelivered: deque[Entry] = deque()
        self._file = file
        self._owner = threading.Lock()
        self._lines = LineBuffer(0, DEFAULT_MAX_LINE_BYTES)
        self._is_ended = False
        self._wake_reader, self._wake_writer = -1, -1

    @property
    def is_exhausted(self) -> bool:
        """True when everything up to the end of the stream was taken."""
        is_read = self._is_ended and not self._lines.has_part_of_a_line
        return is_read and not self.undelivered

    def claim(self, max_line_bytes: int) -> None:
        """Become the one reader. Raises `ConfigurationError` where there is one."""
        if not self._owner.acquire(blocking=False):
            raise ConfigurationError(
                f"{self.name} is being read by another pipeline",
                remedy="only one pipeline can have it",
            )
        try:
            with file_errors("opening it", self.name):
                os.fstat(self._file)
                self._wake_reader, self._wake_writer = os.pipe()
        except BaseException:
            self._owner.release()
            raise
        os.set_blocking(self._wake_writer, False)
        self._lines.max_line_bytes = max_line_bytes

    def release(self) -> None:
        """Let another pipeline read; only by the one that has claimed it."""
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        self._owner.release()

    def interrupt(self) -> None:
        """Make a `read` that waits return now. Callable from any thread, while claimed."""
        # Where the pipe is full there are reasons enough to wake up.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"!")

    def read(self, max_lines: int, max_bytes: int, timeout_s: float) -> list[Line]:
        """The next lines; waits for so long where there are none. Raises `Outage`."""
        lines: list[Line] = []
        taken = 0
        deadline = time.monotonic() + timeout_s
        with file_errors("reading", self.name):
            while len(lines) < max_lines and taken < max_bytes:
                line = self._lines.next()
                if line is None and self._is_ended:
                    line = self._lines.finish()
                    if line is None:
                        break
                if line is not None:
                    lines.append(line)
                    taken += line.end - line.offset
                elif not self._fill(0 if lines else deadline - time.monotonic()):
                    break
        return lines

    def _fill(self, timeout_s: float) -> bool:
        """Read what is there; False when the wait is over without anything."""
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        poll.register(self._wake_reader, select.POLLIN)
        ready = {file for file, _ in poll.poll(max(0.0, timeout_s) * 1000)}
        if self._wake_reader in ready:
            os.read(self._wake_reader, _CHUNK_BYTES)
        if self._file not in ready:
            return False
        chunk = os.read(self._file, _CHUNK_BYTES)
        self._is_ended = not chunk
        self._lines.feed(chunk)
        return True


STDIN = StdinInput(0)


class StdinSource(NothingExpires):
    """Reads the lines of stdin.

    Within the process nothing is lost: what was not acknowledged goes to the next source on the
    same input. Beyond the process there is no position to go back to.
    """

    def __init__(
        self, options: FileSourceOptions, stdin: StdinInput, context: BackendContext
    ) -> None:
        self._options = options
        self._stdin = stdin
        self._context = context
        self._thread: ThreadPoolExecutor | None = None
        self._sequence = 0
        self._out: dict[int, Sequence[Entry]] = {}
        self._is_interrupted = False

    async def connect(self) -> None:
        """Become the one reader of stdin."""
        if self._thread is None:
            self._stdin.claim(self._options.max_line_bytes)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="stdin-source")
        self._release_from(0)

    async def poll(self) -> Batch:
        """See `relay.contracts.Source`."""
        thread = self._thread
        if thread is None:
            raise NotConnected("stdin is not open")
        if not self._stdin.undelivered:
            timeout_s = 0.0 if self._is_interrupted else IDLE_POLL_S
            # A poll that is cut off leaves what it reads in the input, not in its own hands.
            await asyncio.get_running_loop().run_in_executor(thread, self._read, timeout_s)
        self._is_interrupted = False
        undelivered = self._stdin.undelivered
        size = min(self._context.batch_size, len(undelivered))
        entries = [undelivered.popleft() for _ in range(size)]
        if entries:
            return self._batch(entries)
        if self._stdin.is_exhausted:
            raise EndOfInput
        return Batch(is_end_of_backlog=True)

    def interrupt(self) -> None:
        """See `relay.contracts.Source`."""
        self._is_interrupted = True
        if self._thread is not None:
            self._stdin.interrupt()

    async def acknowledge(self, batch: Batch) -> None:
        """Forget the batch."""
        if isinstance(batch.position, int):
            self._out.pop(batch.position, None)

    async def reject(self, batch: Batch) -> None:
        """Hand the batch out again, and those behind it."""
        if isinstance(batch.position, int) and batch.position in self._out:
            self._release_from(batch.position)

    async def is_healthy(self) -> bool:
        """True while stdin is ours."""
        return self._thread is not None

    async def aclose(self) -> None:
        """Release stdin; what was not acknowledged stays for the next source on it."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._release_from(0)
        self._stdin.interrupt()
        releasing = asyncio.get_running_loop().run_in_executor(thread, self._stdin.release)
        thread.shutdown(wait=False)
        with contextlib.suppress(OSError):
            await asyncio.shield(releasing)

    def _read(self, timeout_s: float) -> None:
        """Runs in the thread: read lines and leave them, decoded, in the input."""
        context, options = self._context, self._options
        lines = self._stdin.read(context.batch_size, context.batch_bytes, timeout_s)
        self._stdin.undelivered.extend(
            decode_line(
                line, options.content, str(uuid.uuid4()), self._stdin.name, options.max_line_bytes
            )
            for line in lines
        )

    def _batch(self, entries: Sequence[Entry]) -> Batch:
        self._sequence += 1
        self._out[self._sequence] = entries
        messages, rejected = sorted_out(entries)
        return Batch(
            messages=messages,
            rejected=rejected,
            position=self._sequence,
            checkpoint=str(self._sequence),
        )

    def _release_from(self, sequence: int) -> None:
        for number in sorted((known for known in self._out if known >= sequence), reverse=True):
            self._stdin.undelivered.extendleft(reversed(self._out.pop(number)))
