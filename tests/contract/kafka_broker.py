"""What the tests of the Kafka sink and source share: topics of their own, and looks at them."""

from __future__ import annotations

import asyncio
import inspect
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka import codec as client_codec
from aiokafka import errors as client_errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.conn import AIOKafkaConnection
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import ConsumerRecord
from msgspec import structs

from relay.backends.kafka import KafkaSink, KafkaSource
from relay.backends.kafka.errors import mapped
from relay.backends.kafka.record import RecordEncoder, decoded
from relay.contracts import Rejected
from relay.message import RelayMessage
from tests.contract.evidence import PAUSE_S, numbered
from tests.contract.surroundings import backend_context
from tests.servers.kafka import PASSWORD, USER, KafkaServer
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles

TIMEOUT_MS = 10_000
_BATCH_HEADER_BYTES = 61
_CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}


def sink_of(
    brokers: str,
    topic: str | None,
    *,
    ordering: str | None = None,
    namespace: str = "",
    **keys: object,
) -> KafkaSink:
    """A sink with these keys, not connected."""
    named = {} if topic is None else {"topic": topic}
    return KafkaSink.from_options(
        {
            "type": "kafka",
            "brokers": brokers,
            "request_timeout_ms": TIMEOUT_MS,
            **named,
            **keys,
        },
        backend_context(ordering=ordering, dedup_namespace=namespace),
    )


def source_of(
    brokers: str,
    topic: str | Sequence[str],
    *,
    batch_size: int = 100,
    batch_bytes: int = 1024 * 1024,
    pipeline: str = "pipeline",
    **keys: object,
) -> KafkaSource:
    """A source with these keys, not connected; its group is the topic's unless said otherwise."""
    group = topic if isinstance(topic, str) else topic[0]
    return KafkaSource.from_options(
        {
            "type": "kafka",
            "brokers": brokers,
            "topic": topic,
            "group_id": group,
            "request_timeout_ms": TIMEOUT_MS,
            **keys,
        },
        backend_context(
            direction="reverse", batch_size=batch_size, batch_bytes=batch_bytes, pipeline=pipeline
        ),
    )


