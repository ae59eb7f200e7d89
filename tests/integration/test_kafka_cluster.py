"""What Kafka has confirmed survives the loss of one broker of three."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from msgspec import structs

from relay.backends.kafka import KafkaSink
from relay.backends.kafka.record import decoded
from relay.contracts import Rejected
from relay.errors import ErrorKind, Outage
from relay.message import RelayMessage
from tests.contract.evidence import (
    PAUSE_S,
    assert_per_key_order,
    dedup_keys,
    first_occurrences,
    numbered,
)
from tests.contract.kafka_broker import eventually, new_name, sink_of, source_of
from tests.contract.source_contract import collect
from tests.servers.kafka import KafkaCluster

# Three JVMs on a busy machine: electing a leader takes seconds.
BOUND_S = 90.0
PARTITIONS = 3


class Topic:
    """A topic that every broker has."""

    def __init__(self, cluster: KafkaCluster) -> None:
        self.cluster = cluster
        self.name = new_name()

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.cluster.brokers)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()

    async def create(self, min_insync: int) -> None:
        """Make it, and wait until each broker leads a partition and all replicas are in sync."""
        configuration = {"min.insync.replicas": str(min_insync)}
        async with self._admin() as admin:
            await admin.create_topics(
                [NewTopic(self.name, PARTITIONS, 3, topic_configs=configuration)]
            )
        await self.until_all_in_sync()

    async def until_all_in_sync(self) -> None:
        """Wait until every partition has a leader and three replicas in sync."""

        async def are_in_sync() -> bool:
            partitions = await self._partitions()
            return len(partitions) == PARTITIONS and all(
                one["leader"] > 0 and len(one["isr"]) == 3 for one in partitions
            )

        await eventually(are_in_sync, BOUND_S)

    async def leader(self) -> int:
        """The broker that leads the first partition."""
        (first,) = [one for one in await self._partitions() if one["partition"] == 0]
        return first["leader"]

    async def coordinator(self) -> int:
        """The broker that keeps the group of the topic's name."""
        async with self._admin() as admin:
            found: int = await admin.find_coordinator(self.name)
        return found

    async def _partitions(self) -> Sequence[dict[str, object]]:
        async with self._admin() as admin:
            (found,) = await admin.describe_topics([self.name])
        return found["partitions"]

    async def restored(self) -> list[RelayMessage]:
        """All that it has, each partition in its order."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.cluster.brokers, auto_offset_reset="earliest"
        )
        partitions = [TopicPartition(self.name, number) for number in range(PARTITIONS)]
        consumer.assign(partitions)
        await consumer.start()
        found: list[RelayMessage] = []
        try:
            async with asyncio.timeout(BOUND_S):
                for one, end in (await consumer.end_offsets(partitions)).items():
                    while end and await consumer.position(one) < end:
                        for record in (await consumer.getmany(one, timeout_ms=100)).get(one, []):
                            message = decoded(record)
                            assert not isinstance(message, Rejected)
                            found.append(message)
        finally:
            await consumer.stop()
        return found

    def numbered(self, count: int) -> list[RelayMessage]:
        """So many messages for this topic."""
        return [structs.replace(one, subject=self.name) for one in numbered(count, keys=9)]

    def sink(self, **keys: object) -> KafkaSink:
        """A sink that sends them, each key in its partition."""
        return sink_of(self.cluster.brokers, self.name, key_template="{key}", **keys)


@pytest.fixture
async def topic(kafka_cluster: KafkaCluster) -> Topic:
    for one in kafka_cluster.nodes.values():
        one.thaw()
    # The test before may have killed some.
    await asyncio.to_thread(kafka_cluster.start)
    topic = Topic(kafka_cluster)
    await topic.create(min_insync=2)
    return topic


async def delivered(sink: KafkaSink, messages: Sequence[RelayMessage]) -> None:
    """Publish as the loop does, until all is confirmed."""
    pending = list(messages)
    async with asyncio.timeout(BOUND_S):
        while pending:
            try:
                failures = (await sink.publish(pending)).failures
                assert not [one for one in failures if one.error.kind is ErrorKind.MESSAGE]
                pending = [pending[one.index] for one in failures]
                if pending:
                    raise Outage("something is left")
            except Outage:
                await asyncio.sleep(PAUSE_S)
                with contextlib.suppress(Outage):
                    await sink.connect()


async def test_events_survive_a_leader_that_is_killed_while_they_are_sent(topic: Topic) -> None:
    sink = topic.sink()
    await sink.connect()
    messages = topic.numbered(3000)
    await delivered(sink, messages[:1000])

    publishing = asyncio.create_task(delivered(sink, messages[1000:2000]))
    await asyncio.to_thread(topic.cluster.nodes[await topic.leader()].kill)
    await publishing
    await delivered(sink, messages[2000:])

    arrived = first_occurrences(await topic.restored())
    assert sorted(dedup_keys(arrived)) == sorted(dedup_keys(messages))
    assert_per_key_order(arrived, messages)
    await sink.aclose()


async def test_what_only_its_leader_has_is_not_confirmed(topic: Topic) -> None:
    sink = topic.sink(request_timeout_ms=2000)
    await sink.connect()
    messages = topic.numbered(300)
    await delivered(sink, messages[:100])
    number = await topic.leader()
    leader = topic.cluster.nodes[number]
    others = [one for other, one in topic.cluster.nodes.items() if other != number]

    for one in others:
        one.freeze()
    failures = (await sink.publish(messages[100:])).failures
    await asyncio.to_thread(leader.kill)
    for one in others:
        one.thaw()

    assert len(failures) == 200
    await delivered(sink, messages[100:])
    arrived = first_occurrences(await topic.restored())
    assert sorted(dedup_keys(arrived)) == sorted(dedup_keys(messages))
    await sink.aclose()


async def test_too_few_replicas_in_sync_are_an_outage_until_they_are_back(
    kafka_cluster: KafkaCluster, topic: Topic
) -> None:
    demanding = Topic(kafka_cluster)
    await demanding.create(min_insync=3)
    sink = demanding.sink(request_timeout_ms=3000)
    await sink.connect()
    messages = demanding.numbered(100)
    number = await demanding.leader()
    gone = next(one for other, one in kafka_cluster.nodes.items() if other != number)

    await asyncio.to_thread(gone.kill)
    failures = (await sink.publish(messages)).failures
    await asyncio.to_thread(gone.start)

    assert len(failures) == 100
    assert all(one.error.kind is ErrorKind.OUTAGE for one in failures)
    await delivered(sink, messages)
    assert sorted(dedup_keys(await demanding.restored())) == sorted(dedup_keys(messages))
    await sink.aclose()


async def test_what_was_acknowledged_stays_so_when_the_coordinator_of_the_group_is_killed(
    topic: Topic,
) -> None:
    sink = topic.sink()
    await sink.connect()
    messages = topic.numbered(400)
    await delivered(sink, messages)
    await sink.aclose()
    source = source_of(topic.cluster.brokers, topic.name)
    await source.connect()
    batches = await collect(source, 200, timeout_s=BOUND_S)
    for batch in batches:
        await source.acknowledge(batch)

    await asyncio.to_thread(topic.cluster.nodes[await topic.coordinator()].kill)
    async with asyncio.timeout(BOUND_S):
        while sum(len(batch.messages) for batch in batches) < 400:
            try:
                batch = await source.poll()
                if not batch.is_empty:
                    await source.acknowledge(batch)
                    batches.append(batch)
            except Outage:
                with contextlib.suppress(Outage):
                    await source.connect()

    arrived = [message for batch in batches for message in batch.messages]
    assert sorted(dedup_keys(arrived)) == sorted(dedup_keys(messages))
    await source.aclose()
