"""What the Kafka sink stores: where, how, how often; and what it refuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.record.memory_records import MemoryRecords
from msgspec import structs

from relay import wire
from relay.backends.kafka import KafkaSink
from relay.contracts import PublishResult
from relay.errors import ErrorKind, MessageRejected, MessageTooLarge
from relay.message import RelayMessage
from tests.contract.evidence import (
    assert_per_key_order,
    complete_message,
    dedup_keys,
    first_occurrences,
    until,
)
from tests.contract.kafka_broker import Broker, new_name, sink_of, source_of
from tests.contract.sink_contract import deliver
from tests.contract.source_contract import collect, messages_of
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
    """A topic of six partitions."""
    broker = Broker(kafka_server)
    await broker.create(partitions=6)
    yield broker
    await broker.drop()


async def publish(
    broker: Broker, *messages: RelayMessage, topic: str | None = "", **keys: Any
) -> PublishResult:
    """Publish once with a sink of these keys."""
    where = broker.topic if topic == "" else topic
    sink = sink_of(broker.server.brokers, where, **keys)
    await sink.connect()
    try:
        addressed = [
            one if one.subject else structs.replace(one, subject=sink.subject_of(one))
            for one in messages
        ]
        return await sink.publish(addressed)
    finally:
        await sink.aclose()


def bare(dedup_key: str, **fields: Any) -> RelayMessage:
    return RelayMessage(
        **{"dedup_key": dedup_key, "payload": b'{"id":1}', "op": "insert", **fields}
    )


# Where and how


@pytest.mark.shows("sink:kafka.topic_template", "sink:kafka.routing", "sink:kafka.topic")
async def test_each_event_goes_where_template_and_routing_say(kafka_server: KafkaServer) -> None:
    base = new_name()
    topics = [f"{base}.Order_lines.insert", f"{base}.gone._.x", base]
    broker = Broker(kafka_server, base)
    await broker.create(*topics)

    await publish(
        broker,
        bare("1", stream_table="Order lines"),
        bare("2", key="", op="delete", payload=b'{"a":"x"}'),
        topic=None,
        topic_template=f"{base}.{{stream_table}}.{{op}}",
        routing={"delete": f"{base}.gone.{{key}}.{{payload.a}}"},
    )
    await publish(broker, bare("3"))

    stored = [[one.dedup_key for one in await broker.restored(topic)] for topic in topics]
    assert stored == [["1"], ["2"], ["3"]]
    await broker.drop(*topics)


@pytest.mark.shows("sink:kafka.key_template")
async def test_the_record_key_keeps_an_entity_in_one_partition_in_order(wide: Broker) -> None:
    messages = wide.numbered(120, keys=7)

    assert not (await publish(wide, *messages, key_template="{key}")).failures
    by_entity = await wide.records()

    assert {one.key for one in by_entity} == {b"k%d" % number for number in range(7)}
    places = {(one.key, one.partition) for one in by_entity}
    assert len(places) == 7
    assert_per_key_order(await wide.restored(), messages)


async def test_a_publish_that_is_cancelled_while_it_learns_a_topic_does_not_spoil_the_next(
    wide: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = sink_of(wide.server.brokers, None, topic_template=wide.topic)
    await sink.connect()
    messages = wide.numbered(3)
    asking = asyncio.Event()

    async def never_answered(*_: object) -> dict[str, int]:
        asking.set()
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    with monkeypatch.context() as patched:
        patched.setattr("relay.backends.kafka.sink.limits_of", never_answered)
        publishing = asyncio.create_task(sink.publish(messages))
        async with asyncio.timeout(30):
            await asking.wait()
        publishing.cancel()
        await asyncio.wait([publishing])

    assert not (await sink.publish(messages)).failures
    assert sorted(dedup_keys(await wide.restored())) == dedup_keys(messages)
    await sink.aclose()


async def test_without_a_template_the_record_key_is_the_dedup_key_and_spreads(
    wide: Broker,
) -> None:
    await publish(wide, *wide.numbered(60))

    records = await wide.records()
    assert {one.key for one in records} == {b"m:%d" % number for number in range(60)}
    assert {one.partition for one in records} == set(range(6))


async def test_a_key_goes_to_the_partition_that_the_client_library_chooses(wide: Broker) -> None:
    await publish(wide, *wide.numbered(40, keys=40), key_template="{key}-{op}-☃")
    ours = {one.key: one.partition for one in await wide.records()}

    async with wide.producer() as producer:
        theirs = {
            key: (await producer.send_and_wait(wide.topic, b"{}", key=key)).partition
            for key in ours
        }

    assert theirs == ours


async def test_events_without_a_key_take_turns(wide: Broker) -> None:
    await publish(wide, *[bare(f"{n}", key=None) for n in range(12)], key_template="{key}")

    records = await wide.records()
    assert {one.key for one in records} == {None}
    assert {one.partition for one in records} == set(range(6))


@pytest.mark.shows("sink:kafka.format")
@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
async def test_every_format_carries_its_mark_and_comes_back(broker: Broker, format_: str) -> None:
    sent = structs.replace(complete_message(), subject=broker.topic)

    await publish(broker, sent, format=format_)

    (record,) = await broker.records()
    headers = dict(record.headers)
    assert headers["pgtrickle-format"] == format_.encode()
    assert headers["pgtrickle-dedup-key"] == sent.dedup_key.encode()
    assert headers["traceparent"] == sent.headers["traceparent"].encode()
    if format_ == "payload":
        assert record.value == sent.payload
    source = source_of(broker.server.brokers, broker.topic)
    await source.connect()
    (arrived,) = messages_of(await collect(source, 1))
    assert msgspec.json.decode(arrived.payload) == msgspec.json.decode(sent.payload)
    for field in ("dedup_key", "key", "op", "is_full_refresh", "outbox_id", "refresh_id"):
        assert getattr(arrived, field) == getattr(sent, field)
    await source.aclose()


async def test_a_publishers_header_does_not_pass_for_our_metadata(broker: Broker) -> None:
    headers = {"pgtrickle-op": "delete", "Pgtrickle-Format": "payload", "Other": "☃"}
    await publish(broker, bare("1", headers=headers, subject=broker.topic))

    (record,) = await broker.records()
    (restored,) = await broker.restored()

    assert dict(record.headers) == {
        wire.LOWER.format: b"envelope",
        wire.LOWER.dedup_key: b"1",
        wire.LOWER.op: b"insert",
        "Other": "☃".encode(),
    }
    assert restored.op == "insert"


@pytest.mark.shows("sink:kafka.compression")
@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_batches_are_compressed_as_asked_and_can_be_read(
    broker: Broker, compression: str
) -> None:
    messages = [
        bare(f"{n}", payload=b'"%s"' % (b"repeat " * 400), subject=broker.topic) for n in range(100)
    ]
    assert not (await publish(broker, *messages, compression=compression)).failures

    source = source_of(broker.server.brokers, broker.topic, pipeline=compression)
    await source.connect()
    arrived = messages_of(await collect(source, 100))
    assert dedup_keys(arrived) == dedup_keys(messages)
    assert all(one.payload == messages[0].payload for one in arrived)
    size = len(await broker.stored())
    assert size > 280_000 if compression == "none" else size < 40_000
    await source.aclose()


@pytest.mark.shows("sink:kafka.acks")
@pytest.mark.parametrize("acks,is_idempotent", [("all", True), ("1", False)])
async def test_with_all_acknowledgements_the_broker_knows_the_producer_and_its_batches(
    broker: Broker, acks: str, is_idempotent: bool
) -> None:
    messages = broker.numbered(3)

    assert not (await publish(broker, *messages, acks=acks)).failures

    batch = MemoryRecords(await broker.stored()).next_batch()
    assert (batch.producer_id >= 0) is is_idempotent
    assert dedup_keys(await broker.restored()) == dedup_keys(messages)


@pytest.mark.parametrize("ordering", ["strict", "pipelined"])
async def test_both_orderings_keep_the_order_of_a_partition_with_one_acknowledgement(
    broker: Broker, ordering: str
) -> None:
    messages = broker.numbered(5000)

    assert not (await publish(broker, *messages, acks="1", ordering=ordering)).failures

    assert dedup_keys(await broker.restored()) == dedup_keys(messages)


@pytest.mark.shows("sink:kafka.linger_ms")
async def test_a_small_publish_lingers_and_a_large_one_does_not(broker: Broker) -> None:
    sink = sink_of(broker.server.brokers, broker.topic, linger_ms=60_000)
    await sink.connect()
    large = [
        bare(f"{n}", payload=b'"%s"' % (b"x" * 1000), subject=broker.topic) for n in range(600)
    ]

    started = time.monotonic()
    assert not (await sink.publish(large)).failures
    assert time.monotonic() - started < BOUND_S
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await sink.publish(broker.numbered(1))

    assert len(await broker.records()) == 600
    await sink.aclose()


# What is too large


@pytest.mark.shows("sink:kafka.max_request_size")
@pytest.mark.parametrize("compression,is_accepted", [("none", False), ("zstd", True)])
async def test_what_is_too_large_for_us_is_refused_with_the_limit_unless_compression_helps(
    broker: Broker, compression: str, is_accepted: bool
) -> None:
    large = bare("large", payload=b'"%s"' % (b"x" * 20_000), subject=broker.topic)
    good = broker.numbered(2)

    result = await publish(
        broker, good[0], large, good[1], max_request_size=10_000, compression=compression
    )

    if is_accepted:
        assert not result.failures
    else:
        (failure,) = result.failures
        assert failure.index == 1
        assert isinstance(failure.error, MessageTooLarge)
        assert "max_request_size is 10000 bytes" in str(failure.error)
        assert dedup_keys(await broker.restored()) == dedup_keys(good)


async def test_the_limit_of_the_topic_is_found_and_named(kafka_server: KafkaServer) -> None:
    broker = Broker(kafka_server)
    await broker.create(configuration={"max.message.bytes": "5000"})
    good = broker.numbered(200)
    large = bare("large", payload=b'"%s"' % (b"x" * 5000), subject=broker.topic)

    result = await publish(broker, *good[:100], large, *good[100:])

    (failure,) = result.failures
    assert failure.index == 100
    assert f"max.message.bytes of the topic '{broker.topic}' is 5000 bytes" in str(failure.error)
    assert dedup_keys(await broker.restored()) == dedup_keys(good)
    await broker.drop()


async def test_batches_of_records_that_are_mostly_key_keep_within_a_known_limit(
    kafka_server: KafkaServer,
) -> None:
    broker = Broker(kafka_server)
    await broker.create(configuration={"max.message.bytes": "5000"})
    messages = [bare(f"{n:0{100 + 5 * n}}", subject=broker.topic) for n in range(100)]

    assert not (await publish(broker, *messages)).failures

    assert dedup_keys(await broker.restored()) == dedup_keys(messages)
    await broker.drop()


async def test_a_limit_that_came_later_is_met_with_smaller_batches(broker: Broker) -> None:
    sink = sink_of(broker.server.brokers, broker.topic)
    await sink.connect()
    messages = broker.numbered(200)
    await deliver(sink, messages[:1])
    async with broker.admin() as admin:
        await admin.alter_configs(
            [ConfigResource(ConfigResourceType.TOPIC, broker.topic, {"max.message.bytes": "2000"})]
        )

    async with asyncio.timeout(BOUND_S):
        await deliver(sink, messages[1:])
    (refused,) = (
        await sink.publish([bare("l", payload=b'"%s"' % (b"x" * 9000), subject=broker.topic)])
    ).failures

    assert isinstance(refused.error, MessageTooLarge)
    assert dedup_keys(await broker.restored()) == dedup_keys(messages)
    await sink.aclose()


async def test_a_limit_that_can_not_be_asked_is_met_with_smaller_batches(
    kafka_server: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(kafka_server)
    await broker.create(configuration={"max.message.bytes": "2000"})

    async def unknown(*_: object) -> dict[str, int]:
        return {}

    # As for a user who may write, but not describe configurations.
    monkeypatch.setattr("relay.backends.kafka.sink.limits_of", unknown)
    sink = sink_of(broker.server.brokers, broker.topic)
    await sink.connect()
    messages = broker.numbered(200)

    async with asyncio.timeout(BOUND_S):
        await deliver(sink, messages)

    assert dedup_keys(first_occurrences(await broker.restored())) == dedup_keys(messages)
    await sink.aclose()
    await broker.drop()


@pytest.mark.parametrize(
    "message,words",
    [
        (bare("1", subject="a b"), "can't be the name of a Kafka topic"),
        (bare("1", subject="t" * 250), "has 250 characters, the limit is 249"),
        (bare("a\ud800"), "no UTF-8 form"),
        (bare("1", headers={"a": "\ud800"}), "no UTF-8 form"),
        (bare("1", payload=b"{"), "not JSON"),
    ],
)
async def test_a_message_that_can_not_be_sent_costs_only_itself(
    broker: Broker, message: RelayMessage, words: str
) -> None:
    good = broker.numbered(2)

    result = await publish(broker, good[0], message, good[1])

    (failure,) = result.failures
    assert failure.index == 1
    assert isinstance(failure.error, MessageRejected)
    assert failure.error.found_before_sending
    assert words in str(failure.error)
    assert dedup_keys(await broker.restored()) == dedup_keys(good)


@pytest.fixture
async def compacted(kafka_server: KafkaServer) -> AsyncIterator[Broker]:
    """A topic that takes no record without a key."""
    broker = Broker(kafka_server)
    await broker.create(configuration={"cleanup.policy": "compact"})
    yield broker
    await broker.drop()


async def test_a_record_that_the_broker_refuses_does_not_stop_what_comes_behind_it(
    compacted: Broker,
) -> None:
    large = b'"%s"' % (b"x" * 400_000)
    messages = [
        bare(f"m{n}", key="" if n == 1 else "k", payload=large, subject=compacted.topic)
        for n in range(12)
    ]

    result = await publish(compacted, *messages, key_template="{key}")

    refused = [one.index for one in result.failures if one.error.kind is ErrorKind.MESSAGE]
    assert refused == [1]


async def test_a_record_that_the_broker_refuses_is_found_among_its_neighbours(
    compacted: Broker,
) -> None:
    sink = sink_of(compacted.server.brokers, compacted.topic, key_template="{key}")
    await sink.connect()
    pending = [
        bare(f"m{n}", key="" if n == 20 else "k", subject=compacted.topic) for n in range(50)
    ]
    refused: list[str] = []

    for _ in range(12):
        found, pending = await _attempted(sink, pending)
        refused += found

    assert (refused, pending) == (["m20"], [])
    expected = [f"m{n}" for n in range(50) if n != 20]
    assert dedup_keys(first_occurrences(await compacted.restored())) == expected
    await sink.aclose()


async def _attempted(
    sink: KafkaSink, messages: Sequence[RelayMessage]
) -> tuple[list[str], list[RelayMessage]]:
    """The keys of what is refused for good, and what the loop would publish again."""
    failures = (await sink.publish(messages)).failures
    return (
        [messages[one.index].dedup_key for one in failures if one.error.kind is ErrorKind.MESSAGE],
        [messages[one.index] for one in failures if one.error.kind is not ErrorKind.MESSAGE],
    )


# How often, when things break


async def test_a_connection_that_breaks_again_and_again_stores_everything_once_and_in_order(
    broker: Broker, kafka_proxy: TcpProxy
) -> None:
    sink = sink_of(kafka_proxy.address, broker.topic)
    await sink.connect()
    messages = broker.numbered(4000)

    async def disturb() -> None:
        for cut_after in range(12):
            await kafka_proxy.wait_for_connections(1, timeout_s=BOUND_S)
            kafka_proxy.cut_after(20_000 * cut_after, "to_server")
            await kafka_proxy.wait_until_cut(timeout_s=BOUND_S)
            await kafka_proxy.restore()

    disturbing = asyncio.create_task(disturb())
    for start in range(0, 4000, 1000):
        await deliver(sink, messages[start : start + 1000])
    disturbing.cancel()
    await asyncio.gather(disturbing, return_exceptions=True)
    await kafka_proxy.restore()

    assert dedup_keys(await broker.restored()) == dedup_keys(messages)
    await sink.aclose()


async def test_an_answer_that_is_lost_does_not_store_twice(
    wide: Broker, kafka_proxy: TcpProxy
) -> None:
    sink = sink_of(kafka_proxy.address, wide.topic)
    await sink.connect()
    messages = wide.numbered(500)
    await deliver(sink, messages[:100])

    kafka_proxy.cut_after(1, "to_client")
    result = await sink.publish(messages[100:])
    assert len(result.failures) == 400
    await kafka_proxy.restore()
    await sink.connect()
    await deliver(sink, messages[100:])

    assert sorted(dedup_keys(await wide.restored())) == sorted(dedup_keys(messages))
    await sink.aclose()


async def test_what_can_not_be_sent_again_as_it_was_is_sent_as_new(
    broker: Broker, kafka_proxy: TcpProxy
) -> None:
    sink = sink_of(kafka_proxy.address, broker.topic)
    await sink.connect()
    messages = broker.numbered(40)
    await deliver(sink, messages[:1])
    kafka_proxy.cut_after(1, "to_client")
    assert len((await sink.publish(messages[:20])).failures) == 20
    await kafka_proxy.restore()
    await sink.connect()

    # Others come first, as when dead letters are retried meanwhile.
    await deliver(sink, messages[30:])
    await deliver(sink, messages[:30])

    arrived = first_occurrences(await broker.restored())
    assert sorted(dedup_keys(arrived)) == sorted(dedup_keys(messages))
    await sink.aclose()


async def test_a_publish_that_is_cancelled_can_be_repeated(
    broker: Broker, kafka_proxy: TcpProxy
) -> None:
    sink = sink_of(kafka_proxy.address, broker.topic)
    await sink.connect()
    # So many bytes take more turns than any of these publishes is given.
    value = b'"%s"' % (b"x" * 3000)
    messages = [structs.replace(one, payload=value) for one in broker.numbered(3000)]
    for turns in (1, 3, 10, 30):
        publishing = asyncio.create_task(sink.publish(messages))
        for _ in range(turns):
            await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.wait([publishing], timeout=BOUND_S)
        assert publishing.cancelled()

    await deliver(sink, messages)

    assert dedup_keys(await broker.restored()) == dedup_keys(messages)
    await sink.aclose()


async def test_what_cancelled_publishes_have_stored_one_after_the_other_is_not_sent_again(
    broker: Broker,
) -> None:
    sink = sink_of(broker.server.brokers, broker.topic)
    await sink.connect()
    messages = broker.numbered(3000)
    stored = 0
    for _ in range(2):
        publishing = asyncio.create_task(sink.publish(messages))
        for _ in range(3):
            await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.wait([publishing], timeout=BOUND_S)
        stored = len(await until(broker.restored, stored + 1))

    await deliver(sink, messages)

    assert dedup_keys(await broker.restored()) == dedup_keys(messages)
    await sink.aclose()


async def test_a_broker_that_is_killed_in_the_middle_loses_nothing(broker: Broker) -> None:
    sink = sink_of(broker.server.brokers, broker.topic)
    await sink.connect()
    messages = broker.numbered(3000)
    await deliver(sink, messages[:1000])

    publishing = asyncio.create_task(sink.publish(messages[1000:]))
    await asyncio.sleep(0)
    await asyncio.to_thread(broker.server.kill)
    await asyncio.wait([publishing], timeout=BOUND_S)
    await asyncio.to_thread(broker.server.start)
    await sink.connect()
    await deliver(sink, messages[1000:])

    assert dedup_keys(first_occurrences(await broker.restored())) == dedup_keys(messages)
    await sink.aclose()


async def test_no_record_overtakes_a_first_one_that_was_refused(compacted: Broker) -> None:
    sink = sink_of(compacted.server.brokers, compacted.topic, key_template="{key}")
    await sink.connect()
    large = b'"%s"' % (b"x" * 100_000)
    pending = [
        bare(f"m{n}", key="" if n == 1 else "k", payload=large, subject=compacted.topic)
        for n in range(30)
    ]

    async with asyncio.timeout(BOUND_S):
        while pending:
            _, pending = await _attempted(sink, pending)

    expected = [f"m{n}" for n in range(30) if n != 1]
    assert dedup_keys(first_occurrences(await compacted.restored())) == expected
    await sink.aclose()


async def test_no_record_overtakes_a_first_one_that_was_lost_with_its_connection(
    broker: Broker, kafka_proxy: TcpProxy
) -> None:
    messages: list[RelayMessage] = []
    for turns in range(20):
        # Each has a producer id of its own, of which the partition knows nothing.
        sink = sink_of(kafka_proxy.address, broker.topic)
        await sink.connect()
        some = [
            structs.replace(one, payload=b'"%s"' % (b"x" * 300_000))
            for one in broker.numbered(12, start=len(messages))
        ]
        publishing = asyncio.create_task(sink.publish(some))
        before = kafka_proxy.bytes_forwarded["to_server"]
        while kafka_proxy.bytes_forwarded["to_server"] < before + 50_000:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        await kafka_proxy.reset_connections()
        left = [some[failure.index] for failure in (await publishing).failures]
        await sink.connect()
        await deliver(sink, left)
        messages += some
        await sink.aclose()

    arrived = first_occurrences(await broker.restored())
    assert dedup_keys(arrived) == dedup_keys(messages)


async def test_a_topic_that_was_made_again_with_fewer_partitions_gets_what_was_not_answered(
    wide: Broker, kafka_proxy: TcpProxy
) -> None:
    sink = sink_of(kafka_proxy.address, wide.topic)
    await sink.connect()
    messages = wide.numbered(50)
    await deliver(sink, messages[:10])
    kafka_proxy.cut_after(1, "to_client")
    assert len((await sink.publish(messages[10:])).failures) == 40

    await wide.drop()
    await wide.create(partitions=1)
    await kafka_proxy.restore()
    await sink.connect()
    await deliver(sink, messages[10:])

    # Each has a record key of its own, so that there is no order to keep.
    arrived = first_occurrences(await wide.restored())
    assert sorted(dedup_keys(arrived)) == sorted(dedup_keys(messages[10:]))
    await sink.aclose()
