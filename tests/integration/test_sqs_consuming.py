"""The SQS source against a real server: visibility, order, what others send, and closing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import aioboto3
import pytest
from aiobotocore.config import AioConfig

from relay.backends.sqs import SqsSource
from relay.contracts import Batch
from relay.errors import LeaseLost, NotConnected, Outage
from relay.message import RelayMessage
from tests.contract.evidence import (
    assert_per_key_order,
    assert_same_message,
    complete_message,
    dedup_keys,
    first_occurrences,
    numbered,
)
from tests.contract.source_contract import AT_ONCE_S, collect, messages_of
from tests.contract.sqs_broker import Broker, broker_of, sink_of, source_of
from tests.servers.proxy import TcpProxy
from tests.servers.sqs import SqsServer

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
BOUND_S = 60


@pytest.fixture
async def fifo(sqs_server: SqsServer) -> AsyncIterator[Broker]:
    async with broker_of(sqs_server, is_fifo=True) as broker:
        yield broker


@pytest.fixture
async def standard(sqs_server: SqsServer) -> AsyncIterator[Broker]:
    async with broker_of(sqs_server) as broker:
        yield broker


async def connected(broker: Broker, *, batch_size: int = 100, **keys: object) -> SqsSource:
    source = source_of(broker.url, batch_size=batch_size, **{**broker.keys, **keys})
    await source.connect()
    return source


async def poll_in_vain(source: SqsSource) -> None:
    """Poll until that fails."""
    async with asyncio.timeout(BOUND_S):
        while True:
            await source.poll()


@pytest.mark.parametrize("is_fifo", [True, False])
@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
async def test_every_field_survives_the_way_through_the_queue(
    sqs_server: SqsServer, format_: str, *, is_fifo: bool
) -> None:
    sent = complete_message()
    async with broker_of(sqs_server, is_fifo=is_fifo) as broker:
        sink = sink_of(broker.url, format=format_, **broker.keys)
        await sink.connect()
        assert not (await sink.publish([sent])).failures
        await sink.aclose()
        source = await connected(broker)

        (arrived,) = messages_of(await collect(source, 1))

        assert_same_message(arrived, sent)
        await source.aclose()


@pytest.mark.shows("source:sqs.visibility_timeout")
async def test_a_message_left_to_run_out_is_polled_again_and_not_before(
    standard: Broker,
) -> None:
    await standard.feed(numbered(3))
    source = await connected(standard, visibility_timeout=3)
    started = time.monotonic()
    first = await collect(source, 3)

    again = await collect(source, 3)

    assert time.monotonic() - started > 2
    assert sorted(dedup_keys(messages_of(again))) == sorted(dedup_keys(messages_of(first)))
    for batch in (*first, *again):
        await source.acknowledge(batch)
    await source.aclose()


@pytest.mark.shows("source:sqs.wait_time_seconds")
async def test_a_receive_waits_as_long_as_it_is_told(standard: Broker) -> None:
    took = []
    for wait_s in (1, 3):
        source = await connected(standard, wait_time_seconds=wait_s)
        started = time.monotonic()
        await source.poll()
        (receiving,) = source._receiving
        async with asyncio.timeout(BOUND_S):
            assert not await receiving
        took.append(time.monotonic() - started)
        await source.aclose()

    assert took[0] >= 0.9
    assert took[1] >= 2.9


@pytest.mark.shows("source:sqs.max_in_flight")
async def test_several_receives_run_while_they_come_back_full_and_lose_nothing(
    standard: Broker,
) -> None:
    for most in (3, 1):
        messages = numbered(150, prefix=str(most))
        await standard.feed(messages)
        source = await connected(standard, max_in_flight=most)
        batches: list[Batch] = []
        widest = 0
        async with asyncio.timeout(BOUND_S):
            while len({*dedup_keys(messages_of(batches))}) < 150:
                batches.append(await source.poll())
                await source.acknowledge(batches[-1])
                widest = max(widest, source._width)
        assert widest == most
        assert {*dedup_keys(messages_of(batches))} == {*dedup_keys(messages)}
        await source.aclose()


async def test_a_fifo_queue_gives_each_key_in_order_with_several_receives(fifo: Broker) -> None:
    messages = numbered(120, keys=12)
    await fifo.feed(messages)
    source = await connected(fifo)
    arrived: list[RelayMessage] = []

    async with asyncio.timeout(BOUND_S):
        while len(first_occurrences(arrived)) < 120:
            batch = await source.poll()
            arrived.extend(batch.messages)
            await source.acknowledge(batch)

    assert_per_key_order(arrived, messages)
    await source.aclose()


async def test_what_is_released_to_a_fifo_queue_comes_again_in_order(fifo: Broker) -> None:
    await fifo.feed(numbered(9))
    source = await connected(fifo, batch_size=4)
    first = await source.poll()

    # What was received with it and waits must not overtake it.
    await source.reject(first)

    again: list[RelayMessage] = []
    async with asyncio.timeout(AT_ONCE_S + BOUND_S):
        while len(again) < 9:
            batch = await source.poll()
            again.extend(batch.messages)
            await source.acknowledge(batch)
    assert dedup_keys(again) == dedup_keys(numbered(9))
    await source.aclose()


async def test_a_fifo_queue_is_not_at_its_end_while_what_is_unacknowledged_keeps_the_rest_back(
    fifo: Broker,
) -> None:
    await fifo.feed(numbered(25))
    source = await connected(fifo)
    out = await collect(source, 10)

    for _ in range(3):
        batch = await source.poll()
        assert not batch.messages
        assert not batch.is_end_of_backlog
    arrived = messages_of(out)
    for batch in out:
        await source.acknowledge(batch)
    async with asyncio.timeout(BOUND_S):
        while not (batch := await source.poll()).is_end_of_backlog:
            arrived += batch.messages
            await source.acknowledge(batch)
    assert dedup_keys(arrived) == dedup_keys(numbered(25))
    await source.aclose()


async def test_closing_leaves_nothing_hidden(standard: Broker) -> None:
    await standard.feed(numbered(120))
    source = await connected(standard, batch_size=20)
    await collect(source, 40)

    await source.aclose()

    await standard.until_attribute("ApproximateNumberOfMessagesNotVisible", "0")
    assert len(await standard.restored()) == 120


async def test_acknowledging_deletes_and_leaves_nothing(standard: Broker) -> None:
    await standard.feed(numbered(45))
    source = await connected(standard)
    for batch in await collect(source, 45):
        await source.acknowledge(batch)
    await source.aclose()

    assert not await standard.take()


async def test_a_message_that_the_queue_took_back_is_said_when_it_is_acknowledged(
    standard: Broker,
) -> None:
    await standard.feed(numbered(2))
    source = await connected(standard)
    batches = await collect(source, 2)
    await standard.ask("purge_queue")

    with pytest.raises(LeaseLost, match="visibility_timeout"):
        await source.acknowledge(batches[0])
    await source.aclose()


async def test_a_batch_of_before_a_reconnect_is_not_acknowledged(standard: Broker) -> None:
    await standard.feed(numbered(5))
    source = await connected(standard)
    (old, *_) = await collect(source, 5)
    await source.connect()

    with pytest.raises(NotConnected):
        await source.acknowledge(old)

    again = await collect(source, 5, timeout_s=AT_ONCE_S + BOUND_S)
    assert sorted(dedup_keys(messages_of(again))) == dedup_keys(numbered(5))
    await source.aclose()


async def test_equal_bodies_of_a_queue_that_deduplicates_by_content_are_different_events(
    sqs_server: SqsServer,
) -> None:
    async with broker_of(sqs_server, is_fifo=True, ContentBasedDeduplication="true") as broker:
        source = await connected(broker)
        keys = []
        for _ in range(2):
            await broker.put('{"a":1}', group="g")
            (batch,) = await collect(source, 1)
            keys += dedup_keys(batch.messages)
            # Deleted, it is forgotten by this server as after five minutes by others.
            await source.acknowledge(batch)
        await source.aclose()

    assert len(set(keys)) == 2


async def test_the_deduplication_id_of_others_is_their_dedup_key(sqs_server: SqsServer) -> None:
    for scope, expected in (("queue", "theirs"), ("messageGroup", "g:theirs")):
        async with broker_of(sqs_server, is_fifo=True, DeduplicationScope=scope) as broker:
            await broker.put('{"a":1}', group="g", dedup_id="theirs")
            source = await connected(broker)
            (message,) = messages_of(await collect(source, 1))
            assert (message.dedup_key, message.key) == (expected, "g")
            await source.aclose()


async def test_large_messages_come_in_batches_of_bounded_size(standard: Broker) -> None:
    body = b'"%s"' % (b"x" * 50_000)
    await standard.feed([RelayMessage(dedup_key=str(number), payload=body) for number in range(24)])
    source = source_of(standard.url, batch_bytes=200_000, **standard.keys)
    await source.connect()

    batches = await collect(source, 24)

    assert max(len(batch.messages) for batch in batches) <= 4
    await source.aclose()


async def test_a_call_to_keep_a_batch_that_fails_gives_nothing_back(
    standard: Broker, tcp_proxy: Proxies
) -> None:
    await standard.feed(numbered(5))
    proxy = await tcp_proxy(*standard.server.address)
    source = source_of(standard.through(proxy), visibility_timeout=6, **standard.keys)
    await source.connect()
    batches = await collect(source, 5)

    await proxy.cut()
    for batch in batches:
        await source.keep_alive(batch)
    await proxy.restore()
    for batch in batches:
        await source.keep_alive(batch)

    await standard.until_attribute("ApproximateNumberOfMessagesNotVisible", "5")
    for batch in batches:
        await source.acknowledge(batch)
    await standard.until_attribute("ApproximateNumberOfMessagesNotVisible", "0")
    await source.aclose()


async def test_a_server_that_stops_answering_is_an_outage_and_an_interrupt_is_prompt(
    standard: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*standard.server.address)
    source = source_of(standard.through(proxy), timeout_ms=3000, **standard.keys)
    await source.connect()
    proxy.stall()
    polling = asyncio.create_task(source.poll())
    await asyncio.sleep(0)
    started = time.monotonic()
    source.interrupt()
    assert not (await polling).messages
    assert time.monotonic() - started < 0.7

    with pytest.raises(Outage):
        await poll_in_vain(source)
    await proxy.restore()
    await source.aclose()


@pytest.mark.speed
async def test_consuming_reaches_half_of_what_the_bare_client_reaches(
    sqs_server: SqsServer,
) -> None:
    count = 3000
    messages = [
        RelayMessage(
            dedup_key=f"outbox_orders:{number}:0",
            key=str(number),
            op="insert",
            payload=b'{"id":%d,"note":"%s"}' % (number, b"x" * 180),
            stream_table="orders",
            outbox_id=number,
        )
        for number in range(count)
    ]
    async with broker_of(sqs_server) as broker:
        await broker.feed(messages)
        floor_s = await _consume_bare(broker, count)
    async with broker_of(sqs_server) as broker:
        await broker.feed(messages)
        source = await connected(broker, batch_size=1000)
        arrived: set[str] = set()
        started = time.perf_counter()
        while len(arrived) < count:
            batch = await source.poll()
            arrived.update(dedup_keys(batch.messages))
            await source.acknowledge(batch)
        took_s = time.perf_counter() - started
        await source.aclose()

    print(f"bare {count / floor_s:,.0f}/s, source {count / took_s:,.0f}/s")
    assert took_s < 2 * floor_s


async def _consume_bare(broker: Broker, count: int) -> float:
    """Seconds to receive and delete as many through the client alone, as many calls at a time."""
    session = aioboto3.Session(
        aws_access_key_id="any", aws_secret_access_key="any", region_name=broker.server.region
    )
    seen: set[str] = set()
    async with session.client(
        "sqs",
        endpoint_url=broker.server.url,
        config=AioConfig(parameter_validation=False, max_pool_connections=20),
    ) as client:

        async def consume() -> None:
            while len(seen) < count:
                answer = await client.receive_message(
                    QueueUrl=broker.url,
                    MaxNumberOfMessages=10,
                    MessageAttributeNames=["All"],
                    MessageSystemAttributeNames=["All"],
                )
                found: Sequence[dict[str, str]] = answer.get("Messages", [])
                if not found:
                    continue
                await client.delete_message_batch(
                    QueueUrl=broker.url,
                    Entries=[
                        {"Id": str(number), "ReceiptHandle": one["ReceiptHandle"]}
                        for number, one in enumerate(found)
                    ],
                )
                seen.update(one["MessageId"] for one in found)

        started = time.perf_counter()
        await asyncio.gather(*(consume() for _ in range(8)))
        return time.perf_counter() - started
