"""What the tests with several nodes share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.relay_surroundings import RelayWorld, StartProcess, relay_world
from tests.servers.postgres import Database


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    """Relays and a captured table of orders."""
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world
