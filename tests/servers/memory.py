"""A broker in memory with a source and a sink, for tests of whatever stands around the contracts.

Guarantees: those of the contracts, kept as a real broker keeps them: messages travel encoded, a
lost connection voids what is in flight, an acknowledgement settles once and for good. Ordering:
strict; a publish stops at the first transient failure and fails all behind it, so that no message
overtakes another of its key; it costs nothing here. Deduplication: by dedup key, where the
channel says so. What it does not do: survive the process. Tests build it, and disturb it through
`Faults` and `MemoryChannel.cut`.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Mapping, Sequence

import msgspec

from relay.contracts import ALL_ACCEPTED, Batch, Failure, PublishResult, Rejected
from relay.errors import (
    EndOfInput,
    MessageRejected,
    MessageTooLarge,
    MessageUndecodable,
    NotConnected,
    Outage,
    RelayError,
)
from relay.message import RelayMessage
from relay.wire import LOWER, Encoded, encoder, is_json, restore

SPELLING = LOWER
IDLE_POLL_S = 1.0


class Record(msgspec.Struct, frozen=True):
    """One message as the channel holds it."""

    subject: str
    encoded: Encoded


class MemoryChannel:
    """The broker: an append-only log with one shared position for all its sources.

    ``oversize_bytes``: bodies above it are refused. ``deduplicates``: a dedup key that is there
    already is accepted and not stored again.
    """

    def __init__(self, *, oversize_bytes: int | None = None, deduplicates: bool = False) -> None:
        self.oversize_bytes = oversize_bytes
        self.deduplicates = deduplicates
        self.records: list[Record] = []
        self.generation = 0
        self._is_reachable = True
        self._is_complete = False
        self._ready: list[int] = []
        self._dedup_keys: set[str] = set()
        self._waiting: set[asyncio.Event] = set()

    @property
    def is_reachable(self) -> bool:
        """False between `cut` and `restore`."""
        return self._is_reachable

    @property
    def is_exhausted(self) -> bool:
        """True when all was handed out and nothing more can come."""
        return self._is_complete and not self._ready

    def append(self, record: Record) -> bool:
        """Store one message; False where it was there already."""
        dedup_key = record.encoded.headers.get(SPELLING.dedup_key)
        if self.deduplicates and dedup_key is not None:
            if dedup_key in self._dedup_keys:
                return False
            self._dedup_keys.add(dedup_key)
        self._ready.append(len(self.records))
        self.records.append(record)
        self._wake()
        return True

    def take(self, max_rows: int) -> list[int]:
        """Hand out the next numbers in order; they are the caller's until released."""
        taken = self._ready[:max_rows]
        del self._ready[:max_rows]
        return taken

    def release(self, numbers: Sequence[int]) -> None:
        """Make these available again, in their old places."""
        for number in numbers:
            bisect.insort(self._ready, number)
        self._wake()

    def complete(self) -> None:
        """Nothing more will be appended: sources come to their end of input."""
        self._is_complete = True
        self._wake()

    def cut(self) -> None:
        """Break every connection and refuse new ones until `restore`."""
        self._is_reachable = False
        self.generation += 1
        self._wake()

    def restore(self) -> None:
        """Accept connections again."""
        self._is_reachable = True

    def restart(self) -> None:
        """Break every connection once; what is stored stays."""
        self.cut()
        self.restore()

    def wait_on(self, event: asyncio.Event) -> None:
        """Set this event whenever something changes here, until `forget`."""
        self._waiting.add(event)

    def forget(self, event: asyncio.Event) -> None:
        """Take an event away again; harmless when it is not there."""
        self._waiting.discard(event)

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()


class Faults:
    """What a `MemorySink` does wrong on purpose.

    ``refused``: dedup key to the error with which this message fails, each time. ``accepting``:
    while cleared, a publish stores its messages but does not return, as a slow broker does.
    """

    def __init__(self) -> None:
        self.refused: dict[str, RelayError] = {}
        self.accepting = asyncio.Event()
        self.accepting.set()
        self._errors: list[RelayError] = []

    def fail_next(self, publishes: int, error: RelayError) -> None:
        """Make so many publishes raise this error before anything is stored."""
        self._errors += [error] * publishes

    def next_error(self) -> RelayError | None:
        """Take the error with which the publish that begins now must fail."""
        return self._errors.pop(0) if self._errors else None


class _Connection:
    """One side's connection to a channel; a cut makes it useless until it is opened again."""

    def __init__(self, channel: MemoryChannel) -> None:
        self._channel = channel
        self._generation: int | None = None

    @property
    def is_open(self) -> bool:
        return self._channel.is_reachable and self._generation == self._channel.generation

    def open(self) -> None:
        self._generation = None
        if not self._channel.is_reachable:
            raise NotConnected("the channel is out of reach")
        self._generation = self._channel.generation

    def require(self) -> None:
        if not self.is_open:
            raise NotConnected("the connection to the channel was lost")

    def close(self) -> None:
        self._generation = None


