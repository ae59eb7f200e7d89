"""The commit-order guarantee against random interleavings of real transactions.

Sixteen writers commit, roll back, roll back to savepoints, prepare and wait, on shared keys; one
writer stays open for the whole run; readers are replaced with batches unacknowledged; the server
restarts. What the outbox holds in the end is the truth that the deliveries are held against.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import asyncpg
import msgspec
import pytest

from relay.backends.outbox import OutboxSource
from relay.contracts import Batch
from relay.errors import Outage
from relay.message import RelayMessage
from tests.integration.outbox_surroundings import (
    Connection,
    OutboxWorld,
    enable_orders,
    messages_of,
    outbox_world,
    place_of,
    rest_of,
    row_of,
)
from tests.servers.postgres import Database, PostgresServer

WRITERS = 16
KEYS = 60
WRITING_S = 6.0
SETTLED_WITHIN_S = 1.0
FIXED_SEEDS = (1, 20262)
# Another one in each run, and the same in all processes of a run.
RANDOM_SEED = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**9)

_PUBLISH = "select pgtrickle.outbox_publish('orders', $1)"
_PLAIN_INSERT = (
    "insert into pgtrickle.outbox_orders (pgt_id, refresh_id, inserted_count, deleted_count,"
    " is_claim_check, payload) values (gen_random_uuid(), gen_random_uuid(), 1, 0, false,"
    " jsonb_build_object('v', 1, 'inserted', $1::jsonb, 'deleted', '[]'::jsonb))"
)
_ADOPTED_INSERT = "insert into public.written (who, event)"
_CONNECTION_LOST = (
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)


@dataclass
class Deliveries:
    """What came out, in order. ``excused``: times in which nothing could arrive in time."""

    order: list[RelayMessage] = field(default_factory=list)
    arrived_at: dict[str, float] = field(default_factory=dict)
    repeated_without_restart: list[str] = field(default_factory=list)
    restarts: int = 0
    excused: list[tuple[float, float]] = field(default_factory=list)

    def take(self, batch: Batch, seen_by_this_reader: set[str]) -> None:
        now = time.monotonic()
        assert not batch.rejected
        for message in batch.messages:
            if message.dedup_key in seen_by_this_reader:
                self.repeated_without_restart.append(message.dedup_key)
            seen_by_this_reader.add(message.dedup_key)
            self.order.append(message)
            if message.op != "delete":
                self.arrived_at.setdefault(str(row_of(message)["note"]), now)

    def in_first_order(self) -> list[RelayMessage]:
        return list({message.dedup_key: message for message in reversed(self.order)}.values())[::-1]


@dataclass
class Writing:
    """The writers' side: when which tag was committed, as far as the writer knows."""

    world: OutboxWorld
    dice: random.Random
    committed_at: dict[str, float] = field(default_factory=dict)
    tags: int = 0
    prepared: int = 0

    def tag(self) -> str:
        self.tags += 1
        return f"t{self.tags}"

    async def write(self, is_over: asyncio.Event) -> None:
        """One writer until it is over; comes back after the server does."""
        while not is_over.is_set():
            with contextlib.suppress(*_CONNECTION_LOST):
                connection = await self.world.connect_publisher()
                try:
                    while not is_over.is_set():
                        await self.transaction(connection)
                finally:
                    connection.terminate()
            await asyncio.sleep(0.02)

    async def transaction(self, connection: Connection) -> None:
        dice = self.dice
        await connection.execute("begin")
        tags: list[str] = []
        for key in sorted(dice.sample(range(KEYS), dice.choice((1, 1, 1, 2, 3)))):
            if dice.random() < 0.2:
                await connection.execute("savepoint before")
                await self.change(connection, key)
                await connection.execute("rollback to before")
            if dice.random() < 0.1:
                await connection.execute("savepoint kept")
            tags.append(await self.change(connection, key))
        fate = dice.random()
        if fate < 0.05:
            await asyncio.sleep(dice.uniform(0.1, 0.6))
        if dice.random() < 0.3:
            await connection.execute("rollback")
        elif 0.05 < fate < 0.09:
            await self.prepare(connection, tags)
        else:
            await connection.execute("commit")
            self.committed_at.update(dict.fromkeys(tags, time.monotonic()))

    async def prepare(self, connection: Connection, tags: list[str]) -> None:
        """Leave the transaction to whoever ends it, after a while this writer."""
        name = tags[0]
        try:
            await connection.execute(f"prepare transaction '{name}'")
        except (asyncpg.FeatureNotSupportedError, asyncpg.ConfigurationLimitExceededError):
            return  # it would notify, or too many are prepared: the server has rolled it back
        self.prepared += 1
        await asyncio.sleep(self.dice.uniform(0, 0.2))
        # After a restart of the server somebody else may have ended it, or be about to.
        with contextlib.suppress(asyncpg.UndefinedObjectError, asyncpg.ObjectInUseError):
            if self.dice.random() < 0.3:
                await connection.execute(f"rollback prepared '{name}'")
            else:
                await connection.execute(f"commit prepared '{name}'")
                self.committed_at.update(dict.fromkeys(tags, time.monotonic()))

    async def change(self, connection: Connection, key: int) -> str:
        """The next version of a key, in one of three ways; its row lock orders the writers."""
        tag = self.tag()
        way = self.dice.random()
        if way < 0.5:
            await connection.execute(
                "update public.orders set version = version + 1, note = $2 where id = $1", key, tag
            )
            return tag
        version = await connection.fetchval(
            "update public.uncaptured set version = version + 1 where id = $1 returning version",
            key,
        )
        row = {"id": 1000 + key, "version": version, "note": tag}
        await connection.execute(
            _PUBLISH if way < 0.75 else _PLAIN_INSERT, msgspec.json.encode([row]).decode()
        )
        return tag


