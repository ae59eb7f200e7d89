"""The present picture of this relay: what health, `/status`, the status view and the fleet show.

The board listens to events and remembers, per pipeline, only what the picture needs; `snapshot`
gives it frozen. Here, once, stands what counts as well, as stalled, as delivered and as gone.

Well: the database is connected and no pipeline is suspended, failed, stalled, or in trouble for
longer than a short grace. Trouble begins with a failure and ends with *progress*: a batch
acknowledged, or a poll that found nothing while the pipeline runs and nothing is in flight. So a
connection that comes and goes without moving anything does not look well in between.

Stalled: for ``stalled_after_s`` there was something to do and no progress. There is something to
do while messages are in flight, while the outbox is ahead, while the pipeline starts, and while no
poll returns (a source answers within a second or so, even if it has nothing).
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import msgspec

from relay import __version__
from relay.events import (
    BatchAcknowledged,
    BatchPublished,
    ConnectionChanged,
    DeadLettered,
    DeadLettersRetried,
    Direction,
    Event,
    LagObserved,
    OwnershipChanged,
    PipelineDescribed,
    PipelineEvent,
    PipelineState,
    Polled,
    Retried,
    StateChanged,
)

RATE_SECONDS = 60
RECENT_BATCHES = 20

_RATE_AVERAGED_OVER_S = 5
_TROUBLE_GRACE_S = 10.0

_BEGINNINGS = frozenset({PipelineState.STARTING, PipelineState.FAILED})
_AT_ONCE_UNWELL = frozenset({PipelineState.FAILED, PipelineState.SUSPENDED})
_TROUBLED = frozenset({PipelineState.FAILED, PipelineState.SUSPENDED, PipelineState.RETRYING})
_AT_REST = frozenset({PipelineState.STOPPED, PipelineState.COMPLETED})


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Creation to acceptance over the last minute, in seconds, within a few percent."""

    p50_s: float
    p95_s: float
    p99_s: float


class RecentBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One acknowledged batch; ``duration_s`` is how long it took to settle it."""

    acknowledged_at: datetime
    checkpoint: str
    messages: int
    duplicates: int
    dead_lettered: int
    attempts: int
    duration_s: float


class PipelineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline at the time of the snapshot. Counts are since this process took it over.

    ``settings`` have their secrets masked. ``since`` is when ``state`` was entered, whatever the
    reason has been since. ``trouble`` says why ``is_healthy`` is false, ``undelivered`` why
    ``is_drained`` is; both are empty otherwise. ``published`` counts messages that a forward
    pipeline's sink accepted, ``consumed`` those of a reverse one. ``in_flight`` messages are polled
    and not acknowledged. ``lag_rows``, ``oldest_unsent_age_s`` and ``dead_letters`` are as last
    observed, None before. ``rate_history`` has one count a second, the latest complete second
    last.
    """

    name: str
    direction: Direction
    source: str
    sink: str
    settings: Mapping[str, object]
    state: PipelineState
    reason: str
    since: datetime
    is_healthy: bool
    trouble: str
    is_stalled: bool
    is_drained: bool
    undelivered: str
    source_connected: bool
    sink_connected: bool
    published: int
    consumed: int
    duplicates: int
    dead_lettered: int
    errors: int
    last_error: str
    last_error_at: datetime | None
    checkpoint: str
    offset: int | None
    in_flight: int
    lag_rows: int | None
    oldest_unsent_age_s: float | None
    dead_letters: int | None
    rate_per_s: float
    rate_history: Sequence[int]
    latency: Latency | None
    recent_batches: Sequence[RecentBatch]
    last_progress_at: datetime | None


class RelayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The relay at the time of the snapshot; pipelines are ordered by name.

    ``is_coordinated``: it has been decided at least once which pipelines run here. ``members``
    counts the relays of the group, this one included.
    """

    worker_id: str
    group_id: str
    version: str
    started_at: datetime
    taken_at: datetime
    database_connected: bool
    database_reason: str
    is_coordinated: bool
    members: int
    pipelines: Sequence[PipelineStatus]

    @property
    def trouble(self) -> str:
        """Why the relay is not well, in one line; empty where it is."""
        if not self.database_connected:
            return self.database_reason or "the database is not connected"
        unwell = [pipeline.name for pipeline in self.pipelines if not pipeline.is_healthy]
        return f"not healthy: {', '.join(unwell)}" if unwell else ""

    @property
    def is_healthy(self) -> bool:
        """True when the database is connected and every pipeline is well."""
        return not self.trouble

    @property
    def is_ready(self) -> bool:
        """True when the database is connected and it has been decided what runs here."""
        return self.database_connected and self.is_coordinated

    def to_json(self) -> bytes:
        """This status as one JSON object; times in RFC 3339."""
        return msgspec.json.encode(self, enc_hook=str)


class Roster:
    """Which pipelines an observer has to show; every observer that shows pipelines keeps one.

    A pipeline comes with its description or with its first state, and goes when the relay owns it
    no longer. What it says afterwards, while its connections close, does not bring it back.
    """

    def __init__(self) -> None:
        self._present: set[str] = set()
        self._owned: frozenset[str] | None = None

    def __contains__(self, pipeline: str) -> bool:
        return pipeline in self._present

    def observe(self, event: Event) -> Sequence[str]:
        """Take the event into account; gives the pipelines that are gone with it."""
        match event:
            case OwnershipChanged():
                self._owned = frozenset(event.pipelines)
                gone = self._present - self._owned
            case StateChanged() if event.state in _AT_REST and self._owned is not None:
                gone = (self._present - self._owned) & {event.pipeline}
            case PipelineDescribed():
                self._present.add(event.pipeline)
                return ()
            case StateChanged() if event.state in _BEGINNINGS:
                self._present.add(event.pipeline)
                return ()
            case _:
                return ()
        self._present -= gone
        return sorted(gone)


class Board:
    """An observer that keeps the picture; ask it for a `snapshot` in the event loop's thread.

    ``mask`` takes secrets out of error texts. ``clock`` is monotonic and in seconds, ``now`` the
    time of day with zone: a clock that jumps changes what is shown, never what is judged.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        group_id: str,
        stalled_after_s: float,
        mask: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._worker_id = worker_id
        self._group_id = group_id
        self._stalled_after_s = stalled_after_s
        self._mask = mask
        self._clock = clock
        self._now = now
        self._started_at = now()
        self._is_database_connected = False
        self._database_reason = ""
        self._is_coordinated = False
        self._members = 0
        self._roster = Roster()
        self._pictures: dict[str, _Picture] = {}

    def __call__(self, event: Event) -> None:
        """Take one event into the picture."""
        for name in self._roster.observe(event):
            del self._pictures[name]
        if isinstance(event, PipelineEvent):
            if event.pipeline in self._roster:
                self._picture(event).observe(event, self._clock())
        elif isinstance(event, OwnershipChanged):
            self._is_coordinated = True
            self._members = event.members
        else:
            self._is_database_connected = event.is_connected
            self._database_reason = self._mask(event.reason)

    def snapshot(self) -> RelayStatus:
        """The picture now."""
        clock_s, now = self._clock(), self._now()
        return RelayStatus(
            worker_id=self._worker_id,
            group_id=self._group_id,
            version=__version__,
            started_at=self._started_at,
            taken_at=now,
            database_connected=self._is_database_connected,
            database_reason=self._database_reason,
            is_coordinated=self._is_coordinated,
            members=self._members,
            pipelines=[
                self._pictures[name].status(clock_s, now, self._stalled_after_s)
                for name in sorted(self._pictures)
            ],
        )

    def stalled(self) -> Mapping[str, bool]:
        """For each pipeline whether it is stalled now; much cheaper than a snapshot."""
        clock_s = self._clock()
        return {
            name: picture.is_stalled(clock_s, self._stalled_after_s)
            for name, picture in self._pictures.items()
        }

    def _picture(self, event: PipelineEvent) -> _Picture:
        picture = self._pictures.get(event.pipeline)
        if picture is None:
            picture = _Picture(event.pipeline, event.direction, self._mask, self._clock())
            self._pictures[event.pipeline] = picture
        return picture


