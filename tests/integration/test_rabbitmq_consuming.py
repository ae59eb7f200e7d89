"""The RabbitMQ source against a real broker: deliveries, what goes back, and keys of strangers."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

import aio_pika
import pytest
import uvloop

from relay.backends.rabbitmq import RabbitSource
from relay.backends.rabbitmq import connection as connection_module
from relay.contracts import Batch
from relay.errors import ConfigurationError, DestinationMissing, NotConnected, Outage, TimedOut
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
from tests.contract.rabbitmq_broker import Broker, sink_of, source_of
from tests.contract.source_contract import (
    assert_nothing_more,
    collect,
    messages_of,
)
from tests.servers.proxy import TcpProxy
from tests.servers.rabbitmq import RabbitServer

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
NAME = "consuming"
BOUND_S = 60


@pytest.fixture
async def broker(rabbitmq_server: RabbitServer) -> AsyncIterator[Broker]:
    broker = Broker(rabbitmq_server, NAME)
    await broker.make()
    yield broker
    await broker.drop()


async def connected(broker: Broker, *, batch_size: int = 100, **keys: object) -> RabbitSource:
    source = source_of(broker.server.url, broker.queue, batch_size=batch_size, **keys)
    await source.connect()
    return source


async def poll_in_vain(source: RabbitSource) -> None:
    """Poll until that fails."""
    async with asyncio.timeout(BOUND_S):
        while True:
            await source.poll()


@pytest.mark.shows("source:rabbitmq.queue")
@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
async def test_every_field_survives_the_way_through_the_broker(
    broker: Broker, format_: str
) -> None:
    sent = complete_message()
    headers = {**sent.headers, "CC": "other", "Pgtrickle-op": "x", "50%": "ä\n"}
    odd = RelayMessage(
        dedup_key="k" * 300, key="k" * 10_000, payload=b"{}", subject="x", headers=headers
    )
    await broker.feed([sent, odd], format_)
    source = await connected(broker)

    first, second = messages_of(await collect(source, 2))

    assert_same_message(first, sent, SERIALIZED_FIELDS)
    assert_same_message(second, odd, SERIALIZED_FIELDS)
    await source.aclose()


async def test_an_envelope_is_known_by_its_content_type_alone(broker: Broker) -> None:
    await broker.feed([complete_message()])
    (arrived,) = await broker.taken()
    await broker.put(arrived.body, content_type=arrived.content_type)
    source = await connected(broker)

    (message,) = messages_of(await collect(source, 1))

    assert_same_message(message, complete_message(), SERIALIZED_FIELDS)
    await source.aclose()


async def test_a_broken_envelope_is_refused_as_one_message(broker: Broker) -> None:
    marked = {"Pgtrickle-Format": "envelope"}
    await broker.put(b'{"v":9}', headers=marked, message_id="broken")
    await broker.feed(numbered(1))
    source = await connected(broker)

    batches = await collect(source, 2)

    assert dedup_keys(messages_of(batches)) == ["m:0"]
    assert [one.message.dedup_key for batch in batches for one in batch.rejected] == ["broken"]
    await source.aclose()


async def test_headers_that_are_nested_too_deep_cost_only_their_message(broker: Broker) -> None:
    nested = b""
    for _ in range(2000):
        nested = b"\x01aF" + len(nested).to_bytes(4, "big") + nested
    has_headers = b"\x20\x00"
    await assert_only_it_is_refused(broker, has_headers + len(nested).to_bytes(4, "big") + nested)


async def test_properties_that_are_not_utf_8_cost_only_their_message(broker: Broker) -> None:
    has_message_id = b"\x00\x80"
    await assert_only_it_is_refused(broker, has_message_id + b"\x02\xff\xfe")


async def test_a_time_that_no_clock_shows_costs_only_its_message(broker: Broker) -> None:
    has_timestamp = b"\x00\x40"
    await assert_only_it_is_refused(broker, has_timestamp + b"\x7f" + b"\xff" * 7)


async def assert_only_it_is_refused(
    broker: Broker, properties: bytes, routing_key: str = "x"
) -> None:
    await broker.feed(numbered(1))
    exchange = broker.exchange.encode()
    await broker.put_raw([(properties, b'{"a":1}')], queue=routing_key, exchange=exchange)
    await broker.feed(numbered(2)[1:])
    source = await connected(broker)

    batches = await collect_all(source, 3)

    assert dedup_keys(first_occurrences(messages_of(batches))) == ["m:0", "m:1"]
    refused = [one for batch in batches for one in batch.rejected]
    assert all("broken properties" in str(one.error) for one in refused)
    assert {one.message.payload for one in refused} == {b'{"a":1}'}
    await source.aclose()
    assert await broker.depth() == 0


async def test_a_routing_key_that_is_not_utf_8_costs_only_its_message(broker: Broker) -> None:
    await assert_only_it_is_refused(broker, b"\x00\x00", routing_key="k\xff.x")


async def collect_all(source: RabbitSource, count: int) -> list[Batch]:
    """Poll and acknowledge as the loop does, reconnecting, until so many were handed out.

    One whose acknowledgement is lost comes again, or does not where the broker has it.
    """
    batches: list[Batch] = []
    payloads: set[bytes] = set()
    async with asyncio.timeout(BOUND_S):
        while len(payloads) < count:
            try:
                batch = await source.poll()
                batches.append(batch)
                payloads |= {one.payload for one in batch.messages}
                payloads |= {one.message.payload for one in batch.rejected}
                await source.acknowledge(batch)
            except Outage:
                await reconnect(source.connect)
    return batches


async def test_a_strangers_message_has_its_id_as_key_and_its_properties_as_headers(
    broker: Broker,
) -> None:
    at = datetime(2025, 3, 30, 2, 30, 15, tzinfo=UTC)
    await broker.put(
        b'{"a":1}',
        message_id="theirs",
        timestamp=at,
        message_type="order.placed",
        app_id="shop",
        correlation_id="c",
        headers={"n": 7, "yes": True, "deep": {"x": [1, "y"]}, "t": "text"},
    )
    await broker.put(b'{"a":2}', headers={"Pgtrickle-Dedup-Key": "ours"})
    await broker.put(b'{"a":3}')
    source = await connected(broker)

    first, second, third = messages_of(await collect(source, 3))

    assert (first.dedup_key, second.dedup_key) == ("theirs", "ours")
    assert len(third.dedup_key) == 36
    assert first.created_at == at
    assert first.subject == NAME
    assert dict(first.headers) == {
        "type": "order.placed",
        "app-id": "shop",
        "correlation-id": "c",
        "n": "7",
        "yes": "true",
        "deep": '{"x":[1,"y"]}',
        "t": "text",
    }
    await source.aclose()


async def test_a_body_in_another_encoding_is_refused_with_its_name(broker: Broker) -> None:
    await broker.put(b"\x1f\x8b", content_encoding="gzip")
    source = await connected(broker)

    (batch,) = await collect(source, 1)

    assert "gzip" in str(batch.rejected[0].error)
    await source.aclose()


@pytest.mark.shows("source:rabbitmq.declare_queue")
async def test_a_queue_is_made_only_where_that_is_asked_for(broker: Broker) -> None:
    name = f"{NAME}.made"
    source = source_of(broker.server.url, name)
    looking = f"^looking for the queue '{name}' on .*set declare_queue"
    with pytest.raises(DestinationMissing, match=looking):
        await source.connect()
    making = source_of(broker.server.url, name, declare_queue=True)
    for _ in range(2):
        await making.connect()
    await making.aclose()

    await source.connect()
    await source.aclose()

    async with broker.channel() as channel:
        await channel.declare_queue(name, durable=True)
        await channel.queue_delete(name)


@pytest.mark.shows("source:rabbitmq.prefetch_count")
async def test_the_broker_sends_no_more_ahead_than_it_may(broker: Broker) -> None:
    await broker.feed(numbered(30))
    source = await connected(broker, prefetch_count=10)
    held = await collect(source, 10)

    empty = await source.poll()

    assert empty.is_empty
    assert not empty.is_end_of_backlog
    assert await broker.depth() == 20
    for batch in held:
        await source.acknowledge(batch)
    assert dedup_keys(messages_of(await collect(source, 10))) == dedup_keys(numbered(20)[10:])
    await source.aclose()


@pytest.mark.shows("source:rabbitmq.exclusive")
async def test_a_queue_has_one_consumer_unless_it_may_be_shared(broker: Broker) -> None:
    first = await connected(broker)
    second = source_of(broker.server.url, broker.queue)
    with pytest.raises(Outage, match="set exclusive to false"):
        await second.connect()
    await first.aclose()
    await second.connect()
    await second.aclose()

    sharing = [
        await connected(broker, exclusive=False, prefetch_count=5, batch_size=5) for _ in "ab"
    ]
    await broker.feed(numbered(10))
    arrived = [messages_of(await collect(source, 5)) for source in sharing]

    assert sorted(dedup_keys(arrived[0] + arrived[1])) == sorted(dedup_keys(numbered(10)))
    for source in sharing:
        await source.aclose()


async def test_batches_may_be_acknowledged_in_any_order(broker: Broker) -> None:
    await broker.feed(numbered(30))
    source = await connected(broker, batch_size=10)
    batches = await collect(source, 30)
    settled = {key for batch in batches[1:] for key in dedup_keys(batch.messages)}

    for batch in reversed(batches[1:]):
        await source.acknowledge(batch)
    await source.aclose()

    left = [key for key in dedup_keys(numbered(30)) if key not in settled]
    assert dedup_keys(await broker.restored()) == left


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_what_is_rejected_and_what_waits_behind_it_comes_again_in_order(
    broker: Broker, kind: str
) -> None:
    await broker.make({"x-queue-type": kind})
    await broker.feed(numbered(200))
    source = await connected(broker, batch_size=20)
    batches = [await source.poll() for _ in range(4)]
    await source.acknowledge(batches[0])
    settled = len(batches[0].messages)

    for batch in reversed(batches[1:]):
        await source.reject(batch)
    with pytest.raises(NotConnected):
        await source.acknowledge(batches[1])

    again = await collect(source, 200 - settled)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(200)[settled:])
    await source.aclose()


async def test_a_batch_of_before_a_reconnect_is_not_acknowledged(broker: Broker) -> None:
    await broker.feed(numbered(5))
    source = await connected(broker)
    (old, *_) = await collect(source, 5)
    await source.connect()

    with pytest.raises(NotConnected):
        await source.acknowledge(old)

    assert dedup_keys(messages_of(await collect(source, 5))) == dedup_keys(numbered(5))
    await source.aclose()


async def test_what_still_arrives_while_it_closes_is_not_handed_out_after_a_reconnect(
    broker: Broker, tcp_proxy: Proxies, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    url = proxy.url(broker.server.url)
    source = source_of(url, broker.queue, batch_size=5, timeout_ms=1000)
    await source.connect()
    await broker.feed(numbered(5))
    await collect(source, 5)
    proxy.stall()
    await broker.feed(numbered(25, start=5))
    close = connection_module.Connection.aclose

    async def let_through_and_close(connection: connection_module.Connection) -> None:
        await proxy.restore()
        await close(connection)

    # The broker is heard again when it has been given up, but is not gone yet.
    monkeypatch.setattr(connection_module.Connection, "aclose", let_through_and_close)
    await reconnect(source.connect)

    again = await collect(source, 5)
    for batch in again:
        await source.acknowledge(batch)
    await source.aclose()
    await source.connect()
    rest = await collect(source, 30 - len(messages_of(again)))
    assert dedup_keys(messages_of([*again, *rest])) == dedup_keys(numbered(30))
    await source.aclose()


async def test_after_a_lost_connection_everything_comes_again_and_in_order(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    await broker.feed(numbered(300))
    source = source_of(proxy.url(broker.server.url), broker.queue, batch_size=50)
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
    again = await collect(source, 320 - settled)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(320)[settled:])
    await source.aclose()


async def test_a_broker_killed_while_messages_flow_loses_none(broker: Broker) -> None:
    messages = numbered(3000)
    await broker.feed(messages)
    source = await connected(broker)
    batches = await collect(source, 500)
    for batch in batches:
        await source.acknowledge(batch)

    await asyncio.to_thread(broker.server.kill)
    await asyncio.to_thread(broker.server.start)
    keys = set(dedup_keys(messages_of(batches)))
    async with asyncio.timeout(2 * BOUND_S):
        while len(keys) < 3000:
            try:
                batch = await source.poll()
                batches.append(batch)
                keys.update(dedup_keys(batch.messages))
                await source.acknowledge(batch)
            except Outage:
                await _reconnected(source)

    arrived = first_occurrences(messages_of(batches))
    assert dedup_keys(arrived) == dedup_keys(messages)
    await source.aclose()
    assert await broker.depth() == 0


async def test_a_queue_that_is_deleted_is_an_outage_and_then_said_to_be_missing(
    broker: Broker,
) -> None:
    source = await connected(broker)
    polling = asyncio.create_task(poll_in_vain(source))
    await asyncio.sleep(0)
    async with broker.channel() as channel:
        await channel.queue_delete(broker.queue)

    with pytest.raises(Outage, match="the queue was deleted"):
        await polling

    with pytest.raises(DestinationMissing, match=NAME):
        await source.connect()
    await source.aclose()


async def test_a_queue_that_is_deleted_and_made_again_is_consumed_within_seconds(
    broker: Broker,
) -> None:
    await broker.feed(numbered(1))
    source = await connected(broker)
    await source.acknowledge((await collect(source, 1))[0])

    await broker.make()
    await broker.put(b'{"a":1}', message_id="later")

    async with asyncio.timeout(5):
        with pytest.raises(Outage, match="the queue was deleted"):
            await poll_in_vain(source)
        await reconnect(source.connect)
        assert dedup_keys(messages_of(await collect(source, 1))) == ["later"]
    await source.aclose()


async def test_large_messages_come_in_batches_of_bounded_size_and_wait_at_the_broker(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    body = b'"%s"' % (b"x" * 50_000)
    count = 600
    await broker.put_all([body] * count)
    source = source_of(proxy.url(broker.server.url), broker.queue, batch_bytes=200_000)
    await source.connect()
    await source.poll()
    await source.poll()
    # Time is what is tested: all could be here by now, and is not; the rest is the network's.
    await asyncio.sleep(3)
    assert proxy.bytes_forwarded["to_client"] < 20_000_000

    batches = await collect(source, count - 8)

    assert max(len(batch.messages) for batch in batches) <= 4
    for batch in batches:
        await source.acknowledge(batch)
    assert await source.is_healthy()
    await source.aclose()


async def test_a_large_document_comes_whole(broker: Broker) -> None:
    body = b'"%s"' % (b"x" * 20_000_000)
    await broker.put(body)
    source = await connected(broker)

    (message,) = messages_of(await collect(source, 1))

    assert message.payload == body
    await source.aclose()


async def test_heartbeats_keep_an_idle_connection_and_find_a_silent_broker(
    broker: Broker, tcp_proxy: Proxies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "HEARTBEAT_S", 1)
    proxy = await tcp_proxy(*broker.server.address)
    source = source_of(proxy.url(broker.server.url), broker.queue)
    await source.connect()

    # Time is what is tested: more than both sides' patience passes without a message.
    for _ in range(4):
        assert (await source.poll()).is_empty
    proxy.stall()
    with pytest.raises(TimedOut, match="no sign of life"):
        await poll_in_vain(source)

    await proxy.restore()
    await source.aclose()


async def test_a_broker_that_needs_longer_than_the_timeout_is_given_more_each_time(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    source = source_of(proxy.url(broker.server.url), broker.queue, timeout_ms=500)
    await source.connect()

    for number in range(2):
        await broker.feed(numbered(1, start=number))
        batch = (await collect(source, 1))[0]
        proxy.stall()
        with pytest.raises(TimedOut):
            await source.acknowledge(batch)
        await proxy.restore()
        await reconnect(source.connect)
    await broker.feed(numbered(1, start=2))
    batch = (await collect(source, 1))[0]
    proxy.stall()
    acknowledging = asyncio.create_task(source.acknowledge(batch))
    # Time is what is tested: more than it had the last time.
    await asyncio.sleep(1.1)
    await proxy.restore()
    await acknowledging

    await source.aclose()


async def test_a_late_answer_about_the_lag_costs_nothing(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    await broker.feed(numbered(3))
    source = source_of(proxy.url(broker.server.url), broker.queue, timeout_ms=500)
    await source.connect()
    (batch,) = await collect(source, 3)
    assert await source.lag() == 3

    proxy.stall()
    assert await source.lag() is None
    await proxy.restore()

    await source.acknowledge(batch)
    assert await source.lag() == 0
    await source.aclose()


async def test_a_batch_that_was_acknowledged_is_gone_when_that_returns(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    await broker.feed(numbered(2500))
    url = proxy.url(broker.server.url)
    source = source_of(url, broker.queue, batch_size=1000, prefetch_count=2500)
    await source.connect()
    batches: list[Batch] = []
    for batch in await collect(source, 2500):
        batches.append(batch)
        await source.acknowledge(batch)

    # As a killed process does.
    await proxy.reset_connections()
    await reconnect(source.connect)

    await assert_nothing_more(source)
    await source.aclose()


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("limits", [{}, {"x-max-length-bytes": 20_000_000, "x-max-age": "1D"}])
@pytest.mark.parametrize("is_stored_before", [True, False])
async def test_a_stream_is_refused_with_what_helps(
    broker: Broker, limits: dict[str, object], *, exclusive: bool, is_stored_before: bool
) -> None:
    name = f"{NAME}.stream"
    arguments = {"x-queue-type": "stream", **limits}
    async with broker.channel() as channel:
        await channel.declare_queue(name, durable=True, arguments=arguments)  # type: ignore[arg-type]  # texts and numbers
    try:
        source = source_of(broker.server.url, name, exclusive=exclusive)
        if is_stored_before:
            await broker.put(b"{}", queue=name)
            async with asyncio.timeout(BOUND_S):
                while not await broker.depth(name):
                    pass
        await source.connect()
        if not is_stored_before:
            await broker.put(b"{}", queue=name)

        with pytest.raises(ConfigurationError, match="bind a classic or a quorum queue"):
            await collect(source, 1)
        await source.aclose()
    finally:
        async with broker.channel() as channel:
            await channel.queue_delete(name)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_what_was_moved_out_of_a_stream_is_consumed(broker: Broker, kind: str) -> None:
    await broker.make({"x-queue-type": kind, "x-dead-letter-exchange": "elsewhere"})
    await broker.put(b'{"a":1}', headers={"x-stream-offset": 7}, message_id="moved")
    source = await connected(broker)

    batches = await collect(source, 1)

    assert dedup_keys(messages_of(batches)) == ["moved"]
    await source.acknowledge(batches[0])
    await source.aclose()


async def test_a_slow_batch_does_not_cost_the_connection_while_more_waits_than_may(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "HEARTBEAT_S", 1)
    count = 40
    await broker.put_all([b'"%s"' % (b"x" * 500_000)] * count)
    source = await connected(broker, batch_bytes=500_000)
    first = await source.poll()

    # Time is what is tested: several times what the client waits for a sign of life.
    await asyncio.sleep(10)

    await source.acknowledge(first)
    batches = await collect(source, count - 1)
    assert await source.is_healthy()
    for batch in batches:
        await source.acknowledge(batch)
    await source.aclose()


async def test_a_start_and_a_stop_leave_no_task_thread_or_socket(broker: Broker) -> None:
    await broker.feed(numbered(50))
    tasks, before = asyncio.all_tasks(), threads_and_sockets()

    source = await connected(broker, batch_size=10)
    sink = sink_of(broker.server.url, broker.exchange)
    await sink.connect()
    await sink.publish(numbered(5))
    await source.acknowledge(await source.poll())
    assert await source.is_healthy()
    await source.aclose()
    await sink.aclose()

    await assert_no_task_left(tasks)
    assert threads_and_sockets() == before


def threads_and_sockets() -> tuple[int, int]:
    """How many of each this process has."""
    gc.collect()
    sockets = [one for one in gc.get_objects() if isinstance(one, socket.socket)]
    open_sockets = [one for one in sockets if one.fileno() >= 0]
    return threading.active_count(), len(open_sockets)


@pytest.mark.parametrize("is_tls", [False, True])
async def test_closing_is_bounded_while_the_broker_is_gone(
    broker: Broker, tcp_proxy: Proxies, *, is_tls: bool
) -> None:
    server = broker.server
    assert server.tls_files is not None
    assert server.tls_port is not None
    keys = {"tls_ca": str(server.tls_files.authority)} if is_tls else {}
    proxy = await tcp_proxy(server.address[0], server.tls_port if is_tls else server.address[1])
    url = proxy.url(server.url)
    await broker.feed(numbered(50))
    before = asyncio.all_tasks()
    source = source_of(url, broker.queue, batch_size=10, **keys)
    sink = sink_of(url, broker.exchange, **keys)
    await source.connect()
    await sink.connect()
    await source.poll()
    proxy.stall()
    publishing = asyncio.create_task(sink.publish(numbered(100)))
    await asyncio.sleep(0)

    started = time.monotonic()
    publishing.cancel()
    await asyncio.wait([publishing])
    await sink.aclose()
    await source.aclose()

    assert time.monotonic() - started < 10
    await assert_no_task_left(before)
    await proxy.restore()


async def assert_no_task_left(before: set[asyncio.Task[object]]) -> None:
    """The client's own may end a few turns later, whatever the broker does."""
    left = {task for task in asyncio.all_tasks() - before if "TcpProxy" not in str(task)}
    if left:
        _, left = await asyncio.wait(left, timeout=1)
    assert not left


