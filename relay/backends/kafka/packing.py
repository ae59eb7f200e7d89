"""The messages of one publish on their way into record batches, some hundred in one go."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from relay.backends.kafka.partition import hashes, partition_of
from relay.backends.kafka.producer import RecordBatch
from relay.backends.kafka.record import RecordEncoder
from relay.errors import MessageRejected, MessageUndecodable, RelayError
from relay.message import RelayMessage
from relay.template import Render

# What goes into one request: brokers handle few large ones with far less effort than many small.
CHUNK_BYTES = 512 * 1024

_RECORDS_AT_ONCE = 250


class Topic(msgspec.Struct):
    """What the sink knows of a topic.

    ``limit``: the most bytes of a batch that it takes; ``batch_bytes``: the most that we give it;
    ``is_searched``: each record is a batch, to find the one that the broker refuses;
    ``next_partition``: for a record without a key.
    """

    partitions: int
    limit: int
    batch_bytes: int
    is_searched: bool = False
    next_partition: int = 0

    def turn(self) -> int:
        """The partition of a record without a key: they take turns."""
        self.next_partition = (self.next_partition + 1) % self.partitions
        return self.next_partition


class Packing:
    """Puts messages into batches, in order.

    ``topics``: of each message, None for one that is not to be sent. ``key_of``: what the record
    key is, None for the dedup key. What can't be sent is noted in ``failed`` by its index.
    """

    def __init__(
        self,
        messages: Sequence[RelayMessage],
        topics: Sequence[str | None],
        known: Mapping[str, Topic],
        *,
        encoder: RecordEncoder,
        key_of: Render | None,
        codec: int,
        settled: AbstractSet[int],
        failed: dict[int, RelayError],
    ) -> None:
        self._messages = messages
        self._topics = topics
        self._known = known
        self._encoder = encoder
        self._key_of = key_of
        self._codec = codec
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

    def next_chunk(self) -> list[RecordBatch]:
        """The next batches, one of a partition, about `CHUNK_BYTES` together."""
        batches: dict[tuple[str, int], RecordBatch] = {}
        messages, topics, known, settled = self._messages, self._topics, self._known, self._settled
        values, keys, key_hashes = self._values, self._keys, self._hashes
        headers_of, failed = self._encoder.headers, self._failed
        now_ms = int(time.time() * 1000)
        size = 0
        at, end = self.packed, len(messages)
        while at < end and size < CHUNK_BYTES:
            if at == len(values):
                self._make_more()
            name = topics[at]
            if name is None or at in settled:
                at += 1
                continue
            value, key = values[at], keys[at]
            try:
                if not isinstance(value, bytes):
                    raise value
                if not isinstance(key, bytes):
                    raise key
                headers = headers_of(messages[at])
            except MessageRejected as error:
                failed[at] = error
                at += 1
                continue
            topic = known[name]
            partition = partition_of(key_hashes[at], topic.partitions) if key else topic.turn()
            batch = batches.get((name, partition))
            if batch is None:
                # The first record is always taken.
                limit = 1 if topic.is_searched else topic.batch_bytes
                batch = RecordBatch(name, partition, codec=self._codec, limit=limit)
                batches[name, partition] = batch
            indexes = batch.indexes
            if batch.add(len(indexes), now_ms, key or None, value, headers) is None:
                break
            indexes.append(at)
            size += len(value)
            at += 1
        self.packed = at
        for batch in batches.values():
            batch.keys = [messages[index].dedup_key for index in batch.indexes]
        return list(batches.values())

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
