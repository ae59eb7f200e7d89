"""`backfill`: how fast rows that are there go into the outbox, and what their writers notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from statistics import median, quantiles
from typing import Final

from relay.postgres import Connection
from scripts.benchmark.orders import COLUMNS, VALUES, make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.surroundings import (
    Surroundings,
    connected_to,
    surroundings,
)

WRITERS: Final = 4
WRITES_PER_S: Final = 400
TARGET_ROWS_PER_S: Final = 50_000
TARGET_OF_P99: Final = 2.0

_TABLE: Final = "backfilled_orders"


async def backfill(*, events: int, seconds: float, runs: int, say: Callable[[str], None]) -> Row:
    """Backfills of ten times ``events`` rows, beside writers that update single rows of them.

    The writers keep a steady pace, so that their latency and not their rate shows what they notice;
    for ``seconds`` they are alone before each backfill.
    """
    rows = 10 * events
    results: list[dict[str, float]] = []
    async with surroundings() as around:
        await make_table(around.postgres, _TABLE)
        await around.postgres.execute(
            f"insert into {_TABLE} ({COLUMNS}) select {VALUES} from generate_series(1, {rows})"
        )
        await around.postgres.execute(f"vacuum analyze {_TABLE}")
        await around.postgres.execute("select pgtrickle.enable_outbox($1)", _TABLE)
        async with connected_to(around.database_url) as loader:
            for run in range(1, runs + 1):
                results.append(await _turn(around, loader, rows, seconds))
                say(
                    f"backfill {run}/{runs}: {results[-1]['rows_per_s']:,.0f} rows/s,"
                    f" p99 of writers {results[-1]['alone_p99_ms']:.1f} ms alone,"
                    f" {results[-1]['beside_p99_ms']:.1f} ms beside it"
                )
        received = await around.count(
            f"select sum(inserted_count) from pgtrickle.outbox_{_TABLE}"
            " where payload -> 'backfill' is not null"
        )
    figures = {name: median(result[name] for result in results) for name in results[0]}
    return Row(
        name="backfill",
        title=f"rows that are there, beside {WRITERS} writers",
        targets=[
            Target(
                figure="rows into the outbox",
                value=figures["rows_per_s"],
                bound="at least",
                limit=TARGET_ROWS_PER_S,
                unit="/s",
            ),
            Target(
                figure="p99 of writers, times that without",
                value=figures["beside_p99_ms"] / figures["alone_p99_ms"],
                bound="below",
                limit=TARGET_OF_P99,
            ),
            Target(
                figure="writers that failed",
                value=max(result["failed_writers"] for result in results),
                bound="below",
                limit=1,
            ),
        ],
        figures=figures,
        runs=results,
        counted={"sent": rows * runs, "received": received},
    )


async def _turn(
    around: Surroundings, loader: Connection, rows: int, seconds: float
) -> dict[str, float]:
    alone_ms, failed_alone = await _writing(around, rows, asyncio.sleep(seconds))
    started_at = time.perf_counter()
    beside_ms, failed_beside = await _writing(
        around, rows, loader.execute(f"call pgtrickle.backfill('{_TABLE}')", timeout=3600)
    )
    return {
        "rows_per_s": rows / (time.perf_counter() - started_at),
        "alone_p99_ms": alone_ms,
        "beside_p99_ms": beside_ms,
        "failed_writers": float(failed_alone + failed_beside),
    }


async def _writing(
    around: Surroundings, rows: int, meanwhile: Awaitable[object]
) -> tuple[float, int]:
    """The p99 of single-row updates meanwhile, in ms, and how many writers failed."""
    latencies: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(connected_to(around.database_url))
            for _ in range(WRITERS)
        ]
        writers = [
            asyncio.create_task(_write(connection, rows, latencies)) for connection in connections
        ]
        await meanwhile
        failed = sum(writer.done() for writer in writers)
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
    return 1000 * quantiles(latencies, n=100)[98], failed


async def _write(connection: Connection, rows: int, latencies: list[float]) -> None:
    """Update one row after the other at a steady pace, until cancelled."""
    statement = await connection.prepare(f"update {_TABLE} set total = total + 1 where id = $1")
    due_at = time.perf_counter()
    while True:
        due_at += WRITERS / WRITES_PER_S
        await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
        started_at = time.perf_counter()
        await statement.fetch(random.randint(1, rows))  # noqa: S311 - any row
        latencies.append(time.perf_counter() - started_at)
