"""Record batches on their way to the brokers, each stored once.

The producer is idempotent (https://kafka.apache.org/documentation/#semantics): it has an id, each
batch of a partition a number, and a broker neither stores a batch twice nor one whose predecessor
is missing. So several requests may be under way without an event overtaking another of its
partition; only of a producer that is new to a partition a broker takes any number, so that nothing
is sent behind the first batch before that one is stored. What was not answered keeps its number:
sent again as the very same batch, also over another connection, it is stored once. Where the same
batch can't be sent again a new id is asked for, and what had been stored of it comes a second time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from relay.backends.kafka.cluster import Cluster
from relay.backends.kafka.errors import DUPLICATE_SEQUENCE_NUMBER, of_code
from relay.backends.kafka.record import Header
from relay.errors import ErrorKind, Outage, RelayError, TimedOut

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}

# As many as a broker remembers of a producer and partition.
MAX_REQUESTS_UNDER_WAY = 5

_Add = Callable[[int, int, bytes | None, bytes, list[Header]], object | None]

_MAGIC = 2
_NO_ID = -1
_MAX_SEQUENCE = 2**31


class HeldBack(Outage):
    """Not sent: the broker refused for good what was sent before it, which is not its fault."""


class RecordBatch:
    """Records for one partition; ``indexes`` and ``keys`` are those of their messages.

    ``add`` takes offset in the batch, time in ms, key, value and headers of one more record, and
    gives None where the batch is full; the first is always taken. ``error``: why the batch was not
    accepted, once it was sent; None where it was.
    """

    __slots__ = (
        "_builder",
        "add",
        "data",
        "error",
        "indexes",
        "keys",
        "limit",
        "partition",
        "topic",
    )

    def __init__(self, topic: str, partition: int, *, codec: int, limit: int) -> None:
        self.topic = topic
        self.partition = partition
        self.limit = limit
        self.indexes: list[int] = []
        self.keys: list[str] = []
        self.data = b""
        self.error: RelayError | None = None
        self._builder = DefaultRecordBatchBuilder(
            _MAGIC, codec, 0, _NO_ID, _NO_ID, _NO_ID, batch_size=limit
        )
        self.add: _Add = self._builder.append

    @property
    def slot(self) -> tuple[str, int]:
        """Topic and partition."""
        return self.topic, self.partition

    def seal(self, producer_id: int, epoch: int, sequence: int) -> int:
        """Compress and number the batch, once; its size in bytes."""
        self._builder.set_producer_state(producer_id, epoch, sequence)
        self.data = bytes(self._builder.build())
        del self._builder, self.add
        return len(self.data)


class Producer:
    """Numbers batches and sends them; outlives the connections of a sink."""

    def __init__(self, *, is_idempotent: bool, timeout_ms: int, max_under_way: int) -> None:
        self._is_idempotent = is_idempotent
        self._acks = -1 if is_idempotent else 1
        self._timeout_ms = timeout_ms
        self._max_under_way = max_under_way
        self._id = _NO_ID
        self._epoch = _NO_ID
        self._sequences: dict[tuple[str, int], int] = {}
        # In the order in which they were sent, what was not accepted and may be sent again.
        self._unsettled: list[RecordBatch] = []
        # The partitions that have stored something of this id.
        self._known: set[tuple[str, int]] = set()

    async def prepare(self, cluster: Cluster, keys: Sequence[str]) -> list[RecordBatch]:
        """Be ready to send the messages of these dedup keys.

        Gives batches of an earlier attempt that hold some of them, to be sent before all others;
        their ``indexes`` are those of ``keys``. Raises `Outage`, `ConfigurationError`.
        """
        if not self._is_idempotent:
            return []
        again, self._unsettled = self._unsettled, []
        # A topic that was made anew may have fewer partitions.
        are_there = all(one.partition < cluster.partitions_of(one.topic) for one in again)
        if again and not (are_there and _found_again(again, keys)):
            self._id = _NO_ID
        if self._id == _NO_ID:
            again = []
            doing = f"asking for a producer id at {cluster.address}"
            answer = await cluster.ask_any(InitProducerIdRequest(None, 2**31 - 1), doing)
            if answer.error_code:
                raise of_code(answer.error_code, doing)
            self._id, self._epoch = answer.producer_id, answer.producer_epoch
            self._sequences.clear()
            self._known = set()
        self._unsettled = list(again)
        return again

    def seal(self, batch: RecordBatch) -> int:
        """Make a batch ready to be sent, as the next one of its partition; its size in bytes."""
        if not self._is_idempotent:
            return batch.seal(_NO_ID, _NO_ID, _NO_ID)
        return batch.seal(self._id, self._epoch, self._sequences.get(batch.slot, 0))

    def enlist(self, batch: RecordBatch) -> None:
        """This sealed batch will be sent: the next one of its partition comes after it."""
        if self._is_idempotent:
            after = self._sequences.get(batch.slot, 0) + len(batch.indexes)
            self._sequences[batch.slot] = after % _MAX_SEQUENCE
            self._unsettled.append(batch)
        batch.error = _UNANSWERED

    def settle(self, batches: Sequence[RecordBatch]) -> None:
        """Remember what of these is to be sent again, when all of it was answered or given up."""
        unsettled = [one for one in self._unsettled if one.error is not None]
        if any(_is_out_of_step(one) for one in chain(unsettled, batches)):
            self.start_anew()
        else:
            self._unsettled = unsettled

    def start_anew(self) -> None:
        """Go on with another id: what is unsettled is not going to be sent as it was."""
        self._id = _NO_ID
        self._unsettled = []

    def flight(self, cluster: Cluster) -> Flight:
        """Requests of one publish."""
        known = self._known if self._is_idempotent else None
        return Flight(cluster, self._acks, self._timeout_ms, self._max_under_way, known)


class Flight:
    """The requests of one publish that are under way, in the order in which they were sent.

    ``known``: the partitions that can tell a gap in our numbers; None where there are none.
    Whoever makes one calls `land` or `abandon` at the end.
    """

    def __init__(
        self,
        cluster: Cluster,
        acks: int,
        timeout_ms: int,
        max_under_way: int,
        known: set[tuple[str, int]] | None,
    ) -> None:
        self._cluster = cluster
        self._acks = acks
        self._timeout_ms = timeout_ms
        self._max_under_way = max_under_way
        self._known = known
        self._begun: set[tuple[str, int]] = set()
        self._requests: deque[asyncio.Task[RelayError | None]] = deque()
        self.trouble: RelayError | None = None

    async def send(self, batches: Sequence[RecordBatch]) -> None:
        """Send batches, at most one of a partition; waits while too many are under way.

        Sends nothing once there is `trouble`: what a later request holds must not be stored
        before what an earlier one held.
        """
        while len(self._requests) >= self._max_under_way or (
            self._requests and self._may_overtake(batches)
        ):
            await self._await_first()
        by_leader: dict[int, list[RecordBatch]] = {}
        try:
            if self.trouble is not None:
                raise self.trouble
            for batch in batches:
                leader = self._cluster.leader_of(batch.topic, batch.partition)
                by_leader.setdefault(leader, []).append(batch)
            for leader in by_leader:
                await self._cluster.connected(leader, "sending records")
        except RelayError as error:
            self.trouble = error
            for batch in batches:
                batch.error = error
            return
        self._begun.update(batch.slot for batch in batches)
        for leader, theirs in by_leader.items():
            self._requests.append(asyncio.create_task(self._produce(leader, theirs)))
        # Lets the requests out before the next ones are made.
        await asyncio.sleep(0)

    async def land(self) -> None:
        """Wait until everything is answered or given up."""
        while self._requests:
            await self._await_first()

    async def abandon(self) -> None:
        """Wait for nothing any more."""
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        self._requests.clear()

    def _may_overtake(self, batches: Sequence[RecordBatch]) -> bool:
        """Whether one would be stored although the first of its partition is lost."""
        known = self._known
        return known is not None and any(
            batch.slot in self._begun and batch.slot not in known for batch in batches
        )

    async def _await_first(self) -> None:
        first = self._requests[0]
        await asyncio.wait({first})
        self._requests.popleft()
        self.trouble = self.trouble or first.result()

    async def _produce(self, leader: int, batches: Sequence[RecordBatch]) -> RelayError | None:
        """Send one request and note what became of each batch; the first trouble that passes."""
        by_topic: dict[str, list[tuple[int, bytes]]] = {}
        for batch in batches:
            by_topic.setdefault(batch.topic, []).append((batch.partition, batch.data))
        # The broker gives up waiting for replicas before we give up waiting for it.
        request = ProduceRequest(
            None, self._acks, max(1, self._timeout_ms * 4 // 5), list(by_topic.items())
        )
        try:
            answer = await self._cluster.ask(leader, request, "sending records")
        except RelayError as error:
            for batch in batches:
                batch.error = error
            if isinstance(error, TimedOut):
                await self._cluster.drop(leader)
            return error
        codes = {
            (topic, partition): code
            for topic, partitions in answer.topics
            for partition, code, *_ in partitions
        }
        return next(
            filter(None, [self._noted(one, codes.get(one.slot, -1)) for one in batches]), None
        )

    def _noted(self, batch: RecordBatch, code: int) -> RelayError | None:
        if code in (0, DUPLICATE_SEQUENCE_NUMBER):
            batch.error = None
            if self._known is not None:
                self._known.add(batch.slot)
            return None
        where = f"sending records to {batch.topic!r}, partition {batch.partition}"
        batch.error = of_code(code, where)
        self._cluster.forget(batch.topic)
        if batch.error.kind is ErrorKind.MESSAGE:
            return HeldBack(f"{batch.error.problem}; what comes behind is sent again")
        return batch.error


_UNANSWERED = TimedOut("sending records was broken off")


def _found_again(batches: Sequence[RecordBatch], keys: Sequence[str]) -> bool:
    """Whether all messages of the batches are to be sent again; sets their new indexes."""
    places = {key: index for index, key in enumerate(keys)}
    if len(places) < len(keys) or not all(key in places for batch in batches for key in batch.keys):
        return False
    for batch in batches:
        batch.indexes = [places[key] for key in batch.keys]
    return True


def _is_out_of_step(batch: RecordBatch) -> bool:
    """Whether the numbers of a partition don't fit any more, or can't once others are sent."""
    error = batch.error
    return error is not None and (
        error.kind is not ErrorKind.OUTAGE or error.problem.endswith(_OUT_OF_STEP)
    )


_OUT_OF_STEP = (
    "OUT_OF_ORDER_SEQUENCE_NUMBER",
    "UNKNOWN_PRODUCER_ID",
    "INVALID_PRODUCER_EPOCH",
)
