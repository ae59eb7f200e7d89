"""The Redis Streams sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Self

import msgspec
from redis.exceptions import ResponseError

from relay.backends.redis.connection import Connection, Reply, connect, pack, pack_one, rows
from relay.backends.redis.entry import Frame, Limits, frame_of, packed_fields
from relay.backends.redis.errors import of_reply
from relay.backends.redis.key import check_key, check_template, escape
from relay.backends.redis.options import (
    RedisSinkOptions,
    check_at_least_one,
    check_connection,
)
from relay.context import BackendContext
from relay.contracts import Failure, PublishResult
from relay.errors import (
    ConfigurationError,
    ErrorKind,
    MessageRejected,
    MessageUndecodable,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import Render, compile_routing
from relay.wire import FIELD, bodies_encoder, encoder

ORDERINGS = ("strict", "pipelined")

# The server's default for proto-max-bulk-len.
_LONGEST_VALUE = 512 * 1024 * 1024
# What is under way at a time; a transaction holds up the other clients of the server.
_CHUNK_BYTES = 1024 * 1024
_CHUNK_MESSAGES = 1000
# While the server is at one, the next is on its way to it.
_CHUNKS_UNDER_WAY = 2
_BODIES_AT_ONCE = 250
_KNOWN_HEADS = 1024

_BEGIN = pack(b"MULTI")
_END = pack(b"EXEC")


class _Chunk(msgspec.Struct):
    """What is sent in one go: which messages, the parts of their commands, and their entities."""

    indexes: list[int] = msgspec.field(default_factory=list)
    parts: list[bytes] = msgspec.field(default_factory=list)
    size: int = 0
    keys: set[str] = msgspec.field(default_factory=set)
    repeats_key: bool = False

    def add(self, index: int, message: RelayMessage, parts: Sequence[bytes], size: int) -> None:
        """One more command, behind the others."""
        self.indexes.append(index)
        self.parts += parts
        self.size += size
        if (key := message.key) is not None:
            self.repeats_key = self.repeats_key or key in self.keys
            self.keys.add(key)


class RedisSink:
    """Adds messages to streams, many in one go, and waits for every answer."""

    def __init__(
        self,
        options: RedisSinkOptions,
        *,
        render: Render,
        namespace: str,
        ordering: str,
        name: str,
    ) -> None:
        self._options = options
        self._render = render
        self._namespace = namespace
        self._bodies = bodies_encoder(options.format, namespace=namespace)
        self._encode = encoder(options.format, FIELD, namespace=namespace)
        self._is_strict = ordering == "strict"
        self._name = name
        self._connection: Connection | None = None
        self._limits = Limits(options.max_message_bytes, _LONGEST_VALUE)
        trimming = [] if options.maxlen is None else [b"MAXLEN", b"~", b"%d" % options.maxlen]
        self._before_fields = b"".join(map(pack_one, [*trimming, b"*"]))
        self._fixed_arguments = 3 + len(trimming)
        # By op and full-refresh mark; None where messages are packed one at a time.
        self._frames: dict[tuple[str, bool], Frame | None] = {}
        # By subject and number of arguments, for some subjects.
        self._heads: dict[tuple[str, int], bytes] = {}
        # By dedup key, what this connection has added while too few replicas answered.
        self._unconfirmed: set[str] = set()

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, RedisSinkOptions, path="sink")
        check_connection(parsed, "sink")
        check_at_least_one("sink", maxlen=parsed.maxlen, max_message_bytes=parsed.max_message_bytes)
        if parsed.wait_replicas < 0:
            raise ConfigurationError("sink.wait_replicas must not be negative")
        for template in (parsed.stream_key, *parsed.routing.values()):
            check_template(template)
        ordering = context.ordering or "strict"
        if ordering not in ORDERINGS:
            raise ConfigurationError(
                f"ordering {ordering!r} is unknown to the redis sink",
                remedy=f"use one of {', '.join(ORDERINGS)}",
            )
        return cls(
            parsed,
            render=compile_routing(parsed.stream_key, parsed.routing, escape=escape),
            namespace=context.dedup_namespace,
            ordering=ordering,
            name=f"pgtrickle-relay {context.pipeline}",
        )

    async def connect(self) -> None:
        """Open anew, and learn the server's limit for one value where it tells."""
        await self.aclose()
        connection = await connect(self._options, name=self._name, path="sink")
        try:
            limit = await _setting(connection, b"proto-max-bulk-len")
        except BaseException:
            await connection.aclose()
            raise
        value_bytes = int(limit) if limit.isdecimal() else _LONGEST_VALUE
        self._limits = Limits(self._options.max_message_bytes, value_bytes)
        self._unconfirmed.clear()
        self._connection = connection

    async def describe(self) -> dict[str, str]:
        """The server, and what it does with an entry before it answers, as far as it tells."""
        connection = self._open()
        described = {"server": connection.address}
        information = await connection.facts(b"INFO")
        if isinstance(information, bytes):
            lines = information.decode("utf-8", "replace").splitlines()
            facts = dict(line.split(":", 1) for line in lines if ":" in line)
            described["version"] = facts.get("redis_version", "unknown")
            described["replicas"] = facts.get("connected_slaves", "unknown")
            described["durability"] = (
                f"append-only file, fsync {await _setting(connection, b'appendfsync') or 'unknown'}"
                if facts.get("aof_enabled") == "1"
                else "no append-only file: a restart loses what came since the last snapshot"
            )
        return described

    def subject_of(self, message: RelayMessage) -> str:
        """The stream by template or routing. Raises `MessageRejected` for one that is none."""
        return check_key(self._render(message))

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Add all; see the package for order and for what counts as accepted.

        A connection that is lost, or silent for ``timeout_ms``, fails what was under way as
        unknown and what was not sent; it is not used again.
        """
        connection = self._open()
        failed: dict[int, RelayError] = {}
        bodies: list[bytes | MessageUndecodable] = []
        under_way: deque[tuple[_Chunk, asyncio.Task[None]]] = deque()
        sent_to = 0
        chunk, packed_to = self._next_chunk(messages, bodies, 0, failed)
        try:
            while chunk.indexes or under_way:
                if chunk.indexes and self._may_go(chunk, [one for one, _ in under_way]):
                    adding = asyncio.create_task(self._add(connection, chunk, messages, failed))
                    under_way.append((chunk, adding))
                    sent_to = packed_to
                    # The next is packed while the server is at this one.
                    await asyncio.sleep(0)
                    chunk, packed_to = self._next_chunk(messages, bodies, sent_to, failed)
                    continue
                first, adding = under_way[0]
                await adding
                under_way.popleft()
                # Behind what may still be accepted later nothing of its key may go.
                trouble = self._trouble(connection, first, failed)
                if trouble is not None:
                    failed.update(dict.fromkeys(range(sent_to, len(messages)), trouble))
                    chunk = _Chunk()
        finally:
            for _, adding in under_way:
                adding.cancel()
            await asyncio.gather(*(adding for _, adding in under_way), return_exceptions=True)
        if self._options.wait_replicas and connection.loss is None:
            await self._confirm(connection, messages, failed)
        return PublishResult(failures=[Failure(one, failed[one]) for one in sorted(failed)])

    async def is_healthy(self) -> bool:
        """True when the server answers a ping within seconds."""
        connection = self._connection
        return connection is not None and await connection.is_healthy()

    async def aclose(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    def _may_go(self, chunk: _Chunk, under_way: Sequence[_Chunk]) -> bool:
        """True where there is room, and nothing under way could be overtaken by one of its key."""
        if len(under_way) == _CHUNKS_UNDER_WAY:
            return False
        return not self._is_strict or all(chunk.keys.isdisjoint(one.keys) for one in under_way)

    def _trouble(
        self, connection: Connection, chunk: _Chunk, failed: Mapping[int, RelayError]
    ) -> RelayError | None:
        """Why nothing more is to be sent after this chunk; None where nothing speaks against it."""
        if not self._is_strict and connection.loss is None:
            return None
        return next((failed[one] for one in chunk.indexes if _is_passing(failed, one)), None)

    def _open(self) -> Connection:
        if self._connection is None:
            raise NotConnected("the redis sink is not connected")
        if self._connection.loss is not None:
            raise self._connection.loss
        return self._connection

    def _next_chunk(
        self,
        messages: Sequence[RelayMessage],
        bodies: list[bytes | MessageUndecodable],
        start: int,
        failed: dict[int, RelayError],
    ) -> tuple[_Chunk, int]:
        """The next commands to send, and where to go on; what can't be sent fails at once.

        ``bodies`` are those made so far; more are added.
        """
        chunk = _Chunk()
        unconfirmed = self._unconfirmed
        while start < len(messages) and len(chunk.indexes) < _CHUNK_MESSAGES:
            if unconfirmed and messages[start].dedup_key in unconfirmed:
                start += 1
                continue
            if start >= len(bodies):
                made = len(bodies)
                bodies += self._bodies(messages[made : made + _BODIES_AT_ONCE])
                continue
            try:
                size, parts = self._command(messages[start], bodies[start])
            except MessageRejected as error:
                failed[start] = error
                start += 1
                continue
            if chunk.size and chunk.size + size > _CHUNK_BYTES:
                break
            chunk.add(start, messages[start], parts, size)
            start += 1
        return chunk, start

    def _command(
        self, message: RelayMessage, body: bytes | MessageUndecodable
    ) -> tuple[int, Sequence[bytes]]:
        """Bytes, or a few more, and parts of the command. Raises `MessageRejected`."""
        if not isinstance(body, bytes):
            raise body
        frame = None if message.headers else self._frame(message)
        if frame is not None:
            key = message.dedup_key.encode("utf-8", "surrogatepass")
            size = frame.size + len(body) + len(key)
            # Which limit it is that was passed, if any, says the long way.
            if size <= self._limits.message_bytes and size <= self._limits.value_bytes:
                head = self._head(message, frame.arguments)
                return len(head) + size, (head, *frame.around(body, key))
        count, fields = packed_fields(message, self._encode, self._limits)
        command = self._head(message, count) + fields
        return len(command), (command,)

    def _frame(self, message: RelayMessage) -> Frame | None:
        """What this message, which has no headers, has in common with others."""
        kind = (message.op, message.is_full_refresh)
        if kind not in self._frames:
            self._frames[kind] = frame_of(message, self._options.format, self._namespace)
        return self._frames[kind]

    def _head(self, message: RelayMessage, arguments: int) -> bytes:
        """What stands in front of the fields."""
        head = self._heads.get((message.subject, arguments))
        if head is None:
            key = check_key(message.subject or self._render(message))
            head = b"*%d\r\n$4\r\nXADD\r\n%b%b" % (
                self._fixed_arguments + arguments,
                pack_one(key.encode()),
                self._before_fields,
            )
            if message.subject and len(self._heads) < _KNOWN_HEADS:
                self._heads[message.subject, arguments] = head
        return head

    async def _add(
        self,
        connection: Connection,
        chunk: _Chunk,
        messages: Sequence[RelayMessage],
        failed: dict[int, RelayError],
    ) -> None:
        """Send a chunk and note what the server refuses, or that nothing is known of it."""
        try:
            replies = await self._replies(connection, chunk)
        except Outage as error:
            failed.update(dict.fromkeys(chunk.indexes, error))
            return
        for index, reply in zip(chunk.indexes, replies, strict=True):
            if isinstance(reply, ResponseError):
                stream = messages[index].subject or self._render(messages[index])
                failed[index] = of_reply(reply, f"adding to stream {stream!r}", is_publish=True)

    async def _replies(self, connection: Connection, chunk: _Chunk) -> Sequence[Reply]:
        """The answer to each command. Raises `Outage`, and what kept a transaction from running."""
        doing = f"adding to a stream on {connection.address}"
        commands = len(chunk.indexes)
        if not self._is_strict or not chunk.repeats_key:
            return await connection.ask_all(doing, b"".join(chunk.parts), commands)
        packed = b"".join((_BEGIN, *chunk.parts, _END))
        begun, *queued, ended = await connection.ask_all(doing, packed, commands + 2)
        if not isinstance(ended, ResponseError):
            return rows(ended)
        refused = next((one for one in (begun, *queued) if isinstance(one, ResponseError)), ended)
        raise of_reply(refused, doing)

    async def _confirm(
        self,
        connection: Connection,
        messages: Sequence[RelayMessage],
        failed: dict[int, RelayError],
    ) -> None:
        """Wait for the replicas; what they have not received yet is not accepted yet."""
        added = [index for index in range(len(messages)) if index not in failed]
        if not added:
            return
        wanted, wait_ms = self._options.wait_replicas, self._options.timeout_ms
        doing = f"waiting for the replicas of {connection.address}"
        error: RelayError
        try:
            reached = await connection.ask(
                doing, b"WAIT", b"%d" % wanted, b"%d" % wait_ms, wait_s=wait_ms / 1000
            )
            if isinstance(reached, int) and reached >= wanted:
                self._unconfirmed.clear()
                return
            error = TimedOut(
                f"fewer than {wanted} replicas received the events within {wait_ms} ms",
                remedy="check the replicas, or lower wait_replicas",
            )
            # They are in the stream: trying again must only wait, not add them again.
            self._unconfirmed.update(messages[index].dedup_key for index in added)
        except Outage as lost:
            error = lost
        failed.update(dict.fromkeys(added, error))


async def _setting(connection: Connection, name: bytes) -> str:
    """One setting of the server as text, empty where it does not tell."""
    match await connection.facts(b"CONFIG", b"GET", name):
        case [_, bytes() as value]:
            return value.decode("utf-8", "replace")
    return ""


def _is_passing(failed: Mapping[int, RelayError], index: int) -> bool:
    error = failed.get(index)
    return error is not None and error.kind is not ErrorKind.MESSAGE
