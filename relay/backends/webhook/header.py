"""Message headers as HTTP carries them, for any name and any text, and back.

A name keeps the characters of a token; others, and ``%`` itself, become ``%XX`` of their UTF-8
bytes. So does the first letter of a name that steers the request or its connection (`RESERVED`):
a publisher can't give a second ``Content-Length`` or somebody's ``Authorization``. A text that is
not printable ASCII, or has white space at its ends, travels as RFC 8187 writes it: the name gets a
``*`` behind it and the text is ``UTF-8''`` and percent-encoded
(https://www.rfc-editor.org/rfc/rfc8187#section-3.2). `decode` undoes all of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from urllib.parse import quote, unquote, unquote_to_bytes

from relay.message import text_of
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

_NAME_ESCAPED = re.compile(r"[^!#$&'*+\-.^_`|~0-9A-Za-z]|\*$")
_EXTENDED = "UTF-8''"
# Stores of idempotency keys take texts of about this length.
_LONGEST_KEY = 255
_OWN = HTTP.names() | {SUBJECT.lower()}

RawHeaders = list[tuple[bytes, bytes]]


def encode(headers: Mapping[str, str], *, own: frozenset[str] = _OWN) -> RawHeaders:
    """The headers as they stand on the wire; names in ``own`` are ours and not escaped."""
    return [_line(name, value, is_own=name.lower() in own) for name, value in headers.items()]


def decode(headers: Mapping[str, str]) -> dict[str, str]:
    """What `encode` was given, from what arrived."""
    decoded: dict[str, str] = {}
    for name, value in headers.items():
        if name.endswith("*") and value.startswith(_EXTENDED):
            decoded[_own_name(name[:-1])] = _unquoted(value.removeprefix(_EXTENDED))
        else:
            decoded[_own_name(name)] = value
    return decoded


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
    return wire_name + b"*", (_EXTENDED + quote(value, safe="", errors="surrogatepass")).encode()


def _is_plain(value: str) -> bool:
    return value.isascii() and value.isprintable() and value.strip() == value


@lru_cache(maxsize=4096)
def _wire_name(name: str) -> bytes:
    if name.lower() in RESERVED:
        return f"%{ord(name[0]):02X}{_NAME_ESCAPED.sub(_percent, name[1:])}".encode()
    return (_NAME_ESCAPED.sub(_percent, name) or "%").encode()


def _own_name(name: str) -> str:
    if "%" not in name:
        return name
    return "" if name == "%" else _unquoted(name)


def _unquoted(value: str) -> str:
    try:
        return unquote(value, errors="surrogatepass")
    except UnicodeDecodeError:
        return text_of(unquote_to_bytes(value))


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass"))
