"""CloudEvents as others send them, through the source of each binding's broker."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

import msgspec
import pytest

from relay.contracts import Source
from relay.mapping import compile_reverse
from relay.message import RelayMessage
from tests.contract import kafka_broker, nats_broker, rabbitmq_broker
from tests.contract.source_contract import collect, messages_of
from tests.servers.kafka import KafkaServer
from tests.servers.nats import NatsServer
from tests.servers.rabbitmq import RabbitServer

EVENT = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "paid", "region": "eu"}
DATA = b'{"a":1}'
STRUCTURED = msgspec.json.encode({**EVENT, "data": {"a": 1}})
CONTENT_TYPE = "application/cloudevents+json"


async def assert_both_arrive(source: Source) -> None:
    """The event in binary mode and the same one in structured mode, each with what it says."""
    await source.connect()
    reshape = compile_reverse(None, None)
    arrived = [reshape(message) for message in messages_of(await collect(source, 2))]
    await source.aclose()

    for event in arrived:
        assert _essence(event) == ('["/shop","7"]', "paid", DATA, "eu")


def _essence(event: RelayMessage) -> tuple[str, str, bytes, str | None]:
    return event.dedup_key, event.subject, event.payload, event.headers.get("ce-region")


def _spelled(prefix: str) -> Mapping[str, str]:
    return {f"{prefix}{name}": text for name, text in EVENT.items()}


async def test_over_kafka(kafka_server: KafkaServer) -> None:
    broker = kafka_broker.Broker(kafka_server)
    await broker.create()
    headers = [(name, text.encode()) for name, text in _spelled("ce_").items()]
    await broker.put(DATA, headers=[*headers, ("content-type", b"application/json")])
    await broker.put(STRUCTURED, headers=[("content-type", CONTENT_TYPE.encode())])

    await assert_both_arrive(kafka_broker.source_of(kafka_server.brokers, broker.topic))
    await broker.drop()


async def test_over_nats(nats_server: NatsServer) -> None:
    async with _stream(nats_server) as broker:
        await broker.put("orders.ce", DATA, headers={**_spelled("ce-"), "Nats-Msg-Id": "one"})
        await broker.put("orders.ce", STRUCTURED, headers={"content-type": CONTENT_TYPE})

        await assert_both_arrive(nats_broker.source_of(nats_server.url))


@contextlib.asynccontextmanager
async def _stream(server: NatsServer) -> AsyncIterator[nats_broker.Broker]:
    broker = nats_broker.Broker(server, "cloudevents")
    await broker.create()
    yield broker
    await broker.drop()


@pytest.mark.parametrize("prefix", ["cloudEvents:", "cloudEvents_"])
async def test_over_amqp(rabbitmq_server: RabbitServer, prefix: str) -> None:
    broker = rabbitmq_broker.Broker(rabbitmq_server, "cloudevents")
    await broker.make()
    await broker.put(DATA, headers=_spelled(prefix), content_type="application/json")
    await broker.put(STRUCTURED, content_type=CONTENT_TYPE)

    await assert_both_arrive(rabbitmq_broker.source_of(rabbitmq_server.url, broker.queue))
    await broker.drop()
