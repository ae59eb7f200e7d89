"""One connection with one channel to a RabbitMQ broker.

aio-pika connects, and never again by itself: which messages are repeated, and in which order, is
the loop's to decide. What is published and consumed goes through aiormq's channel below it. A
connection that is lost stays lost, and so does one whose channel the broker has closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from importlib.metadata import version
from typing import Any, TypeVar

import aio_pika
from aiormq import Channel, ChannelInvalidStateError

from relay.backends.rabbitmq.errors import Unreadable, not_amqp, of_close, of_exception
from relay.backends.rabbitmq.options import RabbitConnectionOptions, endpoint_of
from relay.backends.rabbitmq.transport import Frames, Transport
from relay.errors import NotConnected, Outage, RelayError, TimedOut
from relay.tls import context_of

HEARTBEAT_S = 10
"""How often each side shows a sign of life; a broker ends a connection after two without one."""

_CLOSE_TIMEOUT_S = 2.0
_PROMPT_S = 2.0
_GUEST = "guest"

T = TypeVar("T")

# The client logs messages that it can't place, payload and all, and what it raises anyway.
for _name in ("aiormq.channel", "aiormq.connection"):
    logging.getLogger(_name).addFilter(lambda _: False)


class Connection:
    """A connection, from `open` on with a ``channel``.

    ``doing``: what it is for, in the words of errors. ``loss``: why it is gone, None while it
    stands. ``wake`` is set when it is lost, and by who has something for the one that waits.
    """

    channel: Channel

    def __init__(
        self,
        options: RabbitConnectionOptions,
        name: str,
        path: str,
        *,
        timeout_s: float | None = None,
        is_careful: bool = False,
    ) -> None:
        """``timeout_s``: how long an answer may take, instead of what the options say."""
        endpoint, vhost = endpoint_of(options, path)
        is_external = endpoint.username is None and options.tls_cert is not None
        self.address = endpoint.address
        self.doing = f"connecting to RabbitMQ at {self.address}"
        self.wake = asyncio.Event()
        self.loss: RelayError | None = None
        self._vhost = vhost
        self._timeout_s = timeout_s or options.timeout_ms / 1000
        self._frames = Frames(is_careful=is_careful)
        context = context_of(options, path) if endpoint.is_tls else None
        self._transport = Transport(endpoint, context, self._frames, self._timeout_s)
        address = aio_pika.connection.make_url(
            login=endpoint.username or _GUEST,
            password=endpoint.password or _GUEST,
            virtualhost=vhost,
            heartbeat=HEARTBEAT_S,
            auth="external" if is_external else "plain",
        )
        ours = {"product": "pgtrickle-relay", "version": version("pgtrickle-relay")}
        self._client = aio_pika.Connection(
            address, client_properties={**ours, "connection_name": name}
        )
        # The socket is opened there, whatever the address says.
        self._client.kwargs["transport_factory"] = self._transport
        self._is_aborted = False
        self._is_held = False
        self._calls = 0
        self._questions: dict[str, asyncio.Task[Any]] = {}

    @property
    def version(self) -> str:
        """The broker's."""
        return str(self.channel.connection.server_properties.get("version", "unknown"))

    def require(self) -> None:
        """Raise `Outage` where the connection is gone."""
        if isinstance(self.loss, Outage):
            raise self.loss
        if self.loss is not None:
            # What was wrong has been said once; whether it still is shows on the next connection.
            raise NotConnected(f"the connection was given up: {self.loss.problem}")

    async def open(self, *, confirms: bool) -> None:
        """Connect, log in and open a channel.

        Raises `Outage`, `AuthenticationRefused`, `DestinationMissing` or `ConfigurationError`.
        """
        try:
            await self.call(self.doing, self._client.connect())
        except Unreadable:
            refusal = self._frames.refusal()
            if refusal is None:
                raise not_amqp(self.doing) from None
            doing = f"opening the virtual host {self._vhost!r} of {self.address}"
            raise of_close(refusal.reply_code or 0, refusal.reply_text or "", doing) from None
        self.channel = await self.new_channel(confirms=confirms)
        self.channel.closing.add_done_callback(self._on_closing)

    async def new_channel(self, *, confirms: bool, is_bounded: bool = True) -> Channel:
        """A channel, on which with ``confirms`` a message that comes back raises."""
        above = self._client.channel(publisher_confirms=confirms, on_return_raises=confirms)
        await self.call(self.doing, above.initialize(), is_bounded=is_bounded)
        channel = await above.get_underlay_channel()
        assert isinstance(channel, Channel)  # noqa: S101 - for the type checker
        return channel

    async def call(self, doing: str, answer: Awaitable[T], *, is_bounded: bool = True) -> T:
        """The broker's answer. Raises what it says, and `Outage`.

        An answer that is late costs the connection: only to stop waiting would cost the channel.
        Without a bound it costs nothing, and may have to wait until what was sent before is taken.
        """
        late = TimedOut(f"{doing}: no answer within {self._timeout_s:g} s")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._timeout_s, self.abort, late) if is_bounded else None
        self._calls += is_bounded
        self._hold_or_not()
        try:
            return await answer
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            # The client raises the same for a connection that it lost.
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            ours = self.error_of(error, doing)
            if ours is None or ours is error:
                raise
            raise ours from None
        finally:
            if timer is not None:
                timer.cancel()
            self._calls -= is_bounded
            self._hold_or_not()

    async def ask(self, what: str, question: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """The answer to what nobody depends on; None where it takes seconds, or is refused.

        One that is late is waited for again by whoever asks the same next.
        """
        asked = self._questions.get(what)
        if asked is None or asked.done():
            asked = self._questions[what] = asyncio.create_task(_answer(question))
        await asyncio.wait([asked], timeout=_PROMPT_S)
        return asked.result() if asked.done() and not asked.cancelled() else None

    def error_of(self, error: BaseException, doing: str) -> RelayError | None:
        """The relay's error for what the client raised; None for a mistake of ours."""
        if self._is_aborted or isinstance(error, ChannelInvalidStateError | asyncio.CancelledError):
            return self.loss or NotConnected(f"{doing}: the broker ended the connection")
        return of_exception(error, doing) or self.loss

    async def is_blocked(self) -> bool:
        """True where the broker has said that it takes nothing from publishers."""
        try:
            async with asyncio.timeout(0):
                await self.channel.connection.ready()
        except TimeoutError:
            return True
        return False

    async def is_healthy(self) -> bool:
        """True when the broker answers within seconds."""
        return self.loss is None and await self.ask("answers", self._answers) is True

    def hold(self, *, is_held: bool) -> None:
        """Stop or go on taking what the broker sends, as long as no answer is awaited."""
        self._is_held = is_held
        self._hold_or_not()

    def abort(self, reason: RelayError) -> None:
        """Drop the connection at once: what is unsettled stays unknown."""
        self._lose(reason)
        self._is_aborted = True
        self._transport.abort()

    async def aclose(self) -> None:
        """Close; never raises, and takes no longer than the bounds."""
        self._lose(NotConnected("the connection is closed"))
        # To cancel the client's closing would leave its tasks behind.
        timer = asyncio.get_running_loop().call_later(_CLOSE_TIMEOUT_S, self._transport.abort)
        try:
            with suppress(Exception):
                await self._client.close()
        finally:
            timer.cancel()
            await self._transport.aclose()
            if self._questions:
                await asyncio.wait(self._questions.values(), timeout=_CLOSE_TIMEOUT_S)

    async def _answers(self) -> bool:
        doing = f"asking RabbitMQ at {self.address}"
        await self.call(doing, self.channel.flow(active=True), is_bounded=False)
        return True

    def _on_closing(self, closing: asyncio.Future[object]) -> None:
        error = None if closing.cancelled() else closing.exception()
        if error is None or isinstance(error, asyncio.CancelledError):
            self._lose(TimedOut(f"RabbitMQ at {self.address} showed no sign of life"))
        else:
            unknown = Unreadable(f"{self.doing}: a frame can't be read: {type(error).__name__}")
            self._lose(of_exception(error, self.doing) or unknown)

    def _lose(self, reason: RelayError) -> None:
        self.loss = self.loss or reason
        self.wake.set()
        self._hold_or_not()

    def _hold_or_not(self) -> None:
        self._frames.hold(is_held=self._is_held and not self._calls and self.loss is None)


async def _answer(question: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
    with suppress(RelayError):
        return await question()
    return None
