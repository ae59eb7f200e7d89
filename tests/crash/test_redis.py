"""Fifty thousand events to and from Redis Streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from tests.contract.redis_far_side import FarSide
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
from tests.servers.redis import RedisServer

STREAM = "fifty"


class _Stream:
    """A stream and its server, which syncs each write before it answers."""

    def __init__(self, far_side: FarSide) -> None:
        self._far_side = far_side

    async def take_away(self, blow: Blow) -> None:
        await asyncio.to_thread(getattr(self._far_side.server, blow))

    async def bring_back(self) -> None:
        await asyncio.to_thread(self._far_side.server.start)


class _ToRedis(_Stream, Destination):
    def sink(self) -> Mapping[str, object]:
        return {"type": "redis", "url": self._far_side.server.url, "stream_key": STREAM}

    async def count(self) -> int:
        return int(str(await self._far_side.ask("XLEN", STREAM)))

    async def events(self) -> Sequence[Arrived]:
        return [arrived(fields[b"payload"]) for _, fields in await self._far_side.entries()]


class _FromRedis(_Stream, Origin):
    def source(self) -> Mapping[str, object]:
        return {"type": "redis", "url": self._far_side.server.url, "stream_key": STREAM}

    async def put(self, ids: Sequence[int]) -> None:
        await self._far_side.put_all({"payload": payload(id_)} for id_ in ids)


@pytest.fixture
async def far_side(redis_server: RedisServer) -> AsyncIterator[FarSide]:
    far_side = FarSide(redis_server, STREAM)
    await far_side.drop()
    yield far_side
    await far_side.drop()


class TestForward(ForwardProof):
    @pytest.fixture
    def destination(self, far_side: FarSide) -> Destination:
        return _ToRedis(far_side)


class TestReverse(ReverseProof):
    @pytest.fixture
    def origin(self, far_side: FarSide) -> Origin:
        return _FromRedis(far_side)
