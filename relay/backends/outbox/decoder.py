"""From outbox rows to messages: payload version 1 in all its forms.

A payload is ``{"v":1,"inserted":[…],"deleted":[…]}``; ``full_refresh`` marks a snapshot,
``claim_check`` says that the rows are in the delta table; the two are independent. A bare array is
read as ``inserted``. Deletes go out before inserts, while the index in the dedup key counts the
inserted rows first and then the deleted ones, so that a key never changes.

A full refresh without rows is a truncation: one message ``truncate`` with payload ``null``. With
``snapshot_markers`` a full refresh is framed by ``snapshot_begin`` and ``snapshot_end``, payload
``null``, whose dedup keys end in ``:begin`` and ``:end``; not one with ``backfill``, which is a
part of a table. Where that names a pipeline, the rows are for that one alone: for others the outbox
row has no messages.

Rows are passed on as the bytes that were read; only the key columns are looked at. A row that
cannot be looked into costs only itself; a payload that cannot be read costs its outbox row.

One reader of several makes messages of its own keys only; what has no key, or can't be read, is the
first one's. Of a row that is another's nothing but the key is looked at.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar
from zlib import crc32

import msgspec

from relay.backends.outbox.row import OutboxRow, OutboxRows
from relay.backends.outbox.split import array_elements, object_members
from relay.contracts import Rejected
from relay.errors import MessageRejected, MessageUndecodable
from relay.message import NO_HEADERS, Op, RelayMessage
from relay.partition import WHOLE, Partition
from relay.shape import Shape

PAYLOAD_VERSION: Final = 1

ROW_ID: Final = "__pgt_row_id"

PART_ROWS: Final = 250
"""Rows to decode in one go: as many as stay in the processor's cache meanwhile."""

_Value = TypeVar("_Value")
_Row = msgspec.Raw | bytes
# The raw values of the key columns of a decoded row, whose type is made for the columns; empty
# where missing.
_ValuesOf = Callable[[Any], Sequence[_Row]]

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_ARRAY_OPENS = ord("[")


class _Payload(msgspec.Struct, frozen=True, gc=False):
    v: int | float | str | bool | None = None
    inserted: list[msgspec.Raw] | None = None
    deleted: list[msgspec.Raw] | None = None
    full_refresh: bool | None = False
    claim_check: bool | None = False
    backfill: bool | str | None = False
    inserted_count: int | None = None
    deleted_count: int | None = None


class OutboxEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What all messages of one outbox row have in common."""

    outbox_id: int
    refresh_id: str | None
    created_at: datetime | None
    headers: Mapping[str, str]
    is_full_refresh: bool
    is_backfill: bool = False
    key_columns: tuple[str, ...] | None = None


class ClaimCheck(msgspec.Struct, frozen=True, kw_only=True):
    """An outbox row whose rows are in the delta table; counts None where the row does not say."""

    event: OutboxEvent
    inserted_count: int | None
    deleted_count: int | None
    payload: bytes


class SetAside(msgspec.Struct, kw_only=True):
    """What of some rows does not go out: what is refused, and how many the shape left out."""

    rejected: list[Rejected] = msgspec.field(default_factory=list)
    filtered: int = 0


class Decoded(SetAside, kw_only=True):
    """The messages of the first ``rows`` outbox rows that were given, in order.

    A claim check is decoded alone: ``claim_check`` is set, ``rows`` is 1 and there are no messages.
    """

    messages: list[RelayMessage] = msgspec.field(default_factory=list)
    rows: int = 0
    claim_check: ClaimCheck | None = None


class OutboxDecoder:
    """Decodes the rows of one outbox. Without state: the same row always gives the same messages.

    ``namespace`` goes in front of every dedup key. ``pipeline`` is who reads. ``key_columns`` name
    the entity; an outbox row may name others, after a column was renamed (``follows_renames``); a
    row that lacks one of them has no key. ``collapse_updates`` turns a delete and an insert of one
    key in one outbox row into an ``update`` that has the index of the insert, where there are keys:
    then ``collapses_updates`` is true. ``shape`` is applied before. ``partition``: whose keys.
    """

    def __init__(
        self,
        *,
        outbox_table: str,
        stream_table: str,
        pipeline: str = "",
        key_columns: Sequence[str] = (),
        namespace: str = "",
        collapse_updates: bool = False,
        snapshot_markers: bool = False,
        follows_renames: bool = True,
        shape: Shape | None = None,
        partition: Partition = WHOLE,
    ) -> None:
        self._namespace = f"{namespace}:" if namespace else ""
        self._prefix = f"{self._namespace}{outbox_table}:"
        self._stream_table = stream_table
        self._pipeline = pipeline
        self._keys = _KeyReader(tuple(key_columns))
        self._follows_renames = follows_renames
        self._renamed_keys: dict[tuple[str, ...], _KeyReader] = {}
        self._hides_row_id = ROW_ID in key_columns
        self.collapses_updates = collapse_updates and bool(key_columns)
        self._marks_snapshots = snapshot_markers
        self._shape = shape
        self._partition = partition
        self._has_the_rest = partition.number == 1
        self._payload = msgspec.json.Decoder(_Payload)
        self._array = msgspec.json.Decoder(list[msgspec.Raw])

    def decode(self, rows: OutboxRows, decoded: Decoded) -> bool:
        """Decode these, `PART_ROWS` at most, behind what is decoded already.

        False where no more rows belong into the batch: up to the first claim check, or that.
        """
        singles = self._single_inserts(rows)
        if singles is not None:
            decoded.messages += self._shaped(singles, decoded)
            decoded.rows += len(rows)
            return True
        return all(self._decode_row(row, decoded) for row in rows)

    def rows_of(
        self,
        event: OutboxEvent,
        op: Op,
        rows: Sequence[_Row],
        first_index: int,
        aside: SetAside,
    ) -> list[RelayMessage]:
        """The messages of rows that share an op and follow each other."""
        keys = self._keys_of(event).of_all(rows)
        if keys is None:
            alone = [
                message
                for index, row in enumerate(rows, first_index)
                for message in self._row_alone(event, op, row, index, aside.rejected)
            ]
            return self._shaped(alone, aside)
        prefix, history = f"{self._prefix}{event.outbox_id}:", history_of(event.refresh_id)
        stream_table = self._stream_table
        outbox_id, refresh_id, created_at, headers, is_full_refresh = (
            event.outbox_id,
            event.refresh_id,
            event.created_at,
            event.headers,
            event.is_full_refresh,
        )
        messages = [
            RelayMessage(
                dedup_key=f"{prefix}{index}{history}",
                payload=self._told(row),
                key=key,
                op=op,
                is_full_refresh=is_full_refresh,
                stream_table=stream_table,
                outbox_id=outbox_id,
                refresh_id=refresh_id,
                created_at=created_at,
                headers=headers,
                is_json=True,
            )
            for index, (row, key) in self._own(
                enumerate(zip(rows, keys, strict=True), first_index), keys
            )
        ]
        return self._shaped(messages, aside)

    def key_of(self, event: OutboxEvent, row: bytes) -> str | None:
        """The key of a row, or None where it has none or cannot be looked into."""
        try:
            return self._keys_of(event).of(row)
        except MessageUndecodable:
            return None

    def goes_out(self, event: OutboxEvent, op: Op, row: bytes) -> bool:
        """Whether a row of this op goes out, as far as the shape decides."""
        return self._shape is None or bool(self.rows_of(event, op, [row], 0, SetAside()))

    def updated(self, messages: list[RelayMessage], aside: SetAside) -> list[RelayMessage]:
        """The messages without those whose op is not asked for, once updates are put together."""
        if self._shape is None:
            return messages
        sent = [message for message in messages if self._shape.sends(message.op)]
        aside.filtered += len(messages) - len(sent)
        return sent

    def insert_op(self, event: OutboxEvent) -> Op:
        """What an inserted row is: in a snapshot the consumer may have it already."""
        return "upsert" if event.is_full_refresh else "insert"

    def begin(self, event: OutboxEvent) -> list[RelayMessage]:
        """What goes before the rows of a full refresh."""
        return self._marker(event, "snapshot_begin", "begin")

    def end(self, event: OutboxEvent) -> list[RelayMessage]:
        """What goes behind the rows of a full refresh."""
        return self._marker(event, "snapshot_end", "end")

    def truncation(self, event: OutboxEvent, aside: SetAside) -> list[RelayMessage]:
        """The one message of a full refresh without rows."""
        if not self._has_the_rest:
            return []
        return self._shaped([self._message(event, "0", "truncate", b"null")], aside)

    def refused(self, claim_check: ClaimCheck, error: MessageUndecodable) -> Rejected:
        """A claim check as a whole on its way to the dead letters."""
        return self._refused(claim_check.event, claim_check.payload, error)

    def _single_inserts(self, rows: OutboxRows) -> list[RelayMessage] | None:
        """The messages of the commonest rows by far: each says that one row was inserted.

        None for any other. What it gives is what the long way would give, at a third of the cost:
        the row was cut out of its payload, which is a whole JSON document, being of type jsonb.
        """
        inserted = rows.cut()
        if not inserted or any(rows.are_claim_checks) or any(rows.key_columns):
            return None
        if self._hides_row_id:
            return None
        # Several rows in one payload, or another array behind, and there are not as many keys.
        keys = self._keys.of_all(inserted)
        if keys is None:
            return None
        nothing = itertools.repeat(None)
        prefix, stream_table = self._prefix, self._stream_table
        return [
            RelayMessage(
                dedup_key=f"{prefix}{outbox_id}:0{history_of(refresh_id)}",
                payload=row,
                key=key,
                op="insert",
                stream_table=stream_table,
                outbox_id=outbox_id,
                refresh_id=refresh_id,
                created_at=created_at,
                headers=NO_HEADERS if headers is None else headers_of(headers),
                is_json=True,
            )
            for outbox_id, refresh_id, created_at, headers, row, key in self._own(
                zip(
                    rows.ids,
                    rows.refresh_ids or nothing,
                    rows.created_ats or nothing,
                    rows.headers or nothing,
                    inserted,
                    keys,
                    strict=False,
                ),
                keys,
            )
        ]

    def _own(self, rows: Iterable[_Value], keys: Sequence[str | None]) -> Iterable[_Value]:
        """Those of these rows whose keys are ours."""
        partition = self._partition
        return rows if partition == WHOLE else itertools.compress(rows, partition.has(keys))

    def _shaped(self, messages: list[RelayMessage], aside: SetAside) -> list[RelayMessage]:
        if self._shape is None:
            return messages
        sent: list[RelayMessage] = []
        for message in messages:
            try:
                shaped = self._shape.of(message)
            except MessageRejected as error:
                aside.rejected.append(Rejected(message, error))
            else:
                if shaped is None:
                    aside.filtered += 1
                else:
                    sent.append(shaped)
        return sent

    def _decode_row(self, row: OutboxRow, decoded: Decoded) -> bool:
        """One row, whatever it is; False where a claim check ends the batch."""
        outbox_id, refresh_id, created_at, _, _, is_claim_check, body, headers, key_columns = row
        event = OutboxEvent(
            outbox_id=outbox_id,
            refresh_id=refresh_id,
            created_at=created_at,
            headers=NO_HEADERS if headers is None else headers_of(headers),
            is_full_refresh=False,
            key_columns=None if key_columns is None else tuple(key_columns),
        )
        try:
            payload = self._read(body, is_claim_check=bool(is_claim_check))
        except MessageUndecodable as error:
            if self._has_the_rest:
                decoded.rejected.append(self._refused(event, body or b"null", error))
            decoded.rows += 1
            return True
        if isinstance(payload.backfill, str) and payload.backfill != self._pipeline:
            decoded.rows += 1
            return True
        if payload.full_refresh:
            event = msgspec.structs.replace(
                event, is_full_refresh=True, is_backfill=bool(payload.backfill)
            )
        if not payload.claim_check and not is_claim_check:
            self._decode_inline(event, payload, decoded)
            decoded.rows += 1
            return True
        if decoded.rows == 0:
            decoded.claim_check = _claim_check(event, row, payload)
            decoded.rows = 1
        return False

    def _row_alone(
        self, event: OutboxEvent, op: Op, row: _Row, index: int, rejected: list[Rejected]
    ) -> list[RelayMessage]:
        """The message of one row; where it can't be looked into, its rejection and none."""
        try:
            key = self._keys_of(event).of(row)
        except MessageUndecodable as error:
            if self._has_the_rest:
                rejected.append(self._refused(event, bytes(row), error, index=index, op=op))
            return []
        return [
            self._message(event, str(index), op, self._told(row), key=key)
            for _ in self._own([row], [key])
        ]

    def _keys_of(self, event: OutboxEvent) -> _KeyReader:
        """What reads the keys of an outbox row: it may say that they were renamed."""
        columns = event.key_columns
        if columns is None or not self._follows_renames:
            return self._keys
        if columns not in self._renamed_keys:
            self._renamed_keys[columns] = _KeyReader(columns)
        return self._renamed_keys[columns]

    def _told(self, row: _Row) -> bytes:
        """The row as it goes out: the row id of a stream table of pg_trickle is its key alone."""
        if not self._hides_row_id:
            return bytes(row)
        members = object_members(bytes(row))
        members.pop(ROW_ID, None)
        return msgspec.json.encode({name: msgspec.Raw(value) for name, value in members.items()})

    def _decode_inline(self, event: OutboxEvent, payload: _Payload, decoded: Decoded) -> None:
        inserted, deleted = payload.inserted or (), payload.deleted or ()
        messages = decoded.messages
        if event.is_full_refresh:
            if not inserted and not deleted:
                messages += self.truncation(event, decoded)
                return
            messages += self.begin(event)
        removed = self.rows_of(event, "delete", deleted, len(inserted), decoded) if deleted else []
        added = self.rows_of(event, self.insert_op(event), inserted, 0, decoded)
        if self.collapses_updates and not event.is_full_refresh:
            messages += self.updated(_collapsed(removed, added), decoded)
        else:
            messages += removed
            messages += added
        if event.is_full_refresh:
            messages += self.end(event)

    def _read(self, body: bytes | None, *, is_claim_check: bool) -> _Payload:
        if body is None:
            if is_claim_check:
                return _Payload(v=PAYLOAD_VERSION, claim_check=True)
            raise MessageUndecodable("the outbox row has no payload")
        try:
            if body[0] == _ARRAY_OPENS:
                return _Payload(v=PAYLOAD_VERSION, inserted=self._array.decode(body))
            payload = self._payload.decode(body)
        except RecursionError:
            payload = _read_deep(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MessageUndecodable(
                f"the outbox payload is not as it should be: {error}"
            ) from None
        if payload.v != PAYLOAD_VERSION or payload.v is True:
            if payload.v is None:
                raise MessageUndecodable("the outbox payload does not say its version (v)")
            if isinstance(payload.v, str):
                raise MessageUndecodable("the outbox payload's version (v) is not a number")
            raise MessageUndecodable(
                f"outbox payload version {payload.v!r} is not one this version can read"
            )
        return payload

    def _marker(self, event: OutboxEvent, op: Op, suffix: str) -> list[RelayMessage]:
        if not self._marks_snapshots or not event.is_full_refresh or event.is_backfill:
            return []
        return [self._message(event, suffix, op, b"null")]

    def _message(
        self, event: OutboxEvent, suffix: str, op: Op, payload: bytes, *, key: str | None = None
    ) -> RelayMessage:
        return RelayMessage(
            dedup_key=f"{self._prefix}{event.outbox_id}:{suffix}{history_of(event.refresh_id)}",
            payload=payload,
            key=key,
            op=op,
            is_full_refresh=event.is_full_refresh,
            stream_table=self._stream_table,
            outbox_id=event.outbox_id,
            refresh_id=event.refresh_id,
            created_at=event.created_at,
            headers=event.headers,
        )

    def _refused(
        self,
        event: OutboxEvent,
        payload: bytes,
        error: MessageUndecodable,
        *,
        index: int = 0,
        op: Op = "event",
    ) -> Rejected:
        return Rejected(self._message(event, str(index), op, payload), error)


def history_of(refresh_id: str | None) -> str:
    """The last part of a dedup key: the CRC-32 of the row's refresh id; nothing where it has none.

    After a failover to a standby that lacked the last commits, or a restore, ids are drawn again
    for other events. Their refresh ids are others, and so are their keys.
    """
    return "" if refresh_id is None else f":{crc32(refresh_id.encode()):08x}"


def _claim_check(event: OutboxEvent, row: OutboxRow, payload: _Payload) -> ClaimCheck:
    _, _, _, inserted_count, deleted_count, _, body, _, _ = row
    if payload.inserted_count is not None:
        inserted_count = payload.inserted_count
    if payload.deleted_count is not None:
        deleted_count = payload.deleted_count
    return ClaimCheck(
        event=event,
        inserted_count=inserted_count,
        deleted_count=deleted_count,
        payload=body or b"null",
    )


def _collapsed(removed: list[RelayMessage], added: list[RelayMessage]) -> list[RelayMessage]:
    replaced = {message.key for message in removed} & {message.key for message in added}
    replaced.discard(None)
    if not replaced:
        return removed + added
    return [
        *(message for message in removed if message.key not in replaced),
        *(
            msgspec.structs.replace(message, op="update") if message.key in replaced else message
            for message in added
        ),
    ]


def headers_of(raw: bytes) -> Mapping[str, str]:
    """The publisher's headers; what is not text goes as its JSON, what is null not at all."""
    if raw == b"{}":
        return NO_HEADERS
    try:
        values = msgspec.json.decode(raw)
    except _UNREADABLE:
        return NO_HEADERS
    if not isinstance(values, dict):
        return NO_HEADERS
    return {
        name: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in values.items()
        if value is not None
    }


def _read_deep(body: bytes) -> _Payload:
    """The same payload where some row is nested too deep for the decoder."""
    if body[0] == _ARRAY_OPENS:
        return _Payload(v=PAYLOAD_VERSION, inserted=_raws(body))
    members = object_members(body)
    rows = {name: members.pop(name, b"[]") for name in ("inserted", "deleted")}
    try:
        payload = msgspec.convert(
            {name: msgspec.json.decode(raw) for name, raw in members.items()}, _Payload
        )
    except (*_UNREADABLE, msgspec.ValidationError) as error:
        raise MessageUndecodable(f"the outbox payload is not as it should be: {error}") from None
    return msgspec.structs.replace(
        payload, inserted=_raws(rows["inserted"]), deleted=_raws(rows["deleted"])
    )


def _raws(array: bytes) -> list[msgspec.Raw]:
    return [msgspec.Raw(element) for element in array_elements(array)]


class _KeyReader:
    """Reads the keys of rows: one column's text, or several as a compact JSON array.

    Raises `MessageUndecodable` for a row that is not sound; one that is no object has no key.
    """

    def __init__(self, columns: tuple[str, ...]) -> None:
        self._columns = columns
        self._is_single = len(columns) == 1
        row_type: object
        if any(_needs_escaping(column) for column in columns):
            # The decoder of a struct does not take such names.
            row_type = dict[str, msgspec.Raw]
            self._values_of: _ValuesOf = _picking(columns)
            self._first_of: Callable[[Any], _Row] = lambda row: row.get(columns[0], b"")
        else:
            names = [f"column_{number}" for number in range(len(columns))]
            row_type = msgspec.defstruct(
                "KeyColumns",
                [(name, msgspec.Raw, msgspec.Raw()) for name in names],
                rename=dict(zip(names, columns, strict=True)),
                frozen=True,
                gc=False,
            )
            self._values_of = msgspec.structs.astuple
            self._first_of = operator.attrgetter("column_0")
        self._row = msgspec.json.Decoder(row_type if columns else msgspec.Raw)
        self._rows = msgspec.json.Decoder(list[row_type if columns else msgspec.Raw])  # type: ignore[misc]  # made here

    def of(self, row: _Row) -> str | None:
        """The key of one row."""
        if not self._columns:
            return None
        try:
            values = self._values_of(self._row.decode(row))
            return _single_key(str(values[0], "utf-8")) if self._is_single else _joined_key(values)
        except msgspec.ValidationError:
            return None
        except _UNREADABLE as error:
            raise MessageUndecodable(f"the row's key cannot be read: {error}") from None

    def of_all(self, rows: Sequence[_Row]) -> Sequence[str | None] | None:
        """The keys of these rows, cheaper than one after the other.

        None where they have to be looked at one by one: some row is no object or is not sound, or
        what was given for one is several.
        """
        try:
            found = self._rows.decode(b"[%b]" % b",".join(rows))
            if len(found) != len(rows):
                return None
            if not self._columns:
                return [None] * len(rows)
            if not self._is_single:
                return list(map(_joined_key, map(self._values_of, found)))
            return _single_keys(list(map(self._first_of, found)))
        except _UNREADABLE:
            return None


def _picking(columns: Sequence[str]) -> _ValuesOf:
    return lambda row: [row.get(column, b"") for column in columns]


def _single_keys(values: Sequence[_Row]) -> Sequence[str | None]:
    texts = b"\n".join(values).decode().split("\n")
    # An array or an object may have line breaks of its own.
    if len(texts) != len(values):
        texts = [str(value, "utf-8") for value in values]
    if "" not in texts and "".join(texts).isdecimal():
        return texts
    return list(map(_single_key, texts))


def _single_key(text: str) -> str | None:
    if not text or text == "null":
        return None
    return msgspec.json.decode(text, type=str) if text[0] == '"' else text


def _joined_key(values: Sequence[_Row]) -> str | None:
    texts = [bytes(value) for value in values]
    return None if b"" in texts else f"[{b','.join(texts).decode()}]"


def _needs_escaping(name: str) -> bool:
    return any(character in '"\\' or ord(character) < 32 for character in name)
