"""`pgtrickle-relay doctor`: everything that can be wrong, looked at once, each with its remedy.

It moves no position and takes nothing from a relay at work: a pipeline that runs is judged by what
its relay reports, one that is paused by its configuration. Of those that should run and do not,
both sides are really connected, as a relay would. An outbox is looked up, and never claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from relay import __version__
from relay.assembly import Access, Assembly, Sides
from relay.catalog import Catalog, PipelineRow, Reader, readers_of
from relay.contracts import Sink, Source
from relay.endpoint import parse_address
from relay.errors import ConfigurationError, DestinationMissing, Outage, RelayError
from relay.overview import PAUSED, WAITING, Overview, PipelineOverview, overview
from relay.partition import KEYLESS, KEYLESS_REMEDY
from relay.postgres import Database
from relay.profiles import check_profiles, row_to_try
from relay.registry import missing_extras
from relay.secrets import DEFAULT_FILE_ROOTS, mask_urls, references
from relay.settings import Settings, schema_identifier
from relay.start import opened, other_groups

_CONNECT_S = 10.0
_CLOSE_S = 5.0
_CLOCK_S = 5.0


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line: what was looked at and what was found; ``remedy`` is empty where all is well."""

    check: str
    is_ok: bool
    found: str
    remedy: str = ""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All checks, in the order in which a person would mend them."""

    version: str
    is_well: bool
    checks: Sequence[Check]


async def diagnose(
    settings: Settings, environment: Mapping[str, str], origins: Mapping[str, str]
) -> Diagnosis:
    """Look at everything; ``origins`` says of each setting that is not a default whence it came.

    Never raises `RelayError`: what can't be reached is a check that failed.
    """
    checks = [_settings(settings, origins)]
    access = Access(settings, environment)

    def mask(text: str) -> str:
        return mask_urls(access.mask(text))

    with _noting(checks, "profiles"):
        check_profiles(settings.backends)
        checks += [_ok("profiles", ", ".join(sorted(settings.backends)) or "none")]
    checks += [_extras(), *_file_roots(settings)]
    with _noting(checks, "database"):
        database = access.database()
        catalog = Catalog(database, settings.relay.group_id)
        async with opened(database, catalog):
            assembly = access.assembly(database, catalog, worker_id=f"doctor-{os.getpid()}")
            await _Look(settings, database, catalog, assembly, checks).everywhere()
    masked = [
        msgspec.structs.replace(one, found=mask(one.found), remedy=mask(one.remedy))
        for one in checks
    ]
    return Diagnosis(version=__version__, is_well=all(one.is_ok for one in masked), checks=masked)


class _Look:
    """The checks that need the database, with it open."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        catalog: Catalog,
        assembly: Assembly,
        checks: list[Check],
    ) -> None:
        self._settings = settings
        self._database = database
        self._catalog = catalog
        self._assembly = assembly
        self._checks = checks

    async def everywhere(self) -> None:
        for check, look in (
            ("database", self._server),
            ("schema", self._schema),
            ("groups", self._groups),
            ("capture", self._capture),
            ("backfills", self._backfills),
            ("pipelines", self._pipelines),
        ):
            with _noting(self._checks, check):
                await look()

    async def _server(self) -> None:
        asked_at = time.time()
        row = await self._database.fetch_row("looking at the server", _SERVER)
        if row is None:
            return
        answered_at = time.time()
        where = await self._database.whereabouts()
        encrypted = "encrypted" if row["ssl"] else "not encrypted"
        self._checks.append(
            _bad(
                "database",
                f"{where} is a standby",
                "connect to the primary, for example with target_session_attrs=primary",
            )
            if row["standby"]
            else _ok("database", f"{where}, PostgreSQL {row['version']}, primary, {encrypted}")
        )
        # With one in transaction mode the database could not have been opened.
        self._checks.append(_ok("pooler", "none, or one that keeps sessions"))
        off_s = max(asked_at - row["now"], row["now"] - answered_at, 0.0)
        self._checks.append(
            _ok("clock", "as the server's")
            if off_s < _CLOCK_S
            else _bad("clock", f"{off_s:.0f} s off the server's", "synchronise both clocks (NTP)")
        )

    async def _schema(self) -> None:
        schema = self._settings.postgres.schema
        row = await self._database.fetch_row("looking at the schema", _SCHEMA, schema)
        version = await self._catalog.version()
        if row is None:
            return
        self._checks.append(
            _bad(
                "schema",
                f"{row['others']} may create in schema {schema}",
                f"revoke create on schema {row['quoted']} from {row['others']}",
            )
            if row["others"]
            else _ok("schema", f"{schema}, version {version}, owned by {row['owner']}")
        )

    async def _groups(self) -> None:
        own, readers = self._catalog.group_id, await self._catalog.readers()
        fleet = await self._catalog.fleet(of_all_groups=True)
        alive = {one.relay_group_id for one in fleet if one.is_alive}
        groups = {one.relay_group_id for one in readers if one.relay_group_id is not None}
        if others := other_groups(readers, own):
            self._checks.append(
                _bad(
                    "group",
                    f"{own} is new here and would deliver everything again; others have positions:"
                    f" {', '.join(others)}",
                    "correct relay.group_id, unless that is meant",
                )
            )
        else:
            self._checks.append(_ok("group", own))
        self._checks.extend(
            self._forgotten(group, [one for one in readers if one.relay_group_id == group])
            for group in sorted(groups - alive - {own})
        )

    def _forgotten(self, group: str, readers: Sequence[Reader]) -> Check:
        outboxes = sorted({reader.outbox_table for reader in readers if reader.outbox_table})
        since = max((one.updated_at for one in readers if one.updated_at is not None), default=None)
        when = "" if since is None else f" since {since:%Y-%m-%d %H:%M}"
        return _bad(
            f"relay group {group}",
            f"none of its relays lives, and it holds back {', '.join(outboxes)}{when}",
            f"start its relays, or {self._call('relay_forget_group', group)}",
        )

    async def _capture(self) -> None:
        problems = await self._catalog.capture_problems()
        self._checks.extend(
            _bad("capture", f"{one.outbox_table}: {one.problem}", one.remedy or "")
            for one in problems
        )
        if not problems:
            self._checks.append(_ok("capture", "nothing is amiss"))

    async def _backfills(self) -> None:
        for one in await self._catalog.backfills():
            _, _, found = one.progress.partition(": ")
            if one.state == "stuck":
                remedy = (
                    "its next row is locked: end the session that"
                    f" select pg_blocking_pids({one.call_pid}) names"
                )
            elif one.state == "interrupted":
                remedy = "call backfill with the same arguments, which goes on where it stopped"
            else:
                remedy = ""
            check = f"backfill of {one.stream_table} to {one.pipeline or 'all'}"
            self._checks.append(Check(check=check, is_ok=not remedy, found=found, remedy=remedy))

    async def _pipelines(self) -> None:
        rows = {row.name: row for row in readers_of(await self._catalog.pipelines())}
        seen = await overview(self._catalog, list(rows.values()))
        self._checks.append(self._http(seen))
        tried = {
            options.get("profile")
            for row in rows.values()
            if row.enabled
            for options in (row.config.get("source"), row.config.get("sink"))
            if isinstance(options, Mapping)
        }
        of_profiles, found = await asyncio.gather(
            _all(self._profile(name) for name in self._settings.backends if name not in tried),
            _all(self._pipeline(rows[one.name], one) for one in seen.pipelines),
        )
        self._checks.extend(of_profiles)
        for one, check in zip(seen.pipelines, found, strict=True):
            self._checks.append(check)
            if not one.enabled and one.lag_rows:
                self._checks.append(self._held(one, rows[one.name].pipeline))
            if one.outbox and rows[one.name].partition.number == 1 < rows[one.name].partition.of:
                self._checks.extend(await self._keys(rows[one.name], one.outbox))
            if one.dead_letters:
                pipeline = rows[one.name].pipeline
                error = await self._catalog.oldest_dead_letter_error(pipeline)
                self._checks.append(
                    _bad(
                        f"dead letters of {one.name}",
                        f"{one.dead_letters}, the oldest: {error}",
                        f"mend the cause, then {self._call('relay_dlq_retry_all', pipeline)}",
                    )
                )

    async def _keys(self, row: PipelineRow, outbox: str) -> list[Check]:
        """Whether several readers have something to share."""
        described = await self._catalog.outbox(outbox)
        # An adopted one has a column for the key: that none is in it is for the log to say.
        keys = described.is_adopted or described.key_columns or row.config.get("key_columns")
        return [] if keys else [_bad(f"keys of {row.pipeline}", f"it {KEYLESS}", KEYLESS_REMEDY)]

    def _held(self, one: PipelineOverview, pipeline: str) -> Check:
        held = one.outbox_bytes or 0
        return _bad(
            f"paused pipeline {one.name}",
            f"holds back {one.lag_rows} rows of {one.outbox} ({held // 1024} KiB)",
            f"{self._call('enable_relay', pipeline)}, or {self._call('delete_relay', pipeline)}",
        )

    def _call(self, function: str, name: str) -> str:
        literal = name.replace("'", "''")
        return f"select {schema_identifier(self._settings.postgres.schema)}.{function}('{literal}')"

    def _http(self, seen: Overview) -> Check:
        metrics = self._settings.metrics
        if not metrics.enabled:
            return _ok("http", "switched off")
        host, port = parse_address(metrics.addr, "metrics.addr")
        try:
            with socket.create_server((host or "", port)):
                return _ok("http", f"{metrics.addr} is free")
        except OSError as error:
            if seen.relays:
                return _ok("http", f"{metrics.addr} is taken, by a relay at work it seems")
            return _bad(
                "http", f"metrics.addr {metrics.addr}: {error.strerror}", "choose another address"
            )

    async def _profile(self, name: str) -> Check:
        """A profile that no enabled pipeline uses: whether it connects, as far as it can."""
        check = f"profile {name}"
        checks: list[Check] = []
        with _noting(checks, check):
            row = row_to_try(name, self._settings.backends[name])
            if row is None:
                return _ok(check, "not connected: that takes what a pipeline says")
            sides = self._assembly.sides(row)
            async with _closing(sides.sink):
                # What it is to be connected to is not the profile's business.
                with contextlib.suppress(DestinationMissing):
                    await self._connect_one("sink", sides.sink)
            checks.append(_ok(check, "connects; no enabled pipeline uses it"))
        return checks[0]

    async def _pipeline(self, row: PipelineRow, seen: PipelineOverview) -> Check:
        check = f"pipeline {row.name}"
        checks: list[Check] = []
        with _noting(checks, check):
            sides = self._assembly.sides(row)
            named = ", ".join(dict.fromkeys(references(row.config)))
            about = f"{seen.source} to {seen.sink}" + (f", refers to {named}" if named else "")
            if seen.state == PAUSED:
                return _ok(check, f"{about}, paused")
            if seen.trouble and seen.state != WAITING:
                owners = ", ".join(seen.owners)
                return _bad(check, f"{seen.state}: {seen.trouble}", f"see the log of {owners}")
            if seen.state != WAITING:
                return _ok(check, f"{about}, {seen.state} in {', '.join(seen.owners)}")
            await self._connect(row, seen, sides)
            checks.append(_ok(check, f"{about}, both sides answer; no relay runs it"))
        return checks[0]

    async def _connect(self, row: PipelineRow, seen: PipelineOverview, sides: Sides) -> None:
        async with _closing(sides.sink), _closing(sides.source):
            await self._connect_one("sink", sides.sink)
            if row.direction == "reverse":
                await self._connect_one("source", sides.source)
            else:
                outbox = await self._catalog.outbox(
                    seen.outbox or str(sides.config.source.get("outbox"))
                )
                if outbox.sequence_cache != 1:
                    raise ConfigurationError(
                        f"the sequence of {outbox.outbox_table} has cache {outbox.sequence_cache}",
                        remedy="alter table … alter column id set cache 1",
                    )

    @staticmethod
    async def _connect_one(role: str, side: Sink | Source) -> None:
        try:
            async with asyncio.timeout(_CONNECT_S):
                await side.connect()
                if not await side.is_healthy():
                    raise Outage(f"the {role} was connected and does not answer")
        except TimeoutError:
            raise Outage(
                f"the {role} did not answer within {_CONNECT_S:g} s",
                remedy="correct the address, or look at its server",
            ) from None


