"""From outbox rows to messages: payload version 1 in all its forms.

A payload is ``{"v":1,"inserted":[…],"deleted":[…]}``; ``full_refresh`` marks a snapshot,
``claim_check`` says that the rows are in the delta table; the two are independent. A bare array is
read as ``inserted``. Deletes go out before inserts, while the index in the dedup key counts the
inserted rows first and then the deleted ones, so that a key never changes.

A full refresh without rows is a truncation: one message ``truncate`` with payload ``null``. With
``snapshot_markers`` a full refresh is framed by ``snapshot_begin`` and ``snapshot_end``, payload
``null``, whose dedup keys end in ``:begin`` and ``:end``.

Rows are passed on as the bytes that were read; only the key columns are looked at. A row that
cannot be looked into costs only itself; a payload that cannot be read costs its outbox row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec

from relay.backends.outbox.split import array_elements, object_members
from relay.contracts import Rejected
from relay.errors import MessageUndecodable
from relay.message import NO_HEADERS, Op, RelayMessage

PAYLOAD_VERSION: Final = 1

# id, refresh_id, created_at, inserted_count, deleted_count, is_claim_check, payload, headers
OutboxRow = tuple[
    int,
    str | None,
    datetime | None,
    int | None,
    int | None,
    bool | None,
    bytes | None,
    bytes | None,
]
_Row = msgspec.Raw | bytes

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_ARRAY_OPENS = ord("[")
# As many as stay in the processor's cache meanwhile: 4,000 at once take twice as long.
_ROWS_AT_ONCE = 250


class _Payload(msgspec.Struct, frozen=True, gc=False):
    v: int | float | str | bool | None = None
    inserted: list[msgspec.Raw] | None = None
    deleted: list[msgspec.Raw] | None = None
    full_refresh: bool | None = False
    claim_check: bool | None = False
    inserted_count: int | None = None
    deleted_count: int | None = None


class OutboxEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What all messages of one outbox row have in common."""

    outbox_id: int
    refresh_id: str | None
    created_at: datetime | None
    headers: Mapping[str, str]
    is_full_refresh: bool


class ClaimCheck(msgspec.Struct, frozen=True, kw_only=True):
    """An outbox row whose rows are in the delta table; counts None where the row does not say."""

    event: OutboxEvent
    inserted_count: int | None
    deleted_count: int | None
    payload: bytes


class Decoded(msgspec.Struct, kw_only=True):
    """The messages of the first ``rows`` outbox rows that were given, in order.

    A claim check is decoded alone: ``claim_check`` is set, ``rows`` is 1 and there are no messages.
    """

    messages: list[RelayMessage] = msgspec.field(default_factory=list)
    rejected: list[Rejected] = msgspec.field(default_factory=list)
    rows: int = 0
    claim_check: ClaimCheck | None = None


