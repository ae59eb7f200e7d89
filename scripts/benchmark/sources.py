"""`from-<backend>`: the messages of an origin into an inbox, through one pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from scripts.benchmark.backends import Origin, at_most, source_backend
from scripts.benchmark.inbox import Inbox
from scripts.benchmark.row import Row, Target
from scripts.benchmark.sinks import beside_floors, of_floor, told
from scripts.benchmark.surroundings import Surroundings, surroundings

INBOX: Final = "arrived"


async def from_origin(
    name: str, *, events: int, runs: int, target_of_floor: float, say: Callable[[str], None]
) -> Row:
    """Measure so many runs, each with its own floor; the figures are their medians.

    The floor is the slower of two: a bare client that reads and acknowledges the same messages,
    and bare asyncpg that writes the same rows into the same table. A run before them warms what
    gets faster while it runs, and does not count. Raises `ServerMissing`.
    """
    backend = source_backend(name)
    events = at_most(events, backend.most_events)
    results: list[dict[str, float]] = []
    received = 0
    async with surroundings() as around, backend.opened(around) as origin:
        await around.postgres.execute("select pgtrickle.create_inbox($1)", INBOX)
        inbox = Inbox(around.postgres, f"pgtrickle.{INBOX}")
        async with around.relay(secret=origin.environment):
            for run in range(runs + 1):
                keys, result = await _run(around, origin, inbox, f"from-{name}-{run}", events)
                if run == 0:
                    continue
                received += keys
                results.append(result)
                say(f"from-{name} {run}/{runs}: {told(result)}")
    figures = {figure: median(result[figure] for result in results) for figure in results[0]}
    slowest = min(result["per_s"] for result in results)
    return Row(
        name=f"from-{name}",
        title=f"{events:,} messages from {backend.title} to an inbox",
        targets=[
            *_at_least("messages a second", figures["per_s"], backend.target_per_s),
            of_floor(figures, target_of_floor),
            *_at_least("slowest run", slowest, backend.hard_bar_per_s),
        ],
        figures=figures,
        runs=results,
        counted={"sent": events * runs, "received": received},
    )


def _at_least(figure: str, value: float, limit: float | None) -> Sequence[Target]:
    if limit is None:
        return ()
    return (Target(figure=figure, value=value, bound="at least", limit=limit, unit="/s"),)


async def _run(
    around: Surroundings, origin: Origin, inbox: Inbox, pipeline: str, events: int
) -> tuple[int, dict[str, float]]:
    """How many different messages arrived, and how fast."""
    await inbox.empty()
    await origin.fill(events)
    await around.reverse(pipeline, INBOX, origin.source())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(origin.send())
        stretch = await inbox.until_holding(events, timeout_s=60 + events / 50)
    await around.delete_pipeline(pipeline)
    keys = await inbox.read()
    read_per_s = await origin.floor()
    write_per_s = await inbox.floor()
    protocol_per_s = await origin.protocol_floor()
    return len(keys), beside_floors(stretch.per_s, read_per_s, write_per_s, protocol_per_s)
