"""`group`: what a consumer group costs, in the relay and for one commit among many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Final
from uuid import uuid4

import asyncpg

from scripts.benchmark.forward import in_turns
from scripts.benchmark.orders import make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.surroundings import Surroundings, surroundings

TARGET_OF_ALONE: Final = 0.5
TARGET_COMMIT_MS: Final = 10.0

_ALONE: Final = "alone"
_GROUPED: Final = "grouped"
_WORKERS_GROUP: Final = "workers"
_WORKERS: Final = 10
_WORKERS_BATCH: Final = 20
_WORKERS_BYTES: Final = 1_000_000


async def group(*, events: int, runs: int, seconds: float, say: Callable[[str], None]) -> Row:
    """The same backlog by a pipeline without a group and by one worker of a group, in turns.

    Then so many workers poll and commit at once, without a relay, for so many seconds.
    """
    async with surroundings() as around:
        await make_table(around.postgres, "orders")
        await around.postgres.execute("select pgtrickle.enable_outbox('orders')")
        await around.set_pipeline(_ALONE, "orders", is_enabled=False)
        await around.set_pipeline(_GROUPED, "orders", group=_GROUPED, is_enabled=False)
        async with around.relay():
            results, received = await in_turns(
                around, "group", plain=_ALONE, other=_GROUPED, events=events, runs=runs, say=say
            )
        commits_ms, bare_ms = await _commits_ms(around, seconds)
    figures = {name: median(result[name] for result in results) for name in results[0]}
    figures["commit_p50_ms"] = median(commits_ms)
    figures["commit_p99_ms"] = quantiles(commits_ms, n=100)[-1]
    figures["bare_commit_p99_ms"] = quantiles(bare_ms, n=100)[-1]
    say(
        f"group: 99 of 100 commits take less than {figures['commit_p99_ms']:.1f} ms,"
        f" an insert of one row beside them {figures['bare_commit_p99_ms']:.1f} ms"
    )
    return Row(
        name="group",
        title=f"{events:,} outbox events to JetStream by a consumer group of one",
        targets=[
            Target(
                figure="of the same without a group",
                value=100 * figures["of_alone"],
                bound="at least",
                limit=100 * TARGET_OF_ALONE,
                unit="%",
            ),
            Target(
                figure=f"commit_offset p99, {_WORKERS} workers",
                value=figures["commit_p99_ms"],
                bound="below",
                limit=TARGET_COMMIT_MS,
                unit="ms",
            ),
        ],
        figures=figures,
        runs=results,
        counted={"sent": 2 * events * runs, "received": received},
    )


async def _commits_ms(
    around: Surroundings, seconds: float
) -> tuple[Sequence[float], Sequence[float]]:
    """How long each commit took, with as many workers at it, as the relay's, while rows last.

    And how long an insert of one row took beside each: what the disk and the machine cost alone.
    """
    await around.postgres.execute("create table bare (n int)")
    await around.postgres.execute(
        "select pgtrickle.create_consumer_group($1, 'orders', 'earliest')", _WORKERS_GROUP
    )
    found = await asyncio.gather(
        *(_work(around.database_url, f"worker{number}", seconds) for number in range(_WORKERS))
    )
    commits, bare = zip(*(taken for one in found for taken in one), strict=True)
    return commits, bare


async def _work(url: str, consumer: str, seconds: float) -> list[tuple[float, float]]:
    connection = await asyncpg.connect(url)
    taken_ms: list[tuple[float, float]] = []
    try:
        ends_at = time.perf_counter() + seconds
        while time.perf_counter() < ends_at:
            token = uuid4()
            ids = await connection.fetchval(
                "select outbox_ids from pgtrickle.relay_group_poll($1, $2, $3, 30, $4, $3, $5)",
                *(_WORKERS_GROUP, consumer, _WORKERS_BATCH, _WORKERS_BYTES, token),
            )
            if not ids:
                break
            began = time.perf_counter()
            await connection.execute(
                "select pgtrickle.commit_offset($1, $2, $3, $4)",
                *(_WORKERS_GROUP, consumer, ids[-1], token),
            )
            committed = time.perf_counter()
            await connection.execute("insert into bare values (1)")
            ended = time.perf_counter()
            taken_ms.append((1000 * (committed - began), 1000 * (ended - committed)))
    finally:
        await connection.close()
    return taken_ms
