"""Positions are moved while transactions are open and a relay delivers: nothing is lost.

After a seek two things have to arrive, whatever happened before: every row at or above the place,
and every row that was not committed at that moment, wherever it lies. Writers commit out of id
order and roll back, one transaction is always open over several seeks; the relay is killed now and
then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from tests.integration.relay_surroundings import RelayWorld, StartProcess, relay_world, until
from tests.servers.postgres import Database

SEEKS = 6
KILLED_AT = {2}
WRITERS = 4
PIPELINES = ("alone", "shared")
VISIBLE = "select coalesce(array_agg(id), '{}') from pgtrickle.outbox_orders where %s"


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


@dataclass
class Writing:
    """Writers on one table; each order has an id of its own."""

    dsn: str
    dice: random.Random
    orders: int = 0

    async def insert(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self.orders += 1
        await connection.execute("insert into orders (id) values ($1)", self.orders)

    async def write(self, pause: Callable[[], float]) -> None:
        connection = await asyncpg.connect(self.dsn)
        try:
            while True:
                transaction = connection.transaction()
                await transaction.start()
                await self.insert(connection)
                await asyncio.sleep(pause())
                await self.insert(connection)
                await (transaction.rollback if self.dice.random() < 0.2 else transaction.commit)()
        finally:
            connection.terminate()


def delivered(path: Path, behind: int) -> set[int]:
    """The outbox ids in the complete lines behind so many bytes."""
    lines = path.read_bytes()[behind:].rpartition(b"\n")[0].splitlines() if path.exists() else []
    # A torn line in front: it was being written at that moment.
    return {json.loads(line)["outbox_id"] for line in lines if line.startswith(b'{"v"')}


async def seek(world: RelayWorld, pipeline: str, dice: random.Random) -> tuple[str, set[int]]:
    """Put the pipeline somewhere; gives which rows that asks for, and which were visible then."""
    last = int(str(await world.value("select max(id) from pgtrickle.outbox_orders")))
    place = dice.choice(["earliest", "latest", "latest", "id", "id", "time"])
    at = str(dice.randint(max(1, last - 200), last))
    if place == "time":
        at = str(
            await world.value(
                "select created_at::text from pgtrickle.outbox_orders order by id desc limit 1"
                f" offset {dice.randint(0, 50)}"
            )
        )
    to = place if place in ("earliest", "latest") else at
    await world.run(f"select pgtrickle.relay_seek('{pipeline}', '{to}')")
    visible = await world.value(VISIBLE % "true")
    asked_for = {
        "earliest": "true",
        "latest": "false",
        "id": f"id >= {at}",
        "time": f"created_at >= '{at}'",
    }
    assert isinstance(visible, list)
    return asked_for[place], set(visible)


async def test_after_a_seek_everything_from_there_and_all_that_was_open_arrives(
    world: RelayWorld,
) -> None:
    dice = random.Random(20261130)
    files = {name: world.directory / f"{name}.jsonl" for name in PIPELINES}
    await world.to_file("alone")
    # What a killed relay held is free again that soon.
    config = {
        "source": {"outbox": "orders", "consumer_group": "sharers"},
        "sink": {"type": "file", "output": str(files["shared"])},
        "visibility_seconds": 2,
    }
    await world.run(
        "select pgtrickle.set_relay_outbox('shared', $1::text::jsonb)", json.dumps(config)
    )
    relay = await world.relay()
    writing = Writing(world.database.dsn, dice)
    async with asyncio.TaskGroup() as tasks:
        writers = [
            *(
                tasks.create_task(writing.write(lambda: dice.uniform(0, 0.2)))
                for _ in range(WRITERS)
            ),
            tasks.create_task(writing.write(lambda: 2.5)),
        ]
        await until(lambda: asyncio.sleep(0, writing.orders > 50))
        for number in range(SEEKS):
            pipeline = dice.choice(PIPELINES)
            before = files[pipeline].stat().st_size if files[pipeline].exists() else 0
            asked_for, visible = await seek(world, pipeline, dice)
            if number in KILLED_AT:
                await relay.kill()
                relay = await world.relay()
            orders = writing.orders
            await until(lambda written=orders: asyncio.sleep(0, writing.orders > written + 20))
            wanted = await world.value(VISIBLE % asked_for)
            committed = await world.value(VISIBLE % "true")
            assert isinstance(wanted, list)
            assert isinstance(committed, list)
            required = {*wanted, *(set(committed) - visible)}

            async def arrived(
                path: Path = files[pipeline], behind: int = before, all_: set[int] = required
            ) -> bool:
                return not all_ - delivered(path, behind)

            with contextlib.suppress(AssertionError):
                await until(arrived, timeout_s=20)
            lost = required - delivered(files[pipeline], before)
            assert not lost, (number, pipeline, asked_for, sorted(lost))
        for writer in writers:
            writer.cancel()
