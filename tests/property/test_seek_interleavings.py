"""A position is moved in the middle of anything: nothing is lost, nothing else is sent, in order.

Writers commit out of id order, roll back and stay open; readers publish and acknowledge later,
release, crash, are paused, share in a consumer group or have keys of their own. They take turns at
random, and at some moment the position is put somewhere. What has to come from there: each event
at or above that place, and each that was not committed at that moment, wherever it lies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import asyncpg
import msgspec
import pytest

from relay.backends.outbox import OutboxSource
from relay.backends.outbox.group import GroupSource
from relay.catalog import CONFIG_CHANNEL, OUTBOX_CHANNEL, Catalog
from relay.context import BackendContext
from relay.contracts import Batch
from relay.errors import LeaseLost
from relay.partition import WHOLE, Partition
from relay.postgres import Database as RelayDatabase
from relay.settings import PostgresSettings
from tests.servers.postgres import Database

INTERLEAVINGS = int(os.environ.get("PGTRICKLE_TEST_INTERLEAVINGS", "100"))
RANDOM_SEED = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**9)
STEPS = 24
WRITERS = 3
KEYS = 6
READERS = 3
BOUND_S = 20.0
PAUSE_S = 0.005
SWEPT_EVERY = 25
PIPELINES = ("alone", "shared", "dealt")

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_ROWS = (
    "select id, (payload #>> '{inserted,0,note}')::int as event, created_at"
    " from pgtrickle.outbox_orders order by id"
)


@dataclass
class Writer:
    """One connection; ``written`` are the events of its open transaction, by key."""

    connection: Connection
    written: dict[int, int] = field(default_factory=dict)


@dataclass
class Reader:
    """One source, what it has not acknowledged, and whether it knows of the last seek.

    ``begins_again``: it was told to reject, so its next poll reads from the position there is then.
    """

    source: OutboxSource | GroupSource
    out: deque[tuple[Batch, Sequence[tuple[str, int]]]] = field(default_factory=deque)
    is_connected: bool = False
    is_fresh: bool = True
    begins_again: bool = False


@dataclass
class Stage:
    """One outbox, its writers, and pipelines of each kind at it."""

    admin: Connection
    writers: Sequence[Writer]
    readers: dict[str, Sequence[Reader]]
    events: int = 0


@dataclass
class Play:
    """One interleaving: a pipeline of one kind, and one seek of it."""

    stage: Stage
    pipeline: str
    dice: random.Random
    done: list[str] = field(default_factory=list)
    required: set[int] = field(default_factory=set)
    forbidden: set[int] = field(default_factory=set)
    arrived: list[tuple[str, int]] = field(default_factory=list)
    has_sought: bool = False

    @property
    def readers(self) -> Sequence[Reader]:
        return self.stage.readers[self.pipeline]

    async def run(self) -> None:
        sought_at = self.dice.randrange(STEPS)
        for step in range(STEPS):
            if step == sought_at:
                await self.seek()
            elif self.dice.random() < 0.5:
                await self.write()
            else:
                await self.read(self.dice.choice(self.readers))
        for writer in self.stage.writers:
            await self.end(writer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as tasks:
                for reader in self.readers:
                    tasks.create_task(self.drain(reader))
        arrived = [event for _, event in self.arrived]
        lost = self.required - set(arrived)
        assert not lost, f"lost: {sorted(lost)}"
        assert not self.forbidden & set(arrived), "sent again without being asked for"
        if self.pipeline != "shared":
            last: dict[str, int] = {}
            for key, event in dict.fromkeys(self.arrived):
                assert event > last.get(key, 0), f"key {key}: {event} came behind {last[key]}"
                last[key] = event

    @property
    def is_complete(self) -> bool:
        return self.required <= {event for _, event in self.arrived}

    async def drain(self, reader: Reader) -> None:
        """Publish and acknowledge until all has arrived, whichever reader has the last of it."""
        while not self.is_complete:
            await self.poll(reader, BOUND_S)
            await self.acknowledge(reader, len(reader.out))
        for other in self.readers:
            other.source.interrupt()

    async def write(self) -> None:
        writer = self.dice.choice(self.stage.writers)
        held = {key for one in self.stage.writers for key in one.written}
        if writer.written and self.dice.random() < 0.4:
            await self.end(writer)
        elif free := sorted(set(range(KEYS)) - held):
            if not writer.written:
                await writer.connection.execute("begin")
            key = self.dice.choice(free)
            self.stage.events += 1
            await writer.connection.execute(
                "update orders set note = $2 where id = $1", key, str(self.stage.events)
            )
            writer.written[key] = self.stage.events
            self.done.append(f"write {self.stage.events} of {key}")

    async def end(self, writer: Writer) -> None:
        if not writer.written:
            return
        how = self.dice.choice(("commit", "commit", "rollback"))
        await writer.connection.execute(how)
        self.done.append(f"{how} {sorted(writer.written.values())}")
        if how == "commit" and self.has_sought:
            self.required |= set(writer.written.values())
        writer.written.clear()

    async def seek(self) -> None:
        rows = await self.stage.admin.fetch(_ROWS)
        kinds = ("earliest", "latest", "id", "time") if rows else ("earliest", "latest")
        kind = self.dice.choice(kinds)
        wanted, to = [], kind
        if kind == "earliest":
            wanted = rows
        elif kind != "latest":
            # Far back now and then, but most often among what is in flight.
            row = self.dice.choice(rows if self.dice.random() < 0.2 else rows[-12:])
            to = str(row["id"] if kind == "id" else row["created_at"])
            first = row["id"]
            if kind == "time":
                first = min(one["id"] for one in rows if one["created_at"] >= row["created_at"])
            wanted = [one for one in rows if one["id"] >= first]
        sent = await self.stage.admin.fetchval(
            "select pgtrickle.relay_seek($1, $2)", self.pipeline, to
        )
        self.done.append(f"seek {self.pipeline} {to}: {sent}")
        assert sent == len(wanted)
        self.has_sought = True
        self.required = {row["event"] for row in wanted}
        self.forbidden = {row["event"] for row in rows} - self.required
        for reader in self.readers:
            reader.is_fresh = reader.begins_again or not reader.is_connected

    async def read(self, reader: Reader) -> None:
        turn = self.dice.random()
        if not reader.is_connected or turn < 0.6:
            await self.poll(reader)
        elif turn < 0.85:
            await self.acknowledge(reader, self.dice.randint(0, len(reader.out)))
        elif turn < 0.92 and reader.out:
            # As after an outage of the destination: from the oldest on.
            self.done.append("reject")
            for batch, _ in reader.out:
                await reader.source.reject(batch)
            reader.out.clear()
            reader.begins_again = True
        elif turn < 0.96:
            self.done.append("pause")
            await self.leave(reader)
        else:
            # As after an outage of the database.
            await self.connect(reader)

    async def leave(self, reader: Reader) -> None:
        await reader.source.aclose()
        reader.out.clear()
        reader.is_connected = reader.begins_again = False

    async def connect(self, reader: Reader) -> None:
        self.done.append("connect")
        await reader.source.connect()
        reader.out.clear()
        reader.is_connected = reader.is_fresh = True
        reader.begins_again = False

    async def poll(self, reader: Reader, pause_s: float = PAUSE_S) -> None:
        if not reader.is_connected:
            await self.connect(reader)
        ends = asyncio.get_running_loop().call_later(pause_s, reader.source.interrupt)
        try:
            batch = await reader.source.poll()
        except LeaseLost:
            await self.connect(reader)
            return
        finally:
            ends.cancel()
        reader.is_fresh |= reader.begins_again
        reader.begins_again = False
        assert not batch.rejected
        events = [
            (str(message.key), int(msgspec.json.decode(message.payload)["note"]))
            for message in batch.messages
            if message.op != "delete"
        ]
        if events:
            self.done.append(f"publish {[event for _, event in events]}")
        # Of a group that counts which is settled: another lease may have been void.
        if self.has_sought and reader.is_fresh and self.pipeline != "shared":
            self.arrived += events
        reader.out.append((batch, events))

    async def acknowledge(self, reader: Reader, batches: int) -> None:
        for _ in range(batches):
            batch, events = reader.out.popleft()
            try:
                await reader.source.acknowledge(batch)
            except LeaseLost:
                await self.connect(reader)
                return
            if self.has_sought and self.pipeline == "shared":
                self.arrived += events


@contextlib.asynccontextmanager
async def stage(dsn: str) -> AsyncIterator[Stage]:
    """Three pipelines at one outbox: alone, two workers of a group, readers of partitions."""
    async with contextlib.AsyncExitStack() as stack:
        database = RelayDatabase(PostgresSettings(url=dsn, pool_size=4))
        await database.open()
        stack.push_async_callback(database.aclose)
        listening = asyncio.create_task(database.listen((OUTBOX_CHANNEL, CONFIG_CHANNEL)))
        stack.callback(listening.cancel)
        connections = []
        for _ in range(WRITERS + 1):
            connections.append(await asyncpg.connect(dsn))
            stack.callback(connections[-1].terminate)
        admin, *writers = connections
        await admin.execute(
            "create table orders (id int primary key, note text);"
            f"insert into orders select g, 0 from generate_series(0, {KEYS - 1}) as g;"
            "select pgtrickle.enable_outbox('orders')"
        )
        partitions = {"partitions": READERS}
        for name, source, more in (
            ("alone", {}, {}),
            ("shared", {"consumer_group": "sharers"}, {}),
            ("dealt", {}, partitions),
        ):
            config = {"source": {"outbox": "orders", **source}, "sink": {"type": "stdout"}, **more}
            await admin.execute(
                "select pgtrickle.set_relay_outbox($1, $2::text::jsonb)",
                *(name, msgspec.json.encode(config).decode()),
            )
        dealt = await admin.fetchval(
            "select pgtrickle.relay_partitioning(config)::text from pgtrickle.relay_outbox_config"
            " where name = 'dealt'"
        )

        def reader(
            name: str, worker: str, partition: Partition = WHOLE, **source: object
        ) -> Reader:
            context = BackendContext(
                pipeline=name,
                direction="forward",
                worker_id=worker,
                database=database,
                catalog=Catalog(database, "default"),
                emit=lambda _: None,
                file_roots=(Path("/"),),
                batch_size=4,
                batch_bytes=4_194_304,
                poll_interval_s=0.002,
                partition=partition,
                partitioning={} if partition is WHOLE else msgspec.json.decode(dealt),
            )
            return Reader(OutboxSource.from_options({"outbox": "orders", **source}, context))

        readers = {
            "alone": [reader("alone", "w")],
            "shared": [reader("shared", f"w{n}", consumer_group="sharers") for n in (1, 2)],
            "dealt": [
                reader(f"dealt/{n}", "w", Partition(n, READERS)) for n in range(1, READERS + 1)
            ],
        }
        yield Stage(admin, [Writer(connection) for connection in writers], readers)
        for one in (one for group in readers.values() for one in group if one.is_connected):
            await one.source.aclose()


async def sweep(stage: Stage) -> None:
    """Everybody is behind everything, and retention removes it."""
    for pipeline in PIPELINES:
        await stage.admin.execute("select pgtrickle.relay_seek($1, 'latest')", pipeline)
    await stage.admin.execute(
        "update pgtrickle.outbox_orders set created_at = created_at - '2 days'::interval"
    )
    await stage.admin.execute("select pgtrickle.relay_sweep_outbox('outbox_orders', 100000)")


@pytest.mark.slow
async def test_wherever_a_position_is_put_all_from_there_and_all_that_was_open_arrives_in_order(
    migrated_database: Database,
) -> None:
    async with stage(migrated_database.dsn) as world:
        for number in range(INTERLEAVINGS):
            dice = random.Random(f"{RANDOM_SEED} {number}")
            play = Play(world, dice.choice(PIPELINES), dice)
            try:
                await play.run()
            except Exception as failure:
                failure.add_note(f"seed {RANDOM_SEED}, interleaving {number}:")
                failure.add_note("\n".join(play.done))
                raise
            if number % SWEPT_EVERY == SWEPT_EVERY - 1:
                await sweep(world)
