"""Settling one batch: every message of it ends accepted by the sink or durable as a dead letter.

Here, and only here, stands what happens when a publish fails: retry what is transient, in order
and for ever unless told otherwise; dead-letter what is rejected for good; and recognise that a
sink which rejects everything is broken, not fed with poison.

A far side that asks for a rest (HTTP's ``Retry-After``) gets it: nothing is published before it is
over, not even dead letters.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta
from typing import Protocol

import msgspec

from relay.backoff import LONGEST_ASKED_WAIT_S, Backoff
from relay.catalog import DeadLetter, StoredDeadLetter
from relay.contracts import Batch, Describing, Failure, Sink, Source
from relay.errors import (
    ConfigurationError,
    ErrorKind,
    MessageRejected,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.events import (
    BatchPublished,
    ConnectionChanged,
    DeadLettered,
    DeadLettersRetried,
    Direction,
    Event,
    PipelineState,
    Retried,
    Side,
    StateChanged,
)
from relay.message import RelayMessage

# All of these, in order. Raises `MessageRejected` where one of them is refused; asked for one at a
# time it then shows which.
Transform = Callable[[Sequence[RelayMessage]], list[RelayMessage]]

_RETRY_ROWS = 100
_DESCRIBE_TIMEOUT_S = 2.0
_STOPPING = (PipelineState.STOPPING, "")
_ENDS = frozenset({PipelineState.STOPPED, PipelineState.COMPLETED, PipelineState.FAILED})


class DeadLetters(Protocol):
    """Where messages go that can't be delivered; every method is durable when it returns."""

    async def store(self, letters: Sequence[DeadLetter]) -> list[int]:
        """Keep these; gives their ids in order."""

    async def take(self, max_rows: int) -> list[StoredDeadLetter]:
        """Those for which a retry was asked."""

    async def settle(self, ids: Sequence[int]) -> None:
        """These were delivered."""

    async def fail(self, letters: Sequence[StoredDeadLetter], errors: Sequence[str]) -> None:
        """These were rejected again."""

    async def put_back(self, ids: Sequence[int]) -> None:
        """Ask for a retry of these."""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How failures are met. ``max_attempts`` None: transient failures are retried for ever.

    ``breaker_threshold``: after so many rejections in a row without one success, the sink counts
    as broken and is probed instead of fed.
    """

    initial_s: float = 1.0
    max_s: float = 60.0
    max_attempts: int | None = None
    breaker_threshold: int = 20

    def backoff(self) -> Backoff:
        """A fresh back-off under this policy."""
        return Backoff(self.initial_s, self.max_s)


class Stopping(Exception):
    """The pipeline was asked to stop while a batch could not be settled: give the batch back."""


def heed_cancellation(error: Exception | None = None) -> None:
    """Raise `CancelledError` where this task was cancelled, and it got lost on the way.

    A driver whose clean-up fails while it is cancelled puts that failure in its place, as does a
    task group until Python 3.13; and until 3.12 `asyncio.wait_for`, which drivers use, drops a
    cancellation that comes together with the result.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from error


class Voice:
    """What one pipeline tells its observers, with its name on it; states only when they change."""

    def __init__(self, pipeline: str, direction: Direction, emit: Callable[[Event], None]) -> None:
        self.pipeline = pipeline
        self.direction = direction
        self.emit = emit
        self._state: tuple[PipelineState, str] | None = None

    def state(self, state: PipelineState, reason: str = "") -> None:
        """Tell the state, unless it is what was told last; while stopping, only how it ends."""
        if self._state == (state, reason):
            return
        if self._state == _STOPPING and state not in _ENDS:
            return
        self._state = (state, reason)
        self.emit(
            StateChanged(
                pipeline=self.pipeline, direction=self.direction, state=state, reason=reason
            )
        )

    def connection(
        self, side: Side, *, is_connected: bool, details: Mapping[str, str] | None = None
    ) -> None:
        """Tell that one side was connected or lost."""
        self.emit(
            ConnectionChanged(
                pipeline=self.pipeline,
                direction=self.direction,
                side=side,
                is_connected=is_connected,
                details=details or {},
            )
        )

    def retried(self, side: Side, attempt: int, delay_s: float, error: RelayError) -> None:
        """Tell that something will be tried again."""
        self.state(PipelineState.RETRYING, str(error))
        self.emit(
            Retried(
                pipeline=self.pipeline,
                direction=self.direction,
                side=side,
                attempt=attempt,
                delay_s=delay_s,
                kind=error.kind,
                error=str(error),
            )
        )


