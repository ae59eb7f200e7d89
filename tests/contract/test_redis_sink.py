"""The Redis Streams sink under the contract, against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

import pytest

from relay.backends.redis import RedisSink
from relay.contracts import Sink
from relay.message import RelayMessage
from tests.contract.evidence import until
from tests.contract.redis_broker import Broker, RedisHarness, sink_of, user_lines
from tests.contract.sink_contract import SinkContract, SinkHarness
from tests.servers.proxy import TcpProxy
from tests.servers.redis import RedisServer
from tests.servers.tls import TlsFiles

LIMIT_BYTES = 1024 * 1024


class RedisSinkHarness(RedisHarness, SinkHarness):
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

    def make(self) -> RedisSink:
        return sink_of(self.url, self.broker.stream, max_message_bytes=LIMIT_BYTES)

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        return await until(self._all, at_least)

    async def _all(self) -> Sequence[RelayMessage]:
        return [*await self.broker.restored(), *await self.broker.restored("orders.upsert")]

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b"not JSON", subject="orders.insert")

    def oversize(self, dedup_key: str) -> RelayMessage:
        body = b'"%s"' % (b"x" * LIMIT_BYTES)
        return RelayMessage(dedup_key=dedup_key, payload=body, subject="orders.insert")

    async def make_tls(self, *, trusted: bool) -> Sink:
        server = self._server_with("", self._tls_files.contents(), is_tls=True)
        files = self._tls_files
        authority = files.authority if trusted else files.other_authority
        return sink_of(f"rediss://localhost:{server.tls_port}", "orders", tls_ca=str(authority))

    async def make_unauthorized(self) -> Sink:
        server = self._server_with(user_lines("relay", "right", "~* +@all"))
        return sink_of(server.url, "orders", username="relay", password="wrong")


class TestRedisSink(SinkContract):
    backend = "redis"
    lacks: ClassVar[Mapping[str, str]] = {
        "deduplication": "a stream holds what it is sent; consumers deduplicate by pgt_dedup_key",
    }

    @pytest.fixture
    async def harness(
        self,
        redis_server: RedisServer,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
        redis_server_with: Callable[..., RedisServer],
        tls_files: TlsFiles,
    ) -> AsyncIterator[RedisSinkHarness]:
        broker = Broker(redis_server, "orders.insert")
        await broker.drop("orders.upsert")
        proxy = await tcp_proxy(*redis_server.address)
        yield RedisSinkHarness(broker, proxy, redis_server_with, tls_files)
        await broker.drop("orders.upsert")
