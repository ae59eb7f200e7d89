"""The Kafka sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Self

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from relay.backends.kafka import client
from relay.backends.kafka.errors import mapped, of_exception
from relay.backends.kafka.options import KafkaSinkOptions, check_connection
from relay.backends.kafka.packing import BATCH_BYTES, LIMIT_NAME, Pack, Packer, Topic
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
    TimedOut,
)
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import compile_routing

# Kafka's default for max.message.bytes, where the topic's can't be asked.
_DEFAULT_TOPIC_LIMIT = 1_048_588
_LIMIT_AGE_S = 60.0
_HEALTH_TIMEOUT_S = 2.0


class HeldBack(Outage):
    """Not sent: what goes before it was refused for good, which is not its fault."""


class _Sent(msgspec.Struct, eq=False):
    """A batch that the producer has, of these messages."""

    pack: Pack
    messages: Sequence[RelayMessage]
    answer: asyncio.Future[Any]

    @property
    def is_accepted(self) -> bool:
        """Whether the broker has it, as `acks` wants it."""
        return self.answer.done() and self.answer.exception() is None

    @property
    def error(self) -> RelayError | None:
        """Why the batch was not accepted; None where it was, or there is no answer yet."""
        if not self.answer.done() or (error := self.answer.exception()) is None:
            return None
        where = f"sending records to {self.pack.topic.name!r}, partition {self.pack.partition}"
        return of_exception(error, where) or Outage(f"{where}: unexpected {type(error).__name__}")


class KafkaSink:
    """Sends messages as record batches, one of a partition at a time, and waits for every answer.

    The producer outlives publishes and connections: it sends a batch that was not answered again,
    under the same number, and the next publish waits for that answer first.
    """

    def __init__(self, options: KafkaSinkOptions, context: BackendContext) -> None:
        self._options = options
        template = options.topic or options.topic_template or ""
        for one in (template, *options.routing.values()):
            check_template(one)
        self._render = compile_routing(template, options.routing, escape=escape, check=check_topic)
        self._packer = Packer(options, context.dedup_namespace)
        name = f"pgtrickle-relay-{context.pipeline}"
        self._start = partial(client.started, options, "sink", name)
        self._server = client.server_of(options, "sink")
        self._is_idempotent = options.acks == "all"
        self._timeout_s = options.request_timeout_ms / 1000
        self._is_open = False
        self._producer: AIOKafkaProducer | None = None
        self._heard = client.Heard(options)
        self._topics: dict[str, Topic] = {}
        # What the producer has, and nobody was told the outcome of.
        self._sent: list[_Sent] = []

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, KafkaSinkOptions, path="sink")
        check_connection(parsed, "sink")
        if parsed.topic and ("{" in parsed.topic or "}" in parsed.topic):
            raise ConfigurationError(
                f"sink.topic {parsed.topic!r} has a brace", remedy="write it as topic_template"
            )
        return cls(parsed, context)

    async def connect(self) -> None:
        """See that brokers answer and let us in. Raises `DestinationMissing` for the one topic."""
        try:
            producer = await self._ready()
            await self._look_again(producer)
            partitions_of = producer.client.cluster.partitions_for_topic
            if any(
                one.pack.partition not in (partitions_of(one.pack.topic.name) or ())
                for one in self._sent
            ):
                # Of a topic that is gone, or was made again with fewer partitions.
                await self._give_up()
                producer = await self._ready()
            if self._options.topic is not None:
                await self._learn(producer, {self._options.topic})
        except BaseException:
            self._is_open = False
            if not self._sent:
                await self._give_up()
            raise
        self._is_open = True

    async def describe(self) -> dict[str, str]:
        """The brokers, what an acceptance means, and the partitions of the one topic."""
        producer = await self._ready()
        durability = "acks all, idempotent" if self._is_idempotent else "acks 1: the leader alone"
        topics = {
            f"topic {name}": f"{topic.partitions} partitions, {LIMIT_NAME} {topic.limit}"
            for name, topic in self._topics.items()
        }
        brokers = str(len(producer.client.cluster.brokers()))
        return {"server": self._server, "brokers": brokers, "durability": durability, **topics}

    def subject_of(self, message: RelayMessage) -> str:
        """The topic by template or routing. Raises `MessageRejected` for one that is none."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Send all; see the package for order and for what counts as accepted.

        Where brokers do not answer for ``request_timeout_ms``, or can't be connected to, what is
        in flight fails as unknown and the rest as not sent. Raises `DestinationMissing` for a
        topic that is missing, and `Outage`.
        """
        if not self._is_open:
            raise NotConnected("the kafka sink is not connected")
        if not messages:
            return PublishResult()
        if self._options.linger_ms and sum(len(one.payload) for one in messages) < BATCH_BYTES:
            await asyncio.sleep(self._options.linger_ms / 1000)
        self._heard.forget()
        producer = await self._ready()
        named = {message.subject for message in messages}
        refused = _refused(named - self._topics.keys())
        named -= refused.keys()
        await self._learn(producer, named)
        topics = [self._topics.get(message.subject) for message in messages]
        failed: dict[int, RelayError] = {}
        if refused:
            failed = {at: refused[messages[at].subject] for at, one in enumerate(topics) if not one}
        trouble = await self._answered(self._sent)
        accepted: set[int] = set()
        if self._sent:
            stored = {
                one.messages[at].dedup_key
                for one in self._sent
                if one.is_accepted
                for at in one.pack.indexes
            }
            accepted = {at for at, one in enumerate(messages) if one.dedup_key in stored}
            for at in accepted:
                topics[at] = None
        if trouble is None:
            # Kept until we are done: cancelled before, we are asked for these messages again.
            kept = [one for one in self._sent if one.is_accepted]
            if len(kept) < len(self._sent):
                await self._give_up()
                producer = await self._ready()
            self._sent = kept
            flight: Sequence[_Sent] = ()
            for packs in self._packer.chunks(messages, topics, failed, producer.create_batch):
                # They were packed while those before them were in flight.
                trouble = await self._settle(flight, accepted, failed)
                if trouble is not None:
                    break
                flight = await self._send(producer, packs, messages)
                # Lets requests out before the next ones are packed.
                await asyncio.sleep(0)
            else:
                trouble = await self._settle(flight, accepted, failed)
            self._sent = [one for one in self._sent if not one.answer.done()]
        if trouble is None:
            for topic in named:
                self._topics[topic].is_searched = False
        else:
            rest = set(range(len(messages))) - accepted - failed.keys()
            failed.update(dict.fromkeys(rest, trouble))
        return PublishResult(
            failures=[
                Failure(one, error, was_sent=not isinstance(error, HeldBack))
                for one, error in sorted(failed.items())
            ]
        )

    async def is_healthy(self) -> bool:
        """True when a broker answers within seconds."""
        if not self._is_open or self._producer is None:
            return False
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                return bool(await self._producer.client.force_metadata_update())
        except TimeoutError:
            return False

    async def aclose(self) -> None:
        """Close within seconds; what was not answered is not waited for."""
        self._is_open = False
        await self._give_up()
        await client.until_closed()

    async def _ready(self) -> AIOKafkaProducer:
        """The producer, started where there is none. Raises `Outage`, `AuthenticationRefused`."""
        if self._producer is None:
            compression = self._options.compression
            self._producer = await self._start(
                AIOKafkaProducer,
                self._heard,
                enable_idempotence=self._is_idempotent,
                acks="all" if self._is_idempotent else 1,
                compression_type=None if compression == "none" else compression,
                max_batch_size=BATCH_BYTES,
            )
        return self._producer

    async def _give_up(self) -> None:
        """Close the producer: what it was not answered for is sent as new."""
        producer, self._producer = self._producer, None
        self._sent.clear()
        if producer is not None:
            await client.close(producer)

    async def _look_again(self, producer: AIOKafkaProducer) -> None:
        """Ask for all topics: one that is asked for by its name is made where it is missing."""
        self._heard.forget()
        try:
            async with asyncio.timeout(self._timeout_s):
                is_known = await producer.client.force_metadata_update()
        except TimeoutError:
            is_known = False
        if not is_known:
            raise self._heard.trouble or TimedOut("asking for topics: no answer in time")

    async def _learn(self, producer: AIOKafkaProducer, topics: set[str]) -> None:
        """Know partitions and limits of these topics. Raises `DestinationMissing`, `Outage`."""
        partitions_of = producer.client.cluster.partitions_for_topic
        if not all(map(partitions_of, topics)):
            await self._look_again(producer)
        for topic in topics:
            if not partitions_of(topic):
                raise client.topic_missing(topic, self._server)
        now = time.monotonic()
        known = {one.name for one in self._topics.values() if one.known_at > now - _LIMIT_AGE_S}
        for topic, limit in (await self._limits(topics - known)).items():
            if topic not in self._topics or self._topics[topic].limit != limit:
                most = min(limit, self._options.max_request_size, BATCH_BYTES)
                self._topics[topic] = Topic(topic, limit, most)
            # What the broker has taught of its batches stays true.
            self._topics[topic].known_at = now
        for topic in topics:
            self._topics[topic].partitions = len(partitions_of(topic) or (0,))

    async def _limits(self, topics: AbstractSet[str]) -> dict[str, int]:
        """The most bytes of a batch of each topic."""
        if not topics:
            return {}
        admin = await self._start(AIOKafkaAdminClient, client.Heard(self._options))
        try:
            with mapped("asking for the limits of topics"):
                async with asyncio.timeout(self._timeout_s):
                    limits = await limits_of(admin, topics)
        finally:
            await client.close(admin)
        return {topic: limits.get(topic, _DEFAULT_TOPIC_LIMIT) for topic in topics}

    async def _send(
        self, producer: AIOKafkaProducer, packs: Sequence[Pack], messages: Sequence[RelayMessage]
    ) -> Sequence[_Sent]:
        """Hand batches, one of a partition, to the producer, which has none of these partitions."""
        flight = []
        for pack in packs:
            topic, partition = pack.topic.name, pack.partition
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await producer.send_batch(pack.builder, topic, partition=partition)
            except (KafkaError, TimeoutError, AssertionError) as error:
                answer = asyncio.get_running_loop().create_future()
                answer.set_exception(error)
            # An answer that nobody waits for any more is no error of the program.
            answer.add_done_callback(lambda one: one.exception())
            flight.append(_Sent(pack, messages, answer))
            self._sent.append(flight[-1])
        return flight

    async def _answered(self, flight: Sequence[_Sent]) -> RelayError | None:
        """Wait until all are answered; what keeps us from that.

        No longer than for one answer, nor when brokers can't be reached.
        """
        pending = [one.answer for one in flight if not one.answer.done()]
        if not pending:
            return None
        try:
            async with self._heard.bound(self._timeout_s):
                await asyncio.wait(pending)
        except TimeoutError:
            return self._heard.trouble or TimedOut("sending records: no answer in time")
        return None

    async def _settle(
        self, flight: Sequence[_Sent], accepted: set[int], failed: dict[int, RelayError]
    ) -> RelayError | None:
        """Wait for these batches, and note what became of them; why nothing more may be sent."""
        unanswered = trouble = await self._answered(flight)
        is_refused = False
        for one in flight:
            error = one.error
            if one.is_accepted:
                accepted.update(one.pack.indexes)
            elif error is not None:
                is_refused = True
                if error.kind is ErrorKind.MESSAGE and len(one.pack.indexes) > 1:
                    error = _search(one.pack, error)
                failed.update(dict.fromkeys(one.pack.indexes, error))
                if error.kind is ErrorKind.MESSAGE:
                    error = HeldBack(f"{error.problem}; what was sent before it was refused")
                trouble = trouble or error
            elif unanswered is not None:
                failed.update(dict.fromkeys(one.pack.indexes, unanswered))
        if is_refused and self._is_idempotent:
            # The numbers of a partition have a gap now.
            await self._give_up()
        return trouble


def _refused(topics: AbstractSet[str]) -> dict[str, MessageRejected]:
    """Why each of these that can't be a topic's name is none."""
    refused = {}
    for topic in topics:
        try:
            check_topic(topic)
        except MessageRejected as error:
            refused[topic] = error
    return refused


def _search(pack: Pack, error: RelayError) -> Outage:
    """The broker refuses a batch, for a message that it does not name."""
    if isinstance(error, MessageTooLarge):
        pack.topic.batch_bytes = max(1, min(pack.topic.batch_bytes, pack.limit) // 2)
        return Outage(f"{error.problem}; smaller batches are tried")
    pack.topic.is_searched = True
    return Outage(f"{error.problem}; its records are tried one by one")


async def limits_of(admin: AIOKafkaAdminClient, topics: Iterable[str]) -> dict[str, int]:
    """The most bytes of a batch by topic, as far as the user may ask for it."""
    asked = [ConfigResource(ConfigResourceType.TOPIC, one, {LIMIT_NAME: ""}) for one in topics]
    answers = await admin.describe_configs(asked)
    return {
        topic: int(value)
        for answer in answers
        for code, _, _, topic, entries in answer.resources
        for name, value, *_ in entries
        if code == 0 and name == LIMIT_NAME and str(value).isdecimal()
    }
