"""What the tests of the NATS sink and source share: a stream of their own, and looks at it."""

from __future__ import annotations

import asyncio
import inspect
import json
import ssl
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from urllib.parse import urlsplit

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import ConsumerInfo

from relay.backends.nats import NatsSink, NatsSource
from relay.backends.nats.errors import mapped
from relay.errors import MessageUndecodable
from relay.escape import headers_from
from relay.message import RelayMessage
from relay.wire import TITLE, restore
from tests.contract.surroundings import backend_context
from tests.servers.nats import NatsServer
from tests.servers.proxy import TcpProxy

TEMPLATE = "orders.{stream_table}.{op}"


def sink_of(
    url: str, *, ordering: str | None = None, namespace: str = "", **keys: object
) -> NatsSink:
    """A sink with these keys, not connected."""
    options = {"type": "nats", "url": url, "subject_template": TEMPLATE, **keys}
    return NatsSink.from_options(
        options, backend_context(ordering=ordering, dedup_namespace=namespace)
    )


def source_of(
    url: str, *, batch_size: int = 100, batch_bytes: int = 1024 * 1024, **keys: object
) -> NatsSource:
    """A source with these keys, not connected."""
    options = {"type": "nats", "url": url, "subject": "orders.>", **keys}
    context = backend_context(direction="reverse", batch_size=batch_size, batch_bytes=batch_bytes)
    return NatsSource.from_options(options, context)


class Broker:
    """One stream, made and looked at over a connection of its own."""

    def __init__(self, server: NatsServer, stream: str) -> None:
        self.server = server
        self.stream = stream

    async def create(self, **config: object) -> None:
        """Make the stream on ``orders.>``, or with what is given."""
        await self.drop()
        full = {"name": self.stream, "subjects": ["orders.>"], "storage": "file", **config}
        await self._ask(f"STREAM.CREATE.{self.stream}", full)

    async def update(self, **config: object) -> None:
        """Change the stream's configuration to exactly this."""
        full = {"name": self.stream, "subjects": ["orders.>"], "storage": "file", **config}
        await self._ask(f"STREAM.UPDATE.{self.stream}", full)

    async def purge(self) -> None:
        """Remove all messages."""
        await self._ask(f"STREAM.PURGE.{self.stream}", None)

    async def drop(self) -> None:
        """Remove the stream, where it is."""
        with suppress(nats.js.errors.NotFoundError):
            await self._ask(f"STREAM.DELETE.{self.stream}", None)

    async def drop_consumer(self, durable: str) -> None:
        """Remove a consumer."""
        await self._ask(f"CONSUMER.DELETE.{self.stream}.{durable}", None)

    async def create_consumer(self, durable: str, **config: object) -> None:
        """Make a durable consumer with this configuration."""
        await self._ask(
            f"CONSUMER.DURABLE.CREATE.{self.stream}.{durable}",
            {"stream_name": self.stream, "config": {"durable_name": durable, **config}},
        )

    async def consumer(self, durable: str = "pipeline") -> ConsumerInfo:
        """How far a consumer is."""
        client = await self._client()
        try:
            found: ConsumerInfo = await client.jsm().consumer_info(self.stream, durable)
        finally:
            await client.close()
        return found

    async def put(
        self, subject: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        """Store one message as somebody else would."""
        client = await self._client()
        try:
            await client.jetstream().publish(
                subject, body, headers=None if headers is None else dict(headers)
            )
        finally:
            await client.close()

    async def messages(self) -> Sequence[tuple[str, dict[str, str], bytes]]:
        """All stored messages in order: subject, headers as on the wire, body."""
        client = await self._client()
        found: list[tuple[str, dict[str, str], bytes]] = []
        try:
            context = client.jetstream()
            state = (await context.stream_info(self.stream)).state
            if not state.messages:
                return []
            subscription = await context.subscribe(
                "orders.>", stream=self.stream, ordered_consumer=True
            )
            while len(found) < state.messages:
                message = await subscription.next_msg(timeout=10)
                found.append((message.subject, dict(message.headers or {}), message.data))
        finally:
            await client.close()
        return found

    async def restored(self) -> Sequence[RelayMessage]:
        """All stored messages as a consumer of ours gets them."""
        return [restored(*message) for message in await self.messages()]

    async def _client(self) -> Client:
        client = Client()
        await client.connect(self.server.url)
        return client

    async def _ask(self, subject: str, request: object) -> None:
        client = await self._client()
        try:
            body = b"" if request is None else msgspec.json.encode(request)
            answer = json.loads((await client.request(f"$JS.API.{subject}", body, timeout=10)).data)
            if "error" in answer:
                raise nats.js.errors.APIError.from_error(answer["error"])
        finally:
            await client.close()


def restored(subject: str, headers: Mapping[str, str], body: bytes) -> RelayMessage:
    """One stored message of ours; where its body is broken, what its headers say."""
    own = {name: text for name, text in headers.items() if not name.startswith("Nats-")}
    decoded = headers_from(own)
    try:
        message = restore(body, decoded, TITLE)
        assert message is not None
    except MessageUndecodable:
        return RelayMessage(dedup_key=decoded[TITLE.dedup_key], payload=body, subject=subject)
    return msgspec.structs.replace(message, subject=subject)


class NatsHarness:
    """What both harnesses can do to a NATS server, which is reached through a proxy."""

    def __init__(self, broker: Broker, proxy: TcpProxy) -> None:
        self.broker = broker
        self.proxy = proxy

    @property
    def url(self) -> str:
        """The address that leads through the proxy."""
        return self.proxy.url(self.broker.server.url)

    async def cut(self) -> None:
        await self.proxy.cut()

    async def stall(self) -> None:
        self.proxy.stall()

    async def restore(self) -> None:
        await self.proxy.restore()

    async def restart(self) -> None:
        await asyncio.to_thread(self.broker.server.restart)

    def mapping(self) -> AbstractContextManager[object]:
        return mapped("testing")

    def exceptions(self) -> Iterable[BaseException]:
        yield from driver_exceptions()


def driver_exceptions() -> Iterable[Exception]:
    """One instance of every exception class of the client library, TLS and the network."""
    for module in (nats.errors, nats.js.errors):
        for _, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, Exception):
                yield _instance(member)
    yield from (TimeoutError(), ConnectionResetError(), OSError("no route"), EOFError())
    yield from (ssl.SSLError(1, "broken"), ssl.SSLCertVerificationError(1, "unknown"))


def _instance(kind: type[Exception]) -> Exception:
    if not inspect.isfunction(kind.__init__):
        return kind()
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return kind(*("something" for one in parameters if one.default is one.empty))


def port_of(url: str) -> tuple[str, int]:
    """Host and port of a NATS address."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port
