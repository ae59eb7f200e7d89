"""`pgtrickle-relay drain`: deliver what there is, and say what became of it and why."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from relay.app import Relay, work
from relay.board import PipelineStatus
from relay.catalog import readers_of
from relay.events import (
    BatchAcknowledged,
    BatchPublished,
    Event,
    OwnershipChanged,
    PipelineState,
    StateChanged,
)
from relay.registry import source_runs_everywhere
from relay.settings import Settings
from relay.start import opened_catalog

_LOOK_S = 0.25


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """What a drain did with one pipeline.

    Counts are of messages, ``left`` is of rows of its outbox, and None where nobody can tell.
    ``reason``: why something is left or was not delivered, else empty.
    """

    name: str
    delivered: int
    dead_lettered: int
    left: int | None
    reason: str

    @property
    def is_done(self) -> bool:
        """True when everything that there was is delivered."""
        return not (self.reason or self.left or self.dead_lettered)


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a drain did, by pipeline in the order of their names."""

    is_complete: bool
    pipelines: Sequence[Drained]


async def run_drain(
    settings: Settings, *, timeout_s: float | None, show: Callable[[int, int], None]
) -> DrainReport:
    """Deliver what there is, at most for so long; without ``timeout_s`` as long as it moves.

    It moves while something was delivered within ``metrics.stalled_after_s``. ``show`` is called a
    few times a second with how many messages were delivered, and how many rows are left.
    """
    relay = Relay(settings, os.environ)
    watch = _Watch(relay)
    relay.events.subscribe(watch)
    async with asyncio.TaskGroup() as tasks:
        bound = tasks.create_task(
            watch.stop_when_over(timeout_s, settings.metrics.stalled_after_s, show)
        )
        try:
            is_complete = await work(relay, settings, until_drained=True)
        finally:
            bound.cancel()
    return await _reported(settings, watch, is_complete=is_complete)


def lines_of(report: DrainReport) -> Iterator[str]:
    """The report for people."""
    for one in report.pipelines:
        left = "an unknown number of" if one.left is None else f"{one.left:,}"
        why = f": {one.reason}" if one.reason else ""
        yield (
            f"{one.name}: {one.delivered:,} delivered, {one.dead_lettered:,} dead-lettered,"
            f" {left} rows left{why}"
        )
    yield f"{'everything' if report.is_complete else 'not everything'} is delivered"


class _Watch:
    """Remembers each pipeline as it last was, since the board forgets those that have ended."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._moved_at = time.monotonic()
        self.seen: dict[str, PipelineStatus] = {}
        self.over = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, BatchPublished | BatchAcknowledged | OwnershipChanged):
            self._moved_at = time.monotonic()
        if isinstance(event, StateChanged):
            self._look()

    def _look(self) -> None:
        self.seen |= {status.name: status for status in self._relay.board.snapshot().pipelines}

    async def stop_when_over(
        self, timeout_s: float | None, stalled_after_s: float, show: Callable[[int, int], None]
    ) -> None:
        began_at = time.monotonic()
        while not self.over:
            await asyncio.sleep(_LOOK_S)
            self._look()
            seen = self.seen.values()
            show(sum(map(_delivered, seen)), sum(status.lag_rows or 0 for status in seen))
            now = time.monotonic()
            if timeout_s is not None and now - began_at > timeout_s:
                self.over = f"not done within {timeout_s:g} s"
            elif timeout_s is None and now - self._moved_at > stalled_after_s:
                self.over = f"nothing was delivered for {stalled_after_s:g} s"
        self._relay.coordinator.stop()


async def _reported(settings: Settings, watch: _Watch, *, is_complete: bool) -> DrainReport:
    async with opened_catalog(settings, os.environ) as catalog:
        readers = readers_of(await catalog.pipelines())
        # Senders come to a receiver at any time: there is nothing to drain.
        rows = [
            row
            for row in readers
            if row.enabled and not source_runs_everywhere(str(row.config.get("source_type")))
        ]
        lags = {lag.pipeline: lag for lag in await catalog.lag([row.name for row in rows])}
    pipelines = []
    for row in sorted(rows, key=lambda row: row.name):
        status, lag = watch.seen.get(row.name), lags.get(row.name)
        # What is not an outbox has said itself that it is at its end.
        at_end = 0 if status is not None and status.state is PipelineState.COMPLETED else None
        left = at_end if lag is None else lag.lag_rows
        if status is None:
            owner = None if lag is None else lag.worker_id
            reason = "another relay of the group runs it" + (f": {owner}" if owner else "")
        else:
            reason = _why(status, watch.over, is_left=bool(left))
        pipelines.append(
            Drained(
                name=row.name,
                delivered=0 if status is None else _delivered(status),
                dead_lettered=0 if status is None else status.dead_lettered,
                left=left,
                reason=reason,
            )
        )
    return DrainReport(
        is_complete=is_complete and all(one.is_done for one in pipelines), pipelines=pipelines
    )


def _why(status: PipelineStatus, over: str, *, is_left: bool) -> str:
    if status.state is not PipelineState.COMPLETED:
        return "; ".join(filter(None, (over, status.trouble or status.reason or status.last_error)))
    if status.dead_lettered:
        return status.last_error
    return "written meanwhile" if is_left else ""


def _delivered(status: PipelineStatus) -> int:
    return status.published + status.consumed
