"""Fixtures of the Kafka broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.servers.finding import LOOPBACK, ServerLedger, ServerMissing, leave_out
from tests.servers.kafka import VERSION, KafkaCluster, KafkaServer, find_kafka
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles


@pytest.fixture(scope="session")
def kafka_server(server_ledger: ServerLedger, tls_files: TlsFiles) -> Iterator[KafkaServer]:
    """One broker, shared by the session, with a listener for each way to connect.

    A test uses topics and groups of its own; one that stops the broker starts it again.
    """
    try:
        server = find_kafka(tls_files)
    except ServerMissing as missing:
        server_ledger.missing["kafka"] = str(missing)
        leave_out(f"kafka: {missing}")
    server_ledger.found["kafka"] = f"Kafka {server.version} ({server.origin})"
    yield server
    server.control.close()


@pytest.fixture(scope="module")
def kafka_cluster(server_ledger: ServerLedger, tls_files: TlsFiles) -> Iterator[KafkaCluster]:
    """Three brokers of the module's own."""
    try:
        cluster = KafkaCluster(tls_files)
    except ServerMissing as missing:
        server_ledger.missing["kafka, three brokers"] = str(missing)
        leave_out(f"kafka: {missing}")
    try:
        cluster.start()
        server_ledger.found["kafka, three brokers"] = f"Kafka {VERSION} (local)"
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
async def kafka_proxy(kafka_server: KafkaServer) -> AsyncIterator[TcpProxy]:
    """A proxy in front of the broker, also for the address by which the broker names itself."""
    kafka_server.at("PROXIED")
    proxy = TcpProxy(LOOPBACK, kafka_server.ports["PROXIED"], kafka_server.proxied_port)
    await proxy.start()
    yield proxy
    await proxy.aclose()
