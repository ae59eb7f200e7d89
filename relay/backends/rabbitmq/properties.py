"""The properties of a message on the wire, and back.

Ours are the content type, our metadata and the publisher's headers as texts of the header table,
the delivery mode ``persistent`` and the message id. Properties that somebody else set come back as
headers under their AMQP names, unless a header of that name is there.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from struct import Struct

import msgspec
from pamqp import decode

_CONTENT_TYPE = 0x8000
_CONTENT_ENCODING = 0x4000
_HEADERS = 0x2000
_DELIVERY_MODE = 0x1000
_PRIORITY = 0x0800
_MESSAGE_ID = 0x0080
_TIMESTAMP = 0x0040
_CONTINUED = 0x0001

_TEXTS_BEFORE_ID: Mapping[int, str] = {
    0x0400: "correlation-id",
    0x0200: "reply-to",
    0x0100: "expiration",
}
_TEXTS_AFTER_TIME: Mapping[int, str] = {0x0020: "type", 0x0010: "user-id", 0x0008: "app-id"}

_FLAGS = Struct(">H")
_LENGTH = Struct(">I")
_TIME = Struct(">Q")
_OURS = _FLAGS.pack(_CONTENT_TYPE | _HEADERS | _DELIVERY_MODE | _MESSAGE_ID)
_PERSISTENT = b"\x02"
_LONG_TEXT = ord("S")
_LONG_TEXT_BYTE = b"S"


class Properties(msgspec.Struct, frozen=True, gc=False):
    """What came with a message. ``headers``: as texts, the other properties among them."""

    content_type: str
    message_id: str
    headers: dict[str, str]
    created_at: datetime | None = None


def before(content_type: str) -> bytes:
    """The flags of our properties and the content type, which begin each message of ours."""
    return _OURS + _short_text(content_type.encode())


def after(message_id: bytes) -> bytes:
    """What stands behind the header table of a message of ours."""
    return _PERSISTENT + _short_text(message_id)


def field(name: bytes, value: bytes) -> bytes:
    """One text in the header table; the name has at most 255 bytes."""
    return b"".join((_short_text(name), _LONG_TEXT_BYTE, _LENGTH.pack(len(value)), value))


def table(fields: bytes) -> bytes:
    """The header table of these fields."""
    return _LENGTH.pack(len(fields)) + fields


def decoded(raw: bytes) -> Properties:
    """What `before`, `table` and `after` were given, or what somebody else sent.

    Raises `ValueError` for what can't be read.
    """
    try:
        return _decoded(raw)
    except (IndexError, struct.error, OverflowError, OSError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _decoded(raw: bytes) -> Properties:
    (flags,) = _FLAGS.unpack_from(raw)
    position = _FLAGS.size
    if flags & _CONTINUED:
        raise ValueError("properties that AMQP 0-9-1 does not have")
    content_type = message_id = ""
    created_at: datetime | None = None
    headers: dict[str, str] = {}
    others: dict[str, str] = {}
    if flags & _CONTENT_TYPE:
        content_type, position = _text_at(raw, position)
    if flags & _CONTENT_ENCODING:
        others["content-encoding"], position = _text_at(raw, position)
    if flags & _HEADERS:
        (size,) = _LENGTH.unpack_from(raw, position)
        end = position + _LENGTH.size + size
        headers = _table(raw[position:end])
        position = end
    if flags & _DELIVERY_MODE:
        position += 1
    if flags & _PRIORITY:
        position += 1
    for flag, name in _TEXTS_BEFORE_ID.items():
        if flags & flag:
            others[name], position = _text_at(raw, position)
    if flags & _MESSAGE_ID:
        message_id, position = _text_at(raw, position)
    if flags & _TIMESTAMP:
        (seconds,) = _TIME.unpack_from(raw, position)
        position += _TIME.size
        created_at = _time(seconds)
    for flag, name in _TEXTS_AFTER_TIME.items():
        if flags & flag:
            others[name], position = _text_at(raw, position)
    if position > len(raw):
        raise ValueError("cut short")
    if others:
        headers = {**others, **headers}
    return Properties(content_type, message_id, headers, created_at)


def _table(raw: bytes) -> dict[str, str]:
    """A header table with all values as texts."""
    headers: dict[str, str] = {}
    position, end = _LENGTH.size, len(raw)
    while position < end:
        start = position + 1
        position = start + raw[position]
        name = raw[start:position]
        if raw[position] != _LONG_TEXT:
            return _table_of_any(raw)
        (size,) = _LENGTH.unpack_from(raw, position + 1)
        start = position + 1 + _LENGTH.size
        position = start + size
        headers[_name(name)] = raw[start:position].decode("utf-8", "backslashreplace")
    if position > end:
        raise ValueError("cut short")
    return headers


def _table_of_any(raw: bytes) -> dict[str, str]:
    _, values = decode.field_table(raw)
    return {name: _as_text(value) for name, value in values.items() if value is not None}


def _as_text(value: object) -> str:
    """Texts bare, all else as JSON spells it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "backslashreplace")
    try:
        return msgspec.json.encode(value, enc_hook=str).decode()
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return str(value)


def _time(seconds: int) -> datetime | None:
    """A time that a clock can show; others are left out."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _text_at(raw: bytes, position: int) -> tuple[str, int]:
    end = position + 1 + raw[position]
    return raw[position + 1 : end].decode("utf-8", "backslashreplace"), end


def _short_text(text: bytes) -> bytes:
    return bytes((len(text),)) + text


@lru_cache(maxsize=4096)
def _name(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
