"""Reading the rows of a claim check page by page, in bounded memory.

Each page is its own short statement that goes on behind the last row of the page before: a cursor
held open while a sink stalls would pin the database's horizon and a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from relay.backends.outbox.decoder import ClaimCheck, OutboxDecoder, SetAside
from relay.catalog import OutboxDescription
from relay.contracts import Rejected
from relay.errors import MessageUndecodable
from relay.message import Op, RelayMessage
from relay.postgres import Database

PAGE_ROWS: Final = 1_000
MAX_RECOUNTS: Final = 3

Part = Literal["deleted", "inserted"]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """One page in the order in which it goes out; ``rows`` counts what was read of the table."""

    messages: Sequence[RelayMessage] = ()
    rejected: Sequence[Rejected] = ()
    filtered: int = 0
    rows: int = 0
    is_last: bool = False


class _Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What the delta table holds for one outbox row. Row numbers are None where there is none."""

    inserted: int
    deleted: int
    unknown: int
    first_inserted: int | None
    first_deleted: int | None


class DeltaTable:
    """The statements on one delta table."""

    def __init__(self, relation: str) -> None:
        inserted, deleted = "d.row_op = 'INSERT'", "d.row_op = 'DELETE'"
        self.contents = (
            f"select count(*) filter (where {inserted}) as inserted,"
            f" count(*) filter (where {deleted}) as deleted,"
            f" count(*) filter (where not ({inserted} or {deleted})) as unknown,"
            f" min(d.row_num) filter (where {inserted}) as first_inserted,"
            f" min(d.row_num) filter (where {deleted}) as first_deleted"
            f" from {relation} as d where d.outbox_id = $1"
        )
        self.deleted_page = _page(relation, deleted, inserted)
        self.inserted_page = _page(relation, inserted, deleted)


