"""The SQS sink against a real server: what the queue holds, in which order, and what is said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import aioboto3
import pytest
from aiobotocore.config import AioConfig

from relay.backends.sqs import SqsSink
from relay.backends.sqs.entry import entry_maker
from relay.backends.sqs.sink import _failed
from relay.errors import DestinationMissing, ErrorKind, MessageTooLarge, NotConnected, Outage
from relay.message import RelayMessage
from tests.contract.evidence import (
    assert_per_key_order,
    assert_same_message,
    complete_message,
    dedup_keys,
    numbered,
)
from tests.contract.sink_contract import deliver
from tests.contract.sqs_broker import Broker, broker_of, sink_of
from tests.servers.proxy import TcpProxy
from tests.servers.sqs import SqsServer

Proxies = Callable[[str, int], Awaitable[TcpProxy]]


@pytest.fixture
async def fifo(sqs_server: SqsServer) -> AsyncIterator[Broker]:
    async with broker_of(sqs_server, is_fifo=True) as broker:
        yield broker


@pytest.fixture
async def standard(sqs_server: SqsServer) -> AsyncIterator[Broker]:
    async with broker_of(sqs_server) as broker:
        yield broker


async def connected(broker: Broker, ordering: str | None = None, **keys: object) -> SqsSink:
    sink = sink_of(broker.url, ordering=ordering, **{**broker.keys, **keys})
    await sink.connect()
    return sink


def large(dedup_key: str, size: int) -> RelayMessage:
    return RelayMessage(dedup_key=dedup_key, payload=b'"%s"' % (b"x" * size))


def counted(sink: SqsSink) -> list[int]:
    """How many messages each call has from now on."""
    queue = sink._queue
    assert queue is not None
    sizes: list[int] = []
    send = queue.send

    async def counting(entries: Sequence[Mapping[str, object]]) -> Mapping[str, object]:
        sizes.append(len(entries))
        return await send(entries)

    queue.send = counting  # type: ignore[method-assign]  # passes on what it counts
    return sizes


@pytest.mark.shows("sink:sqs.format")
@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
async def test_the_documented_attributes_go_with_every_format(
    standard: Broker, format_: str
) -> None:
    sink = await connected(standard, format=format_)
    sent = complete_message()

    await sink.publish([sent])

    (received,) = await standard.take()
    texts = {name: one["StringValue"] for name, one in received["MessageAttributes"].items()}
    assert texts["Pgtrickle-Format"] == format_
    assert texts["Pgtrickle-Dedup-Key"] == sent.dedup_key
    (arrived,) = await standard.restored()
    assert_same_message(arrived, sent)
    await sink.aclose()


@pytest.mark.shows("sink:sqs.subject_template", "sink:sqs.routing")
async def test_the_subject_is_by_template_or_routing_and_reaches_the_consumer(
    standard: Broker,
) -> None:
    sink = await connected(
        standard, format="payload", subject_template="a.{op}", routing={"delete": "gone"}
    )
    for op in ("insert", "delete"):
        message = RelayMessage(dedup_key=op, payload=b"{}", op=op)
        subject = sink.subject_of(message)
        await sink.publish([RelayMessage(dedup_key=op, payload=b"{}", op=op, subject=subject)])

    assert [message.subject for message in await standard.restored()] == ["a.insert", "gone"]
    await sink.aclose()


@pytest.mark.shows("sink:sqs.message_group_id")
async def test_the_message_group_is_the_key_unless_a_template_says_otherwise(
    fifo: Broker, standard: Broker
) -> None:
    messages = [
        RelayMessage(dedup_key="1", key="7", payload=b"{}", stream_table="orders"),
        RelayMessage(dedup_key="2", key="a b", payload=b"{}", stream_table="orders"),
        RelayMessage(dedup_key="3", key="k" * 10_000, payload=b"{}", stream_table="orders"),
        RelayMessage(dedup_key="4", payload=b"{}", stream_table="orders"),
    ]
    for broker, keys, expected in (
        (fifo, {}, ["7", "a%20b", 64, "_"]),
        (fifo, {"message_group_id": "t-{stream_table}"}, ["t-orders"] * 4),
        (standard, {}, [None] * 4),
        (standard, {"message_group_id": "{key}"}, ["7", "a%20b", 64, "_"]),
    ):
        sink = await connected(broker, **keys)
        assert not (await sink.publish(messages)).failures
        groups = {
            one["Attributes"].get("MessageDeduplicationId", str(number + 1)): one["Attributes"].get(
                "MessageGroupId"
            )
            for number, one in enumerate((await broker.take())[-4:])
        }
        found = [
            len(group) if group and len(group) > 60 else group
            for group in (groups[message.dedup_key] for message in messages)
        ]
        assert found == expected
        await sink.aclose()


async def test_a_fifo_queue_holds_a_repeated_message_once(fifo: Broker) -> None:
    sink = await connected(fifo)
    messages = [*numbered(15, keys=5), RelayMessage(dedup_key="ä" * 200, payload=b"{}")]
    await deliver(sink, messages[:10])

    await deliver(sink, messages)
    await deliver(sink, messages)

    assert sorted(dedup_keys(await fifo.restored())) == sorted(dedup_keys(messages))
    await sink.aclose()


async def test_strict_ordering_sends_one_of_a_key_at_a_time_and_pipelined_several(
    fifo: Broker,
) -> None:
    for ordering, calls in (("strict", [1] * 12), ("pipelined", [10, 2])):
        sink = await connected(fifo, ordering)
        sizes = counted(sink)
        messages = numbered(12, prefix=ordering)
        await sink.publish(messages)
        assert sizes == calls
        assert dedup_keys(await fifo.restored())[-12:] == dedup_keys(messages)
        await sink.aclose()


async def test_many_keys_fill_the_calls_and_each_keeps_its_order(fifo: Broker) -> None:
    sink = await connected(fifo)
    sizes = counted(sink)
    messages = numbered(200, keys=50)

    assert not (await sink.publish(messages)).failures

    assert len(sizes) <= 30
    assert_per_key_order(await fifo.restored(), messages)
    await sink.aclose()


@pytest.mark.shows("sink:sqs.max_in_flight")
async def test_so_many_calls_are_in_flight_at_a_time(standard: Broker, tcp_proxy: Proxies) -> None:
    proxy = await tcp_proxy(*standard.server.address)
    for most in (1, 3):
        sink = sink_of(standard.through(proxy), max_in_flight=most, **standard.keys)
        await sink.connect()
        await proxy.wait_for_connections(0)
        proxy.stall()
        publishing = asyncio.create_task(sink.publish(numbered(100, prefix=str(most))))
        await proxy.wait_for_connections(most)
        assert not publishing.done()
        await proxy.restore()
        assert not (await publishing).failures
        await sink.aclose()

    assert len(await standard.restored()) == 200


@pytest.mark.shows("sink:sqs.max_message_bytes")
async def test_a_message_above_our_limit_or_the_queues_fails_alone_and_the_limit_is_named(
    sqs_server: SqsServer, standard: Broker
) -> None:
    async with broker_of(sqs_server, MaximumMessageSize="5000") as small:
        for broker, limit in ((standard, 5000), (small, None)):
            sink = await connected(broker, max_message_bytes=limit)
            good = numbered(10)

            result = await sink.publish([*good[:5], large("big", 5000), *good[5:]])

            ((index, error),) = [(one.index, one.error) for one in result.failures]
            assert index == 5
            assert isinstance(error, MessageTooLarge)
            assert "5000 bytes" in str(error)
            assert dedup_keys(await broker.restored()) == dedup_keys(good)
            await sink.aclose()


async def test_large_messages_share_a_call_as_far_as_its_bytes_allow(standard: Broker) -> None:
    sink = await connected(standard)
    sizes = counted(sink)
    messages = [large(f"l:{number}", 300_000) for number in range(7)]

    result = await sink.publish([*messages, large("huge", 20_000_000)])

    assert [one.index for one in result.failures] == [7]
    assert sorted(sizes) == [1, 3, 3]
    assert sorted(dedup_keys(await standard.restored())) == sorted(dedup_keys(messages))
    await sink.aclose()


async def test_a_call_refused_as_a_whole_is_halved_until_the_culprit_is_found(
    standard: Broker,
) -> None:
    sink = await connected(standard)
    # The queue's limit is lowered behind the sink's back.
    await standard.ask("set_queue_attributes", Attributes={"MaximumMessageSize": "1024"})
    good = numbered(9)

    result = await sink.publish([*good[:4], large("big", 2000), *good[4:]])

    ((index, error),) = [(one.index, one.error) for one in result.failures]
    assert index == 4
    assert error.kind is ErrorKind.MESSAGE
    assert sorted(dedup_keys(await standard.restored())) == sorted(dedup_keys(good))
    await sink.aclose()


def test_each_entry_of_an_answer_is_judged_by_itself_and_silence_is_no_acceptance() -> None:
    answer = {
        "Successful": [{"Id": "0"}, {"Id": "4"}],
        "Failed": [
            {"Id": "1", "Code": "InvalidMessageContents", "SenderFault": True},
            {"Id": "2", "Code": "InternalError", "SenderFault": False},
        ],
    }

    errors = _failed(answer, range(5), "sending")

    assert {number: error.kind for number, error in errors.items()} == {
        1: ErrorKind.MESSAGE,
        2: ErrorKind.OUTAGE,
        3: ErrorKind.OUTAGE,
    }


async def test_a_queue_that_is_deleted_meanwhile_is_said(sqs_server: SqsServer) -> None:
    async with broker_of(sqs_server) as broker:
        sink = await connected(broker)
        await broker.ask("delete_queue")

        result = await sink.publish(numbered(3))

        assert [one.index for one in result.failures] == [0, 1, 2]
        assert all(isinstance(one.error, DestinationMissing) for one in result.failures)
        await sink.aclose()


async def test_a_connection_that_breaks_in_the_middle_of_a_batch_loses_and_repeats_nothing(
    fifo: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*fifo.server.address)
    sink = sink_of(fifo.through(proxy), **fifo.keys)
    await sink.connect()
    messages = numbered(200, keys=40)
    proxy.cut_after(40_000, "to_server")

    publishing = asyncio.create_task(deliver(sink, messages))
    await proxy.wait_until_cut()
    await proxy.restore()
    await publishing

    arrived = await fifo.restored()
    assert len(arrived) == 200
    assert_per_key_order(arrived, messages)
    await sink.aclose()


async def test_a_server_that_stops_answering_is_given_up_after_the_timeout(
    standard: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*standard.server.address)
    sink = sink_of(standard.through(proxy), timeout_ms=2000, **standard.keys)
    await sink.connect()
    proxy.stall()
    started = time.monotonic()

    with pytest.raises(Outage):
        await sink.publish(numbered(3))

    assert time.monotonic() - started < 10
    await proxy.restore()
    await deliver(sink, numbered(3))
    await sink.aclose()


async def test_the_queue_and_what_it_keeps_are_described(fifo: Broker) -> None:
    sink = await connected(fifo)

    described = await sink.describe()

    assert described["order"] == "kept within a message group"
    assert described["largest message"] == "1048576 bytes"
    await sink.aclose()
    with pytest.raises(NotConnected):
        await sink.describe()


@pytest.mark.speed
async def test_publishing_reaches_half_of_what_the_bare_client_reaches(
    sqs_server: SqsServer,
) -> None:
    count = 5000
    messages = [
        RelayMessage(
            dedup_key=f"outbox_orders:{number}:0",
            key=str(number),
            subject="orders",
            op="insert",
            payload=b'{"id":%d,"note":"%s"}' % (number, b"x" * 180),
            stream_table="orders",
            outbox_id=number,
        )
        for number in range(count)
    ]
    async with broker_of(sqs_server) as broker:
        floor_s = await _publish_bare(broker, messages)
    async with broker_of(sqs_server) as broker:
        sink = await connected(broker)
        started = time.perf_counter()
        for start in range(0, count, 1000):
            assert not (await sink.publish(messages[start : start + 1000])).failures
        took_s = time.perf_counter() - started
        await broker.until_attribute("ApproximateNumberOfMessages", str(count))
        await sink.aclose()

    print(f"bare {count / floor_s:,.0f}/s, sink {count / took_s:,.0f}/s")
    assert took_s < 2 * floor_s


async def _publish_bare(broker: Broker, messages: Sequence[RelayMessage]) -> float:
    """Seconds for the same entries through the client alone, as many calls at a time."""
    make = entry_maker("envelope")
    entries = [
        {"MessageBody": entry.body, "MessageAttributes": entry.attributes}
        for entry in map(make, messages)
    ]
    session = aioboto3.Session(
        aws_access_key_id="any", aws_secret_access_key="any", region_name=broker.server.region
    )
    async with session.client(
        "sqs", endpoint_url=broker.server.url, config=AioConfig(parameter_validation=False)
    ) as client:
        turn = asyncio.Semaphore(8)

        async def send(start: int) -> None:
            async with turn:
                answer = await client.send_message_batch(
                    QueueUrl=broker.url,
                    Entries=[
                        {"Id": str(number), **entry}
                        for number, entry in enumerate(entries[start : start + 10])
                    ],
                )
                assert len(answer["Successful"]) == 10

        started = time.perf_counter()
        await asyncio.gather(*(send(start) for start in range(0, len(entries), 10)))
        return time.perf_counter() - started
