"""The migrator: brings a database's relay catalog to this program's version.

Safe to run by any number of processes at once and at any time: one works, the others wait for it
and then find nothing to do. Each SQL file is one transaction and is recorded with its checksum in
it, so that a crash leaves a file applied as a whole or not at all. Migrations run once and never
change; the functions are defined again whenever one of their files is not the one recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeAlias

import asyncpg

from relay.errors import CatalogError, MigrationRefused, NotConnected

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

OLDEST_SERVER_VERSION = 15
LOCK_KEY = 0x7067_745F_6D69_6772  # "pgt_migr": no other advisory lock of ours begins so
LOCK_WAIT_S = 120
STATEMENT_LOCK_WAIT_S = 10


class StepKind(StrEnum):
    """What a file is: run once, or defined again."""

    MIGRATION = "migration"
    FUNCTIONS = "functions"


@dataclass(frozen=True, slots=True)
class MigrationStep:
    """One file that was considered. ``is_applied`` is false when it was there already."""

    filename: str
    kind: StepKind
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


@dataclass(frozen=True, slots=True)
class _SqlFile:
    name: str
    kind: StepKind
    version: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


async def migrate(
    connection: Connection, *, on_step: Callable[[MigrationStep], None]
) -> MigrationReport:
    """Bring the database of ``connection`` to this program's catalog; ``on_step`` sees each file.

    Raises `MigrationRefused` when the server is too old or a standby, when the catalog is newer
    than this program or was changed by hand, when another migration does not end within
    `LOCK_WAIT_S`, or when the role lacks a right; `CatalogError` when a file fails for another
    reason; `NotConnected` when the connection is lost. A file that failed left nothing behind.
    """
    notices: list[str] = []

    def note(_connection: object, message: asyncpg.PostgresLogMessage) -> None:
        notices.append(str(message))

    connection.add_log_listener(note)
    try:
        with _refusals("before anything was changed"):
            await connection.execute(_PRECONDITIONS)
        async with _migration_lock(connection):
            return await _migrate_alone(connection, on_step, notices)
    finally:
        connection.remove_log_listener(note)


async def catalog_version(connection: Connection) -> str | None:
    """The version of the catalog in this database; None when it has none.

    Raises `CatalogError` when the role may not see it.
    """
    with _refusals("reading the version of the catalog"):
        if not await connection.fetchval(
            "select to_regclass('pgtrickle.relay_migrations') is not null"
        ):
            return None
        return _highest(list((await _recorded(connection)).values()))


def migration_script() -> str:
    """What `migrate` would do to any database, as a script for ``psql -f``.

    It makes the same checks, takes the same lock, and records the same versions and checksums.
    """
    prologue = _packaged("prologue.sql")
    opening = f"begin;\nset local lock_timeout = '{STATEMENT_LOCK_WAIT_S}s';\n\n{prologue}"
    parts = [
        "-- The relay catalog, for psql -f. Can be run again at any time.",
        "\\set ON_ERROR_STOP on",
        _PRECONDITIONS,
        f"set lock_timeout = '{LOCK_WAIT_S}s';",
        f"select pg_catalog.pg_advisory_lock({LOCK_KEY});",
        "reset lock_timeout;",
        f"{opening}\ncommit;",
        _check_of_records(),
    ]
    for file in _files():
        body = f"-- {file.name}\n{opening}\n{file.text}\n{_record_statement(file)}\ncommit;"
        if file.kind is StepKind.MIGRATION:
            parts += [
                (
                    f"select not exists (select from pgtrickle.relay_migrations where filename = "
                    f"{_literal(file.name)}) as is_pending \\gset"
                ),
                f"\\if :is_pending\n{body}\n\\endif",
            ]
        else:
            parts.append(body)
    parts.append(f"select pg_catalog.pg_advisory_unlock({LOCK_KEY});")
    return "\n\n".join(parts) + "\n"


async def _migrate_alone(
    connection: Connection, on_step: Callable[[MigrationStep], None], notices: list[str]
) -> MigrationReport:
    before = await catalog_version(connection)
    with _refusals("reading what was applied"):
        checksums = await _recorded_checksums(connection) if before is not None else {}
        if before is not None:
            await connection.execute(_check_of_records())
    steps: list[MigrationStep] = []
    for file in _files():
        # Functions also carry grants on what has come into being since, so they run every time.
        is_pending = file.kind is StepKind.FUNCTIONS or file.name not in checksums
        if is_pending:
            await _apply(connection, file)
        steps.append(MigrationStep(file.name, file.kind, is_pending))
        on_step(steps[-1])
    with _refusals("reading the owner of the catalog"):
        owner = await connection.fetchval(
            "select tableowner::text from pg_catalog.pg_tables"
            " where schemaname = 'pgtrickle' and tablename = 'relay_migrations'"
        )
    return MigrationReport(
        version_before=before,
        version_after=_newest_version(),
        steps=tuple(steps),
        owner=str(owner),
        has_own_role=owner == "pgtrickle_owner",
        notices=tuple(dict.fromkeys(notices)),
    )


async def _apply(connection: Connection, file: _SqlFile) -> None:
    with _refusals(f"applying {file.name}"):
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(f"set local lock_timeout = '{STATEMENT_LOCK_WAIT_S}s'")
            await connection.execute(_packaged("prologue.sql"))
            await connection.execute(file.text)
            await connection.execute(_record_statement(file))


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


async def _recorded(connection: Connection) -> dict[str, str]:
    rows = await connection.fetch("select filename, version from pgtrickle.relay_migrations")
    return {row["filename"]: row["version"] for row in rows}


async def _recorded_checksums(connection: Connection) -> dict[str, str]:
    rows = await connection.fetch("select filename, checksum from pgtrickle.relay_migrations")
    return {row["filename"]: row["checksum"] for row in rows}


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
        f"({_literal(file.name)}, {_literal(file.checksum)})"
        for file in _files()
        if file.kind is StepKind.MIGRATION
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
    from pgtrickle.relay_migrations as m
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
    from pgtrickle.relay_migrations as m
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
    return (
        "insert into pgtrickle.relay_migrations as m (filename, checksum, version)\n"
        f"values ({_literal(file.name)}, {_literal(file.checksum)}, {_literal(file.version)})\n"
        "on conflict (filename) do update\n"
        "set checksum = excluded.checksum, version = excluded.version, applied_at = now();"
    )


def _literal(text: str) -> str:
    """A string literal of one of our own names, which contain no quote."""
    return f"'{text}'"


@cache
def _files() -> tuple[_SqlFile, ...]:
    """All files in the order in which they are applied."""
    migrations = sorted(
        (
            _SqlFile(path.name, StepKind.MIGRATION, _target_version(path.name), _text(path))
            for path in _sql_directory().joinpath("migrations").iterdir()
            if path.name.endswith(".sql")
        ),
        key=lambda file: _version_key(file.version),
    )
    functions = sorted(
        (
            _SqlFile(path.name, StepKind.FUNCTIONS, migrations[-1].version, _text(path))
            for path in _sql_directory().joinpath("functions").iterdir()
            if path.name.endswith(".sql")
        ),
        key=lambda file: file.name,
    )
    return (*migrations, *functions)


def _newest_version() -> str:
    return _files()[-1].version


def _target_version(filename: str) -> str:
    found = re.fullmatch(r"pg_trickle--(?:[\d.]+--)?(\d+\.\d+\.\d+)\.sql", filename)
    if found is None:
        raise CatalogError(f"{filename} is not named like a migration")
    return found[1]


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _highest(versions: list[str]) -> str | None:
    return max(versions, key=_version_key, default=None)


@cache
def _packaged(name: str) -> str:
    return _text(_sql_directory().joinpath(name))


def _text(path: Traversable) -> str:
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


def _sql_directory() -> Traversable:
    """Inside the package when it was installed from a wheel, beside it in a checkout."""
    packaged = resources.files("relay").joinpath("sql")
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "sql"
