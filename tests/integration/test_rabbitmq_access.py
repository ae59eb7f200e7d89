"""Who we are to a RabbitMQ broker: users, virtual hosts, permissions, certificates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    Outage,
    RelayError,
)
from tests.contract.evidence import numbered
from tests.contract.rabbitmq_broker import Broker, sink_of, source_of
from tests.servers.finding import free_port
from tests.servers.rabbitmq import USERS, RabbitServer
from tests.servers.tls import TlsFiles, write_tls_files

ROLES = pytest.mark.parametrize("role", ["sink", "source"])
NAME = "access"


@pytest.fixture
async def broker(rabbitmq_server: RabbitServer) -> AsyncIterator[Broker]:
    broker = Broker(rabbitmq_server, NAME)
    await broker.make()
    yield broker
    await broker.drop()


@pytest.fixture
def files(rabbitmq_server: RabbitServer) -> TlsFiles:
    assert rabbitmq_server.tls_files is not None
    return rabbitmq_server.tls_files


async def reach(role: str, url: str, **keys: str | int | bool) -> None:
    """Connect, publish or consume, and close. Raises what the sink or the source raises."""
    if role == "sink":
        sink = sink_of(url, f"{NAME}.exchange", **keys)
        try:
            await sink.connect()
            result = await sink.publish(numbered(1))
            if result.failures:
                raise result.failures[0].error
        finally:
            await sink.aclose()
    else:
        source = source_of(url, NAME, **keys)
        source.interrupt()
        try:
            await source.connect()
            await source.poll()
        finally:
            await source.aclose()


def with_user(url: str, user: str, password: str) -> str:
    return url.replace("//", f"//{quote(user)}:{quote(password, safe='')}@")


@pytest.mark.shows(
    "sink:rabbitmq.username",
    "sink:rabbitmq.password",
    "source:rabbitmq.username",
    "source:rabbitmq.password",
)
@ROLES
async def test_user_and_password_are_accepted_or_refused(broker: Broker, role: str) -> None:
    url, (password, _) = broker.server.url, USERS["relay"]

    await reach(role, url, username="relay", password=password)
    await reach(role, with_user(url, "relay", password))
    for user in ("relay", "nobody"):
        with pytest.raises(AuthenticationRefused, match="correct username and password") as caught:
            await reach(role, url, username=user, password="wrong-one")
        assert "wrong-one" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.shows("sink:rabbitmq.vhost", "source:rabbitmq.vhost")
@ROLES
async def test_a_virtual_host_has_exchanges_and_queues_of_its_own(
    broker: Broker, role: str
) -> None:
    url = broker.server.url

    for keys, address in (({"vhost": "other/place"}, url), ({}, f"{url}/other%2Fplace")):
        with pytest.raises(DestinationMissing, match="in vhost 'other/place'"):
            await reach(role, address, **keys)
    await reach(role, url, vhost="/")
    await reach(role, f"{url}/%2F")


@ROLES
async def test_a_virtual_host_that_is_missing_or_closed_to_the_user_is_said_with_the_remedy(
    broker: Broker, role: str
) -> None:
    with pytest.raises(DestinationMissing, match="rabbitmqctl add_vhost"):
        await reach(role, broker.server.url, vhost="nowhere")
    with pytest.raises(AuthenticationRefused, match="rabbitmqctl set_permissions"):
        await reach(role, broker.server.url, username="stranger", password="p")


async def test_the_permissions_that_are_documented_are_all_that_a_user_needs(
    broker: Broker,
) -> None:
    url = broker.server.url

    await reach("sink", url, username="writer", password="p")
    await reach("source", url, username="reader", password="p")


@pytest.mark.parametrize("role, user", [("sink", "reader"), ("source", "writer")])
async def test_a_missing_permission_is_named(broker: Broker, role: str, user: str) -> None:
    with pytest.raises(AuthenticationRefused, match="rabbitmqctl set_permissions") as caught:
        await reach(role, broker.server.url, username=user, password="p")

    assert NAME in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_what_may_not_be_made_is_an_error_that_names_the_permission(
    rabbitmq_server: RabbitServer,
) -> None:
    url = rabbitmq_server.url
    sink = sink_of(url, "new", username="modest", password="p", declare_exchange=True)
    source = source_of(url, "new", username="modest", password="p", declare_queue=True)

    for connect in (sink.connect, source.connect):
        with pytest.raises(AuthenticationRefused, match="rabbitmqctl set_permissions"):
            await connect()


@pytest.mark.shows("sink:rabbitmq.tls_ca", "sink:rabbitmq.tls_cert", "sink:rabbitmq.tls_key")
@pytest.mark.shows("source:rabbitmq.tls_ca", "source:rabbitmq.tls_cert", "source:rabbitmq.tls_key")
@ROLES
async def test_a_client_certificate_logs_in_by_itself_and_a_strange_one_is_refused(
    broker: Broker, files: TlsFiles, tmp_path: Path, role: str
) -> None:
    # 127.0.0.1 is in the server's certificate.
    url, ca = f"amqp://127.0.0.1:{broker.server.tls_port}", str(files.authority)
    ours = {"tls_cert": str(files.client_certificate), "tls_key": str(files.client_key)}
    stranger = write_tls_files(tmp_path)
    theirs = {"tls_cert": str(stranger.client_certificate), "tls_key": str(stranger.client_key)}

    await reach(role, url, tls_ca=ca, **ours)
    await reach(role, url, tls_ca=ca, **ours, username="guest", password="guest")
    with pytest.raises(RelayError) as caught:
        await reach(role, url, tls_ca=ca, **theirs)
    # TLS 1.3 lets the server refuse after the handshake: what is heard of it is up to the network.
    assert isinstance(caught.value, AuthenticationRefused | Outage)


@pytest.mark.shows("sink:rabbitmq.tls", "sink:rabbitmq.tls_insecure")
@pytest.mark.shows("source:rabbitmq.tls", "source:rabbitmq.tls_insecure")
@ROLES
async def test_an_unknown_certificate_is_refused_unless_any_will_do(
    broker: Broker, role: str
) -> None:
    url = f"amqp://127.0.0.1:{broker.server.tls_port}"

    for address, keys in ((url, {"tls": True}), (url.replace("amqp", "amqps"), {})):
        with pytest.raises(ConfigurationError, match="not trusted"):
            await reach(role, address, **keys)
    await reach(role, url, tls_insecure=True)


async def test_tls_is_never_silently_left_out(broker: Broker) -> None:
    server = broker.server
    for url in (server.url.replace("amqp://", "amqps://"), f"amqp://127.0.0.1:{server.tls_port}"):
        with pytest.raises(RelayError) as caught:
            await reach("sink", url)
        assert isinstance(caught.value, ConfigurationError | Outage)


async def test_tls_files_that_do_not_exist_are_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="TLS files"):
        await reach("sink", "amqp://localhost", tls_ca=str(tmp_path / "absent.pem"))


@pytest.mark.shows("sink:rabbitmq.url", "source:rabbitmq.url")
@ROLES
async def test_a_broker_that_is_away_is_an_outage_that_names_it_on_one_line(role: str) -> None:
    port = free_port()

    for host in (f"127.0.0.1:{port}", "nowhere.invalid:7"):
        with pytest.raises(Outage, match=r"127\.0\.0\.1|nowhere\.invalid") as caught:
            await reach(role, f"amqp://me:hunter2@{host}")
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x01\x00\x00"])
async def test_what_speaks_something_else_is_a_configuration_error(answer: bytes) -> None:
    is_closed = asyncio.Event()

    async def misunderstand(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(answer)
        await _closed(writer)
        is_closed.set()

    server = await asyncio.start_server(misunderstand, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    with pytest.raises(ConfigurationError, match="does not speak AMQP 0-9-1"):
        await reach("sink", f"amqp://127.0.0.1:{port}")

    async with asyncio.timeout(30):
        await is_closed.wait()
    server.close()
    await server.wait_closed()


@pytest.mark.shows("sink:rabbitmq.timeout_ms", "source:rabbitmq.timeout_ms")
@ROLES
async def test_a_broker_that_never_answers_is_given_up_in_time(role: str) -> None:
    is_closed = asyncio.Event()

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while await reader.read(4096):
                pass
        await _closed(writer)
        is_closed.set()

    server = await asyncio.start_server(be_silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    started = time.monotonic()

    with pytest.raises(Outage, match="no answer"):
        await reach(role, f"amqp://127.0.0.1:{port}", timeout_ms=200)

    assert time.monotonic() - started < 5
    async with asyncio.timeout(30):
        await is_closed.wait()
    server.close()
    await server.wait_closed()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
