"""What the status view shows and what it can ask for, wherever it comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from relay.board import PipelineStatus, RelayStatus
from relay.catalog import Backfill, DeadLetterSummary, Lag, PipelineRow, Seek
from relay.overview import PAUSED, WAITING
from relay.partition import pipeline_of

LATEST_DEAD_LETTERS = 10


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """What each relay says of itself, and every pipeline of the catalog, all secrets masked.

    ``catalog`` also has the pipelines that no relay runs, paused ones above all; ``lags`` and
    ``dead_letters`` are theirs. ``ongoing`` are those that are not over.
    Whatever the catalog knows may be older than what the relays say.
    """

    relays: Sequence[RelayStatus]
    catalog: Sequence[PipelineRow] = ()
    lags: Mapping[str, Lag] = {}
    dead_letters: Mapping[str, int] = {}
    ongoing: Sequence[Backfill | Seek] = ()


class PipelineLine(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline of the fleet. ``status`` and ``owner`` are absent where nobody runs it.

    ``trouble`` says why it is not well, else it is empty. ``lag_rows`` is None for a reverse
    pipeline and where it is not known. ``delivered``: by the owner since it started, or by all
    relays where nobody runs it.
    """

    name: str
    source: str
    sink: str
    is_forward: bool
    is_enabled: bool
    state: str
    settings: Mapping[str, object]
    trouble: str = ""
    owner: str = ""
    status: PipelineStatus | None = None
    lag_rows: int | None = None
    oldest_unsent_age_s: float | None = None
    dead_letters: int = 0
    delivered: int = 0

    @property
    def rate_per_s(self) -> float:
        """Messages a second, over the last seconds."""
        return 0.0 if self.status is None else self.status.rate_per_s

    @property
    def p95_s(self) -> float | None:
        """Creation to acceptance over the last minute; None where it saw none."""
        latency = None if self.status is None else self.status.latency
        return None if latency is None else latency.p95_s

    @property
    def errors(self) -> int:
        """Failures since the owner took it over."""
        return 0 if self.status is None else self.status.errors


class LogLine(Protocol):
    """One entry of a log."""

    @property
    def level(self) -> str: ...

    def as_short_text(self) -> str:
        """The entry in one line for people, what happened first."""


class LogTail(Protocol):
    """The end of a log."""

    def entries(self) -> Sequence[LogLine]:
        """What is kept, the oldest first."""

    def show_on_stderr(self, *, shown: bool) -> None:
        """Off while the view has the screen."""


class Watched(Protocol):
    """Relays that can be looked at and operated.

    The asynchronous calls raise `RelayError`; the view shows it and goes on.
    """

    def fleet(self) -> Fleet:
        """The fleet now; quick, and called in the event loop's thread."""

    async def refresh(self) -> None:
        """Fetch what `fleet` can't know by itself."""

    async def dead_letters(self, pipeline: str) -> Sequence[DeadLetterSummary]:
        """The latest of its dead letters, `LATEST_DEAD_LETTERS` at most, the newest first."""

    async def pause(self, pipeline: str) -> None:
        """Disable it; its position stays."""

    async def resume(self, pipeline: str) -> None:
        """Enable it."""

    async def retry_dead_letters(self, pipeline: str) -> int:
        """Ask for another try of all its dead letters; gives their number."""

    async def retry_dead_letter(self, letter: int) -> None:
        """Ask for another try of the dead letter with this id."""


def lines_of(fleet: Fleet, now: datetime) -> list[PipelineLine]:
    """Every pipeline of the fleet once for each relay that runs it, ordered by name."""
    rows = {row.name: row for row in fleet.catalog}
    lines = [
        _run_line(status, relay, rows.get(status.name))
        for relay in fleet.relays
        for status in relay.pipelines
    ]
    shown = {line.name for line in lines}
    trouble = "no relay of the group runs it" if _is_whole_group(fleet) else ""
    lines += [
        _resting_line(row, fleet, trouble, now) for name, row in rows.items() if name not in shown
    ]
    return sorted(lines, key=lambda line: (line.name, line.owner))


def delivered(fleet: Fleet) -> Mapping[str, int]:
    """Messages by direction since the relays started, with those of pipelines that rest now."""
    # By pipeline: a reader of it may be gone, where it has fewer now.
    directions = {row.pipeline: row.direction for row in fleet.catalog}
    total: Counter[str] = Counter()
    for relay in fleet.relays:
        for status in relay.pipelines:
            directions[pipeline_of(status.name)] = status.direction
            total[status.direction] += status.published + status.consumed
        for name, count in relay.delivered_before.items():
            total[directions.get(pipeline_of(name), "")] += count
    return total


def _is_whole_group(fleet: Fleet) -> bool:
    """Whether what these relays don't run, nobody runs; not before it is decided who runs what."""
    members = max((relay.members for relay in fleet.relays), default=0)
    return len(fleet.relays) >= members and all(relay.is_coordinated for relay in fleet.relays)


def _run_line(status: PipelineStatus, relay: RelayStatus, row: PipelineRow | None) -> PipelineLine:
    is_forward = status.direction == "forward"
    return PipelineLine(
        name=status.name,
        source=status.source,
        sink=status.sink,
        is_forward=is_forward,
        is_enabled=row is None or row.enabled,
        state="stalled" if status.is_stalled else status.state.value,
        settings=status.settings,
        trouble=status.trouble,
        owner=relay.worker_id,
        status=status,
        lag_rows=status.lag_rows if is_forward else None,
        oldest_unsent_age_s=status.oldest_unsent_age_s,
        dead_letters=status.dead_letters or 0,
        delivered=status.published + status.consumed + relay.delivered_before.get(status.name, 0),
    )


def _resting_line(row: PipelineRow, fleet: Fleet, trouble: str, now: datetime) -> PipelineLine:
    lag = fleet.lags.get(row.name)
    since = None if lag is None else lag.oldest_unsent_at
    return PipelineLine(
        name=row.name,
        source=str(row.config.get("source_type", "?")),
        sink=str(row.config.get("sink_type", "?")),
        is_forward=row.direction == "forward",
        is_enabled=row.enabled,
        state=WAITING if row.enabled else PAUSED,
        settings=row.config,
        trouble=trouble if row.enabled else "",
        lag_rows=None if lag is None else lag.lag_rows,
        oldest_unsent_age_s=None if since is None else (now - since).total_seconds(),
        dead_letters=fleet.dead_letters.get(row.name, 0),
        delivered=sum(relay.delivered_before.get(row.name, 0) for relay in fleet.relays),
    )
