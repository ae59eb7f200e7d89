"""The real relay, its database and its brokers: what the tests of the process share.

Every relay logs in as a role that is a member of `pgtrickle_relay` and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar
from urllib.parse import urlsplit

import asyncpg
import httpx
import msgspec
import nats
import psycopg
from nats.aio.client import Client
from nats.js.api import StreamConfig
from psycopg import sql

from tests.servers.nats import NatsServer
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess

BOUND_S = 30.0
MEMBER = "relay_member"

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
StartProcess = Callable[..., Awaitable[RelayProcess]]
T = TypeVar("T")


class Event(msgspec.Struct, frozen=True):
    """One envelope, as a file or a stream holds it."""

    dedup_key: str
    op: str
    subject: str
    payload: Mapping[str, object]
    key: str | None = None

    @property
    def id(self) -> object:
        """The column `id` of the row."""
        return self.payload["id"]


class PipelineHealth(msgspec.Struct, frozen=True):
    """What `/health` says of one pipeline."""

    state: str
    healthy: bool
    reason: str


class Health(msgspec.Struct, frozen=True):
    """What `/health` says."""

    status: str
    reason: str
    pipelines: Mapping[str, PipelineHealth]


@dataclass
class RelayWorld:
    """One database, its owner's connection, and relays that log in as a mere member."""

    database: Database
    owner: Connection
    directory: Path
    start_process: StartProcess
    started: list[RelayProcess] = field(default_factory=list)

    @property
    def member_dsn(self) -> str:
        """The database as the relay logs in."""
        return self.database.server.database_dsn(self.database.name, user=MEMBER)

    async def relay(
        self,
        *arguments: str,
        dsn: str | None = None,
        environment: Mapping[str, str] | None = None,
        is_awaited: bool = True,
    ) -> RelayProcess:
        """A relay under the overlay for tests, ready unless it is not to be awaited."""
        verb = [arguments[0]] if arguments and arguments[0].isalpha() else []
        process = await self.start_process(
            *verb,
            "+env=test",
            *arguments[len(verb) :],
            dsn=dsn or self.member_dsn,
            environment=environment,
            directory=self.directory,
        )
        self.started.append(process)
        if is_awaited:
            await process.wait_until_ready()
        return process

    async def run(self, query: str, *args: object) -> None:
        """Run one statement, or several without arguments, as the owner."""
        await self.owner.execute(query, *args)

    async def value(self, query: str, *args: object) -> object:
        """The one value that a query of the owner gives."""
        found: object = await self.owner.fetchval(query, *args)
        return found

    async def reconnect(self) -> None:
        """A new connection for the owner, after the server was away."""
        self.owner.terminate()
        self.owner = await asyncpg.connect(self.database.dsn)

    async def make_orders(self, table: str = "orders") -> None:
        """A table with an outbox."""
        await self.run(
            f"create table public.{table}"
            " (id int primary key, version int not null default 0, note text)"
        )
        await self.run(f"select pgtrickle.enable_outbox('{table}')")

    async def insert(self, first: int, last: int, table: str = "orders") -> None:
        """Rows with the ids from first to last, a transaction each."""
        for id_ in range(first, last + 1):
            await self.run(f"insert into {table} (id) values ($1)", id_)

    async def forward(
        self, name: str, sink: Mapping[str, object], table: str = "orders", **keys: object
    ) -> None:
        """Make or change a forward pipeline."""
        config = {"source": {"outbox": table}, "sink": sink, **keys}
        await self.run(
            "select pgtrickle.set_relay_outbox($1, $2::text::jsonb)", name, as_json(config)
        )

    async def to_file(self, name: str, table: str = "orders", **keys: object) -> Path:
        """Make a pipeline to a file of the same name; the file."""
        path = self.directory / f"{name}.jsonl"
        await self.forward(name, {"type": "file", "output": str(path)}, table, **keys)
        return path

    async def reverse(self, name: str, source: Mapping[str, object], inbox: str) -> None:
        """Make or change a reverse pipeline into an inbox that is made where it is missing."""
        await self.run(
            "select pgtrickle.set_relay_inbox($1, $2, $3::text::jsonb)",
            name,
            inbox,
            as_json(source),
        )

    async def inbox_keys(self, inbox: str) -> list[str]:
        """The dedup keys that an inbox holds."""
        rows = await self.owner.fetch(f"select event_id from pgtrickle.{inbox} order by event_id")
        return [row["event_id"] for row in rows]

    async def health(self, relay: RelayProcess) -> Health:
        """What `/health` says now."""
        return msgspec.json.decode(await self.page(relay, "/health"), type=Health)

    async def state(self, relay: RelayProcess, pipeline: str) -> PipelineHealth | None:
        """The health of one pipeline, None where it is paused or this relay does not have it."""
        health = (await self.health(relay)).pipelines.get(pipeline)
        return None if health is None or health.state == "paused" else health

    async def page(self, relay: RelayProcess, path: str) -> str:
        """What the relay's HTTP server answers."""
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            return (await client.get(f"{relay.http_url}{path}")).text

    async def until_state(
        self, relay: RelayProcess, pipeline: str, state: str, *, timeout_s: float = BOUND_S
    ) -> PipelineHealth:
        """Wait until a pipeline is in this state."""

        async def found() -> PipelineHealth | None:
            health = await self.state(relay, pipeline)
            return health if health is not None and health.state == state else None

        return await until(found, timeout_s=timeout_s)

    @contextlib.asynccontextmanager
    async def restarting(self, relay: RelayProcess, pipeline: str) -> AsyncIterator[None]:
        """What the block changes has made the pipeline run again when the block is left."""
        since = len(relay.stderr)
        yield
        await relay.wait_for_log(rf"\[{pipeline}\] running", since=since)

    async def epoch(self, pipeline: str) -> int:
        """How often the pipeline was taken over; 0 before the first time."""
        found = await self.value(
            "select max(epoch) from pgtrickle.relay_consumer_offsets where pipeline_id = $1",
            pipeline,
        )
        return int(str(found or 0))


