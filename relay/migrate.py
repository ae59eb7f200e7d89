"""The migrator: brings a database's relay catalog to this program's version.

Safe to run by any number of processes at once and at any time: one works, the others wait for it
and then find nothing to do. Each SQL file is one transaction, so that a crash leaves a file applied
as a whole or not at all. Migrations run once and never change; the functions are defined again
whenever they are not what was recorded, or somebody changed them in the database.

The migrating role may be a superuser, while the catalog belongs to a role that is none. Whatever
that owner could have changed runs inside one definer function of the owner's (see
``sql/prologue.sql``), from which nobody gets back to the rights of the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeAlias

import asyncpg
import msgspec

from relay.errors import CatalogError, MigrationRefused, NotConnected
from relay.settings import DEFAULT_SCHEMA, schema_identifier

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

OLDEST_SERVER_VERSION = 15
LOCK_KEY = 0x7067_745F_6D69_6772  # "pgt_migr": no other advisory lock of ours begins so
LOCK_WAIT_S = 120
STATEMENT_LOCK_WAIT_S = 10

_FUNCTIONS = "functions"


@dataclass(frozen=True, slots=True)
class MigrationStep:
    """One file that was considered. ``is_applied`` is false when it was there already."""

    filename: str
    is_applied: bool


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What a migration did.

    ``owner`` owns the schema's objects and is who its definer functions run as. Where it is not
    ``pgtrickle_owner`` (``has_own_role`` false) that role was missing and could not be created:
    the functions then have all the rights of the role that migrated. ``notices`` is what the
    server had to say besides.
    """

    version_before: str | None
    version_after: str
    steps: tuple[MigrationStep, ...]
    owner: str
    has_own_role: bool
    notices: tuple[str, ...]

    @property
    def is_up_to_date(self) -> bool:
        """True when nothing was to do."""
        return not any(step.is_applied for step in self.steps)


@dataclass(frozen=True, slots=True)
class _SqlFile:
    """One file with its placeholders in it; its checksum is the same in every schema."""

    name: str
    version: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class _State(msgspec.Struct, frozen=True):
    """What is recorded in the database, and a digest of its functions and of our files now."""

    owner: str
    files: Mapping[str, tuple[str, str]]
    functions: str


def file_count() -> int:
    """How many steps a migration has."""
    return len(_migrations()) + len(_functions())


async def migrate(
    connection: Connection,
    *,
    on_step: Callable[[MigrationStep], None],
    schema: str = DEFAULT_SCHEMA,
) -> MigrationReport:
    """Bring the database of ``connection`` to this program's catalog; ``on_step`` sees each file.

    Raises `MigrationRefused` when the server is too old or a standby, when the schema belongs to an
    extension or to others, when the catalog is newer than this program or was changed by hand, when
    another migration does not end within `LOCK_WAIT_S`, or when the role lacks a right;
    `CatalogError` when a file fails for another reason; `NotConnected` when the connection is lost.
    A file that failed left nothing behind.
    """
    notices: list[str] = []

    def note(_connection: object, message: asyncpg.PostgresLogMessage) -> None:
        notices.append(str(message))

    connection.add_log_listener(note)
    try:
        with _refusals("before anything was changed"):
            await connection.execute(_PRECONDITIONS)
        async with _migration_lock(connection):
            return await _Migrator(connection, schema).run(on_step, notices)
    finally:
        connection.remove_log_listener(note)


