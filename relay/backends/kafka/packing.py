"""The messages of one publish on their way into batches, some hundred in one go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgspec
from aiokafka import codec

from relay.backends.kafka.options import KafkaSinkOptions
from relay.backends.kafka.partition import hashes
from relay.backends.kafka.record import Header, RecordEncoder
from relay.errors import MessageRejected, MessageTooLarge, MessageUndecodable, RelayError
from relay.message import RelayMessage
from relay.template import compile_template

LIMIT_NAME = "max.message.bytes"

# The most of one batch, and of the batches that are packed at a time: brokers, and the client,
# handle few large requests with far less effort than many small ones.
BATCH_BYTES = 512 * 1024
_CHUNK_BYTES = 2 * BATCH_BYTES
_OVERHEAD_BYTES = 96
# What may be in a record beside, at most, is no matter for such a value.
_SMALL_BYTES = BATCH_BYTES // 4
_RECORDS_AT_ONCE = 250
_COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": codec.gzip_encode,
    "snappy": codec.snappy_encode,
    "lz4": codec.lz4_encode,
    "zstd": codec.zstd_encode,
}
_dedup_key_of: Callable[[RelayMessage], str] = attrgetter("dedup_key")


class Topic(msgspec.Struct, eq=False):
    """What the sink knows of a topic.

    ``limit``: the most bytes of a batch that it takes, ``known_at``: when that was asked;
    ``batch_bytes``: the most that we give it; ``is_searched``: each record is a batch, to find the
    one that the broker refuses.
    """

    name: str
    limit: int
    batch_bytes: int
    known_at: float = 0.0
    partitions: int = 0
    is_searched: bool = False


class Pack(msgspec.Struct, eq=False):
    """A batch of the client for one partition; ``indexes`` are those of its messages."""

    topic: Topic
    partition: int
    builder: Any  # untyped in the library
    limit: int
    indexes: list[int] = []

    def has_room(self, bytes_: int) -> bool:
        """Whether so many bytes more keep within our limit; a first record always does."""
        size: int = self.builder.size() + _OVERHEAD_BYTES + bytes_
        return size <= self.limit or not self.indexes


class Packer:
    """Puts messages into batches, in order, as the sink's options say."""

    def __init__(self, options: KafkaSinkOptions, namespace: str) -> None:
        self._encoder = RecordEncoder(options.format, namespace)
        template = options.key_template
        self._key_of = _dedup_key_of if template is None else compile_template(template)
        self._compress = _COMPRESS[options.compression]
        self._max_request_size = options.max_request_size
        # Records without a key take turns.
        self._turns = itertools.count()

    def chunks(
        self,
        messages: Sequence[RelayMessage],
        topics: Sequence[Topic | None],
        failed: dict[int, RelayError],
        new_builder: Callable[[], Any],
    ) -> Iterator[list[Pack]]:
        """Batches, one of a partition at a time, about a megabyte together.

        Leaves out what has no topic; what can't be sent is noted in ``failed`` by its index.
        """
        packs: dict[tuple[str, int], Pack] = {}
        size, now_ms = 0, int(time.time() * 1000)
        for at, ((value, key, hash_), message, topic) in enumerate(
            zip(self._parts(messages), messages, topics, strict=True)
        ):
            if topic is None:
                continue
            try:
                if not isinstance(value, bytes):
                    raise value
                headers = self._encoder.headers(message)
                bytes_ = len(value)
                if message.headers or bytes_ > _SMALL_BYTES or topic.batch_bytes < BATCH_BYTES:
                    bytes_ = self._checked_size(topic, key, value, headers)
            except MessageRejected as error:
                failed[at] = error
                continue
            slot = topic.name, (hash_ if key else next(self._turns)) % topic.partitions
            while True:
                pack = packs.get(slot)
                if pack is None:
                    limit = 1 if topic.is_searched else topic.batch_bytes
                    pack = packs[slot] = Pack(topic, slot[1], new_builder(), limit)
                # To hand these over as one dictionary takes as long as to append them.
                if (pack.limit == BATCH_BYTES or pack.has_room(bytes_)) and pack.builder.append(
                    timestamp=now_ms, key=key or None, value=value, headers=headers
                ) is not None:
                    break
                yield list(packs.values())
                packs, size = {}, 0
            pack.indexes.append(at)
            size += bytes_
            if size >= _CHUNK_BYTES:
                yield list(packs.values())
                packs, size = {}, 0
        if packs:
            yield list(packs.values())

    def _parts(
        self, messages: Sequence[RelayMessage]
    ) -> Iterator[tuple[bytes | MessageRejected, bytes, int]]:
        """Value, key and the key's hash of each message; in place of a value why it has none."""
        for start in range(0, len(messages), _RECORDS_AT_ONCE):
            some = messages[start : start + _RECORDS_AT_ONCE]
            values: list[bytes | MessageRejected] = list(self._encoder.values(some))
            keys = [self._key(message, at, values) for at, message in enumerate(some)]
            yield from zip(values, keys, hashes(keys), strict=True)

    def _key(self, message: RelayMessage, at: int, values: list[bytes | MessageRejected]) -> bytes:
        """The record key, empty for none; why there can't be one is noted in place of the value."""
        try:
            return self._key_of(message).encode()
        except UnicodeEncodeError:
            values[at] = MessageUndecodable("the record key has no UTF-8 form")
        except MessageRejected as error:
            values[at] = error
        return b""

    def _checked_size(
        self, topic: Topic, key: bytes, value: bytes, headers: Sequence[Header]
    ) -> int:
        """Its bytes. Raises `MessageTooLarge` where a batch of its own is too large."""
        texts = [part for header, text in headers for part in (header.encode(), text)]
        body = b"".join([key, value, *texts])
        limit = min(topic.limit, self._max_request_size)
        if _OVERHEAD_BYTES + len(body) > limit:
            size = _OVERHEAD_BYTES // 2 + len(self._compress(body))
            if size > limit:
                said = f"max_request_size is {limit} bytes"
                if topic.limit == limit:
                    said = f"{LIMIT_NAME} of the topic {topic.name!r} is {limit} bytes"
                raise MessageTooLarge(f"the record has {size} bytes with its batch, {said}")
        return len(body)