def origins_of(
    settings: Settings, overlays: Sequence[str], stated: Iterable[str], variables: Mapping[str, str]
) -> dict[str, str]:
    """Whence each setting that is not a default came, by key.

    ``stated`` are the keys of the command line, ``variables`` the environment variables by key.
    """
    named = f"overlays ({', '.join(overlays)})" if overlays else "an overlay"
    origins = {}
    given = set(stated)
    for section in settings.__struct_fields__:
        ours, default = getattr(settings, section), getattr(Settings(), section)
        for name in getattr(ours, "__struct_fields__", ()):
            key = f"{section}.{name}"
            if key in given:
                origins[key] = "the command line"
            elif key in variables:
                origins[key] = variables[key]
            elif getattr(ours, name) != getattr(default, name):
                origins[key] = named
    return origins


def _settings(settings: Settings, origins: Mapping[str, str]) -> Check:
    libpq = sorted(name for name in os.environ if name.startswith("PG") and "_" not in name)
    keys: dict[str, list[str]] = {}
    for key, origin in origins.items():
        keys.setdefault(origin, []).append(key)
    said = [f"{', '.join(those)} from {origin}" for origin, those in keys.items()]
    if not settings.postgres.url and libpq:
        said.append(f"the database from {', '.join(libpq)}")
    return _ok("settings", "; ".join(said) or "all are defaults")


