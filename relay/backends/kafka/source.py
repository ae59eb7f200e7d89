"""The Kafka source: see the package for what it promises."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as driver

from relay.backends.kafka import client
from relay.backends.kafka.errors import mapped, of_exception
from relay.backends.kafka.options import KafkaSourceOptions, check_connection
from relay.backends.kafka.record import decoded, position_key
from relay.backends.kafka.topic import check_names
from relay.context import BackendContext
from relay.contracts import Batch, Rejected
from relay.errors import (
    ConfigurationError,
    MessageUndecodable,
    NotConnected,
    Outage,
    OwnershipLost,
    PositionLost,
    RelayError,
    TimedOut,
)
from relay.message import RelayMessage
from relay.options import parse_options

_log = logging.getLogger(__name__)

_POLL_S = 0.9
# How long `connect` waits for partitions; a poll goes on waiting.
_ASSIGNMENT_WAIT_S = 10.0
_HEALTH_TIMEOUT_S = 2.0
_FETCH_WAIT_MS = 500
_PARTITION_FETCH_BYTES = 1024 * 1024
_LONGEST_HEARTBEAT_MS = 3000
# Of the time that the group gives us to finish what is in flight, what joining again may take.
_DRAIN_SHARE = 0.8
# What a request may take on top of what the broker itself waits for.
_MARGIN_MS = 5000
_NEVER_MS = 2**31 - 1
_UNWATCHED_MS = 5000
_NAMED_PARTITIONS = 4
_NOTHING = "(?!)"
# The client's words for an assignment of others, and a control batch emptied by compaction.
_OF_OTHER_TOPICS = "assignment for unsubscribed topic"
_EMPTIED = "Control batch did not contain any records"


class _Position(msgspec.Struct, eq=False):
    """What one batch holds: by partition its first offset and the one behind its last.

    ``lost``: why it is not ours any more.
    """

    ranges: Mapping[TopicPartition, tuple[int, int]]
    lost: RelayError | None = None


class _Unreadable(msgspec.Struct, frozen=True):
    """In the place of a record that the client can't read."""

    offset: int
    rejected: Rejected


class _Page(NamedTuple):
    """Fetched records of one partition, one at least; behind them is ``behind``."""

    partition: TopicPartition
    records: Sequence[Any]
    behind: int


