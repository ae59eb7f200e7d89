"""Each key of a pipeline, changed, and what is different; with the setting it falls back to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from relay.events import (
    BatchPublished,
    DeadLettered,
    PipelineDescribed,
    PipelineState,
    Retried,
    StateChanged,
)
from tests.effects.relay_at_work import AtWork, Catalog, at_work, lines, to_file
from tests.servers.finding import free_port
from tests.servers.postgres import Database

REFUSE_ALL = "alter table pgtrickle.{} add constraint never check (event_id = 'never')"
FAIL_FOR_A_WHILE = """
create function public.fail() returns trigger language plpgsql as
$$ begin raise exception 'not now' using errcode = '40001'; end $$;
create trigger fail before insert on pgtrickle.received
for each row execute function public.fail()
"""


@pytest.fixture
async def catalog(migrated_database: Database) -> AsyncIterator[Catalog]:
    connection = await asyncpg.connect(migrated_database.dsn)
    yield Catalog(migrated_database.dsn, connection)
    await connection.close()


def delays(relay: AtWork, pipeline: str) -> list[float]:
    return [one.delay_s for one in relay.heard.of(Retried) if one.pipeline == pipeline]


def dead_lettered(relay: AtWork, pipeline: str) -> int:
    return sum(one.messages for one in relay.heard.of(DeadLettered) if one.pipeline == pipeline)


# How much and how fast


@pytest.mark.shows("pipeline:batch_size", "setting:relay.batch_size")
async def test_a_batch_has_at_most_so_many_messages(catalog: Catalog, tmp_path: Path) -> None:
    await catalog.orders()
    await catalog.insert(1, 10)
    await catalog.forward("by-setting", to_file(tmp_path / "a.jsonl"))
    await catalog.forward("by-key", to_file(tmp_path / "b.jsonl"), batch_size=2)

    async with at_work(catalog.dsn, relay={"batch_size": 4}) as relay:
        await relay.until_acknowledged(10, "by-setting", "by-key")

    assert relay.polled("by-setting") == [4, 4, 2]
    assert relay.polled("by-key") == [2, 2, 2, 2, 2]


@pytest.mark.shows("setting:relay.batch_bytes")
@pytest.mark.parametrize("batch_bytes,batches", [(1, [1, 1, 1, 1]), (1_000_000, [4])])
async def test_a_batch_ends_at_its_bytes(
    catalog: Catalog, tmp_path: Path, batch_bytes: int, batches: list[int]
) -> None:
    await catalog.orders()
    await catalog.insert(1, 4, "x" * 1000)
    await catalog.forward("p", to_file(tmp_path / "out.jsonl"))

    async with at_work(catalog.dsn, relay={"batch_bytes": batch_bytes}) as relay:
        await relay.until_acknowledged(4, "p")

    assert relay.polled("p") == batches


@pytest.mark.shows("pipeline:prefetch", "setting:relay.prefetch")
async def test_so_many_batches_are_polled_ahead_of_the_one_in_flight(catalog: Catalog) -> None:
    await catalog.orders()
    await catalog.insert(1, 10)
    await catalog.run("select pgtrickle.create_inbox('received')")
    sink = {"type": "pg-inbox", "inbox": "received"}
    await catalog.forward("by-setting", sink, batch_size=1)
    await catalog.forward("by-key", sink, batch_size=1, prefetch=0)

    async with at_work(catalog.dsn, relay={"prefetch": 2}) as relay:
        async with catalog.connection.transaction():
            await catalog.run("lock table pgtrickle.received in exclusive mode")
            await relay.heard.until(lambda: len(relay.polled("by-setting")) == 3)
            await relay.heard.until(lambda: len(relay.polled("by-key")) == 1)
            await relay.a_while("by-key")
            ahead = [len(relay.polled(name)) for name in ("by-setting", "by-key")]
        await relay.until_acknowledged(10, "by-setting", "by-key")

    assert ahead == [3, 1]


@pytest.mark.shows("pipeline:poll_interval_ms", "setting:relay.poll_interval_ms")
async def test_nobody_is_asked_more_often_than_the_poll_interval(
    catalog: Catalog, tmp_path: Path
) -> None:
    await catalog.orders(", notify => false")
    await catalog.forward("by-setting", to_file(tmp_path / "a.jsonl"))
    await catalog.forward("by-key", to_file(tmp_path / "b.jsonl"), poll_interval_ms=1000)

    async with at_work(catalog.dsn, relay={"poll_interval_ms": 5}) as relay:
        await relay.until_state("by-setting", PipelineState.RUNNING)
        await relay.until_state("by-key", PipelineState.RUNNING)
        for id_ in range(40):
            await catalog.insert(id_, id_)
            await asyncio.sleep(0.03)
        await relay.until_acknowledged(40, "by-setting", "by-key")

    assert len(relay.polled("by-setting")) > 3 * len(relay.polled("by-key"))


# What happens when it fails


@pytest.mark.shows(
    "pipeline:retry_initial_ms",
    "setting:relay.retry_initial_ms",
    "pipeline:retry_max_ms",
    "setting:relay.retry_max_ms",
)
async def test_waits_start_with_the_first_and_grow_to_the_longest(catalog: Catalog) -> None:
    await catalog.orders()
    await catalog.insert(1, 1)
    nowhere = {"type": "nats", "url": f"nats://127.0.0.1:{free_port()}"}
    await catalog.forward("by-setting", nowhere)
    await catalog.forward("by-key", nowhere, retry_initial_ms=100, retry_max_ms=120)

    async with at_work(catalog.dsn, relay={"retry_initial_ms": 4, "retry_max_ms": 40}) as relay:
        await relay.heard.until(lambda: len(delays(relay, "by-setting")) >= 7)
        await relay.heard.until(lambda: len(delays(relay, "by-key")) >= 3)

    by_setting, by_key = delays(relay, "by-setting"), delays(relay, "by-key")
    assert 0.002 <= by_setting[0] <= 0.004
    assert 0.02 <= by_setting[6] <= 0.04
    assert 0.05 <= by_key[0] <= 0.1
    assert all(0.06 <= delay_s <= 0.12 for delay_s in by_key[1:])


@pytest.mark.shows("pipeline:max_attempts")
async def test_after_so_many_attempts_a_message_becomes_a_dead_letter(catalog: Catalog) -> None:
    await catalog.orders()
    await catalog.insert(1, 1)
    await catalog.run("select pgtrickle.create_inbox('received')")
    await catalog.run(FAIL_FOR_A_WHILE)
    sink = {"type": "pg-inbox", "inbox": "received"}
    await catalog.forward("bounded", sink, max_attempts=3)
    await catalog.forward("endless", sink)

    async with at_work(catalog.dsn) as relay:
        await relay.until_acknowledged(1, "bounded")
        await relay.heard.until(lambda: len(delays(relay, "endless")) >= 6)

    settled = [one for one in relay.heard.of(BatchPublished) if one.pipeline == "bounded"]
    assert [(one.attempts, one.dead_lettered) for one in settled] == [(3, 1)]
    assert dead_lettered(relay, "endless") == 0


@pytest.mark.shows("pipeline:breaker_threshold", "setting:relay.breaker_threshold")
async def test_so_many_rejections_in_a_row_suspend_a_pipeline(catalog: Catalog) -> None:
    await catalog.orders()
    await catalog.insert(1, 12)
    for name in ("one", "two"):
        await catalog.run("select pgtrickle.create_inbox($1)", name)
        await catalog.run(REFUSE_ALL.format(name))
    await catalog.forward("by-setting", {"type": "pg-inbox", "inbox": "one"}, batch_size=1)
    await catalog.forward(
        "by-key", {"type": "pg-inbox", "inbox": "two"}, batch_size=1, breaker_threshold=2
    )

    async with at_work(catalog.dsn, relay={"breaker_threshold": 6}) as relay:
        for name in ("by-setting", "by-key"):
            await relay.until_state(name, PipelineState.SUSPENDED)

    def before_suspension(name: str) -> int:
        events = [
            one
            for one in relay.heard.events
            if isinstance(one, DeadLettered | StateChanged) and one.pipeline == name
        ]
        at = next(
            at
            for at, one in enumerate(events)
            if isinstance(one, StateChanged) and one.state is PipelineState.SUSPENDED
        )
        return sum(one.messages for one in events[:at] if isinstance(one, DeadLettered))

    assert before_suspension("by-key") < 2 <= before_suspension("by-setting") < 6


# What is read, and what it becomes


@pytest.mark.shows("pipeline:start")
async def test_a_new_pipeline_begins_where_it_says(catalog: Catalog, tmp_path: Path) -> None:
    await catalog.orders()
    await catalog.insert(1, 3)
    await catalog.forward("all", to_file(tmp_path / "all.jsonl"))
    await catalog.forward("new", to_file(tmp_path / "new.jsonl"), start="latest")
    await catalog.insert(4, 5)

    async with at_work(catalog.dsn) as relay:
        await relay.until_acknowledged(5, "all")
        await relay.until_acknowledged(2, "new")

    assert [line["key"] for line in lines(tmp_path / "all.jsonl")] == ["1", "2", "3", "4", "5"]
    assert [line["key"] for line in lines(tmp_path / "new.jsonl")] == ["4", "5"]


@pytest.mark.shows("pipeline:description")
async def test_a_description_is_shown_with_the_pipeline(catalog: Catalog, tmp_path: Path) -> None:
    await catalog.orders()
    await catalog.forward("p", to_file(tmp_path / "a.jsonl"), description="for the shop")

    async with at_work(catalog.dsn) as relay:
        await relay.heard.until(lambda: relay.heard.of(PipelineDescribed) != [])

    (described,) = relay.heard.of(PipelineDescribed)
    assert described.settings["description"] == "for the shop"
    assert await catalog.value(
        "select config ->> 'description' from pgtrickle.list_relay_configs()"
    ) == ("for the shop")


@pytest.mark.shows(
    "pipeline:source",
    "pipeline:source_type",
    "pipeline:sink",
    "pipeline:sink_type",
    "sink:nats.type",
    "sink:pg-inbox.type",
    "source:nats.type",
    "source:outbox.type",
)
async def test_the_types_say_what_is_connected_and_each_is_said_once(
    catalog: Catalog, tmp_path: Path
) -> None:
    await catalog.orders()
    await catalog.insert(1, 1)
    (tmp_path / "in.jsonl").write_text('{"id": 1}\n')
    await catalog.run("select pgtrickle.create_inbox('received')")
    await catalog.forward("out", to_file(tmp_path / "out.jsonl"))
    await catalog.reverse(
        "in", {"type": "file", "input": str(tmp_path / "in.jsonl")}, inbox="received"
    )
    wrong = {
        "sink.type": {"source": {"outbox": "orders"}, "sink": {"type": "pg-inbox", "inbox": "a"}},
        "source.type": {
            "source": {"outbox": "orders", "type": "nats"},
            "sink": {"type": "nats", "url": "nats://127.0.0.1:1"},
        },
    }
    for key, config in wrong.items():
        # The functions refuse this; a row may still be edited by hand.
        await catalog.run(
            "insert into pgtrickle.relay_outbox_config (name, enabled, config)"
            " values ($1, true, $2::text::jsonb)",
            key,
            json.dumps({"source_type": "outbox", "sink_type": "nats", **config}),
        )

    async with at_work(catalog.dsn) as relay:
        await relay.until_acknowledged(1, "out", "in")
        for key in wrong:
            await relay.until_state(key, PipelineState.FAILED)

    described = {one.pipeline: (one.source, one.sink) for one in relay.heard.of(PipelineDescribed)}
    assert described["out"] == ("outbox", "file")
    assert described["in"] == ("file", "pg-inbox")
    assert len(lines(tmp_path / "out.jsonl")) == 1
    assert await catalog.value("select count(*) from pgtrickle.received") == 1
    for key in wrong:
        assert f"{key} is" in relay.reasons(key)[0]


@pytest.mark.shows("pipeline:dedup_key_from", "pipeline:event_type_from", "pipeline:columns")
async def test_a_reverse_pipeline_takes_its_fields_from_where_it_says(
    catalog: Catalog, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 7, "kind": "paid", "shop": "north"}\n')
    for name in ("plain", "mapped"):
        await catalog.run("select pgtrickle.create_inbox($1)", name)
    source = {"type": "file", "input": str(path)}
    await catalog.reverse("plain", source, inbox="plain")
    await catalog.reverse(
        "mapped",
        source,
        inbox="mapped",
        dedup_key_from="payload:id",
        event_type_from="payload:kind",
        columns={"aggregate_id": "payload:shop"},
    )

    async with at_work(catalog.dsn) as relay:
        await relay.until_acknowledged(1, "plain", "mapped")

    query = "select event_id, event_type, aggregate_id from pgtrickle.{}"
    (plain,) = await catalog.connection.fetch(query.format("plain"))
    (mapped,) = await catalog.connection.fetch(query.format("mapped"))
    assert tuple(mapped) == ("7", "paid", "north")
    assert tuple(plain)[1:] == ("in.jsonl", None)
    assert plain["event_id"] != "7"
