"""Fifty thousand events to and from a durable queue of RabbitMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import aiormq
import pytest
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from tests.contract.rabbitmq_broker import Broker
from tests.crash.fifty_thousand import (
    BOUND_S,
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
from tests.servers.rabbitmq import RabbitServer

_AT_ONCE = 2_000


class _Queue:
    """A queue and its node, which keeps persistent messages that it has confirmed."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def take_away(self, blow: Blow) -> None:
        await asyncio.to_thread(getattr(self._broker.server, blow))

    async def bring_back(self) -> None:
        await asyncio.to_thread(self._broker.server.start)


class _ToRabbit(_Queue, Destination):
    """The queue can only be looked at by taking messages out, so those are kept here."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self._events: list[Arrived] = []

    def sink(self) -> Mapping[str, object]:
        return {
            "type": "rabbitmq",
            "url": self._broker.server.url,
            "exchange": self._broker.exchange,
        }

    async def count(self) -> int:
        return len(self._events) + await self._broker.depth()

    async def events(self) -> Sequence[Arrived]:
        count = await self.count()
        are_all = asyncio.Event()

        async def take(message: DeliveredMessage) -> None:
            # Kept first: one whose acknowledgement is lost comes again, and none goes missing.
            self._events.append(arrived(message.body))
            await message.channel.basic_ack(message.delivery_tag or 0)
            if len(self._events) >= count:
                are_all.set()

        if len(self._events) < count:
            async with aiormq.connect(self._broker.server.url) as connection:
                channel = await connection.channel()
                await channel.basic_qos(prefetch_count=_AT_ONCE)
                await channel.basic_consume(self._broker.queue, take)
                async with asyncio.timeout(BOUND_S):
                    await are_all.wait()
        return self._events


class _FromRabbit(_Queue, Origin):
    def source(self) -> Mapping[str, object]:
        return {
            "type": "rabbitmq",
            "url": self._broker.server.url,
            "queue": self._broker.queue,
        }

    async def put(self, ids: Sequence[int]) -> None:
        async with aiormq.connect(self._broker.server.url) as connection:
            channel = await connection.channel()
            for start in range(0, len(ids), _AT_ONCE):
                confirmed = await asyncio.gather(
                    *(
                        channel.basic_publish(
                            payload(id_),
                            routing_key=self._broker.queue,
                            mandatory=True,
                            wait=False,
                            properties=Basic.Properties(delivery_mode=2, message_id=f"m{id_}"),
                        )
                        for id_ in ids[start : start + _AT_ONCE]
                    )
                )
                assert all(isinstance(one, Basic.Ack) for one in confirmed)


@pytest.fixture
async def broker(rabbitmq_server: RabbitServer) -> AsyncIterator[Broker]:
    broker = Broker(rabbitmq_server, "fifty")
    await broker.make()
    yield broker
    await broker.drop()


class TestForward(ForwardProof, GroupProof):
    @pytest.fixture
    def destination(self, broker: Broker) -> Destination:
        return _ToRabbit(broker)


class TestReverse(ReverseProof):
    @pytest.fixture
    def origin(self, broker: Broker) -> Origin:
        return _FromRabbit(broker)
