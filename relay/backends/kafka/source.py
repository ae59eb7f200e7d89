"""The Kafka source: see the package for what it promises."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, Self

from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.offset import OffsetRequest

from relay.backends.kafka.cluster import Cluster, open_cluster
from relay.backends.kafka.errors import OFFSET_OUT_OF_RANGE, UNKNOWN_TOPIC_OR_PARTITION, of_code
from relay.backends.kafka.fetch import Page, pages
from relay.backends.kafka.group import Member, Partition, Rebalancing
from relay.backends.kafka.options import KafkaSourceOptions, check_at_least, check_connection
from relay.backends.kafka.record import decoded
from relay.backends.kafka.topic import check_names
from relay.context import BackendContext
from relay.contracts import Batch, Rejected
from relay.errors import (
    ConfigurationError,
    NotConnected,
    Outage,
    OwnershipLost,
    PositionLost,
    RelayError,
)
from relay.message import RelayMessage
from relay.options import parse_options

_log = logging.getLogger(__name__)

_POLL_S = 0.9
# How long `connect` waits for partitions; a poll goes on waiting.
_ASSIGNMENT_WAIT_S = 10.0
_FETCH_WAIT_MS = 500
_PARTITION_FETCH_BYTES = 1024 * 1024
_FETCH_LANE = "fetch"
_LONGEST_HEARTBEAT_S = 3.0
# Of the time that the group gives us to finish what is out, what joining again may take.
_DRAIN_SHARE = 0.8
_EARLIEST, _LATEST = -2, -1
_ISOLATION = {"read_uncommitted": 0, "read_committed": 1}
_NAMED_PARTITIONS = 4


class _State(Enum):
    OUT = auto()
    SETTLED = auto()
    LOST = auto()


class _Position:
    """What one batch holds: by partition its first offset and the one behind its last."""

    __slots__ = ("opening", "ranges", "state")

    def __init__(self, opening: int, ranges: Mapping[Partition, tuple[int, int]]) -> None:
        self.opening = opening
        self.ranges = ranges
        self.state = _State.OUT


class KafkaSource:
    """Reads topics as a member of a consumer group, and commits offsets when told to.

    One task keeps the membership, one more for each broker fetches. They end with `aclose` or
    `connect`; what goes wrong in one is raised by the next poll.
    """

    def __init__(
        self,
        options: KafkaSourceOptions,
        *,
        topics: Sequence[str],
        member: Member,
        batch_size: int,
        batch_bytes: int,
        name: str,
    ) -> None:
        self._options = options
        self._topics = topics
        self._member = member
        self._batch_size = batch_size
        self._batch_bytes = batch_bytes
        self._name = name
        self._isolation = _ISOLATION[options.isolation_level]
        shortest_ms = min(options.session_timeout_ms, options.rebalance_timeout_ms)
        self._heartbeat_s = min(_LONGEST_HEARTBEAT_S, shortest_ms / 3000)
        self._most_buffered = max(options.fetch_max_bytes, 2 * batch_bytes)
        self._cluster: Cluster | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = 0
        self._trouble: RelayError | None = None
        # Where to fetch next, and where the log ends as far as we know.
        self._positions: dict[Partition, int] = {}
        self._ends: dict[Partition, int] = {}
        self._is_assigned = False
        self._pages: deque[Page] = deque()
        self._buffered = 0
        self._room = asyncio.Event()
        self._out: list[_Position] = []
        self._all_in = asyncio.Event()
        self._wake = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, KafkaSourceOptions, path="source")
        check_connection(parsed, "source")
        topics = [parsed.topic] if isinstance(parsed.topic, str) else list(parsed.topic)
        check_names("source.topic", topics)
        check_at_least(
            "source",
            1,
            session_timeout_ms=parsed.session_timeout_ms,
            rebalance_timeout_ms=parsed.rebalance_timeout_ms,
            fetch_max_bytes=parsed.fetch_max_bytes,
        )
        if parsed.group_id == "":
            raise ConfigurationError("source.group_id is empty", remedy="leave it out, or name it")
        instance = parsed.group_instance_id
        member = Member(
            parsed.group_id or context.pipeline,
            topics,
            instance=(context.pipeline if instance is None else instance) or None,
            session_timeout_ms=parsed.session_timeout_ms,
            rebalance_timeout_ms=parsed.rebalance_timeout_ms,
        )
        return cls(
            parsed,
            topics=topics,
            member=member,
            batch_size=context.batch_size,
            batch_bytes=context.batch_bytes,
            name=f"pgtrickle-relay-{context.pipeline}",
        )

    @property
    def keep_alive_interval_s(self) -> float | None:
        """A third of the session; the signs of life themselves need no help."""
        return self._options.session_timeout_ms / 3000

    async def connect(self) -> None:
        """Open anew and join the group, where it goes on.

        Waits a while for partitions; a poll goes on waiting. Raises `DestinationMissing` for a
        topic that is missing, `PositionLost`, `Outage`, `AuthenticationRefused`.
        """
        await self._close()
        cluster = await open_cluster(self._options, path="source", name=self._name)
        try:
            await cluster.learn(self._topics)
            await self._member.find_coordinator(cluster)
        except BaseException:
            await cluster.aclose()
            raise
        self._opening += 1
        self._cluster = cluster
        self._start(self._stay(cluster))
        deadline = time.monotonic() + _ASSIGNMENT_WAIT_S
        while not (self._is_assigned or self._trouble or self._is_interrupted):
            if not await self._woken(deadline):
                break
        try:
            self._open()
        except RelayError:
            await self._close()
            raise

    async def describe(self) -> dict[str, str]:
        """The brokers, the group, and how many partitions are ours."""
        cluster = self._open()
        return {
            "server": cluster.address,
            "brokers": str(cluster.brokers),
            "group": self._member.group,
            "partitions": f"{len(self._positions)} of"
            f" {sum(map(cluster.partitions_of, self._topics))}",
        }

    async def poll(self) -> Batch:
        """What was fetched, at most a batch; waits up to a second for the first record.

        Hands out nothing while the group shares its partitions anew. Raises what ended the
        membership or a fetch: `Outage`, `OwnershipLost`, `PositionLost`.
        """
        deadline = time.monotonic() + _POLL_S
        while True:
            self._open()
            if self._pages or self._is_interrupted:
                break
            if not await self._woken(deadline):
                break
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        return self._batch(was_cut_short=was_cut_short)

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        self._wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Commit, for every partition of the batch, the offset behind it."""
        position = self._position(batch)
        if position.state is _State.SETTLED:
            return
        offsets = {one: range_[1] for one, range_ in position.ranges.items()}
        try:
            await self._member.commit(self._open(), offsets)
        except OwnershipLost as error:
            self._trouble = self._trouble or error
            raise
        self._settle(position)

    async def keep_alive(self, batch: Batch) -> None:
        """See that the batch is still ours. Raises `OwnershipLost`, `Outage`."""
        self._open()
        self._position(batch)

    async def reject(self, batch: Batch) -> None:
        """Give back this batch and all that came after it, so that the order stays.

        The next poll hands it out again. To acknowledge or reject a later batch that is out does
        nothing more.
        """
        position = batch.position
        if not isinstance(position, _Position) or position not in self._out:
            return
        for one in self._out[self._out.index(position) :]:
            for partition, (first, _) in one.ranges.items():
                if partition in self._positions:
                    self._go_back(partition, first)
            self._settle(one)

    async def is_healthy(self) -> bool:
        """True when a broker answers within seconds and nothing has ended the membership."""
        cluster = self._cluster
        return cluster is not None and self._trouble is None and await cluster.is_healthy()

    async def aclose(self) -> None:
        """Leave the group, so that a successor has the partitions at once, and close."""
        await self._close(is_leaving=True)

    async def _close(self, *, is_leaving: bool = False) -> None:
        cluster, self._cluster = self._cluster, None
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            if cluster is not None and is_leaving:
                await self._member.leave(cluster)
        finally:
            self._let_go()
            self._trouble = None
            if cluster is not None:
                await cluster.aclose()

    def _open(self) -> Cluster:
        if self._trouble is not None:
            raise self._trouble
        if self._cluster is None:
            raise NotConnected("the kafka source is not connected")
        return self._cluster

    def _position(self, batch: Batch) -> _Position:
        """The position of a batch that is ours. Raises `NotConnected`, `OwnershipLost`."""
        position = batch.position
        if not isinstance(position, _Position) or position.opening != self._opening:
            raise NotConnected("this batch was handed out before the source was opened anew")
        if position.state is _State.LOST:
            raise OwnershipLost("the partitions of this batch went to another member of the group")
        return position

    def _settle(self, position: _Position, state: _State = _State.SETTLED) -> None:
        position.state = state
        if position in self._out:
            self._out.remove(position)
        if not self._out:
            self._all_in.set()

    def _let_go(self) -> None:
        """Forget all partitions and what was fetched of them; what is still out is lost."""
        for position in tuple(self._out):
            self._settle(position, _State.LOST)
        self._is_assigned = False
        self._positions.clear()
        self._ends.clear()
        self._pages.clear()
        self._buffered = 0
        self._room.set()

    def _start(self, work: Any) -> asyncio.Task[None]:  # a coroutine
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Keep what ended one of our tasks for the next poll."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._trouble is None:
            if not isinstance(error, RelayError):
                _log.error("unexpected error", exc_info=error)
                error = Outage(f"unexpected {type(error).__name__}: {error}")
            self._trouble = error
        self._wake.set()

    async def _woken(self, deadline: float) -> bool:
        """Wait until something happens; False when the time is over."""
        self._wake.clear()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await self._wake.wait()
        return True

    async def _stay(self, cluster: Cluster) -> None:
        """Be a member of the group, from round to round."""
        while True:
            with contextlib.suppress(Rebalancing):
                partitions = await self._member.join(cluster)
                await self._take_over(cluster, partitions)
                fetching = self._start_fetching(cluster)
                try:
                    await self._show_signs_of_life(cluster)
                except Rebalancing:
                    for task in fetching:
                        task.cancel()
                    await asyncio.gather(*fetching, return_exceptions=True)
                    await self._drain(cluster)
                    self._let_go()

    async def _take_over(self, cluster: Cluster, partitions: Sequence[Partition]) -> None:
        """Find where each partition goes on, and make it durable where it never began.

        Without that, one that begins at its end would begin later and later until something is
        acknowledged. Raises `PositionLost`, `Outage`.
        """
        await cluster.learn({topic for topic, _ in partitions})
        committed = await self._member.committed(cluster, partitions) if partitions else {}
        earliest = await self._offsets(cluster, partitions, _EARLIEST)
        latest = await self._offsets(cluster, partitions, _LATEST)
        starts: dict[Partition, int] = {}
        for one in partitions:
            at = committed.get(one)
            if at is None:
                is_earliest = self._options.auto_offset_reset == "earliest"
                starts[one] = earliest[one] if is_earliest else latest[one]
            elif not earliest[one] <= at <= latest[one]:
                starts[one] = self._instead_of(one, at, earliest[one], latest[one])
        if starts:
            await self._member.commit(cluster, starts)
        self._positions.update({**committed, **starts})
        self._ends.update(latest)
        self._is_assigned = True
        self._wake.set()

    async def _offsets(
        self, cluster: Cluster, partitions: Sequence[Partition], which: int
    ) -> dict[Partition, int]:
        """Where the log of each partition begins, or ends."""
        found: dict[Partition, int] = {}
        for leader, theirs in _by_leader(cluster, partitions).items():
            doing = f"asking for offsets at {cluster.address}"
            topics = [(topic, [(one, which) for one in ones]) for topic, ones in theirs.items()]
            answer = await cluster.ask(leader, OffsetRequest(-1, self._isolation, topics), doing)
            for topic, ones in answer.topics:
                for number, code, _, offset in ones:
                    if code:
                        cluster.forget(topic)
                        raise _passing(code, f"{doing}: {topic!r}, partition {number}")
                    found[topic, number] = offset
        return found

    def _instead_of(self, partition: Partition, at: int, earliest: int, latest: int) -> int:
        """Where to go on when the position is not in the log. Raises `PositionLost`."""
        topic, number = partition
        missing = (
            f"offsets {at} to {earliest - 1} were removed before they were read"
            if at < earliest
            else "was the topic made anew?"
        )
        found = (
            f"the group {self._member.group!r} goes on at offset {at} of {topic!r}, partition"
            f" {number}, which has {earliest} to {latest}: {missing}"
        )
        how = self._options.on_position_lost
        if how == "fail":
            raise PositionLost(found, remedy="set on_position_lost to earliest or latest")
        instead = earliest if how == "earliest" else latest
        _log.warning(
            "%s; going on at %s, as on_position_lost says",
            found,
            instead,
            extra={"pipeline": self._name.removeprefix("pgtrickle-relay-")},
        )
        return instead

    async def _show_signs_of_life(self, cluster: Cluster) -> None:
        """Heartbeats, until the group shares its partitions anew or ours have become more."""
        counts = [cluster.partitions_of(topic) for topic in self._topics]
        while True:
            await asyncio.sleep(self._heartbeat_s)
            await self._member.show_sign_of_life(cluster)
            await cluster.learn(self._topics)
            if [cluster.partitions_of(topic) for topic in self._topics] != counts:
                raise Rebalancing

    async def _drain(self, cluster: Cluster) -> None:
        """Before partitions are let go: wait until what is out is settled, within bounds."""
        self._take_back_what_was_not_handed_out()
        deadline = time.monotonic() + self._options.rebalance_timeout_ms / 1000 * _DRAIN_SHARE
        self._all_in.clear()
        while self._out and (left_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, self._heartbeat_s)):
                    await self._all_in.wait()
            with contextlib.suppress(Rebalancing):
                await self._member.show_sign_of_life(cluster)

    def _take_back_what_was_not_handed_out(self) -> None:
        self._is_assigned = False
        self._pages.clear()
        self._buffered = 0
        self._room.set()

    def _start_fetching(self, cluster: Cluster) -> list[asyncio.Task[None]]:
        leaders = _by_leader(cluster, list(self._positions))
        return [
            self._start(
                self._fetch(
                    cluster, leader, [(topic, one) for topic in topics for one in topics[topic]]
                )
            )
            for leader, topics in leaders.items()
        ]

    async def _fetch(self, cluster: Cluster, leader: int, partitions: Sequence[Partition]) -> None:
        """Fetch from one broker whenever there is room."""
        doing = f"fetching from broker {leader}"
        wait_s = (self._options.request_timeout_ms + _FETCH_WAIT_MS) / 1000
        while True:
            await self._room.wait()
            asked = {one: self._positions[one] for one in partitions}
            answer = await cluster.ask(
                leader, self._fetch_request(asked), doing, lane=_FETCH_LANE, timeout_s=wait_s
            )
            if code := getattr(answer, "error_code", 0):
                raise of_code(code, doing)
            for topic, ones in answer.topics:
                for one in ones:
                    await self._take(cluster, topic, one, asked)
            self._wake.set()

    def _fetch_request(self, asked: Mapping[Partition, int]) -> FetchRequest:
        topics: dict[str, list[tuple[int, int, int]]] = {}
        most = min(self._options.fetch_max_bytes, _PARTITION_FETCH_BYTES)
        for (topic, number), offset in asked.items():
            topics.setdefault(topic, []).append((number, offset, most))
        return FetchRequest(
            _FETCH_WAIT_MS, 1, self._options.fetch_max_bytes, self._isolation, list(topics.items())
        )

    async def _take(
        self, cluster: Cluster, topic: str, answer: Sequence[Any], asked: Mapping[Partition, int]
    ) -> None:
        """Buffer what came of one partition, unless it went elsewhere meanwhile."""
        number, code, end, stable_end, *rest = answer
        partition = (topic, number)
        offset = asked[partition]
        if self._positions.get(partition) != offset:
            return
        if code == OFFSET_OUT_OF_RANGE:
            await self._find_place(cluster, partition, offset)
            return
        if code:
            cluster.forget(topic)
            raise _passing(code, f"fetching from {topic!r}, partition {number}")
        self._ends[partition] = stable_end if self._isolation else end
        # What comes behind has grown with the protocol; the records are always last.
        aborted = next((one for one in rest[:-1] if isinstance(one, list)), None)
        found = pages(topic, number, rest[-1] or b"", offset, aborted if self._isolation else None)
        for page in found:
            self._pages.append(page)
            self._buffered += page.size
        if found:
            self._positions[partition] = found[-1].next_offset
        if self._buffered >= self._most_buffered:
            self._room.clear()

    async def _find_place(self, cluster: Cluster, partition: Partition, offset: int) -> None:
        (earliest,) = (await self._offsets(cluster, [partition], _EARLIEST)).values()
        (latest,) = (await self._offsets(cluster, [partition], _LATEST)).values()
        if not earliest <= offset <= latest:
            instead = self._instead_of(partition, offset, earliest, latest)
            if self._positions.get(partition) == offset:
                self._positions[partition] = instead
                self._ends[partition] = latest

    def _go_back(self, partition: Partition, offset: int) -> None:
        """Fetch this partition from there again."""
        if self._positions[partition] <= offset:
            return
        self._positions[partition] = offset
        self._pages = deque(
            page for page in self._pages if (page.topic, page.partition) != partition
        )
        self._buffered = sum(page.size for page in self._pages)
        if self._buffered < self._most_buffered:
            self._room.set()

    def _batch(self, *, was_cut_short: bool) -> Batch:
        messages: list[RelayMessage] = []
        rejected: list[Rejected] = []
        ranges: dict[Partition, tuple[int, int]] = {}
        count, size = self._batch_size, 0
        while self._pages and count > 0 and size < self._batch_bytes:
            page = self._pages[0]
            taken = 0
            for record in page.records[page.at : page.at + count]:
                one = decoded(record, page.topic, page.partition)
                if isinstance(one, Rejected):
                    rejected.append(one)
                    size += len(one.message.payload)
                else:
                    messages.append(one)
                    size += len(one.payload)
                taken += 1
                if size >= self._batch_bytes:
                    break
            count -= taken
            self._note_range(ranges, page, taken)
        is_end = not self._pages and self._is_assigned and not was_cut_short
        at_end = is_end and all(
            self._positions[one] >= end for one, end in self._ends.items() if one in self._positions
        )
        if not ranges:
            return Batch(is_end_of_backlog=at_end)
        position = _Position(self._opening, ranges)
        self._out.append(position)
        self._all_in.clear()
        return Batch(
            messages=messages,
            rejected=rejected,
            position=position,
            checkpoint=_checkpoint(ranges),
            is_end_of_backlog=at_end,
        )

    def _note_range(self, ranges: dict[Partition, tuple[int, int]], page: Page, taken: int) -> None:
        """So many more records of the first page are handed out; it goes when it is used up."""
        partition = (page.topic, page.partition)
        first = page.records[page.at].offset if taken else page.next_offset
        page.at += taken
        is_used_up = page.at >= len(page.records)
        behind = page.next_offset if is_used_up else page.records[page.at - 1].offset + 1
        ranges[partition] = (ranges[partition][0] if partition in ranges else first, behind)
        if is_used_up:
            self._pages.popleft()
            self._buffered -= page.size
            if self._buffered < self._most_buffered:
                self._room.set()


def _by_leader(
    cluster: Cluster, partitions: Sequence[Partition]
) -> dict[int, dict[str, list[int]]]:
    """By broker and topic the partitions that it serves. Raises `NotConnected`."""
    leaders: dict[int, dict[str, list[int]]] = {}
    for topic, number in partitions:
        of_leader = leaders.setdefault(cluster.leader_of(topic, number), {})
        of_leader.setdefault(topic, []).append(number)
    return leaders


def _passing(code: int, doing: str) -> RelayError:
    """The error for a code of one partition: a topic that moves is missing for a moment."""
    if code == UNKNOWN_TOPIC_OR_PARTITION:
        return Outage(f"{doing}: it has moved, or is gone")
    return of_code(code, doing)


def _checkpoint(ranges: Mapping[Partition, tuple[int, int]]) -> str:
    named = [f"{topic}/{number}@{behind}" for (topic, number), (_, behind) in ranges.items()]
    more = len(named) - _NAMED_PARTITIONS
    return " ".join(named[:_NAMED_PARTITIONS]) + (f" and {more} more" if more > 0 else "")
