"""`to-<backend>`: the events of an outbox into a destination, through one pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Final

from relay.settings import RelaySettings
from scripts.benchmark.backends import Destination, at_most, sink_backend
from scripts.benchmark.orders import COLUMNS, VALUES, make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.surroundings import Surroundings, surroundings

TARGET_OF_FLOOR: Final = 0.5
# As many as the relay reads at a time by default.
PAGE_ROWS: Final = RelaySettings().batch_size


async def to_destination(
    name: str, *, events: int, runs: int, target_of_floor: float, say: Callable[[str], None]
) -> Row:
    """Measure so many runs, each with its own floor; the figures are their medians.

    A run before them warms what gets faster while it runs, and does not count. Each run delivers
    the same outbox of ``events`` rows, each captured from a statement of its own, through a new
    pipeline from its beginning. The floor is the slower of two: bare asyncpg that reads the same
    rows, and a bare client that writes the same bytes to the destination. Raises `ServerMissing`.
    """
    backend = sink_backend(name)
    events = at_most(events, backend.most_events)
    results: list[dict[str, float]] = []
    received = 0
    async with surroundings() as around, backend.opened(around) as destination:
        await _fill(around, events)
        async with around.relay(secret=destination.environment):
            for run in range(runs + 1):
                keys, result = await _run(around, destination, f"to-{name}-{run}", events)
                if run == 0:
                    continue
                received += keys
                results.append(result)
                say(f"to-{name} {run}/{runs}: {told(result)}")
    figures = {figure: median(result[figure] for result in results) for figure in results[0]}
    return Row(
        name=f"to-{name}",
        title=f"{events:,} outbox events to {backend.title}",
        targets=[of_floor(figures, target_of_floor)],
        figures=figures,
        runs=results,
        counted={"sent": events * runs, "received": received},
    )


def beside_floors(
    per_s: float, read_per_s: float, write_per_s: float, protocol_per_s: float | None
) -> dict[str, float]:
    """The figures of a run: how fast it was, and its floor, the slower of the two."""
    floor_per_s = min(read_per_s, write_per_s)
    figures = {} if protocol_per_s is None else {"protocol_per_s": protocol_per_s}
    return figures | {
        "per_s": per_s,
        "floor_per_s": floor_per_s,
        "read_floor_per_s": read_per_s,
        "write_floor_per_s": write_per_s,
        "of_floor": per_s / floor_per_s,
    }


def told(figures: dict[str, float]) -> str:
    """These figures in a line of progress."""
    past_library = figures.get("protocol_per_s")
    return (
        f"{figures['per_s']:,.0f}/s, floor {figures['floor_per_s']:,.0f}/s"
        f" (reading {figures['read_floor_per_s']:,.0f},"
        f" writing {figures['write_floor_per_s']:,.0f}"
        + ("" if past_library is None else f", past the library {past_library:,.0f}")
        + ")"
    )


def of_floor(figures: dict[str, float], limit: float) -> Target:
    """The target of every row that has a floor."""
    return Target(
        figure=f"of the floor, {figures['per_s']:,.0f} of {figures['floor_per_s']:,.0f}/s",
        value=100 * figures["of_floor"],
        bound="at least",
        limit=100 * limit,
        unit="%",
    )


async def _fill(around: Surroundings, events: int) -> None:
    await make_table(around.postgres, "orders")
    await around.postgres.execute("select pgtrickle.enable_outbox('orders')")
    await around.postgres.execute(
        f"do $$ begin for n in 1..{events} loop"
        f" insert into orders ({COLUMNS}) values ({VALUES}); end loop; end $$"
    )
    await around.postgres.execute("vacuum analyze pgtrickle.outbox_orders")


async def _run(
    around: Surroundings, destination: Destination, pipeline: str, events: int
) -> tuple[int, dict[str, float]]:
    """How many different events arrived, and how fast."""
    await destination.empty()
    await around.forward(pipeline, "orders", destination.sink())
    stretch = await destination.until_holding(events, timeout_s=60 + events / 50)
    await around.delete_pipeline(pipeline)
    keys = await destination.read()
    read_per_s = await _read_floor(around, events)
    write_per_s = await destination.floor()
    protocol_per_s = await destination.protocol_floor()
    return len(keys), beside_floors(stretch.per_s, read_per_s, write_per_s, protocol_per_s)


async def _read_floor(around: Surroundings, events: int) -> float:
    """Outbox rows a second of bare asyncpg that reads them in order and does nothing with them.

    Raises `RuntimeError` where not all are there.
    """
    page = await around.postgres.prepare(
        "select id, refresh_id, created_at, inserted_count, deleted_count, is_claim_check, payload,"
        " headers from pgtrickle.outbox_orders where id > $1 order by id limit $2"
    )
    seen = last_id = 0
    started = time.perf_counter()
    while rows := await page.fetch(last_id, PAGE_ROWS):
        seen += len(rows)
        last_id = rows[-1]["id"]
    elapsed_s = time.perf_counter() - started
    if seen != events:
        raise RuntimeError(f"{seen} of {events} outbox rows were read")
    return seen / elapsed_s
