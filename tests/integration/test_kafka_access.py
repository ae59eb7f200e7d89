"""How the Kafka backends get in: addresses, TLS, users, and what is said where they do not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from relay.backends.kafka import KafkaSink, KafkaSource
from relay.backends.kafka.options import KafkaSinkOptions
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    NotConnected,
    RelayError,
    TimedOut,
)
from relay.message import RelayMessage
from relay.options import declared_keys
from relay.pipeline_config import with_profile
from tests.contract.kafka_broker import Broker, login, new_name, sink_of, source_of
from tests.contract.surroundings import backend_context
from tests.servers.finding import LOOPBACK
from tests.servers.kafka import KafkaServer
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles

BOUND_S = 30.0


@pytest.fixture
async def broker(kafka_server: KafkaServer) -> AsyncIterator[Broker]:
    broker = Broker(kafka_server)
    await broker.create()
    yield broker
    await broker.drop()


async def is_let_in(brokers: str, topic: str, **keys: Any) -> bool:
    """Whether a sink and a source are both served; fails where only one of them is."""
    served = [
        await _is_connected(sink_of(brokers, topic, **keys)),
        await _is_connected(source_of(brokers, topic, **keys)),
    ]
    assert served[0] == served[1]
    return served[0]


async def _is_connected(one: KafkaSink | KafkaSource) -> bool:
    try:
        async with asyncio.timeout(BOUND_S):
            await one.connect()
    except RelayError:
        return False
    finally:
        await one.aclose()
    return True


async def poll_for_ever(source: KafkaSource) -> None:
    while True:
        await source.poll()


@pytest.mark.shows("sink:kafka.brokers", "source:kafka.brokers")
async def test_one_broker_of_the_list_that_answers_is_enough(broker: Broker) -> None:
    with socket.socket() as silent:
        silent.bind((LOOPBACK, 0))
        dead = f"{LOOPBACK}:{silent.getsockname()[1]}"
        brokers = broker.server.brokers

        assert await is_let_in(f"{dead}, {brokers}", broker.topic)
        assert not await is_let_in(dead, broker.topic)
        with pytest.raises(NotConnected, match=f"connecting to Kafka at {dead}"):
            await sink_of(dead, broker.topic).connect()


async def test_a_host_without_a_name_is_one_line_that_names_it(broker: Broker) -> None:
    with pytest.raises(NotConnected, match=r"connecting to Kafka at nowhere\.invalid:9092"):
        await sink_of("nowhere.invalid", broker.topic).connect()


@pytest.mark.shows("sink:kafka.tls_ca", "source:kafka.tls_ca")
@pytest.mark.shows("sink:kafka.tls_insecure", "source:kafka.tls_insecure")
@pytest.mark.shows("sink:kafka.tls", "source:kafka.tls")
async def test_a_server_is_trusted_by_its_authority_or_not_at_all(
    broker: Broker, tls_files: TlsFiles
) -> None:
    brokers, topic = broker.server.at("TLS"), broker.topic

    assert await is_let_in(brokers, topic, tls_ca=str(tls_files.authority))
    assert await is_let_in(brokers, topic, tls_insecure=True)
    assert not await is_let_in(brokers, topic, tls_ca=str(tls_files.other_authority))
    with pytest.raises(ConfigurationError, match=r"is not trusted.*tls_ca"):
        await sink_of(brokers, topic, tls=True).connect()
    with pytest.raises(NotConnected, match="does the broker want TLS"):
        await sink_of(brokers, topic).connect()


@pytest.mark.shows("sink:kafka.tls_cert", "sink:kafka.tls_key")
@pytest.mark.shows("source:kafka.tls_cert", "source:kafka.tls_key")
async def test_a_server_that_asks_for_a_certificate_is_shown_ours(
    broker: Broker, tls_files: TlsFiles
) -> None:
    brokers, topic = broker.server.at("MTLS"), broker.topic
    authority = str(tls_files.authority)
    own = {"tls_cert": str(tls_files.client_certificate), "tls_key": str(tls_files.client_key)}

    assert await is_let_in(brokers, topic, tls_ca=authority, **own)
    assert not await is_let_in(brokers, topic, tls_ca=authority)
    with pytest.raises(ConfigurationError, match="TLS files can't be used"):
        await sink_of(
            brokers, topic, tls_ca=authority, **{**own, "tls_key": str(tls_files.server_key)}
        ).connect()


@pytest.mark.shows("sink:kafka.sasl_mechanism", "source:kafka.sasl_mechanism")
@pytest.mark.shows("sink:kafka.sasl_username", "source:kafka.sasl_username")
@pytest.mark.shows("sink:kafka.sasl_password", "source:kafka.sasl_password")
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_a_user_logs_in_and_a_wrong_one_is_refused(
    broker: Broker, tls_files: TlsFiles, mechanism: str
) -> None:
    server, topic = broker.server, broker.topic
    authority = str(tls_files.authority)

    assert await is_let_in(server.at("SASL"), topic, **login(mechanism=mechanism))
    assert await is_let_in(
        server.at("SASLTLS"), topic, tls_ca=authority, **login(mechanism=mechanism)
    )
    for wrong in (login("wrong", mechanism), {**login(mechanism=mechanism), "sasl_username": "x"}):
        with pytest.raises(AuthenticationRefused, match="connecting to Kafka at"):
            await sink_of(server.at("SASL"), topic, **wrong).connect()
        with pytest.raises(AuthenticationRefused):
            await source_of(server.at("SASL"), topic, **wrong).connect()
    assert not await is_let_in(server.at("SASL"), topic, request_timeout_ms=2000)


@pytest.mark.shows("sink:kafka.request_timeout_ms", "source:kafka.request_timeout_ms")
async def test_a_broker_that_says_nothing_is_given_up(
    broker: Broker, kafka_proxy: TcpProxy
) -> None:
    keys: dict[str, Any] = {"request_timeout_ms": 700}
    sink = sink_of(kafka_proxy.address, broker.topic, **keys)
    source = source_of(kafka_proxy.address, broker.topic, **keys)
    await sink.connect()
    await source.connect()
    assert not (await sink.publish(broker.numbered(1))).failures

    kafka_proxy.stall()

    async with asyncio.timeout(BOUND_S):
        result = await sink.publish(broker.numbered(3))
        assert [type(failure.error) for failure in result.failures] == [TimedOut] * 3
        with pytest.raises(TimedOut):
            await sink.connect()
        with pytest.raises(TimedOut):
            await poll_for_ever(source)
        assert not await source.is_healthy()
        await sink.aclose()
        await source.aclose()


@pytest.mark.shows("sink:kafka.client", "source:kafka.client")
async def test_settings_of_the_client_library_come_from_a_profile_and_take_effect(
    broker: Broker, kafka_proxy: TcpProxy
) -> None:
    profile = {"type": "kafka", "brokers": kafka_proxy.address, "client": {"max_idle_ms": 200}}
    options = with_profile(
        "sink",
        "kafka",
        {"profile": "main", "topic": broker.topic},
        {"main": profile},
        declared_keys(KafkaSinkOptions),
    )
    sink = KafkaSink.from_options({"type": "kafka", **options}, backend_context())
    await sink.connect()

    # The library hangs up by itself, and the next publish calls again.
    await kafka_proxy.wait_for_connections(0, timeout_s=BOUND_S)
    assert not (await sink.publish(broker.numbered(2))).failures
    await sink.aclose()
    with pytest.raises(ConfigurationError, match=r"source\.client\.max_idle is not a known key"):
        source_of("h", "t", client={"max_idle": 1})
    with pytest.raises(ConfigurationError, match="belongs into a profile"):
        with_profile("sink", "kafka", {"client": {}}, {}, declared_keys(KafkaSinkOptions))


async def test_a_missing_topic_is_one_line_that_says_how_to_make_it_and_is_not_made(
    kafka_server: KafkaServer,
) -> None:
    topic = new_name()
    said = rf"there is no topic '{topic}' at .*kafka-topics\.sh --create --topic {topic}"

    with pytest.raises(DestinationMissing, match=said):
        await sink_of(kafka_server.brokers, topic).connect()
    with pytest.raises(DestinationMissing, match=said):
        await source_of(kafka_server.brokers, topic).connect()
    sink = sink_of(kafka_server.brokers, None, topic_template=topic)
    await sink.connect()
    with pytest.raises(DestinationMissing, match=said):
        await sink.publish([RelayMessage(dedup_key="1", payload=b"{}", subject=topic)])
    await sink.aclose()

    assert topic not in await Broker(kafka_server).topics()


async def test_both_say_what_they_are_connected_to(broker: Broker) -> None:
    sink = sink_of(broker.server.brokers, broker.topic)
    source = source_of(broker.server.brokers, broker.topic)
    await sink.connect()
    await source.connect()

    described, of_source = await sink.describe(), await source.describe()

    assert described["server"] == broker.server.brokers
    assert described["durability"] == "acks all, idempotent"
    assert described[f"topic {broker.topic}"].startswith("1 partitions, max.message.bytes ")
    assert of_source["group"] == broker.topic
    assert of_source["partitions"] == "1 of 1"
    await sink.aclose()
    await source.aclose()
