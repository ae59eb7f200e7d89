"""What the core emits to its observers: metrics, health, logs, the status view and tests.

The core emits, and does not know who listens. Observers run in the event loop's thread, must be
quick, and never fail the core: what an observer raises is logged and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Literal

import msgspec

from relay.errors import ErrorKind

Direction = Literal["forward", "reverse"]
Side = Literal["source", "sink"]


class PipelineState(StrEnum):
    """Where a pipeline stands in this process."""

    STARTING = "starting"
    RUNNING = "running"
    RETRYING = "retrying"
    SUSPENDED = "suspended"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"
    COMPLETED = "completed"


class PipelineEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Common to all events of one pipeline.

    ``worker``: which of several workers in this relay, counted from 1; 0 where there is one.
    """

    pipeline: str
    direction: Direction
    worker: int = 0


class PipelineDescribed(PipelineEvent, frozen=True, kw_only=True):
    """A pipeline is going to run here: what it connects. ``settings`` has secrets masked."""

    source: str
    sink: str
    settings: dict[str, object]


class StateChanged(PipelineEvent, frozen=True, kw_only=True):
    """The pipeline's state, with the reason where it is not well."""

    state: PipelineState
    reason: str = ""


class ConnectionChanged(PipelineEvent, frozen=True, kw_only=True):
    """One side was connected or lost. ``details``: what it says of its broker, if anything."""

    side: Side
    is_connected: bool
    details: Mapping[str, str] = {}


class Polled(PipelineEvent, frozen=True, kw_only=True):
    """A poll has returned: so many messages, after so long including the wait."""

    messages: int
    rejected: int
    full_refresh: bool
    duration_s: float


class BatchPublished(PipelineEvent, frozen=True, kw_only=True):
    """All messages of a batch are settled: accepted, dead-lettered, or left out (``filtered``).

    Where a stop came first it says how far the batch had come; it will be repeated as a whole.
    ``latencies_s``: for each accepted message that has a creation time, creation to acceptance.
    """

    messages: int
    duplicates: int
    dead_lettered: int
    duration_s: float
    attempts: int
    filtered: int = 0
    latencies_s: Sequence[float] = ()


class BatchAcknowledged(PipelineEvent, frozen=True, kw_only=True):
    """The source has made it durable. ``offset`` where positions are numbers, else None."""

    messages: int
    checkpoint: str
    offset: int | None = None


class Retried(PipelineEvent, frozen=True, kw_only=True):
    """Something failed and will be tried again after ``delay_s``."""

    side: Side
    attempt: int
    delay_s: float
    kind: ErrorKind
    error: str


class LeaseExpired(PipelineEvent, frozen=True, kw_only=True):
    """A lease ran out, or its group was moved: what was not acknowledged is delivered again."""

    reason: str


class DeadLettered(PipelineEvent, frozen=True, kw_only=True):
    """Messages went to the dead-letter queue, all for this reason."""

    messages: int
    kind: ErrorKind
    error: str


class DeadLettersRetried(PipelineEvent, frozen=True, kw_only=True):
    """Dead letters were published again: so many were accepted, so many failed again."""

    delivered: int
    failed: int


class ClaimCheckFetched(PipelineEvent, frozen=True, kw_only=True):
    """One page of claim-check rows was read."""

    rows: int


class RequestRefused(PipelineEvent, frozen=True, kw_only=True):
    """A request to this pipeline's receiver was answered with this status, and is no message.

    ``reason`` is one of few words; what the request held is not told.
    """

    status: int
    reason: str


class LagObserved(PipelineEvent, frozen=True, kw_only=True):
    """How far a pipeline is behind its outbox, and how many dead letters of it were counted."""

    lag_rows: int
    oldest_unsent_age_s: float
    dead_letters: int


class SourceLagObserved(PipelineEvent, frozen=True, kw_only=True):
    """How many messages the broker has for a source that are not acknowledged; None: unknown."""

    messages: int | None


class OutboxObserved(msgspec.Struct, frozen=True, kw_only=True):
    """What an outbox holds; rows are PostgreSQL's estimate. None where it is not known (yet)."""

    outbox: str
    rows: int | None
    bytes: int | None
    capture_problems: int | None


class CatalogObserved(msgspec.Struct, frozen=True, kw_only=True):
    """What only the database tells: all outboxes, and the pipelines that no relay runs.

    ``unowned``: the enabled ones of the group that none of its relays owns. ``idle``: how far
    these and the disabled ones are behind, as far as it is known.
    """

    outboxes: Sequence[OutboxObserved]
    unowned: Sequence[str]
    idle: Sequence[LagObserved]


class OwnershipChanged(msgspec.Struct, frozen=True, kw_only=True):
    """Which pipelines this process runs now, and how many relays share the group.

    ``everywhere``: those of them that no relay owns, because all of the group run them.
    ``blocked``: those that none of the group can have, each with who holds its lock instead.
    """

    pipelines: Sequence[str]
    members: int
    everywhere: Sequence[str] = ()
    blocked: Mapping[str, str] = {}


class DatabaseChanged(msgspec.Struct, frozen=True, kw_only=True):
    """The relay's own database connection was made or lost."""

    is_connected: bool
    reason: str = ""


Event = PipelineEvent | OwnershipChanged | CatalogObserved | DatabaseChanged
Observer = Callable[[Event], None]

_log = logging.getLogger(__name__)


class Events:
    """Hands each event to every observer, in the order in which they subscribed."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Add an observer; returns what removes it again."""
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def emit(self, event: Event) -> None:
        """Call all observers. Never raises."""
        for observer in tuple(self._observers):
            try:
                observer(event)
            except Exception:  # noqa: BLE001 - an observer must never fail the core
                _log.exception("an observer failed", extra={"event": type(event).__name__})
