"""The client library's producer, consumer and administrator: how they are started and closed.

They connect, and connect again, by themselves, and say in their log alone what keeps them from it
(`bootstrap` answers only that it failed). So this log is read: each client is started in a context
of its own, which its tasks inherit, and what they complain of there is kept for it in `Heard`. For
the relay's log it becomes an error of ours; only the library's tracebacks are passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from relay.backends.kafka.errors import mapped, of_exception
from relay.backends.kafka.options import KafkaConnectionOptions, addresses_of, mechanism_of
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    NotConnected,
    RelayError,
)
from relay.tls import context_of

Client = Any  # AIOKafkaProducer, AIOKafkaConsumer or AIOKafkaAdminClient, untyped in the library

# Partitions are added and leaders move.
METADATA_AGE_MS = 60_000
# Brokers hang up on what was idle for ten minutes.
_MAX_IDLE_MS = 540_000
_CLOSE_TIMEOUT_S = 2.0
_FETCHES_END_S = 0.02

_closing: set[asyncio.Task[None]] = set()


class Heard:
    """What keeps one client from its brokers, as far as it has said so since `forget`."""

    def __init__(self, options: KafkaConnectionOptions) -> None:
        self._has_tls = options.wants_tls
        self._troubles: list[RelayError] = []
        self._waiting: asyncio.Timeout | None = None

    @property
    def trouble(self) -> RelayError | None:
        """The most telling of all; None where there is none."""
        configuration = (one for one in self._troubles if isinstance(one, ConfigurationError))
        return next(configuration, self._troubles[0] if self._troubles else None)

    def forget(self) -> None:
        """Begin again: what was said is over."""
        self._troubles.clear()

    @contextlib.asynccontextmanager
    async def bound(self, timeout_s: float) -> AsyncIterator[None]:
        """Raise `TimeoutError` when the time is over, or when there is any trouble."""
        async with asyncio.timeout(0 if self._troubles else timeout_s) as self._waiting:
            try:
                yield
            finally:
                self._waiting = None

    def hear(self, error: BaseException, where: str) -> None:
        """Keep one complaint."""
        ours = of_exception(error, f"connecting to Kafka at {where}")
        if isinstance(ours, NotConnected) and "ended" in ours.problem and not self._has_tls:
            # A server that speaks TLS hangs up on one who does not.
            remedy = "does the broker want TLS? set tls_ca or tls"
            ours = NotConnected(ours.problem, remedy=remedy)
        if ours is not None:
            self._troubles.append(ours)
            if self._waiting is not None and not self._waiting.expired():
                self._waiting.reschedule(0)


_heard: ContextVar[Heard | None] = ContextVar("_heard", default=None)


class _Ear(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        heard = _heard.get()
        if record.exc_info:
            logging.getLogger().handle(record)
        elif heard is not None and record.name == "aiokafka" and isinstance(record.args, tuple):
            *place, error = record.args or ("",)
            if isinstance(error, BaseException):
                heard.hear(error, ":".join(map(str, place)) if place[1:] else f"node {place[0]}")


def _listen() -> None:
    """Read the library's log, from warnings on, whatever the level of ours is."""
    library = logging.getLogger("aiokafka")
    library.propagate = False
    library.setLevel(logging.WARNING)
    if not any(isinstance(one, _Ear) for one in library.handlers):
        library.addHandler(_Ear())


def server_of(options: KafkaConnectionOptions, path: str) -> str:
    """The brokers to begin with, for people and errors."""
    return ",".join(addresses_of(options, path))


async def started(
    options: KafkaConnectionOptions,
    path: str,
    name: str,
    kind: Callable[..., Client],
    heard: Heard,
    **own: object,
) -> Client:
    """A connected client of this kind, with these arguments of its own.

    Raises the most telling of what keeps each address from answering; `ConfigurationError` for
    files that can't be used.
    """
    client = kind(**_arguments(options, path, name) | own)
    doing = f"connecting to Kafka at {server_of(options, path)}"
    timeout_s = options.request_timeout_ms / 1000 * (len(addresses_of(options, path)) + 1)
    _listen()
    token = _heard.set(heard)
    starting = asyncio.create_task(client.start())
    try:
        with mapped(doing):
            async with asyncio.timeout(timeout_s):
                # Cancelled half-way it would leave its first connection open.
                await asyncio.shield(starting)
    except ValueError as error:
        # What the server says in the exchange of passwords is not what it must.
        await close(client, starting)
        raise AuthenticationRefused(
            f"{doing}: the server does not prove that it knows our password: {error}"
        ) from None
    except BaseException as error:
        await close(client, starting)
        if heard.trouble is not None and isinstance(error, RelayError):
            raise heard.trouble from error
        raise
    finally:
        _heard.reset(token)
    heard.forget()
    return client


