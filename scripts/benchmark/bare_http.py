"""HTTP with nothing around it: a receiver in a process of its own, and a client that only posts.

The receiver answers 200 as soon as a request is whole, keeps the bodies, and says under paths of
its own what it has. Both know just enough of HTTP/1.1 for bodies with a `Content-Length` over
connections that stay open (https://www.rfc-editor.org/rfc/rfc9112).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar, Final, cast

import msgspec
import uvloop

from relay.demo.embedded import LOOPBACK
from scripts.benchmark.server import running_module

SILENCE_S: Final = 30.0
CONTROL_PATH: Final = b"/bench/"

_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_STATUS: Final = re.compile(rb"HTTP/1\.1 (\d{3})[^\r]*\r\n")
# What every envelope has exactly once at its beginning.
_ENVELOPE: Final = b'{"v":1,"dedup_key":'


class Received(msgspec.Struct):
    """What a receiver has: envelopes, and when the first and last request was whole."""

    requests: int = 0
    envelopes: int = 0
    first_at: float = 0.0
    last_at: float = 0.0


class _Receiver(asyncio.Protocol):
    """One connection of the receiver's process."""

    received: ClassVar[Received] = Received()
    bodies: ClassVar[list[bytes]] = []

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._whole_bytes = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        self._buffer += data
        if len(self._buffer) < self._whole_bytes:
            return
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end])
            length = _LENGTH.search(head)
            start = end + 4
            whole = start + (int(length[1]) if length else 0)
            if len(self._buffer) < whole:
                self._whole_bytes = whole
                return
            body = bytes(memoryview(self._buffer)[start:whole])
            del self._buffer[:whole]
            self._whole_bytes = 0
            self._answer(head.split(b" ", 2)[1], body)

    def _answer(self, path: bytes, body: bytes) -> None:
        answer = _ANSWER
        if path.startswith(CONTROL_PATH):
            content = _controlled(path.removeprefix(CONTROL_PATH))
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
        else:
            now, received = time.time(), _Receiver.received
            received.requests += 1
            received.envelopes += body.count(_ENVELOPE)
            received.first_at = received.first_at or now
            received.last_at = now
            _Receiver.bodies.append(body)
        if self._transport is not None:
            self._transport.write(answer)


def _controlled(command: bytes) -> bytes:
    if command == b"empty":
        _Receiver.received = Received()
        _Receiver.bodies = []
    if command == b"bodies":
        return b"\n".join(_Receiver.bodies)
    return msgspec.json.encode(_Receiver.received)


class Receiver:
    """The receiver, as the rows see it."""

    def __init__(self, port: int) -> None:
        self._port = port

    @property
    def port(self) -> int:
        """Where it listens on the loopback."""
        return self._port

    @property
    def url(self) -> str:
        """Where events are posted to."""
        return f"http://{LOOPBACK}:{self._port}/events"

    async def empty(self) -> None:
        """Forget everything."""
        await self._ask("empty")

    async def received(self) -> Received:
        """What it has by now."""
        return msgspec.json.decode(await self._ask("state"), type=Received)

    async def bodies(self) -> list[bytes]:
        """The body of every request, in the order in which they were whole."""
        return (await self._ask("bodies")).split(b"\n")

    async def _ask(self, command: str) -> bytes:
        reader, writer = await asyncio.open_connection(LOOPBACK, self._port)
        try:
            writer.write(b"GET %b%b HTTP/1.1\r\n\r\n" % (CONTROL_PATH, command.encode()))
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            return await reader.readexactly(int(length[1]) if length else 0)
        finally:
            writer.close()


class Poster(asyncio.Protocol):
    """One connection that posts one request at a time; `posted` makes as many as are wanted."""

    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._status: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - part of the protocol
        """Part of `asyncio.Protocol`."""
        if self._status is not None and not self._status.done():
            self._status.set_exception(ConnectionResetError("the connection was lost"))

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._buffer[:end])
        whole = end + 4 + (int(length[1]) if length else 0)
        if len(self._buffer) < whole:
            return
        status = _STATUS.match(self._buffer)
        self._buffer = self._buffer[whole:]
        if self._status is not None and not self._status.done():
            self._status.set_result(0 if status is None else int(status[1]))

    async def post(self, request: bytes) -> int:
        """The status of the answer. Raises `ConnectionError`, `TimeoutError`."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection was lost")
        self._status = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        async with asyncio.timeout(SILENCE_S):
            return await self._status

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


def request(port: int, path: str, key: str, body: bytes) -> bytes:
    """A request with an idempotency key."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\nContent-Type: application/json\r\n"
        f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def post_all(port: int, requests: Sequence[bytes], connections: int) -> float:
    """Post all over so many connections; how long that took, in seconds.

    Each connection has one request in flight. Raises `RuntimeError` where one gets no 200.
    """
    loop = asyncio.get_running_loop()
    posters = [
        (await loop.create_connection(Poster, LOOPBACK, port))[1] for _ in range(connections)
    ]
    waiting = iter(requests)

    async def post(poster: Poster) -> None:
        for one in waiting:
            status = await poster.post(one)
            if status != 200:
                raise RuntimeError(f"a request was answered {status}")

    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as tasks:
            for poster in posters:
                tasks.create_task(post(poster))
        return time.perf_counter() - started
    finally:
        for poster in posters:
            poster.close()


@contextlib.asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver in a process of its own, gone at the end."""
    async with running_module("scripts.benchmark.bare_http") as port:
        yield Receiver(port)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Receiver, LOOPBACK, port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
