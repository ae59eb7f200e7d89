"""What the Kafka backends leave behind when they are closed, and how long that takes."""

from __future__ import annotations

import asyncio
import gc
import os
import stat
import threading
import time
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from relay.backends.kafka import KafkaSink, KafkaSource
from tests.contract.kafka_broker import Broker, eventually, sink_of, source_of
from tests.contract.source_contract import collect
from tests.servers.kafka import KafkaServer
from tests.servers.proxy import TcpProxy

BOUND_S = 30.0
CLOSED_WITHIN_S = 9.0


@pytest.fixture
async def broker(kafka_server: KafkaServer) -> AsyncIterator[Broker]:
    broker = Broker(kafka_server)
    await broker.create()
    yield broker
    await broker.drop()


def open_sockets() -> set[int]:
    found = set()
    for path in Path("/dev/fd").iterdir():
        try:
            is_socket = stat.S_ISSOCK(os.fstat(int(path.name)).st_mode)
        except OSError:
            continue
        if is_socket:
            found.add(int(path.name))
    return found


class Belongings:
    """The tasks, threads and sockets of this process at one moment."""

    def __init__(self) -> None:
        self.tasks = asyncio.all_tasks()
        self.threads = set(threading.enumerate())
        self.sockets = open_sockets()

    async def are_all(self) -> bool:
        """Whether there is nothing more than there was."""
        return (
            asyncio.all_tasks() <= self.tasks
            and set(threading.enumerate()) <= self.threads
            and len(open_sockets()) <= len(self.sockets)
        )


async def closed_in_s(one: KafkaSink | KafkaSource) -> float:
    started = time.monotonic()
    async with asyncio.timeout(BOUND_S):
        await one.aclose()
    return time.monotonic() - started


async def test_a_start_and_a_stop_leave_no_task_thread_or_socket(broker: Broker) -> None:
    before = Belongings()
    sink = sink_of(broker.server.brokers, broker.topic)
    source = source_of(broker.server.brokers, broker.topic)

    await sink.connect()
    await source.connect()
    assert not (await sink.publish(broker.numbered(10))).failures
    await collect(source, 10)
    await sink.connect()
    await source.connect()
    await sink.aclose()
    await source.aclose()

    await eventually(before.are_all, 5.0)


async def test_a_start_that_is_cancelled_while_the_broker_is_asked_leaves_no_connection(
    broker: Broker, kafka_proxy: TcpProxy
) -> None:
    sink = sink_of(kafka_proxy.address, broker.topic)
    forwarded = kafka_proxy.bytes_forwarded
    starting = asyncio.create_task(sink.connect())
    # First the broker answers what it speaks, then it is asked for its topics.
    async with asyncio.timeout(BOUND_S):
        for direction in ("to_client", "to_server"):
            before = forwarded[direction]
            while forwarded[direction] == before:  # noqa: ASYNC110 - a later turn is too late
                await asyncio.sleep(0)

    starting.cancel()
    await asyncio.wait([starting], timeout=BOUND_S)
    await sink.aclose()

    with warnings.catch_warnings(record=True) as left_open:
        warnings.simplefilter("always")
        gc.collect()
    assert not left_open


@pytest.mark.parametrize("how", ["cut", "stall"])
async def test_a_sink_is_closed_in_time_while_its_broker_is_gone_and_leaves_nothing(
    broker: Broker, kafka_proxy: TcpProxy, how: str
) -> None:
    before = Belongings()
    sink = sink_of(kafka_proxy.address, broker.topic, request_timeout_ms=1000)
    await sink.connect()
    assert not (await sink.publish(broker.numbered(1))).failures
    if how == "cut":
        await kafka_proxy.cut()
    else:
        kafka_proxy.stall()
    large = [
        structs.replace(one, payload=b'"%s"' % (b"x" * 300_000))
        for one in broker.numbered(20, start=1)
    ]
    assert len((await sink.publish(large)).failures) == 20

    assert await closed_in_s(sink) < CLOSED_WITHIN_S

    await kafka_proxy.cut()
    await eventually(before.are_all, 10.0)
    await kafka_proxy.restore()


@pytest.mark.parametrize("instance", ["", "named"])
@pytest.mark.parametrize("how", ["cut", "stall"])
async def test_a_source_is_closed_in_time_while_its_broker_is_gone_and_leaves_nothing(
    broker: Broker, kafka_proxy: TcpProxy, how: str, instance: str
) -> None:
    before = Belongings()
    keys = {"session_timeout_ms": 2000, "rebalance_timeout_ms": 2000, "request_timeout_ms": 1000}
    source = source_of(kafka_proxy.address, broker.topic, group_instance_id=instance, **keys)
    await source.connect()
    await broker.put_all([b"{}"] * 3)
    await collect(source, 3)
    if how == "cut":
        await kafka_proxy.cut()
    else:
        kafka_proxy.stall()

    assert await closed_in_s(source) < CLOSED_WITHIN_S

    await kafka_proxy.cut()
    try:
        await eventually(before.are_all, 15.0)
    except TimeoutError:
        for t in asyncio.all_tasks() - before.tasks:
            print("LEFT", t, t.get_stack())
        print(open_sockets(), before.sockets, set(threading.enumerate()) - before.threads)
        raise
    await kafka_proxy.restore()


async def test_a_source_that_waits_for_the_others_of_its_group_is_closed_in_time(
    broker: Broker,
) -> None:
    await broker.put_all([b"{}"] * 3)
    busy = source_of(broker.server.brokers, broker.topic, pipeline="busy")
    await busy.connect()
    await collect(busy, 3)
    waiting = source_of(broker.server.brokers, broker.topic, pipeline="waiting")
    joining = asyncio.create_task(waiting.connect())
    await eventually(lambda: _is_rebalancing(busy))

    waiting.interrupt()
    await joining
    assert await closed_in_s(waiting) < CLOSED_WITHIN_S
    # What is in flight keeps its partitions, and is not waited for when it closes.
    assert await closed_in_s(busy) < CLOSED_WITHIN_S


async def _is_rebalancing(source: KafkaSource) -> bool:
    return (await source.describe())["state"] == "rebalancing"
