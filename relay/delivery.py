"""Settling one batch: every message of it ends accepted by the sink or durable as a dead letter.

Here, and only here, stands what happens when a publish fails: retry what is transient, in order
and for ever unless limited; dead-letter what is rejected for good; and recognise that a
sink which rejects everything is broken, not fed with poison.

A destination that asks to back off (HTTP's ``Retry-After``) is obeyed: nothing is published before
the time is over, not even dead letters.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta

import msgspec

from relay.backoff import LONGEST_ASKED_WAIT_S, Backoff
from relay.cancellation import reraise_cancellation
from relay.contracts import Batch, Failure, Sink
from relay.dead_letter import DeadLetterQueue, Take, Transform, is_sinks_verdict
from relay.errors import (
    ConfigurationError,
    ErrorKind,
    MessageRejected,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.events import BatchPublished, PipelineState, Side
from relay.message import RelayMessage
from relay.pipeline_events import PipelineEvents


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
    """The pipeline was asked to stop while a batch could not be settled: it is released."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What of a batch is ready to be published, and what is not, with the reason.

    ``rejected``: by the source. ``refused``: by the transform. ``filtered``: so many were left out.
    """

    messages: Sequence[RelayMessage]
    rejected: Sequence[tuple[RelayMessage, RelayError]] = ()
    refused: Sequence[tuple[RelayMessage, RelayError]] = ()
    filtered: int = 0


_Acceptance = tuple[datetime, Sequence[RelayMessage], AbstractSet[int]]


class _Settlement(msgspec.Struct, kw_only=True):
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
    filtered: int = 0
    acceptances: list[_Acceptance] = msgspec.field(default_factory=list)


class Delivery:
    """Publishes batches of one pipeline to its sink, whatever it takes."""

    def __init__(
        self,
        *,
        sink: Sink,
        transform: Transform,
        dead_letters: DeadLetterQueue,
        policy: RetryPolicy,
        events: PipelineEvents,
        stop: asyncio.Event,
    ) -> None:
        self._sink = sink
        self._transform = transform
        self._dead_letters = dead_letters
        self._policy = policy
        self._events = events
        self._stop = stop
        self._is_connected = False
        # Until when the destination asks not to be tried, by the monotonic clock, and why.
        self._back_off_until_s = -math.inf
        self._back_off_reason = ""
        self._publishing = asyncio.Lock()
        self._rejections_in_a_row = 0

    async def connect(self) -> None:
        """Connect the sink, trying until it works. Raises `ConfigurationError`, `Stopping`."""
        async with self._publishing:
            await self._until_done("sink", self._connect)

    async def aclose(self) -> None:
        """Close the sink."""
        await self._sink.aclose()
        self._lost()

    def prepare(self, batch: Batch) -> Prepared:
        """Transform the messages of a batch; to be done while the one before is in flight."""
        messages: list[RelayMessage] = []
        refused: list[tuple[RelayMessage, RelayError]] = []
        try:
            messages = self._transform(batch.messages)
        except MessageRejected:
            for message in batch.messages:
                try:
                    messages += self._transform([message])
                except MessageRejected as error:
                    refused.append((message, error))
        return Prepared(
            messages=messages,
            rejected=[(rejected.message, rejected.error) for rejected in batch.rejected],
            refused=refused,
            filtered=batch.filtered + len(batch.messages) - len(messages) - len(refused),
        )

    async def settle(self, prepared: Prepared) -> None:
        """Return when every message of the batch is accepted or dead-lettered.

        Raises `Stopping` when that can't be had before the pipeline stops, and
        `ConfigurationError` when it never will be.
        """
        started = time.perf_counter()
        work = _Settlement(pending=list(prepared.messages), filtered=prepared.filtered)
        try:
            if prepared.rejected:
                await self._dead_letter(work, prepared.rejected, attempts=1, is_transformed=False)
            if prepared.refused:
                await self._dead_letter(
                    work, prepared.refused, attempts=1, is_transformed=False, is_shaped=True
                )
            if work.pending:
                async with self._publishing:
                    await self._publish_all(work)
        except Stopping:
            if work.accepted or work.dead_lettered:
                self._emit(work, started)
            raise
        self._events.state(PipelineState.RUNNING)
        self._emit(work, started)

    async def attempt(self, take: Take) -> Sequence[Failure] | None:
        """Publish once, beside the batches; None where the sink must not be tried now.

        What to publish is taken when it is its turn: what has waited behind a suspended batch may
        have been purged meanwhile, or be another relay's.
        """
        async with self._publishing:
            # A suspended batch releases the sink when the pipeline stops, no better than it was.
            if self._stop.is_set() or self._back_off_s() > 0:
                return None
            return await self._publish_once(_Settlement(pending=[]), await take())

    def _emit(self, work: _Settlement, started: float) -> None:
        self._events.emit(
            BatchPublished(
                **self._events.labels,
                messages=work.accepted,
                duplicates=work.duplicates,
                dead_lettered=work.dead_lettered,
                filtered=work.filtered,
                duration_s=time.perf_counter() - started,
                attempts=work.attempts,
                latencies_s=_latencies_s(work.acceptances),
            )
        )

    async def _publish_all(self, work: _Settlement) -> None:
        backoff = self._policy.backoff()
        while work.pending:
            await self._back_off()
            work.attempts += 1
            failures = await self._publish_once(work, work.pending)
            rejected, transient = _sorted_out(work.pending, failures)
            if len(failures) < len(work.pending):
                backoff.reset()
            elif rejected and self._is_sink_broken(work, rejected):
                await self._probe(work, rejected[0][1])
                continue
            if rejected:
                await self._dead_letter(work, rejected, attempts=work.attempts, is_transformed=True)
            work.pending = [message for message, _ in transient]
            if transient:
                await self._after_transient(work, transient, backoff)

    async def _publish_once(
        self, work: _Settlement, messages: Sequence[RelayMessage]
    ) -> Sequence[Failure]:
        """Publish and account for what was accepted; an outage is the failure of each message."""
        if not messages:
            return ()
        try:
            await self._connect()
            reraise_cancellation()
            result = await self._sink.publish(messages)
        except Outage as error:
            reraise_cancellation(error)
            self._lost()
            self._note_back_off(error)
            return [Failure(index, error) for index in range(len(messages))]
        except ConfigurationError:
            # Whoever corrects it may do so at the broker, too: connect again.
            self._lost()
            raise
        failed = {failure.index for failure in result.failures}
        for failure in result.failures:
            if failure.error.kind is ErrorKind.CONFIGURATION:
                self._lost()
                raise failure.error
            if isinstance(failure.error, NotConnected | TimedOut):
                self._lost()
            self._note_back_off(failure.error)
        if len(failed) < len(messages):
            self._rejections_in_a_row = 0
            self._dead_letters.clear_suspects()
            work.accepted += len(messages) - len(failed)
            work.duplicates += result.duplicates
            work.acceptances.append((datetime.now(UTC), messages, failed))
        return result.failures

    def _is_sink_broken(
        self, work: _Settlement, rejected: Sequence[tuple[RelayMessage, RelayError]]
    ) -> bool:
        """Called when nothing was accepted: is it the messages, or the sink?

        What the relay found before sending says nothing about the sink. Once a message of this
        batch was accepted, the sink is known to work and the rest is poison.
        """
        if work.accepted:
            return False
        self._rejections_in_a_row += sum(1 for _, error in rejected if is_sinks_verdict(error))
        return self._rejections_in_a_row >= self._policy.breaker_threshold

    async def _probe(self, work: _Settlement, error: RelayError) -> None:
        """Hold the batch and try one message at a time until one is accepted.

        Only the first message of each key is tried, so that no event overtakes another of its key.
        """
        self._events.state(
            PipelineState.SUSPENDED,
            f"the sink rejected {self._rejections_in_a_row} messages in a row,"
            f" probing until it accepts one: {error}",
        )
        # Requested before it is known when the sink recovers, so that no stop or crash forgets
        # them; they are sent when this batch releases the sink.
        await self._until_done("source", self._dead_letters.put_back_suspects)
        backoff = self._policy.backoff()
        for probe in itertools.cycle(_first_of_each_key(work.pending)):
            await self._pause(backoff.next_s(self._back_off_s()))
            work.attempts += 1
            if not await self._publish_once(work, [probe]):
                work.pending = [message for message in work.pending if message is not probe]
                break

    async def _after_transient(
        self,
        work: _Settlement,
        transient: Sequence[tuple[RelayMessage, Failure]],
        backoff: Backoff,
    ) -> None:
        limit = self._policy.max_attempts
        if limit is not None and (spent := _spent(work, transient, limit)):
            await self._dead_letter(work, spent, attempts=limit, is_transformed=True)
            gone = {id(message) for message, _ in spent}
            work.pending = [message for message in work.pending if id(message) not in gone]
            return
        delay_s = backoff.next_s(self._back_off_s())
        errors = (failure.error for _, failure in transient)
        decisive = max(errors, key=lambda error: error.retry_after_s or 0.0)
        self._events.retried("sink", work.attempts, delay_s, decisive)
        await self._pause(delay_s)

    async def _dead_letter(
        self,
        work: _Settlement,
        refused: Sequence[tuple[RelayMessage, RelayError]],
        *,
        attempts: int,
        is_transformed: bool,
        is_shaped: bool = False,
    ) -> None:
        await self._until_done(
            "source",
            lambda: self._dead_letters.store(
                refused, attempts=attempts, is_transformed=is_transformed, is_shaped=is_shaped
            ),
        )
        work.dead_lettered += len(refused)

    async def _until_done(self, side: Side, action: Callable[[], Awaitable[None]]) -> None:
        """Retry while there is an outage. Raises `Stopping`, `ConfigurationError`."""
        backoff = self._policy.backoff()
        while True:
            try:
                return await action()
            except Outage as error:
                reraise_cancellation(error)
                delay_s = backoff.next_s(error.retry_after_s)
                self._events.retried(side, backoff.attempt, delay_s, error)
                await self._pause(delay_s)

    async def _connect(self) -> None:
        if not self._is_connected:
            await self._sink.connect()
            self._is_connected = True
            await self._events.connected("sink", self._sink)

    def _lost(self) -> None:
        if self._is_connected:
            self._is_connected = False
            self._events.disconnected("sink")

    def _note_back_off(self, error: RelayError) -> None:
        """Note for how long it asks not to be tried again; of several the longest counts."""
        if error.retry_after_s is None:
            return
        until_s = time.monotonic() + min(error.retry_after_s, LONGEST_ASKED_WAIT_S)
        if until_s > self._back_off_until_s:
            self._back_off_until_s = until_s
            self._back_off_reason = str(error)

    def _back_off_s(self) -> float:
        """How long the destination still asks not to be tried, in seconds."""
        return max(0.0, self._back_off_until_s - time.monotonic())

    async def _back_off(self) -> None:
        """Wait for what is left of a time that an earlier publish was asked for."""
        if (wait_s := self._back_off_s()) > 0:
            self._events.state(PipelineState.RETRYING, self._back_off_reason)
            await self._pause(wait_s)

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
    work: _Settlement, transient: Sequence[tuple[RelayMessage, Failure]], limit: int
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


def _first_of_each_key(messages: Sequence[RelayMessage]) -> list[RelayMessage]:
    firsts: dict[str, RelayMessage] = {}
    for message in messages:
        firsts.setdefault(message.key if message.key is not None else message.dedup_key, message)
    return list(firsts.values())
