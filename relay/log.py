"""Logs: one format, on standard error, without payloads and without secrets.

`configure` takes over the root logger. Every record becomes one `LogEntry` whose texts have gone
through the mask; the entry goes into the ring for the status view and, unless that view has the
screen, over a bounded queue to a thread that writes. So a stalled terminal or a full pipe costs
lines, which are counted, and never holds up the relay.

`EventLog` turns events into records. It is where a failure that repeats is logged once and then
summed up.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, TextIO

import msgspec

from relay.events import (
    BatchAcknowledged,
    BatchPublished,
    ClaimCheckFetched,
    ConnectionChanged,
    DatabaseChanged,
    DeadLettered,
    DeadLettersRetried,
    Event,
    OwnershipChanged,
    PipelineDescribed,
    PipelineEvent,
    PipelineState,
    Polled,
    Retried,
    StateChanged,
)
from relay.settings import LogSettings

# What a log call may pass as ``extra``, in the order in which it is written. Anything else is left
# out: a field that nobody has looked at could carry a payload.
FIELDS = (
    "pipeline",
    "direction",
    "source",
    "sink",
    "side",
    "state",
    "batch",
    "checkpoint",
    "attempt",
    "messages",
    "duplicates",
    "dead_lettered",
    "delivered",
    "failed",
    "duration_s",
    "delay_s",
    "repeated",
    "members",
    "event",
    "outbox",
    "kind",
    "error",
)
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
_LONGEST_TEXT = 2000
_LONGEST_EXCEPTION_TEXT = 300
_NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN_VALUE = re.compile(r"[^\s\"=]+")
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "31"}

FieldValue = str | int | float | bool


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One record, fit to be shown: masked, of bounded length, without line breaks in its texts.

    ``fields`` in the order of `FIELDS`. ``trace`` has the lines of a traceback, if there is one.
    """

    at: datetime
    level: str
    logger: str
    message: str
    fields: Mapping[str, FieldValue]
    trace: Sequence[str] = ()

    def as_json(self) -> str:
        """One JSON object without line breaks."""
        line: dict[str, object] = {"ts": self.at, "level": self.level, "msg": self.message}
        line.update(self.fields)
        line["logger"] = self.logger
        if self.trace:
            line["trace"] = self.trace
        return msgspec.json.encode(line).decode()

    def as_text(self, *, colour: bool = False) -> str:
        """For people: local time, level, pipeline, message, what else is known; trace below."""
        clock = self.at.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        level = f"{self.level.upper():<8}"
        if colour:
            level = f"\x1b[{_COLOURS.get(self.level, '0')}m{level}\x1b[0m"
        rest = dict(self.fields)
        pipeline = rest.pop("pipeline", None)
        rest.pop("direction", None)
        words = [clock, level]
        if pipeline is not None:
            words.append(f"[{pipeline}]")
        is_ours = self.logger.partition(".")[0] == "relay"
        words.append(self.message if is_ours else f"{self.logger}: {self.message}")
        words.extend(f"{name}={_shown(value)}" for name, value in rest.items())
        return "\n".join([" ".join(words), *(f"    {line}" for line in self.trace)])


class LogRing:
    """The last `RING_ENTRIES` entries. ``written`` counts all that ever came, to see news."""

    def __init__(self) -> None:
        self._entries: deque[LogEntry] = deque(maxlen=RING_ENTRIES)
        self.written = 0

    def append(self, entry: LogEntry) -> None:
        """Add one; the oldest goes. Called from any thread."""
        self._entries.append(entry)
        self.written += 1

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
        """Write what is queued, for at most two seconds, and give logging back. Idempotent."""
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
            entry = self._entry(record)
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

    def _entry(self, record: logging.LogRecord) -> LogEntry:
        trace: Sequence[str] = ()
        if record.exc_info is not None and record.exc_info[1] is not None:
            trace = [self._clean(line) for line in _trace(record.exc_info[1], self._mask)]
        return LogEntry(
            at=datetime.fromtimestamp(record.created, UTC),
            level=record.levelname.lower(),
            logger=record.name,
            message=self._clean(record.getMessage()),
            fields={
                name: self._clean(value) if isinstance(value, str) else value
                for name in FIELDS
                if isinstance(value := getattr(record, name, None), str | int | float | bool)
            },
            trace=trace,
        )

    def _clean(self, text: str) -> str:
        """Masked before anything else: what is cut or escaped would not be recognised any more."""
        text = self._mask(text)
        if len(text) > _LONGEST_TEXT:
            text = f"{text[:_LONGEST_TEXT]}… ({len(text)} characters)"
        text = _NOT_PRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        return text.encode("utf-8", "backslashreplace").decode()


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
            except (OSError, ValueError):  # closed, or nobody reads: nothing is left to tell it to
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


def _shown(value: FieldValue) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else '"' + text.replace('"', '\\"') + '"'


