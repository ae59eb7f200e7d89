"""AMQP 0-9-1 on the wire: bytes to frames and back, for many messages at a time.

The few methods that set up and end a connection are pamqp's. What comes with every message
(publish, deliver, return, and the acknowledgements in both directions) is read and written here,
whole chunks at a time: an object and a future per frame cost more than all else. The layouts are
those of https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, 2.3 and 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from struct import Struct

import msgspec
from pamqp import frame as codec
from pamqp.base import Frame

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_BYTES = 8
"""What a frame has around its payload."""

HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00\xce"
GREETING = b"AMQP\x00\x00\x09\x01"
CHANNEL = 1
"""The one channel that a connection of ours has."""

_END = 0xCE
_END_BYTE = b"\xce"
_HEAD = Struct(">BHI")
_TAG = Struct(">QB")
_CONTENT = Struct(">HHQ")
_CODE = Struct(">H")
_BASIC = 60

_PUBLISH = b"\x00\x3c\x00\x28\x00\x00"
_RETURN = b"\x00\x3c\x00\x32"
_DELIVER = b"\x00\x3c\x00\x3c"
_ACK = b"\x00\x3c\x00\x50"
_NACK = b"\x00\x3c\x00\x78"

_NACK_SIZE = _TAG.size + len(_NACK)
_MANDATORY = b"\x01"
_MULTIPLE = 1
_REQUEUE = 2
_CONTENT_OFFSET = 7


class Broken(Exception):
    """What arrived is no frame of AMQP 0-9-1."""


class Content(msgspec.Struct, gc=False):
    """A message that arrived, delivered or returned.

    ``properties``: from their flags on, undecoded. ``reason``: of a returned one, code and text.
    """

    tag: int
    exchange: str
    routing_key: str
    reason: str = ""
    properties: bytes = b""
    body: bytes = b""


class Arrivals(msgspec.Struct, frozen=True):
    """Who is told what arrives, in its order; nobody may raise.

    ``method`` gets the channel and any method not named here; ``accepted`` several delivery tags;
    ``confirmed`` one tag, whether it stands for all up to it, and whether they are refused.
    """

    method: Callable[[int, Frame], None]
    delivered: Callable[[Content], None]
    returned: Callable[[Content], None]
    accepted: Callable[[Sequence[int]], None]
    confirmed: Callable[[int, bool, bool], None]


class FrameReader:
    """Cuts what arrives into frames, and puts messages together from theirs."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._rest = b""
        self._content: Content | None = None
        self._missing = 0
        self._parts: list[bytes] = []
        self._is_return = False
        self._accepted: list[int] = []

    def feed(self, data: bytes) -> None:
        """Take what arrived. Raises `Broken`, and what the codec raises."""
        if self._rest:
            data = self._rest + data
        position, end = 0, len(data)
        while end - position >= FRAME_BYTES:
            kind, channel, size = _HEAD.unpack_from(data, position)
            after = position + size + FRAME_BYTES
            if after > end:
                if kind not in (METHOD, HEADER, BODY, HEARTBEAT):
                    raise Broken
                break
            if data[after - 1] != _END:
                raise Broken
            start = position + _CONTENT_OFFSET
            if kind == METHOD:
                self._method(data, channel, position, start, after)
            elif kind == HEADER:
                self._header(data, start, after)
            elif kind == BODY:
                self._body(data[start : after - 1])
            elif kind != HEARTBEAT:
                raise Broken
            position = after
        self._rest = data[position:]
        self._flush()

    def _method(self, data: bytes, channel: int, position: int, start: int, after: int) -> None:
        method = data[start : start + 4]
        start += 4
        if method == _ACK:
            tag, bits = _TAG.unpack_from(data, start)
            if bits & _MULTIPLE:
                self._flush()
                self._arrivals.confirmed(tag, True, False)
            else:
                self._accepted.append(tag)
        elif method == _DELIVER:
            start += 1 + data[start]
            tag, _ = _TAG.unpack_from(data, start)
            self._begin(data, start + _TAG.size, tag)
        elif method == _NACK:
            tag, bits = _TAG.unpack_from(data, start)
            self._flush()
            self._arrivals.confirmed(tag, bool(bits & _MULTIPLE), True)
        elif method == _RETURN:
            (code,) = _CODE.unpack_from(data, start)
            text, start = _short(data, start + _CODE.size)
            self._begin(data, start, 0, reason=f"{code} {_text(text)}")
        else:
            _, _, frame = codec.unmarshal(data[position:after])
            if not isinstance(frame, Frame):
                raise Broken
            self._flush()
            self._arrivals.method(channel, frame)

    def _begin(self, data: bytes, start: int, tag: int, reason: str = "") -> None:
        exchange, start = _short(data, start)
        routing_key, _ = _short(data, start)
        self._is_return = bool(reason)
        self._content = Content(tag, _text(exchange), _text(routing_key), reason)

    def _header(self, data: bytes, start: int, after: int) -> None:
        content = self._content
        if content is None:
            raise Broken
        _, _, self._missing = _CONTENT.unpack_from(data, start)
        content.properties = data[start + _CONTENT.size : after - 1]
        if not self._missing:
            self._complete(content, b"")

    def _body(self, part: bytes) -> None:
        content = self._content
        if content is None:
            raise Broken
        self._missing -= len(part)
        if self._missing > 0:
            self._parts.append(part)
        elif self._missing < 0:
            raise Broken
        elif self._parts:
            self._parts.append(part)
            body = b"".join(self._parts)
            self._parts.clear()
            self._complete(content, body)
        else:
            self._complete(content, part)

    def _complete(self, content: Content, body: bytes) -> None:
        content.body = body
        self._content = None
        if self._is_return:
            self._flush()
            self._arrivals.returned(content)
        else:
            self._arrivals.delivered(content)

    def _flush(self) -> None:
        if self._accepted:
            accepted, self._accepted = self._accepted, []
            self._arrivals.accepted(accepted)


