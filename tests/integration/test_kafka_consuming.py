"""What the Kafka source reads, commits and releases, alone and among other members of its group."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import NewPartitions
from aiokafka.errors import CommitFailedError, KafkaError

from relay.backends.kafka import KafkaSource
from relay.contracts import Batch
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    Outage,
    OwnershipLost,
    PositionLost,
    RelayError,
)
from relay.mapping import compile_reverse
from relay.message import RelayMessage
from tests.contract.evidence import dedup_keys
from tests.contract.kafka_broker import (
    Broker,
    batch_with_broken_header,
    eventually,
    new_name,
    source_of,
)
from tests.contract.source_contract import (
    assert_nothing_more,
    collect,
    collect_through_outages,
    messages_of,
)
from tests.servers.kafka import KafkaServer
from tests.servers.proxy import TcpProxy

BOUND_S = 40.0


@pytest.fixture
async def broker(kafka_server: KafkaServer) -> AsyncIterator[Broker]:
    broker = Broker(kafka_server)
    await broker.create()
    yield broker
    await broker.drop()


@pytest.fixture
async def wide(kafka_server: KafkaServer) -> AsyncIterator[Broker]:
    """A topic of four partitions."""
    broker = Broker(kafka_server)
    await broker.create(partitions=4)
    yield broker
    await broker.drop()


def reader(broker: Broker, **keys: Any) -> KafkaSource:
    return source_of(broker.server.brokers, broker.topic, **keys)


async def connected(broker: Broker, **keys: Any) -> KafkaSource:
    source = reader(broker, **keys)
    await source.connect()
    return source


async def trouble_of(source: KafkaSource) -> RelayError:
    """Poll until something ends it."""
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                await source.poll()
            except RelayError as error:
                return error


# What it commits


async def test_every_partition_of_a_batch_is_committed_when_it_is_acknowledged(
    wide: Broker,
) -> None:
    for number in range(4):
        await wide.put_all([b"{}"] * (number + 1), partition=number)
    source = await connected(wide)

    batches = await collect(source, 10)
    before = await wide.committed()
    for batch in batches:
        await source.acknowledge(batch)

    assert set(before.values()) == {0}
    assert await wide.committed() == {(wide.topic, n): n + 1 for n in range(4)}
    await source.aclose()


async def test_several_topics_are_read_together(kafka_server: KafkaServer) -> None:
    sides = [Broker(kafka_server) for _ in range(2)]
    for side in sides:
        await side.create()
        await side.put(b'{"a":1}')

    source = source_of(kafka_server.brokers, [side.topic for side in sides])
    await source.connect()
    arrived = messages_of(await collect(source, 2))

    assert {one.subject for one in arrived} == {side.topic for side in sides}
    places = {one.dedup_key.rpartition(":")[0] for one in arrived}
    assert places == {f"kafka:{side.topic}:0:0" for side in sides}
    await source.aclose()
    for side in sides:
        await side.drop()


@pytest.mark.shows("source:kafka.topic", "source:kafka.group_id")
async def test_each_group_reads_a_topic_for_itself(broker: Broker) -> None:
    await broker.put_all([b"{}"] * 3)
    for group in (new_name(), new_name()):
        source = await connected(broker, group_id=group)
        for batch in await collect(source, 3):
            await source.acknowledge(batch)
        assert await broker.committed(group) == {(broker.topic, 0): 3}
        await source.aclose()


@pytest.mark.shows("source:kafka.auto_offset_reset")
@pytest.mark.parametrize("reset,expected", [("earliest", 3), ("latest", 1)])
async def test_a_group_begins_where_it_is_told_and_stays_there(
    broker: Broker, reset: str, expected: int
) -> None:
    await broker.put_all([b"{}"] * 2)
    await (await connected(broker, auto_offset_reset=reset)).aclose()
    # Comes while nobody reads, and nothing was ever acknowledged.
    await broker.put(b"{}")

    source = await connected(broker, auto_offset_reset=reset)

    assert len(messages_of(await collect(source, expected))) == expected
    await assert_nothing_more(source)
    await source.aclose()


@pytest.mark.shows("source:kafka.fetch_max_bytes")
async def test_a_record_that_is_larger_than_a_fetch_is_read_all_the_same(
    broker: Broker,
) -> None:
    bodies = [b'"%s"' % (b"x" * 50_000)] * 4
    for body in bodies:
        await broker.put(body)
    source = await connected(broker, fetch_max_bytes=1000)

    arrived = messages_of(await collect(source, 4))

    assert [one.payload for one in arrived] == bodies
    await source.aclose()


async def test_a_batch_is_bounded_in_bytes(broker: Broker) -> None:
    await broker.put_all([b'"%s"' % (b"x" * 1000)] * 50)
    source = await connected(broker, batch_bytes=10_000)

    batches = await collect(source, 50)

    assert all(len(batch.messages) <= 10 for batch in batches)
    await source.aclose()


@pytest.mark.shows("source:kafka.isolation_level")
@pytest.mark.parametrize(
    "level,expected", [("read_committed", ["1", "4"]), ("read_uncommitted", ["1", "2", "3", "4"])]
)
async def test_what_a_transaction_aborted_is_left_out_or_not(
    broker: Broker, level: str, expected: list[str]
) -> None:
    async with broker.producer(transactional_id=new_name()) as producer:
        for is_kept, values in ((True, [b"1"]), (False, [b"2", b"3"]), (True, [b"4"])):
            await producer.begin_transaction()
            for value in values:
                await producer.send_and_wait(broker.topic, value)
            await (producer.commit_transaction if is_kept else producer.abort_transaction)()
    source = await connected(broker, isolation_level=level)

    batches = await collect(source, len(expected))
    for batch in batches:
        await source.acknowledge(batch)

    assert [one.payload.decode() for one in messages_of(batches)] == expected
    await assert_nothing_more(source)
    await source.aclose()


# What it makes of records


async def test_records_of_others_keep_key_and_headers(broker: Broker) -> None:
    await broker.put(b'{"a":1}', key="Ä".encode(), headers=[("type", b"paid"), ("type", b"late")])
    await broker.put(None, key=b"gone")
    await broker.put(b"{}", headers=[("pgtrickle-dedup-key", b"theirs")])
    await broker.put(b"{}", key=b"\xff\x00")
    source = await connected(broker)

    first, gone, keyed, binary = messages_of(await collect(source, 4))

    assert (first.key, dict(first.headers), first.op) == ("Ä", {"type": "late"}, "event")
    assert (gone.key, gone.op, gone.payload) == ("gone", "delete", b"null")
    assert (keyed.dedup_key, dict(keyed.headers)) == ("theirs", {})
    assert binary.key == "\\xff\x00"
    reshape = compile_reverse("record_key", "header:type")
    assert (reshape(first).dedup_key, reshape(first).subject) == ("Ä", "late")
    await source.aclose()


@pytest.mark.parametrize("compression", ["none", "gzip", "lz4", "snappy", "zstd"])
async def test_records_with_a_header_name_that_is_not_utf_8_are_refused_and_hold_up_nothing(
    wide: Broker, compression: str
) -> None:
    values = [b'{"n":%d}' % number for number in range(30)]
    for number in range(4):
        await wide.put_all([b'"before"'] * 20, partition=number)
    await wide.put_raw(batch_with_broken_header(values, compression))
    for number in range(4):
        await wide.put_all([b'"behind"'] * 20, partition=number)
    source = await connected(wide)

    batches = await collect(source, 190, timeout_s=BOUND_S)
    for batch in batches:
        await source.acknowledge(batch)

    arrived = messages_of(batches)
    assert len(set(dedup_keys(arrived))) == len(arrived) == 160
    assert [one.payload for one in arrived if f"{wide.topic}:0:" in one.dedup_key] == [
        *[b'"before"'] * 20,
        *[b'"behind"'] * 20,
    ]
    refused = [one for batch in batches for one in batch.rejected]
    assert [one.message.dedup_key for one in refused] == [
        f"kafka:{wide.topic}:0:{offset}" for offset in range(20, 50)
    ]
    assert str(refused[0].error) == (
        f"record 20 of {wide.topic!r}, partition 0, can't be read: a header's name is not UTF-8"
    )
    assert (await wide.committed())[wide.topic, 0] == 70
    await assert_nothing_more(source)
    await source.aclose()


async def test_a_broken_envelope_is_refused_with_its_key_and_body(broker: Broker) -> None:
    ours = [("pgtrickle-format", b"envelope"), ("pgtrickle-dedup-key", b"k:1")]
    await broker.put(b'{"v":2}', headers=ours)
    await broker.put(None, headers=ours)
    await broker.put(b"{}")
    source = await connected(broker)

    batches = await collect(source, 3)

    refused = [one for batch in batches for one in batch.rejected]
    assert [(one.message.dedup_key, one.message.payload) for one in refused] == [
        ("k:1", b'{"v":2}'),
        ("k:1", b""),
    ]
    assert len(messages_of(batches)) == 1
    await source.aclose()


# Where it goes on


@pytest.mark.shows("source:kafka.on_position_lost")
@pytest.mark.parametrize("how,expected", [("fail", []), ("earliest", [8, 9]), ("latest", [])])
async def test_a_position_that_retention_removed_is_said_and_handled_as_configured(
    broker: Broker, caplog: pytest.LogCaptureFixture, how: str, expected: list[int]
) -> None:
    await broker.put_all([b"%d" % n for n in range(10)])
    source = await connected(broker, batch_size=5)
    (batch,) = await collect(source, 5)
    await source.acknowledge(batch)
    await source.aclose()
    await broker.remove_before(8)

    source = reader(broker, on_position_lost=how)
    said = r"goes on at offset 5 of .*, partition 0, which has 8 to 10: offsets 5 to 7 were removed"
    if how == "fail":
        with pytest.raises(PositionLost, match=said):
            await source.connect()
    else:
        with caplog.at_level(logging.WARNING):
            await source.connect()
        arrived = messages_of(await collect(source, len(expected)))
        assert [int(one.payload) for one in arrived] == expected
        await assert_nothing_more(source)
        assert "offsets 5 to 7 were removed before they were read" in caplog.text
    await source.aclose()


async def test_a_position_that_is_removed_while_it_reads_is_said(broker: Broker) -> None:
    source = await connected(broker)
    await broker.put_all([b"%d" % n for n in range(10)])
    (batch,) = await collect(source, 10)

    await broker.remove_before(8)
    await source.reject(batch)
    error = await trouble_of(source)

    assert isinstance(error, PositionLost)
    assert "which has 8 to 10" in str(error)
    await source.aclose()


async def test_a_topic_that_is_deleted_and_created_again_is_said(broker: Broker) -> None:
    await broker.put_all([b"{}"] * 5)
    source = await connected(broker, session_timeout_ms=1000)
    for batch in await collect(source, 5):
        await source.acknowledge(batch)
    committed = await broker.committed()
    await broker.drop()
    error = await trouble_of(source)
    assert isinstance(error, Outage)
    await source.aclose()
    with pytest.raises(DestinationMissing):
        await source.connect()

    await broker.create()
    assert committed == {(broker.topic, 0): 5}
    # The broker forgets a group's offsets of a topic that is removed; a mirror does not.
    await eventually(lambda: _is_set(broker, 5))
    with pytest.raises(PositionLost, match="was the topic deleted and created again"):
        await source.connect()
    await source.aclose()


# Among others


@pytest.mark.shows("source:kafka.group_instance_id")
async def test_whoever_runs_the_pipeline_next_has_its_partitions_at_once_and_shuts_out_the_other(
    broker: Broker,
) -> None:
    await broker.put_all([b"%d" % n for n in range(10)])
    keys = {"session_timeout_ms": 30_000, "batch_size": 5}
    stalled = await connected(broker, **keys)
    (batch,) = await collect(stalled, 5)

    # As after a kill: the one before has not left the group.
    successor = await connected(broker, **keys)
    again = messages_of(await collect(successor, 10, timeout_s=5))

    assert [one.payload for one in again] == [b"%d" % n for n in range(10)]
    with pytest.raises(OwnershipLost):
        await stalled.acknowledge(batch)
    assert isinstance(await trouble_of(stalled), OwnershipLost)
    await stalled.aclose()
    assert await successor.is_healthy()
    await successor.poll()
    await successor.aclose()


async def test_a_pipeline_whose_topic_is_changed_takes_its_place_when_its_session_is_over(
    broker: Broker, wide: Broker
) -> None:
    keys = {"group_id": broker.topic, "session_timeout_ms": 1500}
    before = await connected(broker, **keys)
    await before.aclose()
    await wide.put_all([b"{}"] * 3)
    source = reader(wide, **keys)

    with pytest.raises(Outage, match="read other topics") as refused:
        await source.connect()
    await asyncio.sleep(refused.value.retry_after_s or 0)
    await source.connect()

    assert len(messages_of(await collect(source, 3))) == 3
    await source.aclose()


async def test_members_with_names_of_their_own_share_the_partitions(wide: Broker) -> None:
    first = await connected(wide, pipeline="a", group_instance_id="")
    second = await connected(wide, pipeline="b")
    for number in range(4):
        await wide.put_all([b"%d" % number] * 5, partition=number)

    arrived: dict[str, list[RelayMessage]] = {"first": [], "second": []}
    async with asyncio.timeout(BOUND_S):
        while sum(map(len, arrived.values())) < 20:
            for name, source in (("first", first), ("second", second)):
                batch = await source.poll()
                arrived[name] += batch.messages
                if not batch.is_empty:
                    await source.acknowledge(batch)

    assert all(arrived.values())
    assert len(set(dedup_keys([*arrived["first"], *arrived["second"]]))) == 20
    await first.aclose()
    # What the first leaves, the second has.
    await wide.put_all([b"later"] * 3, partition=0)
    await wide.put_all([b"later"] * 3, partition=3)

    async def has_all() -> bool:
        return (await second.describe())["partitions"] == "4 of 4"

    await eventually(has_all)
    await second.aclose()


@pytest.mark.shows("source:kafka.session_timeout_ms")
async def test_partitions_of_one_that_died_come_when_its_session_is_over(
    broker: Broker, kafka_proxy: TcpProxy
) -> None:
    await broker.put_all([b"{}"] * 3)
    keys = {"session_timeout_ms": 2000, "rebalance_timeout_ms": 2000, "group_instance_id": ""}
    dead = source_of(kafka_proxy.address, broker.topic, **keys)
    await dead.connect()
    await collect(dead, 3)
    await kafka_proxy.cut()

    alive = await connected(broker, **keys)

    assert len(messages_of(await collect(alive, 3, timeout_s=BOUND_S))) == 3
    assert alive.keep_alive_interval_s == pytest.approx(0.667, abs=0.01)
    with pytest.raises(ConfigurationError, match="INVALID_SESSION_TIMEOUT"):
        await reader(broker, session_timeout_ms=100).connect()
    await dead.aclose()
    await alive.aclose()


async def test_a_rebalance_waits_until_what_is_in_flight_is_settled(wide: Broker) -> None:
    for number in range(4):
        await wide.put_all([b"{}"] * 5, partition=number)
    first = await connected(wide, pipeline="a", rebalance_timeout_ms=60_000)
    batches = await collect(first, 20)

    joining = asyncio.create_task(connected(wide, pipeline="b", rebalance_timeout_ms=60_000))
    await eventually(lambda: _is_rebalancing(first))
    assert (await first.poll()).is_empty
    assert not joining.done()
    for batch in batches:
        await first.acknowledge(batch)
    second = await joining

    assert await wide.committed() == {(wide.topic, number): 5 for number in range(4)}
    await assert_nothing_more(second)
    await assert_nothing_more(first)
    await first.aclose()
    await second.aclose()


@pytest.mark.shows("source:kafka.rebalance_timeout_ms")
async def test_what_is_not_settled_in_time_goes_to_the_next_and_is_lost_to_us(
    broker: Broker,
) -> None:
    await broker.put_all([b"{}"] * 5)
    first = await connected(broker, pipeline="b", rebalance_timeout_ms=1000)
    (batch,) = await collect(first, 5)

    # The first by name gets the one partition.
    second = await connected(broker, pipeline="a", rebalance_timeout_ms=1000)

    assert len(messages_of(await collect(second, 5, timeout_s=BOUND_S))) == 5
    with pytest.raises(OwnershipLost):
        await first.acknowledge(batch)
    with pytest.raises(OwnershipLost):
        await first.keep_alive(batch)
    await first.aclose()
    await second.aclose()


async def test_a_rejected_batch_takes_back_what_came_after_it(broker: Broker) -> None:
    await broker.put_all([b"%d" % n for n in range(30)])
    source = await connected(broker, batch_size=10)
    first, second, third = await _three(source)
    await source.acknowledge(first)

    await source.reject(second)
    again = messages_of(await collect(source, 20))
    await source.acknowledge(third)

    assert [int(one.payload) for one in again] == list(range(10, 30))
    assert await broker.committed() == {(broker.topic, 0): 10}
    await source.aclose()


async def test_new_partitions_are_found(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.backends.kafka.client.METADATA_AGE_MS", 100)
    source = await connected(broker, session_timeout_ms=1500)
    async with broker.admin() as admin:
        await admin.create_partitions({broker.topic: NewPartitions(3)})
    await broker.put(b'"there"', partition=2)

    assert messages_of(await collect(source, 1))[0].payload == b'"there"'
    await source.aclose()


async def test_partitions_that_were_added_before_a_successor_took_over_are_found(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = await connected(broker)
    async with broker.admin() as admin:
        await admin.create_partitions({broker.topic: NewPartitions(3)})

    monkeypatch.setattr("relay.backends.kafka.client.METADATA_AGE_MS", 100)

    # As after a kill: the one before has not left the group.
    successor = await connected(broker)
    await broker.put(b'"there"', partition=2)

    assert messages_of(await collect(successor, 1, timeout_s=20))[0].payload == b'"there"'
    await successor.aclose()
    await killed.aclose()


async def _three(source: KafkaSource) -> tuple[Batch, Batch, Batch]:
    found: list[Batch] = []
    while len(found) < 3:
        found += await collect(source, 10)
    first, second, third = found
    return first, second, third


async def _is_rebalancing(source: KafkaSource) -> bool:
    return (await source.describe())["state"] == "rebalancing"


async def _is_set(broker: Broker, offset: int) -> bool:
    """Set where the group goes on, once it has no member any more."""
    try:
        await broker.commit(offset)
    except CommitFailedError:
        return False
    return True


# A topic that is deleted and created again


async def test_a_client_whose_part_in_the_group_has_ended_is_an_outage(broker: Broker) -> None:
    await broker.put_all([b'"1"'])
    source = await connected(broker)
    await collect(source, 1)
    (task,) = (
        one
        for one in asyncio.all_tasks()
        if "_coordination_routine" in getattr(one.get_coro(), "__qualname__", "")
    )

    task.cancel()

    trouble = await trouble_of(source)
    assert isinstance(trouble, Outage)
    assert "part in the group ended" in str(trouble)
    await source.aclose()


async def test_every_event_of_a_topic_that_was_created_again_has_a_key_of_its_own(
    broker: Broker,
) -> None:
    await broker.put_all([b'"A%d"' % n for n in range(1, 5)])
    source = await connected(broker, on_position_lost="earliest")
    before = messages_of(await collect(source, 4))

    await broker.drop()
    await broker.create()
    await broker.put_all([b'"B%d"' % n for n in range(1, 6)])
    behind: list[Batch] = []
    await collect_through_outages(source, 5, behind, acknowledge=True)

    after = messages_of(behind)
    assert [one.payload for one in after] == [b'"B%d"' % n for n in range(1, 6)]
    assert not set(dedup_keys(before)) & set(dedup_keys(after))
    await source.aclose()


async def test_a_late_acknowledgement_does_not_skip_what_a_topic_has_that_was_created_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.backends.kafka.source._UNWATCHED_MS", -(10**6))
    await broker.put_all([b'"A%d"' % n for n in range(1, 5)])
    source = await connected(broker, batch_size=2)
    (batch,) = await collect(source, 2)

    await broker.drop()
    await broker.create()
    await broker.put_all([b'"B%d"' % n for n in range(1, 6)])
    with pytest.raises((Outage, OwnershipLost)):
        await source.acknowledge(batch)
    assert isinstance(await trouble_of(source), Outage | OwnershipLost)
    await source.connect()

    arrived = messages_of(await collect(source, 5))
    assert [one.payload for one in arrived] == [b'"B%d"' % n for n in range(1, 6)]
    await source.aclose()


class _Sticking(AIOKafkaConsumer):  # type: ignore[misc]  # untyped in the library
    """A consumer that comes to a control batch that compaction has emptied, as the library does.

    A broker makes one only after a long time; what the library raises there is the library's own.
    """

    async def getmany(self, *partitions: Any, **keys: Any) -> Any:
        found = await super().getmany(*partitions, **keys)
        for one, records in found.items():
            if any(record.offset == 3 for record in records):
                self.seek(one, 0 if len(records) > 1 else 3)
                raise KafkaError("Control batch did not contain any records")
        return found


async def test_an_emptied_control_batch_is_passed_and_named(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.backends.kafka.source.AIOKafkaConsumer", _Sticking)
    await broker.put_all([b"%d" % n for n in range(10)])
    source = await connected(broker)

    batches = await collect(source, 10)

    assert [one.payload for one in messages_of(batches)] == [b"%d" % n for n in range(10) if n != 3]
    (refused,) = [one for batch in batches for one in batch.rejected]
    assert f"record 3 of {broker.topic!r}, partition 0, can't be read" in str(refused.error)
    await source.aclose()
