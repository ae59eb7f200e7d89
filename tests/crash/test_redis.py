"""Fifty thousand events to and from Redis Streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from tests.contract.redis_broker import Broker
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
from tests.servers.redis import RedisServer

STREAM = "fifty"


class _Stream:
    """A stream and its server, which syncs each write before it answers."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def take_away(self, blow: Blow) -> None:
        await asyncio.to_thread(getattr(self._broker.server, blow))

    async def bring_back(self) -> None:
        await asyncio.to_thread(self._broker.server.start)


class _ToRedis(_Stream, Destination):
    def sink(self) -> Mapping[str, object]:
        return {"type": "redis", "url": self._broker.server.url, "stream_key": STREAM}

    async def count(self) -> int:
        return int(str(await self._broker.ask("XLEN", STREAM)))

    async def events(self) -> Sequence[Arrived]:
        return [arrived(fields[b"payload"]) for _, fields in await self._broker.entries()]


class _FromRedis(_Stream, Origin):
    def source(self) -> Mapping[str, object]:
        return {"type": "redis", "url": self._broker.server.url, "stream_key": STREAM}

    async def put(self, ids: Sequence[int]) -> None:
        await self._broker.put_all({"payload": payload(id_)} for id_ in ids)


@pytest.fixture
async def broker(redis_server: RedisServer) -> AsyncIterator[Broker]:
    broker = Broker(redis_server, STREAM)
    await broker.drop()
    yield broker
    await broker.drop()


class TestForward(ForwardProof, GroupProof):
    @pytest.fixture
    def destination(self, broker: Broker) -> Destination:
        return _ToRedis(broker)


class TestReverse(ReverseProof):
    @pytest.fixture
    def origin(self, broker: Broker) -> Origin:
        return _FromRedis(broker)
