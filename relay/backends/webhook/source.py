"""The webhook source: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import msgspec

from relay.backends.webhook.intake import Intake
from relay.backends.webhook.listener import Answer, Listener, attach, detach, unavailable
from relay.backends.webhook.options import WebhookSourceOptions, check_source, listen_address
from relay.backends.webhook.signature import is_same, verifier
from relay.context import BackendContext
from relay.contracts import Batch
from relay.errors import MessageUndecodable, NotConnected
from relay.message import RelayMessage
from relay.options import parse_options

_IDLE_POLL_S = 0.9
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

    def settle(self, count: int) -> None:
        self.unsettled -= count
        if self.unsettled == 0:
            self.give(Answer(200, accepted=self.count))

    def give(self, answer: Answer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


class _Run(msgspec.Struct, frozen=True):
    """Messages that follow each other, all of one request."""

    request: _Request
    messages: Sequence[RelayMessage]


class _Position:
    """The messages of one batch. Compared by identity."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self.runs = runs


class WebhookSource:
    """Receives requests and answers each when all of its messages are settled."""

    # A load balancer sends anywhere.
    runs_everywhere: ClassVar[bool] = True

    def __init__(self, options: WebhookSourceOptions, context: BackendContext) -> None:
        self._options = options
        self._batch_size = context.batch_size
        self._batch_bytes = context.batch_bytes
        self._intake = Intake(options)
        self._verify = verifier(options)
        self._auth_header = (options.auth_header or "Authorization").lower()
        self._listener: Listener | None = None
        self._queue: deque[_Run] = deque()
        self._out: list[_Position] = []
        self._held_bytes = 0
        self._handed_out = 0
        self._is_stuck = False
        self._arrived = asyncio.Event()

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, WebhookSourceOptions, path="source")
        listen_address(parsed.listen_addr)
        check_source(parsed)
        return cls(parsed, context)

    @property
    def keep_alive_interval_s(self) -> float | None:
        """Never: a request that waits too long is answered, whatever is done about it."""
        return None

    @property
    def address(self) -> str:
        """``host:port`` on which it listens; what it was told while it does not."""
        return self._options.listen_addr if self._listener is None else self._listener.address

    @property
    def waiting_messages(self) -> int:
        """How many messages were received and not handed out yet."""
        return sum(len(run.messages) for run in self._queue)

    @property
    def max_body_bytes(self) -> int:
        """Larger bodies are refused."""
        return self._options.max_body_bytes

    async def connect(self) -> None:
        """Listen, or go on listening; what is out and still waited for is handed out again.

        Raises `ConfigurationError` where the address, the path or the certificate can't be used.
        """
        for position in reversed(self._out):
            self._queue.extendleft(
                run for run in reversed(position.runs) if not run.request.is_answered
            )
        self._out.clear()
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
        if not self._queue:
            try:
                async with asyncio.timeout(_IDLE_POLL_S):
                    await self._arrived.wait()
            except TimeoutError:
                pass
        self._arrived.clear()
        runs = self._take()
        if not runs:
            return Batch(is_end_of_backlog=True)
        messages = [message for run in runs for message in run.messages]
        position = _Position(runs)
        self._out.append(position)
        self._handed_out += len(messages)
        return Batch(
            messages=messages,
            position=position,
            checkpoint=f"{self._handed_out} received",
            is_end_of_backlog=not self._queue,
        )

    def interrupt(self) -> None:
        """Make a waiting `poll` return."""
        self._arrived.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Answer 200 to every request whose last messages these are; a batch that is void, none."""
        self._is_stuck = False
        for run in self._withdrawn(batch):
            run.request.settle(len(run.messages))

    async def keep_alive(self, batch: Batch) -> None:
        """Nothing: the sender can't be told."""

    async def reject(self, batch: Batch) -> None:
        """Answer 503 to the requests concerned: their senders come again."""
        for run in self._withdrawn(batch):
            run.request.give(unavailable("the relay lets go of what it can't write now"))
        self._forget_answered()

    async def is_healthy(self) -> bool:
        """True while connections are accepted."""
        return self._listener is not None and self._listener.is_listening

    async def aclose(self) -> None:
        """Answer 503 to every request that waits, and stop listening unless others share it."""
        listener, self._listener = self._listener, None
        runs = [*self._queue, *(run for position in self._out for run in position.runs)]
        self._queue.clear()
        self._out.clear()
        for run in runs:
            run.request.give(unavailable("this receiver is stopping"))
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
        except MessageUndecodable as error:
            return Answer(400, reason=error.problem)
        if not messages:
            return Answer(200, accepted=0)
        # It may have closed while the body was read.
        if self._listener is None:
            return unavailable("this receiver is stopping")
        request = _Request(len(messages))
        self._queue.append(_Run(request, messages))
        self._arrived.set()
        try:
            async with asyncio.timeout(self._options.answer_timeout_ms / 1000):
                return await request.answer
        except TimeoutError:
            self._is_stuck = True
            self._forget_answered()
            return unavailable("it was not written in time")

    def _take(self) -> list[_Run]:
        taken: list[_Run] = []
        room, room_bytes = self._batch_size, self._batch_bytes
        while self._queue and room > 0:
            run = self._queue[0]
            count, size = _fitting(run.messages[:room], room_bytes, is_first=not taken)
            if count == 0:
                break
            if count == len(run.messages):
                taken.append(self._queue.popleft())
            else:
                taken.append(_Run(run.request, run.messages[:count]))
                self._queue[0] = _Run(run.request, run.messages[count:])
            room -= count
            room_bytes -= size
        return taken

    def _withdrawn(self, batch: Batch) -> Sequence[_Run]:
        """The messages of a batch that is out, which it is no more; none of one that is void."""
        position = batch.position
        if not isinstance(position, _Position) or position not in self._out:
            return ()
        self._out.remove(position)
        return position.runs

    def _forget_answered(self) -> None:
        """Senders who were told to come again will; what is not handed out yet need not be."""
        self._queue = deque(run for run in self._queue if not run.request.is_answered)


def _fitting(
    messages: Sequence[RelayMessage], room_bytes: int, *, is_first: bool
) -> tuple[int, int]:
    """How many of these fit, from the first on, and their bytes; one always, if it is the first."""
    total = 0
    for count, message in enumerate(messages):
        size = len(message.payload)
        if total + size > room_bytes and (count or not is_first):
            return count, total
        total += size
    return len(messages), total