@dataclass(slots=True)
class _Picture:
    """What is remembered of one pipeline. Times are of the monotonic clock, in seconds."""

    name: str
    direction: Direction
    mask: Callable[[str], str]
    since_s: float
    source: str = ""
    sink: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    state: PipelineState = PipelineState.STARTING
    reason: str = ""
    source_connected: bool = False
    sink_connected: bool = False
    published: int = 0
    consumed: int = 0
    duplicates: int = 0
    dead_lettered: int = 0
    errors: int = 0
    last_error: str = ""
    last_error_s: float | None = None
    checkpoint: str = ""
    offset: int | None = None
    in_flight: int = 0
    lag: LagObserved | None = None
    found_nothing: bool = False
    polled_s: float = -math.inf
    progress_s: float | None = None
    troubled_s: float | None = None
    behind_s: float | None = None
    in_flight_s: float | None = None
    waiting: deque[BatchPublished] = field(default_factory=deque)
    recent: deque[tuple[float, str, BatchPublished]] = field(
        default_factory=lambda: deque(maxlen=RECENT_BATCHES)
    )
    rate: _Rate = field(default_factory=lambda: _Rate())
    latencies: _LatencyWindow = field(default_factory=lambda: _LatencyWindow())

    def observe(self, event: PipelineEvent, clock_s: float) -> None:
        match event:
            case Polled():
                self._polled(event, clock_s)
            case BatchPublished():
                self._settled(event, clock_s)
            case BatchAcknowledged():
                self._acknowledged(event, clock_s)
            case LagObserved():
                self.lag = event
                self.behind_s = _first(self.behind_s, clock_s) if event.lag_rows > 0 else None
            case Retried():
                self._failed(event.error, clock_s)
                self.troubled_s = _first(self.troubled_s, clock_s)
            case DeadLettered():
                self._failed(event.error, clock_s)
            case DeadLettersRetried():
                self._accepted(event.delivered, clock_s)
            case StateChanged():
                self._changed(event, clock_s)
            case ConnectionChanged():
                self._connected(event)
            case PipelineDescribed():
                self.direction, self.source, self.sink = event.direction, event.source, event.sink
                self.settings = event.settings
            case _:
                pass

    def _polled(self, event: Polled, clock_s: float) -> None:
        self.polled_s = clock_s
        taken = event.messages + event.rejected
        self.found_nothing = taken == 0
        if taken and not self.in_flight:
            self.in_flight_s = clock_s
        self.in_flight += taken
        if not self.in_flight and self.state is PipelineState.RUNNING:
            self.troubled_s = None

    def _settled(self, event: BatchPublished, clock_s: float) -> None:
        self._accepted(event.messages, clock_s)
        self.duplicates += event.duplicates
        self.dead_lettered += event.dead_lettered
        self.latencies.add(event.latencies_s, clock_s)
        self.waiting.append(msgspec.structs.replace(event, latencies_s=()))

    def _accepted(self, messages: int, clock_s: float) -> None:
        if self.direction == "forward":
            self.published += messages
        else:
            self.consumed += messages
        self.rate.add(messages, clock_s)

    def _acknowledged(self, event: BatchAcknowledged, clock_s: float) -> None:
        self.in_flight = max(0, self.in_flight - event.messages)
        self.in_flight_s = clock_s if self.in_flight else None
        self.progress_s = clock_s
        self.behind_s = None
        self.troubled_s = None
        self.checkpoint = event.checkpoint
        self.offset = event.offset
        if self.waiting:
            settled = self.waiting.popleft()
            if event.messages:
                self.recent.append((clock_s, event.checkpoint, settled))

    def _failed(self, error: str, clock_s: float) -> None:
        self.errors += 1
        self.last_error = self.mask(error)
        self.last_error_s = clock_s

    def _changed(self, event: StateChanged, clock_s: float) -> None:
        if event.state is not self.state:
            self.since_s = clock_s
        self.state = event.state
        self.reason = self.mask(event.reason)
        if event.state in _TROUBLED:
            self.troubled_s = _first(self.troubled_s, clock_s)
        if event.state in _AT_ONCE_UNWELL:
            self._failed(event.reason, clock_s)
        if event.state in _AT_REST:
            self._forget_in_flight()
            self.troubled_s = None

    def _connected(self, event: ConnectionChanged) -> None:
        if event.side == "sink":
            self.sink_connected = event.is_connected
            return
        self.source_connected = event.is_connected
        if not event.is_connected:
            self._forget_in_flight()

    def _forget_in_flight(self) -> None:
        """The source hands out again what it had handed out."""
        self.in_flight = 0
        self.in_flight_s = None
        self.found_nothing = False
        self.waiting.clear()

    def is_stalled(self, clock_s: float, stalled_after_s: float) -> bool:
        """For so long there was something to do, and no progress."""
        if self.state in _AT_REST:
            return False
        begun = [since for since in (self.behind_s, self.in_flight_s) if since is not None]
        if self.state is PipelineState.STARTING:
            begun.append(self.since_s)
        elif self.state is PipelineState.RUNNING and not self.in_flight:
            begun.append(max(self.polled_s, self.since_s))
        return bool(begun) and clock_s - min(begun) >= stalled_after_s

    def _trouble(self, clock_s: float, *, is_stalled: bool) -> str:
        if self.state in _AT_ONCE_UNWELL:
            return f"{self.state.value}: {self.reason}"
        if self.troubled_s is not None and clock_s - self.troubled_s >= _TROUBLE_GRACE_S:
            so_long = f"{clock_s - self.troubled_s:.0f} s"
            return f"no progress for {so_long}: {self.last_error or self.reason}"
        if not is_stalled:
            return ""
        if self.in_flight:
            return f"stalled: {self.in_flight} messages in flight, none settled"
        if self.behind_s is not None and self.lag is not None:
            return f"stalled: {self.lag.lag_rows} rows behind and nothing moves"
        if self.state is PipelineState.STARTING:
            return "stalled: still starting"
        return "stalled: the source does not answer"

    def _undelivered(self) -> str:
        """Why it can't be said that everything is delivered, or nothing."""
        if self.in_flight:
            return f"{self.in_flight} messages in flight"
        if self.state is PipelineState.COMPLETED:
            return ""
        if self.direction == "forward":
            if self.lag is None:
                return "not measured yet"
            return f"{self.lag.lag_rows} rows behind" if self.lag.lag_rows else ""
        if self.state is not PipelineState.RUNNING:
            return self.state.value
        return "" if self.found_nothing else "the last poll found messages"

    def status(self, clock_s: float, now: datetime, stalled_after_s: float) -> PipelineStatus:
        def at(then_s: float) -> datetime:
            return now - timedelta(seconds=clock_s - then_s)

        is_stalled = self.is_stalled(clock_s, stalled_after_s)
        trouble = self._trouble(clock_s, is_stalled=is_stalled)
        undelivered = self._undelivered()
        history = self.rate.history(clock_s)
        return PipelineStatus(
            name=self.name,
            direction=self.direction,
            source=self.source,
            sink=self.sink,
            settings=self.settings,
            state=self.state,
            reason=self.reason,
            since=at(self.since_s),
            is_healthy=not trouble,
            trouble=trouble,
            is_stalled=is_stalled,
            is_drained=not undelivered,
            undelivered=undelivered,
            source_connected=self.source_connected,
            sink_connected=self.sink_connected,
            published=self.published,
            consumed=self.consumed,
            duplicates=self.duplicates,
            dead_lettered=self.dead_lettered,
            errors=self.errors,
            last_error=self.last_error,
            last_error_at=None if self.last_error_s is None else at(self.last_error_s),
            checkpoint=self.checkpoint,
            offset=self.offset,
            in_flight=self.in_flight,
            lag_rows=None if self.lag is None else self.lag.lag_rows,
            oldest_unsent_age_s=None if self.lag is None else self.lag.oldest_unsent_age_s,
            dead_letters=None if self.lag is None else self.lag.dead_letters,
            rate_per_s=sum(history[-_RATE_AVERAGED_OVER_S:]) / _RATE_AVERAGED_OVER_S,
            rate_history=history,
            latency=self.latencies.percentiles(clock_s),
            recent_batches=[
                RecentBatch(
                    acknowledged_at=at(acknowledged_s),
                    checkpoint=checkpoint,
                    messages=batch.messages,
                    duplicates=batch.duplicates,
                    dead_lettered=batch.dead_lettered,
                    attempts=batch.attempts,
                    duration_s=batch.duration_s,
                )
                for acknowledged_s, checkpoint, batch in self.recent
            ],
            last_progress_at=None if self.progress_s is None else at(self.progress_s),
        )