def _arguments(options: KafkaConnectionOptions, path: str, name: str) -> dict[str, object]:
    own: Mapping[str, object] = options.client
    mechanism = mechanism_of(options)
    arguments: dict[str, object] = {
        "bootstrap_servers": addresses_of(options, path),
        "client_id": own.get("client_id", name),
        "connections_max_idle_ms": own.get("max_idle_ms", _MAX_IDLE_MS),
        "request_timeout_ms": options.request_timeout_ms,
        "metadata_max_age_ms": METADATA_AGE_MS,
        "security_protocol": ("SASL_" if mechanism else "")
        + ("SSL" if options.wants_tls else "PLAINTEXT"),
    }
    if options.wants_tls:
        arguments["ssl_context"] = context_of(options, path)
    if mechanism:
        arguments |= {
            "sasl_mechanism": mechanism,
            "sasl_plain_username": options.sasl_username,
            "sasl_plain_password": options.sasl_password,
        }
    return arguments


def topic_missing(topic: str, server: str) -> DestinationMissing:
    """The error for a topic that is not there."""
    return DestinationMissing(
        f"there is no topic {topic!r} at {server}, or the user may not see it",
        remedy=f"make it with: kafka-topics.sh --create --topic {topic}",
    )


async def close(client: Client, starting: asyncio.Task[None] | None = None) -> None:
    """Close within seconds, also while it is ``starting``; never raises.

    What a silent broker keeps open ends by itself when the library's requests time out.
    """
    closing = asyncio.create_task(_closed(client, starting))
    _closing.add(closing)
    closing.add_done_callback(_closing.discard)
    await asyncio.wait({closing}, timeout=_CLOSE_TIMEOUT_S)
    if not closing.done() and isinstance(client, AIOKafkaProducer):
        await _abandon(client)
        await asyncio.wait({closing}, timeout=_CLOSE_TIMEOUT_S)


async def until_closed() -> None:
    """Wait, within seconds, for what a cancelled `close` has left to end by itself."""
    loop = asyncio.get_running_loop()
    if closing := {one for one in _closing if one.get_loop() is loop}:
        await asyncio.wait(closing, timeout=_CLOSE_TIMEOUT_S)


async def _closed(client: Client, starting: asyncio.Task[None] | None) -> None:
    if starting is not None:
        await asyncio.wait({starting}, timeout=_CLOSE_TIMEOUT_S / 4)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    with contextlib.suppress(Exception):
        if isinstance(client, AIOKafkaConsumer) and client.assignment():
            # `stop` breaks off where it finds a fetch that waits to be tried again; this ends it.
            client.unsubscribe()
            await asyncio.sleep(_FETCHES_END_S)
        await (client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop())


async def _abandon(producer: AIOKafkaProducer) -> None:
    """Let `stop` of a producer end although its broker is gone.

    An idempotent producer never gives a batch up, and `stop` waits until all are answered. Nothing
    public ends that, so here, and nowhere else, the library's own parts are touched: connections
    are cut off, the task that sends is ended, and what is queued fails.
    """
    for connection in producer.client._conns.values():  # noqa: SLF001 - see above
        if connection._writer is not None:  # noqa: SLF001 - see above
            connection._writer.transport.abort()  # noqa: SLF001 - see above
    sending = producer._sender.sender_task  # noqa: SLF001 - see above
    for _ in range(2):
        if sending is not None and not sending.done():
            # The second time it ends the requests that it waits for.
            sending.cancel()
            await asyncio.wait({sending}, timeout=_CLOSE_TIMEOUT_S / 4)
    queued = producer._message_accumulator  # noqa: SLF001 - see above
    for batches in queued._batches.values():  # noqa: SLF001 - see above
        # It expects there what it has tried to send, also where that waits for its next turn.
        queued._pending_batches.update(batches)  # noqa: SLF001 - see above
    queued.fail_all(NotConnected("the producer is closed"))
