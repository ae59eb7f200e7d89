"""What `sinks` and `sources` need to know of each backend: one module a backend.

A module has a class for each direction, listed below, whose ``opened`` starts the server with its
ordinary settings, on the loopback, and stops it in the end. To add a backend, write the module and
list its classes; the rows ``to-<name>`` and ``from-<name>`` and their tests are there then.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol, cast

import msgspec

from scripts.benchmark.surroundings import Surroundings

SINKS: Final[Mapping[str, str]] = {
    "redis": "redis:ToRedis",
    "kafka": "kafka:ToKafka",
    "rabbitmq": "rabbitmq:ToRabbit",
    "sqs": "sqs:ToSqs",
    "webhook": "webhook:ToWebhook",
    "webhook-each": "webhook:ToWebhookEach",
    "inbox": "inbox:ToInbox",
    "file": "files:ToFile",
}
SOURCES: Final[Mapping[str, str]] = {
    "nats": "nats:FromNats",
    "redis": "redis:FromRedis",
    "kafka": "kafka:FromKafka",
    "rabbitmq": "rabbitmq:FromRabbit",
    "sqs": "sqs:FromSqs",
    "webhook": "webhook:FromWebhook",
    "webhook-each": "webhook:FromWebhookEach",
    "file": "files:FromFile",
}

_LOOK_S: Final = 0.01


class ServerMissing(Exception):
    """A row can't be measured here; the message says what to install."""


class Stretch(msgspec.Struct, frozen=True):
    """So many messages arrived within so many seconds, all of them behind the first ones."""

    messages: int
    seconds: float

    @property
    def per_s(self) -> float:
        """Messages a second."""
        return self.messages / max(self.seconds, 1e-6)


class Destination(Protocol):
    """Where a sink writes to, looked at past the relay.

    ``most_events``: how many a run has at most, where the server is too slow for more.
    """

    most_events: int | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that the relay finds its secrets in."""
        return {}

    def sink(self) -> Mapping[str, object]:
        """The sink of the pipeline; asked after each `empty`."""
        ...

    async def empty(self) -> None:
        """Make it empty, and forget what was read of it."""
        ...

    async def until_holding(self, messages: int, timeout_s: float) -> Stretch:
        """Wait for so many, by the destination's own clock where it has one, else by `observed`.

        Raises `TimeoutError`.
        """
        ...

    async def read(self) -> set[str]:
        """Read everything that is there, and keep it for `floor`; the different dedup keys."""
        ...

    async def floor(self) -> float:
        """Messages a second of a bare client that sends the very bytes of `read` to the server.

        Every acknowledgement is counted, and so is what the server holds afterwards; nothing is
        read from PostgreSQL. Raises `RuntimeError` where something is missing.
        """
        ...

    async def protocol_floor(self) -> float | None:
        """The same past the client library, where `floor` is the library's; told, not judged."""
        return None


class Origin(Protocol):
    """Where a source reads from, filled past the relay.

    ``most_events``: how many a run has at most, where the server is too slow for more.
    """

    most_events: int | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that the relay finds its secrets in."""
        return {}

    def source(self) -> Mapping[str, object]:
        """The source of the pipeline; asked after each `fill`."""
        ...

    async def fill(self, messages: int) -> None:
        """Make it hold exactly the messages of `payload` from 0 on, none of them read before."""
        ...

    async def send(self) -> None:
        """Called while the pipeline runs: for what can't be stored beforehand."""

    async def floor(self) -> float:
        """Messages a second of a bare client that reads and acknowledges the very same messages.

        Nothing is done with them. Raises `RuntimeError` where something is missing.
        """
        ...

    async def protocol_floor(self) -> float | None:
        """The same past the library, where `floor` is the library's; told, not judged."""
        return None


class _Sink(Protocol):
    """A class of `SINKS`. ``title``: for people, as in "100,000 outbox events to Redis"."""

    title: str
    most_events: int | None

    @classmethod
    def opened(cls, around: Surroundings) -> AbstractAsyncContextManager[Destination]:
        """The server, ready. Raises `ServerMissing`."""
        ...


class _Source(Protocol):
    """A class of `SOURCES`. Targets in messages a second, on top of half of the floor."""

    title: str
    most_events: int | None
    target_per_s: float | None
    hard_bar_per_s: float | None

    @classmethod
    def opened(cls, around: Surroundings) -> AbstractAsyncContextManager[Origin]:
        """The server, ready. Raises `ServerMissing`."""
        ...


def sink_backend(name: str) -> type[_Sink]:
    """The class behind ``to-<name>``."""
    return cast("type[_Sink]", _found(SINKS[name]))


def source_backend(name: str) -> type[_Source]:
    """The class behind ``from-<name>``."""
    return cast("type[_Source]", _found(SOURCES[name]))


def at_most(events: int, most: int | None) -> int:
    """So many events, or the ``most_events`` of a backend where those are fewer."""
    return events if most is None else min(events, most)


def payload(number: int) -> bytes:
    """The JSON of a message, about 200 bytes."""
    return (
        b'{"id":%d,"customer":"customer 17","total":12.95,"status":"new",'
        b'"placed_at":"2026-01-01T12:00:00.000000+00:00","note":"leave it with the neighbour on'
        b' the left, who is at home in the mornings; ring twice"}' % number
    )


async def observed(count: Callable[[], Awaitable[int]], messages: int, timeout_s: float) -> Stretch:
    """The stretch from the first look that finds something to the one that finds everything.

    Raises `TimeoutError`.
    """
    deadline = time.perf_counter() + timeout_s
    asked_at = time.perf_counter()
    first: tuple[int, float] | None = None
    while True:
        held, now = await count(), time.perf_counter()
        if held and first is None:
            # What is there already arrived since the last look, and is not counted.
            first = (held, now) if held < messages else (0, asked_at)
        if held >= messages and first is not None:
            return Stretch(held - first[0], now - first[1])
        if now > deadline:
            raise TimeoutError(f"{held} of {messages} messages arrived")
        asked_at = now
        await asyncio.sleep(_LOOK_S)


def _found(place: str) -> object:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