def _first(earlier_s: float | None, now_s: float) -> float:
    return now_s if earlier_s is None else earlier_s


class _Rate:
    """Counts per second, for the last `RATE_SECONDS` complete ones and the present one."""

    def __init__(self) -> None:
        self._counts = [0] * (RATE_SECONDS + 1)
        self._second = 0

    def add(self, messages: int, clock_s: float) -> None:
        self._move_to(math.floor(clock_s))
        self._counts[self._second % len(self._counts)] += messages

    def history(self, clock_s: float) -> Sequence[int]:
        """Of the complete seconds, the earliest first."""
        self._move_to(math.floor(clock_s))
        size = len(self._counts)
        return [self._counts[(self._second + 1 + age) % size] for age in range(RATE_SECONDS)]

    def _move_to(self, second: int) -> None:
        for skipped in range(max(self._second + 1, second - RATE_SECONDS), second + 1):
            self._counts[skipped % len(self._counts)] = 0
        self._second = max(self._second, second)


_SLOT_S = 10.0
_SLOTS = 6
_SAMPLES_OF_A_BATCH = 100
# From 100 µs in steps of a twelfth of a doubling (6 %) to more than an hour.
_BOUNDS_S = [0.0001 * 2 ** (step / 12) for step in range(310)]


class _LatencyWindow:
    """Latencies of the last minute in fine buckets, one histogram for each ten seconds.

    Of a large batch every n-th latency counts for n, so that a batch costs the same at any size.
    """

    def __init__(self) -> None:
        self._slots: deque[tuple[float, list[int]]] = deque(maxlen=_SLOTS)

    def add(self, latencies_s: Sequence[float], clock_s: float) -> None:
        if not latencies_s:
            return
        if not self._slots or clock_s - self._slots[-1][0] >= _SLOT_S:
            self._slots.append((clock_s, [0] * (len(_BOUNDS_S) + 1)))
        counts = self._slots[-1][1]
        stride = -(-len(latencies_s) // _SAMPLES_OF_A_BATCH)
        for latency_s in latencies_s[::stride]:
            counts[bisect_right(_BOUNDS_S, latency_s)] += stride

    def percentiles(self, clock_s: float) -> Latency | None:
        """None where the last minute saw none."""
        while self._slots and clock_s - self._slots[0][0] >= _SLOT_S * _SLOTS:
            self._slots.popleft()
        if not self._slots:
            return None
        merged = [sum(column) for column in zip(*(slot[1] for slot in self._slots), strict=True)]
        total = sum(merged)
        return Latency(
            p50_s=_quantile(merged, total * 0.50),
            p95_s=_quantile(merged, total * 0.95),
            p99_s=_quantile(merged, total * 0.99),
        )


def _quantile(counts: Sequence[int], rank: float) -> float:
    """The upper bound of the bucket in which the message of that rank lies."""
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= rank:
            return _BOUNDS_S[min(bucket, len(_BOUNDS_S) - 1)]
    return _BOUNDS_S[-1]
