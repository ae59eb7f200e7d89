"""The RabbitMQ sink under the contract, against a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

import pytest

from relay.backends.rabbitmq import RabbitSink
from relay.contracts import Sink
from relay.message import RelayMessage
from tests.contract.evidence import until
from tests.contract.rabbitmq_broker import Broker, RabbitHarness, sink_of
from tests.contract.sink_contract import SinkContract, SinkHarness
from tests.servers.proxy import TcpProxy
from tests.servers.rabbitmq import RabbitServer

LIMIT_BYTES = 1024 * 1024


class RabbitSinkHarness(RabbitHarness, SinkHarness):
    def make(self) -> RabbitSink:
        return sink_of(self.url, self.broker.exchange, max_message_bytes=LIMIT_BYTES)

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        return await until(self.broker.restored, at_least)

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b"not JSON", subject="orders.insert")

    def oversize(self, dedup_key: str) -> RelayMessage:
        body = b'"%s"' % (b"x" * LIMIT_BYTES)
        return RelayMessage(dedup_key=dedup_key, payload=body, subject="orders.insert")

    async def make_tls(self, *, trusted: bool) -> Sink:
        authority = self.authority(trusted=trusted)
        return sink_of(self.tls_url, self.broker.exchange, tls_ca=authority)

    async def make_unauthorized(self) -> Sink:
        return sink_of(
            self.broker.server.url, self.broker.exchange, username="relay", password="wrong"
        )


class TestRabbitSink(SinkContract):
    backend = "rabbitmq"
    lacks: ClassVar[Mapping[str, str]] = {
        "deduplication": "a queue holds what it is sent; consumers deduplicate by message-id",
    }

    @pytest.fixture
    async def harness(
        self,
        rabbitmq_server: RabbitServer,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
    ) -> AsyncIterator[RabbitSinkHarness]:
        broker = Broker(rabbitmq_server, "contract.sink")
        await broker.make()
        yield RabbitSinkHarness(broker, await tcp_proxy(*rabbitmq_server.address))
        await broker.drop()