class _Migrator:
    """One migration of one schema, with the lock held."""

    def __init__(self, connection: Connection, schema: str) -> None:
        self._connection = connection
        self._schema = schema

    async def run(
        self, on_step: Callable[[MigrationStep], None], notices: list[str]
    ) -> MigrationReport:
        state = await self._apply(_RECORDS + _check_of_records(), "reading what was applied")
        versions = [version for _, version in state.files.values()]
        steps: list[MigrationStep] = []
        functions = _functions()
        are_current = state.files.get(_FUNCTIONS, ("", ""))[0] == state.functions
        for file in _migrations():
            is_pending = file.name not in state.files
            if is_pending:
                are_current = False
                await self._apply(file.text + _record_statement(file), f"applying {file.name}")
            steps.append(MigrationStep(file.name, is_pending))
            on_step(steps[-1])
        if not are_current:
            # All in one transaction: nobody may call a new one before its rights are settled.
            await self._apply(
                "".join(file.text for file in functions) + _record_functions(),
                "defining the functions",
            )
        for file in functions:
            steps.append(MigrationStep(file.name, not are_current))
            on_step(steps[-1])
        return MigrationReport(
            version_before=max(versions, key=_version_key, default=None),
            version_after=_newest_version(),
            steps=tuple(steps),
            owner=state.owner,
            has_own_role=state.owner == "pgtrickle_owner",
            notices=tuple(dict.fromkeys(notices)),
        )

    async def _apply(self, statements: str, doing: str) -> _State:
        """Run statements as the owner, in one transaction; gives the state behind it."""
        with _refusals(doing):
            async with self._connection.transaction(isolation="read_committed"):
                for statement in (
                    f"set local lock_timeout = '{STATEMENT_LOCK_WAIT_S}s'",
                    self._filled(_packaged("prologue.sql")),
                ):
                    await self._connection.execute(statement)
                answer = await self._connection.fetchval(
                    self._filled("select @schema@.relay_apply($1::text, $2::text)::text"),
                    self._filled(statements),
                    self._filled(_state()),
                )
                await self._connection.execute(
                    self._filled("drop function @schema@.relay_apply(text, text)")
                )
        return msgspec.json.decode(answer, type=_State)

    def _filled(self, text: str) -> str:
        return filled(text, self._schema)


def filled(text: str, schema: str) -> str:
    """SQL text with the schema in it: ``@schema@`` as identifier, ``@schema_name@`` as literal."""
    literal = "'" + schema.replace("'", "''") + "'"
    return text.replace("@schema_name@", literal).replace("@schema@", schema_identifier(schema))


async def contents(connection: Connection, schema: str = DEFAULT_SCHEMA) -> Sequence[str]:
    """What `uninstall` would remove, in words; empty where there is no catalog."""
    with _refusals("looking at the catalog"):
        row = await connection.fetchrow(_CONTENTS, schema)
    if row is None or not row["is_ours"]:
        return ()
    return (f"{row['outboxes']} outboxes", f"{row['tables'] - row['outboxes']} other tables")


async def uninstall(connection: Connection, *, schema: str = DEFAULT_SCHEMA) -> Sequence[str]:
    """Remove the schema with everything in it, and our functions beside the tables of others.

    Dropping the schema takes the capture triggers with it, so the application's writes go on.
    Returns the functions that this role may not drop. Raises `MigrationRefused`, `NotConnected`.
    """
    left: list[str] = []
    async with _migration_lock(connection):
        with _refusals("removing the catalog"):
            async with connection.transaction():
                await connection.execute(f"set local lock_timeout = '{STATEMENT_LOCK_WAIT_S}s'")
                await connection.execute("set local search_path = pg_catalog, pg_temp")
                functions = await connection.fetch(_BESIDE, schema_identifier(schema))
                await connection.execute(filled("drop schema @schema@ cascade", schema))
                for function in functions:
                    try:
                        async with connection.transaction():
                            await connection.execute(f"drop function {function['signature']}")
                    except asyncpg.InsufficientPrivilegeError:
                        left.append(function["signature"])
    return left


_CONTENTS = """
select
    bool_or(c.relname = 'relay_migrations') as is_ours,
    count(*) filter (where c.relname like 'outbox\\_%' and exists (
        select from pg_catalog.pg_attribute as a where a.attrelid = c.oid and a.attname = 'pgt_id'
    )) as outboxes,
    count(*) as tables
from pg_catalog.pg_class as c
join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
where n.nspname = $1 and c.relkind = 'r'
"""

# Ours stand beside the tables of others; their text begins by saying so, and names the schema.
_BESIDE = """
select p.oid::regprocedure::text as signature
from pg_catalog.pg_proc as p
where p.proname like 'pgtrickle\\_%'
    and p.prosrc like E'\\n-- pgtrickle-relay %'
    and position($1 || '.' in p.prosrc) > 0
order by 1
"""


