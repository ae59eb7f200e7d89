"""The webhook sink: see the package for what it promises.

With ``batch_mode``, the default, messages go as one JSON array per request, one request at a time,
so that order is kept whatever happens; it costs a round trip per batch. Without it each message is
a request of its own and up to ``max_in_flight`` are in flight. With ``ordering`` ``strict``, the
default, a message then waits for the answer to the one before it *of its own key*; that costs
nothing while keys vary, and a round trip per event where one key has them all. With ``pipelined``
nothing waits, and an event may be accepted before its predecessor of the same key.

``Idempotency-Key`` is the dedup key, and for an array a digest of its dedup keys. A request that is
repeated after a failure holds the same messages under the same key. Only where the relay itself was
restarted in between may an array be cut in another place; each element of the ``envelope`` and
``cloudevents`` formats still carries its own dedup key. An array that is refused (4xx) is halved
until the messages concerned are found; 413 halves it too and makes the next ones smaller. What
``Retry-After`` asks for is told to the loop, which waits up to an hour. Redirects are not followed,
cookies and proxies of the environment not used. Headers carry any text
(`relay.backends.webhook.header`). What a receiver answers is neither kept nor logged.

What the formats carry: ``envelope`` everything; ``payload`` everything in a request of its own, and
in an array the rows alone; ``cloudevents`` everything but, in an array, the publisher's headers.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import msgspec

from relay import wire
from relay.backends.webhook.client import Client
from relay.backends.webhook.header import SUBJECT, RawHeaders, batch_key, encode, idempotency_key
from relay.backends.webhook.options import WebhookSinkOptions, check_sink, target_of
from relay.context import BackendContext
from relay.contracts import ALL_ACCEPTED, Failure, PublishResult
from relay.errors import (
    ConfigurationError,
    ErrorKind,
    MessageTooLarge,
    MessageUndecodable,
    NotConnected,
    Outage,
)
from relay.flight import Flight
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import compile_routing

_ARRAY_BYTES = 1024 * 1024
# So many refusals in a row without one acceptance, and a publish searches no further.
_FRUITLESS_REQUESTS = 60
_BATCH_CONTENT_TYPES: Mapping[wire.Format, str] = {
    **wire.CONTENT_TYPES,
    "cloudevents": "application/cloudevents-batch+json",
}


class _Outgoing(msgspec.Struct, frozen=True):
    """What of a publish will be sent, in order: messages, their index there, and their bodies."""

    indexes: Sequence[int]
    messages: Sequence[RelayMessage]
    bodies: Sequence[bytes]


class _Unsettled(msgspec.Struct, frozen=True):
    """An array of which it is not known whether it was accepted: how many, under which key."""

    count: int
    key: str


class WebhookSink:
    """Sends messages to one receiver, as arrays or one by one."""

    def __init__(self, options: WebhookSinkOptions, context: BackendContext) -> None:
        """`from_options` checks what this takes."""
        self._options = options
        self._target = target_of(options)
        self._render = compile_routing(options.subject_template, options.routing)
        self._encode = wire.bodies_encoder(options.format, namespace=context.dedup_namespace)
        self._headers_of = wire.headers_encoder(options.format, wire.HTTP)
        self._is_strict = context.ordering != "pipelined"
        self._client = Client(options, self._target)
        self._array_headers = _array_headers(options.format)
        self._content_type = wire.CONTENT_TYPES[options.format].encode()
        self._array_bytes = _ARRAY_BYTES
        self._unsettled: _Unsettled | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, WebhookSinkOptions, path="sink")
        check_sink(parsed, target_of(parsed))
        if context.ordering == "pipelined" and parsed.batch_mode:
            raise ConfigurationError(
                "ordering pipelined has no effect on batch_mode, which sends one array at a time",
                remedy="leave it out, or set batch_mode to false",
            )
        return cls(parsed, context)

    async def connect(self) -> None:
        """See that the receiver can be reached, over TLS where it should be; nothing is sent.

        Whether it knows us shows at the first request only.
        """
        await self._client.open()
        self._array_bytes = _ARRAY_BYTES

    async def describe(self) -> dict[str, str]:
        """Where requests go; the rest of the URL may be secret."""
        mode = "arrays" if self._options.batch_mode else "one request per message"
        return {"server": self._target.address, "mode": mode}

    def subject_of(self, message: RelayMessage) -> str:
        """The subject by template or routing, which the message bears in its metadata."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Send all; see the package for order and for what counts as accepted.

        Sending stops at the first failure that is not a message's own; what was not sent fails for
        the same reason.
        """
        if not self._client.is_open:
            raise NotConnected("the webhook sink is not connected")
        failures: list[Failure] = []
        outgoing = self._encoded(messages, failures)
        if self._options.batch_mode:
            await self._send_arrays(outgoing, failures)
        else:
            await self._send_each(outgoing, failures)
        if not failures:
            return ALL_ACCEPTED
        return PublishResult(failures=sorted(failures, key=lambda failure: failure.index))

    async def is_healthy(self) -> bool:
        """True when the receiver accepts connections now."""
        return self._client.is_open and await self._client.is_reachable()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _encoded(self, messages: Sequence[RelayMessage], failures: list[Failure]) -> _Outgoing:
        """What can be sent of these; why the rest can't goes into ``failures``."""
        made = self._encode(messages)
        bodies = [body for body in made if isinstance(body, bytes)]
        is_bare_array = self._options.batch_mode and self._options.format == "payload"
        limit = self._options.max_body_bytes - 2 * self._options.batch_mode
        # As a rule nothing is wrong with any of them.
        if (
            len(bodies) == len(made)
            and not is_bare_array
            and max(map(len, bodies), default=0) <= limit
        ):
            return _Outgoing(range(len(bodies)), messages, bodies)
        bodies.clear()
        indexes: list[int] = []
        for index, (message, body) in enumerate(zip(messages, made, strict=True)):
            if isinstance(body, MessageUndecodable):
                failures.append(Failure(index, body))
            elif is_bare_array and not message.is_json and not wire.is_json(body):
                not_json = MessageUndecodable(
                    "the payload is not JSON, which an array has to contain"
                )
                failures.append(Failure(index, not_json))
            elif len(body) > limit:
                too_large = MessageTooLarge(
                    f"the message has {len(body)} bytes, sink.max_body_bytes allows {limit} bytes"
                )
                failures.append(Failure(index, too_large))
            else:
                indexes.append(index)
                bodies.append(body)
        return _Outgoing(indexes, [messages[index] for index in indexes], bodies)

    async def _send_arrays(self, outgoing: _Outgoing, failures: list[Failure]) -> None:
        """Send one array after the other, halving what is refused until each culprit is found."""
        keys = [message.dedup_key for message in outgoing.messages]
        arrays = deque(self._cut(outgoing.bodies, keys))
        fruitless = 0
        while arrays:
            start, end = arrays.popleft()
            key = batch_key(keys[start:end])
            body = b"[%b]" % b",".join(outgoing.bodies[start:end])
            error = await self._client.send(body, self._array_headers, key)
            if error is None:
                self._unsettled = None
                fruitless = 0
                continue
            fruitless += 1
            if error.kind is not ErrorKind.MESSAGE:
                self._unsettled = _Unsettled(end - start, key)
                failures += [Failure(index, error) for index in outgoing.indexes[start:end]]
                break
            if isinstance(error, MessageTooLarge):
                self._array_bytes = max(1, len(body) // 2)
            if end - start == 1:
                failures.append(Failure(outgoing.indexes[start], error))
            else:
                half = (start + end) // 2
                arrays.extendleft(((half, end), (start, half)))
            if fruitless >= _FRUITLESS_REQUESTS:
                error = Outage(f"{fruitless} requests in a row were refused, the last: {error}")
                break
        for start, end in arrays:
            failures += [
                Failure(index, error, was_sent=False)
                for index in outgoing.indexes[start:end]
                if error
            ]

    def _cut(self, bodies: Sequence[bytes], keys: Sequence[str]) -> Iterator[tuple[int, int]]:
        """From where to where arrays of a bounded size go, one behind the other.

        What may have been accepted already is cut as it was then.
        """
        start = 0
        unsettled = self._unsettled
        if unsettled is not None and batch_key(keys[: unsettled.count]) == unsettled.key:
            yield 0, unsettled.count
            start = unsettled.count
        limit = min(self._array_bytes, self._options.max_body_bytes)
        sums = list(itertools.accumulate(map(len, bodies), initial=0))

        def size_bytes(end: int) -> int:
            # A bracket in front, and a comma or a bracket behind each.
            return 1 + sums[end] - sums[start] + end - start

        while start < len(bodies):
            ends = range(start + 1, len(bodies) + 1)
            end = start + max(1, bisect_right(ends, limit, key=size_bytes))
            yield start, end
            start = end

    async def _send_each(self, outgoing: _Outgoing, failures: list[Failure]) -> None:
        flight = Flight(
            outgoing.messages,
            is_strict=self._is_strict,
            window=self._options.max_in_flight,
        )

        async def send() -> None:
            while (number := flight.take()) is not None:
                message = outgoing.messages[number]
                error = await self._client.send(
                    outgoing.bodies[number],
                    self._headers(message),
                    idempotency_key(message.dedup_key),
                )
                if error is None:
                    flight.accept((number,))
                else:
                    flight.fail(number, error)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(self._options.max_in_flight, len(outgoing.bodies))):
                tasks.create_task(send())
        failures += [
            Failure(outgoing.indexes[failed.index], failed.error, was_sent=failed.was_sent)
            for failed in flight.failures()
        ]

    def _headers(self, message: RelayMessage) -> RawHeaders:
        headers = self._headers_of(message)
        if message.subject:
            headers = {**headers, SUBJECT: message.subject}
        return [(b"Content-Type", self._content_type), *encode(headers)]


def _array_headers(format_: wire.Format) -> RawHeaders:
    headers = [(b"Content-Type", _BATCH_CONTENT_TYPES[format_].encode())]
    # A bare array of rows has no metadata that a receiver of ours could restore.
    if format_ != "payload":
        headers.append((wire.HTTP.format.encode(), format_.encode()))
    return headers
