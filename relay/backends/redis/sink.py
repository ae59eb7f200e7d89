"""The Redis Streams sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from redis.exceptions import ResponseError

from relay.backends.redis.connection import Connection, Reply, connect, pack, rows
from relay.backends.redis.entry import fields_of
from relay.backends.redis.errors import of_reply
from relay.backends.redis.key import check_key, check_template, escape
from relay.backends.redis.options import RedisSinkOptions, endpoint_of
from relay.context import BackendContext
from relay.contracts import Failure, PublishResult
from relay.errors import (
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    MessageUndecodable,
    NotConnected,
    Outage,
    RelayError,
)
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import compile_routing
from relay.wire import FIELD, bodies_encoder, pairs_encoder

# What is sent in one go; a transaction holds up the other clients of the server.
_CHUNK_BYTES = 1024 * 1024
_CHUNK_MESSAGES = 1000
# The server's default for proto-max-bulk-len.
_LONGEST_VALUE = 512 * 1024 * 1024


class RedisSink:
    """Adds messages to streams, many in one go, and waits for every answer."""

    def __init__(self, options: RedisSinkOptions, context: BackendContext) -> None:
        namespace = context.dedup_namespace
        self._options = options
        self._render = compile_routing(
            options.stream_key, options.routing, escape=escape, check=check_key
        )
        self._encode_bodies = bodies_encoder(options.format, namespace=namespace)
        self._pairs_of = pairs_encoder(options.format, FIELD)
        trimming = () if options.maxlen is None else (b"MAXLEN", b"~", b"%d" % options.maxlen)
        self._before_fields = (*trimming, b"*")
        self._longest_value = _LONGEST_VALUE
        self._is_strict = context.ordering != "pipelined"
        self._name = f"pgtrickle-relay {context.pipeline}"
        self._connection: Connection | None = None
        # By dedup key, what this connection has added while too few replicas answered.
        self._unconfirmed: set[str] = set()

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, RedisSinkOptions, path="sink")
        endpoint_of(parsed, "sink")
        for template in (parsed.stream_key, *parsed.routing.values()):
            check_template(template)
        return cls(parsed, context)

    async def connect(self) -> None:
        """Open again, and learn the server's limit for one value where it says."""
        await self.aclose()
        self._connection = await connect(self._options, name=self._name, path="sink")
        limit = await _setting(self._connection, b"proto-max-bulk-len")
        self._longest_value = int(limit) if limit.isdecimal() else _LONGEST_VALUE
        self._unconfirmed.clear()

    async def describe(self) -> dict[str, str]:
        """The server, and what it does with an entry before it answers, as far as it says."""
        connection = self._open()
        described = {"server": connection.address}
        information = await connection.facts(b"INFO")
        if isinstance(information, bytes):
            lines = information.decode("utf-8", "replace").splitlines()
            facts = dict(line.split(":", 1) for line in lines if ":" in line)
            fsync = await _setting(connection, b"appendfsync") or "unknown"
            described["version"] = facts.get("redis_version", "unknown")
            described["replicas"] = facts.get("connected_slaves", "unknown")
            described["durability"] = (
                f"append-only file, fsync {fsync}"
                if facts.get("aof_enabled") == "1"
                else "no append-only file: a restart loses what came since the last snapshot"
            )
        return described

    def subject_of(self, message: RelayMessage) -> str:
        """The stream by template or routing. Raises `MessageRejected` for one that is none."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Add all; see the package for order and for what counts as accepted.

        A connection that is lost, or silent for ``timeout_ms``, fails what was in flight as
        unknown and what was not sent; it is not used again.
        """
        connection = self._open()
        failed: dict[int, RelayError] = {}
        adding: asyncio.Task[RelayError | None] | None = None
        try:
            for chunk in self._chunks(messages, failed):
                trouble = await adding if adding is not None else None
                if trouble is not None:
                    # Behind what may still be accepted later nothing of its key may go.
                    failed.update(dict.fromkeys(range(next(iter(chunk)), len(messages)), trouble))
                    break
                adding = asyncio.create_task(self._add(connection, chunk, messages, failed))
                # It is sent now, and the next is packed while the server is at this one.
                await asyncio.sleep(0)
            if adding is not None:
                await adding
        finally:
            if adding is not None:
                adding.cancel()
                await asyncio.gather(adding, return_exceptions=True)
        if self._options.wait_replicas:
            await self._confirm(connection, messages, failed)
        return PublishResult(failures=[Failure(one, failed[one]) for one in sorted(failed)])

    async def is_healthy(self) -> bool:
        """True when the server answers a ping within seconds."""
        return self._connection is not None and await self._connection.is_healthy()

    async def aclose(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    def _open(self) -> Connection:
        if self._connection is None:
            raise NotConnected("the redis sink is not connected")
        if self._connection.loss is not None:
            raise self._connection.loss
        return self._connection

    def _chunks(
        self, messages: Sequence[RelayMessage], failed: dict[int, RelayError]
    ) -> Iterator[Mapping[int, bytes]]:
        """What is sent in one go each, as commands by the index of their message, in order.

        What can't be sent is noted in ``failed``.
        """
        chunk: dict[int, bytes] = {}
        size = 0
        bodies = self._encode_bodies(messages)
        for index, (message, body) in enumerate(zip(messages, bodies, strict=True)):
            if message.dedup_key in self._unconfirmed:
                continue
            try:
                command = self._command(message, body)
            except MessageRejected as error:
                failed[index] = error
                continue
            size += len(command)
            if chunk and (len(chunk) == _CHUNK_MESSAGES or size > _CHUNK_BYTES):
                yield chunk
                chunk, size = {}, len(command)
            chunk[index] = command
        if chunk:
            yield chunk

    def _command(self, message: RelayMessage, body: bytes | MessageUndecodable) -> bytes:
        if not isinstance(body, bytes):
            raise body
        stream = check_key(message.subject)
        try:
            fields = fields_of(message, body, self._pairs_of)
            command = pack(b"XADD", stream, *self._before_fields, *fields)
        except UnicodeEncodeError:
            raise MessageUndecodable("a text of the message has no UTF-8 form") from None
        if len(command) > self._options.max_message_bytes:
            raise MessageTooLarge(
                f"the entry has {len(command)} bytes,"
                f" max_message_bytes is {self._options.max_message_bytes} bytes"
            )
        if len(command) > self._longest_value:
            longest = max(len(one if isinstance(one, bytes) else one.encode()) for one in fields)
            if longest > self._longest_value:
                raise MessageTooLarge(
                    f"a field has {longest} bytes, the server's proto-max-bulk-len is"
                    f" {self._longest_value} bytes"
                )
        return command

    async def _add(
        self,
        connection: Connection,
        chunk: Mapping[int, bytes],
        messages: Sequence[RelayMessage],
        failed: dict[int, RelayError],
    ) -> RelayError | None:
        """Send a chunk and note what is not accepted.

        Returns why nothing more is to be sent, None where it may go on.
        """
        keys = [key for index in chunk if (key := messages[index].key) is not None]
        is_transaction = self._is_strict and len(set(keys)) < len(keys)
        try:
            replies = await self._replies(connection, [*chunk.values()], is_transaction)
        except Outage as error:
            failed.update(dict.fromkeys(chunk, error))
            return error if self._is_strict or connection.loss is not None else None
        trouble: RelayError | None = None
        for index, reply in zip(chunk, replies, strict=True):
            if isinstance(reply, ResponseError):
                doing = f"adding to stream {messages[index].subject!r}"
                refused = of_reply(reply, doing, is_publish=True)
                failed[index] = refused
                if self._is_strict and refused.kind is not ErrorKind.MESSAGE:
                    trouble = trouble or refused
        return trouble

    async def _replies(
        self, connection: Connection, commands: Sequence[bytes], is_transaction: bool
    ) -> Sequence[Reply]:
        """The answer to each command. Raises `Outage`, and what kept a transaction from running."""
        doing = f"adding to a stream on {connection.address}"
        if not is_transaction:
            return await connection.ask_all(doing, commands)
        sent = [pack(b"MULTI"), *commands, pack(b"EXEC")]
        *queued, ended = await connection.ask_all(doing, sent)
        if not isinstance(ended, ResponseError):
            return rows(ended)
        refused = next((one for one in queued if isinstance(one, ResponseError)), ended)
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
        # The connection stands, and only on this one can be waited for what it has added.
        error = Outage(
            f"fewer than {wanted} replicas received the events within {wait_ms} ms",
            remedy="check the replicas, or lower wait_replicas",
        )
        command = (b"WAIT", b"%d" % wanted, b"%d" % wait_ms)
        doing = f"waiting for the replicas of {connection.address}"
        try:
            reached = await connection.ask(doing, *command, wait_s=wait_ms / 1000)
            if isinstance(reached, int) and reached >= wanted:
                self._unconfirmed.clear()
                return
            # They are in the stream: trying again must only wait, not add them again.
            self._unconfirmed.update(messages[index].dedup_key for index in added)
        except Outage as lost:
            error = lost
        failed.update(dict.fromkeys(added, error))


async def _setting(connection: Connection, name: bytes) -> str:
    """One setting of the server as text, empty where it does not say."""
    match await connection.facts(b"CONFIG", b"GET", name):
        case [_, bytes() as value]:
            return value.decode("utf-8", "replace")
    return ""
