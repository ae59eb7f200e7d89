"""What is counted and remembered of one pipeline, and how it is judged."""

from __future__ import annotations

import heapq
import math
import operator
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import msgspec

from relay.board.status import PipelineStatus, RecentBatch, WorkerStatus
from relay.board.window import Histogram, LatencyWindow, RateWindow
from relay.errors import ErrorKind
from relay.events import (
    BatchAcknowledged,
    BatchPublished,
    ClaimCheckFetched,
    ConnectionChanged,
    DeadLettered,
    DeadLettersRetried,
    Direction,
    LagObserved,
    LeaseExpired,
    PipelineDescribed,
    PipelineEvent,
    PipelineState,
    Polled,
    RequestRefused,
    Retried,
    Side,
    SourceLagObserved,
    StateChanged,
)

AT_REST = frozenset({PipelineState.STOPPED, PipelineState.COMPLETED})
RECENT_BATCHES = 20

_RATE_AVERAGED_OVER_S = 5
# For so long a refused request says something about the senders, if none was accepted.
_REFUSED_FOR_S = 60.0
# Who does not even know the path or the method is not one of them.
_OF_PASSERS_BY = frozenset({"unknown_path", "method"})
_TROUBLE_GRACE_S = 10.0

_DURATION_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
_LATENCY_BOUNDS_S = (*_DURATION_BOUNDS_S, 300.0, 1800.0, 3600.0)

# These are unwell at once, and an error of this kind.
_UNWELL = {
    PipelineState.FAILED: ErrorKind.CONFIGURATION,
    PipelineState.SUSPENDED: ErrorKind.OUTAGE,
}
_TROUBLED = frozenset({*_UNWELL, PipelineState.RETRYING})
_WORST_FIRST = (
    PipelineState.FAILED,
    PipelineState.SUSPENDED,
    PipelineState.RETRYING,
    PipelineState.STOPPING,
    PipelineState.STARTING,
    PipelineState.RUNNING,
    PipelineState.COMPLETED,
    PipelineState.STOPPED,
)
_SHOWN_AS_THEY_ARE = (
    "name", "direction", "source", "sink", "settings", "state", "reason", "source_connected",
    "sink_connected", "duplicates", "dead_lettered", "filtered", "last_error", "checkpoint",
    "offset", "in_flight", "source_lag", "dead_letters",
)  # fmt: skip


