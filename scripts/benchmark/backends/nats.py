"""JetStream on file storage; the row of its sink is `forward`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping

from nats.aio.client import Client
from nats.aio.msg import Msg

from scripts.benchmark.backends import Origin, payload
from scripts.benchmark.bare_nats import PULL_MESSAGES, SILENCE_S, StoredMessage, connected
from scripts.benchmark.floor import WINDOW, client_of
from scripts.benchmark.surroundings import NATS_TOKEN, STREAM, Surroundings


class FromNats(Origin):
    """`from-nats`."""

    title = "JetStream"
    target_per_s: float | None = None
    hard_bar_per_s: float | None = None

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._messages = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, around: Surroundings) -> AsyncIterator[Origin]:
        """Part of the protocol."""
        yield cls(around)

    def source(self) -> Mapping[str, object]:
        return nats_source(self._around)

    async def fill(self, messages: int) -> None:
        self._messages = messages
        await self._around.fresh_stream()
        async with connected(
            self._around.servers.nats.url, self._around.servers.nats.token
        ) as nats:
            await nats.publish_all([message(number) for number in range(messages)], WINDOW)

    async def floor(self) -> float:
        """nats-py in bulk: requests ahead, one subscription, an acknowledgement each."""
        async with client_of(self._around) as client:
            started = time.perf_counter()
            await acknowledge_all(client, self._messages)
            return self._messages / (time.perf_counter() - started)

    async def protocol_floor(self) -> float | None:
        async with connected(
            self._around.servers.nats.url, self._around.servers.nats.token
        ) as nats:
            started = time.perf_counter()
            await nats.acknowledge_all(STREAM, self._messages)
            return self._messages / (time.perf_counter() - started)


async def acknowledge_all(client: Client, messages: int) -> None:
    """Read so many messages and acknowledge each; returns when the server has counted them."""
    manager, done = client.jsm(), asyncio.Event()
    inbox, acknowledged = client.new_inbox(), 0
    request = b'{"batch":%d}' % PULL_MESSAGES

    async def acknowledge(message: Msg) -> None:
        nonlocal acknowledged
        await message.ack()
        acknowledged += 1
        if acknowledged % PULL_MESSAGES == 0:
            await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.floor", request, reply=inbox)
        if acknowledged >= messages:
            done.set()

    await manager.add_consumer(STREAM, durable_name="floor", max_ack_pending=-1)
    await client.subscribe(inbox, cb=acknowledge, pending_msgs_limit=0, pending_bytes_limit=0)
    async with asyncio.timeout(SILENCE_S + messages / 1000):
        for _ in range(2):
            await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.floor", request, reply=inbox)
        await done.wait()
        while (await manager.consumer_info(STREAM, "floor")).num_ack_pending:
            continue


def nats_source(around: Surroundings) -> Mapping[str, object]:
    """The source of a pipeline from the stream."""
    return {
        "type": "nats",
        "url": around.servers.nats.url,
        "token": f"${{env:{NATS_TOKEN}}}",
        "stream": STREAM,
        "subject": f"{STREAM}.>",
    }


def message(number: int) -> StoredMessage:
    """One message as it is published, with an id of its own."""
    return StoredMessage(
        subject=f"{STREAM}.in".encode(),
        block=b"NATS/1.0\r\nNats-Msg-Id: m%d\r\n\r\n" % number,
        body=payload(number),
    )