class MemorySink:
    """Publishes into a channel."""

    def __init__(
        self, channel: MemoryChannel, *, faults: Faults | None = None, format_: str = "envelope"
    ) -> None:
        self.faults = faults or Faults()
        self._channel = channel
        self._connection = _Connection(channel)
        self._encode = encoder(format_, SPELLING)

    async def connect(self) -> None:
        """See `relay.contracts.Sink`."""
        self._connection.open()

    def subject_of(self, message: RelayMessage) -> str:
        """What the message already says, else its stream table and op."""
        return message.subject or f"{message.stream_table}.{message.op}"

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """See `relay.contracts.Sink`."""
        self._connection.require()
        error = self.faults.next_error()
        if error is not None:
            raise error
        failures: list[Failure] = []
        duplicates = 0
        for index, message in enumerate(messages):
            try:
                duplicates += not self._store(message)
            except Outage as outage:
                # Order: nothing behind a transient failure may be accepted before it.
                failures += [Failure(later, outage) for later in range(index, len(messages))]
                break
            except RelayError as refusal:
                failures.append(Failure(index, refusal))
        await self.faults.accepting.wait()
        self._connection.require()
        if not failures and not duplicates:
            return ALL_ACCEPTED
        return PublishResult(failures=failures, duplicates=duplicates)

    async def is_healthy(self) -> bool:
        """See `relay.contracts.Sink`."""
        return self._connection.is_open

    async def aclose(self) -> None:
        """See `relay.contracts.Sink`."""
        self._connection.close()

    def _store(self, message: RelayMessage) -> bool:
        refusal = self.faults.refused.get(message.dedup_key)
        if refusal is not None:
            raise refusal
        encoded = self._encode(message)
        limit = self._channel.oversize_bytes
        if limit is not None and len(encoded.body) > limit:
            raise MessageTooLarge(
                f"the message has {len(encoded.body)} bytes, the channel takes {limit}"
            )
        return self._channel.append(Record(self.subject_of(message), encoded))


class _Position(msgspec.Struct, frozen=True):
    """Which records a batch holds, and over which connection they were read."""

    numbers: tuple[int, ...]
    generation: int


class MemorySource:
    """Reads a channel; several sources of one channel share its messages.

    A plain payload has the dedup key ``memory:{number}``.
    """

    def __init__(self, channel: MemoryChannel, *, batch_size: int = 100) -> None:
        self._channel = channel
        self._batch_size = batch_size
        self._connection = _Connection(channel)
        self._changed = asyncio.Event()
        self._is_interrupted = False
        self._opened = 0
        self._unacknowledged: set[int] = set()

    @property
    def keep_alive_interval_s(self) -> float | None:
        """Never: nothing here expires."""
        return None

    async def connect(self) -> None:
        """See `relay.contracts.Source`."""
        self._release_all()
        self._connection.open()
        self._opened += 1
        self._channel.wait_on(self._changed)

    async def poll(self) -> Batch:
        """See `relay.contracts.Source`."""
        try:
            async with asyncio.timeout(IDLE_POLL_S):
                while not self._is_interrupted:
                    self._changed.clear()
                    self._connection.require()
                    numbers = self._channel.take(self._batch_size)
                    if numbers:
                        return self._batch(numbers)
                    if self._channel.is_exhausted:
                        raise EndOfInput
                    await self._changed.wait()
        except TimeoutError:
            pass
        self._is_interrupted = False
        return Batch(is_end_of_backlog=True)

    def interrupt(self) -> None:
        """See `relay.contracts.Source`."""
        self._is_interrupted = True
        self._changed.set()

    async def acknowledge(self, batch: Batch) -> None:
        """See `relay.contracts.Source`."""
        self._connection.require()
        self._unacknowledged.difference_update(self._numbers(batch))

    async def keep_alive(self, batch: Batch) -> None:  # noqa: ARG002 - the contract's signature
        """See `relay.contracts.Source`."""
        self._connection.require()

    async def reject(self, batch: Batch) -> None:
        """See `relay.contracts.Source`."""
        numbers = self._unacknowledged.intersection(self._numbers(batch))
        self._unacknowledged -= numbers
        self._channel.release(sorted(numbers))

    async def is_healthy(self) -> bool:
        """See `relay.contracts.Source`."""
        return self._connection.is_open

    async def aclose(self) -> None:
        """See `relay.contracts.Source`."""
        self._connection.close()
        self._channel.forget(self._changed)
        self._release_all()

    def _batch(self, numbers: Sequence[int]) -> Batch:
        self._unacknowledged.update(numbers)
        messages: list[RelayMessage] = []
        rejected: list[Rejected] = []
        for number in numbers:
            decoded = _decode(number, self._channel.records[number])
            if isinstance(decoded, Rejected):
                rejected.append(decoded)
            else:
                messages.append(decoded)
        return Batch(
            messages=messages,
            rejected=rejected,
            position=_Position(tuple(numbers), self._opened),
            checkpoint=str(numbers[-1]),
            is_end_of_backlog=len(numbers) < self._batch_size,
        )

    def _numbers(self, batch: Batch) -> tuple[int, ...]:
        """The records of a batch; none where a reconnect has made the batch void."""
        position = batch.position
        if not isinstance(position, _Position) or position.generation != self._opened:
            return ()
        return position.numbers

    def _release_all(self) -> None:
        numbers, self._unacknowledged = self._unacknowledged, set()
        self._channel.release(sorted(numbers))


def _decode(number: int, record: Record) -> RelayMessage | Rejected:
    body, headers = record.encoded.body, record.encoded.headers
    try:
        restored = restore(body, headers, SPELLING)
        if restored is not None:
            return restored
        if is_json(body):
            return _plain(number, record.subject, body, headers)
        raise MessageUndecodable("the body is not JSON")
    except MessageRejected as error:
        return Rejected(_plain(number, record.subject, body, headers), error)


def _plain(number: int, subject: str, body: bytes, headers: Mapping[str, str]) -> RelayMessage:
    return RelayMessage(
        dedup_key=f"memory:{number}", subject=subject, payload=body, headers=headers
    )
