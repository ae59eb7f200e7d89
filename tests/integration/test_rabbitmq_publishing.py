"""The RabbitMQ sink against a real broker: what is stored, in which order, and what is said."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

import aio_pika
import pytest
from msgspec import structs

from relay.backends.rabbitmq import RabbitSink
from relay.contracts import PublishResult, Sink
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageTooLarge,
    NotConnected,
    Outage,
    TimedOut,
)
from relay.message import RelayMessage
from tests.contract.evidence import (
    assert_per_key_order,
    complete_message,
    dedup_keys,
    first_occurrences,
    numbered,
    reconnect,
    until,
)
from tests.contract.rabbitmq_broker import Broker, sink_of
from tests.contract.sink_contract import deliver
from tests.servers.proxy import TcpProxy
from tests.servers.rabbitmq import MAX_MESSAGE_BYTES, RabbitServer

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
NAME = "publishing"
BOUND_S = 60


@pytest.fixture
async def broker(rabbitmq_server: RabbitServer) -> AsyncIterator[Broker]:
    broker = Broker(rabbitmq_server, NAME)
    await broker.make()
    yield broker
    await broker.drop()


async def connected(broker: Broker, ordering: str | None = None, **keys: object) -> RabbitSink:
    sink = sink_of(broker.server.url, broker.exchange, ordering=ordering, **keys)
    await sink.connect()
    return sink


def large(dedup_key: str, size: int) -> RelayMessage:
    """A message with a body of exactly so many bytes in the format ``payload``."""
    return RelayMessage(dedup_key=dedup_key, payload=b'"%s"' % (b"x" * (size - 2)), subject="large")


def sent_to(subject: str, number: int, key: str | None = None) -> RelayMessage:
    return RelayMessage(dedup_key=f"m:{number}", key=key, payload=b"{}", subject=subject)


def failed(result: PublishResult) -> list[int]:
    return [failure.index for failure in result.failures]


@pytest.mark.shows("sink:rabbitmq.format")
@pytest.mark.parametrize(
    "format_, content_type",
    [
        ("envelope", "application/vnd.pgtrickle.envelope+json"),
        ("payload", "application/json"),
        ("cloudevents", "application/cloudevents+json"),
    ],
)
async def test_the_documented_properties_go_with_every_format(
    broker: Broker, format_: str, content_type: str
) -> None:
    sink = await connected(broker, format=format_)
    message = RelayMessage(
        dedup_key="orders:7:0", payload=b'{"a":1}', subject="x", headers={"traceparent": "00-4b"}
    )

    await sink.publish([message])

    (arrived,) = await broker.taken()
    assert arrived.message_id == "orders:7:0"
    assert arrived.content_type == content_type
    assert arrived.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert arrived.headers["Pgtrickle-Dedup-Key"] == "orders:7:0"
    assert arrived.headers["Pgtrickle-Format"] == format_
    assert arrived.headers["traceparent"] == "00-4b"
    assert b'"a":1' in arrived.body
    await sink.aclose()


async def test_every_field_of_a_complete_message_is_in_the_headers(broker: Broker) -> None:
    sink = await connected(broker, format="payload")
    sent = complete_message()

    await sink.publish([sent])

    (arrived,) = await broker.taken()
    assert arrived.routing_key == sent.subject
    assert arrived.headers["Pgtrickle-Key"] == sent.key
    assert arrived.headers["Pgtrickle-Outbox-Id"] == "9007199254740993"
    assert arrived.headers["Pgtrickle-Full-Refresh"] == "true"
    await sink.aclose()


@pytest.mark.shows("sink:rabbitmq.routing_key_template", "sink:rabbitmq.routing")
async def test_an_event_has_the_routing_key_of_its_template(broker: Broker) -> None:
    sink = await connected(
        broker,
        routing_key_template="a.{stream_table}",
        routing={"delete": "gone.{key}"},
    )
    kept = RelayMessage(dedup_key="1", payload=b"{}", stream_table="or.ders", op="insert")
    gone = RelayMessage(dedup_key="2", payload=b"{}", key="#", op="delete")

    await sink.publish([structs.replace(one, subject=sink.subject_of(one)) for one in (kept, gone)])

    assert [one.routing_key for one in await broker.taken()] == ["a.or%2Eders", "gone.%23"]
    await sink.aclose()


@pytest.mark.shows("sink:rabbitmq.exchange")
async def test_without_an_exchange_an_event_goes_to_the_queue_that_its_routing_key_names(
    broker: Broker,
) -> None:
    sink = sink_of(broker.server.url, "", routing_key_template=NAME)
    await sink.connect()

    result = await sink.publish([sent_to(NAME, 1), sent_to("absent", 2)])

    assert [one.message_id for one in await broker.taken()] == ["m:1"]
    ((index, error),) = [(one.index, one.error) for one in result.failures]
    assert index == 1
    assert isinstance(error, DestinationMissing)
    assert "there is no queue 'absent'" in str(error)
    await sink.aclose()


@pytest.mark.shows("sink:rabbitmq.declare_exchange", "sink:rabbitmq.exchange_type")
async def test_an_exchange_is_made_only_where_that_is_asked_for(broker: Broker) -> None:
    name = f"{NAME}.made"
    absent = sink_of(broker.server.url, name)
    looking = f"^looking for the exchange '{name}' on .*set declare_exchange"
    with pytest.raises(DestinationMissing, match=looking):
        await absent.connect()
    made = sink_of(broker.server.url, name, declare_exchange=True, exchange_type="fanout")
    for _ in range(2):
        await made.connect()
    await made.aclose()

    async with broker.channel() as channel:
        exchange = await channel.declare_exchange(name, aio_pika.ExchangeType.FANOUT, durable=True)
        queue = await channel.get_queue(broker.queue)
        await queue.bind(exchange)
        await absent.connect()
        assert not (await absent.publish([sent_to("any.key", 1)])).failures
        await absent.aclose()
        other = sink_of(broker.server.url, name, declare_exchange=True)
        with pytest.raises(ConfigurationError, match="inequivalent arg 'type'"):
            await other.connect()
        await channel.exchange_delete(name)

    assert [one.routing_key for one in await broker.taken()] == ["any.key"]


async def test_an_unknown_type_of_exchange_is_said(broker: Broker) -> None:
    sink = sink_of(broker.server.url, "new", declare_exchange=True, exchange_type="topick")

    with pytest.raises(ConfigurationError, match="correct exchange_type"):
        await sink.connect()


@pytest.mark.shows("sink:rabbitmq.mandatory")
async def test_an_event_that_no_queue_takes_is_an_error_unless_it_may_be_dropped(
    broker: Broker,
) -> None:
    async with broker.channel() as channel:
        queue = await channel.get_queue(broker.queue)
        await queue.unbind(broker.exchange, "#")
        await queue.bind(broker.exchange, "taken.#")
    messages = [sent_to("stray.x" if number % 3 else "taken.x", number) for number in range(9)]
    sink = await connected(broker, "pipelined")
    careless = await connected(broker, mandatory=False)

    result = await sink.publish(messages)

    assert failed(result) == [1, 2, 4, 5, 7, 8]
    assert all(isinstance(one.error, DestinationMissing) for one in result.failures)
    assert "stray.x" in str(result.failures[0].error)
    assert broker.exchange in str(result.failures[0].error)
    assert dedup_keys(await broker.restored()) == ["m:0", "m:3", "m:6"]
    assert not (await careless.publish(messages[1:3])).failures
    assert await broker.depth() == 0
    await sink.aclose()
    await careless.aclose()


async def test_behind_an_unroutable_event_nothing_of_its_key_is_stored(broker: Broker) -> None:
    async with broker.channel() as channel:
        queue = await channel.get_queue(broker.queue)
        await queue.unbind(broker.exchange, "#")
        await queue.bind(broker.exchange, "taken")
    messages = [sent_to("stray", 0, "a"), sent_to("taken", 1, "a"), sent_to("taken", 2, "b")]
    sink = await connected(broker)

    result = await sink.publish(messages)

    assert failed(result)[:2] == [0, 1]
    assert "m:1" not in dedup_keys(await broker.restored())
    await sink.aclose()


async def test_an_exchange_that_vanishes_is_an_error_that_names_it(broker: Broker) -> None:
    sink = await connected(broker)
    async with broker.channel() as channel:
        await channel.exchange_delete(broker.exchange)

    result = await sink.publish(numbered(3))

    assert failed(result) == [0, 1, 2]
    assert all(isinstance(one.error, DestinationMissing) for one in result.failures)
    assert broker.exchange in str(result.failures[0].error)
    with pytest.raises(Outage):
        await sink.publish(numbered(3))
    await broker.make()
    await sink.connect()
    await deliver(sink, numbered(3))
    await sink.aclose()


@pytest.mark.shows("sink:rabbitmq.max_message_bytes")
async def test_a_message_above_our_limit_fails_alone_and_the_limit_is_named(
    broker: Broker,
) -> None:
    sink = await connected(broker, max_message_bytes=5000, format="payload")
    good = numbered(10)

    result = await sink.publish([*good[:5], large("big", 5001), *good[5:], large("fits", 5000)])

    ((index, error),) = [(one.index, one.error) for one in result.failures]
    assert index == 5
    assert isinstance(error, MessageTooLarge)
    assert "max_message_bytes is 5000 bytes" in str(error)
    assert set(dedup_keys(await broker.restored())) == {*dedup_keys(good), "fits"}
    await sink.aclose()


async def test_the_brokers_own_limit_is_learnt_from_it_and_costs_no_other_message(
    broker: Broker,
) -> None:
    sink = await connected(broker, max_message_bytes=2 * MAX_MESSAGE_BYTES, format="payload")
    good = numbered(10)
    big = large("big", MAX_MESSAGE_BYTES + 1)

    result = await sink.publish([*good[:5], big, *good[5:]])

    refused = {one.index: one.error for one in result.failures}
    assert isinstance(refused[5], MessageTooLarge)
    assert str(MAX_MESSAGE_BYTES) in str(refused[5])
    # The connection is gone, which the loop has to hear before it publishes again.
    assert all(isinstance(error, NotConnected) for at, error in refused.items() if at != 5)
    await reconnect(sink.connect)
    again = await sink.publish([*good, big])
    assert failed(again) == [10]
    assert isinstance(again.failures[0].error, MessageTooLarge)
    assert dedup_keys(first_occurrences(await broker.restored())) == dedup_keys(good)
    await sink.aclose()


async def test_headers_that_fit_in_no_frame_are_refused_alone(broker: Broker) -> None:
    sink = await connected(broker)
    good = numbered(2)
    wide = structs.replace(good[0], dedup_key="wide", headers={"x": "y" * 131072})
    odd = structs.replace(good[0], dedup_key="odd", headers={"n" * 129: "y"})

    result = await sink.publish([good[0], wide, odd, good[1]])

    assert failed(result) == [1, 2]
    assert all(one.error.kind is ErrorKind.MESSAGE for one in result.failures)
    assert "131072" in str(result.failures[0].error)
    assert dedup_keys(await broker.restored()) == dedup_keys(good)
    await sink.aclose()


async def test_a_large_document_travels_whole(broker: Broker) -> None:
    sink = await connected(broker, max_message_bytes=MAX_MESSAGE_BYTES)
    document = large("large", 20_000_000)

    await deliver(sink, [document, *numbered(1)])

    first, second = await broker.restored()
    assert first.payload == document.payload
    assert second.dedup_key == "m:0"
    await sink.aclose()


async def test_a_queue_that_is_full_is_an_outage_that_keeps_the_order_until_it_has_room(
    broker: Broker,
) -> None:
    await broker.make({"x-max-length": 50, "x-overflow": "reject-publish"})
    sink = await connected(broker)
    messages = numbered(300, keys=7)

    async with asyncio.timeout(BOUND_S):
        result = await sink.publish(messages)
        assert result.failures
        assert all(isinstance(one.error, Outage) for one in result.failures)
        assert "a queue is full" in str(result.failures[0].error)
        while pending := [messages[one.index] for one in result.failures]:
            await broker.restored()
            messages = pending
            result = await sink.publish(pending)

    assert_per_key_order(await broker.restored(), numbered(300, keys=7))
    await sink.aclose()


@contextmanager
def low_memory(server: RabbitServer) -> Iterator[None]:
    """The broker believes that it has no memory left."""
    server.tell("set_vm_memory_high_watermark", "absolute", "1")
    try:
        yield
    finally:
        server.tell("set_vm_memory_high_watermark", "absolute", "2GB")


@pytest.mark.shows("sink:rabbitmq.confirm_timeout_ms")
async def test_a_broker_that_blocks_publishers_is_an_outage_after_the_timeout(
    broker: Broker,
) -> None:
    sink = await connected(broker, confirm_timeout_ms=1000)
    await deliver(sink, numbered(1))
    is_blocked = low_memory(broker.server)
    await asyncio.to_thread(is_blocked.__enter__)
    try:
        started = time.monotonic()
        result = await sink.publish(numbered(3, start=1))
        took_s = time.monotonic() - started
    finally:
        await asyncio.to_thread(is_blocked.__exit__, None, None, None)

    assert failed(result) == [0, 1, 2]
    assert all(isinstance(one.error, NotConnected) for one in result.failures)
    assert "takes nothing from publishers" in str(result.failures[0].error)
    assert 0.9 <= took_s < 20
    await reconnect(sink.connect)
    await deliver(sink, numbered(3, start=1))
    await until(broker.restored, 4)
    await sink.aclose()


async def test_of_two_events_with_one_dedup_key_the_one_that_comes_back_is_the_one_that_fails(
    broker: Broker,
) -> None:
    async with broker.channel() as channel:
        queue = await channel.get_queue(broker.queue)
        await queue.unbind(broker.exchange, "#")
        await queue.bind(broker.exchange, "taken")
    stray, taken = sent_to("stray", 1), sent_to("taken", 1)
    sink = await connected(broker, "pipelined")

    assert failed(await sink.publish([taken, stray])) == [1]
    assert 0 in failed(await sink.publish([stray, taken]))
    await sink.aclose()


@pytest.mark.shows("sink:rabbitmq.max_in_flight")
@pytest.mark.parametrize("max_in_flight", [5, 20])
async def test_no_more_than_so_many_messages_wait_for_a_confirmation(
    broker: Broker, tcp_proxy: Proxies, max_in_flight: int
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    url = proxy.url(broker.server.url)
    sink = sink_of(url, broker.exchange, max_in_flight=max_in_flight, confirm_timeout_ms=500)
    await sink.connect()
    # No confirmation arrives any more.
    proxy.swallow("to_client")

    result = await sink.publish(numbered(100, keys=100))

    assert len(result.failures) == 100
    assert all(isinstance(one.error, TimedOut) for one in result.failures)
    await until(broker.restored, max_in_flight)
    assert len(await broker.restored()) == max_in_flight
    await sink.aclose()


async def test_a_broker_killed_in_mid_batch_loses_nothing_and_keeps_the_order(
    broker: Broker,
) -> None:
    sink = await connected(broker)
    messages = numbered(2000, keys=50)

    async with asyncio.timeout(3 * BOUND_S), asyncio.TaskGroup() as tasks:
        publishing = tasks.create_task(_deliver_in_batches(sink, messages))
        while await broker.depth() < 200:
            assert not publishing.done()
        await asyncio.to_thread(broker.server.kill)
        await asyncio.to_thread(broker.server.start)

    arrived = await broker.restored()
    assert_per_key_order(arrived, messages)
    await sink.aclose()


async def test_a_connection_that_breaks_in_the_middle_of_a_batch_stores_a_beginning_of_it(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    sink = sink_of(proxy.url(broker.server.url), broker.exchange, ordering="pipelined")
    await sink.connect()
    messages = numbered(900)
    proxy.cut_after(100_000, "to_server")

    result = await sink.publish(messages)

    assert result.failures
    with pytest.raises(Outage):
        await sink.publish(messages)
    await proxy.restore()
    await sink.connect()
    await deliver(sink, [messages[one.index] for one in result.failures])
    arrived = first_occurrences(await until(broker.restored, 900))
    assert dedup_keys(arrived) == dedup_keys(messages)
    await sink.aclose()


async def test_who_is_cancelled_while_the_connection_breaks_leaves_no_error_unread(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    unread: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: unread.append(context["message"])
    )
    for steps in range(0, 60, 3):
        await proxy.restore()
        sink = sink_of(proxy.url(broker.server.url), broker.exchange, ordering="pipelined")
        await sink.connect()
        proxy.swallow("to_client")
        publishing = asyncio.create_task(sink.publish(numbered(200)))
        await asyncio.sleep(0)
        await proxy.reset_connections()
        for _ in range(steps):
            await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        del publishing
        await sink.aclose()
    gc.collect()

    assert not unread


async def test_a_broker_that_stops_answering_is_given_up_after_the_timeout(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    sink = sink_of(proxy.url(broker.server.url), broker.exchange, confirm_timeout_ms=300)
    await sink.connect()
    proxy.stall()
    started = time.monotonic()

    result = await sink.publish(numbered(3))

    assert time.monotonic() - started < 10
    assert all(isinstance(one.error, TimedOut) for one in result.failures)
    with pytest.raises(Outage):
        await sink.publish(numbered(3))
    await proxy.restore()
    await sink.aclose()


async def test_the_broker_is_described(broker: Broker) -> None:
    sink = await connected(broker)

    described = await sink.describe()

    assert described["version"] == broker.server.version
    assert described["exchange"] == broker.exchange
    await sink.aclose()
    with pytest.raises(NotConnected):
        await sink.describe()


async def _deliver_in_batches(sink: Sink, messages: list[RelayMessage]) -> None:
    for start in range(0, len(messages), 100):
        pending = messages[start : start + 100]
        while pending:
            try:
                failures = (await sink.publish(pending)).failures
            except Outage:
                await _reconnected(sink)
                continue
            pending = [pending[failure.index] for failure in failures]


async def _reconnected(sink: Sink) -> None:
    """A node that was killed takes longer than the contract's bound to come back."""
    while True:
        try:
            await sink.connect()
        except Outage:
            await asyncio.sleep(0.05)
        else:
            return
