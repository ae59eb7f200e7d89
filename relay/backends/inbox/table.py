"""Where messages are written: an inbox of the catalog, or a table named directly.

An inbox of the catalog is written by the function beside its table, with the rights of the
table's owner; a table that was named is examined and inserted into by the role that connected.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from relay.backends.inbox.row import DOCUMENT_FIELDS, FIELDS
from relay.catalog import INBOX_IS_INTACT, InboxDescription
from relay.errors import AuthenticationRefused, ConfigurationError, DestinationMissing
from relay.postgres import Database

REQUIRED_FIELDS = ("event_id", "payload")
DOCUMENT_TYPES = ("jsonb", "json", "text", "character varying", "bytea")

_DOING = "looking at the inbox table"
_DURABLY = "pg_catalog.set_config('synchronous_commit', 'on', true)"

# Types without their length: a cast to varchar(20) would cut silently, the assignment refuses.
_COLUMNS = """
select
    quote_ident(a.attname) as name,
    format_type(a.atttypid, -1) as type,
    exists (
        select
        from pg_index as i
        where i.indrelid = a.attrelid
            and i.indisunique
            and i.indimmediate
            and i.indisvalid
            and i.indpred is null
            and i.indnkeyatts = 1
            and i.indkey[0] = a.attnum
    ) as is_unique,
    has_column_privilege(a.attrelid, a.attnum, 'insert') as is_insertable,
    has_column_privilege(a.attrelid, a.attnum, 'select') as is_selectable
from pg_attribute as a
where a.attrelid = to_regclass($1) and a.attnum > 0 and not a.attisdropped
"""


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """One column of the table; ``name`` is quoted, ``type`` has no length."""

    name: str
    type: str
    is_unique: bool
    is_insertable: bool
    is_selectable: bool


class InboxTable(msgspec.Struct, frozen=True, kw_only=True):
    """A table fit to be written to. ``relation`` is quoted; ``columns``: field to its column."""

    relation: str
    columns: Mapping[str, Column]

    def statement(self, *, makes_durable: bool) -> str:
        """One insert that takes an array of values for each column, in their order.

        ``makes_durable``: for sessions in which a commit does not wait for the disk.
        """
        numbered = list(enumerate(self.columns.items(), start=1))
        names = ", ".join(column.name for column in self.columns.values())
        values = ", ".join(f"sent.{field}::{column.type}" for _, (field, column) in numbered)
        arrays = ", ".join(f"${n}::{_array_type(column.type)}" for n, (_, column) in numbered)
        durably = f"(select {_DURABLY}) as durably cross join " if makes_durable else ""
        return (
            f"insert into {self.relation} ({names}) select {values}"
            f" from {durably}unnest({arrays}) as sent({', '.join(self.columns)})"
            f" on conflict ({self.columns['event_id'].name}) do nothing "
        )


def receive_statement(inbox: InboxDescription, *, makes_durable: bool) -> str:
    """One call of the function beside an inbox, after `INBOX_IS_INTACT`'s three parameters.

    Every name is qualified: what runs in the table may have changed the session.
    """
    arrays = ", ".join(
        f"${n}::pg_catalog.{_array_type(type_)}" for n, type_ in enumerate(inbox.types, start=4)
    )
    return (
        f"select case when {INBOX_IS_INTACT} then {inbox.receive_function}({arrays}) end,"
        f" {INBOX_IS_INTACT}{f', {_DURABLY}' if makes_durable else ''}"
    )


async def table_named(database: Database, table: str, schema: str | None) -> InboxTable:
    """The table of that name, with columns named as our fields.

    Raises `DestinationMissing` where there is none, `ConfigurationError` with all that is wrong
    with it, `AuthenticationRefused` with the rights that are missing; `Outage`.
    """
    row = await database.fetch_row(
        _DOING,
        "select format('%I.%I', $1::text, $2::text) as relation",
        schema or database.settings.schema,
        table,
    )
    relation = table if row is None else str(row["relation"])
    return await _examined(database, relation, {field: field for field in FIELDS})


async def _examined(database: Database, relation: str, names: Mapping[str, str]) -> InboxTable:
    rows = await database.fetch(_DOING, _COLUMNS, relation)
    if not rows:
        raise DestinationMissing(
            f"there is no inbox table {relation}", remedy="create it, or correct the sink"
        )
    there = {row["name"]: msgspec.convert(dict(row), Column) for row in rows}
    columns = {field: there[names[field]] for field in FIELDS if names.get(field) in there}
    problems = _problems(columns, names)
    if problems:
        raise ConfigurationError(
            f"{relation} does not fit as an inbox: {'; '.join(problems)}",
            remedy="correct the table; one with other names is adopted with"
            " pgtrickle.enable_inbox_tracking and then named as inbox",
        )
    _require_rights(relation, columns)
    return InboxTable(relation=relation, columns=columns)


def _problems(columns: Mapping[str, Column], names: Mapping[str, str]) -> list[str]:
    problems = [
        f"it has no column {names.get(field, field)}"
        for field in REQUIRED_FIELDS
        if field not in columns
    ]
    event_id = columns.get("event_id")
    if event_id is not None and not event_id.is_unique:
        problems.append(f"{event_id.name} has no unique index of its own that is checked at once")
    problems.extend(
        f"{column.name} is {column.type} and not one of {', '.join(DOCUMENT_TYPES)}"
        for field in DOCUMENT_FIELDS
        if (column := columns.get(field)) is not None and column.type not in DOCUMENT_TYPES
    )
    return problems


def _require_rights(relation: str, columns: Mapping[str, Column]) -> None:
    event_id = columns["event_id"].name
    closed = [column.name for column in columns.values() if not column.is_insertable]
    missing = [f"insert ({', '.join(closed)})"] if closed else []
    if not columns["event_id"].is_selectable:
        missing.append(f"select ({event_id})")
    if missing:
        raise AuthenticationRefused(
            f"the relay's role lacks rights on {relation}",
            remedy=f"grant {', '.join(missing)} on {relation} to the relay's role",
        )


def _array_type(column_type: str) -> str:
    return "bytea[]" if column_type == "bytea" else "text[]"
