"""Message headers as NATS writes them, for any name and any text (`relay.escape`), and back.

Reserved are the names that begin with ``Nats-``: those are orders to the server (``Nats-Rollup``
removes messages) and are never a publisher's to give. Extended is a text with control characters,
or with white space at its ends. `relay.escape.headers_from` undoes all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from relay.escape import extended, header_name, quoted
from relay.message import text_of

MESSAGE_ID = "Nats-Msg-Id"
EXPECTED_STREAM = "Nats-Expected-Stream"


def encode(headers: Mapping[str, str], *, message_id: str, fixed: str = "") -> bytes:
    """The header block of one message: ours, then ``fixed`` lines as they are, then ``headers``."""
    text = message_id if is_plain(message_id) else quoted(message_id)
    lines = [f"NATS/1.0\r\n{MESSAGE_ID}: {text}\r\n{fixed}"]
    for name, value in headers.items():
        if is_plain(value):
            lines.append(f"{_wire_name(name)}: {value}\r\n")
        else:
            lines.append(f"{_wire_name(name)}*: {extended(value)}\r\n")
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


def is_plain(value: str) -> bool:
    """True for a text that is written as it is."""
    return value.isprintable() and value.strip() == value


@lru_cache(maxsize=4096)
def _wire_name(name: str) -> str:
    return header_name(name, is_reserved=name[:5].lower() == "nats-")