class Prepared(msgspec.Struct, frozen=True):
    """What of a batch is ready to be published, and what is refused, with the reason."""

    messages: Sequence[RelayMessage]
    refused: Sequence[tuple[RelayMessage, RelayError]]


_Acceptance = tuple[datetime, Sequence[RelayMessage], AbstractSet[int]]


class Settlement(msgspec.Struct, kw_only=True):
    """How far one batch has come.

    ``tried``: by the id of a pending message, how often it failed itself; a failure that merely
    held it back behind another does not count. ``acceptances``: when the sink accepted what, and
    the indices of what it did not.
    """

    pending: list[RelayMessage]
    tried: dict[int, int] = msgspec.field(default_factory=dict)
    attempts: int = 0
    accepted: int = 0
    duplicates: int = 0
    dead_lettered: int = 0
    duration_s: float = 0.0
    acceptances: list[_Acceptance] = msgspec.field(default_factory=list)


class Delivery:
    """Publishes batches of one pipeline to its sink, whatever it takes."""

    def __init__(
        self,
        *,
        sink: Sink,
        transform: Transform,
        dead_letters: DeadLetters,
        policy: RetryPolicy,
        voice: Voice,
        stop: asyncio.Event,
    ) -> None:
        self._sink = sink
        self._transform = transform
        self._dead_letters = dead_letters
        self._policy = policy
        self._voice = voice
        self._stop = stop
        self._is_connected = False
        # Until when the far side asks not to be tried, by the monotonic clock, and in which words.
        self._rest_until_s = -math.inf
        self._rest_reason = ""
        self._publishing = asyncio.Lock()
        self._retry_wanted = asyncio.Event()
        self._rejections_in_a_row = 0
        self._condemned: list[int] = []
        self._letters_left = False

    def want_dead_letter_retry(self) -> None:
        """Somebody asked for dead letters to be tried again."""
        self._retry_wanted.set()

    async def connect(self) -> None:
        """Connect the sink, trying until it works. Raises `ConfigurationError`, `Stopping`."""
        async with self._publishing:
            await self._persist("sink", self._connect)

    async def aclose(self) -> None:
        """Close the sink."""
        await self._sink.aclose()
        self._lost()

    def prepare(self, batch: Batch) -> Prepared:
        """Transform the messages of a batch; to be done while the one before is under way."""
        refused = [(rejected.message, rejected.error) for rejected in batch.rejected]
        with contextlib.suppress(MessageRejected):
            return Prepared(self._transform(batch.messages), refused)
        messages: list[RelayMessage] = []
        for message in batch.messages:
            try:
                messages += self._transform([message])
            except MessageRejected as error:
                refused.append((message, error))
        return Prepared(messages, refused)

    async def settle(self, prepared: Prepared) -> Settlement:
        """Return when every message of the batch is accepted or dead-lettered.

        What is returned is for `tell`. Raises `Stopping` when that can't be had before the pipeline
        stops, and `ConfigurationError` when it never will be.
        """
        started = time.perf_counter()
        work = Settlement(pending=list(prepared.messages))
        refused = prepared.refused
        try:
            if refused:
                await self._bury(refused, attempts=1, is_transformed=False)
                work.dead_lettered += len(refused)
            if work.pending:
                async with self._publishing:
                    await self._publish_all(work)
        except Stopping:
            if work.accepted or work.dead_lettered:
                work.duration_s = time.perf_counter() - started
                self.tell(work)
            raise
        self._voice.state(PipelineState.RUNNING)
        work.duration_s = time.perf_counter() - started
        return work

    def tell(self, work: Settlement) -> None:
        """Tell the observers how a batch was settled; apart, so that the next need not wait."""
        self._voice.emit(
            BatchPublished(
                pipeline=self._voice.pipeline,
                direction=self._voice.direction,
                messages=work.accepted,
                duplicates=work.duplicates,
                dead_lettered=work.dead_lettered,
                duration_s=work.duration_s,
                attempts=work.attempts,
                latencies_s=_latencies_s(work.acceptances),
            )
        )

    async def retry_dead_letters(self) -> None:
        """Publish dead letters again whenever somebody asks; runs until cancelled.

        They go out after newer events of their key: a retry repeats an event, not a history.
        Raises `ConfigurationError`.
        """
        self._retry_wanted.set()
        while True:
            heed_cancellation()
            try:
                async with asyncio.timeout(self._policy.max_s):
                    await self._retry_wanted.wait()
            except TimeoutError:
                if not self._letters_left:
                    continue
            self._retry_wanted.clear()
            self._letters_left = True
            try:
                self._letters_left = not await self._publish_requested_letters()
            except Outage as error:
                # They stay requested: an outage of the catalog must not end the session for them.
                heed_cancellation(error)

    async def _publish_requested_letters(self) -> bool:
        """True when no request is left."""
        while letters := await self._dead_letters.take(_RETRY_ROWS):
            if not await self._publish_letters(letters):
                return False
        return True

    async def _publish_letters(self, letters: Sequence[StoredDeadLetter]) -> bool:
        """True when all were settled one way or the other; an outage leaves them requested."""
        tried: list[StoredDeadLetter] = []
        messages: list[RelayMessage] = []
        rejected: list[tuple[StoredDeadLetter, RelayError]] = []
        for letter in letters:
            try:
                ready = (
                    [letter.message] if letter.is_transformed else self._transform([letter.message])
                )
            except MessageRejected as error:
                rejected.append((letter, error))
            else:
                tried.append(letter)
                messages += ready
        async with self._publishing:
            # What was suspended lets go of the sink when it stops, no better than it was.
            if self._stop.is_set() or self._rest_s() > 0:
                return False
            failures = await self._publish_once(Settlement(pending=messages), messages)
        failed = {failure.index for failure in failures}
        delivered = [letter.id for index, letter in enumerate(tried) if index not in failed]
        refused = [failure for failure in failures if failure.error.kind is ErrorKind.MESSAGE]
        rejected += [(tried[failure.index], failure.error) for failure in refused]
        if delivered:
            await self._dead_letters.settle(delivered)
        if rejected:
            await self._dead_letters.fail(
                [letter for letter, _ in rejected], [str(error) for _, error in rejected]
            )
            self._condemned.extend(
                letter.id for letter, error in rejected if _is_sinks_verdict(error)
            )
        self._voice.emit(
            DeadLettersRetried(
                pipeline=self._voice.pipeline,
                direction=self._voice.direction,
                delivered=len(delivered),
                failed=len(rejected),
            )
        )
        return len(refused) == len(failures)

    async def _publish_all(self, work: Settlement) -> None:
        backoff = self._policy.backoff()
        while work.pending:
            await self._rest()
            work.attempts += 1
            failures = await self._publish_once(work, work.pending)
            rejected, transient = _sorted_out(work.pending, failures)
            if len(failures) < len(work.pending):
                backoff.reset()
            elif rejected and self._is_sink_broken(work, rejected):
                await self._probe(work, rejected[0][1])
                continue
            if rejected:
                await self._bury(rejected, attempts=work.attempts, is_transformed=True)
                work.dead_lettered += len(rejected)
            work.pending = [message for message, _ in transient]
            if transient:
                await self._after_transient(work, transient, backoff)

    async def _publish_once(
        self, work: Settlement, messages: Sequence[RelayMessage]
    ) -> Sequence[Failure]:
        """Publish and account for what was accepted; an outage is the failure of each message."""
        if not messages:
            return ()
        try:
            await self._connect()
            heed_cancellation()
            result = await self._sink.publish(messages)
        except Outage as error:
            heed_cancellation(error)
            self._lost()
            self._grant_rest(error)
            return [Failure(index, error) for index in range(len(messages))]
        except ConfigurationError:
            # Whoever changes what is wrong does so on the far side, too: we go there anew.
            self._lost()
            raise
        failed = {failure.index for failure in result.failures}
        for failure in result.failures:
            if failure.error.kind is ErrorKind.CONFIGURATION:
                self._lost()
                raise failure.error
            if isinstance(failure.error, NotConnected | TimedOut):
                self._lost()
            self._grant_rest(failure.error)
        if len(failed) < len(messages):
            self._rejections_in_a_row = 0
            self._condemned.clear()
            work.accepted += len(messages) - len(failed)
            work.duplicates += result.duplicates
            work.acceptances.append((datetime.now(UTC), messages, failed))
        return result.failures

    def _is_sink_broken(
        self, work: Settlement, rejected: Sequence[tuple[RelayMessage, RelayError]]
    ) -> bool:
        """Called when nothing was accepted: is it the messages, or the sink?

        What the relay found before sending says nothing about the sink. Once a message of this
        batch was accepted, the sink is known to work and the rest is poison.
        """
        if work.accepted:
            return False
        self._rejections_in_a_row += sum(1 for _, error in rejected if _is_sinks_verdict(error))
        return self._rejections_in_a_row >= self._policy.breaker_threshold

    async def _probe(self, work: Settlement, error: RelayError) -> None:
        """Hold the batch and try one message at a time until one is accepted.

        Only the first message of each key is tried, so that no event overtakes another of its key.
        """
        self._voice.state(
            PipelineState.SUSPENDED,
            f"the sink rejected {self._rejections_in_a_row} messages in a row,"
            f" probing until it accepts one: {error}",
        )
        # Requested before it is known when the sink recovers, so that no stop or crash forgets
        # them; they are sent when this batch lets go of the sink.
        if self._condemned:
            condemned = tuple(self._condemned)
            await self._persist("dead letters", lambda: self._dead_letters.put_back(condemned))
            self._condemned.clear()
            self._retry_wanted.set()
        backoff = self._policy.backoff()
        for probe in itertools.cycle(_first_of_each_key(work.pending)):
            await self._pause(backoff.next_s(self._rest_s()))
            work.attempts += 1
            if not await self._publish_once(work, [probe]):
                work.pending = [message for message in work.pending if message is not probe]
                break

    async def _after_transient(
        self,
        work: Settlement,
        transient: Sequence[tuple[RelayMessage, Failure]],
        backoff: Backoff,
    ) -> None:
        limit = self._policy.max_attempts
        if limit is not None and (spent := _spent(work, transient, limit)):
            await self._bury(spent, attempts=limit, is_transformed=True)
            work.dead_lettered += len(spent)
            gone = {id(message) for message, _ in spent}
            work.pending = [message for message in work.pending if id(message) not in gone]
            return
        delay_s = backoff.next_s(self._rest_s())
        errors = (failure.error for _, failure in transient)
        decisive = max(errors, key=lambda error: error.retry_after_s or 0.0)
        self._voice.retried("sink", work.attempts, delay_s, decisive)
        await self._pause(delay_s)

    async def _bury(
        self,
        refused: Sequence[tuple[RelayMessage, RelayError]],
        *,
        attempts: int,
        is_transformed: bool,
    ) -> None:
        letters = [
            DeadLetter(
                message=message,
                is_transformed=is_transformed,
                error_kind=error.kind.value,
                error=str(error),
                attempts=attempts,
            )
            for message, error in refused
        ]
        ids: list[int] = []

        async def store() -> None:
            ids.extend(await self._dead_letters.store(letters))

        await self._persist("dead letters", store)
        self._condemned.extend(
            id_ for id_, (_, error) in zip(ids, refused, strict=True) if _is_sinks_verdict(error)
        )
        for kind, error_text, count in _grouped(refused):
            self._voice.emit(
                DeadLettered(
                    pipeline=self._voice.pipeline,
                    direction=self._voice.direction,
                    messages=count,
                    kind=kind,
                    error=error_text,
                )
            )

    async def _persist(self, what: str, action: Callable[[], Awaitable[None]]) -> None:
        """Do it until it works. Raises `Stopping`, `ConfigurationError`."""
        backoff = self._policy.backoff()
        while True:
            try:
                await action()
            except Outage as error:
                heed_cancellation(error)
                delay_s = backoff.next_s(error.retry_after_s)
                self._voice.retried(
                    "sink" if what == "sink" else "source", backoff.attempt, delay_s, error
                )
                await self._pause(delay_s)
            else:
                return

    async def _connect(self) -> None:
        if self._is_connected:
            return
        await self._sink.connect()
        self._is_connected = True
        self._voice.connection("sink", is_connected=True, details=await described(self._sink))

    def _lost(self) -> None:
        if self._is_connected:
            self._is_connected = False
            self._voice.connection("sink", is_connected=False)

    def _grant_rest(self, error: RelayError) -> None:
        """Note for how long it asks not to be tried again; of several the longest counts."""
        if error.retry_after_s is None:
            return
        until_s = time.monotonic() + min(error.retry_after_s, LONGEST_ASKED_WAIT_S)
        if until_s > self._rest_until_s:
            self._rest_until_s = until_s
            self._rest_reason = str(error)

    def _rest_s(self) -> float:
        """How long the far side still asks not to be tried, in seconds."""
        return max(0.0, self._rest_until_s - time.monotonic())

    async def _rest(self) -> None:
        """Wait for what is left of a rest that something before this publish was told of."""
        if (rest_s := self._rest_s()) > 0:
            self._voice.state(PipelineState.RETRYING, self._rest_reason)
            await self._pause(rest_s)

    async def _pause(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stop.wait()
        if self._stop.is_set():
            raise Stopping


def _sorted_out(
    messages: Sequence[RelayMessage], failures: Sequence[Failure]
) -> tuple[list[tuple[RelayMessage, RelayError]], list[tuple[RelayMessage, Failure]]]:
    """What was rejected for good, and what is to be tried again, in order."""
    rejected: list[tuple[RelayMessage, RelayError]] = []
    transient: list[tuple[RelayMessage, Failure]] = []
    for failure in failures:
        message = messages[failure.index]
        if failure.error.kind is ErrorKind.MESSAGE:
            rejected.append((message, failure.error))
        else:
            transient.append((message, failure))
    return rejected, transient


def _latencies_s(acceptances: Sequence[_Acceptance]) -> list[float]:
    latencies: list[timedelta] = []
    for accepted_at, messages, failed in acceptances:
        created = [message.created_at for message in messages]
        if failed:
            created = [at for index, at in enumerate(created) if index not in failed]
        latencies += map(accepted_at.__sub__, filter(None, created))
    return list(map(timedelta.total_seconds, latencies))


def _spent(
    work: Settlement, transient: Sequence[tuple[RelayMessage, Failure]], limit: int
) -> list[tuple[RelayMessage, RelayError]]:
    """Count this attempt, and give what has had all of its attempts.

    Behind the first transient failure nothing is sent: what waits there, or was not sent for it,
    fails with the very same error, and is not counted.
    """
    spent: list[tuple[RelayMessage, RelayError]] = []
    counted: set[int] = set()
    for message, failure in transient:
        if not failure.was_sent or id(failure.error) in counted:
            continue
        counted.add(id(failure.error))
        work.tried[id(message)] = tried = work.tried.get(id(message), 0) + 1
        if tried >= limit:
            spent.append((message, failure.error))
    return spent


async def described(side: Source | Sink) -> Mapping[str, str]:
    """What one side tells of its far side; where it can't say now, it is connected all the same."""
    if not isinstance(side, Describing):
        return {}
    try:
        async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
            return await side.describe()
    except (RelayError, TimeoutError) as error:
        heed_cancellation(error)
        return {}


def _is_sinks_verdict(error: RelayError) -> bool:
    return isinstance(error, MessageRejected) and not error.found_before_sending


def _first_of_each_key(messages: Sequence[RelayMessage]) -> list[RelayMessage]:
    firsts: dict[str, RelayMessage] = {}
    for message in messages:
        firsts.setdefault(message.key if message.key is not None else message.dedup_key, message)
    return list(firsts.values())


def _grouped(
    refused: Sequence[tuple[RelayMessage, RelayError]],
) -> list[tuple[ErrorKind, str, int]]:
    counts: dict[tuple[ErrorKind, str], int] = {}
    for _, error in refused:
        reason = (error.kind, str(error))
        counts[reason] = counts.get(reason, 0) + 1
    return [(kind, text, count) for (kind, text), count in counts.items()]
