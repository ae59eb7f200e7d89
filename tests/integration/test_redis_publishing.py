"""The Redis sink against a real server: what is stored, in which order, and what is said of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from msgspec import structs
from redis.asyncio import Redis

from relay.backends.redis import RedisSink
from relay.contracts import Sink
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageTooLarge,
    MessageUndecodable,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.events import Retried
from relay.message import RelayMessage
from relay.wire import FIELD, encoder
from tests.contract.evidence import (
    assert_per_key_order,
    complete_message,
    dedup_keys,
    first_occurrences,
    numbered,
    until,
)
from tests.contract.redis_broker import Broker, sink_of
from tests.contract.sink_contract import deliver
from tests.servers.proxy import TcpProxy
from tests.servers.redis import RedisServer
from tests.unit.in_memory import Line

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
ServerWith = Callable[..., RedisServer]
STREAM = "orders.insert"


@pytest.fixture
async def broker(
    redis_server: RedisServer,
) -> AsyncIterator[Broker]:
    broker = Broker(redis_server, STREAM)
    await broker.drop()
    yield broker
    await broker.drop()


async def connected(broker: Broker, ordering: str | None = None, **keys: object) -> RedisSink:
    sink = sink_of(broker.server.url, STREAM, ordering=ordering, **keys)
    await sink.connect()
    return sink


def large(dedup_key: str, size: int, key: str | None = None) -> RelayMessage:
    return RelayMessage(
        dedup_key=dedup_key, payload=b'"%s"' % (b"x" * size), subject=STREAM, key=key
    )


@pytest.mark.shows("sink:redis.format")
@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
async def test_the_documented_fields_go_with_every_format(broker: Broker, format_: str) -> None:
    sink = await connected(broker, format=format_)
    message = RelayMessage(
        dedup_key="orders:7:0", payload=b'{"a":1}', subject=STREAM, headers={"traceparent": "00-4b"}
    )

    await sink.publish([message])

    ((_, fields),) = await broker.entries()
    assert fields[b"pgt_dedup_key"] == b"orders:7:0"
    assert fields[b"pgt_format"] == format_.encode()
    assert fields[b"header:traceparent"] == b"00-4b"
    assert b'"a":1' in fields[b"payload"]
    await sink.aclose()


@pytest.mark.shows("sink:redis.stream_key", "sink:redis.routing")
async def test_an_event_goes_to_the_stream_of_its_template(broker: Broker) -> None:
    sink = await connected(broker)
    other = sink_of(broker.server.url, "test:{stream_table}", routing={"delete": "test:gone:{key}"})
    await other.connect()
    kept = RelayMessage(dedup_key="1", payload=b"{}", stream_table="or:ders", op="insert")
    gone = RelayMessage(dedup_key="2", payload=b"{}", key="a*", op="delete")

    await other.publish(
        [structs.replace(one, subject=other.subject_of(one)) for one in (kept, gone)]
    )

    assert dedup_keys(await broker.restored("test:or%3Aders")) == ["1"]
    assert dedup_keys(await broker.restored("test:gone:a%2A")) == ["2"]
    await broker.drop("test:or%3Aders", "test:gone:a%2A")
    await other.aclose()
    await sink.aclose()


@pytest.mark.shows("sink:redis.maxlen")
async def test_a_stream_is_trimmed_only_where_that_is_asked_for(broker: Broker) -> None:
    sink = await connected(broker)
    await sink.publish(numbered(2000))
    assert len(await broker.entries()) == 2000
    await sink.aclose()

    trimming = await connected(broker, maxlen=500)
    await trimming.publish(numbered(100, start=2000))

    # Trimming is approximate: whole nodes of the stream go.
    assert 500 <= len(await broker.entries()) < 1000
    await trimming.aclose()


@pytest.mark.shows("sink:redis.max_message_bytes")
async def test_a_message_above_our_limit_fails_alone_and_the_limit_is_named(
    broker: Broker,
) -> None:
    sink = await connected(broker, max_message_bytes=5000)
    good = numbered(10)

    result = await sink.publish([*good[:5], large("big", 5000), *good[5:]])

    ((index, error),) = [(one.index, one.error) for one in result.failures]
    assert index == 5
    assert isinstance(error, MessageTooLarge)
    assert "5000" in str(error)
    assert dedup_keys(await broker.restored()) == dedup_keys(good)
    await sink.aclose()


async def test_a_message_above_the_servers_limit_fails_alone_and_the_limit_is_named(
    redis_server_with: ServerWith,
) -> None:
    broker = Broker(redis_server_with("proto-max-bulk-len 1mb"), STREAM)
    sink = await connected(broker)
    good = numbered(10)

    result = await sink.publish([*good[:5], large("big", 1024 * 1024), *good[5:]])

    ((index, error),) = [(one.index, one.error) for one in result.failures]
    assert index == 5
    assert isinstance(error, MessageTooLarge)
    assert str(1024 * 1024) in str(error)
    assert dedup_keys(await broker.restored()) == dedup_keys(good)
    await sink.aclose()


async def test_a_large_document_travels_whole(broker: Broker) -> None:
    sink = await connected(broker)
    document = large("large", 20_000_000)

    await deliver(sink, [document, *numbered(1)])

    first, second = await broker.restored()
    assert first.payload == document.payload
    assert second.dedup_key == "m:0"
    await sink.aclose()


async def test_a_server_out_of_memory_is_an_outage_that_keeps_the_order_until_it_has_room(
    redis_server_with: ServerWith,
) -> None:
    broker = Broker(redis_server_with("maxmemory 4mb\nmaxmemory-policy noeviction"), STREAM)
    sink = await connected(broker)
    messages = [large(f"m:{number}", 20_000, key="k") for number in range(400)]

    result = await sink.publish(messages)

    assert result.failures
    assert all(isinstance(one.error, Outage) for one in result.failures)
    assert len({id(one.error) for one in result.failures}) == 1
    assert "maxmemory" in str(result.failures[0].error)
    accepted = len(messages) - len(result.failures)
    assert dedup_keys(await broker.restored()) == dedup_keys(messages[:accepted])
    await broker.ask("CONFIG", "SET", "maxmemory", "0")
    await deliver(sink, [messages[one.index] for one in result.failures])
    assert dedup_keys(await broker.restored()) == dedup_keys(messages)
    await sink.aclose()


async def test_a_server_out_of_memory_lets_no_event_overtake_another_of_its_key(
    redis_server_with: ServerWith,
) -> None:
    broker = Broker(redis_server_with("maxmemory 4mb\nmaxmemory-policy noeviction"), STREAM)
    sink = await connected(broker)
    # No key comes twice in a pipeline of about a megabyte, and each comes again soon.
    messages = [large(f"m:{number}", 20_000, key=f"k{number % 60}") for number in range(400)]

    left = messages
    for maxmemory in ("5mb", "6mb", "0"):
        result = await sink.publish(left)
        left = [left[one.index] for one in result.failures]
        assert left
        await broker.ask("CONFIG", "SET", "maxmemory", maxmemory)
    await deliver(sink, left)

    assert_per_key_order(await broker.restored(), messages)
    await sink.aclose()


@pytest.mark.parametrize("ordering", ["strict", "pipelined"])
async def test_a_key_that_is_no_stream_is_said_with_its_name(broker: Broker, ordering: str) -> None:
    await broker.ask("SET", STREAM, "text")
    sink = await connected(broker, ordering)

    result = await sink.publish(numbered(3))

    assert [one.index for one in result.failures] == [0, 1, 2]
    assert all(isinstance(one.error, DestinationMissing) for one in result.failures)
    assert STREAM in str(result.failures[0].error)
    await sink.aclose()


@pytest.mark.shows("pipeline:ordering")
async def test_only_strict_ordering_of_keys_that_repeat_needs_transactions(
    broker: Broker,
) -> None:
    before = await _transactions(broker)
    pipelined = await connected(broker, "pipelined")
    await pipelined.publish(numbered(2500))
    assert await _transactions(broker) == before
    await pipelined.aclose()

    strict = await connected(broker)
    await strict.publish(numbered(2500, start=2500, keys=2500))
    assert await _transactions(broker) == before
    await strict.publish(numbered(2500, start=5000))

    assert await _transactions(broker) == before + 3
    assert dedup_keys(await broker.restored()) == dedup_keys(numbered(7500))
    await strict.aclose()


async def test_nothing_of_a_key_is_sent_before_the_answer_to_what_comes_before_it(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    sink = sink_of(proxy.url(broker.server.url), STREAM)
    await sink.connect()
    messages = numbered(3000)
    # In the middle of the answer to the first transaction, behind a short one to each command.
    proxy.cut_after(9500, "to_client")

    result = await sink.publish(messages)

    assert len(result.failures) == 3000
    assert dedup_keys(await broker.restored()) == dedup_keys(messages[:1000])
    await sink.aclose()


async def test_messages_behind_a_thousand_that_cannot_be_sent_are_sent(broker: Broker) -> None:
    sink = await connected(broker)
    broken = [structs.replace(one, payload=b"{", is_json=False) for one in numbered(1100)]
    nameless = structs.replace(broken[0], payload=b"{}", headers={"x": "\ud800"})
    good = numbered(10)

    result = await sink.publish([*broken, nameless, *good])

    assert [one.index for one in result.failures] == list(range(1101))
    assert all(isinstance(one.error, MessageUndecodable) for one in result.failures)
    assert dedup_keys(await broker.restored()) == dedup_keys(good)
    await sink.aclose()


@pytest.mark.parametrize("keys", [1, 3])
async def test_a_server_that_does_not_know_a_command_is_said_without_what_it_was_sent(
    redis_server_with: ServerWith, keys: int
) -> None:
    broker = Broker(redis_server_with('rename-command XADD ""'), STREAM)
    sink = await connected(broker, format="payload")
    messages = [structs.replace(one, payload=b'"card 4111 1111"') for one in numbered(3, keys=keys)]

    try:
        error: RelayError = (await sink.publish(messages)).failures[0].error
    except ConfigurationError as refused:
        error = refused

    assert isinstance(error, ConfigurationError)
    assert "4111" not in str(error)
    assert "under their own names" in str(error)
    await sink.aclose()


async def test_a_read_only_replica_is_an_outage(
    redis_server: RedisServer,
    redis_server_with: ServerWith,
) -> None:
    host, port = redis_server.address
    replica = Broker(redis_server_with(f"replicaof {host} {port}"), STREAM)
    sink = await connected(replica)

    result = await sink.publish(numbered(3))

    assert len(result.failures) == 3
    assert all(one.error.kind is ErrorKind.OUTAGE for one in result.failures)
    await sink.aclose()


async def test_a_primary_that_became_a_replica_is_left_for_whoever_has_its_address_now(
    redis_server_with: ServerWith, tcp_proxy: Proxies
) -> None:
    old, new = (Broker(redis_server_with(""), STREAM) for _ in range(2))
    proxy = await tcp_proxy(*old.server.address)
    line = Line(sink=sink_of(proxy.url(old.server.url), STREAM))
    line.write(*numbered(5))

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 5)
        # A fail-over: the name leads to another server, and open connections stay where they are.
        proxy.host, proxy.port = new.server.address
        await old.ask("REPLICAOF", *new.server.address)
        line.write(*numbered(5, start=5))
        await line.heard.until(lambda: line.acknowledged == 10)

    assert dedup_keys(await new.restored()) == dedup_keys(numbered(5, start=5))


@pytest.mark.shows("sink:redis.wait_replicas")
async def test_an_event_counts_as_accepted_when_enough_replicas_have_it_and_is_added_once(
    redis_server_with: ServerWith,
) -> None:
    broker = Broker(redis_server_with("repl-diskless-sync-delay 0"), STREAM)
    sink = await connected(broker, wait_replicas=1, timeout_ms=300)

    first = await sink.publish(numbered(10))
    second = await sink.publish(numbered(10))

    for result in (first, second):
        assert len(result.failures) == 10
        assert all(type(one.error) is Outage for one in result.failures)
    assert len(await broker.entries()) == 10
    host, port = broker.server.address
    replica = Broker(redis_server_with(f"replicaof {host} {port}"), STREAM)
    await deliver(sink, numbered(20))
    assert dedup_keys(await broker.restored()) == dedup_keys(numbered(20))
    assert dedup_keys(await replica.restored()) == dedup_keys(numbered(20))
    await sink.aclose()


async def test_a_pipeline_that_waits_for_replicas_adds_no_event_again(
    redis_server_with: ServerWith,
) -> None:
    broker = Broker(redis_server_with("repl-diskless-sync-delay 0"), STREAM)
    sink = sink_of(broker.server.url, STREAM, wait_replicas=1, timeout_ms=1000)
    line = Line(sink=sink)
    line.write(*numbered(10))

    async with line.running():
        await line.heard.until(lambda: len(line.heard.of(Retried)) == 3)
        host, port = broker.server.address
        await asyncio.to_thread(redis_server_with, f"replicaof {host} {port}")
        await line.heard.until(lambda: line.acknowledged == 10)

    assert dedup_keys(await broker.restored()) == dedup_keys(numbered(10))


async def test_what_no_replica_was_asked_for_is_not_accepted_when_the_connection_breaks(
    redis_server_with: ServerWith, tcp_proxy: Proxies
) -> None:
    broker = Broker(redis_server_with("repl-diskless-sync-delay 0"), STREAM)
    proxy = await tcp_proxy(*broker.server.address)
    sink = sink_of(proxy.url(broker.server.url), STREAM, wait_replicas=1, timeout_ms=300)
    await sink.connect()
    messages = [large(f"m:{number}", 700_000) for number in range(4)]
    # Each goes by itself: the answer to the first comes whole, the one to the second does not.
    proxy.cut_after(30, "to_client")

    result = await sink.publish(messages)

    assert len(await broker.entries()) > 0
    assert [failure.index for failure in result.failures] == [0, 1, 2, 3]
    assert all(failure.error.kind is ErrorKind.OUTAGE for failure in result.failures)
    await sink.aclose()


async def test_a_restart_of_the_server_in_mid_batch_loses_nothing_and_keeps_the_order(
    broker: Broker,
) -> None:
    sink = await connected(broker)
    messages = numbered(6000, keys=7)

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        publishing = tasks.create_task(_deliver_in_batches(sink, messages))
        await until(broker.restored, 500)
        assert not publishing.done()
        await asyncio.to_thread(broker.server.kill)
        await asyncio.to_thread(broker.server.start)

    arrived = await broker.restored()
    assert_per_key_order(arrived, messages)
    assert dedup_keys(first_occurrences(arrived)) == dedup_keys(messages)
    await sink.aclose()


async def test_a_connection_that_breaks_in_the_middle_of_a_batch_stores_whole_transactions(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    sink = sink_of(proxy.url(broker.server.url), STREAM)
    await sink.connect()
    messages = numbered(900)
    proxy.cut_after(100_000, "to_server")

    result = await sink.publish(messages)

    assert len(result.failures) == 900
    assert not await broker.entries()
    with pytest.raises(Outage):
        await sink.publish(messages)
    await proxy.restore()
    await sink.connect()
    await deliver(sink, messages)
    assert dedup_keys(await broker.restored()) == dedup_keys(messages)
    await sink.aclose()


async def test_a_server_that_stops_answering_is_given_up_after_the_timeout(
    broker: Broker, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    sink = sink_of(proxy.url(broker.server.url), STREAM, timeout_ms=300)
    await sink.connect()
    proxy.stall()
    started = time.monotonic()

    result = await sink.publish(numbered(3))

    assert time.monotonic() - started < 2
    assert all(isinstance(one.error, TimedOut) for one in result.failures)
    with pytest.raises(Outage):
        await sink.publish(numbered(3))
    await proxy.restore()
    await sink.aclose()


async def test_the_server_and_its_durability_are_described(broker: Broker) -> None:
    sink = await connected(broker)

    described = await sink.describe()

    assert described["version"] == broker.server.version
    assert described["durability"] == "append-only file, fsync always"
    await sink.aclose()
    with pytest.raises(NotConnected):
        await sink.describe()


async def test_every_field_of_a_complete_message_is_in_the_entry(broker: Broker) -> None:
    sink = await connected(broker, format="payload")
    sent = complete_message()

    await sink.publish([sent])

    ((_, fields),) = await broker.entries("orders.upsert")
    assert fields[b"pgt_key"].decode() == sent.key
    assert fields[b"pgt_outbox_id"] == b"9007199254740993"
    assert fields[b"pgt_full_refresh"] == b"true"
    await broker.drop("orders.upsert")
    await sink.aclose()


@pytest.mark.speed
async def test_publishing_reaches_half_of_what_the_bare_client_reaches(broker: Broker) -> None:
    count = 50_000
    await broker.ask("CONFIG", "SET", "appendfsync", "everysec")
    messages = [
        RelayMessage(
            dedup_key=f"outbox_orders:{number}:0",
            key=str(number),
            subject=STREAM,
            op="insert",
            payload=b'{"id":%d,"note":"%s"}' % (number, b"x" * 180),
            stream_table="orders",
            outbox_id=number,
        )
        for number in range(count)
    ]
    floor_s = await _publish_bare(broker, messages)
    await broker.drop()
    sink = await connected(broker)

    started = time.perf_counter()
    for start in range(0, count, 1000):
        result = await sink.publish(messages[start : start + 1000])
        assert not result.failures
    took_s = time.perf_counter() - started

    assert await broker.ask("XLEN", STREAM) == count
    await sink.aclose()
    await broker.ask("CONFIG", "SET", "appendfsync", "always")
    print(f"bare {count / floor_s:,.0f}/s, sink {count / took_s:,.0f}/s")
    assert took_s < 2 * floor_s


async def _deliver_in_batches(sink: Sink, messages: list[RelayMessage]) -> None:
    for start in range(0, len(messages), 100):
        await deliver(sink, messages[start : start + 100])


async def _transactions(broker: Broker) -> int:
    found = await broker.ask("INFO", "commandstats")
    assert isinstance(found, dict)
    calls = found.get("cmdstat_exec", {"calls": 0})["calls"]
    assert isinstance(calls, int)
    return calls


async def _publish_bare(broker: Broker, messages: list[RelayMessage]) -> float:
    """Seconds for the same bodies and fields through the client library's own pipelines."""
    encode = encoder("envelope", FIELD)
    prepared: list[dict[str | bytes, str | bytes]] = []
    for message in messages:
        encoded = encode(message)
        fields: dict[str | bytes, str | bytes] = {"payload": encoded.body}
        fields.update(encoded.headers.items())
        prepared.append(fields)
    async with Redis.from_url(broker.server.url) as client:
        started = time.perf_counter()
        for start in range(0, len(prepared), 1000):
            pipeline = client.pipeline(transaction=False)
            for fields in prepared[start : start + 1000]:
                pipeline.xadd(STREAM, fields)  # type: ignore[arg-type]  # invariant in the library
            await pipeline.execute()
        return time.perf_counter() - started
