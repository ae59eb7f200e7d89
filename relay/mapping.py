"""Where a field of the inbox comes from, compiled once per pipeline: the reverse mapping rules.

A rule is one text, in one of six forms:

- ``header:NAME``: a header of the message, its name without regard to case;
- ``payload:a.b.c``: one value inside the JSON payload;
- ``subject``: the subject, topic or routing key under which the message came;
- ``constant:TEXT``: always this text;
- ``record_key``: the message's key;
- ``body_digest``: the SHA-256 of the payload, in hexadecimal.

A CloudEvent of somebody else is taken apart first (`relay.cloudevent`). The rules for dedup key and
event type look at the message as it came, and where it lacks what they name at the event in it;
those for columns at the event.

A message that lacks what a rule names is refused, it alone, with `MessageUndecodable`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import msgspec

from relay.cloudevent import unwrapped
from relay.errors import ConfigurationError, MessageUndecodable
from relay.message import RelayMessage

FORMS = "header:NAME, payload:a.b.c, subject, constant:TEXT, record_key, body_digest"

Reshape = Callable[[RelayMessage], RelayMessage]
ReadText = Callable[[RelayMessage], str | None]
ReadDocument = Callable[[RelayMessage], bytes | None]
_AsText = Callable[[bytes | None, tuple[str, ...]], str | None]


def compile_reverse(dedup_key_from: str | None, event_type_from: str | None) -> Reshape:
    """A function that gives a message the dedup key and the subject that these rules find.

    None leaves the field as the source set it, or the CloudEvent in the message. Raises
    `ConfigurationError` for a rule that is none; the returned function raises `MessageUndecodable`
    where a message lacks what a rule names, or has an empty text there: an empty dedup key would
    make all such messages one.
    """
    dedup_key_of = _compile_required("dedup_key_from", dedup_key_from)
    event_type_of = _compile_required("event_type_from", event_type_from)
    if dedup_key_of is None and event_type_of is None:
        return unwrapped

    def reshape(message: RelayMessage) -> RelayMessage:
        event = unwrapped(message)
        return msgspec.structs.replace(
            event,
            dedup_key=event.dedup_key if dedup_key_of is None else dedup_key_of(message, event),
            subject=event.subject if event_type_of is None else event_type_of(message, event),
        )

    return reshape


def compile_column(spec: str) -> ReadText:
    """A function that reads the text for one column; None where the message has none.

    Strings inside the payload come bare, all else as the payload spells it. Raises
    `ConfigurationError`; the returned function raises `MessageUndecodable` for a payload that is
    not JSON where the rule has to look inside.
    """
    return _compile_text(spec, _as_text)


def compile_document(spec: str) -> ReadDocument:
    """A function that reads the JSON for one column; None where the message has none.

    Besides ``payload:a.b.c`` there is ``payload`` alone, the whole of it. Raises and lets raise as
    `compile_column`, and `ConfigurationError` for the forms that give a text and not JSON.
    """
    form, _, argument = spec.partition(":")
    if spec == "payload":
        return lambda message: message.payload
    if form == "payload" and argument:
        path = _path(spec, argument)
        return lambda message: found_in(message.payload, path)
    raise ConfigurationError(
        f"{spec!r} does not say where a JSON document comes from",
        remedy="use payload or payload:a.b.c",
    )


def header_value(headers: Mapping[str, str], name: str, lowered: str) -> str | None:
    """A header by its name in any case; as it is spelled, where there are several.

    ``lowered`` is the name in lower case, which the caller knows for all its messages.
    """
    value = headers.get(name)
    if value is not None or not headers:
        return value
    return next((text for other, text in headers.items() if other.lower() == lowered), None)


def found_in(payload: bytes, path: tuple[str, ...]) -> bytes | None:
    """The value at a path as the payload spells it, decoding nothing beside the way.

    None where there is none, or null. Raises `MessageUndecodable` where the payload is not JSON.
    """
    here: bytes | msgspec.Raw = payload
    for name in path:
        try:
            found = msgspec.json.decode(here, type=dict[str, msgspec.Raw]).get(name)
        except msgspec.ValidationError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise MessageUndecodable(
                f"the payload is not JSON that {'.'.join(path)} could be looked up in"
            ) from None
        if found is None:
            return None
        here = found
    document = bytes(here)
    return None if document == b"null" else document


def single_value(document: bytes | None, path: tuple[str, ...]) -> str | None:
    """Its text, a string's bare and all else as JSON spells it; None for none.

    Raises `MessageUndecodable` for an object, an array, and what is not valid text.
    """
    if document is not None and document.startswith((b"{", b"[")):
        raise MessageUndecodable(f"the payload's field {'.'.join(path)} is not a single value")
    return _as_text(document, path)


def _compile_text(spec: str, as_text: _AsText) -> ReadText:
    form, _, argument = spec.partition(":")
    if spec == "subject":
        return lambda message: message.subject
    if spec == "record_key":
        return lambda message: message.key
    if spec == "body_digest":
        return lambda message: hashlib.sha256(message.payload).hexdigest()
    if form == "constant" and ":" in spec:
        return lambda _: argument
    if form == "header" and argument:
        lowered = argument.lower()
        return lambda message: header_value(message.headers, argument, lowered)
    if form == "payload" and argument:
        path = _path(spec, argument)
        return lambda message: as_text(found_in(message.payload, path), path)
    raise ConfigurationError(
        f"{spec!r} does not say where a value comes from", remedy=f"use one of {FORMS}"
    )


def _compile_required(
    key: str, spec: str | None
) -> Callable[[RelayMessage, RelayMessage], str] | None:
    if spec is None:
        return None
    try:
        read = _compile_text(spec, single_value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{key}: {error.problem}", remedy=error.remedy) from None

    def required(message: RelayMessage, event: RelayMessage) -> str:
        found = read(message) or (None if event is message else read(event))
        if not found:
            raise MessageUndecodable(f"{key} asks for {spec}, which the message lacks")
        return found

    return required


def _path(spec: str, argument: str) -> tuple[str, ...]:
    path = tuple(argument.split("."))
    if "" in path:
        raise ConfigurationError(
            f"{spec!r} has an empty name in its path", remedy="write payload:a.b.c"
        )
    return path


def _as_text(document: bytes | None, path: tuple[str, ...]) -> str | None:
    if document is None:
        return None
    try:
        if document.startswith(b'"'):
            return msgspec.json.decode(document, type=str)
        return document.decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise MessageUndecodable(
            f"the payload's field {'.'.join(path)} is not valid text"
        ) from None
