"""One pipeline: poll → transform → publish → acknowledge, for as long as it is wanted.

Three stages run side by side, joined by short queues: while batch n is published, batch n+1 is
polled and transformed, and batch n-1 acknowledged. A batch moves on only when all of it is done,
so what is acknowledged is always the position of a finished batch.

Any trouble of the source ends the *session*: what was polled and not acknowledged is void, and
the source starts again from what was acknowledged; the same events come again with the same keys.
Trouble of the sink is met inside `relay.delivery`, while the batch is held and kept alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import operator
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from enum import StrEnum
from typing import TypeGuard

import msgspec

from relay.cancellation import reraise_cancellation
from relay.contracts import Batch, Measuring, Sink, Source
from relay.dead_letter import DeadLetterQueue, DeadLetters, Transform
from relay.delivery import Delivery, Prepared, RetryPolicy, Stopping
from relay.errors import (
    DestinationMissing,
    EndOfInput,
    ErrorKind,
    LeaseLost,
    PositionLost,
    RelayError,
)
from relay.events import (
    BatchAcknowledged,
    Direction,
    Event,
    LeaseExpired,
    PipelineState,
    Polled,
    SourceLagObserved,
)
from relay.pipeline_events import PipelineEvents

_log = logging.getLogger(__name__)

_MISSING_RETRY_S = 3.0
_LAG_INTERVAL_S = 10.0

_is_full_refresh = operator.attrgetter("is_full_refresh")


class Ending(StrEnum):
    """How a run ended."""

    STOPPED = "stopped"
    COMPLETED = "completed"
    FAILED = "failed"


class Pipeline:
    """Runs one source into one sink. Its trouble is its own: `run` raises nothing but cancellation.

    ``prefetch``: how many polled batches may wait while one is being published.
    ``dead_letter_lease_s``: for how long a retry of a dead letter is this one's; 0 where no other
    runs the pipeline.
    ``shape``: what the source did to its messages already, and dead letters of it still need.
    ``failed_retry_s``: how long a configuration error stands before everything is tried again; for
    what is missing it is a few seconds at most, since it may be made again any time.
    """

    def __init__(
        self,
        *,
        name: str,
        direction: Direction,
        source: Source,
        sink: Sink,
        transform: Transform,
        dead_letters: DeadLetters,
        emit: Callable[[Event], None],
        policy: RetryPolicy,
        dead_letter_lease_s: int = 0,
        prefetch: int = 1,
        failed_retry_s: float = 30.0,
        shape: Transform = list,
    ) -> None:
        self._source = source
        self._policy = policy
        self._prefetch = prefetch
        self._failed_retry_s = failed_retry_s
        self._stop = asyncio.Event()
        self._is_draining = False
        self._is_running = False
        self._events = PipelineEvents(name, direction, emit)
        self._dead_letters = DeadLetterQueue(
            dead_letters=dead_letters,
            shape=shape,
            transform=transform,
            events=self._events,
            look_again_s=policy.max_s,
            lease_s=dead_letter_lease_s,
        )
        self._delivery = Delivery(
            sink=sink,
            transform=transform,
            dead_letters=self._dead_letters,
            policy=policy,
            events=self._events,
            stop=self._stop,
        )

    def stop(self) -> None:
        """Ask for an end: the batch in flight is finished, the rest released."""
        if self._is_running:
            self._events.state(PipelineState.STOPPING)
        self._stop.set()
        self._source.interrupt()

    def drain(self) -> None:
        """Ask for an end as soon as the source has nothing more at the moment."""
        self._is_draining = True

    def retry_dead_letters(self) -> None:
        """Dead letters of this pipeline are to be tried again."""
        self._dead_letters.want_retry()

    async def run(self) -> Ending:
        """Run until stopped, drained or at the end of the input; closes source and sink."""
        backoff = self._policy.backoff()
        self._events.state(PipelineState.STARTING)
        self._is_running = True
        ending = Ending.STOPPED
        try:
            while not self._stop.is_set():
                try:
                    await self._session(backoff.reset)
                    ending = Ending.STOPPED if self._stop.is_set() else Ending.COMPLETED
                    break
                except Stopping:
                    break
                except LeaseLost as error:
                    # Nothing has failed: the rows are another's, and there are others.
                    reraise_cancellation(error)
                    self._events.emit(LeaseExpired(**self._events.labels, reason=str(error)))
                except Exception as error:  # noqa: BLE001 - nothing reaches the siblings
                    reraise_cancellation(error)
                    asked_s = error.retry_after_s if isinstance(error, RelayError) else None
                    await self._recover(error, backoff.next_s(asked_s), backoff.attempt)
                    if self._is_draining and not _is_worth_waiting(error):
                        ending = Ending.FAILED
                        break
        finally:
            self._is_running = False
            await self._close()
        if ending is not Ending.FAILED:
            self._events.state(PipelineState(ending.value))
        return ending

    async def _session(self, connected: Callable[[], None]) -> None:
        """From connect to the end or the first trouble of the source."""
        session = _Session(
            source=self._source,
            delivery=self._delivery,
            dead_letters=self._dead_letters,
            events=self._events,
            stop=self._stop,
            is_draining=lambda: self._is_draining,
            prefetch=self._prefetch,
            progressed=connected,
        )
        try:
            await self._source.connect()
            await self._events.connected("source", self._source)
            async with self._observing_lag():
                await self._delivery.connect()
                self._events.state(PipelineState.RUNNING)
                await session.run()
        except BaseExceptionGroup as group:
            raise _weightiest(group) from group
        finally:
            self._events.disconnected("source")

    @contextlib.asynccontextmanager
    async def _observing_lag(self) -> AsyncIterator[None]:
        """Emit the lag of a source that tells it, now and then while the block lasts."""
        source = self._source
        if not isinstance(source, Measuring):
            yield
            return
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._observe_lag(source, is_over))
            try:
                yield
            finally:
                is_over.set()

    async def _observe_lag(self, source: Measuring, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            messages = None
            try:
                messages = await source.lag()
            except RelayError as error:
                # What is wrong with the broker a poll finds out, and says.
                reraise_cancellation(error)
            except Exception as error:  # noqa: BLE001 - a figure never disturbs the delivery
                reraise_cancellation(error)
                _log.exception("the lag of a source can't be told", extra=self._events.labels)
                return
            self._events.emit(SourceLagObserved(**self._events.labels, messages=messages))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAG_INTERVAL_S):
                    await is_over.wait()

    async def _recover(self, error: Exception, delay_s: float, attempt: int) -> None:
        if _is_worth_waiting(error):
            self._events.retried("source", attempt, delay_s, error)
        else:
            delay_s = self._failed_retry_s
            if isinstance(error, DestinationMissing | PositionLost):
                delay_s = min(delay_s, _MISSING_RETRY_S)
            reason = str(error)
            if not isinstance(error, RelayError):
                _log.error("unexpected error", exc_info=error, extra=self._events.labels)
                # Its text is nobody's promise, and may hold what was being read.
                reason = f"unexpected {type(error).__name__}, see the log"
            self._events.state(PipelineState.FAILED, reason)
            if self._is_draining:
                return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stop.wait()

    async def _close(self) -> None:
        try:
            await self._close_side(self._source.aclose)
        finally:
            # Whatever interrupts the one side, the other holds a connection or a file, too.
            await self._close_side(self._delivery.aclose)

    async def _close_side(self, close: Callable[[], Awaitable[None]]) -> None:
        try:
            await close()
        except Exception:  # noqa: BLE001 - nothing reaches the siblings
            _log.exception("a pipeline could not be closed in order", extra=self._events.labels)


class Workers:
    """The workers that one pipeline has in this relay, run as if they were one pipeline."""

    def __init__(self, workers: Sequence[Pipeline]) -> None:
        self._workers = workers

    def stop(self) -> None:
        """See `Pipeline.stop`."""
        for worker in self._workers:
            worker.stop()

    def drain(self) -> None:
        """See `Pipeline.drain`."""
        for worker in self._workers:
            worker.drain()

    def retry_dead_letters(self) -> None:
        """See `Pipeline.retry_dead_letters`."""
        for worker in self._workers:
            worker.retry_dead_letters()

    async def run(self) -> Ending:
        """Run all; ends as the one that fared worst."""
        async with asyncio.TaskGroup() as tasks:
            runs = [tasks.create_task(worker.run()) for worker in self._workers]
        endings = {run.result() for run in runs}
        return next(
            ending
            for ending in (Ending.FAILED, Ending.STOPPED, Ending.COMPLETED)
            if ending in endings
        )


def _is_worth_waiting(error: Exception) -> TypeGuard[RelayError]:
    return isinstance(error, RelayError) and error.kind is not ErrorKind.CONFIGURATION


class _Finished(msgspec.Struct, frozen=True):
    """Passes through the queues behind the last batch."""


class _Session:
    """The three stages over one connected source."""

    def __init__(
        self,
        *,
        source: Source,
        delivery: Delivery,
        dead_letters: DeadLetterQueue,
        events: PipelineEvents,
        stop: asyncio.Event,
        is_draining: Callable[[], bool],
        prefetch: int,
        progressed: Callable[[], None],
    ) -> None:
        self._source = source
        self._delivery = delivery
        self._dead_letters = dead_letters
        self._events = events
        self._stop = stop
        self._is_draining = is_draining
        self._progressed = progressed
        self._polled: asyncio.Queue[tuple[Batch, Prepared, float] | _Finished] = asyncio.Queue(
            max(1, prefetch)
        )
        self._settled: asyncio.Queue[Batch | _Finished] = asyncio.Queue(2)
        self._room = asyncio.Semaphore(prefetch + 1)
        self._unacknowledged: deque[Batch] = deque()

    async def run(self) -> None:
        """Until stop, drain or end of input; what is unacknowledged then is released.

        Raises what the source or the delivery raised, in an exception group.
        """
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(self._keep_alive())
            tasks.create_task(self._dead_letters.retry(self._delivery.attempt))
            tasks.create_task(self._poll())
            tasks.create_task(self._publish())
            await tasks.create_task(self._acknowledge())
            keeping.cancel()
            # Not cancelled: what the sink has accepted meanwhile would be sent again.
            self._dead_letters.end_retrying()
        for batch in reversed(self._unacknowledged):
            await self._source.reject(batch)

    async def _poll(self) -> None:
        while not self._stop.is_set():
            await self._room.acquire()
            if self._stop.is_set():
                break
            started = time.perf_counter()
            try:
                batch = await self._source.poll()
            except EndOfInput:
                break
            reraise_cancellation()
            self._progressed()
            self._events.emit(
                Polled(
                    **self._events.labels,
                    messages=len(batch.messages),
                    rejected=len(batch.rejected),
                    full_refresh=any(map(_is_full_refresh, batch.messages)),
                    duration_s=time.perf_counter() - started,
                )
            )
            if batch.is_empty:
                self._room.release()
                if self._is_draining() and batch.is_end_of_backlog:
                    break
                continue
            self._unacknowledged.append(batch)
            await self._polled.put((batch, self._delivery.prepare(batch), time.monotonic()))
        await self._polled.put(_Finished())

    async def _publish(self) -> None:
        while not isinstance(polled := await self._polled.get(), _Finished):
            batch, prepared, polled_s = polled
            if not self._stop.is_set():
                interval_s = self._source.keep_alive_interval_s
                if interval_s is not None and time.monotonic() - polled_s > interval_s:
                    # It has waited for so long that it may be another's by now.
                    await self._source.keep_alive(batch)
                with contextlib.suppress(Stopping):
                    await self._delivery.settle(prepared)
                    reraise_cancellation()
                    await self._settled.put(batch)
            self._room.release()
        await self._settled.put(_Finished())

    async def _acknowledge(self) -> None:
        while not isinstance(batch := await self._settled.get(), _Finished):
            await self._source.acknowledge(batch)
            reraise_cancellation()
            self._unacknowledged.popleft()
            self._events.emit(
                BatchAcknowledged(
                    **self._events.labels,
                    messages=len(batch.messages) + len(batch.rejected),
                    checkpoint=batch.checkpoint,
                    offset=int(batch.checkpoint) if batch.checkpoint.isdecimal() else None,
                )
            )

    async def _keep_alive(self) -> None:
        interval_s = self._source.keep_alive_interval_s
        if interval_s is None:
            return
        while True:
            await asyncio.sleep(interval_s)
            for batch in tuple(self._unacknowledged):
                await self._source.keep_alive(batch)
                reraise_cancellation()


def _weightiest(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of what several stages raised, the one that decides: bugs, configuration, outage."""
    leaves = list(_leaves(group))
    for error in leaves:
        if not isinstance(error, RelayError | asyncio.CancelledError):
            return error
    for error in leaves:
        if isinstance(error, RelayError) and error.kind is ErrorKind.CONFIGURATION:
            return error
    return leaves[0]


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