def of_method(method: Frame, channel: int = CHANNEL) -> bytes:
    """The frame of any method."""
    return codec.marshal(method, channel)


def publish(exchange: str, routing_key: str, *, is_mandatory: bool) -> bytes:
    """The frame that begins a message; `header` and `bodies` follow it."""
    names = b"".join(
        bytes((len(name),)) + name for name in (exchange.encode(), routing_key.encode())
    )
    payload = b"".join((_PUBLISH, names, _MANDATORY if is_mandatory else b"\x00"))
    return _HEAD.pack(METHOD, CHANNEL, len(payload)) + payload + _END_BYTE


def header(properties: bytes, body_bytes: int) -> bytes:
    """The frame with a message's properties, from their flags on."""
    head = _HEAD.pack(HEADER, CHANNEL, _CONTENT.size + len(properties))
    return b"".join((head, _CONTENT.pack(_BASIC, 0, body_bytes), properties, _END_BYTE))


def header_size(properties: bytes) -> int:
    """How long that frame is."""
    return FRAME_BYTES + _CONTENT.size + len(properties)


def bodies(body: bytes, frame_max: int) -> bytes:
    """The frames with a message's body; none for an empty one."""
    most = frame_max - FRAME_BYTES
    if len(body) <= most:
        if not body:
            return b""
        return _HEAD.pack(BODY, CHANNEL, len(body)) + body + _END_BYTE
    parts: list[bytes] = []
    for start in range(0, len(body), most):
        part = body[start : start + most]
        parts += (_HEAD.pack(BODY, CHANNEL, len(part)), part, _END_BYTE)
    return b"".join(parts)


def acknowledgement(tag: int, *, is_multiple: bool) -> bytes:
    """The frame that acknowledges one delivery, or all up to it."""
    return b"".join(
        (_HEAD.pack(METHOD, CHANNEL, _NACK_SIZE), _ACK, _TAG.pack(tag, is_multiple), _END_BYTE)
    )


def giving_back(tag: int, *, is_multiple: bool) -> bytes:
    """The frame that puts one delivery, or all up to it, back into the queue."""
    bits = _REQUEUE | (_MULTIPLE if is_multiple else 0)
    return b"".join(
        (_HEAD.pack(METHOD, CHANNEL, _NACK_SIZE), _NACK, _TAG.pack(tag, bits), _END_BYTE)
    )


def _short(data: bytes, start: int) -> tuple[bytes, int]:
    """A text of at most 255 bytes, and where it ends."""
    end = start + 1 + data[start]
    return data[start + 1 : end], end


@lru_cache(maxsize=4096)
def _text(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")