async def test_a_quorum_queue_is_consumed_too(broker: Broker) -> None:
    name = f"{NAME}.quorum"
    async with broker.channel() as channel:
        await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
    try:
        await broker.put_all([b"%d" % number for number in range(50)], queue=name)
        source = source_of(broker.server.url, name, batch_size=10)
        await source.connect()
        first = await source.poll()
        await source.reject(first)

        batches = await collect(source, 50)

        assert [int(one.payload) for one in messages_of(batches)] == list(range(50))
        for batch in batches:
            await source.acknowledge(batch)
        await source.aclose()
    finally:
        async with broker.channel() as channel:
            await channel.queue_delete(name)


async def test_a_broker_that_names_no_consumer_is_described(broker: Broker) -> None:
    source = await connected(broker)

    described = await source.describe()

    assert described["queue"] == NAME
    assert described["version"] == broker.server.version
    await source.aclose()
    with pytest.raises(NotConnected):
        await source.describe()


@pytest.mark.parametrize("is_tls", [False, True])
def test_the_loop_that_the_relay_runs_on_does_as_well(
    rabbitmq_server: RabbitServer, *, is_tls: bool
) -> None:
    server = rabbitmq_server
    files = server.tls_files
    assert files is not None
    url = f"amqps://localhost:{server.tls_port}" if is_tls else server.url
    keys = {"tls_ca": str(files.authority)} if is_tls else {}
    messages = [
        RelayMessage(dedup_key=str(n), payload=b'"%s"' % (b"x" * 10_000)) for n in range(90)
    ]

    async def round_trip() -> None:
        broker = Broker(server, NAME)
        await broker.make()
        sink = sink_of(url, broker.exchange, **keys)
        source = source_of(url, broker.queue, batch_bytes=50_000, **keys)
        await sink.connect()
        await source.connect()
        assert not (await sink.publish(messages)).failures
        batches = await collect(source, len(messages))
        for batch in batches:
            await source.acknowledge(batch)
        assert dedup_keys(messages_of(batches)) == dedup_keys(messages)
        await source.aclose()
        await sink.aclose()
        assert await broker.depth() == 0
        await broker.drop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(round_trip())


async def test_another_client_understands_what_goes_through(broker: Broker) -> None:
    """The frames are ours on both ends of the other tests."""
    await broker.feed(numbered(3), "payload")

    arrived = await broker.taken()

    assert [message.body for message in arrived] == [one.payload for one in numbered(3)]
    assert all(message.delivery_mode is aio_pika.DeliveryMode.PERSISTENT for message in arrived)


async def _reconnected(source: RabbitSource) -> None:
    """A node that was killed takes longer than the contract's bound to come back."""
    while True:
        try:
            await source.connect()
        except Outage:
            await asyncio.sleep(0.05)
        else:
            return
