"""The NATS source against a real server: redelivery, order, confirmation and its consumer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from msgspec import structs

from relay.backends.nats import NatsSource
from relay.contracts import Batch
from relay.errors import ConfigurationError, DestinationMissing, Outage, PositionLost
from relay.message import RelayMessage
from tests.contract.evidence import (
    SERIALIZED_FIELDS,
    assert_same_message,
    complete_message,
    dedup_keys,
    numbered,
    reconnect,
)
from tests.contract.nats_broker import Broker, port_of, sink_of, source_of
from tests.contract.source_contract import AT_ONCE_S, collect, messages_of
from tests.servers.nats import NatsServer
from tests.servers.proxy import TcpProxy

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
LONG_BEFORE_REDELIVERY_S = 20


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    broker = Broker(nats_server, "consuming")
    await broker.create()
    yield broker
    await broker.drop()


async def feed(broker: Broker, messages: list[RelayMessage], **keys: str) -> None:
    sink = sink_of(broker.server.url, format=keys.get("format", "envelope"))
    await sink.connect()
    assert not (await sink.publish(messages)).failures
    await sink.aclose()


async def connected(broker: Broker, **keys: Any) -> NatsSource:
    source = source_of(broker.server.url, **keys)
    await source.connect()
    return source


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
async def test_every_field_survives_the_way_through_the_broker(
    broker: Broker, format_: str
) -> None:
    sent = complete_message()
    await feed(broker, [sent], format=format_)
    source = await connected(broker)

    (arrived,) = messages_of(await collect(source, 1))

    assert_same_message(arrived, sent, SERIALIZED_FIELDS)
    await source.aclose()


async def test_headers_with_strange_characters_survive_every_format(broker: Broker) -> None:
    headers = {
        "plain": "text",
        "Nats-Rollup": "all",
        "with space and: colon": "x",
        "emoji 🦊": "🦊\r\n☃",
        "edges": "  both  ",
        "star*": "UTF-8''%41",
        "100%": "50 %",
        "empty": "",
    }
    for number, format_ in enumerate(("envelope", "payload", "cloudevents")):
        message = RelayMessage(
            dedup_key=f"h:{number}", payload=b"{}", subject="orders.x", headers=headers
        )
        await feed(broker, [message], format=format_)
    source = await connected(broker)

    arrived = messages_of(await collect(source, 3))

    assert [dict(message.headers) for message in arrived] == [headers] * 3
    await source.aclose()


async def test_a_plain_message_is_named_by_its_message_id_else_by_its_place(
    broker: Broker,
) -> None:
    await broker.put("orders.theirs", b'{"a":1}', {"Nats-Msg-Id": "theirs-1", "X": "y"})
    await broker.put("orders.theirs", b'{"a":2}')
    source = await connected(broker)

    first, second = messages_of(await collect(source, 2))

    assert first.dedup_key == "theirs-1"
    assert first.headers == {"Nats-Msg-Id": "theirs-1", "X": "y"}
    assert first.subject == "orders.theirs"
    assert re.fullmatch(r"nats:consuming:\d{16}:2", second.dedup_key)
    await source.aclose()


@pytest.mark.parametrize(
    "lines",
    [
        b"HPUB orders.theirs 8 10\r\nNATS/1.0{}\r\n",
        b"HPUB orders.theirs 4 6\r\nXXXX{}\r\n",
        b"HPUB orders.theirs 12 14\r\nNATS/1.0 \xff\r\n{}\r\n",
        b"PUB orders.\xff 2\r\n{}\r\n",
    ],
)
async def test_bytes_that_are_no_headers_and_no_text_cost_nobody_anything(
    broker: Broker, lines: bytes
) -> None:
    await feed(broker, numbered(1))
    reader, writer = await asyncio.open_connection(*port_of(broker.server.url))
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n' + lines + b"PING\r\n")
    while await reader.readline() != b"PONG\r\n":
        continue
    writer.close()
    await feed(broker, numbered(1, start=1))
    source = await connected(broker)

    first, strange, last = messages_of(await collect(source, 3))

    assert (first.dedup_key, strange.payload, last.dedup_key) == ("m:0", b"{}", "m:1")
    await source.aclose()


async def test_places_of_a_stream_that_was_made_again_are_other_places(broker: Broker) -> None:
    keys = []
    for _ in range(2):
        await broker.create()
        await broker.put("orders.theirs", b"{}")
        source = await connected(broker)
        keys += dedup_keys(messages_of(await collect(source, 1)))
        await source.aclose()

    assert len(set(keys)) == 2


async def test_after_a_lost_connection_everything_comes_again_at_once_and_in_order(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*port_of(broker.server.url))
    await feed(broker, numbered(300))
    source = source_of(proxy.url(broker.server.url), batch_size=50)
    await source.connect()
    first = await source.poll()
    await source.acknowledge(first)
    held = await source.poll()

    await proxy.reset_connections()
    with pytest.raises(Outage):
        await source.acknowledge(held)
    await reconnect(source.connect)
    await feed(broker, numbered(20, start=300))

    settled = len(first.messages)
    again = await collect(source, 320 - settled, timeout_s=AT_ONCE_S)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(320)[settled:])
    await source.aclose()


async def test_what_a_killed_process_held_comes_at_once_and_before_what_is_new(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    await feed(broker, numbered(100))
    proxy = await tcp_proxy(*port_of(broker.server.url))
    killed = source_of(proxy.url(broker.server.url), batch_size=40)
    await killed.connect()
    await killed.poll()
    await proxy.reset_connections()
    await feed(broker, numbered(10, start=100))

    successor = await connected(broker)

    again = await collect(successor, 110, timeout_s=AT_ONCE_S)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(110))
    await killed.aclose()
    await successor.aclose()


async def test_a_batch_of_before_a_reconnect_is_not_acknowledged(broker: Broker) -> None:
    await feed(broker, numbered(5))
    source = await connected(broker)
    (old, *_) = await collect(source, 5)
    await source.connect()

    with pytest.raises(Outage):
        await source.acknowledge(old)

    assert dedup_keys(messages_of(await collect(source, 5))) == dedup_keys(numbered(5))
    await source.aclose()


async def test_rejecting_releases_in_order_what_is_waiting_too(broker: Broker) -> None:
    await feed(broker, numbered(200))
    source = await connected(broker, batch_size=20)
    batches = [await source.poll() for _ in range(3)]
    settled = len(batches[0].messages)
    await source.acknowledge(batches[0])

    for batch in batches[1:]:
        await source.reject(batch)

    again = await collect(source, 200 - settled, timeout_s=AT_ONCE_S)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(200)[settled:])
    await source.aclose()


async def test_what_waits_at_the_server_to_come_again_does_not_overtake_what_is_released(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    await feed(broker, numbered(200))
    proxy = await tcp_proxy(*port_of(broker.server.url))
    source = source_of(proxy.url(broker.server.url), batch_size=20)
    await source.connect()
    held = [await source.poll() for _ in range(4)]
    await source.reject(held[0])

    # Each time the first of them come again, and the rest is still waiting.
    (part, *_) = await collect(source, 1)
    await source.reject(part)
    (part, *_) = await collect(source, 1)
    await proxy.reset_connections()
    await reconnect(source.connect)

    assert dedup_keys(messages_of([part]))[0] == "m:0"
    again = await collect(source, 200, timeout_s=AT_ONCE_S)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(200))
    await source.aclose()


async def test_what_is_on_its_way_while_requests_end_comes_again_in_order(
    broker: Broker,
) -> None:
    count = 5000
    await feed(broker, numbered(count))
    source = await connected(broker, batch_size=500)
    for _ in range(15):
        # The next messages are asked for, and on their way, when this returns.
        (batch, *_) = await collect(source, 1)
        await source.reject(batch)

    again: list[Batch] = []
    async with asyncio.timeout(LONG_BEFORE_REDELIVERY_S):
        while len(messages_of(again)) < count:
            again.append(await source.poll())
            await source.acknowledge(again[-1])

    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(count))
    await source.aclose()


async def test_what_is_released_last_batch_first_comes_again_in_order(broker: Broker) -> None:
    await feed(broker, numbered(60))
    source = await connected(broker, batch_size=20)
    batches = [await source.poll() for _ in range(3)]
    released = sum(len(batch.messages) for batch in batches)
    assert sum(bool(batch.messages) for batch in batches) > 1

    for batch in reversed(batches):
        await source.reject(batch)
    await source.aclose()

    successor = await connected(broker, batch_size=20)
    again = await collect(successor, 60, timeout_s=AT_ONCE_S)
    assert released > 20
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(60))
    await successor.aclose()


@pytest.mark.shows("source:nats.ack_wait_seconds")
async def test_a_redelivery_of_what_is_unacknowledged_is_not_handed_out_twice(
    broker: Broker,
) -> None:
    await feed(broker, numbered(5))
    source = await connected(broker, ack_wait_seconds=1)
    batches = await collect(source, 5)

    # Nobody keeps the batch alive: the server delivers it again while it is unacknowledged.
    async with asyncio.timeout(10):
        while not (await broker.consumer()).num_redelivered:
            assert (await source.poll()).is_empty
    assert (await source.poll()).is_empty
    await feed(broker, numbered(1, start=5))
    later = await collect(source, 1)

    assert dedup_keys(messages_of(later)) == ["m:5"]
    for batch in [*batches, *later]:
        await source.acknowledge(batch)
    await source.aclose()
    successor = await connected(broker, ack_wait_seconds=1)
    assert (await successor.poll()).is_empty
    await successor.aclose()


async def test_keeping_alive_covers_what_waits_behind_a_slow_batch(broker: Broker) -> None:
    await feed(broker, numbered(60))
    source = await connected(broker, batch_size=20, ack_wait_seconds=1)
    first = await source.poll()
    async with asyncio.timeout(10):
        while ((await broker.consumer()).num_ack_pending or 0) <= len(first.messages):
            continue
    ends_at = time.monotonic() + 2.5

    while time.monotonic() < ends_at:
        await source.keep_alive(first)
        await asyncio.sleep(source.keep_alive_interval_s or 0)

    consumer = await broker.consumer()
    assert (consumer.num_ack_pending or 0) > len(first.messages)
    assert not consumer.num_redelivered
    await source.aclose()


@pytest.mark.shows("source:nats.durable_name")
async def test_an_existing_consumer_that_differs_is_named_with_the_difference(
    broker: Broker,
) -> None:
    await broker.create_consumer(
        "theirs", ack_policy="all", filter_subject="orders.x", ack_wait=5_000_000_000
    )

    with pytest.raises(ConfigurationError) as caught:
        await connected(broker, durable_name="theirs")

    text = str(caught.value)
    assert "subject orders.x, not orders.>" in text
    assert "ack policy all, not explicit" in text
    assert "ack_wait_seconds 5, not 30" in text


async def test_a_push_consumer_is_refused(broker: Broker) -> None:
    await broker.create_consumer(
        "pushed", ack_policy="explicit", filter_subject="orders.>", deliver_subject="somewhere"
    )

    with pytest.raises(ConfigurationError, match="push delivery"):
        await connected(broker, durable_name="pushed")


@pytest.mark.shows("source:nats.subject")
async def test_a_subject_that_no_stream_stores_is_said_on_connecting(broker: Broker) -> None:
    with pytest.raises(DestinationMissing, match=r"nobody\.stores\.this"):
        await connected(broker, subject="nobody.stores.this")


async def test_a_consumer_deleted_while_it_is_read_is_a_lost_position(broker: Broker) -> None:
    source = await connected(broker, durable_name="short")
    await source.poll()
    polling = asyncio.create_task(_poll_until_it_fails(source))
    await broker.drop_consumer("short")

    with pytest.raises(PositionLost, match="deliver_policy"):
        await asyncio.wait_for(polling, 10)
    await source.aclose()


@pytest.mark.parametrize(
    "policy, expected", [("all", [0, 1, 2, 3]), ("last", [2, 3]), ("new", [3])]
)
@pytest.mark.shows("source:nats.deliver_policy")
async def test_a_new_consumer_begins_where_its_policy_says(
    broker: Broker, policy: str, expected: list[int]
) -> None:
    await feed(broker, numbered(3))
    source = await connected(broker, deliver_policy=policy)
    await feed(broker, numbered(1, start=3))

    arrived = messages_of(await collect(source, len(expected)))

    assert dedup_keys(arrived) == [f"m:{number}" for number in expected]
    await source.aclose()


async def test_messages_larger_than_a_batch_are_handed_out_one_at_a_time(
    broker: Broker,
) -> None:
    bodies = [b'"%s"' % (b"%d" % number * 900_000) for number in range(4)]
    for body in bodies:
        await broker.put("orders.theirs", body)
    source = await connected(broker, batch_bytes=1000)

    batches = await collect(source, 4)

    assert [message.payload for message in messages_of(batches)] == bodies
    assert all(len(batch.messages) == 1 for batch in batches)
    await source.aclose()


async def test_messages_of_any_size_come_again_in_order(broker: Broker) -> None:
    count = 12
    for number in range(count):
        body = b'"%s"' % (b"x" * (900_000, 300_000)[number % 2])
        await broker.put("orders.theirs", body, {"Nats-Msg-Id": f"m:{number}"})
    source = await connected(broker, batch_bytes=1000)
    held = await collect(source, count // 2)
    await source.reject(held[0])

    again = await collect(source, count, timeout_s=AT_ONCE_S)

    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(count))
    await source.aclose()


async def test_a_silent_server_is_an_outage_within_seconds(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*port_of(broker.server.url))
    source = source_of(proxy.url(broker.server.url))
    await source.connect()
    await source.poll()
    proxy.stall()

    with pytest.raises(Outage):
        await asyncio.wait_for(_poll_until_it_fails(source), 15)

    assert not await source.is_healthy()
    await asyncio.wait_for(source.aclose(), 10)


@pytest.mark.speed
async def test_a_hundred_thousand_messages_are_consumed_and_confirmed_in_seconds(
    broker: Broker,
) -> None:
    count = 100_000
    await feed(broker, numbered(count, keys=1000))
    source = await connected(broker, batch_size=2000)

    started = time.perf_counter()
    arrived = 0
    pending: list[Batch] = []
    while arrived < count:
        batch = await source.poll()
        arrived += len(batch.messages)
        pending.append(batch)
        await source.acknowledge(pending.pop(0))
    took_s = time.perf_counter() - started

    print(f"source {count / took_s:,.0f}/s with every acknowledgement confirmed")
    assert arrived == count
    assert count / took_s > 10_000
    await source.aclose()


async def _poll_until_it_fails(source: NatsSource) -> None:
    while True:
        await source.poll()


async def test_what_was_held_far_apart_in_a_busy_stream_comes_before_what_is_new(
    broker: Broker, tcp_proxy: Proxies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.backends.nats.source._WIDEST_RECLAIM", 100)
    await feed(broker, numbered(1))
    others = [structs.replace(one, subject="orders.update") for one in numbered(200, prefix="o")]
    await feed(broker, others)
    await feed(broker, numbered(1, start=1))
    keys: dict[str, Any] = {"subject": "orders.insert", "ack_wait_seconds": 1}
    proxy = await tcp_proxy(*port_of(broker.server.url))
    killed = source_of(proxy.url(broker.server.url), **keys)
    await killed.connect()
    assert dedup_keys(messages_of(await collect(killed, 2))) == ["m:0", "m:1"]
    await proxy.reset_connections()
    await feed(broker, numbered(1, start=2))

    successor = await connected(broker, **keys)
    first = await successor.poll()

    again = await collect(successor, 3)
    assert first.is_empty
    assert not first.is_end_of_backlog
    assert dedup_keys(messages_of(again)) == ["m:0", "m:1", "m:2"]
    await killed.aclose()
    await successor.aclose()
