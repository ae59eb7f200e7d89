"""The NATS sink under the contract, against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from relay.backends.nats import NatsSink
from relay.contracts import Sink
from relay.message import RelayMessage
from tests.contract.evidence import until
from tests.contract.nats_broker import Broker, NatsHarness, port_of, sink_of
from tests.contract.sink_contract import SinkContract, SinkHarness
from tests.servers.nats import NatsServer
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles

LIMIT_BYTES = 1024 * 1024
TLS = 'tls { cert_file: "server.pem", key_file: "server.key" }'


class NatsSinkHarness(NatsHarness, SinkHarness):
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

    def make(self) -> NatsSink:
        return sink_of(self.url)

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        return await until(self.broker.restored, at_least)

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b"{}", subject="orders..insert")

    def oversize(self, dedup_key: str) -> RelayMessage:
        body = b'"%s"' % (b"x" * LIMIT_BYTES)
        return RelayMessage(dedup_key=dedup_key, payload=body, subject="orders.insert")

    async def make_tls(self, *, trusted: bool) -> Sink:
        server = self._server_with(TLS, self._tls_files.contents())
        files = self._tls_files
        authority = files.authority if trusted else files.other_authority
        return sink_of(
            server.url, tls=True, tls_ca=str(authority), stream="tls", create_stream=True
        )

    async def make_unauthorized(self) -> Sink:
        server = self._server_with('authorization { user: "relay", password: "right" }')
        return sink_of(server.url, user="relay", password="wrong")


class TestNatsSink(SinkContract):
    backend = "nats"

    @pytest.fixture
    async def harness(
        self,
        nats_server: NatsServer,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
        nats_server_with: Callable[..., NatsServer],
        tls_files: TlsFiles,
    ) -> AsyncIterator[NatsSinkHarness]:
        broker = Broker(nats_server, "contract_sink")
        await broker.create()
        proxy = await tcp_proxy(*port_of(nats_server.url))
        yield NatsSinkHarness(broker, proxy, nats_server_with, tls_files)
        await broker.drop()
