"""Which partition a record goes to: the rule of Kafka's own clients, so that all agree.

A key's partition is its 32-bit MurmurHash2 without the sign, modulo the number of partitions
(``DefaultPartitioner`` and ``Utils.murmur2`` of the Java client;
https://github.com/aappleby/smhasher/blob/master/src/MurmurHash2.cpp).

Keys of one length are hashed together: each has 64 bits of one large integer, of which the upper
32 are free for what a multiplication adds. So each step is a few operations for all keys.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

_SEED = 0x9747B28C
_M = 0x5BD1E995
_LANE_BYTES = 8


def hashes(keys: Sequence[bytes]) -> list[int]:
    """The hash of each key, without its sign: modulo their number, that of its partition."""
    lengths = list(map(len, keys))
    if len(set(lengths)) == 1:
        return list(_hashes(keys, lengths[0]))
    found = [0] * len(keys)
    for length in set(lengths):
        places = [place for place, own in enumerate(lengths) if own == length]
        for place, hash_ in zip(
            places, _hashes([keys[place] for place in places], length), strict=True
        ):
            found[place] = hash_
    return found


def _hashes(keys: Sequence[bytes], length: int) -> Sequence[int]:
    lanes = len(keys)
    joined = b"".join(keys)
    mask = _in_each(0xFFFFFFFF, lanes)
    h = _in_each(_SEED ^ length, lanes)
    for at in range(0, length - 3, 4):
        k = (_column(joined, length, range(at, at + 4), lanes) * _M) & mask
        k = ((k ^ (k >> 24 & mask)) * _M) & mask
        h = ((h * _M) & mask) ^ k
    if length & 3:
        h = ((h ^ _column(joined, length, range(length & ~3, length), lanes)) * _M) & mask
    h = ((h ^ (h >> 13 & mask)) * _M) & mask
    h = (h ^ (h >> 15 & mask)) & _in_each(0x7FFFFFFF, lanes)
    return struct.unpack(f"<{lanes}Q", h.to_bytes(lanes * _LANE_BYTES, "little"))


def _column(joined: bytes, length: int, places: range, lanes: int) -> int:
    """These bytes, four at most, of each key."""
    column = bytearray(lanes * _LANE_BYTES)
    for lane_byte, place in enumerate(places):
        column[lane_byte::_LANE_BYTES] = joined[place::length]
    return int.from_bytes(column, "little")


@lru_cache(maxsize=64)
def _in_each(value: int, lanes: int) -> int:
    return int.from_bytes(value.to_bytes(_LANE_BYTES, "little") * lanes, "little")
