"""Messages as AMQP has them, and the frames that the client is given to read."""

from __future__ import annotations

import asyncio
import struct
from datetime import UTC, datetime
from unittest.mock import Mock

import pytest
from aiormq.abc import DeliveredMessage
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, header
from pamqp import frame as codec
from pamqp.common import FieldTable

from relay.backends.rabbitmq import transport
from relay.backends.rabbitmq.content import Encoder, decoded
from relay.backends.rabbitmq.errors import Unreadable
from relay.backends.rabbitmq.transport import UNREADABLE, Frames
from relay.contracts import Rejected
from relay.errors import MessageRejected, MessageTooLarge
from relay.message import RelayMessage
from tests.contract.evidence import assert_same_message, complete_message

FRAME_MAX = 131072
BOUND_S = 30


def delivered(body: bytes, properties: commands.Basic.Properties) -> DeliveredMessage:
    """The message as the client hands it on, after a journey over the wire."""
    raw = codec.marshal(header.ContentHeader(0, len(body), properties), 1)
    _, _, head = codec.unmarshal(raw)
    assert isinstance(head, header.ContentHeader)
    return DeliveredMessage(
        commands.Basic.Deliver("tag", 1, False, "e", "x"), head, body, Mock(name="no channel")
    )


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
def test_a_message_comes_back_as_it_was(format_: str) -> None:
    encoder = Encoder(format_, namespace="")  # type: ignore[arg-type]  # one of the three
    for sent in (complete_message(), RelayMessage(dedup_key="ä" * 200, payload=b"{}", subject="x")):
        properties = encoder.properties(sent, FRAME_MAX)

        one = decoded(delivered(encoder.body(sent), properties), "queue")

        assert isinstance(one, RelayMessage)
        expected = {"dedup_key", "payload", "key", "op", "headers", "outbox_id", "created_at"}
        assert_same_message(one, sent, frozenset(expected))
        assert len(properties.message_id or "") <= 255


def test_the_size_of_the_headers_is_never_underestimated() -> None:
    encoder = Encoder("payload", namespace="")
    for sent in (complete_message(), RelayMessage(dedup_key="ä", payload=b"{}")):
        frame = codec.marshal(header.ContentHeader(0, 2, encoder.properties(sent, FRAME_MAX)), 1)

        with pytest.raises(MessageTooLarge):
            encoder.properties(sent, len(frame) - 1)


def test_text_that_is_not_unicode_is_refused() -> None:
    encoder = Encoder("payload", namespace="")
    for broken in (
        RelayMessage(dedup_key="a\ud800", payload=b"{}"),
        RelayMessage(dedup_key="a", payload=b"{}", headers={"x": "\ud800"}),
        RelayMessage(dedup_key="a", payload=b"{}", headers={"\ud800": "x"}),
    ):
        with pytest.raises(MessageRejected):
            encoder.properties(broken, FRAME_MAX)


def test_properties_of_others_are_read_with_every_type_of_value() -> None:
    at = datetime(2025, 3, 30, 2, 30, 15, tzinfo=UTC)
    table: FieldTable = {
        "n": 1,
        "t": True,
        "d": at,
        "list": [1, {"x": None}],
        "none": None,
        "s": "ä",
        "type": "own",
    }
    properties = commands.Basic.Properties(
        content_type="text/json",
        content_encoding="gzip",
        headers=table,
        delivery_mode=1,
        priority=3,
        correlation_id="c",
        reply_to="r",
        expiration="100",
        message_id="m",
        timestamp=at,
        message_type="kind",
        user_id="u",
        app_id="a",
    )

    found = decoded(delivered(b"{}", properties), "queue")

    assert isinstance(found, RelayMessage)
    assert (found.dedup_key, found.created_at) == ("m", at)
    assert dict(found.headers) == {
        "n": "1",
        "t": "true",
        "d": '"2025-03-30T02:30:15Z"',
        "list": '[1,{"x":null}]',
        "s": "ä",
        "type": "own",
        "content-encoding": "gzip",
        "correlation-id": "c",
        "reply-to": "r",
        "expiration": "100",
        "user-id": "u",
        "app-id": "a",
    }


async def read(data: bytes, *, is_careful: bool = True) -> bytes:
    """What the client is given of it, asked for as the client does."""
    frames = Frames(is_careful=is_careful)
    frames.feed_data(data)
    frames.feed_eof()
    head = await frames.readexactly(1) + await frames.readexactly(6)
    return head + await frames.readexactly(int.from_bytes(head[3:], "big") + 1)


@given(st.binary(max_size=60))
async def test_broken_properties_cost_only_their_message(raw: bytes) -> None:
    payload = struct.pack(">HHQ", 60, 0, 2) + raw
    frame = struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"

    _, channel, head = codec.unmarshal(await read(frame))

    assert isinstance(head, header.ContentHeader)
    assert (channel, head.body_size) == (1, 2)
    one = decoded(DeliveredMessage(Mock(routing_key="x"), head, b"{}", Mock()), "queue")
    assert isinstance(one, RelayMessage | Rejected)


async def test_a_name_that_is_not_utf_8_costs_only_its_message() -> None:
    frame = codec.marshal(commands.Basic.Deliver("tag", 7, True, "exchange", "k.."), 1)

    _, _, method = codec.unmarshal(await read(frame.replace(b"k..", b"k\xff.")))

    assert isinstance(method, commands.Basic.Deliver)
    assert (method.consumer_tag, method.delivery_tag, method.redelivered) == ("tag", 7, True)
    assert method.routing_key == UNREADABLE


@pytest.mark.parametrize("is_careful", [False, True])
async def test_what_can_be_read_is_handed_on_as_it_is(*, is_careful: bool) -> None:
    properties = commands.Basic.Properties(headers={"x": "y" * 1000}, message_id="ä")
    frame = codec.marshal(header.ContentHeader(0, 2, properties), 1)

    assert await read(frame, is_careful=is_careful) == frame


async def test_while_it_is_held_only_heartbeats_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_BEAT_S", 0.01)
    frame = codec.marshal(commands.Basic.Ack(1, multiple=False), 1)
    frames = Frames(is_careful=False)
    frames.feed_data(frame)

    frames.hold(is_held=True)
    held = [await frames.readexactly(8) for _ in range(3)]
    frames.hold(is_held=False)

    assert held == [b"\x08\x00\x00\x00\x00\x00\x00\xce"] * 3
    async with asyncio.timeout(BOUND_S):
        assert await frames.readexactly(len(frame)) == frame


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad Request\r\n", b"AMQP\x00\x01\x00\x00"])
async def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(Unreadable):
        await read(data)
