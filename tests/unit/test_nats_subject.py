"""Subjects of the NATS backend: escaping, checking, filters."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.backends.nats.subject import (
    MAX_SUBJECT_BYTES,
    check_subject,
    check_template,
    covering,
    escape,
    filter_of,
)
from relay.errors import MessageTooLarge, NameInvalid, TemplateInvalid


@given(st.text())
def test_a_value_is_always_exactly_one_token(value: str) -> None:
    escaped = escape(value)

    assert "." not in escaped
    assert escaped not in ("", "*", ">")
    if len(escaped.encode()) < MAX_SUBJECT_BYTES:
        assert check_subject(f"a.{escaped}.b") == f"a.{escaped}.b"


@given(st.text())
def test_escaping_can_be_undone(value: str) -> None:
    escaped = escape(value)

    assert ("" if escaped == "_" else unquote(escaped, errors="surrogatepass")) == value


@pytest.mark.parametrize(
    "value, escaped",
    [
        ("orders", "orders"),
        ("Order lines", "Order%20lines"),
        ("a.b", "a%2Eb"),
        ("*", "%2A"),
        (">", "%3E"),
        ("50%", "50%25"),
        ("$JS", "%24JS"),
        ("a\r\nPUB b 0", "a%0D%0APUB%20b%200"),
        ("ä☃", "ä☃"),
        ("", "_"),
        ("_", "%5F"),
    ],
)
def test_values_are_escaped_as_documented(value: str, escaped: str) -> None:
    assert escape(value) == escaped


@pytest.mark.shows("error:NameInvalid")
@pytest.mark.parametrize(
    "subject", ["", "a..b", ".a", "a.", "a b", "a.*", "a.>.b", "a\r\nPUB b", "a\tb", "a\x00"]
)
def test_what_nats_refuses_as_a_subject_is_refused_before_sending(subject: str) -> None:
    with pytest.raises(NameInvalid) as caught:
        check_subject(subject)

    assert caught.value.found_before_sending


def test_a_subject_longer_than_a_control_line_allows_names_the_limit() -> None:
    with pytest.raises(MessageTooLarge, match=str(MAX_SUBJECT_BYTES)):
        check_subject("a" * (MAX_SUBJECT_BYTES + 1))


@pytest.mark.parametrize("template", ["", "a..{op}", "a.*", "a {op}", "{op}.>"])
def test_a_template_that_can_only_make_invalid_subjects_is_refused(template: str) -> None:
    with pytest.raises(TemplateInvalid):
        check_template(template)


def test_a_filter_has_a_wildcard_for_each_token_with_a_variable() -> None:
    assert filter_of("pgtrickle.{stream_table}.x-{op}.end") == "pgtrickle.*.*.end"


def test_a_created_stream_covers_every_template_once() -> None:
    templates = ("pgtrickle.{stream_table}.{op}", "pgtrickle.special.{op}", "audit.deletes")

    assert covering(templates) == ["pgtrickle.>", "audit.deletes"]


def test_a_template_that_begins_with_a_variable_has_no_stream_to_create() -> None:
    with pytest.raises(TemplateInvalid, match="create the stream yourself"):
        covering(["{stream_table}.{op}"])
