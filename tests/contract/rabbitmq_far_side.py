"""What the tests of the RabbitMQ sink and source share: queues of their own, and looks at them.

The far side is looked at with aio-pika, so that nobody judges his own frames.
"""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import datetime

import aio_pika
import pamqp.exceptions
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from pamqp import commands
from pamqp import frame as codec
from pamqp.body import ContentBody
from pamqp.common import FieldTable
from pamqp.header import ContentHeader

from relay.backends.rabbitmq import RabbitSink, RabbitSource
from relay.backends.rabbitmq.connection import connect
from relay.backends.rabbitmq.content import decoded
from relay.backends.rabbitmq.errors import mapped
from relay.backends.rabbitmq.frame import CHANNEL, FRAME_BYTES, Content
from relay.backends.rabbitmq.options import RabbitSinkOptions
from relay.backends.rabbitmq.properties import after, before, field, table
from relay.contracts import Rejected
from relay.message import RelayMessage
from tests.contract.surroundings import backend_context
from tests.servers.proxy import TcpProxy
from tests.servers.rabbitmq import RabbitServer


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


class FarSide:
    """One queue with an exchange in front of it that gives it everything."""

    def __init__(self, server: RabbitServer, name: str) -> None:
        self.server = server
        self.queue = name
        self.exchange = f"{name}.exchange"
        self._seen: list[AbstractIncomingMessage] = []

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
        # Other clients give every message an id.
        set_ = commands.Basic.Properties(
            headers=headers,
            delivery_mode=2,
            **properties,  # type: ignore[arg-type]  # passed on as they came
        )
        begin = commands.Basic.Publish(routing_key=queue or self.queue, mandatory=True)
        options = RabbitSinkOptions(type="rabbitmq", url=self.server.url)
        connection = await connect(options, name="the far side", path="sink")
        try:
            await connection.call(commands.Tx.Select(), commands.Tx.SelectOk, "feeding")
            for body in bodies:
                most = connection.frame_max - FRAME_BYTES
                parts = [body[start : start + most] for start in range(0, len(body), most)]
                head = ContentHeader(body_size=len(body), properties=set_)
                frames = (begin, head, *map(ContentBody, parts))
                connection.write(b"".join(codec.marshal(one, CHANNEL) for one in frames))
            await connection.call(commands.Tx.Commit(), commands.Tx.CommitOk, "feeding")
        finally:
            await connection.aclose()

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
        async with self.channel() as channel:
            declared = await channel.get_queue(queue or self.queue)
            while True:
                message = await declared.get(no_ack=True, fail=False)
                if message is None:
                    return list(self._seen)
                self._seen.append(message)

    async def restored(self) -> Sequence[RelayMessage]:
        """All of them as a consumer of ours gets them; broken ones by what their headers say."""
        found = [decoded(_content(message), self.queue) for message in await self.taken()]
        return [one.message if isinstance(one, Rejected) else one for one in found]


class RabbitHarness:
    """What both harnesses can do to a node, which is reached through a proxy."""

    def __init__(self, far_side: FarSide, proxy: TcpProxy) -> None:
        self.far_side = far_side
        self.proxy = proxy

    @property
    def url(self) -> str:
        """The address that leads through the proxy."""
        return self.proxy.url(self.far_side.server.url)

    @property
    def tls_url(self) -> str:
        """The address of the TLS listener."""
        return f"amqps://localhost:{self.far_side.server.tls_port}"

    def authority(self, *, trusted: bool) -> str:
        """The file of the authority that signed the node's certificate, or of another one."""
        files = self.far_side.server.tls_files
        assert files is not None
        return str(files.authority if trusted else files.other_authority)

    async def cut(self) -> None:
        await self.proxy.cut()

    async def restore(self) -> None:
        await self.proxy.restore()

    async def restart(self) -> None:
        await asyncio.to_thread(self.far_side.server.restart)

    def mapping(self) -> AbstractContextManager[object]:
        return mapped("testing")

    def exceptions(self) -> Iterable[BaseException]:
        yield from driver_exceptions()


def driver_exceptions() -> Iterable[Exception]:
    """One instance of every exception class of the codec, TLS and the network."""
    for _, member in inspect.getmembers(pamqp.exceptions, inspect.isclass):
        if issubclass(member, Exception):
            yield member("something", "broken")
    yield from (TimeoutError(), ConnectionResetError(), OSError("no route"), EOFError())
    yield from (ssl.SSLError(1, "broken"), ssl.SSLCertVerificationError(1, "unknown"))


def _content(message: AbstractIncomingMessage) -> Content:
    """A message that another client took, as if it had come to us."""
    fields = b"".join(
        field(name.encode(), value if isinstance(value, bytes) else str(value).encode())
        for name, value in message.headers.items()
    )
    properties = (
        before(message.content_type or "")
        + table(fields)
        + after((message.message_id or "").encode())
    )
    return Content(
        tag=1,
        exchange=message.exchange or "",
        routing_key=message.routing_key or "",
        properties=properties,
        body=message.body,
    )
