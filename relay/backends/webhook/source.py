"""The webhook source: see the package for what it promises.

A JSON object is one message, an array one for each element, a whole array of up to 100,000 being
answered as one. What comes while a batch is being written gathers for the next one, a fiftieth of a
second at most. A refusal (authentication, signature, JSON, size) has its reason in JSON. 503 with
``Retry-After`` says that it can't be written now: no answer within ``answer_timeout_ms``, too much
waiting already, or an end of the pipeline. A request whose sender has gone away, or was told 503
after its messages were handed on, may still be delivered. The dedup key is ours where the message
is ours, with ``signature: stripe`` the event's id in the body (and its ``type`` the event type),
else ``Idempotency-Key``, else the sender's id (``webhook-id``, ``svix-id``, ``X-GitHub-Delivery``),
with ``:{index}`` behind it for an element of an array, else a random UUID: then a repetition can't
be told from a new message, unless ``dedup_key_from`` names what can.

Relays on one host need a port each. Several pipelines of a relay may share one ``listen_addr`` with
different paths and the same TLS keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import msgspec

from relay.backends.webhook.intake import Intake
from relay.backends.webhook.listener import Answer, Listener, attach, detach, unavailable
from relay.backends.webhook.options import WebhookSourceOptions, check_source
from relay.backends.webhook.signature import is_same, verifier
from relay.context import BackendContext
from relay.contracts import Batch, NothingExpires
from relay.endpoint import parse_address
from relay.errors import MessageTooLarge, MessageUndecodable, NotConnected
from relay.events import RequestRefused
from relay.message import RelayMessage
from relay.options import parse_options

_IDLE_POLL_S = 0.9
_WORTH_A_BATCH = 32
_GATHERING_S = 0.02
# What may be waiting or being read at a time; whoever comes then is told to come again.
_WAITING_MESSAGES = 20_000
_WAITING_BYTES = 64 * 1024 * 1024


class _Request:
    """One request that waits for its messages to be settled."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.unsettled = count
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    @property
    def is_answered(self) -> bool:
        return self.answer.done()

    def settle_one(self) -> None:
        self.unsettled -= 1
        if self.unsettled == 0:
            self.give(Answer(200, accepted=self.count))

    def give(self, answer: Answer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


_Received = tuple[_Request, RelayMessage]


class _Position(msgspec.Struct, frozen=True, eq=False):
    """The messages of one batch, each with its request."""

    received: Sequence[_Received]


class WebhookSource(NothingExpires):
    """Receives requests and answers each when all of its messages are settled."""

    # A load balancer sends anywhere.
    runs_everywhere: ClassVar[bool] = True

    def __init__(self, options: WebhookSourceOptions, context: BackendContext) -> None:
        self._options = options
        self._context = context
        self._batch_size = context.batch_size
        self._batch_bytes = context.batch_bytes
        self._intake = Intake(options)
        self._verify = verifier(options)
        self._auth_header = (options.auth_header or "Authorization").lower()
        self._listener: Listener | None = None
        # Received and not handed out yet, oldest first.
        self._waiting: deque[_Received] = deque()
        self._out: list[_Position] = []
        self._held_bytes = 0
        self._handed_out = 0
        self._is_stuck = False
        # Something has arrived, or is settled.
        self._news = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, WebhookSourceOptions, path="source")
        parse_address(parsed.listen_addr, "source.listen_addr")
        check_source(parsed)
        return cls(parsed, context)

    @property
    def address(self) -> str:
        """``host:port`` on which it listens; what it was told while it does not."""
        return self._options.listen_addr if self._listener is None else self._listener.address

    @property
    def waiting_messages(self) -> int:
        """How many messages were received and not handed out yet."""
        return len(self._waiting)

    @property
    def max_body_bytes(self) -> int:
        """Larger bodies are refused."""
        return self._options.max_body_bytes

    async def connect(self) -> None:
        """Listen, or go on listening; what still has a waiting sender comes again.

        Raises `ConfigurationError` where the address, the path or the certificate can't be used.
        """
        for position in reversed(self._out):
            self._waiting.extendleft(reversed(position.received))
        self._out.clear()
        self._forget_answered()
        self._is_stuck = False
        if self._listener is None:
            self._listener = await attach(self._options, self)

    async def describe(self) -> dict[str, str]:
        """Where it listens."""
        return {"listening": self.address, "path": self._options.path}

    async def poll(self) -> Batch:
        """What was received, oldest first."""
        if self._listener is None:
            raise NotConnected("the webhook source does not listen")
        if not self._out:
            self._is_stuck = False
        await self._until(lambda: bool(self._waiting), _IDLE_POLL_S)
        if self._waiting:
            await self._until(self._is_worth_a_batch, _GATHERING_S)
        self._is_interrupted = False
        received = self._taken()
        if not received:
            return Batch(is_end_of_backlog=True)
        position = _Position(received)
        self._out.append(position)
        self._handed_out += len(received)
        return Batch(
            messages=[message for _, message in received],
            position=position,
            checkpoint=f"{self._handed_out} received",
            is_end_of_backlog=not self._waiting,
        )

    def interrupt(self) -> None:
        """Make a waiting `poll` return, or the next one that would wait."""
        self._is_interrupted = True
        self._news.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Answer 200 to every request whose last messages these are; a batch that is void, none."""
        self._is_stuck = False
        for request, _ in self._withdrawn(batch):
            request.settle_one()

    async def reject(self, batch: Batch) -> None:
        """Answer 503 to the requests concerned: their senders come again."""
        for request, _ in self._withdrawn(batch):
            request.give(unavailable("the relay releases what it can't write now"))
        self._forget_answered()

    async def is_healthy(self) -> bool:
        """True while connections are accepted."""
        return self._listener is not None and self._listener.is_listening

    async def aclose(self) -> None:
        """Answer 503 to every request that waits, and stop listening unless others share it."""
        listener, self._listener = self._listener, None
        for received in (self._waiting, *(position.received for position in self._out)):
            for request, _ in received:
                request.give(unavailable("this receiver is stopping"))
        self._waiting.clear()
        self._out.clear()
        if listener is not None:
            await detach(listener, self._options.path)

    def admit(self, headers: Mapping[str, str], size_bytes: int) -> Answer | None:
        """Refuse a request by its headers, or reserve room for it."""
        expected = self._options.auth_value
        if expected is not None:
            given = headers.get(self._auth_header)
            if given is None or not is_same(given, expected):
                reason = "is missing" if given is None else "does not have the value agreed on"
                return Answer(401, reason=f"the header {self._auth_header} {reason}")
        unreadable = self._intake.unreadable(headers)
        if unreadable is not None:
            return Answer(415, reason=unreadable)
        room = max(_WAITING_BYTES, self.max_body_bytes)
        if self._listener is None:
            return unavailable("this receiver is stopping")
        if self._is_stuck:
            return unavailable("what came before can't be written at the moment")
        if self.waiting_messages >= _WAITING_MESSAGES or self._held_bytes + size_bytes > room:
            return unavailable("too much is waiting already")
        self._held_bytes += size_bytes
        return None

    def release(self, size_bytes: int) -> None:
        """Give the room of an admitted request back."""
        self._held_bytes -= size_bytes

    async def receive(
        self, headers: Mapping[str, str], raw: Mapping[str, str], body: bytes
    ) -> Answer:
        """Wait until all messages of the request are settled, for as long as is configured."""
        refusal = self._verify(headers, body)
        if refusal is not None:
            return Answer(401, reason=refusal)
        try:
            messages = self._intake.messages(headers, raw, body)
        except MessageTooLarge as error:
            return Answer(413, reason=error.problem)
        except MessageUndecodable as error:
            return Answer(400, reason=error.problem)
        if not messages:
            return Answer(200, accepted=0)
        # It may have closed while the body was read.
        if self._listener is None:
            return unavailable("this receiver is stopping")
        request = _Request(len(messages))
        is_first = not self._waiting
        self._waiting.extend((request, message) for message in messages)
        # Whoever waits would look again at each message, and find that one more is not enough.
        if is_first or self._is_worth_a_batch():
            self._news.set()
        # A timer for each is cheaper than a timeout around each.
        patience = asyncio.get_running_loop().call_later(
            self._options.answer_timeout_ms / 1000, self._give_up, request
        )
        try:
            return await request.answer
        finally:
            patience.cancel()

    def refused(self, status: int, reason: str) -> None:
        """Let it be counted: only the sender saw it."""
        self._context.emit(
            RequestRefused(
                pipeline=self._context.pipeline,
                direction=self._context.direction,
                status=status,
                reason=reason,
            )
        )

    def _give_up(self, request: _Request) -> None:
        """Tell a sender who has waited for as long as is configured to come again."""
        if not request.is_answered:
            self._is_stuck = True
            request.give(unavailable("it was not written in time"))
            self._forget_answered()

    def _forget_answered(self) -> None:
        """Senders who were told to come again will; what is not handed out yet need not be."""
        self._waiting = deque(one for one in self._waiting if not one[0].is_answered)

    def _taken(self) -> Sequence[_Received]:
        """The oldest that fit into a batch; one always, where there is any."""
        taken: list[_Received] = []
        left_bytes = self._batch_bytes
        while self._waiting and len(taken) < self._batch_size:
            left_bytes -= len(self._waiting[0][1].payload)
            if taken and left_bytes < 0:
                break
            taken.append(self._waiting.popleft())
        return taken

    async def _until(self, condition: Callable[[], bool], most_s: float) -> None:
        """Wait for it, for so long at most, and no longer than until somebody interrupts."""
        if condition() or self._is_interrupted:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while not condition() and not self._is_interrupted:
                    self._news.clear()
                    await self._news.wait()

    def _is_worth_a_batch(self) -> bool:
        """Whether to hand out what is here, or to gather more while another batch is in flight.

        Each batch costs a transaction, however small. Senders wait for their answers and send
        nothing meanwhile, so that small batches would stay small.
        """
        return not self._out or self.waiting_messages >= min(_WORTH_A_BATCH, self._batch_size)

    def _withdrawn(self, batch: Batch) -> Sequence[_Received]:
        """Take the messages of an unacknowledged batch; none of one that is void."""
        position = batch.position
        if not isinstance(position, _Position) or position not in self._out:
            return ()
        self._out.remove(position)
        self._news.set()
        return position.received
