"""The RabbitMQ source under the contract, against a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

import pytest

from relay.contracts import Source
from relay.message import RelayMessage
from tests.contract.rabbitmq_broker import Broker, RabbitHarness, source_of
from tests.contract.source_contract import SourceContract, SourceHarness
from tests.servers.proxy import TcpProxy
from tests.servers.rabbitmq import RabbitServer


class RabbitSourceHarness(RabbitHarness, SourceHarness):
    def make(self, *, batch_size: int = 100) -> Source:
        return source_of(self.url, self.broker.queue, batch_size=batch_size)

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        await self.broker.feed(messages)

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        await self.broker.put_all(bodies)
        return bodies

    async def make_tls(self, *, trusted: bool) -> Source:
        authority = self.authority(trusted=trusted)
        return source_of(self.tls_url, self.broker.queue, tls_ca=authority)

    async def make_unauthorized(self) -> Source:
        return source_of(
            self.broker.server.url, self.broker.queue, username="relay", password="wrong"
        )


class TestRabbitSource(SourceContract):
    backend = "rabbitmq"
    lacks: ClassVar[Mapping[str, str]] = {
        "keep alive": "a delivery stays ours while the channel lives, up to consumer_timeout",
        "stable keys of plain payloads": "without message-id a redelivery can't be told from a new"
        " message; dedup_key_from can name another rule",
    }

    @pytest.fixture
    async def harness(
        self,
        rabbitmq_server: RabbitServer,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
    ) -> AsyncIterator[RabbitSourceHarness]:
        broker = Broker(rabbitmq_server, "contract.source")
        await broker.make()
        yield RabbitSourceHarness(broker, await tcp_proxy(*rabbitmq_server.address))
        await broker.drop()
