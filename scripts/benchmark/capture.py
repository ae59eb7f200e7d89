"""`capture`: what an outbox costs those who write the table."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

from scripts.benchmark.orders import COLUMNS, VALUES, make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.surroundings import (
    STREAM,
    Surroundings,
    libpq_environment,
    pgbench,
    surroundings,
)

CONNECTIONS: Final = 16
TARGET: Final = 0.6

_PLAIN: Final = "plain_orders"
_CAPTURED: Final = "captured_orders"
_DELIVERED: Final = "delivered_orders"
_BACKLOG: Final = "backlog_orders"
# More than the relay can deliver beside the load, so that it is busy to its end.
_BACKLOG_PER_S: Final = 110_000
_BACKLOG_ROWS: Final = 500
_RATE: Final = re.compile(rb"^tps = ([0-9.]+)", re.MULTILINE)


async def capture(*, seconds: float, runs: int, say: Callable[[str], None]) -> Row:
    """Commits a second of single-row inserts with an outbox, as parts of those without.

    The loads take turns, ``seconds`` each: with an idle relay; beside a relay that is busy with
    the backlog of another table, the same in both; and into an outbox that the relay delivers
    meanwhile, whose part of the processors comes on top.
    """
    results: list[dict[str, float]] = []
    async with surroundings() as around:
        for table in (_PLAIN, _CAPTURED, _DELIVERED, _BACKLOG):
            await make_table(around.postgres, table)
        await around.postgres.execute(
            "select pgtrickle.enable_outbox(t) from unnest($1::text[]) as t",
            [_CAPTURED, _DELIVERED, _BACKLOG],
        )
        await around.fresh_stream()
        sent = received = 0
        await around.set_pipeline("delivered", _DELIVERED)
        await around.set_pipeline("backlog", _BACKLOG)
        async with around.relay():
            for run in range(1, runs + 1):
                # The server has room for some turns only.
                await around.fresh_stream()
                before = await _written(around)
                result = await _turn(around, seconds, before)
                results.append(result)
                sent += await _written(around) - before
                received += (await around.nats.state_of(STREAM)).messages
                say(
                    f"capture {run}/{runs}: {result['plain_per_s']:,.0f} commits/s without,"
                    f" {result['alone']:.0%} with, {result['beside_busy_relay']:.0%} beside a busy"
                    f" relay, {result['while_delivered']:.0%} while delivered"
                )
    figures = {name: median(result[name] for result in results) for name in results[0]}
    return Row(
        name="capture",
        title=f"commits of {CONNECTIONS} connections with an outbox",
        targets=[
            Target(
                figure=figure,
                value=100 * figures[name],
                bound="at least",
                limit=100 * TARGET,
                unit="%",
            )
            for figure, name in (
                ("of the commits without an outbox", "alone"),
                ("the same, both beside a busy relay", "beside_busy_relay"),
            )
        ],
        figures=figures,
        runs=results,
        counted={"sent": sent, "received": received},
    )


async def _turn(around: Surroundings, seconds: float, written: int) -> dict[str, float]:
    """Every load once, between two plain ones: what drifts meanwhile counts half on each side.

    ``written``: how many events there were before this turn.
    """
    before = await _commits_per_s(around, _PLAIN, seconds)
    captured = await _commits_per_s(around, _CAPTURED, seconds)
    delivered = await _commits_per_s(around, _DELIVERED, seconds)
    await _until_delivered(around, written)
    after = await _commits_per_s(around, _PLAIN, seconds)
    busy_plain = await _commits_beside_busy_relay(around, _PLAIN, seconds, written)
    busy_captured = await _commits_beside_busy_relay(around, _CAPTURED, seconds, written)
    plain = (before + after) / 2
    return {
        "plain_per_s": plain,
        "captured_per_s": captured,
        "delivered_per_s": delivered,
        "busy_plain_per_s": busy_plain,
        "busy_captured_per_s": busy_captured,
        "alone": captured / plain,
        "beside_busy_relay": busy_captured / busy_plain,
        "while_delivered": delivered / plain,
    }


async def _commits_beside_busy_relay(
    around: Surroundings, table: str, seconds: float, written: int
) -> float:
    statements = max(1, round(seconds * _BACKLOG_PER_S / _BACKLOG_ROWS))
    await around.postgres.execute(
        f"do $$ begin for n in 1..{statements} loop insert into {_BACKLOG} ({COLUMNS})"
        f" select {VALUES} from generate_series(1, {_BACKLOG_ROWS}); end loop; end $$"
    )
    rate = await _commits_per_s(around, table, seconds)
    await _until_delivered(around, written)
    return rate


async def _commits_per_s(around: Surroundings, table: str, seconds: float) -> float:
    with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-") as directory:
        script = Path(directory) / "insert.sql"
        await asyncio.to_thread(
            script.write_text, f"insert into {table} ({COLUMNS}) values ({VALUES});\n"
        )
        process = await asyncio.create_subprocess_exec(
            *(pgbench(), "--no-vacuum", "--file", script, "--client", str(CONNECTIONS)),
            *("--jobs", "1", "--time", str(max(1, round(seconds)))),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(libpq_environment(around.database_url)),
        )
        output, errors = await process.communicate()
    rate = _RATE.search(output)
    if process.returncode != 0 or rate is None:
        raise RuntimeError(f"pgbench failed: {errors.decode(errors='replace')}")
    return float(rate[1])


async def _until_delivered(around: Surroundings, before: int) -> None:
    rows = await _written(around) - before
    await around.nats.until_stored(STREAM, rows, timeout_s=60 + rows / 1000)


async def _written(around: Surroundings) -> int:
    return await around.count(
        f"select (select count(*) from {_DELIVERED}) + (select count(*) from {_BACKLOG})"
    )
