"""What the status view shows and what it can ask for, wherever it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from relay.board import PipelineStatus, RelayStatus
from relay.catalog import PipelineRow


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """What each relay says of itself, and every pipeline of the catalog.

    ``catalog`` also has the pipelines that no relay runs, paused ones above all; it may be older
    than what the relays say. ``lags``: rows behind the outbox of those that none of
    these relays runs, where it is known.
    """

    relays: Sequence[RelayStatus]
    catalog: Sequence[PipelineRow] = ()
    lags: Mapping[str, int | None] = {}


class PipelineLine(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline of the fleet. ``status`` and ``owner`` are absent where nobody runs it.

    ``trouble`` says why it is not well, and is empty where it is.
    """

    name: str
    source: str
    sink: str
    is_forward: bool
    is_enabled: bool
    state: str
    trouble: str = ""
    owner: str = ""
    status: PipelineStatus | None = None
    resting_lag_rows: int | None = None

    @property
    def rate_per_s(self) -> float:
        """Messages a second, over the last seconds."""
        return 0.0 if self.status is None else self.status.rate_per_s

    @property
    def lag_rows(self) -> int | None:
        """Rows behind the outbox; None for a reverse pipeline and where it is not known."""
        if self.status is None:
            return self.resting_lag_rows
        return self.status.lag_rows if self.is_forward else None

    @property
    def errors(self) -> int:
        """Failures since the owner took it over."""
        return 0 if self.status is None else self.status.errors

    @property
    def dead_letters(self) -> int:
        """Messages in the dead-letter queue, as last counted."""
        return 0 if self.status is None else self.status.dead_letters or 0


class LogLine(Protocol):
    """One entry of a log."""

    @property
    def level(self) -> str: ...

    def as_text(self, *, colour: bool = False) -> str:
        """The entry for people; its first line says what happened."""


class LogTail(Protocol):
    """The end of a log."""

    def entries(self) -> Sequence[LogLine]:
        """What is kept, the oldest first."""


class Watched(Protocol):
    """Relays that can be looked at and operated.

    The asynchronous calls raise `RelayError`; the view shows it and goes on.
    """

    def fleet(self) -> Fleet:
        """The fleet now; quick, and called in the event loop's thread."""

    async def refresh(self) -> None:
        """Fetch what `fleet` can't know by itself."""

    async def pause(self, pipeline: str) -> None:
        """Disable it; its position stays."""

    async def resume(self, pipeline: str) -> None:
        """Enable it."""

    async def retry_dead_letters(self, pipeline: str) -> int:
        """Ask for another try of all its dead letters; gives their number."""


def lines_of(fleet: Fleet) -> list[PipelineLine]:
    """Every pipeline of the fleet once for each relay that runs it, ordered by name."""
    rows = {row.name: row for row in fleet.catalog}
    lines = [
        _run_line(status, relay.worker_id, rows)
        for relay in fleet.relays
        for status in relay.pipelines
    ]
    shown = {line.name for line in lines}
    waiting = "no relay of the group runs it" if _is_whole_group(fleet) else ""
    lines += [
        _resting_line(row, fleet.lags.get(name), waiting)
        for name, row in rows.items()
        if name not in shown
    ]
    return sorted(lines, key=lambda line: (line.name, line.owner))


def started_at(fleet: Fleet) -> datetime | None:
    """When the oldest relay started."""
    return min((relay.started_at for relay in fleet.relays), default=None)


def _is_whole_group(fleet: Fleet) -> bool:
    """Whether what these relays don't run, nobody runs; not before it is decided who runs what."""
    members = max((relay.members for relay in fleet.relays), default=0)
    return len(fleet.relays) >= members and all(relay.is_coordinated for relay in fleet.relays)


def _run_line(status: PipelineStatus, owner: str, rows: Mapping[str, PipelineRow]) -> PipelineLine:
    row = rows.get(status.name)
    return PipelineLine(
        name=status.name,
        source=status.source,
        sink=status.sink,
        is_forward=status.direction == "forward",
        is_enabled=row is None or row.enabled,
        state="stalled" if status.is_stalled else status.state.value,
        trouble=status.trouble,
        owner=owner,
        status=status,
    )


def _resting_line(row: PipelineRow, lag_rows: int | None, waiting: str) -> PipelineLine:
    return PipelineLine(
        name=row.name,
        source=str(row.config.get("source_type", "?")),
        sink=str(row.config.get("sink_type", "?")),
        is_forward=row.direction == "forward",
        is_enabled=row.enabled,
        state="waiting" if row.enabled else "paused",
        trouble=waiting if row.enabled else "",
        resting_lag_rows=lag_rows,
    )
