"""Each setting of a relay, changed, and what is different then."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from relay.events import LagObserved, OwnershipChanged, PipelineState
from relay.locks import Locks
from relay.settings import (
    FileSettings,
    MetricsSettings,
    PostgresSettings,
    SecretSettings,
)
from tests.effects.relay_at_work import BOUND_S, AtWork, Catalog, at_work, lines, to_file
from tests.servers.finding import free_port
from tests.servers.postgres import Database

NATS_SECRET = {
    "type": "nats",
    "url": "nats://127.0.0.1:1",
    "user": "u",
    "password": "${env:RELAY_PASS}",
}


@pytest.fixture
async def catalog(migrated_database: Database) -> AsyncIterator[Catalog]:
    connection = await asyncpg.connect(migrated_database.dsn)
    yield Catalog(migrated_database.dsn, connection)
    await connection.close()


def nowhere() -> dict[str, object]:
    """A sink that can't be reached."""
    return {"type": "nats", "url": f"nats://127.0.0.1:{free_port()}"}


async def one_to_file(catalog: Catalog, path: Path, rows: int = 1) -> None:
    await catalog.orders()
    await catalog.insert(1, rows)
    await catalog.forward("p", to_file(path))


# The relay and its group


@pytest.mark.shows("setting:relay.group_id")
async def test_each_group_delivers_everything(catalog: Catalog, tmp_path: Path) -> None:
    await one_to_file(catalog, tmp_path / "out.jsonl", rows=3)

    for group in ("blue", "blue", "green"):
        async with at_work(catalog.dsn, relay={"group_id": group}) as relay:
            await relay.until_state("p", PipelineState.RUNNING)
            await relay.a_while("p")

    assert [line["outbox_id"] for line in lines(tmp_path / "out.jsonl")] == [1, 2, 3, 1, 2, 3]


@pytest.mark.shows("setting:relay.worker_id", "setting:relay.report_interval_s")
async def test_a_relay_reports_to_the_fleet_under_its_name(catalog: Catalog) -> None:
    seen: dict[str, set[object]] = {"often": set(), "seldom": set()}

    async with (
        at_work(catalog.dsn, relay={"worker_id": "often", "report_interval_s": 0.05}),
        at_work(catalog.dsn, relay={"worker_id": "seldom", "report_interval_s": 60.0}),
        asyncio.timeout(BOUND_S),
    ):
        while len(seen["often"]) < 5 or not seen["seldom"]:
            for row in await catalog.connection.fetch("select * from pgtrickle.relay_fleet()"):
                seen[row["worker_id"]].add(row["last_seen_at"])

    assert len(seen["seldom"]) == 1


@pytest.mark.shows("setting:relay.max_pipelines")
async def test_a_relay_runs_no_more_pipelines_than_its_limit(
    catalog: Catalog, tmp_path: Path
) -> None:
    await catalog.orders()
    for number in range(3):
        await catalog.forward(f"p{number}", to_file(tmp_path / f"{number}.jsonl"))

    async with at_work(catalog.dsn, relay={"max_pipelines": 2}) as relay:
        await relay.a_while("p0")
        assert max(len(one.pipelines) for one in relay.heard.of(OwnershipChanged)) == 2
    async with at_work(catalog.dsn) as relay:
        await relay.heard.until(
            lambda: any(len(one.pipelines) == 3 for one in relay.heard.of(OwnershipChanged))
        )


_LAST_LOOKS = """
select lock.query_start
from pg_stat_activity as lock
where lock.datname = current_database()
    and lock.application_name like '% lock'
    and (lock.query like '%pg_try_advisory_lock%' or lock.query like '%pg_locks%')
    and 2 = (
        select count(*)
        from pg_stat_activity as listen
        where listen.datname = current_database()
            and listen.application_name like '% listen'
            and listen.query like '%pgtrickle_outbox_new%'
    )
order by lock.query_start
"""


@pytest.mark.shows("setting:relay.coordinate_interval_s")
async def test_who_looks_more_often_takes_what_becomes_free(
    catalog: Catalog, tmp_path: Path
) -> None:
    await one_to_file(catalog, tmp_path / "out.jsonl")
    holder = Locks(PostgresSettings(url=catalog.dsn), "default")
    await holder.open(lambda: None)
    await holder.try_acquire("p")

    async with (
        contextlib.aclosing(holder),
        at_work(catalog.dsn, relay={"coordinate_interval_s": 0.05}) as often,
        at_work(catalog.dsn, relay={"coordinate_interval_s": 30.0}) as seldom,
    ):
        # Each looks once more when its notifications begin, since it may have missed some. After
        # that one looks again and again while the holder and the other do not.
        looks: list[object] = []
        quiet = 0
        async with asyncio.timeout(BOUND_S):
            while quiet < 20:
                last = [row["query_start"] for row in await catalog.connection.fetch(_LAST_LOOKS)]
                if len(last) == 3 and last != looks:
                    quiet = quiet + 1 if last[:-1] == looks[:-1] else 0
                    looks = last
                await asyncio.sleep(0.01)
        await holder.release("p")

        await often.until_acknowledged(1, "p")
        assert seldom.states("p") == []


