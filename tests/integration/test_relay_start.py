"""What a relay says first: where it works, and whether it is about to repeat everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from relay.locks import lock_key
from tests.integration.relay_surroundings import RelayWorld, StartProcess, relay_world
from tests.servers.postgres import Database

NEW_HERE = "is new here and delivers everything from the start again"


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        await world.to_file("out")
        yield world


async def test_the_first_line_says_version_group_database_address_and_number_of_pipelines(
    world: RelayWorld,
) -> None:
    relay = await world.relay("relay.group_id=blue")

    first = relay.stderr[0]

    assert "pgtrickle-relay 0.29.0: group blue" in first
    assert f"database {world.database.name} as relay_member at 127.0.0.1:" in first
    assert f"http 127.0.0.1:{relay.metrics_port}" in first
    assert first.rstrip().endswith("1 pipeline")


async def test_a_group_that_is_new_while_others_have_positions_is_said_loudly(
    world: RelayWorld,
) -> None:
    first = await world.relay("relay.group_id=production")
    await first.wait_for_log("running")
    await first.terminate()
    again = await world.relay("relay.group_id=production")
    await again.wait_for_log("running")
    await again.terminate()

    mistyped = await world.relay("relay.group_id=prodution")

    warning = await mistyped.wait_for_log(NEW_HERE)
    assert "WARNING" in warning
    assert "others have positions: production" in warning
    assert not [line for line in first.stderr + again.stderr if NEW_HERE in line]


async def test_a_pipeline_whose_lock_a_stranger_holds_is_named_everywhere_until_it_is_free(
    world: RelayWorld,
) -> None:
    key = lock_key("pipeline", "default", "out")
    stranger = await asyncpg.connect(
        world.database.dsn, server_settings={"application_name": "psql"}
    )
    await stranger.execute("select pg_advisory_lock($1)", key)
    relay = await world.relay()

    line = await relay.wait_for_log("blocked")

    who = f"pid {stranger.get_server_pid()}, role postgres, application psql"
    assert who in line
    blocked = await world.until_state(relay, "out", "blocked")
    health = await world.health(relay)
    assert (health.status, blocked.healthy) == ("degraded", False)
    assert who in health.reason
    assert who in blocked.reason
    await stranger.close()
    await world.until_state(relay, "out", "running")
    assert (await world.health(relay)).status == "healthy"
