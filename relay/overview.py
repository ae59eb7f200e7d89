"""The fleet as the database alone tells it, or one relay: what `status` prints, `doctor` judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from relay.board import PipelineStatus, RelayStatus
from relay.catalog import (
    Backfill,
    Catalog,
    FleetRow,
    Lag,
    OutboxSize,
    PipelineRow,
    Reader,
    Seek,
    counted,
)
from relay.events import Direction

# Where none of the relays says anything of a pipeline.
PAUSED, WAITING = "paused", "waiting"


class PipelineOverview(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline of the catalog, whoever runs it.

    ``trouble`` is why it is not well, empty where it is; a paused one is well. ``owners``: relays
    that are alive and run it. Lag is None for reverse pipelines, and where the outbox is gone.
    ``outbox_rows`` is PostgreSQL's estimate.
    """

    name: str
    direction: Direction
    enabled: bool
    source: str
    sink: str
    state: str
    trouble: str
    owners: Sequence[str]
    lag_rows: int | None
    oldest_unsent_age_s: float | None
    dead_letters: int
    outbox: str | None
    outbox_rows: int | None
    outbox_bytes: int | None


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """A relay group at one time, or one relay of it; pipelines are ordered by name.

    ``trouble``: why that one relay is not well.

    ``seeks``: of pipelines that still send again what was there at that moment.
    """

    group_id: str
    relays: Sequence[str]
    pipelines: Sequence[PipelineOverview]
    backfills: Sequence[Backfill] = ()
    seeks: Sequence[Seek] = ()
    trouble: str = ""

    @property
    def is_well(self) -> bool:
        """True when every pipeline that is enabled runs somewhere and is well."""
        return not self.trouble and not any(pipeline.trouble for pipeline in self.pipelines)


async def overview(catalog: Catalog, rows: Sequence[PipelineRow]) -> Overview:
    """Ask the database about these pipelines, each reader by itself. Raises `RelayError`."""
    fleet = [one for one in await catalog.fleet() if one.is_alive]
    return of_answers(
        catalog.group_id,
        rows,
        fleet,
        await catalog.lag([row.name for row in rows]),
        await catalog.dead_letter_counts([row.name for row in rows]),
        await catalog.readers(),
        await catalog.outbox_sizes(),
        await catalog.backfills(),
        [seek for seek in await catalog.seeks() if not seek.is_over],
    )


def of_answers(
    group_id: str,
    rows: Sequence[PipelineRow],
    fleet: Sequence[FleetRow],
    lags: Sequence[Lag],
    dead_letters: Mapping[str, int],
    readers: Sequence[Reader],
    sizes: Sequence[OutboxSize],
    backfills: Sequence[Backfill] = (),
    seeks: Sequence[Seek] = (),
) -> Overview:
    """What the answers of the catalog come to."""
    reports = [report for one in fleet if (report := report_of(one)) is not None]
    lag_of = {lag.pipeline: lag for lag in lags}
    outbox_of = {reader.pipeline: reader.outbox_table for reader in readers}
    size_of = {size.outbox_table: size for size in sizes}
    pipelines = []
    for row in sorted(rows, key=lambda row: row.name):
        running = [
            (report.worker_id, status)
            for report in reports
            for status in report.pipelines
            if status.name == row.name
        ]
        lag = lag_of.get(row.name)
        size = size_of.get(outbox_of.get(row.pipeline) or "")
        state, trouble = _state_of(row, [status for _, status in running])
        pipelines.append(
            PipelineOverview(
                name=row.name,
                direction=row.direction,
                enabled=row.enabled,
                source=str(row.config.get("source_type", "?")),
                sink=str(row.config.get("sink_type", "?")),
                state=state,
                trouble=trouble,
                owners=[worker for worker, _ in running],
                lag_rows=None if lag is None else lag.lag_rows,
                oldest_unsent_age_s=None if lag is None else _age_s(lag.oldest_unsent_at),
                dead_letters=dead_letters.get(row.name, 0),
                outbox=None if size is None else size.outbox_table,
                outbox_rows=None if size is None else size.estimated_rows,
                outbox_bytes=None if size is None else size.bytes,
            )
        )
    return Overview(
        group_id=group_id,
        relays=[report.worker_id for report in reports],
        pipelines=pipelines,
        backfills=backfills,
        seeks=seeks,
    )


def of_relay(relay: RelayStatus) -> Overview:
    """What one relay says of itself and of the pipelines that it runs."""
    return Overview(
        group_id=relay.group_id,
        relays=[relay.worker_id],
        pipelines=[
            PipelineOverview(
                name=status.name,
                direction=status.direction,
                enabled=True,
                source=status.source,
                sink=status.sink,
                state=_shown_state(status),
                trouble=status.trouble,
                owners=[relay.worker_id],
                lag_rows=status.lag_rows if status.direction == "forward" else None,
                oldest_unsent_age_s=status.oldest_unsent_age_s,
                dead_letters=status.dead_letters or 0,
                outbox=None,
                outbox_rows=None,
                outbox_bytes=None,
            )
            for status in relay.pipelines
        ],
        trouble=relay.trouble,
    )


def table_of(seen: Overview) -> Iterator[str]:
    """For people: a line for each pipeline, the unwell first, each backfill and each seek."""
    head = ("pipeline", "route", "state", "owner", "lag", "age", "dead", "outbox", "why")
    rows = [
        (
            one.name,
            f"{one.source} -> {one.sink}",
            one.state,
            ", ".join(one.owners) or "-",
            "-" if one.lag_rows is None else str(one.lag_rows),
            "-" if one.oldest_unsent_age_s is None else f"{one.oldest_unsent_age_s:.0f} s",
            counted(one.dead_letters),
            "-" if one.outbox_bytes is None else f"{one.outbox_bytes // 1024} KiB",
            one.trouble,
        )
        for one in sorted(seen.pipelines, key=lambda one: not one.trouble)
    ]
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    yield from (backfill.progress for backfill in seen.backfills)
    yield from (seek.progress for seek in seen.seeks)
    if seen.trouble:
        yield f"{', '.join(seen.relays)}: {seen.trouble}"


def report_of(row: FleetRow) -> RelayStatus | None:
    """What a relay says of itself; None where it is of a version that says it otherwise."""
    try:
        return msgspec.json.decode(row.report, type=RelayStatus)
    except msgspec.ValidationError:
        return None


def _state_of(row: PipelineRow, running: Sequence[PipelineStatus]) -> tuple[str, str]:
    if not row.enabled:
        return PAUSED, ""
    if not running:
        return WAITING, "no relay of the group runs it"
    unwell = [status for status in running if not status.is_healthy]
    worst = unwell[0] if unwell else running[0]
    return _shown_state(worst), worst.trouble


def _shown_state(status: PipelineStatus) -> str:
    return "stalled" if status.is_stalled else status.state.value


def _age_s(since: datetime | None) -> float | None:
    return None if since is None else max(0.0, (datetime.now(UTC) - since).total_seconds())
