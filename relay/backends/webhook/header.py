"""Message headers as HTTP carries them, for any name and any text (`relay.escape`), and back.

`RESERVED` are the names that steer the request or its connection: a publisher can't give a second
``Content-Length`` or somebody's ``Authorization``. Extended is a text that is not printable ASCII,
or has white space at its ends. `relay.escape.headers_from` undoes all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache

from relay.escape import extended, header_name
from relay.wire import HTTP

IDEMPOTENCY_KEY = "Idempotency-Key"
SUBJECT = "X-Pgtrickle-Subject"

# Steer the transport, or say who the sender is: never kept, whoever sent them.
TRANSPORT = frozenset(
    {
        *("host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade"),
        *("keep-alive", "expect", "content-encoding", "proxy-connection", "proxy-authenticate"),
        *("authorization", "proxy-authorization", "cookie", "set-cookie"),
    }
)
# What a request of ours, or a proxy on its way, adds to what the publisher attached.
RESERVED = TRANSPORT | {
    *("content-type", "user-agent", "accept", "accept-encoding", "accept-language", "date"),
    *("idempotency-key", "webhook-id", "webhook-timestamp", "webhook-signature"),
    *("forwarded", "via", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"),
    *("x-forwarded-port", "x-real-ip"),
}

# Stores of idempotency keys take texts of about this length.
_LONGEST_KEY = 255
_OWN = HTTP.names() | {SUBJECT.lower()}

RawHeaders = list[tuple[bytes, bytes]]


def encode(headers: Mapping[str, str]) -> RawHeaders:
    """The headers as they stand on the wire; names of ours are not escaped."""
    return [_line(name, value, is_own=name.lower() in _OWN) for name, value in headers.items()]


def without(headers: Mapping[str, str], names: frozenset[str]) -> dict[str, str]:
    """The headers but those names, given in lower case."""
    return {name: value for name, value in headers.items() if name.lower() not in names}


def idempotency_key(dedup_key: str) -> str:
    """The dedup key itself where receivers can take it as a header, else a digest of it."""
    if len(dedup_key) <= _LONGEST_KEY and dedup_key and _is_plain(dedup_key):
        return dedup_key
    return f"sha256-{_digest([dedup_key])}"


def batch_key(dedup_keys: Iterable[str]) -> str:
    """A key for several messages together: the same for the same ones in the same order."""
    return f"batch-{_digest(dedup_keys)}"


def _digest(texts: Iterable[str]) -> str:
    # In order, and with all lengths in front, no text can pass for two.
    texts = list(texts)
    lengths = ",".join(map(str, map(len, texts)))
    whole = f"{lengths}:{''.join(texts)}"
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


def _line(name: str, value: str, *, is_own: bool) -> tuple[bytes, bytes]:
    wire_name = name.encode() if is_own else _wire_name(name)
    if _is_plain(value):
        return wire_name, value.encode()
    return wire_name + b"*", extended(value).encode()


def _is_plain(value: str) -> bool:
    return value.isascii() and value.isprintable() and value.strip() == value


@lru_cache(maxsize=4096)
def _wire_name(name: str) -> bytes:
    return header_name(name, is_reserved=name.lower() in RESERVED).encode()
