"""Every metric moves in a relay at work, fed by what really happens in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import asyncpg
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from relay.locks import lock_key
from relay.metrics import METRICS, PREFIX
from relay.settings import MetricsSettings
from tests.effects.relay_at_work import BOUND_S, AtWork, Catalog, at_work, to_file
from tests.integration.relay_surroundings import NatsWorld, nats_world
from tests.servers.finding import free_port
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database

# Those of a consumer group's workers move in tests/integration/test_relay_group.py.
OF_GROUPS = {"worker_messages_published_total", "worker_healthy", "leases_lost_total"}
FULL_REFRESH = '{"v": 1, "full_refresh": true, "inserted": [{"id": 1}], "deleted": []}'


@pytest.fixture
async def catalog(migrated_database: Database) -> AsyncIterator[Catalog]:
    connection = await asyncpg.connect(migrated_database.dsn)
    yield Catalog(migrated_database.dsn, connection)
    await connection.close()


async def everything_happens(
    catalog: Catalog, directory: Path, hook_port: int, nats: NatsWorld
) -> None:
    """Pipelines in both directions, some well, some in each kind of trouble, one that rests."""
    (directory / "in.jsonl").write_text('{"id": 1}\n')
    nowhere = f"nats://127.0.0.1:{free_port()}"
    await catalog.orders(", claim_check_rows => 3")
    for name in ("paused", "locked"):
        await catalog.forward(name, to_file(directory / f"{name}.jsonl"))
    await catalog.run("select pgtrickle.disable_relay('paused')")
    # So that no relay can have it.
    await catalog.run("select pg_advisory_lock($1)", lock_key("pipeline", "default", "locked"))
    await catalog.insert(1, 2)
    await catalog.run("insert into public.orders select g, '' from generate_series(10, 20) as g")
    await catalog.run(
        "insert into pgtrickle.outbox_orders (payload) values ($1::text::jsonb)", FULL_REFRESH
    )
    await catalog.run("analyze pgtrickle.outbox_orders")
    await catalog.run("alter table public.orders disable trigger user")
    for inbox in ("shared", "refusing", "received"):
        await catalog.run("select pgtrickle.create_inbox($1)", inbox)
    await catalog.run("alter table pgtrickle.refusing add check (event_id = 'never')")
    await catalog.forward("to-file", to_file(directory / "out.jsonl"))
    await catalog.forward("choosy", to_file(directory / "few.jsonl"), ops=["delete"])
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
    await nats.publish(1, 3)
    away = {"url": f"postgresql://127.0.0.1:{free_port()}/away", "inbox": "received"}
    await catalog.reverse("from-nats", nats.source(), inbox="received", sink=away)
    await catalog.reverse(
        "from-nowhere", {"type": "nats", "url": nowhere, "subject": "a"}, inbox="received"
    )


async def samples(relay: AtWork, hook_port: int) -> Sequence[Sample]:
    """What the metrics say, behind a request that the receiver refuses."""
    assert relay.relay.http.address is not None
    host, port = relay.relay.http.address
    async with httpx.AsyncClient(trust_env=False) as client:
        with contextlib.suppress(httpx.TransportError):
            await client.post(f"http://127.0.0.1:{hook_port}/in", content=b"no JSON")
        exposed = (await client.get(f"http://{host}:{port}/metrics")).text
    return [one for family in text_string_to_metric_families(exposed) for one in family.samples]


def moved(samples: Sequence[Sample]) -> set[str]:
    """The metrics of which a sample is above zero."""
    above_zero = {sample.name for sample in samples if sample.value > 0}
    return {
        spec.name
        for spec in METRICS
        if {PREFIX + spec.name, f"{PREFIX}{spec.name}_count"} & above_zero
    }


@pytest.fixture
async def nats(nats_server: NatsServer) -> AsyncIterator[NatsWorld]:
    async with nats_world(nats_server, "measured") as nats:
        yield nats


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
    "metric:messages_filtered_total",
    "metric:last_committed_offset",
    "metric:consumer_lag_rows",
    "metric:oldest_unsent_age_seconds",
    "metric:source_lag",
    "metric:outbox_rows",
    "metric:outbox_bytes",
    "metric:capture_problems",
    "metric:pipelines_unowned",
    "metric:source_connected",
    "metric:sink_connected",
    "metric:pipeline_state",
    "metric:pipeline_healthy",
    "metric:pipeline_stalled",
    "metric:last_progress_timestamp_seconds",
    "metric:pipelines_owned",
    "metric:group_members",
    "metric:database_connected",
    "metric:build_info",
)
async def test_a_relay_at_work_moves_every_metric(
    catalog: Catalog, tmp_path: Path, nats: NatsWorld
) -> None:
    hook_port = free_port()
    await everything_happens(catalog, tmp_path, hook_port, nats)
    expected = {spec.name for spec in METRICS} - OF_GROUPS
    metrics = MetricsSettings(addr="127.0.0.1:0", lag_interval_s=0.05, stalled_after_s=0.2)

    async with at_work(catalog.dsn, metrics=metrics) as relay:
        await relay.heard.until(lambda: relay.relay.http.address is not None)
        still = expected
        with_time_left = asyncio.get_running_loop().time() + BOUND_S
        while still and asyncio.get_running_loop().time() < with_time_left:
            found = await samples(relay, hook_port)
            still = still - moved(found)

    assert still == set()
    lags = {
        sample.labels["pipeline"]: sample.value
        for sample in found
        if sample.name == f"{PREFIX}consumer_lag_rows"
    }
    assert relay.relay.board.snapshot().blocked.keys() == {"locked"}
    assert lags["paused"] == lags["locked"] == 4
    assert any(one.name == "process_cpu_seconds_total" and one.value > 0 for one in found)
