"""An outbox that is a table of its application, through the sources that read every outbox."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import msgspec

from relay.backends.outbox import OutboxSource
from relay.contracts import Batch
from relay.partition import Partition
from tests.integration.outbox_surroundings import OutboxWorld, messages_of, outbox_world, polled
from tests.servers.postgres import Database

ROWS = 40


async def adopt(world: OutboxWorld) -> None:
    await world.publisher.execute(
        "create table public.written (seq bigint generated always as identity primary key,"
        " who text, kind text, topic text, event text, said jsonb, mark uuid, at timestamptz);"
        "select pgtrickle.adopt_outbox('shop', 'public.written', id => 'seq', payload => 'event',"
        " key => 'who', dedup_key => 'mark', event_type => 'kind', subject => 'topic',"
        " headers => 'said', created_at => 'at')"
    )


async def write(world: OutboxWorld) -> None:
    await world.publisher.execute(
        "insert into public.written (who, event) select (g % 7)::text, g::text"
        f" from generate_series(1, {ROWS}) as g"
    )


async def test_columns_become_what_a_message_has(any_migrated_database: Database) -> None:
    async with outbox_world(any_migrated_database.dsn) as world:
        await adopt(world)
        await world.publisher.execute(
            "insert into public.written (who, kind, topic, event, said, mark, at) values"
            " ('7', 'paid', 'orders', '{\"a\": 1 }', '{\"trace\": \"t\", \"kind\": 2}',"
            "  'a3f1b7c2-0000-4000-8000-000000000001', '2026-01-02 03:04:05+00'),"
            " (null, null, null, 'no JSON', null, null, null),"
            " (null, null, null, null, '[]', null, null)"
        )
        source = world.source("shop", world.context(dedup_namespace="eu"))
        await source.connect()

        full, bare, empty = messages_of(await polled(source, 3))
        await source.aclose()

        assert full.dedup_key == "eu:a3f1b7c2-0000-4000-8000-000000000001"
        assert (full.key, full.op, full.stream_table, full.outbox_id) == ("7", "event", "shop", 1)
        assert full.payload == b'{"a": 1 }'
        assert full.created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        assert full.headers == {
            "trace": "t", "kind": "2", "event_type": "paid", "subject": "orders",
        }  # fmt: skip
        assert (bare.key, bare.payload, bare.headers) == (None, b"no JSON", {})
        assert bare.dedup_key.startswith("eu:outbox_shop:2:0:")
        assert (empty.payload, empty.headers, empty.created_at) == (b"null", {}, None)


async def test_groups_partitions_and_a_seek_give_each_row_to_whom_it_belongs(
    any_migrated_database: Database,
) -> None:
    async with outbox_world(any_migrated_database.dsn) as world:
        await adopt(world)
        # Ids that nobody will ever see.
        with contextlib.suppress(ZeroDivisionError):
            async with world.publisher.transaction():
                await write(world)
                raise ZeroDivisionError
        await write(world)
        events = {str(number) for number in range(1, ROWS + 1)}

        await world.publisher.execute(
            "select pgtrickle.create_consumer_group('g', 'shop', 'earliest')"
        )
        workers = [
            OutboxSource.from_options(
                {"outbox": "shop", "consumer_group": "g"},
                world.context(pipeline="grouped", worker_id=worker, batch_size=9),
            )
            for worker in ("one", "two")
        ]
        taken: list[Batch] = []
        for worker in workers:
            await worker.connect()
        while sum(len(batch.messages) for batch in taken) < ROWS:
            for worker in workers:
                taken.append(await worker.poll())
                await worker.acknowledge(taken[-1])
        for worker in workers:
            await worker.aclose()
        given = [message.payload.decode() for message in messages_of(taken)]
        assert (len(given), set(given)) == (ROWS, events)

        await world.publisher.execute(
            'select pgtrickle.set_relay_outbox(\'shared\', \'{"source": {"outbox": "shop"},'
            ' "sink": {"type": "stdout"}, "partitions": 2}\')'
        )
        parts = []
        for number in (1, 2):
            context = msgspec.structs.replace(
                world.context(pipeline=f"shared/{number}"),
                partition=Partition(number, 2),
                partitioning={"partitions": 2, "key_columns": None},
            )
            source = OutboxSource.from_options({"outbox": "shop"}, context)
            await source.connect()
            batch = await source.poll()
            await source.acknowledge(batch)
            parts.append({(message.key, message.payload.decode()) for message in batch.messages})
            await source.aclose()
        assert {key for key, _ in parts[0]} & {key for key, _ in parts[1]} == set()
        assert {event for part in parts for _, event in part} == events

        await world.publisher.execute(
            'select pgtrickle.set_relay_outbox(\'alone\', \'{"source": {"outbox": "shop"},'
            ' "sink": {"type": "stdout"}, "start": "latest"}\')'
        )
        assert (
            await world.publisher.fetchval("select pgtrickle.relay_seek('alone', 75::bigint)") == 6
        )
        source = world.source("shop", world.context(pipeline="alone"))
        await source.connect()
        again = messages_of(await polled(source, 6))
        await source.aclose()
        assert [message.outbox_id for message in again] == [75, 76, 77, 78, 79, 80]
