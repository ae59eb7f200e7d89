"""The dead letters of one pipeline: storing them, and publishing them again when asked to."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from relay.cancellation import reraise_cancellation
from relay.catalog import DeadLetter, StoredDeadLetter
from relay.contracts import Failure
from relay.errors import ErrorKind, MessageRejected, MessageUndecodable, Outage, RelayError
from relay.events import DeadLettered, DeadLettersRetried, Direction
from relay.message import RelayMessage
from relay.pipeline_events import PipelineEvents

# Gives these, in order, without those that the pipeline leaves out. Raises `MessageRejected` where
# one of them is refused; called with one at a time, it shows which.
Transform = Callable[[Sequence[RelayMessage]], list[RelayMessage]]
Take = Callable[[], Awaitable[Sequence[RelayMessage]]]
# One attempt with what is then taken; None where the sink must not be tried now.
Attempt = Callable[[Take], Awaitable[Sequence[Failure] | None]]

_RETRY_ROWS = 100


class DeadLetters(Protocol):
    """What is asked of `relay.catalog.Catalog`; every method is durable when it returns."""

    async def dead_letter(
        self, pipeline: str, direction: Direction, letters: Sequence[DeadLetter]
    ) -> list[int]:
        """Keep these; gives their ids in order."""

    async def take_dead_letters(
        self, pipeline: str, max_rows: int, lease_s: int
    ) -> list[StoredDeadLetter]:
        """Those for which a retry was asked; nobody else's for so long."""

    async def settle_dead_letters(self, ids: Sequence[int]) -> None:
        """These were delivered."""

    async def fail_dead_letters(
        self, letters: Sequence[StoredDeadLetter], errors: Sequence[str]
    ) -> None:
        """These were rejected again."""

    async def put_back(self, ids: Sequence[int]) -> None:
        """Ask for a retry of these."""


class _Retry(msgspec.Struct):
    """Dead letters that were taken: those to publish, and those that can't be any more."""

    tried: list[StoredDeadLetter] = msgspec.field(default_factory=list)
    rejected: list[tuple[StoredDeadLetter, RelayError]] = msgspec.field(default_factory=list)


