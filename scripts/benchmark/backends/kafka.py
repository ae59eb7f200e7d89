"""Kafka: one KRaft node on the jars that `scripts/test` gets, and topics of several partitions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from relay.demo.embedded import LOOPBACK
from scripts.benchmark.backends import (
    Destination,
    Origin,
    ServerMissing,
    Stretch,
    observed,
    payload,
)
from scripts.benchmark.server import START_TIMEOUT_S, free_port, running_server
from scripts.benchmark.surroundings import Surroundings

PARTITIONS: Final = 4

_JARS: Final = Path.home() / ".cache" / "pgtrickle-relay-tests"
_CLUSTER_ID: Final = "cGd0cmlja2xlLXJlbGF5LQ"
_BATCH_BYTES: Final = 256 * 1024
_PAGE: Final = 5_000
_SILENCE_S: Final = 30.0
_LOOK_S: Final = 0.05


class Record(msgspec.Struct, frozen=True):
    """A record as it is stored."""

    partition: int
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]] = []


class _Envelope(msgspec.Struct, frozen=True):
    dedup_key: str


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


@contextlib.asynccontextmanager
async def _server() -> AsyncIterator[str]:
    """The address of a broker of our own."""
    java = _java()
    port, controller = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-kafka-") as name:
        directory = Path(name)
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{LOOPBACK}:{controller}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAIN",
            "listeners": f"PLAIN://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller}",
            "listener.security.protocol.map": "PLAIN:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(directory / "logs"),
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
        }
        configuration = directory / "server.properties"
        configuration.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        await _format(java, configuration)
        async with running_server([*java, "kafka.Kafka", configuration], directory, port):
            yield f"{LOOPBACK}:{port}"


def _java() -> Sequence[str]:
    """How the broker's programs are called. Raises `ServerMissing`."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        raise ServerMissing("Java is missing: apt-get install openjdk-17-jre-headless")
    jars = sorted(path.parent for path in _JARS.glob("kafka-*/kafka_2.13-*.jar"))
    if not jars:
        raise ServerMissing(f"no jars of Kafka in {_JARS}: scripts/test gets them")
    return (java, "-Xms256m", "-Xmx1g", "-cp", f"{jars[-1]}/*")


async def _format(java: Sequence[str], configuration: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(*java, "kafka.tools.StorageTool", "format"),
        *("--cluster-id", _CLUSTER_ID, "--config", configuration),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=configuration.parent,
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"Kafka's directory can't be formatted:\n{said.decode()}")


class _Topics:
    """One topic after the other, looked at over a consumer of our own."""

    def __init__(self, brokers: str, admin: Any, looker: Any) -> None:
        self.brokers = brokers
        self._admin = admin
        self._looker = looker
        self._made = 0

    @property
    def topic(self) -> str:
        """The newest."""
        return f"bench-{self._made}"

    @property
    def partitions(self) -> Sequence[TopicPartition]:
        """Those of the newest."""
        return [TopicPartition(self.topic, number) for number in range(PARTITIONS)]

    async def renew(self) -> None:
        """Make another, empty topic; the one before goes."""
        if self._made:
            await self._admin.delete_topics([self.topic])
        self._made += 1
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await self._is_made():  # noqa: ASYNC110 - it can only be looked at
                await asyncio.sleep(_LOOK_S)

    async def count(self) -> int:
        """How many records the newest has."""
        return sum((await self._looker.end_offsets(self.partitions)).values())

    async def records(self) -> list[Record]:
        """All records of the newest, each partition in its order."""
        count = await self.count()
        found: list[Record] = []
        async with _consumer(self.brokers, group_id=None) as consumer:
            consumer.assign(self.partitions)
            while len(found) < count:
                pages = await _page(consumer)
                found += [
                    Record(one.partition, one.key, bytes(one.value), list(one.headers))
                    for page in pages
                    for one in page
                ]
        return found

    async def add(self, records: Sequence[Record]) -> float:
        """Add all, each partition in its order; how many seconds that took.

        Batches of every partition are in flight at a time. Raises `RuntimeError` where the topic
        does not have all that was acknowledged.
        """
        parts = defaultdict[int, list[Record]](list)
        for record in records:
            parts[record.partition].append(record)
        before = await self.count()
        producer = AIOKafkaProducer(
            bootstrap_servers=self.brokers, acks="all", max_batch_size=_BATCH_BYTES
        )
        await producer.start()
        try:
            await producer.partitions_for(self.topic)
            started = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for partition, part in parts.items():
                    tasks.create_task(_add_to(producer, self.topic, partition, part))
            elapsed_s = time.perf_counter() - started
        finally:
            await producer.stop()
        if await self.count() != before + len(records):
            raise RuntimeError("the topic does not have what it acknowledged")
        return elapsed_s

    async def consume(self, group: str) -> float:
        """Read and commit all as a new group; how many seconds that took.

        Raises `RuntimeError` where not everything was committed.
        """
        count, seen = await self.count(), 0
        async with _consumer(self.brokers, group_id=group) as consumer:
            consumer.assign(self.partitions)
            started = time.perf_counter()
            committing: asyncio.Task[None] | None = None
            while seen < count:
                # The next records are in flight while these are committed.
                pages = await _page(consumer)
                seen += sum(map(len, pages))
                if committing is not None:
                    await committing
                ends = {
                    TopicPartition(page[-1].topic, page[-1].partition): page[-1].offset + 1
                    for page in pages
                }
                committing = asyncio.create_task(consumer.commit(ends))
            if committing is not None:
                await committing
            elapsed_s = time.perf_counter() - started
            committed = [await consumer.committed(one) or 0 for one in self.partitions]
        if sum(committed) != count:
            raise RuntimeError(f"{seen} read and {sum(committed)} committed of {count}")
        return elapsed_s

    async def _is_made(self) -> bool:
        """Ask for the newest, and whether all its partitions are served."""
        try:
            if self.topic not in await self._admin.list_topics():
                await self._admin.create_topics([NewTopic(self.topic, PARTITIONS, 1)])
            self._looker.assign(self.partitions)
            return await self.count() == 0
        except KafkaError:
            return False


