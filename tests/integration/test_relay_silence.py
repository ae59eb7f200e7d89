"""A database that neither answers nor ends its connections."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import pytest

from relay import postgres
from relay.catalog import Catalog, PipelineRow
from relay.events import Direction, Event, LagObserved
from relay.housekeeping import Housekeeping
from relay.settings import PostgresSettings
from tests.integration.relay_surroundings import (
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
from tests.servers.proxy import TcpProxy

ROWS = 2_000
_DIRECTIONS: dict[str, Direction] = {"out": "forward", "in": "reverse"}

Proxies = Callable[[str, int], Awaitable[TcpProxy]]


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


async def test_a_silent_database_stops_the_workers_and_they_go_on_when_it_speaks_again(
    world: RelayWorld, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(LOOPBACK, port_of(world.database.dsn))
    output = await world.to_file("p", batch_size=10)
    relay = await world.relay(dsn=proxy.url(world.member_dsn))
    await world.insert(1, ROWS // 2)
    await events_of(output, 50)

    proxy.stall()
    await relay.wait_for_log("the database is lost", timeout_s=3.0)
    held = len(events_in(output))
    await world.insert(ROWS // 2 + 1, ROWS)
    assert len(events_in(output)) == held
    await proxy.restore()

    events = await events_of(output, ROWS)
    assert_each_once_or_repeated_with_its_key(events, range(1, ROWS + 1))
    assert await relay.terminate() == 0


async def test_a_relay_ends_in_time_while_its_database_is_silent(
    world: RelayWorld, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(LOOPBACK, port_of(world.database.dsn))
    output = await world.to_file("p", batch_size=10)
    relay = await world.relay("relay.shutdown_timeout_s=2", dsn=proxy.url(world.member_dsn))
    await world.insert(1, 100)
    await events_of(output, 100)
    proxy.stall()

    began = time.monotonic()
    code = await relay.terminate()

    assert code == 1, relay.output
    assert time.monotonic() - began < 8.0
    await proxy.restore()
    successor = await world.relay()
    await world.insert(101, 102)
    events = await events_of(output, 102)
    assert_each_once_or_repeated_with_its_key(events, range(1, 103))
    assert await successor.terminate() == 0


async def test_a_write_that_hangs_does_not_outlive_the_ownership_of_its_pipeline(
    world: RelayWorld, tcp_proxy: Proxies, nats_server: NatsServer
) -> None:
    proxy = await tcp_proxy(LOOPBACK, port_of(world.database.dsn))
    async with nats_world(nats_server, "silence") as stream:
        await world.reverse("in", stream.source(), "arrived")
        relay = await world.relay("postgres.connect_timeout_s=1", dsn=proxy.url(world.member_dsn))
        await world.until_state(relay, "in", "running")
        proxy.stall()
        await stream.publish(1, 100)

        await relay.wait_for_log("the database is lost", timeout_s=3.0)
        await relay.wait_for_log("gave up in", timeout_s=10.0)
        await proxy.restore()

        async def has_all() -> bool:
            return len(await world.inbox_keys("arrived")) == 100

        await until(has_all)
        assert await relay.terminate() == 0


async def test_an_outage_is_said_once_by_each_chore_and_then_that_it_is_over(
    world: RelayWorld, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(LOOPBACK, port_of(world.database.dsn))
    relay = await world.relay(dsn=proxy.url(world.member_dsn))
    await proxy.cut()
    await relay.wait_for_log("housekeeping failed.*reporting to the fleet")
    await relay.wait_for_log("housekeeping failed.*reading the pipelines")

    async def are_more_turns_over() -> bool:
        # Five reports a second are due.
        return time.monotonic() - began > 1.0

    began = time.monotonic()
    await until(are_more_turns_over)
    await proxy.restore()
    await relay.wait_for_log("housekeeping works again")

    told = [line.partition("failed")[2] for line in relay.stderr if "housekeeping failed" in line]
    assert len(told) == len(set(told)) <= 5


def chores(
    database: postgres.Database, rows: Mapping[str, PipelineRow], emit: Callable[[Event], None]
) -> Housekeeping:
    async def nobody(_: Sequence[str]) -> Sequence[str]:
        return ()

    return Housekeeping(
        catalog=Catalog(database, "default"),
        worker_id="w",
        owned=lambda: rows,
        unowned=nobody,
        report=lambda: b"{}",
        emit=emit,
    )


async def test_of_a_pipeline_without_a_position_no_lag_is_told(world: RelayWorld) -> None:
    events: list[Event] = []
    database = postgres.Database(PostgresSettings(url=world.database.dsn))
    await database.open()
    rows = {
        name: PipelineRow(name=name, direction=direction, enabled=True, config={})
        for name, direction in _DIRECTIONS.items()
    }
    housekeeping = chores(database, rows, events.append)

    await housekeeping.observe_lag()

    assert [event.pipeline for event in events if isinstance(event, LagObserved)] == ["in"]
    await database.aclose()


async def test_backfills_and_seeks_are_logged_while_they_go_on_and_when_they_end(
    world: RelayWorld, caplog: pytest.LogCaptureFixture
) -> None:
    database = postgres.Database(PostgresSettings(url=world.database.dsn))
    await database.open()
    config = {"source": {"outbox_table": "outbox_orders"}}
    rows = {"out": PipelineRow(name="out", direction="forward", enabled=True, config=config)}
    housekeeping = chores(database, rows, lambda _: None)
    caplog.set_level("INFO", "relay.housekeeping")

    await housekeeping.log_progress()
    assert caplog.messages == []
    await world.run("call pgtrickle.backfill('orders')")
    await housekeeping.log_progress()
    await housekeeping.log_progress()
    assert caplog.messages == ["backfill of orders to all: finished, 0 rows sent"]
    await world.run(
        "update pgtrickle.relay_backfills set finished_at = null,"
        " updated_at = now() - '1 min'::interval, progressed_at = now() - '1 min'::interval"
    )
    await housekeeping.log_progress()
    await housekeeping.log_progress()
    assert len(caplog.messages) == 2
    assert "all: interrupted, 0 rows sent, no progress for 6" in caplog.messages[1]
    assert caplog.records[-1].levelname == "WARNING"

    await world.insert(1, 3)
    await world.to_file("out")
    await world.run("select pgtrickle.relay_seek('out', 2)")
    await housekeeping.log_progress()
    await housekeeping.log_progress()
    await world.run("select pgtrickle.relay_seek('out', 'latest')")
    await housekeeping.log_progress()
    assert len(caplog.messages) == 4
    assert "relay_seek of out to 2 by postgres at 2" in caplog.messages[2]
    assert caplog.messages[2].endswith(": behind id 1, at id 1 of 3")
    assert "relay_seek of out to latest by postgres at 2" in caplog.messages[3]
    assert caplog.messages[3].endswith(": behind id 3")
    await database.aclose()
