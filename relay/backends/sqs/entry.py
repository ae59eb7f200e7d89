"""A message as the entry of a ``SendMessageBatch``, and a received one back.

Our metadata are message attributes, ``Pgtrickle-Dedup-Key`` and the like (`relay.wire.TITLE`), and
``Pgtrickle-Subject``; a header of the publisher is an attribute of its own name. SQS takes ten
attributes at most, names of certain characters, texts that are not empty, and no character that
XML 1.0 forbids. What does not fit travels as one JSON object in the attribute ``Pgtrickle-More``,
with the members ``metadata`` and ``headers``; with the format ``envelope`` it is left out, since
the body has everything. In a body that is JSON such characters are escaped; one that is none is
refused for them.

A message of somebody else is a payload with its attributes as headers, and its message group as
key; binary attributes come as base64.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TypedDict

import msgspec
from msgspec import structs

from relay import wire
from relay.contracts import Rejected
from relay.errors import MessageTooLarge, MessageUndecodable
from relay.message import NO_HEADERS, RelayMessage

SUBJECT = "Pgtrickle-Subject"
MORE = "Pgtrickle-More"
TRACE = "AWSTraceHeader"

_OWN = wire.TITLE.names() | {SUBJECT.lower()}
_RESERVED = _OWN | {MORE.lower()}
_MOST_ATTRIBUTES = 10
_TYPE = "String"
_NAME = re.compile(r"(?!\.)(?!.*\.\.)[A-Za-z0-9_.-]{1,256}(?<!\.)")
_THEIRS = ("aws.", "amazon.")
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Attribute(TypedDict, total=False):
    """One message attribute as the client library has it."""

    DataType: str
    StringValue: str
    BinaryValue: bytes


class Received(TypedDict, total=False):
    """One received message as the client library has it."""

    MessageId: str
    ReceiptHandle: str
    Body: str
    Attributes: dict[str, str]
    MessageAttributes: dict[str, Attribute]


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A message ready to be sent; ``size`` is what SQS counts: body and attributes, in bytes."""

    body: str
    attributes: Mapping[str, Attribute]
    size: int


class _More(msgspec.Struct, frozen=True):
    metadata: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}


def entry_maker(format_: str, *, namespace: str = "") -> Callable[[RelayMessage], Entry]:
    """The function that makes the entries of one format. Raises `ConfigurationError`.

    The function itself raises `MessageUndecodable` for a message that SQS can't carry.
    """
    body_of = wire.body_encoder(format_, namespace=namespace)
    headers_of = wire.headers_encoder(format_, wire.TITLE)
    has_body_all = format_ == "envelope"

    def make(message: RelayMessage) -> Entry:
        headers = message.headers
        # A publisher's header must not pass for our metadata.
        bare = structs.replace(message, headers=NO_HEADERS) if headers else message
        try:
            encoded = body_of(message)
            own = headers_of(bare)
            if message.subject and format_ == "payload":
                own[SUBJECT] = message.subject
            body = _body(encoded)
            attributes = _attributes(own, headers, is_rest_kept=not has_body_all)
            size = len(body) if body.isascii() else len(body.encode())
            size += sum(map(_size, attributes.items()))
        except UnicodeError:
            raise MessageUndecodable("the message holds text that is not Unicode") from None
        return Entry(
            body,
            {name: {"DataType": _TYPE, "StringValue": text} for name, text in attributes.items()},
            size,
        )

    return make


def check_size(entry: Entry, limit: int, whose: str) -> Entry:
    """The entry, when it is within the limit. Raises `MessageTooLarge`."""
    if entry.size > limit:
        raise MessageTooLarge(
            f"the message has {entry.size} bytes with its attributes, {whose} {limit} bytes"
        )
    return entry


def decoded(
    received: Received, queue_name: str, *, is_dedup_by_group: bool = False
) -> RelayMessage | Rejected:
    """The message that was received, or why it is none, with the raw body."""
    body = received.get("Body", "").encode("utf-8", "surrogatepass")
    own, headers = _sorted_out(received)
    try:
        if (packed := own.pop(MORE, None)) is not None:
            more = _more(packed)
            own, headers = {**own, **more.metadata}, {**headers, **more.headers}
        subject = own.pop(SUBJECT, None)
        restored = wire.restore(body, own, wire.TITLE)
    except MessageUndecodable as error:
        broken = RelayMessage(
            dedup_key=own.get(wire.TITLE.dedup_key) or received["MessageId"],
            payload=body,
            subject=queue_name,
            headers=headers,
            token=received["ReceiptHandle"],
        )
        return Rejected(broken, error)
    if restored is None:
        return _of_others(received, body, own, headers, queue_name, is_dedup_by_group)
    return structs.replace(
        restored,
        subject=restored.subject or subject or queue_name,
        headers=restored.headers or headers or NO_HEADERS,
        token=received["ReceiptHandle"],
    )


