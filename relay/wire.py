"""The one table of our metadata names, and the formats in which an event travels.

`encode` turns a message into a body and metadata; `restore` turns them back, so that forward →
broker → reverse is lossless. The spelling of a name is the only thing a transport adds.

Formats: ``envelope`` (one JSON object holding everything, version 1), ``payload`` (the row alone,
the rest as metadata) and ``cloudevents`` (CloudEvents 1.0, structured mode,
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from relay.errors import ConfigurationError, MessageUndecodable
from relay.message import NO_HEADERS, RelayMessage, op_named

Format = Literal["envelope", "payload", "cloudevents"]

ENVELOPE_VERSION = 1
CONTENT_TYPES: Mapping[Format, str] = {
    "envelope": "application/vnd.pgtrickle.envelope+json",
    "payload": "application/json",
    "cloudevents": "application/cloudevents+json",
}


class Spelling(msgspec.Struct, frozen=True):
    """Our metadata names as one transport writes them."""

    dedup_key: str
    op: str
    key: str
    stream_table: str
    outbox_id: str
    refresh_id: str
    full_refresh: str
    created_at: str
    format: str

    @classmethod
    def of(cls, spell: Callable[[str], str]) -> Spelling:
        """Derive all names from one rule over ``Dedup-Key``, ``Op`` and so on."""
        return cls(*(spell(field.replace("_", "-").title()) for field in cls.__struct_fields__))

    def names(self) -> frozenset[str]:
        """All names, in lower case: what is metadata of ours among somebody's headers."""
        return frozenset(_spelled(self))


@functools.cache
def _spelled(spelling: Spelling) -> Mapping[str, str]:
    """How each name is spelled, by the name in lower case: every message that is read asks."""
    return {name.lower(): name for name in msgspec.structs.astuple(spelling)}


@functools.cache
def _spellings(spelling: Spelling) -> frozenset[str]:
    return frozenset(_spelled(spelling).values())


TITLE = Spelling.of(lambda name: f"Pgtrickle-{name}")
HTTP = Spelling.of(lambda name: f"X-Pgtrickle-{name}")
LOWER = Spelling.of(lambda name: f"pgtrickle-{name.lower()}")
FIELD = Spelling.of(lambda name: f"pgt_{name.lower().replace('-', '_')}")


class Encoded(msgspec.Struct, frozen=True, gc=False):
    """A message ready for a transport; ``headers`` are ours and the publisher's together."""

    body: bytes
    headers: dict[str, str]


# Without a zone it is no moment, and can't be compared with one.
_Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """The JSON object of the ``envelope`` format, in the order of its keys."""

    v: int
    dedup_key: str
    key: str | None
    subject: str
    op: str
    payload: msgspec.Raw
    is_full_refresh: bool
    stream_table: str
    outbox_id: int | None
    refresh_id: str | None
    created_at: _Moment | None
    headers: Mapping[str, str]


class _CloudEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    id: str
    source: str
    type: str
    specversion: str
    datacontenttype: str = ""
    subject: str | None = None
    time: _Moment | None = None
    pgtrickleop: str | None = None
    pgtricklestream: str | None = None
    pgtrickleoutboxid: str | None = None
    pgtricklerefreshid: str | None = None
    pgtricklefullrefresh: bool = False
    pgtricklesubject: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


_json = msgspec.json.Encoder()
_document = msgspec.json.Decoder(msgspec.Raw)
# As many as stay in the processor's cache meanwhile.
_BODIES_AT_ONCE = 250
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_envelope = msgspec.json.Decoder(Envelope)
_cloud_event = msgspec.json.Decoder(_CloudEvent)

Encode = Callable[[RelayMessage], Encoded]
EncodeBody = Callable[[RelayMessage], bytes]
EncodeBodies = Callable[[Sequence[RelayMessage]], list[bytes | MessageUndecodable]]
# Many in one go: a call for each costs as much as half of what it does.
_Wrap = Callable[[Sequence[RelayMessage]], Sequence[msgspec.Struct]]
EncodeHeaders = Callable[[RelayMessage], dict[str, str]]
EncodePairs = Callable[[RelayMessage], list[tuple[str, bytes]]]

# Formats in which the headers of a message without headers of the publisher's depend on nothing
# but its dedup key, its op and whether it is a snapshot row.
FEW_HEADERS: frozenset[Format] = frozenset({"envelope", "cloudevents"})


