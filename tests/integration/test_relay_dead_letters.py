"""Messages that can't be delivered: kept with their reason, and delivered when it is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from tests.integration.relay_surroundings import (
    Event,
    NatsWorld,
    RelayWorld,
    StartProcess,
    nats_world,
    relay_world,
    until,
)
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database


class _Letter(msgspec.Struct):
    dedup_key: str
    error: str
    payload: bytes
    attempts: int


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        yield world


@pytest.fixture
async def stream(nats_server: NatsServer) -> AsyncIterator[NatsWorld]:
    async with nats_world(nats_server, "letters") as stream:
        yield stream


async def _letters(world: RelayWorld) -> list[_Letter]:
    rows = await world.owner.fetch(
        "select dedup_key, error, payload, attempts from pgtrickle.relay_dlq_list()"
    )
    return [msgspec.convert(dict(row), _Letter) for row in rows]


async def _until_letters(world: RelayWorld, count: int) -> list[_Letter]:
    async def found() -> list[_Letter] | None:
        letters = await _letters(world)
        return letters if len(letters) == count else None

    return await until(found)


async def _retry(world: RelayWorld) -> None:
    await world.run("select pgtrickle.relay_dlq_retry(id) from pgtrickle.relay_dlq_list()")


async def _until_inbox_holds(world: RelayWorld, keys: list[str]) -> None:
    async def found() -> bool:
        return await world.inbox_keys("arrived") == sorted(keys)

    await until(found)


async def test_what_the_inbox_refuses_is_kept_and_its_neighbours_are_written(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await world.reverse("in", stream.source(), "arrived")
    await world.run(
        "alter table pgtrickle.arrived add constraint small check ((payload ->> 'id')::int < 100)"
    )
    await stream.publish(1, 2)
    broken = rb'{"id": 3, "note": "a\u0000b"}'
    for key, body in (("m3", broken), ("m100", b'{"id": 100}')):
        await stream.client.jetstream().publish(
            f"{stream.subject}in", body, headers={"Nats-Msg-Id": key}
        )
    await stream.publish(4, 5)
    relay = await world.relay()

    nul, large = await _until_letters(world, 2)
    await _until_inbox_holds(world, ["m1", "m2", "m4", "m5"])
    assert (nul.dedup_key, nul.payload) == ("m3", broken)
    assert "unsupported Unicode escape sequence" in nul.error
    assert large.dedup_key == "m100"
    assert "small" in large.error

    await world.run("alter table pgtrickle.arrived drop constraint small")
    await _retry(world)

    await _until_inbox_holds(world, ["m1", "m100", "m2", "m4", "m5"])
    (nul,) = await _until_letters(world, 1)

    async def is_told() -> bool:
        (letter,) = await _letters(world)
        return letter.attempts == 2

    await until(is_told)
    assert nul.dedup_key == "m3"
    assert "pgtrickle_relay_dlq_entries_total{" in await world.page(relay, "/metrics")


async def test_what_is_too_large_for_the_broker_is_kept_and_delivered_where_it_fits(
    world: RelayWorld, stream: NatsWorld, nats_server_with: Callable[..., NatsServer]
) -> None:
    await world.make_orders()
    small = nats_server_with("max_payload: 65536")
    async with nats_world(small, "letters") as narrow:
        await world.forward("out", narrow.sink())
        await world.run(
            "insert into orders (id, note) values (1, 'a'), (2, repeat('x', 100000)), (3, 'c')"
        )
        relay = await world.relay()
        (letter,) = await _until_letters(world, 1)
        await narrow.until_holding(2)
        assert [event.id for event in await narrow.events()] == [1, 3]
        assert "65536" in letter.error

        async with world.restarting(relay, "out"):
            await world.forward("out", stream.sink())
        await _retry(world)

        await stream.until_holding(1)
        (event,) = await stream.events()
        assert (event.dedup_key, event.id) == (letter.dedup_key, 2)
        await _until_letters(world, 0)


async def test_what_the_template_could_not_name_gets_its_subject_when_it_is_tried_again(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await world.make_orders()
    by_note = f"{stream.stream}.{{payload.note}}"
    await world.forward("out", {**stream.sink(), "subject_template": by_note}, dedup_namespace="n")
    await world.run("insert into orders (id, note) values (1, 'a'), (2, null), (3, 'c')")
    relay = await world.relay()
    (letter,) = await _until_letters(world, 1)
    first, second, third = (f"n:outbox_orders:1:{index}:" for index in range(3))
    assert letter.dedup_key.startswith(second)
    await stream.until_holding(2)

    async with world.restarting(relay, "out"):
        by_op = {**stream.sink(), "subject_template": f"{stream.stream}.by.{{op}}"}
        await world.forward("out", by_op, dedup_namespace="n")
    await _retry(world)

    await stream.until_holding(3)
    events = await stream.events()
    assert events[0].dedup_key.startswith(first)
    assert events[1].dedup_key.startswith(third)
    assert events[2].dedup_key == letter.dedup_key
    assert [_subject_end(event) for event in events] == ["a", "c", "by.insert"]
    await _until_letters(world, 0)


async def test_a_reverse_message_without_its_key_is_kept_and_transformed_when_tried_again(
    world: RelayWorld, stream: NatsWorld
) -> None:
    def config(rule: str) -> str:
        return msgspec.json.encode(
            {
                "source": stream.source(),
                "sink": {"type": "pg-inbox", "inbox": "arrived"},
                "dedup_key_from": rule,
                "event_type_from": "constant:arrived",
            }
        ).decode()

    await world.run("select pgtrickle.create_inbox('arrived')")
    statement = "select pgtrickle.set_relay_inbox('in', $1::text::jsonb)"
    await world.run(statement, config("payload:order"))
    await stream.publish(1, 1)
    relay = await world.relay()
    (letter,) = await _until_letters(world, 1)
    assert "dedup_key_from asks for payload:order" in letter.error

    async with world.restarting(relay, "in"):
        await world.run(statement, config("payload:id"))
    await _retry(world)

    await _until_inbox_holds(world, ["1"])
    assert await world.value("select event_type from pgtrickle.arrived") == "arrived"


async def test_a_request_whose_notification_was_missed_is_found_when_the_relay_listens_again(
    world: RelayWorld, stream: NatsWorld
) -> None:
    await world.make_orders()
    by_note = f"{stream.stream}.{{payload.note}}"
    await world.forward("out", {**stream.sink(), "subject_template": by_note})
    await world.insert(1, 1)
    await world.relay()
    await _until_letters(world, 1)

    await world.run(
        "insert into pgtrickle.relay_dlq_retries (relay_group_id, pipeline, id)"
        " select relay_group_id, pipeline, id from pgtrickle.relay_dlq"
    )
    await world.run(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name like '%relay listen'"
    )

    async def was_tried_again() -> bool:
        (letter,) = await _letters(world)
        return letter.attempts == 2

    await until(was_tried_again)


def _subject_end(event: Event) -> str:
    return event.subject.partition(".")[2]