class KafkaSource(ConsumerRebalanceListener):  # type: ignore[misc]  # untyped in the library
    """Reads topics as a member of a consumer group, and commits offsets when told to.

    The client keeps the membership and fetches. What goes wrong there is raised by the next poll.
    """

    def __init__(self, options: KafkaSourceOptions, context: BackendContext) -> None:
        self._options = options
        self._context = context
        self._topics = [options.topic] if isinstance(options.topic, str) else list(options.topic)
        check_names("source.topic", self._topics)
        # A topic that is subscribed to by its name is made where it is missing.
        self._pattern = f"^(?:{'|'.join(map(re.escape, self._topics))})$"
        self._group = options.group_id or context.pipeline
        instance = options.group_instance_id
        self._instance = (context.pipeline if instance is None else instance) or None
        self._timeout_s = options.request_timeout_ms / 1000
        self._server = client.server_of(options, "source")
        self._consumer: AIOKafkaConsumer | None = None
        self._heard = client.Heard(options)
        self._trouble: RelayError | None = None
        # Nothing is fetched in a rebalance; while joining, to see what keeps us from it.
        self._state: Literal["joining", "rebalancing", "assigned"] = "joining"
        self._is_joining_again = False
        # How many partitions the topics had when ours were assigned.
        self._counted = 0
        self._coordination: asyncio.Task[Any] | None = None
        self._fetching: asyncio.Task[list[_Page]] | None = None
        self._busy_at = 0.0
        # Partitions of which one has a record that the client can't read.
        self._suspects: list[TopicPartition] = []
        self._in_flight: list[_Position] = []
        self._all_in = asyncio.Event()
        self._committing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, KafkaSourceOptions, path="source")
        check_connection(parsed, "source")
        if parsed.group_id == "":
            raise ConfigurationError("source.group_id is empty", remedy="leave it out, or name it")
        return cls(parsed, context)

    @property
    def keep_alive_interval_s(self) -> float | None:
        """A third of the session; the heartbeats themselves need no help."""
        return self._options.session_timeout_ms / 3000

    async def connect(self) -> None:
        """Open again and join the group, where it goes on.

        Waits a while for partitions; a poll goes on waiting. Raises `DestinationMissing` for a
        topic that is missing, `PositionLost`, `Outage`, `AuthenticationRefused`.
        """
        await self._close()
        self._heard = client.Heard(self._options)
        consumer = self._consumer = await self._started()
        try:
            with mapped(f"asking for topics at {self._server}"):
                async with asyncio.timeout(self._timeout_s):
                    there = await consumer.topics()
            for topic in self._topics:
                if topic not in there:
                    raise client.topic_missing(topic, self._server)
            consumer.subscribe(pattern=self._pattern, listener=self)
            deadline = time.monotonic() + _ASSIGNMENT_WAIT_S
            while self._state != "assigned" and not self._is_interrupted:
                if not await self._woken(deadline):
                    break
                self._taken()
            self._open()
        except BaseException:
            await self._close()
            raise

    async def describe(self) -> dict[str, str]:
        """The brokers, the group, and how many partitions are ours."""
        consumer = self._open()
        return {
            "server": self._server,
            "group": self._group,
            "partitions": f"{len(consumer.assignment())} of {self._count(consumer)}",
            "state": "assigned" if self._state == "assigned" else "rebalancing",
        }

    async def poll(self) -> Batch:
        """What was fetched, at most a batch; waits up to a second for the first record.

        Hands out nothing while the group rebalances. Raises what ended the membership or a fetch:
        `Outage`, `OwnershipLost`, `PositionLost`.
        """
        deadline = time.monotonic() + _POLL_S
        while not (pages := self._taken()) and not self._is_interrupted:
            if not await self._woken(deadline):
                break
        consumer = self._open()
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        if pages:
            self._busy_at = time.monotonic()
        elif not was_cut_short:
            self._look_around(consumer)
        return await self._batch(consumer, pages, was_cut_short=was_cut_short)

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        self._wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Commit, for every partition of the batch, the offset behind it."""
        position = self._position(batch)
        if position not in self._in_flight:
            return
        consumer = self._open()
        offsets = {one: behind for one, (_, behind) in position.ranges.items()}
        try:
            with mapped(f"committing offsets of the group {self._group!r}"):
                async with asyncio.timeout(self._timeout_s), self._committing:
                    await self._check_generation(consumer, offsets)
                    await consumer.commit(offsets)
        except OwnershipLost as error:
            self._fail(error)
            self._release(error)
            raise
        self._settle(position)

    async def _check_generation(
        self, consumer: AIOKafkaConsumer, partitions: Mapping[TopicPartition, int]
    ) -> None:
        """Raise `OwnershipLost` where a topic was deleted and created again while nobody looked.

        A fetch finds that at once. Of a partition that is not fetched, since what was fetched is
        not used up, the broker has forgotten what was committed; a commit would skip what is new.
        """
        if not consumer.assignment().issuperset(partitions):
            raise OwnershipLost("the group rebalances")
        oldest_ms = time.time() * 1000 - _UNWATCHED_MS
        unwatched = [
            one for one in partitions if (consumer.last_poll_timestamp(one) or 0) < oldest_ms
        ]
        if None in await asyncio.gather(*map(consumer.committed, unwatched)):
            raise OwnershipLost(f"one of {', '.join(self._topics)} was deleted and created again")

    async def keep_alive(self, batch: Batch) -> None:
        """See that the batch is still ours. Raises `OwnershipLost`, `Outage`."""
        self._open()
        self._position(batch)

    async def reject(self, batch: Batch) -> None:
        """Hand out this batch again, and all that came after it, so that the order stays.

        To acknowledge or reject a later batch that is in flight does nothing more.
        """
        position, consumer = batch.position, self._consumer
        if position not in self._in_flight or consumer is None:
            return
        # Of each partition the earliest: what is set later in this order was handed out before.
        back = {page.partition: page.records[0].offset for page in self._taken()}
        self._drop_fetched()
        for one in reversed(self._in_flight[self._in_flight.index(position) :]):
            back |= {partition: first for partition, (first, _) in one.ranges.items()}
            self._settle(one)
        for partition in back.keys() & consumer.assignment():
            consumer.seek(partition, back[partition])

    async def lag(self) -> int | None:
        """What the partitions that are ours have behind what is acknowledged."""
        consumer = self._open()
        if self._state != "assigned":
            return None
        unsettled: dict[TopicPartition, int] = {}
        for position in self._in_flight:
            for one, (first, _) in position.ranges.items():
                unsettled.setdefault(one, first)
        for page in self._fetched():
            unsettled.setdefault(page.partition, page.records[0].offset)
        lag = 0
        for one in consumer.assignment():
            end = consumer.highwater(one)
            if end is None:
                return None
            at = unsettled.get(one)
            lag += max(0, end - (await consumer.position(one) if at is None else at))
        return lag

    async def is_healthy(self) -> bool:
        """True when a broker answers within seconds and nothing has ended the membership."""
        if self._consumer is None or self._trouble is not None:
            return False
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self._consumer.topics()
        except (driver.KafkaError, TimeoutError):
            return False
        return True

    async def aclose(self) -> None:
        """Close within seconds.

        A static member's successor takes its place at once; any other member leaves the group, so
        that others have its partitions at once.
        """
        await self._close()

    async def _started(self) -> AIOKafkaConsumer:
        options = self._options
        # Joining takes as long as the others need to finish; all else is bounded here.
        slowest_ms = max(options.rebalance_timeout_ms, options.session_timeout_ms)
        shortest_ms = min(options.session_timeout_ms, options.rebalance_timeout_ms)
        # What a batch has no room for is fetched again.
        fetch_bytes = min(options.fetch_max_bytes, self._context.batch_bytes)
        return await client.started(
            options,
            "source",
            f"pgtrickle-relay-{self._context.pipeline}",
            AIOKafkaConsumer,
            self._heard,
            request_timeout_ms=max(options.request_timeout_ms, slowest_ms + _MARGIN_MS),
            group_id=self._group,
            group_instance_id=self._instance,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level=options.isolation_level,
            session_timeout_ms=options.session_timeout_ms,
            rebalance_timeout_ms=options.rebalance_timeout_ms,
            heartbeat_interval_ms=min(_LONGEST_HEARTBEAT_MS, max(1, shortest_ms // 3)),
            max_poll_interval_ms=_NEVER_MS,
            fetch_max_wait_ms=_FETCH_WAIT_MS,
            fetch_max_bytes=fetch_bytes,
            max_partition_fetch_bytes=min(fetch_bytes, _PARTITION_FETCH_BYTES),
        )

    async def _close(self) -> None:
        consumer, self._consumer = self._consumer, None
        # Ended first, so that closing does not wait for a group that rebalances.
        coordination, self._coordination = self._coordination, None
        if coordination is not None and not coordination.done():
            coordination.cancel()
            await asyncio.wait({coordination})
        self._release(NotConnected("this batch was handed out before the source was opened again"))
        self._state, self._is_joining_again = "joining", False
        self._trouble = None
        self._counted = 0
        if consumer is not None:
            await client.close(consumer)

    def _open(self) -> AIOKafkaConsumer:
        trouble = self._trouble or self._heard.trouble
        if self._consumer is None:
            raise NotConnected("the kafka source is not connected")
        if trouble is not None:
            raise trouble
        return self._consumer

    def _position(self, batch: Batch) -> _Position:
        """The position of a batch that is ours. Raises why it is not any more."""
        position = batch.position
        if not isinstance(position, _Position):
            raise NotConnected("this batch is of another source")
        if position.lost is not None:
            raise position.lost
        return position

    def _settle(self, position: _Position) -> None:
        self._in_flight.remove(position)
        if not self._in_flight:
            self._all_in.set()

    def _fail(self, error: BaseException) -> None:
        """Keep what ends the membership or a fetch, for the next poll."""
        if _OF_OTHER_TOPICS in str(error):
            # Who takes a static member's place gets its partitions, of whatever topics.
            error = Outage(
                f"the member {self._instance!r} of the group {self._group!r} read other topics",
                remedy="its place is taken when its session is over",
                retry_after_s=self._options.session_timeout_ms / 1000 + 1,
            )
        doing = f"reading from Kafka at {self._server}"
        ours = of_exception(error, doing)
        if ours is None:
            _log.error("unexpected error", exc_info=error)
            ours = Outage(f"{doing}: unexpected {type(error).__name__}")
        self._trouble = self._trouble or ours
        self._wake.set()

    def _drop_fetched(self) -> None:
        """Forget what was fetched and not handed out; a fetch that waits has nothing yet."""
        self._suspects = []
        if self._fetching is not None:
            self._fetching.cancel()
            self._fetching = None

    def _release(self, why: RelayError) -> None:
        """What is still in flight is lost, and what was fetched comes again."""
        self._drop_fetched()
        for position in tuple(self._in_flight):
            position.lost = why
            self._settle(position)

    # Membership: called by the client, in the task that keeps it

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Before partitions are given up: wait until what is in flight is settled, within bounds.

        The client joins again when this returns. A task that is cancelled in here joins no more.
        """
        consumer = self._member()
        end = None if self._is_joining_again else await self._end_of(consumer, revoked)
        if end is not None:
            self._fail(end)
            self._release(end)
            raise asyncio.CancelledError
        self._all_in.clear()
        if self._in_flight:
            with contextlib.suppress(TimeoutError):
                bound_s = self._options.rebalance_timeout_ms / 1000 * _DRAIN_SHARE
                async with asyncio.timeout(bound_s):
                    await self._all_in.wait()
        self._release(OwnershipLost("the partitions of this batch went to another member"))
        self._state = "joining"
        if self._trouble is not None:
            raise asyncio.CancelledError

    def _member(self) -> AIOKafkaConsumer:
        """The client, of whose coordination this is the task; nothing more is handed out."""
        if self._consumer is None:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        if task is not None and task is not self._coordination:
            self._coordination = task
            task.add_done_callback(self._coordination_ended)
        self._state = "rebalancing"
        self._drop_fetched()
        return self._consumer

    def _coordination_ended(self, task: asyncio.Task[Any]) -> None:
        """Keep that the client's task of the group has ended: it would assign nothing any more."""
        error = None if task.cancelled() else task.exception()
        if task is self._coordination:
            self._fail(error or Outage(f"Kafka at {self._server}: our part in the group ended"))

    async def _end_of(
        self, consumer: AIOKafkaConsumer, partitions: set[TopicPartition]
    ) -> RelayError | None:
        """Why we are no member any more: then even what is committed already can't be committed."""
        try:
            async with asyncio.timeout(self._timeout_s), self._committing:
                for one in list(partitions)[:1]:
                    at = await consumer.committed(one)
                    if at is not None:
                        await consumer.commit({one: at})
        except driver.CommitFailedError as error:
            if not isinstance(error.__cause__, driver.RebalanceInProgressError):
                return OwnershipLost("another member has taken our place in the group")
        except driver.IllegalStateError:
            return Outage(f"of the topics {', '.join(self._topics)} one was deleted, or created")
        except (driver.KafkaError, TimeoutError):
            return None
        return None

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Take over what is ours now."""
        consumer = self._member()
        if self._is_joining_again:
            self._is_joining_again = False
            consumer.subscribe(pattern=self._pattern, listener=self)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._take_over(consumer, sorted(assigned))
                has_new = await self._has_partitions_of_nobody(consumer, assigned)
        except Exception as error:  # noqa: BLE001 - the client would only log it
            self._fail(error)
            return
        self._counted = self._count(consumer)
        if has_new:
            self._join_again(consumer)
            return
        self._busy_at = time.monotonic()
        self._state = "assigned"
        self._wake.set()

    async def _has_partitions_of_nobody(
        self, consumer: AIOKafkaConsumer, ours: set[TopicPartition]
    ) -> bool:
        """Whether partitions came before we took the place of the member that shares them.

        The group does not tell who takes that place, and they would stay nobody's. What a member
        of ours has is committed from the start.
        """
        if self._instance is None or self._counted:
            return False
        all_ = {
            TopicPartition(topic, number)
            for topic in self._topics
            for number in consumer.partitions_for_topic(topic) or ()
        }
        return None in await asyncio.gather(*map(consumer.committed, all_ - ours))

    def _join_again(self, consumer: AIOKafkaConsumer) -> None:
        """Make the group rebalance: the client joins again when its topics change."""
        self._drop_fetched()
        self._is_joining_again, self._state = True, "rebalancing"
        consumer.subscribe(pattern=_NOTHING, listener=self)

    async def _take_over(
        self, consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]
    ) -> None:
        """Find where each partition goes on, and make it durable where it never began.

        Without that, one that begins at its end would begin later and later until something is
        acknowledged. Raises `PositionLost`.
        """
        committed = await asyncio.gather(*map(consumer.committed, partitions))
        earliest = await consumer.beginning_offsets(partitions)
        latest = await consumer.end_offsets(partitions)
        positions: dict[TopicPartition, int | None] = dict(zip(partitions, committed, strict=True))
        starts = {}
        for one, at in positions.items():
            if at is None:
                is_earliest = self._options.auto_offset_reset == "earliest"
                starts[one] = earliest[one] if is_earliest else latest[one]
            elif not earliest[one] <= at <= latest[one]:
                starts[one] = self._instead_of(one, at, earliest[one], latest[one])
        if starts:
            await consumer.commit(starts)
        for one, at in (positions | starts).items():
            consumer.seek(one, at)

    def _instead_of(self, partition: TopicPartition, at: int, earliest: int, latest: int) -> int:
        """Where to go on when the position is not in the log. Raises `PositionLost`."""
        missing = (
            f"offsets {at} to {earliest - 1} were removed before they were read"
            if at < earliest
            else "was the topic deleted and created again?"
        )
        found = (
            f"the group {self._group!r} goes on at offset {at} of {partition.topic!r}, partition"
            f" {partition.partition}, which has {earliest} to {latest}: {missing}"
        )
        how = self._options.on_position_lost
        if how == "fail":
            raise PositionLost(found, remedy="set on_position_lost to earliest or latest")
        instead = earliest if how == "earliest" else latest
        _log.warning(
            "%s; going on at %s, as on_position_lost says",
            found,
            instead,
            extra={"pipeline": self._context.pipeline},
        )
        return instead

    # Fetching

    async def _woken(self, deadline: float) -> bool:
        """Fetch, and wait until something happens; False when the time is over."""
        consumer = self._open()
        self._wake.clear()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        if self._fetching is None and self._state != "rebalancing":
            self._fetching = asyncio.create_task(self._fetch(consumer))
            self._fetching.add_done_callback(lambda _: self._wake.set())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await self._wake.wait()
        return True

    async def _fetch(self, consumer: AIOKafkaConsumer) -> list[_Page]:
        """The next records; who is interrupted meanwhile gets them later.

        A record that the client can't read it would come to again and again. Such a one is looked
        for record by record in the partitions that have any, passed, and named.
        """
        suspect = self._suspects[0] if self._suspects else None
        others = self._suspects[1:]
        began = {one: await consumer.position(one) for one in consumer.assignment()}
        bounds = {"timeout_ms": int(_POLL_S * 1000), "max_records": self._context.batch_size}
        try:
            if suspect is None:
                found = await consumer.getmany(**bounds)
            else:
                found = await consumer.getmany(suspect, **bounds | {"max_records": 1})
        except driver.OffsetOutOfRangeError as error:
            await self._take_over(consumer, list(error.args[0]))
            raise Outage("the position was not in the log any more") from error
        except (driver.KafkaError, UnicodeDecodeError) as error:
            if not isinstance(error, UnicodeDecodeError) and _EMPTIED not in str(error):
                raise
            if suspect is not None:
                at = began[suspect]
                consumer.seek(suspect, at + 1)
                self._suspects = [suspect]
                return [_Page(suspect, [_unreadable(suspect, at, error)], at + 1)]
            # What was read of other partitions went with it.
            for one, at in began.items():
                consumer.seek(one, at)
            self._suspects = [one for one, at in began.items() if consumer.highwater(one) > at]
            return []
        # Where but one is left, it has just shown that it can be read again.
        self._suspects = [*others, suspect] if others and found else others
        return [_Page(one, page, await consumer.position(one)) for one, page in found.items()]

    def _fetched(self) -> Sequence[_Page]:
        """What a fetch has brought and no poll has taken."""
        task = self._fetching
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return ()
        return task.result()

    def _taken(self) -> Sequence[_Page]:
        """What a fetch has brought; what ended it is kept."""
        task = self._fetching
        if task is None or not task.done():
            return ()
        self._fetching = None
        if task.cancelled():
            return ()
        error = task.exception()
        if error is None:
            return task.result()
        self._fail(error)
        return ()

    def _look_around(self, consumer: AIOKafkaConsumer) -> None:
        """What an idle poll looks at. Raises `TimedOut` for a broker that is silent.

        Where partitions have been added the group rebalances.
        """
        if self._state != "assigned":
            return
        longest_s = self._timeout_s + 2 * _FETCH_WAIT_MS / 1000
        if time.monotonic() - self._busy_at > longest_s:
            oldest_ms = (time.time() - longest_s) * 1000
            for one in consumer.assignment():
                if (consumer.last_poll_timestamp(one) or 0) < oldest_ms:
                    raise TimedOut(
                        f"reading from {one.topic!r}, partition {one.partition}: no answer"
                    )
        if self._count(consumer) != self._counted and not self._in_flight:
            self._counted = self._count(consumer)
            self._join_again(consumer)

    def _count(self, consumer: AIOKafkaConsumer) -> int:
        """How many partitions the topics have."""
        return sum(len(consumer.partitions_for_topic(one) or ()) for one in self._topics)

    # Batches

    async def _batch(
        self, consumer: AIOKafkaConsumer, pages: Sequence[_Page], *, was_cut_short: bool
    ) -> Batch:
        messages: list[RelayMessage] = []
        rejected: list[Rejected] = []
        ranges: dict[TopicPartition, tuple[int, int]] = {}
        size = 0
        for partition, records, behind in pages:
            first = records[0].offset
            for record in records:
                if size >= self._context.batch_bytes:
                    # The rest comes again.
                    behind = record.offset
                    consumer.seek(partition, behind)
                    break
                one = record.rejected if isinstance(record, _Unreadable) else decoded(record)
                if isinstance(one, Rejected):
                    rejected.append(one)
                    size += len(one.message.payload)
                else:
                    messages.append(one)
                    size += len(one.payload)
            if behind > first:
                ranges[partition] = first, behind
        is_end = not was_cut_short and await self._is_at_end(consumer)
        if not ranges:
            return Batch(is_end_of_backlog=is_end)
        position = _Position(ranges)
        self._in_flight.append(position)
        return Batch(
            messages=messages,
            rejected=rejected,
            position=position,
            checkpoint=_checkpoint(ranges),
            is_end_of_backlog=is_end,
        )

    async def _is_at_end(self, consumer: AIOKafkaConsumer) -> bool:
        """Whether the client has read all that there is of every partition."""
        if self._state != "assigned":
            return False
        is_committed = self._options.isolation_level == "read_committed"
        end_of = consumer.last_stable_offset if is_committed else consumer.highwater
        for one in consumer.assignment():
            end = end_of(one)
            if end is None or await consumer.position(one) < end:
                return False
        return True


def _unreadable(partition: TopicPartition, offset: int, error: Exception) -> _Unreadable:
    topic, number = partition
    why = "a header's name is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
    problem = f"record {offset} of {topic!r}, partition {number}, can't be read: {why}"
    message = RelayMessage(
        dedup_key=position_key(topic, number, offset), payload=b"", subject=topic
    )
    return _Unreadable(offset, Rejected(message, MessageUndecodable(problem)))


def _checkpoint(ranges: Mapping[TopicPartition, tuple[int, int]]) -> str:
    named = [f"{topic}/{number}@{behind}" for (topic, number), (_, behind) in ranges.items()]
    more = len(named) - _NAMED_PARTITIONS
    return " ".join(named[:_NAMED_PARTITIONS]) + (f" and {more} more" if more > 0 else "")
