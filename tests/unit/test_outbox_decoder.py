"""Payload version 1 in all its forms."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from relay.backends.outbox.decoder import PART_ROWS, Decoded, OutboxDecoder
from relay.backends.outbox.row import OutboxRow, OutboxRows
from relay.backends.outbox.split import array_elements, object_members

CREATED_AT = datetime(2026, 1, 2, tzinfo=UTC)
# Of the refresh id "r-1".
HISTORY = "d9c03ff9"
DEEP = b"[" * 10_000 + b"]" * 10_000


def decoder(
    *,
    key_columns: tuple[str, ...] = ("id",),
    namespace: str = "",
    collapse_updates: bool = False,
    snapshot_markers: bool = False,
) -> OutboxDecoder:
    return OutboxDecoder(
        outbox_table="outbox_orders",
        stream_table="orders",
        pipeline="own",
        key_columns=key_columns,
        namespace=namespace,
        collapse_updates=collapse_updates,
        snapshot_markers=snapshot_markers,
    )


def decode(
    payload: bytes | None,
    *,
    by: OutboxDecoder | None = None,
    headers: bytes | None = None,
    is_claim_check: bool = False,
    key_columns: tuple[str, ...] | None = None,
) -> Decoded:
    row = (7, "r-1", CREATED_AT, 1, 0, is_claim_check, payload, headers, key_columns)
    return decode_all([row], by=by)


def decode_all(rows: Sequence[OutboxRow], *, by: OutboxDecoder | None = None) -> Decoded:
    """As the source does: part by part, until one says that no more belongs into the batch."""
    decoded = Decoded()
    reader = by or decoder()
    for start in range(0, len(rows), PART_ROWS):
        if not reader.decode(OutboxRows.of(rows[start : start + PART_ROWS]), decoded):
            break
    return decoded


def shown(decoded: Decoded) -> list[tuple[str, str, str | None, bytes]]:
    return [
        (
            message.dedup_key.removeprefix("outbox_orders:7:").removesuffix(f":{HISTORY}"),
            message.op,
            message.key,
            message.payload,
        )
        for message in decoded.messages
    ]


def single_inserts(count: int) -> list[OutboxRow]:
    payload = b'{"v": 1, "deleted": [], "inserted": [{"id": %d}]}'
    return [
        (number, None, CREATED_AT, 1, 0, False, payload % number, None, None)
        for number in range(count)
    ]


@pytest.mark.parametrize("key_columns", [(), ("id",), ("id", "id2"), ('"',)])
@pytest.mark.parametrize("odd_one", [0, 249, 250, 599])
@pytest.mark.parametrize(
    "odd",
    [
        b'{"v": 1, "inserted": [{"id": 1}], "deleted": [{"id": 1}]}',
        b'{"v": 1, "inserted": [{"id": 1}, {"id": 2}]}',
        b'{"v": 1, "deleted": [], "inserted": [{"id": 1}, {"id": 2}]}',
        b'{"v": 1, "deleted": [], "inserted": [3]}',
        b'{"v": 1, "deleted": [], "inserted": [3, 4]}',
        b'{"v": 1, "deleted": [], "inserted": [], "inserted_1": [{"id": 1}]}',
        b'{"v": 1, "deleted": [], "inserted": [{"id": 1}], "inserted_1": [{"id": 1}]}',
        b'{"v": 1, "deleted": [], "inserted": [{"id": 1}], "inserted_1": []}',
        b'{"v": 1, "deleted": [], "inserted": []}',
        b'{"v": 1, "deleted": [], "inserted": [{"id": [4]}]}',
        b'{"v": 1, "deleted": [], "inserted": [{"id": "]}"}]}',
        b'{"v": 1, "deleted": [], "inserted": [{"id": %b}]}' % DEEP,
        b'{"v": 1, "inserted": [3]}',
        b'{"v": 1, "full_refresh": true, "inserted": [{"id": 4}]}',
        b'[{"id": 5}]',
        b'{"v": 2, "inserted": [{"id": 6}]}',
        b'{"v": 1, "inserted": [{"id": %b}]}' % DEEP,
        None,
    ],
)
def test_rows_that_are_decoded_together_come_out_as_each_by_itself(
    odd: bytes | None, odd_one: int, key_columns: tuple[str, ...]
) -> None:
    rows = single_inserts(600)
    rows[odd_one] = (odd_one, "r", CREATED_AT, 1, 0, False, odd, b'{"a": "b"}', None)
    one = decoder(key_columns=key_columns)

    together = decode_all(rows, by=one)

    alone = [decode_all([row], by=one) for row in rows]
    assert together.rows == 600
    assert together.messages == [message for one in alone for message in one.messages]
    assert [one.message for one in together.rejected] == [
        rejected.message for one in alone for rejected in one.rejected
    ]


@pytest.mark.parametrize("at", [0, 1, 250, 600])
def test_a_claim_check_ends_what_is_decoded_together(at: int) -> None:
    rows = single_inserts(700)
    rows[at] = (at, None, CREATED_AT, 1, 0, False, b'{"v": 1, "claim_check": true}', None, None)

    decoded = decode_all(rows)

    assert len(decoded.messages) == at
    assert decoded.rows == (at or 1)
    assert (decoded.claim_check is not None) == (at == 0)


def test_an_id_that_is_drawn_again_for_another_event_has_another_key() -> None:
    body = b'{"v": 1, "inserted": [{"id": 5}], "deleted": []}'
    rows = [(7, refresh_id, CREATED_AT, 1, 0, False, body, None, None) for refresh_id in "ab"]

    keys = {decode_all([row]).messages[0].dedup_key for row in rows}

    assert len(keys) == 2


def test_a_row_carries_what_the_outbox_row_says() -> None:
    (message,) = decode(
        b'{"v": 1, "inserted": [{"id": 5, "n": 1e400}], "deleted": []}',
        by=decoder(namespace="eu"),
        headers=b'{"traceparent": "00-1", "retries": 2, "none": null, "o": {"a": 1}}',
    ).messages

    assert message.dedup_key == f"eu:outbox_orders:7:0:{HISTORY}"
    assert (message.key, message.op, message.payload) == ("5", "insert", b'{"id": 5, "n": 1e400}')
    assert (message.stream_table, message.outbox_id, message.refresh_id) == ("orders", 7, "r-1")
    assert message.created_at == CREATED_AT
    assert message.headers == {"traceparent": "00-1", "retries": "2", "o": '{"a":1}'}


def test_deletes_go_out_first_but_are_numbered_last() -> None:
    decoded = decode(b'{"v":1,"inserted":[{"id":1},{"id":2}],"deleted":[{"id":1},{"id":3}]}')

    assert shown(decoded) == [
        ("2", "delete", "1", b'{"id":1}'),
        ("3", "delete", "3", b'{"id":3}'),
        ("0", "insert", "1", b'{"id":1}'),
        ("1", "insert", "2", b'{"id":2}'),
    ]


def test_a_delete_and_an_insert_of_one_key_collapse_where_that_is_asked_for() -> None:
    decoded = decode(
        b'{"v":1,"inserted":[{"id":1},{"id":2}],"deleted":[{"id":1},{"id":3}]}',
        by=decoder(collapse_updates=True),
    )

    assert [entry[:3] for entry in shown(decoded)] == [
        ("3", "delete", "3"),
        ("0", "update", "1"),
        ("1", "insert", "2"),
    ]


@pytest.mark.shows("pipeline:snapshot_markers")
def test_rows_of_a_full_refresh_are_upserts_framed_by_markers_where_asked_for() -> None:
    body = b'{"v":1,"full_refresh":true,"inserted":[{"id":1}],"deleted":[]}'

    plain, framed = decode(body), decode(body, by=decoder(snapshot_markers=True))

    assert [entry[:2] for entry in shown(plain)] == [("0", "upsert")]
    assert [entry[:2] for entry in shown(framed)] == [
        ("begin", "snapshot_begin"),
        ("0", "upsert"),
        ("end", "snapshot_end"),
    ]
    assert all(message.is_full_refresh for message in framed.messages)


def test_a_full_refresh_without_rows_is_one_truncate() -> None:
    decoded = decode(
        b'{"v":1,"full_refresh":true,"inserted":[],"deleted":[]}', by=decoder(snapshot_markers=True)
    )

    assert shown(decoded) == [("0", "truncate", None, b"null")]


def test_a_bare_array_is_read_as_inserted() -> None:
    assert shown(decode(b'[{"id": 1}]')) == [("0", "insert", "1", b'{"id": 1}')]


@pytest.mark.parametrize(
    "payload, said",
    [
        (b'{"v":2,"inserted":[]}', "version 2 is not"),
        (b'{"v":true}', "version True is not"),
        (b'{"v":"card 4111"}', "version (v) is not a number"),
        (b'{"inserted":[]}', "does not say its version"),
        (b'{"v":1,"inserted":{"id":1}}', "not as it should be"),
        (b'"text"', "not as it should be"),
        (None, "has no payload"),
    ],
)
def test_a_payload_that_cannot_be_read_costs_its_outbox_row_and_no_other(
    payload: bytes | None, said: str
) -> None:
    good = (8, None, None, 1, 0, False, b'{"v":1,"inserted":[{"id":1}]}', None, None)

    decoded = decode_all([(7, None, None, 1, 0, False, payload, None, None), good])

    (rejected,) = decoded.rejected
    assert said in str(rejected.error)
    assert rejected.message.dedup_key == "outbox_orders:7:0"
    assert rejected.message.payload == (payload or b"null")
    assert [message.outbox_id for message in decoded.messages] == [8]
    assert decoded.rows == 2


@pytest.mark.parametrize(
    "columns, row, key",
    [
        (("id",), b'{"id": "a\\"b"}', 'a"b'),
        (("id",), b'{"id": 12345678901234567890123}', "12345678901234567890123"),
        (("id",), b'{"id": null}', None),
        (("id",), b'{"other": 1}', None),
        (("id",), b"[1, 2]", None),
        (("a", "b"), b'{"b": "x", "c": 0, "a": 1}', '[1,"x"]'),
        (("a", "b"), b'{"a": 1}', None),
        (('we"ird', "n"), b'{"we\\"ird": 1, "n": 2}', "[1,2]"),
        (("ünï {c}",), '{"ünï {c}": 1}'.encode(), "1"),
        ((), b'{"id": 1}', None),
    ],
)
def test_the_key_is_the_text_of_its_columns(
    columns: tuple[str, ...], row: bytes, key: str | None
) -> None:
    decoded = decode(b'{"v":1,"inserted":[' + row + b"]}", by=decoder(key_columns=columns))

    assert shown(decoded) == [("0", "insert", key, row)]


def test_a_row_that_nests_too_deep_costs_only_itself() -> None:
    decoded = decode(b'{"v":1,"inserted":[{"id":1},{"d":' + DEEP + b'},{"id":3}],"deleted":[]}')

    assert [message.key for message in decoded.messages] == ["1", "3"]
    assert [message.dedup_key.split(":")[2] for message in decoded.messages] == ["0", "2"]
    (rejected,) = decoded.rejected
    assert rejected.message.dedup_key == f"outbox_orders:7:1:{HISTORY}"
    assert rejected.message.payload == b'{"d":' + DEEP + b"}"


def test_a_claim_check_is_decoded_alone() -> None:
    inline = (1, None, None, 1, 0, False, b'{"v":1,"inserted":[{"id":1}]}', None, None)
    claim = (
        2,
        None,
        None,
        5,
        1,
        True,
        b'{"v":1,"claim_check":true,"full_refresh":true}',
        None,
        None,
    )

    before, alone = decode_all([inline, claim, inline]), decode_all([claim, inline])

    assert (before.rows, len(before.messages), before.claim_check) == (1, 1, None)
    assert (alone.rows, alone.messages) == (1, [])
    assert alone.claim_check is not None
    assert (alone.claim_check.inserted_count, alone.claim_check.deleted_count) == (5, 1)
    assert alone.claim_check.event.is_full_refresh


def test_a_document_is_taken_apart_without_recursion() -> None:
    assert array_elements(b' [1, "a,]\\"", {"b": [2, 3]} , []] ') == [
        b"1",
        b'"a,]\\""',
        b'{"b": [2, 3]}',
        b"[]",
    ]
    assert array_elements(b"[ ]") == []
    assert object_members(b'{"a:": {"b": 1}, "c" : [1,2]}') == {"a:": b'{"b": 1}', "c": b"[1,2]"}


def test_a_row_that_names_other_key_columns_is_read_by_them_unless_the_pipeline_says_its_own() -> (
    None
):
    renamed = b'{"v": 1, "deleted": [], "inserted": [{"ident": 3, "id": 9}]}'
    own = OutboxDecoder(
        outbox_table="outbox_orders",
        stream_table="orders",
        key_columns=("id",),
        follows_renames=False,
    )

    assert [key for *_, key, _ in shown(decode(renamed, key_columns=("ident",)))] == ["3"]
    assert [key for *_, key, _ in shown(decode(renamed))] == ["9"]
    assert [key for *_, key, _ in shown(decode(renamed, key_columns=("ident",), by=own))] == ["9"]


def test_the_row_id_of_a_stream_table_is_its_key_and_stays_out_of_the_event() -> None:
    payload = b'{"v": 1, "deleted": [], "inserted": [{"n": "a", "__pgt_row_id": 17}]}'

    assert shown(decode(payload, by=decoder(key_columns=("__pgt_row_id",)))) == [
        ("0", "insert", "17", b'{"n":"a"}')
    ]


def test_rows_of_a_backfill_are_for_all_pipelines_or_for_the_one_that_is_named() -> None:
    payload = b'{"v": 1, "backfill": %s, "inserted": [{"id": 1}], "full_refresh": true}'
    claim_check = b'{"v": 1, "backfill": "other", "full_refresh": true, "claim_check": true}'
    by = decoder(snapshot_markers=True)
    for addressee in (b"true", b'"own"'):
        decoded = decode(payload % addressee, by=by)
        # It is a part of the table: no marker says that what is missing is gone.
        assert [message.op for message in decoded.messages] == ["upsert"]
        assert decoded.messages[0].is_full_refresh
    for skipped in (payload % b'"other"', claim_check):
        decoded = decode(skipped, by=by, is_claim_check=skipped is claim_check)
        assert (decoded.rows, decoded.messages, decoded.rejected) == (1, [], [])
        assert decoded.claim_check is None
