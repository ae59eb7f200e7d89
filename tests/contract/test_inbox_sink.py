"""The inbox sink, writing into another database, under the contract of sinks."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar
from urllib.parse import urlsplit

import asyncpg
import msgspec
import psycopg
import pytest
from psycopg.rows import dict_row

from relay.backends.inbox import InboxSink
from relay.message import RelayMessage, op_named
from relay.postgres import postgres_errors
from tests.contract.evidence import numbered, until
from tests.contract.sink_contract import SinkContract, SinkHarness
from tests.contract.surroundings import backend_context
from tests.servers.postgres import Database, PostgresServer
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles

CREATE_TABLE = """
create table public.inbox (
    event_id text primary key,
    event_type text not null,
    source text,
    aggregate_id text,
    payload jsonb not null,
    headers jsonb,
    trace_id text,
    arrived bigint generated always as identity
)
"""

# As text: a document may be deeper than what Python's decoder follows.
READ_TABLE = """
select event_id, event_type, aggregate_id, payload::text as payload, headers
from public.inbox
order by arrived
"""


class InboxSinkHarness(SinkHarness):
    def __init__(
        self,
        database: Database,
        proxy: TcpProxy,
        servers: Callable[..., PostgresServer],
        tls_files: TlsFiles,
    ) -> None:
        self._database = database
        self._proxy = proxy
        self._servers = servers
        self._tls_files = tls_files
        _create_table(database.dsn)

    def make(self) -> InboxSink:
        return _sink({"url": self._proxy.url(self._database.dsn)})

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        return await until(self._read, at_least)

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b'{"a":"\\u0000"}')

    async def cut(self) -> None:
        await self._proxy.cut()

    async def stall(self) -> None:
        self._proxy.stall()

    async def restore(self) -> None:
        await self._proxy.restore()

    async def restart(self) -> None:
        await asyncio.to_thread(self._database.server.restart)

    def oversize(self, dedup_key: str) -> RelayMessage:
        # Zeroed pages that nobody touches: PostgreSQL's limit costs this test no memory.
        return RelayMessage(dedup_key=dedup_key, payload=bytes(0x0FFFFFFF + 1))

    async def make_tls(self, *, trusted: bool) -> InboxSink:
        files = self._tls_files
        server = await asyncio.to_thread(
            self._servers,
            {
                "ssl": "on",
                "ssl_cert_file": files.server_certificate.name,
                "ssl_key_file": files.server_key.name,
            },
            {
                "pg_hba.conf": b"hostssl all all all trust\n",
                files.server_certificate.name: files.server_certificate.read_bytes(),
                files.server_key.name: files.server_key.read_bytes(),
            },
        )
        _create_table(server.dsn)
        authority = files.authority if trusted else files.other_authority
        return _sink({"url": server.dsn, "sslmode": "verify-full", "sslrootcert": str(authority)})

    async def make_unauthorized(self) -> InboxSink:
        url = self._database.server.database_dsn(self._database.name, user="nobody_we_know")
        return _sink({"url": url})

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

    async def _read(self) -> Sequence[RelayMessage]:
        with psycopg.connect(self._database.dsn, row_factory=dict_row) as connection:
            rows = connection.execute(READ_TABLE).fetchall()
        return [_restored(row) for row in rows]


class TestInboxSink(SinkContract):
    backend = "pg-inbox"
    lacks: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture
    async def harness(
        self,
        database: Database,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
        postgres_server_with: Callable[..., PostgresServer],
        tls_files: TlsFiles,
    ) -> InboxSinkHarness:
        address = urlsplit(database.dsn)
        assert address.hostname is not None
        assert address.port is not None
        proxy = await tcp_proxy(address.hostname, address.port)
        return InboxSinkHarness(database, proxy, postgres_server_with, tls_files)


def test_the_event_type_comes_from_the_stream_table_and_the_op() -> None:
    assert _sink({"url": "postgresql://"}).subject_of(numbered(1)[0]) == "orders.insert"


def _sink(options: Mapping[str, object]) -> InboxSink:
    return InboxSink.from_options(
        {"type": "pg-inbox", "inbox_table": "inbox", "schema": "public", **options},
        backend_context(),
    )


def _create_table(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(CREATE_TABLE)


def _restored(row: Mapping[str, object]) -> RelayMessage:
    headers = dict(msgspec.convert(row["headers"], dict[str, object]))
    metadata = {
        name: headers.pop(name)
        for name in RelayMessage.__struct_fields__
        if name in headers and name != "op"
    }
    return msgspec.convert(
        {
            **metadata,
            "op": op_named(str(headers.pop("op"))),
            "dedup_key": row["event_id"],
            "key": row["aggregate_id"],
            "subject": row["event_type"],
            "payload": str(row["payload"]).encode(),
            "headers": headers,
        },
        RelayMessage,
    )
