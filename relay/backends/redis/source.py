"""The Redis Streams source: see the package for what it promises."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Self

import msgspec
from redis.exceptions import ResponseError

from relay.backends.redis.connection import Connection, Reply, connect, pack, rows
from relay.backends.redis.entry import Entry, decoded, entries
from relay.backends.redis.errors import of_reply
from relay.backends.redis.key import check_key
from relay.backends.redis.options import (
    MAX_BLOCK_MS,
    RedisSourceOptions,
    check_at_least_one,
    check_connection,
    check_start_id,
)
from relay.context import BackendContext
from relay.contracts import Batch, Rejected
from relay.errors import ConfigurationError, MessageRejected, NotConnected, RelayError
from relay.message import RelayMessage
from relay.options import parse_options

_SHORTEST_CLAIM_MS = 1000
_CLOSE_TIMEOUT_S = 2.0
_FROM_THE_START = b"0-0"
# A command with more ids than this keeps other clients of the server waiting.
_CHUNK_IDS = 1000
# Redis bounds a read by entries, not by bytes: how many to ask for is felt out.
_FIRST_COUNT = 64
_GROWTH = 4
# An age that every other consumer's claim_idle_ms is below: it may claim at once.
_LONG_IDLE_MS = b"86400000"


class _Position(msgspec.Struct, frozen=True):
    """Ids handed out together, and since which `connect`."""

    opening: int
    ids: tuple[bytes, ...]


class _Found(msgspec.Struct, frozen=True):
    """What one look brought. ``asked``: how many entries it was for."""

    entries: Sequence[Entry]
    asked: int


class RedisSource:
    """Reads a stream as a consumer of a group and acknowledges when told to.

    Reading what is new blocks, on a connection of its own; everything else goes over the other.
    At most one look at each is under way, as a task that outlives an interrupted poll and ends
    with `aclose` or `connect` at the latest: what it brings is handed out by the next poll.
    """

    def __init__(
        self,
        options: RedisSourceOptions,
        *,
        group: str,
        consumer: str,
        batch_size: int,
        batch_bytes: int,
        name: str,
    ) -> None:
        self._options = options
        self._stream = options.stream_key
        self._key = options.stream_key.encode()
        self._group = group.encode()
        self._consumer = consumer.encode()
        self._batch_size = batch_size
        self._batch_bytes = batch_bytes
        self._most = min(batch_size, options.count or batch_size)
        self._name = name
        self._commands: Connection | None = None
        self._blocking: Connection | None = None
        self._blocking_id: int | None = None
        self._reading: asyncio.Task[_Found] | None = None
        self._looking: asyncio.Task[_Found] | None = None
        self._opening = 0
        # Where to go on among what is pending for us; None when all of it was seen.
        self._pending_after: bytes | None = None
        self._claim_from = _FROM_THE_START
        self._claim_at = 0.0
        self._count = _FIRST_COUNT
        self._is_backlog_left = True
        self._buffer: deque[Entry] = deque()
        # Everything that is buffered or out.
        self._held: set[bytes] = set()
        self._wake = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, RedisSourceOptions, path="source")
        check_connection(parsed, "source")
        check_start_id(parsed.start_id)
        check_at_least_one("source", count=parsed.count)
        if not 1 <= parsed.block_ms <= MAX_BLOCK_MS:
            raise ConfigurationError(f"source.block_ms must be from 1 to {MAX_BLOCK_MS}")
        if parsed.claim_idle_ms < _SHORTEST_CLAIM_MS:
            raise ConfigurationError(f"source.claim_idle_ms must be at least {_SHORTEST_CLAIM_MS}")
        for name in ("group_name", "consumer_name", "payload_field"):
            if getattr(parsed, name) == "":
                raise ConfigurationError(f"source.{name} is empty")
        try:
            check_key(parsed.stream_key)
        except MessageRejected as error:
            raise ConfigurationError(f"source.stream_key: {error}") from None
        return cls(
            parsed,
            group=parsed.group_name or context.pipeline,
            consumer=parsed.consumer_name or context.pipeline,
            batch_size=context.batch_size,
            batch_bytes=context.batch_bytes,
            name=f"pgtrickle-relay {context.pipeline}",
        )

    @property
    def keep_alive_interval_s(self) -> float | None:
        """A third of the time after which another consumer might claim what we hold."""
        return self._options.claim_idle_ms / 3000

    async def connect(self) -> None:
        """Open anew; find or make the stream and the group; begin with what is pending for us.

        Raises `DestinationMissing` where the key holds something else than a stream.
        """
        await self._close()
        commands = await connect(self._options, name=self._name, path="source")
        try:
            blocking = await connect(self._options, name=self._name, path="source")
            try:
                await self._find_group(commands)
                number = await blocking.facts(b"CLIENT", b"ID")
            except BaseException:
                await blocking.aclose()
                raise
        except BaseException:
            await commands.aclose()
            raise
        self._opening += 1
        self._pending_after = _FROM_THE_START
        self._claim_from, self._claim_at = _FROM_THE_START, 0.0
        self._count = min(_FIRST_COUNT, self._most)
        self._is_backlog_left = True
        self._blocking_id = number if isinstance(number, int) else None
        self._commands, self._blocking = commands, blocking

    async def poll(self) -> Batch:
        """What is pending for us, then what can be claimed, then what is new; at most a batch.

        Waits up to ``block_ms`` for the first entry. The next entries are already asked for when
        it returns. Raises `PositionLost` where stream or group were deleted meanwhile.
        """
        deadline = time.monotonic() + self._options.block_ms / 1000
        while True:
            commands, blocking = self._open()
            self._take_found()
            left_s = deadline - time.monotonic()
            if self._buffer or self._is_interrupted or left_s <= 0:
                break
            if self._is_look_due():
                look = self._looking = self._looking or asyncio.create_task(self._look(commands))
            else:
                look = self._reading = self._reading or asyncio.create_task(self._read(blocking))
                left_s = min(left_s, max(0.0, self._claim_at - time.monotonic()))
            await self._first_of(look, left_s)
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        batch = self._batch(self._taken(), was_cut_short=was_cut_short)
        if not self._buffer and self._reading is None and not self._is_look_due():
            self._reading = asyncio.create_task(self._read(blocking))
        return batch

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        self._wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Take every entry of the batch off the group's list of what is pending."""
        commands, _ = self._open()
        if not self._is_current(batch):
            raise NotConnected("this batch was handed out before the source was opened anew")
        ids = self._ids(batch)
        await self._tell(commands, (b"XACK", self._key, self._group), ids, ())
        self._held.difference_update(ids)

    async def keep_alive(self, batch: Batch) -> None:
        """Show a sign of life for this batch and for what is waiting to be polled."""
        commands, _ = self._open()
        self._take_found()
        await self._claim(commands, [*self._ids(batch), *(one.id for one in self._buffer)])

    async def reject(self, batch: Batch) -> None:
        """Give back this batch and all that comes after it, so that the order stays.

        The next poll hands it out again; another consumer of the group may claim it at once. A
        later batch that is out is thereby given back too; to acknowledge or reject it does
        nothing more.
        """
        commands, _ = self._open()
        ids = self._ids(batch)
        if not ids:
            return
        await self._stop_reading(commands)
        first = min(map(_order, ids))
        given_back = sorted((one for one in self._held if _order(one) >= first), key=_order)
        self._buffer.clear()
        self._held.difference_update(given_back)
        self._pending_after = _FROM_THE_START
        await self._claim(commands, given_back, b"IDLE", _LONG_IDLE_MS)

    async def is_healthy(self) -> bool:
        """True when the server answers a ping within seconds."""
        connection = self._commands
        return connection is not None and await connection.is_healthy()

    async def aclose(self) -> None:
        """Give back everything that is not acknowledged, and close."""
        await self._close()

    async def _close(self) -> None:
        commands, self._commands = self._commands, None
        blocking, self._blocking = self._blocking, None
        try:
            if commands is not None and commands.loss is None:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._stop_reading(commands)
                    given_back = sorted(self._held, key=_order)
                    await self._claim(commands, given_back, b"IDLE", _LONG_IDLE_MS)
        except (RelayError, TimeoutError):
            # It is pending for us all the same, and comes first on the next connection.
            pass
        finally:
            self._buffer.clear()
            self._held.clear()
            await self._cancel_looks()
            for connection in (commands, blocking):
                if connection is not None:
                    await connection.aclose()

    async def _cancel_looks(self) -> None:
        looks = [one for one in (self._reading, self._looking) if one is not None]
        self._reading = self._looking = None
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)

    async def _stop_reading(self, commands: Connection) -> None:
        """End our looks; when it returns, nothing more is delivered to us.

        What they still brought is pending for us. A connection that is merely closed could be
        given an entry by a server that has not noticed yet.
        """
        reading = self._reading
        if reading is not None and not reading.done() and self._blocking_id is not None:
            await commands.facts(b"CLIENT", b"UNBLOCK", b"%d" % self._blocking_id)
        looks = [one for one in (reading, self._looking) if one is not None]
        if looks:
            await asyncio.wait(looks)
        await self._cancel_looks()

    def _open(self) -> tuple[Connection, Connection]:
        if self._commands is None or self._blocking is None:
            raise NotConnected("the redis source is not connected")
        for connection in (self._commands, self._blocking):
            if connection.loss is not None:
                raise connection.loss
        return self._commands, self._blocking

    async def _find_group(self, commands: Connection) -> None:
        doing = f"making the group {self._group.decode()!r} of the stream {self._stream!r}"
        command = pack(
            *(b"XGROUP", b"CREATE", self._key, self._group),
            *(self._options.start_id.encode(), b"MKSTREAM"),
        )
        (reply,) = await commands.ask_all(doing, command, 1)
        if isinstance(reply, ResponseError) and not str(reply).startswith("BUSYGROUP"):
            raise of_reply(reply, doing)

    def _is_look_due(self) -> bool:
        return self._pending_after is not None or time.monotonic() >= self._claim_at

    async def _first_of(self, look: asyncio.Task[_Found], left_s: float) -> None:
        """Return when the look has ended, the poll is interrupted or the time is over."""
        self._wake.clear()
        if self._is_interrupted:
            return
        waking = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({look, waking}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waking.cancel()
            await asyncio.gather(waking, return_exceptions=True)

    def _take_found(self) -> None:
        """Move what finished looks brought into the buffer. Raises what ended them."""
        looking, reading = self._looking, self._reading
        if looking is not None and looking.done():
            self._looking = None
            self._keep(looking.result())
        if reading is not None and reading.done() and not self._buffer:
            self._reading = None
            found = reading.result()
            self._is_backlog_left = len(found.entries) >= found.asked
            self._keep(found)

    def _keep(self, found: _Found) -> None:
        self._feel_out(found)
        for entry in found.entries:
            if entry.id not in self._held:
                self._held.add(entry.id)
                self._buffer.append(entry)

    def _feel_out(self, found: _Found) -> None:
        """Ask for fewer when entries are large, for more when they are small."""
        if not found.entries:
            return
        each = max(1, sum(entry.size for entry in found.entries) // len(found.entries))
        fitting = max(1, self._batch_bytes // each)
        self._count = min(self._most, fitting, _GROWTH * len(found.entries) + _FIRST_COUNT)

    async def _look(self, commands: Connection) -> _Found:
        """One page of what is pending for us, or else of what can be claimed."""
        if self._pending_after is not None:
            return await self._look_at_pending(commands, self._pending_after)
        return await self._look_for_claims(commands)

    async def _look_at_pending(self, commands: Connection, after: bytes) -> _Found:
        asked = self._count
        reply = await commands.ask(
            f"reading what is pending in {self._stream!r}", *self._read_command(asked, after)
        )
        found = list(entries(_of_stream(reply)))
        self._pending_after = found[-1].id if found else None
        return _Found(found, asked)

    async def _look_for_claims(self, commands: Connection) -> _Found:
        asked = self._count
        reply = rows(
            await commands.ask(
                f"claiming entries of {self._stream!r}",
                *(b"XAUTOCLAIM", self._key, self._group, self._consumer),
                *(b"%d" % self._options.claim_idle_ms, self._claim_from),
                *(b"COUNT", b"%d" % asked),
            )
        )
        next_, claimed, *removed = reply
        self._claim_from = next_ if isinstance(next_, bytes) else _FROM_THE_START
        if self._claim_from == _FROM_THE_START:
            self._claim_at = time.monotonic() + self._options.claim_idle_ms / 2000
        if None in rows(claimed):
            # Before Redis 7 a removed entry is claimed without saying which: it is pending now.
            self._pending_after = _FROM_THE_START
        # Redis 7 names the removed ones, and has already taken them off its list.
        gone = [
            Entry(id_, None)
            for id_ in rows(removed[0] if removed else None)
            if isinstance(id_, bytes)
        ]
        return _Found([*gone, *entries(rows(claimed))], asked)

    async def _read(self, blocking: Connection) -> _Found:
        asked = self._count
        block_ms = self._options.block_ms
        reply = await blocking.ask(
            f"reading {self._stream!r}",
            *self._read_command(asked, b">", b"BLOCK", b"%d" % block_ms),
            wait_s=block_ms / 1000,
        )
        return _Found(list(entries(_of_stream(reply))), asked)

    def _read_command(self, count: int, after: bytes, *how: bytes) -> Sequence[bytes]:
        return (
            *(b"XREADGROUP", b"GROUP", self._group, self._consumer),
            *(b"COUNT", b"%d" % count, *how, b"STREAMS", self._key, after),
        )

    def _is_current(self, batch: Batch) -> bool:
        position = batch.position
        return not isinstance(position, _Position) or position.opening == self._opening

    def _ids(self, batch: Batch) -> list[bytes]:
        """What of a batch is still ours to answer for."""
        position = batch.position
        if not isinstance(position, _Position) or position.opening != self._opening:
            return []
        return [one for one in position.ids if one in self._held]

    async def _claim(self, commands: Connection, ids: Sequence[bytes], *age: bytes) -> None:
        """Set the age of what we hold, to none or to what is said.

        What was removed from the stream meanwhile keeps its age: to claim it would, since Redis 7,
        take it off the list of what is pending, and nobody would ever hear of it.
        """
        removed = await self._removed(commands, ids)
        start = (b"XCLAIM", self._key, self._group, self._consumer, b"0")
        there = [one for one in ids if one not in removed]
        await self._tell(commands, start, there, (*age, b"JUSTID"))

    async def _removed(self, commands: Connection, ids: Sequence[bytes]) -> AbstractSet[bytes]:
        """What in the range of these is pending for us, but in the stream no more."""
        removed: set[bytes] = set()
        if not ids:
            return removed
        places = [_order(one) for one in ids]
        last = max(places)
        after = b"%d" % max(0, min(places)[0] - 1)
        while True:
            reply = await commands.ask(
                f"looking at what is pending in {self._stream!r}",
                *self._read_command(self._count, after),
            )
            found = list(entries(_of_stream(reply)))
            removed.update(entry.id for entry in found if entry.fields is None)
            if not found or _order(found[-1].id) >= last:
                return removed
            after = found[-1].id

    async def _tell(
        self,
        commands: Connection,
        before: Iterable[bytes],
        ids: Sequence[bytes],
        after: Iterable[bytes],
    ) -> None:
        """Give one command for many ids, in chunks. Raises `Outage`, and what is answered."""
        chunks = [ids[at : at + _CHUNK_IDS] for at in range(0, len(ids), _CHUNK_IDS)]
        packed = b"".join(pack(*before, *chunk, *after) for chunk in chunks)
        doing = f"settling entries of {self._stream!r}"
        for reply in await commands.ask_all(doing, packed, len(chunks)) if chunks else ():
            if isinstance(reply, ResponseError):
                raise of_reply(reply, doing)

    def _taken(self) -> list[Entry]:
        taken: list[Entry] = []
        size = 0
        while self._buffer and len(taken) < self._batch_size and size < self._batch_bytes:
            entry = self._buffer.popleft()
            size += entry.size
            taken.append(entry)
        return taken

    def _batch(self, taken: Sequence[Entry], *, was_cut_short: bool) -> Batch:
        is_end = not (self._buffer or self._is_look_due() or was_cut_short)
        if not taken:
            return Batch(is_end_of_backlog=is_end)
        messages: list[RelayMessage] = []
        rejected: list[Rejected] = []
        for entry in taken:
            one = decoded(entry, self._stream, self._options.payload_field)
            if isinstance(one, Rejected):
                rejected.append(one)
            else:
                messages.append(one)
        return Batch(
            messages=messages,
            rejected=rejected,
            position=_Position(self._opening, tuple(entry.id for entry in taken)),
            checkpoint=taken[-1].id.decode(),
            is_end_of_backlog=is_end and not self._is_backlog_left,
        )


def _of_stream(reply: Reply) -> Sequence[Reply]:
    """The entries in the answer to a read of one stream; none where the answer is nil."""
    for _, found in islice(map(rows, rows(reply)), 1):
        return rows(found)
    return ()


def _order(id_: bytes) -> tuple[int, int]:
    """What ids are ordered by."""
    time_ms, _, number = id_.partition(b"-")
    return int(time_ms), int(number or 0)
