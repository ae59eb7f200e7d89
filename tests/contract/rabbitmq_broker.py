"""What the tests of the RabbitMQ sink and source share: queues of their own, and looks at them."""

from __future__ import annotations

import asyncio
import inspect
import ssl
import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import datetime
from typing import Self

import aio_pika
import aiormq
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aiormq.abc import DeliveredMessage
from pamqp import commands
from pamqp import frame as codec
from pamqp.base import Frame
from pamqp.common import FieldTable
from pamqp.header import ContentHeader, ProtocolHeader

from relay.backends.rabbitmq import RabbitSink, RabbitSource
from relay.backends.rabbitmq.content import decoded
from relay.backends.rabbitmq.errors import of_exception
from relay.contracts import Rejected
from relay.message import RelayMessage
from tests.contract.surroundings import backend_context
from tests.servers.proxy import TcpProxy
from tests.servers.rabbitmq import RabbitServer

FRAME_MAX = 131072
_FRAME_BYTES = 8


def sink_of(
    url: str,
    exchange: str,
    *,
    ordering: str | None = None,
    namespace: str = "",
    **keys: object,
) -> RabbitSink:
    """A sink with these keys, not connected."""
    return RabbitSink.from_options(
        {"type": "rabbitmq", "url": url, "exchange": exchange, **keys},
        backend_context(ordering=ordering, dedup_namespace=namespace),
    )


def source_of(
    url: str,
    queue: str,
    *,
    batch_size: int = 100,
    batch_bytes: int = 1024 * 1024,
    **keys: object,
) -> RabbitSource:
    """A source with these keys, not connected."""
    return RabbitSource.from_options(
        {"type": "rabbitmq", "url": url, "queue": queue, **keys},
        backend_context(direction="reverse", batch_size=batch_size, batch_bytes=batch_bytes),
    )


class Broker:
    """One queue with an exchange in front of it that gives it everything."""

    def __init__(self, server: RabbitServer, name: str) -> None:
        self.server = server
        self.queue = name
        self.exchange = f"{name}.exchange"
        self._seen: list[DeliveredMessage] = []

    @asynccontextmanager
    async def channel(self, *, confirms: bool = True) -> AsyncIterator[AbstractChannel]:
        """A channel of a connection of its own."""
        connection = await aio_pika.connect(self.server.url, heartbeat=0)
        try:
            yield await connection.channel(publisher_confirms=confirms)
        finally:
            await connection.close()

    async def make(self, arguments: FieldTable | None = None) -> None:
        """Begin with an empty durable queue, bound to its topic exchange with ``#``."""
        await self.drop()
        async with self.channel() as channel:
            exchange = await channel.declare_exchange(
                self.exchange, aio_pika.ExchangeType.TOPIC, durable=True
            )
            queue = await channel.declare_queue(self.queue, durable=True, arguments=arguments)
            await queue.bind(exchange, "#")

    async def drop(self) -> None:
        """Remove queue and exchange, with whoever still consumes."""
        self._seen.clear()
        async with self.channel() as channel:
            await channel.queue_delete(self.queue)
            await channel.exchange_delete(self.exchange)

    async def put(
        self,
        body: bytes,
        *,
        queue: str | None = None,
        headers: FieldTable | None = None,
        **properties: str | datetime | None,
    ) -> None:
        """Put one message there as somebody else would, with no property but these."""
        await self.put_all([body], queue=queue, headers=headers, **properties)

    async def put_all(
        self,
        bodies: Sequence[bytes],
        *,
        queue: str | None = None,
        headers: FieldTable | None = None,
        **properties: str | datetime | None,
    ) -> None:
        """Put several there, in order."""
        # The client gives every message an id.
        set_ = commands.Basic.Properties(
            headers=headers,
            delivery_mode=2,
            **properties,  # type: ignore[arg-type]  # passed on as they came
        )
        await self.put_raw([(set_.marshal(), body) for body in bodies], queue=queue or self.queue)

    async def put_raw(
        self, messages: Sequence[tuple[bytes, bytes]], *, queue: str, exchange: bytes = b""
    ) -> None:
        """Put messages there with properties as they are on the wire, as none sends them."""
        async with _Stranger(self.server) as stranger:
            await stranger.ask(commands.Tx.Select())
            for properties, body in messages:
                stranger.publish(exchange, queue.encode("latin-1"), properties, body)
            await stranger.ask(commands.Tx.Commit())

    async def feed(self, messages: Sequence[RelayMessage], format_: str = "envelope") -> None:
        """Put messages of ours there, in order."""
        sink = sink_of(self.server.url, self.exchange, format=format_, ordering="pipelined")
        await sink.connect()
        try:
            result = await sink.publish(messages)
            assert not result.failures
        finally:
            await sink.aclose()

    async def depth(self, queue: str | None = None) -> int:
        """How many messages are ready for delivery."""
        async with self.channel() as channel:
            declared = await channel.get_queue(queue or self.queue)
            return declared.declaration_result.message_count or 0

    async def taken(self, queue: str | None = None) -> Sequence[AbstractIncomingMessage]:
        """Everything that ever came into the queue, in order; what is new is taken out of it."""
        await self._take(queue)
        return [aio_pika.IncomingMessage(message, no_ack=True) for message in self._seen]

    async def restored(self) -> Sequence[RelayMessage]:
        """All of them as a consumer of ours gets them; broken ones by what their headers say."""
        await self._take()
        found = [decoded(message, self.queue) for message in self._seen]
        return [one.message if isinstance(one, Rejected) else one for one in found]

    async def _take(self, queue: str | None = None) -> None:
        async with self.channel() as above:
            channel = await above.get_underlay_channel()
            while True:
                message = await channel.basic_get(queue or self.queue, no_ack=True)
                if isinstance(message.delivery, commands.Basic.GetEmpty):
                    return
                self._seen.append(message)


