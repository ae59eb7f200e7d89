"""The coordinator by itself: what it asks of pipelines that do not end in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from relay import coordinator
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
        self.is_closed = False

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        self.reached.set()
        await asyncio.Event().wait()
        return await super().publish(messages)

    async def aclose(self) -> None:
        self.is_closed = True
        await super().aclose()


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


class Cut:
    """A coordinator whose one pipeline does not end in time, with the batch in its hands."""

    def __init__(self, database: Database, settings: PostgresSettings) -> None:
        self.sink = Stuck()
        self.line = Line(source=SlowToClose, sink=self.sink)
        self.line.write(message("0"))
        self.catalog, self.locks = OneRow(database, "default"), CountedLocks(settings, "default")
        self.coordinator = Coordinator(
            settings=RelaySettings(shutdown_timeout_s=0.05, coordinate_interval_s=0.02),
            database=database,
            catalog=self.catalog,
            locks=self.locks,
            builder=OneLine(self.line),
            emit=self.line.heard,
        )

    @property
    def source(self) -> SlowToClose:
        assert isinstance(self.line.source, SlowToClose)
        return self.line.source


@pytest.fixture
async def cut(migrated_database: ServerDatabase) -> AsyncIterator[Cut]:
    settings = PostgresSettings(url=migrated_database.dsn)
    database = Database(settings)
    await database.open()
    yield Cut(database, settings)
    await database.aclose()


async def test_a_pipeline_that_never_closes_does_not_keep_the_relay_from_ending(
    cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "_CLOSING_S", 0.05)
    run = asyncio.create_task(cut.coordinator.run())

    async with asyncio.timeout(BOUND_S):
        await cut.sink.reached.wait()
        cut.coordinator.stop()
        assert not await run

    assert cut.source.closing.is_set()
    assert cut.sink.is_closed


async def test_what_is_cut_off_is_not_cut_off_again_while_it_closes(cut: Cut) -> None:
    source, catalog, locks = cut.source, cut.catalog, cut.locks
    run = asyncio.create_task(cut.coordinator.run())
    try:
        async with asyncio.timeout(BOUND_S):
            await cut.sink.reached.wait()
            catalog.rows = ()
            cut.coordinator.reload()
            await source.closing.wait()
            for _ in range(3):
                locks.round.clear()
                await locks.round.wait()
            source.may_close.set()

            await source.closed.wait()
    finally:
        cut.coordinator.stop()
        await run
