"""The RabbitMQ source: see the package for what it promises."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Self

import msgspec
from pamqp import commands

from relay.backends.rabbitmq import frame
from relay.backends.rabbitmq.connection import Connection, connect
from relay.backends.rabbitmq.content import decoded
from relay.backends.rabbitmq.frame import Content
from relay.backends.rabbitmq.options import (
    MAX_PREFETCH,
    RabbitSourceOptions,
    check_at_least_one,
    check_connection,
    check_name,
)
from relay.context import BackendContext
from relay.contracts import Batch, Rejected
from relay.errors import ConfigurationError, NotConnected, RelayError
from relay.message import RelayMessage
from relay.options import parse_options

MAX_WAIT_S = 1.0
_CLOSE_TIMEOUT_S = 2.0
_BATCHES_AHEAD = 4
_LEAST_PREFETCH = 1000


class _Position(msgspec.Struct, frozen=True, eq=False):
    """Delivery tags handed out together, without a gap, and since which `connect`."""

    opening: int
    first: int
    last: int


class RabbitSource:
    """Consumes a queue and acknowledges when told to.

    The broker sends ahead; what waits here is bounded by ``prefetch_count`` and, since that counts
    messages of any size, by four batches of bytes, beyond which nothing more is read.
    """

    def __init__(
        self,
        options: RabbitSourceOptions,
        *,
        batch_size: int,
        batch_bytes: int,
        name: str,
    ) -> None:
        self._options = options
        self._queue = options.queue
        self._batch_size = batch_size
        self._batch_bytes = batch_bytes
        self._prefetch = options.prefetch_count or min(
            MAX_PREFETCH, max(_LEAST_PREFETCH, _BATCHES_AHEAD * batch_size)
        )
        self._name = name
        self._connection: Connection | None = None
        self._consumer = ""
        self._opening = 0
        self._buffer: deque[Content] = deque()
        self._buffered_bytes = 0
        self._out: deque[_Position] = deque()
        self._wake = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, RabbitSourceOptions, path="source")
        check_connection(parsed, "source")
        check_name(parsed.queue, "source.queue")
        if not parsed.queue:
            raise ConfigurationError("source.queue is empty")
        check_at_least_one("source", prefetch_count=parsed.prefetch_count)
        if parsed.prefetch_count is not None and parsed.prefetch_count > MAX_PREFETCH:
            raise ConfigurationError(f"source.prefetch_count must be at most {MAX_PREFETCH}")
        return cls(
            parsed,
            batch_size=context.batch_size,
            batch_bytes=context.batch_bytes,
            name=f"pgtrickle-relay {context.pipeline}",
        )

    @property
    def keep_alive_interval_s(self) -> float | None:
        """Never: what was delivered stays ours while the channel lives."""
        return None

    async def connect(self) -> None:
        """Open anew; find or make the queue and begin to consume.

        Raises `DestinationMissing` where the queue is not there, and `Outage` while another
        consumer has it to itself.
        """
        await self._close()
        connection = await connect(self._options, name=self._name, path="source")
        connection.doing = f"consuming the queue {self._queue!r}"
        connection.on_delivered = self._on_delivered
        connection.on_trouble = self._wake.set
        try:
            await connection.call(
                commands.Queue.Declare(
                    queue=self._queue, passive=not self._options.declare_queue, durable=True
                ),
                commands.Queue.DeclareOk,
                f"looking for the queue {self._queue!r} on {connection.address}",
            )
            await connection.call(
                commands.Basic.Qos(prefetch_count=self._prefetch),
                commands.Basic.QosOk,
                connection.doing,
            )
            await self._consume(connection)
        except BaseException:
            self._forget()
            await connection.aclose()
            raise
        self._opening += 1
        self._connection = connection

    async def describe(self) -> dict[str, str]:
        """The broker and the queue."""
        connection = self._open()
        return {
            "server": connection.address,
            "version": connection.server.get("version", "unknown"),
            "queue": self._queue,
        }

    async def poll(self) -> Batch:
        """What was delivered, at most a batch; waits up to a second for the first message."""
        connection = self._open()
        if not self._consumer:
            await self._consume(connection)
        deadline = time.monotonic() + MAX_WAIT_S
        # Where there is something at once, what else arrived gets its turn all the same.
        await asyncio.sleep(0)
        while True:
            connection.require()
            left_s = deadline - time.monotonic()
            if self._buffer or self._is_interrupted or left_s <= 0:
                break
            self._wake.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
            except TimeoutError:
                break
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        return self._batch(self._taken(connection), was_cut_short=was_cut_short)

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        self._wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Acknowledge every message of the batch, and see that the broker has taken it in."""
        connection = self._open()
        position = batch.position
        if not isinstance(position, _Position):
            return
        if position.opening != self._opening:
            raise NotConnected("this batch was handed out before the source was opened anew")
        if position not in self._out:
            return
        if self._out[0] is position:
            connection.write(frame.acknowledgement(position.last, is_multiple=True))
        else:
            tags = range(position.first, position.last + 1)
            connection.write(
                b"".join(frame.acknowledgement(tag, is_multiple=False) for tag in tags)
            )
        self._out.remove(position)
        await connection.flush(f"acknowledging messages of {self._queue!r}")

    async def keep_alive(self, batch: Batch) -> None:
        """Nothing to do: see `keep_alive_interval_s`."""

    async def reject(self, batch: Batch) -> None:
        """Put back this batch and all that comes after it, so that the order stays.

        The next poll hands it out again; another consumer of the queue may have it at once. A
        later batch that is out is thereby given back too; to acknowledge or reject it does nothing
        more.
        """
        connection = self._open()
        position = batch.position
        if not isinstance(position, _Position) or position not in self._out:
            return
        await self._stop_consuming(connection)
        await self._give_back(connection, position)

    async def is_healthy(self) -> bool:
        """True when the broker answers within seconds."""
        connection = self._connection
        return connection is not None and await connection.is_healthy()

    async def aclose(self) -> None:
        """Put back everything that is not acknowledged, and close."""
        await self._close()

    def _open(self) -> Connection:
        if self._connection is None:
            raise NotConnected("the rabbitmq source is not connected")
        self._connection.require()
        return self._connection

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if connection.loss is None:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    # The broker would do both when the connection ends, but some time after.
                    await self._stop_consuming(connection)
                    await self._give_back(connection, self._out[0] if self._out else None)
        except (RelayError, TimeoutError):
            pass
        finally:
            self._forget()
            await connection.aclose()

    async def _consume(self, connection: Connection) -> None:
        answer = await connection.call(
            commands.Basic.Consume(queue=self._queue, exclusive=self._options.exclusive),
            commands.Basic.ConsumeOk,
            connection.doing,
        )
        self._consumer = answer.consumer_tag or ""

    async def _stop_consuming(self, connection: Connection) -> None:
        """When it returns, nothing more is delivered to us."""
        consumer, self._consumer = self._consumer, ""
        if consumer:
            await connection.call(
                commands.Basic.Cancel(consumer), commands.Basic.CancelOk, connection.doing
            )

    async def _give_back(self, connection: Connection, position: _Position | None) -> None:
        """Put back what was handed out from this position on, and all that waits here."""
        given_back = [content.tag for content in self._buffer]
        while position is not None and self._out and self._out[-1].first >= position.first:
            out = self._out.pop()
            given_back += range(out.first, out.last + 1)
        self._drop_buffer()
        connection.hold(is_held=False)
        if not given_back:
            return
        if self._out:
            connection.write(
                b"".join(frame.giving_back(tag, is_multiple=False) for tag in given_back)
            )
        else:
            connection.write(frame.giving_back(max(given_back), is_multiple=True))
        await connection.flush(f"giving back messages of {self._queue!r}")

    def _forget(self) -> None:
        self._drop_buffer()
        self._out.clear()
        self._consumer = ""

    def _drop_buffer(self) -> None:
        self._buffer.clear()
        self._buffered_bytes = 0

    def _on_delivered(self, content: Content) -> None:
        self._buffer.append(content)
        self._buffered_bytes += len(content.body)
        if (
            self._buffered_bytes > _BATCHES_AHEAD * self._batch_bytes
            and self._connection is not None
        ):
            self._connection.hold(is_held=True)
        self._wake.set()

    def _taken(self, connection: Connection) -> list[Content]:
        taken: list[Content] = []
        size = 0
        while self._buffer and len(taken) < self._batch_size and size < self._batch_bytes:
            content = self._buffer.popleft()
            size += len(content.body)
            taken.append(content)
        self._buffered_bytes -= size
        if self._buffered_bytes <= _BATCHES_AHEAD * self._batch_bytes // 2:
            connection.hold(is_held=False)
        return taken

    def _batch(self, taken: Sequence[Content], *, was_cut_short: bool) -> Batch:
        if not taken:
            # Whoever has as much as may be sent ahead can't tell whether there is more.
            out = sum(position.last - position.first + 1 for position in self._out)
            return Batch(is_end_of_backlog=not was_cut_short and out < self._prefetch)
        messages: list[RelayMessage] = []
        rejected: list[Rejected] = []
        for content in taken:
            one = decoded(content, self._queue)
            if isinstance(one, Rejected):
                rejected.append(one)
            else:
                messages.append(one)
        position = _Position(self._opening, taken[0].tag, taken[-1].tag)
        self._out.append(position)
        return Batch(
            messages=messages,
            rejected=rejected,
            position=position,
            checkpoint=f"delivery {position.last}",
        )
