"""The Redis Streams sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Self

from redis.exceptions import ResponseError

from relay.backends.redis.connection import Connection, Reply, connect, pack, rows
from relay.backends.redis.errors import of_reply
from relay.backends.redis.key import check_key, check_template, escape
from relay.backends.redis.options import (
    RedisSinkOptions,
    check_at_least_one,
    check_connection,
)
from relay.backends.redis.packing import Chunk, Commands, Packing
from relay.context import BackendContext
from relay.contracts import Failure, PublishResult
from relay.errors import (
    ConfigurationError,
    ErrorKind,
    NotConnected,
    Outage,
    RelayError,
)
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import Render, compile_routing

ORDERINGS = ("strict", "pipelined")

# While the server is at one, the next is on its way to it.
_CHUNKS_UNDER_WAY = 2

_BEGIN = pack(b"MULTI")
_END = pack(b"EXEC")


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
        self._commands = Commands(options, render=render, namespace=namespace)
        self._is_strict = ordering == "strict"
        self._name = name
        self._connection: Connection | None = None
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
            render=compile_routing(
                parsed.stream_key, parsed.routing, escape=escape, check=check_key
            ),
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
        self._commands.limit_values(int(limit) if limit.isdecimal() else None)
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
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Add all; see the package for order and for what counts as accepted.

        A connection that is lost, or silent for ``timeout_ms``, fails what was under way as
        unknown and what was not sent; it is not used again.
        """
        connection = self._open()
        failed: dict[int, RelayError] = {}
        packing = Packing(messages, self._commands, skipped=self._unconfirmed, failed=failed)
        under_way: deque[tuple[Chunk, asyncio.Task[None]]] = deque()
        sent_to = 0
        chunk = packing.next_chunk()
        try:
            while chunk.indexes or under_way:
                if chunk.indexes and self._may_go(chunk, [one for one, _ in under_way]):
                    adding = asyncio.create_task(self._add(connection, chunk, messages, failed))
                    under_way.append((chunk, adding))
                    sent_to = chunk.end
                    # The next is packed while the server is at this one.
                    await asyncio.sleep(0)
                    chunk = packing.next_chunk()
                    continue
                first, adding = under_way[0]
                await adding
                under_way.popleft()
                # Behind what may still be accepted later nothing of its key may go.
                trouble = self._trouble(connection, first, failed)
                if trouble is not None:
                    failed.update(dict.fromkeys(range(sent_to, len(messages)), trouble))
                    chunk = Chunk()
        finally:
            for _, adding in under_way:
                adding.cancel()
            await asyncio.gather(*(adding for _, adding in under_way), return_exceptions=True)
        if self._options.wait_replicas:
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

    def _may_go(self, chunk: Chunk, under_way: Sequence[Chunk]) -> bool:
        """True where there is room, and nothing under way could be overtaken by one of its key."""
        if len(under_way) == _CHUNKS_UNDER_WAY:
            return False
        return not self._is_strict or all(chunk.keys.isdisjoint(one.keys) for one in under_way)

    def _trouble(
        self, connection: Connection, chunk: Chunk, failed: Mapping[int, RelayError]
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

    async def _add(
        self,
        connection: Connection,
        chunk: Chunk,
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

    async def _replies(self, connection: Connection, chunk: Chunk) -> Sequence[Reply]:
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
        """Wait for the replicas; what they have not received yet is not accepted yet.

        That is so, too, where the connection is gone and nobody can be asked any more.
        """
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
            # The connection stands, and only on this one can be waited for what it has added.
            error = Outage(
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
