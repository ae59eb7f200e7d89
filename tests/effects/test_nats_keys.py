"""Keys of the NATS sink and source that show only against a server, changed one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import nkeys
import pytest
from nats.aio.client import Client

from relay.backends.nats import NatsSource
from relay.errors import AuthenticationRefused, ConfigurationError, DestinationMissing, RelayError
from relay.message import RelayMessage
from tests.contract.evidence import numbered
from tests.contract.nats_broker import Broker, sink_of, source_of
from tests.contract.source_contract import collect
from tests.contract.surroundings import backend_context
from tests.integration.test_nats_access import MUTUAL_TLS, TLS, new_key, operated
from tests.servers.nats import NatsServer
from tests.servers.tls import TlsFiles

ServerWith = Callable[..., NatsServer]


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    broker = Broker(nats_server, "effects")
    await broker.create()
    yield broker
    await broker.drop()


async def is_let_in(server: NatsServer, **keys: str | bool) -> bool:
    """Whether a source gets as far as to miss its stream."""
    options = {"type": "nats", "url": server.url, "subject": "a", "stream": "nowhere", **keys}
    source = NatsSource.from_options(options, backend_context(direction="reverse"))
    try:
        await source.connect()
    except DestinationMissing:
        return True
    except RelayError:
        return False
    finally:
        await source.aclose()
    raise AssertionError("there is no such stream")


# Who the source is


@pytest.mark.shows("source:nats.user", "source:nats.password")
async def test_a_source_logs_in_with_user_and_password(nats_server_with: ServerWith) -> None:
    server = nats_server_with('authorization { user: "relay", password: "s3cret" }')

    assert await is_let_in(server, user="relay", password="s3cret")
    assert not await is_let_in(server, user="relay", password="other")
    assert not await is_let_in(server, user="other", password="s3cret")
    with pytest.raises(AuthenticationRefused):
        await source_of(server.url).connect()


@pytest.mark.shows("source:nats.token")
async def test_a_source_logs_in_with_a_token(nats_server_with: ServerWith) -> None:
    server = nats_server_with('authorization { token: "t0ken" }')

    assert await is_let_in(server, token="t0ken")
    assert not await is_let_in(server, token="other")


@pytest.mark.shows("source:nats.nkey_seed")
async def test_a_source_logs_in_with_an_nkey(nats_server_with: ServerWith) -> None:
    ours, other = (new_key(nkeys.PREFIX_BYTE_USER) for _ in range(2))
    server = nats_server_with(f"authorization {{ users: [ {{ nkey: {ours.public} }} ] }}")

    assert await is_let_in(server, nkey_seed=ours.seed)
    assert not await is_let_in(server, nkey_seed=other.seed)


@pytest.mark.shows("source:nats.creds_file")
async def test_a_source_logs_in_with_a_credentials_file(
    nats_server_with: ServerWith, tmp_path: Path
) -> None:
    ours, other = operated(), operated()
    server = nats_server_with(ours.configuration)
    (tmp_path / "ours.creds").write_text(ours.credentials)
    (tmp_path / "other.creds").write_text(other.credentials)

    assert await is_let_in(server, creds_file=str(tmp_path / "ours.creds"))
    assert not await is_let_in(server, creds_file=str(tmp_path / "other.creds"))


@pytest.mark.shows("source:nats.tls_ca", "source:nats.tls_cert", "source:nats.tls_key")
async def test_a_source_knows_the_server_and_shows_its_certificate(
    nats_server_with: ServerWith, tls_files: TlsFiles
) -> None:
    server = nats_server_with(MUTUAL_TLS, tls_files.contents())
    own = {"tls_cert": str(tls_files.client_certificate), "tls_key": str(tls_files.client_key)}

    assert await is_let_in(server, tls_ca=str(tls_files.authority), **own)
    assert not await is_let_in(server, tls_ca=str(tls_files.other_authority), **own)
    assert not await is_let_in(server, tls_ca=str(tls_files.authority))
    assert not await is_let_in(
        server, tls_ca=str(tls_files.authority), **{**own, "tls_key": str(tls_files.server_key)}
    )


@pytest.mark.shows("source:nats.tls", "source:nats.tls_insecure")
async def test_a_source_demands_tls_and_may_be_told_to_trust_anybody(
    nats_server: NatsServer, nats_server_with: ServerWith, tls_files: TlsFiles
) -> None:
    server = nats_server_with(TLS, tls_files.contents())

    assert await is_let_in(server, tls_insecure=True)
    assert not await is_let_in(server)
    assert await is_let_in(nats_server)
    with pytest.raises(ConfigurationError, match="the server offers none"):
        await source_of(nats_server.url, tls=True).connect()


# What the source takes and the sink sends


@pytest.mark.shows("source:nats.max_deliver")
@pytest.mark.parametrize("max_deliver,comes_again", [(-1, True), (1, False)])
async def test_a_message_is_delivered_so_often(
    broker: Broker, max_deliver: int, comes_again: bool
) -> None:
    await broker.put("orders.theirs", b"{}")
    source = source_of(broker.server.url, max_deliver=max_deliver)
    await source.connect()
    (batch,) = await collect(source, 1)

    await source.reject(batch)

    assert bool((await source.poll()).messages) is comes_again
    await source.aclose()


@pytest.mark.shows("sink:nats.max_in_flight")
@pytest.mark.parametrize("max_in_flight", [5, 20])
async def test_no_more_than_so_many_messages_wait_for_an_acknowledgement(
    nats_server: NatsServer, max_in_flight: int
) -> None:
    # A listener that is no stream: it receives, and acknowledges nothing.
    listener = Client()
    await listener.connect(nats_server.url)
    subscription = await listener.subscribe("silent.>")
    await listener.flush()
    sink = sink_of(
        nats_server.url,
        max_in_flight=max_in_flight,
        ack_timeout_ms=300,
    )
    await sink.connect()

    result = await sink.publish(
        [
            msgspec.structs.replace(message, subject="silent.x")
            for message in numbered(100, keys=100)
        ]
    )
    await listener.flush()

    assert len(result.failures) == 100
    assert subscription.pending_msgs == max_in_flight
    await sink.aclose()
    await listener.close()


@pytest.mark.shows("sink:nats.routing")
async def test_events_of_a_type_go_where_the_routing_says(nats_server: NatsServer) -> None:
    listener = Client()
    await listener.connect(nats_server.url)
    plain, routed = [await listener.subscribe(f"{name}.>") for name in ("plain", "gone")]
    await listener.flush()
    sink = sink_of(
        nats_server.url,
        subject_template="plain.{op}",
        routing={"delete": "gone.{key}"},
        ack_timeout_ms=300,
    )
    messages = [
        RelayMessage(dedup_key="1", payload=b"{}", key="7", op="insert"),
        RelayMessage(dedup_key="2", payload=b"{}", key="7", op="delete"),
    ]
    messages = [msgspec.structs.replace(one, subject=sink.subject_of(one)) for one in messages]
    await sink.connect()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sink.publish(messages[:1]))
        subject = (await plain.next_msg(timeout=5)).subject
    await sink.connect()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sink.publish(messages[1:]))
        subject_of_the_deleted = (await routed.next_msg(timeout=5)).subject

    assert (subject, subject_of_the_deleted) == ("plain.insert", "gone.7")
    await sink.aclose()
    await listener.close()
