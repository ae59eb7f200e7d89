"""How what a fetch brings is read."""

from __future__ import annotations

import struct

from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from relay.backends.kafka.fetch import pages

_TRANSACTIONAL, _CONTROL = 0x10, 0x20


def batch_of(offset: int, *values: bytes) -> bytes:
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, batch_size=2**20)
    for number, value in enumerate(values):
        builder.append(number, 1, None, value, [])
    return struct.pack(">q", offset) + bytes(builder.build())[8:]


def emptied(offset: int, attributes: int) -> bytes:
    """A batch as compaction leaves it of a producer's last one: its header without a record."""
    checked = struct.pack(">hiqqqhii", attributes, 0, 1, 1, 7, 0, -1, 0)
    head = struct.pack(">ibI", 0, 2, calc_crc32c(checked)) + checked
    return struct.pack(">qi", offset, len(head)) + head


def test_what_compaction_has_emptied_is_passed_over() -> None:
    for attributes in (0, _TRANSACTIONAL, _CONTROL | _TRANSACTIONAL):
        data = batch_of(0, b"1", b"2") + emptied(2, attributes) + batch_of(3, b"3")

        found = pages("t", 0, data, 0, [])

        assert [record.value for page in found for record in page.records] == [b"1", b"2", b"3"]
        assert found[-1].next_offset == 4
