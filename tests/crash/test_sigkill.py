"""The relay is killed at each boundary of a batch: nothing is lost, repeats carry the same key.

A boundary is held from outside: a lock in the database keeps a statement waiting, a proxy that
stalls keeps an answer away. When the relay is seen to stand there, it gets SIGKILL.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import msgspec
import pytest

from tests.integration.relay_surroundings import (
    Event,
    NatsWorld,
    RelayWorld,
    StartProcess,
    assert_each_once_or_repeated_with_its_key,
    events_in,
    events_of,
    nats_world,
    port_of,
    relay_world,
    until,
)
from tests.servers.finding import LOOPBACK
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess
from tests.servers.proxy import TcpProxy

ROWS = 50
IDS = range(1, ROWS + 1)
OFFSETS = "pgtrickle.relay_consumer_offsets"
DEAD_LETTERS = "pgtrickle.relay_dlq"

Proxies = Callable[[str, int], Awaitable[TcpProxy]]


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


@pytest.fixture
async def stream(nats_server: NatsServer) -> AsyncIterator[NatsWorld]:
    async with nats_world(nats_server, "crash") as stream:
        yield stream


@contextlib.asynccontextmanager
async def _locked(world: RelayWorld, table: str) -> AsyncIterator[None]:
    """Nobody writes this table while the block lasts."""
    holder = await asyncpg.connect(world.database.dsn)
    try:
        async with holder.transaction():
            await holder.execute(f"lock table {table} in exclusive mode")
            yield
    finally:
        holder.terminate()


async def _until_waiting_for(world: RelayWorld, doing: str) -> None:
    """Wait until a statement of the relay that contains this text waits for a lock."""

    async def is_waiting() -> bool:
        found = await world.value(
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
            " and datname = current_database() and position($1 in query) > 0",
            doing,
        )
        return bool(found)

    await until(is_waiting)


async def _until_position(world: RelayWorld, position: int) -> None:
    async def is_there() -> bool:
        found = await world.value(f"select max(last_change_id) from {OFFSETS}")
        return found is not None and int(str(found)) >= position

    await until(is_there)


async def _write_in_one_transaction(world: RelayWorld) -> None:
    async with world.owner.transaction():
        await world.insert(1, ROWS)


async def _running(world: RelayWorld, pipeline: str = "p", dsn: str | None = None) -> RelayProcess:
    relay = await world.relay(dsn=dsn)
    await world.until_state(relay, pipeline, "running")
    return relay


def _assert_once_and_in_order(events: list[Event]) -> None:
    assert [event.id for event in events] == list(IDS)


class TestForwardToAFile:
    """The file can't recognise a repetition: it may hold one, with the same key."""

    async def test_a_kill_before_the_publish(self, world: RelayWorld) -> None:
        output = await world.to_file("p")
        relay = await _running(world)
        # A row that does not decode goes to the dead letters before its batch is published.
        async with _locked(world, DEAD_LETTERS):
            async with world.owner.transaction():
                await world.run(_UNDECODABLE)
                await world.insert(1, ROWS)
            await _until_waiting_for(world, "relay_dead_letter")
            await relay.kill()
            assert events_in(output) == []

        await _running(world)

        _assert_once_and_in_order(await events_of(output, ROWS))
        assert await world.value(f"select count(*) from {DEAD_LETTERS}") == 1

    async def test_a_kill_between_publish_and_acknowledgement(self, world: RelayWorld) -> None:
        output = await world.to_file("p")
        relay = await _running(world)
        async with _locked(world, OFFSETS):
            await _write_in_one_transaction(world)
            await _until_waiting_for(world, "relay_commit")
            await relay.kill()
        _assert_once_and_in_order(events_in(output))

        await _running(world)
        await world.insert(ROWS + 1, ROWS + 1)

        events = await events_of(output, ROWS + 1)
        assert_each_once_or_repeated_with_its_key(events, range(1, ROWS + 2))

    async def test_a_kill_after_the_acknowledgement(self, world: RelayWorld) -> None:
        output = await world.to_file("p")
        relay = await _running(world)
        await _write_in_one_transaction(world)
        await _until_position(world, ROWS)
        await relay.kill()

        await _running(world)
        await world.insert(ROWS + 1, ROWS + 1)

        events = await events_of(output, ROWS + 1)
        assert [event.id for event in events] == list(range(1, ROWS + 2))

    async def test_a_kill_in_the_middle_of_a_claim_check(
        self, world: RelayWorld, tcp_proxy: Proxies
    ) -> None:
        rows = 5_000
        proxy = await tcp_proxy(LOOPBACK, port_of(world.database.dsn))
        output = await world.to_file("p", batch_size=200)
        relay = await _running(world, dsn=proxy.url(world.member_dsn))
        proxy.cut_after(400_000, "to_client")
        await world.run(
            "insert into orders (id, note) select n, repeat('x', 200)"
            " from generate_series(1, $1::int) n",
            rows,
        )
        await proxy.wait_until_cut()
        await relay.kill()
        before = len(events_in(output))
        assert 0 < before < rows

        await _running(world)

        events = await events_of(output, rows)
        assert_each_once_or_repeated_with_its_key(events, range(1, rows + 1))


