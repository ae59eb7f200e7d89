"""A real outbox with the relay's database around it, for tests of the outbox source."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import asyncpg
import msgspec

from relay.backends.outbox import OutboxSource
from relay.catalog import OUTBOX_CHANNEL, Catalog
from relay.context import BackendContext
from relay.contracts import Batch
from relay.events import Event
from relay.message import RelayMessage
from relay.postgres import Database
from relay.settings import PostgresSettings

BOUND_S = 20.0

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass
class OutboxWorld:
    """One database with an outbox, as a publisher (`publisher`) and as the relay sees it."""

    dsn: str
    database: Database
    catalog: Catalog
    publisher: Connection
    events: list[Event] = field(default_factory=list)

    def context(
        self,
        *,
        pipeline: str = "pipeline",
        batch_size: int = 1000,
        batch_bytes: int = 4_194_304,
        dedup_namespace: str = "",
        worker_id: str = "worker",
        **pipeline_options: object,
    ) -> BackendContext:
        """What a source of a pipeline with these options is built with."""
        return BackendContext(
            pipeline=pipeline,
            direction="forward",
            worker_id=worker_id,
            database=self.database,
            catalog=self.catalog,
            emit=self.events.append,
            file_roots=(Path("/tmp"),),  # noqa: S108 - an outbox touches no file
            batch_size=batch_size,
            batch_bytes=batch_bytes,
            poll_interval_s=0.02,
            dedup_namespace=dedup_namespace,
            pipeline_options=pipeline_options,
        )

    def source(self, outbox: str = "orders", context: BackendContext | None = None) -> OutboxSource:
        """A source on this outbox, not connected; all of one pipeline share its position."""
        return OutboxSource.from_options({"outbox": outbox}, context or self.context())

    async def connect_publisher(self) -> Connection:
        """One more connection of a publisher, superuser, read committed."""
        return await asyncpg.connect(self.dsn)


@contextlib.asynccontextmanager
async def outbox_world(dsn: str, *, pool_size: int = 4) -> AsyncIterator[OutboxWorld]:
    """The relay's database open and listening, and a publisher, until the block ends."""
    database = Database(PostgresSettings(url=dsn, pool_size=pool_size))
    await database.open()
    listening = asyncio.create_task(database.listen((OUTBOX_CHANNEL,)))
    publisher: Connection = await asyncpg.connect(dsn)
    try:
        yield OutboxWorld(dsn, database, Catalog(database, "default"), publisher)
    finally:
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        await publisher.close(timeout=5)
        await database.aclose()


async def enable_orders(connection: Connection, arguments: str = "") -> None:
    """A table `orders (id, version, note)` with its outbox; `arguments` as in SQL, with a comma."""
    await connection.execute(
        "create table public.orders (id int primary key, version int not null default 0, note text)"
    )
    await connection.execute(f"select pgtrickle.enable_outbox('orders'{arguments})")


async def polled(source: OutboxSource, messages: int, *, acknowledge: bool = True) -> list[Batch]:
    """Poll until so many messages and rejections were handed out. Raises TimeoutError."""
    batches: list[Batch] = []
    missing = messages
    async with asyncio.timeout(BOUND_S):
        while missing > 0:
            batch = await source.poll()
            if batch.is_empty:
                continue
            missing -= len(batch.messages) + len(batch.rejected)
            batches.append(batch)
            if acknowledge:
                await source.acknowledge(batch)
    return batches


async def rest_of(source: OutboxSource, *, acknowledge: bool = True) -> list[Batch]:
    """Poll until a poll brings nothing."""
    batches: list[Batch] = []
    async with asyncio.timeout(BOUND_S):
        while not (batch := await source.poll()).is_end_of_backlog or batch.messages:
            batches.append(batch)
            if acknowledge:
                await source.acknowledge(batch)
    return batches


def messages_of(batches: Sequence[Batch]) -> list[RelayMessage]:
    """All messages, in the order in which they were handed out."""
    return [message for batch in batches for message in batch.messages]


def place_of(message: RelayMessage) -> str:
    """The dedup key without its last part, which differs each time: outbox, id and index."""
    place, _, history = message.dedup_key.rpartition(":")
    assert len(history) == 8
    return place


def row_of(message: RelayMessage) -> Mapping[str, object]:
    """The row that a message carries."""
    return msgspec.json.decode(message.payload, type=dict[str, object])
