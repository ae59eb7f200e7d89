"""Every PostgreSQL connection of the relay: how it is made, its errors, its pool, its listener.

One table maps SQLSTATE to the relay's errors (`relay_error`); nobody else looks at SQLSTATE.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from relay.backoff import Backoff
from relay.errors import (
    AuthenticationRefused,
    CatalogMissing,
    ConfigurationError,
    DestinationMissing,
    LeaseLost,
    MessageRejected,
    NotConnected,
    Outage,
    OutboxUnsafe,
    OwnershipLost,
    RelayError,
    TimedOut,
)
from relay.network import not_connected
from relay.secrets import mask_urls
from relay.settings import PostgresSettings, schema_identifier
from relay.tls import refuses_us, why_not_trusted

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
PooledConnection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Listener = Callable[[str], None]

# One pair of libpq's keyword = value form; a quoted value may hold anything, and a backslash takes
# the next character as it is.
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-KEYWORD-VALUE
_PAIR = re.compile(r"\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?=\s|$)", re.DOTALL)
# The driver's words where sslmode asks for TLS; it has no class of its own for that.
_NO_TLS = "rejected SSL upgrade"
_TLS_FILES = ("sslrootcert", "sslcert", "sslkey")
_SESSION_ATTRS = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")

# They are the server's, and let it notice that a relay is gone and free its locks.
_KEEPALIVE = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
# A pooler may have several free connections to hand out, in whatever order.
_POOLER_LOOKS = 4

# By SQLSTATE; a two-letter entry stands for its class. What is not listed is an outage: it is
# tried again and loses nothing, while a wrong "message" verdict would drop an event to the dead
# letters and a wrong "configuration" verdict would stop a pipeline.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_BY_STATE: Mapping[str, type[RelayError]] = {
    "RL003": DestinationMissing,
    "RL005": OutboxUnsafe,
    "RL020": OwnershipLost,
    "RL021": LeaseLost,
    "RL022": DestinationMissing,
    "RL030": DestinationMissing,
    "RL": ConfigurationError,
    "28": AuthenticationRefused,
    "42501": AuthenticationRefused,
    "3D000": ConfigurationError,
    "3F000": CatalogMissing,
    "42883": CatalogMissing,
    "42P01": DestinationMissing,
    "42": ConfigurationError,
    "0A": ConfigurationError,
    "22": MessageRejected,
    "23": MessageRejected,
    "54": MessageRejected,
    "44": MessageRejected,
    "21": MessageRejected,
    "P0": MessageRejected,
    "57014": TimedOut,
    "25006": NotConnected,
}

# What no row of an insert can be blamed for, by class or state: connections, transactions,
# authorization, resources, locks, operators, foreign servers, the server itself, our own functions.
_OF_NO_ROW = frozenset(
    {"08", "25", "28", "3D", "40", "53", "55006", "55P03", "57", "58", "F0", "HV", "RL", "XX"}
)
# Values that do not fit are quoted in what is said of them.
_QUOTING = frozenset({"22"})
# The function of the server behind a `raise`, and where that stands.
_RAISE = "exec_stmt_raise"
_FUNCTION = re.compile(r"PL/pgSQL function [^\n]* line \d+")
# The function of the server that finds a row against a policy; 42501 too, as a missing right.
_POLICY_CHECK = "ExecWithCheckOptions"

# What to do, where the server gives no hint.
_REMEDIES: Mapping[str, str] = {
    "28000": "correct the user of the URL, or pg_hba.conf on the server",
    "28P01": "correct user and password of the URL",
    "3D000": "create the database, or correct the URL",
    "42704": "correct the parameters of the connection string",
}


def relay_error(error: asyncpg.PostgresError, doing: str) -> RelayError:
    """The relay's error for what a server said. ``doing`` completes "while …"."""
    state = getattr(error, "sqlstate", None) or ""
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        # Of class 0A too, but another try, with the table as it is now, heals it.
        return Outage(f"PostgreSQL, while {doing}: a table was altered meanwhile [{state}]")
    found = _BY_STATE.get(state) or _BY_STATE.get(state[:2]) or Outage
    if getattr(error, "server_source_function", None) == _POLICY_CHECK:
        found = MessageRejected
    hint = getattr(error, "hint", None) or _REMEDIES.get(state, "")
    detail = getattr(error, "detail", None) if state.startswith("RL") else None
    # Behind the first colon the driver's own words quote the argument of a query.
    own_words = str(error).partition(": ")[0]
    message = getattr(error, "message", None) or own_words or type(error).__name__
    if found is CatalogMissing and getattr(error, "context", None):
        # What is missing was named inside a function, such as somebody's trigger.
        found = ConfigurationError
    if found is CatalogMissing:
        return CatalogMissing(
            "the database has no relay catalog, or an older one",
            remedy="run `pgtrickle-relay migrate`",
        )
    said = f"{message}: {detail}" if detail else message
    return found(f"PostgreSQL, while {doing}: {mask_urls(said)} [{state}]", remedy=mask_urls(hint))


