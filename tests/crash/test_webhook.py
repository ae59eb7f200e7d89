"""Fifty thousand events to a webhook, and from senders that repeat what was not accepted."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import aiohttp
import msgspec
import pytest

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
from tests.integration.relay_surroundings import RelayWorld, until
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.http import HttpServer
from tests.servers.process import RelayProcess
from tests.servers.proxy import TcpProxy

Proxies = Callable[[str, int], Awaitable[TcpProxy]]

_PATH = "/orders"
_SENDERS = 8
_MESSAGES_PER_REQUEST = 50
_PAUSE_S = 0.02

_array = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _ToWebhook(Destination):
    """A receiver that keeps what it accepted, also where its answer did not arrive."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._events: list[Arrived] = []
        self._requests = 0

    def sink(self) -> Mapping[str, object]:
        return {"type": "webhook", "url": self._server.url}

    async def count(self) -> int:
        requests = self._server.accepted[self._requests :]
        self._requests += len(requests)
        for request in requests:
            self._events += [arrived(bytes(event)) for event in _array(request.body)]
        return len(self._events)

    async def events(self) -> Sequence[Arrived]:
        await self.count()
        return self._events

    async def take_away(self, blow: Blow) -> None:  # noqa: ARG002 - it can't end in order
        await self._server.stop()

    async def bring_back(self) -> None:
        await self._server.start()


class _FromWebhook(Origin):
    """Senders that go through a proxy, and repeat a request under its key until it gets a 200."""

    keeps = False

    def __init__(self, proxy: TcpProxy) -> None:
        self._proxy = proxy
        self._refused = 0

    def source(self) -> Mapping[str, object]:
        return {"type": "webhook", "listen_addr": f"{LOOPBACK}:{self._proxy.port}", "path": _PATH}

    async def put(self, ids: Sequence[int]) -> None:
        left = iter(ids)
        timeout = aiohttp.ClientTimeout(total=BOUND_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
            for _ in range(_SENDERS):
                tasks.create_task(self._send(session, left))

    async def take_away(self, blow: Blow) -> None:
        self._refused = 0
        if blow == "stop":
            await self._proxy.cut()
        else:
            # In the middle of an answer: nobody knows whether the request was accepted.
            self._proxy.cut_after(1, "to_client")
            await self._proxy.wait_until_cut(timeout_s=BOUND_S)

    async def bring_back(self) -> None:
        await self._proxy.restore()

    async def until_missed(
        self,
        world: RelayWorld,  # noqa: ARG002 - a receiver does not miss its senders
        relay: RelayProcess,  # noqa: ARG002
    ) -> None:
        async def is_refused() -> bool:
            return self._refused >= _SENDERS

        await until(is_refused, timeout_s=BOUND_S)

    async def _send(self, session: aiohttp.ClientSession, left: Iterator[int]) -> None:
        while part := list(itertools.islice(left, _MESSAGES_PER_REQUEST)):
            body = b"[%b]" % b",".join(map(payload, part))
            while not await self._is_accepted(session, f"m{part[0]}", body):
                self._refused += 1
                await asyncio.sleep(_PAUSE_S)

    async def _is_accepted(self, session: aiohttp.ClientSession, key: str, body: bytes) -> bool:
        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        url = f"http://{self._proxy.address}{_PATH}"
        try:
            async with session.post(url, data=body, headers=headers) as answer:
                await answer.read()
                return answer.status == 200
        except aiohttp.ClientError:
            return False


class TestForward(ForwardProof, GroupProof):
    @pytest.fixture
    def destination(self, http_server: HttpServer) -> Destination:
        return _ToWebhook(http_server)


class TestReverse(ReverseProof):
    @pytest.fixture
    async def origin(self, tcp_proxy: Proxies) -> Origin:
        return _FromWebhook(await tcp_proxy(LOOPBACK, free_port()))
