"""The outbox source under the contract, with its database behind a proxy that can be cut.

An outbox holds rows, not messages: what the suite feeds travels inside a row, and is taken out of
it again between the source and the suite.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from relay.backends.outbox import OutboxSource
from relay.backends.outbox.reading import REST_S
from relay.catalog import Catalog
from relay.contracts import Batch, Source
from relay.message import RelayMessage
from relay.postgres import Database as RelayDatabase
from relay.postgres import postgres_errors
from relay.settings import PostgresSettings
from relay.wire import LOWER, encoder, restore
from tests.contract.source_contract import SourceContract, SourceHarness
from tests.contract.surroundings import backend_context
from tests.servers.postgres import Database
from tests.servers.proxy import TcpProxy


class Fed(msgspec.Struct, frozen=True):
    """What was fed, as a row; without headers it is somebody's plain body."""

    body: bytes
    headers: Mapping[str, str] = {}


class FedOutboxSource(OutboxSource):
    """The source, with what was fed in place of the rows that it travelled in."""

    async def poll(self) -> Batch:
        batch = await super().poll()
        return msgspec.structs.replace(batch, messages=[_fed(row) for row in batch.messages])


def _fed(row: RelayMessage) -> RelayMessage:
    fed = msgspec.json.decode(row.payload, type=Fed)
    message = restore(fed.body, fed.headers, LOWER)
    return message or RelayMessage(dedup_key=row.dedup_key, payload=fed.body)


class OutboxSourceHarness(SourceHarness):
    def __init__(self, database: Database, proxy: TcpProxy, relay: RelayDatabase) -> None:
        self._database = database
        self._proxy = proxy
        self._relay = relay
        self._encode = encoder("envelope", LOWER)

    @property
    def idle_poll_s(self) -> float:
        return REST_S

    def make(self, *, batch_size: int = 100) -> Source:
        context = backend_context(
            database=self._relay, catalog=Catalog(self._relay, "default"), batch_size=batch_size
        )
        return FedOutboxSource.from_options({"outbox": "fed"}, context)

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        encoded = map(self._encode, messages)
        await self._publish([Fed(message.body, message.headers) for message in encoded])

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        await self._publish([Fed(body) for body in bodies])
        return bodies

    async def cut(self) -> None:
        await self._proxy.cut()

    async def stall(self) -> None:
        self._proxy.stall()

    async def restore(self) -> None:
        await self._proxy.restore()

    async def restart(self) -> None:
        await asyncio.to_thread(self._database.server.restart)

    def mapping(self) -> AbstractContextManager[object]:
        return postgres_errors("testing")

    def exceptions(self) -> Iterable[BaseException]:
        yield from (
            driver_class("made up")
            for driver_class in vars(asyncpg.exceptions).values()
            if isinstance(driver_class, type)
            and issubclass(driver_class, Exception)
            and not issubclass(driver_class, Warning)
        )
        yield from (ConnectionResetError("reset"), EOFError(), TimeoutError(), ssl.SSLError("bad"))

    async def _publish(self, rows: Sequence[Fed]) -> None:
        connection = await asyncpg.connect(self._database.dsn)
        try:
            await connection.executemany(
                "select pgtrickle.outbox_publish('fed', jsonb_build_array($1::jsonb))",
                [(msgspec.json.encode(row).decode(),) for row in rows],
            )
        finally:
            await connection.close()


class TestOutboxSource(SourceContract):
    backend = "outbox"
    lacks: ClassVar = {
        "lag": "the relay measures it for all outboxes at once",
        "keep alive": "rows of an outbox are not on loan",
        "tls": "the connection is the relay's own and tested with it",
        "authentication": "the connection is the relay's own and tested with it",
    }

    @pytest.fixture
    async def harness(
        self,
        migrated_database: Database,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
    ) -> AsyncIterator[OutboxSourceHarness]:
        address = urlsplit(migrated_database.dsn)
        proxy = await tcp_proxy(address.hostname or "", address.port or 0)
        connection = await asyncpg.connect(migrated_database.dsn)
        await connection.execute("select pgtrickle.enable_outbox('fed', capture => 'none')")
        await connection.close()
        relay = RelayDatabase(PostgresSettings(url=proxy.url(migrated_database.dsn)))
        await relay.open()
        yield OutboxSourceHarness(migrated_database, proxy, relay)
        await relay.aclose()
