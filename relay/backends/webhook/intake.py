"""From one request to its messages: what is let in, under which key, and what is refused."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

import msgspec

from relay.backends.webhook.header import RESERVED, SUBJECT, TRANSPORT, without
from relay.backends.webhook.options import WebhookSourceOptions
from relay.errors import MessageTooLarge, MessageUndecodable
from relay.escape import headers_from
from relay.message import RelayMessage, text_of
from relay.wire import HTTP, is_json, restore

# In this order; the last is used by GitHub alone.
_ID_HEADERS = ("idempotency-key", "webhook-id", "svix-id", "x-github-delivery")
_FORMS = ("application/x-www-form-urlencoded", "multipart/")
_OWN_FORMAT = HTTP.format.lower()
_OWN_KEY = (HTTP.dedup_key.lower(), f"{HTTP.dedup_key.lower()}*")

# Each takes memory and time of its own, however small it is, and all are read in one go.
_MOST_ELEMENTS = 100_000


class _StripeEvent(msgspec.Struct, frozen=True, gc=False):
    """https://docs.stripe.com/api/events/object"""

    id: str
    type: str


_array = msgspec.json.Decoder(list[msgspec.Raw])
_stripe_event = msgspec.json.Decoder(_StripeEvent)


class Intake:
    """Reads requests under the options of one source."""

    def __init__(self, options: WebhookSourceOptions) -> None:
        self._path = options.path
        secrets = {(options.auth_header or "authorization").lower()}
        self._unkept = TRANSPORT | secrets
        self._reserved = RESERVED | secrets
        self._is_stripe = options.signature == "stripe"

    def unreadable(self, headers: Mapping[str, str]) -> str | None:
        """Why a body under these headers is not looked at; None where it is."""
        if headers.get("content-encoding", "identity").lower() != "identity":
            return "compressed bodies are not read"
        content_type = headers.get("content-type", "").lower()
        if content_type.startswith(_FORMS):
            return "the body is to be JSON, not a form"
        return None

    def messages(
        self, headers: Mapping[str, str], raw: Mapping[str, str], body: bytes
    ) -> Sequence[RelayMessage]:
        """The messages of a request in order. ``headers`` by lower-case name, ``raw`` as spelled.

        Raises `MessageUndecodable` where one of them can't be read, `MessageTooLarge` where there
        are too many: the sender is told.
        """
        text = body.strip()
        if not text:
            raise MessageUndecodable("the body is empty")
        if not is_json(body):
            raise MessageUndecodable("the body is not one JSON document in UTF-8")
        if not text.startswith((b"{", b"[")):
            raise MessageUndecodable("the body is neither an object nor an array")
        is_ours = _OWN_FORMAT in headers
        # An array with a dedup key is one message of ours, whose payload happens to be an array.
        is_array = text.startswith(b"[") and not (is_ours and any(k in headers for k in _OWN_KEY))
        bodies = _elements(body) if is_array else [body]
        if is_ours:
            return self._restored(raw, bodies, is_array=is_array)
        return self._plain(headers, raw, bodies, is_array=is_array)

    def _plain(
        self,
        headers: Mapping[str, str],
        raw: Mapping[str, str],
        bodies: Sequence[bytes],
        *,
        is_array: bool,
    ) -> Sequence[RelayMessage]:
        kept = without(raw, self._unkept)
        if not all(map(str.isascii, (*kept, *kept.values()))):
            kept = {_as_text(name): _as_text(value) for name, value in kept.items()}
        given = next((headers[name] for name in _ID_HEADERS if headers.get(name)), None)
        name = None if given is None else _as_text(given)

        def dedup_key(index: int) -> str:
            if name is None:
                return str(uuid.uuid4())
            return f"{name}:{index}" if is_array else name

        if self._is_stripe and not is_array and (event := _event_of_stripe(bodies[0])) is not None:
            return [
                RelayMessage(
                    dedup_key=event.id, payload=bodies[0], subject=event.type, headers=kept
                )
            ]
        return [
            RelayMessage(dedup_key=dedup_key(index), payload=body, subject=self._path, headers=kept)
            for index, body in enumerate(bodies)
        ]

    def _restored(
        self, raw: Mapping[str, str], bodies: Sequence[bytes], *, is_array: bool
    ) -> Sequence[RelayMessage]:
        headers = headers_from(without(raw, self._reserved))
        subject = next((v for k, v in headers.items() if k.lower() == SUBJECT.lower()), "")
        marked = next((v for k, v in headers.items() if k.lower() == _OWN_FORMAT), "")
        # An envelope has everything in it: the headers need not be looked through for each.
        headers = (
            {HTTP.format: marked}
            if marked == "envelope"
            else without(headers, frozenset({SUBJECT.lower()}))
        )
        messages: list[RelayMessage] = []
        for index, body in enumerate(bodies):
            try:
                message = restore(body, headers, HTTP)
            except MessageUndecodable as error:
                where = f"element {index}: " if is_array else ""
                raise MessageUndecodable(f"{where}{error.problem}") from None
            if message is not None:
                messages.append(
                    message
                    if message.subject
                    else msgspec.structs.replace(message, subject=subject)
                )
        return messages


def _event_of_stripe(body: bytes) -> _StripeEvent | None:
    """Its body is signed, its headers are not, and a repetition has the same id in it."""
    try:
        event = _stripe_event.decode(body)
    except msgspec.MsgspecError:
        return None
    return event if event.id and event.type else None


def _elements(array: bytes) -> Sequence[bytes]:
    elements = _array.decode(array)
    if len(elements) > _MOST_ELEMENTS:
        raise MessageTooLarge(
            f"the array has {len(elements)} elements, {_MOST_ELEMENTS} are read at a time"
        )
    return [bytes(element) for element in elements]


def _as_text(value: str) -> str:
    """The server gives bytes of a header that are not UTF-8 as lone surrogates."""
    return text_of(value.encode("utf-8", "surrogateescape"))
