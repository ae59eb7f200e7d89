"""The bytes between broker and client: the one place that knows how AMQP cuts its frames.

Left alone, the client takes deliveries as fast as they come; it ends the connection over a message
that it can't decode, which then comes again and again; it does not say why a virtual host is
refused; and it closes with a patience of its own. So it reads from `Frames`, which hands on whole
frames (https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, 4.2) and can wait between two of
them, and its socket belongs to `Transport`, which can drop it.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from struct import Struct

from aiormq import TransportFactory, spec
from aiormq.connection import FrameReceiver

from relay.backends.rabbitmq.errors import not_amqp
from relay.backends.rabbitmq.options import Endpoint

UNREADABLE = "application/vnd.pgtrickle.unreadable"
"""What stands in the place of properties, or of names, that the client can't decode."""

_BEAT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
_BUFFER_BYTES = 256 * 1024
_HEAD = Struct(">BHI")
_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
_BEAT = _HEAD.pack(_HEARTBEAT, 0, 0) + b"\xce"
_DELIVER = b"\x00\x3c\x00\x3c"


class Frames(asyncio.StreamReader):
    """What the client reads from. ``last``: the frame that it has, or is getting.

    A careful one tries each frame before, which costs decoding it twice, and puts `UNREADABLE` in
    the place of what can't be decoded.
    """

    def __init__(self, address: str, *, is_careful: bool) -> None:
        super().__init__(limit=_BUFFER_BYTES)
        self.last = b""
        self._address = address
        self._is_careful = is_careful
        self._is_wanted = asyncio.Event()
        self._is_wanted.set()
        self._read = 0

    def hold(self, *, is_held: bool) -> None:
        """Hand on nothing more, or go on."""
        (self._is_wanted.clear if is_held else self._is_wanted.set)()

    async def readexactly(self, n: int) -> bytes:
        """The next bytes of a frame: the client asks for it piece by piece."""
        while len(self.last) - self._read < n:
            self.last, self._read = self.last[self._read :] + await self._next(), 0
        self._read += n
        return self.last[self._read - n : self._read]

    async def refusal(self) -> spec.Connection.Close | None:
        """What the broker said, where the last thing that it sent was that it closes."""
        frame = await _decoded(self.last)
        return frame if isinstance(frame, spec.Connection.Close) else None

    async def _next(self) -> bytes:
        while not self._is_wanted.is_set():
            try:
                async with asyncio.timeout(_BEAT_S):
                    await self._is_wanted.wait()
            except TimeoutError:
                # Else the client would take the broker for dead.
                return _BEAT
        head = await super().readexactly(_HEAD.size)
        kind, _, size = _HEAD.unpack(head)
        if kind not in (_METHOD, _HEADER, _BODY, _HEARTBEAT):
            raise not_amqp(f"connecting to RabbitMQ at {self._address}")
        frame = head + await super().readexactly(size + 1)
        if self._is_careful and await _decoded(frame) is None:
            return _mended(frame)
        return frame


class Transport(TransportFactory):
    """Opens the socket of one connection, over TLS where there is a context."""

    def __init__(
        self, endpoint: Endpoint, context: ssl.SSLContext | None, frames: Frames, timeout_s: float
    ) -> None:
        self._endpoint = endpoint
        self._context = context
        self._frames = frames
        self._timeout_s = timeout_s
        self._writer: asyncio.StreamWriter | None = None

    async def create(
        self,
        url: object,  # noqa: ARG002 - the same place
        **_: object,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, for the client."""
        loop, (host, port) = asyncio.get_running_loop(), (self._endpoint.host, self._endpoint.port)
        protocol = asyncio.StreamReaderProtocol(self._frames)
        async with asyncio.timeout(self._timeout_s):
            transport, _protocol = await loop.create_connection(
                lambda: protocol, host, port, ssl=self._context
            )
        self._writer = asyncio.StreamWriter(transport, protocol, self._frames, loop)
        return self._frames, self._writer

    def abort(self) -> None:
        """Drop the socket at once."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def wait_closed(self) -> None:
        """Return when the socket is gone; after `abort` nobody has to answer for that."""
        if self._writer is not None:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._writer.wait_closed()


async def _decoded(frame: bytes) -> object | None:
    """What the client makes of this frame; None where it can't decode it."""
    reader = asyncio.StreamReader()
    reader.feed_data(frame)
    try:
        return (await FrameReceiver(reader).get_frame())[2]
    except Exception:  # noqa: BLE001 - whatever its codec raises
        return None


def _mended(frame: bytes) -> bytes:
    """A message's header without its properties, or a delivery without its names."""
    payload, mark = frame[_HEAD.size : -1], bytes((len(UNREADABLE),)) + UNREADABLE.encode()
    if frame[0] == _HEADER:
        # Class, weight and size stay, and the flag says that there is a content type.
        payload = payload[:12] + b"\x80\x00" + mark
    elif payload.startswith(_DELIVER):
        # Consumer, delivery tag and a bit stay; no exchange, and the mark as routing key.
        payload = payload[: 14 + payload[4]] + b"\x00" + mark
    return frame[:3] + len(payload).to_bytes(4, "big") + payload + frame[-1:]
