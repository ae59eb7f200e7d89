"""Stdout as an output: whole batches, and a reader that stalls can be given up on."""

from __future__ import annotations

import os
import select
import stat
import threading
from collections.abc import Sequence

from relay.backends.files.errors import file_errors
from relay.backends.files.output import sync
from relay.errors import NotConnected

_STOP_LOOK_S = 0.2


class StreamOutput:
    """A stream of the process, shared by all that write to it: whole batches take turns.

    Flushed when `append` returns; synced where the stream leads to a regular file. A line that
    could only be written in part is completed before the next one.
    """

    def __init__(self, file: int, name: str) -> None:
        self._file = file
        self._name = name
        self._turn = threading.Lock()
        self._rest = b""

    def writer(self, header: bytes) -> StreamWriter:
        """One sink's access to this stream."""
        return StreamWriter(self, header)

    def write(self, lines: Sequence[bytes], is_stopped: threading.Event) -> None:
        """Write all lines. Raises `Outage`, `ConfigurationError`, `NotConnected` when stopped."""
        while not self._turn.acquire(timeout=_STOP_LOOK_S):
            if is_stopped.is_set():
                raise NotConnected(f"{self._name} was closed while waiting for it")
        try:
            with file_errors("writing", self._name):
                self._write_completely(lines, is_stopped)
        finally:
            self._turn.release()

    def check(self) -> None:
        """Raise `NotConnected` where the process has no such stream."""
        with file_errors("opening it", self._name):
            os.fstat(self._file)

    def _write_completely(self, lines: Sequence[bytes], is_stopped: threading.Event) -> None:
        is_regular = stat.S_ISREG(os.fstat(self._file).st_mode)
        whole = [self._rest, *lines]
        data = memoryview(b"".join(whole))
        written = 0
        try:
            while written < len(data):
                written += (
                    os.write(self._file, data[written:])
                    if is_regular
                    else self._write_some(data[written : written + select.PIPE_BUF], is_stopped)
                )
        finally:
            self._rest = _rest_of_begun(whole, written)
        if is_regular:
            sync(self._file)

    def _write_some(self, data: memoryview, is_stopped: threading.Event) -> int:
        """Wait until the stream takes something; so little never blocks when it says it does."""
        poll = select.poll()
        poll.register(self._file, select.POLLOUT)
        while not poll.poll(_STOP_LOOK_S * 1000):
            if is_stopped.is_set():
                raise NotConnected(f"{self._name} was closed while its reader was not reading")
        return os.write(self._file, data)


class StreamWriter:
    """One sink's access to a stream; ``header`` is written before its first line."""

    def __init__(self, stream: StreamOutput, header: bytes) -> None:
        self._stream = stream
        self._header = header
        self._is_stopped = threading.Event()
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """See `Output`."""
        return self._is_open

    def open(self) -> None:
        """See `Output`."""
        self._stream.check()
        self._is_stopped.clear()
        self._is_open = True

    def append(self, lines: Sequence[bytes]) -> None:
        """See `Output`."""
        if not self._is_open:
            raise NotConnected("the stream is not open")
        try:
            self._stream.write([self._header, *lines] if self._header else lines, self._is_stopped)
        except BaseException:
            self._is_open = False
            raise
        self._header = b""

    def stop(self) -> None:
        """See `Output`."""
        self._is_stopped.set()

    def close(self) -> None:
        """See `Output`; the stream itself belongs to the process."""
        self._is_open = False


def _rest_of_begun(lines: Sequence[bytes], written: int) -> bytes:
    """What is missing from the line in which writing stopped, or from the rest of an older one."""
    for number, line in enumerate(lines):
        if written < len(line):
            return line[written:] if written or number == 0 else b""
        written -= len(line)
    return b""


STDOUT = StreamOutput(1, "stdout")
