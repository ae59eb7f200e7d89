"""The RabbitMQ sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Self

from pamqp import commands

from relay import wire
from relay.backends.rabbitmq import frame, properties
from relay.backends.rabbitmq.connection import Connection, connect
from relay.backends.rabbitmq.content import Encoder, message_id_of
from relay.backends.rabbitmq.errors import SizeRefused
from relay.backends.rabbitmq.options import (
    DEFAULT_EXCHANGE_TYPE,
    DEFAULT_ROUTING_KEY,
    RabbitSinkOptions,
    check_at_least_one,
    check_connection,
    check_name,
)
from relay.backends.rabbitmq.routing_key import check_routing_key, check_template, escape
from relay.context import BackendContext
from relay.contracts import PublishResult
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.flight import Flight
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import Render, compile_routing

ORDERINGS = ("strict", "pipelined")

# https://www.rabbitmq.com/docs/configure, max_message_size: lowered in 4.0.
_LIMIT_BEFORE_4 = 128 * 1024 * 1024
_LIMIT_FROM_4 = 16 * 1024 * 1024
_CHUNK_BYTES = 128 * 1024


class RabbitSink:
    """Publishes to an exchange, many messages at a time, and waits for every confirmation."""

    def __init__(
        self,
        options: RabbitSinkOptions,
        *,
        render: Render,
        encoder: Encoder,
        ordering: str,
        name: str,
    ) -> None:
        self._options = options
        self._render = render
        self._encoder = encoder
        self._is_strict = ordering == "strict"
        self._name = name
        self._confirm_timeout_s = options.confirm_timeout_ms / 1000
        self._begin = lru_cache(maxsize=4096)(self._publish_frame)
        self._limit_bytes = options.max_message_bytes or _LIMIT_FROM_4
        # What a broker has said that it takes; it stays true on the next connection.
        self._refused_above: int | None = None
        self._connection: Connection | None = None
        self._flight: Flight | None = None
        # The broker numbers what is published on a channel: so many before this publish.
        self._published = 0
        # Of this publish, which message has which number, how large it is, and up to where the
        # broker has confirmed all at once.
        self._sent: list[int] = []
        self._sizes: list[int] = []
        self._confirmed = 0
        self._returned = 0
        self._wake = asyncio.Event()

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, RabbitSinkOptions, path="sink")
        check_connection(parsed, "sink")
        _check(parsed)
        ordering = context.ordering or "strict"
        if ordering not in ORDERINGS:
            raise ConfigurationError(
                f"ordering {ordering!r} is unknown to the rabbitmq sink",
                remedy=f"use one of {', '.join(ORDERINGS)}",
            )
        # An unknown format is refused by the first function that is made for it.
        wire.body_encoder(parsed.format)
        return cls(
            parsed,
            render=compile_routing(
                parsed.routing_key_template, parsed.routing, escape=escape, check=check_routing_key
            ),
            encoder=Encoder(parsed.format, namespace=context.dedup_namespace),
            ordering=ordering,
            name=f"pgtrickle-relay {context.pipeline}",
        )

    async def connect(self) -> None:
        """Open anew; find or make the exchange. Raises `DestinationMissing` where it is missing."""
        await self.aclose()
        connection = await connect(self._options, name=self._name, path="sink")
        try:
            await self._find_exchange(connection)
            await connection.call(
                commands.Confirm.Select(),
                commands.Confirm.SelectOk,
                f"asking RabbitMQ at {connection.address} for confirmations",
            )
        except BaseException:
            await connection.aclose()
            raise
        connection.doing = f"publishing to {self._exchange_in_words()}"
        connection.on_accepted = self._on_accepted
        connection.on_confirmed = self._on_confirmed
        connection.on_returned = self._on_returned
        connection.on_trouble = self._wake.set
        self._published = 0
        self._limit_bytes = self._limit_of(connection)
        self._connection = connection

    async def describe(self) -> dict[str, str]:
        """The broker, the exchange and the size that a message may have."""
        connection = self._open()
        return {
            "server": connection.address,
            "version": connection.server.get("version", "unknown"),
            "exchange": self._options.exchange or "the default exchange",
            "largest message": f"{self._limit_bytes} bytes",
        }

    def subject_of(self, message: RelayMessage) -> str:
        """The routing key by template or routing. Raises `MessageRejected` for one that is none."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Publish all; see the package for order and for what counts as accepted.

        A connection that is lost, or without a confirmation for ``confirm_timeout_ms``, fails what
        was under way as unknown and what was not sent; it is not used again.
        """
        connection = self._open()
        flight = Flight(messages, is_strict=self._is_strict, window=self._options.max_in_flight)
        self._flight = flight
        try:
            while True:
                await self._send(connection, flight)
                if flight.is_over:
                    break
                await self._await_confirmations(connection, flight)
                if connection.loss is not None:
                    self._fail_unsettled(connection, flight)
        finally:
            self._flight = None
            self._published += len(self._sent)
            self._sent, self._sizes = [], []
            self._confirmed = self._returned = 0
        return PublishResult(failures=flight.failures())

    async def is_healthy(self) -> bool:
        """True when the broker answers within seconds and takes what is published."""
        connection = self._connection
        return (
            connection is not None and connection.blocked is None and await connection.is_healthy()
        )

    async def aclose(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    def _open(self) -> Connection:
        if self._connection is None:
            raise NotConnected("the rabbitmq sink is not connected")
        self._connection.require()
        return self._connection

    async def _find_exchange(self, connection: Connection) -> None:
        options = self._options
        if not options.exchange:
            return
        await connection.call(
            commands.Exchange.Declare(
                exchange=options.exchange,
                exchange_type=options.exchange_type or DEFAULT_EXCHANGE_TYPE,
                passive=not options.declare_exchange,
                durable=True,
            ),
            commands.Exchange.DeclareOk,
            f"looking for {self._exchange_in_words()} on {connection.address}",
        )

    def _limit_of(self, connection: Connection) -> int:
        """The most bytes of a body: ours, or the default of that version; never above its word."""
        major = connection.server.get("version", "").partition(".")[0]
        usual = _LIMIT_BEFORE_4 if major in ("2", "3") else _LIMIT_FROM_4
        wanted = self._options.max_message_bytes or usual
        return wanted if self._refused_above is None else min(wanted, self._refused_above)

    async def _send(self, connection: Connection, flight: Flight) -> None:
        """Send what may go, a chunk at a time, letting confirmations in between."""
        chunk: list[bytes] = []
        size = 0
        try:
            while (index := flight.take()) is not None:
                message = flight.messages[index]
                try:
                    begin = self._begin(self._routing_key(message))
                    body = self._body(message)
                    header = self._encoder.header(message, len(body), connection.frame_max)
                except MessageRejected as error:
                    flight.fail(index, error)
                    continue
                self._sent.append(index)
                self._sizes.append(len(body))
                chunk += (begin, header, frame.bodies(body, connection.frame_max))
                total = len(header) + len(body)
                flight.weigh(index, total)
                size += total
                if size >= _CHUNK_BYTES:
                    connection.write(b"".join(chunk))
                    chunk.clear()
                    size = 0
                    await connection.drain(self._confirm_timeout_s)
                    await asyncio.sleep(0)
            if chunk:
                connection.write(b"".join(chunk))
                await connection.drain(self._confirm_timeout_s)
        except Outage as error:
            if connection.loss is None:
                connection.abort(self._blocked_or(connection, error))
            self._fail_unsettled(connection, flight)

    async def _await_confirmations(self, connection: Connection, flight: Flight) -> None:
        """Return when there is something to do; give up on a connection that has gone silent."""
        while connection.loss is None and not flight.wants_sender:
            heard = flight.settled
            self._wake.clear()
            try:
                async with asyncio.timeout(self._confirm_timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                if flight.settled == heard:
                    silent = TimedOut(
                        f"no confirmation from {connection.address} within"
                        f" {self._options.confirm_timeout_ms} ms"
                    )
                    connection.abort(self._blocked_or(connection, silent))

    def _blocked_or(self, connection: Connection, error: Outage) -> Outage:
        """Why nothing moves: the broker said that it blocks publishers, or ``error``."""
        if connection.blocked is None:
            return error
        return Outage(
            f"RabbitMQ at {connection.address} takes nothing from publishers: {connection.blocked}",
            remedy="free memory or disk space on the broker, or raise its limits",
        )

    def _fail_unsettled(self, connection: Connection, flight: Flight) -> None:
        """Nothing more will be heard of what is under way."""
        loss = connection.loss
        if loss is None:
            return
        if isinstance(loss, SizeRefused):
            self._refused_above = loss.limit_bytes
            self._limit_bytes = min(self._limit_bytes, loss.limit_bytes)
            for index, size in zip(self._sent, self._sizes, strict=True):
                if size > loss.limit_bytes:
                    flight.fail(
                        index, _too_large(size, "the broker's max_message_size", loss.limit_bytes)
                    )
        flight.fail_all(_gone(loss))

    def _routing_key(self, message: RelayMessage) -> str:
        return check_routing_key(message.subject or self._render(message))

    def _body(self, message: RelayMessage) -> bytes:
        body = self._encoder.body(message)
        if len(body) > self._limit_bytes:
            name = (
                "max_message_bytes"
                if self._limit_bytes == self._options.max_message_bytes
                else "the broker's max_message_size"
            )
            raise _too_large(len(body), name, self._limit_bytes)
        return body

    def _publish_frame(self, routing_key: str) -> bytes:
        return frame.publish(
            self._options.exchange, routing_key, is_mandatory=self._options.mandatory
        )

    def _exchange_in_words(self) -> str:
        return (
            f"the exchange {self._options.exchange!r}"
            if self._options.exchange
            else "the default exchange"
        )

    def _on_accepted(self, tags: Sequence[int]) -> None:
        flight = self._flight
        if flight is None:
            return
        before, sent = self._published + 1, self._sent
        flight.accept([sent[tag - before] for tag in tags if tag >= before])
        if flight.wants_sender:
            self._wake.set()

    def _on_confirmed(self, tag: int, is_multiple: bool, is_refused: bool) -> None:
        flight, number = self._flight, tag - self._published
        if flight is None or number < 1:
            return
        if is_multiple:
            indices = self._sent[self._confirmed : number]
            self._confirmed = max(self._confirmed, number)
        else:
            indices = [self._sent[number - 1]]
        if is_refused:
            for index in indices:
                if flight.is_under_way(index):
                    flight.fail(index, self._refused(flight.messages[index]))
        else:
            flight.accept(indices)
        if flight.wants_sender:
            self._wake.set()

    def _on_returned(self, content: frame.Content) -> None:
        """Fail what no queue takes. Returns come in the order of publishing, before the answer."""
        flight = self._flight
        if flight is None:
            return
        message_id = properties.decoded(content.properties).message_id
        for number in range(self._returned, len(self._sent)):
            index = self._sent[number]
            message = flight.messages[index]
            if (
                flight.is_under_way(index)
                and message_id_of(message) == message_id
                and self._routing_key(message) == content.routing_key
            ):
                self._returned = number + 1
                flight.fail(index, self._unroutable(content))
                break
        if flight.wants_sender:
            self._wake.set()

    def _refused(self, message: RelayMessage) -> Outage:
        return Outage(
            f"RabbitMQ refuses an event with the routing key {self._routing_key(message)!r}:"
            " a queue is full, or failed",
            remedy="make room in the queue or raise its limit",
        )

    def _unroutable(self, content: frame.Content) -> DestinationMissing:
        key = content.routing_key
        if self._options.exchange:
            return DestinationMissing(
                f"no queue takes the routing key {key!r} from {self._exchange_in_words()}",
                remedy="bind a queue for it, or set mandatory to false to let such events go",
            )
        return DestinationMissing(
            f"there is no queue {key!r}, to which the default exchange would hand the event",
            remedy="declare the queue, or name an exchange",
        )


def _gone(loss: RelayError) -> RelayError:
    """Whatever ended the connection, as an error that makes the loop connect anew."""
    if loss.kind is not ErrorKind.OUTAGE or isinstance(loss, NotConnected | TimedOut):
        return loss
    return NotConnected(loss.problem, remedy=loss.remedy)


def _check(options: RabbitSinkOptions) -> None:
    for template in (options.routing_key_template, *options.routing.values()):
        check_template(template)
    check_name(options.exchange, "sink.exchange")
    if not options.exchange and options.routing_key_template == DEFAULT_ROUTING_KEY:
        raise ConfigurationError(
            "sink.exchange is missing", remedy="or name queues with sink.routing_key_template"
        )
    if options.declare_exchange and not options.exchange:
        raise ConfigurationError(
            "sink.declare_exchange needs a name", remedy="say which one with sink.exchange"
        )
    if options.exchange_type is not None and not options.declare_exchange:
        raise ConfigurationError(
            "sink.exchange_type is only for an exchange that is to be made",
            remedy="set declare_exchange, or leave out exchange_type",
        )
    check_at_least_one(
        "sink",
        max_in_flight=options.max_in_flight,
        max_message_bytes=options.max_message_bytes,
        confirm_timeout_ms=options.confirm_timeout_ms,
    )


def _too_large(size: int, name: str, limit_bytes: int) -> MessageTooLarge:
    return MessageTooLarge(f"the message has {size} bytes, {name} is {limit_bytes} bytes")
