"""CloudEvents 1.x of others, in any message: what identifies one, and where its parts go.

- structured: the body is the event, in JSON
  (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md); the content
  type says so, or there is none and the body has all that an event must have;
- binary: the attributes are headers, ``ce-id`` in HTTP and NATS, ``ce_id`` in Kafka,
  ``cloudEvents:id`` or ``cloudEvents_id`` in AMQP, and the body is the data
  (https://github.com/cloudevents/spec/tree/v1.0.2/cloudevents/bindings).

``source`` and ``id`` together identify an event, neither does alone. What lacks one of them, a
``type`` or a ``specversion`` of 1.x only looks like an event, and is a payload.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import structs

from relay.message import RelayMessage, text_of
from relay.wire import is_json

# By what stands in front of an attribute's name; whether its text is percent-encoded.
_PREFIXES: Mapping[str, bool] = {
    "ce-": True,
    "ce_": False,
    "cloudevents:": False,
    "cloudevents_": False,
}
_PREFIX = tuple(_PREFIXES)
_STRUCTURED = "application/cloudevents"
_DATA = ("data", "data_base64")
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)

_event = msgspec.json.Decoder(dict[str, msgspec.Raw])
_json = msgspec.json.Encoder()


def identity(source: str, id_: str) -> str:
    """The dedup key of the event; no other pair of texts has it."""
    return _json.encode((source, id_)).decode()


def unwrapped(message: RelayMessage) -> RelayMessage:
    """The event in a message of somebody else, or the message itself where there is none.

    The dedup key is `identity`, the subject ``type``, the payload ``data`` (or what
    ``data_base64`` stands for: the document, or its base64 as a JSON string where it is none). All
    attributes become headers ``ce-…``, beside the headers that there are. A message that came out
    of an outbox stays as it is, whatever its payload looks like.
    """
    if message.outbox_id is not None:
        return message
    attributes: dict[str, str] = {}
    others: dict[str, str] = {}
    content_type = None
    for name, text in message.headers.items():
        lowered = name.lower()
        if lowered.startswith(_PREFIX):
            prefix = next(filter(lowered.startswith, _PREFIX))
            attributes[lowered[len(prefix) :]] = _plain(text) if _PREFIXES[prefix] else text
            continue
        if lowered == "content-type":
            content_type = text.strip().lower()
        others[name] = text
    if _is_complete(attributes):
        return _made(message, attributes, others, message.payload)
    is_structured = (content_type or _STRUCTURED).startswith(_STRUCTURED)
    if not is_structured or b'"specversion"' not in message.payload:
        return message
    try:
        document = _event.decode(message.payload)
        attributes = {
            name: _text(bytes(raw)) for name, raw in document.items() if name not in _DATA
        }
        payload = _data(document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, binascii.Error):
        return message
    if not _is_complete(attributes):
        return message
    others = {name: text for name, text in others.items() if name.lower() != "content-type"}
    return _made(message, attributes, others, payload)


def _is_complete(attributes: Mapping[str, str]) -> bool:
    return attributes.get("specversion", "").startswith("1.") and all(
        map(attributes.get, ("id", "source", "type"))
    )


def _made(
    message: RelayMessage, attributes: Mapping[str, str], others: Mapping[str, str], payload: bytes
) -> RelayMessage:
    return structs.replace(
        message,
        dedup_key=identity(attributes["source"], attributes["id"]),
        subject=attributes["type"],
        payload=payload,
        headers={**others, **{f"ce-{name}": text for name, text in attributes.items()}},
    )


def _data(document: Mapping[str, msgspec.Raw]) -> bytes:
    if "data_base64" not in document:
        return bytes(document.get("data", b"null"))
    encoded = bytes(document["data_base64"])
    decoded = base64.b64decode(msgspec.json.decode(encoded, type=str), validate=True)
    return decoded if is_json(decoded) else encoded


def _text(document: bytes) -> str:
    """A text bare, anything else as JSON spells it; null like an attribute that is not there."""
    if document.startswith(b'"'):
        return msgspec.json.decode(document, type=str)
    return "" if document == b"null" else document.decode()


def _plain(text: str) -> str:
    """What HTTP's binding writes, and senders that quote
    (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md#3132-http-header-values).
    """
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = _QUOTED_PAIR.sub(r"\1", text[1:-1])
    return text_of(unquote_to_bytes(text)) if "%" in text else text
