"""A position is moved under a relay at work: it notices, says so, and sends from there."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from relay.events import LeaseExpired
from tests.effects.relay_at_work import Catalog, at_work, lines, to_file
from tests.servers.postgres import Database

NOTICED_WITHIN_S = 1.0


@pytest.fixture
async def catalog(migrated_database: Database) -> AsyncIterator[Catalog]:
    connection = await asyncpg.connect(migrated_database.dsn)
    yield Catalog(migrated_database.dsn, connection)
    await connection.close()


@pytest.mark.parametrize("group", [None, "sharers"])
async def test_an_idle_pipeline_notices_within_a_second_that_it_was_moved(
    catalog: Catalog, tmp_path: Path, group: str | None
) -> None:
    await catalog.orders()
    await catalog.insert(1, 5)
    source = {"outbox": "orders"} | ({"consumer_group": group} if group else {})
    await catalog.forward("p", to_file(tmp_path / "out"), source=source)

    async with at_work(catalog.dsn) as relay:
        await relay.until_acknowledged(5, "p")
        await relay.a_while("p")
        before = relay.acknowledged("p")
        moved_s = time.monotonic()
        again = await catalog.value("select pgtrickle.relay_seek('p', 3)")
        await relay.heard.until(lambda: relay.acknowledged("p") == before + 3)
        took_s = time.monotonic() - moved_s
        if group is None:
            assert "relay_seek" in relay.heard.of(LeaseExpired)[0].reason
        await catalog.insert(6, 6)
        await relay.until_acknowledged(before + 4, "p")

    assert again == 3
    assert took_s < NOTICED_WITHIN_S + 1
    assert [line["key"] for line in lines(tmp_path / "out")] == [*"12345", *"345", "6"]