def migration_script(schema: str = DEFAULT_SCHEMA) -> str:
    """What `migrate` would do to any database, as a script for ``psql -f``.

    It makes the same checks, takes the same lock, and records the same versions and checksums.
    """
    opening = (
        "begin isolation level read committed;\n"
        f"set local lock_timeout = '{STATEMENT_LOCK_WAIT_S}s';\n{_packaged('prologue.sql')}"
    )
    closing = "drop function @schema@.relay_apply(text, text);\ncommit;"
    parts = [
        "-- The relay catalog, for psql -f. Can be run again at any time.",
        "\\set ON_ERROR_STOP on",
        _PRECONDITIONS,
        f"set lock_timeout = '{LOCK_WAIT_S}s';",
        f"select pg_catalog.pg_advisory_lock({LOCK_KEY});",
        "reset lock_timeout;",
        _applied(opening, _RECORDS + _check_of_records(), closing),
    ]
    for file in _migrations():
        body = _applied(opening, file.text + _record_statement(file), closing)
        parts += [
            f"{opening}\nselect @schema@.relay_apply(''::text, $ask$select to_jsonb(not exists"
            " (select from @schema@.relay_migrations as m where m.filename ="
            f" {_literal(file.name)}))$ask$::text) as is_pending \\gset\n{closing}",
            f"\\if :is_pending\n-- {file.name}\n{body}\n\\endif",
        ]
    functions = "".join(file.text for file in _functions())
    parts.append(_applied(opening, functions + _record_functions(), closing))
    parts.append(f"select pg_catalog.pg_advisory_unlock({LOCK_KEY});")
    return filled("\n\n".join(parts) + "\n", schema)


def _applied(opening: str, statements: str, closing: str) -> str:
    return (
        f"{opening}\nselect @schema@.relay_apply($relay_file${statements}$relay_file$::text,"
        f" 'select null::jsonb'::text);\n{closing}"
    )


_RECORDS = """
create table if not exists @schema@.relay_migrations (
    filename text primary key,
    checksum text not null,
    version text not null,
    applied_at timestamptz not null default now()
);
comment on table @schema@.relay_migrations is
    'SQL files that were applied, and what the functions then looked like.';
"""


@cache
def _fingerprint() -> str:
    """SQL for what the functions look like: the same as recorded, and nothing is to do."""
    checksums = " ".join(file.checksum for file in _functions())
    return f"""
(
    select md5(concat_ws(' ', '{checksums}', string_agg(x.said, ' ' order by x.said)))
    from (
        select concat_ws(
            ' ', p.oid::regprocedure, p.prosrc, p.prosecdef, p.proconfig, p.proacl) as said
        from pg_proc as p
        join pg_namespace as n on n.oid = p.pronamespace
        where n.nspname = @schema_name@ and p.proname <> 'relay_apply'
            -- Those of single inboxes come and go.
            and p.proname !~ '^(receive|count|sweep)_'
        union all
        select concat_ws(' ', n.nspacl,
            (select string_agg(r.rolname, ' ' order by r.rolname) from pg_roles as r
            where r.rolname in ('pgtrickle_relay', 'pgtrickle_publisher')))
        from pg_namespace as n
        where n.nspname = @schema_name@
    ) as x
)"""


def _record_functions() -> str:
    return _record(_FUNCTIONS, _fingerprint(), _newest_version())


@cache
def _state() -> str:
    return f"""
select jsonb_build_object(
    'owner', current_user,
    'files', coalesce(
        (select jsonb_object_agg(m.filename, jsonb_build_array(m.checksum, m.version))
        from @schema@.relay_migrations as m), '{{}}'),
    'functions', {_fingerprint()}
)
"""


@contextlib.asynccontextmanager
async def _migration_lock(connection: Connection) -> AsyncIterator[None]:
    with _refusals("waiting for another migration"):
        previous = await connection.fetchval("select current_setting('lock_timeout')")
        await connection.execute(f"set lock_timeout = '{LOCK_WAIT_S}s'")
        try:
            await connection.execute(f"select pg_catalog.pg_advisory_lock({LOCK_KEY})")
        finally:
            if not connection.is_closed():
                await connection.execute(
                    "select pg_catalog.set_config('lock_timeout', $1, false)", previous
                )
    try:
        yield
    finally:
        # A cancelled caller must not leave the lock with a connection that goes back to a pool.
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            await asyncio.shield(
                connection.execute(f"select pg_catalog.pg_advisory_unlock({LOCK_KEY})")
            )


@contextlib.contextmanager
def _refusals(doing: str) -> Iterator[None]:
    """Say what the server said, and where; the remedy is the server's hint."""
    try:
        yield
    except asyncpg.PostgresError as error:
        state = getattr(error, "sqlstate", None) or ""
        said = getattr(error, "message", None) or str(error)
        hint = getattr(error, "hint", None) or ""
        if state.startswith(("08", "57P")):
            raise NotConnected(f"the server went away while {doing}: {said}") from error
        if state in _REFUSED_STATES:
            raise MigrationRefused(f"{said} [{state}, {doing}]", remedy=hint) from error
        raise CatalogError(f"migration failed while {doing}: {said} [{state}]", remedy=hint) from (
            error
        )
    except (OSError, asyncpg.InterfaceError) as error:
        raise NotConnected(f"the server went away while {doing}: {error}") from error