@pytest.mark.shows("setting:relay.shutdown_timeout_s")
async def test_what_is_in_flight_has_so_long_to_finish(catalog: Catalog) -> None:
    await catalog.orders()
    await catalog.insert(1, 1)
    await catalog.run("select pgtrickle.create_inbox('received')")
    await catalog.forward("p", {"type": "pg-inbox", "inbox": "received"})

    async def stopped_while_it_writes(timeout_s: float, *, release: bool) -> tuple[bool, float]:
        async with at_work(catalog.dsn, relay={"shutdown_timeout_s": timeout_s}) as relay:
            async with catalog.connection.transaction():
                await catalog.run("lock table pgtrickle.received in access exclusive mode")
                await relay.heard.until(lambda: relay.polled("p") == [1])
                started = time.monotonic()
                relay.relay.coordinator.stop()
                if not release:
                    await relay.task
            return await relay.task, time.monotonic() - started

    in_vain = await stopped_while_it_writes(0.3, release=False)
    in_time = await stopped_while_it_writes(20.0, release=True)

    assert in_vain[0] is False
    assert 0.3 <= in_vain[1] < 5
    assert in_time[0] is True
    assert await catalog.value("select count(*) from pgtrickle.received") == 1


@pytest.mark.shows("setting:relay.failed_retry_s")
async def test_a_failed_pipeline_is_tried_again_after_so_long(catalog: Catalog) -> None:
    await catalog.orders()
    await catalog.forward("p", NATS_SECRET)

    async with at_work(catalog.dsn, relay={"failed_retry_s": 0.1}) as relay:
        await relay.heard.until(lambda: len(relay.reasons("p")) == 4)
    async with at_work(catalog.dsn, relay={"failed_retry_s": 60.0}) as relay:
        await relay.a_while("p")
        assert len(relay.reasons("p")) == 1


@pytest.mark.shows("setting:relay.sweep_interval_s")
async def test_delivered_rows_past_their_retention_are_removed_so_often(
    catalog: Catalog, tmp_path: Path
) -> None:
    await one_to_file(catalog, tmp_path / "out.jsonl", rows=3)
    left = "select count(*) from pgtrickle.outbox_orders"

    async def old_and_delivered(relay: AtWork) -> None:
        await relay.until_acknowledged(3, "p")
        await catalog.run(
            "update pgtrickle.outbox_orders set created_at = now() - interval '99 days'"
        )

    async with at_work(catalog.dsn, relay={"sweep_interval_s": 60.0}) as relay:
        await old_and_delivered(relay)
        await relay.a_while("p")
        assert await catalog.value(left) == 3
    async with at_work(catalog.dsn, relay={"sweep_interval_s": 0.1}), asyncio.timeout(BOUND_S):
        while await catalog.value(left) != 0:  # noqa: ASYNC110 - a sweep is told to nobody
            await asyncio.sleep(0.01)


# Measuring


@pytest.mark.shows("setting:metrics.lag_interval_s")
async def test_lag_is_measured_so_often(catalog: Catalog, tmp_path: Path) -> None:
    await one_to_file(catalog, tmp_path / "out.jsonl")

    async def measured(interval_s: float, *, rows: int) -> int:
        metrics = MetricsSettings(addr="127.0.0.1:0", lag_interval_s=interval_s)
        async with at_work(catalog.dsn, metrics=metrics) as relay:
            await relay.until_state("p", PipelineState.RUNNING)
            for id_ in range(2 + rows, 22 + rows):
                await catalog.insert(id_, id_)
                await relay.until_acknowledged(id_ - rows - 1, "p")
                await asyncio.sleep(0.02)
            return len(relay.heard.of(LagObserved))

    assert await measured(0.05, rows=0) >= 4
    assert await measured(60.0, rows=20) <= 1


