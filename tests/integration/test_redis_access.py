"""Who we are to a Redis server: users, passwords, permissions, certificates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.errors import AuthenticationRefused, ConfigurationError, Outage, RelayError
from tests.contract.evidence import numbered
from tests.contract.redis_broker import Broker, sink_of, source_of, user_lines
from tests.servers.finding import free_port
from tests.servers.redis import RedisServer
from tests.servers.tls import TlsFiles

ServerWith = Callable[..., RedisServer]
ROLES = pytest.mark.parametrize("role", ["sink", "source"])
STREAM = "orders.insert"


async def reach(role: str, url: str, **keys: str | int | bool) -> None:
    """Connect, add or read, and close. Raises what the sink or the source raises."""
    if role == "sink":
        sink = sink_of(url, STREAM, **keys)
        try:
            await sink.connect()
            result = await sink.publish(numbered(1))
            if result.failures:
                raise result.failures[0].error
        finally:
            await sink.aclose()
    else:
        source = source_of(url, STREAM, block_ms=10, **keys)
        try:
            await source.connect()
            await source.poll()
        finally:
            await source.aclose()


@pytest.mark.shows(
    "sink:redis.username", "sink:redis.password", "source:redis.username", "source:redis.password"
)
@ROLES
async def test_user_and_password_are_accepted_or_refused(
    redis_server_with: ServerWith,
    role: str,
) -> None:
    server = redis_server_with(user_lines("relay", "s3cret/@", "~* +@all"))

    await reach(role, server.url, username="relay", password="s3cret/@")
    await reach(role, server.url.replace("//", "//relay:s3cret%2F%40@"))
    for keys in ({}, {"username": "relay", "password": "wrong-one"}, {"password": "wrong-one"}):
        with pytest.raises(AuthenticationRefused) as caught:
            await reach(role, server.url, **keys)
        assert "wrong-one" not in str(caught.value)
        assert "\n" not in str(caught.value)


@ROLES
async def test_a_password_alone_is_the_default_users(
    redis_server_with: ServerWith,
    role: str,
) -> None:
    server = redis_server_with("requirepass t0ken")

    await reach(role, server.url, password="t0ken")
    await reach(role, server.url.replace("//", "//:t0ken@"))
    with pytest.raises(AuthenticationRefused):
        await reach(role, server.url)


async def test_the_commands_that_are_documented_are_all_that_a_user_needs(
    redis_server_with: ServerWith,
) -> None:
    adding = redis_server_with(user_lines("relay", "p", f"~{STREAM} +xadd +multi +exec"))
    reading = redis_server_with(
        user_lines("relay", "p", f"~{STREAM} +xgroup|create +xreadgroup +xack +xclaim +xautoclaim")
    )

    await reach("sink", adding.url, username="relay", password="p")
    await reach("source", reading.url, username="relay", password="p")


@ROLES
async def test_a_missing_permission_is_named(
    redis_server_with: ServerWith,
    role: str,
) -> None:
    server = redis_server_with(user_lines("relay", "p", "~other +@all"))

    with pytest.raises(AuthenticationRefused, match="ACL SETUSER"):
        await reach(role, server.url, username="relay", password="p")


@pytest.mark.shows("sink:redis.tls_ca", "sink:redis.tls_cert", "sink:redis.tls_key")
@pytest.mark.shows("source:redis.tls_ca", "source:redis.tls_cert", "source:redis.tls_key")
@ROLES
async def test_a_client_certificate_is_accepted_and_its_absence_refused(
    redis_server_with: ServerWith,
    tls_files: TlsFiles,
    role: str,
) -> None:
    server = redis_server_with("tls-auth-clients yes", tls_files.contents(), is_tls=True)
    url, ca = f"redis://127.0.0.1:{server.tls_port}", str(tls_files.authority)

    await reach(
        role,
        url,
        tls_ca=ca,
        tls_cert=str(tls_files.client_certificate),
        tls_key=str(tls_files.client_key),
    )
    with pytest.raises(RelayError) as caught:
        await reach(role, url, tls_ca=ca)
    assert isinstance(caught.value, AuthenticationRefused | Outage)


@pytest.mark.shows("sink:redis.tls", "sink:redis.tls_insecure")
@pytest.mark.shows("source:redis.tls", "source:redis.tls_insecure")
@ROLES
async def test_an_unknown_certificate_is_refused_unless_any_will_do(
    redis_server_with: ServerWith,
    tls_files: TlsFiles,
    role: str,
) -> None:
    server = redis_server_with("", tls_files.contents(), is_tls=True)
    url = f"redis://127.0.0.1:{server.tls_port}"

    with pytest.raises(ConfigurationError, match="not trusted"):
        await reach(role, url, tls=True)
    await reach(role, url, tls_insecure=True)


async def test_tls_is_never_silently_left_out(
    redis_server: RedisServer,
) -> None:
    for url, keys in (
        (redis_server.url, {"tls": True}),
        (redis_server.url.replace("redis://", "rediss://"), {}),
    ):
        with pytest.raises(RelayError) as caught:
            await reach("sink", url, **keys)
        assert isinstance(caught.value, ConfigurationError | Outage)


async def test_tls_files_that_do_not_exist_are_a_configuration_error(
    redis_server: RedisServer,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigurationError, match="TLS files"):
        await reach("sink", redis_server.url, tls_ca=str(tmp_path / "absent.pem"))


@pytest.mark.shows("sink:redis.url", "source:redis.url")
@ROLES
async def test_a_server_that_is_away_is_an_outage_that_names_it_on_one_line(role: str) -> None:
    port = free_port()

    for url in (f"redis://:hunter2@127.0.0.1:{port}", "redis://:hunter2@nowhere.invalid:7"):
        with pytest.raises(Outage, match=r"127\.0\.0\.1|nowhere\.invalid") as caught:
            await reach(role, url)
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.shows("sink:redis.db", "source:redis.db")
@ROLES
async def test_a_database_has_streams_of_its_own_and_one_that_is_not_there_is_said(
    redis_server: RedisServer,
    role: str,
) -> None:
    broker = Broker(redis_server, STREAM)
    elsewhere = f"{redis_server.url}/3"
    await broker.drop()

    await reach(role, redis_server.url, db=3)

    assert not await broker.ask("EXISTS", STREAM)
    await reach(role, elsewhere)
    with pytest.raises(ConfigurationError, match="out of range"):
        await reach(role, redis_server.url, db=99)


@pytest.mark.shows("sink:redis.timeout_ms", "source:redis.timeout_ms")
@ROLES
async def test_a_server_that_never_answers_is_given_up_in_time(role: str) -> None:
    is_closed = asyncio.Event()

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            pass
        writer.close()
        is_closed.set()

    server = await asyncio.start_server(be_silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    started = time.monotonic()

    with pytest.raises(Outage):
        await reach(role, f"redis://127.0.0.1:{port}", timeout_ms=200)

    assert time.monotonic() - started < 3
    async with asyncio.timeout(5):
        await is_closed.wait()
    server.close()
    await server.wait_closed()
