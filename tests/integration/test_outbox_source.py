"""The outbox source against PostgreSQL: payloads as captured, claim checks, waking, resuming."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from relay.backends.outbox import OutboxSource, reading
from relay.backends.outbox.reader import Round
from relay.contracts import Batch
from relay.errors import (
    ConfigurationError,
    NotConnected,
    OutboxUnsafe,
    OwnershipLost,
    PositionLost,
    RelayError,
)
from relay.events import ClaimCheckFetched
from relay.partition import Partition
from tests.integration.outbox_surroundings import (
    BOUND_S,
    OutboxWorld,
    enable_orders,
    messages_of,
    outbox_world,
    place_of,
    polled,
    rest_of,
    row_of,
)
from tests.integration.relay_surroundings import until
from tests.servers.postgres import Database


@pytest.fixture
async def world(any_migrated_database: Database) -> AsyncIterator[OutboxWorld]:
    async with outbox_world(any_migrated_database.dsn) as made:
        yield made


async def connected(world: OutboxWorld, **options: object) -> OutboxSource:
    source = world.source(context=world.context(**options))  # type: ignore[arg-type]  # by name
    await source.connect()
    return source


def ops(batches: list[Batch]) -> list[tuple[str, str | None]]:
    return [(message.op, message.key) for message in messages_of(batches)]


@pytest.mark.shows("source:outbox.outbox")
async def test_captured_changes_arrive_in_order_with_keys(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    source = await connected(world)

    await world.publisher.execute("insert into orders values (1, 0, 'a'), (2, 0, 'b')")
    await world.publisher.execute("update orders set version = 1 where id = 1")
    await world.publisher.execute("delete from orders where id = 2")
    await world.publisher.execute("truncate orders")
    batches = await polled(source, 6)

    assert ops(batches) == [
        ("insert", "1"),
        ("insert", "2"),
        ("delete", "1"),
        ("insert", "1"),
        ("delete", "2"),
        ("truncate", None),
    ]
    first = messages_of(batches)[0]
    assert first.dedup_key.startswith("outbox_orders:1:0:")
    assert first.created_at is not None
    assert first.refresh_id is not None
    assert row_of(first) == {"id": 1, "version": 0, "note": "a"}
    await source.aclose()


@pytest.mark.shows("source:outbox.outbox_table")
async def test_the_outbox_that_a_name_meant_is_read_whatever_the_name_means_now(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    await world.publisher.execute("insert into orders values (1, 0, 'a')")
    bound = {"outbox": "orders_before", "outbox_table": "outbox_orders"}
    source = OutboxSource.from_options(bound, world.context())

    await source.connect()

    assert ops(await polled(source, 1)) == [("insert", "1")]
    await source.aclose()


@pytest.mark.shows("pipeline:collapse_updates")
async def test_an_update_is_one_message_where_updates_are_collapsed(world: OutboxWorld) -> None:
    await enable_orders(world.publisher, ", claim_check_rows => 3")
    source = await connected(world, collapse_updates=True)
    await world.publisher.execute(
        "insert into orders select g, 0, 'a' from generate_series(1, 3) g"
    )

    await world.publisher.execute("update orders set version = 1 where id = 1")
    await world.publisher.execute("update orders set version = 2")  # six rows: a claim check
    batches = await polled(source, 7)

    assert ops(batches)[3] == ("update", "1")
    assert sorted(ops(batches)[4:]) == [("update", "1"), ("update", "2"), ("update", "3")]
    assert [place_of(message) for message in messages_of(batches)][4:] == [
        f"outbox_orders:3:{index}" for index in range(3)
    ]
    await source.aclose()


@pytest.mark.shows("pipeline:key_columns", "pipeline:dedup_namespace")
async def test_headers_and_other_key_columns_travel(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    source = await connected(
        world, key_columns=["version", "note"], dedup_namespace="eu", batch_size=10
    )
    await world.publisher.execute(
        "select pgtrickle.outbox_publish('orders', $1, headers => $2)",
        '[{"id": 1, "version": 7, "note": "x"}]',
        '{"traceparent": "00-1"}',
    )

    (message,) = messages_of(await polled(source, 1))

    assert message.key == '[7,"x"]'
    assert message.headers == {"traceparent": "00-1"}
    assert place_of(message) == "eu:outbox_orders:1:0"
    await source.aclose()


async def test_readers_of_partitions_whose_messages_have_no_key_say_so_once(
    world: OutboxWorld, caplog: pytest.LogCaptureFixture
) -> None:
    await world.publisher.execute("select pgtrickle.enable_outbox('events', capture => 'none')")
    for number in (1, 2):
        context = msgspec.structs.replace(
            world.context(pipeline=f"p/{number}"),
            partition=Partition(number, 2),
            partitioning={"partitions": 2},
        )
        source = world.source("events", context)
        await source.connect()
        for _ in range(2):
            await world.publisher.execute(
                """select pgtrickle.outbox_publish('events', '[{"a": 1}]')"""
            )
            if number == 1:
                await polled(source, 1)
        await source.aclose()

    (warning,) = [one for one in caplog.records if "have no key" in one.message]
    assert (warning.levelname, vars(warning)["pipeline"]) == ("WARNING", "p/1")


async def test_a_claim_check_is_read_in_pages_and_moves_the_offset_with_the_last(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher, ", claim_check_rows => 10")
    source = await connected(world, batch_size=50)
    await world.publisher.execute("insert into orders values (0, 0, 'before')")
    await world.publisher.execute(
        "insert into orders select g, 0, 'a' from generate_series(1, 120) g"
    )
    await world.publisher.execute("update orders set version = 1 where id > 0")
    await world.publisher.execute("insert into orders values (500, 0, 'behind')")

    batches = await polled(source, 1 + 120 + 240 + 1)

    messages = messages_of(batches)
    assert all(len(batch.messages) <= 50 for batch in batches)
    assert [batch.checkpoint for batch in batches if batch.checkpoint] == ["1", "2", "3", "4"]
    assert [message.op for message in messages] == (
        ["insert"] * 121 + ["delete"] * 120 + ["insert"] * 121
    )
    assert [place_of(message) for message in messages[121:]] == [
        *(f"outbox_orders:3:{index}" for index in range(120, 240)),
        *(f"outbox_orders:3:{index}" for index in range(120)),
        "outbox_orders:4:0",
    ]
    fetched = [event.rows for event in world.events if isinstance(event, ClaimCheckFetched)]
    assert sum(fetched) == 360
    await source.aclose()


async def test_a_claim_check_that_was_left_half_way_is_read_again_with_the_same_keys(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher, ", claim_check_rows => 10")
    await world.publisher.execute(
        "insert into orders select g, 0, 'a' from generate_series(1, 90) g"
    )
    source = await connected(world, batch_size=30)
    first = messages_of(await polled(source, 60))
    await source.aclose()

    again = await connected(world, batch_size=30)
    second = messages_of(await polled(again, 90))

    assert [message.dedup_key for message in second[:60]] == [
        message.dedup_key for message in first
    ]
    await again.aclose()


async def test_a_snapshot_by_claim_check_is_read(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    await write_claim_check(world, promised=2)
    source = await connected(world, snapshot_markers=True)

    batches = await polled(source, 4)

    assert ops(batches) == [
        ("snapshot_begin", None),
        ("upsert", "1"),
        ("upsert", "2"),
        ("snapshot_end", None),
    ]
    await source.aclose()


async def write_claim_check(world: OutboxWorld, *, promised: int) -> None:
    """A snapshot by claim check with two rows, whatever it promises."""
    async with world.publisher.transaction():
        outbox_id = await world.publisher.fetchval(
            "insert into pgtrickle.outbox_orders (pgt_id, refresh_id, inserted_count,"
            " deleted_count, is_claim_check, payload) values (gen_random_uuid(),"
            " gen_random_uuid(), $1, 0, true, $2) returning id",
            promised,
            json.dumps(
                {"v": 1, "full_refresh": True, "claim_check": True, "inserted_count": promised}
            ),
        )
        for number in (1, 2):
            await world.publisher.execute(
                "insert into pgtrickle.outbox_delta_rows_orders values ($1, $2, 'INSERT', $3)",
                outbox_id,
                number,
                json.dumps({"id": number}),
            )


async def test_a_claim_check_that_lacks_rows_is_refused_as_a_whole_with_the_counts(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    await write_claim_check(world, promised=3)
    await world.publisher.execute("insert into orders values (9, 0, 'behind')")
    source = await connected(world)

    batches = await polled(source, 2)

    (rejected,) = [rejected for batch in batches for rejected in batch.rejected]
    assert "promises 3 inserted rows, but 2 are there" in str(rejected.error)
    assert place_of(rejected.message) == "outbox_orders:1:0"
    assert ops(batches) == [("insert", "9")]
    await source.aclose()


async def test_a_backfill_for_one_pipeline_is_read_by_its_readers_and_passed_by_others(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher, ", claim_check_rows => 2")
    await world.publisher.execute(
        "set session_replication_role = replica; insert into orders values (1), (2), (3);"
        "reset session_replication_role;"
        """select pgtrickle.set_relay_outbox('one', '{"source": {"outbox": "orders"},
            "sink": {"type": "stdout"}, "partitions": 2}')"""
    )
    await world.publisher.execute("call pgtrickle.backfill('orders', 'one', chunk_rows => 3)")
    await world.publisher.execute("call pgtrickle.backfill('orders', 'one', 'id = 1')")
    await world.publisher.execute("insert into orders values (4)")

    shared = {"partitions": 2, "key_columns": None}
    for pipeline, partitioning, expected in (("one/2", shared, "1 2 3 1 4"), ("other", {}, "4")):
        context = world.context(pipeline=pipeline)
        source = world.source(context=msgspec.structs.replace(context, partitioning=partitioning))
        await source.connect()
        messages = messages_of(await rest_of(source))
        assert " ".join(str(message.key) for message in messages) == expected
        assert [message.op for message in messages[:-1]] == ["upsert"] * (len(messages) - 1)
        await source.aclose()
        position = await world.publisher.fetchval(
            "select last_change_id from pgtrickle.relay_consumer_offsets where pipeline_id = $1",
            pipeline,
        )
        assert position == 3