class _Stranger:
    """A publisher that spells its messages itself."""

    def __init__(self, server: RabbitServer) -> None:
        self._server = server

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(*self._server.address)
        self._writer.write(ProtocolHeader().marshal())
        await self._answer()
        await self.ask(commands.Connection.StartOk({}, "PLAIN", "\x00guest\x00guest"), channel=0)
        self._send(commands.Connection.TuneOk(1, FRAME_MAX, 0), channel=0)
        await self.ask(commands.Connection.Open("/"), channel=0)
        await self.ask(commands.Channel.Open())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def ask(self, method: Frame, *, channel: int = 1) -> None:
        """Send a method and wait for its answer."""
        self._send(method, channel)
        await self._answer()

    def publish(self, exchange: bytes, routing_key: bytes, properties: bytes, body: bytes) -> None:
        """Send one message."""
        names = b"".join(bytes((len(name),)) + name for name in (exchange, routing_key))
        self._frame(1, struct.pack(">HHH", 60, 40, 0) + names + b"\x01")
        self._frame(2, struct.pack(">HHQ", 60, 0, len(body)) + properties)
        most = FRAME_MAX - _FRAME_BYTES
        for start in range(0, len(body), most):
            self._frame(3, body[start : start + most])

    def _frame(self, kind: int, payload: bytes) -> None:
        self._writer.write(struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce")

    def _send(self, method: Frame, channel: int) -> None:
        self._writer.write(codec.marshal(method, channel))

    async def _answer(self) -> None:
        head = await self._reader.readexactly(7)
        rest = await self._reader.readexactly(int.from_bytes(head[3:], "big") + 1)
        _, _, answer = codec.unmarshal(head + rest)
        assert not isinstance(answer, commands.Channel.Close | commands.Connection.Close)


class RabbitHarness:
    """What both harnesses can do to a node, which is reached through a proxy."""

    def __init__(self, broker: Broker, proxy: TcpProxy) -> None:
        self.broker = broker
        self.proxy = proxy

    @property
    def url(self) -> str:
        """The address that leads through the proxy."""
        return self.proxy.url(self.broker.server.url)

    @property
    def tls_url(self) -> str:
        """The address of the TLS listener."""
        return f"amqps://localhost:{self.broker.server.tls_port}"

    def authority(self, *, trusted: bool) -> str:
        """The file of the authority that signed the node's certificate, or of another one."""
        files = self.broker.server.tls_files
        assert files is not None
        return str(files.authority if trusted else files.other_authority)

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


@contextmanager
def mapped(doing: str) -> Iterator[None]:
    """Raise what the backend makes of an exception."""
    try:
        yield
    except Exception as error:
        raise of_exception(error, doing) or error from error


def driver_exceptions() -> Iterator[Exception]:
    """One instance of every exception class of the client, TLS and the network."""
    frame = commands.Basic.Return(312, "NO_ROUTE", "", "key")
    returned = DeliveredMessage(frame, ContentHeader(), b"", None)  # type: ignore[arg-type]  # none
    for _, member in inspect.getmembers(aiormq.exceptions, inspect.isclass):
        if member is aiormq.PublishError or member is aiormq.DeliveryError:
            yield member(returned, frame)
        elif issubclass(member, Exception):
            yield member("something", "broken")
    yield from (TimeoutError(), ConnectionResetError(), OSError("no route"), EOFError())
    yield from (ssl.SSLError(1, "broken"), ssl.SSLCertVerificationError(1, "unknown"))
