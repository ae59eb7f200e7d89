"""The one message that travels through the relay, from any source to any sink.

A message is immutable and carries its payload as the bytes that were read: nobody decodes them
unless something must look inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Literal, cast, get_args

import msgspec

Op = Literal[
    "insert", "update", "delete", "upsert", "truncate", "snapshot_begin", "snapshot_end", "event"
]

NO_HEADERS: Mapping[str, str] = {}
_OPS = frozenset(get_args(Op))
_LOOKS_ESCAPED = re.compile(rb"\\(?=x[0-9a-f]{2})")


class RelayMessage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One event.

    ``dedup_key``: the same on every repetition of this event, and of no other event.
    ``key``: the entity, which decides order: events of one key arrive in source order. A single
    primary key column as its text, several as a compact JSON array; None where there is none.
    ``subject``: forward the resolved subject, topic or routing key, which the pipeline fills in
    before anybody else sees the message; reverse the event type.
    ``payload``: JSON as raw bytes, UTF-8.
    ``op``: what happened to the row; ``upsert`` for a row of a full refresh, ``event`` where it is
    unknown. ``snapshot_begin`` and ``snapshot_end`` frame a full refresh where that is asked for.
    ``created_at``: when the outbox row was written, with time zone.
    ``headers``: what the publisher attached (trace context and the like), text to text.
    ``is_json``: the payload is known to be one JSON document; else a sink that needs to be sure of
    it looks itself.
    ``token``: the source's own handle for acknowledging; never leaves the process.
    """

    dedup_key: str
    payload: bytes
    key: str | None = None
    subject: str = ""
    op: Op = "event"
    is_full_refresh: bool = False
    stream_table: str = ""
    outbox_id: int | None = None
    refresh_id: str | None = None
    created_at: datetime | None = None
    headers: Mapping[str, str] = NO_HEADERS
    is_json: bool = False
    token: object = None


def op_named(name: str) -> Op:
    """The op of that name; ``event`` for a name that is none of ours."""
    return cast("Op", name) if name in _OPS else "event"


def text_of(received: bytes) -> str:
    """What somebody else sent where a text is due, such as an id: no other bytes give the same.

    UTF-8 is decoded. A byte that is none is written ``\\xff``, as is a backslash that would make
    such a text out of others.
    """
    if b"\\x" in received:
        received = _LOOKS_ESCAPED.sub(rb"\\x5c", received)
    return received.decode("utf-8", "backslashreplace")
