"""What stands between the relay and its primary: poolers in both modes, and a standby."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import pytest

from relay.errors import ConfigurationError
from relay.locks import Locks
from relay.postgres import Database as RelayDatabase
from relay.settings import PostgresSettings
from tests.integration.relay_surroundings import (
    MEMBER,
    RelayWorld,
    StartProcess,
    events_of,
    relay_world,
    until,
)
from tests.servers.pgbouncer import pgbouncer, through
from tests.servers.postgres import Database, PostgresServer

BOUND_S = 30


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


async def test_a_pooler_in_session_mode_is_as_good_as_the_server_itself(
    world: RelayWorld, another_migrated_database: Database
) -> None:
    other = await asyncpg.connect(another_migrated_database.dsn)
    await other.execute("select pgtrickle.create_inbox('order_inbox')")
    with pgbouncer(world.database.server, "session", MEMBER) as port:
        path = await world.to_file("out")
        url = through(port, another_migrated_database)
        await world.forward("in", {"type": "pg-inbox", "url": url, "inbox": "order_inbox"})
        relay = await world.relay(dsn=through(port, world.database, MEMBER))
        await world.insert(1, 5)

        await events_of(path, 5)

        async def all_arrived() -> bool:
            return await other.fetchval("select count(*) = 5 from pgtrickle.order_inbox") is True

        await until(all_arrived)
        await relay.terminate()
    other.terminate()


async def test_a_pooler_in_transaction_mode_is_refused_at_the_start(world: RelayWorld) -> None:
    with pgbouncer(world.database.server, "transaction", MEMBER) as port:
        relay = await world.relay(dsn=through(port, world.database, MEMBER), is_awaited=False)

        assert await relay.wait(timeout_s=BOUND_S) == 2
        assert "pooler in transaction mode" in relay.stderr[-1]
        assert "set pool_mode to session" in relay.stderr[-1]


async def test_an_inbox_behind_a_pooler_in_transaction_mode_fails_with_the_remedy(
    world: RelayWorld, another_migrated_database: Database
) -> None:
    with pgbouncer(world.database.server, "transaction") as port:
        url = through(port, another_migrated_database)
        await world.forward("in", {"type": "pg-inbox", "url": url, "inbox": "order_inbox"})
        relay = await world.relay()

        failed = await world.until_state(relay, "in", "failed")

        assert "set pool_mode to session" in failed.reason


async def test_locks_of_a_session_that_is_not_ours_any_more_are_noticed(
    migrated_database: Database,
) -> None:
    locks = Locks(PostgresSettings(url=migrated_database.dsn), "default")
    await locks.open(on_lost=lambda: None)
    assert locks._connection is not None
    await locks._connection.execute("select pg_advisory_unlock_all()")

    with pytest.raises(ConfigurationError, match="pooler in transaction mode"):
        await locks.members()

    await locks.aclose()


async def test_a_standby_is_refused_at_the_start_whatever_pipelines_there_are(
    postgres_server_with: Callable[..., PostgresServer],
    tmp_path: Path,
    relay_process: StartProcess,
) -> None:
    primary = postgres_server_with({})
    with primary.migrated_database() as database:
        async with relay_world(database, tmp_path, relay_process) as world:
            with primary.standby() as standby:
                dsn = standby.database_dsn(database.name, user=MEMBER)
                relay = await world.relay(dsn=dsn, is_awaited=False)

                assert await relay.wait(timeout_s=BOUND_S) == 2
                assert "the database is a standby" in relay.stderr[-1]
                assert "target_session_attrs=read-write" in relay.stderr[-1]


async def test_a_server_itself_is_never_taken_for_a_pooler(migrated_database: Database) -> None:
    for _ in range(5):
        async with asyncio.timeout(BOUND_S):
            database = RelayDatabase(PostgresSettings(url=migrated_database.dsn, pool_size=2))
            await database.open()
            await database.aclose()
