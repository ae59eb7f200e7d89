"""What a new user does by hand, from an empty database to a kill in full flow."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from tests.integration.relay_surroundings import (
    RelayWorld,
    StartProcess,
    assert_each_once_or_repeated_with_its_key,
    events_in,
    events_of,
    nats_world,
    relay_world,
    until,
    writing,
)
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database

ROWS = 10_000
INSERT = "insert into orders (id) values (%s)"


@pytest.fixture
async def world(
    database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    """An empty database, not migrated."""
    async with relay_world(database, tmp_path, relay_process) as world:
        yield world


async def _migrate(world: RelayWorld) -> None:
    migrate = await world.start_process("migrate", dsn=world.database.dsn)
    assert await migrate.wait() == 0, migrate.output
    await world.run("grant pgtrickle_relay to relay_member")


async def test_a_new_user_gets_each_change_in_order_and_loses_nothing_by_disabling(
    world: RelayWorld,
) -> None:
    await _migrate(world)
    await world.run("create table orders (id int primary key, version int default 0)")
    await world.run("select pgtrickle.enable_outbox('orders')")
    member = await asyncpg.connect(world.member_dsn)
    output = world.directory / "o.jsonl"
    await member.execute(
        "select pgtrickle.set_relay_outbox('orders-to-file', 'orders', null,"
        f""" '{{"type":"file","output":"{output}"}}')"""
    )
    relay = await world.relay()
    await world.until_state(relay, "orders-to-file", "running")

    changes = (
        "insert into orders values (1), (2)",
        "update orders set version = 1 where id = 2",
        "delete from orders where id = 1",
    )
    seen = 0
    for change, count in zip(changes, (2, 2, 1), strict=True):
        began = time.monotonic()
        await world.run(change)
        seen += count
        await events_of(output, seen, timeout_s=1.0)
        assert time.monotonic() - began < 1.0
    assert [(event.op, event.id) for event in events_in(output)] == [
        ("insert", 1),
        ("insert", 2),
        ("delete", 2),
        ("insert", 2),
        ("delete", 1),
    ]

    await member.execute("select pgtrickle.disable_relay('orders-to-file')")

    async def is_gone() -> bool:
        return await world.state(relay, "orders-to-file") is None

    await until(is_gone, timeout_s=1.0)
    await world.run("insert into orders values (3)")
    await member.execute("select pgtrickle.enable_relay('orders-to-file')")
    assert (await events_of(output, seen + 1, timeout_s=2.0))[-1].id == 3

    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied"):
        await member.fetch("select * from pgtrickle.relay_outbox_config")
    await member.close()
    assert await relay.terminate() == 0


async def test_a_kill_while_rows_are_written_loses_none_and_repeats_with_the_same_key(
    world: RelayWorld,
) -> None:
    await _migrate(world)
    await world.make_orders()
    output = await world.to_file("orders-to-file")
    relay = await world.relay()

    with writing(world.database.dsn, INSERT, 1, ROWS) as committed:
        for share in (0.2, 0.6):
            await events_of(output, int(ROWS * share))
            await relay.kill()
            relay = await world.relay()
        assert committed() > ROWS * 0.6
    events = await events_of(output, ROWS)

    assert_each_once_or_repeated_with_its_key(events, range(1, ROWS + 1))
    assert await relay.terminate() == 0


async def test_a_stream_holds_each_event_exactly_once_after_a_kill(
    world: RelayWorld, nats_server: NatsServer
) -> None:
    await _migrate(world)
    await world.make_orders()
    async with nats_world(nats_server, "tour") as stream:
        await world.forward("orders-to-nats", stream.sink())
        relay = await world.relay()
        line = await relay.wait_for_log("sink connected")
        assert "stream tour: duplicate window 120 s" in line

        with writing(world.database.dsn, INSERT, 1, ROWS):
            for share in (0.2, 0.6):
                await stream.until_holding(int(ROWS * share))
                await relay.kill()
                relay = await world.relay()
        await stream.until_holding(ROWS)
        assert await relay.terminate() == 0

        events = await stream.events()
        assert [event.id for event in events] == list(range(1, ROWS + 1))
        assert len({event.dedup_key for event in events}) == ROWS