class OutboxDecoder:
    """Decodes the rows of one outbox. Without state: the same row always gives the same messages.

    ``namespace`` goes in front of every dedup key. ``key_columns`` name the entity; a row that
    lacks one of them has no key. ``collapse_updates`` turns a delete and an insert of one key in
    one outbox row into an ``update`` that has the index of the insert.
    """

    def __init__(
        self,
        *,
        outbox_table: str,
        stream_table: str,
        key_columns: Sequence[str] = (),
        namespace: str = "",
        collapse_updates: bool = False,
        snapshot_markers: bool = False,
    ) -> None:
        self._prefix = f"{namespace}:{outbox_table}:" if namespace else f"{outbox_table}:"
        self._stream_table = stream_table
        self._keys = _KeyReader(tuple(key_columns))
        self._collapses = collapse_updates and bool(key_columns)
        self._marks_snapshots = snapshot_markers
        self._payload = msgspec.json.Decoder(_Payload)
        self._payloads = msgspec.json.Decoder(list[_Payload])
        self._array = msgspec.json.Decoder(list[msgspec.Raw])

    @property
    def collapses_updates(self) -> bool:
        """True where a delete and an insert of one key become one update."""
        return self._collapses

    def decode(self, rows: Sequence[OutboxRow]) -> Decoded:
        """Decode as many rows as belong into one batch: up to the first claim check, or that."""
        decoded = Decoded()
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            singles = self._single_inserts(some)
            if singles is not None:
                decoded.messages += singles
                decoded.rows += len(some)
            elif not self._decode_singly(some, decoded):
                break
        return decoded

    def _decode_singly(self, rows: Sequence[OutboxRow], decoded: Decoded) -> bool:
        """Decode row by row behind what is decoded already; False where a claim check ends it."""
        messages, rejected = decoded.messages, decoded.rejected
        for row in rows:
            plain = self._plain_inserts(row)
            if plain:
                messages += plain
                decoded.rows += 1
                continue
            outbox_id, refresh_id, created_at, _, _, is_claim_check, body, headers = row
            event = OutboxEvent(
                outbox_id=outbox_id,
                refresh_id=refresh_id,
                created_at=created_at,
                headers=NO_HEADERS if headers is None else _headers(headers),
                is_full_refresh=False,
            )
            try:
                payload = self._read(body, is_claim_check=bool(is_claim_check))
            except MessageUndecodable as error:
                rejected.append(self._refused(event, body or b"null", error))
                decoded.rows += 1
                continue
            if payload.full_refresh:
                event = msgspec.structs.replace(event, is_full_refresh=True)
            if payload.claim_check or is_claim_check:
                if decoded.rows == 0:
                    decoded.claim_check = _claim_check(event, row, payload)
                    decoded.rows = 1
                return False
            self._decode_inline(event, payload, messages, rejected)
            decoded.rows += 1
        return True

    def rows_of(
        self,
        event: OutboxEvent,
        op: Op,
        rows: Iterable[msgspec.Raw | bytes],
        first_index: int,
        rejected: list[Rejected],
    ) -> Iterator[RelayMessage]:
        """The messages of rows that share an op and follow each other."""
        prefix = f"{self._prefix}{event.outbox_id}:"
        stream_table, key_of = self._stream_table, self._keys.of
        outbox_id, refresh_id, created_at, headers, is_full_refresh = (
            event.outbox_id,
            event.refresh_id,
            event.created_at,
            event.headers,
            event.is_full_refresh,
        )
        for index, row in enumerate(rows, first_index):
            try:
                key = key_of(row)
            except MessageUndecodable as error:
                rejected.append(self._refused(event, bytes(row), error, index=index, op=op))
                continue
            yield RelayMessage(
                dedup_key=f"{prefix}{index}",
                payload=bytes(row),
                key=key,
                op=op,
                is_full_refresh=is_full_refresh,
                stream_table=stream_table,
                outbox_id=outbox_id,
                refresh_id=refresh_id,
                created_at=created_at,
                headers=headers,
            )

    def key_of(self, row: bytes) -> str | None:
        """The key of a row, or None where it has none or cannot be looked into."""
        try:
            return self._keys.of(row)
        except MessageUndecodable:
            return None

    def insert_op(self, event: OutboxEvent) -> Op:
        """What an inserted row is: in a snapshot the consumer may have it already."""
        return "upsert" if event.is_full_refresh else "insert"

    def begin(self, event: OutboxEvent) -> list[RelayMessage]:
        """What goes before the rows of a full refresh."""
        return self._marker(event, "snapshot_begin", "begin")

    def end(self, event: OutboxEvent) -> list[RelayMessage]:
        """What goes behind the rows of a full refresh."""
        return self._marker(event, "snapshot_end", "end")

    def truncation(self, event: OutboxEvent) -> RelayMessage:
        """The one message of a full refresh without rows."""
        return self._message(event, "0", "truncate", b"null")

    def refused(self, claim_check: ClaimCheck, error: MessageUndecodable) -> Rejected:
        """A claim check as a whole on its way to the dead letters."""
        return self._refused(claim_check.event, claim_check.payload, error)

    def _single_inserts(self, rows: Sequence[OutboxRow]) -> list[RelayMessage] | None:
        """The messages of the commonest rows by far: each says that one row was inserted.

        None for any other. What it gives is what the long way would give, at a third of the cost:
        all are read in two calls. Each body is a whole JSON document, being of type jsonb.
        """
        bodies = [row[6] for row in rows if row[6] and not row[5]]
        if len(bodies) < len(rows):
            return None
        try:
            payloads = self._payloads.decode(b"[%b]" % b",".join(bodies))
            inserted = [
                payload.inserted[0]
                for payload in payloads
                if payload.inserted
                and len(payload.inserted) == 1
                and not payload.deleted
                and payload.v == PAYLOAD_VERSION
                and payload.v is not True
                and not payload.full_refresh
                and not payload.claim_check
            ]
            if len(inserted) < len(rows):
                return None
            keys = self._keys.of_all(inserted)
        except (*_UNREADABLE, MessageUndecodable):
            return None
        prefix, stream_table = self._prefix, self._stream_table
        return [
            RelayMessage(
                dedup_key=f"{prefix}{outbox_id}:0",
                payload=bytes(row),
                key=key,
                op="insert",
                stream_table=stream_table,
                outbox_id=outbox_id,
                refresh_id=refresh_id,
                created_at=created_at,
                headers=NO_HEADERS if headers is None else _headers(headers),
            )
            for (outbox_id, refresh_id, created_at, _, _, _, _, headers), row, key in zip(
                rows, inserted, keys, strict=True
            )
        ]

    def _plain_inserts(self, row: OutboxRow) -> list[RelayMessage] | None:
        """The messages of the commonest row by far: rows were inserted, and nothing is amiss.

        None for any other. What it gives is what the long way would give, at half the cost.
        """
        outbox_id, refresh_id, created_at, _, _, is_claim_check, body, headers = row
        if is_claim_check or not body:
            return None
        try:
            payload = self._payload.decode(body)
            if (
                payload.v is True
                or payload.v != PAYLOAD_VERSION
                or not payload.inserted
                or payload.deleted
                or payload.full_refresh
                or payload.claim_check
            ):
                return None
            prefix = f"{self._prefix}{outbox_id}:"
            stream_table, key_of = self._stream_table, self._keys.of
            texts = NO_HEADERS if headers is None else _headers(headers)
            return [
                RelayMessage(
                    dedup_key=f"{prefix}{index}",
                    payload=bytes(inserted),
                    key=key_of(inserted),
                    op="insert",
                    stream_table=stream_table,
                    outbox_id=outbox_id,
                    refresh_id=refresh_id,
                    created_at=created_at,
                    headers=texts,
                )
                for index, inserted in enumerate(payload.inserted)
            ]
        except (*_UNREADABLE, MessageUndecodable):
            return None

    def _decode_inline(
        self,
        event: OutboxEvent,
        payload: _Payload,
        messages: list[RelayMessage],
        rejected: list[Rejected],
    ) -> None:
        inserted, deleted = payload.inserted or (), payload.deleted or ()
        if event.is_full_refresh:
            if not inserted and not deleted:
                messages.append(self.truncation(event))
                return
            messages.extend(self.begin(event))
        if deleted:
            removed = list(self.rows_of(event, "delete", deleted, len(inserted), rejected))
            added = list(self.rows_of(event, self.insert_op(event), inserted, 0, rejected))
            if self._collapses and not event.is_full_refresh:
                removed, added = _collapsed(removed, added)
            messages += removed
            messages += added
        else:
            messages.extend(self.rows_of(event, self.insert_op(event), inserted, 0, rejected))
        if event.is_full_refresh:
            messages.extend(self.end(event))

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
            raise MessageUndecodable(
                f"outbox payload version {payload.v!r} is not one this version can read"
            )
        return payload

    def _marker(self, event: OutboxEvent, op: Op, suffix: str) -> list[RelayMessage]:
        if not self._marks_snapshots or not event.is_full_refresh:
            return []
        return [self._message(event, suffix, op, b"null")]

    def _message(self, event: OutboxEvent, suffix: str, op: Op, payload: bytes) -> RelayMessage:
        return RelayMessage(
            dedup_key=f"{self._prefix}{event.outbox_id}:{suffix}",
            payload=payload,
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


def _claim_check(event: OutboxEvent, row: OutboxRow, payload: _Payload) -> ClaimCheck:
    _, _, _, inserted_count, deleted_count, _, body, _ = row
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


def _collapsed(
    removed: list[RelayMessage], added: list[RelayMessage]
) -> tuple[list[RelayMessage], list[RelayMessage]]:
    replaced = {message.key for message in removed} & {message.key for message in added}
    replaced.discard(None)
    if not replaced:
        return removed, added
    return (
        [message for message in removed if message.key not in replaced],
        [
            msgspec.structs.replace(message, op="update") if message.key in replaced else message
            for message in added
        ],
    )


def _headers(raw: bytes) -> Mapping[str, str]:
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
        self._as_key = _single_key if len(columns) == 1 else _joined_key
        # The decoder of a struct does not take such names.
        self._by_name = (
            msgspec.json.Decoder(dict[str, msgspec.Raw])
            if any(_needs_escaping(column) for column in columns)
            else None
        )
        names = [f"column_{number}" for number in range(len(columns))]
        row_type = msgspec.defstruct(
            "KeyColumns",
            [(name, msgspec.Raw, msgspec.Raw()) for name in names],
            rename=None if self._by_name else dict(zip(names, columns, strict=True)),
            frozen=True,
            gc=False,
        )
        self._row = msgspec.json.Decoder(row_type)
        self._rows = msgspec.json.Decoder(list[row_type])  # type: ignore[valid-type]  # made here

    def of(self, row: _Row) -> str | None:
        """The key of one row."""
        if not self._columns:
            return None
        try:
            return self._as_key(self._picked(row))
        except msgspec.ValidationError:
            return None
        except _UNREADABLE as error:
            raise MessageUndecodable(f"the row's key cannot be read: {error}") from None

    def of_all(self, rows: Sequence[_Row]) -> Sequence[str | None]:
        """The keys of these rows, cheaper than one after the other."""
        if not self._columns or self._by_name:
            return [self.of(row) for row in rows]
        try:
            found = self._rows.decode(b"[%b]" % b",".join(rows))
            as_key, values_of = self._as_key, msgspec.structs.astuple
            return [as_key(values_of(columns)) for columns in found]
        except _UNREADABLE:
            return [self.of(row) for row in rows]

    def _picked(self, row: _Row) -> Sequence[_Row]:
        """The raw values of the key columns; empty where missing."""
        if self._by_name is None:
            return msgspec.structs.astuple(self._row.decode(row))
        found = self._by_name.decode(row)
        return [found.get(column, b"") for column in self._columns]


def _single_key(values: Sequence[_Row]) -> str | None:
    text = str(values[0], "utf-8")
    if not text or text == "null":
        return None
    return msgspec.json.decode(text, type=str) if text[0] == '"' else text


def _joined_key(values: Sequence[_Row]) -> str | None:
    texts = [bytes(value) for value in values]
    return None if b"" in texts else f"[{b','.join(texts).decode()}]"


def _needs_escaping(name: str) -> bool:
    return any(character in '"\\' or ord(character) < 32 for character in name)
