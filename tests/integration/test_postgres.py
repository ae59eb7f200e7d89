"""Connections to PostgreSQL: strings, TLS, the pool, listening, and what server errors mean."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from relay.backends.inbox import InboxSink
from relay.catalog import Catalog
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    MessageRejected,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.postgres import _BY_STATE, Database, connect
from relay.settings import PostgresSettings
from tests.contract.surroundings import backend_context
from tests.servers.finding import ServerMissing, free_port, leave_out
from tests.servers.postgres import Database as ServerDatabase
from tests.servers.postgres import PostgresServer, configured_postgres
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles

BOUND_S = 10.0
PASSWORD = "it's a \\ long@pass:word/1"

Proxies = Callable[[str, int], Awaitable[TcpProxy]]

# The client's certificate is for the name relay.
HBA = b"""
hostssl all relay all cert
host all scrammed all scram-sha-256
hostssl all encrypted all trust
host all postgres all trust
"""


@pytest.fixture(scope="module")
def tls_server(tls_files: TlsFiles) -> Iterator[PostgresServer]:
    """It speaks TLS, and asks each login for something else."""
    settings = {
        "ssl": "on",
        "ssl_cert_file": tls_files.server_certificate.name,
        "ssl_key_file": tls_files.server_key.name,
        "ssl_ca_file": tls_files.authority.name,
    }
    files = {"pg_hba.conf": HBA, **tls_files.contents()}
    try:
        server = configured_postgres(settings, files)
    except ServerMissing as missing:
        leave_out(f"postgres: {missing}")
    try:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute("create role relay login")
            connection.execute("create role encrypted login")
            connection.execute(
                psycopg.sql.SQL("create role scrammed login password {}").format(PASSWORD)
            )
        yield server
    finally:
        server.control.close()


@pytest.fixture
async def opened(migrated_database: ServerDatabase) -> AsyncIterator[Database]:
    async with database_of(url=migrated_database.dsn) as database:
        yield database


@contextlib.asynccontextmanager
async def database_of(**settings: object) -> AsyncIterator[Database]:
    database = Database(settings_of(**settings))
    await database.open()
    try:
        yield database
    finally:
        await database.aclose()


def settings_of(**settings: object) -> PostgresSettings:
    return PostgresSettings(**settings)  # type: ignore[arg-type]  # by name


async def asked(query: str, **settings: object) -> object:
    """The answer to a query over a connection of its own."""
    connection = await connect(settings_of(**settings), purpose="test")
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def login(server: PostgresServer, user: str, host: str = "127.0.0.1") -> str:
    return f"postgresql://{user}@{host}:{urlsplit(server.dsn).port}/postgres"


# Connection strings


@pytest.mark.shows("setting:postgres.url")
async def test_the_url_says_which_database(
    database: ServerDatabase, migrated_database: ServerDatabase
) -> None:
    for one in (database, migrated_database):
        async with database_of(url=one.dsn) as opened:
            row = await opened.fetch_row("asking", "select current_database()")

            assert row is not None
            assert row[0] == one.name


async def test_keywords_and_values_lead_there_too(database: ServerDatabase) -> None:
    parts = urlsplit(database.dsn)
    text = f" host={parts.hostname}  port = '{parts.port}' user={parts.username} "

    assert await asked("select current_database()", url=f"{text}dbname='{database.name}'") == (
        database.name
    )


async def test_a_url_may_name_the_database_as_a_parameter(database: ServerDatabase) -> None:
    url = f"{login(database.server, 'postgres').removesuffix('postgres')}?dbname={database.name}"

    assert await asked("select current_database()", url=url) == database.name


async def test_without_a_url_the_environment_of_libpq_says_where(
    database: ServerDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = urlsplit(database.dsn)
    monkeypatch.setenv("PGHOST", str(parts.hostname))
    monkeypatch.setenv("PGPORT", str(parts.port))
    monkeypatch.setenv("PGUSER", str(parts.username))
    monkeypatch.setenv("PGDATABASE", database.name)

    assert await asked("select current_database()") == database.name


async def test_a_password_may_hold_anything(tls_server: PostgresServer) -> None:
    port = urlsplit(tls_server.dsn).port
    quoted = PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
    bare = quoted.replace(" ", "\\ ")
    keywords = f"host=127.0.0.1 port={port} user=scrammed dbname=postgres"

    for url in (
        f"{keywords} password='{quoted}'",
        f"{keywords} password={bare}",
        f"postgresql://scrammed:it%27s%20a%20%5C%20long%40pass%3Aword%2F1@127.0.0.1:{port}/postgres",
    ):
        assert await asked("select current_user::text", url=url) == "scrammed"


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "host=h port",
        "host='h",
        "postgresql://h:port/d",
        "postgresql://u:hunter2@ss:word@h/d",
        "postgresql://u:hun[ter2@h/d",
        "postgresql://h/d?hunter2",
        "postgresql://h/d?sslmode=sometimes",
        "postgresql://h/d?connect_timeout=10",
    ],
)
async def test_a_string_that_makes_no_sense_is_a_configuration_error_without_the_password(
    url: str,
) -> None:
    for reach in (asked("select 1", url=url), Database(settings_of(url=url)).open()):
        with pytest.raises(ConfigurationError) as refused:
            await reach
        assert "hunter2" not in str(refused.value)
        assert "ss:word" not in str(refused.value)


async def test_a_parameter_that_nobody_knows_is_a_configuration_error(
    database: ServerDatabase,
) -> None:
    with pytest.raises(ConfigurationError, match="keepalives_idl"):
        await asked("select 1", url=f"{database.dsn}?keepalives_idl=3")


@pytest.mark.shows("error:NotConnected")
async def test_a_server_that_is_away_is_an_outage() -> None:
    url = f"postgresql://u:hunter2@127.0.0.1:{free_port()}/d"

    with pytest.raises(NotConnected) as away:
        await Database(settings_of(url=url)).open()

    assert "hunter2" not in str(away.value)


# TLS


@pytest.mark.shows("setting:postgres.sslmode")
async def test_sslmode_decides_whether_the_connection_is_encrypted(
    tls_server: PostgresServer,
) -> None:
    query = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
    url = login(tls_server, "postgres")

    assert await asked(query, url=url, sslmode="require") is True
    assert await asked(query, url=url, sslmode="disable") is False
    assert await asked(query, url=f"{url}?sslmode=disable", sslmode="require") is True
    assert await asked(query, url=f"{url}?sslmode=disable") is False
    with pytest.raises(AuthenticationRefused):
        await asked(query, url=login(tls_server, "encrypted"), sslmode="disable")


@pytest.mark.shows("setting:postgres.sslrootcert")
@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
async def test_a_server_of_an_unknown_authority_is_refused(
    tls_server: PostgresServer, tls_files: TlsFiles, mode: str
) -> None:
    url = login(tls_server, "encrypted")

    await asked("select 1", url=url, sslmode=mode, sslrootcert=str(tls_files.authority))
    with pytest.raises(AuthenticationRefused, match="not trusted"):
        await asked("select 1", url=url, sslmode=mode, sslrootcert=str(tls_files.other_authority))


async def test_only_verify_full_looks_at_the_name(
    tls_server: PostgresServer, tls_files: TlsFiles
) -> None:
    # The same loopback, under a name that the certificate is not for.
    url = login(tls_server, "encrypted", host="127.1")
    authority = str(tls_files.authority)

    await asked("select 1", url=url, sslmode="verify-ca", sslrootcert=authority)
    with pytest.raises(AuthenticationRefused, match="not trusted"):
        await asked("select 1", url=url, sslmode="verify-full", sslrootcert=authority)


async def test_verifying_without_an_authority_is_a_configuration_error(
    tls_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    with pytest.raises(ConfigurationError, match=r"root\.crt"):
        await asked("select 1", url=login(tls_server, "encrypted"), sslmode="verify-full")


@pytest.mark.shows("setting:postgres.sslcert", "setting:postgres.sslkey")
async def test_a_client_certificate_logs_in_and_its_absence_does_not(
    tls_server: PostgresServer, tls_files: TlsFiles
) -> None:
    url = login(tls_server, "relay")
    certificate, key = str(tls_files.client_certificate), str(tls_files.client_key)

    user = await asked(
        "select current_user::text", url=url, sslmode="require", sslcert=certificate, sslkey=key
    )

    assert user == "relay"
    with pytest.raises(AuthenticationRefused, match="certificate"):
        await asked("select 1", url=url, sslmode="require")
    with pytest.raises(ConfigurationError, match="sslcert"):
        await asked("select 1", url=url, sslmode="require", sslcert=certificate)


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert"])
@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_a_tls_file_that_is_none_is_named(
    tls_server: PostgresServer, tmp_path: Path, name: str, content: str | None
) -> None:
    path = tmp_path / "some.pem"
    if content is not None:
        path.write_text(content)

    settings = settings_of(
        url=login(tls_server, "encrypted"), sslmode="require", **{name: str(path)}
    )

    with pytest.raises(ConfigurationError, match=rf"{name} .*some\.pem"):
        await Database(settings).open()


@pytest.mark.shows(
    "sink:pg-inbox.sslmode",
    "sink:pg-inbox.sslrootcert",
    "sink:pg-inbox.sslcert",
    "sink:pg-inbox.sslkey",
)
async def test_an_inbox_elsewhere_is_reached_under_tls_keys_of_its_own(
    tls_server: PostgresServer, tls_files: TlsFiles
) -> None:
    with psycopg.connect(tls_server.dsn, autocommit=True) as connection:
        connection.execute(
            "create table public.elsewhere (event_id text primary key, payload jsonb);"
            " grant all on public.elsewhere to public"
        )
    certificate = {
        "sslcert": str(tls_files.client_certificate),
        "sslkey": str(tls_files.client_key),
    }

    async def connect_sink(user: str, **keys: object) -> None:
        table = {"type": "pg-inbox", "inbox_table": "elsewhere", "schema": "public"}
        sink = InboxSink.from_options(
            {**table, "url": login(tls_server, user), **keys}, backend_context()
        )
        try:
            await sink.connect()
        finally:
            await sink.aclose()

    await connect_sink("encrypted", sslmode="require")
    await connect_sink("relay", sslmode="require", **certificate)
    await connect_sink("encrypted", sslmode="verify-full", sslrootcert=str(tls_files.authority))
    for user, keys in (
        ("encrypted", {"sslmode": "disable"}),
        ("relay", {"sslmode": "require"}),
        (
            "encrypted",
            {"sslmode": "verify-full", "sslrootcert": str(tls_files.other_authority)},
        ),
    ):
        with pytest.raises(AuthenticationRefused):
            await connect_sink(user, **keys)


async def test_a_server_without_tls_is_not_spoken_to_where_tls_is_required() -> None:
    async def refuse_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.write(b"N")
        said.append(await reader.read())
        writer.close()
        await writer.wait_closed()
        is_over.set()

    said: list[bytes] = []
    is_over = asyncio.Event()
    async with await asyncio.start_server(refuse_tls, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]

        with pytest.raises(RelayError):
            await asked("select 1", url=f"postgresql://u:p@127.0.0.1:{port}/d", sslmode="require")
        async with asyncio.timeout(BOUND_S):
            await is_over.wait()

    assert said == [b""]


# The pool


@pytest.mark.shows("setting:postgres.application_name")
async def test_every_connection_carries_the_application_name(opened: Database) -> None:
    url = opened.settings.url

    name = await asked(
        "select current_setting('application_name')", url=url, application_name="blue"
    )
    row = await opened.fetch_row("asking", "select current_setting('application_name')")

    assert name == "blue test"
    assert row is not None
    assert row[0] == "pgtrickle-relay work"


@pytest.mark.shows("setting:postgres.connect_timeout_s", "error:TimedOut")
async def test_a_server_that_does_not_answer_is_given_up_after_the_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/d"
        started = time.monotonic()

        with pytest.raises(TimedOut):
            await asked("select 1", url=url, connect_timeout_s=0.2)
        with pytest.raises(TimedOut):
            await Database(settings_of(url=url, connect_timeout_s=0.2)).open()

        assert 0.4 <= time.monotonic() - started < 5


@pytest.mark.shows("setting:postgres.command_timeout_s")
async def test_a_statement_that_does_not_end_is_given_up_after_the_command_timeout(
    database: ServerDatabase,
) -> None:
    async with database_of(url=database.dsn, command_timeout_s=0.2) as opened:
        started = time.monotonic()

        with pytest.raises(TimedOut, match="while sleeping"):
            await opened.execute("sleeping", "select pg_sleep(20)")

        assert 0.2 <= time.monotonic() - started < 5
        assert await opened.fetch("asking", "select 1")


@pytest.mark.shows("setting:postgres.pool_size")
@pytest.mark.parametrize("size", [1, 3])
async def test_the_pool_has_so_many_connections_and_no_more(
    database: ServerDatabase, size: int
) -> None:
    async with (
        database_of(url=database.dsn, pool_size=size, connect_timeout_s=0.5) as opened,
        contextlib.AsyncExitStack() as taken,
    ):
        for _ in range(size):
            await taken.enter_async_context(opened.connection("taking one"))

        with pytest.raises(TimedOut, match="while taking another"):
            await taken.enter_async_context(opened.connection("taking another"))


async def test_a_connection_that_was_lost_is_replaced(opened: Database) -> None:
    with pytest.raises(Outage):
        await opened.execute("ending it", "select pg_terminate_backend(pg_backend_pid())")

    assert await opened.fetch("asking", "select 1")


async def _seen_of(opened: Database, pid: int) -> tuple[str, str]:
    """State and last statement of a session, as another one sees them."""
    with psycopg.connect(opened.settings.url) as other:
        row = other.execute(
            "select state, query from pg_stat_activity where pid = %s", (pid,)
        ).fetchone()
    assert row is not None
    return row[0], row[1]


async def test_a_connection_goes_back_to_the_pool_without_a_word_to_the_server(
    opened: Database,
) -> None:
    async with opened.connection("asking") as connection:
        pid = connection.get_server_pid()
        await connection.execute("select 'the last'")

    assert await _seen_of(opened, pid) == ("idle", "select 'the last'")


async def test_a_transaction_that_was_left_open_does_not_go_back_to_the_pool(
    opened: Database,
) -> None:
    async with opened.connection("asking") as connection:
        pid = connection.get_server_pid()
        await connection.execute("begin")

    assert (await _seen_of(opened, pid))[0] == "idle"


async def test_a_closed_pool_is_an_outage_and_closing_twice_does_no_harm(
    opened: Database,
) -> None:
    await opened.aclose()
    await opened.aclose()

    with pytest.raises(NotConnected, match="pool is closed"):
        await opened.fetch("asking", "select 1")


async def test_closing_ends_although_the_server_does_not_answer(
    database: ServerDatabase, tcp_proxy: Proxies
) -> None:
    parts = urlsplit(database.dsn)
    proxy = await tcp_proxy(str(parts.hostname), int(parts.port or 0))
    opened = Database(settings_of(url=proxy.url(database.dsn)))
    await opened.open()
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(_expect_outage(opened))
        proxy.stall()

        async with asyncio.timeout(5):
            await opened.aclose()
        await asking
    await proxy.restore()
    await proxy.wait_for_connections(0)


async def _expect_outage(opened: Database) -> None:
    with pytest.raises(Outage):
        await opened.fetch("waiting", "select pg_sleep(30)")


async def test_json_is_bytes_on_both_ways(opened: Database) -> None:
    row = await opened.fetch_row("asking", "select $1::jsonb, $2::json", b'{"a": 1}', b'{"b" :2}')

    assert row is not None
    assert tuple(row) == (b'{"a": 1}', b'{"b" :2}')


async def test_a_table_altered_under_a_prepared_statement_costs_no_pipeline(
    opened: Database,
) -> None:
    await opened.execute("making it", "create table public.t (a int)")

    async def alter_it_in_between() -> None:
        async with opened.connection("reading") as connection:
            statement = await connection.prepare("select * from public.t")
            await statement.fetch()
            await connection.execute("alter table public.t add column b int")
            # Only outside of a transaction the driver prepares it again by itself.
            async with connection.transaction():
                await statement.fetch()

    with pytest.raises(Outage, match="altered meanwhile"):
        await alter_it_in_between()


# Listening


class Heard:
    """What a listener was called with."""

    def __init__(self) -> None:
        self.payloads: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, payload: str) -> None:
        self.payloads.append(payload)
        self._changed.set()

    async def until(self, count: int) -> list[str]:
        async with asyncio.timeout(BOUND_S):
            while len(self.payloads) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.payloads


@contextlib.asynccontextmanager
async def listening(database: Database, *channels: str) -> AsyncIterator[None]:
    task = asyncio.create_task(database.listen(channels))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def notify(database: Database, channel: str, payload: str) -> None:
    await database.execute("notifying", "select pg_notify($1, $2)", channel, payload)


async def test_each_notification_reaches_the_listeners_of_its_channel(opened: Database) -> None:
    one, same, other = Heard(), Heard(), Heard()
    opened.subscribe("a", one)
    unsubscribe = opened.subscribe("a", same)
    opened.subscribe("b", other)
    async with listening(opened, "a", "b"):
        assert await one.until(1) == [""]
        await same.until(1)
        unsubscribe()

        await notify(opened, "a", "first")
        await notify(opened, "b", "second")

        assert await one.until(2) == ["", "first"]
        assert await other.until(2) == ["", "second"]
        assert same.payloads == [""]


async def test_a_lost_listening_connection_is_made_again_and_says_so(opened: Database) -> None:
    heard = Heard()
    opened.subscribe("a", heard)
    async with listening(opened, "a"):
        await heard.until(1)

        await opened.execute(
            "cutting it",
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = 'pgtrickle-relay listen'"
            " and datname = current_database()",
        )

        assert await heard.until(2) == ["", ""]
        await notify(opened, "a", "after")
        assert await heard.until(3) == ["", "", "after"]


async def test_listening_goes_on_when_the_server_comes_back(
    opened: Database, tcp_proxy: Proxies
) -> None:
    parts = urlsplit(opened.settings.url)
    proxy = await tcp_proxy(str(parts.hostname), int(parts.port or 0))
    through = Database(settings_of(url=proxy.url(opened.settings.url)))
    heard = Heard()
    through.subscribe("a", heard)
    async with listening(through, "a"):
        await heard.until(1)
        await proxy.cut()
        await notify(opened, "a", "missed")
        await proxy.restore()

        assert await heard.until(2) == ["", ""]


async def test_a_cancelled_listener_leaves_no_connection(opened: Database) -> None:
    heard = Heard()
    opened.subscribe("a", heard)
    async with listening(opened, "a"):
        await heard.until(1)

    async with asyncio.timeout(BOUND_S):
        while await opened.fetch(  # noqa: ASYNC110 - the server tells nobody of it
            "asking",
            "select 1 from pg_stat_activity where datname = current_database()"
            " and application_name = 'pgtrickle-relay listen'",
        ):
            await asyncio.sleep(0.01)


# What each server error means


async def _fenced(database: Database) -> None:
    catalog = Catalog(database, "default")
    await _reverse_pipeline(database)
    late = await catalog.claim("p", None, "one")
    await catalog.claim("p", None, "two")
    await catalog.set_cursor("p", late.epoch, "key", b'"here"')


async def _reverse_pipeline(database: Database) -> None:
    await database.execute(
        "setting", """select pgtrickle.set_relay_inbox('p', 'in', '{"type": "stdin"}')"""
    )


async def _lost_lease(database: Database) -> None:
    for statement in (
        "select pgtrickle.enable_outbox('events', capture => 'none')",
        "select pgtrickle.create_consumer_group('g', 'events', 'earliest')",
        "select pgtrickle.extend_lease('g', 'nobody')",
    ):
        await database.execute("leasing", statement)


async def _unsafe(database: Database) -> None:
    for statement in (
        "select pgtrickle.enable_outbox('events', capture => 'none')",
        "alter table pgtrickle.outbox_events alter column id set cache 20",
        "select pgtrickle.create_consumer_group('g', 'events')",
    ):
        await database.execute("grouping", statement)


async def _as_nobody(database: Database) -> None:
    async with database.connection("reading") as connection:
        await connection.execute("set role pg_monitor")
        await connection.execute("select * from pgtrickle.relay_outbox_config")


async def _elsewhere(database: Database, **changed: str) -> None:
    parts = urlsplit(database.settings.url)
    user = changed.get("user", parts.username)
    url = f"postgresql://{user}@{parts.hostname}:{parts.port}/{changed.get('name', 'postgres')}"
    await connect(settings_of(url=url), purpose="test")


def _running(*statements: str) -> Callable[[Database], Awaitable[None]]:
    async def run(database: Database) -> None:
        async with database.connection("running") as connection:
            for statement in statements:
                await connection.execute(statement)

    return run


# Each entry of the table, with what makes a server say it.
PROVOKED: Mapping[str, Callable[[Database], Awaitable[None]]] = {
    "RL003": _running("select pgtrickle.disable_outbox('nothing')"),
    "RL005": _unsafe,
    "RL020": _fenced,
    "RL021": _lost_lease,
    "RL022": _running("select * from pgtrickle.consumer_lag('nothing')"),
    "RL030": _running("select pgtrickle.drop_inbox('nothing')"),
    "RL": _running("select pgtrickle.get_relay_config('nothing')"),
    "28": lambda database: _elsewhere(database, user="nobody_we_know"),
    "42501": _as_nobody,
    "3D000": lambda database: _elsewhere(database, name="no_such_database"),
    "3F000": _running("select no_such_schema.f()"),
    "42883": _running("select pgtrickle.no_such_function()"),
    "42P01": _running("select * from public.no_such_table"),
    "42": _running("selct 1"),
    "0A": _running("select * from elsewhere.public.t"),
    "22": _running("select 1 / 0"),
    "23": _running("create table public.t (a int unique)", "insert into public.t values (1), (1)"),
    "54": _running("select repeat('x', 1 << 30)"),
    "44": _running(
        "create table public.t (a int)",
        "create view public.v as select a from public.t where a > 0 with check option",
        "insert into public.v values (-1)",
    ),
    "21": _running("select (select 1 union select 2)"),
    "P0": _running("do $$ begin raise exception 'no'; end $$"),
    "57014": _running("select pg_cancel_backend(pg_backend_pid()), pg_sleep(5)"),
    "25006": _running("begin read only; create table public.t ()"),
}


def test_every_entry_of_the_table_is_provoked() -> None:
    assert PROVOKED.keys() == _BY_STATE.keys()


@pytest.mark.shows("error:LeaseLost", "error:RelayError")
@pytest.mark.parametrize("state", PROVOKED)
async def test_a_server_error_becomes_the_relays_own(opened: Database, state: str) -> None:
    expected = _BY_STATE[state]

    with pytest.raises(RelayError) as said:
        await PROVOKED[state](opened)

    assert type(said.value) is expected
    # The one error that is told in the relay's own words.
    assert f"[{state}" in str(said.value) or "run `pgtrickle-relay migrate`" in str(said.value)


@pytest.mark.parametrize(
    "statements",
    [
        ("select pg_terminate_backend(pg_backend_pid())",),
        ("do $$ begin raise exception 'retry' using errcode = '40001'; end $$",),
        ("do $$ begin raise exception 'new' using errcode = 'ZZ999'; end $$",),
    ],
)
async def test_what_is_not_listed_is_an_outage_that_loses_nothing(
    opened: Database, statements: tuple[str, ...]
) -> None:
    with pytest.raises(Outage):
        await _running(*statements)(opened)


@pytest.mark.shows("error:MessageRejected")
async def test_a_value_that_does_not_fit_is_a_rejected_message(opened: Database) -> None:
    with pytest.raises(MessageRejected, match="invalid input"):
        await opened.fetch("writing", "select $1::int", "text")


async def test_no_error_repeats_the_password_of_a_url(opened: Database) -> None:
    with pytest.raises(RelayError) as said:
        await opened.execute(
            "failing",
            "do $$ begin raise exception 'at postgresql://u:hunter2@h/d'"
            " using hint = 'try postgresql://u:hunter2@h/e'; end $$",
        )

    assert "hunter2" not in str(said.value)
    assert "postgresql://u:******@h/d" in str(said.value)
