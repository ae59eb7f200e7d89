"""Pipelines of a consumer group: every relay runs them, and each row goes to one worker."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import asyncpg
import msgspec
import pytest

from tests.integration.relay_surroundings import (
    NatsWorld,
    RelayWorld,
    StartProcess,
    as_json,
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

Proxies = Callable[[str, int], Awaitable[TcpProxy]]

PIPELINE = "p"
GROUP = "sharers"


class _Pipeline(msgspec.Struct):
    published: int


class _Status(msgspec.Struct):
    pipelines: list[_Pipeline]


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


@pytest.fixture
async def stream(nats_server: NatsServer) -> AsyncIterator[NatsWorld]:
    async with nats_world(nats_server, "shared") as stream:
        yield stream


@pytest.fixture
async def proxy(stream: NatsWorld, tcp_proxy: Proxies) -> TcpProxy:
    """In front of the stream's server."""
    return await tcp_proxy(LOOPBACK, port_of(stream.server.url))


def url_of(proxy: TcpProxy, stream: NatsWorld) -> str:
    return proxy.url(stream.server.url)


async def share(world: RelayWorld, stream: NatsWorld, **keys: object) -> None:
    await world.run(
        "select pgtrickle.set_relay_outbox($1, $2::text::jsonb)",
        PIPELINE,
        as_json(
            {
                "source": {"outbox": "orders", "consumer_group": GROUP},
                "sink": stream.sink(),
                "batch_size": 50,
                **keys,
            }
        ),
    )


async def until_settled(world: RelayWorld) -> None:
    async def is_settled() -> bool:
        return bool(
            await world.value(
                "select lag_rows = 0 from pgtrickle.relay_lag('default', array[$1])", PIPELINE
            )
        )

    await until(is_settled)


async def consumers(world: RelayWorld) -> Sequence[str]:
    rows = await world.owner.fetch("select consumer_id from pgtrickle.consumer_lag($1)", GROUP)
    return [row["consumer_id"] for row in rows]


async def until_leased(world: RelayWorld, rows: int) -> None:
    async def are_leased() -> bool:
        return (
            await world.value("select sum(leased_rows) from pgtrickle.consumer_lag($1)", GROUP)
            == rows
        )

    await until(are_leased)


async def until_forgotten(world: RelayWorld, group_id: str) -> None:
    """A relay that has just ended may be counted as alive for a moment."""

    async def is_forgotten() -> bool:
        try:
            await world.run("select pgtrickle.relay_forget_group($1)", group_id)
        except asyncpg.PostgresError:
            return False
        return True

    await until(is_forgotten)


async def published(world: RelayWorld, relay: RelayProcess) -> int:
    """How many messages this relay has published."""
    status = msgspec.json.decode(await world.page(relay, "/status"), type=_Status)
    return sum(pipeline.published for pipeline in status.pipelines)


async def write(world: RelayWorld, first: int, last: int) -> None:
    """A row of the outbox for each id, in one transaction."""
    async with world.owner.transaction():
        await world.insert(first, last)


