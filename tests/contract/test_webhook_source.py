"""The webhook source under the contract; its broker is a sender that repeats what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import pytest

from relay.contracts import Source
from relay.message import RelayMessage
from relay.network import listening
from relay.wire import is_json
from tests.contract.source_contract import SourceContract, SourceHarness
from tests.contract.surroundings import backend_context
from tests.contract.webhook_client import (
    PATH,
    ObservedSource,
    Sender,
    listening_exceptions,
    request_of,
)
from tests.servers.finding import LOOPBACK, free_port


class WebhookSourceHarness(SourceHarness):
    def __init__(self, addr: str, sender: Sender, arrivals: asyncio.Event) -> None:
        self._addr = addr
        self._sender = sender
        self._arrivals = arrivals
        self._bodies = 0

    def make(self, *, batch_size: int = 100) -> Source:
        source = ObservedSource.from_options(
            {
                "type": "webhook",
                "listen_addr": self._addr,
                "path": PATH,
                "answer_timeout_ms": 60_000,
            },
            backend_context(direction="reverse", batch_size=batch_size),
        )
        source.arrivals = self._arrivals
        return source

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        for message in messages:
            self._sender.add(*request_of(message))

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        held = [body for body in bodies if body.startswith(b"{") and is_json(body)]
        for body in held:
            self._bodies += 1
            self._sender.add(body, [(b"Idempotency-Key", b"theirs-%d" % self._bodies)])
        return held

    def mapping(self) -> AbstractContextManager[object]:
        return listening("testing", "")

    def exceptions(self) -> Iterable[BaseException]:
        yield from listening_exceptions()


class TestWebhookSource(SourceContract):
    backend = "webhook"
    lacks: ClassVar[Mapping[str, str]] = {
        "reconnect": "senders connect to it, so it has no connection of its own to lose",
        "lag": "what senders still have to send they don't tell",
        "restart": "it is the server; senders repeat what it had not answered",
        "keep alive": "a sender waits as long as it likes and can't be told to wait longer",
        "tls": "it is the server, whose certificate the senders check;"
        " shown in the integration tests",
        "authentication": "the senders are who is refused; shown in the integration tests",
    }

    @pytest.fixture
    async def harness(self) -> AsyncIterator[WebhookSourceHarness]:
        addr = f"{LOOPBACK}:{free_port()}"
        arrivals = asyncio.Event()
        sender = Sender(addr, arrivals)
        sending = asyncio.create_task(sender.run())
        yield WebhookSourceHarness(addr, sender, arrivals)
        sending.cancel()
        await asyncio.wait([sending])
