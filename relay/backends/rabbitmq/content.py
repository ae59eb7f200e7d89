"""A message of the relay as an AMQP message, and back.

Our metadata are headers ``Pgtrickle-…`` (`relay.wire.TITLE`), the publisher's headers stand beside
them under their own names. A name that is an order to the broker (``CC``, ``BCC``) or could pass
for metadata of ours gets its first letter written as ``%XX``, as ``%`` itself is; `decoded` undoes
it. The message id is the dedup key, or the SHA-256 of one that is longer than 255 bytes. Of
somebody else's message the properties become headers under their AMQP names, unless a header of
that name is there, and every value becomes a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from urllib.parse import unquote_to_bytes
from uuid import uuid4

import msgspec
from aiormq import spec
from aiormq.abc import DeliveredMessage
from msgspec import structs

from relay import wire
from relay.backends.rabbitmq.options import MAX_NAME_BYTES
from relay.backends.rabbitmq.transport import UNREADABLE
from relay.contracts import Rejected
from relay.errors import MessageTooLarge, MessageUndecodable
from relay.message import NO_HEADERS, RelayMessage, text_of

_RESERVED = re.compile(r"CC$|BCC$|pgtrickle-", re.IGNORECASE)
_ENVELOPE = wire.CONTENT_TYPES["envelope"]
_ENVELOPE_MARK: Mapping[str, str] = {wire.TITLE.format: "envelope"}
_PERSISTENT = 2
# The client cuts off what is longer.
_MAX_HEADER_NAME_BYTES = 128
# What AMQP puts around a text of the header table, and around everything else that is sent.
_BYTES_OF_A_FIELD = 6
_BYTES_OF_A_FRAME = 30
_TEXTS: Mapping[str, str] = {
    "content-encoding": "content_encoding",
    "correlation-id": "correlation_id",
    "reply-to": "reply_to",
    "expiration": "expiration",
    "type": "message_type",
    "user-id": "user_id",
    "app-id": "app_id",
}


class Encoder:
    """Makes the body and the properties of a message.

    ``body``: see `relay.wire.body_encoder`. ``frame_max`` is the connection's.
    """

    def __init__(self, format_: wire.Format, *, namespace: str) -> None:
        self.body = wire.body_encoder(format_, namespace=namespace)
        self._headers_of = wire.headers_encoder(format_, wire.TITLE)
        self._content_type = wire.CONTENT_TYPES[format_]

    def properties(self, message: RelayMessage, frame_max: int) -> spec.Basic.Properties:
        """The properties. Raises `MessageRejected` for headers that AMQP can't carry."""
        own = structs.replace(message, headers=NO_HEADERS) if message.headers else message
        headers, message_id = self._headers_of(own), message_id_of(message)
        content_type = self._content_type
        try:
            headers |= {_wire_name(name): text for name, text in message.headers.items()}
            texts = "".join((*headers, *headers.values(), message_id, content_type)).encode()
        except UnicodeEncodeError:
            raise MessageUndecodable("a text of the message has no UTF-8 form") from None
        size = len(texts) + _BYTES_OF_A_FIELD * len(headers) + _BYTES_OF_A_FRAME
        if size > frame_max:
            raise MessageTooLarge(
                f"the headers have {size} bytes, the broker's frame_max is {frame_max} bytes"
            )
        return spec.Basic.Properties(
            content_type=content_type,
            headers={**headers},
            delivery_mode=_PERSISTENT,
            message_id=message_id,
        )


def message_id_of(message: RelayMessage) -> str:
    """The message id under which this message is published."""
    key = message.dedup_key
    if len(key) <= MAX_NAME_BYTES // 4:
        return key
    encoded = key.encode("utf-8", "surrogatepass")
    if len(encoded) <= MAX_NAME_BYTES:
        return key
    return f"sha256:{sha256(encoded).hexdigest()}"


def decoded(delivered: DeliveredMessage, queue: str) -> RelayMessage | Rejected:
    """The message that was delivered, or why it is none, with the raw body."""
    properties, subject = delivered.header.properties, delivered.routing_key or ""
    headers = _headers(properties)
    # Without an id a redelivery can't be told from a new message.
    foreign_key = properties.message_id or headers.get(wire.TITLE.dedup_key) or str(uuid4())
    message = RelayMessage(
        dedup_key=foreign_key,
        payload=delivered.body,
        subject=subject,
        created_at=properties.timestamp,
        headers=headers or NO_HEADERS,
    )
    if UNREADABLE in (properties.content_type, subject):
        broken = MessageUndecodable(f"a message of {queue!r} has broken properties or names")
        return Rejected(message, broken)
    if wire.TITLE.format in headers:
        return _of_ours(message, headers)
    if properties.content_type == _ENVELOPE:
        return _of_ours(message, {**headers, **_ENVELOPE_MARK})
    if wire.is_json(message.payload):
        return message
    encoding = headers.get("content-encoding", "")
    encoded = f" (its content-encoding is {encoding!r})" if encoding else ""
    return Rejected(message, MessageUndecodable(f"a message of {queue!r} is not JSON{encoded}"))


def _of_ours(raw: RelayMessage, headers: Mapping[str, str]) -> RelayMessage | Rejected:
    is_envelope = headers[wire.TITLE.format] == "envelope"
    try:
        # The body of an envelope has everything; its headers are for those who filter.
        own = _ENVELOPE_MARK if is_envelope else headers
        restored = wire.restore(raw.payload, own, wire.TITLE)
    except MessageUndecodable as error:
        return Rejected(raw, error)
    assert restored is not None, "the marker is there"  # noqa: S101 - for the type checker
    if not restored.subject:
        restored = structs.replace(restored, subject=raw.subject)
    if is_envelope or not restored.headers:
        return restored
    names = {_own_name(name): text for name, text in restored.headers.items()}
    return structs.replace(restored, headers=names)


def _headers(properties: spec.Basic.Properties) -> dict[str, str]:
    own = properties.headers or {}
    headers = {name: _as_text(value) for name, value in own.items() if value is not None}
    for name, attribute in _TEXTS.items():
        if value := getattr(properties, attribute):
            headers.setdefault(name, value)
    return headers


def _as_text(value: object) -> str:
    """Texts bare, all else as JSON spells it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        return text_of(bytes(value))
    try:
        return msgspec.json.encode(value, enc_hook=str).decode()
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return str(value)


@lru_cache(maxsize=4096)
def _wire_name(name: str) -> str:
    escaped = name.replace("%", "%25")
    if _RESERVED.match(name):
        escaped = f"%{ord(name[0]):02X}{escaped[1:]}"
    size = len(escaped.encode())
    if size > _MAX_HEADER_NAME_BYTES:
        raise MessageTooLarge(
            f"the name of a header has {size} bytes, the limit is {_MAX_HEADER_NAME_BYTES} bytes"
        )
    return escaped


def _own_name(name: str) -> str:
    return text_of(unquote_to_bytes(name)) if "%" in name else name
