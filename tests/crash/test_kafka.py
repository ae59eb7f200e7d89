"""Fifty thousand events to and from Kafka, over several partitions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from tests.contract.kafka_far_side import FarSide
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

    def __init__(self, far_side: FarSide) -> None:
        self._far_side = far_side

    @property
    def _place(self) -> Mapping[str, object]:
        return {
            "type": "kafka",
            "brokers": self._far_side.server.brokers,
            "topic": self._far_side.topic,
        }

    async def take_away(self, blow: Blow) -> None:
        await asyncio.to_thread(getattr(self._far_side.server, blow))

    async def bring_back(self) -> None:
        await asyncio.to_thread(self._far_side.server.start)


class _ToKafka(_Topic, Destination):
    def sink(self) -> Mapping[str, object]:
        return {**self._place, "key_template": "{key}"}

    async def count(self) -> int:
        return sum((await self._far_side.ends()).values())

    async def events(self) -> Sequence[Arrived]:
        return [arrived(bytes(record.value)) for record in await self._far_side.records()]


class _FromKafka(_Topic, Origin):
    def source(self) -> Mapping[str, object]:
        return self._place

    async def put(self, ids: Sequence[int]) -> None:
        for number in range(_PARTITIONS):
            part = [payload(id_) for id_ in ids if id_ % _PARTITIONS == number]
            await self._far_side.put_all(part, number)


@pytest.fixture
async def far_side(kafka_server: KafkaServer) -> AsyncIterator[FarSide]:
    far_side = FarSide(kafka_server)
    await far_side.create(partitions=_PARTITIONS)
    yield far_side
    await far_side.drop()


class TestForward(ForwardProof, GroupProof):
    @pytest.fixture
    def destination(self, far_side: FarSide) -> Destination:
        return _ToKafka(far_side)


class TestReverse(ReverseProof):
    @pytest.fixture
    def origin(self, far_side: FarSide) -> Origin:
        return _FromKafka(far_side)