def rejection_of_row(error: RelayError) -> MessageRejected | None:
    """The verdict on the one row whose insert raised this; None where no row is to blame.

    A ``configuration`` error may be one row's, too, such as a right that a trigger needs for some
    rows only: that it is so, another row shows that is accepted.
    """
    cause = error.__cause__
    if isinstance(error, MessageRejected) or not isinstance(cause, asyncpg.PostgresError):
        return error if isinstance(error, MessageRejected) else None
    state = cause.sqlstate or ""
    is_stale = isinstance(cause, asyncpg.InvalidCachedStatementError)
    if is_stale or not state or not _OF_NO_ROW.isdisjoint((state, state[:2])):
        return None
    rejection = MessageRejected(error.problem, remedy=error.remedy)
    rejection.__cause__ = cause
    return rejection


def discreet(error: RelayError) -> RelayError:
    """The error of an insert without what may be of the row: a value that does not fit, or the
    words of a user's own ``raise``. Those are its ``quoting``.
    """
    cause = error.__cause__
    if not isinstance(cause, asyncpg.PostgresError):
        return error
    state = cause.sqlstate or ""
    is_raised = getattr(cause, "server_source_function", None) == _RAISE
    if state[:2] not in _QUOTING and not (is_raised and not state.startswith("RL")):
        return error
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(cause).__name__.removesuffix("Error")).lower()
    where = _FUNCTION.search(getattr(cause, "context", None) or "")
    said = f"raised by {where[0]}" if is_raised and where else "raised" if is_raised else words
    told = type(error)(f"PostgreSQL, while inserting: {said} [{state}]")
    told.quoting = str(error)
    told.__cause__ = cause
    return told


@contextlib.contextmanager
def postgres_errors(doing: str) -> Iterator[None]:
    """Map everything that asyncpg and the socket below it raise. ``doing`` completes "while …"."""
    try:
        yield
    except asyncpg.PostgresError as error:
        raise relay_error(error, doing) from error
    except TimeoutError as error:
        raise TimedOut(f"PostgreSQL gave no answer in time while {doing}") from error
    except ssl.SSLCertVerificationError as error:
        why, remedy = why_not_trusted(error)
        raise AuthenticationRefused(
            f"the PostgreSQL server's certificate is not trusted while {doing}: {why}",
            remedy=remedy or "check sslmode and sslrootcert",
        ) from error
    except ssl.SSLError as error:
        if why := refuses_us(error):
            raise AuthenticationRefused(
                f"the PostgreSQL server refuses our certificate while {doing}: {why}",
                remedy="set sslcert and sslkey to a certificate that the server trusts",
            ) from error
        raise NotConnected(f"PostgreSQL is out of reach while {doing}: {_told(error)}") from error
    except ConnectionError as error:
        if _NO_TLS not in str(error):
            raise not_connected(error, f"PostgreSQL is out of reach while {doing}") from error
        raise ConfigurationError(
            f"the PostgreSQL server offers no TLS while {doing}",
            remedy="turn TLS on at the server, or choose another sslmode",
        ) from error
    except OSError as error:
        raise not_connected(error, f"PostgreSQL is out of reach while {doing}") from error
    except EOFError as error:
        raise NotConnected(f"PostgreSQL is out of reach while {doing}: {_told(error)}") from error
    except asyncpg.ClientConfigurationError as error:
        raise ConfigurationError(
            f"the PostgreSQL connection string is wrong: {_told(error)}"
        ) from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        raise NotConnected(
            f"the PostgreSQL connection was lost while {doing}: {_told(error)}"
        ) from error


