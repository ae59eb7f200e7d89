"""Message headers as NATS writes them, for any name and any text, and back.

A name keeps the characters that HTTP allows in a token; others, and ``%`` itself, become ``%XX``
of their UTF-8 bytes. So does the first letter of a name that begins with ``Nats-``: those are
orders to the server (``Nats-Rollup`` removes messages) and are never a publisher's to give. A text
with control characters, or with white space at its ends, travels as RFC 8187 writes it: the name
gets a ``*`` behind it and the text is ``UTF-8''`` and percent-encoded
(https://www.rfc-editor.org/rfc/rfc8187#section-3.2). `decode` undoes all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import quote, unquote, unquote_to_bytes

from relay.message import text_of

MESSAGE_ID = "Nats-Msg-Id"
EXPECTED_STREAM = "Nats-Expected-Stream"

_NAME_ESCAPED = re.compile(r"[^!#$&'*+\-.^_`|~0-9A-Za-z]|\*$")
_EXTENDED = "UTF-8''"


def encode(headers: Mapping[str, str], *, message_id: str, fixed: str = "") -> bytes:
    """The header block of one message: ours, then ``fixed`` lines as they are, then ``headers``."""
    text = message_id if is_plain(message_id) else _quoted(message_id)
    lines = [f"NATS/1.0\r\n{MESSAGE_ID}: {text}\r\n{fixed}"]
    for name, value in headers.items():
        if is_plain(value):
            lines.append(f"{_wire_name(name)}: {value}\r\n")
        else:
            lines.append(f"{_wire_name(name)}*: {_EXTENDED}{_quoted(value)}\r\n")
    lines.append("\r\n")
    return "".join(lines).encode()


def parse(block: bytes) -> dict[str, str]:
    """The headers of a received block as they are on the wire; of a repeated name the last.

    What a server says in the first line is under ``Status`` and ``Description``.
    """
    first, *lines = text_of(block).split("\r\n")
    code, _, text = first[len("NATS/1.0") :].strip().partition(" ")
    headers = {"Status": code, "Description": text} if code.isdigit() else {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    return headers


def decode(headers: Mapping[str, str]) -> dict[str, str]:
    """What `encode` was given, from what `parse` read."""
    decoded: dict[str, str] = {}
    for name, value in headers.items():
        if name.endswith("*") and value.startswith(_EXTENDED):
            decoded[_own_name(name[:-1])] = _unquoted(value.removeprefix(_EXTENDED))
        else:
            decoded[_own_name(name)] = value
    return decoded


def is_plain(value: str) -> bool:
    """True for a text that is written as it is."""
    return value.isprintable() and value.strip() == value


@lru_cache(maxsize=4096)
def _wire_name(name: str) -> str:
    if name[:5].lower() == "nats-":
        return f"%{ord(name[0]):02X}{_NAME_ESCAPED.sub(percent, name[1:])}"
    return _NAME_ESCAPED.sub(percent, name) or "%"


def _own_name(name: str) -> str:
    if "%" not in name:
        return name
    return "" if name == "%" else _unquoted(name)


def _quoted(value: str) -> str:
    return quote(value, safe="", errors="surrogatepass")


def _unquoted(value: str) -> str:
    try:
        return unquote(value, errors="surrogatepass")
    except UnicodeDecodeError:
        return text_of(unquote_to_bytes(value))


def percent(found: re.Match[str]) -> str:
    """What was found as ``%XX`` of its UTF-8 bytes."""
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass"))
