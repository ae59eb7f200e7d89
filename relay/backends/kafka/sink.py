"""The Kafka sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Self

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from relay.backends.kafka import client
from relay.backends.kafka.errors import mapped, of_exception
from relay.backends.kafka.options import (
    KafkaSinkOptions,
    addresses_of,
    check_at_least,
    check_connection,
)
from relay.backends.kafka.packing import BATCH_BYTES, LIMIT_NAME, Pack, Packing, Topic
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
    TimedOut,
)
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import Render, compile_routing, compile_template

ORDERINGS = ("strict", "pipelined")

# Kafka's default for max.message.bytes, where the topic's can't be asked.
_DEFAULT_TOPIC_LIMIT = 1_048_588
_LIMIT_AGE_S = 60.0
_HEALTH_TIMEOUT_S = 2.0
# A batch that is not answered in this many publishes, though brokers answer, is sent again as new.
_MOST_WAITS = 2


class HeldBack(Outage):
    """Not stored: what was sent before it was refused for good, which is not its fault."""


class _Sent(msgspec.Struct, eq=False):
    """A batch that the producer has; ``indexes`` are those of its messages in this publish.

    ``waits``: how many publishes have waited for its answer in vain.
    """

    pack: Pack
    keys: Sequence[str]
    answer: asyncio.Future[Any]
    indexes: list[int]
    waits: int = 0

    @property
    def error(self) -> RelayError | None:
        """Why the batch was not accepted; None where it was, or there is no answer yet."""
        if not self.answer.done() or (error := self.answer.exception()) is None:
            return None
        where = f"sending records to {self.pack.slot[0]!r}, partition {self.pack.slot[1]}"
        return of_exception(error, where) or Outage(f"{where}: unexpected {type(error).__name__}")


class KafkaSink:
    """Sends messages as record batches and waits for every answer.

    The producer outlives publishes and connections: it sends a batch that was not answered again,
    under the same number, and the publish that repeats its messages waits for the same answer.
    """

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
        self._is_idempotent = options.acks == "all"
        self._waits_for_each = not self._is_idempotent and ordering == "strict"
        self._timeout_s = options.request_timeout_ms / 1000
        self._server = ",".join(map(str, addresses_of(options, "sink")))
        self._admin: AIOKafkaAdminClient | None = None
        self._producer: AIOKafkaProducer | None = None
        self._heard = client.Heard(options)
        self._topics: dict[str, Topic] = {}
        # By dedup key what the producer has, and nobody was told the outcome of.
        self._unsettled: dict[str, _Sent] = {}
        # Of each partition the last batch, and which have stored something of this producer.
        self._last: dict[tuple[str, int], _Sent] = {}
        self._begun: set[tuple[str, int]] = set()

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
        """See that brokers answer and let us in. Raises `DestinationMissing` for the one topic."""
        await self._close_admin()
        admin = AIOKafkaAdminClient(**client.arguments_of(self._options, "sink", self._name))
        await client.start(admin, client.Heard(self._options), self._options, "sink")
        try:
            producer = await self._ready()
            await self._look_again(producer)
            cluster = producer.client.cluster
            if any(
                number not in (cluster.partitions_for_topic(topic) or ())
                for topic, number in {one.pack.slot for one in self._unsettled.values()}
            ):
                # A topic that was made again may have fewer partitions.
                await self._give_up()
                producer = await self._ready()
            topic = self._options.topic
            if topic is not None:
                await self._learn(producer, admin, {topic})
        except BaseException:
            await client.close(admin)
            if not self._unsettled:
                await self._give_up()
            raise
        self._admin = admin

    async def describe(self) -> dict[str, str]:
        """The brokers, what an acceptance means, and the partitions of the one topic."""
        self._open()
        producer = await self._ready()
        described = {
            "server": self._server,
            "brokers": str(len(producer.client.cluster.brokers())),
            "durability": "acks all, idempotent"
            if self._is_idempotent
            else "acks 1: the leader alone",
        }
        for name, topic in self._topics.items():
            described[f"topic {name}"] = (
                f"{topic.partitions} partitions, {LIMIT_NAME} {topic.limit}"
            )
        return described

    def subject_of(self, message: RelayMessage) -> str:
        """The topic by template or routing. Raises `MessageRejected` for one that is none."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Send all; see the package for order and for what counts as accepted.

        Where brokers do not answer for ``request_timeout_ms``, or can't be connected to, what is
        in flight fails as unknown and the rest as not sent. Raises `DestinationMissing` for a
        topic that is missing, and `Outage`.
        """
        admin = self._open()
        if not messages:
            return PublishResult()
        if self._options.linger_ms and sum(len(one.payload) for one in messages) < BATCH_BYTES:
            await asyncio.sleep(self._options.linger_ms / 1000)
        self._heard.forget()
        producer = await self._ready()
        failed: dict[int, RelayError] = {}
        topics = self._topics_of(messages, failed)
        await self._learn(producer, admin, {topic for topic in topics if topic is not None})
        sent = self._in_flight(messages)
        packing = Packing(
            messages,
            topics,
            self._topics,
            encoder=self._encoder,
            key_of=self._key_of,
            compression=self._options.compression,
            max_request_size=self._options.max_request_size,
            settled={index for one in sent for index in one.indexes},
            failed=failed,
        )
        # What is sent already is answered before what comes behind it is sent.
        trouble = await self._wait(sent)
        while not packing.is_over and trouble is None:
            for pack in packing.next_chunk(producer.create_batch):
                if trouble is None:
                    keys = [messages[index].dedup_key for index in pack.indexes]
                    trouble = await self._send(producer, pack, keys, sent)
                if trouble is not None and not any(one.pack is pack for one in sent):
                    failed.update(dict.fromkeys(pack.indexes, trouble))
            # Lets requests out before the next ones are made.
            await asyncio.sleep(0)
        trouble = await self._wait(sent) or trouble
        if trouble is not None:
            settled = {index for one in sent for index in one.indexes}
            left = [one for one in range(packing.packed, len(messages)) if one not in settled]
            failed.update(dict.fromkeys(left, trouble))
        await self._note(sent, trouble, failed)
        return PublishResult(
            failures=[
                Failure(one, error, was_sent=not isinstance(error, HeldBack))
                for one, error in sorted(failed.items())
            ]
        )

    async def is_healthy(self) -> bool:
        """True when a broker answers within seconds."""
        if self._admin is None or self._producer is None:
            return False
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                return bool(await self._producer.client.force_metadata_update())
        except TimeoutError:
            return False

    async def aclose(self) -> None:
        """Close within seconds; what was not answered is not waited for."""
        await self._close_admin()
        await self._give_up()

    async def _close_admin(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            await client.close(admin)

    async def _give_up(self) -> None:
        """Close the producer: what it has not sent, or was not answered, is sent as new."""
        producer, self._producer = self._producer, None
        self._unsettled.clear()
        self._last.clear()
        self._begun.clear()
        if producer is not None:
            await client.close(producer)

    def _open(self) -> AIOKafkaAdminClient:
        if self._admin is None:
            raise NotConnected("the kafka sink is not connected")
        return self._admin

    async def _ready(self) -> AIOKafkaProducer:
        """The producer, started where there is none. Raises `Outage`, `AuthenticationRefused`."""
        if self._producer is None:
            compression = self._options.compression
            producer = AIOKafkaProducer(
                **client.arguments_of(self._options, "sink", self._name),
                enable_idempotence=self._is_idempotent,
                acks="all" if self._is_idempotent else 1,
                compression_type=None if compression == "none" else compression,
                max_batch_size=BATCH_BYTES,
            )
            await client.start(producer, self._heard, self._options, "sink")
            self._producer = producer
        return self._producer

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

    async def _learn(
        self, producer: AIOKafkaProducer, admin: AIOKafkaAdminClient, topics: set[str]
    ) -> None:
        """Know partitions and limits of these topics. Raises `DestinationMissing`, `Outage`."""
        partitions_of = producer.client.cluster.partitions_for_topic
        if not all(map(partitions_of, topics)):
            await self._look_again(producer)
        oldest = time.monotonic() - _LIMIT_AGE_S
        to_ask = []
        for topic in topics:
            known = self._topics.get(topic)
            partitions = len(partitions_of(topic) or ())
            if not partitions:
                raise client.topic_missing(topic, self._server)
            if known is not None:
                known.partitions = partitions
            if known is None or known.known_at < oldest:
                to_ask.append(topic)
        if not to_ask:
            return
        with mapped("asking for the limits of topics"):
            async with asyncio.timeout(self._timeout_s * 2):
                limits = await limits_of(admin, to_ask)
        for topic in to_ask:
            limit = limits.get(topic, _DEFAULT_TOPIC_LIMIT)
            known = self._topics.get(topic)
            if known is not None and known.limit == limit:
                # What the broker has taught of its batches stays true.
                known.known_at = time.monotonic()
                continue
            self._topics[topic] = Topic(
                len(partitions_of(topic) or (0,)),
                limit,
                min(limit, self._options.max_request_size, BATCH_BYTES),
                time.monotonic(),
            )

    def _in_flight(self, messages: Sequence[RelayMessage]) -> list[_Sent]:
        """What an earlier publish has sent of these messages, in the order in which it was."""
        found: list[_Sent] = []
        for index, message in enumerate(messages if self._unsettled else ()):
            one = self._unsettled.get(message.dedup_key)
            if one is None:
                continue
            if one not in found:
                found.append(one)
                one.indexes = []
            one.indexes.append(index)
        return found

    async def _send(
        self, producer: AIOKafkaProducer, pack: Pack, keys: Sequence[str], sent: list[_Sent]
    ) -> RelayError | None:
        """Queue one batch behind the others of its partition; what keeps it from that."""
        last = self._last.get(pack.slot)
        trouble = None
        if last is not None and (self._waits_for_each or pack.slot not in self._begun):
            # Of a producer that is new to a partition a broker takes any number: a second batch
            # would be stored although the first is lost.
            trouble = await self._wait([last])
        if trouble is not None:
            return trouble
        if any(one.error is not None for one in sent):
            return HeldBack("what was sent before was not accepted; this is sent again")

        async def queue() -> None:
            topic, partition = pack.slot
            answer = await producer.send_batch(pack.builder, topic, partition=partition)
            one = _Sent(pack, keys, answer, pack.indexes)
            answer.add_done_callback(answered)
            self._last[pack.slot] = one
            self._unsettled.update(dict.fromkeys(keys, one))
            sent.append(one)

        def answered(answer: asyncio.Future[Any]) -> None:
            if answer.exception() is None:
                self._begun.add(pack.slot)

        return await self._bounded(queue())

    async def _wait(self, sent: Iterable[_Sent]) -> RelayError | None:
        """Wait until all are answered; what keeps us from that."""
        pending = [one.answer for one in sent if not one.answer.done()]
        return await self._bounded(asyncio.wait(pending)) if pending else None

    async def _bounded(self, work: Coroutine[Any, Any, object]) -> RelayError | None:
        """Wait for it no longer than for an answer, nor when brokers can't be reached."""
        tasks = doing, _ = asyncio.create_task(work), asyncio.create_task(self._heard.is_any.wait())
        try:
            await asyncio.wait(tasks, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if doing.cancelled():
            return self._heard.trouble or TimedOut("sending records: no answer in time")
        error = doing.exception()
        return (
            None if error is None else of_exception(error, "sending records") or Outage(str(error))
        )

    async def _note(
        self, sent: Sequence[_Sent], trouble: RelayError | None, failed: dict[int, RelayError]
    ) -> None:
        """What became of the messages of these batches, and whether the producer can go on."""
        refused: set[tuple[str, int]] = set()
        is_spent = False
        for name in {one.pack.slot[0] for one in sent}:
            if all(one.error is None for one in sent if one.pack.slot[0] == name):
                self._topics[name].is_searched = False
        for one in sent:
            error = one.error
            if not one.answer.done():
                one.waits += 1
                is_spent |= one.waits >= _MOST_WAITS and self._heard.trouble is None
                error = trouble
            is_spent |= error is not None and one.answer.done()
            if error is None:
                continue
            if one.pack.slot in refused:
                error = HeldBack(f"{error.problem}; what was sent before it was refused")
            elif error.kind is ErrorKind.MESSAGE:
                refused.add(one.pack.slot)
                if len(one.keys) > 1:
                    error = self._search(one.pack, error)
            failed.update(dict.fromkeys(one.indexes, error))
        self._unsettled = {
            key: one for key, one in self._unsettled.items() if not one.answer.done()
        }
        if is_spent and self._is_idempotent:
            # The numbers of a partition have a gap now, or nobody knows.
            await self._give_up()

    def _search(self, pack: Pack, error: RelayError) -> Outage:
        """The broker refuses a batch, for a message that it does not name."""
        topic = self._topics[pack.slot[0]]
        if isinstance(error, MessageTooLarge):
            topic.batch_bytes = max(1, min(topic.batch_bytes, pack.limit) // 2)
            return Outage(f"{error.problem}; smaller batches are tried")
        topic.is_searched = True
        return Outage(f"{error.problem}; its records are tried one by one")


async def limits_of(admin: AIOKafkaAdminClient, topics: Sequence[str]) -> dict[str, int]:
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