class Broker:
    """Topics of one test, looked at over the client library's own producer and consumer."""

    def __init__(self, server: KafkaServer, topic: str = "") -> None:
        self.server = server
        self.topic = topic or new_name()
        self._partitions: dict[str, int] = {}

    def numbered(self, count: int, *, keys: int = 1, start: int = 0) -> list[RelayMessage]:
        """So many messages for this topic."""
        return [
            structs.replace(message, subject=self.topic)
            for message in numbered(count, keys=keys, start=start)
        ]

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        """A started administrator."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.server.brokers)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()

    async def create(
        self, *topics: str, partitions: int = 1, configuration: Mapping[str, str] | None = None
    ) -> None:
        """Make the topic, or others, and wait until they have a leader."""
        names = topics or (self.topic,)
        self._partitions |= dict.fromkeys(names, partitions)
        async with self.admin() as admin:
            answer = await admin.create_topics(
                [NewTopic(one, partitions, 1, topic_configs=configuration) for one in names]
            )
            assert all(code == 0 for _, code, *_ in answer.topic_errors), answer

            async def have_leaders() -> bool:
                return all(map(_has_leaders, await admin.describe_topics(list(names))))

            await eventually(have_leaders)
        await eventually(lambda: self._is_served(names))

    async def ends(self) -> dict[int, int]:
        """The offset behind the last record of each partition, of those that are served."""
        answered = await self._asked_ends([self.topic])
        return {partition: end for _, partition, code, end in answered if code == 0}

    async def _is_served(self, topics: Sequence[str]) -> bool:
        """Whether the broker that leads the partitions of these topics knows that it does."""
        return not any(code for _, _, code, _ in await self._asked_ends(topics))

    async def _asked_ends(self, topics: Sequence[str]) -> list[tuple[str, int, int, int]]:
        """Topic, partition, error code and end of each partition."""
        connection = AIOKafkaConnection(*self.server.address, request_timeout_ms=TIMEOUT_MS)
        await connection.connect()
        try:
            asked = [(one, [(n, -1) for n in range(self._partitions[one])]) for one in topics]
            answer = await connection.send(OffsetRequest(-1, 0, asked))
        finally:
            await asyncio.wait({connection.close()}, timeout=5)
        return [
            (topic, partition, code, end)
            for topic, ones in answer.topics
            for partition, code, _, end in ones
        ]

    async def drop(self, *topics: str) -> None:
        """Remove the topic, or others, and wait until they are gone."""
        names = topics or (self.topic,)
        async with self.admin() as admin:
            await admin.delete_topics(list(names))

            async def are_gone() -> bool:
                return not set(names) & set(await admin.list_topics())

            await eventually(are_gone)

    async def topics(self) -> set[str]:
        """All topics that there are."""
        async with self.admin() as admin:
            return set(await admin.list_topics())

    async def remove_before(self, offset: int, partition: int = 0) -> None:
        """Remove records as retention does."""
        async with self.admin() as admin:
            await admin.delete_records(
                {TopicPartition(self.topic, partition): RecordsToDelete(before_offset=offset)}
            )

    @asynccontextmanager
    async def producer(self, **arguments: object) -> AsyncIterator[AIOKafkaProducer]:
        """A started producer of the client library."""
        producer = AIOKafkaProducer(bootstrap_servers=self.server.brokers, **arguments)
        await producer.start()
        try:
            yield producer
        finally:
            await producer.stop()

    async def put(
        self,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        partition: int = 0,
    ) -> int:
        """Add one record as somebody else would; its offset."""
        async with self.producer() as producer:
            sent = await producer.send_and_wait(
                self.topic,
                value,
                # The library wants a key where there is no value.
                key=key if value is not None or key is not None else b"",
                headers=list(headers),
                partition=partition,
            )
        offset: int = sent.offset
        return offset

    async def put_all(self, values: Sequence[bytes], partition: int = 0) -> None:
        """Add plain values in order."""
        async with self.producer(acks="all") as producer:
            sent = [await producer.send(self.topic, one, partition=partition) for one in values]
            await asyncio.gather(*sent)

    async def feed(
        self, messages: Sequence[RelayMessage], format_: str = "envelope", partition: int = 0
    ) -> None:
        """Add messages of ours, in order, to this topic whatever their subject."""
        encoder = RecordEncoder(format_, "")
        async with self.producer(acks="all") as producer:
            sent = []
            for message, value in zip(messages, encoder.values(messages), strict=True):
                assert isinstance(value, bytes)
                headers = encoder.headers(message)
                sent.append(
                    await producer.send(self.topic, value, headers=headers, partition=partition)
                )
            await asyncio.gather(*sent)

    async def records(
        self, *topics: str, isolation_level: str = "read_uncommitted"
    ) -> list[ConsumerRecord]:
        """All records of the topic, or of others, each partition in its order."""
        partitions = [
            TopicPartition(topic, number)
            for topic in topics or (self.topic,)
            for number in range(self._partitions.get(topic, 1))
        ]
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.server.brokers,
            auto_offset_reset="earliest",
            isolation_level=isolation_level,
        )
        consumer.assign(partitions)
        await consumer.start()
        try:
            async with asyncio.timeout(30):
                ends = await consumer.end_offsets(partitions)
                found: list[ConsumerRecord] = []
                for one in partitions:
                    while ends[one] and await consumer.position(one) < ends[one]:
                        batches = await consumer.getmany(one, timeout_ms=100)
                        found += batches.get(one, [])
        finally:
            await consumer.stop()
        return found

    async def put_raw(self, batch: bytes) -> None:
        """Add a record batch to the first partition as it is."""
        connection = AIOKafkaConnection(*self.server.address, request_timeout_ms=TIMEOUT_MS)
        await connection.connect()
        try:
            answer = await connection.send(
                ProduceRequest(None, -1, TIMEOUT_MS, [(self.topic, [(0, batch)])])
            )
            ((_, ((_, code, *_),)),) = answer.topics
            assert code == 0
        finally:
            await asyncio.wait({connection.close()}, timeout=5)

    async def commit(self, offset: int) -> None:
        """Set where the group of the topic goes on in the first partition; it has no members."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.server.brokers, group_id=self.topic, enable_auto_commit=False
        )
        one = TopicPartition(self.topic, 0)
        consumer.assign([one])
        await consumer.start()
        try:
            await consumer.commit({one: offset})
        finally:
            await consumer.stop()

    async def stored(self) -> bytes:
        """The first partition as the broker keeps it: its batches, compressed as they came."""
        connection = AIOKafkaConnection(*self.server.address, request_timeout_ms=TIMEOUT_MS)
        await connection.connect()
        try:
            most = 16 * 1024 * 1024
            asked = [(self.topic, [(0, 0, most)])]
            answer = await connection.send(FetchRequest(100, 1, most, 0, asked))
            ((_, ((*_, records),)),) = answer.topics
        finally:
            await asyncio.wait({connection.close()}, timeout=5)
        return bytes(records)

    async def restored(self, *topics: str) -> list[RelayMessage]:
        """All records as a consumer of ours gets them; broken ones by what their headers say."""
        messages = []
        for record in await self.records(*topics):
            one = decoded(record)
            messages.append(one.message if isinstance(one, Rejected) else one)
        return messages

    async def committed(self, group: str | None = None) -> dict[tuple[str, int], int]:
        """Where a group goes on, by default the one that is named after the topic."""
        async with self.admin() as admin:
            found = await admin.list_consumer_group_offsets(group or self.topic)
        return {(one.topic, one.partition): at.offset for one, at in found.items()}


