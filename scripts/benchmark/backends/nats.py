"""JetStream on file storage; the row of its sink is `forward`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping

from scripts.benchmark.backends import Origin, payload
from scripts.benchmark.bare_nats import StoredMessage, connected
from scripts.benchmark.floor import WINDOW
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
            self._around.servers.nats_url, self._around.servers.nats_token
        ) as nats:
            await nats.publish_all([message(number) for number in range(messages)], WINDOW)

    async def floor(self) -> float:
        async with connected(
            self._around.servers.nats_url, self._around.servers.nats_token
        ) as nats:
            started = time.perf_counter()
            await nats.acknowledge_all(STREAM, self._messages)
            return self._messages / (time.perf_counter() - started)


def nats_source(around: Surroundings) -> Mapping[str, object]:
    """The source of a pipeline from the stream."""
    return {
        "type": "nats",
        "url": around.servers.nats_url,
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