@dataclass
class AdoptedWriting(Writing):
    """The same writers, of an application that has an outbox table of its own."""

    async def change(self, connection: Connection, key: int) -> str:
        tag = self.tag()
        version = await connection.fetchval(
            "update public.uncaptured set version = version + 1 where id = $1 returning version",
            key,
        )
        row = msgspec.json.encode({"id": key, "version": version, "note": tag}).decode()
        way = self.dice.random()
        if way < 0.4:
            await connection.execute(f"{_ADOPTED_INSERT} values ($1, $2)", str(key), row)
        elif way < 0.7:
            # The second row is as good as rolled back, and the third is another key's.
            await connection.execute(
                f"{_ADOPTED_INSERT} select $1, $2 from generate_series(1, 2) as g where g = 1",
                str(key),
                row,
            )
        else:
            await connection.copy_records_to_table(
                "written", schema_name="public", columns=["who", "event"], records=[(str(key), row)]
            )
        return tag


@dataclass
class Reading:
    """The relay's side: a source that is replaced now and then, with batches still out."""

    dice: random.Random
    make: Callable[[], OutboxSource]
    deliveries: Deliveries
    restart_chance: float = 0.01

    async def read(self, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            began = time.monotonic()
            source = self.make()
            try:
                await source.connect()
                self.deliveries.excused.append((began, time.monotonic()))
                await self._one_life(source, is_over)
            except Outage:
                await asyncio.sleep(0.02)
                self.deliveries.excused.append((began, time.monotonic() + 0.5))
            finally:
                await source.aclose()
            self.deliveries.restarts += 1

    async def _one_life(self, source: OutboxSource, is_over: asyncio.Event) -> None:
        seen: set[str] = set()
        out: deque[Batch] = deque()
        while True:
            batch = await source.poll()
            self.deliveries.take(batch, seen)
            out.append(batch)
            if self.dice.random() < self.restart_chance:
                return
            while len(out) > self.dice.randrange(3):
                await source.acknowledge(out.popleft())
            if is_over.is_set() and not batch.messages:
                while out:
                    await source.acknowledge(out.popleft())
                return


@contextlib.asynccontextmanager
async def open_writer(world: OutboxWorld, tag: str) -> AsyncIterator[Connection]:
    """A transaction that has written an event and stays open inside the block."""
    connection = await world.connect_publisher()
    try:
        await connection.execute("begin")
        await connection.execute("insert into public.orders (id, note) values (-1, $1)", tag)
        yield connection
    finally:
        connection.terminate()


async def prepare_world(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    await world.publisher.execute(
        "create table public.uncaptured (id int primary key, version int not null default 0)"
    )
    await world.publisher.execute(
        f"insert into public.uncaptured select g from generate_series(0, {KEYS - 1}) as g"
    )
    await world.publisher.execute(
        f"insert into public.orders select g, 0, 't0' from generate_series(0, {KEYS - 1}) as g"
    )


async def visible_events(world: OutboxWorld) -> set[str]:
    """Outbox, id and index of everything that is committed in the outbox."""
    async with asyncio.timeout(20):
        connection = await world.connect_publisher()
        try:
            rows = await connection.fetch(
                "select id, inserted_count + deleted_count as events from pgtrickle.outbox_orders"
            )
        finally:
            await connection.close()
    return {f"outbox_orders:{row['id']}:{index}" for row in rows for index in range(row["events"])}


def assert_order(deliveries: Deliveries) -> None:
    """Per key, versions only rise in the order of first arrival."""
    versions: dict[object, int] = {}
    for message in deliveries.in_first_order():
        if message.op == "delete":
            continue
        row = row_of(message)
        version = row["version"]
        assert isinstance(version, int)
        assert version >= versions.get(row["id"], -1), f"key {row['id']}: {message.dedup_key} late"
        versions[row["id"]] = version


def late_by(writing: Writing, deliveries: Deliveries) -> list[float]:
    """Seconds from commit to arrival, without those that crossed a restart."""
    return sorted(
        arrived - committed
        for tag, committed in writing.committed_at.items()
        if (arrived := deliveries.arrived_at.get(tag)) is not None
        and not any(begin < arrived and committed < end for begin, end in deliveries.excused)
    )


async def run(
    world: OutboxWorld,
    seed: int,
    *,
    during: Callable[[Deliveries], object] | None = None,
    writing_of: type[Writing] = Writing,
) -> tuple[Writing, Deliveries]:
    """Writers and reader side by side, until all is written and the reader finds no more."""
    deliveries = Deliveries()
    writing = writing_of(world, random.Random(seed))
    reading = Reading(
        random.Random(seed + 1),
        # Small batches are read ahead of each other all the time, large ones hardly ever.
        lambda: world.source(context=world.context(batch_size=10 if seed % 2 else 200)),
        deliveries,
    )
    written, read = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        writers = [tasks.create_task(writing.write(written)) for _ in range(WRITERS)]
        reader = tasks.create_task(reading.read(read))
        if during is None:
            await asyncio.sleep(WRITING_S)
        else:
            await during(deliveries)  # type: ignore[misc]  # always a coroutine function
        written.set()
        await asyncio.wait(writers)
        read.set()
        await asyncio.wait([reader])
    return writing, deliveries


@pytest.mark.parametrize("seed", [*FIXED_SEEDS, RANDOM_SEED])
async def test_every_committed_event_arrives_once_in_order_and_in_time_beside_an_open_writer(
    migrated_database: Database, seed: int
) -> None:
    async with outbox_world(migrated_database.dsn) as world:
        await prepare_world(world)

        async with open_writer(world, "open") as open_one:
            writing, deliveries = await run(world, seed)
            before_its_commit = await visible_events(world)
            arrived_before = set(map(place_of, deliveries.order))
            await open_one.execute("commit")
            last = world.source()
            await last.connect()
            late = messages_of(await rest_of(last))
            await last.aclose()

        latencies = late_by(writing, deliveries)
        print(
            f"seed {seed}: {len(arrived_before)} events, {writing.prepared} prepared,"
            f" {deliveries.restarts} readers, latency"
            f" p50 {latencies[len(latencies) // 2] * 1e3:.0f} ms, max {latencies[-1] * 1e3:.0f} ms"
        )
        assert before_its_commit - arrived_before == set(), "lost"
        assert arrived_before - before_its_commit == set(), "invented"
        assert [row_of(message)["note"] for message in late] == ["open"]
        assert not deliveries.repeated_without_restart
        assert_order(deliveries)
        assert latencies[-1] < SETTLED_WITHIN_S


async def test_a_table_that_an_application_has_already_is_read_in_commit_order_too(
    any_migrated_database: Database,
) -> None:
    async with outbox_world(any_migrated_database.dsn) as world:
        await prepare_world(world)
        await world.publisher.execute("select pgtrickle.disable_outbox('orders')")
        await world.publisher.execute(
            "create table public.written (who text, event text,"
            " seq bigint generated always as identity primary key)"
        )
        await world.publisher.execute(
            "select pgtrickle.adopt_outbox('orders', 'public.written', id => 'seq',"
            " payload => 'event', key => 'who')"
        )
        open_one = await world.connect_publisher()
        await open_one.execute("begin")
        await open_one.execute(
            f'{_ADOPTED_INSERT} values (\'-1\', \'{{"id": -1, "version": 0, "note": "open"}}\')'
        )

        writing, deliveries = await run(world, RANDOM_SEED, writing_of=AdoptedWriting)
        rows = await world.publisher.fetch("select seq from public.written")
        arrived = set(map(place_of, deliveries.order))
        await open_one.execute("commit")
        await open_one.close()
        last = world.source()
        await last.connect()
        late = messages_of(await rest_of(last))
        await last.aclose()

        print(
            f"seed {RANDOM_SEED}: {len(arrived)} events, {writing.prepared} prepared,"
            f" {deliveries.restarts} readers"
        )
        assert arrived == {f"outbox_orders:{row['seq']}:0" for row in rows}
        assert {message.key for message in deliveries.order} == set(map(str, range(KEYS)))
        assert [row_of(message)["note"] for message in late] == ["open"]
        assert not deliveries.repeated_without_restart
        assert_order(deliveries)
        assert late_by(writing, deliveries)[-1] < SETTLED_WITHIN_S


async def test_a_restart_of_the_server_changes_nothing(
    postgres_server: PostgresServer, migrated_database: Database
) -> None:
    async with outbox_world(migrated_database.dsn) as world:
        await prepare_world(world)
        await world.publisher.execute("begin")
        await world.publisher.execute("insert into public.orders values (-2, 0, 'prepared')")
        # The reader wakes and notifies only later: nothing forbids to prepare yet.
        await world.publisher.execute("prepare transaction 'over the restart'")

        async def restart(deliveries: Deliveries) -> None:
            await asyncio.sleep(1.5)
            began = time.monotonic()
            await asyncio.to_thread(postgres_server.restart)
            deliveries.excused.append((began, time.monotonic() + 2))
            await asyncio.sleep(2.5)
            connection = await world.connect_publisher()
            await connection.execute("commit prepared 'over the restart'")
            await connection.close()
            for prepared in await _prepared(world):
                await _finish(world, prepared)

        _, deliveries = await run(world, 7, during=restart)
        for prepared in await _prepared(world):
            await _finish(world, prepared)
        last = world.source()
        await last.connect()
        deliveries.take(Batch(messages=messages_of(await rest_of(last))), set())
        await last.aclose()

        arrived = set(map(place_of, deliveries.order))
        assert arrived == await visible_events(world)
        assert "prepared" in deliveries.arrived_at
        assert not deliveries.repeated_without_restart
        assert_order(deliveries)


async def _prepared(world: OutboxWorld) -> list[str]:
    connection = await world.connect_publisher()
    rows = await connection.fetch(
        "select gid from pg_prepared_xacts where database = current_database()"
    )
    await connection.close()
    return [row["gid"] for row in rows]


async def _finish(world: OutboxWorld, name: str) -> None:
    """End a prepared transaction whose writer was cut off."""
    connection = await world.connect_publisher()
    with contextlib.suppress(asyncpg.UndefinedObjectError, asyncpg.ObjectInUseError):
        await connection.execute(f"commit prepared '{name}'")
    await connection.close()
