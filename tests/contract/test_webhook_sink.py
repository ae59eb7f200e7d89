"""The webhook sink under the contract, as arrays and one by one, against a real server."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import pytest

from relay.backends.webhook import WebhookSink
from relay.backends.webhook.errors import mapped
from relay.backends.webhook.options import WebhookSinkOptions
from relay.contracts import Sink
from relay.message import RelayMessage
from tests.contract.evidence import until
from tests.contract.sink_contract import SinkContract, SinkHarness
from tests.contract.webhook_client import driver_exceptions, host_of, restored, sink_of
from tests.servers.http import OK, HttpServer, Received, Reply
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles

LIMIT_BYTES = WebhookSinkOptions(type="webhook", url="").max_body_bytes
LACKS = {
    "deduplication": "an answer does not tell whether the receiver had the event already;"
    " a receiver that keeps idempotency keys is shown in the integration tests",
    "authentication": "HTTP signs nobody in before a request; a refused request is shown in the"
    " integration tests",
}


def refuse_the_unacceptable(request: Received) -> Reply:
    return Reply(422) if b'"unacceptable"' in request.body else OK


class WebhookSinkHarness(SinkHarness):
    def __init__(
        self,
        server: HttpServer,
        proxy: TcpProxy,
        https_server_with: Callable[..., Awaitable[HttpServer]],
        tls_files: TlsFiles,
        keys: Mapping[str, object],
    ) -> None:
        self._server = server
        self._proxy = proxy
        self._https_server_with = https_server_with
        self._tls_files = tls_files
        self._keys = keys
        server.judge = refuse_the_unacceptable

    def make(self) -> WebhookSink:
        return sink_of(self._proxy.url(self._server.url), **self._keys)

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        async def read() -> Sequence[RelayMessage]:
            return restored(self._server.accepted)

        return await until(read, at_least)

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b'{"unacceptable":true}')

    async def cut(self) -> None:
        await self._proxy.cut()

    async def stall(self) -> None:
        self._proxy.stall()

    async def restore(self) -> None:
        await self._proxy.restore()

    async def restart(self) -> None:
        await self._server.restart()

    def oversize(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b'"%s"' % (b"x" * LIMIT_BYTES))

    async def make_tls(self, *, trusted: bool) -> Sink:
        files = self._tls_files
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(files.server_certificate, files.server_key)
        server = await self._https_server_with(context)
        authority = files.authority if trusted else files.other_authority
        return sink_of(server.url, tls=True, tls_ca=str(authority), **self._keys)

    def mapping(self) -> AbstractContextManager[object]:
        return mapped("testing")

    def exceptions(self) -> Iterable[BaseException]:
        yield from driver_exceptions()


class WebhookSinkContract(SinkContract):
    """The harness of both ways of sending."""

    backend = "webhook"
    lacks: ClassVar[Mapping[str, str]] = LACKS
    keys: ClassVar[Mapping[str, object]] = {}

    @pytest.fixture
    async def harness(
        self,
        http_server: HttpServer,
        tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
        https_server_with: Callable[..., Awaitable[HttpServer]],
        tls_files: TlsFiles,
    ) -> WebhookSinkHarness:
        proxy = await tcp_proxy(*host_of(http_server.url))
        return WebhookSinkHarness(http_server, proxy, https_server_with, tls_files, self.keys)


class TestWebhookSink(WebhookSinkContract):
    """Arrays, the default."""


class TestWebhookSinkOneByOne(WebhookSinkContract):
    """A request for each message; what is compared in order has one key."""

    keys: ClassVar[Mapping[str, object]] = {"batch_mode": False}
