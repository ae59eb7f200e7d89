"""The RabbitMQ sink and source beside the bare client, which does the same with no relay around."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import aiormq
import pytest
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from relay.message import RelayMessage
from relay.wire import TITLE, encoder
from tests.contract.rabbitmq_broker import Broker, sink_of, source_of
from tests.servers.rabbitmq import RabbitServer

pytestmark = pytest.mark.speed

COUNT = 20_000
IN_FLIGHT = 4096
BATCH = 1000


@pytest.fixture
async def broker(rabbitmq_server: RabbitServer) -> AsyncIterator[Broker]:
    broker = Broker(rabbitmq_server, "speed")
    await broker.make()
    yield broker
    await broker.drop()


def orders() -> list[RelayMessage]:
    return [
        RelayMessage(
            dedup_key=f"outbox_orders:{number}:0",
            key=str(number),
            subject="orders.insert",
            op="insert",
            payload=b'{"id":%d,"note":"%s"}' % (number, b"x" * 180),
            stream_table="orders",
            outbox_id=number,
        )
        for number in range(COUNT)
    ]


async def test_publishing_reaches_half_of_what_the_bare_client_reaches(broker: Broker) -> None:
    messages = orders()
    floor_s = await _publish_bare(broker, messages)
    await broker.make()
    sink = sink_of(broker.server.url, broker.exchange)
    await sink.connect()

    started = time.perf_counter()
    for start in range(0, COUNT, IN_FLIGHT):
        assert not (await sink.publish(messages[start : start + IN_FLIGHT])).failures
    took_s = time.perf_counter() - started

    assert await broker.depth() == COUNT
    await sink.aclose()
    print(f"bare {COUNT / floor_s:,.0f}/s, sink {COUNT / took_s:,.0f}/s")
    assert took_s < 2 * floor_s


async def test_consuming_reaches_half_of_what_the_bare_client_reaches(broker: Broker) -> None:
    await broker.feed(orders())
    floor_s = await _consume_bare(broker)
    await broker.feed(orders())
    source = source_of(broker.server.url, broker.queue, batch_size=BATCH)

    started = time.perf_counter()
    await source.connect()
    arrived = 0
    while arrived < COUNT:
        batch = await source.poll()
        arrived += len(batch.messages)
        await source.acknowledge(batch)
    took_s = time.perf_counter() - started

    await source.aclose()
    assert await broker.depth() == 0
    print(f"bare {COUNT / floor_s:,.0f}/s, source {COUNT / took_s:,.0f}/s")
    assert took_s < 2 * floor_s


async def _publish_bare(broker: Broker, messages: Sequence[RelayMessage]) -> float:
    """Seconds for the same bodies and properties, with so many confirmations awaited at a time."""
    encode = encoder("envelope", TITLE)
    prepared = [(message.dedup_key, encode(message)) for message in messages]
    async with aiormq.connect(broker.server.url) as connection:
        channel = await connection.channel()
        started = time.perf_counter()
        for start in range(0, COUNT, IN_FLIGHT):
            confirmed = await asyncio.gather(
                *(
                    channel.basic_publish(
                        encoded.body,
                        exchange=broker.exchange,
                        routing_key="orders.insert",
                        mandatory=True,
                        wait=False,
                        properties=Basic.Properties(
                            content_type="application/json",
                            headers=dict(encoded.headers),
                            delivery_mode=2,
                            message_id=dedup_key,
                        ),
                    )
                    for dedup_key, encoded in prepared[start : start + IN_FLIGHT]
                )
            )
            assert all(isinstance(one, Basic.Ack) for one in confirmed)
        return time.perf_counter() - started


async def _consume_bare(broker: Broker) -> float:
    """Seconds for the same messages, acknowledged as often."""
    is_over = asyncio.Event()
    arrived = 0
    async with aiormq.connect(broker.server.url) as connection:
        channel = await connection.channel()

        async def take(message: DeliveredMessage) -> None:
            nonlocal arrived
            arrived += 1
            if arrived % BATCH == 0:
                await channel.basic_ack(message.delivery_tag or 0, multiple=True)
            if arrived == COUNT:
                is_over.set()

        await channel.basic_qos(prefetch_count=4 * BATCH)
        started = time.perf_counter()
        await channel.basic_consume(broker.queue, take)
        await is_over.wait()
        return time.perf_counter() - started
