"""A key's partition is the one that every other client of Kafka chooses."""

from __future__ import annotations

import random

import pytest
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.partitioner import murmur2 as murmur2_of_the_library

from relay.backends.kafka.partition import hashes


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
    assert hashes([key]) == [number % 2**31]


def test_keys_of_every_length_go_where_the_library_sends_them() -> None:
    chosen = random.Random(5)
    partitioner = DefaultPartitioner()
    keys = [chosen.randbytes(length) for length in range(400) for _ in range(3)]
    chosen.shuffle(keys)

    found = hashes(keys)

    assert found == [murmur2_of_the_library(key) % 2**31 for key in keys]
    assert [hash_ % 7 for hash_ in found] == [
        partitioner(key, list(range(7)), list(range(7))) for key in keys
    ]


@pytest.mark.parametrize("key", [b"", b"\xff" * 23, b"\xff" * 24, b"\0" * 7])
def test_keys_that_are_hashed_together_do_not_touch_each_other(key: bytes) -> None:
    others = [b"\xff" * len(key), b"\0" * len(key)]

    assert hashes([*others, key, *others])[2] == hashes([key])[0]
