"""The Redis Streams source under the contract, against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from relay.contracts import Source
from relay.message import RelayMessage
from tests.contract.redis_broker import Broker, RedisHarness, source_of, user_lines
from tests.contract.source_contract import SourceContract, SourceHarness
from tests.servers.proxy import TcpProxy
from tests.servers.redis import RedisServer
from tests.servers.tls import TlsFiles


class RedisSourceHarness(RedisHarness, SourceHarness):
    def __init__(
        self,
        broker: Broker,
        proxy: TcpProxy,
        server_with: Callable[..., RedisServer],
        tls_files: TlsFiles,
    ) -> None:
        super().__init__(broker, proxy)
        self._server_with = server_with
        self._tls_files = tls_files

    def make(self, *, batch_size: int = 100) -> Source:
        return source_of(self.url, self.broker.stream, batch_size=batch_size)

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        await self.broker.feed(messages)

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        for body in bodies:
            await self.broker.put({"payload": body})
        return bodies

    def make_short_lived(self) -> tuple[Source, float]:
        return source_of(self.url, self.broker.stream, claim_idle_ms=1000), 1.0

    async def make_tls(self, *, trusted: bool) -> Source:
        server = self._server_with("", self._tls_files.contents(), is_tls=True)
        files = self._tls_files
        authority = files.authority if trusted else files.other_authority
        return source_of(f"rediss://localhost:{server.tls_port}", "orders", tls_ca=str(authority))

    async def make_unauthorized(self) -> Source:
        server = self._server_with(user_lines("relay", "right", "~* +@all"))
        return source_of(server.url, "orders", username="relay", password="wrong")


class TestRedisSource(SourceContract):
    backend = "redis"

    @pytest.fixture
    async def harness(
        self,
        redis_server: RedisServer,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
        redis_server_with: Callable[..., RedisServer],
        tls_files: TlsFiles,
    ) -> AsyncIterator[RedisSourceHarness]:
        broker = Broker(redis_server, "contract.source")
        await broker.drop()
        proxy = await tcp_proxy(*redis_server.address)
        yield RedisSourceHarness(broker, proxy, redis_server_with, tls_files)
        await broker.drop()
