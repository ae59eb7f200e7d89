"""Which partition a record goes to: the rule of Kafka's own clients, so that all agree.

A key's partition is its 32-bit MurmurHash2 without the sign, modulo the number of partitions
(``DefaultPartitioner`` and ``Utils.murmur2`` of the Java client;
https://github.com/aappleby/smhasher/blob/master/src/MurmurHash2.cpp).
"""

from __future__ import annotations

import struct
from functools import lru_cache

_SEED = 0x9747B28C
_M = 0x5BD1E995
_32 = 0xFFFFFFFF
_words = [struct.Struct(f"<{count}I") for count in range(64)]


def partition_of(key: bytes, count: int) -> int:
    """The number of the partition, of so many, that records of this key go to."""
    return 0 if count == 1 else (_remembered(key) & 0x7FFFFFFF) % count


def murmur2(data: bytes) -> int:
    """The hash as Kafka's clients compute it, without a sign."""
    length = len(data)
    whole = length >> 2
    unpack = _words[whole] if whole < 64 else struct.Struct(f"<{whole}I")
    h = _SEED ^ length
    for word in unpack.unpack_from(data):
        k = (word * _M) & _32
        h = ((h * _M) ^ ((k ^ (k >> 24)) * _M)) & _32
    if rest := data[whole << 2 :]:
        h = ((h ^ int.from_bytes(rest, "little")) * _M) & _32
    h = ((h ^ (h >> 13)) * _M) & _32
    return h ^ (h >> 15)


# Entities come again; what comes once, such as a dedup key, costs little to forget.
_remembered = lru_cache(maxsize=65536)(murmur2)