@pytest.mark.shows("source:outbox.consumer_group")
async def test_two_relays_share_the_rows_and_each_row_goes_out_once(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await share(world, stream)
    one = await world.relay("relay.worker_id=one")
    two = await world.relay("relay.worker_id=two")
    for relay in (one, two):
        await world.until_state(relay, PIPELINE, "running")

    await write(world, 1, 2_000)
    await until_settled(world)

    ids = Counter(event.id for event in await stream.events())
    assert ids == dict.fromkeys(range(1, 2_001), 1)
    shares = [await published(world, relay) for relay in (one, two)]
    assert sum(shares) == 2_000
    assert min(shares) >= 500
    assert await consumers(world) == ["one/1", "two/1"]


@pytest.mark.shows(
    "pipeline:parallelism", "metric:worker_messages_published_total", "metric:worker_healthy"
)
async def test_every_relay_has_as_many_workers_as_the_pipeline_says(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await share(world, stream, parallelism=3)
    relay = await world.relay("relay.worker_id=one")

    async def are_three() -> bool:
        return await consumers(world) == ["one/1", "one/2", "one/3"]

    await until(are_three)
    await write(world, 1, 1_000)
    await until_settled(world)
    assert await stream.count() == await published(world, relay) == 1_000
    metrics = await world.page(relay, "/metrics")
    by_worker = re.findall(r"worker_messages_published_total{.*worker=.(\d).} (.+)", metrics)
    assert [number for number, _ in by_worker] == ["1", "2", "3"]
    assert sum(float(messages) for _, messages in by_worker) == 1_000
    assert re.findall(r"worker_healthy{.*} (.+)", metrics) == ["1.0", "1.0", "1.0"]

    await share(world, stream, parallelism=1)

    async def is_one() -> bool:
        return await consumers(world) == ["one/1"]

    await until(is_one)


@pytest.mark.shows("pipeline:visibility_seconds")
async def test_what_a_killed_relay_had_is_another_s_when_its_lease_has_run_out(
    world: RelayWorld, stream: NatsWorld, proxy: TcpProxy
) -> None:
    await share(world, stream, visibility_seconds=2, sink=stream.sink(url_of(proxy, stream)))
    one = await world.relay("relay.worker_id=one")
    two = await world.relay("relay.worker_id=two")
    for relay in (one, two):
        await world.until_state(relay, PIPELINE, "running")
    proxy.stall()
    await write(world, 1, 200)
    await until_leased(world, 200)

    await one.kill()
    killed_at = time.monotonic()
    await proxy.restore()
    await until_settled(world)

    assert time.monotonic() - killed_at < 2 + 2
    assert {event.id for event in await stream.events()} == set(range(1, 201))
    assert await published(world, two) == 200


async def test_a_relay_that_stops_releases_what_it_has_leased(
    world: RelayWorld, stream: NatsWorld, proxy: TcpProxy
) -> None:
    await share(world, stream, visibility_seconds=600, sink=stream.sink(url_of(proxy, stream)))
    one = await world.relay("relay.worker_id=one", "relay.shutdown_timeout_s=1")
    await world.until_state(one, PIPELINE, "running")
    proxy.stall()
    await write(world, 1, 100)
    await until_leased(world, 100)

    await one.terminate()
    await proxy.restore()

    assert await consumers(world) == []
    await world.relay("relay.worker_id=two")
    await stream.until_holding(100)
    await until_settled(world)


@pytest.mark.shows("metric:leases_lost_total")
async def test_a_relay_that_was_stopped_for_longer_than_its_lease_goes_on_with_other_rows(
    world: RelayWorld, stream: NatsWorld, proxy: TcpProxy
) -> None:
    await share(world, stream, visibility_seconds=1, sink=stream.sink(url_of(proxy, stream)))
    one = await world.relay("relay.worker_id=one")
    await world.until_state(one, PIPELINE, "running")
    proxy.stall()
    await write(world, 1, 50)
    await until_leased(world, 50)
    one.send_signal(signal.SIGSTOP)
    await proxy.restore()
    two = await world.relay("relay.worker_id=two")
    await until_settled(world)
    assert await published(world, two) == 50

    one.send_signal(signal.SIGCONT)

    await one.wait_for_log("a lease ran out")
    await write(world, 51, 200)
    await until_settled(world)
    lost = re.search(r"leases_lost_total{.*} (\d)", await world.page(one, "/metrics"))
    assert lost is not None
    assert float(lost[1]) >= 1
    health = await world.health(one)
    assert health.pipelines[PIPELINE].healthy, health
    assert {event.id for event in await stream.events()} == set(range(1, 201))


async def test_a_claim_check_is_leased_like_any_row_and_settled_behind_its_last_page(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await share(world, stream, visibility_seconds=2, batch_size=200)
    await world.relay("relay.worker_id=one")
    await world.relay("relay.worker_id=two")
    await world.insert(1, 5)
    await world.run("insert into orders select n from generate_series(6, 5000) n")
    await world.insert(5_001, 5_010)

    await until_settled(world)

    ids = Counter(event.id for event in await stream.events())
    assert ids == dict.fromkeys(range(1, 5_011), 1)
    assert await world.value("select last_drained_at is not null from pgtrickle.pgt_outbox_config")


async def test_drain_ends_when_nobody_in_the_group_has_anything_left(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await share(world, stream, parallelism=2)
    await write(world, 1, 500)

    drain = await world.relay("drain", is_awaited=False)

    assert await drain.wait() == 0, drain.output
    assert await stream.count() == 500
    assert await consumers(world) == []


async def test_a_group_that_was_dropped_fails_its_pipeline_until_it_is_set_again(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await share(world, stream)
    relay = await world.relay("relay.worker_id=one")
    await world.until_state(relay, PIPELINE, "running")

    await world.run("select pgtrickle.drop_consumer_group($1)", GROUP)

    failed = await world.until_state(relay, PIPELINE, "failed")
    assert "does not exist" in failed.reason
    await share(world, stream)
    await world.until_state(relay, PIPELINE, "running")
    await write(world, 1, 10)
    await until_settled(world)


async def test_seeking_back_while_relays_run_delivers_everything_again(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await share(world, stream, dedup_namespace="first")
    relay = await world.relay("relay.worker_id=one")
    await write(world, 1, 100)
    await until_settled(world)

    await world.run("select pgtrickle.seek_offset($1, 'me', 0)", GROUP)

    async def is_again() -> bool:
        return await published(world, relay) == 200

    await until(is_again)
    await until_settled(world)
    assert (await world.health(relay)).pipelines[PIPELINE].healthy


async def test_a_pipeline_that_is_disabled_or_deleted_leaves_its_group_where_it_is(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await share(world, stream)
    await world.relay("relay.worker_id=one")
    await write(world, 1, 100)
    await until_settled(world)
    await world.run("select pgtrickle.disable_relay($1)", PIPELINE)

    async def has_left() -> bool:
        return await consumers(world) == []

    await until(has_left)
    await world.run("select pgtrickle.delete_relay($1)", PIPELINE)
    await write(world, 101, 200)
    await share(world, stream)
    await until_settled(world)

    assert Counter(event.id for event in await stream.events()) == dict.fromkeys(range(1, 201), 1)


async def test_another_relay_group_may_not_read_the_same_consumer_group(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await share(world, stream)
    mine = await world.relay("relay.group_id=mine")
    await world.until_state(mine, PIPELINE, "running")
    theirs = await world.relay("relay.group_id=theirs")

    failed = await world.until_state(theirs, PIPELINE, "failed")

    assert 'for relay group "mine"' in failed.reason
    await mine.terminate()
    await until_forgotten(world, "mine")
    await world.until_state(theirs, PIPELINE, "running")


async def test_a_dead_letter_is_tried_again_by_one_relay_alone(
    world: RelayWorld, stream: NatsWorld, proxy: TcpProxy
) -> None:
    await share(world, stream, sink=stream.sink(url_of(proxy, stream)))
    for relay in (await world.relay("relay.worker_id=one"), await world.relay()):
        await world.until_state(relay, PIPELINE, "running")
    await world.run(
        "select pgtrickle.relay_dead_letter('default', $1, 'forward', array_agg('k' || n),"
        " array_agg(''::text), array_agg(n::text), array_agg('insert'::text),"
        " array_agg('{}'::jsonb), array_agg(convert_to(format('{\"id\": %s}', n), 'UTF8')),"
        " array_agg('{}'::jsonb), array_agg('message'::text), array_agg('no'::text),"
        " array_agg(1)) from generate_series(1, 200) n",
        PIPELINE,
    )
    proxy.stall()

    await world.run("select pgtrickle.relay_dlq_retry_all($1)", PIPELINE)

    # A hundred each: what the one has in hand is not the other's.
    async def are_taken() -> bool:
        query = "select count(*) from pgtrickle.relay_dlq_retries where taken_until > now()"
        return await world.value(query) == 200

    await until(are_taken)
    await proxy.restore()

    async def are_gone() -> bool:
        return await world.value("select count(*) from pgtrickle.relay_dlq_list()") == 0

    await until(are_gone)
    assert await stream.count() == 200
