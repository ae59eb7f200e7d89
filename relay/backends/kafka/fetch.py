"""What a fetch brings, as records: batches walked through, aborted transactions left out.

The library's reader, written in C, gives up on a whole batch for one header name that is not
UTF-8; such a batch is read here, record by record (the format:
https://kafka.apache.org/documentation/#recordbatch).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from aiokafka import codec
from aiokafka.record.control_record import ABORT_MARKER, ControlRecord
from aiokafka.record.memory_records import MemoryRecords

from relay.backends.kafka.record import Record
from relay.errors import Outage

_LENGTH = struct.Struct(">qi")
_HEADER_BYTES = 61
_NO_RECORDS: Sequence[Record] = ()
_DECODERS = {
    1: codec.gzip_decode,
    2: codec.snappy_decode,
    3: codec.lz4_decode,
    4: codec.zstd_decode,
}


class Page(msgspec.Struct):
    """The records of one batch from ``at`` on, in order; behind them comes ``next_offset``.

    ``size``: bytes as they came over the network.
    """

    topic: str
    partition: int
    records: Sequence[Record]
    next_offset: int
    size: int
    at: int = 0


class _PlainRecord(msgspec.Struct, frozen=True):
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


def pages(
    topic: str,
    partition: int,
    data: bytes,
    offset: int,
    aborted: Sequence[tuple[int, int]] | None,
) -> list[Page]:
    """What one fetch from this offset on brought of one partition.

    ``aborted``: producer and first offset of each aborted transaction in it; None where that is
    not asked. Raises `Outage` for what can't be read.
    """
    found: list[Page] = []
    pending = sorted(aborted or (), key=lambda one: one[1])
    producers: set[int] = set()
    for raw in _batches(data):
        batch = _opened(raw, topic, partition)
        while pending and pending[0][1] <= batch.base_offset:
            producers.add(pending.pop(0)[0])
        records = _NO_RECORDS
        if batch.is_control_batch:
            # Compaction leaves a batch empty where it is the last that its producer wrote.
            marker = next(batch, None)
            if marker is not None and ControlRecord.parse(marker.key) == ABORT_MARKER:
                producers.discard(batch.producer_id)
        elif not (batch.is_transactional and batch.producer_id in producers):
            # A batch begins before what was asked for where somebody read a part of it.
            records = [one for one in _records(batch, raw) if one.offset >= offset]
        page = Page(topic, partition, records, batch.next_offset, len(raw))
        if found and not records:
            found[-1].next_offset = page.next_offset
        else:
            found.append(page)
    return found


def _batches(data: bytes) -> Iterator[bytes]:
    """Each whole batch; the last one may be cut off, and comes again."""
    at = 0
    while at + _LENGTH.size <= len(data):
        end = at + _LENGTH.size + _LENGTH.unpack_from(data, at)[1]
        if end > len(data):
            return
        yield data[at:end]
        at = end


def _opened(raw: bytes, topic: str, partition: int) -> Any:  # untyped in the library
    batch = MemoryRecords(raw).next_batch()
    if not batch.validate_crc():
        raise Outage(f"a batch of {topic!r}, partition {partition}, came damaged")
    return batch


def _records(batch: Any, raw: bytes) -> Sequence[Record]:  # as above
    try:
        return list(batch)
    except UnicodeDecodeError:
        return list(_read(batch, raw))


def _read(batch: Any, raw: bytes) -> Iterator[Record]:  # as above
    body = raw[_HEADER_BYTES:]
    if batch.compression_type:
        body = bytes(_DECODERS[batch.compression_type](body))
    at = 0
    while at < len(body):
        length, at = _varint(body, at)
        end = at + length
        _, at = _varint(body, at + 1)
        delta, at = _varint(body, at)
        key, at = _bytes(body, at)
        value, at = _bytes(body, at)
        count, at = _varint(body, at)
        headers: list[tuple[str, bytes | None]] = []
        for _ in range(count):
            name, at = _bytes(body, at)
            text, at = _bytes(body, at)
            headers.append(((name or b"").decode("utf-8", "backslashreplace"), text))
        yield _PlainRecord(batch.base_offset + delta, key, value, headers)
        at = end


def _bytes(body: bytes, at: int) -> tuple[bytes | None, int]:
    length, at = _varint(body, at)
    return (None, at) if length < 0 else (body[at : at + length], at + length)


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """A number in zigzag, seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
        shift += 7
