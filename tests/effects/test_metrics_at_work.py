"""Every metric moves in a relay at work, fed by what really happens in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay.metrics import METRICS, PREFIX
from relay.settings import MetricsSettings
from tests.effects.relay_at_work import BOUND_S, AtWork, Catalog, at_work, to_file
from tests.servers.finding import free_port
from tests.servers.postgres import Database

# Those of a consumer group's workers move in tests/integration/test_relay_group.py.
OF_GROUPS = {"worker_messages_published_total", "worker_healthy", "leases_lost_total"}
FULL_REFRESH = '{"v": 1, "full_refresh": true, "inserted": [{"id": 1}], "deleted": []}'


@pytest.fixture
async def catalog(migrated_database: Database) -> AsyncIterator[Catalog]:
    connection = await asyncpg.connect(migrated_database.dsn)
    yield Catalog(migrated_database.dsn, connection)
    await connection.close()


async def everything_happens(catalog: Catalog, directory: Path, hook_port: int) -> None:
    """Pipelines in both directions, some well and some in each kind of trouble."""
    (directory / "in.jsonl").write_text('{"id": 1}\n')
    nowhere = f"nats://127.0.0.1:{free_port()}"
    await catalog.orders(", claim_check_rows => 3")
    await catalog.insert(1, 2)
    await catalog.run("insert into public.orders select g, '' from generate_series(10, 20) as g")
    await catalog.run(
        "insert into pgtrickle.outbox_orders (payload) values ($1::text::jsonb)", FULL_REFRESH
    )
    for inbox in ("shared", "refusing", "received"):
        await catalog.run("select pgtrickle.create_inbox($1)", inbox)
    await catalog.run("alter table pgtrickle.refusing add check (event_id = 'never')")
    await catalog.forward("to-file", to_file(directory / "out.jsonl"))
    await catalog.forward("to-inbox", {"type": "pg-inbox", "inbox": "shared"})
    await catalog.forward("to-inbox-again", {"type": "pg-inbox", "inbox": "shared"})
    await catalog.forward("refused", {"type": "pg-inbox", "inbox": "refusing"})
    await catalog.forward("to-nowhere", {"type": "nats", "url": nowhere})
    await catalog.reverse(
        "from-file", {"type": "file", "input": str(directory / "in.jsonl")}, inbox="received"
    )
    await catalog.reverse(
        "hook",
        {"type": "webhook", "listen_addr": f"127.0.0.1:{hook_port}", "path": "/in"},
        inbox="received",
    )
    await catalog.reverse(
        "from-nowhere", {"type": "nats", "url": nowhere, "subject": "a"}, inbox="received"
    )


async def moved(relay: AtWork, hook_port: int) -> set[str]:
    """The metrics of which a sample is above zero."""
    assert relay.relay.http.address is not None
    host, port = relay.relay.http.address
    async with httpx.AsyncClient(trust_env=False) as client:
        with contextlib.suppress(httpx.TransportError):
            await client.post(f"http://127.0.0.1:{hook_port}/in", content=b"no JSON")
        exposed = (await client.get(f"http://{host}:{port}/metrics")).text
    above_zero = {
        sample.name
        for family in text_string_to_metric_families(exposed)
        for sample in family.samples
        if sample.value > 0
    }
    return {
        spec.name
        for spec in METRICS
        if {PREFIX + spec.name, f"{PREFIX}{spec.name}_count"} & above_zero
    }


@pytest.mark.shows(
    "metric:messages_published_total",
    "metric:messages_consumed_total",
    "metric:batches_committed_total",
    "metric:polls_total",
    "metric:publish_errors_total",
    "metric:source_errors_total",
    "metric:errors_total",
    "metric:batch_publish_duration_seconds",
    "metric:poll_duration_seconds",
    "metric:delivery_latency_seconds",
    "metric:claim_check_fetches_total",
    "metric:full_refresh_batches_total",
    "metric:inbox_writes_total",
    "metric:inbox_dedup_skips_total",
    "metric:webhook_refused_total",
    "metric:dlq_depth",
    "metric:dlq_entries_total",
    "metric:last_committed_offset",
    "metric:consumer_lag_rows",
    "metric:oldest_unsent_age_seconds",
    "metric:source_connected",
    "metric:sink_connected",
    "metric:pipeline_state",
    "metric:pipeline_stalled",
    "metric:last_progress_timestamp_seconds",
    "metric:pipelines_owned",
    "metric:group_members",
    "metric:database_connected",
    "metric:build_info",
)
async def test_a_relay_at_work_moves_every_metric(catalog: Catalog, tmp_path: Path) -> None:
    hook_port = free_port()
    await everything_happens(catalog, tmp_path, hook_port)
    expected = {spec.name for spec in METRICS} - OF_GROUPS
    metrics = MetricsSettings(addr="127.0.0.1:0", lag_interval_s=0.05, stalled_after_s=0.2)

    async with at_work(catalog.dsn, metrics=metrics) as relay:
        await relay.heard.until(lambda: relay.relay.http.address is not None)
        still = expected
        with_time_left = asyncio.get_running_loop().time() + BOUND_S
        while still and asyncio.get_running_loop().time() < with_time_left:
            still = still - await moved(relay, hook_port)

    assert still == set()