def encoder(format_: str, spelling: Spelling, *, namespace: str = "") -> Encode:
    """The encode function for one format and transport: `body_encoder` and `headers_encoder`."""
    body_of = body_encoder(format_, namespace=namespace)
    headers_of = headers_encoder(format_, spelling)
    return lambda message: Encoded(body_of(message), headers_of(message))


def body_encoder(format_: str, *, namespace: str = "") -> EncodeBody:
    """The function that makes the body for one format.

    ``namespace`` becomes the front of a CloudEvents ``source``. Raises `ConfigurationError` for
    an unknown format. The function itself raises `MessageUndecodable` for a message that the
    format can't hold.
    """
    wrapped = _wrapper(format_, namespace)
    if wrapped is None:
        return lambda message: message.payload
    return _wrapping(wrapped)


def bodies_encoder(format_: str, *, namespace: str = "") -> EncodeBodies:
    """The function that makes the bodies of many messages in one go, at half the cost.

    It gives what `body_encoder` makes of each; for a message that the format can't hold, its error.
    """
    wrapped = _wrapper(format_, namespace)
    if wrapped is None:
        return lambda messages: [message.payload for message in messages]
    body_of = _wrapping(wrapped)

    def bodies_of(messages: Sequence[RelayMessage]) -> list[bytes | MessageUndecodable]:
        bodies: list[bytes | MessageUndecodable] = []
        for start in range(0, len(messages), _BODIES_AT_ONCE):
            some = messages[start : start + _BODIES_AT_ONCE]
            bodies += _together(some, wrapped) or [_body_or_error(body_of, one) for one in some]
        return bodies

    return bodies_of


def headers_encoder(format_: str, spelling: Spelling) -> EncodeHeaders:
    """The function that makes the headers for one format and transport.

    Every encoding carries the format marker and the publisher's own headers; ``payload`` also
    carries all our metadata; ``envelope`` only the dedup key, the op and, for a snapshot row, the
    full-refresh mark, since the body has the rest. Raises `ConfigurationError` for an unknown
    format.
    """
    if format_ == "payload":
        return lambda message: _metadata(message, spelling)
    if format_ == "envelope":
        return lambda message: _envelope_headers(message, spelling)
    if format_ == "cloudevents":
        return lambda message: {
            **message.headers,
            spelling.format: "cloudevents",
            spelling.dedup_key: message.dedup_key,
        }
    raise _unknown(format_)


def pairs_encoder(format_: str, spelling: Spelling) -> EncodePairs:
    """Our headers as names and UTF-8 texts, without the publisher's, at half the cost.

    What is the same for many messages is encoded once. The function raises `UnicodeEncodeError`.
    Raises `ConfigurationError` for an unknown format.
    """
    headers_of = headers_encoder(format_, spelling)
    has_all = format_ == "payload"
    same_of: dict[tuple[str, bool, str], list[tuple[str, bytes]]] = {}

    def pairs_of(message: RelayMessage) -> list[tuple[str, bytes]]:
        kind = message.op, message.is_full_refresh, message.stream_table if has_all else ""
        same = same_of.get(kind)
        if same is None:
            bare = RelayMessage(
                dedup_key="",
                payload=b"",
                op=message.op,
                is_full_refresh=message.is_full_refresh,
                stream_table=message.stream_table,
            )
            same = same_of[kind] = [
                (name, text.encode()) for name, text in headers_of(bare).items() if text
            ]
        pairs = [*same, (spelling.dedup_key, message.dedup_key.encode())]
        if has_all:
            if message.key is not None:
                pairs.append((spelling.key, message.key.encode()))
            if message.outbox_id is not None:
                pairs.append((spelling.outbox_id, b"%d" % message.outbox_id))
            if message.refresh_id is not None:
                pairs.append((spelling.refresh_id, message.refresh_id.encode()))
            if message.created_at is not None:
                pairs.append((spelling.created_at, _isoformat(message.created_at)))
        return pairs

    return pairs_of


