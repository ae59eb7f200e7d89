"""Events as log lines."""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable

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
    LeaseExpired,
    OwnershipChanged,
    PipelineDescribed,
    PipelineEvent,
    PipelineState,
    Polled,
    RequestRefused,
    Retried,
    StateChanged,
)
from relay.log.entry import FieldValue

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

# A pipeline and its worker.
_Who = tuple[str, int]


class _Repeat(msgspec.Struct):
    """One line that was logged, and how often its like came since."""

    first_s: float
    level: int
    message: str
    fields: dict[str, FieldValue]
    count: int = 0


class _Seen(msgspec.Struct):
    """How a pipeline's worker was seen last, and since when it fails without progress."""

    state: PipelineState | None = None
    connected: set[str] = msgspec.field(default_factory=set)
    troubled_s: float | None = None
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
        self._seen: defaultdict[_Who, _Seen] = defaultdict(_Seen)
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
        elif isinstance(event, DatabaseChanged):
            self._database(event)

    def close(self) -> None:
        """Sum up what has repeated and was not logged yet."""
        self._sum_up(float("inf"))

    def _pipeline(self, event: PipelineEvent) -> None:
        match event:
            case StateChanged():
                self._state(event)
            case ConnectionChanged():
                self._connection(event)
            case Retried():
                self._retried(event)
            case LeaseExpired():
                void = "a lease ran out or a position was moved, what was in flight is void"
                self._say_once(event, logging.WARNING, void, error=event.reason)
            case DeadLettered():
                self._say_once(
                    event,
                    logging.ERROR,
                    "dead-lettered",
                    messages=event.messages,
                    kind=event.kind.value,
                    error=event.error,
                )
            case RequestRefused():
                refused = f"a request was refused: {event.status}, {event.reason}"
                self._say_once(event, logging.WARNING, refused)
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
                    self._begin_run(event.pipeline)
                self._described[event.pipeline] = event
            case Polled() if event.messages or event.rejected:
                self._debug(event, "polled", messages=event.messages, duration_s=event.duration_s)
            case Polled() if self._seen[_who(event)].state is PipelineState.RUNNING:
                self._recovered(event)
            case BatchPublished():
                self._debug(
                    event,
                    "published",
                    messages=event.messages,
                    duplicates=event.duplicates,
                    dead_lettered=event.dead_lettered,
                    filtered=event.filtered,
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
            case _:
                pass

    def _state(self, event: StateChanged) -> None:
        seen = self._seen[_who(event)]
        former, seen.state = seen.state, event.state
        is_in_trouble = seen.troubled_s is not None
        if event.state is PipelineState.RETRYING or event.state is former is PipelineState.STOPPED:
            return
        if event.state in _TROUBLED:
            self._trouble(event)
            said = {"state": event.state.value, "error": event.reason}
            self._say_once(event, logging.ERROR, _WORDS[event.state], **said)
            return
        # A connection that comes and goes without moving anything is no news.
        level = logging.DEBUG if is_in_trouble else logging.INFO
        if event.state in (PipelineState.STOPPED, PipelineState.COMPLETED):
            level = logging.INFO
            self._begin_run(event.pipeline)
        self._say(event, level, _WORDS[event.state], state=event.state.value)

    def _connection(self, event: ConnectionChanged) -> None:
        seen = self._seen[_who(event)]
        if (event.side in seen.connected) == event.is_connected:
            return
        seen.connected ^= {event.side}
        level = logging.INFO if seen.troubled_s is None else logging.DEBUG
        word = "connected" if event.is_connected else "disconnected"
        facts = "; ".join(f"{name}: {fact}" for name, fact in event.details.items())
        detail = f" ({facts})" if facts else ""
        self._say(event, level, f"{event.side} {word}{detail}", side=event.side)

    def _retried(self, event: Retried) -> None:
        self._trouble(event)
        self._say_once(
            event,
            logging.WARNING,
            f"{event.side} failed, trying again",
            side=event.side,
            attempt=event.attempt,
            delay_s=event.delay_s,
            kind=event.kind.value,
            error=event.error,
        )

    def _trouble(self, event: PipelineEvent) -> None:
        seen = self._seen[_who(event)]
        seen.troubled_s = self._clock() if seen.troubled_s is None else seen.troubled_s
        seen.failures += 1

    def _recovered(self, event: PipelineEvent) -> None:
        seen = self._seen[_who(event)]
        if seen.troubled_s is not None:
            failures = "1 failure" if seen.failures == 1 else f"{seen.failures} failures"
            lasted = f"{self._clock() - seen.troubled_s:.0f} s"
            seen.troubled_s, seen.failures = None, 0
            again = f"delivering again after {failures} in {lasted}"
            self._say_once(event, logging.INFO, again)

    def _ownership(self, event: OwnershipChanged) -> None:
        owned = frozenset(event.pipelines)
        former = frozenset[str]() if self._owned is None else self._owned
        words = ["1 pipeline runs here" if len(owned) == 1 else f"{len(owned)} pipelines run here"]
        words += [f"took {', '.join(sorted(owned - former))}"] if owned - former else []
        words += [f"gave up {', '.join(sorted(former - owned))}"] if former - owned else []
        if owned != self._owned or event.members != self._members:
            _log.info("; ".join(words), extra={"members": event.members})
        self._owned, self._members = owned, event.members
        for name, who in event.blocked.items():
            error = f"a session that is no relay of this group holds its lock: {who}"
            self._once(name, logging.ERROR, "blocked", {"pipeline": name, "error": error})
        for gone in former - owned:
            self._forget(gone)

    def _database(self, event: DatabaseChanged) -> None:
        if not event.is_connected:
            lost = "the database is lost, no pipeline runs"
            self._once("", logging.ERROR, lost, {"error": event.reason})
            return
        self._sum_up_of("")
        _log.info("the database is connected%s", f": {event.reason}" if event.reason else "")

    def _begin_run(self, pipeline: str) -> None:
        """What comes now belongs to another run: it is logged even if it resembles the last."""
        self._sum_up_of(pipeline)
        for seen in [seen for who, seen in self._seen.items() if who[0] == pipeline]:
            seen.troubled_s, seen.failures = None, 0

    def _forget(self, pipeline: str) -> None:
        self._begin_run(pipeline)
        self._described.pop(pipeline, None)
        for who in [who for who in self._seen if who[0] == pipeline]:
            del self._seen[who]

    def _once(self, pipeline: str, level: int, message: str, fields: dict[str, FieldValue]) -> None:
        """Log it, unless its like was logged within ``repeat_s``."""
        likeness = (pipeline, _DIGITS.sub("#", f"{message} {fields.get('error', '')}"))
        repeat = self._repeats.get(likeness)
        if repeat is not None:
            repeat.count += 1
            repeat.fields = fields
            return
        if len(self._repeats) >= _MOST_REPEATS:
            self._log_repeat(self._repeats.pop(next(iter(self._repeats))))
        self._repeats[likeness] = _Repeat(self._clock(), level, message, fields)
        _log.log(level, "%s", message, extra=fields)

    def _sum_up(self, until_s: float) -> None:
        """Close the repeats that began up to then; they stand in the order of their beginning."""
        while self._repeats:
            likeness, repeat = next(iter(self._repeats.items()))
            if repeat.first_s > until_s:
                return
            del self._repeats[likeness]
            self._log_repeat(repeat)

    def _sum_up_of(self, pipeline: str) -> None:
        for likeness in [likeness for likeness in self._repeats if likeness[0] == pipeline]:
            self._log_repeat(self._repeats.pop(likeness))

    def _log_repeat(self, repeat: _Repeat) -> None:
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

    def _say_once(
        self, event: PipelineEvent, level: int, message: str, **fields: FieldValue
    ) -> None:
        self._once(event.pipeline, level, message, {**self._fields(event), **fields})

    def _debug(self, event: PipelineEvent, message: str, **fields: FieldValue) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            self._say(event, logging.DEBUG, message, **fields)

    def _fields(self, event: PipelineEvent) -> dict[str, FieldValue]:
        fields: dict[str, FieldValue] = {"pipeline": event.pipeline, "direction": event.direction}
        if event.worker:
            fields["worker"] = event.worker
        described = self._described.get(event.pipeline)
        if described is not None:
            fields |= {"source": described.source, "sink": described.sink}
        return fields


def _who(event: PipelineEvent) -> _Who:
    return event.pipeline, event.worker
