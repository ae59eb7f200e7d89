"""Several readers of one pipeline, in order: whose a key is, and how they are called.

A pipeline with ``partitions: N`` has N readers, ``orders-to-kafka/1`` to ``orders-to-kafka/N``.
Each is run, owned and shown like a pipeline of its own, and publishes the messages of its keys. No
pipeline has a name of this form. Why no key is lost or overtaken when N changes:
`docs/decisions/0006-partitions.md`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from zlib import crc32

import msgspec

_NUMBERED = re.compile(r"/[0-9]+\Z")
# As `relay_partitioning` reads it, which has to do with rows that were written by hand.
_SEVERAL = re.compile(r"[2-9]|[1-5][0-9]|6[0-4]")


class Partition(msgspec.Struct, frozen=True):
    """The keys of one reader: the ``number``-th, counted from 1, of ``of``."""

    number: int = 1
    of: int = 1

    def has(self, keys: Sequence[str | None]) -> list[bool]:
        """Whether each of these keys is one of its own."""
        of, rest = self.of, self.number - 1
        return [key_hash(key) % of == rest for key in keys]


WHOLE = Partition()
# Of a pipeline with partitions.
KEYLESS = "has several readers, and its messages have no key: all of them go to the first reader"
KEYLESS_REMEDY = "name key_columns, or leave partitions out"


def key_hash(key: str | None) -> int:
    """CRC-32 (as in zlib) of the key's UTF-8; 0 without a key, so that it goes to the first reader.

    Stored with dead letters and promised to users: it never changes.
    """
    return 0 if key is None else crc32(key.encode("utf-8", "surrogatepass"))


def partitions_of(config: Mapping[str, object]) -> int:
    """How many readers a pipeline has; 1 where what its row says of it is no such number."""
    source = config.get("source")
    shares = isinstance(source, Mapping) and source.get("consumer_group") is not None
    several = None if shares else _SEVERAL.fullmatch(str(config.get("partitions")))
    return 1 if several is None else int(several[0])


def pipeline_of(reader: str) -> str:
    """The pipeline whose reader this is; the name itself where it is the only one."""
    return _NUMBERED.sub("", reader)
