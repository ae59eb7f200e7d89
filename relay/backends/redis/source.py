"""The Redis Streams source: see the package for what it promises.

To tell a stream from another that had its name before, each has a generation: a second group that
reads nothing, with a random number in its position. Redis makes a group once, whoever asks, and
deletes it with its stream. Entries are handed out only while the stream is of the generation that
was found on connecting.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Self

import msgspec
from redis.exceptions import ResponseError

from relay.backends.redis.connection import Connection, Reply, connect, pack, rows
from relay.backends.redis.entry import Entry, decoded, entries
from relay.backends.redis.errors import of_reply
from relay.backends.redis.key import check_key
from relay.backends.redis.options import (
    RedisSourceOptions,
    check_start_id,
    endpoint_of,
)
from relay.context import BackendContext
from relay.contracts import Batch, sorted_out
from relay.errors import ConfigurationError, MessageRejected, NotConnected, RelayError
from relay.options import parse_options

_CLOSE_TIMEOUT_S = 2.0
_FROM_THE_START = b"0-0"
# Redis bounds a read by entries, not by bytes: how many to ask for is learnt from what came.
_FIRST_COUNT = 64
_GROWTH = 4
# An idle time above every consumer's claim_idle_ms, so that another may claim at once.
_RELEASED = (b"IDLE", b"86400000")

_GENERATION = b"pgtrickle:generation"
# Later than every entry, so that nothing is kept in the stream for this group.
_LAST_MS = 2**63 - 1


class _Position(msgspec.Struct, frozen=True):
    """Ids handed out together, and over which connection."""

    connection: Connection
    ids: tuple[bytes, ...]


class RedisSource:
    """Reads a stream as a consumer of a group and acknowledges when asked to.

    Reading what is new blocks, on a connection of its own; everything else goes over the other. At
    most one read is in flight, as a task that outlives an interrupted poll and ends with `aclose`
    or `connect` at the latest: what it brings is handed out by the next poll.
    """

    def __init__(self, options: RedisSourceOptions, context: BackendContext) -> None:
        self._options = options
        self._doing = f"reading the stream {options.stream_key!r}"
        self._key = options.stream_key.encode()
        self._group = (options.group_name or context.pipeline).encode()
        self._consumer = (options.consumer_name or context.pipeline).encode()
        self._name = f"pgtrickle-relay {context.pipeline}"
        self._batch_size = context.batch_size
        self._batch_bytes = context.batch_bytes
        self._most = min(context.batch_size, options.count or context.batch_size)
        self._connections: tuple[Connection, Connection] | None = None
        self._blocking_id: Reply = None
        # Empty where the user may not ask for it.
        self._generation = ""
        self._reading: asyncio.Task[Sequence[Entry]] | None = None
        # Where to go on among what is pending for us; None when all of it was seen.
        self._pending_after: bytes | None = None
        self._claim_from = _FROM_THE_START
        self._claim_at = 0.0
        self._count = _FIRST_COUNT
        self._is_backlog_left = True
        self._buffer: deque[Entry] = deque()
        # Everything that is buffered, or handed out and unacknowledged.
        self._held: set[bytes] = set()
        self._wake = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, RedisSourceOptions, path="source")
        endpoint_of(parsed, "source")
        check_start_id(parsed.start_id)
        for name in ("group_name", "consumer_name", "payload_field"):
            if getattr(parsed, name) == "":
                raise ConfigurationError(f"source.{name} is empty")
        try:
            check_key(parsed.stream_key)
        except MessageRejected as error:
            raise ConfigurationError(f"source.stream_key: {error}") from None
        return cls(parsed, context)

    @property
    def keep_alive_interval_s(self) -> float | None:
        """A third of the time after which another consumer might claim what we hold."""
        return self._options.claim_idle_ms / 3000

    async def connect(self) -> None:
        """Open again; find or make the stream and the group; begin with what is pending for us.

        Raises `DestinationMissing` where the key holds something else than a stream.
        """
        await self.aclose()
        async with contextlib.AsyncExitStack() as opened:
            commands = await connect(self._options, name=self._name, path="source")
            opened.push_async_callback(commands.aclose)
            blocking = await connect(self._options, name=self._name, path="source")
            opened.push_async_callback(blocking.aclose)
            await self._make_group(commands, self._group, self._options.start_id.encode())
            number = secrets.randbits(32)
            await self._make_group(commands, _GENERATION, b"%d-%d" % (_LAST_MS, number))
            groups = await commands.facts(b"XINFO", b"GROUPS", self._key)
            self._generation = _generation(groups)
            if groups is not None and not self._generation:
                raise NotConnected(f"{self._doing}: it was deleted meanwhile")
            self._blocking_id = await blocking.facts(b"CLIENT", b"ID")
            opened.pop_all()
        self._pending_after = self._claim_from = _FROM_THE_START
        self._claim_at = 0.0
        self._count = min(_FIRST_COUNT, self._most)
        self._is_backlog_left = True
        self._connections = commands, blocking

    async def poll(self) -> Batch:
        """What is pending for us, then what can be claimed, then what is new; at most a batch.

        Waits up to ``block_ms`` for the first entry. The next entries are already asked for when
        it returns. Raises `PositionLost` where stream or group were deleted meanwhile.
        """
        deadline = time.monotonic() + self._options.block_ms / 1000
        while True:
            self._wake.clear()
            commands, blocking = self._open()
            self._take_read()
            left_s = deadline - time.monotonic()
            if self._buffer or self._is_interrupted or left_s <= 0:
                break
            self._read_on(commands, blocking)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        batch = self._batch(commands, was_cut_short=was_cut_short)
        if not self._buffer:
            self._read_on(commands, blocking)
        return batch

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        self._wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Take every entry of the batch off the group's list of what is pending."""
        commands, _ = self._open()
        position = batch.position
        if isinstance(position, _Position) and position.connection is not commands:
            raise NotConnected("this batch was handed out over a connection before this one")
        if ids := self._ids(batch):
            await commands.ask(self._doing, b"XACK", self._key, self._group, *ids)
            self._held.difference_update(ids)

    async def keep_alive(self, batch: Batch) -> None:  # noqa: ARG002 - all of them are
        """Show a sign of life for all that we hold, what is waiting to be polled included."""
        commands, _ = self._open()
        self._take_read()
        await self._set_idle(commands, self._held)

    async def reject(self, batch: Batch) -> None:
        """Release this batch and all that comes after it, so that the order stays.

        The next poll hands it out again; another consumer of the group may claim it at once. A
        later batch that is unacknowledged is thereby released too; to acknowledge or reject it does
        nothing more.
        """
        commands, _ = self._open()
        ids = self._ids(batch)
        if not ids:
            return
        await self._stop_reading(commands)
        first = min(map(_order, ids))
        released = {one for one in self._held if _order(one) >= first}
        self._buffer.clear()
        self._held.difference_update(released)
        self._pending_after = _FROM_THE_START
        await self._set_idle(commands, released, *_RELEASED)

    async def lag(self) -> int | None:
        """What the group has not read yet, which Redis can't always tell, and what is pending."""
        commands, _ = self._open()
        facts = _group(await commands.facts(b"XINFO", b"GROUPS", self._key), self._group)
        unread, pending = facts.get(b"lag"), facts.get(b"pending")
        if not isinstance(unread, int) or not isinstance(pending, int):
            return None
        return unread + pending

    async def is_healthy(self) -> bool:
        """True when the server answers a ping within seconds."""
        return self._connections is not None and await self._connections[0].is_healthy()

    async def aclose(self) -> None:
        """Release everything that is not acknowledged, and close."""
        connections, self._connections = self._connections, None
        if connections is None:
            return
        commands, blocking = connections
        try:
            # What can't be released is pending for us all the same, and comes first the next time.
            with contextlib.suppress(RelayError, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._stop_reading(commands)
                    await self._set_idle(commands, self._held, *_RELEASED)
        finally:
            self._buffer.clear()
            self._held.clear()
            await self._end_reading()
            await asyncio.gather(commands.aclose(), blocking.aclose())

    def _open(self) -> tuple[Connection, Connection]:
        if self._connections is None:
            raise NotConnected("the redis source is not connected")
        for connection in self._connections:
            if connection.loss is not None:
                raise connection.loss
        return self._connections

    async def _make_group(self, commands: Connection, group: bytes, start: bytes) -> None:
        doing = f"making the group {group.decode()!r} of the stream {self._options.stream_key!r}"
        command = pack(b"XGROUP", b"CREATE", self._key, group, start, b"MKSTREAM")
        (reply,) = await commands.ask_all(doing, [command])
        if isinstance(reply, ResponseError) and not str(reply).startswith("BUSYGROUP"):
            raise of_reply(reply, doing)

    def _read_on(self, commands: Connection, blocking: Connection) -> None:
        """See that a read is in flight."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(commands, blocking))
            self._reading.add_done_callback(lambda _: self._wake.set())

    def _take_read(self) -> None:
        """Move what a finished read brought into the buffer. Raises what ended it."""
        if self._reading is None or not self._reading.done():
            return
        reading, self._reading = self._reading, None
        found = [entry for entry in reading.result() if entry.id not in self._held]
        self._held.update(entry.id for entry in found)
        self._buffer.extend(found)
        size = sum(entry.size for entry in found)
        if size:
            # Ask for fewer when entries are large, for more when they are small.
            fitting = max(1, self._batch_bytes * len(found) // size)
            self._count = min(self._most, fitting, _GROWTH * len(found) + _FIRST_COUNT)

    async def _stop_reading(self, commands: Connection) -> None:
        """End our read; when it returns, nothing more is delivered to us.

        What it still brought is pending for us. A connection that is merely closed could be given
        an entry by a server that has not noticed yet.
        """
        if self._reading is not None and not self._reading.done():
            if isinstance(self._blocking_id, int):
                await commands.facts(b"CLIENT", b"UNBLOCK", b"%d" % self._blocking_id)
            await asyncio.wait([self._reading])
        await self._end_reading()

    async def _end_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, commands: Connection, blocking: Connection) -> Sequence[Entry]:
        """One page of what is pending for us, of what can be claimed, or of what is new."""
        if self._pending_after is not None:
            found = await self._entries(commands, self._pending_after)
            self._pending_after = found[-1].id if found else None
        elif self._is_claim_due():
            found = await self._claim(commands)
        else:
            asked, block_ms = self._count, self._options.block_ms
            how = (b"BLOCK", b"%d" % block_ms)
            found = await self._entries(blocking, b">", *how, wait_s=block_ms / 1000)
            self._is_backlog_left = len(found) >= asked
        return found

    async def _entries(
        self, connection: Connection, after: bytes, *how: bytes, wait_s: float = 0.0
    ) -> Sequence[Entry]:
        """What is pending for us behind an id, or what is new."""
        command = (
            *(b"XREADGROUP", b"GROUP", self._group, self._consumer),
            *(b"COUNT", b"%d" % self._count, *how, b"STREAMS", self._key, after),
        )
        streams = rows(await self._checked(connection, command, wait_s=wait_s))
        return [one for name_and_found in streams for one in entries(rows(rows(name_and_found)[1]))]

    def _is_claim_due(self) -> bool:
        return time.monotonic() >= self._claim_at

    async def _claim(self, commands: Connection) -> Sequence[Entry]:
        """Make pending for us what others have kept for too long, to be read as such.

        Gives what was removed from the stream and is now pending for nobody; Redis before 7 makes
        it pending for us like the rest.
        """
        command = (
            *(b"XAUTOCLAIM", self._key, self._group, self._consumer),
            *(b"%d" % self._options.claim_idle_ms, self._claim_from),
            *(b"COUNT", b"%d" % self._count, b"JUSTID"),
        )
        next_, claimed, *removed = rows(await self._checked(commands, command))
        self._claim_from = next_ if isinstance(next_, bytes) else _FROM_THE_START
        if self._claim_from == _FROM_THE_START:
            self._claim_at = time.monotonic() + self._options.claim_idle_ms / 2000
        if claimed:
            self._pending_after = _FROM_THE_START
        return [Entry(one, None) for ids in removed for one in rows(ids) if isinstance(one, bytes)]

    async def _checked(
        self, connection: Connection, command: Sequence[bytes], *, wait_s: float = 0.0
    ) -> Reply:
        """The answer to a command that reads, where the stream is still of our generation."""
        commands = [pack(*command)]
        if self._generation:
            commands.append(pack(b"XINFO", b"GROUPS", self._key))
        reply, *groups = await connection.ask_all(self._doing, commands, wait_s=wait_s)
        if isinstance(reply, ResponseError):
            raise of_reply(reply, self._doing)
        if groups and _generation(groups[0]) != self._generation:
            raise NotConnected(f"{self._doing}: it was deleted and made again")
        return reply

    def _ids(self, batch: Batch) -> list[bytes]:
        """What of a batch is still ours to answer for."""
        position = batch.position
        if not isinstance(position, _Position) or position.connection is not self._open()[0]:
            return []
        return [one for one in position.ids if one in self._held]

    async def _set_idle(self, commands: Connection, ids: AbstractSet[bytes], *age: bytes) -> None:
        """Set the age of what we hold, to none or to what is said.

        What was removed from the stream meanwhile keeps its age: to claim it would, since Redis 7,
        take it off the list of what is pending, and nobody would ever hear of it.
        """
        places = sorted(map(_order, ids))
        there: list[bytes] = []
        after = b"%d" % max(0, places[0][0] - 1) if places else b""
        while after and (found := await self._entries(commands, after)):
            there += [one.id for one in found if one.id in ids and one.fields is not None]
            after = found[-1].id if _order(found[-1].id) < places[-1] else b""
        if there:
            command = (b"XCLAIM", self._key, self._group, self._consumer, b"0", *there)
            await commands.ask(self._doing, *command, *age, b"JUSTID")

    def _batch(self, commands: Connection, *, was_cut_short: bool) -> Batch:
        taken: list[Entry] = []
        size = 0
        while self._buffer and len(taken) < self._batch_size and size < self._batch_bytes:
            taken.append(self._buffer.popleft())
            size += taken[-1].size
        is_read_due = self._pending_after is not None or self._is_claim_due()
        is_end = not (self._buffer or is_read_due or was_cut_short)
        if not taken:
            return Batch(is_end_of_backlog=is_end)
        stream, payload_field = self._options.stream_key, self._options.payload_field
        messages, rejected = sorted_out(
            decoded(one, stream, payload_field, self._generation) for one in taken
        )
        return Batch(
            messages=messages,
            rejected=rejected,
            position=_Position(commands, tuple(entry.id for entry in taken)),
            checkpoint=taken[-1].id.decode(),
            is_end_of_backlog=is_end and not self._is_backlog_left,
        )


def _order(id_: bytes) -> tuple[int, int]:
    """What ids are ordered by."""
    time_ms, _, number = id_.partition(b"-")
    return int(time_ms), int(number or 0)


def _group(groups: Reply, name: bytes) -> Mapping[Reply, Reply]:
    """What the server tells of one of a stream's groups; nothing where there is none."""
    for group in map(rows, rows(groups)):
        facts = dict(zip(group[::2], group[1::2], strict=True))
        if facts.get(b"name") == name:
            return facts
    return {}


def _generation(groups: Reply) -> str:
    """The generation in what the server tells of a stream's groups; empty where there is none."""
    position = _group(groups, _GENERATION).get(b"last-delivered-id")
    return f"{_order(position)[1]:08x}" if isinstance(position, bytes) else ""
