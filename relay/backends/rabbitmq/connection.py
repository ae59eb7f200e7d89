"""One connection with one channel to a RabbitMQ broker, for many messages at a time.

It speaks AMQP 0-9-1 over asyncio's transport with pamqp's methods. The clients that the same codec
serves make tasks and futures per message and, some of them, reconnect and repeat behind the back
of the loop, which has to decide what is repeated, and in which order. A connection that is lost
stays lost, and so does one whose channel the broker has closed.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import TypeVar, cast

from pamqp import commands
from pamqp.base import Frame
from pamqp.common import FieldTable
from pamqp.exceptions import PAMQPException

from relay.backends.rabbitmq import frame as wire
from relay.backends.rabbitmq.errors import mapped, not_amqp, of_close, of_exception
from relay.backends.rabbitmq.frame import Arrivals, Broken, Content, FrameReader
from relay.backends.rabbitmq.options import (
    Endpoint,
    RabbitConnectionOptions,
    endpoint_of,
    tls_context_of,
)
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)

HEARTBEAT_S = 10
"""How often each side shows a sign of life; after two without one the connection is lost."""

_CLOSE_TIMEOUT_S = 2.0
_HEALTH_TIMEOUT_S = 2.0
_FRAME_MAX = 131072
_WRITE_BUFFER_BYTES = 1024 * 1024
_GUEST = "guest"

_CAPABILITIES = (
    "authentication_failure_close",
    "basic.nack",
    "connection.blocked",
    "consumer_cancel_notify",
    "publisher_confirms",
)

Reply = TypeVar("Reply", bound=Frame)


class Connection(asyncio.Protocol):
    """An open connection. Calls from several tasks are answered in turn.

    What arrives goes to ``on_delivered``, ``on_returned``, ``on_accepted`` and ``on_confirmed``,
    which may not raise; ``on_trouble`` is told of a loss, and when publishers are blocked or not
    any more. ``frame_max`` is the most bytes of one frame.
    """

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self.on_delivered: Callable[[Content], None] = _ignore
        self.on_returned: Callable[[Content], None] = _ignore
        self.on_accepted: Callable[[Sequence[int]], None] = _ignore
        self.on_confirmed: Callable[[int, bool, bool], None] = _ignore
        self.on_trouble: Callable[[], None] = _ignore
        self.doing = f"talking to RabbitMQ at {endpoint.address}"
        self.frame_max = _FRAME_MAX
        self.blocked: str | None = None
        self.server: dict[str, str] = {}
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._reader = FrameReader(
            Arrivals(
                method=self._on_method,
                delivered=lambda content: self.on_delivered(content),
                returned=lambda content: self.on_returned(content),
                accepted=lambda tags: self.on_accepted(tags),
                confirmed=lambda *confirmed: self.on_confirmed(*confirmed),
            )
        )
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._loss: RelayError | None = None
        self._expected: deque[tuple[asyncio.Future[Frame], str]] = deque()
        self._writable = asyncio.Event()
        self._gone = asyncio.Event()
        self._is_held = False
        self._is_paused = False
        self._is_open = False
        self._heartbeat_s = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._heard_at = self._said_at = self._loop.time()

    @property
    def loss(self) -> RelayError | None:
        """Why the connection is gone, None while it stands."""
        return self._loss

    @property
    def address(self) -> str:
        """``host:port`` of the broker."""
        return self._endpoint.address

    def require(self) -> None:
        """Raise `Outage` where the connection is gone."""
        if self._loss is None:
            return
        if isinstance(self._loss, Outage):
            raise self._loss
        # What was wrong has been said once; whether it still is shows on the next connection.
        raise NotConnected(f"the connection was given up: {self._loss.problem}")

    def write(self, data: bytes) -> None:
        """Send whole frames. Raises `Outage`."""
        self.require()
        assert self._transport is not None, "connected"  # noqa: S101 - for the type checker
        self._said_at = self._loop.time()
        self._transport.write(data)

    async def drain(self, timeout_s: float) -> None:
        """Wait while the broker takes our bytes more slowly than they come. Raises `Outage`."""
        if not self._writable.is_set():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._writable.wait()
            except TimeoutError:
                raise TimedOut(
                    f"RabbitMQ at {self.address} took no bytes for {timeout_s:g} s"
                ) from None
        self.require()

    async def call(self, method: Frame, into: type[Reply], doing: str) -> Reply:
        """Send a method and wait for its answer. Raises what the broker says, and `Outage`."""
        return await self._answered(self._ask(method, doing), into, doing)

    async def flush(self, doing: str) -> None:
        """Return when the broker has processed all that was written. Raises `Outage`."""
        await self.call(commands.Channel.Flow(active=True), commands.Channel.FlowOk, doing)

    async def is_healthy(self) -> bool:
        """True when the broker answers now."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self.flush(f"asking RabbitMQ at {self.address}")
        except (RelayError, TimeoutError):
            return False
        return True

    def hold(self, *, is_held: bool) -> None:
        """Stop or go on reading what the broker sends, as long as no answer is awaited."""
        if is_held == self._is_held:
            return
        self._is_held = is_held
        self._read_or_not()

    def abort(self, reason: RelayError) -> None:
        """Drop the connection at once: what is unsettled stays unknown."""
        self._lose(reason)
        if self._transport is not None:
            self._transport.abort()

    async def aclose(self) -> None:
        """Close; never raises, and takes no longer than the bound."""
        # What still comes has a number that means another message on the next connection.
        self.on_delivered = _ignore
        doing = f"closing the connection to {self.address}"
        if self._loss is None and self._is_open:
            with suppress(RelayError, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self.call(
                        commands.Connection.Close(200, "", 0, 0), commands.Connection.CloseOk, doing
                    )
        self.abort(NotConnected("the connection is closed"))
        if self._transport is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._gone.wait()

    async def greet(self, mechanism: str, response: str, name: str) -> None:
        """Log in, agree on limits and open the virtual host and a channel. Raises what fails."""
        doing = f"connecting to RabbitMQ at {self.address}"
        self._send(wire.GREETING)
        start = await self._answered(self._expect(doing), commands.Connection.Start, doing)
        properties = start.server_properties or {}
        self.server = {key: str(properties.get(key, "")) for key in ("product", "version")}
        if mechanism not in (start.mechanisms or "").split():
            raise AuthenticationRefused(
                f"{doing}: the broker does not let anybody log in with {mechanism}",
                remedy="enable rabbitmq_auth_mechanism_ssl, or set username and password"
                if mechanism == "EXTERNAL"
                else "enable it in the broker's auth_mechanisms",
            )
        tune = await self.call(
            commands.Connection.StartOk(_client_properties(name), mechanism, response),
            commands.Connection.Tune,
            doing,
        )
        self.frame_max = min(tune.frame_max or _FRAME_MAX, _FRAME_MAX)
        heartbeat_s = min(tune.heartbeat or HEARTBEAT_S, HEARTBEAT_S)
        self._send(
            wire.of_method(commands.Connection.TuneOk(1, self.frame_max, heartbeat_s), channel=0)
        )
        self._heartbeat_s = float(heartbeat_s)
        self._tick()
        await self.call(
            commands.Connection.Open(self._endpoint.vhost),
            commands.Connection.OpenOk,
            f"opening the virtual host {self._endpoint.vhost!r} of {self.address}",
        )
        await self.call(commands.Channel.Open(), commands.Channel.OpenOk, doing)
        self._is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Transports of uvloop are none by their class.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if not self._is_open and data.startswith(b"AMQP"):
            self.abort(not_amqp(self.doing))
            return
        try:
            self._reader.feed(data)
        except (Broken, PAMQPException, ValueError, LookupError) as error:
            broken = NotConnected(f"{self.doing}: a frame can't be read: {type(error).__name__}")
            self.abort(broken if self._is_open else not_amqp(self.doing))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        doing = self._doing_now()
        known = None if exc is None else of_exception(exc, doing)
        self._lose(known or NotConnected(f"{doing}: the broker ended the connection"))
        self._gone.set()

    def _send(self, data: bytes) -> None:
        self.write(data)

    def _ask(self, method: Frame, doing: str) -> asyncio.Future[Frame]:
        is_of_connection = isinstance(method, _OF_CONNECTION)
        self._send(wire.of_method(method, channel=0 if is_of_connection else wire.CHANNEL))
        return self._expect(doing)

    def _expect(self, doing: str) -> asyncio.Future[Frame]:
        answer: asyncio.Future[Frame] = self._loop.create_future()
        self._expected.append((answer, doing))
        self._read_or_not()
        return answer

    async def _answered(
        self, answer: asyncio.Future[Frame], into: type[Reply], doing: str
    ) -> Reply:
        """The answer; one that comes after we stopped waiting finds nobody."""
        try:
            async with asyncio.timeout(self._timeout_s):
                frame = await answer
        except TimeoutError:
            raise TimedOut(f"{doing}: no answer within {self._timeout_s:g} s") from None
        if not isinstance(frame, into):
            raise NotConnected(f"{doing}: the broker answers {frame.name}")
        return frame

    def _on_method(self, channel: int, frame: Frame) -> None:
        match frame:
            case commands.Connection.Close() | commands.Channel.Close():
                code, text = frame.reply_code or 200, frame.reply_text or "closed"
                is_channel = isinstance(frame, commands.Channel.Close)
                done = commands.Channel.CloseOk() if is_channel else commands.Connection.CloseOk()
                reason = of_close(code, text, self._doing_now())
                if self._transport is not None and not self._transport.is_closing():
                    self._transport.write(wire.of_method(done, channel=channel))
                self._lose(reason)
                if self._transport is not None:
                    self._transport.close()
            case commands.Connection.Blocked():
                self.blocked = frame.reason or "blocked"
                self.on_trouble()
            case commands.Connection.Unblocked():
                self.blocked = None
                self.on_trouble()
            case commands.Basic.Cancel():
                self.abort(
                    NotConnected(
                        f"{self.doing}: the broker ended the consumer: the queue was deleted, or"
                        " its node went away"
                    )
                )
            case _:
                if self._expected:
                    answer, _ = self._expected.popleft()
                    if not answer.done():
                        answer.set_result(frame)
                    self._read_or_not()

    def _doing_now(self) -> str:
        return self._expected[0][1] if self._expected else self.doing

    def _lose(self, reason: RelayError) -> None:
        if self._loss is not None:
            return
        self._loss = reason
        if self._beat is not None:
            self._beat.cancel()
        for answer, _ in self._expected:
            if not answer.done():
                answer.set_exception(reason)
                # Whoever asked may have stopped waiting.
                answer.exception()
        self._expected.clear()
        self._writable.set()
        self.on_trouble()

    def _read_or_not(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        is_to_pause = self._is_held and not self._expected
        if is_to_pause == self._is_paused:
            return
        self._is_paused = is_to_pause
        if is_to_pause:
            transport.pause_reading()
        else:
            self._heard_at = self._loop.time()
            transport.resume_reading()

    def _tick(self) -> None:
        """Show a sign of life where nothing else does, and look for the broker's."""
        now = self._loop.time()
        transport = self._transport
        if self._loss is not None or transport is None:
            return
        if now - self._said_at >= self._heartbeat_s / 2:
            self._said_at = now
            transport.write(wire.HEARTBEAT_FRAME)
        if not self._is_paused and now - self._heard_at > 2 * self._heartbeat_s:
            silent_s = now - self._heard_at
            self.abort(
                TimedOut(f"RabbitMQ at {self.address} showed no sign of life for {silent_s:.0f} s")
            )
            return
        self._beat = self._loop.call_later(self._heartbeat_s / 4, self._tick)


async def connect(options: RabbitConnectionOptions, *, name: str, path: str) -> Connection:
    """Connect, log in and open a channel.

    Raises `Outage`, `AuthenticationRefused`, `DestinationMissing` or `ConfigurationError`.
    """
    endpoint = endpoint_of(options, path)
    context = tls_context_of(options, path)
    mechanism, response = _credentials(options, endpoint)
    timeout_s = options.timeout_ms / 1000
    connection = Connection(endpoint, timeout_s)
    doing = f"connecting to RabbitMQ at {endpoint.address}"
    try:
        with mapped(doing):
            async with asyncio.timeout(timeout_s):
                await _open(connection, endpoint, context)
                await connection.greet(mechanism, response, name)
    except BaseException:
        await connection.aclose()
        raise
    return connection


async def _open(connection: Connection, endpoint: Endpoint, context: ssl.SSLContext | None) -> None:
    await asyncio.get_running_loop().create_connection(
        lambda: connection,
        endpoint.host,
        endpoint.port,
        ssl=context,
        server_hostname=None if context is None else endpoint.host,
    )


def _credentials(options: RabbitConnectionOptions, endpoint: Endpoint) -> tuple[str, str]:
    """The login mechanism and what it is told."""
    if endpoint.username is None and options.tls_cert is not None:
        return "EXTERNAL", ""
    user = _GUEST if endpoint.username is None else endpoint.username
    password = _GUEST if endpoint.password is None else endpoint.password
    if "\x00" in user or "\x00" in password:
        raise ConfigurationError("username and password can't hold NUL")
    return "PLAIN", f"\x00{user}\x00{password}"


def _client_properties(name: str) -> FieldTable:
    return {
        "product": "pgtrickle-relay",
        "version": version("pgtrickle-relay"),
        "connection_name": name,
        "capabilities": dict.fromkeys(_CAPABILITIES, True),
    }


def _ignore(*_: object) -> None:
    """Where nobody listens."""


_OF_CONNECTION = (
    commands.Connection.StartOk,
    commands.Connection.TuneOk,
    commands.Connection.Open,
    commands.Connection.Close,
)
