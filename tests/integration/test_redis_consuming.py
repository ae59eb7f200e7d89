"""The Redis source against a real server: what is pending, claimed, removed, and its group."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.asyncio import Redis

from relay.backends.redis import RedisSource
from relay.contracts import Batch
from relay.errors import DestinationMissing, NotConnected, Outage, PositionLost
from relay.message import RelayMessage
from tests.contract.evidence import (
    SERIALIZED_FIELDS,
    assert_same_message,
    complete_message,
    dedup_keys,
    first_occurrences,
    numbered,
    reconnect,
)
from tests.contract.redis_broker import Broker, sink_of, source_of
from tests.contract.source_contract import (
    AT_ONCE_S,
    assert_nothing_more,
    collect,
    collect_through_outages,
    messages_of,
)
from tests.servers.proxy import TcpProxy
from tests.servers.redis import RedisServer

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
STREAM = "consuming"


@pytest.fixture
async def broker(
    redis_server: RedisServer,
) -> AsyncIterator[Broker]:
    broker = Broker(redis_server, STREAM)
    await broker.drop()
    yield broker
    await broker.drop()


async def connected(broker: Broker, *, batch_size: int = 100, **keys: object) -> RedisSource:
    source = source_of(broker.server.url, STREAM, batch_size=batch_size, **keys)
    await source.connect()
    return source


async def poll_in_vain(source: RedisSource) -> None:
    """Poll until that fails."""
    async with asyncio.timeout(10):
        while True:
            await source.poll()


@pytest.mark.shows("source:redis.stream_key")
@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
async def test_every_field_survives_the_way_through_the_broker(
    broker: Broker, format_: str
) -> None:
    sent = complete_message()
    stream = sent.subject
    await broker.drop(stream)
    sink = sink_of(broker.server.url, STREAM, format=format_)
    await sink.connect()
    assert not (await sink.publish([sent])).failures
    await sink.aclose()
    source = source_of(broker.server.url, stream)
    await source.connect()

    (arrived,) = messages_of(await collect(source, 1))

    assert_same_message(arrived, sent, SERIALIZED_FIELDS)
    await source.aclose()
    await broker.drop(stream)


async def test_after_a_lost_connection_everything_comes_again_at_once_and_in_order(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    await broker.feed(numbered(300))
    source = source_of(proxy.url(broker.server.url), STREAM, batch_size=50)
    await source.connect()
    first = await source.poll()
    await source.acknowledge(first)
    held = await source.poll()

    await proxy.reset_connections()
    with pytest.raises(Outage):
        await source.acknowledge(held)
    await reconnect(source.connect)
    await broker.feed(numbered(20, start=300))

    settled = len(first.messages)
    again = await collect(source, 320 - settled, timeout_s=AT_ONCE_S)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(320)[settled:])
    await source.aclose()


async def test_what_a_killed_process_held_comes_at_once_and_before_what_is_new(
    broker: Broker,
) -> None:
    await broker.feed(numbered(100))
    first = await connected(broker, batch_size=40)
    await first.poll()
    await broker.cut_off()
    await broker.feed(numbered(10, start=100))

    successor = await connected(broker)

    again = await collect(successor, 110, timeout_s=AT_ONCE_S)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(110))
    await first.aclose()
    await successor.aclose()


async def test_a_batch_of_before_a_reconnect_is_not_acknowledged(broker: Broker) -> None:
    await broker.feed(numbered(5))
    source = await connected(broker)
    (old, *_) = await collect(source, 5)
    await source.connect()

    with pytest.raises(NotConnected):
        await source.acknowledge(old)

    assert dedup_keys(messages_of(await collect(source, 5))) == dedup_keys(numbered(5))
    await source.aclose()


async def test_rejecting_releases_in_order_what_is_waiting_too(broker: Broker) -> None:
    await broker.feed(numbered(200))
    source = await connected(broker, batch_size=20)
    batches = [await source.poll() for _ in range(3)]
    settled = len(batches[0].messages)
    await source.acknowledge(batches[0])

    for batch in batches[1:]:
        await source.reject(batch)

    again = await collect(source, 200 - settled, timeout_s=AT_ONCE_S)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(200)[settled:])
    await source.aclose()


async def test_acknowledging_leaves_nothing_pending(broker: Broker) -> None:
    await broker.feed(numbered(2500))
    source = await connected(broker, batch_size=2000)
    for batch in await collect(source, 2500):
        await source.acknowledge(batch)

    assert await broker.pending() == 0
    await source.aclose()


@pytest.mark.shows("source:redis.group_name")
async def test_each_group_gets_everything_and_is_by_default_the_pipelines(
    broker: Broker,
) -> None:
    await broker.feed(numbered(10))
    for keys in ({}, {"pipeline": "other"}, {"group_name": "shared"}):
        source = await connected(broker, **keys)
        arrived = messages_of(await collect(source, 10))
        assert dedup_keys(arrived) == dedup_keys(numbered(10))
        await source.aclose()

    for group in ("pipeline", "other", "shared"):
        assert await broker.pending(group) == 10


@pytest.mark.shows("source:redis.consumer_name", "source:redis.claim_idle_ms")
async def test_what_a_dead_consumer_held_is_claimed_after_its_time_and_not_before(
    broker: Broker,
) -> None:
    await broker.feed(numbered(30))
    dead = await connected(broker, consumer_name="dead")
    assert len(messages_of(await collect(dead, 30))) == 30
    await broker.cut_off()
    heir = await connected(broker, consumer_name="heir", claim_idle_ms=1000, batch_size=10)

    assert not (await heir.poll()).messages
    claimed = await collect(heir, 30)

    assert dedup_keys(messages_of(claimed)) == dedup_keys(numbered(30))
    for batch in claimed:
        await heir.acknowledge(batch)
    assert await broker.pending() == 0
    await heir.aclose()
    await dead.aclose()


async def test_what_is_kept_alive_is_not_claimed_by_another_consumer(broker: Broker) -> None:
    await broker.feed(numbered(5))
    slow = await connected(broker, consumer_name="slow", claim_idle_ms=1000)
    batches = await collect(slow, 5)
    other = await connected(broker, consumer_name="other", claim_idle_ms=1000, block_ms=200)
    interval_s = slow.keep_alive_interval_s
    assert interval_s is not None

    # Time is what is tested: the age at which they may be claimed passes twice.
    deadline = time.monotonic() + 2.2
    while time.monotonic() < deadline:
        assert not (await other.poll()).messages
        for batch in batches:
            await slow.keep_alive(batch)
    for batch in batches:
        await slow.acknowledge(batch)

    assert await broker.pending() == 0
    await slow.aclose()
    await other.aclose()


async def test_what_is_released_can_be_claimed_at_once(broker: Broker) -> None:
    await broker.feed(numbered(5))
    leaving = await connected(broker, consumer_name="leaving")
    await collect(leaving, 5)
    await leaving.aclose()

    other = await connected(broker, consumer_name="other")

    again = await collect(other, 5, timeout_s=AT_ONCE_S)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(5))
    await other.aclose()


async def test_a_pending_entry_that_was_removed_is_refused_as_one_message(
    broker: Broker,
) -> None:
    await broker.feed(numbered(5))
    first = await connected(broker)
    await collect(first, 5)
    await broker.cut_off()
    ids = [id_ for id_, _ in await broker.entries()]
    await broker.ask("XDEL", STREAM, ids[1], ids[3])

    source = await connected(broker)
    batches = await collect(source, 5)

    assert dedup_keys(messages_of(batches)) == ["m:0", "m:2", "m:4"]
    gone = [one.message.dedup_key for batch in batches for one in batch.rejected]
    position = f"redis:{STREAM}:{await broker.generation()}"
    assert gone == [f"{position}:{ids[at].decode()}" for at in (1, 3)]
    for batch in batches:
        await source.acknowledge(batch)
    assert await broker.pending() == 0
    await first.aclose()
    await source.aclose()


async def test_a_dead_consumers_entry_that_was_removed_is_refused_too(broker: Broker) -> None:
    await broker.feed(numbered(3))
    dead = await connected(broker, consumer_name="dead")
    await collect(dead, 3)
    await dead.aclose()
    await broker.ask("XTRIM", STREAM, "MAXLEN", 2)

    source = await connected(broker)
    batches = await collect(source, 3, timeout_s=AT_ONCE_S)

    assert dedup_keys(messages_of(batches)) == ["m:1", "m:2"]
    assert sum(len(batch.rejected) for batch in batches) == 1
    await source.aclose()


@pytest.mark.parametrize("is_waiting", [True, False])
async def test_a_group_that_is_deleted_is_a_lost_position_and_made_again_on_the_next_start(
    broker: Broker, *, is_waiting: bool
) -> None:
    await broker.feed(numbered(3))
    source = await connected(broker)
    for batch in await collect(source, 3):
        await source.acknowledge(batch)
    if is_waiting:
        polling = asyncio.create_task(poll_in_vain(source))
        await asyncio.sleep(0)
        await broker.drop()
    else:
        await source.poll()
        await broker.ask("XGROUP", "DESTROY", STREAM, "pipeline")
        polling = asyncio.create_task(poll_in_vain(source))

    with pytest.raises(PositionLost, match="start_id"):
        await polling

    await source.connect()
    await broker.feed(numbered(1, start=3))
    assert "m:3" in dedup_keys(messages_of(await collect(source, 1 if is_waiting else 4)))
    await source.aclose()


@pytest.mark.shows("source:redis.start_id")
async def test_a_new_group_begins_where_start_id_says(broker: Broker) -> None:
    await broker.feed(numbered(3))
    second = (await broker.entries())[1][0].decode()
    for start_id, expected in (("0", 3), (second, 1), ("$", 0)):
        source = await connected(broker, group_name=f"from {start_id}", start_id=start_id)
        await broker.feed(numbered(1, start=9, prefix=start_id))
        arrived = messages_of(await collect(source, 1))
        later = 0 if len(arrived) > expected else expected + 1 - len(arrived)
        arrived += messages_of(await collect(source, later))
        theirs = [key for key in dedup_keys(arrived) if key.startswith("m:")]
        assert theirs == dedup_keys(numbered(3)[3 - expected :])
        await source.aclose()


@pytest.mark.shows("source:redis.block_ms")
async def test_an_idle_poll_waits_as_long_as_it_is_told(broker: Broker) -> None:
    for block_ms in (50, 600):
        source = await connected(broker, block_ms=block_ms)
        await source.poll()
        started = time.monotonic()

        await source.poll()

        assert 0.8 * block_ms <= 1000 * (time.monotonic() - started) < block_ms + 400
        await source.aclose()


@pytest.mark.shows("source:redis.count")
async def test_no_batch_holds_more_entries_than_count(broker: Broker) -> None:
    await broker.feed(numbered(30))
    source = await connected(broker, count=7)

    batches = await collect(source, 30)

    assert max(len(batch.messages) for batch in batches) == 7
    assert dedup_keys(messages_of(batches)) == dedup_keys(numbered(30))
    await source.aclose()


async def test_large_entries_come_in_batches_of_bounded_size(broker: Broker) -> None:
    body = b'"%s"' % (b"x" * 50_000)
    await broker.feed([RelayMessage(dedup_key=str(number), payload=body) for number in range(64)])
    source = await connected(broker, batch_bytes=200_000)

    batches = await collect(source, 64)

    assert max(len(batch.messages) for batch in batches) <= 4
    assert dedup_keys(messages_of(batches)) == [str(number) for number in range(64)]
    await source.aclose()


@pytest.mark.shows("source:redis.payload_field")
async def test_entries_of_others_are_read_by_their_payloads_field(broker: Broker) -> None:
    await broker.put({"data": '{"a":1}', "kind": "x"})
    for keys, payload in (
        ({}, b'{"data":"{\\"a\\":1}","kind":"x"}'),
        (
            {"payload_field": "data", "group_name": "other"},
            b'{"a":1}',
        ),
    ):
        source = await connected(broker, **keys)
        (message,) = messages_of(await collect(source, 1))
        assert message.payload == payload
        await source.aclose()


async def test_a_key_that_is_no_stream_is_said_with_its_name(broker: Broker) -> None:
    await broker.ask("SET", STREAM, "text")
    source = source_of(broker.server.url, STREAM)

    with pytest.raises(DestinationMissing, match=STREAM):
        await source.connect()
    await source.aclose()


async def test_a_server_killed_while_messages_flow_loses_none(broker: Broker) -> None:
    messages = numbered(3000)
    await broker.feed(messages)
    source = await connected(broker)
    batches = await collect(source, 500)
    for batch in batches:
        await source.acknowledge(batch)

    await asyncio.to_thread(broker.server.kill)
    await asyncio.to_thread(broker.server.start)
    missing = 3000 - len(messages_of(batches))
    later: list[Batch] = []
    await collect_through_outages(source, missing, later, acknowledge=True)

    arrived = first_occurrences(messages_of([*batches, *later]))
    assert dedup_keys(arrived) == dedup_keys(messages)
    assert await broker.pending() == 0
    await source.aclose()


async def test_closing_ends_the_waiting_read_on_the_server(broker: Broker) -> None:
    source = await connected(broker)
    polling = asyncio.create_task(source.poll())
    await broker.until_somebody_waits()
    source.interrupt()
    await polling
    started = time.monotonic()

    await source.aclose()

    assert time.monotonic() - started < 0.5
    await broker.feed(numbered(1))
    assert await broker.pending() == 0


async def test_a_server_that_stops_answering_is_an_outage_and_an_interrupt_is_prompt(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    source = source_of(proxy.url(broker.server.url), STREAM, timeout_ms=500)
    await source.connect()
    await source.poll()
    proxy.stall()
    polling = asyncio.create_task(source.poll())
    await asyncio.sleep(0)
    started = time.monotonic()
    source.interrupt()
    assert not (await polling).messages
    assert time.monotonic() - started < 0.3

    with pytest.raises(Outage):
        await poll_in_vain(source)

    await proxy.restore()
    await reconnect(source.connect)
    await broker.feed(numbered(2))
    assert len(messages_of(await collect(source, 2))) == 2
    await assert_nothing_more(source)
    await source.aclose()


@pytest.mark.speed
async def test_consuming_reaches_half_of_what_the_bare_client_reaches(broker: Broker) -> None:
    count = 40_000
    await broker.ask("CONFIG", "SET", "appendfsync", "everysec")
    body = b'{"id":1,"note":"%s"}' % (b"x" * 180)
    for start in range(0, count, 5000):
        await broker.feed(
            [
                RelayMessage(dedup_key=f"o:{number}:0", key=str(number), payload=body)
                for number in range(start, start + 5000)
            ]
        )
    floor_s = await _consume_bare(broker, count)
    source = await connected(broker, batch_size=1000)

    started = time.perf_counter()
    received = 0
    while received < count:
        batch = await source.poll()
        received += len(batch.messages)
        await source.acknowledge(batch)
    took_s = time.perf_counter() - started

    await source.aclose()
    await broker.ask("CONFIG", "SET", "appendfsync", "always")
    print(f"bare {count / floor_s:,.0f}/s, source {count / took_s:,.0f}/s")
    assert took_s < 2 * floor_s


async def _consume_bare(broker: Broker, count: int) -> float:
    """Seconds for reading and acknowledging all through the client library, looking at nothing."""
    async with Redis.from_url(broker.server.url) as client:
        await client.xgroup_create(STREAM, "bare", id="0")
        started = time.perf_counter()
        received = 0
        while received < count:
            reply = await client.xreadgroup("bare", "bare", {STREAM: ">"}, count=1000)
            assert isinstance(reply, list)
            _, found = reply[0]
            assert isinstance(found, list)
            ids = [str(one[0], "ascii") for one in found if isinstance(one[0], bytes)]
            await client.xack(STREAM, "bare", *ids)
            received += len(ids)
        return time.perf_counter() - started


async def test_a_server_that_becomes_a_replica_is_an_outage_and_no_lost_position(
    redis_server_with: Callable[..., RedisServer],
) -> None:
    broker, other = (Broker(redis_server_with(""), STREAM) for _ in range(2))
    source = await connected(broker)
    await source.poll()

    polling = asyncio.create_task(poll_in_vain(source))
    await broker.until_somebody_waits()
    await broker.ask("REPLICAOF", *other.server.address)

    with pytest.raises(NotConnected):
        await polling
    await source.aclose()


async def test_what_was_trimmed_while_it_was_unacknowledged_is_refused_after_it_was_released(
    broker: Broker,
) -> None:
    first, batches = await _holding_what_was_trimmed(broker)
    for batch in batches:
        await first.reject(batch)
    await first.aclose()

    await _assert_trimmed_is_refused(broker)


async def test_what_was_trimmed_while_it_was_kept_alive_is_refused_after_a_crash(
    broker: Broker,
) -> None:
    first, batches = await _holding_what_was_trimmed(broker)
    for batch in batches:
        await first.keep_alive(batch)
    await broker.cut_off()

    await _assert_trimmed_is_refused(broker)
    await first.aclose()


async def _holding_what_was_trimmed(broker: Broker) -> tuple[RedisSource, list[Batch]]:
    """A source with five messages out, of which the first three are in the stream no more."""
    await broker.feed(numbered(5))
    source = await connected(broker)
    batches = await collect(source, 5)
    await broker.ask("XTRIM", STREAM, "MAXLEN", 2)
    return source, batches


async def _assert_trimmed_is_refused(broker: Broker) -> None:
    source = await connected(broker)
    again = await collect(source, 5, timeout_s=AT_ONCE_S)

    assert dedup_keys(messages_of(again)) == ["m:3", "m:4"]
    assert sum(len(batch.rejected) for batch in again) == 3
    await source.aclose()
