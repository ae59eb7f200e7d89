"""The NATS sink against a real server: what is stored, in which order, and what is said of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from relay.contracts import Sink
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageTooLarge,
    NotConnected,
    Outage,
    TimedOut,
)
from relay.message import RelayMessage
from relay.wire import TITLE, encoder
from tests.contract.evidence import (
    assert_per_key_order,
    complete_message,
    dedup_keys,
    numbered,
    until,
)
from tests.contract.nats_broker import Broker, port_of, sink_of
from tests.contract.sink_contract import deliver
from tests.servers.nats import NatsServer
from tests.servers.proxy import TcpProxy

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
LIMIT_BYTES = 1024 * 1024


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    broker = Broker(nats_server, "publishing")
    await broker.create()
    yield broker
    await broker.drop()


def large(dedup_key: str, size: int) -> RelayMessage:
    return RelayMessage(dedup_key=dedup_key, payload=b'"%s"' % (b"x" * size), subject="orders.x")


async def test_a_repeated_event_is_stored_once_and_counted_as_a_duplicate(
    broker: Broker,
) -> None:
    sink = sink_of(broker.server.url)
    await sink.connect()
    first = await sink.publish(numbered(500))
    await sink.aclose()

    again = sink_of(broker.server.url)
    await again.connect()
    second = await again.publish(numbered(600))
    await again.aclose()

    assert (first.duplicates, second.duplicates) == (0, 500)
    assert not first.failures
    assert not second.failures
    assert dedup_keys(await broker.restored()) == dedup_keys(numbered(600))


async def test_a_message_above_the_servers_limit_fails_alone_and_the_limit_is_named(
    broker: Broker,
) -> None:
    sink = sink_of(broker.server.url)
    await sink.connect()
    good = numbered(10)

    result = await sink.publish([*good[:5], large("big", LIMIT_BYTES), *good[5:]])

    ((index, error),) = [(one.index, one.error) for one in result.failures]
    assert index == 5
    assert isinstance(error, MessageTooLarge)
    assert str(LIMIT_BYTES) in str(error)
    assert dedup_keys(await broker.restored()) == dedup_keys(good)
    await sink.aclose()


async def test_a_message_above_the_streams_limit_fails_alone(broker: Broker) -> None:
    await broker.update(max_msg_size=2000)
    sink = sink_of(broker.server.url)
    await sink.connect()
    good = numbered(10)

    result = await sink.publish([*good[:5], large("big", 5000), *good[5:]])

    ((index, error),) = [(one.index, one.error) for one in result.failures]
    assert index == 5
    assert isinstance(error, MessageTooLarge)
    assert dedup_keys(await broker.restored()) == dedup_keys(good)
    await sink.aclose()


@pytest.mark.parametrize("ordering", ["strict", "pipelined"])
@pytest.mark.parametrize("keys", [1500, 7])
async def test_a_message_that_the_stream_refuses_among_many_costs_only_itself(
    broker: Broker, ordering: str, keys: int
) -> None:
    await broker.update(max_msg_size=2000)
    sink = sink_of(broker.server.url, ordering=ordering)
    await sink.connect()
    good = numbered(1500, keys=keys)

    async with asyncio.timeout(60):
        result = await sink.publish([*good[:3], large("big", 5000), *good[3:]])

    assert [one.index for one in result.failures] == [3]
    restored = await broker.restored()
    assert sorted(dedup_keys(restored)) == sorted(dedup_keys(good))
    if ordering == "strict":
        assert_per_key_order(restored, good)
    await sink.aclose()


async def test_a_late_acknowledgement_settles_nothing_of_the_next_publish(
    broker: Broker,
) -> None:
    # A listener that is no stream: it receives, and acknowledges nothing.
    listener = Client()
    await listener.connect(broker.server.url)
    await listener.subscribe("silent.>")
    await listener.flush()
    sink = sink_of(broker.server.url, ack_timeout_ms=500)
    await sink.connect()
    cancelled = asyncio.create_task(sink.publish(numbered(3000, keys=3000)))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled

    silent = [msgspec.structs.replace(one, subject="silent.x") for one in numbered(200)]
    result = await sink.publish(silent)

    assert await broker.restored()
    assert [one.index for one in result.failures] == list(range(200))
    await sink.aclose()
    await listener.close()


async def test_after_a_transient_failure_nothing_more_of_its_key_is_sent(
    broker: Broker,
) -> None:
    await broker.create(max_msgs_per_subject=1, discard="new", discard_new_per_subject=True)
    await broker.put("orders.full", b"{}")
    sink = sink_of(broker.server.url)
    await sink.connect()
    messages = [
        RelayMessage(dedup_key=subject, key="one", payload=b"{}", subject=subject)
        for subject in ("orders.free", "orders.full", "orders.behind", "orders.last")
    ]

    result = await sink.publish(messages)

    assert [(one.index, one.was_sent) for one in result.failures] == [
        (1, True),
        (2, False),
        (3, False),
    ]
    assert {one.error.kind for one in result.failures} == {ErrorKind.OUTAGE}
    assert "'orders.full'" in str(result.failures[0].error)
    subjects = [subject for subject, _, _ in await broker.messages()]
    assert subjects == ["orders.full", "orders.free"]
    await sink.aclose()


async def test_headers_beyond_what_jetstream_keeps_are_too_large(broker: Broker) -> None:
    sink = sink_of(broker.server.url)
    await sink.connect()
    heavy = RelayMessage(
        dedup_key="heavy", payload=b"{}", subject="orders.x", headers={"note": "x" * 70_000}
    )

    result = await sink.publish([heavy, *numbered(1)])

    assert [one.index for one in result.failures] == [0]
    assert isinstance(result.failures[0].error, MessageTooLarge)
    await sink.aclose()


async def test_a_full_stream_is_an_outage_that_keeps_the_order_until_it_has_room(
    broker: Broker,
) -> None:
    await broker.update(max_msgs=37, discard="new")
    sink = sink_of(broker.server.url, max_in_flight=16)
    await sink.connect()
    messages = numbered(200, keys=5)

    result = await sink.publish(messages)

    assert len(result.failures) == 163
    assert all(one.error.kind is ErrorKind.OUTAGE for one in result.failures)
    assert "maximum messages exceeded" in str(result.failures[0].error)
    await broker.update()
    await deliver(sink, [messages[one.index] for one in result.failures])
    arrived = await broker.restored()
    for key in {message.key for message in messages}:
        expected = [message.dedup_key for message in messages if message.key == key]
        assert [message.dedup_key for message in arrived if message.key == key] == expected
    await sink.aclose()


async def test_a_full_server_is_an_outage_that_says_what_to_do_and_passes(
    nats_server_with: Callable[..., NatsServer],
) -> None:
    server = nats_server_with('jetstream: { store_dir: "jetstream", max_file_store: 1MB }')
    full = Broker(server, "full")
    await full.create()
    sink = sink_of(server.url)
    await sink.connect()
    messages = [large(f"m{number}", 20_000) for number in range(100)]

    result = await sink.publish(messages)

    assert result.failures
    assert all(one.error.kind is ErrorKind.OUTAGE for one in result.failures)
    assert "raise max_file_store" in str(result.failures[0].error)
    arrived = dedup_keys(await full.restored())
    await full.purge()
    left = [messages[one.index] for one in result.failures]
    await deliver(sink, left[:20])
    assert arrived == [one.dedup_key for one in messages[: len(messages) - len(left)]]
    assert dedup_keys(await full.restored()) == dedup_keys(left[:20])
    await sink.aclose()


@pytest.mark.shows("pipeline:ordering")
async def test_pipelined_ordering_lets_messages_of_one_key_be_in_flight_together(
    broker: Broker,
) -> None:
    sink = sink_of(broker.server.url, ordering="pipelined")
    await sink.connect()

    result = await sink.publish(numbered(2000, keys=1))

    assert not result.failures
    assert dedup_keys(await broker.restored()) == dedup_keys(numbered(2000))
    await sink.aclose()


async def test_a_restart_of_the_server_in_mid_batch_loses_and_repeats_nothing(
    broker: Broker,
) -> None:
    sink = sink_of(broker.server.url)
    await sink.connect()
    messages = numbered(5000, keys=50)

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        publishing = tasks.create_task(_deliver_in_batches(sink, messages))
        await until(broker.restored, 200)
        await asyncio.to_thread(broker.server.restart)
    assert publishing.done()

    arrived = await broker.restored()
    assert sorted(dedup_keys(arrived)) == sorted(dedup_keys(messages))
    for key in {message.key for message in messages}:
        expected = [message.dedup_key for message in messages if message.key == key]
        assert [message.dedup_key for message in arrived if message.key == key] == expected
    await sink.aclose()


async def test_a_connection_cut_in_mid_publish_leaves_no_message_without_a_verdict(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*port_of(broker.server.url))
    sink = sink_of(proxy.url(broker.server.url))
    await sink.connect()
    messages = numbered(3000, keys=100)
    proxy.cut_after(300_000, "to_server")

    result = await asyncio.wait_for(sink.publish(messages), 10)

    assert result.failures
    assert all(isinstance(one.error, Outage) for one in result.failures)
    failed = {one.index for one in result.failures}
    stored = set(dedup_keys(await broker.restored()))
    accepted = {one.dedup_key for at, one in enumerate(messages) if at not in failed}
    assert accepted <= stored
    with pytest.raises(NotConnected):
        await sink.publish(messages)
    await sink.aclose()


@pytest.mark.shows("sink:nats.ack_timeout_ms", "error:TimedOut")
async def test_a_server_that_goes_silent_ends_the_publish_after_the_ack_timeout(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*port_of(broker.server.url))
    sink = sink_of(proxy.url(broker.server.url), ack_timeout_ms=300)
    await sink.connect()
    proxy.stall()

    started = time.monotonic()
    result = await sink.publish(numbered(10, keys=10))

    assert 0.3 <= time.monotonic() - started < 3
    assert len(result.failures) == 10
    assert all(isinstance(one.error, TimedOut) for one in result.failures)
    with pytest.raises(Outage):
        await sink.publish(numbered(1))
    await sink.aclose()


async def test_a_stalled_server_does_not_hold_up_a_large_publish_or_the_close(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*port_of(broker.server.url))
    sink = sink_of(proxy.url(broker.server.url), ack_timeout_ms=300)
    await sink.connect()
    proxy.stall()

    async with asyncio.timeout(8):
        result = await sink.publish([large(f"big:{n}", 900_000) for n in range(40)])
        await sink.aclose()

    assert len(result.failures) == 40
    assert all(one.error.kind is ErrorKind.OUTAGE for one in result.failures)


async def test_a_subject_without_a_stream_is_a_configuration_error_with_a_remedy(
    broker: Broker,
) -> None:
    sink = sink_of(broker.server.url)
    await sink.connect()
    lost = RelayMessage(dedup_key="lost", payload=b"{}", subject="nobody.listens")

    result = await sink.publish([*numbered(3, keys=3), lost])

    (failure,) = result.failures
    assert isinstance(failure.error, DestinationMissing)
    assert "nobody.listens" in str(failure.error)
    assert "create_stream" in str(failure.error)
    await sink.aclose()


async def test_a_named_stream_that_is_missing_is_said_on_connecting(broker: Broker) -> None:
    sink = sink_of(broker.server.url, stream="absent")

    with pytest.raises(DestinationMissing, match="create_stream"):
        await sink.connect()


@pytest.mark.shows(
    "sink:nats.create_stream", "sink:nats.duplicate_window_s", "sink:nats.subject_template"
)
async def test_a_stream_is_created_on_file_storage_with_the_window_asked_for(
    nats_server: NatsServer,
) -> None:
    broker = Broker(nats_server, "made_by_the_sink")
    sink = sink_of(
        nats_server.url,
        subject_template="made.{stream_table}.{op}",
        stream=broker.stream,
        create_stream=True,
        duplicate_window_s=77,
    )
    await sink.connect()
    try:
        await sink.connect()
        result = await sink.publish(
            [RelayMessage(dedup_key="a", payload=b"{}", subject="made.orders.insert")]
        )
        described = await sink.describe()
    finally:
        await sink.aclose()
        await broker.drop()

    assert not result.failures
    assert described["stream made_by_the_sink"] == "duplicate window 77 s"


async def test_the_streams_of_the_template_are_described_without_naming_one(
    broker: Broker,
) -> None:
    sink = sink_of(broker.server.url)
    await sink.connect()

    described = await sink.describe()

    assert described["stream publishing"] == "duplicate window 120 s"
    await sink.aclose()


@pytest.mark.shows("sink:nats.stream")
async def test_a_stream_other_than_the_expected_one_is_a_configuration_error(
    broker: Broker,
) -> None:
    other = Broker(broker.server, "other")
    await other.create(subjects=["other.>"])
    sink = sink_of(broker.server.url, stream="other")
    await sink.connect()

    result = await sink.publish(numbered(1))

    assert isinstance(result.failures[0].error, ConfigurationError)
    assert "expected stream does not match" in str(result.failures[0].error)
    await sink.aclose()
    await other.drop()


async def test_a_server_without_jetstream_is_a_configuration_error() -> None:
    # A server that knows nothing of JetStream: the API has no responder.
    server = await asyncio.start_server(_greet_without_jetstream, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    sink = sink_of(f"nats://127.0.0.1:{port}")

    with pytest.raises(ConfigurationError, match="JetStream"):
        await sink.connect()

    server.close()
    await server.wait_closed()


async def test_a_value_adds_no_token_and_no_wildcard_to_the_subject(broker: Broker) -> None:
    sink = sink_of(broker.server.url, subject_template="orders.{key}.{op}")
    await sink.connect()
    keys = ["a.b", "*", ">", "a b", "x\r\nPUB orders.forged 2\r\n{}", "", "ä"]
    messages = []
    for number, key in enumerate(keys):
        message = RelayMessage(dedup_key=str(number), key=key, payload=b"{}", op="insert")
        messages.append(msgspec.structs.replace(message, subject=sink.subject_of(message)))

    result = await sink.publish(messages)

    assert not result.failures
    subjects = [subject for subject, _, _ in await broker.messages()]
    assert [subject.count(".") for subject in subjects] == [2] * len(keys)
    assert [subject.split(".")[1] for subject in subjects] == [
        "a%2Eb",
        "%2A",
        "%3E",
        "a%20b",
        "x%0D%0APUB%20orders%2Eforged%202%0D%0A{}",
        "_",
        "ä",
    ]
    await sink.aclose()


async def test_a_header_of_a_publisher_gives_no_order_to_the_server(broker: Broker) -> None:
    await broker.update(allow_rollup_hdrs=True)
    sink = sink_of(broker.server.url, format="payload")
    await sink.connect()
    order = RelayMessage(
        dedup_key="order",
        payload=b"{}",
        subject="orders.insert",
        headers={"Nats-Rollup": "all", "note": "a\r\nNats-Rollup: all"},
    )

    result = await sink.publish([*numbered(3), order])

    assert not result.failures
    assert len(await broker.messages()) == 4
    arrived = {message.dedup_key: message for message in await broker.restored()}
    assert arrived["order"].headers == order.headers
    await sink.aclose()


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
@pytest.mark.shows("sink:nats.format")
async def test_the_documented_headers_go_with_every_format(broker: Broker, format_: str) -> None:
    sink = sink_of(broker.server.url, format=format_)
    await sink.connect()

    await sink.publish([complete_message()])

    ((_, headers, _),) = await broker.messages()
    assert headers["Nats-Msg-Id"] == "orders:7:0"
    assert headers["Pgtrickle-Format"] == format_
    assert headers["traceparent"].startswith("00-4bf9")
    await sink.aclose()


@pytest.mark.speed
async def test_publishing_is_quicker_than_the_client_in_bulk(broker: Broker) -> None:
    count = 50_000
    messages = [
        RelayMessage(
            dedup_key=f"outbox_orders:{number}:0",
            key=str(number),
            subject="orders.insert",
            op="insert",
            payload=b'{"id":%d,"note":"%s"}' % (number, b"x" * 180),
            stream_table="orders",
            outbox_id=number,
        )
        for number in range(count)
    ]
    floor_s = await _publish_in_bulk(broker.server, messages)
    await broker.create()
    sink = sink_of(broker.server.url)
    await sink.connect()

    started = time.perf_counter()
    for start in range(0, count, 2000):
        result = await sink.publish(messages[start : start + 2000])
        assert not result.failures
    took_s = time.perf_counter() - started

    await sink.aclose()
    print(f"client in bulk {count / floor_s:,.0f}/s, sink {count / took_s:,.0f}/s")
    assert took_s < floor_s


async def _deliver_in_batches(sink: Sink, messages: list[RelayMessage]) -> None:
    for start in range(0, len(messages), 100):
        await deliver(sink, messages[start : start + 100])


async def _publish_in_bulk(server: NatsServer, messages: list[RelayMessage]) -> float:
    """Seconds for the same bodies with the client alone, every reply counted."""
    encode = encoder("envelope", TITLE)
    bodies = [encode(message).body for message in messages]
    client = Client()
    await client.connect(server.url)
    in_flight = asyncio.Semaphore(4096)

    async def count(_: Msg) -> None:
        in_flight.release()

    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=count)
    started = time.perf_counter()
    for message, body in zip(messages, bodies, strict=True):
        await in_flight.acquire()
        headers = {"Nats-Msg-Id": message.dedup_key}
        await client.publish("orders.insert", body, reply=inbox, headers=headers)
    for _ in range(4096):
        await in_flight.acquire()
    took_s = time.perf_counter() - started
    await client.close()
    return took_s


async def _greet_without_jetstream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b'INFO {"server_id":"x","version":"2.10.0","headers":true,"max_payload":99}\r\n')
    inbox = sid = b""
    while line := await reader.readline():
        words = line.split()
        if words[0] == b"PING":
            writer.write(b"PONG\r\n")
        elif words[0] == b"SUB":
            inbox, sid = words[1], words[-1]
        elif words[0] == b"PUB":
            await reader.readexactly(int(words[-1]) + 2)
            assert inbox
            writer.write(b"HMSG %b %b 16 16\r\nNATS/1.0 503\r\n\r\n\r\n" % (words[2], sid))
    writer.close()