@contextlib.asynccontextmanager
async def relay_world(
    database: Database, directory: Path, start_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    """A world on this database; its relays end with their fixture."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        _make_member(connection)
    owner: Connection = await asyncpg.connect(database.dsn)
    world = RelayWorld(database, owner, directory, start_process)
    try:
        yield world
    finally:
        for process in world.started:
            await process.aclose()
            # Shown with a test that fails.
            print(process.output)
        world.owner.terminate()


def _make_member(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """Roles belong to the server: another test may have made it."""
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        connection.execute(sql.SQL("create role {} login").format(sql.Identifier(MEMBER)))
    with contextlib.suppress(psycopg.errors.UndefinedObject):
        connection.execute(sql.SQL("grant pgtrickle_relay to {}").format(sql.Identifier(MEMBER)))


async def until(
    found: Callable[[], Awaitable[T | None]], *, timeout_s: float = BOUND_S, every_s: float = 0.02
) -> T:
    """Ask until there is an answer other than None and False. Raises AssertionError."""
    ends_at = time.monotonic() + timeout_s
    while True:
        answer = await found()
        if answer is not None and answer is not False:
            return answer
        assert time.monotonic() < ends_at, f"not within {timeout_s} s: {found!r}"
        await asyncio.sleep(every_s)


def events_in(path: Path) -> list[Event]:
    """Every complete line of a file; none where there is no file yet."""
    if not path.exists():
        return []
    complete = path.read_bytes().rpartition(b"\n")[0]
    return [msgspec.json.decode(line, type=Event) for line in complete.splitlines()]


async def events_of(path: Path, count: int, *, timeout_s: float = BOUND_S) -> list[Event]:
    """Wait until the file holds so many different events; all its lines."""

    async def found() -> list[Event] | None:
        events = events_in(path)
        return events if len({event.dedup_key for event in events}) >= count else None

    return await until(found, timeout_s=timeout_s)


def assert_each_once_or_repeated_with_its_key(events: Sequence[Event], ids: Sequence[int]) -> None:
    """Every row is there, and what is there twice is the same event with the same key."""
    keys: dict[object, set[str]] = {}
    rows: dict[str, set[object]] = {}
    for event in events:
        keys.setdefault(event.id, set()).add(event.dedup_key)
        rows.setdefault(event.dedup_key, set()).add(event.id)
    missing = set(ids) - keys.keys()
    assert not missing, f"{len(missing)} rows are lost, among them {sorted(missing)[:5]}"
    assert keys.keys() <= set(ids)
    assert all(len(found) == 1 for found in keys.values())
    assert all(len(found) == 1 for found in rows.values())


def assert_first_occurrences_are_in_order(events: Sequence[Event]) -> None:
    """Rows came first in the order in which they were written."""
    first = list(dict.fromkeys(event.id for event in events))
    assert first == sorted(first, key=str) or first == sorted(first, key=lambda id_: int(str(id_)))


def port_of(url: str) -> int:
    """The port that a URL names."""
    port = urlsplit(url).port
    assert port is not None
    return port


@dataclass
class NatsWorld:
    """A stream on the NATS server, made and looked at over a connection of its own."""

    server: NatsServer
    stream: str
    client: Client

    @property
    def subject(self) -> str:
        """The beginning of the stream's subjects."""
        return f"{self.stream}."

    async def count(self) -> int:
        """How many messages the stream holds."""
        info = await self.client.jetstream().stream_info(self.stream)
        return info.state.messages

    async def events(self) -> list[Event]:
        """All messages of the stream, in its order."""
        count = await self.count()
        if not count:
            return []
        subscription = await self.client.jetstream().subscribe(
            f"{self.subject}>", ordered_consumer=True
        )
        events: list[Event] = []
        async with asyncio.timeout(BOUND_S):
            while len(events) < count:
                message = await subscription.next_msg(timeout=BOUND_S)
                events.append(msgspec.json.decode(message.data, type=Event))
        await subscription.unsubscribe()
        return events

    async def until_holding(self, count: int, *, timeout_s: float = BOUND_S) -> None:
        """Wait until the stream holds at least so many messages."""

        async def found() -> bool:
            return await self.count() >= count

        await until(found, timeout_s=timeout_s)

    async def publish(self, first: int, last: int) -> None:
        """Plain JSON messages with the ids from first to last and message ids of their own."""
        stream = self.client.jetstream()
        for id_ in range(first, last + 1):
            await stream.publish(
                f"{self.subject}in",
                as_json({"id": id_}).encode(),
                headers={"Nats-Msg-Id": f"m{id_}"},
            )

    def sink(self, url: str | None = None, **keys: object) -> Mapping[str, object]:
        """A sink object into this stream."""
        return {
            "type": "nats",
            "url": url or self.server.url,
            "stream": self.stream,
            "subject_template": f"{self.stream}.{{stream_table}}.{{op}}",
            **keys,
        }

    def source(self, url: str | None = None, **keys: object) -> Mapping[str, object]:
        """A source object out of this stream."""
        return {
            "type": "nats",
            "url": url or self.server.url,
            "stream": self.stream,
            "subject": f"{self.subject}>",
            **keys,
        }


@contextlib.asynccontextmanager
async def nats_world(
    server: NatsServer, stream: str, *, duplicate_window_s: float = 120
) -> AsyncIterator[NatsWorld]:
    """A stream of that name for as long as the block lasts."""
    client = await nats.connect(server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    world = NatsWorld(server, stream, client)
    with contextlib.suppress(nats.js.errors.NotFoundError):
        await client.jetstream().delete_stream(stream)
    await client.jetstream().add_stream(
        StreamConfig(name=stream, subjects=[f"{stream}.>"], duplicate_window=duplicate_window_s)
    )
    try:
        yield world
    finally:
        with contextlib.suppress(nats.errors.Error):
            await client.jetstream().delete_stream(stream)
        await client.close()


@contextlib.contextmanager
def writing(dsn: str, statement: str, first: int, last: int) -> Iterator[Callable[[], int]]:
    """Another thread that runs the statement for each id, a transaction each.

    It connects again where the server goes away, and repeats what it then does not know of: the
    statement must bear that. Gives a function that says how many are committed; the block's end
    waits for the rest.
    """
    committed = 0

    def write() -> None:
        nonlocal committed
        ends_at = time.monotonic() + BOUND_S
        while committed <= last - first and time.monotonic() < ends_at:
            with (
                contextlib.suppress(psycopg.OperationalError),
                psycopg.connect(dsn, autocommit=True) as connection,
            ):
                while committed <= last - first:
                    connection.execute(statement, (first + committed,))
                    committed += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield lambda: committed
    finally:
        thread.join()


def as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()
