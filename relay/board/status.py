"""What a snapshot of the board shows; all of it frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec

from relay.events import Direction, PipelineState


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


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One of several workers of a consumer group in this relay; as in `PipelineStatus`."""

    number: int
    state: PipelineState
    reason: str
    trouble: str
    published: int
    errors: int
    in_flight: int
    checkpoint: str
    last_progress_at: datetime | None


class PipelineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline at the time of the snapshot. Counts are since this process took it over.

    ``settings`` have their secrets masked. ``since`` is when ``state`` was entered, whatever the
    reason has been since. ``trouble`` says why ``is_healthy`` is false, ``undelivered`` why
    ``is_drained`` is; both are empty otherwise. ``published`` counts messages that a forward
    pipeline's sink accepted, ``consumed`` those of a reverse one, ``filtered`` those that the
    pipeline's ``ops`` or ``where`` left out, ``refused`` by reason the
    requests to a receiver that became no messages. ``in_flight`` messages are polled and not
    acknowledged. ``lag_rows``, ``oldest_unsent_age_s`` and ``dead_letters`` are as last
    observed, None before. ``rate_history`` has one count a second, the latest complete second
    last. ``workers``: where this relay has several of the pipeline; numbers are then sums, and the
    state is that of the worker that fares worst.
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
    refused: Mapping[str, int]
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
    workers: Sequence[WorkerStatus] = ()
    source_lag: int | None = None
    filtered: int = 0


class RelayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The relay at the time of the snapshot; pipelines are ordered by name.

    ``is_coordinated``: it has been decided at least once which pipelines run here. ``members``
    counts the relays of the group, this one included. ``blocked``: pipelines that run nowhere, each
    with the session outside of the group that holds its lock. ``unowned``: enabled ones that no
    relay of the group has taken for a while. ``paused``: the disabled ones, each with the rows that
    it is behind, as far as they were seen. ``delivered_before``: messages that
    this relay delivered for a pipeline which then was paused, released or set to something else.
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
    blocked: Mapping[str, str] = {}
    unowned: Sequence[str] = ()
    paused: Mapping[str, int] = {}
    delivered_before: Mapping[str, int] = {}

    @property
    def trouble(self) -> str:
        """Why the relay is not well, in one line; empty where it is."""
        if not self.database_connected:
            return self.database_reason or "the database is not connected"
        if self.blocked:
            held = "; ".join(f"{name}: {who}" for name, who in sorted(self.blocked.items()))
            return f"no relay can run what a stranger holds the lock of: {held}"
        if self.unowned:
            return f"no relay of the group runs: {', '.join(self.unowned)}"
        unwell = [pipeline.name for pipeline in self.pipelines if not pipeline.is_healthy]
        return f"not healthy: {', '.join(unwell)}" if unwell else ""

    @property
    def is_healthy(self) -> bool:
        """True when the database is connected, and every pipeline is run and well."""
        return not self.trouble

    @property
    def is_ready(self) -> bool:
        """True when the database is connected and it has been decided what runs here."""
        return self.database_connected and self.is_coordinated

    def to_json(self) -> bytes:
        """This status as one JSON object; times in RFC 3339."""
        return msgspec.json.encode(self, enc_hook=str)
