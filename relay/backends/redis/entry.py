"""A message as the fields of a stream entry, and back.

``payload`` is the body, ``pgt_dedup_key`` and the like our metadata (`relay.wire.FIELD`), and
``header:NAME`` a header of the publisher: the prefix keeps its names apart from ours. Redis takes
any bytes, so nothing is escaped.

An entry of somebody else is a payload with headers where it has the payload's field, and one JSON
object of all its fields, as texts, where it has not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import msgspec
from msgspec import structs

from relay import wire
from relay.backends.redis.connection import Reply
from relay.contracts import Rejected
from relay.errors import MessageUndecodable
from relay.message import NO_HEADERS, RelayMessage, text_of

HEADER = "header:"

_PAYLOAD = b"payload"
_OWN: Mapping[bytes, str] = {str(name).encode(): str(name) for name in structs.astuple(wire.FIELD)}
_FORMAT = wire.FIELD.format.encode()
_DEDUP_KEY = wire.FIELD.dedup_key.encode()


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry as it was read; without fields it was removed from the stream.

    ``size``: bytes of its fields.
    """

    id: bytes
    fields: Sequence[bytes] | None
    size: int = 0


def fields_of(message: RelayMessage, body: bytes, pairs_of: wire.EncodePairs) -> list[bytes | str]:
    """Names and values in turn. Raises `UnicodeEncodeError`."""
    fields: list[bytes | str] = [_PAYLOAD, body]
    for pair in pairs_of(message):
        fields += pair
    for name, value in message.headers.items():
        fields += (HEADER + name, value)
    return fields


def entries(reply: Sequence[Reply]) -> Iterator[Entry]:
    """The entries of an answer, in its order."""
    for row in reply:
        match row:
            case [bytes() as id_, list() as fields]:
                texts = cast("list[bytes]", fields)
                yield Entry(id_, texts, sum(map(len, texts)))
            case [bytes() as id_, _]:
                yield Entry(id_, None)


def decoded(
    entry: Entry, stream: str, payload_field: str, generation: str = ""
) -> RelayMessage | Rejected:
    """The message of an entry, or why it is none, with the raw body.

    ``generation`` tells the stream from others of that name before and after it.
    """
    id_ = entry.id.decode()
    position = ":".join(filter(None, ("redis", stream, generation, id_)))
    if entry.fields is None:
        gone = RelayMessage(dedup_key=position, payload=b"", subject=stream, token=id_)
        reason = f"entry {id_} of the stream {stream!r} was removed before it was handled"
        return Rejected(gone, MessageUndecodable(reason))
    fields = dict(zip(entry.fields[::2], entry.fields[1::2], strict=False))
    if _FORMAT in fields:
        return _of_ours(fields, position, stream, id_)
    return _of_others(fields, position, stream, id_, payload_field.encode())


def _of_ours(
    fields: Mapping[bytes, bytes], position: str, stream: str, id_: str
) -> RelayMessage | Rejected:
    body = fields.get(_PAYLOAD)
    own = {_OWN[name]: text_of(text) for name, text in fields.items() if name in _OWN}
    headers = {
        text_of(name).removeprefix(HEADER): text_of(text)
        for name, text in fields.items()
        if name.startswith(HEADER.encode())
    }
    try:
        if body is None:
            raise MessageUndecodable(f"entry {id_} is marked as ours, but has no payload")
        restored = wire.restore(body, own, wire.FIELD)
    except MessageUndecodable as error:
        broken = RelayMessage(
            dedup_key=text_of(fields.get(_DEDUP_KEY, b"")) or position,
            payload=body or b"",
            subject=stream,
            headers=headers,
            token=id_,
        )
        return Rejected(broken, error)
    assert restored is not None, "the format's field is there"  # noqa: S101 - for the type checker
    return structs.replace(
        restored,
        subject=restored.subject or stream,
        headers=restored.headers or headers or NO_HEADERS,
        token=id_,
    )


def _of_others(
    fields: Mapping[bytes, bytes], position: str, stream: str, id_: str, payload_field: bytes
) -> RelayMessage | Rejected:
    body = fields.get(payload_field)
    own_key = fields.get(_DEDUP_KEY)
    rest = {
        text_of(name): text_of(text)
        for name, text in fields.items()
        if name != payload_field and name not in _OWN
    }
    message = RelayMessage(
        dedup_key=text_of(own_key) if own_key else position,
        payload=msgspec.json.encode(rest) if body is None else body,
        subject=stream,
        headers=NO_HEADERS if body is None else rest,
        token=id_,
    )
    if body is not None and not wire.is_json(body):
        return Rejected(message, MessageUndecodable(f"entry {id_} of {stream!r} is not JSON"))
    try:
        if body is None:
            b" ".join(part for pair in fields.items() for part in pair).decode()
    except UnicodeDecodeError:
        reason = f"entry {id_} of {stream!r} has a field that is not UTF-8"
        return Rejected(message, MessageUndecodable(reason))
    return message
