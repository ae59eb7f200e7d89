"""Redis Streams, by the distribution's server with an append-only file synced each second."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from redis.asyncio import Redis

from relay.demo.embedded import LOOPBACK
from scripts.benchmark.backends import (
    Destination,
    Origin,
    ServerMissing,
    Stretch,
    observed,
    payload,
)
from scripts.benchmark.server import free_port, running_server
from scripts.benchmark.surroundings import Surroundings

STREAM: Final = "bench"

_GROUP: Final = "floor"
_CHUNK: Final = 1_000
_PAGE: Final = 5_000

Fields = dict[bytes, bytes]
Entry = tuple[bytes, list[bytes]]


@contextlib.asynccontextmanager
async def _stream() -> AsyncIterator[_Stream]:
    """The stream of a server of our own."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise ServerMissing("redis-server is missing: apt-get install redis-server")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-redis-") as directory:
        settings = ("--bind", LOOPBACK, "--port", str(port), "--appendonly", "yes", "--save", "")
        async with running_server([binary, *settings], Path(directory), port):
            url = f"redis://{LOOPBACK}:{port}"
            async with Redis.from_url(url, protocol=2) as client:
                yield _Stream(url, client)


class _Stream:
    """The stream, looked at through the client library's own commands and pipelines."""

    def __init__(self, url: str, client: Redis) -> None:
        self.url = url
        self._client = client

    async def drop(self) -> None:
        await self._client.delete(STREAM)

    async def count(self) -> int:
        return msgspec.convert(await self._client.xlen(STREAM), int)

    async def first_and_last_at(self) -> tuple[float, float]:
        """When the first and the last entry were added, by the server's clock, in seconds."""
        first = await self._client.xrange(STREAM, count=1)
        last = await self._client.xrevrange(STREAM, count=1)
        return _added_at(first[0][0]), _added_at(last[0][0])

    async def fields(self) -> list[Fields]:
        """The fields of every entry, in order."""
        found: list[Fields] = []
        start = "-"
        while page := await self._client.xrange(STREAM, min=start, count=_PAGE):
            found += [fields for _, fields in page]
            start = f"({page[-1][0].decode()}"
        return found

    async def add(self, entries: Sequence[Fields]) -> float:
        """Add all, a pipeline at a time; how long that took, in seconds."""
        left = iter(entries)
        started = time.perf_counter()
        while part := list(itertools.islice(left, _CHUNK)):
            pipeline = self._client.pipeline(transaction=False)
            for fields in part:
                pipeline.xadd(STREAM, fields)
            if len(await pipeline.execute()) != len(part):
                raise RuntimeError("an answer is missing")
        return time.perf_counter() - started

    async def read_all(self, messages: int) -> float:
        """Read and acknowledge all as a group of their own; how long that took, in seconds."""
        await self._client.xgroup_create(STREAM, _GROUP, id="0")
        seen = acknowledged = 0
        started = time.perf_counter()
        found = await self._client.xreadgroup(_GROUP, "bare", {STREAM: ">"}, count=_CHUNK)
        while found:
            [(_, entries)] = found
            seen += len(entries)
            # The next entries are in flight while these are acknowledged.
            pipeline = self._client.pipeline(transaction=False)
            pipeline.xack(STREAM, _GROUP, *(id_ for id_, _ in entries))
            pipeline.xreadgroup(_GROUP, "bare", {STREAM: ">"}, count=_CHUNK)
            settled, found = await pipeline.execute()
            acknowledged += settled
        elapsed_s = time.perf_counter() - started
        if not seen == acknowledged == messages:
            raise RuntimeError(f"{seen} read and {acknowledged} acknowledged of {messages}")
        return elapsed_s


class ToRedis(Destination):
    """`to-redis`."""

    title = "Redis"

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._entries: list[Fields] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Destination]:
        """Part of the protocol."""
        async with _stream() as stream:
            yield cls(stream)

    def sink(self) -> Mapping[str, object]:
        return {"type": "redis", "url": self._stream.url, "stream_key": STREAM}

    async def empty(self) -> None:
        await self._stream.drop()
        self._entries = []

    async def until_holding(self, messages: int, timeout_s: float) -> Stretch:
        await observed(self._stream.count, messages, timeout_s)
        first, last = await self._stream.first_and_last_at()
        return Stretch(messages, last - first)

    async def read(self) -> set[str]:
        self._entries = await self._stream.fields()
        return {fields[b"pgt_dedup_key"].decode() for fields in self._entries}

    async def floor(self) -> float:
        await self._stream.drop()
        elapsed_s = await self._stream.add(self._entries)
        if await self._stream.count() != len(self._entries):
            raise RuntimeError("the stream does not hold what it acknowledged")
        return len(self._entries) / elapsed_s


class FromRedis(Origin):
    """`from-redis`."""

    title = "Redis"
    target_per_s: float | None = None
    hard_bar_per_s: float | None = None

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._messages = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Origin]:
        """Part of the protocol."""
        async with _stream() as stream:
            yield cls(stream)

    def source(self) -> Mapping[str, object]:
        return {"type": "redis", "url": self._stream.url, "stream_key": STREAM}

    async def fill(self, messages: int) -> None:
        await self._stream.drop()
        await self._stream.add([{b"payload": payload(number)} for number in range(messages)])
        self._messages = messages

    async def floor(self) -> float:
        return self._messages / await self._stream.read_all(self._messages)


def _added_at(id_: bytes) -> float:
    """The time in an entry's id, in seconds."""
    return int(id_.partition(b"-")[0]) / 1000
