"""The RabbitMQ source: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Self

import msgspec
from aiormq.abc import DeliveredMessage

from relay.backends.rabbitmq.connection import Connection
from relay.backends.rabbitmq.content import decoded
from relay.backends.rabbitmq.errors import Unreadable
from relay.backends.rabbitmq.options import (
    MAX_PREFETCH,
    RabbitSourceOptions,
    check_name,
    endpoint_of,
)
from relay.context import BackendContext
from relay.contracts import Batch, NothingExpires, sorted_out
from relay.errors import ConfigurationError, NotConnected, TimedOut
from relay.options import parse_options

MAX_WAIT_S = 1.0
_BATCHES_AHEAD = 2
_LEAST_PREFETCH = 1000
# A broker that is behind needs longer each time that we go away with what it has sent.
_MOST_TIMEOUT_S = 300.0
_OFFSET = "x-stream-offset"


class _Position(msgspec.Struct, frozen=True, eq=False):
    """Delivery tags handed out together, without a gap; ``consumer``: who was given them."""

    consumer: _Consumer
    first: int
    last: int

    def tags(self) -> range:
        """All of them."""
        return range(self.first, self.last + 1)


class RabbitSource(NothingExpires):
    """Consumes a queue and acknowledges when told to.

    The broker sends ahead; what waits here is bounded by ``prefetch_count`` and, since that counts
    messages of any size, by two batches of bytes, beyond which nothing more is read.
    """

    def __init__(self, options: RabbitSourceOptions, context: BackendContext) -> None:
        """`from_options` checks what this takes."""
        self._options = options
        self._batch_size = context.batch_size
        self._batch_bytes = context.batch_bytes
        self._prefetch = options.prefetch_count or min(
            MAX_PREFETCH, max(_LEAST_PREFETCH, _BATCHES_AHEAD * context.batch_size)
        )
        self._name = f"pgtrickle-relay {context.pipeline}"
        self._consumer: _Consumer | None = None
        self._timeout_s = options.timeout_ms / 1000
        self._is_released = False
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, RabbitSourceOptions, path="source")
        endpoint_of(parsed, "source")
        check_name(parsed.queue, "source.queue")
        if not parsed.queue:
            raise ConfigurationError("source.queue is empty")
        return cls(parsed, context)

    async def connect(self) -> None:
        """Open again; find or make the queue and begin to consume.

        Raises `DestinationMissing` where the queue is not there, and `Outage` while another
        consumer has it to itself.
        """
        before = self._consumer
        is_careful = before is not None and isinstance(before.connection.loss, Unreadable)
        await self.aclose()
        connection = Connection(
            self._options,
            self._name,
            "source",
            timeout_s=self._timeout_s,
            is_careful=is_careful,
        )
        consumer = _Consumer(connection, self._options, _BATCHES_AHEAD * self._batch_bytes)
        try:
            with self._more_patience_next_time():
                await connection.open(confirms=False)
                await consumer.open(self._prefetch)
        except BaseException:
            await connection.aclose()
            raise
        self._consumer = consumer
        self._is_released = False

    async def describe(self) -> dict[str, str]:
        """The broker and the queue."""
        connection = self._open().connection
        return {
            "server": connection.address,
            "version": connection.version,
            "queue": self._options.queue,
        }

    async def poll(self) -> Batch:
        """What was delivered, at most a batch; waits up to a second for the first message.

        Raises `ConfigurationError` where the queue turns out to be a stream.
        """
        if self._is_released:
            await self.connect()
        consumer = self._open()
        # Where there is something at once, what else arrived gets its turn all the same.
        await asyncio.sleep(0)
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_WAIT_S):
                while not consumer.waiting and not self._is_interrupted:
                    consumer.connection.require()
                    consumer.connection.wake.clear()
                    await consumer.connection.wake.wait()
        consumer.connection.require()
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        await consumer.refuse_stream()
        if not consumer.waiting:
            # Whoever has as much as may be sent ahead can't tell whether there is more.
            has_room = consumer.handed_out < self._prefetch
            return Batch(is_end_of_backlog=not was_cut_short and has_room)
        position, taken = consumer.take(self._batch_size, self._batch_bytes)
        messages, rejected = sorted_out(decoded(one, self._options.queue) for one in taken)
        return Batch(
            messages=messages,
            rejected=rejected,
            position=position,
            checkpoint=f"delivery {position.last}",
        )

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        if self._consumer is not None:
            self._consumer.connection.wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Acknowledge every message of the batch, and see that the broker has taken it in."""
        consumer, position = self._open(), batch.position
        if not isinstance(position, _Position):
            return
        if position.consumer is not consumer:
            raise NotConnected("this batch was handed out before the source was opened again")
        with self._more_patience_next_time():
            await consumer.acknowledge(position)
        self._timeout_s = self._options.timeout_ms / 1000

    async def reject(self, batch: Batch) -> None:
        """Release everything that is not acknowledged, in order: the next poll opens again.

        Another consumer of the queue may have it at once.
        """
        position, consumer = batch.position, self._consumer
        if isinstance(position, _Position) and position.consumer is consumer:
            await self.aclose()
            self._is_released = True

    async def lag(self) -> int | None:
        """What is ready in the queue, and what was delivered here and is not acknowledged."""
        consumer = self._open()
        ready = await consumer.connection.ask("ready", consumer.ready)
        return None if ready is None else ready + len(consumer.waiting) + consumer.handed_out

    async def is_healthy(self) -> bool:
        """True when the broker answers within seconds."""
        return self._consumer is not None and await self._consumer.connection.is_healthy()

    async def aclose(self) -> None:
        """Close, upon which the broker requeues everything that is not acknowledged."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.connection.aclose()

    @contextmanager
    def _more_patience_next_time(self) -> Iterator[None]:
        """Double the time for an answer that did not come in time, until an acknowledgement has.

        Else a broker that needs longer would be sent its messages back for ever.
        """
        try:
            yield
        except TimedOut:
            self._timeout_s = min(2 * self._timeout_s, _MOST_TIMEOUT_S)
            raise

    def _open(self) -> _Consumer:
        if self._consumer is None:
            raise NotConnected("the rabbitmq source is not connected")
        self._consumer.connection.require()
        return self._consumer


class _Consumer:
    """What one connection has delivered. The next one has its own: tags begin again at 1.

    ``waiting``: not handed out yet. ``unacknowledged``: handed out, in order.
    """

    def __init__(
        self, connection: Connection, options: RabbitSourceOptions, most_bytes: int
    ) -> None:
        self.connection = connection
        self.unacknowledged: deque[_Position] = deque()
        self.waiting: deque[DeliveredMessage] = deque()
        self._waiting_bytes = 0
        self._most_bytes = most_bytes
        self._options = options
        self._queue = options.queue
        self._is_behind = False
        self._is_no_stream = False

    async def open(self, prefetch: int) -> None:
        """Find or make the queue and begin to consume."""
        connection, options = self.connection, self._options
        channel = connection.channel
        looking = channel.queue_declare(
            self._queue, passive=not options.declare_queue, durable=True
        )
        doing = f"looking for the queue {self._queue!r} on {connection.address}"
        self._is_behind = bool((await connection.call(doing, looking)).message_count)
        connection.doing = f"consuming the queue {self._queue!r}"
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled)
        await connection.call(connection.doing, channel.basic_qos(prefetch_count=prefetch))
        consuming = channel.basic_consume(
            self._queue, self._on_delivered, exclusive=options.exclusive
        )
        await connection.call(connection.doing, consuming)

    @property
    def handed_out(self) -> int:
        """How many messages are handed out and not acknowledged."""
        return sum(len(position.tags()) for position in self.unacknowledged)

    async def ready(self) -> int:
        """How many messages the queue has that were not delivered to anybody."""
        connection, doing = self.connection, f"asking what {self._queue!r} holds"
        # A refusal costs the channel.
        other = await connection.new_channel(confirms=False, is_bounded=False)
        try:
            declaring = other.queue_declare(self._queue, passive=True)
            declared = await connection.call(doing, declaring, is_bounded=False)
            return declared.message_count or 0
        finally:
            await connection.call(doing, other.close(), is_bounded=False)

    def take(self, most: int, most_bytes: int) -> tuple[_Position, list[DeliveredMessage]]:
        """Hand out so many messages, or so many bytes and the message that reaches them."""
        taken: list[DeliveredMessage] = []
        size = 0
        while self.waiting and len(taken) < most and size < most_bytes:
            size += len(self.waiting[0].body)
            taken.append(self.waiting.popleft())
        self._waiting_bytes -= size
        if self._waiting_bytes <= self._most_bytes // 2:
            self.connection.hold(is_held=False)
        position = _Position(self, taken[0].delivery_tag or 0, taken[-1].delivery_tag or 0)
        self.unacknowledged.append(position)
        return position, taken

    async def acknowledge(self, position: _Position) -> None:
        """Return when the broker has taken it in."""
        if position in self.unacknowledged:
            is_first = self.unacknowledged[0] is position
            self.unacknowledged.remove(position)
            tags = [position.last] if is_first else position.tags()
            doing = f"acknowledging messages of {self._queue!r}"
            await self.connection.call(doing, self._acknowledge(tags, is_all=is_first))

    async def refuse_stream(self) -> None:
        """Raise `ConfigurationError` where the queue is a stream.

        There an acknowledgement moves nothing, and a new consumer begins at the end. A stream's
        messages say so in a header, which somebody may have moved to a queue with them; old ones
        are not delivered at all. The broker then tells: only a stream can be consumed from an
        offset (https://www.rabbitmq.com/docs/streams#consuming).
        """
        is_suspect = self._is_behind and not self.unacknowledged
        if self.waiting:
            self._is_behind = False
            is_suspect = _OFFSET in (self.waiting[0].header.properties.headers or {})
        if self._is_no_stream or not is_suspect:
            return
        connection, doing = self.connection, f"asking what {self._queue!r} is"
        other = await connection.new_channel(confirms=False)
        await connection.call(doing, other.basic_qos(prefetch_count=1))
        consuming = other.basic_consume(
            self._queue, self._on_delivered, arguments={_OFFSET: "next"}
        )
        try:
            await connection.call(doing, consuming)
        except ConfigurationError as refusal:
            self._is_no_stream = _OFFSET in str(refusal)
        if not self._is_no_stream:
            raise ConfigurationError(
                f"the queue {self._queue!r} is a stream, whose consumers keep their own positions",
                remedy="bind a classic or a quorum queue to the exchange, and consume that",
            )

    async def _acknowledge(self, tags: Iterable[int], *, is_all: bool) -> None:
        channel = self.connection.channel
        for tag in tags:
            await channel.basic_ack(tag, multiple=is_all, wait=False)
        # Its answer comes when the broker has processed all of that.
        await channel.flow(active=True)

    async def _on_delivered(self, message: DeliveredMessage) -> None:
        self.waiting.append(message)
        self._waiting_bytes += len(message.body)
        if self._waiting_bytes > self._most_bytes:
            self.connection.hold(is_held=True)
        self.connection.wake.set()

    def _on_cancelled(self, _: object) -> None:
        gone = "the broker ended the consumer: the queue was deleted, or its node went away"
        self.connection.abort(NotConnected(f"{self.connection.doing}: {gone}"))