def _of_others(
    received: Received,
    body: bytes,
    own: Mapping[str, str],
    headers: Mapping[str, str],
    queue_name: str,
    is_dedup_by_group: bool,
) -> RelayMessage | Rejected:
    system = received.get("Attributes", {})
    group = system.get("MessageGroupId")
    dedup_id = system.get("MessageDeduplicationId")
    dedup_key = received["MessageId"]
    if own.get(wire.TITLE.dedup_key):
        dedup_key = own[wire.TITLE.dedup_key]
    # Made from the body, an id says of two equal messages that they are one.
    elif dedup_id and dedup_id.lower() != hashlib.sha256(body).hexdigest():
        dedup_key = f"{group}:{dedup_id}" if is_dedup_by_group and group else dedup_id
    if TRACE in system:
        headers = {**headers, TRACE: system[TRACE]}
    message = RelayMessage(
        dedup_key=dedup_key,
        key=group,
        payload=body,
        subject=queue_name,
        headers=headers or NO_HEADERS,
        token=received["ReceiptHandle"],
    )
    if not wire.is_json(body):
        reason = f"message {received['MessageId']} of the queue {queue_name!r} is not JSON"
        return Rejected(message, MessageUndecodable(reason))
    return message


def _attributes(
    own: Mapping[str, str], headers: Mapping[str, str], *, is_rest_kept: bool
) -> dict[str, str]:
    """What stands as attributes of their own, and the rest of it packed into one."""
    fitting: dict[str, str] = {}
    metadata: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, text in own.items():
        (fitting if _is_text(text) else metadata)[name] = text
    for name, text in headers.items():
        is_fit = _is_name(name) and name not in fitting and _is_text(text)
        (fitting if is_fit else others)[name] = text
    most = _MOST_ATTRIBUTES
    if is_rest_kept and (metadata or others or len(fitting) > most):
        most -= 1
    for name in list(fitting)[most:]:
        (metadata if name in own else others)[name] = fitting.pop(name)
    if is_rest_kept and (metadata or others):
        fitting[MORE] = _packed(metadata, others)
    return fitting


def _packed(metadata: Mapping[str, str], headers: Mapping[str, str]) -> str:
    """One JSON object in which every character is one that XML allows."""
    return _escaped(msgspec.json.encode(_More(metadata, headers)).decode())


def _more(packed: str) -> _More:
    try:
        return msgspec.json.decode(packed, type=_More)
    except (msgspec.DecodeError, UnicodeError):
        raise MessageUndecodable(f"the attribute {MORE} is not what it should be") from None


def _sorted_out(received: Received) -> tuple[dict[str, str], dict[str, str]]:
    """Our metadata, under the names that we give them, and the rest of the attributes."""
    own: dict[str, str] = {}
    headers: dict[str, str] = {}
    for name, attribute in received.get("MessageAttributes", {}).items():
        text = attribute.get("StringValue")
        if text is None:
            text = base64.b64encode(attribute.get("BinaryValue", b"")).decode()
        (own if name.lower() in _RESERVED else headers)[name] = text
    return own, headers


def _is_name(name: str) -> bool:
    lowered = name.lower()
    return (
        _NAME.fullmatch(name) is not None
        and lowered not in _RESERVED
        and not lowered.startswith(_THEIRS)
    )


def _is_text(text: str) -> bool:
    if not text:
        return False
    unfit = _NOT_IN_XML.search(text)
    if unfit is not None and "\ud800" <= unfit[0] <= "\udfff":
        text.encode()
    return unfit is None


def _size(attribute: tuple[str, str]) -> int:
    name, text = attribute
    return len(name) + len(_TYPE) + (len(text) if text.isascii() else len(text.encode()))


def _body(encoded: bytes) -> str:
    """The body as text. Raises `MessageUndecodable` for one that SQS does not take."""
    body = encoded.decode()
    if not body:
        raise MessageUndecodable("the body is empty, which SQS does not take")
    unfit = _NOT_IN_XML.search(body)
    if unfit is None:
        return body
    if not wire.is_json(encoded):
        raise MessageUndecodable(
            f"the body has the character U+{ord(unfit[0]):04X}, which SQS does not take"
        )
    return _escaped(body)


def _escaped(document: str) -> str:
    """The same JSON: what XML forbids stands inside of strings only, where JSON can escape it."""
    return _NOT_IN_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", document)