def restore(body: bytes, headers: Mapping[str, str], spelling: Spelling) -> RelayMessage | None:
    """The message that `encode` made, or None where this is somebody else's plain payload.

    Only a message that bears our format marker is looked into. What bears the mark but is not
    what it says (another version, a broken object) raises `MessageUndecodable`. What merely looks
    like an envelope is a payload. Header names compare without regard to case.
    """
    own, others = headers, NO_HEADERS
    if not headers.keys() <= _spellings(spelling):
        names = _spelled(spelling)
        others = {name: text for name, text in headers.items() if name.lower() not in names}
        own = {names[name.lower()]: text for name, text in headers.items() if name not in others}
    marker = own.get(spelling.format)
    if marker is None:
        return None
    if marker == "envelope":
        return restore_envelope(body)
    if marker == "cloudevents":
        return _restore_cloud_event(body, others)
    if marker == "payload":
        return _restore_payload(body, own, others, spelling)
    raise MessageUndecodable(
        f"the format marker says {marker[:40]!r}, which this version can't read"
    )


def restore_envelope(body: bytes) -> RelayMessage:
    """The message in a body that is known to be marked as an envelope.

    Raises `MessageUndecodable` where it is none, or of another version.
    """
    try:
        envelope = _envelope.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageUndecodable(f"marked as an envelope, but it is none: {error}") from None
    if envelope.v != ENVELOPE_VERSION:
        raise MessageUndecodable(f"envelope version {envelope.v} is not one this version can read")
    return RelayMessage(
        dedup_key=envelope.dedup_key,
        key=envelope.key,
        subject=envelope.subject,
        op=op_named(envelope.op),
        payload=bytes(envelope.payload),
        is_full_refresh=envelope.is_full_refresh,
        stream_table=envelope.stream_table,
        outbox_id=envelope.outbox_id,
        refresh_id=envelope.refresh_id,
        created_at=envelope.created_at,
        headers=envelope.headers,
    )


def is_json(body: bytes) -> bool:
    """True where the bytes are one JSON document in UTF-8."""
    try:
        _check_json(body)
    except _NOT_JSON:
        return False
    return True


def _check_json(body: bytes) -> None:
    """Raise one of `_NOT_JSON` unless the bytes are one JSON document in UTF-8."""
    _document.decode(body)
    if not body.isascii():
        body.decode()


def _unknown(format_: str) -> ConfigurationError:
    return ConfigurationError(
        f"unknown format {format_!r}", remedy=f"use one of {', '.join(CONTENT_TYPES)}"
    )


def _wrapper(format_: str, namespace: str) -> _Wrap | None:
    """What makes the JSON object around a payload; None where nothing goes around it."""
    if format_ == "payload":
        return None
    if format_ == "envelope":
        return _envelopes
    if format_ == "cloudevents":
        return lambda messages: [_cloud_event_of(message, namespace) for message in messages]
    raise _unknown(format_)


def _wrapping(wrapped: _Wrap) -> EncodeBody:
    """A payload goes into the wrapping JSON as it is, so it must be JSON itself."""

    check, encode = _check_json, _json.encode

    def checked(message: RelayMessage) -> bytes:
        try:
            if not message.is_json:
                check(message.payload)
            return encode(wrapped((message,))[0])
        except UnicodeEncodeError:
            raise MessageUndecodable("a text of the message has no UTF-8 form") from None
        except _NOT_JSON:
            raise MessageUndecodable(
                "the payload is not JSON, which this format has to contain"
            ) from None

    return checked


def _together(messages: Sequence[RelayMessage], wrapped: _Wrap) -> list[bytes] | None:
    """The bodies of all; None where they have to be looked at one by one."""
    if not all(message.is_json for message in messages):
        return None
    try:
        lines = _json.encode_lines(wrapped(messages)).split(b"\n")
    except UnicodeEncodeError:
        return None
    # A payload that has line breaks of its own, between its tokens, makes more lines.
    return lines[:-1] if len(lines) == len(messages) + 1 else None


def _body_or_error(body_of: EncodeBody, message: RelayMessage) -> bytes | MessageUndecodable:
    try:
        return body_of(message)
    except MessageUndecodable as error:
        return error


def _envelopes(messages: Sequence[RelayMessage]) -> Sequence[Envelope]:
    raw = msgspec.Raw
    # By position, in the order of the fields: naming them costs as much again.
    return [
        Envelope(
            ENVELOPE_VERSION,
            message.dedup_key,
            message.key,
            message.subject,
            message.op,
            raw(message.payload),
            message.is_full_refresh,
            message.stream_table,
            message.outbox_id,
            message.refresh_id,
            message.created_at,
            message.headers,
        )
        for message in messages
    ]


