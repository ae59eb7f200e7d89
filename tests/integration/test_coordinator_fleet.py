"""Several relays on one database: fair shares, quick failover, and one owner at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from relay.locks import Locks
from relay.settings import PostgresSettings
from tests.integration.relay_surroundings import (
    BOUND_S,
    RelayWorld,
    StartProcess,
    assert_each_once_or_repeated_with_its_key,
    events_of,
    port_of,
    relay_world,
    until,
    writing,
)
from tests.servers.finding import LOOPBACK
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess
from tests.servers.proxy import TcpProxy

PIPELINES = 4
ROWS = 3_000
INSERT = "insert into orders (id) values (%s)"

# Every change of a position, with the epoch under which it was written.
_LOG_OF_POSITIONS = """
create table position_log (
    number bigserial primary key, pipeline text, epoch bigint, worker text, position bigint
);
create function log_position() returns trigger language plpgsql security definer as $$
begin
    insert into public.position_log (pipeline, epoch, worker, position)
    values (new.pipeline_id, new.epoch, new.worker_id, new.last_change_id);
    return null;
end $$;
create trigger log_position after insert or update on pgtrickle.relay_consumer_offsets
    for each row execute function log_position();
"""

_LOCKS_HELD = """
select count(*) as held from pg_locks
where locktype = 'advisory' and mode = 'ExclusiveLock' and granted
    and database = (select oid from pg_database where datname = current_database())
