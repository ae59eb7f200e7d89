"""Thousands of events to and from SQS; a server with its queues in memory is cut off instead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import pytest

from tests.contract.sqs_broker import Broker, broker_of
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
from tests.servers.proxy import TcpProxy
from tests.servers.sqs import SqsServer

Proxies = Callable[[str, int], Awaitable[TcpProxy]]

# The tests' server takes some 1,500 events a second and gives away some 400: fifty thousand would
# take many minutes.
_EVENTS = 1_500
_PER_CALL = 10
# While there is work, answers come more often than that.
_ANSWER_S = 2.0
# How long the server keeps to an approximate count.
_COUNT_AGE_S = 0.05
# What a killed relay had received comes back after so long.
_VISIBILITY_S = 5


class _Queue:
    """A queue, which the relay reaches through a proxy."""

    event_count = _EVENTS

    def __init__(self, broker: Broker, proxy: TcpProxy) -> None:
        self._broker = broker
        self._proxy = proxy

    @property
    def _place(self) -> Mapping[str, object]:
        return {
            "type": "sqs",
            "queue_url": self._broker.through(self._proxy),
            "region": self._broker.server.region,
        }

    async def take_away(self, blow: Blow) -> None:
        if blow == "stop":
            await self._proxy.cut()
        else:
            # In the middle of an answer: nobody knows whether the request was accepted.
            self._proxy.cut_after(1, "to_client")
            try:
                await self._proxy.wait_until_cut(timeout_s=_ANSWER_S)
            except TimeoutError:
                # All was through: nobody asks any more.
                await self._proxy.cut()

    async def bring_back(self) -> None:
        await self._proxy.restore()


class _ToSqs(_Queue, Destination):
    """A FIFO queue, which keeps the order of each key and stores a repetition once."""

    deduplicates = True

    def __init__(self, broker: Broker, proxy: TcpProxy) -> None:
        super().__init__(broker, proxy)
        self._taken = 0

    def sink(self) -> Mapping[str, object]:
        return {**self._place, "message_group_id": "{key}"}

    async def count(self) -> int:
        # What the server said last may be older than the last event.
        await asyncio.sleep(_COUNT_AGE_S)
        return self._taken + int(await self._broker.attribute("ApproximateNumberOfMessages"))

    async def events(self) -> Sequence[Arrived]:
        found = await self._broker.take()
        self._taken = len(found)
        return [arrived(one["Body"].encode()) for one in found]


class _FromSqs(_Queue, Origin):
    def source(self) -> Mapping[str, object]:
        return {**self._place, "visibility_timeout": _VISIBILITY_S, "wait_time_seconds": 1}

    async def put(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), _PER_CALL):
            entries = [
                {"Id": str(id_), "MessageBody": payload(id_).decode()}
                for id_ in ids[start : start + _PER_CALL]
            ]
            answer = await self._broker.ask("send_message_batch", Entries=entries)
            assert not answer.get("Failed")


@pytest.fixture
async def proxy(
    sqs_server: SqsServer, tcp_proxy: Proxies, monkeypatch: pytest.MonkeyPatch
) -> TcpProxy:
    # The relay's processes find their credentials where AWS puts them.
    for name, secret in sqs_server.keys.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", secret)
    return await tcp_proxy(*sqs_server.address)


class TestForward(ForwardProof, GroupProof):
    @pytest.fixture
    async def destination(
        self, sqs_server: SqsServer, proxy: TcpProxy
    ) -> AsyncIterator[Destination]:
        async with broker_of(sqs_server, is_fifo=True) as broker:
            yield _ToSqs(broker, proxy)


class TestReverse(ReverseProof):
    @pytest.fixture
    async def origin(self, sqs_server: SqsServer, proxy: TcpProxy) -> AsyncIterator[Origin]:
        async with broker_of(sqs_server) as broker:
            yield _FromSqs(broker, proxy)
