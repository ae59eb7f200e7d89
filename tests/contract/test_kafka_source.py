"""The Kafka source under the contract, against a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from relay.contracts import Source
from relay.message import RelayMessage
from tests.contract.kafka_broker import Broker, KafkaHarness, login, source_of
from tests.contract.source_contract import SourceContract, SourceHarness
from tests.servers.kafka import KafkaServer
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles


class KafkaSourceHarness(KafkaHarness, SourceHarness):
    def make(self, *, batch_size: int = 100) -> Source:
        return source_of(self.brokers, self.broker.topic, batch_size=batch_size)

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        await self.broker.feed(messages)

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        await self.broker.put_all(bodies)
        return bodies

    def make_short_lived(self) -> tuple[Source, float]:
        source = source_of(self.brokers, self.broker.topic, session_timeout_ms=2000)
        return source, 2.0

    async def make_tls(self, *, trusted: bool) -> Source:
        return source_of(
            self.broker.server.at("TLS"), self.broker.topic, **self.tls(trusted=trusted)
        )

    async def make_unauthorized(self) -> Source:
        return source_of(self.broker.server.at("SASL"), self.broker.topic, **login("wrong"))


class TestKafkaSource(SourceContract):
    backend = "kafka"

    @pytest.fixture
    async def harness(
        self, kafka_server: KafkaServer, kafka_proxy: TcpProxy, tls_files: TlsFiles
    ) -> AsyncIterator[KafkaSourceHarness]:
        broker = Broker(kafka_server)
        await broker.create()
        yield KafkaSourceHarness(broker, kafka_proxy, tls_files)
        await broker.drop()
