"""Fifty thousand events to an inbox on another PostgreSQL server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import asyncpg
import msgspec
import pytest

from tests.crash.fifty_thousand import Arrived, Blow, Destination, ForwardProof
from tests.crash.sharing import GroupProof
from tests.servers.postgres import PostgresServer

# The order of arrival is the order in which the rows were numbered.
_TABLE = """
create table public.arrived (
    event_id text primary key,
    event_type text not null,
    aggregate_id text,
    payload jsonb not null,
    headers jsonb,
    place bigint generated always as identity
)
"""


class ToInbox(Destination):
    deduplicates = True

    def __init__(self, server: PostgresServer, dsn: str) -> None:
        self._server = server
        self._dsn = dsn

    def sink(self) -> Mapping[str, object]:
        return {
            "type": "pg-inbox",
            "url": self._dsn,
            "inbox_table": "arrived",
            "schema": "public",
        }

    async def prepare(self) -> None:
        await self._ask(_TABLE)

    async def count(self) -> int:
        [row] = await self._ask("select count(*) as count from public.arrived")
        return msgspec.convert(row["count"], int)

    async def events(self) -> Sequence[Arrived]:
        rows = await self._ask(
            "select event_id as dedup_key, aggregate_id as key, (payload ->> 'id')::int as id,"
            " convert_to(payload::text || headers::text, 'UTF8') as content"
            " from public.arrived order by place"
        )
        return [msgspec.convert(row, Arrived) for row in rows]

    async def take_away(self, blow: Blow) -> None:
        await asyncio.to_thread(getattr(self._server, blow))

    async def bring_back(self) -> None:
        await asyncio.to_thread(self._server.start)

    async def _ask(self, query: str) -> Sequence[Mapping[str, object]]:
        connection = await asyncpg.connect(self._dsn)
        try:
            return [dict(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()


class TestForward(ForwardProof, GroupProof):
    @pytest.fixture
    async def destination(
        self, postgres_server_with: Callable[..., PostgresServer]
    ) -> AsyncIterator[Destination]:
        server = postgres_server_with({})
        with server.database() as database:
            destination = ToInbox(server, database.dsn)
            await destination.prepare()
            yield destination
