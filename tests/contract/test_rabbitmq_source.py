"""The RabbitMQ source under the contract, against a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

import pytest

from relay.contracts import Source
from relay.message import RelayMessage
from tests.contract.rabbitmq_far_side import FarSide, RabbitHarness, source_of
from tests.contract.source_contract import SourceContract, SourceHarness
from tests.servers.proxy import TcpProxy
from tests.servers.rabbitmq import RabbitServer


class RabbitSourceHarness(RabbitHarness, SourceHarness):
    def make(self, *, batch_size: int = 100) -> Source:
        return source_of(self.url, self.far_side.queue, batch_size=batch_size)

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        await self.far_side.feed(messages)

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        await self.far_side.put_all(bodies)
        return bodies

    async def make_tls(self, *, trusted: bool) -> Source:
        authority = self.authority(trusted=trusted)
        return source_of(self.tls_url, self.far_side.queue, tls_ca=authority)

    async def make_unauthorized(self) -> Source:
        return source_of(
            self.far_side.server.url, self.far_side.queue, username="relay", password="wrong"
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
        far_side = FarSide(rabbitmq_server, "contract.source")
        await far_side.make()
        yield RabbitSourceHarness(far_side, await tcp_proxy(*rabbitmq_server.address))
        await far_side.drop()
