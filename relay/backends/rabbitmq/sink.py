"""The RabbitMQ sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Self

from aiormq import DeliveryError, PublishError

from relay import wire
from relay.backends.rabbitmq.connection import Connection
from relay.backends.rabbitmq.content import Encoder
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
    MessageRejected,
    MessageTooLarge,
    MessageUndecodable,
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
_USUAL_FRAME_MAX = 128 * 1024
# So many are handed to the client before others get their turn.
_AT_ONCE = 64


class RabbitSink:
    """Publishes to an exchange, many messages at a time, and waits for every confirmation."""

    def __init__(
        self,
        options: RabbitSinkOptions,
        *,
        render: Render,
        encoder: Encoder,
        is_strict: bool,
        name: str,
    ) -> None:
        self._options = options
        self._render = render
        self._encoder = encoder
        self._is_strict = is_strict
        self._name = name
        self._confirm_timeout_s = options.confirm_timeout_ms / 1000
        named = f"the exchange {options.exchange!r}"
        self._exchange = named if options.exchange else "the default exchange"
        self._limit_bytes = options.max_message_bytes or _LIMIT_FROM_4
        # What a broker has said that it takes; it stays true on the next connection.
        self._refused_above: int | None = None
        self._connection: Connection | None = None

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
            is_strict=ordering == "strict",
            name=f"pgtrickle-relay {context.pipeline}",
        )

    async def connect(self) -> None:
        """Open again; find or make the exchange. Raises `DestinationMissing` without one."""
        await self.aclose()
        options, connection = self._options, Connection(self._options, self._name, "sink")
        try:
            await connection.open(confirms=True)
            if options.exchange:
                declared = connection.channel.exchange_declare(
                    options.exchange,
                    exchange_type=options.exchange_type or DEFAULT_EXCHANGE_TYPE,
                    passive=not options.declare_exchange,
                    durable=True,
                )
                doing = f"looking for {self._exchange} on {connection.address}"
                await connection.call(doing, declared)
        except BaseException:
            await connection.aclose()
            raise
        connection.doing = f"publishing to {self._exchange}"
        is_before_4 = connection.version.partition(".")[0] in ("2", "3")
        wanted = options.max_message_bytes or (_LIMIT_BEFORE_4 if is_before_4 else _LIMIT_FROM_4)
        self._limit_bytes = min(wanted, self._refused_above or wanted)
        self._connection = connection

    async def describe(self) -> dict[str, str]:
        """The broker, the exchange and the size that a message may have."""
        connection = self._open()
        return {
            "server": connection.address,
            "version": connection.version,
            "exchange": self._options.exchange or self._exchange,
            "largest message": f"{self._limit_bytes} bytes",
        }

    def subject_of(self, message: RelayMessage) -> str:
        """The routing key by template or routing. Raises `MessageRejected` for one that is none."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Publish all; see the package for order and for what counts as accepted.

        A connection that is lost, or without a confirmation for ``confirm_timeout_ms``, fails what
        was in flight as unknown and what was not sent; it is not used again.
        """
        connection = self._open()
        flight = Flight(messages, is_strict=self._is_strict, window=self._options.max_in_flight)
        publish = _Publish(connection, flight)
        try:
            while True:
                connection.wake.clear()
                if connection.loss is not None:
                    self._fail_unsettled(publish, connection.loss)
                await self._send(publish)
                if flight.is_over:
                    return PublishResult(failures=flight.failures())
                await self._until_settled(publish)
        finally:
            await publish.aclose()

    async def is_healthy(self) -> bool:
        """True when the broker answers within seconds and takes what is published."""
        connection = self._connection
        if connection is None or not await connection.is_healthy():
            return False
        return not await connection.is_blocked()

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

    async def _send(self, publish: _Publish) -> None:
        """Hand the client what may go; it sends in the order of its calls."""
        flight, channel, options = publish.flight, publish.connection.channel, self._options
        frame_max = channel.connection.connection_tune.frame_max or _USUAL_FRAME_MAX
        count = 0
        while (index := flight.take()) is not None:
            message = flight.messages[index]
            try:
                routing_key, body = self._routing_key(message), self._body(message)
                properties = self._encoder.properties(message, frame_max)
            except MessageRejected as error:
                flight.fail(index, error)
                continue
            message_id = properties.message_id or ""
            if flight.is_in_flight(publish.indices.get(message_id, -1)):
                # The client knows what comes back by its id alone.
                flight.put_back([index])
                return
            flight.weigh(index, len(body))
            publish.indices[message_id], publish.sizes[index] = index, len(body)
            call = channel.basic_publish(
                body,
                exchange=options.exchange,
                routing_key=routing_key,
                properties=properties,
                mandatory=options.mandatory,
                wait=False,
            )
            task = asyncio.create_task(call)
            publish.calls.add(task)
            task.add_done_callback(partial(self._on_answer, publish, index))
            count += 1
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)

    def _on_answer(self, publish: _Publish, index: int, call: asyncio.Task[object]) -> None:
        publish.calls.discard(call)
        if call.cancelled():
            # Somebody cancelled the publish, or the connection's loss is said in a moment.
            return
        flight, connection = publish.flight, publish.connection
        match error := call.exception():
            case None:
                flight.accept((index,))
            case DeliveryError():
                flight.fail(index, self._not_taken(flight.messages[index], error))
            case ValueError() | TypeError():
                # The client could not spell it, and has not sent it.
                flight.fail(index, MessageUndecodable(f"no AMQP message: {type(error).__name__}"))
            case _ if connection.loss is None:
                known = connection.error_of(error, connection.doing)
                connection.abort(known or NotConnected(f"publishing: {type(error).__name__}"))
        if flight.wants_sender:
            connection.wake.set()

    async def _until_settled(self, publish: _Publish) -> None:
        """Return when there is something to do; give up on a connection that has gone silent."""
        settled, connection = publish.flight.settled, publish.connection
        try:
            async with asyncio.timeout(self._confirm_timeout_s):
                await connection.wake.wait()
        except TimeoutError:
            if publish.flight.settled > settled:
                return
            silence: Outage = TimedOut(
                f"no confirmation from {connection.address} within"
                f" {self._options.confirm_timeout_ms} ms"
            )
            if await connection.is_blocked():
                silence = NotConnected(
                    f"RabbitMQ at {connection.address} takes nothing from publishers",
                    remedy="free memory or disk space on the broker, or raise its limits",
                )
            connection.abort(silence)

    def _fail_unsettled(self, publish: _Publish, loss: RelayError) -> None:
        """Nothing more will be heard of what is in flight."""
        flight = publish.flight
        if isinstance(loss, SizeRefused):
            self._refused_above = self._limit_bytes = min(self._limit_bytes, loss.limit_bytes)
            for index, size in publish.sizes.items():
                if size > loss.limit_bytes:
                    flight.fail(index, self._too_large(size))
        if isinstance(loss, Outage) and not isinstance(loss, NotConnected | TimedOut):
            # Whatever it was that ended the connection: the loop has to connect again.
            loss = NotConnected(loss.problem, remedy=loss.remedy)
        flight.fail_all(loss)

    def _routing_key(self, message: RelayMessage) -> str:
        return check_routing_key(message.subject or self._render(message))

    def _body(self, message: RelayMessage) -> bytes:
        body = self._encoder.body(message)
        if len(body) > self._limit_bytes:
            raise self._too_large(len(body))
        return body

    def _too_large(self, size: int) -> MessageTooLarge:
        is_ours = self._limit_bytes == self._options.max_message_bytes
        name = "max_message_bytes" if is_ours else "the broker's max_message_size"
        return MessageTooLarge(f"the message has {size} bytes, {name} is {self._limit_bytes} bytes")

    def _not_taken(self, message: RelayMessage, error: DeliveryError) -> RelayError:
        """Why the broker gave it back, or refused it."""
        key = self._routing_key(message)
        if not isinstance(error, PublishError):
            return Outage(
                f"RabbitMQ refuses an event with the routing key {key!r}: a queue is full, or"
                " failed",
                remedy="make room in the queue or raise its limit",
            )
        if self._options.exchange:
            return DestinationMissing(
                f"no queue takes the routing key {key!r} from {self._exchange}",
                remedy="bind a queue for it, or set mandatory to false to let such events go",
            )
        return DestinationMissing(
            f"there is no queue {key!r}, to which the default exchange would hand the event",
            remedy="declare the queue, or name an exchange",
        )


class _Publish:
    """One publish: the client's calls that are not answered, and what was sent of which size."""

    def __init__(self, connection: Connection, flight: Flight) -> None:
        self.connection = connection
        self.flight = flight
        self.calls: set[asyncio.Task[object]] = set()
        self.indices: dict[str, int] = {}
        self.sizes: dict[int, int] = {}

    async def aclose(self) -> None:
        """End the calls; what the client has not sent by now is not sent."""
        calls = list(self.calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


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
