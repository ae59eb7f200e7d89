"""What a relay says first: where it works, and whether it is about to repeat everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

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
