"""Headers of any name and text travel over HTTP and back, and none of them steers the request."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.backends.webhook.header import (
    RESERVED,
    batch_key,
    encode,
    idempotency_key,
    without,
)
from relay.escape import headers_from

AWKWARD = {
    "plain": "text",
    "Content-Length": "7",
    "host": "evil.example",
    "Authorization": "Bearer theirs",
    "with space and: colon": "x",
    "emoji 🦊": "🦊\r\n☃",
    "edges": "  both  ",
    "star*": "UTF-8''%41",
    "100%": "50 %",
    "empty": "",
    "": "nameless",
    "lone": "\ud800",
}


def over_the_wire(headers: dict[str, str]) -> dict[str, str]:
    """The headers through a parser of HTTP."""
    sender, receiver = h11.Connection(h11.CLIENT), h11.Connection(h11.SERVER)
    request = h11.Request(
        method="POST", target="/", headers=[(b"Host", b"localhost"), *encode(headers)]
    )
    sent = sender.send(request)
    assert sent is not None
    receiver.receive_data(sent)
    arrived = receiver.next_event()
    assert isinstance(arrived, h11.Request)
    raw = {name.decode(): value.decode() for name, value in arrived.headers.raw_items()}
    return headers_from(without(raw, RESERVED))


def test_any_name_and_any_text_come_back_as_they_were() -> None:
    assert over_the_wire(AWKWARD) == AWKWARD


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=5))
def test_whatever_a_publisher_attaches_comes_back(headers: dict[str, str]) -> None:
    if len({name.lower() for name in headers}) == len(headers):
        assert over_the_wire(headers) == headers


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_no_header_of_a_publisher_steers_the_request(name: str) -> None:
    ((on_the_wire, _),) = encode({name.title(): "x"})

    assert on_the_wire.decode().lower() not in RESERVED


def test_an_idempotency_key_is_the_dedup_key_where_a_header_can_hold_it() -> None:
    assert idempotency_key("orders:7:0") == "orders:7:0"
    for awkward in ("Ä:7:0", "x" * 300, "", " a", "a\nb", "\ud800"):
        assert idempotency_key(awkward).startswith("sha256-")
        assert len(idempotency_key(awkward)) < 100


def test_a_batch_key_depends_on_all_of_its_messages_and_their_order() -> None:
    keys = [["a", "b"], ["b", "a"], ["a"], ["ab"], ["a", "b", "c"], ["a", "bc"]]

    assert len({batch_key(one) for one in keys}) == len(keys)
    assert batch_key(["a", "b"]) == batch_key(iter(["a", "b"]))
