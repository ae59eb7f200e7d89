"""Which reader of a pipeline has which message."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import msgspec

from relay.backends.outbox.decoder import Decoded, OutboxDecoder
from relay.backends.outbox.row import OutboxRow, OutboxRows
from relay.catalog import PipelineRow, readers_of
from relay.contracts import Rejected
from relay.message import RelayMessage
from relay.partition import WHOLE, Partition, key_hash, pipeline_of

KEYS = ["42", "a/b", "näme", "[1,null]", ""]


def test_the_hash_of_a_key_is_the_one_that_was_promised() -> None:
    # As `select crc32(convert_to(key, 'UTF8'))` gives it.
    hashes = [841265288, 133447708, 3072461400, 4104714614, 0]
    assert [key_hash(key) for key in KEYS] == hashes
    assert key_hash(None) == 0
    assert isinstance(key_hash("\ud800"), int)


def test_keys_are_dealt_evenly() -> None:
    for of in (2, 3, 4, 7, 64):
        dealt = [key_hash(str(number)) % of for number in range(64_000)]
        counts = [dealt.count(rest) for rest in range(of)]
        assert max(counts) < 1.2 * 64_000 / of, (of, counts)


def test_a_pipeline_with_partitions_is_run_as_its_readers() -> None:
    row = PipelineRow(
        name="p", direction="forward", enabled=True, config={"partitions": 3, "source": {}}
    )
    one = msgspec.structs.replace(row, name="q", config={})

    readers = readers_of([row, one])

    assert [reader.name for reader in readers] == ["p/1", "p/2", "p/3", "q"]
    assert [reader.pipeline for reader in readers] == ["p", "p", "p", "q"]
    assert readers[1].partition == Partition(2, 3)
    assert readers[1].partitioning == {"partitions": 3, "key_columns": None}
    assert (readers[3].partition, readers[3].partitioning) == (WHOLE, {})
    assert pipeline_of("a/3b") == "a/3b"


def rows() -> list[OutboxRow]:
    """Every way through the decoder: single inserts, several rows, no key, nothing to be read."""
    single = b'{"v": 1, "deleted": [], "inserted": [{"id": %d, "n": 1}]}'
    payloads = [single % number for number in range(300)]
    payloads += [
        b'{"v":1,"inserted":[{"id":1},{"id":2},{"id":"x"}],"deleted":[{"id":2},{"id":9}]}',
        b'{"v":1,"inserted":[{"n":1},{"id":3},7,%s],"deleted":[]}' % (b"[" * 9_000 + b"]" * 9_000),
        b'{"v":1,"full_refresh":true,"inserted":[{"id":5},{"id":6}]}',
        b'{"v":1,"full_refresh":true}',
        b'{"v":99}',
    ]
    created_at = datetime(2026, 1, 2, tzinfo=UTC)
    return [
        (id_, "r", created_at, 1, 0, False, payload, None, None)
        for id_, payload in enumerate(payloads, 1)
    ]


def decoded_by(partition: Partition, *, collapses: bool) -> Decoded:
    decoder = OutboxDecoder(
        outbox_table="o",
        stream_table="s",
        key_columns=("id",),
        collapse_updates=collapses,
        partition=partition,
    )
    decoded = Decoded()
    # The commonest rows take a way of their own.
    for part in (rows()[:250], rows()[250:300], rows()[300:]):
        assert decoder.decode(OutboxRows.of(part), decoded)
    return decoded


def test_each_message_is_one_reader_s_and_each_key_s_are_in_order_there() -> None:
    for collapses, of in itertools.product((False, True), (2, 5)):
        whole = decoded_by(WHOLE, collapses=collapses)
        readers = [decoded_by(Partition(n, of), collapses=collapses) for n in range(1, of + 1)]

        assert all(reader.rows == whole.rows for reader in readers)
        for number, reader in enumerate(readers):
            expected = [m for m in whole.messages if key_hash(m.key) % of == number]
            assert list(map(_shown, reader.messages)) == list(map(_shown, expected))
        assert [r.rejected for r in readers[1:]] == [[]] * (of - 1)
        assert list(map(_shown, readers[0].rejected)) == list(map(_shown, whole.rejected))
        assert sum(len(reader.messages) for reader in readers) == len(whole.messages) > 300


def _shown(one: RelayMessage | Rejected) -> object:
    message = one.message if isinstance(one, Rejected) else one
    return (message.dedup_key, message.op, message.key, bytes(message.payload))
