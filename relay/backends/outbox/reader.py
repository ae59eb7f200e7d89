"""Reading an outbox in commit order: no row is skipped, whatever order transactions end in.

The rules and why they are sound: `docs/decisions/0001-commit-order.md`. In short, one round reads
the rows above the position together with the due gaps (one statement, ordered by id), *then* looks
who holds the outbox's insert lock, and only then decides what the read may be used for.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import asyncpg
import msgspec

from relay.backends.outbox.gap import (
    MAX_ID,
    NO_QUESTION,
    NOBODY,
    GapBook,
    GapQuestion,
    Holders,
    LockView,
    PositionDelta,
)
from relay.backends.outbox.row import OutboxRows, cut_inserted
from relay.catalog import OutboxDescription
from relay.errors import CatalogError, OutboxUnsafe
from relay.postgres import Database, PooledConnection

QUESTION_RANGES: Final = 20_000
"""Gaps that one statement asks about; measured at less than 1 µs each."""

DEAD_GAPS_PER_COMMIT: Final = 10_000

_ROUNDS_BEFORE_PACKING: Final = 8
# PostgreSQL compresses what is larger, and then it is not packed either.
_LARGEST_PACKED_ROW_BYTES: Final = 2048

# ``is_surely_open`` is what proves that a holder's rows were invisible to the statement before: its
# transaction is still in progress in this later statement's snapshot, or has no transaction id yet
# and hence no rows. The lock alone proves it less well: a transaction becomes visible shortly
# before it gives its locks back. A prepared transaction (no pid) always has an id. Ids in pg_locks
# have 32 bits: they are extended next to the snapshot's own. Several belong to a transaction with
# savepoints; the oldest is its own.
_LOCK_VIEW: Final = """
with lock as materialized (
    select l.locktype, l.virtualtransaction, l.pid, l.transactionid::text::bigint as short_id
    from pg_catalog.pg_locks as l
    where l.granted
        and (
            (
                l.locktype = 'relation'
                and l.mode = 'RowExclusiveLock'
                and l.relation = $1::oid
                and l.database = (
                    select d.oid from pg_catalog.pg_database as d
                    where d.datname = pg_catalog.current_database()
                )
            )
            or (l.locktype = 'transactionid' and l.mode = 'ExclusiveLock')
        )
),
now as materialized (
    select
        pg_catalog.pg_current_snapshot() as snapshot,
        pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint as next_id
),
transaction as (
    select
        x.virtualtransaction,
        min(n.next_id + mod(x.short_id - n.next_id % 4294967296 + 3 * 2147483648, 4294967296)
            - 2147483648) as id
    from lock as x
    cross join now as n
    where x.locktype = 'transactionid'
    group by x.virtualtransaction
),
holder as (
    select
        l.virtualtransaction as name,
        case
            when t.id is null then l.pid is not null
            else not pg_catalog.pg_visible_in_snapshot(t.id::text::xid8, n.snapshot)
        end as is_surely_open
    from lock as l
    cross join now as n
    left join transaction as t using (virtualtransaction)
    where l.locktype = 'relation'
)
select
    coalesce(array_agg(h.name), '{}') as holders,
    coalesce(array_agg(h.name) filter (where h.is_surely_open), '{}') as surely_open,
    pg_catalog.pg_postmaster_start_time()::text as server_started_at,
    pg_catalog.pg_is_in_recovery() as is_standby
