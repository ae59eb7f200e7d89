"""A message of the relay as an AMQP message, and back.

Our metadata are headers ``Pgtrickle-…`` (`relay.wire.TITLE`), the publisher's headers stand beside
them under their own names. A name that is an order to the broker (``CC``, ``BCC``) or could pass
for metadata of ours gets its first letter written as ``%XX``, as ``%`` itself is; `decoded` undoes
it. The message id is the dedup key, or the SHA-256 of one that is longer than 255 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from urllib.parse import unquote
from uuid import uuid4

from msgspec import structs

from relay import wire
from relay.backends.rabbitmq import frame
from relay.backends.rabbitmq import properties as amqp
from relay.backends.rabbitmq.options import MAX_NAME_BYTES
from relay.contracts import Rejected
from relay.errors import MessageRejected, MessageTooLarge, MessageUndecodable
from relay.message import NO_HEADERS, RelayMessage

_RESERVED = re.compile(r"CC$|BCC$|pgtrickle-", re.IGNORECASE)
_ENVELOPE = wire.CONTENT_TYPES["envelope"]
_ENVELOPE_MARK: Mapping[str, str] = {wire.TITLE.format: "envelope"}


class HeaderInvalid(MessageRejected):
    """A header of this message is none that AMQP can spell."""

    found_before_sending = True


class Encoder:
    """Makes the frames that follow a publish. ``frame_max`` is the connection's."""

    def __init__(self, format_: wire.Format, *, namespace: str) -> None:
        self._encode_body = wire.body_encoder(format_, namespace=namespace)
        self._headers_of = wire.headers_encoder(format_, wire.TITLE)
        self._has_few_headers = format_ in wire.FEW_HEADERS
        self._before = amqp.before(wire.CONTENT_TYPES[format_])
        # Fields of the header table by op and full-refresh mark, without the dedup key's.
        self._fields: dict[tuple[str, bool], bytes] = {}
        self._key_name = wire.TITLE.dedup_key

    def body(self, message: RelayMessage) -> bytes:
        """The body. Raises `MessageUndecodable` for one that the format can't hold."""
        try:
            return self._encode_body(message)
        except UnicodeEncodeError:
            raise _not_unicode() from None

    def header(self, message: RelayMessage, body_bytes: int, frame_max: int) -> bytes:
        """The header frame. Raises `MessageRejected` for headers that AMQP can't carry."""
        try:
            key = message.dedup_key.encode()
            packed = b"".join(
                (
                    self._before,
                    amqp.table(self._table(message, key)),
                    amqp.after(key if len(key) <= MAX_NAME_BYTES else _digest(key)),
                )
            )
        except UnicodeEncodeError:
            raise _not_unicode() from None
        size = frame.header_size(packed)
        if size > frame_max:
            raise MessageTooLarge(
                f"the headers have {size} bytes, the broker's frame_max is {frame_max} bytes"
            )
        return frame.header(packed, body_bytes)

    def _table(self, message: RelayMessage, key: bytes) -> bytes:
        own_key = amqp.field(self._key_name.encode(), key)
        if not self._has_few_headers or message.headers:
            return self._fields_of(message) + own_key
        slot = (message.op, message.is_full_refresh)
        fields = self._fields.get(slot)
        if fields is None:
            fields = self._fields[slot] = self._fields_of(message)
        return fields + own_key

    def _fields_of(self, message: RelayMessage) -> bytes:
        """All headers but the dedup key."""
        bare = structs.replace(message, headers=NO_HEADERS) if message.headers else message
        own = self._headers_of(bare)
        fields = [
            amqp.field(name.encode(), value.encode())
            for name, value in own.items()
            if name != self._key_name
        ]
        fields += [
            amqp.field(_wire_name(name), value.encode()) for name, value in message.headers.items()
        ]
        return b"".join(fields)


def message_id_of(message: RelayMessage) -> str:
    """The message id under which this message is published."""
    key = message.dedup_key.encode("utf-8", "surrogatepass")
    return message.dedup_key if len(key) <= MAX_NAME_BYTES else _digest(key).decode()


def decoded(content: frame.Content, queue: str) -> RelayMessage | Rejected:
    """The message that was delivered, or why it is none, with the raw body."""
    try:
        found = amqp.decoded(content.properties)
    except ValueError as error:
        broken = RelayMessage(
            dedup_key=str(uuid4()), payload=content.body, subject=content.routing_key
        )
        return Rejected(
            broken, MessageUndecodable(f"a message of {queue!r} has broken properties: {error}")
        )
    headers = found.headers
    if wire.TITLE.format in headers:
        return _of_ours(content, found, headers)
    if found.content_type == _ENVELOPE:
        return _of_ours(content, found, {**headers, **_ENVELOPE_MARK})
    return _of_others(content, found, queue)


def _of_ours(
    content: frame.Content, found: amqp.Properties, headers: Mapping[str, str]
) -> RelayMessage | Rejected:
    is_envelope = headers[wire.TITLE.format] == "envelope"
    try:
        # The body of an envelope has everything; its headers are for those who filter.
        own = _ENVELOPE_MARK if is_envelope else headers
        restored = wire.restore(content.body, own, wire.TITLE)
    except MessageUndecodable as error:
        broken = RelayMessage(
            dedup_key=_foreign_key(found),
            payload=content.body,
            subject=content.routing_key,
            headers=headers,
        )
        return Rejected(broken, error)
    assert restored is not None, "the marker is there"  # noqa: S101 - for the type checker
    if not restored.subject:
        restored = structs.replace(restored, subject=content.routing_key)
    if is_envelope or not restored.headers:
        return restored
    names = {_own_name(name): text for name, text in restored.headers.items()}
    return structs.replace(restored, headers=names)


def _of_others(
    content: frame.Content, found: amqp.Properties, queue: str
) -> RelayMessage | Rejected:
    message = RelayMessage(
        dedup_key=_foreign_key(found),
        payload=content.body,
        subject=content.routing_key,
        created_at=found.created_at,
        headers=found.headers or NO_HEADERS,
    )
    if wire.is_json(content.body):
        return message
    encoding = found.headers.get("content-encoding", "")
    encoded = f" (its content-encoding is {encoding!r})" if encoding else ""
    return Rejected(message, MessageUndecodable(f"a message of {queue!r} is not JSON{encoded}"))


def _foreign_key(found: amqp.Properties) -> str:
    """Without an id a redelivery can't be told from a new message."""
    return found.message_id or found.headers.get(wire.TITLE.dedup_key) or str(uuid4())


def _digest(key: bytes) -> bytes:
    return f"sha256:{sha256(key).hexdigest()}".encode()


def _not_unicode() -> MessageUndecodable:
    return MessageUndecodable("a text of the message has no UTF-8 form")


@lru_cache(maxsize=4096)
def _wire_name(name: str) -> bytes:
    escaped = name.replace("%", "%25")
    if _RESERVED.match(name):
        escaped = f"%{ord(name[0]):02X}{escaped[1:]}"
    encoded = escaped.encode()
    if len(encoded) > MAX_NAME_BYTES:
        raise HeaderInvalid(
            f"the name of a header has {len(encoded)} bytes, the limit is {MAX_NAME_BYTES} bytes"
        )
    return encoded


def _own_name(name: str) -> str:
    return unquote(name, errors="replace") if "%" in name else name
