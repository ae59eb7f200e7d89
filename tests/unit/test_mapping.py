"""The reverse mapping rules: where an inbox field comes from."""

from __future__ import annotations

import hashlib

import pytest

from relay.errors import ConfigurationError, MessageUndecodable
from relay.mapping import compile_column, compile_document, compile_reverse
from relay.message import RelayMessage

MESSAGE = RelayMessage(
    dedup_key="theirs:1",
    payload='{"id": 7, "data": {"name": "Ä\\n", "ok": true, "none": null, "tags": ["a"]}}'.encode(),
    key="entity-7",
    subject="orders.created",
    headers={"X-Request-Id": "r-1", "empty": ""},
)


@pytest.mark.parametrize(
    "rule,expected",
    [
        ("header:X-Request-Id", "r-1"),
        ("header:x-request-id", "r-1"),
        ("payload:id", "7"),
        ("payload:data.name", "Ä\n"),
        ("payload:data.ok", "true"),
        ("payload:data.tags", '["a"]'),
        ("subject", "orders.created"),
        ("constant:a:b", "a:b"),
        ("constant:", ""),
        ("record_key", "entity-7"),
        ("body_digest", hashlib.sha256(MESSAGE.payload).hexdigest()),
    ],
)
def test_each_form_reads_its_text(rule: str, expected: str) -> None:
    assert compile_column(rule)(MESSAGE) == expected


@pytest.mark.parametrize(
    "rule", ["header:absent", "payload:absent", "payload:id.deeper", "payload:data.none"]
)
def test_what_is_not_there_leaves_a_column_empty(rule: str) -> None:
    assert compile_column(rule)(MESSAGE) is None


@pytest.mark.parametrize(
    "rule",
    ["header:absent", "header:empty", "payload:absent", "payload:data.none", "payload:data.tags"],
)
def test_a_dedup_key_that_is_missing_empty_or_not_single_costs_the_message(rule: str) -> None:
    with pytest.raises(MessageUndecodable, match=r"dedup_key_from|single value"):
        compile_reverse(rule, None)(MESSAGE)


def test_a_record_key_that_the_message_lacks_costs_the_message() -> None:
    keyless = RelayMessage(dedup_key="1", payload=b"{}")

    with pytest.raises(MessageUndecodable, match="record_key"):
        compile_reverse("record_key", None)(keyless)


@pytest.mark.parametrize(
    "body",
    [b"", b"hello", b'{"id": "\xff"}', b'{"id": "\\ud800"}', b'{"id":' + b"[" * 10_000],
    ids=["empty", "no JSON", "no UTF-8", "a lone surrogate", "deep"],
)
def test_a_payload_that_cannot_be_looked_into_costs_the_message(body: bytes) -> None:
    with pytest.raises(MessageUndecodable):
        compile_reverse("payload:id", None)(RelayMessage(dedup_key="1", payload=body))


def test_the_rules_set_the_dedup_key_and_the_event_type_and_nothing_else() -> None:
    mapped = compile_reverse("payload:id", "header:x-request-id")(MESSAGE)

    assert (mapped.dedup_key, mapped.subject) == ("7", "r-1")
    assert (mapped.payload, mapped.key, mapped.headers) == (
        MESSAGE.payload,
        MESSAGE.key,
        MESSAGE.headers,
    )


def test_one_rule_alone_leaves_the_other_field_as_it_was() -> None:
    assert compile_reverse(None, "constant:order")(MESSAGE).dedup_key == "theirs:1"
    assert compile_reverse("payload:id", None)(MESSAGE).subject == "orders.created"


def test_without_rules_the_message_passes_as_it_is() -> None:
    assert compile_reverse(None, None)(MESSAGE) is MESSAGE


@pytest.mark.parametrize(
    "rule",
    ["", "headers:a", "header:", "payload:", "payload", "payload:a..b", "subject:x", "constant"],
)
def test_a_rule_that_is_none_names_the_known_forms_and_the_key(rule: str) -> None:
    with pytest.raises(ConfigurationError, match=r"event_type_from.*payload:a\.b\.c"):
        compile_reverse(None, rule)


def test_a_document_is_the_payload_or_a_part_of_it_as_it_was_spelled() -> None:
    assert compile_document("payload")(MESSAGE) is MESSAGE.payload
    assert compile_document("payload:data.tags")(MESSAGE) == b'["a"]'
    assert compile_document("payload:absent")(MESSAGE) is None


@pytest.mark.parametrize("rule", ["subject", "constant:{}", "header:a", "payload:"])
def test_a_document_comes_from_nowhere_but_the_payload(rule: str) -> None:
    with pytest.raises(ConfigurationError, match="payload"):
        compile_document(rule)
