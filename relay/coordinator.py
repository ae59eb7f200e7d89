"""Which pipelines this process runs: ownership, fair shares, hot reload.

One loop compares what the catalog wants with what runs here, on every config notification and on
a short tick. A pipeline runs exactly while its lock is held; it is stopped gracefully before its
lock is released, and at once when the lock may be lost.

A pipeline of a consumer group, or with a receiver, *runs everywhere*: every relay of the group runs
it, without a lock. It counts in no share and is not handed over; in all else it is started, stopped
and lost like any other. A drain leaves receivers out: nothing waits for them, and they
never end by themselves.

A pipeline with partitions is as many readers here, each owned, started and lost like a pipeline.
Where their number has changed, all of its readers end, in every relay; whoever finds that none is
left brings them to one position, and only then those of today are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from relay.backoff import Backoff
from relay.catalog import CONFIG_CHANNEL, Catalog, PipelineRow, readers_of
from relay.errors import ConfigurationError, RelayError
from relay.events import DatabaseChanged, Event, OwnershipChanged, PipelineState, StateChanged
from relay.locks import Locks, Members
from relay.pipeline import Ending, Pipeline, Workers
from relay.postgres import Database, postgres_errors
from relay.settings import RelaySettings

_log = logging.getLogger(__name__)

_REREAD_S = 10.0
_STRANGERS_S = 3.0
_READ_TIMEOUT_S = 5.0
# How long a pipeline that was cut off may take to close both of its sides.
_CLOSING_S = 10.0
# For how many ticks a free pipeline beyond our share is left to others: while none of them is known
# to have room for it, and while one is.
_TICKS_BEFORE_OVERFLOW, _TICKS_LEFT_TO_OTHERS = 4, 20
_TICKS_BEFORE_OFFER, _TICKS_BEFORE_OFFER_MAX = 4, 512


class Builder(Protocol):
    """Makes pipelines from catalog rows."""

    def describe(self, row: PipelineRow) -> None:
        """Tell observers what a row is."""

    def runs_everywhere(self, row: PipelineRow) -> bool:
        """Whether every relay of the group runs this row at once. Never raises."""

    def build(self, row: PipelineRow) -> Pipeline | Workers:
        """Raises `ConfigurationError` with what is wrong in the row."""


class _Notice(msgspec.Struct, frozen=True):
    """The payload of a config notification."""

    event: str = ""
    name: str = ""


class _Work:
    """One pipeline that is ours: running, ending, finished, or not able to run as configured."""

    def __init__(self, row: PipelineRow, *, runs_everywhere: bool = False) -> None:
        self.row = row
        self.runs_everywhere = runs_everywhere
        self.pipeline: Pipeline | Workers | None = None
        self.task: asyncio.Task[Ending] | None = None
        self.build_again_at = -math.inf
        self.cut_at: float | None = None
        self.is_surplus = False

    @property
    def is_ending(self) -> bool:
        """True once it was asked to stop."""
        return self.cut_at is not None

    @property
    def is_over(self) -> bool:
        """True when nothing of it runs."""
        return self.task is None or self.task.done()

    def end(self, patience_s: float) -> None:
        """Ask it to stop; `Coordinator._reap` sees to the rest."""
        if self.cut_at is None:
            self.cut_at = time.monotonic() + patience_s
            if self.pipeline is not None:
                self.pipeline.stop()


class Coordinator:
    """Runs this process's share of the group's pipelines, and those that run everywhere."""

    def __init__(
        self,
        *,
        settings: RelaySettings,
        database: Database,
        catalog: Catalog,
        locks: Locks,
        builder: Builder,
        emit: Callable[[Event], None],
    ) -> None:
        self._settings = settings
        self._database = database
        self._catalog = catalog
        self._locks = locks
        self._builder = builder
        self._emit = emit
        self._wanted: dict[str, PipelineRow] = {}
        self._everywhere: frozenset[str] = frozenset()
        self._repartitioning: frozenset[str] = frozenset()
        self._works: dict[str, _Work] = {}
        self._free_ticks: dict[str, int] = {}
        self._overflow: set[str] = set()
        self._offer_ticks = _TICKS_BEFORE_OFFER
        self._ticks_with_room = 0
        self._members = Members(count=1)
        self._blocked: Mapping[str, str] = {}
        self._strangers_at = -math.inf
        self._last_emitted: OwnershipChanged | None = None
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._is_stale = True
        self._read_at = -math.inf
        self._restart_all = False
        self._is_draining = False

    @property
    def rows(self) -> Mapping[str, PipelineRow]:
        """The enabled pipelines that this relay runs now."""
        return {name: work.row for name, work in self._works.items()}

    def stop(self) -> None:
        """Ask `run` to end: pipelines finish what is in flight, then locks are released."""
        self._stop.set()
        self._wake.set()

    def reload(self) -> None:
        """Read the catalog and the secrets again and restart every pipeline."""
        self._restart_all = True
        self._is_stale = True
        self._wake.set()

    async def run(self, *, until_drained: bool = False) -> bool:
        """Coordinate until stopped; True when everything in flight was finished in time.

        With ``until_drained`` it also ends by itself, as soon as nothing more is to deliver, and
        is then True only if every enabled pipeline that has an owner was run here and came to its
        end.
        """
        self._is_draining = until_drained
        unsubscribe = self._database.subscribe(CONFIG_CHANNEL, self._notified)
        try:
            async with asyncio.TaskGroup() as tasks:
                backoff = Backoff(0.2, 5.0)
                while not self._stop.is_set():
                    try:
                        await self._serve(tasks, backoff)
                    except RelayError as error:
                        await self._lose_everything(str(error))
                        # What woke us belongs to what was lost; a stop is never missed.
                        self._wake.clear()
                        if not self._stop.is_set():
                            await self._rest(backoff.next_s())
                return await self._finish()
        finally:
            unsubscribe()
            await self._locks.aclose()

    async def _serve(self, tasks: asyncio.TaskGroup, backoff: Backoff) -> None:
        """From a fresh ownership connection until it is lost (raises) or we stop."""
        await self._locks.open(on_lost=self._wake.set)
        self._emit(DatabaseChanged(is_connected=True))
        self._is_stale = True
        while not self._stop.is_set():
            self._wake.clear()
            await self._count_members()
            if self._is_stale or time.monotonic() - self._read_at > _REREAD_S:
                await self._read_catalog()
            self._end_what_changed()
            self._end_surplus()
            await self._reap()
            await self._repartition()
            await self._acquire(limit=self._share())
            self._join_what_runs_everywhere()
            for work in self._works.values():
                self._start(tasks, work)
            self._emit_ownership()
            backoff.reset()
            if self._is_draining and self._is_drained():
                self._stop.set()
                return
            await self._rest(self._settings.coordinate_interval_s)

    async def _count_members(self) -> None:
        members = await self._locks.members()
        if members.count != self._members.count:
            self._overflow.clear()
            self._free_ticks.clear()
            self._offer_ticks = _TICKS_BEFORE_OFFER
        self._members = members
        self._ticks_with_room = self._ticks_with_room + 1 if self._has_another_room() else 0

    async def _read_catalog(self) -> None:
        self._is_stale = False
        with postgres_errors("reading the pipelines"):
            async with asyncio.timeout(_READ_TIMEOUT_S):
                rows = await self._catalog.pipelines()
                self._repartitioning = await self._catalog.to_repartition()
        self._read_at = time.monotonic()
        self._wanted = {row.name: row for row in readers_of(rows) if row.enabled}
        self._everywhere = frozenset(
            name for name, row in self._wanted.items() if self._builder.runs_everywhere(row)
        )
        if self._is_draining:
            receivers = {
                name for name in self._everywhere if self._wanted[name].direction == "reverse"
            }
            self._everywhere -= receivers
            for name in receivers:
                del self._wanted[name]

    def _end_what_changed(self) -> None:
        """Ask what is not wanted any more, or has changed, to end; each on its own."""
        restart_all, self._restart_all = self._restart_all, False
        for name, work in self._works.items():
            if restart_all or self._wanted.get(name) != work.row or self._is_unsettled(work.row):
                work.end(self._settings.shutdown_timeout_s)

    def _is_unsettled(self, row: PipelineRow) -> bool:
        """Whether its position is still to be made out of those of other readers."""
        return row.pipeline in self._repartitioning and row.name not in self._everywhere

    async def _repartition(self) -> None:
        """Where the readers of a pipeline are to be others, and none runs anywhere, let them be."""
        waiting = {row.pipeline: row for row in self._wanted.values() if self._is_unsettled(row)}
        for pipeline, row in waiting.items():
            try:
                with postgres_errors("bringing readers to one position"):
                    async with asyncio.timeout(_READ_TIMEOUT_S):
                        is_done = await self._catalog.repartition(
                            pipeline, row.partitioning, self._locks.key(pipeline)
                        )
            except RelayError as error:
                # That pipeline's trouble: it is tried again whenever the catalog is read.
                _log.warning("%s", error, extra={"pipeline": pipeline})
                continue
            if is_done:
                self._repartitioning -= {pipeline}
                _log.info("its readers start from one position", extra={"pipeline": pipeline})
            else:
                self._is_stale = True

    def _end_surplus(self) -> None:
        """Ask pipelines above our fair share to end, so that a relay with room can take them.

        Those that we took above our share because nobody else did are released only when another
        member has had room for `_offer_ticks` ticks. That number doubles each time, since a member
        which has room and does not take them may never do so.
        """
        if self._members.count == 1:
            return
        if self._overflow and self._ticks_with_room > self._offer_ticks:
            self._overflow.clear()
            self._offer_ticks = min(2 * self._offer_ticks, _TICKS_BEFORE_OFFER_MAX)
        staying = [
            name
            for name, work in sorted(self._works.items())
            if not (work.is_ending or work.runs_everywhere or name in self._overflow)
        ]
        for name in staying[self._share() :]:
            self._works[name].is_surplus = True
            self._works[name].end(self._settings.shutdown_timeout_s)

    async def _reap(self) -> None:
        """Forget what has ended; keep the lock only of what starts again with a new config.

        What ran everywhere and now has one owner, or the reverse, does not start again as it is.
        """
        for name, work in list(self._works.items()):
            if not work.is_ending:
                continue
            if not work.is_over:
                if work.task is not None and time.monotonic() > (work.cut_at or 0.0):
                    work.task.cancel()
                    # Another cancellation meanwhile would keep it from releasing what it holds at
                    # its broker.
                    work.cut_at = time.monotonic() + _CLOSING_S
                continue
            del self._works[name]
            self._overflow.discard(name)
            row = self._wanted.get(name)
            is_of_a_kind = work.runs_everywhere == (name in self._everywhere)
            stays = row is not None and is_of_a_kind and not self._is_unsettled(row)
            if row is not None and stays and not work.is_surplus:
                self._works[name] = _Work(row, runs_everywhere=work.runs_everywhere)
                continue
            self._free_ticks[name] = -_TICKS_BEFORE_OVERFLOW
            await self._locks.release(name)
            self._emit(
                StateChanged(
                    pipeline=name, direction=work.row.direction, state=PipelineState.STOPPED
                )
            )

    def _share(self) -> int:
        limit = self._settings.max_pipelines
        return self._fair_share() if limit is None else min(self._fair_share(), limit)

    def _fair_share(self) -> int:
        owned = len(self._wanted) - len(self._everywhere)
        return math.ceil(owned / max(1, self._members.count))

    async def _acquire(self, *, limit: int) -> None:
        """Take free pipelines up to our share; beyond it those that nobody takes for a while."""
        missed: list[str] = []
        for name, row in sorted(self._wanted.items()):
            if name in self._works or name in self._everywhere:
                continue
            if self._is_unsettled(row):
                missed.append(name)
                continue
            is_within_share = self._owned_count() < limit
            if not is_within_share and not self._may_overflow(name):
                continue
            if await self._locks.try_acquire(name):
                if not is_within_share:
                    self._overflow.add(name)
                self._free_ticks.pop(name, None)
                self._works[name] = _Work(row)
            else:
                missed.append(name)
        await self._look_for_strangers(missed)
        maximum = self._settings.max_pipelines
        is_full = maximum is not None and self._owned_count() >= maximum
        await self._locks.show_full(is_full=is_full)

    async def _look_for_strangers(self, missed: Sequence[str]) -> None:
        """Ask, every few seconds, which sessions that are no relays hold what we missed."""
        if missed and time.monotonic() >= self._strangers_at:
            self._strangers_at = time.monotonic() + _STRANGERS_S
            self._blocked = await self._locks.strangers(missed)
        self._blocked = {name: who for name, who in self._blocked.items() if name in missed}

    def _has_another_room(self) -> bool:
        fair = self._fair_share()
        return any(held < fair for held in self._members.held_by_open)

    def _may_overflow(self, name: str) -> bool:
        maximum = self._settings.max_pipelines
        if maximum is not None and self._owned_count() >= maximum:
            return False
        self._free_ticks[name] = self._free_ticks.get(name, 0) + 1
        patience = _TICKS_LEFT_TO_OTHERS if self._has_another_room() else _TICKS_BEFORE_OVERFLOW
        return self._free_ticks[name] > patience

    def _owned_count(self) -> int:
        return sum(not work.runs_everywhere for work in self._works.values())

    def _join_what_runs_everywhere(self) -> None:
        for name in sorted(self._everywhere - self._works.keys()):
            self._works[name] = _Work(self._wanted[name], runs_everywhere=True)

    def _start(self, tasks: asyncio.TaskGroup, work: _Work) -> None:
        """Start what is ours and does not run, unless it has completed or can't be built yet."""
        if work.task is not None or work.is_ending or time.monotonic() < work.build_again_at:
            return
        row = work.row
        self._builder.describe(row)
        try:
            work.pipeline = self._builder.build(row)
        except ConfigurationError as error:
            self._fail(work, str(error))
            return
        except Exception as error:  # noqa: BLE001 - a bug in one row is that row's trouble
            _log.exception("a pipeline could not be built", extra={"pipeline": row.name})
            self._fail(work, f"unexpected {type(error).__name__}, see the log")
            return
        if self._is_draining:
            work.pipeline.drain()
        work.task = tasks.create_task(work.pipeline.run(), name=f"pipeline {row.name}")
        work.task.add_done_callback(lambda _: self._wake.set())

    def _is_drained(self) -> bool:
        return all(
            work.task is None or work.task.done() for work in self._works.values()
        ) and not any(work.is_ending for work in self._works.values())

    def _fail(self, work: _Work, reason: str) -> None:
        work.build_again_at = time.monotonic() + self._settings.failed_retry_s
        self._emit(
            StateChanged(
                pipeline=work.row.name,
                direction=work.row.direction,
                state=PipelineState.FAILED,
                reason=reason,
            )
        )

    async def _lose_everything(self, reason: str) -> None:
        """The locks may be gone: another relay may be at work already, so nothing is finished."""
        self._emit(DatabaseChanged(is_connected=False, reason=reason))
        self._blocked = {}
        for work in self._works.values():
            work.end(0.0)
        await self._cut([work.task for work in self._works.values() if work.task is not None])
        self._works.clear()
        self._overflow.clear()
        self._free_ticks.clear()
        self._emit_ownership()
        await self._locks.aclose()

    async def _finish(self) -> bool:
        is_complete = not self._is_draining or self._came_to_its_end()
        for work in self._works.values():
            work.end(self._settings.shutdown_timeout_s)
        ends = [work.task for work in self._works.values() if work.task is not None]
        late: set[asyncio.Task[Ending]] = set()
        if ends:
            _, late = await asyncio.wait(ends, timeout=self._settings.shutdown_timeout_s)
        await self._cut(late)
        self._works.clear()
        self._emit_ownership()
        return is_complete and not late

    def _came_to_its_end(self) -> bool:
        ends = {name: work.task for name, work in self._works.items()}
        return all(
            (task := ends.get(name)) is not None
            and task.done()
            and not task.cancelled()
            and task.result() is Ending.COMPLETED
            for name in self._wanted
        )

    @staticmethod
    async def _cut(tasks: Iterable[asyncio.Task[Ending]]) -> None:
        """Cancel these; what does not close in time is cancelled again, each side of it."""
        pending = {task for task in tasks if not task.done()}
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=_CLOSING_S)

    def _emit_ownership(self) -> None:
        ownership = OwnershipChanged(
            pipelines=sorted(self._works),
            everywhere=sorted(name for name, work in self._works.items() if work.runs_everywhere),
            members=max(1, self._members.count),
            blocked=self._blocked,
        )
        if ownership != self._last_emitted:
            self._last_emitted = ownership
            self._emit(ownership)

    def _notified(self, payload: str) -> None:
        try:
            notice = msgspec.json.decode(payload, type=_Notice)
        except msgspec.DecodeError:
            notice = _Notice()
        is_retry = notice.event == "RETRY"
        for work in self._works.values():
            # Without a payload any notification may have been missed.
            is_meant = not payload or (is_retry and work.row.pipeline == notice.name)
            if is_meant and work.pipeline is not None:
                work.pipeline.retry_dead_letters()
        if not is_retry:
            self._is_stale = True
            self._wake.set()

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
