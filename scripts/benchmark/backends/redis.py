"""Redis Streams, by the distribution's server with an append-only file synced each second."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import hiredis
import msgspec

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

_STREAM: Final = STREAM.encode()
_GROUP: Final = b"floor"
_CHUNK: Final = 1_000
_PAGE: Final = 5_000
_SILENCE_S: Final = 30.0
_READ_BYTES: Final = 1 << 20

Fields = Sequence[bytes]
Entry = tuple[bytes, list[bytes]]


@contextlib.asynccontextmanager
async def _server() -> AsyncIterator[int]:
    """The port of a server of our own."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise ServerMissing("redis-server is missing: apt-get install redis-server")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-redis-") as directory:
        settings = ("--bind", LOOPBACK, "--port", str(port), "--appendonly", "yes", "--save", "")
        async with running_server([binary, *settings], Path(directory), port):
            yield port


class _Stream:
    """The stream, looked at over a connection of our own."""

    def __init__(self, port: int, bare: _Bare) -> None:
        self._port = port
        self._bare = bare

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self._port}"

    async def drop(self) -> None:
        await self._ask(b"DEL", _STREAM)

    async def count(self) -> int:
        return msgspec.convert(await self._ask(b"XLEN", _STREAM), int)

    async def first_and_last_at(self) -> tuple[float, float]:
        """When the first and the last entry were added, by the server's clock, in seconds."""
        first = await self._entries(b"XRANGE", _STREAM, b"-", b"+", b"COUNT", b"1")
        last = await self._entries(b"XREVRANGE", _STREAM, b"+", b"-", b"COUNT", b"1")
        return _added_at(first[0][0]), _added_at(last[0][0])

    async def fields(self) -> list[Fields]:
        """The fields of every entry, in order."""
        found: list[Fields] = []
        start = b"-"
        while page := await self._entries(
            *(b"XRANGE", _STREAM, start, b"+", b"COUNT", b"%d" % _PAGE)
        ):
            found += [fields for _, fields in page]
            start = b"(" + page[-1][0]
        return found

    async def add(self, entries: Sequence[Fields]) -> float:
        """Add all over a bare connection, every answer counted; how long that took, in seconds."""
        commands = [_packed(b"XADD", _STREAM, b"*", *fields) for fields in entries]
        started = time.perf_counter()
        await self._bare.ask_all(commands)
        return time.perf_counter() - started

    async def read_all(self, messages: int) -> float:
        """Read and acknowledge all as a group of their own; how long that took, in seconds."""
        await self._ask(b"XGROUP", b"CREATE", _STREAM, _GROUP, b"0")
        read = _packed(
            *(b"XREADGROUP", b"GROUP", _GROUP, b"bare", b"COUNT", b"%d" % _CHUNK),
            *(b"STREAMS", _STREAM, b">"),
        )
        seen = acknowledged = 0
        started = time.perf_counter()
        [reply] = await self._bare.ask([read])
        while reply:
            [(_, entries)] = msgspec.convert(reply, list[tuple[bytes, list[Entry]]])
            seen += len(entries)
            ids = [id_ for id_, _ in entries]
            # The next entries are under way while these are acknowledged.
            settled, reply = await self._bare.ask([_packed(b"XACK", _STREAM, _GROUP, *ids), read])
            acknowledged += msgspec.convert(settled, int)
        elapsed_s = time.perf_counter() - started
        if not seen == acknowledged == messages:
            raise RuntimeError(f"{seen} read and {acknowledged} acknowledged of {messages}")
        return elapsed_s

    async def _ask(self, *parts: bytes) -> object:
        [answer] = await self._bare.ask([_packed(*parts)])
        return answer

    async def _entries(self, *parts: bytes) -> list[Entry]:
        return msgspec.convert(await self._ask(*parts), list[Entry])


@contextlib.asynccontextmanager
async def _stream() -> AsyncIterator[_Stream]:
    async with _server() as port, _bare(port) as bare:
        yield _Stream(port, bare)


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
        key = b"pgt_dedup_key"
        return {fields[fields.index(key) + 1].decode() for fields in self._entries}

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
        await self._stream.add([(b"payload", payload(number)) for number in range(messages)])
        self._messages = messages

    async def floor(self) -> float:
        return self._messages / await self._stream.read_all(self._messages)


class _Bare:
    """The protocol with nothing around it (https://redis.io/docs/latest/develop/reference/)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._replies = hiredis.Reader()

    async def ask(self, commands: Sequence[bytes]) -> list[object]:
        """Send these at once; their answers. Raises `RuntimeError` on a refusal."""
        self._writer.write(b"".join(commands))
        return await self._answers(len(commands))

    async def ask_all(self, commands: Sequence[bytes]) -> None:
        """Send all without waiting, and count the answers meanwhile."""
        async with asyncio.TaskGroup() as tasks:
            answers = tasks.create_task(self._answers(len(commands)))
            for start in range(0, len(commands), _CHUNK):
                self._writer.write(b"".join(commands[start : start + _CHUNK]))
                await self._writer.drain()
            await answers

    async def _answers(self, count: int) -> list[object]:
        found: list[object] = []
        while len(found) < count:
            reply = self._replies.gets()
            if reply is False:
                async with asyncio.timeout(_SILENCE_S):
                    chunk = await self._reader.read(_READ_BYTES)
                if not chunk:
                    raise RuntimeError("the connection to Redis was lost")
                self._replies.feed(chunk)
                continue
            found.append(reply)
        refused = next((reply for reply in found if isinstance(reply, hiredis.ReplyError)), None)
        if refused is not None:
            raise RuntimeError(f"Redis refuses: {refused}")
        return found


@contextlib.asynccontextmanager
async def _bare(port: int) -> AsyncIterator[_Bare]:
    reader, writer = await asyncio.open_connection(LOOPBACK, port, limit=_READ_BYTES)
    try:
        yield _Bare(reader, writer)
    finally:
        writer.close()


def _packed(*parts: bytes) -> bytes:
    """One command as an array of bulk strings."""
    return b"*%d\r\n" % len(parts) + b"".join(
        b"$%d\r\n%b\r\n" % (len(part), part) for part in parts
    )


def _added_at(id_: bytes) -> float:
    """The time in an entry's id, in seconds."""
    return int(id_.partition(b"-")[0]) / 1000
