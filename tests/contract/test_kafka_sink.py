"""The Kafka sink under the contract, against a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

import pytest

from relay.backends.kafka import KafkaSink
from relay.contracts import Sink
from relay.message import RelayMessage
from tests.contract.evidence import until
from tests.contract.kafka_broker import Broker, KafkaHarness, login, new_name, sink_of
from tests.contract.sink_contract import SinkContract, SinkHarness
from tests.servers.kafka import KafkaServer
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles

LIMIT_BYTES = 100_000
TOPICS = ("orders.insert", "orders.upsert")


class KafkaSinkHarness(KafkaHarness, SinkHarness):
    def make(self) -> KafkaSink:
        return sink_of(self.brokers, self.broker.topic)

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        return await until(self._all, at_least)

    async def _all(self) -> Sequence[RelayMessage]:
        return await self.broker.restored(self.broker.topic, *TOPICS)

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b"not JSON", subject="orders.insert")

    def oversize(self, dedup_key: str) -> RelayMessage:
        body = b'"%s"' % (b"x" * LIMIT_BYTES)
        return RelayMessage(dedup_key=dedup_key, payload=body, subject="orders.insert")

    async def make_tls(self, *, trusted: bool) -> Sink:
        return sink_of(self.broker.server.at("TLS"), self.broker.topic, **self.tls(trusted=trusted))

    async def make_unauthorized(self) -> Sink:
        server = self.broker.server
        return sink_of(server.at("SASL"), self.broker.topic, **login("wrong"))


class TestKafkaSink(SinkContract):
    backend = "kafka"
    lacks: ClassVar[dict[str, str]] = {
        "deduplication": "a topic holds what it is sent; consumers deduplicate by the header",
    }

    @pytest.fixture
    async def harness(
        self, kafka_server: KafkaServer, kafka_proxy: TcpProxy, tls_files: TlsFiles
    ) -> AsyncIterator[KafkaSinkHarness]:
        broker = Broker(kafka_server, new_name())
        limit = {"max.message.bytes": str(LIMIT_BYTES)}
        await broker.create(broker.topic, *TOPICS, configuration=limit)
        yield KafkaSinkHarness(broker, kafka_proxy, tls_files)
        await broker.drop(broker.topic, *TOPICS)
