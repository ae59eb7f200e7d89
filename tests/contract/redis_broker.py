"""What the tests of the Redis sink and source share: streams of their own, and looks at them."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import ssl
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import redis.exceptions
from redis.asyncio import Redis
from redis.typing import EncodableT, FieldT

from relay import wire
from relay.backends.redis import RedisSink, RedisSource
from relay.backends.redis.connection import connect, pack, rows
from relay.backends.redis.entry import Entry, decoded, entries, fields_of
from relay.backends.redis.errors import mapped
from relay.backends.redis.options import RedisSinkOptions
from relay.contracts import Rejected
from relay.message import RelayMessage
from tests.contract.evidence import BOUND_S, PAUSE_S
from tests.contract.surroundings import backend_context
from tests.servers.proxy import TcpProxy
from tests.servers.redis import RedisServer


def sink_of(
    url: str,
    stream: str,
    *,
    ordering: str | None = None,
    namespace: str = "",
    **keys: object,
) -> RedisSink:
    """A sink with these keys, not connected."""
    return RedisSink.from_options(
        {"type": "redis", "url": url, "stream_key": stream, **keys},
        backend_context(ordering=ordering, dedup_namespace=namespace),
    )


def source_of(
    url: str,
    stream: str,
    *,
    batch_size: int = 100,
    batch_bytes: int = 1024 * 1024,
    pipeline: str = "pipeline",
    **keys: object,
) -> RedisSource:
    """A source with these keys, not connected."""
    return RedisSource.from_options(
        {"type": "redis", "url": url, "stream_key": stream, **keys},
        backend_context(
            direction="reverse", batch_size=batch_size, batch_bytes=batch_bytes, pipeline=pipeline
        ),
    )


class Broker:
    """One stream, looked at over a connection of its own."""

    def __init__(self, server: RedisServer, stream: str) -> None:
        self.server = server
        self.stream = stream

    async def ask(self, *command: str | bytes | int) -> object:
        """The answer to any command. Raises what the client library raises."""
        async with Redis.from_url(self.server.url) as client:
            answer: object = await client.execute_command(*command)  # type: ignore[no-untyped-call]  # untyped in the library
        return answer

    async def drop(self, *others: str) -> None:
        """Remove the stream, and others."""
        await self.ask("DEL", self.stream, *others)

    async def put(self, fields: Mapping[str, str | bytes]) -> bytes:
        """Add one entry as somebody else would; its id."""
        pairs = [part for pair in fields.items() for part in pair]
        added = await self.ask("XADD", self.stream, "*", *pairs)
        assert isinstance(added, bytes)
        return added

    async def put_all(self, entries: Iterable[Mapping[str, str | bytes]]) -> None:
        """Add entries in order as somebody else would, many at a time."""
        async with Redis.from_url(self.server.url) as client:
            left = iter(entries)
            while part := list(itertools.islice(left, 1000)):
                async with client.pipeline(transaction=False) as pipeline:
                    for fields in part:
                        entry: dict[FieldT, EncodableT] = dict(fields.items())
                        pipeline.xadd(self.stream, entry)
                    await pipeline.execute()

    async def feed(self, messages: Sequence[RelayMessage], format_: str = "envelope") -> None:
        """Add messages of ours, in order, to this stream whatever their subject."""
        body_of = wire.body_encoder(format_)
        pairs_of = wire.pairs_encoder(format_, wire.FIELD)
        packed = [
            pack(b"XADD", self.stream, b"*", *fields_of(one, body_of(one), pairs_of))
            for one in messages
        ]
        options = RedisSinkOptions(type="redis", url=self.server.url)
        connection = await connect(options, name="the other side", path="sink")
        try:
            replies = await connection.ask_all("feeding", packed)
            assert all(isinstance(reply, bytes) for reply in replies)
        finally:
            await connection.aclose()

    async def entries(self, stream: str | None = None) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """All entries in order: id and fields."""
        options = RedisSinkOptions(type="redis", url=self.server.url)
        connection = await connect(options, name="the other side", path="sink")
        try:
            name = (stream or self.stream).encode()
            reply = await connection.ask("looking", b"XRANGE", name, b"-", b"+")
        finally:
            await connection.aclose()
        return [
            (entry.id, dict(zip(entry.fields[::2], entry.fields[1::2], strict=True)))
            for entry in entries(rows(reply))
            if entry.fields is not None
        ]

    async def restored(self, stream: str | None = None) -> Sequence[RelayMessage]:
        """All entries as a consumer of ours gets them; broken ones by what their fields say."""
        name = stream or self.stream
        messages = []
        for id_, fields in await self.entries(name):
            pairs = [part for pair in fields.items() for part in pair]
            one = decoded(Entry(id_, pairs), name, "payload")
            messages.append(one.message if isinstance(one, Rejected) else one)
        return messages

    async def pending(self, group: str = "pipeline") -> int:
        """How many entries are handed out and not acknowledged."""
        summary = await self.ask("XPENDING", self.stream, group)
        assert isinstance(summary, dict | list)
        found = summary["pending"] if isinstance(summary, dict) else summary[0]
        assert isinstance(found, int)
        return found

    async def cut_off(self) -> None:
        """End every connection, as the server sees it when a process is killed."""
        await self.ask("CLIENT", "KILL", "TYPE", "normal")

    async def generation(self) -> str:
        """What tells this stream from others that had its name, as it stands in dedup keys."""
        async with Redis.from_url(self.server.url) as client:
            groups = await client.xinfo_groups(self.stream)
        positions = {group["name"]: group["last-delivered-id"] for group in groups}
        return f"{int(positions[b'pgtrickle:generation'].partition(b'-')[2]):08x}"

    async def until_somebody_waits(self) -> None:
        """Wait until a client waits for an entry."""
        async with asyncio.timeout(BOUND_S):
            while True:
                if "'blocked_clients': 0" not in str(await self.ask("INFO", "clients")):
                    return
                await asyncio.sleep(PAUSE_S)


class RedisHarness:
    """What both harnesses can do to a Redis server, which is reached through a proxy."""

    def __init__(self, broker: Broker, proxy: TcpProxy) -> None:
        self.broker = broker
        self.proxy = proxy

    @property
    def url(self) -> str:
        """The address that leads through the proxy."""
        return self.proxy.url(self.broker.server.url)

    async def cut(self) -> None:
        await self.proxy.cut()

    async def stall(self) -> None:
        self.proxy.stall()

    async def restore(self) -> None:
        await self.proxy.restore()

    async def restart(self) -> None:
        await asyncio.to_thread(self.broker.server.restart)

    def mapping(self) -> AbstractContextManager[object]:
        return mapped("testing")

    def exceptions(self) -> Iterable[BaseException]:
        yield from driver_exceptions()


def driver_exceptions() -> Iterable[Exception]:
    """One instance of every exception class of the client library, TLS and the network."""
    for _, member in inspect.getmembers(redis.exceptions, inspect.isclass):
        if issubclass(member, Exception):
            yield _instance(member)
    yield from (TimeoutError(), ConnectionResetError(), OSError("no route"), EOFError())
    yield from (ssl.SSLError(1, "broken"), ssl.SSLCertVerificationError(1, "unknown"))


def _instance(kind: type[Exception]) -> Exception:
    # Answers that redirect say where to.
    for arguments in ((), ("something",), ("3999 127.0.0.1:6381",)):
        try:
            return kind(*arguments)
        except (TypeError, ValueError, IndexError):
            continue
    raise AssertionError(f"{kind} can't be made")


def user_lines(name: str, password: str, rules: str) -> str:
    """Configuration that lets in this user alone."""
    return f"user default off\nuser {name} on >{password} {rules}"
