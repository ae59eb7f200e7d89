"""A message as the fields of a stream entry, and back.

``payload`` is the body, ``pgt_dedup_key`` and the like our metadata (`relay.wire.FIELD`), and
``header:NAME`` a header of the publisher: the prefix keeps its names apart from ours. Redis takes
any bytes, so nothing is escaped.

An entry of somebody else is a payload with headers where it has the payload's field, and one JSON
object of all its fields, as texts, where it has not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import msgspec
from msgspec import structs

from relay import wire
from relay.backends.redis.connection import Reply, pack_one
from relay.contracts import Rejected
from relay.errors import MessageTooLarge, MessageUndecodable
from relay.message import NO_HEADERS, RelayMessage

PAYLOAD = "payload"
HEADER = "header:"

_OWN = frozenset(str(name) for name in structs.astuple(wire.FIELD))
_OWN_BYTES: Mapping[bytes, str] = {name.encode(): name for name in _OWN}
_HEADER = HEADER.encode()
_PAYLOAD = PAYLOAD.encode()
_FORMAT = wire.FIELD.format.encode()
_DEDUP_KEY = wire.FIELD.dedup_key.encode()
_PACKED_PAYLOAD = pack_one(_PAYLOAD)
_KEY_MARK = "dedup key"
_END = b"\r\n"
# What the lengths of body and dedup key add at most to those of the frame's own.
_LONGEST_LENGTHS = 24

LENGTHS = [b"$%d\r\n" % size for size in range(4096)]
"""By its bytes, what stands in front of a packed argument."""


class Limits(msgspec.Struct, frozen=True):
    """The most bytes of an entry as a whole, and of one value of it."""

    message_bytes: int
    value_bytes: int


_NO_LIMITS = Limits(2**40, 2**40)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry as it was read; without fields it was removed from the stream.

    ``size``: bytes of its fields.
    """

    id: bytes
    fields: Sequence[bytes] | None
    size: int = 0


def packed_fields(message: RelayMessage, encode: wire.Encode, limits: Limits) -> tuple[int, bytes]:
    """How many arguments an ``XADD`` gets for this message, and these packed.

    Raises `MessageUndecodable`, or `MessageTooLarge` naming the limit.
    """
    try:
        encoded = encode(message)
        own = encoded.headers
        if not _OWN.isdisjoint(message.headers):
            # A publisher's header of such a name must not pass for our metadata.
            own = encode(structs.replace(message, headers=NO_HEADERS)).headers
        arguments = [_packed_name(_PAYLOAD), pack_one(encoded.body)]
        longest = len(encoded.body)
        for name, value in own.items():
            if name in _OWN:
                field = value.encode()
                arguments += (_packed_name(name.encode()), pack_one(field))
                longest = max(longest, len(field))
        for name, value in message.headers.items():
            field = value.encode()
            arguments += (_packed_name(f"{HEADER}{name}".encode()), pack_one(field))
            longest = max(longest, len(field))
    except UnicodeEncodeError:
        raise MessageUndecodable("a text of the message has no UTF-8 form") from None
    packed = b"".join(arguments)
    if len(packed) > limits.message_bytes:
        raise MessageTooLarge(
            f"the entry has {len(packed)} bytes, max_message_bytes is {limits.message_bytes} bytes"
        )
    if longest > limits.value_bytes:
        raise MessageTooLarge(
            f"a field has {longest} bytes, the server's proto-max-bulk-len is"
            f" {limits.value_bytes} bytes"
        )
    return len(arguments), packed


class Frame(NamedTuple):
    """What stands around the body and the dedup key of a command, the same for many messages.

    ``arguments``: how many there are of the fields. ``size``: bytes, with all that the lengths of
    body and dedup key add to them.
    """

    arguments: int
    front: bytes
    between: bytes
    behind: bytes
    size: int

    def behind_head(self, head: bytes) -> Frame:
        """The same frame with more in front of it."""
        return self._replace(front=head + self.front, size=len(head) + self.size)


def frame_of(message: RelayMessage, format_: str, namespace: str) -> Frame | None:
    """The frame of every message that shares op and full-refresh mark, and has no headers.

    None where fields have to be packed one message at a time.
    """
    if format_ not in wire.FEW_HEADERS or message.headers:
        return None
    encode = wire.encoder(format_, wire.FIELD, namespace=namespace)
    marked = structs.replace(message, dedup_key=_KEY_MARK, payload=b"0", is_json=True)
    count, packed = packed_fields(marked, encode, _NO_LIMITS)
    _, _, rest = packed.partition(
        _PACKED_PAYLOAD + pack_one(encode(marked).body).removesuffix(_END)
    )
    between, _, behind = rest.partition(pack_one(_KEY_MARK.encode()))
    size = len(_PACKED_PAYLOAD) + len(between) + len(_END + behind) + _LONGEST_LENGTHS
    return Frame(count, _PACKED_PAYLOAD, between, _END + behind, size)


def entries(reply: Sequence[Reply]) -> Iterator[Entry]:
    """The entries of an answer, in its order."""
    for row in reply:
        match row:
            case [bytes() as id_, list() as fields]:
                texts = cast("list[bytes]", fields)
                yield Entry(id_, texts, sum(map(len, texts)))
            case [bytes() as id_, None]:
                yield Entry(id_, None)
            case _:
                pass


def decoded(entry: Entry, stream: str, payload_field: str) -> RelayMessage | Rejected:
    """The message of an entry, or why it is none, with the raw body."""
    id_ = entry.id.decode()
    position = f"redis:{stream}:{id_}"
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
    if fields[_FORMAT] == b"envelope":
        # The body has everything; the other fields are for those who filter.
        own, headers = {wire.FIELD.format: "envelope"}, {}
    else:
        own = {_OWN_BYTES[name]: _text(text) for name, text in fields.items() if name in _OWN_BYTES}
        headers = {
            _text(name[len(_HEADER) :]): _text(text)
            for name, text in fields.items()
            if name.startswith(_HEADER)
        }
    try:
        if body is None:
            raise MessageUndecodable(f"entry {id_} is marked as ours, but has no field {PAYLOAD}")
        restored = wire.restore(body, own, wire.FIELD)
    except MessageUndecodable as error:
        broken = RelayMessage(
            dedup_key=_text(fields.get(_DEDUP_KEY, b"")) or position,
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
        _text(name): _text(text)
        for name, text in fields.items()
        if name != payload_field and name not in _OWN_BYTES
    }
    message = RelayMessage(
        dedup_key=_text(own_key) if own_key else position,
        payload=msgspec.json.encode(rest) if body is None else body,
        subject=stream,
        headers=NO_HEADERS if body is None else rest,
        token=id_,
    )
    if body is not None and not wire.is_json(body):
        return Rejected(message, MessageUndecodable(f"entry {id_} of {stream!r} is not JSON"))
    if body is None and not _is_text(fields):
        reason = f"entry {id_} of {stream!r} has a field that is not UTF-8"
        return Rejected(message, MessageUndecodable(reason))
    return message


def _is_text(fields: Mapping[bytes, bytes]) -> bool:
    try:
        for name, text in fields.items():
            name.decode()
            text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _text(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")


@lru_cache(maxsize=1024)
def _packed_name(name: bytes) -> bytes:
    return pack_one(name)
