"""A pipeline with partitions as it is seen and operated: each reader by itself, all as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import msgspec
import pytest

from relay.board import RelayStatus
from relay.partition import key_hash
from tests.contract.redis_broker import Broker
from tests.integration.relay_surroundings import RelayWorld, StartProcess, relay_world, until
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess
from tests.servers.redis import RedisServer

SINK = {"type": "pg-inbox", "inbox": "arrived"}
GOOD, REFUSED, LATER = range(1, 31), range(101, 113), range(31, 51)


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        await world.run("select pgtrickle.create_inbox('arrived')")
        yield world


def dealt(ids: range, readers: int) -> dict[str, int]:
    """How many of these are whose."""
    return dict(Counter(f"p/{key_hash(str(id_)) % readers + 1}" for id_ in ids))


async def shown(world: RelayWorld, relay: RelayProcess, what: str) -> dict[str, object]:
    status = msgspec.json.decode(await world.page(relay, "/status"), type=RelayStatus)
    if what == "published":
        # A reader that was given up for a moment begins to count again.
        before = status.delivered_before
        return {one.name: one.published + before.get(one.name, 0) for one in status.pipelines}
    return {one.name: getattr(one, what) for one in status.pipelines}


async def until_shown(
    world: RelayWorld, relay: RelayProcess, what: str, expected: dict[str, int]
) -> None:
    """Wait until every reader shows just this."""

    async def is_shown() -> bool:
        return await shown(world, relay, what) == expected

    await until(is_shown)


async def arrived(world: RelayWorld) -> set[int]:
    rows = await world.owner.fetch("select (payload ->> 'id')::int as id from pgtrickle.arrived")
    return {row["id"] for row in rows}


@pytest.mark.shows("pipeline:partitions")
async def test_readers_deliver_count_and_retry_their_own_keys_and_change_without_a_repetition(
    world: RelayWorld,
) -> None:
    await world.run(
        "alter table pgtrickle.arrived add constraint small check ((payload ->> 'id')::int < 100)"
    )
    await world.forward("p", SINK, partitions=3)
    for ids in (GOOD, REFUSED):
        await world.insert(ids[0], ids[-1])
    relay = await world.relay()

    await until_shown(world, relay, "published", dealt(GOOD, 3))
    await until_shown(world, relay, "dead_letters", dealt(REFUSED, 3))
    assert await arrived(world) == set(GOOD)
    assert await world.value("select array_agg(distinct pipeline) from pgtrickle.relay_dlq") == [
        "p"
    ]
    health = await world.health(relay)
    assert {name: one.healthy for name, one in health.pipelines.items()} == {
        f"p/{number}": True for number in (1, 2, 3)
    }
    metrics = await world.page(relay, "/metrics")
    assert 'pipeline="p/3"' in metrics

    refused = f"/wait?pipeline=p&outbox_id={len(GOOD) + len(REFUSED)}"
    assert '"dead_letters":1,' in await world.page(relay, refused)

    await world.run("alter table pgtrickle.arrived drop constraint small")
    assert await world.value("select pgtrickle.relay_dlq_retry_all('p')") == len(REFUSED)
    both = {name: count + dealt(REFUSED, 3)[name] for name, count in dealt(GOOD, 3).items()}
    await until_shown(world, relay, "published", both)
    assert await arrived(world) == {*GOOD, *REFUSED}
    assert "drained" in await world.page(relay, "/health/drained")
    assert '"dead_letters":0,' in await world.page(relay, refused)

    # Level readers owe nothing to those that come after them.
    since = len(relay.stderr)
    await world.forward("p", SINK, partitions=2)
    await relay.wait_for_log("start from one position", since=since)
    await world.insert(LATER[0], LATER[-1])
    later = dealt(LATER, 2)
    await until_shown(world, relay, "published", {name: both[name] + later[name] for name in later})
    # As for a relay that slept through two changes, and finds the number that it knows.
    since = len(relay.stderr)
    await world.run(
        "update pgtrickle.relay_consumer_offsets set partitioning = '{\"partitions\": 7}'"
    )
    await world.run("select pg_notify('pgtrickle_relay_config', '{}')")
    await relay.wait_for_log("start from one position", since=since)
    await until_shown(world, relay, "state", dict.fromkeys(later, "running"))
    await world.run("select pgtrickle.disable_relay('p')")
    await until_shown(world, relay, "state", {})
    await world.run("select pgtrickle.enable_relay('p')")
    await until_shown(world, relay, "state", dict.fromkeys(later, "running"))
    assert await arrived(world) == {*GOOD, *REFUSED, *LATER}


async def test_a_seek_moves_four_readers_in_two_relays_and_each_key_comes_again_in_order(
    world: RelayWorld, redis_server: RedisServer
) -> None:
    stream = Broker(redis_server, "sought")
    await stream.drop()

    async def versions() -> list[tuple[object, object]]:
        return [
            (row["id"], row["version"])
            for one in await stream.restored()
            for row in [msgspec.json.decode(one.payload, type=dict[str, object])]
        ]

    async def until_there(first: int, expected: set[tuple[int, int]]) -> None:
        """Wait until ids with versions have arrived, from the so manieth entry on."""

        async def are_there() -> bool:
            return {*(await versions())[first:]} >= expected

        await until(are_there)

    await world.forward(
        "p",
        {"type": "redis", "url": stream.server.url, "stream_key": stream.stream},
        partitions=4,
        collapse_updates=True,
    )
    first, second = [await world.relay(f"relay.worker_id={name}") for name in ("a", "b")]

    async def is_shared() -> bool:
        owners = await world.value(
            "select array_agg(worker_id order by worker_id)"
            " from pgtrickle.relay_lag('default', '{p}')"
        )
        return owners == ["a", "a", "b", "b"]

    await until(is_shared)
    await world.insert(1, 8)
    for _ in range(3):
        await world.run("update orders set version = version + 1")
    both = {(id_, version) for id_ in range(1, 9) for version in (2, 3)}
    await until_there(0, both)
    before = len(await versions())
    last = int(str(await world.value("select max(id) from pgtrickle.outbox_orders")))
    late = await asyncpg.connect(world.database.dsn)
    await late.execute("begin")
    await late.execute("update orders set version = version + 1 where id in (1, 5)")

    # From the second of the three on; what is open at that moment lies above or below, and comes.
    assert await world.value("select pgtrickle.relay_seek('p', $1::bigint)", last - 1) == 2
    await until_there(before, both)
    for relay in (first, second):
        await relay.wait_for_log("relay_seek of p to")
    await world.run("select pgtrickle.relay_seek('p', 'latest')")
    await world.run("update orders set version = version + 1 where id = 2")
    await until_there(before, {(2, 4)})
    await late.execute("commit")
    await late.close()
    await until_there(before, {(1, 4), (5, 4)})

    again = (await versions())[before:]
    for id_ in range(1, 9):
        # What was in flight at a seek may come twice.
        came = list(dict.fromkeys(version for one, version in again if one == id_))
        assert came == [2, 3, *([4] if id_ in (1, 2, 5) else [])], id_
    assert await first.terminate() == await second.terminate() == 0
    await stream.drop()
