"""A million pending gaps under one open writer slow nothing down noticeably."""

from __future__ import annotations

import asyncio
import statistics
import time

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


async def polled_after_writer(world: OutboxWorld, source: OutboxSource) -> None:
    """The first event that has to wait for the answer to all gaps."""
    await world.publisher.execute("insert into orders values (-3, 0, 'next')")
    await polled(source, 1)