def _extras() -> Check:
    missing = missing_extras()
    said = f"not installed: {', '.join(missing)}" if missing else "all are installed"
    return _ok("extras", said)


def _file_roots(settings: Settings) -> Iterator[Check]:
    """The directories that settings name; those of the defaults need not be there."""
    may_write = os.R_OK | os.W_OK | os.X_OK
    for key, roots, needed, verb in (
        ("files.roots", settings.files.roots or (), may_write, "write"),
        ("secrets.file_roots", settings.secrets.file_roots, os.R_OK | os.X_OK, "read"),
    ):
        usable = []
        for root in map(Path, roots):
            if root.is_dir() and os.access(root, needed):
                usable.append(str(root))
            elif root.exists() or roots != DEFAULT_FILE_ROOTS:
                yield _bad(
                    key,
                    f"{root} is no directory that the relay may {verb}",
                    f"make it, or correct {key}",
                )
        if usable:
            yield _ok(key, ", ".join(usable))


async def _all(looks: Iterable[Coroutine[None, None, Check]]) -> Sequence[Check]:
    return await asyncio.gather(*looks)


@contextlib.asynccontextmanager
async def _closing(side: Sink | Source) -> AsyncIterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await side.aclose()


@contextlib.contextmanager
def _noting(checks: list[Check], check: str) -> Iterator[None]:
    """What is raised inside becomes a check that failed."""
    try:
        yield
    except RelayError as error:
        checks.append(_bad(check, error.problem, error.remedy))
    except Exception as error:  # noqa: BLE001 - a bug in one check must not hide the others
        checks.append(_bad(check, f"unexpected {type(error).__name__}", "report it, with the log"))


def lines_of(diagnosis: Diagnosis) -> Iterator[str]:
    """The diagnosis for people, one line a check."""
    for one in diagnosis.checks:
        remedy = "" if one.is_ok else f" → {one.remedy}"
        yield " ".join(f"{'✓' if one.is_ok else '✗'} {one.check}: {one.found}{remedy}".split())


def _ok(check: str, found: str) -> Check:
    return Check(check=check, is_ok=True, found=found)


def _bad(check: str, found: str, remedy: str) -> Check:
    return Check(check=check, is_ok=False, found=found, remedy=remedy or "see the log")


_SERVER = """
select
    current_setting('server_version') as version,
    pg_is_in_recovery() as standby,
    coalesce((select s.ssl from pg_stat_ssl as s where s.pid = pg_backend_pid()), false) as ssl,
    extract(epoch from clock_timestamp())::float8 as now
"""

_SCHEMA = """
select
    pg_get_userbyid(n.nspowner) as owner,
    quote_ident(n.nspname) as quoted,
    (
        select string_agg(
            case when a.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
            ', ')
        from aclexplode(n.nspacl) as a
        where a.privilege_type = 'CREATE' and a.grantee <> n.nspowner
    ) as others
from pg_namespace as n
where n.nspname = $1
"""
