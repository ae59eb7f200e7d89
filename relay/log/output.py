"""Where entries go: among the last ones, and over a queue to standard error."""

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


class Logs(logging.Handler):
    """The configured logging of this process: its last entries, and whether it has the screen.

    Makes a masked entry of each record, keeps it, and hands it on. Never raises, never waits.
    """

    def __init__(self, writer: _Writer, mask: Callable[[str], str]) -> None:
        super().__init__()
        self._entries: deque[LogEntry] = deque(maxlen=RING_ENTRIES)
        self._writer = writer
        self._mask = mask
        self._is_shown = True
        self._restore = contextlib.ExitStack()

    @property
    def dropped(self) -> int:
        """Entries that standard error did not take in time."""
        return self._writer.dropped

    def entries(self) -> Sequence[LogEntry]:
        """The last `RING_ENTRIES`, the oldest first."""
        return tuple(self._entries)

    def show_on_stderr(self, *, shown: bool) -> None:
        """Off while a view has the screen; the entries are kept in either case."""
        self._is_shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
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
        self._entries.append(entry)
        if self._is_shown:
            self._writer.put(entry)

    def close(self) -> None:
        """Write what is queued, for at most two seconds, and restore logging. Idempotent."""
        atexit.unregister(self.close)
        self._restore.close()
        self._writer.close()
        super().close()

    def take_over(self, level: int) -> None:
        """Take the place of all other handlers until `close`; libraries at warnings only."""
        root = logging.getLogger()
        self._restore.callback(setattr, root, "handlers", root.handlers[:])
        self._restore.callback(root.setLevel, root.level)
        root.handlers[:] = [self]
        root.setLevel(level)
        for name in _LIBRARIES:
            library = logging.getLogger(name)
            self._restore.callback(library.setLevel, library.level)
            library.setLevel(max(level, logging.WARNING))
        self._restore.callback(logging.captureWarnings, False)
        logging.captureWarnings(True)
        # What is still queued is written at exit.
        atexit.register(self.close)


def configure(
    settings: LogSettings, mask: Callable[[str], str], *, stream: TextIO | None = None
) -> Logs:
    """Make logging of this process ours: level, format, masking; libraries at warnings only.

    ``stream`` is standard error unless given. What is still queued is written at exit.
    """
    stream = sys.stderr if stream is None else stream
    logs = Logs(_Writer(stream, _format_of(settings.format, stream)), mask)
    logs.take_over(logging.getLevelNamesMapping()[settings.level.upper()])
    return logs


def _format_of(name: Literal["text", "json"], stream: TextIO) -> Callable[[LogEntry], str]:
    if name == "json":
        return LogEntry.as_json
    colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return lambda entry: entry.as_text(colour=colour)


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
