"""The NATS source under the contract, against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from msgspec import structs

from relay.contracts import Source
from relay.message import RelayMessage
from tests.contract.nats_broker import Broker, NatsHarness, port_of, sink_of, source_of
from tests.contract.source_contract import SourceContract, SourceHarness
from tests.servers.nats import NatsServer
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles

TLS = 'tls { cert_file: "server.pem", key_file: "server.key" }'


class NatsSourceHarness(NatsHarness, SourceHarness):
    def __init__(
        self,
        broker: Broker,
        proxy: TcpProxy,
        server_with: Callable[..., NatsServer],
        tls_files: TlsFiles,
    ) -> None:
        super().__init__(broker, proxy)
        self._server_with = server_with
        self._tls_files = tls_files

    def make(self, *, batch_size: int = 100) -> Source:
        return source_of(self.url, batch_size=batch_size)

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        sink = sink_of(self.broker.server.url)
        await sink.connect()
        try:
            addressed = [
                one if one.subject else structs.replace(one, subject=sink.subject_of(one))
                for one in messages
            ]
            assert not (await sink.publish(addressed)).failures
        finally:
            await sink.aclose()

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        for body in bodies:
            await self.broker.put("orders.theirs", body)
        return bodies

    def make_short_lived(self) -> tuple[Source, float]:
        return source_of(self.url, durable_name="short_lived", ack_wait_seconds=1), 1.0

    async def make_tls(self, *, trusted: bool) -> Source:
        server = self._server_with(TLS, self._tls_files.contents())
        files = self._tls_files
        authority = files.authority if trusted else files.other_authority
        sink = sink_of(server.url, tls_ca=str(files.authority), stream="tls", create_stream=True)
        await sink.connect()
        await sink.aclose()
        return source_of(server.url, tls=True, tls_ca=str(authority))

    async def make_unauthorized(self) -> Source:
        server = self._server_with('authorization { user: "relay", password: "right" }')
        return source_of(server.url, user="relay", password="wrong")


class TestNatsSource(SourceContract):
    backend = "nats"

    @pytest.fixture
    async def harness(
        self,
        nats_server: NatsServer,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
        nats_server_with: Callable[..., NatsServer],
        tls_files: TlsFiles,
    ) -> AsyncIterator[NatsSourceHarness]:
        broker = Broker(nats_server, "contract_source")
        await broker.create()
        proxy = await tcp_proxy(*port_of(nats_server.url))
        yield NatsSourceHarness(broker, proxy, nats_server_with, tls_files)
        await broker.drop()
