"""The Kafka sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self

from aiokafka.protocol.admin import DescribeConfigsRequest

from relay.backends.kafka.cluster import Cluster, open_cluster
from relay.backends.kafka.options import KafkaSinkOptions, check_at_least, check_connection
from relay.backends.kafka.packing import CHUNK_BYTES, Packing, Topic
from relay.backends.kafka.producer import (
    CODECS,
    MAX_REQUESTS_UNDER_WAY,
    HeldBack,
    Producer,
    RecordBatch,
)
from relay.backends.kafka.record import RecordEncoder
from relay.backends.kafka.topic import check_template, check_topic, escape
from relay.context import BackendContext
from relay.contracts import Failure, PublishResult
from relay.errors import (
    ConfigurationError,
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    RelayError,
)
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import Render, compile_routing, compile_template

ORDERINGS = ("strict", "pipelined")

# The most of one batch: a larger one is not faster, and has to be held to be sent again.
_BATCH_BYTES = 512 * 1024
# Kafka's default for max.message.bytes, where the topic's can't be asked.
_DEFAULT_TOPIC_LIMIT = 1_048_588
_TOPIC_RESOURCE = 2
_LIMIT_NAME = "max.message.bytes"


class KafkaSink:
    """Sends messages as record batches, several requests at a time, and waits for every answer."""

    def __init__(
        self,
        options: KafkaSinkOptions,
        *,
        render: Render,
        key_of: Render | None,
        encoder: RecordEncoder,
        ordering: str,
        name: str,
    ) -> None:
        self._options = options
        self._render = render
        self._key_of = key_of
        self._encoder = encoder
        self._name = name
        self._codec = CODECS[options.compression]
        is_idempotent = options.acks == "all"
        self._producer = Producer(
            is_idempotent=is_idempotent,
            timeout_ms=options.request_timeout_ms,
            max_under_way=MAX_REQUESTS_UNDER_WAY if is_idempotent or ordering != "strict" else 1,
        )
        self._cluster: Cluster | None = None
        self._topics: dict[str, Topic] = {}

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, KafkaSinkOptions, path="sink")
        check_connection(parsed, "sink")
        check_at_least("sink", 0, linger_ms=parsed.linger_ms)
        check_at_least("sink", 1, max_request_size=parsed.max_request_size)
        template = _topic_template(parsed)
        for one in (template, *parsed.routing.values()):
            check_template(one)
        ordering = context.ordering or "strict"
        if ordering not in ORDERINGS:
            raise ConfigurationError(
                f"ordering {ordering!r} is unknown to the kafka sink",
                remedy=f"use one of {', '.join(ORDERINGS)}",
            )
        return cls(
            parsed,
            render=compile_routing(template, parsed.routing, escape=escape, check=check_topic),
            key_of=None if parsed.key_template is None else compile_template(parsed.key_template),
            encoder=RecordEncoder(parsed.format, context.dedup_namespace),
            ordering=ordering,
            name=f"pgtrickle-relay-{context.pipeline}",
        )

    async def connect(self) -> None:
        """Open anew. Raises `DestinationMissing` where the one topic does not exist."""
        await self.aclose()
        cluster = await open_cluster(self._options, path="sink", name=self._name)
        try:
            topic = self._options.topic
            if topic is not None:
                await self._learn(cluster, [topic])
        except BaseException:
            await cluster.aclose()
            raise
        self._cluster = cluster

    async def describe(self) -> dict[str, str]:
        """The brokers, what an acceptance means, and the partitions of the one topic."""
        cluster = self._open()
        described = {
            "server": cluster.address,
            "brokers": str(cluster.brokers),
            "durability": "acks all, idempotent"
            if self._options.acks == "all"
            else "acks 1: the leader alone",
        }
        for name, topic in self._topics.items():
            described[f"topic {name}"] = (
                f"{topic.partitions} partitions, {_LIMIT_NAME} {topic.limit}"
            )
        return described

    def subject_of(self, message: RelayMessage) -> str:
        """The topic by template or routing. Raises `MessageRejected` for one that is none."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Send all; see the package for order and for what counts as accepted.

        A broker that does not answer for ``request_timeout_ms`` fails what was under way as
        unknown and what was not sent. Raises `DestinationMissing` for a topic that is missing.
        """
        cluster = self._open()
        if not messages:
            return PublishResult()
        await self._linger(messages)
        failed: dict[int, RelayError] = {}
        topics = self._topics_of(messages, failed)
        await self._learn(cluster, {topic for topic in topics if topic is not None})
        producer = self._producer
        again = await producer.prepare(cluster, [one.dedup_key for one in messages])
        sent: list[RecordBatch] = list(again)
        settled = {index for batch in again for index in batch.indexes}
        packing = Packing(
            messages,
            topics,
            self._topics,
            encoder=self._encoder,
            key_of=self._key_of,
            codec=self._codec,
            settled=settled,
            failed=failed,
        )
        flight = producer.flight(cluster)
        try:
            for batch in again:
                await flight.send([batch])
            while not packing.is_over and flight.trouble is None:
                batches = [one for one in packing.next_chunk() if self._is_sendable(one, failed)]
                sent += batches
                await flight.send(batches)
            await flight.land()
        except BaseException:
            await flight.abandon()
            raise
        finally:
            producer.settle(sent)
        self._note(sent, failed)
        if flight.trouble is not None:
            left = self._left(packing.packed, len(messages), settled)
            failed.update(dict.fromkeys(left, flight.trouble))
        failures = [
            Failure(one, error, was_sent=not isinstance(error, HeldBack))
            for one, error in sorted(failed.items())
        ]
        return PublishResult(failures=failures)

    async def is_healthy(self) -> bool:
        """True when a broker answers within seconds."""
        cluster = self._cluster
        return cluster is not None and await cluster.is_healthy()

    async def aclose(self) -> None:
        """Close all connections."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            await cluster.aclose()

    def _open(self) -> Cluster:
        if self._cluster is None:
            raise NotConnected("the kafka sink is not connected")
        return self._cluster

    async def _linger(self, messages: Sequence[RelayMessage]) -> None:
        """Wait where this is little, so that the next batch becomes larger."""
        linger_ms = self._options.linger_ms
        if linger_ms and sum(len(one.payload) for one in messages) < CHUNK_BYTES:
            await asyncio.sleep(linger_ms / 1000)

    def _topics_of(
        self, messages: Sequence[RelayMessage], failed: dict[int, RelayError]
    ) -> list[str | None]:
        """The topic of each message; None where it has none, which is its failure."""
        topics: list[str | None] = []
        known = self._topics
        for index, message in enumerate(messages):
            topic: str | None = message.subject
            if topic not in known:
                try:
                    topic = check_topic(topic or self._render(message))
                except MessageRejected as error:
                    failed[index] = error
                    topic = None
            topics.append(topic)
        return topics

    async def _learn(self, cluster: Cluster, topics: set[str] | list[str]) -> None:
        """Know partitions, leaders and limits of these topics. Raises `DestinationMissing`."""
        # A publish that was cancelled in here may have learned one half.
        unknown = [
            topic for topic in topics if topic not in self._topics or not cluster.is_known(topic)
        ]
        if not unknown:
            return
        await cluster.learn(unknown)
        limits = await _limits(cluster, unknown)
        for topic in unknown:
            limit = limits.get(topic, _DEFAULT_TOPIC_LIMIT)
            partitions = cluster.partitions_of(topic)
            known = self._topics.get(topic)
            if known is not None and known.limit == limit:
                # What the broker has taught of its batches stays true.
                known.partitions = partitions
                continue
            self._topics[topic] = Topic(
                partitions, limit, min(limit, self._options.max_request_size, _BATCH_BYTES)
            )

    def _is_sendable(self, batch: RecordBatch, failed: dict[int, RelayError]) -> bool:
        """Seal a batch; one that is too large is a single message's, which then fails."""
        size = self._producer.seal(batch)
        topic_limit = self._topics[batch.topic].limit
        own_limit = self._options.max_request_size
        if size <= min(topic_limit, own_limit):
            self._producer.enlist(batch)
            return True
        limit = (
            f"{_LIMIT_NAME} of the topic {batch.topic!r} is {topic_limit} bytes"
            if topic_limit <= own_limit
            else f"max_request_size is {own_limit} bytes"
        )
        error = MessageTooLarge(f"the record has {size} bytes with its batch, {limit}")
        failed.update(dict.fromkeys(batch.indexes, error))
        return False

    def _note(self, batches: Sequence[RecordBatch], failed: dict[int, RelayError]) -> None:
        """What became of the messages of these batches."""
        troubled = {batch.topic for batch in batches if batch.error is not None}
        for batch in batches:
            topic = self._topics[batch.topic]
            if batch.topic not in troubled:
                topic.is_searched = False
            error = batch.error
            if error is None:
                continue
            if error.kind is ErrorKind.MESSAGE and len(batch.indexes) > 1:
                # The broker refuses the batch, for a message that it does not name.
                if isinstance(error, MessageTooLarge):
                    topic.batch_bytes = max(1, min(topic.batch_bytes, batch.limit) // 2)
                    error = Outage(f"{error.problem}; smaller batches are tried")
                else:
                    topic.is_searched = True
                    error = Outage(f"{error.problem}; its records are tried one by one")
            failed.update(dict.fromkeys(batch.indexes, error))

    def _left(self, start: int, end: int, settled: set[int]) -> list[int]:
        return [index for index in range(start, end) if index not in settled]


def _topic_template(options: KafkaSinkOptions) -> str:
    if (options.topic is None) == (options.topic_template is None):
        raise ConfigurationError(
            "sink needs topic or topic_template, and not both",
            remedy="topic is one topic for all, topic_template may name {stream_table} and more",
        )
    if options.topic is not None:
        if "{" in options.topic or "}" in options.topic:
            raise ConfigurationError(
                f"sink.topic {options.topic!r} has a brace", remedy="write it as topic_template"
            )
        return options.topic
    assert options.topic_template is not None, "one of the two"  # noqa: S101 - for the type checker
    return options.topic_template


async def _limits(cluster: Cluster, topics: Sequence[str]) -> dict[str, int]:
    """The most bytes of a batch by topic, as far as the user may ask for it."""
    resources = [(_TOPIC_RESOURCE, topic, [_LIMIT_NAME]) for topic in topics]
    answer = await cluster.ask_any(
        DescribeConfigsRequest(resources), f"asking for the limits of topics at {cluster.address}"
    )
    return {
        topic: int(value)
        for code, _, _, topic, entries in answer.resources
        for name, value, *_ in entries
        if code == 0 and name == _LIMIT_NAME and value is not None and str(value).isdecimal()
    }
