"""The RabbitMQ sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self

from aiormq import DeliveryError, PublishError

from relay.backends.rabbitmq.connection import Connection
from relay.backends.rabbitmq.content import Encoder
from relay.backends.rabbitmq.errors import SizeRefused
from relay.backends.rabbitmq.options import (
    DEFAULT_EXCHANGE_TYPE,
    DEFAULT_ROUTING_KEY,
    RabbitSinkOptions,
    check_name,
    endpoint_of,
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
from relay.template import compile_routing

# https://www.rabbitmq.com/docs/configure, max_message_size: lowered in 4.0.
_LIMIT_BEFORE_4 = 128 * 1024 * 1024
_LIMIT_FROM_4 = 16 * 1024 * 1024
_USUAL_FRAME_MAX = 128 * 1024
# So many are handed to the client before others get their turn.
_AT_ONCE = 64


class RabbitSink:
    """Publishes to an exchange, many messages at a time, and waits for every confirmation."""

    def __init__(self, options: RabbitSinkOptions, context: BackendContext) -> None:
        """`from_options` checks what this takes."""
        self._options = options
        self._render = compile_routing(
            options.routing_key_template, options.routing, escape=escape, check=check_routing_key
        )
        self._encoder = Encoder(options.format, namespace=context.dedup_namespace)
        self._is_strict = context.ordering != "pipelined"
        self._name = f"pgtrickle-relay {context.pipeline}"
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
        _check(parsed)
        return cls(parsed, context)

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
        while not flight.is_over:
            calls: dict[asyncio.Task[object], int] = {}
            try:
                await self._send(flight, connection, calls)
                await self._until_answered(calls, connection)
            finally:
                # What the client has not sent by now is not sent.
                left = [call for call in calls if not call.done()]
                for call in left:
                    call.cancel()
                await asyncio.gather(*left, return_exceptions=True)
                # Who is cancelled here settles nothing, and would leave errors unread.
                for call in calls:
                    if not call.cancelled():
                        call.exception()
            self._settle(flight, connection, calls)
        return PublishResult(failures=flight.failures())

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

    async def _send(
        self, flight: Flight, connection: Connection, calls: dict[asyncio.Task[object], int]
    ) -> None:
        """Hand the client what may go; it sends in the order of its calls."""
        channel, options = connection.channel, self._options
        frame_max = channel.connection.connection_tune.frame_max or _USUAL_FRAME_MAX
        ids: set[str | None] = set()
        while (index := flight.take()) is not None:
            message = flight.messages[index]
            try:
                routing_key = check_routing_key(message.subject)
                body = self._body(message)
                properties = self._encoder.properties(message, frame_max)
            except MessageRejected as error:
                flight.fail(index, error)
                continue
            if properties.message_id in ids:
                # The client knows what comes back by its id alone.
                flight.put_back([index])
                return
            ids.add(properties.message_id)
            flight.weigh(index, len(body))
            call = channel.basic_publish(
                body,
                exchange=options.exchange,
                routing_key=routing_key,
                properties=properties,
                mandatory=options.mandatory,
                wait=False,
            )
            calls[asyncio.create_task(call)] = index
            if len(calls) % _AT_ONCE == 0:
                await asyncio.sleep(0)

    async def _until_answered(
        self, calls: Mapping[asyncio.Task[object], int], connection: Connection
    ) -> None:
        """Return when all are answered; give up on a connection that has gone silent."""
        pending = set(calls)
        while pending:
            answered, pending = await asyncio.wait(
                pending, timeout=self._options.confirm_timeout_ms / 1000
            )
            if not answered:
                connection.abort(
                    NotConnected(
                        f"RabbitMQ at {connection.address} takes nothing from publishers",
                        remedy="free memory or disk space on the broker, or raise its limits",
                    )
                    if await connection.is_blocked()
                    else TimedOut(
                        f"no confirmation from {connection.address} within"
                        f" {self._options.confirm_timeout_ms} ms"
                    )
                )
                return

    def _settle(
        self, flight: Flight, connection: Connection, calls: Mapping[asyncio.Task[object], int]
    ) -> None:
        """Note what became of each call; all have ended."""
        accepted: list[int] = []
        for call, index in calls.items():
            match error := asyncio.CancelledError() if call.cancelled() else call.exception():
                case None:
                    accepted.append(index)
                case DeliveryError():
                    flight.fail(index, self._not_taken(flight.messages[index], error))
                case ValueError() | TypeError():
                    # The client could not spell it, and has not sent it.
                    wrong = MessageUndecodable(f"no AMQP message: {type(error).__name__}")
                    flight.fail(index, wrong)
                case _ if connection.loss is None:
                    known = connection.error_of(error, connection.doing)
                    connection.abort(known or NotConnected(f"publishing: {type(error).__name__}"))
        flight.accept(accepted)
        if (loss := connection.loss) is None:
            return
        # Nothing more will be heard of what is in flight.
        if isinstance(loss, SizeRefused):
            self._refused_above = self._limit_bytes = min(self._limit_bytes, loss.limit_bytes)
            for index in flight.in_flight():
                size = len(self._encoder.body(flight.messages[index]))
                if size > loss.limit_bytes:
                    flight.fail(index, self._too_large(size))
        if isinstance(loss, Outage) and not isinstance(loss, NotConnected | TimedOut):
            # Whatever it was that ended the connection: the loop has to connect again.
            loss = NotConnected(loss.problem, remedy=loss.remedy)
        flight.fail_all(loss)

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
        """Why the broker returned or nacked it."""
        key = message.subject
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


def _check(options: RabbitSinkOptions) -> None:
    endpoint_of(options, "sink")
    check_name(options.exchange, "sink.exchange")
    for template in (options.routing_key_template, *options.routing.values()):
        check_template(template)
    if not options.exchange and options.routing_key_template == DEFAULT_ROUTING_KEY:
        raise ConfigurationError(
            "sink.exchange is missing", remedy="or name queues with sink.routing_key_template"
        )
    if options.declare_exchange and not options.exchange:
        raise ConfigurationError(
            "sink.declare_exchange needs a name", remedy="say which one with sink.exchange"
        )