async def test_a_commit_wakes_a_sleeping_source_within_milliseconds(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    source = await connected(world)
    latencies = []
    async with asyncio.timeout(BOUND_S):
        for number in range(5):
            polling = asyncio.create_task(rest_then_wait(source))
            # Long after its back-off has reached a second: only a notification is faster.
            await asyncio.wait([polling], timeout=1.4)
            written = time.monotonic()
            await world.publisher.execute("insert into orders values ($1, 0, 'x')", number)
            await polling
            latencies.append(time.monotonic() - written)

    assert sorted(latencies)[2] < 0.1
    await source.aclose()


async def rest_then_wait(source: OutboxSource) -> None:
    while not (batch := await source.poll()).messages:
        pass
    await source.acknowledge(batch)


async def test_publishers_are_asked_to_notify_while_idle_and_spared_while_busy(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    source = await connected(world, batch_size=10)

    async def sleepers() -> list[str]:
        rows = await world.publisher.fetch(
            "select sleeper from pgtrickle.relay_sleepers where sleeps_until > now()"
        )
        return [row["sleeper"] for row in rows]

    await rest_of(source)
    assert await sleepers() == ["worker:pipeline"]
    for number in range(60):
        await world.publisher.execute("insert into orders values ($1, 0, 'x')", number)
    await polled(source, 60)
    assert await sleepers() == []
    await rest_of(source)
    assert await sleepers() == ["worker:pipeline"]
    await source.aclose()
    assert await sleepers() == []


async def test_an_open_transaction_delays_only_its_own_events(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    slow = await world.connect_publisher()
    await slow.execute("begin")
    await slow.execute("insert into orders values (1, 0, 'slow')")
    source = await connected(world)

    await world.publisher.execute("insert into orders values (2, 0, 'quick')")
    assert ops(await polled(source, 1)) == [("insert", "2")]
    await slow.execute("commit")
    assert ops(await polled(source, 1)) == [("insert", "1")]

    await slow.close()
    await source.aclose()


async def test_gaps_outlive_the_source_that_noted_them(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    slow = await world.connect_publisher()
    await slow.execute("begin")
    await slow.execute("insert into orders values (1, 0, 'slow')")
    first = await connected(world)
    await world.publisher.execute("insert into orders values (2, 0, 'quick')")
    await polled(first, 1)
    await first.aclose()

    await slow.execute("commit")
    second = await connected(world)

    assert ops(await rest_of(second)) == [("insert", "1")]
    await slow.close()
    await second.aclose()


async def test_dead_gaps_are_forgotten_while_idle(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    slow = await world.connect_publisher()
    await slow.execute("begin")
    await slow.execute("insert into orders values (1, 0, 'slow')")
    source = await connected(world)
    await world.publisher.execute("insert into orders values (2, 0, 'quick')")
    await polled(source, 1)
    await slow.execute("rollback")

    async with asyncio.timeout(BOUND_S):
        while await world.publisher.fetchval("select count(*) from pgtrickle.relay_pending_gaps"):
            await source.acknowledge(await source.poll())

    await slow.close()
    await source.aclose()


async def test_a_rejected_batch_comes_again_and_an_older_batch_can_still_be_acknowledged(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    await world.publisher.execute("insert into orders values (1, 0, 'a')")
    source = await connected(world, batch_size=1)
    (first,) = await polled(source, 1, acknowledge=False)
    await world.publisher.execute("insert into orders values (2, 0, 'b')")
    (second,) = await polled(source, 1, acknowledge=False)

    await source.reject(second)
    await source.acknowledge(first)

    assert ops(await polled(source, 1)) == [("insert", "2")]
    with pytest.raises(NotConnected):
        await source.acknowledge(second)
    await source.aclose()


@pytest.mark.shows("error:OwnershipLost")
async def test_who_lost_the_pipeline_cannot_acknowledge(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    await world.publisher.execute("insert into orders values (1, 0, 'a')")
    first = await connected(world)
    batches = await polled(first, 1, acknowledge=False)
    second = await connected(world, worker_id="other")

    with pytest.raises(OwnershipLost):
        await first.acknowledge(batches[0])

    assert ops(await polled(second, 1)) == [("insert", "1")]
    await first.aclose()
    await second.aclose()


async def test_a_new_pipeline_on_a_swept_outbox_starts_at_what_is_left_and_resumes(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    await world.publisher.execute("insert into orders values (1, 0, 'a')")
    await world.publisher.execute("insert into orders values (2, 0, 'b')")
    await sweep_first_row(world)

    left = await connected(world)
    await left.aclose()
    source = await connected(world)

    assert ops(await polled(source, 1)) == [("insert", "2")]
    await source.aclose()


async def sweep_first_row(world: OutboxWorld) -> None:
    await world.publisher.execute("delete from pgtrickle.outbox_orders where id = 1")
    await world.publisher.execute("update pgtrickle.pgt_outbox_config set swept_through = 1")


@pytest.mark.shows("error:PositionLost")
async def test_a_position_below_what_was_swept_is_an_error_that_names_the_range(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    source = await connected(world)
    await source.aclose()
    await world.publisher.execute("insert into orders values (1, 0, 'a')")
    await sweep_first_row(world)

    with pytest.raises(PositionLost, match="rows 1 to 1"):
        await source.connect()


@pytest.mark.parametrize(
    "on_reset, arrived",
    [("earliest", [("insert", "1"), ("insert", "2")]), ("latest", [("insert", "2")])],
)
@pytest.mark.shows("pipeline:on_reset")
async def test_an_outbox_made_again_is_read_from_where_the_pipeline_says(
    world: OutboxWorld, on_reset: str, arrived: list[tuple[str, str]]
) -> None:
    await reset_outbox(world)

    source = await connected(world, on_reset=on_reset)
    await world.publisher.execute("insert into orders values (2, 0, 'b')")

    assert ops(await polled(source, len(arrived))) == arrived
    await source.aclose()


async def test_an_outbox_made_again_fails_the_pipeline_unless_it_says_otherwise(
    world: OutboxWorld,
) -> None:
    await reset_outbox(world)

    with pytest.raises(PositionLost, match="position 9 lies beyond"):
        await connected(world)


async def reset_outbox(world: OutboxWorld) -> None:
    """A committed position of 9, and an outbox whose highest id is 1."""
    await enable_orders(world.publisher)
    await world.publisher.execute("insert into orders values (1, 0, 'a')")
    claim = await world.catalog.claim("pipeline", "outbox_orders", "worker")
    await world.catalog.commit("pipeline", claim.epoch, 9)


@pytest.mark.shows("error:OutboxUnsafe")
async def test_a_sequence_with_a_cache_is_refused(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    sequence = await world.publisher.fetchval(
        "select pg_get_serial_sequence('pgtrickle.outbox_orders', 'id')"
    )
    await world.publisher.execute(f"alter sequence {sequence} cache 10")

    with pytest.raises(OutboxUnsafe, match="cache 10"):
        await connected(world)


async def test_an_unknown_outbox_is_a_configuration_error(world: OutboxWorld) -> None:
    with pytest.raises(ConfigurationError, match="no outbox"):
        await world.source("nowhere").connect()


async def test_a_byte_bound_keeps_batches_small_and_never_empty(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    await world.publisher.executemany(
        "insert into orders values ($1, 0, $2)",
        [(number, random.Random(number).randbytes(1500).hex()) for number in range(20)],
    )
    source = await connected(world, batch_bytes=4000)

    batches = await polled(source, 20)

    assert len(batches) >= 10
    await source.aclose()


async def test_a_rollback_leaves_a_hole_that_hides_nothing(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    source = await connected(world)
    await world.publisher.execute("begin")
    await world.publisher.execute("insert into orders values (1, 0, 'gone')")
    await world.publisher.execute("rollback")

    await world.publisher.execute("insert into orders values (1, 0, 'kept')")

    assert [row_of(message)["note"] for message in messages_of(await polled(source, 1))] == ["kept"]
    await source.aclose()


_ROWS_OF_ALL_KINDS = """
alter table pgtrickle.outbox_orders alter refresh_id drop not null;
insert into pgtrickle.outbox_orders (refresh_id, created_at, inserted_count, deleted_count,
    payload, headers)
values
    (null, '2026-01-02 03:04:05.678901+00', 1, 0,
     '{"v": 1, "inserted": [{"id": 1, "note": "line\\nbreak \\u2028"}], "deleted": []}', '{}'),
    ('00000000-0000-0000-0000-000000000007', '1969-12-31 23:59:59.999999+00', 1, 1,
     '{"v": 1, "inserted": [{"id": 2}], "deleted": [{"id": 2}]}', '{"trace": "a\\nb", "n": 1}'),
    (null, '9999-12-31 23:59:59+00', 1, 0, '[{"id": 3}]', '{"trace": ""}'),
    (null, now(), 0, 0, '{"v": 2}', '{}'),
    (null, now(), 0, 0, '{"v": 1, "full_refresh": true, "inserted": [], "deleted": []}', '{}'),
    (null, now(), 1, 0, '"\\n"', '{}')
"""


async def test_rows_in_one_record_are_what_they_are_one_by_one(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    await world.publisher.execute(_ROWS_OF_ALL_KINDS)
    together = await connected(world, pipeline="together")
    singly = await connected(world, pipeline="singly")
    assert singly._session is not None
    singly._session.reader._rows._rounds_before_packing = 1_000_000

    (packed,) = await polled(together, 7)
    (single,) = await polled(singly, 7)

    assert packed.messages == single.messages
    assert packed.rejected[0].message == single.rejected[0].message
    assert [len(packed.messages), len(packed.rejected)] == [5, 2]
    assert _packs(together)
    await together.aclose()
    await singly.aclose()


@pytest.mark.parametrize(
    "statement",
    [
        "insert into orders select n, 0, repeat('a', 9000) from generate_series(1, 3) as n",
        "insert into orders select n, 0, string_agg(md5(random()::text), '')"
        " from generate_series(1, 3) as n, generate_series(1, 70) group by n",
        "select pgtrickle.outbox_publish('orders', jsonb_build_array(jsonb_build_object('id', n)),"
        "  headers => jsonb_build_object('a', repeat('a', 9000))) from generate_series(1, 3) as n",
        "select pgtrickle.outbox_publish('orders', jsonb_build_array(jsonb_build_object('id', n)),"
        "  headers => jsonb_build_object('a', string_agg(md5(random()::text), '')))"
        " from generate_series(1, 3) as n, generate_series(1, 70) group by n",
        "insert into orders select n, 0, '' from generate_series(1, 11) as n",
        "insert into orders select n, 0, '' from generate_series(1, 2000) as n",
    ],
    ids=[
        "compressed",
        "large",
        "compressed headers",
        "large headers",
        "more than a batch",
        "claim check",
    ],
)
async def test_rows_that_do_not_fit_together_come_one_by_one(
    world: OutboxWorld, statement: str
) -> None:
    await enable_orders(world.publisher)
    source = await connected(world, batch_size=10, batch_bytes=10_000)
    assert _packs(source)
    await world.publisher.execute(statement)
    rows = await world.publisher.fetchval(
        "select sum(inserted_count)::int from pgtrickle.outbox_orders"
    )

    assert len(messages_of(await polled(source, rows))) == rows

    assert not _packs(source)
    await source.aclose()


async def test_rows_come_together_up_to_about_the_bytes_of_a_batch(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    await world.publisher.executemany(
        "insert into orders values ($1, 0, $2)",
        [(number, random.Random(number).randbytes(700).hex()) for number in range(40)],
    )
    source = await connected(world, batch_size=100, batch_bytes=16_000)
    assert source._session is not None

    batches = await polled(source, 30)
    assert source._session.has_more
    batches += await polled(source, 40 - len(messages_of(batches)))

    assert not source._session.has_more
    assert _packs(source)
    sizes = [sum(len(message.payload) for message in batch.messages) for batch in batches]
    assert max(sizes) < 18_000
    assert len(batches) < 6
    await source.aclose()


async def test_a_row_that_is_too_large_to_come_with_others_is_not_sent_with_them(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    await world.publisher.execute(
        "insert into orders select 1, 0, string_agg(md5(random()::text), '')"
        " from generate_series(1, 10000)"
    )
    await world.publisher.execute("insert into orders values (2, 0, 'small')")
    source = await connected(world)
    assert source._session is not None
    statement = source._session.reader._rows.above.packed

    record = await world.publisher.fetchrow(statement, 0, 100, 2048)

    assert record is not None
    assert record["is_unfit"]
    assert len(record["payloads"]) < 1000
    assert [len(message.payload) > 300_000 for message in messages_of(await polled(source, 2))] == [
        True,
        False,
    ]
    await source.aclose()


async def test_a_claim_check_has_more_until_its_last_page(world: OutboxWorld) -> None:
    await enable_orders(world.publisher, ", claim_check_rows => 10")
    await world.publisher.execute(
        "insert into orders select g, 0, 'a' from generate_series(1, 120) g"
    )
    source = await connected(world, batch_size=50)
    assert source._session is not None

    for _ in range(2):
        await polled(source, 1)
        assert source._session.has_more

    await rest_of(source)
    assert not source._session.has_more
    await source.aclose()


async def test_the_next_batch_is_read_while_this_one_is_unacknowledged(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    await _insert_singly(world, 5)
    source = await connected(world, batch_size=2)

    await polled(source, 2, acknowledge=False)
    ahead = _ahead(source)
    assert ahead is not None
    async with asyncio.timeout(BOUND_S):
        assert (await ahead).rows.ids == [3, 4]
    # What is read by now does not need the table any more.
    async with world.publisher.transaction():
        await world.publisher.execute("lock table pgtrickle.outbox_orders")
        assert ops(await polled(source, 2, acknowledge=False)) == [("insert", "3"), ("insert", "4")]

    assert ops(await polled(source, 1)) == [("insert", "5")]
    assert _ahead(source) is None
    await source.aclose()


async def test_what_was_read_ahead_of_a_batch_that_is_released_waits_for_it(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher)
    await _insert_singly(world, 5)
    source = await connected(world, batch_size=2)
    (first,) = await polled(source, 2, acknowledge=False)
    assert _ahead(source) is not None

    await source.reject(first)

    assert [key for _, key in ops(await rest_of(source))] == ["1", "2", "3", "4", "5"]
    await source.aclose()


async def test_a_source_that_is_closed_reads_no_further(world: OutboxWorld) -> None:
    await enable_orders(world.publisher)
    await _insert_singly(world, 3)
    source = await connected(world, batch_size=2)
    locker = await world.connect_publisher()
    (first,) = await polled(source, 2, acknowledge=False)
    assert source._session is not None
    async with locker.transaction():
        await locker.execute("lock table pgtrickle.outbox_orders")
        await source._session.aclose()
        source._session.read_ahead()
        in_flight = _ahead(source)
        assert in_flight is not None
        await until(
            lambda: world.publisher.fetchval(
                "select exists (select from pg_locks where not granted)"
            )
        )

        async with asyncio.timeout(BOUND_S):
            await source.aclose()

        assert in_flight.cancelled()
    assert len(first.messages) == 2
    await locker.close()


async def test_a_claim_check_behind_what_is_read_ahead_comes_in_its_turn(
    world: OutboxWorld,
) -> None:
    await enable_orders(world.publisher, ", claim_check_rows => 3")
    await _insert_singly(world, 4)
    await world.publisher.execute("update orders set version = 1")
    await _insert_singly(world, 4, first=10)
    source = await connected(world, batch_size=2)

    batches = await rest_of(source)

    assert ops(batches) == [
        *(("insert", str(key)) for key in range(1, 5)),
        *(("delete", str(key)) for key in range(1, 5)),
        *(("insert", str(key)) for key in range(1, 5)),
        *(("insert", str(key)) for key in range(10, 14)),
    ]
    await source.aclose()


async def test_readers_at_rest_are_woken_without_a_notification_and_without_each_other(
    world: OutboxWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "REST_S", 10 * BOUND_S)
    await enable_orders(world.publisher, ", notify => false")
    await world.publisher.execute("create table gone (id int primary key)")
    await world.publisher.execute("select pgtrickle.enable_outbox('gone')")
    source = await connected(world)
    other = OutboxSource.from_options({"outbox": "gone"}, world.context(pipeline="other"))
    await other.connect()
    for each in (source, other):
        assert (await each.poll()).is_end_of_backlog
    resting = [asyncio.create_task(each.poll()) for each in (source, other)]

    await world.publisher.execute("select pgtrickle.disable_outbox('gone')")
    await world.publisher.execute("insert into orders values (1, 0, 'a')")

    woken, gone = await asyncio.wait_for(asyncio.gather(*resting, return_exceptions=True), BOUND_S)
    assert isinstance(gone, RelayError)
    assert isinstance(woken, Batch)
    assert ops([woken] if woken.messages else await polled(source, 1)) == [("insert", "1")]
    await source.aclose()
    await other.aclose()


async def _insert_singly(world: OutboxWorld, rows: int, *, first: int = 1) -> None:
    """Each by a statement of its own, so that each is an outbox row."""
    for key in range(first, first + rows):
        await world.publisher.execute("insert into orders values ($1, 0, 'a')", key)


def _ahead(source: OutboxSource) -> asyncio.Task[Round] | None:
    assert source._session is not None
    return source._session.ahead


def _packs(source: OutboxSource) -> bool:
    assert source._session is not None
    return source._session.reader._rows._rounds_before_packing == 0