class DeadLetterQueue:
    """Stores what is rejected, and retries what is requested.

    *Suspect* are the dead letters since the sink last accepted anything: should it turn out that
    the sink is broken, they are not poison.
    """

    def __init__(
        self,
        *,
        dead_letters: DeadLetters,
        shape: Transform,
        transform: Transform,
        events: PipelineEvents,
        look_again_s: float,
        lease_s: int,
    ) -> None:
        self._dead_letters = dead_letters
        self._shape = shape
        self._transform = transform
        self._events = events
        self._look_again_s = look_again_s
        self._lease_s = lease_s
        self._retry_wanted = asyncio.Event()
        self._is_ending = False
        self._suspects: list[int] = []

    def want_retry(self) -> None:
        """Somebody asked for dead letters to be tried again."""
        self._retry_wanted.set()

    def end_retrying(self) -> None:
        """Make `retry` return as soon as what it has in hand is settled."""
        self._is_ending = True
        self._retry_wanted.set()

    def clear_suspects(self) -> None:
        """The sink works."""
        self._suspects.clear()

    async def put_back_suspects(self) -> None:
        """Request a retry of the suspects, since the sink is broken. Raises `Outage`."""
        if suspects := tuple(self._suspects):
            await self._dead_letters.put_back(suspects)
            del self._suspects[: len(suspects)]
            self._retry_wanted.set()

    async def store(
        self,
        refused: Sequence[tuple[RelayMessage, RelayError]],
        *,
        attempts: int,
        is_transformed: bool,
        is_shaped: bool = False,
    ) -> None:
        """Dead-letter these. Raises `Outage`, and then none is stored."""
        letters = [
            DeadLetter(
                message=message,
                is_transformed=is_transformed,
                is_shaped=is_shaped,
                error_kind=error.kind.value,
                error=error.quoting or str(error),
                attempts=attempts,
            )
            for message, error in refused
        ]
        ids = await self._dead_letters.dead_letter(**self._events.labels, letters=letters)
        self._suspect(ids, [error for _, error in refused])
        for (kind, text), count in Counter(
            (error.kind, str(error)) for _, error in refused
        ).items():
            self._events.emit(
                DeadLettered(**self._events.labels, messages=count, kind=kind, error=text)
            )

    async def retry(self, attempt: Attempt) -> None:
        """Publish dead letters again whenever somebody asks, until `end_retrying`.

        They go out after newer events of their key: a retry repeats an event, not a history.
        Raises `ConfigurationError`.
        """
        self._is_ending = False
        self._retry_wanted.set()
        is_any_left = False
        while not self._is_ending:
            reraise_cancellation()
            try:
                async with asyncio.timeout(self._look_again_s):
                    await self._retry_wanted.wait()
            except TimeoutError:
                # Nothing notifies us that another relay died with dead letters it had taken.
                if not is_any_left and not self._lease_s:
                    continue
            self._retry_wanted.clear()
            is_any_left = True
            try:
                is_any_left = not await self._publish_requested(attempt)
            except Outage as error:
                # They stay requested: an outage of the catalog must not end the session for them.
                reraise_cancellation(error)

    async def _publish_requested(self, attempt: Attempt) -> bool:
        """True when no request is left."""
        is_settled = True
        while is_settled and not self._is_ending:
            retry = _Retry()
            failures = await attempt(partial(self._take, retry))
            if failures is None:
                return False
            if not (retry.tried or retry.rejected):
                break
            is_settled = await self._settle(retry, failures)
        return is_settled

    async def _take(self, retry: _Retry) -> Sequence[RelayMessage]:
        """Take some of what was requested, and do what is left to be done with it."""
        messages: list[RelayMessage] = []
        for letter in await self._dead_letters.take_dead_letters(
            self._events.labels["pipeline"], _RETRY_ROWS, self._lease_s
        ):
            try:
                messages += self._transformed(letter)
                retry.tried.append(letter)
            except MessageRejected as error:
                retry.rejected.append((letter, error))
        return messages

    async def _settle(self, retry: _Retry, failures: Sequence[Failure]) -> bool:
        """True when all were settled one way or the other; an outage leaves them requested."""
        failed = {failure.index for failure in failures}
        delivered = [letter.id for index, letter in enumerate(retry.tried) if index not in failed]
        refused = [failure for failure in failures if failure.error.kind is ErrorKind.MESSAGE]
        rejected = [
            *retry.rejected,
            *((retry.tried[failure.index], failure.error) for failure in refused),
        ]
        if delivered:
            await self._dead_letters.settle_dead_letters(delivered)
        if rejected:
            again, errors = zip(*rejected, strict=True)
            await self._dead_letters.fail_dead_letters(
                again, [error.quoting or str(error) for error in errors]
            )
            self._suspect([letter.id for letter in again], errors)
        self._events.emit(
            DeadLettersRetried(
                **self._events.labels, delivered=len(delivered), failed=len(rejected)
            )
        )
        return len(refused) == len(failures)

    def _transformed(self, letter: StoredDeadLetter) -> Sequence[RelayMessage]:
        """What is left to be done with it, done. Raises `MessageRejected`."""
        messages: Sequence[RelayMessage] = [letter.message]
        if letter.is_transformed:
            return messages
        if not letter.is_shaped:
            messages = self._shape(messages)
        if not (messages := self._transform(messages)):
            # Settled it would be gone without having been delivered: for people to decide.
            raise MessageUndecodable(
                "the pipeline's ops or where leave it out now",
                remedy="purge it, or change them and try again",
            )
        return messages

    def _suspect(self, ids: Sequence[int], errors: Sequence[RelayError]) -> None:
        self._suspects += [
            id_ for id_, error in zip(ids, errors, strict=True) if is_sinks_verdict(error)
        ]


def is_sinks_verdict(error: RelayError) -> bool:
    """Whether the sink itself has looked at the message and rejected it."""
    return isinstance(error, MessageRejected) and not error.found_before_sending
