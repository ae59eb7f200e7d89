"""The floor under `forward`: the same messages to the same server, with nothing around them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg

from scripts.benchmark.bare_nats import SILENCE_S, StoredMessage, connected
from scripts.benchmark.surroundings import STREAM, Surroundings

# As many as the relay's sink keeps in flight by default.
WINDOW: Final = 4096

Publish = Callable[[Surroundings, Sequence[StoredMessage]], Awaitable[None]]


async def floor_rate(around: Surroundings, messages: Sequence[StoredMessage]) -> float:
    """Messages a second of nats-py's client in bulk, every acknowledgement counted.

    Nothing is read from PostgreSQL and no message waits for another. Raises `RuntimeError` where
    the stream does not hold all of them in the end.
    """
    return await _rate(around, messages, _publish_by_client)


async def protocol_rate(around: Surroundings, messages: Sequence[StoredMessage]) -> float:
    """The same past the library, with lines of the protocol: told, not judged."""
    return await _rate(around, messages, _publish_bare)


@contextlib.asynccontextmanager
async def client_of(around: Surroundings) -> AsyncIterator[Client]:
    """An open connection of nats-py, closed at the end."""
    client = Client()
    await client.connect(
        around.servers.nats.url, token=around.servers.nats.token, allow_reconnect=False
    )
    try:
        yield client
    finally:
        await client.close()


async def _rate(around: Surroundings, messages: Sequence[StoredMessage], publish: Publish) -> float:
    await around.fresh_stream()
    started = time.perf_counter()
    await publish(around, messages)
    elapsed_s = time.perf_counter() - started
    stored = (await around.nats.state_of(STREAM)).messages
    if stored != len(messages):
        raise RuntimeError(f"{len(messages)} messages were acknowledged and {stored} stored")
    return len(messages) / elapsed_s


async def _publish_by_client(around: Surroundings, messages: Sequence[StoredMessage]) -> None:
    """One reply subject and one subscription for all acknowledgements."""
    room = asyncio.Semaphore(WINDOW)

    async def count(acknowledgement: Msg) -> None:
        if b'"error"' in acknowledgement.data or not acknowledgement.data:
            raise RuntimeError(f"the server refuses: {acknowledgement.data[:300]!r}")
        room.release()

    async with client_of(around) as client, asyncio.timeout(SILENCE_S + len(messages) / 1000):
        inbox = client.new_inbox()
        await client.subscribe(inbox, cb=count)
        for message in messages:
            await room.acquire()
            await client.publish(
                message.subject.decode(), message.body, reply=inbox, headers=message.headers()
            )
        for _ in range(WINDOW):
            await room.acquire()


async def _publish_bare(around: Surroundings, messages: Sequence[StoredMessage]) -> None:
    async with connected(around.servers.nats.url, around.servers.nats.token) as nats:
        await nats.publish_all(messages, WINDOW)