from holder as h
"""


# Above a position, with these ids, and above it or in gaps: of an adopted outbox by one call each,
# since two calls would see two snapshots.
_ADOPTED_COLUMNS: Final = (
    "select o.id, null::uuid as refresh_id, o.created_at, o.inserted_count, o.deleted_count,"
    " o.is_claim_check, o.payload, o.headers, o.fields as key_columns"
)
_ADOPTED_BOUNDS: Final = (
    "above => $1, max_rows => $2, with_payload => true",
    "above => null, max_rows => $2, with_payload => true,"
    " firsts => array(select i from unnest($4::bigint[]) as i where i > $1),"
    " lasts => array(select i from unnest($4::bigint[]) as i where i > $1)",
    "above => $1, max_rows => $2, with_payload => true,"
    " firsts => $4::bigint[] || $5::bigint[], lasts => $4::bigint[] || $6::bigint[]",
)


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What one round read: whole outbox rows in ascending order of id, that may go out as such.

    ``may_have_claim_check``: else all of them go out together. ``has_more``: as far as the round
    knows, it left something behind.
    """

    rows: OutboxRows
    question: GapQuestion = NO_QUESTION
    may_have_claim_check: bool = False
    has_more: bool = False
    locks: LockView | None = None


class _Statement(msgspec.Struct, frozen=True):
    """One question in two forms: a record a row, or all rows in one record."""

    bounded: str
    packed: str


