"""What goes on beside the pipelines: measuring lag, sweeping, reporting, snapshots, progress.

Each chore has its own loop. A chore that fails says so once and goes on with its next turn; it
never disturbs a pipeline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

from relay.cancellation import reraise_cancellation
from relay.catalog import Backfill, Catalog, OutboxSize, PipelineRow, Seek, readers_of
from relay.errors import RelayError
from relay.events import CatalogObserved, Event, LagObserved, OutboxObserved

_log = logging.getLogger(__name__)

_SWEEP_ROWS = 1000
_RETIRE_TIMEOUT_S = 2.0
_SNAPSHOT_INTERVAL_S = 2.0
_OUTBOX_INTERVAL_S = 30.0
# Of hundreds of captured tables it takes seconds of the server's time, in every relay.
_CAPTURE_REST = 300.0
_PROGRESS_INTERVAL_S = 10.0


class Housekeeping:
    """The chores of one relay.

    ``owned`` gives the pipelines that it runs at the moment, ``unowned`` those of the named ones
    that no relay of the group owns.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        worker_id: str,
        owned: Callable[[], Mapping[str, PipelineRow]],
        unowned: Callable[[Sequence[str]], Awaitable[Sequence[str]]],
        report: Callable[[], bytes],
        emit: Callable[[Event], None],
    ) -> None:
        self._catalog = catalog
        self._worker_id = worker_id
        self._owned = owned
        self._unowned = unowned
        self._sizes: Sequence[OutboxSize] = ()
        self._capture_problems: Counter[str] | None = None
        self._report = report
        self._emit = emit
        self._progress: Sequence[Backfill | Seek] | None = None

    async def run(
        self, *, lag_interval_s: float, sweep_interval_s: float, report_interval_s: float
    ) -> None:
        """Do all chores until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_every(lag_interval_s, self.observe_lag))
            tasks.create_task(_every(lag_interval_s, self._observe_catalog))
            tasks.create_task(_every(_OUTBOX_INTERVAL_S, self._measure_outboxes))
            tasks.create_task(_every(_OUTBOX_INTERVAL_S, self._look_at_capture, rest=_CAPTURE_REST))
            tasks.create_task(_every(sweep_interval_s, self._sweep))
            tasks.create_task(_every(report_interval_s, self._report_to_fleet))
            tasks.create_task(_every(_SNAPSHOT_INTERVAL_S, self.write_snapshots))
            tasks.create_task(_every(_PROGRESS_INTERVAL_S, self.log_progress))

    async def retire(self) -> None:
        """Leave the fleet's list; what fails here, or takes long, is left to time."""
        try:
            async with asyncio.timeout(_RETIRE_TIMEOUT_S):
                await self._catalog.retire(self._worker_id)
        except (RelayError, TimeoutError) as error:
            _log.debug("could not leave the fleet", extra={"error": str(error)})

    async def observe_lag(self) -> None:
        """Tell observers how far the owned pipelines are behind. Raises `RelayError`.

        Of a forward pipeline whose outbox is gone the lag is unknown, and nothing is emitted.
        """
        for lag in await self._lags(self._owned()):
            self._emit(lag)

    async def _observe_catalog(self) -> None:
        """Tell observers what the outboxes hold, and of the pipelines that no relay runs."""
        owned = self._owned()
        readers = readers_of(await self._catalog.pipelines())
        rows = [row for row in readers if row.name not in owned]
        unowned = await self._unowned([row.name for row in rows if row.enabled])
        idle = {row.name: row for row in rows if not row.enabled or row.name in unowned}
        found = self._capture_problems
        outboxes = [
            OutboxObserved(
                outbox=size.outbox_table,
                rows=size.estimated_rows,
                bytes=size.bytes,
                capture_problems=None if found is None else found[size.outbox_table],
            )
            for size in self._sizes
        ]
        self._emit(CatalogObserved(outboxes=outboxes, unowned=unowned, idle=await self._lags(idle)))

    async def _measure_outboxes(self) -> None:
        self._sizes = await self._catalog.outbox_sizes()

    async def _look_at_capture(self) -> None:
        problems = await self._catalog.capture_problems()
        self._capture_problems = Counter(one.outbox_table for one in problems)

    async def _lags(self, rows: Mapping[str, PipelineRow]) -> Sequence[LagObserved]:
        """How far these are behind; a forward one whose outbox is gone is left out."""
        if not rows:
            return []
        dead_letters = await self._catalog.dead_letter_counts(list(rows))
        lags = {lag.pipeline: lag for lag in await self._catalog.lag(list(rows))}
        now = datetime.now(UTC)
        found = []
        for name, row in rows.items():
            lag = lags.get(name)
            lag_rows = 0 if lag is None else lag.lag_rows
            if lag_rows is None or (lag is None and row.direction == "forward"):
                continue
            oldest = None if lag is None else lag.oldest_unsent_at
            found.append(
                LagObserved(
                    pipeline=name,
                    direction=row.direction,
                    lag_rows=lag_rows,
                    oldest_unsent_age_s=(
                        0.0 if oldest is None else max(0.0, (now - oldest).total_seconds())
                    ),
                    dead_letters=dead_letters.get(name, 0),
                )
            )
        return found

    async def _sweep(self) -> None:
        """Sweep every outbox, since some have only readers that do not, and our own inboxes."""
        inboxes = {_local_inbox(row) for row in self._owned().values()} - {None}
        sweeps = [
            *((self._catalog.sweep, outbox) for outbox in await self._catalog.swept_outboxes()),
            *((self._catalog.sweep_inbox, inbox) for inbox in inboxes if inbox is not None),
        ]
        await _each([partial(_until_done, sweep, relation) for sweep, relation in sweeps])

    async def write_snapshots(self) -> None:
        """Snapshots of stream tables that were refreshed without triggers. Raises `RelayError`."""
        outboxes = await self._catalog.due_snapshots()
        await _each([partial(self._catalog.snapshot, outbox) for outbox in outboxes])

    async def log_progress(self) -> None:
        """Log how far backfills and seeks of owned pipelines have come. Raises `RelayError`.

        Not again what stands as it did at the last look, nor what had ended before the first one.
        """
        owned = self._owned().values()
        outboxes = {_named(row.config, "source", "outbox_table") for row in owned}
        pipelines = {row.pipeline for row in owned}
        mine: Sequence[Backfill | Seek] = [
            *(one for one in await self._catalog.backfills() if one.outbox_table in outboxes),
            *(one for one in await self._catalog.seeks() if one.pipeline in pipelines),
        ]
        before, self._progress = self._progress, mine
        for one in mine:
            if not one.is_over if before is None else one not in before:
                level = logging.WARNING if one.is_unwell else logging.INFO
                _log.log(level, "%s", one.progress)

    async def _report_to_fleet(self) -> None:
        await self._catalog.report(self._worker_id, self._report())


