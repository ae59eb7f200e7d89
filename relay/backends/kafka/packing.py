"""The messages of one publish on their way into batches, some hundred in one go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec
from aiokafka import codec

from relay.backends.kafka.partition import hashes, partition_of
from relay.backends.kafka.record import Header, RecordEncoder
from relay.errors import MessageRejected, MessageTooLarge, MessageUndecodable, RelayError
from relay.message import RelayMessage
from relay.template import Render

LIMIT_NAME = "max.message.bytes"

# The most of one batch, and of the batches that are packed at a time: brokers handle few large
# requests with far less effort than many small ones.
BATCH_BYTES = 512 * 1024
_OVERHEAD_BYTES = 96
_RECORDS_AT_ONCE = 250
_COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": codec.gzip_encode,
    "snappy": codec.snappy_encode,
    "lz4": codec.lz4_encode,
    "zstd": codec.zstd_encode,
}


class Topic(msgspec.Struct):
    """What the sink knows of a topic.

    ``limit``: the most bytes of a batch that it takes, ``known_at``: when that was asked;
    ``batch_bytes``: the most that we give it; ``is_searched``: each record is a batch, to find the
    one that the broker refuses; ``next_partition``: for a record without a key.
    """

    partitions: int
    limit: int
    batch_bytes: int
    known_at: float
    is_searched: bool = False
    next_partition: int = 0

    def turn(self) -> int:
        """The partition of a record without a key: they take turns."""
        self.next_partition = (self.next_partition + 1) % self.partitions
        return self.next_partition


class Pack(msgspec.Struct):
    """A batch of the client for one partition; ``indexes`` are those of its messages."""

    slot: tuple[str, int]
    builder: Any  # untyped in the library
    limit: int
    indexes: list[int] = []


class Packing:
    """Puts messages into batches, in order.

    ``topics``: of each message, None for one that is not to be sent; ``settled``: those that are
    in a batch already. ``key_of``: what the record key is, None for the dedup key. What can't be
    sent is noted in ``failed`` by its index.
    """

    def __init__(
        self,
        messages: Sequence[RelayMessage],
        topics: Sequence[str | None],
        known: Mapping[str, Topic],
        *,
        encoder: RecordEncoder,
        key_of: Render | None,
        compression: str,
        max_request_size: int,
        settled: AbstractSet[int],
        failed: dict[int, RelayError],
    ) -> None:
        self._messages = messages
        self._topics = topics
        self._known = known
        self._encoder = encoder
        self._key_of = key_of
        self._compress = _COMPRESS[compression]
        self._max_request_size = max_request_size
        self._settled = settled
        self._failed = failed
        self._values: list[bytes | MessageUndecodable] = []
        self._keys: list[bytes | MessageRejected] = []
        self._hashes: list[int] = []
        self.packed = 0

    @property
    def is_over(self) -> bool:
        """True when each message is in a batch, or has failed."""
        return self.packed == len(self._messages)

    def next_chunk(self, new_builder: Callable[[], Any]) -> list[Pack]:
        """The next batches, one of a partition, about `BATCH_BYTES` together."""
        packs: dict[tuple[str, int], Pack] = {}
        messages, topics, settled = self._messages, self._topics, self._settled
        values, keys, key_hashes = self._values, self._keys, self._hashes
        headers_of, now_ms = self._encoder.headers, int(time.time() * 1000)
        size, at, end = 0, self.packed, len(messages)
        while at < end and size < BATCH_BYTES:
            if at == len(values):
                self._make_more()
            name = topics[at]
            if name is None or at in settled:
                at += 1
                continue
            value, key, topic = values[at], keys[at], self._known[name]
            try:
                if not isinstance(value, bytes):
                    raise value
                if not isinstance(key, bytes):
                    raise key
                message = messages[at]
                headers = headers_of(message)
                bytes_ = len(value)
                if message.headers or bytes_ * 4 > topic.batch_bytes:
                    bytes_ = self._checked_size(name, topic, key, value, headers)
            except MessageRejected as error:
                self._failed[at] = error
                at += 1
                continue
            number = partition_of(key_hashes[at], topic.partitions) if key else topic.turn()
            pack = packs.get((name, number))
            if pack is None:
                limit = 1 if topic.is_searched else topic.batch_bytes
                pack = packs[name, number] = Pack((name, number), new_builder(), limit)
            elif pack.limit < BATCH_BYTES:
                more = _OVERHEAD_BYTES + len(key) + bytes_ + sum(len(one[1]) for one in headers)
                if pack.builder.size() + more > pack.limit:
                    break
            taken = pack.builder.append(
                timestamp=now_ms, key=key or None, value=value, headers=headers
            )
            if taken is None:
                break
            pack.indexes.append(at)
            size += bytes_
            at += 1
        self.packed = at
        return list(packs.values())

    def _checked_size(
        self, name: str, topic: Topic, key: bytes, value: bytes, headers: Sequence[Header]
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
                    said = f"{LIMIT_NAME} of the topic {name!r} is {limit} bytes"
                raise MessageTooLarge(f"the record has {size} bytes with its batch, {said}")
        return len(body)

    def _make_more(self) -> None:
        """Values, keys and hashes of the next messages."""
        made = len(self._values)
        some = self._messages[made : made + _RECORDS_AT_ONCE]
        self._values += self._encoder.values(some)
        keys = [self._key(message) for message in some]
        self._keys += keys
        self._hashes += hashes([key if isinstance(key, bytes) else b"" for key in keys])

    def _key(self, message: RelayMessage) -> bytes | MessageRejected:
        """The record key, empty for none; why there can't be one."""
        try:
            return (message.dedup_key if self._key_of is None else self._key_of(message)).encode()
        except UnicodeEncodeError:
            return MessageUndecodable("the record key has no UTF-8 form")
        except MessageRejected as error:
            return error
