"""A million pending gaps under one open writer slow nothing down noticeably."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import pytest

from relay.backends.outbox import OutboxSource
from tests.integration.outbox_surroundings import (
    BOUND_S,
    OutboxWorld,
    enable_orders,
    outbox_world,
    polled,
)
from tests.servers.postgres import Database

GAPS = 1_000_000
EVENTS = 40


async def latency_s(world: OutboxWorld, source: OutboxSource, first_key: int) -> float:
    """The median time from a commit to its event."""
    times = []
    for key in range(first_key, first_key + EVENTS):
        await world.publisher.execute("insert into orders values ($1, 0, 'x')", key)
        committed = time.monotonic()
        await polled(source, 1)
        times.append(time.monotonic() - committed)
    return statistics.median(times)


@pytest.mark.slow
async def test_a_million_pending_gaps_slow_nothing_down(migrated_database: Database) -> None:
    async with outbox_world(migrated_database.dsn) as world:
        await enable_orders(world.publisher)
        source = world.source()
        await source.connect()
        without = await latency_s(world, source, 0)
        await source.aclose()
        claim = await world.catalog.claim("pipeline", "outbox_orders", "worker")
        odd = range(1001, 1001 + 2 * GAPS, 2)
        await world.catalog.commit(
            "pipeline", claim.epoch, odd[-1] + 1, opened=list(zip(odd, odd, strict=True))
        )
        await world.publisher.execute(
            "select setval(pg_get_serial_sequence('pgtrickle.outbox_orders', 'id'), $1)", odd[-1]
        )
        writer = await world.connect_publisher()
        await writer.execute("begin")
        # The id that lies in the last gap's neighbour: above the position, missing like the gaps.
        await writer.execute("insert into orders values (-1, 0, 'open')")

        async with asyncio.timeout(BOUND_S):
            await source.connect()
        began = time.monotonic()
        await world.publisher.execute("insert into orders values (-2, 0, 'first')")
        await polled(source, 1)
        after_connect = time.monotonic() - began
        beside = await latency_s(world, source, 1000)
        await writer.execute("rollback")
        began = time.monotonic()
        await polled_after_writer(world, source)
        decided = time.monotonic() - began
        after = await latency_s(world, source, 2000)

        print(
            f"event latency: without gaps {without * 1e3:.1f} ms, with a million"
            f" {beside * 1e3:.1f} ms, after them {after * 1e3:.1f} ms;"
            f" first after connect {after_connect:.2f} s, first after the writer {decided:.2f} s"
        )
        assert beside < without + 0.05
        assert after < without + 0.05
        assert decided < 3.0
        await writer.close()
        await source.aclose()


@pytest.mark.slow
async def test_a_million_gaps_of_a_group_slow_its_polls_down_by_nothing(
    migrated_database: Database,
) -> None:
    async with outbox_world(migrated_database.dsn) as world:
        db, writer = world.publisher, await world.connect_publisher()
        await db.execute("select pgtrickle.enable_outbox('events', capture => 'none')")
        await db.execute("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
        await writer.execute("begin")
        await writer.execute("insert into pgtrickle.outbox_events (payload) values ('{}')")
        await poll_s(db)
        without = statistics.median([await poll_s(db) for _ in range(EVENTS)])
        # As a poll has noted them: every second id is missing, and the writer lives.
        await db.execute(
            "insert into pgtrickle.relay_group_cohorts (group_id, holders)"
            " select 1, array_agg(distinct virtualtransaction) from pg_locks"
            " where relation = 'pgtrickle.outbox_events'::regclass and mode = 'RowExclusiveLock'"
        )
        await db.execute(
            "insert into pgtrickle.relay_group_gaps select 1, i, i, max(c.cohort_id)"
            " from generate_series(1, $1::bigint, 2) as i, pgtrickle.relay_group_cohorts as c"
            " group by i",
            2 * GAPS + 1,
        )
        await db.execute("analyze pgtrickle.relay_group_gaps")
        await db.execute(
            "select setval(pg_get_serial_sequence('pgtrickle.outbox_events', 'id'), $1)",
            2 * GAPS + 1,
        )
        await db.execute("update pgtrickle.relay_groups set frontier = $1", 2 * GAPS + 1)

        beside = statistics.median([await poll_s(db, rows=1) for _ in range(EVENTS)])
        await writer.execute("commit")
        late = await db.fetch("select outbox_id from pgtrickle.poll_outbox('g', 'one')")
        await db.execute("select pgtrickle.commit_offset('g', 'one', 1)")
        polls = 0
        began = time.monotonic()
        while await db.fetchval("select exists (select from pgtrickle.relay_group_cohorts)"):
            await poll_s(db)
            polls += 1
        decided = time.monotonic() - began

        print(
            f"poll of a group: without gaps {without * 1e3:.1f} ms, with a million"
            f" {beside * 1e3:.1f} ms; all decided after {polls} polls, {decided:.1f} s"
        )
        assert [row["outbox_id"] for row in late] == [1]
        assert beside < without + 0.05
        await writer.close()


async def poll_s(db: Any, rows: int = 0) -> float:
    """How long a poll takes that finds so many new rows, and settling them."""
    await db.execute(
        "insert into pgtrickle.outbox_events (payload) select '{}' from generate_series(1, $1)",
        rows,
    )
    began = time.monotonic()
    found = await db.fetch("select outbox_id from pgtrickle.poll_outbox('g', 'one')")
    assert len(found) == rows
    if found:
        await db.execute("select pgtrickle.commit_offset('g', 'one', $1)", found[-1]["outbox_id"])
    return time.monotonic() - began


async def polled_after_writer(world: OutboxWorld, source: OutboxSource) -> None:
    """The first event that has to wait for the answer to all gaps."""
    await world.publisher.execute("insert into orders values (-3, 0, 'next')")
    await polled(source, 1)
