"""The test servers behave as other tests rely on."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import asyncpg
import nats
import psycopg
import pytest

from tests.servers.finding import LOOPBACK, ServerLedger, free_port, is_ci, leave_out
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database, PostgresServer
from tests.servers.tls import TlsFiles


def test_a_free_port_is_nobody_elses_until_its_server_starts() -> None:
    ports = [free_port() for _ in range(20)]

    assert len(set(ports)) == 20
    # Linux gives these to nobody who asks for any.
    assert max(ports) < 32_768
    with socket.socket(type=socket.SOCK_DGRAM) as another_run:
        for port in ports:
            with pytest.raises(OSError, match="in use"):
                another_run.bind((LOOPBACK, port))
            with socket.socket() as server:
                server.bind((LOOPBACK, port))


async def test_each_supported_postgres_accepts_superuser_connections(
    any_postgres_server: PostgresServer,
) -> None:
    connection = await asyncpg.connect(any_postgres_server.dsn)
    try:
        assert await connection.fetchval("select usesuper from pg_user where usename = user")
        assert int(await connection.fetchval("show server_version_num")) >= 150000
        assert await connection.fetchval("show max_prepared_transactions") == "10"
    finally:
        await connection.close()


def test_a_database_is_empty_and_gone_after_its_test(postgres_server: PostgresServer) -> None:
    with postgres_server.database() as created, psycopg.connect(created.dsn) as connection:
        tables = connection.execute(
            "select count(*) from pg_class where relnamespace = 'public'::regnamespace"
        ).fetchone()
        assert tables == (0,)

    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(created.dsn)


def test_a_database_is_dropped_although_somebody_is_connected(
    postgres_server: PostgresServer,
) -> None:
    with postgres_server.database() as created:
        connection = psycopg.connect(created.dsn)

    with pytest.raises(psycopg.OperationalError):
        connection.execute("select 1")
    connection.close()


def test_a_dsn_for_another_role_keeps_address_and_database(database: Database) -> None:
    dsn = database.server.database_dsn(database.name, user="somebody")

    assert urlsplit(dsn).username == "somebody"
    assert urlsplit(dsn).port == urlsplit(database.dsn).port
    assert urlsplit(dsn).path == f"/{database.name}"


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_postgres_comes_back_on_its_address_with_its_data(
    any_postgres_server: PostgresServer, any_database: Database, way: str
) -> None:
    with psycopg.connect(any_database.dsn) as connection:
        connection.execute("create table kept as select 42 as answer")

    if way == "restart":
        any_postgres_server.restart()
    else:
        any_postgres_server.kill()
        any_postgres_server.start()

    with psycopg.connect(any_database.dsn) as connection:
        assert connection.execute("select answer from kept").fetchone() == (42,)


def test_a_stopped_postgres_refuses_connections_until_it_is_started(
    postgres_server: PostgresServer, database: Database
) -> None:
    postgres_server.stop()
    try:
        with pytest.raises(psycopg.OperationalError, match=r"refused"):
            psycopg.connect(database.dsn)
    finally:
        postgres_server.start()

    psycopg.connect(database.dsn).close()


def test_a_postgres_of_its_own_takes_certificates_and_access_rules(
    postgres_server_with: Callable[..., PostgresServer], tls_files: TlsFiles
) -> None:
    server = postgres_server_with(
        {"ssl": "on", "ssl_cert_file": "server.pem", "ssl_key_file": "server.key"},
        {
            **tls_files.contents(),
            "pg_hba.conf": b"host all postgres 127.0.0.1/32 trust\n"
            b"hostssl all secured 127.0.0.1/32 scram-sha-256\n",
        },
    )
    with psycopg.connect(server.dsn) as connection:
        connection.execute("create role secured login password 'in-a-test'")
    dsn = server.database_dsn("postgres", user="secured:in-a-test")

    with psycopg.connect(f"{dsn}?sslmode=verify-full&sslrootcert={tls_files.authority}") as secure:
        encrypted = secure.execute(
            "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
        ).fetchone()
    with pytest.raises(psycopg.OperationalError, match="no encryption"):
        psycopg.connect(f"{dsn}?sslmode=disable")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(dsn.replace("in-a-test", "wrong"))
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        psycopg.connect(f"{dsn}?sslmode=verify-ca&sslrootcert={tls_files.other_authority}")

    assert encrypted == (True,)


async def test_a_migrated_database_has_the_relays_catalog(
    any_migrated_database: Database,
) -> None:
    connection = await asyncpg.connect(any_migrated_database.dsn)
    try:
        assert await connection.fetchval("select pgtrickle.relay_schema_version()") == "0.29.0"
    finally:
        await connection.close()


async def test_a_stream_is_still_there_after_a_restart_of_nats(nats_server: NatsServer) -> None:
    client = await nats.connect(nats_server.url)
    stream = client.jetstream()
    await stream.add_stream(name="kept", subjects=["kept.>"])
    await stream.publish("kept.one", b"1")
    await client.close()

    await asyncio.to_thread(nats_server.restart)

    client = await nats.connect(nats_server.url)
    stream = client.jetstream()
    assert (await stream.stream_info("kept")).state.messages == 1
    await stream.delete_stream("kept")
    await client.close()


async def test_a_killed_nats_is_gone_until_it_is_started(nats_server: NatsServer) -> None:
    await asyncio.to_thread(nats_server.kill)
    try:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", urlsplit(nats_server.url).port)
    finally:
        await asyncio.to_thread(nats_server.start)

    client = await nats.connect(nats_server.url)
    assert client.is_connected
    await client.close()


async def test_a_nats_server_takes_extra_configuration_and_certificates(
    nats_server_with: Callable[..., NatsServer], tls_files: TlsFiles
) -> None:
    server = nats_server_with(
        'tls: { cert_file: "server.pem", key_file: "server.key" }\n'
        'authorization: { user: "relay", password: "in-a-test" }',
        tls_files.contents(),
    )

    with pytest.raises(OSError, match="certificate verify failed"):
        await nats.connect(server.url, allow_reconnect=False, error_cb=_ignore)
    client = await nats.connect(
        server.url.replace("nats://", "tls://"),
        tls=tls_files.client_context(),
        user="relay",
        password="in-a-test",
    )
    assert client.is_connected
    await client.close()


async def _ignore(_: Exception) -> None:
    """The error under test is the one that `connect` raises."""


def test_what_is_missing_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)

    with pytest.raises(pytest.skip.Exception, match="no such server"):
        leave_out("no such server")


def test_what_is_missing_fails_in_continuous_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    with pytest.raises(pytest.fail.Exception, match="no such server"):
        leave_out("no such server")


@pytest.mark.parametrize(
    "value, expected", [("true", True), ("1", True), ("", False), ("0", False)]
)
def test_continuous_integration_is_what_the_environment_says(value: str, expected: bool) -> None:
    assert is_ci({**os.environ, "CI": value}) is expected


def test_the_summary_names_what_was_found_and_what_was_left_out() -> None:
    ledger = ServerLedger(found={"nats": "NATS 2.12"}, missing={"kafka": "no jar"})

    assert ledger.lines() == ["nats: NATS 2.12", "kafka: LEFT OUT, no jar"]
