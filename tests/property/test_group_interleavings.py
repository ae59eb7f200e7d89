"""Consumer groups under random interleavings: nothing lost, nothing settled twice.

Writers commit out of id order, roll back, use savepoints; one stays open for the whole run.
Consumers crash with rows in their hands, release them, commit late, or use the names of
pg_trickle 0.28, which know no lease token.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TypeAlias

import asyncpg
import pytest

from tests.servers.postgres import Database

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

GROUP = "competing"
OUTBOX = "outbox_events"
WATERMARK = "select watermark from pgtrickle.relay_group_find($1, false)"
LEASE_LOST = "RL021"
RUN_S = 5.0
DRAIN_S = 30.0


@dataclass
class History:
    """What writers and consumers of one run have seen."""

    committed: set[int] = field(default_factory=set)
    delivered: Counter[int] = field(default_factory=Counter)
    settled: Counter[int] = field(default_factory=Counter)
    released: set[int] = field(default_factory=set)
    watermarks: list[int] = field(default_factory=list)


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


async def write_row(connection: Connection) -> int:
    return int(
        await connection.fetchval(
            f"insert into pgtrickle.{OUTBOX}"
            " (pgt_id, refresh_id, inserted_count, deleted_count, is_claim_check, payload)"
            " values (gen_random_uuid(), gen_random_uuid(), 1, 0, false,"
            """ '{"v":1,"inserted":[{}],"deleted":[]}') returning id"""
        )
    )


async def write_until(dsn: str, dice: random.Random, ended: asyncio.Event, seen: History) -> None:
    async with connected(dsn) as connection:
        while not ended.is_set():
            transaction = connection.transaction()
            await transaction.start()
            ids: list[int] = []
            for _ in range(dice.randint(1, 4)):
                savepoint = connection.transaction()
                await savepoint.start()
                drawn = await write_row(connection)
                if dice.random() < 0.2:
                    await savepoint.rollback()
                else:
                    await savepoint.commit()
                    ids.append(drawn)
                await asyncio.sleep(dice.choice((0, 0, 0.001, 0.02)))
            if dice.random() < 0.3:
                await transaction.rollback()
            else:
                await transaction.commit()
                seen.committed.update(ids)


async def poll(
    connection: Connection, name: str, batch: int, lease_s: int, seen: History
) -> tuple[str | None, list[int]]:
    rows = await connection.fetch(
        "select lease_token, outbox_id from pgtrickle.poll_outbox($1, $2, $3, $4)",
        GROUP,
        name,
        batch,
        lease_s,
    )
    ids = [row["outbox_id"] for row in rows]
    assert ids == sorted(ids)
    seen.delivered.update(ids)
    return (rows[0]["lease_token"] if rows else None), ids


async def settle(
    connection: Connection, name: str, token: str, ids: list[int], seen: History
) -> None:
    try:
        await connection.execute(
            "select pgtrickle.commit_offset($1, $2, $3, $4)", GROUP, name, ids[-1], token
        )
    except asyncpg.PostgresError as error:
        if getattr(error, "sqlstate", None) != LEASE_LOST:
            raise
        seen.released.update(ids)
    else:
        seen.settled.update(ids)


async def settle_partly(
    connection: Connection, name: str, ids: list[int], last: int, seen: History
) -> None:
    """By name and offset: the rest of the batch stays leased until its lease runs out."""
    try:
        await connection.execute("select pgtrickle.commit_offset($1, $2, $3)", GROUP, name, last)
    except asyncpg.PostgresError as error:
        if getattr(error, "sqlstate", None) != LEASE_LOST:
            raise
        seen.released.update(ids)
    else:
        seen.settled.update(i for i in ids if i <= last)
        seen.released.update(i for i in ids if i > last)


async def consume_until(
    dsn: str, name: str, dice: random.Random, ended: asyncio.Event, seen: History
) -> None:
    while not ended.is_set():
        async with connected(dsn) as connection:
            while not ended.is_set():
                token, ids = await poll(connection, name, dice.randint(1, 20), 1, seen)
                if token is None:
                    await asyncio.sleep(0.005)
                    continue
                fate = dice.random()
                if fate < 0.05:
                    seen.released.update(ids)
                    break  # a crash: another connection goes on under the same name
                if fate < 0.10:
                    seen.released.update(ids)
                    await connection.execute(
                        "select pgtrickle.relay_group_release($1, $2)", GROUP, token
                    )
                elif fate < 0.13:
                    await asyncio.sleep(1.2)
                    await settle(connection, name, token, ids, seen)
                elif fate < 0.40:
                    await settle_partly(connection, name, ids, dice.choice(ids), seen)
                else:
                    await asyncio.sleep(dice.choice((0, 0.002)))
                    await settle(connection, name, token, ids, seen)


async def watch_until(dsn: str, ended: asyncio.Event, seen: History) -> None:
    async with connected(dsn) as connection:
        while not ended.is_set():
            seen.watermarks.append(await connection.fetchval(WATERMARK, GROUP))
            await asyncio.sleep(0.01)


async def drain(dsn: str, seen: History) -> None:
    async with connected(dsn) as connection, asyncio.timeout(DRAIN_S):
        while set(seen.settled) != seen.committed:
            token, ids = await poll(connection, "last", 500, 30, seen)
            if token is None:
                await asyncio.sleep(0.05)
            else:
                await settle(connection, "last", token, ids, seen)
        assert await poll(connection, "last", 500, 30, seen) == (None, [])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
async def test_competing_consumers_settle_each_committed_row_exactly_once(
    migrated_database: Database, seed: int
) -> None:
    dsn, seen, ended = migrated_database.dsn, History(), asyncio.Event()
    dice = random.Random(seed)
    async with connected(dsn) as setup, connected(dsn) as open_writer:
        await setup.execute("select pgtrickle.enable_outbox('events', capture => 'none')")
        await setup.execute("select pgtrickle.relay_group_create($1, $2)", GROUP, OUTBOX)
        staying_open = open_writer.transaction()
        await staying_open.start()
        late = {await write_row(open_writer)}

        async with asyncio.TaskGroup() as tasks:
            for _ in range(6):
                tasks.create_task(write_until(dsn, random.Random(dice.random()), ended, seen))
            for name in ("one", "two", "three", "four", "five"):
                tasks.create_task(
                    consume_until(dsn, name, random.Random(dice.random()), ended, seen)
                )
            tasks.create_task(watch_until(dsn, ended, seen))
            asyncio.get_running_loop().call_later(RUN_S, ended.set)
            while not ended.is_set():
                late.add(await write_row(open_writer))
                await asyncio.sleep(0.05)

        await drain(dsn, seen)
        assert not late & set(seen.delivered)
        watermark_while_open = await setup.fetchval(WATERMARK, GROUP)
        await staying_open.commit()
        seen.committed |= late
        await drain(dsn, seen)
        lag = await setup.fetch("select * from pgtrickle.consumer_lag($1)", GROUP)
        frontier = await setup.fetchval("select frontier from pgtrickle.relay_groups")

    assert len(seen.committed) > 200
    assert set(seen.delivered) == seen.committed, "nothing invented, nothing lost"
    assert set(seen.settled.values()) == {1}
    assert {i for i, times in seen.delivered.items() if times > 1} <= seen.released
    assert seen.watermarks == sorted(seen.watermarks)
    assert watermark_while_open == min(late) - 1
    assert {row["committed_offset"] for row in lag} == {frontier} == {max(seen.committed)}
    for left in ("pending_gaps", "leased_rows", "returned_rows"):
        assert {row[left] for row in lag} == {0}