group by pid
"""

Proxies = Callable[[str, int], Awaitable[TcpProxy]]


class _Owned(msgspec.Struct):
    name: str
    state: str


class _Status(msgspec.Struct):
    pipelines: list[_Owned]
    members: int


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        await world.run(_LOG_OF_POSITIONS)
        yield world


async def _owned(world: RelayWorld, relay: RelayProcess) -> frozenset[str]:
    """The pipelines that run in this relay."""
    status = msgspec.json.decode(await world.page(relay, "/status"), type=_Status)
    return frozenset(one.name for one in status.pipelines if one.state == "running")


async def _until_shared(
    world: RelayWorld, relays: list[RelayProcess], counts: list[int], *, timeout_s: float
) -> list[frozenset[str]]:
    """Wait until so many pipelines run in each relay, the fewest first, and none in two."""

    async def found() -> list[frozenset[str]] | None:
        owned = await asyncio.gather(*(_owned(world, relay) for relay in relays))
        is_disjoint = len(frozenset[str]().union(*owned)) == sum(map(len, owned))
        is_shared = sorted(map(len, owned)) == sorted(counts)
        return owned if is_shared and is_disjoint else None

    return await until(found, timeout_s=timeout_s)


async def _assert_no_position_was_written_by_a_former_owner(world: RelayWorld) -> None:
    rows = await world.owner.fetch(
        "select pipeline, epoch, worker from position_log order by number"
    )
    newest: dict[str, int] = {}
    owners: dict[tuple[str, int], set[str]] = {}
    for row in rows:
        assert row["epoch"] >= newest.get(row["pipeline"], 0)
        newest[row["pipeline"]] = row["epoch"]
        if row["worker"] is not None:
            owners.setdefault((row["pipeline"], row["epoch"]), set()).add(row["worker"])
    assert rows
    assert all(len(workers) == 1 for workers in owners.values())


async def test_two_relays_share_and_one_takes_over_within_two_seconds_of_the_others_kill(
    world: RelayWorld,
) -> None:
    outputs = [await world.to_file(f"p{number}") for number in range(PIPELINES)]
    # The product's own pace, not that of the tests.
    pace = "relay.coordinate_interval_s=0.5"
    first = await world.relay(pace)
    await _until_shared(world, [first], [4], timeout_s=5)
    second = await world.relay(pace)
    await _until_shared(world, [first, second], [2, 2], timeout_s=5)

    with writing(world.database.dsn, INSERT, 1, ROWS) as committed:
        await events_of(outputs[0], ROWS // 10)
        await first.kill()
        assert committed() < ROWS
        began = time.monotonic()
        await _until_shared(world, [second], [4], timeout_s=2.0)
        print(f"failover after {time.monotonic() - began:.2f} s")

    for output in outputs:
        events = await events_of(output, ROWS)
        assert_each_once_or_repeated_with_its_key(events, range(1, ROWS + 1))
    await _assert_no_position_was_written_by_a_former_owner(world)
    assert await second.terminate() == 0


async def test_a_relay_that_ends_in_order_hands_over_without_a_repetition(
    world: RelayWorld,
) -> None:
    outputs = [await world.to_file(f"p{number}") for number in range(PIPELINES)]
    first, second = await world.relay(), await world.relay()
    await _until_shared(world, [first, second], [2, 2], timeout_s=5)

    with writing(world.database.dsn, INSERT, 1, ROWS) as committed:
        await events_of(outputs[0], ROWS // 10)
        assert await first.terminate() == 0
        assert committed() < ROWS
        await _until_shared(world, [second], [4], timeout_s=2.0)

    for output in outputs:
        events = await events_of(output, ROWS)
        assert [event.id for event in events] == list(range(1, ROWS + 1))


async def test_a_relay_whose_ownership_connection_ends_starts_over_and_loses_nothing(
    world: RelayWorld,
) -> None:
    output = await world.to_file("p")
    # Not the tick but the end of the connection is what it notices.
    relay = await world.relay("relay.coordinate_interval_s=30")
    await world.until_state(relay, "p", "running")
    epoch = await world.epoch("p")

    await world.run(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name like '% lock' and datname = current_database()"
    )
    await relay.wait_for_log("the database is lost", timeout_s=1.0)

    async def is_owned_again() -> bool:
        return await world.epoch("p") == epoch + 1

    await until(is_owned_again, timeout_s=3.0)
    await world.insert(1, 10)
    assert [event.id for event in await events_of(output, 10)] == list(range(1, 11))


async def test_a_relay_cut_off_from_the_database_stops_and_another_takes_its_pipelines(
    world: RelayWorld, tcp_proxy: Proxies
) -> None:
    outputs = [await world.to_file(f"p{number}") for number in range(PIPELINES)]
    proxy = await tcp_proxy(LOOPBACK, port_of(world.database.dsn))
    near = await world.relay()
    far = await world.relay(dsn=proxy.url(world.member_dsn))
    await _until_shared(world, [near, far], [2, 2], timeout_s=5)

    with writing(world.database.dsn, INSERT, 1, ROWS):
        await events_of(outputs[0], ROWS // 10)
        await proxy.cut()
        await _until_shared(world, [near, far], [0, 4], timeout_s=3.0)
        health = await world.health(far)
        assert health.status == "degraded"
        assert "out of reach" in health.reason or "lost" in health.reason
        await proxy.restore()
        await _until_shared(world, [near, far], [2, 2], timeout_s=10)

    for output in outputs:
        events = await events_of(output, ROWS)
        assert_each_once_or_repeated_with_its_key(events, range(1, ROWS + 1))
    await _assert_no_position_was_written_by_a_former_owner(world)


async def test_a_limit_of_pipelines_leaves_the_rest_to_others(world: RelayWorld) -> None:
    for number in range(PIPELINES):
        await world.to_file(f"p{number}")
    small = await world.relay("relay.max_pipelines=1")
    await _until_shared(world, [small], [1], timeout_s=5)

    large = await world.relay()

    await _until_shared(world, [small, large], [1, 3], timeout_s=5)


async def test_what_was_taken_for_a_silent_relay_is_offered_to_it_again(world: RelayWorld) -> None:
    names = [f"p{number}" for number in range(PIPELINES)]
    for name in names:
        await world.to_file(name)
    silent = Locks(PostgresSettings(url=world.member_dsn), "default")
    await silent.open(lambda: None)

    async def is_half_taken() -> bool:
        for name in names:
            if len(silent.held) < PIPELINES / 2:
                await silent.try_acquire(name)
        return len(silent.held) == PIPELINES / 2

    async with contextlib.aclosing(silent):
        relay = await world.relay("relay.coordinate_interval_s=0.05")
        await _until_shared(world, [relay], [PIPELINES], timeout_s=BOUND_S)

        await until(is_half_taken)

        await _until_shared(world, [relay], [PIPELINES // 2], timeout_s=BOUND_S)


async def test_two_groups_deliver_everything_each(world: RelayWorld) -> None:
    await world.forward("p", {"type": "stdout"})
    await world.insert(1, 3)
    blue = await world.relay("relay.group_id=blue")
    green = await world.relay("relay.group_id=green")

    for relay in (blue, green):

        async def has_all(relay: RelayProcess = relay) -> bool:
            return len(relay.stdout) == 3

        await until(has_all)

    assert await world.value("select count(*) from pgtrickle.relay_consumer_offsets") == 2


async def test_ten_relays_that_start_at_once_own_fifty_pipelines_once_each(
    world: RelayWorld,
) -> None:
    for number in range(50):
        await world.to_file(f"p{number:02}")
    pace = "relay.coordinate_interval_s=0.5"
    began = time.monotonic()
    relays = await asyncio.gather(*(world.relay(pace, is_awaited=False) for _ in range(10)))

    async def owned() -> list[int]:
        """How many pipelines each relay holds the lock of, which is exclusive."""
        rows = await world.owner.fetch(_LOCKS_HELD)
        return [row["held"] for row in rows]

    async def are_all_owned() -> bool:
        return sum(await owned()) == 50

    async def is_shared() -> bool:
        return await owned() == [5] * 10

    await until(are_all_owned, every_s=0.1)
    owned_s = time.monotonic() - began
    await asyncio.gather(*(relay.wait_until_ready() for relay in relays))
    ready_s = time.monotonic() - began
    await until(is_shared, every_s=0.1)
    shared_s = time.monotonic() - began

    print(f"all owned {owned_s:.2f} s, all ready {ready_s:.2f} s, shared {shared_s:.2f} s")
    await _until_shared(world, list(relays), [5] * 10, timeout_s=5)
    await _assert_no_position_was_written_by_a_former_owner(world)
    # The start of ten interpreters on a shared machine is not the coordinator's.
    assert shared_s - ready_s < 10.0
