"""A fleet that does not move, for the tests of the view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec

from relay.board import Latency, PipelineStatus, RecentBatch, RelayStatus
from relay.catalog import DeadLetterSummary, Lag, PipelineRow
from relay.errors import Outage
from relay.events import PipelineState
from relay.status import Fleet
from relay.status.screen import Scene, ViewState

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)

HEALTHY = PipelineStatus(
    name="orders-to-nats",
    direction="forward",
    source="outbox",
    sink="nats",
    settings={"source": {"outbox": "orders"}, "sink": {"type": "nats", "token": "${env:TOKEN}"}},
    state=PipelineState.RUNNING,
    reason="",
    since=NOW - timedelta(minutes=3, seconds=12),
    is_healthy=True,
    trouble="",
    is_stalled=False,
    is_drained=False,
    undelivered="",
    source_connected=True,
    sink_connected=True,
    published=12_345,
    consumed=0,
    duplicates=2,
    dead_lettered=0,
    refused={},
    errors=0,
    last_error="",
    last_error_at=None,
    checkpoint="12345",
    offset=12_345,
    in_flight=7,
    lag_rows=42,
    oldest_unsent_age_s=3.4,
    dead_letters=0,
    rate_per_s=812.0,
    rate_history=[0, 100, 200, 400, 800, 812, 790],
    latency=Latency(p50_s=0.003, p95_s=0.009, p99_s=0.021),
    recent_batches=[
        RecentBatch(
            acknowledged_at=NOW - timedelta(seconds=1),
            checkpoint="12345",
            messages=500,
            duplicates=2,
            dead_lettered=0,
            attempts=2,
            duration_s=0.0123,
        )
    ],
    last_progress_at=NOW,
)
TROUBLED = msgspec.structs.replace(
    HEALTHY,
    name="invoices-from-nats",
    direction="reverse",
    source="nats",
    sink="pg-inbox",
    settings={},
    state=PipelineState.RETRYING,
    is_healthy=False,
    trouble="no progress for 12 s: NATS is out of reach",
    sink_connected=False,
    published=0,
    consumed=99,
    errors=3,
    last_error="NATS is out of reach",
    last_error_at=NOW - timedelta(seconds=2),
    lag_rows=0,
    dead_letters=5,
    rate_per_s=0.0,
    rate_history=[0] * 7,
    latency=None,
    recent_batches=[],
)
DEAD_LETTERS = [
    DeadLetterSummary(
        id=17,
        subject="pgtrickle.invoices.insert",
        error_kind="rejected",
        error='new row for relation "invoice_inbox" violates check constraint "total_is_positive";'
        " mend the data or drop the constraint, then try it again",
        attempts=1,
        last_failed_at=NOW - timedelta(seconds=40),
        retry_requested_at=None,
    ),
    DeadLetterSummary(
        id=12,
        subject=None,
        error_kind="schema",
        error="the body is no JSON object",
        attempts=3,
        last_failed_at=NOW - timedelta(minutes=40),
        retry_requested_at=NOW,
    ),
]
PAUSED = PipelineRow(
    name="audit-to-file",
    direction="forward",
    enabled=False,
    config={"source_type": "outbox", "sink_type": "file"},
)


@dataclass(frozen=True)
class Line:
    """An entry of a log."""

    level: str
    text: str

    def as_short_text(self) -> str:
        return self.text


@dataclass(frozen=True)
class Log:
    """A log that stays as it is."""

    lines: Sequence[Line] = (
        Line("info", "12:00:00 INFO    running [orders-to-nats]"),
        Line("warning", "12:00:01 WARNING source failed, trying again [invoices-from-nats]"),
    )

    def entries(self) -> Sequence[Line]:
        return self.lines

    def show_on_stderr(self, *, shown: bool) -> None:
        """Nobody writes to it."""


def fleet_of(
    *statuses: PipelineStatus, catalog: Sequence[PipelineRow] = (), worker_id: str = "worker-a"
) -> Fleet:
    """One relay that runs these, and what the catalog has besides."""
    relay = RelayStatus(
        worker_id=worker_id,
        group_id="default",
        version="0.29.0",
        started_at=NOW - timedelta(hours=2, minutes=5),
        taken_at=NOW,
        database_connected=True,
        database_reason="",
        is_coordinated=True,
        members=1,
        pipelines=list(statuses),
        delivered_before={PAUSED.name: 4_321},
    )
    lag = Lag(
        pipeline=PAUSED.name,
        last_change_id=100,
        max_outbox_id=1_300,
        lag_rows=1_200,
        oldest_unsent_at=NOW - timedelta(minutes=7),
        pending_gaps=0,
        worker_id=None,
    )
    return Fleet(relays=[relay], catalog=catalog, lags={PAUSED.name: lag})


FLEET = fleet_of(HEALTHY, TROUBLED, catalog=[PAUSED])


def scene(
    view: ViewState | None = None,
    fleet: Fleet = FLEET,
    banner: Sequence[str] = (),
) -> Scene:
    """What is on the screen, at a time that does not pass."""
    return Scene(
        fleet=fleet,
        view=view or ViewState(),
        now=NOW,
        log=Log().entries(),
        dead_letters={TROUBLED.name: DEAD_LETTERS},
        banner=banner,
    )


class RecordingFleet:
    """A `Watched` that remembers what it was told; resuming what is paused from the start fails.

    Of the dead letters that are tried again the first is refused, and others are delivered.
    """

    def __init__(self) -> None:
        self.told: list[str] = []
        self._paused: set[str] = set()
        self._letters = list(DEAD_LETTERS)
        self._looks = 0

    def fleet(self) -> Fleet:
        rows = [
            PAUSED,
            *(
                PipelineRow(
                    name=status.name,
                    direction=status.direction,
                    enabled=status.name not in self._paused,
                    config={"source_type": status.source, "sink_type": status.sink},
                )
                for status in (HEALTHY, TROUBLED)
            ),
        ]
        running = [status for status in (HEALTHY, TROUBLED) if status.name not in self._paused]
        return fleet_of(*running, catalog=rows)

    async def refresh(self) -> None:
        """What was asked for is done a while later: after the looks that follow the request."""
        if self._letters[0].retry_requested_at:
            self._looks += 1
        if self._looks > 2:
            self._letters[0] = msgspec.structs.replace(
                DEAD_LETTERS[0], attempts=2, error="the total is still -1"
            )

    async def dead_letters(self, pipeline: str) -> Sequence[DeadLetterSummary]:
        return list(self._letters) if pipeline == TROUBLED.name else ()

    async def pause(self, pipeline: str) -> None:
        self.told.append(f"pause {pipeline}")
        self._paused.add(pipeline)

    async def resume(self, pipeline: str) -> None:
        self.told.append(f"resume {pipeline}")
        if pipeline == PAUSED.name:
            raise Outage("PostgreSQL is out of reach")
        self._paused.discard(pipeline)

    async def retry_dead_letters(self, pipeline: str) -> int:
        self.told.append(f"retry {pipeline}")
        return 5

    async def retry_dead_letter(self, letter: int) -> None:
        self.told.append(f"retry {letter}")
        if letter == DEAD_LETTERS[0].id:
            self._letters[0] = msgspec.structs.replace(DEAD_LETTERS[0], retry_requested_at=NOW)
        else:
            self._letters = [one for one in self._letters if one.id != letter]
