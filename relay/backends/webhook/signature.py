"""Signatures over request bodies: one that the sink makes, four that the source can check.

- ``svix``, Standard Webhooks: HMAC-SHA-256 over ``{id}.{timestamp}.{body}``
  (https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md);
- ``stripe``: HMAC-SHA-256 over ``{timestamp}.{body}`` (https://docs.stripe.com/webhooks/signature);
- ``github``: over the body (https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries);
- ``hmac-sha256``: over the body, in hexadecimal or base64, in a header of the sender's choice.

Everything is compared in constant time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Mapping

from relay.backends.webhook.options import WebhookSourceOptions
from relay.errors import ConfigurationError

SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with
DEFAULT_HEADER = "X-Signature-256"

# Headers by lower-case name and the body; gives why it is refused, None where it is not.
Verify = Callable[[Mapping[str, str], bytes], str | None]
Clock = Callable[[], float]


def webhook_secret(text: str, path: str) -> bytes:
    """The key in a ``whsec_…`` text. Raises `ConfigurationError`, without the text."""
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(SECRET_PREFIX) or not key:
        raise ConfigurationError(
            f"{path}.hmac_secret is not a Standard Webhooks secret",
            remedy=f"it is {SECRET_PREFIX} and base64 behind it",
        )
    return key


def sign(key: bytes, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``."""
    return "v1," + base64.b64encode(_hmac(key, f"{webhook_id}.{timestamp}.", body)).decode()


def verifier(options: WebhookSourceOptions, *, now: Clock = time.time) -> Verify:
    """The check that the options ask for. Raises `ConfigurationError` for a useless secret."""
    secret = options.hmac_secret
    if options.signature is None or secret is None:
        return lambda _headers, _body: None
    if not secret:
        raise ConfigurationError("source.hmac_secret is empty: anybody could sign with that")
    tolerance_s = options.signature_tolerance_s
    if options.signature == "svix":
        return _svix(webhook_secret(secret, "source"), tolerance_s, now)
    key = secret.encode()
    if options.signature == "stripe":
        return _stripe(key, tolerance_s, now)
    if options.signature == "github":
        return _plain(key, "X-Hub-Signature-256")
    return _plain(key, options.signature_header or DEFAULT_HEADER)


def is_same(given: str, expected: str) -> bool:
    """Compare a text of a sender with a secret one, in constant time."""
    return hmac.compare_digest(
        given.encode("utf-8", "surrogateescape"), expected.encode("utf-8", "surrogateescape")
    )


def _plain(key: bytes, name: str) -> Verify:
    lowered = name.lower()

    def verify(headers: Mapping[str, str], body: bytes) -> str | None:
        given = headers.get(lowered)
        if given is None:
            return f"the header {name} is missing"
        digest = _hmac(key, "", body)
        return _unless_any(
            [given.removeprefix("sha256=")], [digest.hex(), base64.b64encode(digest).decode()]
        )

    return verify


def _stripe(key: bytes, tolerance_s: int, now: Clock) -> Verify:
    def verify(headers: Mapping[str, str], body: bytes) -> str | None:
        given = headers.get("stripe-signature")
        if given is None:
            return "the header Stripe-Signature is missing"
        parts = [part.strip().partition("=") for part in given.split(",")]
        timestamp = next((value for name, _, value in parts if name == "t"), "")
        reason = _too_far(timestamp, tolerance_s, now)
        if reason is not None:
            return reason
        digest = _hmac(key, f"{timestamp}.", body)
        return _unless_any([value for name, _, value in parts if name == "v1"], [digest.hex()])

    return verify


def _svix(key: bytes, tolerance_s: int, now: Clock) -> Verify:
    def verify(headers: Mapping[str, str], body: bytes) -> str | None:
        family = "webhook" if "webhook-id" in headers else "svix"
        found = [headers.get(f"{family}-{part}") for part in ("id", "timestamp", "signature")]
        webhook_id, timestamp, given = found
        if webhook_id is None or timestamp is None or given is None:
            return "one of the headers webhook-id, webhook-timestamp, webhook-signature is missing"
        reason = _too_far(timestamp, tolerance_s, now)
        if reason is not None:
            return reason
        digest = base64.b64encode(_hmac(key, f"{webhook_id}.{timestamp}.", body)).decode()
        return _unless_any(given.split(" "), [f"v1,{digest}"])

    return verify


def _too_far(timestamp: str, tolerance_s: int, now: Clock) -> str | None:
    if not (timestamp.isascii() and timestamp.isdecimal()) or len(timestamp) > 12:
        return "the signature's timestamp is missing or malformed"
    if abs(now() - int(timestamp)) > tolerance_s:
        return f"the signature's timestamp is more than {tolerance_s} s away from our clock"
    return None


def _unless_any(given: Iterable[str], expected: Iterable[str]) -> str | None:
    pairs = [(one, other) for one in given for other in expected]
    if any([is_same(one, other) for one, other in pairs]):  # noqa: C419 - all, in constant time
        return None
    return "the signature does not match"


def _hmac(key: bytes, front: str, body: bytes) -> bytes:
    digest = hmac.new(key, front.encode("utf-8", "surrogateescape"), hashlib.sha256)
    digest.update(body)
    return digest.digest()
