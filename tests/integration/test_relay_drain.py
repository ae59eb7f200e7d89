"""Draining: deliver everything there is, then end, and say truthfully whether it worked."""

from __future__ import annotations

import json
import re
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
    assert drain.stdout == []
    assert drain.stderr[-3:] == [
        "in: 500 delivered, 0 dead-lettered, 0 rows left",
        "out: 2,000 delivered, 0 dead-lettered, 0 rows left",
        "everything is delivered",
    ]
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
    assert re.fullmatch(
        r"bad: 0 delivered, 0 dead-lettered, 1,501 rows left: failed: \$\{env:ABSENT\} .*",
        drain.stderr[-3],
    )
    assert drain.stderr[-1] == "not everything is delivered"


async def test_a_drain_without_any_pipeline_exits_0(world: RelayWorld) -> None:
    drain = await world.relay("drain", is_awaited=False)

    assert await drain.wait() == 0, drain.output


async def test_a_drain_with_a_dead_letter_says_why_and_exits_1(world: RelayWorld) -> None:
    await world.run("select pgtrickle.create_inbox('received')")
    await world.run("alter table pgtrickle.received add check (payload ->> 'id' <> '7')")
    await world.forward("strict", {"type": "pg-inbox", "inbox": "received"})

    drain = await world.relay("drain", is_awaited=False)

    assert await drain.wait() == 1, drain.output
    assert drain.stderr[-2].startswith("strict: 1,999 delivered, 1 dead-lettered, 0 rows left: ")
    assert "violates check constraint" in drain.stderr[-2]


async def test_a_drain_ends_at_its_timeout_though_a_sink_is_unreachable(world: RelayWorld) -> None:
    await world.forward("away", {"type": "nats", "url": "nats://127.0.0.1:1", "stream": "s"})

    drain = await world.relay("drain", "--timeout", "2", "--json", is_awaited=False)

    assert await drain.wait() == 1, drain.output
    report = json.loads(drain.stdout[0])
    (away,) = report["pipelines"]
    assert (report["is_complete"], away["name"], away["delivered"]) == (False, "away", 0)
    assert away["left"] == 1501  # one statement of 500 orders, and 1,500 single ones
    assert away["reason"].startswith("not done within 2 s; ")
    assert "Connection refused" in away["reason"]


async def test_a_drain_without_a_timeout_ends_where_nothing_moves(world: RelayWorld) -> None:
    await world.forward("away", {"type": "nats", "url": "nats://127.0.0.1:1", "stream": "s"})

    drain = await world.relay("drain", "metrics.stalled_after_s=1", is_awaited=False)

    assert await drain.wait() == 1, drain.output
    assert "left: nothing was delivered for 1 s" in drain.stderr[-2]


async def test_a_drain_beside_a_running_relay_names_it(world: RelayWorld) -> None:
    await world.to_file("out")
    running = await world.relay("relay.worker_id=first")
    await running.wait_for_log("running")

    drain = await world.relay("drain", is_awaited=False)

    assert await drain.wait() == 1, drain.output
    assert "another relay of the group runs it: first" in drain.stderr[-2]
