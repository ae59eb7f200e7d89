"""The SQS source under the contract, against a real server, with a standard queue.

moto keeps the order of a standard queue, as long as one receive at a time asks for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

import pytest

from relay.contracts import Source
from relay.message import RelayMessage
from tests.contract.source_contract import SourceContract, SourceHarness
from tests.contract.sqs_broker import (
    Broker,
    SqsHarness,
    broker_of,
    lasting_queue,
    source_of,
)
from tests.servers.proxy import TcpProxy
from tests.servers.sqs import SqsServer
from tests.servers.tls import TlsFiles

CHECKING = {"INITIAL_NO_AUTH_ACTION_COUNT": "0"}

# An answer that is lost on its way hides its messages for this long, and the suite waits 20 s.
VISIBILITY_S = 10


class SqsSourceHarness(SqsHarness, SourceHarness):
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

    @property
    def keeps_order_over_outages(self) -> bool:
        """Messages of an answer that was lost stay hidden for a while."""
        return False

    def make(self, *, batch_size: int = 100) -> Source:
        return source_of(
            self.url,
            batch_size=batch_size,
            visibility_timeout=VISIBILITY_S,
            max_in_flight=1,
            **self.broker.keys,
        )

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        await self.broker.feed(messages)

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        held = [body for body in bodies if is_text_of_sqs(body)]
        await self.broker.put(*(body.decode() for body in held))
        return held

    def make_short_lived(self) -> tuple[Source, float]:
        return source_of(self.url, visibility_timeout=3, **self.broker.keys), 3.0

    async def make_tls(self, *, trusted: bool) -> Source:
        server = self._server_with(tls=self._tls_files)
        files = self._tls_files
        authority = files.authority if trusted else files.other_authority
        url = await lasting_queue(server, tls_ca=str(files.authority))
        return source_of(url, tls_ca=str(authority), **self.broker.keys)

    async def make_unauthorized(self) -> Source:
        server = self._server_with(CHECKING)
        return source_of(f"{server.url}/123456789012/orders", **self.broker.keys)


def is_text_of_sqs(body: bytes) -> bool:
    """Whether a queue takes this body: it is not empty, and every character is one of XML."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return False
    return bool(text) and all(one >= " " or one in "\t\n\r" for one in text)


class TestSqsSource(SourceContract):
    backend = "sqs"

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
    ) -> AsyncIterator[SqsSourceHarness]:
        async with broker_of(sqs_server) as broker:
            proxy = await tcp_proxy(*sqs_server.address)
            yield SqsSourceHarness(broker, proxy, sqs_server_with, tls_files)