class ClaimCheckReader:
    """Reads one claim check: its deleted rows first, then the inserted ones, by row number.

    Updates are collapsed where the deleted and the inserted row stand at the same place of their
    parts, as those of one UPDATE statement do: finding all pairs would need memory without bound.
    """

    def __init__(
        self,
        *,
        database: Database,
        outbox: OutboxDescription,
        decoder: OutboxDecoder,
        claim_check: ClaimCheck,
        page_rows: int,
        page_bytes: int,
    ) -> None:
        self._database = database
        self._decoder = decoder
        self._claim_check = claim_check
        self._page_rows = page_rows
        self._page_bytes = page_bytes
        self._delta = DeltaTable(outbox.delta_relation)
        self._contents: _Contents | None = None
        self._recounts = 0
        self._part: Part = "deleted"
        self._read_rows = 0
        self._after_row = -1

    @property
    def outbox_id(self) -> int:
        """The outbox row whose rows these are."""
        return self._claim_check.event.outbox_id

    async def next_page(self) -> Page | None:
        """The next page; None where rows that the outbox row promises are not there yet.

        Rows that are missing for good fail the claim check as a whole: its last page then holds
        nothing but that. Raises `Outage`, `ConfigurationError`.
        """
        if self._contents is None:
            contents = await self._count(self._delta)
            reason = self._what_is_wrong(contents)
            if reason and self._recounts < MAX_RECOUNTS:
                self._recounts += 1
                return None
            if reason:
                return self._refused(reason)
            self._contents = contents
            return await self._begin(self._delta, contents)
        return await self._read(self._delta, self._contents, [])

    async def _begin(self, delta: DeltaTable, contents: _Contents) -> Page:
        event = self._claim_check.event
        if event.is_full_refresh and contents.inserted + contents.deleted == 0:
            aside = SetAside()
            messages = self._decoder.truncation(event, aside)
            return Page(messages=messages, filtered=aside.filtered, is_last=True)
        self._enter("deleted" if contents.deleted else "inserted", contents)
        return await self._read(delta, contents, self._decoder.begin(event))

    async def _read(
        self, delta: DeltaTable, contents: _Contents, messages: list[RelayMessage]
    ) -> Page:
        aside = SetAside()
        expected = contents.deleted if self._part == "deleted" else contents.inserted
        rows = 0
        if expected:
            records = await self._database.fetch(
                "reading a claim check",
                delta.deleted_page if self._part == "deleted" else delta.inserted_page,
                self.outbox_id,
                self._after_row,
                self._page_rows,
                self._page_bytes,
                self._twin_distance(contents),
            )
            rows = len(records)
            messages += self._decoded(
                [(row["data"], row["twin"]) for row in records], contents, aside
            )
            if records:
                self._after_row = records[-1]["row_num"]
            else:
                # Somebody deleted rows of a claim check that is being read.
                aside.rejected.append(
                    self._decoder.refused(
                        self._claim_check,
                        MessageUndecodable(
                            f"the delta table lost {expected - self._read_rows} {self._part} rows"
                            " while they were being read"
                        ),
                    )
                )
                self._read_rows = expected
        self._read_rows += rows
        is_last = False
        if self._read_rows >= expected:
            if self._part == "deleted" and contents.inserted:
                self._enter("inserted", contents)
            else:
                is_last = True
                messages += self._decoder.end(self._claim_check.event)
        return Page(
            messages=messages,
            rejected=aside.rejected,
            filtered=aside.filtered,
            rows=rows,
            is_last=is_last,
        )

    def _decoded(
        self,
        rows: Sequence[tuple[bytes | None, bytes | None]],
        contents: _Contents,
        aside: SetAside,
    ) -> list[RelayMessage]:
        event, decoder = self._claim_check.event, self._decoder
        is_deleted = self._part == "deleted"
        first_index = self._read_rows + (contents.inserted if is_deleted else 0)
        op: Op = "delete" if is_deleted else decoder.insert_op(event)
        if not decoder.collapses_updates or event.is_full_refresh:
            return decoder.rows_of(
                event, op, [row or b"null" for row, _ in rows], first_index, aside
            )
        messages: list[RelayMessage] = []
        for index, (row, twin) in enumerate(rows, first_index):
            has_twin = (
                row is not None
                and twin is not None
                and (key := decoder.key_of(event, row)) is not None
                and key == decoder.key_of(event, twin)
                and decoder.goes_out(event, "insert" if is_deleted else "delete", twin)
            )
            made = decoder.rows_of(event, op, [row or b"null"], index, aside)
            if has_twin:
                made = [] if is_deleted else [msgspec.structs.replace(m, op="update") for m in made]
            messages += made
        return decoder.updated(messages, aside)

    def _twin_distance(self, contents: _Contents) -> int | None:
        """From a row's number to that of the row at the same place of the other part."""
        first_inserted, first_deleted = contents.first_inserted, contents.first_deleted
        if not self._decoder.collapses_updates or first_inserted is None or first_deleted is None:
            return None
        distance = first_deleted - first_inserted
        return -distance if self._part == "deleted" else distance

    def _enter(self, part: Part, contents: _Contents) -> None:
        self._part = part
        self._read_rows = 0
        first = contents.first_deleted if part == "deleted" else contents.first_inserted
        self._after_row = -1 if first is None else first - 1

    async def _count(self, delta: DeltaTable) -> _Contents:
        row = await self._database.fetch_row(
            "counting the rows of a claim check", delta.contents, self.outbox_id
        )
        return msgspec.convert({} if row is None else dict(row), _Contents)

    def _what_is_wrong(self, contents: _Contents) -> str:
        promised = self._claim_check
        if contents.unknown:
            return f"the delta table holds {contents.unknown} rows of an unknown operation"
        for part, expected, found in (
            ("inserted", promised.inserted_count, contents.inserted),
            ("deleted", promised.deleted_count, contents.deleted),
        ):
            if expected is not None and found < expected:
                return f"the claim check promises {expected} {part} rows, but {found} are there"
        return ""

    def _refused(self, reason: str) -> Page:
        error = MessageUndecodable(reason)
        return Page(rejected=[self._decoder.refused(self._claim_check, error)], is_last=True)


def _page(relation: str, condition: str, opposite: str) -> str:
    """Rows behind $2 of outbox row $1, $3 at most and about $4 bytes; each with its twin at $5.

    The row that crosses the bound still belongs to it, so there is always one. The size of what is
    stored compressed is multiplied by what compression usually wins.
    """
    return (
        # A subselect in the list is always looked up by both columns of the key; a join may not be.
        "select p.row_num, p.data, case when $5::bigint is not null then"
        f" (select d.row_data from {relation} as d"
        f"  where d.outbox_id = $1 and d.row_num = p.row_num + $5::bigint and {opposite})"
        " end as twin"
        " from (select d.row_num, d.row_data as data,"
        "  coalesce(sum(pg_catalog.pg_column_size(d.row_data)"
        "   * case when pg_catalog.pg_column_compression(d.row_data) is null"
        "      then 1.0::float8 else 8 end) over before, 0) as bytes_before"
        f" from {relation} as d where d.outbox_id = $1 and d.row_num > $2 and {condition}"
        " window before as"
        "  (order by d.row_num rows between unbounded preceding and 1 preceding)"
        " order by d.row_num limit $3) as p"
        " where p.bytes_before < $4::float8 order by p.row_num"
    )
