"""`shape`: what a condition over two fields and a column that is left out cost."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Final

import msgspec

from scripts.benchmark.forward import in_turns
from scripts.benchmark.orders import make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.surroundings import surroundings

TARGET_PER_S: Final = 25_000.0

_WHOLE: Final = "whole"
_SHAPED: Final = "shaped"
# Every row fulfils it, so that both pipelines publish as much.
_KEYS: Final = {"where": 'payload.status == "new" && payload.total > 10', "exclude": ["note"]}


async def shape(*, events: int, runs: int, say: Callable[[str], None]) -> Row:
    """The same backlog by a pipeline without a shape and by one with a condition, in turns."""
    async with surroundings() as around:
        await make_table(around.postgres, "orders")
        await around.postgres.execute("select pgtrickle.enable_outbox('orders')")
        for pipeline in (_WHOLE, _SHAPED):
            await around.set_pipeline(pipeline, "orders", is_enabled=False)
        await around.postgres.execute(
            "select pgtrickle.set_relay_outbox("
            "$1, pgtrickle.get_relay_config($1) || $2::text::jsonb, false)",
            *(_SHAPED, msgspec.json.encode(_KEYS).decode()),
        )
        async with around.relay():
            results, received = await in_turns(
                around, "shape", plain=_WHOLE, other=_SHAPED, events=events, runs=runs, say=say
            )
    figures = {name: median(result[name] for result in results) for name in results[0]}
    return Row(
        name="shape",
        title=f"{events:,} outbox events, chosen and shaped",
        targets=[
            Target(
                figure="events a second",
                value=figures["per_s"],
                bound="at least",
                limit=TARGET_PER_S,
                unit="/s",
            )
        ],
        figures=figures,
        runs=results,
        counted={"sent": 2 * events * runs, "received": received},
    )
