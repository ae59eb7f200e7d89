"""Messages as the fields of an entry, and what is made of the entries of others."""

from __future__ import annotations

import pytest

from relay import wire
from relay.backends.redis.connection import pack
from relay.backends.redis.entry import Entry, decoded, fields_of
from relay.contracts import Rejected
from relay.message import RelayMessage
from tests.contract.evidence import SERIALIZED_FIELDS, assert_same_message, complete_message


def entry(*fields: bytes) -> Entry:
    return Entry(b"7-1", fields)


def read(found: Entry) -> RelayMessage:
    one = decoded(found, "orders", "payload")
    assert isinstance(one, RelayMessage)
    return one


def refused(found: Entry) -> Rejected:
    one = decoded(found, "orders", "payload")
    assert isinstance(one, Rejected)
    return one


def through(message: RelayMessage, format_: str) -> RelayMessage:
    """The message as it comes back from its fields."""
    body = wire.body_encoder(format_)(message)
    fields = fields_of(message, body, wire.pairs_encoder(format_, wire.FIELD))
    return read(entry(*(one if isinstance(one, bytes) else one.encode() for one in fields)))


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
def test_every_field_survives_every_format(format_: str) -> None:
    sent = complete_message()

    arrived = through(sent, format_)

    carries = SERIALIZED_FIELDS if format_ != "payload" else SERIALIZED_FIELDS - {"subject"}
    assert_same_message(arrived, sent, carries)


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
def test_a_header_with_the_name_of_our_metadata_stays_a_header(format_: str) -> None:
    headers = {"pgt_key": "forged", "pgt_op": "delete", "PGT_FORMAT": "x", "payload": "y", "": "z"}
    sent = RelayMessage(dedup_key="1", payload=b"{}", op="insert", headers=headers)

    arrived = through(sent, format_)

    assert dict(arrived.headers) == headers
    assert (arrived.key, arrived.op) == (None, "insert")


def test_somebody_elses_payload_is_named_by_its_place_and_has_the_other_fields_as_headers() -> None:
    message = read(entry(b"payload", b'{"a":1}', b"source", b"shop", b"payload2", b"\xff"))

    assert message.dedup_key == "redis:orders:7-1"
    assert message.payload == b'{"a":1}'
    assert message.subject == "orders"
    assert message.headers == {"source": "shop", "payload2": "\\xff"}


def test_somebody_elses_dedup_field_names_the_message() -> None:
    message = read(entry(b"payload", b"{}", b"pgt_dedup_key", b"theirs"))

    assert message.dedup_key == "theirs"
    assert not message.headers


def test_an_entry_without_a_payload_is_one_object_of_its_fields() -> None:
    message = read(entry(b"id", b"7", b"status", b'pa"id', b"pgt_dedup_key", b"k"))

    assert message.payload == b'{"id":"7","status":"pa\\"id"}'
    assert message.dedup_key == "k"


def test_what_is_not_text_or_not_json_is_refused_with_what_it_holds() -> None:
    binary = refused(entry(b"id", b"\xff"))
    broken = refused(entry(b"payload", b"{"))

    assert b"\\\\xff" in binary.message.payload
    assert broken.message.payload == b"{"


@pytest.mark.parametrize(
    "fields",
    [
        (b"pgt_format", b"envelope"),
        (b"pgt_format", b"envelope", b"payload", b"{}"),
        (b"pgt_format", b"payload", b"payload", b"{}"),
        (b"pgt_format", b"later", b"payload", b"{}"),
    ],
)
def test_what_bears_our_mark_and_is_not_ours_is_refused(fields: tuple[bytes, ...]) -> None:
    assert refused(entry(*fields)).message.dedup_key == "redis:orders:7-1"


def test_a_stream_made_again_gives_its_entries_other_names() -> None:
    one = decoded(entry(b"payload", b"{}"), "orders", "payload", "0a1b2c3d")
    gone = decoded(Entry(b"7-1", None), "orders", "payload", "0a1b2c3d")

    assert isinstance(one, RelayMessage)
    assert isinstance(gone, Rejected)
    assert {one.dedup_key, gone.message.dedup_key} == {"redis:orders:0a1b2c3d:7-1"}


def test_an_entry_that_was_removed_is_refused_by_name() -> None:
    gone = refused(Entry(b"7-1", None))

    assert gone.message.dedup_key == "redis:orders:7-1"
    assert "7-1" in str(gone.error)


def test_a_command_is_packed_by_the_length_of_its_bytes() -> None:
    assert pack("ä".encode(), b"") == b"*2\r\n$2\r\n\xc3\xa4\r\n$0\r\n\r\n"
