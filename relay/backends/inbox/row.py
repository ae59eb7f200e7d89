"""Messages as the values of inbox rows, read by rules that were compiled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TypeAlias

import msgspec

from relay.contracts import Failure
from relay.errors import (
    ConfigurationError,
    MessageRejected,
    MessageTooLarge,
    MessageUndecodable,
    suggestion,
)
from relay.mapping import compile_column, compile_document, header_value
from relay.message import RelayMessage

TEXT_FIELDS = ("event_id", "event_type", "source", "aggregate_id", "trace_id")
DOCUMENT_FIELDS = ("payload", "headers")
FIELDS = (*TEXT_FIELDS, *DOCUMENT_FIELDS)

# https://github.com/postgres/postgres/blob/REL_15_STABLE/src/include/utils/jsonb.h: offsets
# inside a jsonb have 28 bits.
LARGEST_JSONB_BYTES = 0x0FFFFFFF
# https://www.postgresql.org/docs/current/limits.html: a field ends at 1 GB, and so does a message
# of the protocol, which carries a batch; half of it leaves the other messages their room.
LARGEST_FIELD_BYTES = 0x1FFFFFFF

Value: TypeAlias = "str | bytes | None"
Read = Callable[[RelayMessage], Value]

_json = msgspec.json.Encoder()


class Rows(msgspec.Struct, frozen=True):
    """The values of messages, a list for each column; ``indexes`` count in what was published."""

    indexes: Sequence[int]
    columns: Sequence[Sequence[Value]]

    def __len__(self) -> int:
        return len(self.indexes)

    def part(self, start: int, end: int) -> Rows:
        """The rows from ``start`` up to ``end``."""
        return Rows(self.indexes[start:end], [column[start:end] for column in self.columns])


class _Metadata(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    op: str
    stream_table: str = ""
    key: str | None = None
    outbox_id: int | None = None
    refresh_id: str | None = None
    created_at: datetime | None = None
    is_full_refresh: bool = False


_OURS = frozenset(_Metadata.__struct_fields__)
_TRACE_NAMES = frozenset({"traceparent", "trace_id"})


def compile_fields(
    columns: Mapping[str, str], *, source: str | None, pipeline: str
) -> dict[str, Read]:
    """For each field of an inbox the function that reads it from a message.

    ``columns`` says where a field comes from; the others have their defaults. Raises
    `ConfigurationError` for an unknown field or a rule that is none.
    """
    reads: dict[str, Read] = {
        "event_id": lambda message: message.dedup_key,
        "event_type": lambda message: message.subject,
        "source": (lambda _: source)
        if source is not None
        else (lambda message: message.stream_table or pipeline),
        "aggregate_id": lambda message: message.key,
        "trace_id": _trace_id,
        "payload": lambda message: message.payload,
        "headers": _headers,
    }
    for name, spec in columns.items():
        if name not in reads:
            raise ConfigurationError(
                f"columns.{name} is not a field of an inbox", remedy=suggestion(name, FIELDS)
            )
        try:
            reads[name] = (
                compile_document(spec) if name in DOCUMENT_FIELDS else compile_column(spec)
            )
        except ConfigurationError as error:
            raise ConfigurationError(
                f"columns.{name}: {error.problem}", remedy=error.remedy
            ) from None
    reads["event_id"] = _required("event_id", reads["event_id"])
    if "payload" in columns:
        reads["payload"] = _required("payload", reads["payload"])
    if "headers" in columns:
        reads["headers"] = _or_empty_object(reads["headers"])
    return reads


def as_column(name: str, read: Read, column_type: str) -> Read:
    """The field's value as it is sent: bytes for ``bytea``, text for all else.

    The returned function raises `MessageUndecodable` for bytes that are not UTF-8 and
    `MessageTooLarge` above what PostgreSQL holds.
    """
    limit = LARGEST_JSONB_BYTES if column_type == "jsonb" else LARGEST_FIELD_BYTES
    is_binary = column_type == "bytea"
    if name in TEXT_FIELDS and not is_binary:
        return read

    def converted(message: RelayMessage) -> Value:
        value = read(message)
        if value is None:
            return None
        if len(value) > limit:
            raise MessageTooLarge(
                f"{len(value)} bytes are more than a {column_type} column holds: {limit} bytes"
            )
        if is_binary:
            return value.encode() if isinstance(value, str) else value
        return value if isinstance(value, str) else value.decode()

    return converted


def read_rows(
    messages: Sequence[RelayMessage], reads: Sequence[Read]
) -> tuple[Rows, list[Failure]]:
    """The rows of all messages that can be read, in order, and a failure for each other one."""
    try:
        columns = [list(map(read, messages)) for read in reads]
    except (MessageRejected, UnicodeDecodeError, UnicodeEncodeError):
        return _read_singly(messages, reads)
    return Rows(range(len(messages)), columns), []


def _read_singly(
    messages: Sequence[RelayMessage], reads: Sequence[Read]
) -> tuple[Rows, list[Failure]]:
    indexes: list[int] = []
    columns: list[list[Value]] = [[] for _ in reads]
    failures: list[Failure] = []
    for index, message in enumerate(messages):
        try:
            values = [read(message) for read in reads]
        except MessageRejected as error:
            failures.append(Failure(index, error))
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            failures.append(Failure(index, MessageUndecodable(f"not UTF-8: {error.reason}")))
        else:
            indexes.append(index)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    return Rows(indexes, columns), failures


def _required(field: str, read: Read) -> Read:
    def required(message: RelayMessage) -> Value:
        value = read(message)
        if not value:
            raise MessageUndecodable(f"the message has nothing to put into {field}")
        return value

    return required


def _or_empty_object(read: Read) -> Read:
    return lambda message: read(message) or b"{}"


def _trace_id(message: RelayMessage) -> str | None:
    if _TRACE_NAMES.isdisjoint(map(str.lower, message.headers)):
        return None
    # https://www.w3.org/TR/trace-context/#traceparent-header: version, trace id, parent, flags
    traceparent = header_value(message.headers, "traceparent", "traceparent")
    if traceparent is not None:
        parts = traceparent.split("-")
        if len(parts) > 3 and len(parts[1]) == 32:
            return parts[1]
    return header_value(message.headers, "trace_id", "trace_id")


def _headers(message: RelayMessage) -> bytes:
    """Our metadata and the publisher's headers in one object; a name of ours is ours."""
    metadata = _Metadata(
        message.op,
        message.stream_table,
        message.key,
        message.outbox_id,
        message.refresh_id,
        message.created_at,
        message.is_full_refresh,
    )
    encoded = _json.encode(metadata)
    others = message.headers
    if not _OURS.isdisjoint(others):
        others = {name: text for name, text in others.items() if name not in _OURS}
    return encoded[:-1] + b"," + _json.encode(others)[1:] if others else encoded
