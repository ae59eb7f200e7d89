"""Fifty thousand events to and from Kafka, over several partitions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from tests.contract.kafka_broker import Broker
from tests.crash.fifty_thousand import (
    Arrived,
    Blow,
    Destination,
    ForwardProof,
    Origin,
    ReverseProof,
    arrived,
    payload,
)
from tests.crash.sharing import GroupProof
from tests.servers.kafka import KafkaServer

_PARTITIONS = 3


class _Topic:
    """A topic and its broker, which is the session's and comes back with its logs."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    @property
    def _place(self) -> Mapping[str, object]:
        return {
            "type": "kafka",
            "brokers": self._broker.server.brokers,
            "topic": self._broker.topic,
        }

    async def take_away(self, blow: Blow) -> None:
        await asyncio.to_thread(getattr(self._broker.server, blow))

    async def bring_back(self) -> None:
        await asyncio.to_thread(self._broker.server.start)


class _ToKafka(_Topic, Destination):
    def sink(self) -> Mapping[str, object]:
        return {**self._place, "key_template": "{key}"}

    async def count(self) -> int:
        return sum((await self._broker.ends()).values())

    async def events(self) -> Sequence[Arrived]:
        return [arrived(bytes(record.value)) for record in await self._broker.records()]


class _FromKafka(_Topic, Origin):
    def source(self) -> Mapping[str, object]:
        return self._place

    async def put(self, ids: Sequence[int]) -> None:
        for number in range(_PARTITIONS):
            part = [payload(id_) for id_ in ids if id_ % _PARTITIONS == number]
            await self._broker.put_all(part, number)


@pytest.fixture
async def broker(kafka_server: KafkaServer) -> AsyncIterator[Broker]:
    broker = Broker(kafka_server)
    await broker.create(partitions=_PARTITIONS)
    yield broker
    await broker.drop()


class TestForward(ForwardProof, GroupProof):
    @pytest.fixture
    def destination(self, broker: Broker) -> Destination:
        return _ToKafka(broker)


class TestReverse(ReverseProof):
    @pytest.fixture
    def origin(self, broker: Broker) -> Origin:
        return _FromKafka(broker)
