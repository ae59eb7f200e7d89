"""Headers of the NATS backend: anything travels, nothing is injected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import wire
from relay.backends.nats import NatsSink
from relay.backends.nats import headers as wire_headers
from relay.escape import headers_from
from relay.message import Op, RelayMessage
from tests.contract.surroundings import backend_context


@given(st.dictionaries(st.text(), st.text(), max_size=5), st.text())
def test_any_header_comes_back_as_it_was(headers: dict[str, str], message_id: str) -> None:
    block = wire_headers.encode(headers, message_id=message_id)

    on_the_wire = wire_headers.parse(block)
    on_the_wire.pop(wire_headers.MESSAGE_ID)
    assert headers_from(on_the_wire) == headers


@given(st.dictionaries(st.text(), st.text(), max_size=5), st.text())
def test_a_block_has_one_line_for_each_header_whatever_is_in_it(
    headers: dict[str, str], message_id: str
) -> None:
    block = wire_headers.encode(headers, message_id=message_id)

    assert block.count(b"\r\n") == len(headers) + 3
    assert block.count(b"\n") == block.count(b"\r") == len(headers) + 3


def test_ordinary_headers_are_written_as_they_are() -> None:
    block = wire_headers.encode(
        {"traceparent": "00-ab-cd-01", "Note": "50 % ä"}, message_id="o:1:0"
    )

    assert block.decode() == (
        "NATS/1.0\r\nNats-Msg-Id: o:1:0\r\ntraceparent: 00-ab-cd-01\r\nNote: 50 % ä\r\n\r\n"
    )


def test_an_order_to_the_server_is_not_a_publishers_to_give() -> None:
    block = wire_headers.encode({"Nats-Rollup": "all", "nats-ttl": "1s"}, message_id="o:1:0")

    assert b"\r\nNats-Rollup" not in block
    assert b"%4Eats-Rollup: all" in block
    assert b"%6Eats-ttl: 1s" in block


def test_a_text_with_line_breaks_is_written_as_rfc_8187_says() -> None:
    block = wire_headers.encode({"note": "a\r\nNats-Rollup: all"}, message_id="o:1:0")

    assert b"note*: UTF-8''a%0D%0ANats-Rollup%3A%20all\r\n" in block


def test_two_message_ids_that_differ_only_in_line_breaks_stay_different() -> None:
    first = wire_headers.encode({}, message_id="a\nb")
    second = wire_headers.encode({}, message_id="a\rb")

    assert first != second


def test_what_the_server_says_is_told_from_headers() -> None:
    assert wire_headers.parse(b"NATS/1.0 503\r\n\r\n") == {"Status": "503", "Description": ""}
    assert wire_headers.parse(b"NATS/1.0 409 Consumer Deleted\r\nA: b\r\n\r\n") == {
        "Status": "409",
        "Description": "Consumer Deleted",
        "A": "b",
    }
    assert wire_headers.parse(b"NATS/1.0\r\nA: 503\r\n\r\n") == {"A": "503"}


@pytest.mark.parametrize("block", [b"NATS/1.0", b"NATS/1.0 ", b"XXXX", b"NATS/1.0 \xff", b"\xff"])
def test_a_block_that_is_none_has_no_headers(block: bytes) -> None:
    assert wire_headers.parse(block) == {}


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
@given(
    dedup_keys=st.lists(st.text(), min_size=1, max_size=4),
    op=st.sampled_from(["insert", "event"]),
    is_full_refresh=st.booleans(),
    headers=st.dictionaries(st.text(), st.text(), max_size=1),
)
def test_a_block_that_is_made_from_a_remembered_one_is_no_different(
    format_: str, dedup_keys: list[str], op: Op, is_full_refresh: bool, headers: dict[str, str]
) -> None:
    options = {"type": "nats", "url": "nats://localhost", "stream": "here", "format": format_}
    sink = NatsSink.from_options(options, backend_context())
    headers_of = wire.headers_encoder(format_, wire.TITLE)

    for dedup_key in dedup_keys:
        message = RelayMessage(
            dedup_key=dedup_key,
            op=op,
            is_full_refresh=is_full_refresh,
            headers=headers,
            payload=b"1",
        )
        block = sink._block(message, 1, max_payload=2**20)
        assert block == wire_headers.encode(
            headers_of(message),
            message_id=dedup_key,
            fixed=f"{wire_headers.EXPECTED_STREAM}: here\r\n",
        )
