"""The SQS sink under the contract, against a real server, with a FIFO queue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

import pytest

from relay.backends.sqs import SqsSink
from relay.contracts import Sink
from relay.message import RelayMessage
from tests.contract.evidence import until
from tests.contract.sink_contract import SinkContract, SinkHarness
from tests.contract.sqs_broker import Broker, SqsHarness, broker_of, lasting_queue, sink_of
from tests.servers.proxy import TcpProxy
from tests.servers.sqs import SqsServer
from tests.servers.tls import TlsFiles

LIMIT_BYTES = 100_000
CHECKING = {"INITIAL_NO_AUTH_ACTION_COUNT": "0"}


class SqsSinkHarness(SqsHarness, SinkHarness):
    def __init__(
        self,
        broker: Broker,
        proxy: TcpProxy,
        server_with: Callable[..., SqsServer],
        tls_files: TlsFiles,
    ) -> None:
        super().__init__(broker, proxy)
        self._server_with = server_with
        self._tls_files = tls_files

    def make(self, ordering: str = "pipelined") -> SqsSink:
        # Strictly ordered, hundreds of messages of one key take as many calls.
        keys = self.broker.keys
        return sink_of(self.url, ordering=ordering, max_message_bytes=LIMIT_BYTES, **keys)

    def make_strict(self) -> SqsSink:
        return self.make("strict")

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        return await until(self.broker.restored, at_least)

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b"not JSON")

    def oversize(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b'"%s"' % (b"x" * LIMIT_BYTES))

    async def make_tls(self, *, trusted: bool) -> Sink:
        server = self._server_with(tls=self._tls_files)
        files = self._tls_files
        authority = files.authority if trusted else files.other_authority
        url = await lasting_queue(server, tls_ca=str(files.authority))
        return sink_of(url, tls_ca=str(authority), **self.broker.keys)

    async def make_unauthorized(self) -> Sink:
        server = self._server_with(CHECKING)
        return sink_of(f"{server.url}/123456789012/orders", **self.broker.keys)


class TestSqsSink(SinkContract):
    backend = "sqs"
    lacks: ClassVar[Mapping[str, str]] = {
        "deduplication": "a FIFO queue drops repeats of five minutes without saying so, a standard"
        " queue keeps them; consumers deduplicate by Pgtrickle-Dedup-Key",
    }

    shown_as: ClassVar[Mapping[str, str]] = {
        "restart": "the test server keeps its queues in memory: a restart is shown as an outage,"
        " through a proxy that cuts and restores",
    }

    @pytest.fixture
    async def harness(
        self,
        sqs_server: SqsServer,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
        sqs_server_with: Callable[..., SqsServer],
        tls_files: TlsFiles,
    ) -> AsyncIterator[SqsSinkHarness]:
        async with broker_of(sqs_server, is_fifo=True) as broker:
            proxy = await tcp_proxy(*sqs_server.address)
            yield SqsSinkHarness(broker, proxy, sqs_server_with, tls_files)