async def connect(settings: PostgresSettings, *, purpose: str) -> Connection:
    """Open one connection. ``purpose`` goes into the application name.

    Raises `AuthenticationRefused`, `ConfigurationError`, `NotConnected`, `TimedOut`.
    """
    with _readable_string(), postgres_errors(_connecting(settings)):
        connection = await asyncpg.connect(
            dsn=_dsn(settings),
            timeout=settings.connect_timeout_s,
            command_timeout=settings.command_timeout_s,
            server_settings=_application_name(settings, purpose),
        )
        await _prepare(connection, _session(settings))
        return connection


class Database:
    """The pool, and one connection that listens, shared by everything in this process.

    ``settings``: how the database is reached.
    """

    def __init__(self, settings: PostgresSettings) -> None:
        self.settings = settings
        self._session = _session(settings)
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._listeners: dict[str, list[Listener]] = {}

    async def open(self) -> None:
        """Open the pool with one connection in it.

        Raises as `connect` does, and `ConfigurationError` for a pooler that hands a session from
        one server process to another.
        """
        with _readable_string(), postgres_errors(_connecting(self.settings)):
            pool = await asyncpg.create_pool(
                dsn=_dsn(self.settings),
                min_size=0,
                max_size=self.settings.pool_size,
                timeout=self.settings.connect_timeout_s,
                command_timeout=self.settings.command_timeout_s,
                server_settings=_application_name(self.settings, "work"),
                init=lambda connection: _prepare(connection, self._session),
                reset=_leave,
            )
            try:
                await _refuse_pooler(pool, self.settings)
            except BaseException:
                pool.terminate()
                raise
        self._pool = pool

    async def aclose(self) -> None:
        """Close everything within seconds, also when the server does not answer."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(2):
                    await pool.close()
            except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                pool.terminate()

    @contextlib.asynccontextmanager
    async def connection(self, doing: str) -> AsyncIterator[PooledConnection]:
        """A connection of the pool for as long as the block lasts, with its errors mapped."""
        if self._pool is None:
            raise NotConnected("the PostgreSQL pool is closed")
        with postgres_errors(doing):
            async with self._pool.acquire(timeout=self.settings.connect_timeout_s) as connection:
                yield connection

    async def whereabouts(self) -> str:
        """Database, and role and server as the server sees them, in a few words."""
        row = await self.fetch_row(
            "asking where we are",
            "select current_database() as name, current_user as role,"
            " coalesce(host(inet_server_addr()) || ':' || inet_server_port(), 'a local socket')"
            " as address",
        )
        return "?" if row is None else f"{row['name']} as {row['role']} at {row['address']}"

    async def fetch(self, doing: str, query: str, *args: object) -> list[asyncpg.Record]:
        """All rows of one statement."""
        async with self.connection(doing) as connection:
            return await connection.fetch(query, *args)

    async def fetch_row(self, doing: str, query: str, *args: object) -> asyncpg.Record | None:
        """The first row of one statement, or None."""
        async with self.connection(doing) as connection:
            return await connection.fetchrow(query, *args)

    async def execute(self, doing: str, query: str, *args: object) -> None:
        """One statement for its effect."""
        async with self.connection(doing) as connection:
            await connection.execute(query, *args)

    @contextlib.asynccontextmanager
    async def leaving_nothing(
        self, connection: PooledConnection, *, is_needed: bool
    ) -> AsyncIterator[None]:
        """Undo what code of others, such as a trigger, does to the session in the block.

        Settings, temporary objects and prepared statements: each could make a later statement of
        ours mean something else. A connection for which that fails is closed. Nothing, unless
        ``is_needed``.
        """
        try:
            yield
        finally:
            if is_needed:
                try:
                    await self.leave_nothing(connection)
                except BaseException:
                    connection.terminate()
                    raise

    async def leave_nothing(self, connection: PooledConnection) -> None:
        """As `leaving_nothing`, at once; the driver prepares its statements again."""
        await connection.execute(f"reset all; discard temp; deallocate all; {self._session}")
        await connection.reload_schema_state()

    def subscribe(self, channel: str, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with the payload of each notification; returns what ends that.

        It is also called, with an empty payload, whenever the listening connection was made again,
        because notifications may have been missed. ``channel`` is one of the relay's constants.
        """
        self._listeners.setdefault(channel, []).append(listener)
        return lambda: self._listeners[channel].remove(listener)

    async def listen(self, channels: tuple[str, ...]) -> None:
        """Keep one connection listening on ``channels``, for ever; reconnects by itself."""
        backoff = Backoff(0.2, 10.0)
        while True:
            try:
                await self._listen_once(channels, backoff)
            except RelayError:
                await asyncio.sleep(backoff.next_s())

    async def _listen_once(self, channels: tuple[str, ...], backoff: Backoff) -> None:
        connection = await connect(self.settings, purpose="listen")
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        try:
            with postgres_errors("listening"):
                for channel in channels:
                    # Its name on the server depends on the schema, and the server's encoding.
                    name = await connection.fetchval("select relay_channel($1)", channel)
                    await connection.add_listener(name, self._notified)
                backoff.reset()
                for channel in channels:
                    self._tell(channel, "")
                while not lost.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(15):
                            await lost.wait()
                    if not lost.is_set():
                        await connection.execute("select 1", timeout=5)
        finally:
            connection.terminate()
        raise NotConnected("the listening connection was lost")

    def _notified(self, _connection: object, _pid: int, name: str, payload: object) -> None:
        for channel in self._listeners:
            if name.startswith(channel):
                self._tell(channel, str(payload))

    def _tell(self, channel: str, payload: str) -> None:
        for listener in tuple(self._listeners.get(channel, ())):
            listener(payload)