async def _add_to(
    producer: AIOKafkaProducer, topic: str, partition: int, records: Sequence[Record]
) -> None:
    """Send them in batches, as full as they get, and wait for every acknowledgement."""
    acknowledged = []
    batch = producer.create_batch()
    for record in records:
        one = {"timestamp": None, "key": record.key, "value": record.value}
        if batch.append(**one, headers=record.headers) is None:
            acknowledged.append(await producer.send_batch(batch, topic, partition=partition))
            batch = producer.create_batch()
            if batch.append(**one, headers=record.headers) is None:
                raise RuntimeError("a record is larger than a batch")
    acknowledged.append(await producer.send_batch(batch, topic, partition=partition))
    await asyncio.gather(*acknowledged)


async def _page(consumer: AIOKafkaConsumer) -> Sequence[Sequence[Any]]:
    """The next records, by partition. Raises `TimeoutError` where none come."""
    async with asyncio.timeout(_SILENCE_S):
        while True:
            pages = await consumer.getmany(timeout_ms=1000, max_records=_PAGE)
            if pages:
                return list(pages.values())


@contextlib.asynccontextmanager
async def _consumer(brokers: str, group_id: str | None) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=brokers,
        group_id=group_id,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


@contextlib.asynccontextmanager
async def _topics() -> AsyncIterator[_Topics]:
    async with _server() as brokers:
        admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
        await admin.start()
        try:
            async with _consumer(brokers, group_id=None) as looker:
                yield _Topics(brokers, admin, looker)
        finally:
            await admin.close()


class ToKafka(Destination):
    """`to-kafka`."""

    title = "Kafka"

    def __init__(self, topics: _Topics) -> None:
        self._topics = topics
        self._records: Sequence[Record] = ()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Destination]:
        """Part of the protocol."""
        async with _topics() as topics:
            yield cls(topics)

    def sink(self) -> Mapping[str, object]:
        return {"type": "kafka", "brokers": self._topics.brokers, "topic": self._topics.topic}

    async def empty(self) -> None:
        await self._topics.renew()
        self._records = ()

    async def until_holding(self, messages: int, timeout_s: float) -> Stretch:
        return await observed(self._topics.count, messages, timeout_s)

    async def read(self) -> set[str]:
        self._records = await self._topics.records()
        return {_decode_envelope(record.value).dedup_key for record in self._records}

    async def floor(self) -> float:
        await self._topics.renew()
        return len(self._records) / await self._topics.add(self._records)


class FromKafka(Origin):
    """`from-kafka`."""

    title = "Kafka"
    target_per_s: float | None = 40_000.0
    hard_bar_per_s: float | None = 10_000.0

    def __init__(self, topics: _Topics) -> None:
        self._topics = topics
        self._messages = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Origin]:
        """Part of the protocol."""
        async with _topics() as topics:
            yield cls(topics)

    def source(self) -> Mapping[str, object]:
        return {"type": "kafka", "brokers": self._topics.brokers, "topic": self._topics.topic}

    async def fill(self, messages: int) -> None:
        await self._topics.renew()
        await self._topics.add(
            [Record(number % PARTITIONS, None, payload(number)) for number in range(messages)]
        )
        self._messages = messages

    async def floor(self) -> float:
        return self._messages / await self._topics.consume(f"floor-{self._topics.topic}")
