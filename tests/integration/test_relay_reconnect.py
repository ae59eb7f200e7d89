"""Servers that stop, crash and come back, and connections that break, in the middle of the flow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.relay_surroundings import (
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
    writing,
)
from tests.servers.finding import LOOPBACK
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess
from tests.servers.proxy import TcpProxy

ROWS = 6_000
INSERT = "insert into orders (id) values (%s) on conflict do nothing"

Proxies = Callable[[str, int], Awaitable[TcpProxy]]


@dataclass
class Flow:
    """orders → JetStream → inbox, and orders → file beside it, in one relay."""

    world: RelayWorld
    stream: NatsWorld
    relay: RelayProcess
    file: Path
    postgres: TcpProxy
    nats: TcpProxy

    async def until_inbox_holds(self, count: int) -> None:
        async def found() -> bool:
            held = await self.world.value("select count(*) from pgtrickle.arrived")
            return int(str(held)) >= count

        await until(found)

    async def assert_nothing_is_lost(self) -> None:
        """All rows are in the file, once in the stream, once in the inbox; the relay is well."""
        await self.until_inbox_holds(ROWS)
        events = await events_of(self.file, ROWS)
        assert_each_once_or_repeated_with_its_key(events, range(1, ROWS + 1))
        streamed = await self.stream.events()
        assert [event.id for event in streamed] == list(range(1, ROWS + 1))
        assert await self.world.inbox_keys("arrived") == sorted(
            event.dedup_key for event in streamed
        )

        async def is_well() -> bool:
            return (await self.world.health(self.relay)).status == "healthy"

        await until(is_well)
        assert await self.relay.terminate() == 0, self.relay.output


@pytest.fixture
async def flow(
    migrated_database: Database,
    nats_server: NatsServer,
    tmp_path: Path,
    relay_process: StartProcess,
    tcp_proxy: Proxies,
) -> AsyncIterator[Flow]:
    async with (
        relay_world(migrated_database, tmp_path, relay_process) as world,
        nats_world(nats_server, "reconnect") as stream,
    ):
        postgres = await tcp_proxy(LOOPBACK, port_of(migrated_database.dsn))
        nats = await tcp_proxy(LOOPBACK, port_of(nats_server.url))
        url = nats.url(nats_server.url)
        await world.make_orders()
        await world.forward("out", stream.sink(url))
        await world.reverse("in", stream.source(url), "arrived")
        file = await world.to_file("beside")
        # The proxies share their loop with the test: an answer may come late.
        patient = "postgres.heartbeat_timeout_s=10"
        relay = await world.relay(patient, dsn=postgres.url(world.member_dsn))
        yield Flow(world, stream, relay, file, postgres, nats)


async def test_a_restart_of_nats_loses_nothing_and_disturbs_only_what_uses_it(
    flow: Flow, nats_server: NatsServer
) -> None:
    with writing(flow.world.database.dsn, INSERT, 1, ROWS) as committed:
        await flow.stream.until_holding(ROWS // 10)
        undisturbed = await flow.world.epoch("beside")
        await asyncio.to_thread(nats_server.stop)
        before = committed()
        await events_of(flow.file, before + 200)
        await asyncio.to_thread(nats_server.start)

    await flow.assert_nothing_is_lost()
    assert await flow.world.epoch("beside") == undisturbed


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_restart_of_postgresql_loses_nothing(flow: Flow, end: str) -> None:
    server = flow.world.database.server
    with writing(flow.world.database.dsn, INSERT, 1, ROWS):
        await flow.until_inbox_holds(ROWS // 10)
        await asyncio.to_thread(getattr(server, end))
        await flow.relay.wait_for_log("the database is lost")
        await asyncio.to_thread(server.start)
        await flow.world.reconnect()

    await flow.assert_nothing_is_lost()


async def test_connections_that_break_again_and_again_lose_nothing(flow: Flow) -> None:
    with writing(flow.world.database.dsn, INSERT, 1, ROWS) as committed:
        for share in (0.1, 0.4, 0.7):
            await flow.until_inbox_holds(int(ROWS * share))
            await flow.nats.reset_connections()
            await events_of(flow.file, min(ROWS, committed() + 50))
            await flow.postgres.reset_connections()

    await flow.assert_nothing_is_lost()


async def test_a_network_that_is_away_for_a_while_loses_nothing(flow: Flow) -> None:
    with writing(flow.world.database.dsn, INSERT, 1, ROWS):
        await flow.until_inbox_holds(ROWS // 10)
        flow.nats.cut_after(20_000, "to_server")
        await flow.nats.wait_until_cut()
        flow.postgres.cut_after(20_000, "to_client")
        await flow.postgres.wait_until_cut()
        await flow.relay.wait_for_log("the database is lost")
        written = len(events_in(flow.file))
        await flow.nats.restore()
        await flow.postgres.restore()
        await events_of(flow.file, min(ROWS, written + 1))

    await flow.assert_nothing_is_lost()