def _trace(error: BaseException, mask: Callable[[str], str]) -> list[str]:
    """The frames, causes first, with one short line of each exception's text.

    What follows the first line of a database error is its detail, which quotes the row.
    """
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = [] if cause is None else [*_trace(cause, mask), "which led to:"]
    lines.extend(
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    )
    text = next(iter(mask(str(error)).splitlines()), "")
    if len(text) > _LONGEST_EXCEPTION_TEXT:
        text = f"{text[:_LONGEST_EXCEPTION_TEXT]}…"
    lines.append(f"{type(error).__qualname__}: {text}")
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            lines.extend(f"| {line}" for line in _trace(inner, mask))
    return lines


_log = logging.getLogger("relay")
_DIGITS = re.compile(r"\d+")
_MOST_REPEATS = 1000
_TROUBLED = frozenset({PipelineState.RETRYING, PipelineState.FAILED, PipelineState.SUSPENDED})
_WORDS = {
    PipelineState.STARTING: "starting",
    PipelineState.RUNNING: "running",
    PipelineState.STOPPING: "stopping",
    PipelineState.STOPPED: "stopped",
    PipelineState.COMPLETED: "completed: the input has ended",
    PipelineState.FAILED: "failed",
    PipelineState.SUSPENDED: "suspended",
}


class _Repeat(msgspec.Struct):
    """One line that was logged, and how often its like came since."""

    first_s: float
    level: int
    message: str
    fields: dict[str, FieldValue]
    count: int = 0


class _Trouble(msgspec.Struct):
    """A pipeline that has failed and made no progress since."""

    since_s: float
    failures: int = 0


