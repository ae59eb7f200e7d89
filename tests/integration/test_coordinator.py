"""The coordinator by itself: what it asks of pipelines that do not end in time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from relay.catalog import Catalog, PipelineRow
from relay.contracts import PublishResult
from relay.coordinator import Coordinator
from relay.locks import Locks, Members
from relay.message import RelayMessage
from relay.pipeline import Pipeline
from relay.postgres import Database
from relay.settings import PostgresSettings, RelaySettings
from tests.servers.memory import MemoryChannel, MemorySink, MemorySource
from tests.servers.postgres import Database as ServerDatabase
from tests.unit.in_memory import BOUND_S, Line, message

ROW = PipelineRow(name="p", direction="forward", enabled=True, config={})


class OneRow(Catalog):
    """A catalog with one pipeline in it, until that is taken out."""

    rows: Sequence[PipelineRow] = (ROW,)

    async def pipelines(self) -> list[PipelineRow]:
        return list(self.rows)


class CountedLocks(Locks):
    """Tells of each round of the coordinator."""

    def __init__(self, settings: PostgresSettings, group_id: str) -> None:
        super().__init__(settings, group_id)
        self.round = asyncio.Event()

    async def members(self) -> Members:
        self.round.set()
        return await super().members()


class Stuck(MemorySink):
    """Never answers."""

    def __init__(self) -> None:
        super().__init__(MemoryChannel())
        self.reached = asyncio.Event()

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        self.reached.set()
        await asyncio.Event().wait()
        return await super().publish(messages)


class SlowToClose(MemorySource):
    """Has a last word with its broker."""

    def __init__(self, channel: MemoryChannel) -> None:
        super().__init__(channel, batch_size=1)
        self.closing = asyncio.Event()
        self.may_close = asyncio.Event()
        self.closed = asyncio.Event()

    async def aclose(self) -> None:
        self.closing.set()
        await self.may_close.wait()
        await super().aclose()
        self.closed.set()


class OneLine:
    """Builds the one pipeline."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def describe(self, row: PipelineRow) -> None:
        pass

    def runs_everywhere(self, row: PipelineRow) -> bool:  # noqa: ARG002 - the port has it
        return False

    def build(self, row: PipelineRow) -> Pipeline:  # noqa: ARG002 - the port has it
        return self._line.pipeline


async def test_what_is_cut_off_is_not_cut_off_again_while_it_closes(
    migrated_database: ServerDatabase,
) -> None:
    settings = PostgresSettings(url=migrated_database.dsn)
    database = Database(settings)
    await database.open()
    sink = Stuck()
    line = Line(source=SlowToClose, sink=sink)
    line.write(message("0"))
    source = line.source
    assert isinstance(source, SlowToClose)
    catalog, locks = OneRow(database, "default"), CountedLocks(settings, "default")
    coordinator = Coordinator(
        settings=RelaySettings(shutdown_timeout_s=0.05, coordinate_interval_s=0.02),
        database=database,
        catalog=catalog,
        locks=locks,
        builder=OneLine(line),
        emit=line.heard,
    )
    run = asyncio.create_task(coordinator.run())
    try:
        async with asyncio.timeout(BOUND_S):
            await sink.reached.wait()
            catalog.rows = ()
            coordinator.reload()
            await source.closing.wait()
            for _ in range(3):
                locks.round.clear()
                await locks.round.wait()
            source.may_close.set()

            await source.closed.wait()
    finally:
        coordinator.stop()
        await run
        await database.aclose()
