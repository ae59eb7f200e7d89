"""CloudEvents of others: recognised in every mode, and left alone where they only look so."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.cloudevent import identity, unwrapped
from relay.mapping import compile_reverse
from relay.message import RelayMessage, text_of

EVENT = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "paid"}
STRUCTURED = {"Content-Type": "application/cloudevents+json; charset=utf-8"}


def message(payload: object, headers: Mapping[str, str] | None = None) -> RelayMessage:
    body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    return RelayMessage(dedup_key="as it came", payload=body, subject="t", headers=headers or {})


@pytest.mark.parametrize("headers", [STRUCTURED, {}, {"x": "y"}])
def test_a_structured_event_gives_identity_type_data_and_attributes(
    headers: Mapping[str, str],
) -> None:
    event = unwrapped(
        message({**EVENT, "time": "2026-01-01T00:00:00Z", "n": 3, "data": {"a": 1}}, headers)
    )

    assert event.dedup_key == '["/shop","7"]'
    assert (event.subject, event.payload) == ("paid", b'{"a":1}')
    assert event.headers["ce-time"] == "2026-01-01T00:00:00Z"
    assert (event.headers["ce-n"], event.headers["ce-id"]) == ("3", "7")
    assert event.headers.get("x") == headers.get("x")


@pytest.mark.parametrize(
    "prefix,written,read",
    [
        ("ce-", "a%20b%22%E2%82%AC", 'a b"€'),
        ("Ce-", '"a \\"b\\""', 'a "b"'),
        ("ce_", "a%20b", "a%20b"),
        ("cloudEvents:", "a%20b", "a%20b"),
        ("cloudEvents_", "a b", "a b"),
    ],
)
def test_a_binary_event_is_in_the_headers_of_its_binding(
    prefix: str, written: str, read: str
) -> None:
    headers = {f"{prefix}{name}": text for name, text in EVENT.items()}
    body = b'{"specversion":"1.0","id":"inner","source":"s","type":"t"}'

    event = unwrapped(
        message(body, {**headers, f"{prefix}note": written, "content-type": "application/json"})
    )

    assert (event.dedup_key, event.subject, event.payload) == ('["/shop","7"]', "paid", body)
    assert event.headers["ce-note"] == read
    assert event.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "event,payload",
    [
        ({}, b"null"),
        ({"data": "text"}, b'"text"'),
        ({"data": None}, b"null"),
        ({"data_base64": "eyJhIjoxfQ=="}, b'{"a":1}'),
        ({"data_base64": "/w=="}, b'"/w=="'),
    ],
)
def test_the_payload_is_the_data_however_it_is_written(
    event: Mapping[str, object], payload: bytes
) -> None:
    assert unwrapped(message({**EVENT, **event}, STRUCTURED)).payload == payload


@pytest.mark.parametrize(
    "body",
    [
        *({name: text for name, text in EVENT.items() if name != left_out} for left_out in EVENT),
        {**EVENT, "id": ""},
        {**EVENT, "specversion": "2.0"},
        {**EVENT, "data_base64": "?"},
        {**EVENT, "data_base64": 7},
        [EVENT],
        b'{"specversion":"1.0"',
        b'{"specversion":"1.0","id":"\xff","source":"s","type":"t"}',
    ],
)
def test_what_only_looks_like_an_event_is_a_payload(body: object) -> None:
    for headers in (STRUCTURED, {}):
        looks = message(body, headers)
        assert unwrapped(looks) is looks


def test_a_body_that_another_content_type_describes_is_a_payload() -> None:
    looks = message(EVENT, {"content-type": "application/json"})

    assert unwrapped(looks) is looks


@pytest.mark.parametrize("left_out", EVENT)
def test_headers_that_lack_one_of_the_attributes_make_no_event(left_out: str) -> None:
    looks = message(b"{}", {f"ce-{name}": text for name, text in EVENT.items() if name != left_out})

    assert unwrapped(looks) is looks


def test_what_came_out_of_an_outbox_is_never_taken_apart() -> None:
    ours = msgspec.structs.replace(message(EVENT, STRUCTURED), outbox_id=1)

    assert unwrapped(ours) is ours


def test_explicit_rules_win_and_look_at_the_message_before_the_event() -> None:
    came = message({**EVENT, "data": {"id": "inner", "order": 3}}, STRUCTURED)

    def reshaped(dedup_key_from: str, event_type_from: str | None = None) -> tuple[str, str]:
        made = compile_reverse(dedup_key_from, event_type_from)(came)
        return made.dedup_key, made.subject

    assert reshaped("payload:id") == ("7", "paid")
    assert reshaped("payload:data.id", "subject") == ("inner", "t")
    assert reshaped("payload:order") == ("3", "paid")
    assert reshaped("header:ce-source", "constant:x") == ("/shop", "x")
    assert compile_reverse("payload:id", None)(came).payload == b'{"id":"inner","order":3}'


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_no_two_events_have_one_identity(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (identity(*one) == identity(*other)) == (one == other)


_BYTES = st.lists(st.sampled_from([b"\\", b"x", b"ff", b"5c", b"\xff", "Ä".encode()])).map(b"".join)


@given(_BYTES | st.binary(), _BYTES | st.binary())
def test_bytes_that_are_not_utf_8_never_fold_together(one: bytes, other: bytes) -> None:
    assert (text_of(one) == text_of(other)) == (one == other)


def test_text_is_kept_as_it_is() -> None:
    assert text_of("C:\\x Ä \\xZZ".encode()) == "C:\\x Ä \\xZZ"
