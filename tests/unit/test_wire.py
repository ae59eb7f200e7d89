"""Formats and metadata names."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import wire
from relay.errors import ConfigurationError, MessageUndecodable
from relay.message import RelayMessage

FULL = RelayMessage(
    dedup_key="outbox_orders:7:0",
    payload=b'{"id":7,"note":"\\u00e4"}',
    key="7",
    subject="pgtrickle.orders.upsert",
    op="upsert",
    is_full_refresh=True,
    stream_table="orders",
    outbox_id=7,
    refresh_id="6f1f9b0a-5a4e-4d7e-9b7e-0a8a4a6d1c11",
    created_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    headers={"traceparent": "00-abc-def-01"},
)
SPELLINGS = (wire.TITLE, wire.HTTP, wire.LOWER, wire.FIELD)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_envelope_restores_every_field(spelling: wire.Spelling) -> None:
    encoded = wire.encoder("envelope", spelling)(FULL)

    assert wire.restore(encoded.body, encoded.headers, spelling) == FULL


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_payload_restores_all_but_the_subject_which_the_transport_carries(
    spelling: wire.Spelling,
) -> None:
    encoded = wire.encoder("payload", spelling)(FULL)

    assert encoded.body == FULL.payload
    restored = wire.restore(encoded.body, encoded.headers, spelling)
    assert restored == msgspec.structs.replace(FULL, subject="")


@pytest.mark.parametrize("format_", sorted(wire.FEW_HEADERS))
def test_formats_with_few_headers_say_nothing_else_in_them(format_: wire.Format) -> None:
    headers_of = wire.headers_encoder(format_, wire.TITLE)
    bare = RelayMessage(
        dedup_key=FULL.dedup_key,
        op=FULL.op,
        is_full_refresh=FULL.is_full_refresh,
        payload=b"null",
    )

    assert headers_of(bare) == headers_of(msgspec.structs.replace(FULL, headers={}))


def test_headers_as_pairs_are_those_of_the_message_whatever_came_before() -> None:
    bare = RelayMessage(dedup_key="2", payload=b"null")
    other = msgspec.structs.replace(FULL, stream_table="others", dedup_key="3", headers={})
    later = FULL.created_at and FULL.created_at.replace(microsecond=0)
    messages = [bare, FULL, other, msgspec.structs.replace(FULL, created_at=later, key="Ä"), bare]
    for format_ in wire.CONTENT_TYPES:
        headers_of = wire.headers_encoder(format_, wire.LOWER)
        pairs_of = wire.pairs_encoder(format_, wire.LOWER)
        for message in messages:
            alone = msgspec.structs.replace(message, headers={})
            expected = {name: text.encode() for name, text in headers_of(alone).items()}

            assert dict(pairs_of(message)) == expected
            assert len(pairs_of(message)) == len(expected)


@pytest.mark.parametrize(
    "body, is_one",
    [
        (b'{"a":1}', True),
        (' "ä" '.encode(), True),
        ("ä".encode("latin-1").join([b'"', b'"']), False),
        (b'"\xed\xa0\x80"', False),
        (b"", False),
        (b"{} {}", False),
        (b'{"a":', False),
    ],
)
def test_json_is_one_document_in_utf_8(body: bytes, is_one: bool) -> None:
    assert wire.is_json(body) is is_one


def test_a_cloud_event_restores_every_field_and_is_one() -> None:
    encoded = wire.encoder("cloudevents", wire.HTTP, namespace="shop")(FULL)

    event = msgspec.json.decode(encoded.body)
    assert event["specversion"] == "1.0"
    assert event["id"] == FULL.dedup_key
    assert event["source"] == "/shop/orders"
    assert event["type"] == "orders.upsert"
    assert wire.restore(encoded.body, encoded.headers, wire.HTTP) == FULL


@given(
    key=st.none() | st.text(max_size=50),
    headers=st.dictionaries(st.text("abc-", min_size=1, max_size=8), st.text(max_size=20)),
    payload=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner)
    ),
)
def test_any_message_survives_the_envelope(
    key: str | None, headers: dict[str, str], payload: object
) -> None:
    message = RelayMessage(
        dedup_key="d", key=key, headers=headers, payload=msgspec.json.encode(payload)
    )

    encoded = wire.encoder("envelope", wire.TITLE)(message)

    assert wire.restore(encoded.body, encoded.headers, wire.TITLE) == message


_ODD_ONES = [
    msgspec.structs.replace(FULL, payload=b'{"id":\n7}', is_json=True),
    msgspec.structs.replace(FULL, payload=b"1,\n2"),
    msgspec.structs.replace(FULL, payload=b"[1"),
    msgspec.structs.replace(FULL, payload=b"2]"),
    msgspec.structs.replace(FULL, payload=b"\xff"),
    msgspec.structs.replace(FULL, payload=b""),
    msgspec.structs.replace(FULL, dedup_key="\ud800", is_json=True),
    msgspec.structs.replace(FULL, headers={"a": "\ud800"}, is_json=True),
]


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
@given(odd_ones=st.lists(st.tuples(st.integers(0, 600), st.sampled_from(_ODD_ONES))))
@settings(max_examples=30)
def test_bodies_that_are_made_together_are_those_of_each_by_itself(
    format_: str, odd_ones: list[tuple[int, RelayMessage]]
) -> None:
    messages = [
        msgspec.structs.replace(FULL, dedup_key=f"orders:{number}:0", is_json=True)
        for number in range(600)
    ]
    for place, message in odd_ones:
        messages.insert(place, message)
    body_of = wire.body_encoder(format_, namespace="shop")

    bodies = wire.bodies_encoder(format_, namespace="shop")(messages)

    assert len(bodies) == len(messages)
    for message, body in zip(messages, bodies, strict=True):
        if isinstance(body, bytes):
            assert body == body_of(message)
        else:
            with pytest.raises(MessageUndecodable) as raised:
                body_of(message)
            assert str(raised.value) == str(body)


def test_header_names_compare_without_regard_to_case() -> None:
    encoded = wire.encoder("payload", wire.TITLE)(FULL)
    shouted = {name.upper(): value for name, value in encoded.headers.items()}

    restored = wire.restore(encoded.body, shouted, wire.TITLE)

    assert restored is not None
    assert restored.dedup_key == FULL.dedup_key


def test_what_only_looks_like_an_envelope_is_a_payload() -> None:
    body = wire.encoder("envelope", wire.TITLE)(FULL).body

    assert wire.restore(body, {}, wire.TITLE) is None


@pytest.mark.parametrize(
    "body,said",
    [
        (b"{}", "marked as an envelope"),
        (b"not json", "marked as an envelope"),
        (b"\xff\xfe", "marked as an envelope"),
        (b"[" * 20_000, "marked as an envelope"),
    ],
)
def test_a_broken_envelope_is_undecodable(body: bytes, said: str) -> None:
    with pytest.raises(MessageUndecodable, match=said):
        wire.restore(body, {wire.TITLE.format: "envelope"}, wire.TITLE)


def test_an_envelope_of_another_version_is_named() -> None:
    body = wire.encoder("envelope", wire.TITLE)(FULL).body.replace(b'{"v":1', b'{"v":9')

    with pytest.raises(MessageUndecodable, match="envelope version 9"):
        wire.restore(body, {wire.TITLE.format: "envelope"}, wire.TITLE)


@pytest.mark.parametrize(
    "headers,said",
    [
        ({"format": "payload"}, "Dedup-Key is missing"),
        ({"format": "payload", "dedup_key": "d", "outbox_id": "x"}, "malformed"),
        ({"format": "payload", "dedup_key": "d", "created_at": "x"}, "malformed"),
        ({"format": "parquet"}, "format marker says 'parquet'"),
        ({"format": "cloudevents"}, "marked as a CloudEvent"),
    ],
)
def test_wrong_metadata_is_undecodable(headers: dict[str, str], said: str) -> None:
    named = {getattr(wire.TITLE, field): value for field, value in headers.items()}

    with pytest.raises(MessageUndecodable, match=said):
        wire.restore(b"{}", named, wire.TITLE)


def test_a_value_that_does_not_fit_is_not_repeated() -> None:
    event = msgspec.json.encode(
        {"specversion": "1.0", "id": "1", "source": "s", "type": "t", "data": {}}
        | {"pgtrickleoutboxid": "4111 1111"}
    )
    own = {wire.TITLE.format: "payload", wire.TITLE.dedup_key: "d"}

    for body, headers in (
        (event, {wire.TITLE.format: "cloudevents"}),
        (b"{}", own | {wire.TITLE.outbox_id: "4111 1111"}),
        (b"{}", own | {wire.TITLE.created_at: "4111 1111"}),
    ):
        with pytest.raises(MessageUndecodable) as caught:
            wire.restore(body, headers, wire.TITLE)
        assert "4111" not in str(caught.value)


@pytest.mark.parametrize("format_", sorted(wire.CONTENT_TYPES))
def test_a_time_without_a_zone_is_undecodable(format_: wire.Format) -> None:
    timeless = msgspec.structs.replace(FULL, created_at=datetime(2026, 1, 2))  # noqa: DTZ001 - that
    encoded = wire.encoder(format_, wire.TITLE)(timeless)

    with pytest.raises(MessageUndecodable, match="zone"):
        wire.restore(encoded.body, encoded.headers, wire.TITLE)


def test_an_unknown_op_is_an_event() -> None:
    restored = wire.restore(
        b"{}",
        {wire.LOWER.format: "payload", wire.LOWER.dedup_key: "d", wire.LOWER.op: "merge"},
        wire.LOWER,
    )

    assert restored is not None
    assert restored.op == "event"


def test_an_unknown_format_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="unknown format 'avro'"):
        wire.encoder("avro", wire.TITLE)


def test_each_transport_spells_the_same_names_its_own_way() -> None:
    assert wire.TITLE.dedup_key == "Pgtrickle-Dedup-Key"
    assert wire.HTTP.full_refresh == "X-Pgtrickle-Full-Refresh"
    assert wire.LOWER.stream_table == "pgtrickle-stream-table"
    assert wire.FIELD.outbox_id == "pgt_outbox_id"
