"""Webhooks: to a receiver that only answers, and from a client that only posts.

Either in arrays, or one event a request (`…-each`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import ClassVar, Final

import httpx
import msgspec

from relay.demo.embedded import LOOPBACK
from scripts.benchmark.backends import Destination, Origin, Stretch, observed, payload
from scripts.benchmark.bare_aiohttp import aiohttp_receiver, requests_at
from scripts.benchmark.bare_http import Receiver, post_all, receiver, request
from scripts.benchmark.server import free_port, until_accepting
from scripts.benchmark.surroundings import Surroundings

# As many requests as the sink has in flight by default where each event has its own.
SINK_CONNECTIONS: Final = 16
# Senders that wait for the commit of their request before they send the next.
SOURCE_CONNECTIONS: Final = 64
MESSAGES_PER_ARRAY: Final = 100

_START_TIMEOUT_S: Final = 30.0
_SILENCE_S: Final = 30.0


class _Event(msgspec.Struct, frozen=True):
    dedup_key: str


class ToWebhook(Destination):
    """`to-webhook`: arrays, one after the other, as the sink sends them by default."""

    title = "a webhook in arrays"
    is_batched: ClassVar[bool] = True

    def __init__(self, destination: Receiver) -> None:
        self._destination = destination
        self._bodies: Sequence[bytes] = ()
        self._events = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Destination]:
        """Part of the protocol."""
        async with receiver() as destination:
            yield cls(destination)

    def sink(self) -> Mapping[str, object]:
        return {"type": "webhook", "url": self._destination.url, "batch_mode": self.is_batched}

    async def empty(self) -> None:
        await self._destination.empty()
        self._bodies = ()

    async def until_holding(self, messages: int, timeout_s: float) -> Stretch:
        async def count() -> int:
            return (await self._destination.received()).envelopes

        looked = await observed(count, messages, timeout_s)
        received = await self._destination.received()
        if received.requests < 2:
            return looked
        # What came with the first request came before the stretch begins.
        behind = messages - messages // received.requests
        return Stretch(behind, received.last_at - received.first_at)

    async def read(self) -> set[str]:
        self._bodies = await self._destination.bodies()
        events = [event for body in self._bodies for event in _events(body)]
        self._events = len(events)
        return {event.dedup_key for event in events}

    async def floor(self) -> float:
        await self._destination.empty()
        port = self._destination.port
        requests = [
            request(port, "/events", str(number), body) for number, body in enumerate(self._bodies)
        ]
        elapsed_s = await post_all(port, requests, 1 if self.is_batched else SINK_CONNECTIONS)
        if (await self._destination.received()).envelopes != self._events:
            raise RuntimeError("the receiver does not have what it acknowledged")
        return self._events / elapsed_s


class ToWebhookEach(ToWebhook):
    """`to-webhook-each`: a request for each event. The floor is bare httpx."""

    title = "a webhook, a request each"
    is_batched = False

    async def floor(self) -> float:
        await self._destination.empty()
        waiting = iter(enumerate(self._bodies))

        async def post() -> None:
            # A pool of several connections looks through all of them at each request.
            async with httpx.AsyncClient(trust_env=False, timeout=_SILENCE_S) as client:
                for number, body in waiting:
                    headers = {"Content-Type": "application/json", "Idempotency-Key": str(number)}
                    answer = await client.post(self._destination.url, content=body, headers=headers)
                    answer.raise_for_status()

        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(SINK_CONNECTIONS):
                tasks.create_task(post())
        elapsed_s = time.perf_counter() - started
        if (await self._destination.received()).envelopes != self._events:
            raise RuntimeError("the receiver does not have what it acknowledged")
        return self._events / elapsed_s

    async def protocol_floor(self) -> float:
        return await super().floor()


class FromWebhook(Origin):
    """`from-webhook`: arrays of a hundred."""

    title = "a webhook in arrays"
    target_per_s: float | None = None
    hard_bar_per_s: float | None = None
    messages_per_request: ClassVar[int] = MESSAGES_PER_ARRAY

    def __init__(self, destination: Receiver) -> None:
        self._destination = destination
        self._port = free_port()
        self._messages = 0
        self._runs = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Origin]:
        """Part of the protocol."""
        async with receiver() as destination:
            yield cls(destination)

    def source(self) -> Mapping[str, object]:
        return {
            "type": "webhook",
            "listen_addr": f"{LOOPBACK}:{self._port}",
            "path": f"/events/{self._runs}",
        }

    async def fill(self, messages: int) -> None:
        self._messages = messages
        self._runs += 1
        self._port = free_port()

    async def send(self) -> None:
        async with asyncio.timeout(_START_TIMEOUT_S):
            await until_accepting(self._port)
        await post_all(self._port, self._requests(self._port), SOURCE_CONNECTIONS)

    async def floor(self) -> float:
        await self._destination.empty()
        requests = self._requests(self._destination.port)
        elapsed_s = await post_all(self._destination.port, requests, SOURCE_CONNECTIONS)
        if (await self._destination.received()).requests != len(requests):
            raise RuntimeError("the receiver does not have what it acknowledged")
        return self._messages / elapsed_s

    def _requests(self, port: int) -> Sequence[bytes]:
        size = self.messages_per_request
        path = f"/events/{self._runs}"
        numbers = iter(range(self._messages))
        if size == 1:
            return [request(port, path, f"m{number}", payload(number)) for number in numbers]
        return [
            request(port, path, f"m{part[0]}", b"[%b]" % b",".join(map(payload, part)))
            for part in iter(lambda: list(itertools.islice(numbers, size)), [])
        ]


class FromWebhookEach(FromWebhook):
    """`from-webhook-each`: a request for each message. The floor is bare aiohttp."""

    title = "a webhook, a request each"
    messages_per_request = 1

    async def floor(self) -> float:
        async with aiohttp_receiver() as port:
            elapsed_s = await post_all(port, self._requests(port), SOURCE_CONNECTIONS)
            if await requests_at(port) != self._messages:
                raise RuntimeError("the receiver does not have what it acknowledged")
        return self._messages / elapsed_s

    async def protocol_floor(self) -> float:
        return await super().floor()


def _events(body: bytes) -> Sequence[_Event]:
    if body.startswith(b"["):
        return msgspec.json.decode(body, type=list[_Event])
    return [msgspec.json.decode(body, type=_Event)]
