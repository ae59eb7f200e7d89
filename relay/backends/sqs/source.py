"""The SQS source: see the package for what it promises.

Long polls, several at a time while they come back full. ``visibility_timeout`` is extended while a
batch is worked on; a batch that is released is visible at once. What a killed relay held, or an
answer that was lost on the way, comes again when that time has run out. A queue with a redrive
policy counts each receipt and moves what was received too often; an outage of the inbox
does not count, since the batch is held. The dedup key is ours where the message is ours, else its
attribute ``Pgtrickle-Dedup-Key``, else its ``MessageDeduplicationId`` (with the group in front
where the queue deduplicates by group) unless that is the SHA-256 of the body, since equal bodies
recur after five minutes, else its ``MessageId``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Self

import msgspec

from relay.backends.sqs.entry import Received, decoded
from relay.backends.sqs.errors import of_entry
from relay.backends.sqs.options import SqsSourceOptions, target_of
from relay.backends.sqs.queue import MOST_MESSAGES, Queue, Refused, open_queue
from relay.context import BackendContext
from relay.contracts import Batch, sorted_out
from relay.errors import ErrorKind, LeaseLost, NotConnected, Outage, RelayError
from relay.options import parse_options

_POLL_S = 1.0
# While receives come back full, a poll gathers for so long before it hands out what it has.
_GATHER_S = 0.2
_CLOSE_TIMEOUT_S = 3.0


class _Position(msgspec.Struct, frozen=True):
    """Receipt handles handed out together, and over which connection."""

    queue: Queue
    handles: tuple[str, ...]


class SqsSource:
    """Receives from one queue and deletes when asked to.

    Receives are tasks that outlive an interrupted poll and end with `aclose` or `connect` at the
    latest: what they bring is handed out by the next poll. One waits while the queue is empty, up
    to ``max_in_flight`` run while they come back full.
    """

    def __init__(self, options: SqsSourceOptions, context: BackendContext) -> None:
        """`from_options` checks what this takes."""
        self._options = options
        self._batch_size = context.batch_size
        self._batch_bytes = context.batch_bytes
        self._queue: Queue | None = None
        # In the order in which they were begun.
        self._receiving: deque[asyncio.Task[Sequence[Received]]] = deque()
        self._width = 1
        self._is_flowing = False
        self._is_empty = False
        # Receives begun since a batch was settled last: a FIFO queue keeps back what is behind it.
        self._fresh: set[asyncio.Task[Sequence[Received]]] = set()
        self._buffer: deque[Received] = deque()
        self._buffered_since = 0.0
        # The receipt handle of everything that is buffered or unacknowledged.
        self._held: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, SqsSourceOptions, path="source")
        target_of(parsed, "source")
        return cls(parsed, context)

    @property
    def keep_alive_interval_s(self) -> float | None:
        """A third of the time for which messages stay hidden."""
        return self._options.visibility_timeout / 3

    async def connect(self) -> None:
        """Reconnect. What an earlier connection still held is shown to all again at once.

        Raises `DestinationMissing` where there is no such queue.
        """
        await self._close_connections()
        queue = await open_queue(
            self._options, path="source", wait_s=self._options.wait_time_seconds
        )
        try:
            await self._show(queue)
        except BaseException:
            await queue.aclose()
            raise
        self._width = 1
        self._is_flowing = self._is_empty = False
        self._queue = queue

    async def poll(self) -> Batch:
        """What was received, at most a batch; waits up to a second for the first message.

        While the queue has more it gathers for a moment, and the next receives are already under
        way when it returns.
        """
        deadline = time.monotonic() + _POLL_S
        while True:
            queue = self._open()
            self._wake.clear()
            self._take_received()
            left_s = deadline - time.monotonic()
            if self._is_enough() or self._is_interrupted or left_s <= 0:
                break
            self._receive(queue)
            if self._buffer:
                left_s = min(left_s, self._buffered_since + _GATHER_S - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        batch = self._batch(queue, self._taken(), was_cut_short=was_cut_short)
        if self._is_flowing:
            self._receive(queue)
        return batch

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        self._wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Delete every message of the batch.

        Raises `LeaseLost` where the queue has taken back some of them, after deleting the others.
        """
        queue, position = self._open(), batch.position
        if isinstance(position, _Position) and position.queue is not queue:
            raise NotConnected("this batch was received before the source reconnected")
        handles = self._handles(batch)
        refused = await self._settle(handles, queue.delete)
        self._forget(handles)
        if not refused:
            return
        error = of_entry(refused[0], f"deleting from the queue {queue.name}")
        if error.kind is not ErrorKind.MESSAGE:
            raise error
        raise LeaseLost(
            f"the queue {queue.name} took back {len(refused)} of {len(handles)} messages"
            f" before they were deleted",
            remedy="they come again; raise visibility_timeout if that happens often",
        )

    async def keep_alive(self, batch: Batch) -> None:
        """Hide this batch, and what is waiting to be polled, for another ``visibility_timeout``.

        A call that fails is made again the next time, and before the time has run out: to
        reconnect for it would show all that we hold, and the queue counts each receipt.
        """
        queue = self._open()
        self._take_received()
        handles = [*self._handles(batch), *(one["ReceiptHandle"] for one in self._buffer)]
        # What can't be kept comes again: that shows when it is to be deleted.
        with contextlib.suppress(Outage):
            await self._settle(
                handles, lambda some: queue.hide(some, self._options.visibility_timeout)
            )

    async def reject(self, batch: Batch) -> None:
        """Show this batch, and what is waiting to be polled, to all again at once.

        What waits behind it goes too, since a FIFO queue would repeat the batch after it.
        """
        queue = self._open()
        handles = [*self._handles(batch), *(one["ReceiptHandle"] for one in self._buffer)]
        self._buffer.clear()
        self._forget(handles)
        await self._settle(handles, lambda some: queue.hide(some, 0))

    async def lag(self) -> int | None:
        """What the queue holds, hidden or not, about."""
        return await self._open().depth()

    async def is_healthy(self) -> bool:
        """True when the queue answers within seconds."""
        queue = self._queue
        return queue is not None and await queue.is_healthy()

    async def aclose(self) -> None:
        """Release everything that is unacknowledged, and close."""
        await self._close_connections()
        self._held.clear()

    async def _close_connections(self) -> None:
        """End the receives, show again what they brought and what we held, and close."""
        queue, self._queue = self._queue, None
        self._buffer.clear()
        if queue is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                # First of all: a receive that waits is given some of it, and ends.
                await self._show(queue)
                await self._end_receives()
                await self._show(queue)
        except (RelayError, TimeoutError):
            # What is still hidden is tried again by the next connect, or shows after its time.
            pass
        finally:
            for task in self._receiving:
                task.cancel()
            await asyncio.gather(*self._receiving, return_exceptions=True)
            self._receiving.clear()
            await queue.aclose()

    async def _end_receives(self) -> None:
        """Wait for the receives that are in flight and note what they brought."""
        if self._receiving:
            await asyncio.wait(self._receiving)
        while self._receiving:
            task = self._receiving.popleft()
            if not task.cancelled() and task.exception() is None:
                self._held.update((one["ReceiptHandle"], None) for one in task.result())

    async def _show(self, queue: Queue) -> None:
        """Show everything that we hold to all again."""
        handles = list(self._held)
        await self._settle(handles, lambda some: queue.hide(some, 0))
        self._forget(handles)

    def _forget(self, handles: Sequence[str]) -> None:
        for handle in handles:
            self._held.pop(handle, None)
        if handles:
            self._fresh.clear()
            self._is_empty = False

    def _open(self) -> Queue:
        if self._queue is None:
            raise NotConnected("the sqs source is not connected")
        return self._queue

    def _receive(self, queue: Queue) -> None:
        """Begin receives, as many as pay, unless a batch is waiting already."""
        if len(self._buffer) >= self._batch_size:
            return
        while len(self._receiving) < self._width:
            receiving = asyncio.create_task(
                queue.receive(
                    wait_s=self._options.wait_time_seconds,
                    visibility_s=self._options.visibility_timeout,
                )
            )
            receiving.add_done_callback(lambda _: self._wake.set())
            self._receiving.append(receiving)
            self._fresh.add(receiving)

    def _take_received(self) -> None:
        """Move what finished receives brought into the buffer. Raises what ended one."""
        trouble: BaseException | None = None
        for task in [task for task in self._receiving if task.done()]:
            self._receiving.remove(task)
            if (error := task.exception()) is not None:
                trouble = trouble or error
                continue
            self._keep(task.result(), is_fresh=task in self._fresh)
            self._fresh.discard(task)
        if trouble is not None:
            raise trouble

    def _keep(self, received: Sequence[Received], *, is_fresh: bool) -> None:
        self._is_flowing = len(received) == MOST_MESSAGES
        self._is_empty = not received and not self._held and is_fresh
        if self._is_flowing:
            self._width = min(2 * self._width, self._options.max_in_flight)
        elif not received:
            self._width = 1
        if received and not self._buffer:
            self._buffered_since = time.monotonic()
        for one in received:
            self._held[one["ReceiptHandle"]] = None
            self._buffer.append(one)

    def _is_enough(self) -> bool:
        if not self._buffer:
            return False
        return (
            not self._is_flowing
            or len(self._buffer) >= self._batch_size
            or time.monotonic() >= self._buffered_since + _GATHER_S
        )

    async def _settle(
        self, handles: Sequence[str], tell: Callable[[Sequence[str]], Awaitable[Refused]]
    ) -> Refused:
        """Tell the queue about many messages, in several calls at a time; what it refused.

        Raises the first `Outage` or other trouble, once all calls have ended.
        """
        chunks = [
            handles[start : start + MOST_MESSAGES]
            for start in range(0, len(handles), MOST_MESSAGES)
        ]
        turn = asyncio.Semaphore(self._options.max_in_flight)

        async def one(chunk: Sequence[str]) -> Refused:
            async with turn:
                return await tell(chunk)

        refused: list[Mapping[str, object]] = []
        trouble: BaseException | None = None
        for answer in await asyncio.gather(*map(one, chunks), return_exceptions=True):
            if isinstance(answer, BaseException):
                trouble = trouble or answer
            else:
                refused.extend(answer)
        if trouble is not None:
            raise trouble
        return refused

    def _handles(self, batch: Batch) -> list[str]:
        """What of a batch is still ours to answer for."""
        position = batch.position
        if not isinstance(position, _Position) or position.queue is not self._queue:
            return []
        return [one for one in position.handles if one in self._held]

    def _taken(self) -> list[Received]:
        taken: list[Received] = []
        size = 0
        while self._buffer and len(taken) < self._batch_size and size < self._batch_bytes:
            one = self._buffer.popleft()
            size += len(one.get("Body", ""))
            taken.append(one)
        return taken

    def _batch(self, queue: Queue, taken: Sequence[Received], *, was_cut_short: bool) -> Batch:
        is_end = self._is_empty and not self._buffer and not was_cut_short
        if not taken:
            return Batch(is_end_of_backlog=is_end)
        messages, rejected = sorted_out(
            decoded(one, queue.name, is_dedup_by_group=queue.is_dedup_by_group) for one in taken
        )
        return Batch(
            messages=messages,
            rejected=rejected,
            position=_Position(queue, tuple(one["ReceiptHandle"] for one in taken)),
            checkpoint=taken[-1]["MessageId"],
        )