@pytest.mark.shows("setting:metrics.stalled_after_s")
async def test_a_pipeline_without_progress_is_stalled_after_so_long(catalog: Catalog) -> None:
    await catalog.orders()
    await catalog.insert(1, 1)
    await catalog.forward("p", nowhere())

    def measured(stalled_after_s: float) -> MetricsSettings:
        return MetricsSettings(
            addr="127.0.0.1:0", lag_interval_s=0.05, stalled_after_s=stalled_after_s
        )

    async with (
        at_work(catalog.dsn, metrics=measured(0.2)) as soon,
        at_work(catalog.dsn, metrics=measured(60.0), relay={"group_id": "other"}) as late,
    ):
        await soon.heard.until(lambda: _is_stalled(soon) is True)
        await late.heard.until(lambda: _is_stalled(late) is False)


def _is_stalled(relay: AtWork) -> bool | None:
    """Whether the pipeline is stalled; None while nothing is known of it."""
    pipelines = relay.relay.board.snapshot().pipelines
    return next((one.is_stalled for one in pipelines if one.name == "p"), None)


# What pipelines may reach


@pytest.mark.shows("setting:secrets.env_allow")
async def test_a_reference_to_a_variable_obeys_the_allow_list(catalog: Catalog) -> None:
    await catalog.orders()
    await catalog.forward("p", NATS_SECRET)
    await catalog.forward("q", {**NATS_SECRET, "password": "${env:OTHER}"})
    environment = {"RELAY_PASS": "hunter2", "OTHER": "hunter2"}

    async with at_work(catalog.dsn, environment=environment) as relay:
        await relay.heard.until(lambda: relay.reasons("q") != [])
        assert "is not on the allow-list" in relay.reasons("q")[0]
        await relay.until_state("p", PipelineState.RETRYING)
        assert relay.reasons("p") == []
    closed = SecretSettings(env_allow=("OTH*",))
    async with at_work(catalog.dsn, environment=environment, secrets=closed) as relay:
        await relay.heard.until(lambda: relay.reasons("p") != [])
        assert "is not on the allow-list" in relay.reasons("p")[0]
    opened = SecretSettings(env_allow=None)
    async with at_work(catalog.dsn, environment=environment, secrets=opened) as relay:
        await relay.until_state("p", PipelineState.RETRYING)
        assert relay.reasons("p") == []


@pytest.mark.shows("setting:secrets.file_roots")
async def test_a_reference_to_a_file_obeys_the_roots(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    await catalog.orders()
    await catalog.forward("p", {**NATS_SECRET, "password": f"${{file:{tmp_path}/password}}"})

    async with at_work(catalog.dsn) as relay:
        await relay.heard.until(lambda: relay.reasons("p") != [])
        assert "outside of the allowed directories" in relay.reasons("p")[0]
    roots = SecretSettings(file_roots=(str(tmp_path),))
    async with at_work(catalog.dsn, secrets=roots) as relay:
        await relay.until_state("p", PipelineState.RETRYING)
        assert relay.reasons("p") == []


@pytest.mark.shows("setting:files.roots")
async def test_file_pipelines_stay_under_the_roots(catalog: Catalog, tmp_path: Path) -> None:
    await one_to_file(catalog, tmp_path / "out.jsonl")

    async with at_work(catalog.dsn, files=FileSettings(roots=("/nowhere",))) as relay:
        await relay.heard.until(lambda: relay.reasons("p") != [])
    async with at_work(catalog.dsn, files=FileSettings(roots=(str(tmp_path),))) as relay:
        await relay.until_acknowledged(1, "p")

    assert len(lines(tmp_path / "out.jsonl")) == 1


@pytest.mark.shows("setting:backends")
async def test_a_profile_says_where_a_pipeline_leads(
    catalog: Catalog, another_migrated_database: Database
) -> None:
    other = await asyncpg.connect(another_migrated_database.dsn)
    await other.execute("select pgtrickle.create_inbox('received')")
    await catalog.orders()
    await catalog.insert(1, 2)
    await catalog.forward("p", {"type": "pg-inbox", "profile": "there", "inbox": "received"})
    profiles = {"there": {"type": "pg-inbox", "url": "${env:PGTRICKLE_RELAY_THERE}"}}
    environment = {"PGTRICKLE_RELAY_THERE": another_migrated_database.dsn}

    async with at_work(catalog.dsn) as relay:
        await relay.heard.until(lambda: relay.reasons("p") != [])
        assert "add backends.there" in relay.reasons("p")[0]
    async with at_work(catalog.dsn, environment=environment, backends=profiles) as relay:
        await relay.until_acknowledged(2, "p")

    assert await other.fetchval("select count(*) from pgtrickle.received") == 2
    await other.close()