class TestForwardToJetStream:
    """The stream knows what it has: it holds each event once."""

    async def test_a_kill_before_the_publish(
        self, world: RelayWorld, stream: NatsWorld, tcp_proxy: Proxies
    ) -> None:
        proxy = await tcp_proxy(LOOPBACK, port_of(stream.server.url))
        await world.forward("p", stream.sink(proxy.url(stream.server.url)))
        relay = await _running(world)
        proxy.stall()
        await _write_in_one_transaction(world)
        await _until_in_flight(world, relay)
        await relay.kill()
        assert await stream.count() == 0
        await proxy.reset_connections()
        await proxy.restore()

        await _running(world)

        await stream.until_holding(ROWS)
        _assert_once_and_in_order(await stream.events())

    async def test_a_kill_between_publish_and_acknowledgement(
        self, world: RelayWorld, stream: NatsWorld
    ) -> None:
        await world.forward("p", stream.sink())
        relay = await _running(world)
        async with _locked(world, OFFSETS):
            await _write_in_one_transaction(world)
            await _until_waiting_for(world, "relay_commit")
            await relay.kill()
        assert await stream.count() == ROWS

        await _running(world)
        await world.insert(ROWS + 1, ROWS + 1)

        await stream.until_holding(ROWS + 1)
        assert [event.id for event in await stream.events()] == list(range(1, ROWS + 2))

    async def test_a_kill_during_a_dead_letter_write(
        self, world: RelayWorld, nats_server_with: Callable[..., NatsServer]
    ) -> None:
        server = nats_server_with("max_payload: 65536")
        async with nats_world(server, "small") as stream:
            await world.forward("p", stream.sink())
            relay = await _running(world)
            async with _locked(world, DEAD_LETTERS):
                async with world.owner.transaction():
                    await world.insert(1, 20)
                    await world.run("insert into orders values (21, 0, repeat('x', 100000))")
                    await world.insert(22, ROWS)
                await _until_waiting_for(world, "relay_dead_letter")
                await relay.kill()

            await _running(world)

            await _until_position(world, ROWS)
            assert [event.id for event in await stream.events()] == [
                id_ for id_ in IDS if id_ != 21
            ]
            letters = await world.owner.fetch(
                "select metadata ->> 'outbox_id' as outbox_id, error"
                " from pgtrickle.relay_dlq_list()"
            )
            assert [letter["outbox_id"] for letter in letters] == ["21"]
            assert "max_payload" in letters[0]["error"]