@dataclass(slots=True)
class PipelineStats:
    """The fold of one pipeline's events. Names in ``_s`` are of the monotonic clock, in seconds.

    ``accepted`` counts messages that the sink has accepted, retried dead letters with them.
    ``errors`` counts failed attempts, dead-lettered messages and entries into failed or suspended.
    ``workers``: those of a consumer group, where there are several. What is counted is then their
    sum; a state is that of the one that fares worst.
    """

    name: str
    direction: Direction
    mask: Callable[[str], str]
    clock: Callable[[], float]
    now: Callable[[], datetime]
    stalled_after_s: float
    since_s: float
    source: str = ""
    sink: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    state: PipelineState = PipelineState.STARTING
    reason: str = ""
    source_connected: bool = False
    sink_connected: bool = False
    polls: int = 0
    full_refresh_batches: int = 0
    claim_check_pages: int = 0
    accepted: int = 0
    duplicates: int = 0
    dead_lettered: int = 0
    filtered: int = 0
    dying: int = 0
    acknowledged_batches: int = 0
    leases_lost: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    last_refusal: str = ""
    refused_s: float = -math.inf
    received_s: float = -math.inf
    retries: Counter[Side] = field(default_factory=Counter)
    errors: Counter[ErrorKind] = field(default_factory=Counter)
    last_error: str = ""
    last_error_s: float | None = None
    checkpoint: str = ""
    offset: int | None = None
    in_flight: int = 0
    lag: LagObserved | None = None
    source_lag: int | None = None
    dead_letters: int | None = None
    found_nothing: bool = False
    polled_s: float = -math.inf
    progress_at: datetime | None = None
    troubled_s: float | None = None
    behind_s: float | None = None
    in_flight_s: float | None = None
    waiting: deque[BatchPublished] = field(default_factory=deque)
    workers: dict[int, PipelineStats] = field(default_factory=dict)
    recent: deque[tuple[float, str, BatchPublished]] = field(
        default_factory=lambda: deque(maxlen=RECENT_BATCHES)
    )
    rate: RateWindow = field(default_factory=RateWindow)
    latencies: LatencyWindow = field(default_factory=LatencyWindow)
    poll_durations: Histogram = field(default_factory=lambda: Histogram(_DURATION_BOUNDS_S))
    publish_durations: Histogram = field(default_factory=lambda: Histogram(_DURATION_BOUNDS_S))
    delivery_latencies: Histogram = field(default_factory=lambda: Histogram(_LATENCY_BOUNDS_S))

    def observe(self, event: PipelineEvent) -> None:
        """Take one event into account."""
        clock_s = self.clock()
        if event.worker:
            self._of_worker(event)
        match event:
            case Polled():
                self._polled(event, clock_s)
            case BatchPublished():
                self._settled(event, clock_s)
            case BatchAcknowledged():
                self._acknowledged(event, clock_s)
            case LagObserved():
                self.lag = event
                self.dead_letters = event.dead_letters
                for worker in self.workers.values():
                    worker.dead_letters = event.dead_letters
                self.behind_s = _first(self.behind_s, clock_s) if event.lag_rows > 0 else None
            case SourceLagObserved():
                self.source_lag = event.messages
            case Retried():
                self.retries[event.side] += 1
                self._failed(event.kind, event.error, clock_s)
                self.troubled_s = _first(self.troubled_s, clock_s)
            case LeaseExpired():
                self.leases_lost += 1
            case DeadLettered():
                self.dead_lettered += event.messages
                self.dead_letters = (self.dead_letters or 0) + event.messages
                self._failed(event.kind, event.error, clock_s, event.messages)
            case DeadLettersRetried():
                self._accepted(event.delivered, clock_s)
                self.dead_letters = max(0, (self.dead_letters or 0) - event.delivered)
            case RequestRefused():
                self.refusals[event.reason] += 1
                if event.reason not in _OF_PASSERS_BY:
                    self.refused_s = clock_s
                    self.last_refusal = f"{event.status}, {event.reason}"
            case ClaimCheckFetched():
                self.claim_check_pages += 1
            case StateChanged() if not event.worker:
                self._changed(event, clock_s)
            case ConnectionChanged() if not event.worker:
                self._connected(event)
            case PipelineDescribed():
                self.direction, self.source, self.sink = event.direction, event.source, event.sink
                self.settings = event.settings
                self.workers.clear()
            case _:
                pass
        if event.worker:
            self._gather(clock_s)

    def _of_worker(self, event: PipelineEvent) -> None:
        worker = self.workers.get(event.worker)
        if worker is None:
            worker = PipelineStats(
                name=self.name,
                direction=self.direction,
                mask=self.mask,
                clock=self.clock,
                now=self.now,
                stalled_after_s=self.stalled_after_s,
                since_s=self.clock(),
            )
            self.workers[event.worker] = worker
        worker.observe(msgspec.structs.replace(event, worker=0))

    def _gather(self, clock_s: float) -> None:
        """What holds of the workers as a whole."""
        workers = self.workers.values()
        worst = min(workers, key=lambda worker: _WORST_FIRST.index(worker.state))
        if worst.state is not self.state:
            self.since_s = clock_s
        self.state, self.reason = worst.state, worst.reason
        self.source_connected = all(worker.source_connected for worker in workers)
        self.sink_connected = all(worker.sink_connected for worker in workers)
        self.in_flight = sum(worker.in_flight for worker in workers)
        self.found_nothing = all(worker.found_nothing for worker in workers)

    def _polled(self, event: Polled, clock_s: float) -> None:
        self.polled_s = clock_s
        self.polls += 1
        self.full_refresh_batches += event.full_refresh
        self.poll_durations.observe((event.duration_s,))
        taken = event.messages + event.rejected
        self.found_nothing = taken == 0
        if taken:
            self.received_s = clock_s
        if taken and not self.in_flight:
            self.in_flight_s = clock_s
        self.in_flight += taken
        if not self.in_flight and self.state is PipelineState.RUNNING:
            self.troubled_s = None

    def _settled(self, event: BatchPublished, clock_s: float) -> None:
        self.dying += event.dead_lettered
        self._accepted(event.messages, clock_s)
        self.duplicates += event.duplicates
        self.filtered += event.filtered
        if event.messages or event.dead_lettered:
            self.publish_durations.observe((event.duration_s,))
        self.delivery_latencies.observe(event.latencies_s)
        self.latencies.add(event.latencies_s, clock_s)
        if not event.worker:
            self.waiting.append(msgspec.structs.replace(event, latencies_s=()))

    def _accepted(self, messages: int, clock_s: float) -> None:
        self.accepted += messages
        if messages:
            self.dying = 0
        self.rate.add(messages, clock_s)

    def _acknowledged(self, event: BatchAcknowledged, clock_s: float) -> None:
        self.in_flight = max(0, self.in_flight - event.messages)
        self.in_flight_s = clock_s if self.in_flight else None
        self.progress_at = self.now()
        self.acknowledged_batches += 1
        self.behind_s = None
        self.troubled_s = None
        self.checkpoint = event.checkpoint
        if event.offset is not None:
            self.offset = event.offset
        if self.waiting:
            settled = self.waiting.popleft()
            if event.messages:
                self.recent.append((clock_s, event.checkpoint, settled))

    def _failed(self, kind: ErrorKind, error: str, clock_s: float, times: int = 1) -> None:
        self.errors[kind] += times
        self.last_error = self.mask(error)
        self.last_error_s = clock_s

    def _changed(self, event: StateChanged, clock_s: float) -> None:
        if event.state is not self.state:
            self.since_s = clock_s
        self.state = event.state
        self.reason = self.mask(event.reason)
        if event.state in _TROUBLED:
            self.troubled_s = _first(self.troubled_s, clock_s)
        if event.state in _UNWELL:
            self._failed(_UNWELL[event.state], event.reason, clock_s)
        if event.state in AT_REST:
            self._forget_in_flight()
            self.troubled_s = None

    def _connected(self, event: ConnectionChanged) -> None:
        if event.side == "sink":
            self.sink_connected = event.is_connected
            return
        self.source_connected = event.is_connected
        if not event.is_connected:
            self.source_lag = None
            self._forget_in_flight()

    def _forget_in_flight(self) -> None:
        """The source hands out again what it had handed out."""
        self.in_flight = 0
        self.in_flight_s = None
        self.found_nothing = False
        self.waiting.clear()

    def is_stalled(self) -> bool:
        """For ``stalled_after_s`` there was something to do, and no progress."""
        if self.state in AT_REST:
            return False
        if self.workers:
            is_behind = _is_over(self.behind_s, self.stalled_after_s, self.clock())
            return is_behind or any(worker.is_stalled() for worker in self.workers.values())
        begun = [since for since in (self.behind_s, self.in_flight_s) if since is not None]
        if self.state is PipelineState.STARTING:
            begun.append(self.since_s)
        elif self.state is PipelineState.RUNNING and not self.in_flight:
            begun.append(max(self.polled_s, self.since_s))
        return bool(begun) and self.clock() - min(begun) >= self.stalled_after_s

    def trouble(self) -> str:
        """Why it is not healthy; empty where it is."""
        for number, worker in sorted(self.workers.items()):
            if trouble := worker.trouble():
                return f"worker {number}: {trouble}"
        if self.state in _UNWELL:
            return f"{self.state.value}: {self.reason}"
        is_troubled = not self.workers and _is_over(self.troubled_s, _TROUBLE_GRACE_S, self.clock())
        if is_troubled and self.troubled_s is not None:
            so_long = f"{self.clock() - self.troubled_s:.0f} s"
            return f"no progress for {so_long}: {self.last_error or self.reason}"
        if self.dying > 1 and self.dead_letters != 0:
            return f"the last {self.dying} messages became dead letters: {self.last_error}"
        if self.clock() - self.refused_s < _REFUSED_FOR_S < self.refused_s - self.received_s:
            return f"requests are refused, and none was accepted: {self.last_refusal}"
        if not self.is_stalled():
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

    def status(self) -> PipelineStatus:
        """As it stands now, frozen."""
        clock_s, now = self.clock(), self.now()

        def at(then_s: float) -> datetime:
            return now - timedelta(seconds=clock_s - then_s)

        trouble = self.trouble()
        undelivered = self._undelivered()
        history = self.rate.history(clock_s)
        return PipelineStatus(
            **{name: getattr(self, name) for name in _SHOWN_AS_THEY_ARE},
            since=at(self.since_s),
            is_healthy=not trouble,
            trouble=trouble,
            is_stalled=self.is_stalled(),
            is_drained=not undelivered,
            undelivered=undelivered,
            published=self.accepted if self.direction == "forward" else 0,
            consumed=self.accepted if self.direction == "reverse" else 0,
            refused=dict(self.refusals),
            errors=self.errors.total(),
            last_error_at=None if self.last_error_s is None else at(self.last_error_s),
            lag_rows=None if self.lag is None else self.lag.lag_rows,
            oldest_unsent_age_s=None if self.lag is None else self.lag.oldest_unsent_age_s,
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
                for acknowledged_s, checkpoint, batch in self._recent()
            ],
            last_progress_at=self.progress_at,
            workers=[
                WorkerStatus(
                    number=number,
                    state=worker.state,
                    reason=worker.reason,
                    trouble=worker.trouble(),
                    published=worker.accepted,
                    errors=worker.errors.total(),
                    in_flight=worker.in_flight,
                    checkpoint=worker.checkpoint,
                    last_progress_at=worker.progress_at,
                )
                for number, worker in sorted(self.workers.items())
            ],
        )

    def _recent(self) -> Iterable[tuple[float, str, BatchPublished]]:
        if not self.workers:
            return self.recent
        of_all = heapq.merge(
            *(worker.recent for worker in self.workers.values()), key=operator.itemgetter(0)
        )
        return deque(of_all, maxlen=RECENT_BATCHES)


def _is_over(since_s: float | None, seconds: float, now_s: float) -> bool:
    return since_s is not None and now_s - since_s >= seconds


def _first(earlier_s: float | None, now_s: float) -> float:
    return now_s if earlier_s is None else earlier_s