@contextlib.contextmanager
def _readable_string() -> Iterator[None]:
    """What the driver can't take apart; its words may hold a part of the password."""
    try:
        yield
    except ValueError:
        raise ConfigurationError(
            "the PostgreSQL connection string can't be read",
            remedy="write postgresql://user@host:5432/database, with special characters of user"
            " and password percent-encoded",
        ) from None


def _dsn(settings: PostgresSettings) -> str:
    """The driver's URL for what libpq accepts: a URL, ``keyword=value`` pairs, or nothing."""
    url = settings.url.strip()
    if not url.startswith(("postgresql://", "postgres://")):
        url = "postgresql://?" + urlencode(_keywords(url))
    tls = {
        name: value
        for name in ("sslmode", *_TLS_FILES)
        if (value := getattr(settings, name)) is not None
    }
    parts = urlsplit(url)
    if parts.fragment or "@" in parts.path or parts.netloc.count("@") > 1:
        raise ValueError("a special character of the password ends the host")
    stated = {**dict(parse_qsl(parts.query, strict_parsing=bool(parts.query))), **tls}
    if "connect_timeout" in stated:
        raise ConfigurationError(
            "the PostgreSQL connection string has connect_timeout",
            remedy="leave it out: the relay has postgres.connect_timeout_s",
        )
    _check_tls_files(stated)
    session = stated.get("target_session_attrs", "any")
    if session not in _SESSION_ATTRS:
        raise ConfigurationError(
            f"the PostgreSQL connection string has target_session_attrs={session}",
            remedy=f"use one of {', '.join(_SESSION_ATTRS)}",
        )
    # A lone slash would name the database without a name, which wins over all other places.
    path = "" if parts.path == "/" else parts.path
    return urlunsplit(parts._replace(path=path, query=urlencode(stated)))


