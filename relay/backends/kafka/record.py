"""A message as a Kafka record, and back.

The value is the body, the headers are ``pgtrickle-dedup-key`` and the like (`relay.wire.LOWER`)
and the publisher's own, by their names; a publisher's header that has one of our names is left
out, so that it can't pass for our metadata. A record of somebody else is a payload with headers
and its key; without a value (a tombstone) it is the delete of its key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiokafka import ConsumerRecord
from msgspec import structs

from relay import wire
from relay.contracts import Rejected
from relay.errors import MessageUndecodable
from relay.message import NO_HEADERS, RelayMessage, text_of

Header = tuple[str, bytes]

_OWN = wire.LOWER.names()
_FORMAT = wire.LOWER.format
_DEDUP_KEY = wire.LOWER.dedup_key
_MARKED_AS_ENVELOPE = (_FORMAT, b"envelope")


class RecordEncoder:
    """Makes values and headers of messages, in one format."""

    def __init__(self, format_: str, namespace: str) -> None:
        self.values = wire.bodies_encoder(format_, namespace=namespace)
        self._pairs_of = wire.pairs_encoder(format_, wire.LOWER)

    def headers(self, message: RelayMessage) -> list[Header]:
        """The headers. Raises `MessageUndecodable` for a text that has no UTF-8 form."""
        try:
            own = self._pairs_of(message)
            if message.headers:
                for name, text in message.headers.items():
                    # The client encodes the name, too.
                    name.encode()
                    if name.lower() not in _OWN:
                        own.append((name, text.encode()))
        except UnicodeEncodeError:
            raise MessageUndecodable("a text of the message has no UTF-8 form") from None
        return own


def decoded(record: ConsumerRecord) -> RelayMessage | Rejected:
    """The message of a record, or why it is none, with the raw body."""
    headers = record.headers
    if _MARKED_AS_ENVELOPE in headers:
        # The body has everything; the other headers are for those who filter.
        return _of_ours(record, None)
    texts = _texts(headers)
    if _FORMAT in texts or any(name.lower() == _FORMAT for name in texts):
        return _of_ours(record, texts)
    return _of_others(record, texts)


def _texts(headers: Sequence[tuple[str, bytes | None]]) -> Mapping[str, str]:
    """The headers as texts, see `text_of`, which nearly none of them needs."""
    try:
        texts = {name: text.decode() for name, text in headers if text is not None}
        if "\\x" not in "".join(texts.values()):
            return texts
    except UnicodeDecodeError:
        pass
    return {name: text_of(text) for name, text in headers if text is not None}


def _of_ours(record: ConsumerRecord, headers: Mapping[str, str] | None) -> RelayMessage | Rejected:
    """``headers`` None: it is an envelope."""
    body = record.value
    try:
        if body is None:
            raise MessageUndecodable("the record is marked as ours, but has no value")
        restored = (
            wire.restore_envelope(body)
            if headers is None
            else wire.restore(body, headers, wire.LOWER)
        )
    except MessageUndecodable as error:
        texts = _texts(record.headers)
        broken = RelayMessage(
            dedup_key=texts.get(_DEDUP_KEY) or _position(record),
            payload=body or b"",
            subject=record.topic,
            headers={name: text for name, text in texts.items() if name.lower() not in _OWN},
        )
        return Rejected(broken, error)
    assert restored is not None, "the format's header is there"  # noqa: S101 - for the type checker
    return restored if restored.subject else structs.replace(restored, subject=record.topic)


def _of_others(record: ConsumerRecord, texts: Mapping[str, str]) -> RelayMessage | Rejected:
    own_key = next((text for name, text in texts.items() if name.lower() == _DEDUP_KEY), "")
    body = record.value
    message = RelayMessage(
        dedup_key=own_key or _position(record),
        payload=b"null" if body is None else body,
        key=None if record.key is None else text_of(record.key),
        subject=record.topic,
        op="delete" if body is None else "event",
        headers={name: text for name, text in texts.items() if name.lower() not in _OWN}
        if texts
        else NO_HEADERS,
    )
    if body is not None and not wire.is_json(body):
        reason = (
            f"record {record.offset} of {record.topic!r}, partition {record.partition}, is not JSON"
        )
        return Rejected(message, MessageUndecodable(reason))
    return message


def position_key(topic: str, partition: int, offset: int, timestamp: int | None = None) -> str:
    """The dedup key of a record that brings none.

    A topic that is deleted and created again has the same offsets again, at other times.
    """
    known = f"kafka:{topic}:{partition}:{offset}"
    return known if timestamp is None else f"{known}:{timestamp}"


def _position(record: ConsumerRecord) -> str:
    return position_key(record.topic, record.partition, record.offset, record.timestamp)
