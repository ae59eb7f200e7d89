"""The sink: one insert per batch, and a search for the rows that PostgreSQL refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import msgspec

from relay.backends.inbox.options import InboxSinkOptions, inbox_sink_options
from relay.backends.inbox.row import Read, Rows, Value, as_column, compile_fields, read_rows
from relay.backends.inbox.table import receive_statement, table_named
from relay.catalog import Catalog, InboxDescription
from relay.context import BackendContext
from relay.contracts import ALL_ACCEPTED, Failure, PublishResult
from relay.errors import (
    CatalogMissing,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageRejected,
    NotConnected,
    Outage,
    RelayError,
)
from relay.message import RelayMessage
from relay.postgres import (
    Database,
    PooledConnection,
    discreet,
    postgres_errors,
    rejection_of_row,
)
from relay.template import Render, compile_routing

DEFAULT_SUBJECT_TEMPLATE = "{stream_table}.{op}"

_DOING = "writing to the inbox"
# What an interrupted search repeats at most; nor shall its transaction stay open for long.
_SEARCHED_ROWS = 2000
_POOL_SIZE = 2
_HEALTH_TIMEOUT_S = 3.0


class InboxSink:
    """Writes messages into one inbox table; the promises stand in the package's docstring."""

    def __init__(
        self,
        options: InboxSinkOptions,
        context: BackendContext,
        *,
        render_subject: Render,
        reads: Mapping[str, Read],
        mapped: Sequence[str],
    ) -> None:
        self._options = options
        self._context = context
        self._render_subject = render_subject
        self._reads = reads
        self._mapped = mapped
        self._remote: Database | None = None
        self._insert: _Insert | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from the ``sink`` object of the catalog. Raises `ConfigurationError`."""
        parsed = inbox_sink_options(options)
        columns = {**_pipeline_columns(context), **parsed.columns}
        return cls(
            parsed,
            context,
            render_subject=_subject_renderer(parsed, context),
            reads=compile_fields(columns, source=parsed.source, pipeline=context.pipeline),
            mapped=tuple(columns),
        )

    async def connect(self) -> None:
        """Open the other database, if any, and examine the table.

        Raises `DestinationMissing` for a table that is not there, `AuthenticationRefused` where
        rights on it are missing, `ConfigurationError` where it does not fit; `Outage`.
        """
        await self.aclose()
        try:
            self._insert = await self._prepared(await self._opened())
        except BaseException:
            await self.aclose()
            raise

    def subject_of(self, message: RelayMessage) -> str:
        """The event type: forward from the template, reverse the message's subject as it is."""
        return self._render_subject(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Write all in one transaction; where rows are refused, all but those.

        Raises `Outage` where nothing is known of any message, `DestinationMissing` for a table
        that is gone, `ConfigurationError` for whatever else is wrong with all of them.
        """
        insert = self._insert
        if insert is None:
            raise NotConnected("the inbox is not connected")
        rows, failures = read_rows(messages, insert.reads)
        written = _Written(failures=failures)
        if rows:
            try:
                await insert.write(rows, written)
            except CatalogMissing as error:
                raise DestinationMissing(
                    f"inbox {self._options.inbox or self._options.inbox_table} is gone,"
                    " or what writes it",
                    remedy="create it again",
                ) from error
            except RelayError as error:
                raise discreet(error) from error
        if written.rows == len(messages):
            return ALL_ACCEPTED
        return PublishResult(
            failures=[
                Failure(failure.index, discreet(failure.error))
                for failure in sorted(failures, key=lambda failure: failure.index)
            ],
            duplicates=len(messages) - len(failures) - written.rows,
        )

    async def is_healthy(self) -> bool:
        """True when the database answers."""
        if self._insert is None:
            return False
        with contextlib.suppress(RelayError):
            async with self._insert.database.connection("checking health") as connection:
                await connection.execute("select 1", timeout=_HEALTH_TIMEOUT_S)
            return True
        return False

    async def aclose(self) -> None:
        """Close the other database; the relay's own stays open."""
        self._insert = None
        remote, self._remote = self._remote, None
        if remote is not None:
            await remote.aclose()

    async def _opened(self) -> Database:
        options, own = self._options, self._context.database
        if options.url is None:
            return own
        self._remote = Database(
            msgspec.structs.replace(
                own.settings,
                url=options.url,
                sslmode=options.sslmode,
                sslrootcert=options.sslrootcert,
                sslcert=options.sslcert,
                sslkey=options.sslkey,
                pool_size=_POOL_SIZE,
            )
        )
        await self._remote.open()
        return self._remote

    async def _prepared(self, database: Database) -> _Insert:
        options = self._options
        makes_durable = not await _is_commit_durable(database)
        if options.inbox_table:
            table = await table_named(database, options.inbox_table, options.schema)
            types = {field: column.type for field, column in table.columns.items()}
            statement = table.statement(makes_durable=makes_durable)
            relation, inbox = table.relation, None
        else:
            inbox = await self._inbox(database)
            types = dict(zip(inbox.fields, inbox.types, strict=True))
            statement = receive_statement(inbox, makes_durable=makes_durable)
            relation = f"inbox {inbox.inbox_name}"
        _require_mapped(relation, types, self._mapped)
        return _Insert(
            database=database,
            statement=statement,
            inbox=inbox,
            reads=tuple(as_column(name, self._reads[name], type_) for name, type_ in types.items()),
        )

    async def _inbox(self, database: Database) -> InboxDescription:
        options, catalog = self._options, self._context.catalog
        inbox = options.inbox or ""
        if options.url is None:
            return await catalog.inbox(inbox, options.schema)
        try:
            return await Catalog(database, catalog.group_id).inbox(inbox, options.schema)
        except CatalogMissing:
            raise CatalogMissing(
                "the database of sink.url has no relay catalog, or an older one",
                remedy="run `pgtrickle-relay migrate` there, or name its table with inbox_table",
            ) from None


@dataclass(frozen=True)
class _Insert:
    """The insert of one table: how its values are read, and where it runs.

    ``inbox``: of the catalog, written through the function beside its table.
    """

    database: Database
    statement: str
    inbox: InboxDescription | None
    reads: tuple[Read, ...]

    async def write(self, rows: Rows, written: _Written) -> None:
        """Write all at once; where that may be refused for some row's sake, find it."""
        try:
            async with (
                self.database.connection(_DOING) as connection,
                self.database.leaving_nothing(connection, is_needed=self._is_foreign),
            ):
                written.rows += await self._run(connection, rows)
            return
        except RelayError as error:
            if rejection_of_row(error) is None:
                raise
            refusal = error
        if len(rows) == 1 and isinstance(refusal, MessageRejected):
            written.failures.append(Failure(rows.indexes[0], refusal))
        elif len(rows) <= _SEARCHED_ROWS:
            await self._search(rows, written, refusal)
        else:
            for start in range(0, len(rows), _SEARCHED_ROWS):
                await self._search(rows.part(start, start + _SEARCHED_ROWS), written, None)

    async def _search(self, rows: Rows, written: _Written, known_error: RelayError | None) -> None:
        """Write, in one transaction, all rows but those that are refused.

        Raises a configuration error that no row is needed for, or that meets every row of several.
        """
        found = _Written()
        try:
            async with (
                self.database.connection(_DOING) as connection,
                self.database.leaving_nothing(connection, is_needed=self._is_foreign),
                connection.transaction(),
            ):
                # A deferred constraint that waited for the commit would refuse all rows.
                await connection.execute("set constraints all immediate")
                no_rows = rows.part(0, 0)
                if (error := await self._try(connection, no_rows, found)) is not None:
                    raise error
                await self._bisect(connection, rows, found, known_error)
                if 1 < len(found.failures) == len(rows):
                    _raise_common_cause(found.failures)
        except MessageRejected as error:
            raise Outage(
                f"the inbox refuses all rows, for the sake of none: {discreet(error)}"
            ) from error
        written.rows += found.rows
        written.failures += [
            Failure(failure.index, rejection_of_row(failure.error) or failure.error)
            for failure in found.failures
        ]

    async def _bisect(
        self,
        connection: PooledConnection,
        rows: Rows,
        written: _Written,
        known_error: RelayError | None,
    ) -> None:
        """Write the rows, halving where they are refused; in order, each half behind the other.

        ``known_error`` says that they will be: they were, together with others that were not.
        """
        error = known_error
        if error is None or len(rows) == 1:
            error = await self._try(connection, rows, written)
        if error is None:
            return
        if len(rows) == 1:
            written.failures.append(Failure(rows.indexes[0], error))
            return
        half = len(rows) // 2
        failures_before = len(written.failures)
        await self._bisect(connection, rows.part(0, half), written, None)
        is_in_front = len(written.failures) > failures_before
        rest = rows.part(half, len(rows))
        await self._bisect(connection, rest, written, None if is_in_front else error)

    async def _try(
        self, connection: PooledConnection, rows: Rows, written: _Written
    ) -> RelayError | None:
        """Write the rows under a savepoint; gives the error where some row may be refused."""
        try:
            with postgres_errors(_DOING):
                if self._is_foreign:
                    await self.database.leave_nothing(connection)
                async with connection.transaction():
                    written.rows += await self._run(connection, rows)
        except RelayError as error:
            if rejection_of_row(error) is None:
                raise
            return error
        return None

    async def _run(self, connection: PooledConnection, rows: Rows) -> int:
        """How many rows were new."""
        values = map(_sent, rows.columns)
        if self.inbox is None:
            status = await connection.execute(self.statement, *values)
            return int(status.rpartition(" ")[2])
        seen = (self.inbox.table_id, self.inbox.function_id, self.inbox.version)
        return int(await connection.fetchval(self.statement, *seen, *values))

    @property
    def _is_foreign(self) -> bool:
        """Whether triggers and the like of others run in our session."""
        return self.inbox is not None and self.inbox.is_foreign


def _sent(column: Sequence[Value]) -> Sequence[Value]:
    """An array of nulls alone as an empty one, which costs nothing: unnest fills it up with nulls.

    https://www.postgresql.org/docs/current/functions-array.html; the longest array, that of the
    event ids, says how many rows there are.
    """
    is_empty = not column or (column[0] is None and column.count(None) == len(column))
    return () if is_empty else column


def _raise_common_cause(failures: Sequence[Failure]) -> None:
    """Every row failed: unless each has trouble of its own, the configuration is what is wrong."""
    errors = [failure.error for failure in failures]
    if all(error.kind is ErrorKind.CONFIGURATION for error in errors):
        raise errors[0]


@dataclass
class _Written:
    """What has become of a publish so far."""

    failures: list[Failure] = field(default_factory=list)
    rows: int = 0


def _pipeline_columns(context: BackendContext) -> Mapping[str, str]:
    columns = context.pipeline_options.get("columns") or {}
    try:
        return msgspec.convert(columns, dict[str, str])
    except msgspec.ValidationError:
        raise ConfigurationError(
            "columns must be an object of inbox field to where its value comes from"
        ) from None


def _subject_renderer(options: InboxSinkOptions, context: BackendContext) -> Render:
    if context.direction == "forward":
        return compile_routing(
            options.subject_template or DEFAULT_SUBJECT_TEMPLATE, options.routing
        )
    if options.subject_template or options.routing:
        raise ConfigurationError(
            "sink.subject_template and sink.routing are for forward pipelines",
            remedy="say event_type_from on the pipeline",
        )
    return lambda message: message.subject


def _require_mapped(relation: str, columns: Container[str], mapped: Sequence[str]) -> None:
    absent = [name for name in mapped if name not in columns]
    if absent:
        raise ConfigurationError(
            f"columns maps {', '.join(absent)}, but {relation} has no such column",
            remedy="take it out of columns, or add the column",
        )


async def _is_commit_durable(database: Database) -> bool:
    row = await database.fetch_row(
        _DOING, "select current_setting('synchronous_commit') <> 'off' as is_durable"
    )
    return row is not None and bool(row["is_durable"])