class EventLog:
    """An observer that writes events as log lines; batches at debug only.

    Lines that are equal but for their numbers are logged once in ``repeat_s`` seconds; when the
    time is over, one line says how often they came. ``clock`` is monotonic, in seconds.
    """

    def __init__(self, repeat_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._repeat_s = repeat_s
        self._clock = clock
        self._repeats: dict[tuple[str, str], _Repeat] = {}
        self._troubles: dict[str, _Trouble] = {}
        self._states: dict[str, PipelineState] = {}
        self._connections: dict[tuple[str, str], bool] = {}
        self._described: dict[str, PipelineDescribed] = {}
        self._owned: frozenset[str] | None = None
        self._members = 0

    def __call__(self, event: Event) -> None:
        """Log what this event has to say, if anything."""
        self._sum_up(self._clock() - self._repeat_s)
        if isinstance(event, PipelineEvent):
            self._pipeline(event)
        elif isinstance(event, OwnershipChanged):
            self._ownership(event)
        elif event.is_connected:
            self._database(event)
        else:
            self._once(
                "", logging.ERROR, "the database is lost, no pipeline runs", {"error": event.reason}
            )

    def close(self) -> None:
        """Sum up what has repeated and was not told yet."""
        self._sum_up(float("inf"))

    def _pipeline(self, event: PipelineEvent) -> None:
        match event:
            case StateChanged():
                self._state(event)
            case ConnectionChanged():
                self._connection(event)
            case Retried():
                self._retried(event)
            case DeadLettered():
                self._once(
                    event.pipeline,
                    logging.ERROR,
                    "dead-lettered",
                    {
                        **self._fields(event),
                        "messages": event.messages,
                        "kind": event.kind.value,
                        "error": event.error,
                    },
                )
            case DeadLettersRetried() if event.delivered or event.failed:
                self._say(
                    event,
                    logging.INFO,
                    "dead letters were tried again",
                    delivered=event.delivered,
                    failed=event.failed,
                )
            case PipelineDescribed():
                if self._described.get(event.pipeline) != event:
                    self._begin_anew(event.pipeline)
                self._described[event.pipeline] = event
            case Polled() | BatchPublished() | BatchAcknowledged() | ClaimCheckFetched():
                self._work(event)
            case _:
                pass

    def _state(self, event: StateChanged) -> None:
        former = self._states.get(event.pipeline)
        self._states[event.pipeline] = event.state
        is_in_trouble = event.pipeline in self._troubles
        if event.state is PipelineState.RETRYING or event.state is former is PipelineState.STOPPED:
            return
        if event.state in _TROUBLED:
            self._trouble(event)
            self._once(
                event.pipeline,
                logging.ERROR,
                _WORDS[event.state],
                {**self._fields(event), "state": event.state.value, "error": event.reason},
            )
            return
        # A connection that comes and goes without moving anything is no news.
        level = logging.DEBUG if is_in_trouble else logging.INFO
        if event.state in (PipelineState.STOPPED, PipelineState.COMPLETED):
            level = logging.INFO
            self._begin_anew(event.pipeline)
        self._say(event, level, _WORDS[event.state], state=event.state.value)

    def _connection(self, event: ConnectionChanged) -> None:
        side = (event.pipeline, event.side)
        if self._connections.get(side, False) == event.is_connected:
            return
        self._connections[side] = event.is_connected
        level = logging.DEBUG if event.pipeline in self._troubles else logging.INFO
        word = "connected" if event.is_connected else "disconnected"
        facts = "; ".join(f"{name}: {fact}" for name, fact in event.details.items())
        told = f" ({facts})" if facts else ""
        self._say(event, level, f"{event.side} {word}{told}", side=event.side)

    def _retried(self, event: Retried) -> None:
        self._trouble(event)
        self._once(
            event.pipeline,
            logging.WARNING,
            f"{event.side} failed, trying again",
            {
                **self._fields(event),
                "side": event.side,
                "attempt": event.attempt,
                "delay_s": event.delay_s,
                "kind": event.kind.value,
                "error": event.error,
            },
        )

    def _work(self, event: Polled | BatchPublished | BatchAcknowledged | ClaimCheckFetched) -> None:
        match event:
            case Polled():
                if not event.messages and not event.rejected:
                    if self._states.get(event.pipeline) is PipelineState.RUNNING:
                        self._recovered(event)
                    return
                self._debug(event, "polled", messages=event.messages, duration_s=event.duration_s)
            case BatchPublished():
                self._debug(
                    event,
                    "published",
                    messages=event.messages,
                    duplicates=event.duplicates,
                    dead_lettered=event.dead_lettered,
                    attempt=event.attempts,
                    duration_s=event.duration_s,
                )
            case BatchAcknowledged():
                self._recovered(event)
                self._debug(
                    event, "acknowledged", messages=event.messages, checkpoint=event.checkpoint
                )
            case ClaimCheckFetched():
                self._debug(event, "claim check fetched", messages=event.rows)

    def _trouble(self, event: PipelineEvent) -> None:
        trouble = self._troubles.setdefault(event.pipeline, _Trouble(self._clock()))
        trouble.failures += 1

    def _recovered(self, event: PipelineEvent) -> None:
        trouble = self._troubles.pop(event.pipeline, None)
        if trouble is not None:
            failures = "1 failure" if trouble.failures == 1 else f"{trouble.failures} failures"
            lasted = f"{self._clock() - trouble.since_s:.0f} s"
            self._once(
                event.pipeline,
                logging.INFO,
                f"delivering again after {failures} in {lasted}",
                self._fields(event),
            )

    def _ownership(self, event: OwnershipChanged) -> None:
        owned = frozenset(event.pipelines)
        former = frozenset[str]() if self._owned is None else self._owned
        words = [f"{len(owned)} pipelines run here"]
        words += [f"took {', '.join(sorted(owned - former))}"] if owned - former else []
        words += [f"gave up {', '.join(sorted(former - owned))}"] if former - owned else []
        if owned != self._owned or event.members != self._members:
            _log.info("; ".join(words), extra={"members": event.members})
        self._owned, self._members = owned, event.members
        for gone in former - owned:
            self._forget(gone)

    def _database(self, event: DatabaseChanged) -> None:
        self._sum_up_of("")
        _log.info("the database is connected%s", f": {event.reason}" if event.reason else "")

    def _begin_anew(self, pipeline: str) -> None:
        """What comes now belongs to another run: it is told even if it resembles the last."""
        self._sum_up_of(pipeline)
        self._troubles.pop(pipeline, None)

    def _forget(self, pipeline: str) -> None:
        self._begin_anew(pipeline)
        self._states.pop(pipeline, None)
        self._described.pop(pipeline, None)
        for side in ("source", "sink"):
            self._connections.pop((pipeline, side), None)

    def _once(self, pipeline: str, level: int, message: str, fields: dict[str, FieldValue]) -> None:
        """Log it, unless its like was logged within ``repeat_s``."""
        likeness = (pipeline, _DIGITS.sub("#", f"{message} {fields.get('error', '')}"))
        repeat = self._repeats.get(likeness)
        if repeat is not None:
            repeat.count += 1
            repeat.fields = fields
            return
        if len(self._repeats) >= _MOST_REPEATS:
            self._tell(self._repeats.pop(next(iter(self._repeats))))
        self._repeats[likeness] = _Repeat(self._clock(), level, message, fields)
        _log.log(level, "%s", message, extra=fields)

    def _sum_up(self, until_s: float) -> None:
        """Close the repeats that began up to then; they stand in the order of their beginning."""
        while self._repeats:
            likeness, repeat = next(iter(self._repeats.items()))
            if repeat.first_s > until_s:
                return
            del self._repeats[likeness]
            self._tell(repeat)

    def _sum_up_of(self, pipeline: str) -> None:
        for likeness in [likeness for likeness in self._repeats if likeness[0] == pipeline]:
            self._tell(self._repeats.pop(likeness))

    def _tell(self, repeat: _Repeat) -> None:
        if repeat.count:
            _log.log(
                repeat.level,
                "%s: repeated %d times in %.0f s",
                repeat.message,
                repeat.count,
                self._clock() - repeat.first_s,
                extra={**repeat.fields, "repeated": repeat.count},
            )

    def _say(self, event: PipelineEvent, level: int, message: str, **fields: FieldValue) -> None:
        _log.log(level, "%s", message, extra={**self._fields(event), **fields})

    def _debug(self, event: PipelineEvent, message: str, **fields: FieldValue) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            self._say(event, logging.DEBUG, message, **fields)

    def _fields(self, event: PipelineEvent) -> dict[str, FieldValue]:
        fields: dict[str, FieldValue] = {"pipeline": event.pipeline, "direction": event.direction}
        described = self._described.get(event.pipeline)
        if described is not None:
            fields |= {"source": described.source, "sink": described.sink}
        return fields
