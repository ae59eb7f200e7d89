"""The bytes between broker and client, through the `aiormq.TransportFactory` of the client.

Left alone, the client takes deliveries as fast as they come; it ends the connection over a message
that it can't decode, which then comes again and again; it does not say why a virtual host is
refused; and it closes with a patience of its own. So it reads whole frames
(https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, 4.2) from `Frames`, which can wait between
two of them, and its socket belongs to `Transport`, which can drop it.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from struct import Struct

from aiormq import TransportFactory, spec

from relay.backends.rabbitmq.errors import Unreadable
from relay.endpoint import Endpoint

UNREADABLE = "application/vnd.pgtrickle.unreadable"
"""What stands in the place of properties, or of names, that the client can't decode."""

_BEAT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
_BUFFER_BYTES = 256 * 1024
_HEAD = Struct(">BHI")
_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
_BEAT = _HEAD.pack(_HEARTBEAT, 0, 0) + b"\xce"
_CLOSE = b"\x00\x0a\x00\x32"
_DELIVER = b"\x00\x3c\x00\x3c"
_FLAGS = Struct(">H")
_AT_FLAGS = 12
_MORE_FLAGS = 1


class Frames(asyncio.StreamReader):
    """What the client reads from.

    A careful one tries each frame before, which costs decoding it twice, and puts `UNREADABLE` in
    the place of what can't be decoded.
    """

    def __init__(self, *, is_careful: bool) -> None:
        super().__init__(limit=_BUFFER_BYTES)
        self._is_careful = is_careful
        self._is_wanted = asyncio.Event()
        self._is_wanted.set()
        # What has arrived, and how far it was cut; the frame that the client has, or is getting.
        self._arrived = b""
        self._cut = 0
        self._frame = b""
        self._read = 0

    def hold(self, *, is_held: bool) -> None:
        """Hand on nothing more, or go on."""
        (self._is_wanted.clear if is_held else self._is_wanted.set)()

    def at_eof(self) -> bool:
        """Whether nothing is left and nothing comes."""
        return self._cut == len(self._arrived) and super().at_eof()

    async def readexactly(self, n: int) -> bytes:
        """The next bytes of a frame: the client asks for it piece by piece."""
        if self._read == len(self._frame):
            self._frame, self._read = await self._next(), 0
        self._read += n
        return self._frame[self._read - n : self._read]

    def refusal(self) -> spec.Connection.Close | None:
        """What the broker said, where the last thing that it sent was that it closes."""
        method = self._frame[_HEAD.size : -1]
        if not method.startswith(_CLOSE):
            return None
        close = spec.Connection.Close()
        close.unmarshal(method[len(_CLOSE) :])
        return close

    async def _next(self) -> bytes:
        while not self._is_wanted.is_set():
            try:
                async with asyncio.timeout(_BEAT_S):
                    await self._is_wanted.wait()
            except TimeoutError:
                # Else the client would take the broker for dead.
                return _BEAT
        while True:
            if len(self._arrived) - self._cut >= _HEAD.size:
                kind, _, content = _HEAD.unpack_from(self._arrived, self._cut)
                if kind not in (_METHOD, _HEADER, _BODY, _HEARTBEAT):
                    raise Unreadable(f"there is no kind {kind} of frame")
                start, end = self._cut, self._cut + _HEAD.size + content + 1
                if end <= len(self._arrived):
                    self._cut = end
                    frame = self._arrived[start:end]
                    return _readable(frame) if self._is_careful else frame
            more = await self.read(_BUFFER_BYTES)
            self._arrived, self._cut = self._arrived[self._cut :] + more, 0
            if not more:
                raise asyncio.IncompleteReadError(self._arrived, None)


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

    async def aclose(self) -> None:
        """Drop it, and return when it is gone; nobody has to answer for that."""
        self.abort()
        if self._writer is not None:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._writer.wait_closed()


def _readable(frame: bytes) -> bytes:
    """The frame, without the properties or the names where the client can't decode them."""
    payload, mark = frame[_HEAD.size : -1], bytes((len(UNREADABLE),)) + UNREADABLE.encode()
    is_header = frame[0] == _HEADER
    if not is_header and not payload.startswith(_DELIVER):
        return frame
    with suppress(Exception):
        if not is_header:
            spec.Basic.Deliver().unmarshal(payload[len(_DELIVER) :])
            return frame
        (flags,) = _FLAGS.unpack_from(payload, _AT_FLAGS)
        spec.Basic.Properties().unmarshal(flags, payload[_AT_FLAGS + _FLAGS.size :])
        if not flags & _MORE_FLAGS:
            return frame
    if is_header:
        # Class, weight and size stay; the only flag says that there is a content type.
        payload = payload[:_AT_FLAGS] + b"\x80\x00" + mark
    else:
        # Consumer, delivery tag and a bit stay; no exchange, and the mark as routing key.
        payload = payload[: 14 + payload[4]] + b"\x00" + mark
    return frame[:3] + len(payload).to_bytes(4, "big") + payload + frame[-1:]
