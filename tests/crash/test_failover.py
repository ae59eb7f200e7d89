"""A primary dies for good and its standby is promoted under running relays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest

from tests.integration.relay_surroundings import (
    MEMBER,
    NatsWorld,
    RelayWorld,
    as_json,
    nats_world,
    relay_world,
    until,
    writing,
)
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database, PostgresServer

BOUND_S = 60.0
GROUP = "sharers"
VISIBILITY_S = 2
# Until the relay is connected again, and has delivered what was written meanwhile.
RECOVERY_S = 20.0
ROWS = 200
INSERT = "insert into orders (id) values (%s) on conflict do nothing"


@dataclass
class Pair:
    """A primary with the world in it, its standby, and two streams; the other database an inbox.

    ``shared`` is what a consumer group delivers to, and takes what comes again.
    """

    world: RelayWorld
    primary: PostgresServer
    standby: PostgresServer
    stream: NatsWorld
    shared: NatsWorld
    other: Database

    @property
    def relay_dsn(self) -> str:
        """Whichever of the two is the primary."""
        places = ",".join(urlsplit(one.dsn).netloc.partition("@")[2] for one in self.both)
        name = self.world.database.name
        return f"postgresql://{MEMBER}@{places}/{name}?target_session_attrs=read-write"

    @property
    def both(self) -> tuple[PostgresServer, PostgresServer]:
        return self.primary, self.standby

    @property
    def standby_dsn(self) -> str:
        return self.standby.database_dsn(self.world.database.name)

    async def fail_over(self) -> None:
        """The primary is gone at once, and the standby takes its place."""
        await asyncio.to_thread(self.primary.kill)
        _run(self.standby.dsn, "select pg_promote()")
        self.world.owner.terminate()
        self.world.owner = await asyncpg.connect(self.standby_dsn)

    async def replayed(self) -> None:
        """Wait until the standby has everything."""
        target = await self.world.value("select pg_current_wal_lsn()::text")

        async def found() -> bool:
            (row,) = _run(
                self.standby.dsn, f"select pg_last_wal_replay_lsn() >= '{target}'::pg_lsn"
            )
            return bool(row[0])

        await until(found)

    async def until_all_arrived(self, first: int, last: int) -> None:
        """Wait until the streams and the inbox hold every row of these, by its content."""
        wanted = set(range(first, last + 1))

        async def found() -> bool:
            for stream in (self.stream, self.shared):
                if not wanted <= {event.id for event in await stream.events()}:
                    return False
            rows = _run(self.other.dsn, "select (payload ->> 'id')::int from pgtrickle.order_inbox")
            return wanted <= {row[0] for row in rows}

        await until(found, timeout_s=BOUND_S, every_s=0.2)

    async def assert_the_group_repeats_with_equal_keys_only(self) -> None:
        """What one key names is one event, and one event has one key."""
        named = {(event.dedup_key, event.id) for event in await self.shared.events()}
        assert len({key for key, _ in named}) == len(named) == len({id_ for _, id_ in named})


def _run(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(query.encode())
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
async def pair(
    postgres_server_with: Callable[..., PostgresServer],
    migrated_database: Database,
    nats_server: NatsServer,
    tmp_path: Path,
    relay_process: Callable[..., object],
) -> AsyncIterator[Pair]:
    primary = postgres_server_with({})
    with ExitStack() as opened:
        database = opened.enter_context(primary.migrated_database())
        _run(migrated_database.dsn, "select pgtrickle.create_inbox('order_inbox')")
        async with (
            relay_world(database, tmp_path, relay_process) as world,  # type: ignore[arg-type]
            nats_world(nats_server, "failover") as stream,
            nats_world(nats_server, "failover_shared", duplicate_window_s=0.1) as shared,
        ):
            await world.make_orders()
            await world.forward("stream", stream.sink())
            await world.forward(
                "inbox",
                {"type": "pg-inbox", "url": migrated_database.dsn, "inbox": "order_inbox"},
            )
            config = {
                "source": {"outbox": "orders", "consumer_group": GROUP},
                "sink": shared.sink(),
                "batch_size": 10,
                "visibility_seconds": VISIBILITY_S,
            }
            await world.run(
                "select pgtrickle.set_relay_outbox('shared', $1::text::jsonb)", as_json(config)
            )
            standby = opened.enter_context(primary.standby())
            yield Pair(world, primary, standby, stream, shared, migrated_database)


async def test_ids_that_a_promoted_standby_draws_again_are_other_events(pair: Pair) -> None:
    await pair.world.relay(dsn=pair.relay_dsn)
    await pair.world.insert(1, 10)
    await pair.until_all_arrived(1, 10)
    await pair.replayed()
    # From here on it lags behind, for good.
    _run(pair.standby.dsn, "alter system set primary_conninfo = ''")
    _run(pair.standby.dsn, "select pg_reload_conf()")

    async def is_behind() -> bool:
        return not _run(pair.standby.dsn, "select 1 from pg_stat_wal_receiver")

    await until(is_behind)
    await pair.world.insert(11, ROWS)
    await pair.until_all_arrived(11, ROWS)
    last_published = await pair.world.value("select max(id) from pgtrickle.outbox_orders")

    await pair.fail_over()
    await pair.world.insert(1001, 1000 + ROWS)

    first_again = await pair.world.value(
        "select min(id) from pgtrickle.outbox_orders where payload->'inserted'->0->>'id' = '1001'"
    )
    assert isinstance(first_again, int)
    assert isinstance(last_published, int)
    assert first_again <= last_published, "no id was drawn again: nothing is tested"
    await pair.until_all_arrived(1001, 1000 + ROWS)
    await pair.assert_the_group_repeats_with_equal_keys_only()


async def test_a_synchronous_failover_under_load_loses_and_repeats_nothing_that_committed(
    pair: Pair,
) -> None:
    _run(pair.primary.dsn, "alter system set synchronous_standby_names = 'standby'")
    _run(pair.primary.dsn, "select pg_reload_conf()")
    await pair.world.relay(dsn=pair.relay_dsn)
    doomed = await pair.world.relay(dsn=pair.relay_dsn)
    await pair.world.until_state(doomed, "shared", "running")
    places = pair.relay_dsn.replace(MEMBER, "postgres")

    with writing(places, INSERT, 1, ROWS * 3) as committed:

        async def is_in_flight() -> bool:
            return committed() > ROWS

        await until(is_in_flight)
        await doomed.kill()
        await pair.fail_over()
        promoted_at = time.monotonic()
        _run(pair.standby.dsn, "alter system set synchronous_standby_names = ''")
        _run(pair.standby.dsn, "select pg_reload_conf()")

    await pair.until_all_arrived(1, ROWS * 3)
    assert time.monotonic() - promoted_at < VISIBILITY_S + RECOVERY_S
    ids = [event.id for event in await pair.stream.events()]
    assert len(ids) == len(set(ids))
    await pair.assert_the_group_repeats_with_equal_keys_only()