_REFUSED_STATES = frozenset(
    {
        "0A000",  # the server is too old
        "25006",  # it is read only
        "42501",  # a right is missing
        "55000",  # the catalog is newer, or was changed by hand
        "55P03",  # a lock was not to be had in time
    }
)


_PRECONDITIONS = f"""
do $preconditions$
begin
    if pg_catalog.current_setting('server_version_num')::integer < {OLDEST_SERVER_VERSION}0000 then
        raise exception using
            errcode = 'feature_not_supported',
            message = pg_catalog.format(
                'this server is PostgreSQL %s, too old for the relay',
                pg_catalog.current_setting('server_version')
            ),
            hint = 'use PostgreSQL {OLDEST_SERVER_VERSION} or newer';
    end if;
    if pg_catalog.pg_is_in_recovery() then
        raise exception using
            errcode = 'read_only_sql_transaction',
            message = 'this server is a standby',
            hint = 'migrate the primary';
    end if;
end
$preconditions$;
""".strip()


@cache
def _check_of_records() -> str:
    """SQL that refuses a newer catalog, and a migration that is not the one recorded."""
    known = ",\n            ".join(
        f"({_literal(file.name)}, {_literal(file.checksum)})" for file in _migrations()
    )
    newest = ", ".join(map(str, _version_key(_newest_version())))
    return f"""
do $records$
declare
    found_version text;
    changed_file text;
begin
    select m.version
    into found_version
    from @schema@.relay_migrations as m
    where pg_catalog.string_to_array(m.version, '.')::integer[] > array[{newest}]
    order by pg_catalog.string_to_array(m.version, '.')::integer[] desc
    limit 1;
    if found then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = pg_catalog.format(
                'the catalog is of version %s, newer than {_newest_version()}', found_version
            ),
            hint = 'upgrade pgtrickle-relay';
    end if;

    select m.filename
    into changed_file
    from @schema@.relay_migrations as m
    join (
        values
            {known}
    ) as k (filename, checksum) on k.filename = m.filename
    where k.checksum <> m.checksum
    limit 1;
    if found then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = pg_catalog.format('%s is not the file that was applied here', changed_file),
            hint = 'install the release that migrated this database, or a later one, unchanged';
    end if;
end
$records$;
""".strip()


def _record_statement(file: _SqlFile) -> str:
    return _record(file.name, _literal(file.checksum), file.version)


def _record(name: str, checksum: str, version: str) -> str:
    return (
        "\ninsert into @schema@.relay_migrations as m (filename, checksum, version)\n"
        f"values ({_literal(name)}, {checksum}, {_literal(version)})\n"
        "on conflict (filename) do update\n"
        "set checksum = excluded.checksum, version = excluded.version, applied_at = now();"
    )


def _literal(text: str) -> str:
    """A string literal of one of our own names, which contain no quote."""
    return f"'{text}'"


@cache
def _migrations() -> tuple[_SqlFile, ...]:
    """The files that are applied once, in their order."""
    files = [_SqlFile(name, _target_version(name), text) for name, text in _sql("migrations")]
    return tuple(sorted(files, key=lambda file: _version_key(file.version)))


@cache
def _functions() -> tuple[_SqlFile, ...]:
    """The files that are applied whenever something changed, in their order."""
    return tuple(
        _SqlFile(name, _newest_version(), text) for name, text in sorted(_sql("functions"))
    )


def _sql(folder: str) -> Iterator[tuple[str, str]]:
    for path in _sql_directory().joinpath(folder).iterdir():
        if path.name.endswith(".sql"):
            yield path.name, _text(path)


def _newest_version() -> str:
    return _migrations()[-1].version


def _target_version(filename: str) -> str:
    found = re.fullmatch(r"pg_trickle--(?:[\d.]+--)?(\d+\.\d+\.\d+)\.sql", filename)
    if found is None:
        raise CatalogError(f"{filename} is not named like a migration")
    return found[1]


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@cache
def _packaged(name: str) -> str:
    return _text(_sql_directory().joinpath(name))


def _text(path: Traversable) -> str:
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


def _sql_directory() -> Traversable:
    """Inside the package when it was installed from a wheel, beside it in a checkout."""
    packaged = resources.files("relay").joinpath("sql")
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "sql"
