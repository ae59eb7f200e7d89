"""A key's partition is the one that every other client of Kafka chooses."""

from __future__ import annotations

import random

import pytest
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.partitioner import murmur2 as murmur2_of_the_library

from relay.backends.kafka.partition import murmur2, partition_of


@pytest.mark.parametrize(
    "key,number",
    # The vectors of the Java client's own tests (UtilsTest.testMurmur2), without the sign.
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_the_hash_is_that_of_the_java_client(key: bytes, number: int) -> None:
    assert murmur2(key) == number % 2**32


def test_keys_of_every_length_go_where_the_library_sends_them() -> None:
    chosen = random.Random(5)
    partitioner = DefaultPartitioner()
    for length in range(400):
        key = chosen.randbytes(length)
        assert murmur2(key) == murmur2_of_the_library(key) % 2**32
        assert partition_of(key, 7) == partitioner(key, list(range(7)), list(range(7)))