class KafkaHarness:
    """What both harnesses can do to a broker, which is reached through a proxy."""

    def __init__(self, broker: Broker, proxy: TcpProxy, tls_files: TlsFiles) -> None:
        self.broker = broker
        self.proxy = proxy
        self.tls_files = tls_files

    @property
    def brokers(self) -> str:
        """The address that leads through the proxy."""
        return self.proxy.address

    def tls(self, *, trusted: bool) -> dict[str, Any]:
        """The keys that trust the broker's authority, or another."""
        files = self.tls_files
        return {"tls_ca": str(files.authority if trusted else files.other_authority)}

    async def cut(self) -> None:
        await self.proxy.cut()

    async def stall(self) -> None:
        self.proxy.stall()

    async def restore(self) -> None:
        await self.proxy.restore()

    async def restart(self) -> None:
        await asyncio.to_thread(self.broker.server.restart)

    def mapping(self) -> AbstractContextManager[object]:
        return mapped("testing")

    def exceptions(self) -> Iterable[BaseException]:
        yield from driver_exceptions()


async def eventually(is_so: Callable[[], Awaitable[bool]], timeout_s: float = 30.0) -> None:
    """Look again and again until it is so. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not await is_so():  # noqa: ASYNC110 - it can only be looked at
            await asyncio.sleep(PAUSE_S)


def batch_with_broken_header(values: Sequence[bytes], compression: str) -> bytes:
    """Records whose one header has a name that is not UTF-8, as some other client may write.

    They are of now: what is older than the broker keeps may be gone before it is read.
    """
    now_ms = int(time.time() * 1000)

    def built(codec: int) -> bytes:
        builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, batch_size=2**20)
        for number, value in enumerate(values):
            builder.append(number, now_ms, None, value, [("~~", b"v")])
        return bytes(builder.build())

    plain = bytearray(built(0)[_BATCH_HEADER_BYTES:].replace(b"~~", b"\xff\xfe"))
    codec = _CODECS[compression]
    encoders = {
        "gzip": client_codec.gzip_encode,
        "snappy": client_codec.snappy_encode,
        "lz4": client_codec.lz4_encode,
        "zstd": client_codec.zstd_encode,
    }
    body = bytes(encoders[compression](bytes(plain))) if codec else bytes(plain)
    batch = bytearray(built(0)[:_BATCH_HEADER_BYTES]) + body
    batch[8:12] = (len(batch) - 12).to_bytes(4, "big")
    batch[21:23] = codec.to_bytes(2, "big")
    batch[17:21] = calc_crc32c(bytes(batch[21:])).to_bytes(4, "big")
    return bytes(batch)


def login(password: str = PASSWORD, mechanism: str = "SCRAM-SHA-512") -> dict[str, Any]:
    """The keys that log in."""
    return {"sasl_mechanism": mechanism, "sasl_username": USER, "sasl_password": password}


def new_name() -> str:
    """A name for a topic or a group that nobody else has."""
    return f"test.{uuid.uuid4().hex}"


def driver_exceptions() -> Iterable[BaseException]:
    """One instance of every exception class of the client library, TLS and the network."""
    for _, member in inspect.getmembers(client_errors, inspect.isclass):
        if issubclass(member, Exception) and member.__module__ == client_errors.__name__:
            yield _instance(member)
    yield from (TimeoutError(), ConnectionResetError(), OSError("no route"), EOFError())
    yield from (ssl.SSLError(1, "broken"), ssl.SSLCertVerificationError(1, "unknown"))
    yield asyncio.IncompleteReadError(b"", 4)


def _instance(kind: type[Exception]) -> Exception:
    try:
        return kind("broken")
    except TypeError:
        return kind()


def _has_leaders(topic: Mapping[str, object]) -> bool:
    partitions = topic["partitions"]
    assert isinstance(partitions, list)
    return topic["error_code"] == 0 and all(one["leader"] >= 0 for one in partitions)
