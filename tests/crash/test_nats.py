"""Fifty thousand events to and from JetStream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

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
from tests.integration.relay_surroundings import BOUND_S, NatsWorld, nats_world, until
from tests.servers.nats import NatsServer

_AT_ONCE = 500


class _JetStream:
    """A stream and its server, which keeps what it has acknowledged."""

    def __init__(self, stream: NatsWorld) -> None:
        self._stream = stream

    async def take_away(self, blow: Blow) -> None:
        await asyncio.to_thread(getattr(self._stream.server, blow))

    async def bring_back(self) -> None:
        await asyncio.to_thread(self._stream.server.start)

        async def is_connected() -> bool:
            return self._stream.client.is_connected

        await until(is_connected)


class ToJetStream(_JetStream, Destination):
    deduplicates = True

    def sink(self) -> Mapping[str, object]:
        return self._stream.sink()

    async def count(self) -> int:
        return await self._stream.count()

    async def events(self) -> Sequence[Arrived]:
        count = await self.count()
        found: list[Arrived] = []
        subscription = await self._stream.client.jetstream().subscribe(
            f"{self._stream.subject}>", ordered_consumer=True
        )
        async with asyncio.timeout(BOUND_S):
            while len(found) < count:
                found.append(arrived((await subscription.next_msg(timeout=BOUND_S)).data))
        await subscription.unsubscribe()
        return found


class _FromJetStream(_JetStream, Origin):
    def source(self) -> Mapping[str, object]:
        return self._stream.source(ack_wait_seconds=2)

    async def put(self, ids: Sequence[int]) -> None:
        stream = self._stream.client.jetstream(publish_async_max_pending=_AT_ONCE)
        kept = [
            await stream.publish_async(
                f"{self._stream.subject}in", payload(id_), headers={"Nats-Msg-Id": f"m{id_}"}
            )
            for id_ in ids
        ]
        await asyncio.gather(*kept)


@pytest.fixture
async def stream(nats_server: NatsServer) -> AsyncIterator[NatsWorld]:
    async with nats_world(nats_server, "fifty") as stream:
        yield stream


class TestForward(ForwardProof, GroupProof):
    @pytest.fixture
    def destination(self, stream: NatsWorld) -> Destination:
        return ToJetStream(stream)


class TestReverse(ReverseProof):
    @pytest.fixture
    def origin(self, stream: NatsWorld) -> Origin:
        return _FromJetStream(stream)