def _envelope_headers(message: RelayMessage, spelling: Spelling) -> dict[str, str]:
    headers = {
        **message.headers,
        spelling.format: "envelope",
        spelling.dedup_key: message.dedup_key,
        spelling.op: message.op,
    }
    if message.is_full_refresh:
        headers[spelling.full_refresh] = "true"
    return headers


def _metadata(message: RelayMessage, spelling: Spelling) -> dict[str, str]:
    headers = {
        **message.headers,
        spelling.format: "payload",
        spelling.dedup_key: message.dedup_key,
        spelling.op: message.op,
    }
    if message.key is not None:
        headers[spelling.key] = message.key
    if message.stream_table:
        headers[spelling.stream_table] = message.stream_table
    if message.outbox_id is not None:
        headers[spelling.outbox_id] = str(message.outbox_id)
    if message.refresh_id is not None:
        headers[spelling.refresh_id] = message.refresh_id
    if message.is_full_refresh:
        headers[spelling.full_refresh] = "true"
    if message.created_at is not None:
        headers[spelling.created_at] = _isoformat(message.created_at).decode()
    return headers


def _isoformat(moment: datetime) -> bytes:
    """As `datetime.isoformat` writes it, in less than half the time."""
    text = _json.encode(moment)[1:-1]
    return text[:-1] + b"+00:00" if text.endswith(b"Z") else text


def _cloud_event_of(message: RelayMessage, namespace: str) -> _CloudEvent:
    source = f"/{namespace}/{message.stream_table}" if namespace else f"/{message.stream_table}"
    return _CloudEvent(
        specversion="1.0",
        datacontenttype="application/json",
        id=message.dedup_key,
        source=source,
        type=f"{message.stream_table}.{message.op}" if message.stream_table else message.op,
        subject=message.key,
        time=message.created_at,
        pgtrickleop=message.op,
        pgtricklestream=message.stream_table or None,
        pgtrickleoutboxid=None if message.outbox_id is None else str(message.outbox_id),
        pgtricklerefreshid=message.refresh_id,
        pgtricklefullrefresh=message.is_full_refresh,
        pgtricklesubject=message.subject or None,
        data=msgspec.Raw(message.payload),
    )


def _restore_cloud_event(body: bytes, others: Mapping[str, str]) -> RelayMessage:
    try:
        event = _cloud_event.decode(body)
        outbox_id = None if event.pgtrickleoutboxid is None else int(event.pgtrickleoutboxid)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageUndecodable(f"marked as a CloudEvent, but it is none: {error}") from None
    except ValueError:
        raise MessageUndecodable(
            "marked as a CloudEvent, but its pgtrickleoutboxid is no number"
        ) from None
    return RelayMessage(
        dedup_key=event.id,
        key=event.subject,
        subject=event.pgtricklesubject or event.type,
        op=op_named(event.pgtrickleop or "event"),
        payload=bytes(event.data),
        is_full_refresh=event.pgtricklefullrefresh,
        stream_table=event.pgtricklestream or "",
        outbox_id=outbox_id,
        refresh_id=event.pgtricklerefreshid,
        created_at=event.time,
        headers=others,
    )


def _restore_payload(
    body: bytes, own: Mapping[str, str], others: Mapping[str, str], spelling: Spelling
) -> RelayMessage:
    dedup_key, outbox_id = own.get(spelling.dedup_key), own.get(spelling.outbox_id)
    created_at = own.get(spelling.created_at)
    if dedup_key is None:
        raise MessageUndecodable(
            f"marked as a payload of ours, but {spelling.dedup_key} is missing"
        )
    try:
        return RelayMessage(
            dedup_key=dedup_key,
            key=own.get(spelling.key),
            op=op_named(own.get(spelling.op, "event")),
            payload=body,
            is_full_refresh=own.get(spelling.full_refresh) == "true",
            stream_table=own.get(spelling.stream_table, ""),
            outbox_id=None if outbox_id is None else int(outbox_id),
            refresh_id=own.get(spelling.refresh_id),
            created_at=None if created_at is None else _moment(created_at),
            headers=others or NO_HEADERS,
        )
    except ValueError:
        raise MessageUndecodable(
            f"a metadata header is malformed: {spelling.outbox_id} has to be a number,"
            f" {spelling.created_at} a time with its zone"
        ) from None


def _moment(text: str) -> datetime:
    """Raises `ValueError`, also for a time without a zone."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError
    return moment
