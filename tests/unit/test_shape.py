"""Choosing and shaping: single messages, rows of an outbox, and what is refused."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from relay.backends.outbox.decoder import Decoded, OutboxDecoder
from relay.backends.outbox.row import OutboxRows
from relay.errors import ConfigurationError, MessageUndecodable
from relay.events import Direction
from relay.message import Op, RelayMessage
from relay.pipeline_config import parse_config
from relay.secrets import MASK, masked
from relay.shape import REDACTED, Shape, shape_of

ROW = {"id": 7, "status": "paid", "email": "ann@example.org", "phone": "+43 664 1234567"}


def shape(
    direction: Direction = "forward",
    *,
    templates: Mapping[str, Sequence[str]] | None = None,
    **keys: object,
) -> Shape:
    sides = {
        "forward": {"source": {"outbox": "orders"}, "sink": {"type": "stdout"}},
        "reverse": {"source": {"type": "stdin"}, "sink": {"type": "pg-inbox", "inbox": "i"}},
    }
    types = {
        "forward": {"source_type": "outbox", "sink_type": "stdout"},
        "reverse": {"source_type": "stdin", "sink_type": "pg-inbox"},
    }
    config = parse_config(direction, {**sides[direction], **types[direction], **keys})
    made = shape_of(
        config,
        direction,
        templates=templates or {},
        resolve=lambda value: "pepper" if value == "${env:RELAY_PEPPER}" else value,
        subject_of=lambda message: f"orders.{json.loads(message.payload).get('state')}",
    )
    assert made is not None
    return made


def message(payload: object = ROW, op: Op = "insert", **fields: Any) -> RelayMessage:
    body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    return RelayMessage(dedup_key="d", payload=body, op=op, key="7", **fields)


def sent(by: Shape, payload: object = ROW, op: Op = "insert") -> object:
    out = by.of(message(payload, op))
    return None if out is None else json.loads(out.payload)


def test_a_pipeline_without_these_keys_has_no_shape() -> None:
    config = parse_config(
        "forward",
        {
            "source_type": "outbox",
            "source": {"outbox": "orders"},
            "sink_type": "stdout",
            "sink": {"type": "stdout"},
        },
    )

    assert shape_of(config, "forward", templates={}, resolve=lambda value: value) is None


def test_ops_choose_and_the_rows_of_a_snapshot_go_along_with_inserts() -> None:
    inserts, deletes = shape(ops=["insert"]), shape(ops=["delete"])

    assert [sent(inserts, op=op) is not None for op in ("insert", "upsert", "delete")] == [
        True, True, False,
    ]  # fmt: skip
    assert [sent(deletes, op=op) is not None for op in ("insert", "upsert", "delete")] == [
        False, False, True,
    ]  # fmt: skip
    without_rows: list[Op] = ["truncate", "snapshot_begin", "snapshot_end"]
    assert [inserts.of(message(None, op)) is not None for op in without_rows] == [False, True, True]


def test_columns_are_chosen_masked_and_renamed_by_their_own_names() -> None:
    digest = hmac.new(b"pepper", b"ann@example.org", hashlib.sha256).hexdigest()
    mask = {"email": {"hash": "${env:RELAY_PEPPER}"}, "phone": {"keep_last": 4}, "note": "redact"}
    row = {**ROW, "note": "private"}

    assert sent(shape(select=["status", "id", "absent"])) == {"status": "paid", "id": 7}
    assert sent(shape(exclude=["email", "absent"], rename={"status": "state"})) == {
        "id": 7, "state": "paid", "phone": ROW["phone"],
    }  # fmt: skip
    assert sent(shape(mask=mask), row) == {
        "id": 7, "status": "paid", "email": digest, "phone": f"{REDACTED}4567", "note": REDACTED,
    }  # fmt: skip
    assert sent(shape(select=["id"]), {"id": 1, "pgtrickle_omitted": {"geo": "22P02"}}) == {
        "id": 1, "pgtrickle_omitted": {"geo": "22P02"},
    }  # fmt: skip


def test_what_a_mask_is_given_is_never_shown() -> None:
    masked = shape(mask={"a": {"keep_last": 4}, "b": "redact", "c": {"hash": "k"}})

    for value, end in [
        ("12345", "2345"),
        ("1234", ""),
        (123456, "3456"),
        ({"x": 1}, ""),
        ([1], ""),
    ]:
        told = sent(masked, {"a": value, "b": value, "c": value})
        assert isinstance(told, dict)
        assert (told["a"], told["b"], len(told["c"])) == (f"{REDACTED}{end}", REDACTED, 64)
    assert sent(masked, {"a": None, "b": None, "c": None}) == {"a": None, "b": None, "c": None}


def test_of_two_members_of_one_name_none_slips_through() -> None:
    twice = b'{"id": 1, "email": "a", "\\u0065mail": "b"}'

    assert sent(shape(exclude=["email"]), twice) == {"id": 1}
    assert sent(shape(mask={"email": "redact"}), twice) == {"id": 1, "email": REDACTED}


def test_values_that_nobody_looks_at_stay_as_they_are_spelled() -> None:
    spelled = b'{"id":1,"big":123456789012345678901234567890,"exact":1.10,"email":"x"}'
    out = shape(exclude=["email"]).of(message(spelled))

    assert out is not None
    assert out.payload == spelled.replace(b',"email":"x"', b"")


def test_what_is_no_object_can_not_be_shaped_and_is_refused() -> None:
    for payload in (
        b"[1]",
        b"7",
        b"null",
        b"no json",
        b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    ):
        for keys in ({"select": ["a"]}, {"exclude": ["a"]}, {"mask": {"a": "redact"}}):
            with pytest.raises(MessageUndecodable):
                shape("reverse", **keys).of(message(payload))
    with pytest.raises(MessageUndecodable, match="two columns"):
        shape(rename={"status": "id"}).of(message())


def test_a_payload_under_an_op_without_a_row_is_shaped_all_the_same() -> None:
    """A sender of a reverse pipeline chooses the op."""
    assert sent(shape("reverse", exclude=["email"]), op="truncate") == {
        name: value for name, value in ROW.items() if name != "email"
    }


def test_where_may_ask_for_the_subject_with_which_a_message_would_go_out() -> None:
    by_subject = shape(where='subject == "orders.paid"', rename={"status": "state"})

    assert sent(by_subject) is not None
    assert sent(by_subject, {**ROW, "status": "open"}) is None


@pytest.mark.parametrize(
    "keys,reason",
    [
        ({"exclude": ["id"], "key_columns": ["id"]}, "key_columns needs the column id"),
        ({"mask": {"id": "redact"}, "key_columns": ["id"]}, "which mask changes"),
        ({"select": ["email"], "key_columns": ["id"]}, "which select does not list"),
        ({"exclude": ["email"]}, "subject_template needs the column email, which exclude"),
        ({"rename": {"email": "mail"}}, "which rename calls mail"),
        ({"exclude": ["a"], "mask": {"a": "redact"}}, "exclude and mask both name a"),
        ({"rename": {"a": "x", "b": "x"}}, "two columns one name"),
        ({"select": ["a", "email"], "rename": {"a": "email"}}, "two columns one name"),
        ({"select": ["a"], "exclude": ["b"]}, "both select and exclude"),
        ({"ops": ["update"]}, "needs collapse_updates"),
        ({"ops": ["merge"]}, "invalid enum value 'merge'"),
        ({"mask": {"a": {"hash": "x", "keep_last": 1}}}, "either hash or keep_last"),
        ({"mask": {"a": {"keep_last": 0}}}, "from 1 to 1000"),
        ({"mask": {"a": {"hash": ""}}}, "mask.a.hash is empty"),
        ({"where": "payload.a >"}, "does not compile"),
    ],
)
def test_a_shape_that_can_not_be_right_is_refused_with_the_reason(
    keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        shape(templates={"subject_template": ["{{payload.x}}.{payload.email}"]}, **keys)


def test_what_a_rule_of_a_reverse_pipeline_reads_has_to_be_there() -> None:
    for keys, reason in [
        ({"dedup_key_from": "payload:email"}, "dedup_key_from needs the column email"),
        ({"event_type_from": "payload:email.kind"}, "event_type_from needs the column email"),
    ]:
        for hidden in ({"exclude": ["email"]}, {"mask": {"email": "redact"}}):
            with pytest.raises(ConfigurationError, match=reason):
                shape("reverse", **keys, **hidden)
    columns = {"columns": {"aggregate_id": "payload:email"}}
    with pytest.raises(ConfigurationError, match=r"columns.aggregate_id needs the column email"):
        shape("reverse", **columns, exclude=["email"])
    assert shape("reverse", **columns, mask={"email": "redact"})


def test_a_secret_of_a_mask_is_not_shown_with_the_settings() -> None:
    shown = masked({"mask": {"e.mail": {"hash": "pepper"}, "a": {"keep_last": 4}}})

    assert shown == {"mask": {"e.mail": {"hash": MASK}, "a": {"keep_last": 4}}}


# Rows of an outbox


def decoded(by: Shape, *payloads: object, collapse_updates: bool = False) -> Decoded:
    decoder = OutboxDecoder(
        outbox_table="outbox_orders",
        stream_table="orders",
        key_columns=("id",),
        collapse_updates=collapse_updates,
        snapshot_markers=True,
        shape=by,
    )
    rows = [
        (number, "r", None, 1, 0, False, msgspec.json.encode(payload), None, None)
        for number, payload in enumerate(payloads, 1)
    ]
    found = Decoded()
    assert decoder.decode(OutboxRows.of(rows), found)
    return found


def told(found: Decoded) -> list[tuple[str, object]]:
    return [(one.op, json.loads(one.payload)) for one in found.messages]


def test_what_a_filter_drops_is_counted_and_what_it_can_not_judge_is_set_aside_as_it_came() -> None:
    found = decoded(
        shape(where="payload.total > 10", exclude=["email"]),
        {"v": 1, "inserted": [{"id": 1, "total": 11, "email": "a"}, {"id": 2, "total": 9}]},
        {"v": 1, "inserted": [{"id": 3, "email": "a"}], "deleted": [{"id": 4, "total": 99}]},
    )

    assert told(found) == [("insert", {"id": 1, "total": 11}), ("delete", {"id": 4, "total": 99})]
    assert found.filtered == 1
    (rejected,) = found.rejected
    assert json.loads(rejected.message.payload) == {"id": 3, "email": "a"}


def test_an_update_is_put_together_of_what_is_left_of_its_halves() -> None:
    """So a row that comes to fulfil a condition is an insert, and one that ceases to a delete."""
    where = 'payload.status == "paid"'

    def update(before: str, after: str) -> dict[str, object]:
        rows = [{"id": 1, "status": status} for status in (before, after)]
        return {"v": 1, "deleted": rows[:1], "inserted": rows[1:]}

    updates = [
        update(before, after) for before in ("paid", "open") for after in ("paid", "open")
    ]  # fmt: skip
    found = decoded(shape(where=where), *updates, collapse_updates=True)
    assert [op for op, _ in told(found)] == ["update", "delete", "insert"]
    assert found.filtered == 4

    only = decoded(
        shape(ops=["update"], collapse_updates=True), *updates[:1],
        {"v": 1, "inserted": [{"id": 2}]}, {"v": 1, "deleted": [{"id": 2}]}, collapse_updates=True,
    )  # fmt: skip
    assert [op for op, _ in told(only)] == ["update"]
    assert only.filtered == 2

    halves = decoded(shape(ops=["insert"]), *updates[:1], collapse_updates=True)
    assert [op for op, _ in told(halves)] == ["insert"]


def test_a_truncation_and_the_markers_of_a_snapshot_pass_conditions() -> None:
    found = decoded(
        shape(where="payload.id == 1", select=["id"]),
        {"v": 1, "full_refresh": True, "inserted": []},
        {"v": 1, "full_refresh": True, "inserted": [{"id": 1, "a": 1}, {"id": 2}]},
    )

    assert told(found) == [
        ("truncate", None),
        ("snapshot_begin", None),
        ("upsert", {"id": 1}),
        ("snapshot_end", None),
    ]


def test_an_outbox_row_that_was_not_decoded_does_not_go_out_unshaped() -> None:
    """As a dead letter it holds all rows of the statement, which no column names reach."""
    with pytest.raises(MessageUndecodable):
        shape(exclude=["email"]).of(message({"v": 2, "inserted": [ROW]}, op="event"))