class TestReverseFromJetStream:
    """The inbox knows what it has: it holds each message once."""

    async def test_a_kill_before_the_inbox_has_committed(
        self, world: RelayWorld, stream: NatsWorld
    ) -> None:
        await world.reverse("p", stream.source(ack_wait_seconds=2), "arrived")
        relay = await _running(world)
        async with _locked(world, "pgtrickle.arrived"):
            await stream.publish(1, ROWS)
            await _until_waiting_for(world, "arrived")
            await relay.kill()

        await _running(world)

        await _assert_inbox_holds_each_once(world)

    async def test_a_kill_between_the_inbox_and_the_acknowledgement(
        self, world: RelayWorld, stream: NatsWorld, tcp_proxy: Proxies
    ) -> None:
        proxy = await tcp_proxy(LOOPBACK, port_of(stream.server.url))
        source = stream.source(proxy.url(stream.server.url), ack_wait_seconds=2)
        await world.reverse("p", source, "arrived")
        relay = await _running(world)
        async with _locked(world, "pgtrickle.arrived"):
            await stream.publish(1, ROWS)
            await _until_waiting_for(world, "arrived")
            proxy.stall()
        await _until_inbox_holds(world, 1)
        await relay.kill()
        info = await stream.client.jetstream().consumer_info(stream.stream, "p")
        assert info.ack_floor is not None
        assert info.ack_floor.stream_seq == 0
        await proxy.reset_connections()
        await proxy.restore()

        await _running(world)

        await _assert_inbox_holds_each_once(world)
        await _until_all_acknowledged(stream)

    async def test_a_kill_after_the_acknowledgement(
        self, world: RelayWorld, stream: NatsWorld
    ) -> None:
        await world.reverse("p", stream.source(ack_wait_seconds=2), "arrived")
        relay = await _running(world)
        await stream.publish(1, ROWS - 1)
        await _until_inbox_holds(world, ROWS - 1)
        await _until_all_acknowledged(stream)
        await relay.kill()

        await _running(world)
        await stream.publish(ROWS, ROWS)

        await _assert_inbox_holds_each_once(world)

    async def test_a_kill_during_a_dead_letter_write(
        self, world: RelayWorld, stream: NatsWorld
    ) -> None:
        await world.reverse("p", stream.source(ack_wait_seconds=2), "arrived")
        relay = await _running(world)
        async with _locked(world, DEAD_LETTERS):
            await stream.publish(1, 20)
            await stream.client.jetstream().publish(
                f"{stream.subject}in",
                rb'{"id": 0, "note": "a\u0000b"}',
                headers={"Nats-Msg-Id": "m0"},
            )
            await stream.publish(21, ROWS)
            await _until_waiting_for(world, "relay_dead_letter")
            await relay.kill()

        await _running(world)

        await _assert_inbox_holds_each_once(world)
        await _until_all_acknowledged(stream)
        letters = await world.owner.fetch("select dedup_key from pgtrickle.relay_dlq_list()")
        assert [letter["dedup_key"] for letter in letters] == ["m0"]


_UNDECODABLE = """
insert into pgtrickle.outbox_orders (pgt_id, inserted_count, deleted_count, is_claim_check, payload)
values (gen_random_uuid(), 1, 0, false, '{"v": 9}')
"""


class _InFlight(msgspec.Struct):
    in_flight: int


class _Status(msgspec.Struct):
    pipelines: list[_InFlight]


async def _until_in_flight(world: RelayWorld, relay: RelayProcess) -> None:
    async def is_in_flight() -> bool:
        status = msgspec.json.decode(await world.page(relay, "/status"), type=_Status)
        return any(pipeline.in_flight for pipeline in status.pipelines)

    await until(is_in_flight)


async def _until_inbox_holds(world: RelayWorld, count: int) -> None:
    async def is_there() -> bool:
        return len(await world.inbox_keys("arrived")) >= count

    await until(is_there)


async def _assert_inbox_holds_each_once(world: RelayWorld) -> None:
    await _until_inbox_holds(world, ROWS)
    assert await world.inbox_keys("arrived") == sorted(f"m{id_}" for id_ in IDS)


async def _until_all_acknowledged(stream: NatsWorld) -> None:
    async def is_acknowledged() -> bool:
        info = await stream.client.jetstream().consumer_info(stream.stream, "p")
        return (info.num_pending, info.num_ack_pending) == (0, 0)

    await until(is_acknowledged)
