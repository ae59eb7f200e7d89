"""Where entries go: into the ring, and over a queue to standard error."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Literal, TextIO

from relay.log.entry import LogEntry, entry_of
from relay.settings import LogSettings

RING_ENTRIES = 1000

_LIBRARIES = (
    "aio_pika",
    "aioboto3",
    "aiobotocore",
    "aiohttp",
    "aiokafka",
    "aiormq",
    "asyncio",
    "boto3",
    "botocore",
    "httpcore",
    "httpx",
    "hydra",
    "nats",
    "redis",
    "urllib3",
)
_QUEUE_ENTRIES = 10_000
_WRITTEN_AT_ONCE = 200
_FLUSH_S = 2.0


class LogRing:
    """The last `RING_ENTRIES` entries."""

    def __init__(self) -> None:
        self._entries: deque[LogEntry] = deque(maxlen=RING_ENTRIES)

    def append(self, entry: LogEntry) -> None:
        """Add one; the oldest goes. Called from any thread."""
        self._entries.append(entry)

    def entries(self) -> Sequence[LogEntry]:
        """All that is kept, the oldest first."""
        return tuple(self._entries)


class Logs:
    """The configured logging of this process: its ring, and whether standard error is used."""

    def __init__(
        self, ring: LogRing, writer: _Writer, handler: _Funnel, restore: Callable[[], None]
    ) -> None:
        self.ring = ring
        self._writer = writer
        self._handler = handler
        self._restore = restore

    @property
    def dropped(self) -> int:
        """Entries that standard error did not take in time."""
        return self._writer.dropped

    def show_on_stderr(self, *, shown: bool) -> None:
        """Off while a view has the screen; the ring gets every entry in either case."""
        self._handler.writes = shown

    def close(self) -> None:
        """Write what is queued, for at most two seconds, and restore logging. Idempotent."""
        atexit.unregister(self.close)
        restore, self._restore = self._restore, _nothing
        restore()
        self._writer.close()


def configure(
    settings: LogSettings, mask: Callable[[str], str], *, stream: TextIO | None = None
) -> Logs:
    """Make logging of this process ours: level, format, masking; libraries at warnings only.

    ``stream`` is standard error unless given. What is still queued is written at exit.
    """
    stream = sys.stderr if stream is None else stream
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    ring = LogRing()
    writer = _Writer(stream, _format_of(settings.format, stream))
    handler = _Funnel(ring, writer, mask)
    restore = _take_over(handler, level)
    logs = Logs(ring, writer, handler, restore)
    atexit.register(logs.close)
    return logs


def _take_over(handler: logging.Handler, level: int) -> Callable[[], None]:
    """Put the handler in the place of all others; returns what undoes it."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)

    def restore() -> None:
        logging.captureWarnings(False)
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        for name, former in levels.items():
            logging.getLogger(name).setLevel(former)

    return restore


def _nothing() -> None:
    """What is left to restore once it was restored."""


def _format_of(name: Literal["text", "json"], stream: TextIO) -> Callable[[LogEntry], str]:
    if name == "json":
        return LogEntry.as_json
    colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return lambda entry: entry.as_text(colour=colour)


class _Funnel(logging.Handler):
    """Makes a masked entry of each record and hands it on. Never raises, never waits."""

    def __init__(self, ring: LogRing, writer: _Writer, mask: Callable[[str], str]) -> None:
        super().__init__()
        self._ring = ring
        self._writer = writer
        self._mask = mask
        self.writes = True

    def emit(self, record: logging.LogRecord) -> None:
        try:
            entry = entry_of(record, self._mask)
        except Exception as error:  # noqa: BLE001 - a wrong log call costs no more than its text
            entry = LogEntry(
                at=datetime.fromtimestamp(record.created, UTC),
                level="error",
                logger=record.name,
                message=f"a log record could not be written: {type(error).__name__}",
                fields={},
            )
        self._ring.append(entry)
        if self.writes:
            self._writer.put(entry)


class _Writer:
    """A thread that writes entries to a stream; what it can't take in time is counted."""

    def __init__(self, stream: TextIO, form: Callable[[LogEntry], str]) -> None:
        self._stream = stream
        self._form = form
        self._queue: queue.Queue[LogEntry | None] = queue.Queue(_QUEUE_ENTRIES)
        self._is_closing = False
        self._told_dropped = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self._thread.start()

    def put(self, entry: LogEntry) -> None:
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_FLUSH_S)
        self._thread.join(_FLUSH_S)

    def _run(self) -> None:
        is_open = True
        while is_open:
            entries = list(self._waiting())
            is_open = None not in entries
            lines = [self._form(entry) for entry in entries if entry is not None]
            dropped = self.dropped
            if dropped > self._told_dropped:
                lines.append(self._form(_dropped(dropped - self._told_dropped)))
                self._told_dropped = dropped
            try:
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._stream.flush()
            except (OSError, ValueError):  # closed, or nobody reads: nobody is left to read it
                self.dropped += len(lines)
                self._told_dropped = self.dropped

    def _waiting(self) -> Iterator[LogEntry | None]:
        """Wait for one, then take what else is there."""
        yield self._queue.get()
        with contextlib.suppress(queue.Empty):
            for _ in range(_WRITTEN_AT_ONCE):
                yield self._queue.get_nowait()


def _dropped(count: int) -> LogEntry:
    return LogEntry(
        at=datetime.now(UTC),
        level="warning",
        logger=__name__,
        message=f"{count} log entries were dropped: standard error does not keep up",
        fields={},
    )
