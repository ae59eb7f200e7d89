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
_BEGINNING_BYTES = 16
_words = [struct.Struct(f"<{count}I") for count in range(64)]


def partition_of(key: bytes, count: int) -> int:
    """The number of the partition, of so many, that records of this key go to."""
    return 0 if count == 1 else (murmur2(key) & 0x7FFFFFFF) % count


def murmur2(data: bytes) -> int:
    """The hash as Kafka's clients compute it, without a sign."""
    length = len(data)
    if length < _BEGINNING_BYTES:
        h = _mixed(_SEED ^ length, data, 0)
    else:
        h = _mixed(_begun(data[:_BEGINNING_BYTES], length), data, _BEGINNING_BYTES)
    if length & 3:
        h = ((h ^ int.from_bytes(data[length & ~3 :], "little")) * _M) & _32
    h = ((h ^ (h >> 13)) * _M) & _32
    return h ^ (h >> 15)


# Dedup keys differ at their end, and most of the work is their beginning.
@lru_cache(maxsize=4096)
def _begun(beginning: bytes, length: int) -> int:
    return _mixed(_SEED ^ length, beginning, 0)


def _mixed(h: int, data: bytes, at: int) -> int:
    """Take in the whole words of four bytes from there on."""
    count = (len(data) - at) >> 2
    unpack = _words[count] if count < len(_words) else struct.Struct(f"<{count}I")
    for word in unpack.unpack_from(data, at):
        k = (word * _M) & _32
        h = ((h * _M) ^ ((k ^ (k >> 24)) * _M)) & _32
    return h