class RowFetcher:
    """Fetches rows of one outbox as bounded batches, in the cheaper of two forms where it fits."""

    def __init__(self, outbox: OutboxDescription, batch_size: int, batch_bytes: int) -> None:
        self._batch_size = batch_size
        self._batch_bytes = batch_bytes
        columns = (
            "select o.id, o.refresh_id, o.created_at, o.inserted_count, o.deleted_count,"
            " o.is_claim_check, o.payload, o.headers, o.key_columns"
            f" from {outbox.outbox_relation} as o"
        )
        above = f"{columns} where o.id > $1 order by o.id limit $2"
        above_of_ids = (
            f"{columns} where o.id = any($4::bigint[]) and o.id > $1 order by o.id limit $2"
        )
        # Most gaps are one id wide; a list of those is the cheapest to look up by far.
        at_ids = f"{columns} where o.id = any($4::bigint[]) order by o.id limit $2"
        in_ranges = (
            "select o.* from unnest($5::bigint[], $6::bigint[]) as g (first_id, last_id)"
            f" cross join lateral ({columns} where o.id between g.first_id and g.last_id"
            " order by o.id limit $2) as o order by o.id limit $2"
        )
        in_gaps_too = (
            f"select o.* from (({at_ids}) union all ({in_ranges}) union all ({above})) as o"
            " order by o.id limit $2"
        )
        if outbox.is_adopted:
            above, above_of_ids, in_gaps_too = (
                f"{_ADOPTED_COLUMNS} from {outbox.rows(bounds)} as o order by o.id limit $2"
                for bounds in _ADOPTED_BOUNDS
            )
        self._packs = not outbox.is_adopted
        self.above = _Statement(_bounded(above), _packed(above))
        self.above_and_in_gaps = _Statement(_bounded(in_gaps_too), _packed(in_gaps_too))
        self.above_of_ids = _Statement(_bounded(above_of_ids), _packed(above_of_ids))
        self._packed_row_bytes = min(_LARGEST_PACKED_ROW_BYTES, batch_bytes)
        self._packed_rows = max(1, min(batch_size, batch_bytes // self._packed_row_bytes))
        self._rounds_before_packing = 0

    async def fetch(
        self, connection: PooledConnection, statement: _Statement, above: int, *ids: Sequence[int]
    ) -> Round:
        """At least one row where there is one. Raises as PostgreSQL does."""
        if self._packs and self._rounds_before_packing == 0:
            read = await self._fetch_packed(connection, statement.packed, above, ids)
            if read is not None:
                return read
            self._rounds_before_packing = _ROUNDS_BEFORE_PACKING
        self._rounds_before_packing -= 1
        records = await connection.fetch(
            statement.bounded, above, self._batch_size, self._batch_bytes, *ids
        )
        messages = sum(max(1, (record[3] or 0) + (record[4] or 0)) for record in records)
        size = sum(len(record[6] or b"") for record in records)
        self._expect(len(records), messages, size)
        return Round(
            rows=OutboxRows.of([tuple(record) for record in records]),
            may_have_claim_check=True,
            # What is stored compressed has counted for up to eight times of what it is.
            has_more=messages >= self._batch_size or size * 8 >= self._batch_bytes,
        )

    def _expect(self, rows: int, messages: int, size: int) -> None:
        """Ask next time for about as many rows of this kind as make one batch."""
        if not rows:
            return
        by_messages = self._batch_size * rows // max(1, messages)
        by_bytes = self._batch_bytes * rows // max(1, size)
        most = min(self._batch_size, 2 * self._packed_rows)
        self._packed_rows = max(1, min(by_messages, by_bytes, most))

    async def _fetch_packed(
        self,
        connection: PooledConnection,
        statement: str,
        above: int,
        ids: tuple[Sequence[int], ...],
    ) -> Round | None:
        """The rows in one record, at a third of the cost; None where they have to come singly.

        That is where one is a claim check, is large, or where all together are too much.
        """
        asked = self._packed_rows
        try:
            record = await connection.fetchrow(
                statement, above, asked, self._packed_row_bytes, *ids
            )
        except (UnicodeDecodeError, asyncpg.ProgramLimitExceededError):
            return None
        if record is None or record["ids"] is None:
            return Round(rows=OutboxRows())
        if record["is_unfit"] or record["messages"] > self._batch_size:
            return None
        rows = len(record["ids"])
        self._expect(rows, int(record["messages"]), len(record["payloads"]))
        return Round(rows=_unpacked(record), has_more=rows == asked)


class CommitOrderReader:
    """Reads one outbox from a position with its gaps; has no connection of its own."""

    def __init__(
        self,
        *,
        database: Database,
        outbox: OutboxDescription,
        batch_size: int,
        batch_bytes: int,
    ) -> None:
        self._database = database
        self._outbox_oid = outbox.outbox_oid
        self._rows = RowFetcher(outbox, batch_size, batch_bytes)
        self._book = GapBook(0)
        self._server_started_at = ""
        self._recovered: Holders = NOBODY

    @property
    def position(self) -> int:
        """The highest id that was read."""
        return self._book.position

    @property
    def pending_gaps(self) -> int:
        """How many ranges of ids are waited for."""
        return len(self._book)

    @property
    def has_due_gaps(self) -> bool:
        """True when the next round has more to read than what is new."""
        return self._book.has_due_gaps

    @property
    def has_changes(self) -> bool:
        """True when gaps have come or gone since the last `settle` handed out a delta."""
        return self._book.has_changes

    async def start(self, position: int, firsts: Sequence[int], lasts: Sequence[int]) -> None:
        """Begin at a committed position; its gaps are noted afresh with who holds the lock now."""
        book = GapBook(position)
        if firsts:
            async with self._database.connection("looking for open transactions") as connection:
                locks = await self._look(connection)
            book.load(firsts, lasts, locks.holders)
            self._remember_server(locks)
        self._book = book

    async def read(self) -> Round:
        """One round. Changes nothing that `settle` does not confirm; raises as PostgreSQL does."""
        book = self._book
        async with self._database.connection("reading the outbox") as connection:
            while True:
                question = book.question(QUESTION_RANGES)
                read = await self._fetch(connection, question)
                if not book.has_gaps and not book.has_holes(read.rows.ids):
                    return read
                locks = await self._look(connection)
                if self._is_another_run(locks):
                    self._remember_server(locks)
                    if book.has_gaps:
                        book.note_afresh(locks.holders)
                        continue
                # Where a transaction may have ended before the read whose gaps were not read
                # along, a row of it might be older than one that was read: read again.
                if not read.rows.ids or book.rests_surely(locks):
                    return msgspec.structs.replace(read, locks=locks)
                book.observe(locks)

    def settle(self, read: Round, rows: int) -> None:
        """Of this round the first ``rows`` rows go out; what comes behind is read again.

        At least one row of a round that has any.
        """
        holders = NOBODY if read.locks is None else read.locks.holders
        self._book.absorb(read.question, read.rows.ids[:rows], holders)
        if read.locks is not None:
            self._book.observe(read.locks)

    def delta(self) -> PositionDelta:
        """What is to be committed once everything up to here is delivered."""
        return self._book.delta(DEAD_GAPS_PER_COMMIT)

    async def _fetch(self, connection: PooledConnection, question: GapQuestion) -> Round:
        # Rows behind gaps that are not asked about yet have to wait for their answer.
        above = self._book.position if question.is_complete else MAX_ID
        if not question.firsts:
            read = await self._rows.fetch(connection, self._rows.above, above)
        else:
            gaps = _singles_and_ranges(question)
            read = await self._rows.fetch(connection, self._rows.above_and_in_gaps, above, *gaps)
        return msgspec.structs.replace(read, question=question)

    def _is_another_run(self, locks: LockView) -> bool:
        """True where the names of holders have changed: the server has started, or recovered.

        The start time does not show that it recovered from the crash of one of its processes. But
        only a prepared transaction outlives that, and its new name is one that no other has.
        """
        return (
            locks.server_started_at != self._server_started_at
            or not _recovered(locks) <= self._recovered
        )

    def _remember_server(self, locks: LockView) -> None:
        self._server_started_at = locks.server_started_at
        self._recovered = _recovered(locks)

    async def _look(self, connection: PooledConnection) -> LockView:
        row = await connection.fetchrow(_LOCK_VIEW, self._outbox_oid)
        if row is None:
            raise CatalogError("the server said nothing of its locks")
        if row["is_standby"]:
            raise standby()
        return LockView(
            frozenset(row["holders"]), frozenset(row["surely_open"]), row["server_started_at"]
        )


def _singles_and_ranges(
    question: GapQuestion,
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The gaps of one id, and of the others the first and the last ids."""
    if question.firsts == question.lasts:
        return question.firsts, (), ()
    pairs = list(zip(question.firsts, question.lasts, strict=True))
    return (
        [first for first, last in pairs if first == last],
        [first for first, last in pairs if first != last],
        [last for first, last in pairs if first != last],
    )


def _recovered(locks: LockView) -> Holders:
    """Prepared transactions that were read back from disk: they have no process number."""
    return frozenset(name for name in locks.holders if name.startswith("-1/"))


def standby() -> OutboxUnsafe:
    """The error for a server on which open transactions cannot be seen."""
    return OutboxUnsafe(
        "the database is a standby: it does not show which transactions are open",
        remedy="let postgres.url lead to the primary, for example with target_session_attrs",
    )


def _bounded(candidates: str) -> str:
    """As many of the candidates ($2) as make one batch: bounded messages ($2) and bytes ($3).

    The row that crosses a bound still belongs to it, so there is always one. A claim check comes
    alone. The size of what is stored compressed is multiplied by what compression usually wins.
    """
    return (
        "select o.id, o.refresh_id::text as refresh_id, o.created_at, o.inserted_count,"
        " o.deleted_count, o.is_claim_check, o.payload, nullif(o.headers, '{}') as headers,"
        " o.key_columns from (select o.*,"
        "   sum(o.messages) over running - o.messages as messages_before,"
        "   sum(o.bytes) over running - o.bytes as bytes_before"
        "  from (select o.*,"
        "    case when o.is_claim_check then $2::float8"
        "      else greatest(coalesce(o.inserted_count, 0) + coalesce(o.deleted_count, 0), 1)"
        "    end as messages,"
        "    coalesce(pg_catalog.pg_column_size(o.payload), 0)"
        "      * case when pg_catalog.pg_column_compression(o.payload) is null"
        "          then 1.0::float8 else 8 end as bytes"
        f"   from ({candidates}) as o"
        "  ) as o window running as (order by o.id rows unbounded preceding)"
        " ) as o"
        " where o.messages_before < $2::float8 and o.bytes_before < $3::float8"
        "  and (o.is_claim_check is not true or o.messages_before = 0)"
        " order by o.id"
    )


def _packed(candidates: str) -> str:
    """All candidates ($2) in one record, and whether one is unfit for it.

    That is a claim check, one with key columns of its own, or one whose payload or headers are
    larger than $3 bytes.

    The driver takes a few long values apart several times faster than many short ones, a
    timestamp from seconds faster than from its own form. A line holds one JSON text, which has
    no line breaks of its own. Something compressed may be any size; what is unfit is left out, so
    that the record has a bound. (``offset 0`` keeps what is unfit from being found out twice.)
    """
    return (
        "select array_agg(o.id) as ids,"
        " case when count(o.refresh_id) > 0 then array_agg(o.refresh_id::text) end as refresh_ids,"
        " array_agg(pg_catalog.date_part('epoch', o.created_at)) as created_ats,"
        " string_agg(case when o.is_unfit then '' else coalesce(o.payload::text, '') end, E'\\n')"
        "   as payloads,"
        " array_agg(o.id) filter (where o.said is not null and o.is_unfit is not true)"
        "   as ids_with_headers,"
        " string_agg(o.said::text, E'\\n') filter (where o.is_unfit is not true) as headers,"
        " sum(greatest(coalesce(o.inserted_count, 0) + coalesce(o.deleted_count, 0), 1)::float8)"
        "   as messages,"
        " bool_or(o.is_unfit) as is_unfit"
        " from (select o.*, nullif(o.headers, '{}') as said, case"
        "   when o.is_claim_check or o.key_columns is not null"
        "    or pg_catalog.pg_column_size(o.payload) > $3::bigint"
        "    or pg_catalog.pg_column_compression(o.payload) is not null"
        "    or pg_catalog.pg_column_size(o.headers) > $3::bigint"
        "    or pg_catalog.pg_column_compression(o.headers) is not null then true"
        "   else o.payload @> '{\"claim_check\": true}' end as is_unfit"
        f"  from ({candidates}) as o offset 0) as o"
    )


def _unpacked(record: asyncpg.Record) -> OutboxRows:
    """The rows of a packed record; counts and the claim check are what they are without one."""
    ids = record["ids"]
    if any(map(operator.ge, ids, itertools.islice(ids, 1, None))):
        raise CatalogError("the server gave the rows of the outbox out of order")
    payloads = record["payloads"].encode()
    inserted = cut_inserted(payloads, len(ids))
    return OutboxRows(
        ids=ids,
        refresh_ids=record["refresh_ids"] or (),
        created_ats=_moments(record["created_ats"]),
        payloads=() if inserted else _lines(payloads),
        inserted=inserted,
        headers=_headers(record),
    )


def _headers(record: asyncpg.Record) -> Sequence[bytes | None]:
    """Those of each row; most have none."""
    if record["headers"] is None:
        return ()
    headers = dict(zip(record["ids_with_headers"], _lines(record["headers"].encode()), strict=True))
    return [headers.get(id_) for id_ in record["ids"]]


def _lines(text: bytes) -> Sequence[bytes | None]:
    """The lines of a text, None for an empty one."""
    lines = text.split(b"\n")
    return [line or None for line in lines] if b"" in lines else lines


def _moments(seconds: Sequence[float | None]) -> Sequence[datetime | None]:
    """Times from seconds since the epoch, to the microsecond; None for one that Python lacks."""
    try:
        return msgspec.convert(seconds, list[datetime | None], strict=False)
    except msgspec.ValidationError:
        return [_moment(one) for one in seconds]


def _moment(second: float | None) -> datetime | None:
    try:
        return msgspec.convert(second, datetime | None, strict=False)
    except msgspec.ValidationError:
        return None