def _connecting(settings: PostgresSettings) -> str:
    """What we do, with where where the connection string says it."""
    url = urlsplit(_dsn(settings))
    pairs = dict(parse_qsl(url.query))
    where = url.netloc.rpartition("@")[2]
    if not where and "host" in pairs:
        where = pairs["host"] + (f":{pairs['port']}" if "port" in pairs else "")
    return f"connecting to {where}" if where else "connecting"


def _keywords(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    at = 0
    while at < len(text):
        found = _PAIR.match(text, at)
        if found is None:
            raise ConfigurationError(
                "the PostgreSQL connection string is neither a URL nor keyword=value pairs",
                remedy="write postgresql://user@host:5432/database",
            )
        name, quoted, bare = found.groups()
        pairs[name] = re.sub(r"\\(.)", r"\1", quoted if bare is None else bare, flags=re.DOTALL)
        at = found.end()
    return pairs


def _check_tls_files(stated: Mapping[str, str]) -> None:
    """The driver reads them too, but calls a wrong path a lost connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = "sslrootcert"
    try:
        if authority := stated.get(name):
            context.load_verify_locations(cafile=authority)
        name = "sslcert"
        if certificate := stated.get(name):
            context.load_cert_chain(
                certificate, stated.get("sslkey"), password=stated.get("sslpassword", "")
            )
    except OSError as error:
        raise ConfigurationError(
            f"{name} {stated[name]!r} can't be used: {error.strerror or type(error).__name__}",
            remedy="name a PEM file that the relay may read, and the key that belongs to it",
        ) from error


def wandering_session() -> ConfigurationError:
    """What is said where a session is not one at the server."""
    return ConfigurationError(
        "a pooler in transaction mode stands before PostgreSQL: advisory locks, settings and"
        " notifications belong to a session, and it keeps none",
        remedy="connect to the server itself, or set pool_mode to session",
    )


async def _refuse_pooler(pool: asyncpg.Pool[asyncpg.Record], settings: PostgresSettings) -> None:
    """Raise `ConfigurationError` where two sessions meet in one server process, or one wanders."""
    timeout_s = settings.connect_timeout_s
    async with pool.acquire(timeout=timeout_s) as one:
        if settings.pool_size == 1:
            return
        async with pool.acquire(timeout=timeout_s) as other:
            seen = [
                [await session.fetchval("select pg_catalog.pg_backend_pid()") for session in both]
                for both in ((one, other),) * _POOLER_LOOKS
            ]
    ones, others = map(set, zip(*seen, strict=True))
    if len(ones) > 1 or ones & others:
        raise wandering_session()


def _application_name(settings: PostgresSettings, purpose: str) -> dict[str, str]:
    """The only parameter of a start that poolers in session mode take, too."""
    return {"application_name": f"{settings.application_name} {purpose}"[:63]}


def _session(settings: PostgresSettings) -> str:
    """The statements that make a session ours."""
    return (
        f"set search_path to pg_catalog, {schema_identifier(settings.schema)};"
        " set default_transaction_isolation to 'read committed';"
        " set idle_in_transaction_session_timeout to 60000; set timezone to 'UTC';"
        + "".join(f" set {name} to {value};" for name, value in _KEEPALIVE.items())
    )


async def _prepare(connection: Connection | PooledConnection, session: str) -> None:
    """JSON stays bytes on both ways: nobody here looks into a payload without need."""
    await connection.execute(session)
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", format="binary", encoder=_jsonb_out, decoder=_jsonb_in
    )
    await connection.set_type_codec(
        "json", schema="pg_catalog", format="binary", encoder=bytes, decoder=bytes
    )


async def _leave(_connection: Connection | PooledConnection) -> None:
    """Nothing to undo when a connection goes back to the pool, which spares a round trip.

    The relay's statements leave nothing in a session; what an open transaction did is undone by
    the driver all the same.
    """


def _jsonb_out(value: bytes) -> bytes:
    return b"\x01" + value


def _jsonb_in(value: bytes) -> bytes:
    return bytes(value[1:])


def _told(error: BaseException) -> str:
    return mask_urls(str(error) or type(error).__name__)
