"""`forward`: captured single-row events from an outbox into JetStream, through one pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Final

from scripts.benchmark.bare_nats import StoredMessage
from scripts.benchmark.floor import floor_rate, protocol_rate
from scripts.benchmark.orders import COLUMNS, VALUES, make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.surroundings import STREAM, Surroundings, surroundings

TARGET_PER_S: Final = 40_000.0
HARD_BAR_PER_S: Final = 10_000.0
TARGET_OF_FLOOR: Final = 0.5

_PIPELINE: Final = "orders-to-jetstream"
_MESSAGE_ID: Final = b"Nats-Msg-Id: "


async def forward(*, events: int, runs: int, say: Callable[[str], None]) -> Row:
    """Measure so many runs, each with its own floor; the figures are their medians.

    Each run drains a backlog of ``events`` outbox rows, each captured from a statement of its own.
    """
    results: list[dict[str, float]] = []
    received = 0
    async with surroundings() as around:
        await make_table(around.postgres, "orders")
        await around.postgres.execute("select pgtrickle.enable_outbox('orders')")
        await around.set_pipeline(_PIPELINE, "orders", is_enabled=False)
        async with around.relay():
            for run in range(1, runs + 1):
                await fill(around, events)
                result, stored = await drain(around, _PIPELINE, events)
                received += len({_message_id(message) for message in stored})
                result["floor_per_s"] = await floor_rate(around, stored)
                result["protocol_per_s"] = await protocol_rate(around, stored)
                result["of_floor"] = result["per_s"] / result["floor_per_s"]
                results.append(result)
                say(
                    f"forward {run}/{runs}: {result['per_s']:,.0f}/s,"
                    f" floor {result['floor_per_s']:,.0f}/s,"
                    f" past the library {result['protocol_per_s']:,.0f}/s"
                )
    figures = {name: median(result[name] for result in results) for name in results[0]}
    return Row(
        name="forward",
        title=f"{events:,} outbox events to JetStream",
        targets=[
            Target(
                figure="events a second",
                value=figures["per_s"],
                bound="at least",
                limit=TARGET_PER_S,
                unit="/s",
            ),
            Target(
                figure="of the floor",
                value=100 * figures["of_floor"],
                bound="at least",
                limit=100 * TARGET_OF_FLOOR,
                unit="%",
            ),
            Target(
                figure="slowest run",
                value=min(result["per_s"] for result in results),
                bound="at least",
                limit=HARD_BAR_PER_S,
                unit="/s",
            ),
        ],
        figures=figures,
        runs=results,
        counted={"sent": events * runs, "received": received},
    )


async def fill(around: Surroundings, events: int) -> None:
    """So many more rows in the outbox of `orders`, each of a statement of its own."""
    await around.postgres.execute(
        f"do $$ begin for n in 1..{events} loop"
        f" insert into orders ({COLUMNS}) values ({VALUES}); end loop; end $$"
    )
    await around.postgres.execute("vacuum analyze pgtrickle.outbox_orders")


async def drain(
    around: Surroundings, pipeline: str, events: int
) -> tuple[dict[str, float], list[StoredMessage]]:
    """Let the relay deliver the backlog. By the stream's own clock, from its first message on."""
    await around.fresh_stream()
    enabled_at = time.time()
    await around.postgres.execute("select pgtrickle.enable_relay($1)", pipeline)
    state = await around.nats.until_stored(STREAM, events, timeout_s=60 + events / 1000)
    await around.postgres.execute("select pgtrickle.disable_relay($1)", pipeline)
    stored = await around.nats.read(STREAM, state.messages)
    first_at, last_at = seconds_of(state.first_ts), seconds_of(state.last_ts)
    sizes = [len(message.body) for message in stored]
    return {
        "per_s": events / max(last_at - first_at, 1e-6),
        "per_s_with_start": events / max(last_at - enabled_at, 1e-6),
        "body_bytes": median(sizes),
    }, stored


async def in_turns(
    around: Surroundings,
    row: str,
    *,
    plain: str,
    other: str,
    events: int,
    runs: int,
    say: Callable[[str], None],
) -> tuple[list[dict[str, float]], int]:
    """The same backlog by a pipeline that has what the row is about, and by a plain one.

    A result of each turn, named after the plain one, and how many events arrived in all.
    """
    results: list[dict[str, float]] = []
    received = 0
    for run in range(1, runs + 1):
        await fill(around, events)
        without, stored = await drain(around, plain, events)
        received += len(stored)
        measured, stored = await drain(around, other, events)
        received += len(stored)
        per_s, plain_per_s = measured["per_s"], without["per_s"]
        results.append(
            {"per_s": per_s, f"{plain}_per_s": plain_per_s, f"of_{plain}": per_s / plain_per_s}
        )
        say(f"{row} {run}/{runs}: {per_s:,.0f}/s, without a {row} {plain_per_s:,.0f}/s")
    return results, received


def _message_id(message: StoredMessage) -> bytes:
    return message.block.partition(_MESSAGE_ID)[2].partition(b"\r\n")[0]


def seconds_of(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time in UTC with nanoseconds."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    moment = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return moment.timestamp() + float(f"0.{fraction or '0'}")