def _named(config: Mapping[str, object], role: str, key: str) -> str | None:
    options = config.get(role)
    value = options.get(key) if isinstance(options, Mapping) else None
    return value if isinstance(value, str) else None


def _local_inbox(row: PipelineRow) -> str | None:
    """The inbox of a reverse pipeline, unless it is in another database."""
    is_remote = any(_named(row.config, "sink", key) for key in ("url", "profile"))
    if row.direction == "forward" or is_remote:
        return None
    return _named(row.config, "sink", "inbox")


async def _each(tasks: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """One after the other. A failure does not stop the others; the last is raised at the end."""
    failed: RelayError | None = None
    for task in tasks:
        try:
            await task()
        except RelayError as error:
            failed = error
    if failed is not None:
        raise failed


async def _until_done(sweep: Callable[[str, int], Awaitable[int]], relation: str) -> None:
    """Small batches, so that no sweep holds locks for long."""
    swept = _SWEEP_ROWS
    while swept >= _SWEEP_ROWS:
        swept = await sweep(relation, _SWEEP_ROWS)


async def _every(
    interval_s: float, chore: Callable[[], Awaitable[None]], *, rest: float = 0.0
) -> None:
    """Do it for ever; of failures in a row the first is logged, and then that they are over.

    ``rest``: the pause is so many times as long as it took, if that is more.
    """
    is_failing = False
    while True:
        started_s = time.monotonic()
        try:
            await chore()
        except Exception as error:  # noqa: BLE001 - a chore never disturbs a pipeline
            reraise_cancellation(error)
            if not is_failing:
                is_expected = isinstance(error, RelayError)
                _log.warning(
                    "housekeeping failed, trying again",
                    extra={"error": str(error)},
                    exc_info=None if is_expected else error,
                )
            is_failing = True
        else:
            if is_failing:
                _log.info("housekeeping works again")
            is_failing = False
        await asyncio.sleep(max(interval_s, rest * (time.monotonic() - started_s)))
