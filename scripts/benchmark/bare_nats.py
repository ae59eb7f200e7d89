"""The NATS protocol with nothing around it: what the counts are read with, and rates beside.

One connection, no reconnecting, no object per message that nobody asked for
(https://docs.nats.io/reference/reference-protocols/nats-protocol).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, cast
from urllib.parse import urlsplit

import msgspec

NANOSECONDS: Final = 1_000_000_000
REQUEST_TIMEOUT_S: Final = 10.0
SILENCE_S: Final = 30.0

# What every acknowledgement of JetStream holds exactly once, and a refusal never.
_ACCEPTED: Final = b'"seq":'
_CHUNK_MESSAGES: Final = 256
PULL_MESSAGES: Final = 1_000

# Called with subject, reply subject (empty without one), header block and body of a message.
Handler = Callable[[bytes, bytes, bytes, bytes], None]


class StoredMessage(msgspec.Struct, frozen=True, gc=False):
    """A message of a stream, byte for byte."""

    subject: bytes
    block: bytes
    body: bytes

    def headers(self) -> dict[str, str]:
        """The lines of the block."""
        lines = self.block.decode().split("\r\n")[1:]
        return dict(line.split(": ", 1) for line in lines if line)


class StreamState(msgspec.Struct, frozen=True):
    """How much a stream holds, and when its first and last message were stored (RFC 3339)."""

    messages: int
    first_ts: str
    last_ts: str


class _Info(msgspec.Struct, frozen=True):
    state: StreamState


class _When(msgspec.Struct, frozen=True):
    time: str


class _Found(msgspec.Struct, frozen=True):
    message: _When


class _ConsumerInfo(msgspec.Struct, frozen=True):
    num_ack_pending: int
    num_pending: int


class _Error(msgspec.Struct, frozen=True):
    description: str = ""


class _Answer(msgspec.Struct, frozen=True):
    error: _Error | None = None


class BareNats(asyncio.Protocol):
    """One connection; `connected` opens it."""

    def __init__(self) -> None:
        self._buffer = b""
        self._handlers: dict[bytes, Handler] = {}
        self._transport: asyncio.Transport | None = None
        self._greeted = asyncio.get_running_loop().create_future()
        self._writable = asyncio.Event()
        self._writable.set()
        self._subscriptions = 0
        self._inbox = f"_INBOX.{secrets.token_hex(8)}"
        self._inboxes = 0
        self._counts_only = False
        self._accepted = 0
        self._moved = asyncio.Event()
        self._complaint = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - part of the protocol
        """Part of `asyncio.Protocol`."""
        self._moved.set()
        self._writable.set()

    def pause_writing(self) -> None:
        """Part of `asyncio.Protocol`."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Part of `asyncio.Protocol`."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        if self._counts_only:
            seen = self._buffer + data
            self._accepted += seen.count(_ACCEPTED)
            if b'"error"' in seen or b"-ERR" in seen:
                self._complaint = seen
            self._buffer = seen[-len(_ACCEPTED) + 1 :]
            self._moved.set()
            return
        self._buffer += data
        self._buffer = self._buffer[self._parsed() :]

    def subscribe(self, subject: str, handler: Handler) -> None:
        """Hand every message on the subject to the handler."""
        self._subscriptions += 1
        self._handlers[b"%d" % self._subscriptions] = handler
        self._write(f"SUB {subject} {self._subscriptions}\r\n".encode())

    async def request(self, subject: str, body: object = None) -> bytes:
        """One request to the JetStream API and its answer. Raises `RuntimeError` on a refusal."""
        self._inboxes += 1
        inbox = f"{self._inbox}.{self._inboxes}"
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.subscribe(inbox, lambda _, __, ___, reply: answer.set_result(reply))
        content = b"" if body is None else msgspec.json.encode(body)
        self._write(b"PUB %b %b %d\r\n" % (subject.encode(), inbox.encode(), len(content)))
        self._write(content + b"\r\n")
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            reply = await answer
        error = msgspec.json.decode(reply, type=_Answer).error
        if error is not None:
            raise RuntimeError(f"{subject}: {error.description}")
        return reply

    async def make_stream(self, name: str, subjects: Sequence[str]) -> None:
        """An empty stream on file storage that deduplicates by message id, whatever was there."""
        with contextlib.suppress(RuntimeError):
            await self.request(f"$JS.API.STREAM.DELETE.{name}")
        await self.request(
            f"$JS.API.STREAM.CREATE.{name}",
            {
                "name": name,
                "subjects": subjects,
                "storage": "file",
                "retention": "limits",
                "duplicate_window": 120 * NANOSECONDS,
            },
        )

    async def state_of(self, stream: str) -> StreamState:
        """What a stream holds now."""
        reply = await self.request(f"$JS.API.STREAM.INFO.{stream}")
        return msgspec.json.decode(reply, type=_Info).state

    async def stored_at(self, stream: str, number: int) -> str:
        """When the message of this sequence number was stored (RFC 3339)."""
        reply = await self.request(f"$JS.API.STREAM.MSG.GET.{stream}", {"seq": number})
        return msgspec.json.decode(reply, type=_Found).message.time

    async def until_stored(self, stream: str, messages: int, timeout_s: float) -> StreamState:
        """The state of a stream once it holds so many messages. Raises `TimeoutError`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (state := await self.state_of(stream)).messages < messages:
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"{state.messages} of {messages} messages arrived")
            await asyncio.sleep(0.02)
        return state

    async def consume(self, stream: str, handler: Handler) -> None:
        """Hand every message of a stream to the handler, stored ones first, as it is stored."""
        self._inboxes += 1
        inbox = f"{self._inbox}.{self._inboxes}"
        self.subscribe(inbox, handler)
        await self.request(
            f"$JS.API.CONSUMER.CREATE.{stream}",
            {
                "stream_name": stream,
                "config": {
                    "deliver_subject": inbox,
                    "deliver_policy": "all",
                    "ack_policy": "none",
                    "replay_policy": "instant",
                },
            },
        )

    async def acknowledge_all(self, stream: str, messages: int) -> None:
        """Read so many messages as a pulling consumer and acknowledge each; do nothing with them.

        Batches are asked for ahead, and every message has an acknowledgement of its own. Returns
        when the server has counted all of them. Raises `TimeoutError`.
        """
        self._inboxes += 1
        inbox, durable = f"{self._inbox}.{self._inboxes}".encode(), f"floor-{self._inboxes}"
        moved = asyncio.Event()
        replies: list[bytes] = []

        def keep(_: bytes, reply: bytes, __: bytes, ___: bytes) -> None:
            if reply:
                replies.append(reply)
                moved.set()

        await self.request(
            f"$JS.API.CONSUMER.CREATE.{stream}.{durable}",
            {
                "stream_name": stream,
                "config": {
                    "durable_name": durable,
                    "deliver_policy": "all",
                    "ack_policy": "explicit",
                    "max_ack_pending": -1,
                },
            },
        )
        self.subscribe(inbox.decode(), keep)
        ask = b"PUB $JS.API.CONSUMER.MSG.NEXT.%b.%b %b %d\r\n%b\r\n"
        batch = b'{"batch":%d}' % PULL_MESSAGES
        wanted = (stream.encode(), durable.encode(), inbox, len(batch), batch)
        acknowledged = asked = 0
        async with asyncio.timeout(SILENCE_S + messages / 1000):
            while acknowledged < messages:
                while asked < min(messages, acknowledged + 2 * PULL_MESSAGES):
                    self._write(ask % wanted)
                    asked += PULL_MESSAGES
                moved.clear()
                if not replies:
                    await moved.wait()
                settled, replies[:] = replies[:], []
                self._write(b"".join(b"PUB %b 4\r\n+ACK\r\n" % reply for reply in settled))
                acknowledged += len(settled)
                await self._writable.wait()
            while await self._unsettled(stream, durable):
                continue

    async def _unsettled(self, stream: str, durable: str) -> int:
        reply = await self.request(f"$JS.API.CONSUMER.INFO.{stream}.{durable}")
        info = msgspec.json.decode(reply, type=_ConsumerInfo)
        return info.num_ack_pending + info.num_pending

    async def read(self, stream: str, messages: int) -> list[StoredMessage]:
        """The first so many messages of a stream. Raises `TimeoutError`."""
        found: list[StoredMessage] = []
        everything = asyncio.Event()

        def keep(subject: bytes, _: bytes, block: bytes, body: bytes) -> None:
            found.append(StoredMessage(subject, block, body))
            if len(found) >= messages:
                everything.set()

        if messages:
            await self.consume(stream, keep)
            async with asyncio.timeout(SILENCE_S + messages / 1000):
                await everything.wait()
        return found

    def publish(self, message: StoredMessage) -> None:
        """Publish one, without a look at its acknowledgement."""
        block, body = message.block, message.body
        sizes = (len(block), len(block) + len(body))
        line = b"HPUB %b %d %d\r\n" % (message.subject, *sizes)
        self._write(b"".join((line, block, body, b"\r\n")))

    async def publish_all(self, messages: Sequence[StoredMessage], window: int) -> None:
        """Publish and return when JetStream has acknowledged each; one reply subject for all.

        Nothing else may be done with the connection afterwards. Raises `RuntimeError` where one is
        refused, `TimeoutError` where the server goes silent.
        """
        reply = self._inbox.encode() + b".acknowledged"
        self._write(b"SUB %b acknowledged\r\n" % reply)
        self._counts_only = True
        for start in range(0, len(messages), _CHUNK_MESSAGES):
            chunk = messages[start : start + _CHUNK_MESSAGES]
            await self._until_accepted(start + len(chunk) - window)
            lines: list[bytes] = []
            for message in chunk:
                block, body = message.block, message.body
                sizes = (len(block), len(block) + len(body))
                lines += (b"HPUB %b %b %d %d\r\n" % (message.subject, reply, *sizes),)
                lines += (block, body, b"\r\n")
            self._write(b"".join(lines))
            await self._writable.wait()
            await asyncio.sleep(0)
        await self._until_accepted(len(messages))

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    async def greet(self, token: str | None) -> None:
        """Begin the conversation. Raises `TimeoutError`."""
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await self._greeted
        options = {"verbose": False, "pedantic": False, "headers": True, "auth_token": token}
        self._write(b"CONNECT " + msgspec.json.encode(options) + b"\r\n")

    async def _until_accepted(self, messages: int) -> None:
        while self._accepted < messages:
            if self._complaint:
                raise RuntimeError(f"the server refuses: {self._complaint[:300]!r}")
            self._moved.clear()
            async with asyncio.timeout(SILENCE_S):
                await self._moved.wait()

    def _write(self, chunk: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise RuntimeError("the connection to NATS was lost")
        self._transport.write(chunk)

    def _parsed(self) -> int:
        """Handle what has arrived whole; how many bytes that was."""
        buffer, at = self._buffer, 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            words = buffer[at:end].split(b" ")
            verb = words[0]
            if verb in (b"MSG", b"HMSG"):
                total = int(words[-1])
                start = end + 2
                if len(buffer) < start + total + 2:
                    break
                headers = int(words[-2]) if verb == b"HMSG" else 0
                sizes = 1 if verb == b"MSG" else 2
                self._handlers[words[2]](
                    words[1],
                    words[3] if len(words) > 3 + sizes else b"",
                    buffer[start : start + headers],
                    buffer[start + headers : start + total],
                )
                at = start + total + 2
                continue
            if verb == b"PING":
                self._write(b"PONG\r\n")
            elif verb == b"INFO" and not self._greeted.done():
                self._greeted.set_result(None)
            elif verb == b"-ERR":
                raise RuntimeError(buffer[at:end].decode(errors="replace"))
            at = end + 2
        return at


@contextlib.asynccontextmanager
async def connected(url: str, token: str | None) -> AsyncIterator[BareNats]:
    """An open connection, closed at the end."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, nats = await loop.create_connection(
        BareNats, parts.hostname or "127.0.0.1", parts.port or 4222
    )
    try:
        await nats.greet(token)
        yield nats
    finally:
        nats.close()
