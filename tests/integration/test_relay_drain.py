"""Draining: deliver everything there is, then end, and say truthfully whether it worked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.relay_surroundings import (
    RelayWorld,
    StartProcess,
    events_in,
    relay_world,
)
from tests.servers.postgres import Database


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        await world.run("insert into orders (id) select generate_series(1, 500)")
        await world.insert(501, 2000)
        yield world


async def test_a_drain_delivers_everything_in_both_directions_and_exits_0(
    world: RelayWorld,
) -> None:
    output = await world.to_file("out", batch_size=100)
    lines = world.directory / "in.jsonl"
    lines.write_text("".join(f'{{"id": {id_}}}\n' for id_ in range(1, 501)))
    await world.reverse("in", {"type": "file", "input": str(lines)}, "arrived")
    await world.to_file("off")
    await world.run("select pgtrickle.disable_relay('off')")

    drain = await world.relay("drain", is_awaited=False)

    assert await drain.wait() == 0, drain.output
    assert [event.id for event in events_in(output)] == list(range(1, 2001))
    assert len(await world.inbox_keys("arrived")) == 500
    again = await world.relay("drain", is_awaited=False)
    assert await again.wait() == 0, again.output
    assert len(events_in(output)) == 2000
    assert len(await world.inbox_keys("arrived")) == 500


async def test_a_drain_with_a_pipeline_that_can_not_run_delivers_the_others_and_exits_1(
    world: RelayWorld,
) -> None:
    output = await world.to_file("out")
    await world.forward(
        "bad", {"type": "nats", "url": "nats://127.0.0.1:1", "token": "${env:ABSENT}"}
    )

    drain = await world.relay("drain", is_awaited=False)

    assert await drain.wait() == 1, drain.output
    assert len(events_in(output)) == 2000
    assert any("${env:ABSENT}" in line for line in drain.stderr)


async def test_a_drain_without_any_pipeline_exits_0(world: RelayWorld) -> None:
    drain = await world.relay("drain", is_awaited=False)

    assert await drain.wait() == 0, drain.output
