"""What the options of the inbox sink refuse, and how a message becomes a row."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec
import pytest

from relay.backends.inbox import InboxSink
from relay.backends.inbox.row import LARGEST_JSONB_BYTES, as_column, compile_fields, read_rows
from relay.errors import ConfigurationError, MessageTooLarge, MessageUndecodable, TemplateInvalid
from relay.events import Direction
from relay.message import RelayMessage
from tests.contract.surroundings import backend_context

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def sink(options: Mapping[str, object], direction: Direction = "forward") -> InboxSink:
    return InboxSink.from_options(
        {"type": "pg-inbox", **options}, backend_context(direction=direction)
    )


@pytest.mark.parametrize(
    "options,said",
    [
        ({}, "needs inbox or inbox_table"),
        ({"inbox": "a", "inbox_table": "b"}, "has both inbox and inbox_table"),
        ({"inbox": "a", "url": " "}, "sink.url is empty"),
        ({"inbox": "a", "sslmode": "require"}, "sslmode needs url"),
        ({"inbox": "a", "sslrootcert": "/ca.pem"}, "sslrootcert needs url"),
        ({"inbox": "a", "url": "postgresql://h", "sslmode": "sometimes"}, "sink.sslmode"),
        ({"inbox": "a", "inbx_table": "b"}, "did you mean inbox_table"),
        ({"inbox": "a", "columns": {"event_idd": "subject"}}, "did you mean event_id"),
        ({"inbox": "a", "columns": {"trace_id": "trace"}}, "columns.trace_id: 'trace'"),
        ({"inbox": "a", "columns": {"payload": "subject"}}, "columns.payload: 'subject'"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_words(
    options: Mapping[str, object], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        sink(options)


def test_the_columns_of_the_pipeline_are_refused_like_those_of_the_sink() -> None:
    for columns in ({"nothing": "subject"}, ["subject"]):
        context = msgspec.structs.replace(backend_context(), pipeline_options={"columns": columns})
        with pytest.raises(ConfigurationError, match="columns"):
            InboxSink.from_options({"type": "pg-inbox", "inbox": "a"}, context)


@pytest.mark.shows("sink:pg-inbox.subject_template", "sink:pg-inbox.routing")
def test_forward_the_event_type_follows_template_and_routing() -> None:
    made = sink(
        {"inbox": "a", "subject_template": "{stream_table}", "routing": {"delete": "gone.{key}"}}
    )
    message = RelayMessage(dedup_key="1", payload=b"{}", key="7", stream_table="orders")

    assert made.subject_of(message) == "orders"
    assert made.subject_of(msgspec.structs.replace(message, op="delete")) == "gone.7"


def test_reverse_the_event_type_is_the_subject_as_it_came() -> None:
    message = RelayMessage(dedup_key="1", payload=b"{}", subject="a.b")

    assert sink({"inbox": "a"}, "reverse").subject_of(message) == "a.b"


@pytest.mark.parametrize("key,value", [("subject_template", "x"), ("routing", {"insert": "x"})])
def test_reverse_a_template_is_refused_for_event_type_from(key: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match="event_type_from"):
        sink({"inbox": "a", key: value}, "reverse")


@pytest.mark.shows("error:TemplateInvalid")
def test_a_template_with_an_unknown_variable_is_refused() -> None:
    with pytest.raises(TemplateInvalid, match="stream_tabel"):
        sink({"inbox": "a", "subject_template": "{stream_tabel}"})


def test_the_headers_hold_our_metadata_and_the_publishers_headers() -> None:
    read = compile_fields({}, source=None, pipeline="p")["headers"]
    message = RelayMessage(
        dedup_key="1",
        payload=b"{}",
        op="upsert",
        is_full_refresh=True,
        stream_table="orders",
        key="7",
        outbox_id=9,
        refresh_id="r",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        headers={"tenant": "acme", "op": "theirs"},
    )

    assert msgspec.json.decode(read(message) or b"") == {
        "op": "upsert",
        "is_full_refresh": True,
        "stream_table": "orders",
        "key": "7",
        "outbox_id": 9,
        "refresh_id": "r",
        "created_at": "2026-01-02T00:00:00Z",
        "tenant": "acme",
    }


@pytest.mark.parametrize(
    "headers,expected",
    [
        ({}, None),
        ({"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}, TRACE_ID),
        ({"Traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "trace_id": "other"}, TRACE_ID),
        ({"traceparent": "broken", "Trace_Id": "mine"}, "mine"),
        ({"traceparent": "broken"}, None),
    ],
)
def test_the_trace_id_comes_from_traceparent_or_from_the_trace_id_header(
    headers: dict[str, str], expected: str | None
) -> None:
    read = compile_fields({}, source=None, pipeline="p")["trace_id"]

    assert read(RelayMessage(dedup_key="1", payload=b"{}", headers=headers)) == expected


def test_the_source_is_the_constant_the_stream_table_or_the_pipeline() -> None:
    bare = RelayMessage(dedup_key="1", payload=b"{}")
    named = msgspec.structs.replace(bare, stream_table="orders")

    assert compile_fields({}, source="shop", pipeline="p")["source"](named) == "shop"
    assert compile_fields({}, source=None, pipeline="p")["source"](named) == "orders"
    assert compile_fields({}, source=None, pipeline="p")["source"](bare) == "p"


@pytest.mark.parametrize("field,rule", [("event_id", "header:id"), ("payload", "payload:data")])
def test_a_message_without_the_mapped_event_id_or_payload_is_refused(field: str, rule: str) -> None:
    read = compile_fields({field: rule}, source=None, pipeline="p")[field]

    with pytest.raises(MessageUndecodable, match=field):
        read(RelayMessage(dedup_key="1", payload=b"{}"))


def test_mapped_headers_that_are_not_there_are_an_empty_object() -> None:
    read = compile_fields({"headers": "payload:meta"}, source=None, pipeline="p")["headers"]

    assert read(RelayMessage(dedup_key="1", payload=b"{}")) == b"{}"


def test_a_message_that_cannot_be_read_fails_alone_and_without_its_content() -> None:
    reads = [
        as_column(name, read, "text")
        for name, read in compile_fields({}, source=None, pipeline="p").items()
    ]
    messages = [
        RelayMessage(dedup_key="1", payload=b"{}"),
        RelayMessage(dedup_key="2", payload=b'"secret\xff"'),
        RelayMessage(dedup_key="3", payload=b"{}", headers={"a": "\ud800"}),
        RelayMessage(dedup_key="4", payload=b"{}"),
    ]

    rows, failures = read_rows(messages, reads)

    assert list(rows.indexes) == [0, 3]
    assert list(rows.columns[0]) == ["1", "4"]
    assert [failure.index for failure in failures] == [1, 2]
    assert all(isinstance(failure.error, MessageUndecodable) for failure in failures)
    assert "secret" not in str(failures[0].error)


def test_a_part_of_rows_has_the_indexes_and_values_of_its_messages() -> None:
    reads = compile_fields({}, source=None, pipeline="p").values()
    messages = [RelayMessage(dedup_key=f"{n}", payload=b"{}") for n in range(5)]

    rows, failures = read_rows(messages, list(reads))
    part = rows.part(1, 3)

    assert (len(rows), len(part), failures) == (5, 2, [])
    assert list(part.indexes) == [1, 2]
    assert list(part.columns[0]) == ["1", "2"]


def test_bytes_reach_a_bytea_column_as_they_are() -> None:
    read = as_column("payload", lambda message: message.payload, "bytea")

    assert read(RelayMessage(dedup_key="1", payload=b"\xff\x00")) == b"\xff\x00"


def test_a_payload_beyond_what_jsonb_holds_is_refused_and_the_limit_named() -> None:
    read = as_column("payload", lambda message: message.payload, "jsonb")

    with pytest.raises(MessageTooLarge, match=str(LARGEST_JSONB_BYTES)):
        read(RelayMessage(dedup_key="1", payload=bytes(LARGEST_JSONB_BYTES + 1)))
