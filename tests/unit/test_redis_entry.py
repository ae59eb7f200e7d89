"""Messages as the fields of an entry, and what is made of the entries of others."""

from __future__ import annotations

import pytest

from relay import wire
from relay.backends.redis.connection import pack
from relay.backends.redis.entry import Entry, Limits, decoded, packed_fields
from relay.contracts import Rejected
from relay.errors import MessageTooLarge, MessageUndecodable
from relay.message import RelayMessage
from tests.contract.evidence import SERIALIZED_FIELDS, assert_same_message, complete_message

LIMITS = Limits(1000, 500)


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
    """The message as it comes back from the fields it was packed into."""
    count, packed = packed_fields(message, wire.encoder(format_, wire.FIELD), Limits(10**6, 10**6))
    fields: list[bytes] = []
    while packed:
        size, _, rest = packed[1:].partition(b"\r\n")
        fields.append(rest[: int(size)])
        packed = rest[int(size) + 2 :]
    assert len(fields) == count
    return read(entry(*fields))


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


def test_an_entry_above_a_limit_is_refused_and_the_limit_named() -> None:
    encode = wire.encoder("payload", wire.FIELD)
    for size, limit in ((1000, "1000"), (600, "500")):
        message = RelayMessage(dedup_key="1", payload=b'"%s"' % (b"x" * size))
        with pytest.raises(MessageTooLarge, match=limit):
            packed_fields(message, encode, LIMITS)


def test_text_without_a_utf8_form_is_refused() -> None:
    message = RelayMessage(dedup_key="1", payload=b"{}", headers={"x": "\ud800"})

    with pytest.raises(MessageUndecodable):
        packed_fields(message, wire.encoder("payload", wire.FIELD), LIMITS)


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


def test_an_entry_that_was_removed_is_refused_by_name() -> None:
    gone = refused(Entry(b"7-1", None))

    assert gone.message.dedup_key == "redis:orders:7-1"
    assert "7-1" in str(gone.error)


def test_a_command_is_packed_by_the_length_of_its_bytes() -> None:
    assert pack("ä".encode(), b"") == b"*2\r\n$2\r\n\xc3\xa4\r\n$0\r\n\r\n"
