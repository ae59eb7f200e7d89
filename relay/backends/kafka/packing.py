"""The messages of one publish on their way into batches, some hundred in one go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec
from aiokafka import codec

from relay.backends.kafka.options import KafkaSinkOptions
from relay.backends.kafka.partition import hashes, partition_of
from relay.backends.kafka.record import Header, RecordEncoder
from relay.errors import MessageRejected, MessageTooLarge, MessageUndecodable, RelayError
from relay.message import RelayMessage
from relay.template import compile_template

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
    one that the broker refuses.
    """

    partitions: int
    limit: int
    batch_bytes: int
    known_at: float
    is_searched: bool = False


class Pack(msgspec.Struct):
    """A batch of the client for one partition; ``indexes`` are those of its messages."""

    slot: tuple[str, int]
    builder: Any  # untyped in the library
    limit: int
    indexes: list[int] = []

    def has_room(self, bytes_: int) -> bool:
        """Whether so many bytes keep within our limit; the client has its own."""
        return self.builder.size() + _OVERHEAD_BYTES + bytes_ <= self.limit  # type: ignore[no-any-return]


class Packer:
    """Puts messages into batches, in order, as the sink's options say."""

    def __init__(self, options: KafkaSinkOptions, namespace: str) -> None:
        self._encoder = RecordEncoder(options.format, namespace)
        template = options.key_template
        self._key_of = None if template is None else compile_template(template)
        self._compress = _COMPRESS[options.compression]
        self._max_request_size = options.max_request_size
        # Records without a key take turns.
        self._turns = itertools.count()

    def chunks(
        self,
        messages: Sequence[RelayMessage],
        topics: Sequence[str | None],
        known: Mapping[str, Topic],
        accepted: AbstractSet[int],
        failed: dict[int, RelayError],
        new_builder: Callable[[], Any],
    ) -> Iterator[list[Pack]]:
        """Batches, one of a partition at a time, about `BATCH_BYTES` together.

        Leaves out what is ``accepted`` or ``failed`` already; what can't be sent is noted in
        ``failed`` by its index.
        """
        packs: dict[tuple[str, int], Pack] = {}
        size, now_ms = 0, int(time.time() * 1000)
        for at, (value, key, hash_) in enumerate(self._parts(messages)):
            name = topics[at]
            if name is None or at in accepted:
                continue
            topic = known[name]
            try:
                if not isinstance(value, bytes):
                    raise value
                if not isinstance(key, bytes):
                    raise key
                headers = self._encoder.headers(messages[at])
                bytes_ = len(value)
                if messages[at].headers or bytes_ * 4 > topic.batch_bytes:
                    bytes_ = self._checked_size(name, topic, key, value, headers)
            except MessageRejected as error:
                failed[at] = error
                continue
            number = partition_of(hash_, topic.partitions) if key else next(self._turns)
            slot = name, number % topic.partitions
            record = {"timestamp": now_ms, "key": key or None, "value": value, "headers": headers}
            pack = packs.get(slot)
            is_packed = (
                pack is not None
                and (pack.limit >= BATCH_BYTES or pack.has_room(bytes_))
                and pack.builder.append(**record) is not None
            )
            if pack is None or not is_packed:
                if pack is not None:
                    yield list(packs.values())
                    packs, size = {}, 0
                limit = 1 if topic.is_searched else topic.batch_bytes
                pack = packs[slot] = Pack(slot, new_builder(), limit)
                pack.builder.append(**record)
            pack.indexes.append(at)
            size += bytes_
            if size >= BATCH_BYTES:
                yield list(packs.values())
                packs, size = {}, 0
        if packs:
            yield list(packs.values())

    def _parts(
        self, messages: Sequence[RelayMessage]
    ) -> Iterator[tuple[bytes | MessageUndecodable, bytes | MessageRejected, int]]:
        """Value, key and the key's hash of each message."""
        for start in range(0, len(messages), _RECORDS_AT_ONCE):
            some = messages[start : start + _RECORDS_AT_ONCE]
            keys = [self._key(message) for message in some]
            hashed = hashes([key if isinstance(key, bytes) else b"" for key in keys])
            yield from zip(self._encoder.values(some), keys, hashed, strict=True)

    def _key(self, message: RelayMessage) -> bytes | MessageRejected:
        """The record key, empty for none; why there can't be one."""
        try:
            return (message.dedup_key if self._key_of is None else self._key_of(message)).encode()
        except UnicodeEncodeError:
            return MessageUndecodable("the record key has no UTF-8 form")
        except MessageRejected as error:
            return error

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
