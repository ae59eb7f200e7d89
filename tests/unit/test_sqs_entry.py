"""Messages as SQS carries them: attributes, what does not fit, and what others send."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from relay.backends.sqs.entry import (
    MORE,
    SUBJECT,
    Attribute,
    Entry,
    Received,
    check_size,
    decoded,
    entry_maker,
)
from relay.contracts import Rejected
from relay.errors import ConfigurationError, MessageTooLarge, MessageUndecodable
from relay.message import RelayMessage
from relay.wire import CONTENT_TYPES
from tests.contract.evidence import assert_same_message, complete_message

FORMATS = pytest.mark.parametrize("format_", sorted(CONTENT_TYPES))


def received(body: str, attributes: dict[str, str] | None = None, **system: str) -> Received:
    return Received(
        MessageId="id-1",
        ReceiptHandle="handle-1",
        Body=body,
        Attributes=system,
        MessageAttributes={
            name: Attribute(DataType="String", StringValue=text)
            for name, text in (attributes or {}).items()
        },
    )


def arrived(entry: Entry) -> RelayMessage:
    one = decoded(
        Received(
            MessageId="id-1",
            ReceiptHandle="handle-1",
            Body=entry.body,
            MessageAttributes=dict(entry.attributes),
        ),
        "orders",
    )
    assert isinstance(one, RelayMessage)
    return one


def texts(entry: Entry) -> dict[str, str]:
    return {name: attribute["StringValue"] for name, attribute in entry.attributes.items()}


@FORMATS
@pytest.mark.parametrize("count", [0, 1, 5, 30])
def test_every_field_and_any_number_of_headers_come_back(format_: str, count: int) -> None:
    headers = {f"header-{number}": f"value {number}" for number in range(count)}
    sent = msgspec.structs.replace(complete_message(), headers=headers)

    entry = entry_maker(format_)(sent)

    assert len(entry.attributes) <= 10
    assert_same_message(arrived(entry), sent)


@FORMATS
def test_texts_and_names_that_are_no_attributes_come_back(format_: str) -> None:
    headers = {
        "a b": "space",
        "🦊": "☃",
        "": "nameless",
        "empty": "",
        "control": "a\x00\x1f\ufffe",
        ".dot": "x",
        "a..b": "x",
        "AWS.own": "x",
        "n" * 300: "long",
        "Pgtrickle-Op": "theirs",
        "pgtrickle-more": "theirs",
    }
    sent = RelayMessage(
        dedup_key="a\x01", key="", op="delete", payload=b"{}", subject="s\x02", headers=headers
    )

    entry = entry_maker(format_)(sent)

    for name, text in texts(entry).items():
        assert name.isascii()
        assert text
        assert not any(ord(one) < 32 or one == "\ufffe" for one in text)
    back = arrived(entry)
    assert_same_message(back, sent)


def test_headers_are_attributes_of_their_own_as_long_as_there_is_room() -> None:
    message = RelayMessage(
        dedup_key="1", op="insert", payload=b"{}", subject="s", headers={"traceparent": "00-4b"}
    )

    found = texts(entry_maker("payload")(message))

    assert found["traceparent"] == "00-4b"
    assert found["Pgtrickle-Dedup-Key"] == "1"
    assert found[SUBJECT] == "s"
    assert MORE not in found


def test_an_envelope_repeats_nothing_that_does_not_fit() -> None:
    message = RelayMessage(
        dedup_key="1", payload=b"{}", headers={f"h{number}": "v" for number in range(20)} | {"": ""}
    )

    entry = entry_maker("envelope")(message)

    assert len(entry.attributes) == 10
    assert MORE not in entry.attributes


def test_the_size_is_that_of_body_and_attributes() -> None:
    entry = entry_maker("payload")(RelayMessage(dedup_key="ä", payload='{"a":"ä"}'.encode()))
    expected = len(entry.body.encode()) + sum(
        len(name) + len("String") + len(text.encode()) for name, text in texts(entry).items()
    )

    assert entry.size == expected
    assert check_size(entry, expected, "the queue allows") is entry
    with pytest.raises(MessageTooLarge, match=f"the queue allows {expected - 1} bytes"):
        check_size(entry, expected - 1, "the queue allows")


@pytest.mark.parametrize(
    "payload, words",
    [
        (b"", "empty"),
        (b'{"a":"\x00"}', r"U\+0000"),
        ("\uffff".encode(), r"U\+FFFF"),
        (b'{"a":"\xff"}', "not Unicode"),
    ],
)
def test_a_body_that_sqs_does_not_take_is_refused_before_sending(
    payload: bytes, words: str
) -> None:
    with pytest.raises(MessageUndecodable, match=words) as caught:
        entry_maker("payload")(RelayMessage(dedup_key="1", payload=payload))
    assert caught.value.found_before_sending


@FORMATS
def test_a_character_that_xml_lacks_is_escaped_in_json(format_: str) -> None:
    sent = RelayMessage(dedup_key="1", payload='{"a":"\ufffe\uffff"}'.encode(), subject="s")

    entry = entry_maker(format_)(sent)

    assert "\\ufffe\\uffff" in entry.body
    assert_same_message(arrived(entry), sent)


@FORMATS
def test_a_lone_surrogate_is_refused(format_: str) -> None:
    for message in (
        RelayMessage(dedup_key="a\ud800", payload=b"{}"),
        RelayMessage(dedup_key="1", payload=b"{}", headers={"h": "a\ud800"}),
    ):
        with pytest.raises(MessageUndecodable):
            entry_maker(format_)(message)


def test_an_unknown_format_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="unknown format"):
        entry_maker("xml")


def test_a_message_of_others_is_a_payload_with_its_attributes_and_its_group() -> None:
    one = decoded(
        received('{"a":1}', {"kind": "x"}, MessageGroupId="g", AWSTraceHeader="Root=1"), "orders"
    )

    assert isinstance(one, RelayMessage)
    assert (one.payload, one.key, one.subject, one.op) == (b'{"a":1}', "g", "orders", "event")
    assert dict(one.headers) == {"kind": "x", "AWSTraceHeader": "Root=1"}
    assert one.token == "handle-1"


def test_a_binary_attribute_comes_as_base64() -> None:
    message = received("{}")
    message["MessageAttributes"] = {"b": Attribute(DataType="Binary", BinaryValue=b"\xff")}

    one = decoded(message, "orders")

    assert isinstance(one, RelayMessage)
    assert one.headers["b"] == "/w=="


@pytest.mark.parametrize(
    "attributes, system, by_group, expected",
    [
        ({"Pgtrickle-Dedup-Key": "ours"}, {"MessageDeduplicationId": "d"}, False, "ours"),
        ({}, {"MessageDeduplicationId": "d", "MessageGroupId": "g"}, False, "d"),
        ({}, {"MessageDeduplicationId": "d", "MessageGroupId": "g"}, True, "g:d"),
        ({}, {"MessageDeduplicationId": hashlib.sha256(b"{}").hexdigest()}, False, "id-1"),
        ({}, {}, False, "id-1"),
    ],
)
def test_the_dedup_key_of_a_message_of_others(
    attributes: dict[str, str], system: dict[str, str], *, by_group: bool, expected: str
) -> None:
    one = decoded(received("{}", attributes, **system), "orders", is_dedup_by_group=by_group)

    assert isinstance(one, RelayMessage)
    assert one.dedup_key == expected


@pytest.mark.parametrize(
    "message",
    [
        received("hello"),
        received("{}", {"Pgtrickle-Format": "envelope", "Pgtrickle-Dedup-Key": "k"}),
        received("{}", {"Pgtrickle-Format": "payload"}),
        received("{}", {"Pgtrickle-Format": "later", "Pgtrickle-Dedup-Key": "k"}),
        received("{}", {"Pgtrickle-Format": "payload", MORE: "[]", "Pgtrickle-Dedup-Key": "k"}),
    ],
)
def test_what_is_not_what_it_says_is_refused_with_its_body(message: Received) -> None:
    one = decoded(message, "orders")

    assert isinstance(one, Rejected)
    assert one.message.payload == message["Body"].encode()
    assert one.message.dedup_key in {"k", "id-1"}
    assert one.message.token == "handle-1"
