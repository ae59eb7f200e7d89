"""A pipeline between two channels in memory, its dead letters, and what it tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from relay.catalog import DeadLetter, StoredDeadLetter
from relay.contracts import Sink, Source
from relay.delivery import RetryPolicy
from relay.errors import Outage
from relay.events import BatchAcknowledged, Direction, Event, PipelineState, StateChanged
from relay.message import RelayMessage
from relay.pipeline import Ending, Pipeline
from relay.wire import encoder
from tests.servers.memory import SPELLING, Faults, MemoryChannel, MemorySink, MemorySource, Record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

E = TypeVar("E")

BOUND_S = 10.0
QUICK = RetryPolicy(initial_s=0.001, max_s=0.002)
_encode = encoder("envelope", SPELLING)


def message(key: str, payload: bytes = b"{}", *, entity: str | None = None) -> RelayMessage:
    return RelayMessage(dedup_key=key, payload=payload, key=entity, stream_table="orders")


class Heard:
    """All events in order; `until` waits for what is still to come."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.look_again()

    def look_again(self) -> None:
        self._changed.set()

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def states(self) -> list[PipelineState]:
        return [event.state for event in self.of(StateChanged)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(BOUND_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class KeptLetters:
    """Dead letters in a list. ``outages``: so many of the next writes fail."""

    def __init__(self) -> None:
        self.letters: dict[int, DeadLetter] = {}
        self.requested: list[int] = []
        self.failed: dict[int, str] = {}
        self.outages = 0
        self.tried = 0

    async def dead_letter(
        self,
        pipeline: str,  # noqa: ARG002 - one pipeline has them
        direction: Direction,  # noqa: ARG002
        letters: Sequence[DeadLetter],
    ) -> list[int]:
        self.tried += 1
        if self.outages:
            self.outages -= 1
            raise Outage("the catalog is away")
        first = len(self.letters) + 1
        ids = list(range(first, first + len(letters)))
        self.letters.update(zip(ids, letters, strict=True))
        return ids

    async def take_dead_letters(
        self,
        pipeline: str,  # noqa: ARG002 - one pipeline has them
        max_rows: int,
        lease_s: int,  # noqa: ARG002 - nobody else takes them
    ) -> list[StoredDeadLetter]:
        ids = self.requested[:max_rows]
        return [
            StoredDeadLetter(
                id=id_,
                message=self.letters[id_].message,
                is_transformed=self.letters[id_].is_transformed,
                attempts=self.letters[id_].attempts,
            )
            for id_ in ids
        ]

    async def settle_dead_letters(self, ids: Sequence[int]) -> None:
        for id_ in ids:
            del self.letters[id_]
            self.requested.remove(id_)

    async def fail_dead_letters(
        self, letters: Sequence[StoredDeadLetter], errors: Sequence[str]
    ) -> None:
        for letter, error in zip(letters, errors, strict=True):
            self.failed[letter.id] = error
            self.requested.remove(letter.id)

    async def put_back(self, ids: Sequence[int]) -> None:
        self.requested.extend(ids)

    @property
    def keys(self) -> list[str]:
        return [letter.message.dedup_key for letter in self.letters.values()]


class Line:
    """One channel, a pipeline, another channel."""

    def __init__(
        self,
        *,
        policy: RetryPolicy = QUICK,
        prefetch: int = 1,
        batch_size: int = 100,
        failed_retry_s: float = 30.0,
        transform: Callable[[RelayMessage], RelayMessage] = lambda message: message,
        source: Callable[[MemoryChannel], Source] | None = None,
        sink: Sink | None = None,
        letters: KeptLetters | None = None,
        dead_letter_lease_s: int = 0,
    ) -> None:
        self.here = MemoryChannel()
        self.there = MemoryChannel()
        self.faults = Faults()
        self.letters = letters or KeptLetters()
        self.heard = Heard()
        self.source = (
            source(self.here) if source else MemorySource(self.here, batch_size=batch_size)
        )
        self.pipeline = Pipeline(
            name="p",
            direction="forward",
            source=self.source,
            sink=sink or MemorySink(self.there, faults=self.faults),
            transform=lambda messages: list(map(transform, messages)),
            dead_letters=self.letters,
            emit=self.heard,
            policy=policy,
            prefetch=prefetch,
            failed_retry_s=failed_retry_s,
            dead_letter_lease_s=dead_letter_lease_s,
        )

    def write(self, *messages: RelayMessage) -> None:
        for one in messages:
            self.here.append(Record("orders", _encode(one)))

    @property
    def received(self) -> list[str]:
        return [record.encoded.headers[SPELLING.dedup_key] for record in self.there.records]

    @property
    def acknowledged(self) -> int:
        return sum(event.messages for event in self.heard.of(BatchAcknowledged))

    async def run(self) -> Ending:
        """Until the pipeline ends by itself."""
        async with asyncio.timeout(BOUND_S):
            return await self.pipeline.run()

    async def run_to_the_end(self) -> Ending:
        """Until all that was written is settled."""
        self.here.complete()
        return await self.run()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[Ending]]:
        """Beside the caller, stopped in the end."""
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self.pipeline.run())
            try:
                yield task
            finally:
                self.pipeline.stop()
                async with asyncio.timeout(BOUND_S):
                    await asyncio.wait([task])
