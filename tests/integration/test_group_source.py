"""Workers of a consumer group against PostgreSQL: what one has leased, kept alive and released."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from relay.backends.outbox import OutboxSource
from relay.backends.outbox.group import GroupSource
from relay.errors import LeaseLost
from tests.integration.outbox_surroundings import (
    BOUND_S,
    OutboxWorld,
    enable_orders,
    outbox_world,
    polled,
)
from tests.integration.relay_surroundings import until
from tests.servers.postgres import Database

ROWS = 5


@pytest.fixture
async def world(migrated_database: Database) -> AsyncIterator[OutboxWorld]:
    async with outbox_world(migrated_database.dsn, pool_size=6) as made:
        await enable_orders(made.publisher)
        await made.publisher.execute(
            "select pgtrickle.create_consumer_group('g', 'orders', 'earliest')"
        )
        yield made


async def worker(world: OutboxWorld, name: str, *, visibility_seconds: int) -> GroupSource:
    source = OutboxSource.from_options(
        {"outbox": "orders", "consumer_group": "g"},
        world.context(worker_id=name, visibility_seconds=visibility_seconds),
    )
    assert isinstance(source, GroupSource)
    await source.connect()
    return source


async def write(world: OutboxWorld) -> None:
    await world.publisher.executemany(
        "insert into orders (id) values ($1)", [(id_,) for id_ in range(ROWS)]
    )


async def test_rows_are_nobody_else_s_while_they_are_kept_alive_and_somebody_s_afterwards(
    world: OutboxWorld,
) -> None:
    one = await worker(world, "one", visibility_seconds=1)
    other = await worker(world, "other", visibility_seconds=1)
    await write(world)
    (batch,) = await polled(one, ROWS, acknowledge=False)
    interval_s = one.keep_alive_interval_s
    assert interval_s == 0.5
    began = await world.publisher.fetchval("select now()")

    # Time is what is tested: the lease would run out twice.
    ends_at = time.monotonic() + 2.2
    keep_at = time.monotonic() + interval_s
    while time.monotonic() < ends_at:
        assert (await other.poll()).is_empty
        if time.monotonic() >= keep_at:
            await one.keep_alive(batch)
            keep_at += interval_s
    seen = await world.publisher.fetchval(
        "select last_heartbeat_at from pgtrickle.consumer_lag('g') where consumer_id = 'one'"
    )
    assert seen > began
    (again,) = await polled(other, ROWS, acknowledge=False)

    with pytest.raises(LeaseLost):
        await one.keep_alive(batch)
    with pytest.raises(LeaseLost):
        await one.acknowledge(batch)
    await other.acknowledge(again)
    assert await world.publisher.fetchval("select max(lag) from pgtrickle.consumer_lag('g')") == 0
    await asyncio.gather(one.aclose(), other.aclose())


async def test_what_was_leased_before_a_new_connection_is_released_by_it(
    world: OutboxWorld,
) -> None:
    one = await worker(world, "one", visibility_seconds=600)
    other = await worker(world, "other", visibility_seconds=600)
    await write(world)
    await polled(one, ROWS, acknowledge=False)

    await one.connect()

    assert await polled(other, ROWS)
    await asyncio.gather(one.aclose(), other.aclose())


async def test_an_acknowledgement_that_is_cut_off_leaves_nothing_leased(world: OutboxWorld) -> None:
    one = await worker(world, "one", visibility_seconds=600)
    other = await worker(world, "other", visibility_seconds=600)
    await write(world)
    (batch,) = await polled(one, ROWS, acknowledge=False)

    async with world.publisher.transaction():
        await world.publisher.execute("select from pgtrickle.relay_group_leases for update")
        acknowledging = asyncio.create_task(one.acknowledge(batch))

        async def is_waiting() -> bool:
            query = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
            return bool(await world.publisher.fetchval(query))

        await until(is_waiting)
        acknowledging.cancel()
        await asyncio.wait([acknowledging], timeout=BOUND_S)
    await one.aclose()

    assert await polled(other, ROWS)
    await other.aclose()
